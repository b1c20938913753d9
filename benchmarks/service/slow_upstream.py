"""What `upstream.c` is, where there is no compiler: the same answers and counts, tens of times slower."""
# ruff: noqa: E402 (gevent patches before anything else is imported)

from gevent import monkey

monkey.patch_all()

import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from gevent.os import tp_read
from gevent.pywsgi import WSGIServer

INPUT_TOKENS = 16
_ENVELOPE = {"id": "chatcmpl-0123456789", "object": "chat.completion.chunk", "created": 1760000000, "model": "gpt-4o"}
_stats: Counter[str] = Counter(requests=0, streamed=0, input_tokens=0, output_tokens=0, open=0, hung_up=0)


def answer(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
    if environ["REQUEST_METHOD"] == "GET":
        start_response("200 OK", [("Content-Type", "application/json")])
        return iter([json.dumps(_stats).encode()])
    body = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
    wanted = {name: int(number) for name, number in re.findall(r"(tokens|pace_us)=(\d+)", json.dumps(body))}
    most = body.get("max_completion_tokens") or body.get("max_tokens") or 10**6
    tokens = min(most, wanted.get("tokens", 20))
    reason = "stop" if tokens == wanted.get("tokens", 20) else "length"
    usage = {
        "prompt_tokens": INPUT_TOKENS,
        "completion_tokens": tokens,
        "total_tokens": INPUT_TOKENS + tokens,
    }
    _stats.update(requests=1, input_tokens=INPUT_TOKENS)
    if not body.get("stream"):
        _stats.update(output_tokens=tokens)
        start_response("200 OK", [("Content-Type", "application/json")])
        message = {"role": "assistant", "content": " coin" * tokens}
        choice = {"index": 0, "message": message, "finish_reason": reason}
        return iter([json.dumps({**_ENVELOPE, "choices": [choice], "usage": usage}).encode()])
    start_response("200 OK", [("Content-Type", "text/event-stream")])
    _stats.update(streamed=1, open=1)
    ends = [_event({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})]
    if (body.get("stream_options") or {}).get("include_usage"):
        ends.append(_event({"choices": [], "usage": usage}))
    return _stream(tokens, wanted.get("pace_us", 0) / 1e6, b"".join([*ends, b"data: [DONE]\n\n"]))


def _stream(tokens: int, pace_seconds: float, end: bytes) -> Iterator[bytes]:
    event = _event({"choices": [{"index": 0, "delta": {"content": " coin"}, "finish_reason": None}]})
    is_whole = False
    try:
        if pace_seconds:
            for _ in range(tokens):
                time.sleep(pace_seconds)
                _stats.update(output_tokens=1)
                yield event
            yield end
        else:
            _stats.update(output_tokens=tokens)
            yield event * tokens + end
        is_whole = True
    finally:
        _stats.update(open=-1, hung_up=0 if is_whole else 1)


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps({**_ENVELOPE, **chunk}).encode() + b"\n\n"


def main() -> None:
    server = WSGIServer(("127.0.0.1", 0), answer, log=None)
    server.start()
    print(server.server_port, flush=True)
    # In a thread of its own, so that the others go on; it ends with whoever started this.
    tp_read(sys.stdin.fileno(), 1)


if __name__ == "__main__":
    main()
