"""An OpenAI-compatible upstream that keeps an account: what it generated and billed, for whom.

A program of its own, of the standard library alone: ``python upstream.py INPUT_NANOUSD OUTPUT_NANOUSD`` (what a token
costs) listens on a free port of 127.0.0.1, prints it, and serves until its standard input ends. It generates exactly
`max_tokens` tokens. A word of the prompt is a token. The first word of the last message is whom it bills.
``GET /account`` is the account: ``{"<who>": {"requests": n, "billed_nanousd": n}}``.
"""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WORD = "coin "


class Account:
    """What was billed to each identifier."""

    def __init__(self, input_nanousd: int, output_nanousd: int) -> None:
        self._prices = (input_nanousd, output_nanousd)
        self._bills: dict[str, dict[str, int]] = {}
        self._lock = threading.Lock()

    def bill(self, who: str, input_tokens: int, output_tokens: int) -> None:
        """Bill what was generated, read or not."""
        with self._lock:
            its = self._bills.setdefault(who, {"requests": 0, "billed_nanousd": 0})
            its["requests"] += 1
            its["billed_nanousd"] += input_tokens * self._prices[0] + output_tokens * self._prices[1]

    def as_json(self) -> bytes:
        """All of it."""
        with self._lock:
            return json.dumps(self._bills).encode()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024
    account: Account


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._send("application/json", self.server.account.as_json())

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        words = [word for message in request["messages"] for word in message["content"].split()]
        who = request["messages"][-1]["content"].split()[0]
        self.server.account.bill(who, len(words), request["max_tokens"])
        self._send("text/event-stream", _stream(len(words), request["max_tokens"]))

    def _send(self, content_type: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _stream(input_tokens: int, output_tokens: int) -> bytes:
    word = {"choices": [{"index": 0, "delta": {"content": WORD}, "finish_reason": None}]}
    last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}
    usage = {
        "choices": [],
        "usage": {
            "prompt_tokens": input_tokens,
            "completion_tokens": output_tokens,
            "total_tokens": input_tokens + output_tokens,
        },
    }
    return b"".join([*[_event(word)] * output_tokens, _event(last), _event(usage), b"data: [DONE]\n\n"])


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def main() -> None:
    """Serve until standard input ends, as it does when the process that started this ends."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.account = Account(int(sys.argv[1]), int(sys.argv[2]))
    print(server.server_address[1], flush=True)  # noqa: T201 (that is how it is found)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main()
