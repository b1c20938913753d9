"""What an OpenAI-compatible server streams, event by event: text to show, and what can be known of its usage."""

import json
import math
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from flaskapp.llm import Piece, Usage
from flaskapp.llm.event_stream import ServerEvent

_MOST_TOKENS = 10**9
"""More than any model takes; a count beyond it is rubbish and would only break the books."""
_MOST_DEPTH = 64
"""Of lists and objects in each other. Answers have less than ten; what is deeper would only break who reads it."""


class ErrorEvent(Exception):
    """The server says, in the middle of its answer, that it failed."""


class NotACompletion(ValueError):
    """The server sent something else."""


class Completion:
    """The state of one streamed completion. Reads `choices[0].delta.content` (or `refusal`), `usage` and the end.

    A usage counts only if the server said it at or after the last thing that it generated, since one from before says
    less than was generated. Of several the last counts, unless one before it said more: then the highest, number by
    number. It is the server's bill: it is believed, also where more was seen, unless it says nothing.

    Args:
        count_tokens: of a piece of text.
        choices: how many were asked for.
    """

    def __init__(self, count_tokens: Callable[[str], int] = len, choices: int = 1) -> None:
        self._count_tokens = count_tokens
        self._choices = choices
        self._finished: set[int] = set()
        self._open: set[int] = set()
        self._was_summed_up = False
        self.done = False
        """The server said ``[DONE]``: nothing follows."""
        self.finish_reason = "stop"
        self._is_generated = False
        self._usage: Usage | None = None
        self._usage_is_last = False

    @property
    def ended(self) -> bool:
        """The answer has a proper end: a finish reason of each choice, after all that it says, or ``[DONE]``.

        A server that gave fewer choices than were asked for has ended them all where it sums up what they used.
        """
        enough = 1 if self._was_summed_up else self._choices
        return self.done or (len(self._finished) >= enough and not self._open)

    @property
    def usage(self) -> Usage | None:
        """What was used, or None where the server did not say it, or said what cannot be."""
        usage = self._usage if self.ended and self._usage_is_last else None
        return _credible(usage, is_generated=self._is_generated)

    def take(self, event: ServerEvent) -> Piece | None:
        """Take one event; None where it says only that the stream is over.

        Raises:
            ErrorEvent: the server reports an error.
            ValueError: this is no event of a completion.
        """
        if event.data == "[DONE]":
            self.done = True
            return None
        chunk = _loads(event.data)
        if event.name == "error" or _is_error(chunk):
            raise ErrorEvent(event.data)
        text, deltas, tokens = "", 0, 0
        choices = _objects(chunk.get("choices"))
        for choice in choices:
            its_text, generated = self._take_choice(choice)
            text += its_text
            if generated:
                deltas += 1
                tokens += max(1, self._count_tokens(generated))
        if chunk.get("usage") is not None:
            self._take_usage(chunk["usage"], is_summary=not choices)
        return Piece(text, deltas, tokens, chunk)

    def _take_choice(self, choice: dict[str, Any]) -> tuple[str, str]:
        """The text to show, and all that was generated."""
        delta, index = _object(choice.get("delta")), _index(choice)
        # Whatever has text in it was generated and is billed: content, reasoning, tool calls, and kinds yet to come,
        # also in the words of the older API, since we hand those on as they are.
        generated = "".join(_strings([delta, choice.get("text")]))
        if generated:
            self._is_generated = True
            self._usage_is_last = False
            self._open.add(index)
        # Some servers say "" or "null" for none.
        if _finish_reason(choice) not in {None, "", "null"}:
            self._open.discard(index)
            self._finished.add(index)
            self.finish_reason = "length" if _finish_reason(choice) in {"length", "max_tokens"} else "stop"
        text = _text_of(delta.get("content") or delta.get("refusal") or "")
        return (text if index == 0 else ""), generated

    def _take_usage(self, raw: object, *, is_summary: bool) -> None:
        usage = _usage_of(raw)
        # One that says nothing takes nothing back.
        if usage is not None:
            self._usage_is_last = True
            self._was_summed_up |= is_summary and bool(self._finished) and not self._open
            self._usage = usage if self._usage is None else _later(self._usage, usage)


def read_whole(received: bytes) -> dict[str, Any]:
    """A completion that was not streamed.

    Raises:
        ErrorEvent: the server reports an error.
        ValueError: this is no completion.
    """
    body = _loads(received.decode())
    if _is_error(body):
        raise ErrorEvent(str(body.get("error") or body))
    if not isinstance(body.get("choices"), list):
        raise NotACompletion("no choices")
    for choice in body["choices"]:
        if not isinstance(choice, dict) or not isinstance(choice.get("message") or {}, dict):
            raise NotACompletion("a choice that is none")
        _finish_reason(choice)
    return body


def usage_of_whole(body: dict[str, Any]) -> Usage | None:
    """What the server says was used for all of it, or None where it did not say it, or said what cannot be."""
    is_generated = any(text for message in _messages(body) for text in _strings(message))
    return _credible(_usage_of(body.get("usage")), is_generated=is_generated)


def tokens_of_whole(body: dict[str, Any], count_tokens: Callable[[str], int]) -> int:
    """What was generated of all of it, as far as it shows."""
    return sum(count_tokens("".join(_strings(message))) for message in _messages(body))


def _messages(body: dict[str, Any]) -> list[dict[str, Any]]:
    return [_object(choice.get("message")) for choice in _objects(body["choices"])]


def _is_error(said: dict[str, Any]) -> bool:
    """As OpenAI's API says it, or as older servers do."""
    return bool(said.get("error")) or said.get("object") == "error"


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
    # Some servers count what was thought beside what was said, and not in it: the total says so, or that more was
    # thought than there would be of both.
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
    """The second, unless the first said more of anything."""
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
    """All text in a delta, wherever it stands: tool calls have theirs two levels down."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in _NOT_GENERATED:
                yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _loads(data: str) -> dict[str, Any]:
    try:
        loaded = json.loads(data, parse_constant=_no_number, parse_float=_finite)
    except RecursionError as error:
        raise NotACompletion("nested too deep") from error
    # Most of what is streamed has not even so many brackets.
    if data.count("[") + data.count("{") > _MOST_DEPTH and _is_deep(loaded):
        raise NotACompletion("nested too deep")
    if not isinstance(loaded, dict):
        raise NotACompletion("no JSON object")
    return loaded


def _no_number(word: str) -> NoReturn:
    # Python takes it, JSON has no such word, and the client would get it from us.
    raise NotACompletion(f"{word} is not a number")


def _finite(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _no_number(digits[:40])


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
    """What a content shows: a text, or the texts among its parts (others are thoughts)."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise NotACompletion("a text that is none")
    texts = [part.get("text") for part in _objects(content) if part.get("type") == "text"]
    return "".join(text for text in texts if isinstance(text, str))


def _objects(value: object) -> list[dict[str, Any]]:
    return [_object(item) for item in value] if isinstance(value, list) else []
