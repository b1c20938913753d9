"""Any server with OpenAI's chat completions; its answers are streamed through as they arrive.

No request is ever sent twice, no redirect is followed, and no proxy is taken from the environment: the key goes to the
server that was configured and nowhere else. Certificates are checked against the system's, or `SSL_CERT_FILE`.
"""

import base64
import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http import HTTPStatus
from typing import Any, cast
from urllib.parse import quote, unquote, urlsplit

import httpcore2

from backends.clock import Clock
from backends.errors import ConfigurationError
from backends.pricing.token_bounds import counter_for
from flaskapp.llm import MAX_CHOICES, Completed, ModelRequest, Piece, UpstreamBroken, UpstreamNotTaken, Usage
from flaskapp.llm.completion import Completion, ErrorEvent, NotACompletion, read_whole, tokens_of_whole, usage_of_whole
from flaskapp.llm.event_stream import EventStream
from flaskapp.llm.transport import TimedBackend, TimedStream
from flaskapp.strict_json import dumps

_CONNECT_SECONDS = 5.0
_POOL_WAIT_SECONDS = 1.0
_CONNECTIONS = 512
_IDLE_CONNECTIONS = 64
_IDLE_SECONDS = 4.0
"""Shorter than the five seconds after which usual servers hang up: a request must not meet a closing connection."""
_TAIL_SECONDS = 0.2
"""How long to wait, after ``[DONE]``, for the end of the body, so that the connection can be used again."""
_EVENT_STREAM, _JSON = "text/event-stream", "application/json"
_MAX_ANSWER_BYTES = 16_777_216
"""More than any answer of the most choices and tokens."""
_ERROR_BODY_BYTES = 2_048
_ERROR_BODY_SECONDS = 1.0
_DETAIL_CHARACTERS = 200
_COMPLETION_TOKENS_ONLY = re.compile(r"(ft:)?(o[1-9]|gpt-[5-9]|gpt-[1-9][0-9])(?![0-9a-z])")
"""OpenAI's newer models refuse `max_tokens` and take `max_completion_tokens`, which older servers do not know."""

_TRANSPORT_ERRORS = (httpcore2.TimeoutException, httpcore2.NetworkError, httpcore2.ProtocolError)


class OpenAICompatibleModel:
    """One server and a pool of connections to it."""

    max_choices = MAX_CHOICES

    def __init__(self, base_url: str, api_key: str | None = None, *, clock: Clock) -> None:
        """`base_url` is what comes before ``/chat/completions``; `api_key` is sent as a bearer token.

        Raises:
            ConfigurationError: the URL or the key cannot be used.
        """
        self._url, host_header, url_credentials = _parse_base_url(base_url)
        self._headers = {
            "Host": host_header,
            "Content-Type": "application/json",
            "Accept-Encoding": "identity",
            "User-Agent": "tollgate",
        }
        if api_key:
            self._headers["Authorization"] = f"Bearer {_checked_key(api_key)}"
        elif url_credentials:
            self._headers["Authorization"] = f"Basic {url_credentials}"
        self._secrets = [_any_spelling(secret) for secret in (api_key, url_credentials) if secret]
        self._clock = clock
        self._pool = httpcore2.ConnectionPool(
            ssl_context=httpcore2.default_ssl_context(),
            max_connections=_CONNECTIONS,
            max_keepalive_connections=_IDLE_CONNECTIONS,
            keepalive_expiry=_IDLE_SECONDS,
            network_backend=TimedBackend(clock),
        )

    def open(self, request: ModelRequest) -> "StreamedAnswer":
        """Send the request and wait for the head of the response. See `Model.open`."""
        response = self._send(_body(request), request.deadline_seconds, _EVENT_STREAM)
        try:
            self._check(response, _EVENT_STREAM)
        except BaseException:
            response.close()
            raise
        completion = Completion(counter_for(request.model), request.choices)
        return StreamedAnswer(response, self._clock, self._clean, completion)

    def complete(self, request: ModelRequest) -> Completed:
        """Send the request and wait for the whole answer. See `Model.complete`."""
        response = self._send(_body(request, stream=False), request.deadline_seconds, _JSON)
        try:
            self._check(response, _JSON)
            body = self._read_whole(response)
        except (ErrorEvent, ValueError, *_TRANSPORT_ERRORS) as error:
            raise broken_answer(error, self._clean) from error
        finally:
            response.close()
        usage = usage_of_whole(body)
        return Completed(body, usage, 0 if usage else tokens_of_whole(body, counter_for(request.model)))

    def close(self) -> None:
        """Close every connection."""
        self._pool.close()

    def _send(self, body: bytes, deadline_seconds: float, accept: str) -> httpcore2.Response:
        now = self._clock.monotonic_seconds()
        ends = now + deadline_seconds
        moments = {
            "connect": min(now + _CONNECT_SECONDS, ends),
            "read": ends,
            "write": ends,
            "pool": _POOL_WAIT_SECONDS,
        }
        request = httpcore2.Request(
            "POST",
            self._url,
            headers=[*self._headers.items(), ("Accept", accept), ("Content-Length", str(len(body)))],
            content=body,
            extensions={"timeout": moments},
        )
        try:
            return self._pool.handle_request(request)
        except (httpcore2.ConnectError, httpcore2.ConnectTimeout, httpcore2.PoolTimeout) as error:
            raise UpstreamNotTaken("The model could not be reached.", detail=self._clean(repr(error))) from error
        except httpcore2.TimeoutException as error:
            raise UpstreamBroken("The model did not answer in time.", detail=repr(error), timed_out=True) from error
        except (httpcore2.NetworkError, httpcore2.ProtocolError) as error:
            raise UpstreamBroken("The model's server broke off.", detail=self._clean(repr(error))) from error

    def _check(self, response: httpcore2.Response, expected_kind: str) -> None:
        if not HTTPStatus.OK <= response.status < HTTPStatus.MULTIPLE_CHOICES:
            raise UpstreamNotTaken(
                f"The model's server refused the request with status {response.status}.",
                detail=self._clean(self._read_error_body(response)),
                status=response.status,
            )
        kinds = [value for name, value in response.headers if name.lower() == b"content-type"]
        kind = kinds[0].partition(b";")[0].strip().lower() if kinds else expected_kind.encode()
        if kind != expected_kind.encode():
            raise UpstreamBroken(
                "The model's server sent something that is no answer.",
                detail=self._clean(f"status {response.status}, content type {kind.decode(errors='replace')}"),
            )

    @staticmethod
    def _read_whole(response: httpcore2.Response) -> dict[str, Any]:
        received = bytearray()
        for part in response.iter_stream():
            received += part
            if len(received) > _MAX_ANSWER_BYTES:
                raise NotACompletion("an answer that is too large")
        return read_whole(bytes(received))

    def _read_error_body(self, response: httpcore2.Response) -> str:
        stream = cast("TimedStream", response.extensions["network_stream"])
        stream.hurry_until_seconds = self._clock.monotonic_seconds() + _ERROR_BODY_SECONDS
        body = b""
        with contextlib.suppress(*_TRANSPORT_ERRORS):
            for part in response.iter_stream():
                body += part
                if len(body) >= _ERROR_BODY_BYTES:
                    break
        stream.hurry_until_seconds = None
        return body[:_ERROR_BODY_BYTES].decode(errors="replace")

    def _clean(self, text: str) -> str:
        """`text` for one line of the log: short, printable, without our secrets."""
        for secret in self._secrets:
            text = secret.sub("***", text)
        printable = "".join(character if character.isprintable() else " " for character in text)
        return " ".join(printable.split())[:_DETAIL_CHARACTERS]


class StreamedAnswer:
    """An answer that is streamed in. Its usage is known only if all of it was read."""

    def __init__(
        self,
        response: httpcore2.Response,
        clock: Clock,
        clean: Callable[[str], str],
        completion: Completion,
    ) -> None:
        self._response = response
        self._connection = cast("TimedStream", response.extensions["network_stream"])
        self._clock = clock
        self._clean = clean
        self._completion = completion
        self._is_whole = False
        self._lock = threading.Lock()
        self._reading = False
        self._closed = False
        self._hung_up = False

    @property
    def usage(self) -> Usage | None:
        """The usage that the server sent; None without one, or if the answer was not read to its end."""
        return self._completion.usage if self._is_whole else None

    @property
    def finish_reason(self) -> str:
        """Why the server stopped."""
        return self._completion.finish_reason

    def __iter__(self) -> Iterator[Piece]:
        """The pieces, as they arrive.

        Raises:
            UpstreamBroken: the stream broke off, stalled until the deadline, or is not a completion.
        """
        pieces = self._pieces()
        while (piece := self._next(pieces)) is not None:
            yield piece

    def hang_up(self) -> None:
        """See `Answer.hang_up`: the upstream sees the end at once; what has come can still be read."""
        with self._lock:
            if not self._closed:
                self._hung_up = True
                self._connection.break_off()

    def close(self) -> None:
        """Break the connection off, unless the answer has ended. A thread that reads it closes the response itself."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            # Inside the lock: once the response is closed, the connection may serve another request.
            self._connection.break_off()
            reading = self._reading
        if not reading:
            self._response.close()

    def _next(self, pieces: Iterator[Piece]) -> Piece | None:
        with self._lock:
            if self._closed:
                return None
            self._reading = True
        piece = None
        try:
            piece = next(pieces, None)
        except (ErrorEvent, ValueError, *_TRANSPORT_ERRORS) as error:
            if not self._hung_up and not self._closed:
                raise broken_answer(error, self._clean) from error
        finally:
            with self._lock:
                self._reading = False
                if piece is None:
                    self._closed = True
                closed = self._closed
            if closed:
                self._response.close()
        return None if closed else piece

    def _pieces(self) -> Iterator[Piece]:
        batch, lead_tokens = -1, 0
        for piece in self._parsed():
            if self._connection.batches != batch:
                batch, lead_tokens = self._connection.batches, 0
            lead_tokens += piece.tokens
            yield replace(piece, lead_tokens=lead_tokens)

    def _parsed(self) -> Iterator[Piece]:
        events = EventStream()
        body = self._response.iter_stream()
        for received in body:
            for event in events.feed(received):
                if piece := self._completion.read(event):
                    yield piece
            if self._completion.done:
                self._read_tail(body)
                break
        for event in events.end():
            if not self._completion.done and (piece := self._completion.read(event)):
                yield piece
        if not self._completion.ended:
            raise httpcore2.RemoteProtocolError("the stream ended before the answer did")
        # In a body without a length, an end by our own hang-up looks like one by the server.
        self._is_whole = self._completion.done or not (self._hung_up or self._closed)

    def _read_tail(self, body: Iterator[bytes]) -> None:
        self._connection.hurry_until_seconds = self._clock.monotonic_seconds() + _TAIL_SECONDS
        with contextlib.suppress(*_TRANSPORT_ERRORS):
            for _ in body:
                pass
        self._connection.hurry_until_seconds = None


def broken_answer(error: Exception, clean: Callable[[str], str]) -> UpstreamBroken:
    """The failure for `error` in the middle of an answer; `clean` makes its text fit for the log."""
    detail = clean(repr(error))
    if isinstance(error, httpcore2.TimeoutException):
        return UpstreamBroken("The model did not go on in time.", detail=detail, timed_out=True)
    if isinstance(error, ErrorEvent):
        return UpstreamBroken("The model's server reported an error.", detail=detail)
    if isinstance(error, ValueError):
        return UpstreamBroken("The model's server sent something that is no answer.", detail=detail)
    return UpstreamBroken("The model's server broke off.", detail=detail)


def _body(request: ModelRequest, *, stream: bool = True) -> bytes:
    newer = _COMPLETION_TOKENS_ONLY.match(request.model.lower().rpartition("/")[2])
    options = dict(request.options)
    if stream:
        options["stream"] = True
        # Whatever the caller asked for: the usage has to be known.
        options["stream_options"] = {**options.get("stream_options", {}), "include_usage": True}
    if request.choices > 1:
        options["n"] = request.choices
    body = {
        **options,
        "model": request.model,
        "messages": [dict(message) for message in request.messages],
        "max_completion_tokens" if newer else "max_tokens": request.max_tokens,
    }
    # Numbers with a fraction are `Decimal`: they pass with every digit.
    return dumps(body).encode()


def _parse_base_url(base_url: str) -> tuple[httpcore2.URL, str, str]:
    """The URL of the completions, the Host header, and the URL's credentials as HTTP's basic ones (or "")."""
    try:
        parts = urlsplit(base_url)
        host, port = (parts.hostname or "").encode("idna"), parts.port
    except ValueError:
        host, port = b"", None
    if not host or parts.scheme not in {"http", "https"}:
        shown = "a URL with a password" if "@" in base_url else repr(base_url)
        raise ConfigurationError(f"LLM_BASE_URL: an http or https URL like https://api.openai.com/v1; got {shown}")
    target = quote(parts.path.rstrip("/") + "/chat/completions", safe="/%:@!$&'()*+,;=~") + (
        f"?{quote(parts.query, safe='/%:@!$&()*+,;=~?')}" if parts.query else ""
    )
    name = f"[{host.decode()}]" if b":" in host else host.decode()
    credentials = ""
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        credentials = base64.b64encode(pair.encode()).decode()
    url = httpcore2.URL(scheme=parts.scheme, host=host, port=port, target=target)
    return url, name if port is None else f"{name}:{port}", credentials


def _checked_key(api_key: str) -> str:
    if not api_key.isascii() or not api_key.isprintable() or " " in api_key:
        raise ConfigurationError("LLM_API_KEY: visible ASCII characters without spaces; got something else")
    return api_key


def _any_spelling(secret: str) -> re.Pattern[str]:
    """A pattern for `secret`, also where JSON, Python or a URL escaped its characters, or escaped the escapes again.

    It runs in linear time: a match begins only where a run of backslashes does, and it never backtracks into one.
    """
    # A backslash may be doubled any number of times, so a run of them is like one.
    return re.compile(r"(?<!\\)" + "".join(map(_any_spelling_of, re.sub(r"\\+", r"\\", secret))))


def _any_spelling_of(character: str) -> str:
    code = f"{ord(character):02x}"
    escaped = rf"(?<=\\)(?:u00|x)(?i:{code})|%(?i:{code})"
    return rf"(?:\\|{escaped})++" if character == "\\" else rf"\\*+(?:{re.escape(character)}|{escaped})"
