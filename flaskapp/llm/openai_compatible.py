"""Any server with OpenAI's chat completions; its answers are streamed through as they arrive.

No request is sent twice, unless the server refused it for how it was asked (see `dialects`), and no redirect is
followed: the key goes to the server that was configured and nowhere else, and through no proxy but the configured one.
Certificates are checked against the system's, or `SSL_CERT_FILE`.
"""

import base64
import contextlib
import re
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, NamedTuple
from urllib.parse import SplitResult, quote, unquote, urlsplit

from backends.clock import Clock
from backends.contract import Event, Observer
from backends.errors import ConfigurationError
from backends.pricing.token_bounds import counter_for
from flaskapp.llm import (
    MAX_CHOICES,
    NOTHING,
    Batch,
    Completed,
    ModelRequest,
    Piece,
    UpstreamBroken,
    UpstreamError,
    UpstreamNotTaken,
    UpstreamRefused,
    Usage,
)
from flaskapp.llm.completion import (
    Completion,
    ErrorEvent,
    NotACompletion,
    events_of_document,
    read_whole,
    tokens_of_whole,
    usage_in_error,
    usage_of_whole,
)
from flaskapp.llm.dialects import Dialects
from flaskapp.llm.echoes import GONE, texts_in, without_echoes
from flaskapp.llm.event_stream import EventStream
from flaskapp.llm.exchange import Connections, Exchange, ExchangeBroken, ExchangeTimeout, NotSent, Proxy
from flaskapp.llm.put_together import events_in, is_stream, put_together
from flaskapp.llm.refusals import refusal, refusal_in_answer

_TAIL_SECONDS = 0.2
"""How long to wait, after ``[DONE]``, for the end of the body, so that the connection can be used again."""
_EVENT_STREAM, _JSON = "text/event-stream", "application/json"
_ALSO_STREAMS = {_JSON, "text/plain", "application/octet-stream", "application/stream+json", "application/x-ndjson"}
"""Types under which some servers stream all the same. Some also stream where a whole answer was asked for."""
_SILENT_SECONDS = 5.0
"""How long an answer that has its end may go on in silence: some servers neither say ``[DONE]`` nor close."""
_MAX_ANSWER_BYTES = 16_777_216
"""More than any answer of the most choices and tokens."""
_ERROR_BODY_BYTES = 16_384
"""Some servers repeat the whole request in front of what is wrong with it."""
_ERROR_BODY_SECONDS = 1.0
_DETAIL_CHARACTERS = 200
_COMPLETIONS = "/chat/completions"
_KEY_LIKE = re.compile(r"\b(sk|pk|gsk|xai|org|proj|key|csk|nvapi|AIza)[-_]?[A-Za-z0-9*_-]{12,}")
"""Keys and accounts: ours in part, or those of a server behind the server."""


@dataclass(frozen=True, slots=True)
class Habits:
    """How a server wants to be asked."""

    auth_header: str = "Authorization"
    """`Authorization`, with a bearer token, or the name of a header that has the key alone."""
    max_tokens_parameter: str = "auto"
    stream_usage: str = "auto"
    proxy: str | None = None
    """The URL of an HTTP proxy."""


USUAL_HABITS = Habits()


class OpenAICompatibleModel:
    """One server and a pool of connections to it."""

    max_choices = MAX_CHOICES

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        clock: Clock,
        habits: Habits = USUAL_HABITS,
        observer: Observer = lambda _event: None,
    ) -> None:
        """`base_url` is what comes before ``/chat/completions``, or ends with it.

        Raises:
            ConfigurationError: the URL, the key or the proxy cannot be used.
        """
        server, self._target, host_header, url_credentials = _parse_base_url(base_url)
        self._headers = {
            "Host": host_header,
            "Content-Type": "application/json",
            "Accept-Encoding": "identity",
            "User-Agent": "tollgate",
        }
        if api_key:
            prefix = "Bearer " if habits.auth_header == "Authorization" else ""
            self._headers[habits.auth_header] = prefix + _checked_key(api_key)
        elif url_credentials:
            self._headers["Authorization"] = f"Basic {url_credentials}"
        proxy = _parse_proxy(habits.proxy) if habits.proxy else None
        secrets = [api_key, url_credentials, proxy and proxy.credentials, *_passwords(base_url, habits.proxy)]
        self._secrets = [_any_spelling(secret) for secret in secrets if secret]
        self.clock = clock
        self.dialects = Dialects(
            habits.max_tokens_parameter,
            habits.stream_usage,
            lambda model, fields: observer(Event("upstream_learnt", {"model": model, **fields})),
        )
        tls = _tls_context() if server.is_encrypted else None
        self.connections = Connections(server.host, server.port, tls, clock=clock, proxy=proxy)
        target = self._target
        if proxy is not None and tls is None:
            # A proxy is given the whole address; through a tunnel it sees nothing of the request.
            target = f"http://{host_header}{target}"
            if proxy.credentials:
                self._headers["Proxy-Authorization"] = f"Basic {proxy.credentials}"
        lines = [f"POST {target} HTTP/1.1", *(f"{name}: {value}" for name, value in self._headers.items())]
        self.head = "\r\n".join(lines).encode("latin-1")
        """Of a request: the request line and the headers that are always the same."""

    def ask(self, request: ModelRequest) -> "UpstreamAnswer":
        """See `Model.ask`."""
        return UpstreamAnswer(self, request)

    def close(self) -> None:
        """Close every connection."""
        self.connections.close()

    def clean(self, text: str, sent: Sequence[str] = ()) -> str:
        """`text` for one line of the log: short, printable, without our secrets and the texts that were `sent`."""
        for secret in self._secrets:
            text = secret.sub(GONE, text)
        text = _KEY_LIKE.sub(GONE, without_echoes(text, sent))
        printable = "".join(character if character.isprintable() else " " for character in text)
        return " ".join(printable.split())[:_DETAIL_CHARACTERS]


class UpstreamAnswer:
    """An answer of the server. Its usage is known only if all of it was read."""

    def __init__(self, model: OpenAICompatibleModel, request: ModelRequest) -> None:
        self._model = model
        self._request = request
        self._clock = model.clock
        self._exchange = Exchange(model.connections, model.clock)
        self._count_tokens = counter_for(request.model)
        self._completion = Completion(self._count_tokens, request.choices)
        self._events = EventStream(events_of_document)
        self._batch, self._lead_tokens = -1, 0
        self._failure: Exception | None = None
        self._error_text = ""
        self._is_whole = self._is_completed = False
        self._whole_usage: Usage | None = None
        self._early: Batch | None = None
        """What was read while the answer was opened."""
        self._ended_at_seconds: float | None = None
        # These two need no lock. Who uses the connection sets the first and then looks at the second; `close` sets the
        # second and then looks at the first. So one of them sees the other, and the connection is given back.
        self._in_use = False
        self._closed = False
        self._hung_up = False

    @property
    def usage(self) -> Usage | None:
        """The usage that the server sent; None without one, or if the answer was not read to its end."""
        return self._completion.usage if self._is_whole else self._whole_usage

    @property
    def has_ended(self) -> bool:
        """See `Answer.has_ended`."""
        return self._is_whole or self._is_completed

    @property
    def finish_reason(self) -> str:
        """Why the server stopped."""
        return self._completion.finish_reason

    def open(self) -> None:
        """Send the request and wait for the head of the response. See `Answer.open`."""
        self._begin()
        try:
            self._send(stream=True)
            if self._exchange.media_type == _JSON:
                self._await_document()
        except BaseException:
            self._end(is_over=True)
            raise
        self._end()

    def whole(self) -> Completed:
        """Send the request and wait for the whole answer. See `Answer.whole`."""
        self._begin()
        try:
            self._send(stream=False)
            body, data, self._whole_usage = self._read_whole()
        except (ErrorEvent, ValueError, ExchangeBroken) as error:
            raise self._failed(error) from error
        finally:
            self._end(is_over=True)
        self._is_completed = True
        seen_tokens = 0 if self._whole_usage else tokens_of_whole(body, self._count_tokens)
        return Completed(body, data, seen_tokens)

    def read(self, wait_seconds: float) -> Batch | None:
        """What came with one read. See `Answer.read`."""
        self._in_use = True
        batch: Batch | None = None
        try:
            if not self._closed:
                batch = self._read(wait_seconds)
        except (ErrorEvent, ValueError, ExchangeBroken) as error:
            is_cut_off = isinstance(error, ExchangeBroken) and not isinstance(error, ExchangeTimeout)
            # The end that our own hang-up made is none of the server's.
            if not is_cut_off or not (self._hung_up or self._closed):
                raise self._failed(error) from error
        finally:
            self._end(is_over=batch is None or batch.is_last)
        return batch

    def hang_up(self) -> None:
        """See `Answer.hang_up`: the upstream sees the end at once; what has come can still be read."""
        if not self._closed:
            self._hung_up = True
            self._exchange.break_off()

    def close(self) -> None:
        """Break the connection off, unless the answer has ended. A thread that uses it gives the connection back."""
        if self._closed:
            return
        self._closed = True
        # Before it is given back: then it may serve another request, and the exchange has no more to do with it.
        self._exchange.break_off()
        if not self._in_use:
            self._exchange.release()

    def _begin(self) -> None:
        self._in_use = True
        if self._closed:
            raise UpstreamNotTaken("The answer was given up before it was asked for.")

    def _end(self, *, is_over: bool = False) -> None:
        """End the use of the connection."""
        self._in_use = False
        if is_over:
            self._closed = True
        if self._closed:
            self._exchange.release()

    def _send(self, *, stream: bool) -> None:
        """Ask, and ask otherwise where the server refused how it was asked."""
        model, dialects = self._request.model, self._model.dialects
        deadline_at_seconds = self._clock.monotonic_seconds() + self._request.deadline_seconds
        dialect = dialects.of(model)
        tried = {dialect}
        while True:
            try:
                self._send_once(dialect.body(self._request, stream=stream), stream, deadline_at_seconds)
                break
            except UpstreamRefused:
                other = dialects.instead(dialect, self._error_text, stream=stream)
                if other is None or other in tried:
                    raise
                tried.add(other)
                dialect = other
            self._renew_exchange()
        if len(tried) > 1:
            dialects.learn(model, dialect)

    def _send_once(self, body: bytes, stream: bool, deadline_at_seconds: float) -> None:  # noqa: FBT001 (one caller)
        accept = _EVENT_STREAM if stream else _JSON
        head = b"%b\r\nAccept: %b\r\nContent-Length: %d\r\n\r\n" % (self._model.head, accept.encode(), len(body))
        clean = self._clean
        try:
            self._exchange.send(head + body, deadline_at_seconds)
            self._check()
        except NotSent as error:
            raise UpstreamNotTaken("The model could not be reached.", detail=clean(str(error))) from error
        except ExchangeTimeout as error:
            detail = clean(str(error))
            raise UpstreamBroken("The model did not answer in time.", detail=detail, timed_out=True) from error
        except ExchangeBroken as error:
            raise UpstreamBroken("The model's server broke off.", detail=clean(str(error))) from error

    def _renew_exchange(self) -> None:
        before, self._exchange = self._exchange, Exchange(self._model.connections, self._clock)
        before.release()
        if self._closed:
            raise UpstreamNotTaken("The answer was given up before it was asked for again.")

    def _clean(self, text: str) -> str:
        return self._model.clean(text, list(texts_in([self._request.messages, self._request.options])))

    def _failed(self, error: Exception) -> UpstreamError:
        """The failure for `error`; its usage is the answer's, where it says one."""
        clean = self._clean
        if not isinstance(error, ErrorEvent):
            return broken_answer(error, clean)
        if error.is_first:
            return self._billed(refusal_in_answer(error.text, self._clock.now_us(), clean), error.usage)
        return self._billed(broken_answer(error, clean), error.usage)

    def _billed(self, failure: UpstreamError, usage: Usage | None) -> UpstreamError:
        """The failure, with the usage that the server sent with its error, if it did."""
        self._whole_usage = usage
        failure.is_billed = usage is not None
        return failure

    def _check(self) -> None:
        status, kind = self._exchange.status, self._exchange.media_type
        if not HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
            text = self._error_text = self._read_error_body()
            retry_after = self._exchange.header("retry-after")
            failure = refusal(status, text, retry_after, self._clock.now_us(), self._clean)
            raise self._billed(failure, usage_in_error(text))
        if kind not in {_EVENT_STREAM, None} | _ALSO_STREAMS:
            raise UpstreamBroken(
                "The model's server sent something that is no answer.",
                detail=self._clean(f"status {status}, content type {kind}"),
            )

    def _read_whole(self) -> tuple[dict[str, Any], bytes, Usage | None]:
        """The answer; its bytes, where they can be passed on; and its usage."""
        received = bytearray()
        while part := self._exchange.read(self._request.deadline_seconds):
            received += part
            if len(received) > _MAX_ANSWER_BYTES:
                raise NotACompletion("an answer that is too large")
        content = bytes(received)
        if is_stream(content):
            return self._read_streamed_whole(content)
        body, data = read_whole(content)
        return body, data, usage_of_whole(body, self._count_tokens)

    def _read_streamed_whole(self, received: bytes) -> tuple[dict[str, Any], bytes, Usage | None]:
        """As `_read_whole`, of a server that streams although it was not asked to."""
        events = events_in(received)
        self._completion.read(events, [])
        self._completion.count_tokens()
        if not self._completion.ended:
            raise ExchangeBroken("the stream ended before the answer did")
        return put_together(events), b"", self._completion.usage

    def _read_error_body(self) -> str:
        ends = self._clock.monotonic_seconds() + _ERROR_BODY_SECONDS
        body = b""
        with contextlib.suppress(ExchangeBroken):
            while len(body) < _ERROR_BODY_BYTES and (part := self._exchange.read_until(ends)):
                body += part
        return body[:_ERROR_BODY_BYTES].decode(errors="replace")

    def _read(self, wait_seconds: float) -> Batch | None:
        if self._early is not None:
            early, self._early = self._early, None
            return early
        if self._failure is not None:
            raise self._failure
        if self._is_whole:
            self._read_tail()
            return None
        received = self._exchange.read(wait_seconds)
        if received is None:
            return self._silence()
        batch = self._parsed(received)
        if self._completion.done:
            self._is_whole = True
            batch.is_last = self._exchange.is_over
        elif not received and self._failure is None:
            if not self._completion.ended:
                raise ExchangeBroken("the stream ended before the answer did")
            # In a body without a length, an end by our own hang-up looks like one by the server.
            self._is_whole = not (self._hung_up or self._closed)
            batch.is_last = self._is_whole
            return batch if batch.pieces else None
        return batch

    def _silence(self) -> Batch | None:
        """Nothing came. Where all choices have their end, that is the end of the answer once it has lasted."""
        if not self._completion.ended:
            return NOTHING
        now = self._clock.monotonic_seconds()
        if self._ended_at_seconds is None:
            self._ended_at_seconds = now
        if now - self._ended_at_seconds < _SILENT_SECONDS:
            return NOTHING
        self._is_whole = not (self._hung_up or self._closed)
        self._exchange.break_off()
        return None

    def _await_document(self) -> None:
        """Wait for a whole answer that comes in place of a stream, so that an error is a refusal and no broken stream.

        Raises:
            UpstreamNotTaken, UpstreamBroken: it is an error, or broke off.
        """
        try:
            while True:
                batch = self._read(self._request.deadline_seconds)
                if self._failure is not None and not (batch and any(piece.deltas for piece in batch.pieces)):
                    raise self._failure
                if batch is None or not self._events.is_in_document:
                    self._early = batch
                    return
        except (ErrorEvent, ValueError, ExchangeBroken) as error:
            raise self._failed(error) from error

    def _parsed(self, received: bytes) -> Batch:
        """The pieces in the bytes of one read; at the end of the stream, where these are none, in what is left."""
        completion, events, pieces = self._completion, self._events, list[Piece]()
        alike = completion.read_alike(received) if events.is_between_events else None
        if alike is not None:
            pieces.append(alike)
        else:
            try:
                completion.read(events.feed(received) if received else events.end(), pieces)
            except (ErrorEvent, ValueError) as error:
                # What came before it is an answer still; the next read raises it. With its traceback it would hold us.
                self._failure = error.with_traceback(None)
        tokens = completion.count_tokens()
        if self._exchange.batches != self._batch:
            self._batch, self._lead_tokens = self._exchange.batches, 0
        self._lead_tokens += tokens
        return Batch(pieces, tokens, self._lead_tokens)

    def _read_tail(self) -> None:
        ends = self._clock.monotonic_seconds() + _TAIL_SECONDS
        with contextlib.suppress(ExchangeBroken):
            # One that goes on sending is not waited for.
            while self._clock.monotonic_seconds() < ends and self._exchange.read_until(ends):
                pass


def broken_answer(error: Exception, clean: Callable[[str], str]) -> UpstreamBroken:
    """The failure for `error` in the middle of an answer; `clean` makes its text fit for the log."""
    detail = clean(str(error) if isinstance(error, ExchangeBroken) else repr(error))
    if isinstance(error, ExchangeTimeout):
        return UpstreamBroken("The model did not go on in time.", detail=detail, timed_out=True)
    if isinstance(error, ErrorEvent):
        return UpstreamBroken("The model's server reported an error.", detail=detail)
    if isinstance(error, ValueError):
        return UpstreamBroken("The model's server sent something that is no answer.", detail=detail)
    return UpstreamBroken("The model's server broke off.", detail=detail)


class _Server(NamedTuple):
    host: str
    port: int
    is_encrypted: bool


def _parse_base_url(base_url: str) -> tuple[_Server, str, str, str]:
    """The server, the target of the completions, the Host header, and the URL's credentials as HTTP's basic ones."""
    try:
        parts = urlsplit(base_url)
        host, port = (parts.hostname or "").encode("idna").decode(), parts.port
    except ValueError:
        host, port = "", None
    if not host or parts.scheme not in {"http", "https"}:
        shown = "a URL with a password" if "@" in base_url else repr(base_url)
        raise ConfigurationError(f"LLM_BASE_URL: an http or https URL like https://api.openai.com/v1; got {shown}")
    path = parts.path.rstrip("/").removesuffix(_COMPLETIONS).rstrip("/")
    target = quote(path + _COMPLETIONS, safe="/%:@!$&'()*+,;=~") + (
        f"?{quote(parts.query, safe='/%:@!$&()*+,;=~?')}" if parts.query else ""
    )
    name = f"[{host}]" if ":" in host else host
    credentials = _basic_credentials(parts)
    is_encrypted = parts.scheme == "https"
    server = _Server(host, port or (443 if is_encrypted else 80), is_encrypted)
    return server, target, name if port is None else f"{name}:{port}", credentials


def _basic_credentials(parts: SplitResult) -> str:
    if parts.username is None:
        return ""
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return base64.b64encode(pair.encode()).decode()


def _parse_proxy(url: str) -> Proxy:
    """Where the proxy is.

    Raises:
        ConfigurationError: the URL is none of a plain HTTP proxy.
    """
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").encode("idna").decode(), parts.port
    except ValueError:
        host, port = "", None
    if not host or parts.scheme != "http":
        raise ConfigurationError("LLM_PROXY: an address like http://proxy.example:3128; got another one")
    return Proxy(host, port or 80, _basic_credentials(parts))


def _passwords(*urls: str | None) -> list[str]:
    """The passwords in URLs, which must not stand in a log."""
    return [unquote(password) for url in urls if url and (password := urlsplit(url).password)]


def _tls_context() -> ssl.SSLContext:
    """Trust the system's certificates, or only those that `SSL_CERT_FILE` or `SSL_CERT_DIR` names where one is set."""
    paths = ssl.get_default_verify_paths()
    own_file = paths.cafile if paths.cafile != paths.openssl_cafile else None
    own_directory = paths.capath if paths.capath != paths.openssl_capath and not own_file else None
    context = ssl.create_default_context(cafile=own_file, capath=own_directory)
    context.set_alpn_protocols(["http/1.1"])
    return context


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
