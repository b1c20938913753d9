"""Server-sent events of the chat endpoint."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import orjson

from backends.money import usd_text
from flaskapp.answers.characters import MAY_BREAK_LINES, one_line, whole_characters
from flaskapp.answers.failures import Failure
from flaskapp.llm import Piece, Usage

_NO_CHARACTER = "\ufffd"


@dataclass(slots=True)
class ChatStreamFormat:
    """The events of the chat endpoint. See `answer.StreamFormat`."""

    request_id: str
    _held: dict[Hashable, str] = field(default_factory=dict)

    def pieces(self, pieces: Sequence[Piece]) -> bytes:
        """An event for each text, where the pieces have one."""
        texts = [text for piece in pieces for text in piece.texts or (piece.text,) if text]
        if not self._held:
            try:
                return b"".join([_event({"status": "streaming", "chunk": text}) for text in texts])
            except orjson.JSONEncodeError:
                pass
        whole = [whole_characters(text, self._held) for text in texts]
        return b"".join([_event({"status": "streaming", "chunk": text}) for text in whole if text])

    def complete(self, usage: Usage, cost_nanousd: int, finish_reason: str, *, was_cut: bool) -> bytes:
        """The last event of an answer that ended by itself, or at its budget or maximum."""
        del was_cut
        return (_event({"status": "streaming", "chunk": _NO_CHARACTER}) if self._held else b"") + _event(
            {
                "status": "complete",
                "request_id": self.request_id,
                "usage": {"input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens},
                "cost_usd": usd_text(cost_nanousd),
                "finish_reason": finish_reason,
            }
        )

    def broken(self, failure: Failure, usage: Usage, cost_nanousd: int) -> bytes:
        """The last event of an answer that broke after it had begun."""
        return _event(
            {
                "status": "error",
                "request_id": self.request_id,
                "error": failure.error,
                "message": failure.message,
                "usage": {"input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens},
                "cost_usd": usd_text(cost_nanousd),
            }
        )


def _event(body: dict[str, object]) -> bytes:
    data = orjson.dumps(body)
    if MAY_BREAK_LINES[0] in data or MAY_BREAK_LINES[1] in data:
        data = one_line(data)
    return b"data: %b\n\n" % data
