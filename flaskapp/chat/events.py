"""Server-sent events of the chat endpoint."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import orjson

from backends.money import usd_text
from flaskapp.answers.failures import Failure
from flaskapp.llm import Piece, Usage

_FIRST_HALVES, _SECOND_HALVES = ("\ud800", "\udbff"), ("\udc00", "\udfff")
"""Of surrogate pairs: the first and the last of each."""
_NO_CHARACTER = "\ufffd"
_EVENT = b"data: %b\n\n"


@dataclass(slots=True)
class ChatStreamFormat:
    """The events of the chat endpoint. See `answer.StreamFormat`."""

    request_id: str
    _half: str = ""
    """The first half of a surrogate pair, whose second half is still to come."""

    def pieces(self, pieces: Sequence[Piece]) -> bytes:
        """An event for each text, where the pieces have one."""
        texts = [self._half] if self._half else []
        texts += [text for piece in pieces for text in piece.texts or (piece.text,) if text]
        try:
            return b"".join([_EVENT % orjson.dumps({"status": "streaming", "chunk": text}) for text in texts])
        except orjson.JSONEncodeError:
            whole = [*self._whole_characters(texts)]
            return b"".join([_EVENT % orjson.dumps({"status": "streaming", "chunk": text}) for text in whole])

    def _whole_characters(self, texts: Sequence[str]) -> Iterator[str]:
        """The same texts, with the halves of surrogate pairs put together, as some models give them one by one."""
        self._half = ""
        for part in texts:
            text = part
            if self._half and _SECOND_HALVES[0] <= part[:1] <= _SECOND_HALVES[1]:
                text = self._half + part
            elif self._half:
                yield _NO_CHARACTER
            self._half = ""
            if _FIRST_HALVES[0] <= text[-1:] <= _FIRST_HALVES[1]:
                text, self._half = text[:-1], text[-1]
            if text:
                yield text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    def complete(self, usage: Usage, cost_nanousd: int, finish_reason: str, *, was_cut: bool) -> bytes:
        """The last event of an answer that ended by itself, or at its budget or maximum."""
        del was_cut
        body = {
            "status": "complete",
            "request_id": self.request_id,
            "usage": {"input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens},
            "cost_usd": usd_text(cost_nanousd),
            "finish_reason": finish_reason,
        }
        half = _EVENT % orjson.dumps({"status": "streaming", "chunk": _NO_CHARACTER}) if self._half else b""
        return half + _EVENT % orjson.dumps(body)

    def broken(self, failure: Failure, usage: Usage, cost_nanousd: int) -> bytes:
        """The last event of an answer that broke after it had begun."""
        return _EVENT % orjson.dumps(
            {
                "status": "error",
                "request_id": self.request_id,
                "error": failure.error,
                "message": failure.message,
                "usage": {"input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens},
                "cost_usd": usd_text(cost_nanousd),
            }
        )
