"""What an upstream says that an answer used, in whatever words and at whatever place it says so."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from functools import lru_cache
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
_KINDS = {
    "reasoning": re.compile(r"(reasoning|thinking|thoughts?)(output)?token(s|count)"),
    "cache write": re.compile(r"(?=.*token)(.*cach.*(creat|writ)|ephemeral)"),
    "longer cache write": re.compile(r".*cach.*creat.*1h|ephemeral1h"),
    "usual cache write": re.compile(r".*cach.*creat.*5m|ephemeral5m"),
    "cache read": re.compile(r"(?!.*(un|non|not|no)_?cach)(?!.*(miss|creat|writ|details))(?=.*token).*cach"),
    "searches": re.compile(r"(num)?(web)?search(queries|requests|es|count)"),
}
_BY_DURATION = {"longer cache write", "usual cache write"}
_OF_INPUT = _KINDS.keys() - {"reasoning"}
_MOST_NAME_CHARACTERS = 128
"""Longer than the name of any count."""
_COST = ("cost", "totalcost", "costusd", "totalcostusd", "estimatedcost")
_BILLS = {*_COST, "isbyok", "costinusdticks"}


def usage_places(body: Mapping[str, Any]) -> tuple[object, dict[int, object]]:
    """What `body` says of the whole answer, and of single choices by their index; None where it says nothing.

    Most say it at the top, some in a field of their own there (``x_groq``), some in a choice.
    """
    said = _first(body, _PLACES)
    if said is None:
        own = [_object(value).get("usage") for name, value in body.items() if name.startswith("x_")]
        said = next((usage for usage in own if usage is not None), None)
    choices, of_choices = body.get("choices"), {}
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict) and choice.get("usage") is not None:
            of_choices[_index(choice)] = choice["usage"]
    return said, of_choices


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
    inputs, outputs = _flat(_first(counts, _INPUT_DETAILS)), _flat(_first(counts, _OUTPUT_DETAILS))
    total = _count(_first(counts, _TOTAL))
    said_input, said_output = _first(counts, _INPUT), _first(counts, _OUTPUT)
    input_tokens, output_tokens = _count(said_input), _count(said_output)
    if said_input is None and total is not None and output_tokens is not None:
        input_tokens = max(0, total - output_tokens)
    if said_output is None and total is not None and input_tokens is not None:
        output_tokens = max(0, total - input_tokens)
    if input_tokens is None or output_tokens is None:
        return None
    most = _most_of_each_kind(counts, inputs, outputs)
    reasoning, read, written_long = most["reasoning"], most["cache read"], most["longer cache write"]
    written = max(most["cache write"], written_long + most["usual cache write"])
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
        searches=most["searches"],
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
    if not outputs:
        return 0
    text = _count(outputs.get("texttokens"))
    if text is not None:
        return max(0, min(text, shown_tokens))
    others = [_count(outputs.get(f"{kind}tokens")) for kind in ("image", "video")]
    if all(tokens is None for tokens in others):
        return 0
    return max(0, shown_tokens - sum(tokens or 0 for tokens in others) - (_count(outputs.get("audiotokens")) or 0))


def _billed_nanousd(counts: Mapping[str, Any]) -> int:
    """What the provider itself says that the answer costs; 0 where it does not."""
    if _BILLS.isdisjoint(counts):
        return 0
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


def _most_of_each_kind(
    counts: Mapping[str, Any], inputs: Mapping[str, Any], outputs: Mapping[str, Any]
) -> dict[str, int]:
    """The highest count of each of `_KINDS`, at all places where one may stand."""
    places = [(counts, _KINDS.keys()), (inputs, _OF_INPUT), (outputs, {"reasoning"})]
    places += [(_flat(each["cachecreation"]), _BY_DURATION) for each in (counts, inputs) if "cachecreation" in each]
    if "servertooluse" in counts:
        places.append((_flat(counts["servertooluse"]), {"searches"}))
    most = dict.fromkeys(_KINDS, 0)
    for place, kinds in places:
        for name, value in place.items():
            for kind in kinds & _kinds_of(name):
                most[kind] = max(most[kind], _count(value) or 0)
    return most


@lru_cache(maxsize=1_024)
def _kinds_of(name: str) -> frozenset[str]:
    """What a count of this name counts: it is asked of each name, in each usage."""
    return frozenset(kind for kind, pattern in _KINDS.items() if pattern.match(name))


def _first(counts: Mapping[str, Any], names: Iterable[str]) -> Any:
    for name in names:
        value = counts.get(name)
        if value is not None:
            return value
    return None


def _flat(value: object) -> dict[str, Any]:
    """An object's fields by their names without case and underscores; none where it is no object."""
    fields = _object(value)
    return {name.lower().replace("_", ""): item for name, item in fields.items() if len(name) <= _MOST_NAME_CHARACTERS}


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
