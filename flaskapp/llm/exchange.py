"""HTTP/1.1 with one server: pooled connections, a parser in C, and no wait without an end.

The sockets are plain ones, so that gevent's threads and native threads can share the pool. A request is sent once:
nothing here repeats it.
"""

import contextlib
import os
import queue
import select
import socket
import ssl
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from gevent.monkey import get_original
from geventhttpclient.response import HTTPParseError, HTTPResponse

from backends.clock import Clock

_CONNECT_SECONDS = 5.0
_POOL_WAIT_SECONDS = 1.0
_CONNECTIONS = 1_024
_IDLE_CONNECTIONS = 64
_IDLE_SECONDS = 4.0
"""Shorter than the five seconds after which usual servers hang up: a request must not meet a closing connection."""
_READ_BYTES = 65_536
_MAX_UNPACKED_BYTES = 16_777_216
"""The most that one read of a compressed body may come to."""
_ZLIB_OR_GZIP = zlib.MAX_WBITS | 32
_MAX_BYTES_BETWEEN = 131_072
"""The largest head of a response, all interim ones included, and the most that may come without a byte of its body."""
_AT_ONCE_SECONDS = 0.000_5
"""A read that took no longer found its bytes already there."""
_LEAST_SECONDS = 0.000_001
"""A time-out of 0 would mean to not wait at all, and be another error."""
_LEAST_STATUS, _FIRST_FINAL_STATUS = 100, 200
"""Between them are interim ones: the response is still to come."""

# The system's own, which never switch to another greenlet.
_original_poll = get_original("select", "poll")
_original_getaddrinfo = get_original("socket", "getaddrinfo")

_Wake = Callable[[], object]
"""Ends what waits, from any thread and without waiting."""


class NotSent(Exception):
    """No connection could be had, so the server has seen nothing of the request."""


class ExchangeBroken(Exception):
    """The request was sent, at least a part of it, and then the connection failed."""


class ExchangeTimeout(ExchangeBroken):
    """The deadline of the exchange has passed."""


class _Connection:
    """A plain socket. Each time-out is for the whole wait."""

    def __init__(self, plain: socket.socket) -> None:
        self.plain = plain
        self.idle_since_seconds = 0.0

    def send(self, data: bytes, wait_seconds: float) -> None:
        """Send all of it."""
        self.plain.settimeout(max(wait_seconds, _LEAST_SECONDS))
        # All of it nearly always, and for half the price of `sendall` under gevent.
        sent = self.plain.send(data)
        if sent < len(data):
            self.plain.sendall(memoryview(data)[sent:])

    def receive(self, wait_seconds: float) -> bytes | None:
        """What has come; empty at the end; None where what came says nothing yet."""
        self.plain.settimeout(max(wait_seconds, _LEAST_SECONDS))
        return self.plain.recv(_READ_BYTES)

    def close(self) -> None:
        self.plain.close()


class _EncryptedConnection(_Connection):
    """TLS over a plain socket, and no `ssl.SSLSocket`: under gevent, that one's time-out begins anew with each byte."""

    def __init__(self, plain: socket.socket, context: ssl.SSLContext, host: str) -> None:
        super().__init__(plain)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self._has_ended = False

    def shake_hands(self, wait_seconds: float) -> bool:
        """Send our next word and wait for the server's; whether the handshake is done."""
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._flush(wait_seconds)
            self._fill(wait_seconds)
            return False
        except ssl.SSLError:
            # The server is told why.
            self._flush(wait_seconds)
            raise
        self._flush(wait_seconds)
        return True

    def send(self, data: bytes, wait_seconds: float) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self._tls.write(rest) :]
        self._flush(wait_seconds)

    def receive(self, wait_seconds: float) -> bytes | None:
        received = bytearray()
        if not self._has_ended:
            self._fill(wait_seconds)
        try:
            while part := self._tls.read(_READ_BYTES):
                received += part
        except ssl.SSLWantReadError:
            # Some messages of the protocol have to be answered.
            self._flush(wait_seconds)
            return bytes(received) or None
        except ssl.SSLEOFError:
            # Many servers end without a goodbye. A response that is cut so has no end of its own.
            pass
        self._has_ended = True
        return bytes(received)

    def _fill(self, wait_seconds: float) -> None:
        received = super().receive(wait_seconds)
        if received:
            self._incoming.write(received)
        else:
            self._incoming.write_eof()

    def _flush(self, wait_seconds: float) -> None:
        if self._outgoing.pending:
            super().send(self._outgoing.read(), wait_seconds)


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy on the way to a server."""

    host: str
    port: int
    credentials: str = ""
    """HTTP's basic ones; empty for none."""


class Connections:
    """The connections to one server.

    Args:
        host: a name or an address.
        tls: the context of an ``https`` server; None for ``http``.
        proxy: where to connect instead. An encrypted connection goes through it as a tunnel.
    """

    def __init__(
        self, host: str, port: int, tls: ssl.SSLContext | None, *, clock: Clock, proxy: Proxy | None = None
    ) -> None:
        self._host, self._port = host, port
        self._proxy = proxy
        self._near_host, self._near_port = (proxy.host, proxy.port) if proxy else (host, port)
        self._tls = tls
        self._clock = clock
        self._idle: deque[_Connection] = deque()
        self._in_use: set[_Connection] = set()
        # Not a semaphore: an exchange that is dropped gives its place back whenever memory is collected.
        self._places: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(_CONNECTIONS):
            self._places.put(None)
        self._is_closed = False

    @property
    def in_use(self) -> int:
        """How many connections serve an exchange."""
        return len(self._in_use)

    @property
    def idle(self) -> int:
        """How many connections wait for their next exchange."""
        return len(self._idle)

    def take(self, deadline_at_seconds: float, on_wait: Callable[[_Wake | None], None]) -> _Connection:
        """A connection: the one that was used last, or a new one.

        Args:
            deadline_at_seconds: a moment of the clock's monotonic time.
            on_wait: called before each wait with what ends it, and with None when nothing has to be ended any more;
                it raises `NotSent` to end the whole. It has what ends the connection's waits when this returns.

        Raises:
            NotSent: the server cannot be reached in time, or all connections are in use.
        """
        try:
            self._places.get(timeout=_POOL_WAIT_SECONDS)
        except queue.Empty:
            raise NotSent("all connections to the server are in use") from None
        try:
            self._left(deadline_at_seconds)
            connection = self._idle_one(on_wait) or self._connected(deadline_at_seconds, on_wait)
        except BaseException as error:
            self._places.put(None)
            if isinstance(error, OSError):
                raise NotSent(repr(error)) from error
            raise
        self._in_use.add(connection)
        return connection

    def give_back(self, connection: _Connection, *, is_reusable: bool) -> None:
        """End the use of a connection; what is not reusable is closed."""
        self._in_use.discard(connection)
        now = connection.idle_since_seconds = self._clock.monotonic_seconds()
        with contextlib.suppress(IndexError):
            while self._idle[0].idle_since_seconds < now - _IDLE_SECONDS:
                self._idle.popleft().close()
        if is_reusable and not self._is_closed and len(self._idle) < _IDLE_CONNECTIONS:
            self._idle.append(connection)
        else:
            connection.close()
        self._places.put(None)
        # It may have been closed meanwhile.
        if self._is_closed:
            self._close_idle()

    def close(self) -> None:
        """Close the connections, and break off those that are in use: their exchanges close them."""
        self._is_closed = True
        self._close_idle()
        for connection in tuple(self._in_use):
            shut_down(connection.plain)

    def _close_idle(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()

    def _idle_one(self, on_wait: Callable[[_Wake | None], None]) -> _Connection | None:
        oldest = self._clock.monotonic_seconds() - _IDLE_SECONDS
        with contextlib.suppress(IndexError):
            while True:
                connection = self._idle.pop()
                # An idle connection with something to read has been closed by the server.
                if connection.idle_since_seconds >= oldest and not _is_readable(connection.plain):
                    with _closed_on_failure(connection.plain, on_wait):
                        return connection
                connection.close()
        return None

    def _connected(self, deadline_at_seconds: float, on_wait: Callable[[_Wake | None], None]) -> _Connection:
        ends = min(self._clock.monotonic_seconds() + _CONNECT_SECONDS, deadline_at_seconds)
        addresses = self._addresses(ends, on_wait)
        failure = OSError("the name has no address")
        for number, (family, kind, protocol, _, address) in enumerate(addresses):
            # The first may be dead and the last alive, so none gets all the time.
            share_seconds = self._left(ends) / (len(addresses) - number)
            plain = socket.socket(family, kind, protocol)
            try:
                with _closed_on_failure(plain, on_wait):
                    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    plain.settimeout(share_seconds)
                    plain.connect(address)
            except OSError as error:
                failure = error.with_traceback(None)
                continue
            with _closed_on_failure(plain, on_wait):
                return self._encrypted(plain, self._tls, ends) if self._tls else _Connection(plain)
        raise failure

    def _encrypted(self, plain: socket.socket, tls: ssl.SSLContext, ends: float) -> _Connection:
        if self._proxy is not None:
            self._tunnel(plain, self._proxy, ends)
        connection = _EncryptedConnection(plain, tls, self._host)
        while not connection.shake_hands(self._left(ends)):
            pass
        return connection

    def _tunnel(self, plain: socket.socket, proxy: Proxy, ends: float) -> None:
        """Ask the proxy for a connection to the server."""
        name = f"[{self._host}]:{self._port}" if ":" in self._host else f"{self._host}:{self._port}"
        lines = [f"CONNECT {name} HTTP/1.1", f"Host: {name}"]
        if proxy.credentials:
            lines.append(f"Proxy-Authorization: Basic {proxy.credentials}")
        plain.settimeout(self._left(ends))
        plain.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        head = b""
        # The server says nothing before we do, so what comes is the proxy's head and no more.
        while b"\r\n\r\n" not in head:
            plain.settimeout(self._left(ends))
            received = plain.recv(_READ_BYTES)
            head += received
            if not received or len(head) > _READ_BYTES:
                raise OSError("the proxy gave no answer")
        status = head.split(b"\r\n", 1)[0].split(b" ")[1:2]
        if status != [b"200"]:
            raise OSError(f"the proxy answered with status {b''.join(status)[:3].decode(errors='replace')}")

    def _addresses(self, ends: float, on_wait: Callable[[_Wake | None], None]) -> list[Any]:
        with contextlib.suppress(OSError):
            # An address needs no look-up.
            return _look_up(_original_getaddrinfo, self._near_host, self._near_port, socket.AI_NUMERICHOST)
        found: queue.SimpleQueue[list[Any] | OSError] = queue.SimpleQueue()
        on_wait(partial(found.put, OSError("broken off")))
        threading.Thread(target=self._find, args=(found.put,), name="tollgate-lookup", daemon=True).start()
        try:
            addresses = found.get(timeout=self._left(ends))
        except queue.Empty:
            raise TimeoutError("the name was not looked up in time") from None
        if isinstance(addresses, OSError):
            raise addresses
        return addresses

    def _find(self, put: Callable[[list[Any] | OSError], None]) -> None:
        # In a thread of its own: a look-up has no time-out, and cannot be broken off.
        try:
            put(_look_up(socket.getaddrinfo, self._near_host, self._near_port))
        except OSError as error:
            put(error)

    def _left(self, moment_seconds: float) -> float:
        left = moment_seconds - self._clock.monotonic_seconds()
        if left <= 0:
            raise TimeoutError("no time left to connect")
        return left


class Exchange:
    """One request and its response. Only `break_off` may be called from another thread.

    An exchange that is dropped on the way hangs up.
    """

    def __init__(self, connections: Connections, clock: Clock) -> None:
        self._connections = connections
        self._clock = clock
        self._deadline_at_seconds = 0.0
        self._response = _Response()
        self._connection: _Connection | None = None
        self._wake: _Wake | None = None
        self._lock = threading.Lock()
        self._is_broken_off = False
        self._is_sent = False
        self._bytes_without_body = 0
        self.batches = 0
        """How often the reader had caught up; what it reads until the next time may have come before."""
        self._has_caught_up = False

    def __del__(self) -> None:
        self.release()

    @property
    def status(self) -> int:
        """The status of the response, once its head was read."""
        return self._response.final_status

    @property
    def is_over(self) -> bool:
        """Whether the response was read to its end."""
        return self._response.is_over and not self._response.body

    @property
    def media_type(self) -> str | None:
        """The response's content type without parameters; None without one."""
        return self._response.media_type

    def header(self, name: str) -> str | None:
        """A header of the response, the first of that name; None without one."""
        return self._response.first_header(name)

    def send(self, request: bytes, deadline_at_seconds: float) -> None:
        """Send the request, and read the head of the response.

        `deadline_at_seconds`, a moment of the clock's monotonic time, bounds every wait of this exchange.

        Raises:
            NotSent: there is no connection.
            ExchangeBroken: the connection failed, or what came is no response.
        """
        self._deadline_at_seconds = deadline_at_seconds
        self._connection = self._connections.take(deadline_at_seconds, self._note_wait)
        try:
            self._connection.send(request, self._left(self._clock.monotonic_seconds()))
            self._is_sent = True
        except OSError as error:
            failure = _failure(error)
            if isinstance(failure, ExchangeTimeout):
                raise failure from error
            # A server may refuse a request before it has read all of it.
        while not self._response.final_status:
            self._feed(deadline_at_seconds)

    def read(self, wait_seconds: float) -> bytes | None:
        """What has come of the body; None where nothing came in the time; empty at the end.

        Raises:
            ExchangeTimeout: the deadline has passed.
            ExchangeBroken: the body broke off.
        """
        return self.read_until(self._clock.monotonic_seconds() + wait_seconds)

    def read_until(self, moment_seconds: float) -> bytes | None:
        """As `read`, with a wait until a moment of the clock's monotonic time."""
        response = self._response
        while not response.body and not response.is_over:
            try:
                # What comes may be none of the body.
                self._feed(moment_seconds)
            except ExchangeTimeout:
                if moment_seconds >= self._deadline_at_seconds:
                    raise
                return None
        body = bytes(response.body)
        response.body.clear()
        return body

    def break_off(self) -> None:
        """Shut the connection down: a reader in any thread gets what has come, and then the end or `ExchangeBroken`.

        A connection that is being made is given up: `send` raises.
        """
        with self._lock:
            self._is_broken_off = True
            if self._wake is not None:
                self._wake()

    def release(self) -> None:
        """Give the connection back; may be called twice."""
        with self._lock:
            connection, self._connection = self._connection, None
            self._wake = None
        if connection is not None:
            is_reusable = self._response.is_reusable and self._is_sent and not self._is_broken_off
            self._connections.give_back(connection, is_reusable=is_reusable)

    def _note_wait(self, wake: _Wake | None) -> None:
        with self._lock:
            self._wake = wake
            if wake is not None and self._is_broken_off:
                raise NotSent("broken off before it was sent")

    def _feed(self, until_seconds: float) -> None:
        """Parse what comes next, if it comes in the time."""
        connection, response = self._connection, self._response
        if connection is None or response.failure is not None:
            raise ExchangeBroken(repr(response.failure or "the connection was given back"))
        started_seconds = self._clock.monotonic_seconds()
        left_seconds = self._left(started_seconds)
        try:
            received = connection.receive(min(until_seconds - started_seconds, left_seconds))
            if received is None:
                return
            self._note_batch(len(received), self._clock.monotonic_seconds() - started_seconds)
            response.feed(received)
        except (OSError, HTTPParseError) as error:
            raise _failure(error) from error
        if response.body:
            self._bytes_without_body = 0
        else:
            self._note_no_body(len(received))

    def _note_no_body(self, received_bytes: int) -> None:
        if not received_bytes and not self._response.is_over:
            raise ExchangeBroken("the connection ended before the response did")
        self._bytes_without_body += received_bytes
        if self._bytes_without_body > _MAX_BYTES_BETWEEN:
            raise ExchangeBroken("the head of the response is too large, or its body has too little in it")

    def _note_batch(self, received_bytes: int, took_seconds: float) -> None:
        if self._has_caught_up or took_seconds > _AT_ONCE_SECONDS:
            self.batches += 1
        self._has_caught_up = received_bytes < _READ_BYTES
        if not self._has_caught_up:
            # Under gevent, who finds bytes at each read never lets anybody else run.
            time.sleep(0)

    def _left(self, now_seconds: float) -> float:
        left = self._deadline_at_seconds - now_seconds
        if left <= 0:
            raise ExchangeTimeout("the deadline has passed")
        return left


_Unpack = Callable[[bytearray], bytes]


def _unpacking() -> _Unpack:
    """Unpacks a body of gzip or deflate, as it comes."""
    unpacker = zlib.decompressobj(_ZLIB_OR_GZIP)

    def unpack(data: bytearray) -> bytes:
        try:
            unpacked = unpacker.decompress(data, _MAX_UNPACKED_BYTES)
        except zlib.error as error:
            raise HTTPParseError(f"a body that cannot be unpacked: {error}") from error
        if unpacker.unconsumed_tail:
            raise HTTPParseError("a body that unpacks to too much")
        return unpacked

    return unpack


class _Response(HTTPResponse):
    """The library's parser. It reads one final response; what follows makes the connection useless."""

    def __init__(self) -> None:
        super().__init__()
        self.final_status = 0
        """0 until the head of the final response was read."""
        self.media_type: str | None = None
        self.is_over = False
        self.body = bytearray()
        """What came of the body and was not taken yet."""
        self._unpack: _Unpack | None = None
        """Of a body that is compressed, though it was asked for as it is."""
        self.failure: HTTPParseError | None = None
        """What came after the body that can still be taken was no HTTP."""

    @property
    def is_reusable(self) -> bool:
        return self.is_over and self.failure is None and not self.should_close()

    def first_header(self, name: str) -> str | None:
        """The first header of that name; None without one."""
        value = self.get(name)
        first = value[0] if isinstance(value, list) else value
        return first if isinstance(first, str) else None

    def feed(self, data: str | bytes) -> None:
        try:
            # Past the library's own layer, which is there for answers to HEAD.
            super(HTTPResponse, self).feed(data)
        except HTTPParseError as error:
            self.failure = error.with_traceback(None)
            if not self.is_over and not self.body:
                raise

    def _on_message_begin(self) -> None:
        if self.is_over:
            raise HTTPParseError("a second response")
        super()._on_message_begin()

    def _on_headers_complete(self) -> int | bool | None:
        skips_body = super()._on_headers_complete()
        if self.get_code() < _LEAST_STATUS:
            raise HTTPParseError("no status")
        if self.get_code() >= _FIRST_FINAL_STATUS:
            self.final_status = self.get_code()
            first = self.first_header("content-type")
            self.media_type = None if first is None else first.partition(";")[0].strip().lower()
            if str(self.get("content-encoding")).lower() in {"gzip", "x-gzip", "deflate"}:
                self._unpack = _unpacking()
        return skips_body

    def _on_header_field(self, string: str) -> None:
        # Those after the body are dropped.
        if not self.final_status:
            super()._on_header_field(string)

    def _on_header_value(self, string: str) -> None:
        if not self.final_status:
            super()._on_header_value(string)

    def _on_body(self, buf: bytearray) -> None:
        self.body += buf if self._unpack is None else self._unpack(buf)

    def _on_message_complete(self) -> None:
        super()._on_message_complete()
        self.is_over = bool(self.final_status)


def _failure(error: Exception) -> ExchangeBroken:
    # With a number it comes from the system: it has given up the connection.
    is_timeout = isinstance(error, TimeoutError) and error.errno is None
    return ExchangeTimeout(repr(error)) if is_timeout else ExchangeBroken(repr(error))


@contextlib.contextmanager
def _closed_on_failure(plain: socket.socket, on_wait: Callable[[_Wake | None], None]) -> Iterator[None]:
    try:
        on_wait(partial(shut_down, plain))
        yield
    except BaseException:
        # First: what was closed must not be shut down, since its number may be another's by then.
        on_wait(None)
        plain.close()
        raise


def shut_down(connection: socket.socket) -> None:
    """End both directions of `connection`, whatever waits for it: that finds the end, or a broken pipe."""
    # Through a second handle: under gevent, a socket's own shutdown ends what waits for it with another error, and what
    # had come by then would not be read. By its number, since an encrypted one makes no second.
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as handle:
        handle.shutdown(socket.SHUT_RDWR)


def _look_up(getaddrinfo: Callable[..., list[Any]], host: str, port: int, flags: int = 0) -> list[Any]:
    return getaddrinfo(host, port, 0, socket.SOCK_STREAM, 0, flags)


def _is_readable(plain: socket.socket) -> bool:
    poll = _original_poll()
    poll.register(plain.fileno(), select.POLLIN)
    return bool(poll.poll(0))
