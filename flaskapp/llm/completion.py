"""What an OpenAI-compatible server streams, event by event: the text to show, and the usage as far as it is known."""

import codecs
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from itertools import islice
from typing import Any, NoReturn

import orjson

from flaskapp.llm import BETWEEN, Piece, Usage
from flaskapp.llm.event_stream import MAX_EVENT_BYTES, ServerEvent
from flaskapp.llm.finish_reasons import plain_finish_reason
from flaskapp.llm.usages import ReportedUsages, added, usage_of, usage_places, with_output, without_usage

_MOST_NOTICE_BYTES = 256
"""Longer than any text with which a server only says that it is still there."""
_CHUNK_NAMES = {"", "message", "data", "chunk", "delta", "completion"}
"""Names under which servers send what others send without a name."""
_MOST_DEPTH = 64
"""Lists and objects in each other. Answers have less than ten levels; deeper ones would only break their readers."""


class ErrorEvent(Exception):
    """The server reports, in place of an answer or in the middle of it, that it failed.

    Args:
        text: the whole event, or the whole body.
        is_first: nothing was generated before.
        usage: what it says, with the error, that it used.
    """

    def __init__(self, text: str, *, is_first: bool = False, usage: Usage | None = None) -> None:
        super().__init__(text)
        self.text = text
        self.is_first = is_first
        self.usage = usage


class NotACompletion(ValueError):
    """The server sent something else."""


class Completion:
    """The state of one streamed completion. Reads `choices[0].delta.content` (or `refusal`), `usage` and the end.

    A usage counts only if the server sent it with the last text that it generated or later, since an earlier one is too
    low. Of several the last counts, unless an earlier one was higher: then the highest, number by number. Where each
    chunk has a usage of its own, or each choice, their sum counts. The upstream bills by its usage, so it counts also
    where more tokens were read, but for several choices, of which some servers report one. One without tokens counts
    for nothing.

    Args:
        count_tokens: counts the tokens of a text.
        choices: how many the request has.
    """

    def __init__(self, count_tokens: Callable[[str], int] = len, choices: int = 1) -> None:
        self._count_tokens = count_tokens
        self._choices = choices
        self._uncounted: dict[int, list[str]] = {}
        """What was generated since the last count, of each choice."""
        self._counts: dict[int, _TokenCount] = {}
        self._counted_tokens = 0
        self._finished: set[int] = set()
        self._open: set[int] = set()
        self._was_summed_up = False
        self._pattern = _Pattern()
        self.done = False
        """The server sent ``[DONE]``: nothing follows."""
        self.finish_reason = "stop"
        self._is_generated = False
        self._reported = ReportedUsages()
        self._reported_of_choices: dict[int, ReportedUsages] = {}
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
        if not self.ended or not self._usage_is_last:
            return None
        usage = _credible(self._reported_usage(), is_generated=self._is_generated)
        return usage if usage is None or not self._has_choices else with_output(usage, self._counted_tokens)

    @property
    def _has_choices(self) -> bool:
        return self._choices > 1 or len(self._counts) > 1

    def _reported_usage(self) -> Usage | None:
        if self._reported or not self._reported_of_choices:
            return self._reported.usage(self._counted_tokens)
        usages = [each.usage(self._tokens_of(index)) for index, each in self._reported_of_choices.items()]
        return reduce(added, [usage for usage in usages if usage is not None])

    def _tokens_of(self, index: int) -> int:
        return self._counts[index].tokens if index in self._counts else 0

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

    def read_alike(self, received: bytes) -> Piece | None:
        """The piece in bytes that are events like an earlier one, but for their texts; None where they are not."""
        texts = self._pattern.texts_of(received)
        data = received[len(_BEFORE_DATA) : -len(_AFTER_DATA)]
        return self._plain(texts, data, has_usage=self._pattern.has_usage) if texts else None

    def _read_event(self, event: ServerEvent) -> Piece | None:
        """The piece in an event; None for ``[DONE]``."""
        if _is_done(event.data):
            self.done = True
            return None
        if _is_notice(event.data):
            return Piece("")
        chunk, data = _loads(event.data)
        if not event.name and data and (text := _plain_text(chunk)):
            self._pattern.learn(data, chunk)
            return self._plain([text], data, has_usage="usage" in chunk)
        return self._read_chunk(event, chunk, data)

    def _read_chunk(self, event: ServerEvent, chunk: dict[str, Any], data: bytes) -> Piece:
        usage, usages_of_choices = usage_places(chunk)
        if event.name == "error" or _is_error(chunk):
            reported = _credible(usage_of(usage), is_generated=self._is_generated)
            raise ErrorEvent(event.data.decode(errors="replace"), is_first=not self._is_generated, usage=reported)
        choices = _objects(chunk.get("choices"))
        shown, deltas = "", 0
        for choice in choices:
            text, is_step = self._read_choice(choice)
            shown += text
            deltas += is_step
        if usage is not None or usages_of_choices:
            self._read_usages(usage, usages_of_choices, is_summary=not choices, has_text=deltas > 0)
            if usage is None or chunk.get("usage") is None:
                # It is handed on where OpenAI has it, so that it is shown, or not, like any other.
                said = usage if usage is not None else next(iter(usages_of_choices.values()))
                chunk, data = {**without_usage(chunk), "usage": said}, b""
        if event.name not in _CHUNK_NAMES and "choices" not in chunk:
            # Nothing that a client of completions knows: a ping, or what a server says of itself.
            return Piece("")
        return Piece(shown, deltas, chunk, data)

    def count_tokens(self) -> int:
        """The tokens that the answer has more since the last count.

        Parts have more tokens than the whole, however it is cut, so each choice is counted as one text.
        """
        tokens = 0
        for index, texts in self._uncounted.items():
            count = self._counts.get(index)
            if count is None:
                count = self._counts[index] = _TokenCount(self._count_tokens)
            tokens += count.add("".join(texts))
        self._uncounted.clear()
        self._counted_tokens += tokens
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
            self.finish_reason = plain_finish_reason(_finish_reason(choice) or "")
        text = _text_of(delta.get("content") or delta.get("refusal") or "")
        return (text if index == 0 else ""), bool(generated)

    def _read_usages(self, raw: object, of_choices: Mapping[int, object], *, is_summary: bool, has_text: bool) -> None:
        usage = usage_of(raw)
        if usage is not None:
            self._reported.add(usage, is_summary=is_summary, has_text=has_text)
        usages = {index: usage_of(each) for index, each in of_choices.items()}
        for index, of_choice in usages.items():
            if of_choice is not None:
                self._reported_of_choices.setdefault(index, ReportedUsages()).add(
                    of_choice, is_summary=False, has_text=has_text
                )
        # A usage without counts does not undo an earlier one.
        if usage is not None or any(usages.values()):
            self._usage_is_last = True
            self._was_summed_up |= is_summary and bool(self._finished) and not self._open


class _TokenCount:
    """Counts a text that comes in parts, with hardly more tokens than it has as a whole.

    Only its last words are counted again when more of it comes: no token reaches from one word into the next.
    """

    _MOST_CHARACTERS = 64
    """Of the last words. A text without spaces is cut there, which adds a token at most."""

    def __init__(self, count_tokens: Callable[[str], int]) -> None:
        self._count_tokens = count_tokens
        self._before = 0
        self._last_words = ""
        self.tokens = 0
        """Of all of it so far; it never falls."""

    def add(self, text: str) -> int:
        """The tokens that `text` adds."""
        text = self._last_words + text
        if len(text) > self._MOST_CHARACTERS:
            end = text.rfind(" ")
            if end < len(text) - self._MOST_CHARACTERS:
                end = len(text)
            self._before += self._count_tokens(text[:end])
            text = text[end:]
        self._last_words = text
        more = max(0, self._before + (self._count_tokens(text) if text else 0) - self.tokens)
        self.tokens += more
        return more


_BEFORE_DATA, _AFTER_DATA = b"data: ", b"\n\n"
"""Of an event of one line."""
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
        self._before = self._after = self._head = self._tail = self._between = b""
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

    def texts_of(self, received: bytes) -> list[str]:
        """The texts in bytes that are whole events, if each is like the one that was learnt; else none."""
        if not self._before or len(received) > MAX_EVENT_BYTES:
            return []
        if not received.startswith(self._head) or not received.endswith(self._tail) or b"\r" in received:
            return []
        strings = received[len(self._head) : -len(self._tail)].split(self._between)
        # Each event ends with two line feeds, and has no other.
        texts = self._read_strings(strings) if received.count(b"\n") == 2 * len(strings) else []
        # One without text is another kind.
        return [] if "" in texts else texts

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
            self._head, self._tail, self._between = _BEFORE_DATA + before, after + _AFTER_DATA, after + BETWEEN + before


def read_whole(received: bytes) -> tuple[dict[str, Any], bytes]:
    """A completion that was not streamed; and its bytes, where they can be passed on as they are.

    Raises:
        ErrorEvent: the server reports an error.
        ValueError: `received` is not a completion.
    """
    body, data = _loads(received)
    if _is_error(body):
        is_first = not any(text for message in _messages(body) for text in _strings(message))
        usage = _credible(usage_of(usage_places(body)[0]), is_generated=not is_first)
        raise ErrorEvent(received.decode(errors="replace"), is_first=is_first, usage=usage)
    if not isinstance(body.get("choices"), list):
        raise NotACompletion("no choices")
    for choice in body["choices"]:
        if not isinstance(choice, dict) or not isinstance(choice.get("message") or {}, dict):
            raise NotACompletion("a choice that is none")
        _finish_reason(choice)
    return body, data


def usage_of_whole(body: dict[str, Any], count_tokens: Callable[[str], int] = len) -> Usage | None:
    """The usage of a whole answer; None where the server sent none, or an impossible one."""
    messages = _messages(body)
    is_generated = any(text for message in messages for text in _strings(message))
    raw, of_choices = usage_places(body)
    reported = [usage_of(raw)] if raw is not None else list(map(usage_of, of_choices.values()))
    usages = [usage for usage in reported if usage is not None]
    usage = _credible(reduce(added, usages) if usages else None, is_generated=is_generated)
    # Some servers report the usage of one choice for all of them.
    return with_output(usage, tokens_of_whole(body, count_tokens)) if usage and len(messages) > 1 else usage


def tokens_of_whole(body: dict[str, Any], count_tokens: Callable[[str], int]) -> int:
    """The tokens of all text in a whole answer."""
    return sum(count_tokens("".join(_strings(message))) for message in _messages(body))


def _messages(body: dict[str, Any]) -> list[dict[str, Any]]:
    return [_object(choice.get("message")) for choice in _objects(body.get("choices"))]


def events_of_document(document: bytes) -> list[ServerEvent]:
    """The events in which a server would have streamed the whole answer that it sent in place of a stream.

    Raises:
        ErrorEvent: the server reports an error.
        ValueError: it is no answer.
    """
    try:
        body, _ = read_whole(document.removeprefix(codecs.BOM_UTF8))
    except json.JSONDecodeError:
        # One event a line, without the words of an event stream.
        lines = [line for line in document.splitlines() if line.strip()]
        return [ServerEvent("", line) for line in lines]
    choices = [
        {**{name: value for name, value in choice.items() if name != "message"}, "delta": _as_delta(choice)}
        for choice in _objects(body["choices"])
    ]
    chunk = {**body, "object": "chat.completion.chunk", "choices": choices}
    return [ServerEvent("", json.dumps(chunk).encode()), ServerEvent("", _DONE)]


def usage_in_error(text: str) -> Usage | None:
    """The usage that the body of an error says; nearly none does."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return _credible(usage_of(usage_places(body)[0]), is_generated=False) if isinstance(body, dict) else None


def _as_delta(choice: dict[str, Any]) -> dict[str, Any]:
    message = _object(choice.get("message"))
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [{"index": index, **_object(call)} for index, call in enumerate(calls)]}


_DONE = b"[DONE]"


def _is_done(data: bytes) -> bool:
    """Whether an event is the last one; some servers write it with spaces or quotes."""
    return data == _DONE or (len(data) <= _MOST_NOTICE_BYTES and data.translate(None, b" \t\r\n\"'\\") == _DONE)


def _is_notice(data: bytes) -> bool:
    """Whether an event is none of the answer, only a sign that the server is still there: empty, or some word."""
    text = data.strip()
    if text[:1] == b"{" or len(text) > _MOST_NOTICE_BYTES:
        return False
    try:
        return not isinstance(orjson.loads(text), list)
    except orjson.JSONDecodeError:
        return True


def _is_error(body: dict[str, Any]) -> bool:
    """Whether `body` is an error of OpenAI's API, or in the words of another server."""
    if body.get("error") or "error" in (body.get("object"), body.get("type")):
        return True
    if "choices" in body or usage_places(body)[0] is not None:
        return False
    return any(body.get(name) for name in ("detail", "errors", "error_msg", "error_message", "error_code")) or bool(
        body.get("message") and (body.get("code") or body.get("status"))
    )


def _credible(usage: Usage | None, *, is_generated: bool) -> Usage | None:
    if usage is None or not usage.input_tokens or (is_generated and not usage.output_tokens):
        return None
    return usage


def _index(choice: dict[str, Any]) -> int:
    index = choice.get("index", 0)
    return index if isinstance(index, int) else 0


_NOT_GENERATED = {"role", "id", "type", "index", "provider_specific_fields", "annotations", "citations", "usage"}


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
_NO_USAGE: tuple[object, dict[int, object]] = (None, {})


def _plain_text(chunk: dict[str, Any]) -> str:
    """The text of a chunk that has one choice, the first, and nothing else to read; empty where it has."""
    choices = chunk.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or _is_error(chunk) or usage_places(chunk) != _NO_USAGE:
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
