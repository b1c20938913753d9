"""The floor: what any Flask application pays that asks Redis one thing and streams an answer, and nothing more.

``POST /stream?events=21&pace_us=0``: one no-op EVALSHA, then that many events, one write each.
"""

import os
import time
from collections import Counter
from collections.abc import Iterator

import redis
from flask import Flask, Response, request

EVENT = b'data: {"status":"streaming","chunk":" coin"}\n\n'
LAST = b"data: [DONE]\n\n"
MOST_LINKS = 64

app = Flask(__name__)
_pool = redis.BlockingConnectionPool.from_url(os.environ["REDIS_URL"], max_connections=MOST_LINKS, timeout=5)
_redis = redis.Redis(connection_pool=_pool)
_no_op = _redis.script_load("return {0, 0}")
_written: Counter[str] = Counter(open=0, output_tokens=0)


@app.post("/stream")
def stream() -> Response:
    _redis.evalsha(_no_op, 0)
    events, pace_us = int(request.args["events"]), int(request.args["pace_us"])
    return Response(_events(events, pace_us / 1e6), mimetype="text/event-stream")


@app.get("/written")
def written() -> dict[str, int]:
    return _written


def _events(count: int, pace_seconds: float) -> Iterator[bytes]:
    due_seconds = time.monotonic()
    _written["open"] += 1
    try:
        for _ in range(count - 1):
            if pace_seconds:
                due_seconds += pace_seconds
                time.sleep(max(0.0, due_seconds - time.monotonic()))
            _written["output_tokens"] += 1
            yield EVENT
        yield LAST
    finally:
        _written["open"] -= 1
