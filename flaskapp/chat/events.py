"""Server-sent events of the chat endpoint."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import orjson

from backends.money import usd_text
from flaskapp.llm import Piece, Usage


@dataclass(slots=True)
class ChatStreamFormat:
    """The events of the chat endpoint. See `answer.StreamFormat`."""

    request_id: str

    def pieces(self, pieces: Sequence[Piece]) -> bytes:
        """An event for each text, where the pieces have one."""
        texts = [text for piece in pieces for text in piece.texts or (piece.text,) if text]
        return b"".join([_event({"status": "streaming", "chunk": text}) for text in texts])

    def complete(self, usage: Usage, cost_nanousd: int, finish_reason: str, *, was_cut: bool) -> bytes:
        """The last event of an answer that ended by itself, or at its budget or maximum."""
        del was_cut
        return _event(
            {
                "status": "complete",
                "request_id": self.request_id,
                "usage": {"input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens},
                "cost_usd": usd_text(cost_nanousd),
                "finish_reason": finish_reason,
            }
        )

    def broken(self, error: str, message: str, usage: Usage, cost_nanousd: int) -> bytes:
        """The last event of an answer that broke after it had begun."""
        return _event(
            {
                "status": "error",
                "request_id": self.request_id,
                "error": error,
                "message": message,
                "usage": {"input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens},
                "cost_usd": usd_text(cost_nanousd),
            }
        )


def _event(body: dict[str, object]) -> bytes:
    try:
        text = orjson.dumps(body)
    except orjson.JSONEncodeError:
        # A model may emit half a surrogate pair; the stream goes on without it.
        text = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
    return b"data: %b\n\n" % text
