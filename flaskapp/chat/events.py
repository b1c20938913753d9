"""Server-sent events of the chat endpoint."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import orjson

from backends.money import usd_text
from flaskapp.answers.characters import MAY_BREAK_LINES, one_line, whole_characters
from flaskapp.answers.failures import Failure
from flaskapp.llm import Piece, Usage

_NO_CHARACTER = "\ufffd"
_EVENT = b"data: %b\n\n"


@dataclass(slots=True)
class ChatStreamFormat:
    """The events of the chat endpoint. See `answer.StreamFormat`."""

    request_id: str
    _held: dict[Hashable, str] = field(default_factory=dict)

    def pieces(self, pieces: Sequence[Piece]) -> bytes:
        """An event for each text, where the pieces have one."""
        texts = [text for piece in pieces for text in piece.texts or (piece.text,) if text]
        try:
            whole = self._whole(texts) if self._held else texts
            data = b"".join([_EVENT % orjson.dumps({"status": "streaming", "chunk": text}) for text in whole])
        except orjson.JSONEncodeError:
            data = b"".join(
                [_EVENT % orjson.dumps({"status": "streaming", "chunk": text}) for text in self._whole(texts)]
            )
        return one_line(data) if MAY_BREAK_LINES[0] in data or MAY_BREAK_LINES[1] in data else data

    def _whole(self, texts: Sequence[str]) -> list[str]:
        return [whole for text in texts if (whole := whole_characters(text, self._held))]

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
        half = _EVENT % orjson.dumps({"status": "streaming", "chunk": _NO_CHARACTER}) if self._held else b""
        # None of these words can break a line.
        return half + _EVENT % orjson.dumps(body)

    def broken(self, failure: Failure, usage: Usage, cost_nanousd: int) -> bytes:
        """The last event of an answer that broke after it had begun."""
        body = {
            "status": "error",
            "request_id": self.request_id,
            "error": failure.error,
            "message": failure.message,
            "usage": {"input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens},
            "cost_usd": usd_text(cost_nanousd),
        }
        return _EVENT % one_line(orjson.dumps(body))
