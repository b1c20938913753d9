"""Server-sent events of ``/v1``: the upstream's own chunks, passed on, and ours where we end the answer."""

import json
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import orjson

from backends.money import usd_text
from flaskapp.answers.characters import MAY_BREAK_LINES, one_line, with_whole_characters
from flaskapp.answers.failures import Failure
from flaskapp.http.openai_errors import error_object
from flaskapp.llm import BETWEEN, Piece, Usage

_ENVELOPE = ("id", "object", "created", "model", "system_fingerprint", "service_tier")
_DONE = b"data: [DONE]\n\n"
_NO_USAGE = b',"usage":null'


class CompletionStreamFormat:
    """The events of ``/v1/chat/completions``. See `answer.StreamFormat`.

    The upstream always has to send its usage. The client gets it once, at the end, and only with `include_usage`.
    """

    def __init__(self, request_id: str, model: str, created_seconds: int, *, include_usage: bool) -> None:
        self._request_id = request_id
        self._include_usage = include_usage
        self._envelope: dict[str, Any] = {
            "id": f"chatcmpl-{request_id}",
            "object": "chat.completion.chunk",
            "created": created_seconds,
            "model": model,
        }
        self._open_choices: dict[int, None] = {}
        self._finished_choices: set[int] = set()
        self._usage: Mapping[str, Any] | None = None
        self._held: dict[Hashable, str] = {}

    def pieces(self, pieces: Sequence[Piece]) -> bytes:
        """The upstream's chunks, as it wrote them where we change nothing; its usage is kept for the end."""
        events = b"".join([self._plain(piece) if piece.is_plain else self._piece(piece) for piece in pieces])
        return one_line(events) if any(part in events for part in MAY_BREAK_LINES) else events

    def _plain(self, piece: Piece) -> bytes:
        data = piece.data
        if 0 not in self._open_choices:
            # Later ones say the same of the answer and of its choice.
            self._follow(orjson.loads(data.partition(BETWEEN)[0]))
        if self._held:
            return self._one_by_one(data)
        if piece.has_usage == self._include_usage:
            return b"data: %b\n\n" % data
        if piece.has_usage and data.count(b'"usage"') == data.count(_NO_USAGE) == piece.deltas:
            # OpenAI says with each event that it has none. The quotes of a text are escaped, so this is none of it.
            return b"data: %b\n\n" % data.replace(_NO_USAGE, b"")
        return self._one_by_one(data)

    def _one_by_one(self, data: bytes) -> bytes:
        return b"".join([self._piece(Piece("", chunk=orjson.loads(each))) for each in data.split(BETWEEN)])

    def _piece(self, piece: Piece) -> bytes:
        chunk, data = piece.chunk or {}, piece.data
        if self._held or not data:
            # What has half a character in it comes without its data: it has to be written anew.
            chunk, data = with_whole_characters(chunk, self._held), b""
        self._follow(chunk)
        usage, has_usage = chunk.get("usage"), "usage" in chunk
        if isinstance(usage, dict):
            self._usage = usage
        if "choices" not in chunk or (usage is not None and not chunk["choices"]):
            # OpenAI's clients read the choices of every chunk.
            return b""
        if data and usage is None and has_usage == self._include_usage:
            return b"data: %b\n\n" % data
        return self._event({name: value for name, value in chunk.items() if name != "usage"})

    def complete(self, usage: Usage, cost_nanousd: int, finish_reason: str, *, was_cut: bool) -> bytes:
        """What a whole answer lacks: finish reasons where we cut it, the usage with `include_usage`, and ``[DONE]``."""
        del cost_nanousd
        ends = self._ends(finish_reason) if was_cut else b""
        return ends + (self._usage_event(usage) if self._include_usage else b"") + _DONE

    def broken(self, failure: Failure, usage: Usage, cost_nanousd: int) -> bytes:
        """An error in OpenAI's shape, and no ``[DONE]``: this is no whole answer."""
        details = {"cost_usd": usd_text(cost_nanousd), "usage": _usage(usage), **failure.extra}
        content = error_object(
            failure.status, failure.error, failure.message, request_id=self._request_id, details=details
        )
        return _data({"error": content})

    def _follow(self, chunk: Mapping[str, Any]) -> None:
        """Note what is said of the answer, and which choices have begun and ended."""
        self._envelope.update({name: chunk[name] for name in _ENVELOPE if name in chunk})
        choices = chunk.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict) and isinstance(choice.get("index", 0), int):
                index = choice.get("index", 0)
                self._open_choices[index] = None
                if choice.get("finish_reason") is not None:
                    self._finished_choices.add(index)

    def _ends(self, finish_reason: str) -> bytes:
        missing = [index for index in self._open_choices or {0: None} if index not in self._finished_choices]
        return b"".join(self._end(index, finish_reason) for index in missing)

    def _end(self, index: int, finish_reason: str) -> bytes:
        choice = {"index": index, "delta": {}, "logprobs": None, "finish_reason": finish_reason}
        return self._event({**self._envelope, "choices": [choice]})

    def _usage_event(self, usage: Usage) -> bytes:
        theirs, ours = self._usage or {}, _usage(usage)
        is_the_same = all(theirs.get(name) == ours[name] for name in ("prompt_tokens", "completion_tokens"))
        return _data({**self._envelope, "choices": [], "usage": theirs if is_the_same else ours})

    def _event(self, chunk: Mapping[str, Any]) -> bytes:
        return _data({**chunk, "usage": None} if self._include_usage else chunk)


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_input_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def _data(body: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n".encode()
