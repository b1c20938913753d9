"""``python -m benchmarks.service.entered``: the functions of ours that one chat of 20 tokens enters, one a line.

A count that no machine makes noisy. Each function counts once, however often it is entered, in whatever thread.
"""

import os
import sys
import threading
import time
from types import FrameType

from flask.testing import FlaskClient

from benchmarks.service.processes import ROOT
from flaskapp.config import load_config
from flaskapp.factory import create_app

_OURS = tuple(f"{ROOT / package}{os.sep}" for package in ("backends", "flaskapp"))
_SETTLE_SECONDS = 0.5
TOKENS = 20


def functions_entered() -> list[str]:
    """By file, name and line. Made in this process, with a Redis that is a dictionary."""
    entered: set[str] = set()
    is_watching = False
    others: set[int | None] = set()
    """Threads of the process that serve no single request: the settings' and the watcher's."""

    def watch(frame: FrameType, event: str, _argument: object) -> None:
        code = frame.f_code
        if not is_watching or event != "call" or threading.get_ident() in others:
            return
        if code.co_filename.startswith(_OURS) and not code.co_name.startswith("<"):
            entered.add(f"{os.path.relpath(code.co_filename, ROOT)}:{code.co_firstlineno} {code.co_qualname}")

    # Before there is any thread: those of a pool are watched too.
    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        client = _client()
        _chat(client)
        others = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
        is_watching = True
        _chat(client)
    finally:
        is_watching = False
        sys.setprofile(None)
        threading.setprofile(None)
    return sorted(entered)


def _client() -> FlaskClient:
    settings = {"REDIS_URL": "fake://", "DEMO_TOKENS_PER_SECOND": "0", "ENABLE_CHALLENGE_RESPONSE": "false"}
    app = create_app(load_config(settings))
    return app.test_client()


def _chat(client: FlaskClient) -> None:
    body = {"query": "What is Litecoin?", "chat_history": [], "max_tokens": TOKENS}
    with client.post("/api/v1/chat/stream", json=body, headers={"X-Fingerprint": "a-visitor"}) as response:
        if b'"status":"complete"' not in response.data:
            raise RuntimeError(f"no answer: {response.status} {response.data[:200]!r}")
    # What ends an answer may do so in a thread of its own.
    time.sleep(_SETTLE_SECONDS)


if __name__ == "__main__":
    print("\n".join(functions_entered()))
