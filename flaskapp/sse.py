"""Server-sent events of the chat endpoint."""

import json

from backends.money import usd_text
from flaskapp.llm import Usage

HEARTBEAT = b": still here\n\n"
"""A comment, so that a client that has left is noticed while the model is silent."""


def chunk(text: str) -> bytes:
    """A piece of the answer."""
    return _event({"status": "streaming", "chunk": text})


def complete(request_id: str, usage: Usage, cost_nanousd: int, finish_reason: str) -> bytes:
    """The last event of an answer that ended by itself."""
    return _event(
        {
            "status": "complete",
            "request_id": request_id,
            "usage": _usage(usage),
            "cost_usd": usd_text(cost_nanousd),
            "finish_reason": finish_reason,
        }
    )


def broken(request_id: str, error: str, message: str, usage: Usage, cost_nanousd: int) -> bytes:
    """The last event of an answer that broke after it had begun."""
    return _event(
        {
            "status": "error",
            "request_id": request_id,
            "error": error,
            "message": message,
            "usage": _usage(usage),
            "cost_usd": usd_text(cost_nanousd),
        }
    )


def _usage(usage: Usage) -> dict[str, int]:
    return {"input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens}


def _event(body: dict[str, object]) -> bytes:
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    # A model may emit half a surrogate pair; the stream goes on without it.
    return f"data: {text}\n\n".encode(errors="replace")
