"""What an upstream says that an answer used, in whatever words and at whatever place it says so."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from typing import Any

from backends.money import NANOUSD_PER_USD
from flaskapp.llm import Usage

_MOST_TOKENS = 10**9
"""More than any model takes; a larger count is rubbish and would only break the books."""
_MOST_USD = 10_000
"""More than any answer costs."""
_TICKS_PER_USD = 10**10
_PLACES = ("usage", "usage_metadata", "usageMetadata")
_INPUT = ("prompttokens", "inputtokens", "prompttokencount", "inputtokencount")
_OUTPUT = ("completiontokens", "outputtokens", "candidatestokencount", "outputtokencount", "generatedtokens")
_TOTAL = ("totaltokens", "totaltokencount")
_INPUT_DETAILS = ("prompttokensdetails", "inputtokensdetails", "prompttokendetails", "inputtokendetails")
_OUTPUT_DETAILS = ("completiontokensdetails", "outputtokensdetails", "completiontokendetails", "outputtokendetails")
# Providers have a dozen names for each of these, and some say the same twice, under two names.
_REASONING = re.compile(r"(reasoning|thinking|thoughts?)(output)?token(s|count)")
_CACHE_WRITE = re.compile(r"(?=.*token)(.*cach.*(creat|writ)|ephemeral)")
_CACHE_READ = re.compile(r"(?!.*(un|non|not|no)_?cach)(?!.*(miss|creat|writ|details))(?=.*token).*cach")
_SEARCHES = re.compile(r"(num)?(web)?search(queries|requests|es|count)")
_COST = ("cost", "totalcost", "costusd", "totalcostusd", "estimatedcost")


def usage_places(body: Mapping[str, Any]) -> tuple[object, dict[int, object]]:
    """What `body` says of the whole answer, and of single choices by their index; None where it says nothing.

    Most say it at the top, some in a field of their own there (``x_groq``), some in a choice.
    """
    places = [body.get(name) for name in _PLACES]
    places += [_object(value).get("usage") for name, value in body.items() if name.startswith("x_")]
    choices = body.get("choices")
    of_choices = {
        _index(choice): choice["usage"]
        for choice in (choices if isinstance(choices, list) else ())
        if isinstance(choice, dict) and choice.get("usage") is not None
    }
    return next((place for place in places if place is not None), None), of_choices


def without_usage(body: Mapping[str, Any]) -> dict[str, Any]:
    """`body` without what it says of its usage, wherever that stands."""
    kept = {name: _without(value) if name.startswith("x_") else value for name, value in body.items()}
    choices = body.get("choices")
    if isinstance(choices, list):
        kept["choices"] = [_without(choice) for choice in choices]
    return {name: value for name, value in kept.items() if name not in _PLACES}


def usage_of(raw: object) -> Usage | None:
    """The usage that `raw` says; None where it says none, or one that cannot be.

    What was thought, and what was read from a cache or written to one, is a part of the output and of the input for
    most providers. Where it is counted beside them, as the total shows or a part that is larger than its whole, it is
    added. A total that is larger than its parts has output in it that is named nowhere: some report thoughts only so.
    """
    counts = _flat(raw)
    inputs, outputs = (_flat(_first(counts, names)) for names in (_INPUT_DETAILS, _OUTPUT_DETAILS))
    total = _count(_first(counts, _TOTAL))
    said_input, said_output = _first(counts, _INPUT), _first(counts, _OUTPUT)
    input_tokens, output_tokens = _count(said_input), _count(said_output)
    if said_input is None and total is not None and output_tokens is not None:
        input_tokens = max(0, total - output_tokens)
    if said_output is None and total is not None and input_tokens is not None:
        output_tokens = max(0, total - input_tokens)
    if input_tokens is None or output_tokens is None:
        return None
    reasoning = _highest(_REASONING, counts, outputs)
    written, written_long = _written(counts, inputs)
    read = _highest(_CACHE_READ, counts, inputs)
    input_tokens += _beside(counts, input_tokens, (output_tokens, output_tokens + reasoning), (read, written), total)
    if reasoning > output_tokens:
        output_tokens += reasoning
    if total is not None:
        output_tokens = max(output_tokens, total - input_tokens)
    return Usage(
        input_tokens,
        output_tokens,
        min(read, input_tokens),
        written,
        reasoning,
        long_cache_write_tokens=written_long,
        text_tokens=_text_tokens(outputs, output_tokens - reasoning),
        searches=_highest(_SEARCHES, counts, inputs, _flat(counts.get("servertooluse"))),
        billed_nanousd=_billed_nanousd(counts),
    )


def later(one: Usage, other: Usage) -> Usage:
    """The second, unless the first has more of anything."""
    if other.input_tokens >= one.input_tokens and other.output_tokens >= one.output_tokens:
        return replace(other, billed_nanousd=max(one.billed_nanousd, other.billed_nanousd))
    # Cached tokens and text are the cheaper ones: there, less is dearer.
    return Usage(
        max(one.input_tokens, other.input_tokens),
        max(one.output_tokens, other.output_tokens),
        min(one.cached_input_tokens, other.cached_input_tokens),
        max(one.cache_write_tokens, other.cache_write_tokens),
        max(one.reasoning_tokens, other.reasoning_tokens),
        long_cache_write_tokens=max(one.long_cache_write_tokens, other.long_cache_write_tokens),
        text_tokens=min(one.text_tokens, other.text_tokens),
        searches=max(one.searches, other.searches),
        billed_nanousd=max(one.billed_nanousd, other.billed_nanousd),
    )


def added(one: Usage, other: Usage) -> Usage:
    """Both together: two parts of one answer to one prompt, which each of them may name."""
    return replace(
        later(one, other),
        output_tokens=one.output_tokens + other.output_tokens,
        reasoning_tokens=one.reasoning_tokens + other.reasoning_tokens,
        text_tokens=one.text_tokens + other.text_tokens,
        searches=one.searches + other.searches,
        billed_nanousd=one.billed_nanousd + other.billed_nanousd,
    )


def with_output(usage: Usage, output_tokens: int) -> Usage:
    """`usage` with so many output tokens where it has less."""
    return usage if usage.output_tokens >= output_tokens else replace(usage, output_tokens=output_tokens)


class ReportedUsages:
    """The usages of one stream: one at its end, one that grows with each chunk, or one of each chunk alone."""

    def __init__(self) -> None:
        self._highest: Usage | None = None
        self._sum: Usage | None = None
        """Of the chunks that have a choice."""
        self._last: Usage | None = None
        self._has_fallen, self._has_grown_each_time = False, True
        self._parts = 0
        """Usages that came with a text."""
        self._summary: Usage | None = None

    def __bool__(self) -> bool:
        return self._highest is not None or self._summary is not None

    def add(self, usage: Usage, *, is_summary: bool, has_text: bool) -> None:
        """Note the usage of a chunk; `is_summary` where the chunk has no choice, `has_text` where it has a text."""
        self._parts += has_text
        if is_summary:
            self._summary = usage if self._summary is None else later(self._summary, usage)
            return
        if self._last is not None:
            self._has_fallen |= usage.output_tokens < self._last.output_tokens
            self._has_grown_each_time &= usage.output_tokens > self._last.output_tokens
        self._last = usage
        self._highest = usage if self._highest is None else later(self._highest, usage)
        self._sum = usage if self._sum is None else added(self._sum, usage)

    def usage(self, seen_tokens: int) -> Usage | None:
        """What was used in all; `seen_tokens` were read."""
        used = self._highest
        if self._highest is not None and self._sum is not None and self._is_each_alone(seen_tokens):
            used = with_output(self._sum, seen_tokens)
        if used is None or self._summary is None:
            return used or self._summary
        return later(used, self._summary)

    def _is_each_alone(self, seen_tokens: int) -> bool:
        """Whether each chunk said what it had itself: then what was read is closer to the sum than to the highest."""
        if self._highest is None or self._sum is None or self._last is None or self._parts <= 1:
            return False
        highest, total, last = self._highest.output_tokens, self._sum.output_tokens, self._last.output_tokens
        # A usage of the whole may follow those of the parts.
        if self._has_fallen and last < total - last:
            return True
        # One that grows each time grows with the whole, unless far more was read.
        is_far_more = not self._has_grown_each_time or 2 * seen_tokens > 3 * highest
        return is_far_more and seen_tokens * seen_tokens > total * highest


def _written(counts: Mapping[str, Any], inputs: Mapping[str, Any]) -> tuple[int, int]:
    """What was written to caches, and the part of it that was written to a longer one."""
    by_duration = [_flat(each.get("cachecreation")) for each in (counts, inputs)]
    longer = _highest(re.compile(r".*cach.*creat.*1h|ephemeral1h"), counts, inputs, *by_duration)
    usual = _highest(re.compile(r".*cach.*creat.*5m|ephemeral5m"), counts, inputs, *by_duration)
    return max(_highest(_CACHE_WRITE, counts, inputs), longer + usual), longer


def _beside(
    counts: Mapping[str, Any], input_tokens: int, outputs: tuple[int, int], cached: tuple[int, int], total: int | None
) -> int:
    """Cached tokens that are counted beside the input and not within it."""
    read, written = cached
    candidates = [tokens for tokens in (read + written, read, written) if tokens]
    for tokens in candidates:
        if total is not None and total - input_tokens - tokens in outputs:
            return tokens
    if total is not None and total - input_tokens in outputs and read + written <= input_tokens:
        return 0
    # Anthropic's own words.
    is_native = "prompttokens" not in counts and bool(
        counts.keys() & {"cachereadinputtokens", "cachecreationinputtokens"}
    )
    return read + written if is_native or read + written > input_tokens else 0


def _text_tokens(outputs: Mapping[str, Any], shown_tokens: int) -> int:
    """What is known to be text, of so many that were not thought."""
    text = _count(outputs.get("texttokens"))
    if text is not None:
        return max(0, min(text, shown_tokens))
    others = [_count(outputs.get(f"{kind}tokens")) for kind in ("image", "video")]
    if all(tokens is None for tokens in others):
        return 0
    return max(0, shown_tokens - sum(tokens or 0 for tokens in others) - (_count(outputs.get("audiotokens")) or 0))


def _billed_nanousd(counts: Mapping[str, Any]) -> int:
    """What the provider itself says that the answer costs; 0 where it does not."""
    cost = _first(counts, _COST)
    if isinstance(cost, dict):
        cost = _first(_flat(cost), _COST)
    usd = _usd(cost)
    # A router may bill its own fee here, and the provider's bill comes to the owner of the key.
    usd += _usd(_flat(counts.get("costdetails")).get("upstreaminferencecost")) if counts.get("isbyok") else 0
    usd = max(usd, _usd(counts.get("costinusdticks")) / _TICKS_PER_USD)
    # Fractions that a float adds are none.
    return math.ceil(round(usd * NANOUSD_PER_USD, 3)) if usd <= _MOST_USD else 0


def _usd(value: object) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return Decimal(0)
    try:
        usd = Decimal(str(value))
    except InvalidOperation:
        return Decimal(0)
    return usd if usd.is_finite() and usd > 0 else Decimal(0)


def _highest(pattern: re.Pattern[str], *counts: Mapping[str, Any]) -> int:
    found = [_count(value) or 0 for each in counts for name, value in each.items() if pattern.match(name)]
    return max(found, default=0)


def _first(counts: Mapping[str, Any], names: Iterable[str]) -> Any:
    return next((counts[name] for name in names if counts.get(name) is not None), None)


def _flat(value: object) -> dict[str, Any]:
    """An object's fields by their names without case and underscores; none where it is no object."""
    return {str(name).lower().replace("_", ""): item for name, item in _object(value).items()}


def _count(value: object) -> int | None:
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < len(str(_MOST_TOKENS)):
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST_TOKENS:
        return None
    return value


def _index(choice: Mapping[str, Any]) -> int:
    index = choice.get("index", 0)
    return index if isinstance(index, int) else 0


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _without(value: object) -> object:
    return {name: item for name, item in value.items() if name != "usage"} if isinstance(value, dict) else value
