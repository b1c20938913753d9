"""What an OpenAI-compatible server streams, event by event: the text to show, and the usage as far as it is known."""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NoReturn

import orjson

from flaskapp.llm import BETWEEN, Piece, Usage
from flaskapp.llm.event_stream import ServerEvent

_MOST_TOKENS = 10**9
"""More than any model takes; a larger count is rubbish and would only break the books."""
_MOST_DEPTH = 64
"""Lists and objects in each other. Answers have less than ten levels; deeper ones would only break their readers."""


class ErrorEvent(Exception):
    """The server reports, in the middle of its answer, that it failed."""


class NotACompletion(ValueError):
    """The server sent something else."""


class Completion:
    """The state of one streamed completion. Reads `choices[0].delta.content` (or `refusal`), `usage` and the end.

    A usage counts only if the server sent it with the last text that it generated or later, since an earlier one is too
    low. Of several the last counts, unless an earlier one was higher: then the highest, number by number. The upstream
    bills by its usage, so it counts also where more tokens were read; one without tokens counts for nothing.

    Args:
        count_tokens: counts the tokens of a text.
        choices: how many the request has.
    """

    def __init__(self, count_tokens: Callable[[str], int] = len, choices: int = 1) -> None:
        self._count_tokens = count_tokens
        self._choices = choices
        self._uncounted: dict[int, list[str]] = {}
        """What was generated since the last count, of each choice."""
        self._finished: set[int] = set()
        self._open: set[int] = set()
        self._was_summed_up = False
        self._pattern = _Pattern()
        self.done = False
        """The server sent ``[DONE]``: nothing follows."""
        self.finish_reason = "stop"
        self._is_generated = False
        self._usage: Usage | None = None
        self._usage_is_last = False

    @property
    def ended(self) -> bool:
        """Whether the answer has a proper end: a finish reason after the text of each choice, or ``[DONE]``.

        A server that gave fewer choices than the request has ends them all with a summary of their usage.
        """
        enough = 1 if self._was_summed_up else self._choices
        return self.done or (len(self._finished) >= enough and not self._open)

    @property
    def usage(self) -> Usage | None:
        """What was used; None where the server sent no usage, or an impossible one."""
        usage = self._usage if self.ended and self._usage_is_last else None
        return _credible(usage, is_generated=self._is_generated)

    def read(self, events: Sequence[ServerEvent], pieces: list[Piece]) -> None:
        """Add the pieces in `events` to `pieces`, to the last one or to ``[DONE]``.

        Raises:
            ErrorEvent: the server reports an error.
            ValueError: an event is not part of a completion.
        """
        number = 0
        while number < len(events) and not self.done:
            alike = self._pattern.texts_in(events, number)
            if alike:
                data = BETWEEN.join([event.data for event in events[number : number + len(alike)]])
                pieces.append(self._plain(alike, data, has_usage=self._pattern.has_usage))
                number += len(alike)
            elif (piece := self._read_event(events[number])) is not None:
                pieces.append(piece)
                number += 1

    def _read_event(self, event: ServerEvent) -> Piece | None:
        """The piece in an event; None for ``[DONE]``."""
        if event.data == b"[DONE]":
            self.done = True
            return None
        chunk, data = _loads(event.data)
        if not event.name and data and (text := _plain_text(chunk)):
            self._pattern.learn(data, chunk)
            return self._plain([text], data, has_usage="usage" in chunk)
        if event.name == "error" or _is_error(chunk):
            raise ErrorEvent(event.data.decode(errors="replace"))
        choices = _objects(chunk.get("choices"))
        shown, deltas = "", 0
        for choice in choices:
            text, is_step = self._read_choice(choice)
            shown += text
            deltas += is_step
        if chunk.get("usage") is not None:
            self._read_usage(chunk["usage"], is_summary=not choices)
        return Piece(shown, deltas, chunk, data)

    def count_tokens(self) -> int:
        """The tokens generated since the last count. Parts have more than the whole, so they are counted together."""
        tokens = sum([max(len(texts), self._count_tokens("".join(texts))) for texts in self._uncounted.values()])
        self._uncounted.clear()
        return tokens

    def _plain(self, texts: list[str], data: bytes, *, has_usage: bool) -> Piece:
        self._is_generated, self._usage_is_last = True, False
        self._open.add(0)
        self._uncounted.setdefault(0, []).extend(texts)
        return Piece("".join(texts), len(texts), data=data, texts=texts, is_plain=True, has_usage=has_usage)

    def _read_choice(self, choice: dict[str, Any]) -> tuple[str, bool]:
        """The text to show, and whether anything was generated."""
        delta, index = _object(choice.get("delta")), _index(choice)
        # All text was generated and is billed: content, reasoning, tool calls, and kinds yet to come; also in fields of
        # the older API, since those are passed on as they are.
        generated = "".join(_strings([delta, choice.get("text")]))
        if generated:
            self._is_generated, self._usage_is_last = True, False
            self._open.add(index)
            self._uncounted.setdefault(index, []).append(generated)
        # Some servers send "" or "null" for none.
        if _finish_reason(choice) not in {None, "", "null"}:
            self._open.discard(index)
            self._finished.add(index)
            self.finish_reason = "length" if _finish_reason(choice) in {"length", "max_tokens"} else "stop"
        text = _text_of(delta.get("content") or delta.get("refusal") or "")
        return (text if index == 0 else ""), bool(generated)

    def _read_usage(self, raw: object, *, is_summary: bool) -> None:
        usage = _usage_of(raw)
        # A usage without counts does not undo an earlier one.
        if usage is not None:
            self._usage_is_last = True
            self._was_summed_up |= is_summary and bool(self._finished) and not self._open
            self._usage = usage if self._usage is None else _later(self._usage, usage)


_EMPTY = b'""'
_CONTENT = re.compile(rb'"content":\s*("(?:[^"\\]|\\.)*+")')


class _Pattern:
    """What most events of an answer have in common: they differ in their text alone.

    An event that begins and ends like one that was read, with a string of JSON between, says the same but for its text.
    So nothing but the string has to be read. (One without text is another kind, and is read whole.)
    """

    _PROBE = "\x01 probe"

    def __init__(self) -> None:
        self.has_usage = False
        self._before = self._after = b""
        # The first may have a role beside its text. Where each has a field of its own that differs, there is none.
        self._tries_left = 2

    def texts_in(self, events: Sequence[ServerEvent], first: int) -> list[str]:
        """The texts of the events from the first on that are like the one that was learnt; none where it is not."""
        before, after, strings = self._before, self._after, []
        if not before:
            return []
        for name, data in islice(events, first, None):
            if name or not data.startswith(before) or not data.endswith(after):
                break
            string = data[len(before) : -len(after)]
            # Nothing but a string, and some text in it.
            if len(string) <= len(_EMPTY) or string[:1] != b'"' or string[-1:] != b'"':
                break
            strings.append(string)
        return self._read_strings(strings) if strings else []

    def _read_strings(self, strings: Sequence[bytes]) -> list[str]:
        try:
            # No string of JSON has a line feed in it, so nothing can reach from one of them into the next.
            texts: list[Any] = orjson.loads(b"[%b]" % b",\n".join(strings))
        except orjson.JSONDecodeError:
            texts = []
        if len(texts) == len(strings) and all(isinstance(text, str) for text in texts):
            return texts
        # There is something else in place of a text, so the pattern is none.
        self._before = b""
        return []

    def learn(self, data: bytes, chunk: dict[str, Any]) -> None:
        """Take a plain event as the pattern, if the place of its text is certain."""
        found = _CONTENT.search(data) if self._tries_left else None
        if found is None:
            return
        self._tries_left -= 1
        before, after = data[: found.start(1)], data[found.end(1) :]
        probed = orjson.loads(before + orjson.dumps(self._PROBE) + after)
        delta = probed["choices"][0]["delta"]
        # One string was replaced: it was the text of the choice, and no other of that name, if the probe is there now.
        if delta["content"] == self._PROBE:
            self._before, self._after, self.has_usage = before, after, "usage" in chunk


def read_whole(received: bytes) -> tuple[dict[str, Any], bytes]:
    """A completion that was not streamed; and its bytes, where they can be passed on as they are.

    Raises:
        ErrorEvent: the server reports an error.
        ValueError: `received` is not a completion.
    """
    body, data = _loads(received)
    if _is_error(body):
        raise ErrorEvent(str(body.get("error") or body))
    if not isinstance(body.get("choices"), list):
        raise NotACompletion("no choices")
    for choice in body["choices"]:
        if not isinstance(choice, dict) or not isinstance(choice.get("message") or {}, dict):
            raise NotACompletion("a choice that is none")
        _finish_reason(choice)
    return body, data


def usage_of_whole(body: dict[str, Any]) -> Usage | None:
    """The usage of a whole answer; None where the server sent none, or an impossible one."""
    is_generated = any(text for message in _messages(body) for text in _strings(message))
    return _credible(_usage_of(body.get("usage")), is_generated=is_generated)


def tokens_of_whole(body: dict[str, Any], count_tokens: Callable[[str], int]) -> int:
    """The tokens of all text in a whole answer."""
    return sum(count_tokens("".join(_strings(message))) for message in _messages(body))


def _messages(body: dict[str, Any]) -> list[dict[str, Any]]:
    return [_object(choice.get("message")) for choice in _objects(body["choices"])]


def _is_error(body: dict[str, Any]) -> bool:
    """Whether `body` is an error of OpenAI's API, or of an older server."""
    return bool(body.get("error")) or body.get("object") == "error"


def _credible(usage: Usage | None, *, is_generated: bool) -> Usage | None:
    if usage is None or not usage.input_tokens or (is_generated and not usage.output_tokens):
        return None
    return usage


def _usage_of(raw: object) -> Usage | None:
    counts = _object(raw)
    inputs, outputs = _object(counts.get("prompt_tokens_details")), _object(counts.get("completion_tokens_details"))
    input_tokens, output_tokens = _count(counts.get("prompt_tokens")), _count(counts.get("completion_tokens"))
    if input_tokens is None or output_tokens is None:
        return None
    reasoning_tokens = _count(outputs.get("reasoning_tokens")) or 0
    # Some servers count reasoning beside the output and not within it: the total shows that, or more reasoning than
    # output does.
    total_tokens = input_tokens + output_tokens + reasoning_tokens
    is_beside = counts.get("total_tokens") == total_tokens or 0 < output_tokens < reasoning_tokens
    return Usage(
        input_tokens,
        output_tokens + reasoning_tokens if is_beside else output_tokens,
        _count(inputs.get("cached_tokens")) or 0,
        _count(inputs.get("cache_write_tokens")) or 0,
        reasoning_tokens,
    )


def _later(one: Usage, other: Usage) -> Usage:
    """The second, unless the first has more of anything."""
    if other.input_tokens >= one.input_tokens and other.output_tokens >= one.output_tokens:
        return other
    # Cached tokens are the cheaper ones: there, less is dearer.
    return Usage(
        max(one.input_tokens, other.input_tokens),
        max(one.output_tokens, other.output_tokens),
        min(one.cached_input_tokens, other.cached_input_tokens),
        max(one.cache_write_tokens, other.cache_write_tokens),
        max(one.reasoning_tokens, other.reasoning_tokens),
    )


def _index(choice: dict[str, Any]) -> int:
    index = choice.get("index", 0)
    return index if isinstance(index, int) else 0


def _count(value: object) -> int | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST_TOKENS:
        return None
    return value


_NOT_GENERATED = {"role", "id", "type", "index", "provider_specific_fields", "annotations", "citations"}


def _strings(value: object) -> Iterator[str]:
    """All text in a delta, at any depth: that of tool calls is two levels down."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in _NOT_GENERATED:
                yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _loads(data: bytes) -> tuple[dict[str, Any], bytes]:
    """An object of JSON; and its bytes, where they can be passed on as they are."""
    is_clean = True
    try:
        loaded = orjson.loads(data)
    except orjson.JSONDecodeError:
        # It takes no half of a surrogate pair, and no bytes that are no Unicode. Some models give both.
        loaded, is_clean = _loads_leniently(data), False
    # Most events have fewer brackets than that.
    if data.count(b"[") + data.count(b"{") > _MOST_DEPTH and _is_deep(loaded):
        raise NotACompletion("nested too deep")
    if not isinstance(loaded, dict):
        raise NotACompletion("no JSON object")
    return loaded, data if is_clean and b"\n" not in data else b""


def _loads_leniently(data: bytes) -> object:
    try:
        return _DECODER.decode(data.decode(errors="replace"))
    except RecursionError as error:
        raise NotACompletion("nested too deep") from error


_PLAIN_FIELDS = {"content", "role"}


def _plain_text(chunk: dict[str, Any]) -> str:
    """The text of a chunk that has one choice, the first, and nothing else to read; empty where it has."""
    choices = chunk.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or chunk.get("usage") is not None or _is_error(chunk):
        return ""
    choice = choices[0]
    if not isinstance(choice, dict) or choice.get("index", 0) != 0 or "text" in choice:
        return ""
    delta = choice.get("delta")
    if choice.get("finish_reason") is not None or not isinstance(delta, dict) or not delta.keys() <= _PLAIN_FIELDS:
        return ""
    text = delta.get("content")
    return text if isinstance(text, str) else ""


def _no_number(word: str) -> NoReturn:
    # Python reads NaN and Infinity; JSON has no such words, and they would be passed on to the client.
    raise NotACompletion(f"{word} is not a number")


def _finite(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _no_number(digits[:40])


# Made once: `json.loads` makes one for each text.
_DECODER = json.JSONDecoder(parse_constant=_no_number, parse_float=_finite)


def _is_deep(value: object) -> bool:
    level = [value]
    for _ in range(_MOST_DEPTH):
        level = [child for item in level for child in _children(item)]
        if not level:
            return False
    return True


def _children(item: object) -> list[object]:
    children = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
    return [child for child in children if isinstance(child, dict | list)]


def _finish_reason(choice: dict[str, Any]) -> str | None:
    reason = choice.get("finish_reason")
    if reason is not None and not isinstance(reason, str):
        raise NotACompletion("a finish reason that is none")
    return reason


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text_of(content: object) -> str:
    """The text of a content: a string, or the texts among its parts (other parts are thoughts)."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise NotACompletion("a text that is none")
    texts = [part.get("text") for part in _objects(content) if part.get("type") == "text"]
    return "".join(text for text in texts if isinstance(text, str))


def _objects(value: object) -> list[dict[str, Any]]:
    return [_object(item) for item in value] if isinstance(value, list) else []
