"""A little OpenAI-compatible model server on loopback that records what it really generated and billed.

It is the oracle of the tests: a real HTTP server with scripted misbehaviour. `Upstream.script` is for every request,
`Upstream.scripts` for the next ones, in turn, `Upstream.script_of` for those with a certain question; `Upstream.ledger`
has one `Exchange` per request.
"""

import contextlib
import json
import socket
import struct
import threading
from collections import deque
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Self

from rs_bpe.bpe import openai as vocabularies

if TYPE_CHECKING:
    from collections.abc import Callable

WORDS = tuple(f"word{number} " for number in range(20))


@dataclass(frozen=True)
class Script:
    """What the server does with a request."""

    words: tuple[str, ...] = WORDS
    """One token each; cut by the request's `max_tokens`."""
    usage: str = "end"
    """end, none, every, first_only, with_finish, or one of `_last_usages`."""
    ending: str = "done"
    """done, no_done, no_blank_line, no_finish, or one of the `_end_by_…` below, `late_…` after the usage."""
    status: int = 200
    """Anything but 200 is answered with `body` at once."""
    body: str = '{"error":{"message":"scripted"}}'
    headers: tuple[tuple[str, str], ...] = ()
    content_type: str | None = "text/event-stream"
    before_headers: str = ""
    """reset, stall, trickle: what happens in place of an answer."""
    reasoning_words: int = 0
    tool_words: int = 0
    tool_call: bool = False
    """Call the first tool of the request, in place of words."""
    cached_tokens: int = 0
    pause_seconds: float = 0.0
    """Between words."""
    line_end: str = "\n"
    piece_bytes: int = 0
    """Writes of this size, cut anywhere; 0: one write an event."""
    comments: bool = False
    wait_for: threading.Event | None = None
    """Waited for at the place that `wait_at` names."""
    wait_at: str = "middle"
    """head: before the answer's head; first: before the first word; middle: after it; end: after the last one."""
    choices: int = 1
    """Each word is sent once for each of them."""
    hidden_tokens: int = 0
    """Generated and billed, and never sent."""
    template_tokens: int = 0
    """Of the input, what the model's template adds by itself."""
    ignore_max_tokens: bool = False
    error_first: bool = False
    """Report an error in place of an answer, with status 200: as JSON, or as the first event. It bills nothing."""
    raw: str = ""
    """Sent as it is: the whole body, or the first event of a stream."""


@dataclass
class Exchange:
    """One request and what was done for it; filled in as it goes."""

    path: str
    headers: dict[str, str]
    request: dict[str, Any]
    connection: int
    input_tokens: int = 0
    generated_tokens: int = 0
    """Reasoning and tool calls included, read by the client or not."""
    taken: bool = False
    """Whether a model worked on it, so that it costs something."""
    client_left: bool = False
    waits: threading.Event = field(default_factory=threading.Event)
    """It has come to where the script waits."""
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def question(self) -> str:
        """The last message."""
        messages = self.request.get("messages") or [{}]
        return str(messages[-1].get("content", ""))


class Upstream:
    """The server; use it as a context manager."""

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or Script()
        self.scripts: deque[Script] = deque()
        self.script_of: dict[str, Script] = {}
        self.ledger: list[Exchange] = []
        self.on_request: Callable[[], object] = lambda: None
        """Called when a request has come, before anything is answered."""
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.upstream = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.drop_connections()
        self._server.server_close()
        self._thread.join()

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def behave(self, **changes: Any) -> None:
        """Use the default script with these changes from now on."""
        self.script = replace(Script(), **changes)

    def next_script(self, exchange: Exchange) -> Script:
        self.on_request()
        with self._lock:
            self.ledger.append(exchange)
            if exchange.question in self.script_of:
                return self.script_of[exchange.question]
            return self.scripts.popleft() if self.scripts else self.script

    def exchange_of(self, question: str) -> Exchange | None:
        """The only one with this question, if it has come."""
        with self._lock:
            found = [exchange for exchange in self.ledger if exchange.question == question]
        assert len(found) <= 1
        return found[0] if found else None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024
    upstream: Upstream

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.connections: list[socket.socket] = []

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)

    def drop_connections(self) -> None:
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: clients leave on purpose here."""


class _ClientLeft(Exception):
    pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 0
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._take({})

    def do_POST(self) -> None:
        self._take(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _take(self, request: dict[str, Any]) -> None:
        exchange = Exchange(self.path, dict(self.headers), request, connection=id(self.connection))
        script = self.server.upstream.next_script(exchange)
        try:
            self._answer(script, exchange)
        except (OSError, _ClientLeft):
            exchange.client_left = True
            self.close_connection = True
        finally:
            exchange.over.set()

    def _answer(self, script: Script, exchange: Exchange) -> None:
        if script.before_headers:
            exchange.taken = True
            exchange.input_tokens = script.template_tokens + count_input_tokens(exchange.request)
            self._instead(script.before_headers)
            return
        if script.status != 200:
            self._refuse(script)
            return
        exchange.taken = True
        exchange.input_tokens = script.template_tokens + count_input_tokens(exchange.request)
        self._wait_at("head", script, exchange)
        if not exchange.request.get("stream"):
            self._answer_whole(script, exchange)
            return
        self.send_response(200)
        if script.content_type is not None:
            self.send_header("Content-Type", script.content_type)
        self.send_header("Transfer-Encoding", "chunked")
        for name, value in script.headers:
            self.send_header(name, value)
        self.end_headers()
        if script.error_first:
            exchange.input_tokens = 0
            text = '{"error": {"message": "no", "code": 429}}'
            self._write(script, text if script.content_type == "application/json" else f"data: {text}\n\n")
            self.wfile.write(b"0\r\n\r\n")
            return
        self._stream(script, exchange)

    def _instead(self, what: str) -> None:
        if what == "reset":
            self._reset()
        elif what == "stall":
            self._hang()
        elif what == "trickle":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            while not self.server.upstream.closing.wait(0.02):
                self.wfile.write(b"X-More: x\r\n")

    def _refuse(self, script: Script) -> None:
        body = script.body.encode()
        self.send_response(script.status)
        for name, value in script.headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _answer_whole(self, script: Script, exchange: Exchange) -> None:
        deltas = self._deltas(script, exchange)
        kept = deltas[: self._limit(script, exchange)]
        choices = self._choices(script, exchange)
        self._wait_at("middle", script, exchange)
        exchange.generated_tokens = script.hidden_tokens + len(kept) * choices
        if script.ending in {"reset", "stall"}:
            self._break(script.ending, script)
            return
        message: dict[str, Any] = {"role": "assistant", "content": "".join(each.get("content", "") for each in kept)}
        if script.tool_call:
            (name,) = (each["tool_calls"][0]["function"]["name"] for each in kept[:1])
            arguments = "".join(each["tool_calls"][0]["function"]["arguments"] for each in kept)
            call = {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}
            message = {"role": "assistant", "content": None, "tool_calls": [call]}
        reason = self._finish_reason(script, cut=len(deltas) > len(kept))
        whole: dict[str, Any] = {
            **self._envelope(exchange, "chat.completion"),
            "choices": [
                {"index": index, "message": message, "logprobs": None, "finish_reason": reason}
                for index in range(choices)
            ],
            "x_extra": 0.10,
        }
        for usage in self._last_usages(script, exchange):
            whole["usage"] = usage
        text = {"rubbish": "{nonsense", "not_an_object": "[1]", "error_event": '{"error": {"message": "no"}}'}
        body = (script.raw or text.get(script.ending, json.dumps(whole))).encode()
        self.send_response(200)
        if script.content_type is not None:
            kind = "application/json" if script.content_type == "text/event-stream" else script.content_type
            self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if script.ending == "cut":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        self.wfile.write(body)

    @staticmethod
    def _envelope(exchange: Exchange, kind: str) -> dict[str, Any]:
        name = exchange.request.get("model", "")
        return {"id": "chatcmpl-upstream", "object": kind, "created": 1_700_000_000, "model": f"{name}-2026"}

    @staticmethod
    def _choices(script: Script, exchange: Exchange) -> int:
        return max(script.choices, exchange.request.get("n", 1))

    @staticmethod
    def _limit(script: Script, exchange: Exchange) -> int:
        asked = exchange.request.get("max_tokens") or exchange.request.get("max_completion_tokens") or 10**6
        return 10**6 if script.ignore_max_tokens else asked

    @staticmethod
    def _finish_reason(script: Script, *, cut: bool) -> str:
        return "length" if cut else "tool_calls" if script.tool_call else "stop"

    @staticmethod
    def _deltas(script: Script, exchange: Exchange) -> list[dict[str, Any]]:
        if script.tool_call:
            name = exchange.request["tools"][0]["function"]["name"]
            call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": name, "arguments": ""}}
            parts = [{"index": 0, "function": {"arguments": text}} for text in ('{"city"', ':"Oslo"}')]
            return [{"tool_calls": [part]} for part in (call, *parts)]
        deltas: list[dict[str, Any]] = [{"reasoning_content": "hm "}] * script.reasoning_words
        deltas += [{"tool_calls": [{"index": 0, "function": {"arguments": "x"}}]}] * script.tool_words
        return deltas + [{"content": word} for word in script.words]

    def _stream(self, script: Script, exchange: Exchange) -> None:
        deltas, limit = self._deltas(script, exchange), self._limit(script, exchange)
        envelope = self._envelope(exchange, "chat.completion.chunk")
        exchange.generated_tokens += script.hidden_tokens
        if script.raw:
            self._write(script, f"data: {script.raw}{script.line_end}{script.line_end}")
        choices = range(self._choices(script, exchange))
        for index in choices:
            first = {"index": index, "delta": {"role": "assistant", "content": ""}}
            self._event(script, {**envelope, "choices": [first]})
        said = [(index, delta) for delta in deltas[:limit] for index in choices]
        for number, (index, delta) in enumerate(said):
            self._wait_at({0: "first", 1: "middle"}.get(number, ""), script, exchange)
            if number and script.pause_seconds:
                self.server.upstream.closing.wait(script.pause_seconds)
            exchange.generated_tokens += 1
            choice = {"index": index, "delta": delta, "finish_reason": None}
            chunk: dict[str, Any] = {**envelope, "choices": [choice]}
            if script.usage == "every" or (script.usage == "first_only" and number == 0):
                chunk["usage"] = self._usage(script, exchange)
            if script.comments:
                self._write(script, f": keep-alive{script.line_end}{script.line_end}")
            self._event(script, chunk)
        self._wait_at("end", script, exchange)
        self._end(script, exchange, cut=len(deltas) > limit)

    def _wait_at(self, place: str, script: Script, exchange: Exchange) -> None:
        if script.wait_for is not None and script.wait_at == place:
            exchange.waits.set()
            self._hang(script.wait_for)

    def _end(self, script: Script, exchange: Exchange, *, cut: bool) -> None:
        late = script.ending.startswith("late_")
        if not late and script.ending not in {"done", "no_done", "no_finish", "no_blank_line"}:
            self._break(script.ending, script)
            return
        if script.ending != "no_finish":
            self._finish(script, exchange, self._finish_reason(script, cut=cut))
        envelope = self._envelope(exchange, "chat.completion.chunk")
        for usage in self._last_usages(script, exchange):
            self._event(script, {**envelope, "choices": [], "usage": usage})
        if late:
            self._break(script.ending.removeprefix("late_"), script)
            return
        if script.ending == "done":
            self._write(script, f"data: [DONE]{script.line_end}{script.line_end}")
        elif script.ending == "no_blank_line":
            self._write(script, "data: [DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def _finish(self, script: Script, exchange: Exchange, reason: str) -> None:
        for index in range(self._choices(script, exchange)):
            choice = {"index": index, "delta": {}, "finish_reason": reason}
            finish: dict[str, Any] = {**self._envelope(exchange, "chat.completion.chunk"), "choices": [choice]}
            if script.usage == "with_finish":
                finish["usage"] = self._usage(script, exchange)
            self._event(script, finish)

    def _last_usages(self, script: Script, exchange: Exchange) -> list[dict[str, Any]]:
        usage = self._usage(script, exchange)
        less = {**usage, "completion_tokens": 1, "prompt_tokens": 1, "total_tokens": 2}
        return {
            "end": [usage],
            "every": [usage],
            "twice": [less, usage],
            "twice_less": [usage, less],
            "zero": [{"prompt_tokens": 0, "completion_tokens": 0}],
            "zero_input": [{**usage, "prompt_tokens": 0}],
            "zero_output": [{**usage, "completion_tokens": 0, "total_tokens": exchange.input_tokens}],
            "absurd": [{**usage, "completion_tokens": 10**30}],
            "rubbish": [{**usage, "completion_tokens": "many"}],
            "negative": [{**usage, "prompt_tokens": -5}],
        }.get(script.usage, [])

    def _usage(self, script: Script, exchange: Exchange) -> dict[str, Any]:
        return {
            "prompt_tokens": exchange.input_tokens,
            "completion_tokens": exchange.generated_tokens,
            "total_tokens": exchange.input_tokens + exchange.generated_tokens,
            "prompt_tokens_details": {"cached_tokens": script.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": min(script.reasoning_words, exchange.generated_tokens)},
        }

    def _break(self, ending: str, script: Script) -> None:
        getattr(self, f"_end_by_{ending}")(script)

    def _end_by_reset(self, _: Script) -> None:
        self._reset()

    def _end_by_cut(self, _: Script) -> None:
        self.close_connection = True

    def _end_by_stall(self, _: Script) -> None:
        self._hang()

    def _end_by_error_event(self, script: Script) -> None:
        self._event(script, {"error": {"message": "overloaded", "code": 500}})
        self.wfile.write(b"0\r\n\r\n")

    def _end_by_named_error(self, script: Script) -> None:
        self._write(script, 'event: error\ndata: {"message": "overloaded"}\n\n')
        self.wfile.write(b"0\r\n\r\n")

    def _end_by_rubbish(self, script: Script) -> None:
        self._write(script, "data: {nonsense\n\n")
        self._hang()

    def _end_by_not_an_object(self, script: Script) -> None:
        self._write(script, "data: [1]\n\n")

    def _end_by_deep(self, script: Script) -> None:
        self._write(script, "data: " + "[" * 100_000 + "\n\n")

    def _end_by_huge_line(self, script: Script) -> None:
        while True:
            self._write(script, "x" * 65_536)

    def _hang(self, until: threading.Event | None = None) -> None:
        """Until the client has gone, the event has come, or the server closes."""
        self.connection.settimeout(0.02)
        while not self.server.upstream.closing.is_set():
            if until is not None and until.is_set():
                break
            try:
                if self.connection.recv(1) == b"":
                    raise _ClientLeft
            except TimeoutError:
                continue
        self.connection.settimeout(None)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def _event(self, script: Script, chunk: dict[str, Any]) -> None:
        self._write(script, f"data: {json.dumps(chunk)}{script.line_end}{script.line_end}")

    def _write(self, script: Script, text: str) -> None:
        sent = text.encode()
        size = script.piece_bytes or len(sent)
        for start in range(0, len(sent), size):
            piece = sent[start : start + size]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))


def bill_nanousd(exchange: Exchange) -> int:
    """What a request costs at gpt-4o's price, in nano-dollars."""
    return exchange.input_tokens * 2_500 + exchange.generated_tokens * 10_000


def count_input_tokens(request: dict[str, Any]) -> int:
    """As OpenAI documents it: 3 tokens a message, its role and its text, and 3 for the answer's beginning.

    Tools and schemas as their JSON has tokens; images as the documentation's example of 2048 × 4096.
    """
    count = vocabularies.o200k_base().count
    tokens = 3
    for message in request.get("messages", []):
        content = message.get("content") or ""
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        tokens += 3 + count(message["role"])
        for part in parts:
            if part["type"] == "image_url":
                tokens += 85 if part["image_url"].get("detail") == "low" else 1_105
            else:
                tokens += count(part.get("text") or "")
        for call in message.get("tool_calls") or ():
            tokens += 3 + count(call["function"]["name"]) + count(call["function"]["arguments"] or "")
    for name in ("tools", "response_format"):
        if name in request:
            tokens += 8 + count(json.dumps(request[name]))
    return tokens
