"""HTTP/1.1 with one server: pooled connections, a parser in C, and no wait without an end.

The sockets are plain ones, so that gevent's threads and native threads can share the pool. A request is sent once:
nothing here repeats it.
"""

import contextlib
import select
import socket
import ssl
import threading
from typing import Any

from gevent.monkey import get_original
from geventhttpclient.response import HTTPParseError, HTTPResponse

from backends.clock import Clock

_CONNECT_SECONDS = 5.0
_POOL_WAIT_SECONDS = 1.0
_CONNECTIONS = 512
_IDLE_CONNECTIONS = 64
_IDLE_SECONDS = 4.0
"""Shorter than the five seconds after which usual servers hang up: a request must not meet a closing connection."""
_READ_BYTES = 65_536
_MAX_HEAD_BYTES = 131_072
_AT_ONCE_SECONDS = 0.000_5
"""A read that took no longer found its bytes already there."""
_POLL = get_original("select", "poll")
"""The system's own, which never switches to another greenlet."""


class NotSent(Exception):
    """No connection could be had, so the server has seen nothing of the request."""


class ExchangeBroken(Exception):
    """The request was sent, at least a part of it, and then the connection failed."""


class ExchangeTimeout(ExchangeBroken):
    """The deadline of the exchange has passed."""


class Connections:
    """The connections to one server.

    Args:
        host: a name or an address.
        tls: the context of an ``https`` server; None for ``http``.
    """

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None, *, clock: Clock) -> None:
        self._address = (host, port)
        self._tls = tls
        self._clock = clock
        self._idle: list[tuple[socket.socket, float]] = []
        self._places = threading.BoundedSemaphore(_CONNECTIONS)
        self._is_closed = False

    def take(self, deadline_at_seconds: float) -> socket.socket:
        """A connection: the one that was used last, or a new one.

        Raises:
            NotSent: the server cannot be reached in time, or all connections are in use.
        """
        if not self._places.acquire(timeout=_POOL_WAIT_SECONDS):
            raise NotSent("all connections to the server are in use")
        try:
            return self._idle_one() or self._connected(deadline_at_seconds)
        except OSError as error:
            self._places.release()
            raise NotSent(repr(error)) from error
        except BaseException:
            self._places.release()
            raise

    def give_back(self, connection: socket.socket, *, is_reusable: bool) -> None:
        """End the use of a connection; what is not reusable is closed."""
        self._places.release()
        if is_reusable and not self._is_closed and len(self._idle) < _IDLE_CONNECTIONS:
            self._idle.append((connection, self._clock.monotonic_seconds()))
        else:
            connection.close()

    def close(self) -> None:
        """Close the connections that are not in use; the others are closed when they are given back."""
        self._is_closed = True
        while self._idle:
            self._idle.pop()[0].close()

    def _idle_one(self) -> socket.socket | None:
        oldest = self._clock.monotonic_seconds() - _IDLE_SECONDS
        with contextlib.suppress(IndexError):
            while True:
                connection, since_seconds = self._idle.pop()
                # An idle connection with something to read has been closed by the server.
                if since_seconds >= oldest and not _is_readable(connection):
                    return connection
                connection.close()
        return None

    def _connected(self, deadline_at_seconds: float) -> socket.socket:
        ends = min(self._clock.monotonic_seconds() + _CONNECT_SECONDS, deadline_at_seconds)
        connection = socket.create_connection(self._address, timeout=self._left(ends))
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                connection.settimeout(self._left(ends))
                connection = self._tls.wrap_socket(connection, server_hostname=self._address[0])
        except BaseException:
            connection.close()
            raise
        return connection

    def _left(self, moment_seconds: float) -> float:
        left = moment_seconds - self._clock.monotonic_seconds()
        if left <= 0:
            raise TimeoutError("no time left to connect")
        return left


class Exchange:
    """One request and its response. Only `break_off` may be called from another thread.

    Args:
        deadline_at_seconds: a moment of the clock's monotonic time, which bounds every wait.
    """

    def __init__(self, connections: Connections, clock: Clock, deadline_at_seconds: float) -> None:
        self._connections = connections
        self._clock = clock
        self._deadline_at_seconds = deadline_at_seconds
        self._response = _Response()
        self._connection: socket.socket | None = None
        self._lock = threading.Lock()
        self._is_broken_off = False
        self.batches = 0
        """How often the reader had caught up; what it reads until the next time may have come before."""
        self._has_caught_up = False

    @property
    def status(self) -> int:
        """The status of the response, once its head was read."""
        return self._response.get_code()

    @property
    def media_type(self) -> str | None:
        """The response's content type without parameters; None without one."""
        value = self._response.get("content-type")
        first = value[0] if isinstance(value, list) else value
        return None if first is None else first.partition(";")[0].strip().lower()

    def send(self, request: bytes) -> None:
        """Send the request, and read the head of the response.

        Raises:
            NotSent: there is no connection.
            ExchangeBroken: the connection failed, or what came is no response.
        """
        connection = self._connections.take(self._deadline_at_seconds)
        with self._lock:
            self._connection = connection
            if self._is_broken_off:
                raise ExchangeBroken("broken off before it was sent")
        try:
            connection.settimeout(self._left())
            connection.sendall(request)
        except TimeoutError as error:
            raise ExchangeTimeout(repr(error)) from error
        except OSError as error:
            raise ExchangeBroken(repr(error)) from error
        head_bytes = 0
        while not self._response.is_final_head_complete:
            head_bytes += self._feed(self._left())
            if head_bytes > _MAX_HEAD_BYTES and not self._response.is_final_head_complete:
                raise ExchangeBroken("the head of the response is too large")

    def read(self, wait_seconds: float) -> bytes | None:
        """What has come of the body; None where nothing came in the time; empty at the end.

        Raises:
            ExchangeTimeout: the deadline has passed.
            ExchangeBroken: the body broke off.
        """
        while True:
            if body := self._response.take_body():
                return body
            if self._response.is_over:
                return b""
            left = self._left()
            try:
                self._feed(min(wait_seconds, left))
            except ExchangeTimeout:
                if wait_seconds < left:
                    return None
                raise

    def read_until(self, moment_seconds: float) -> bytes | None:
        """As `read`, with a wait until a moment of the clock's monotonic time."""
        return self.read(max(0.0, moment_seconds - self._clock.monotonic_seconds()))

    def break_off(self) -> None:
        """Shut the connection down: a reader in any thread gets what has come, and then the end."""
        with self._lock:
            self._is_broken_off = True
            if self._connection is not None:
                # The plain socket's shutdown also under TLS: an SSLSocket's makes it a plain one under its reader.
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(self._connection, socket.SHUT_RDWR)

    def release(self) -> None:
        """Give the connection back; may be called twice."""
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            is_reusable = self._response.is_reusable and not self._is_broken_off
            self._connections.give_back(connection, is_reusable=is_reusable)

    def _feed(self, wait_seconds: float) -> int:
        """Parse what comes next; the number of bytes."""
        connection = self._connection
        if connection is None:
            raise ExchangeBroken("the connection was given back")
        started_seconds = self._clock.monotonic_seconds()
        try:
            connection.settimeout(max(wait_seconds, 0.000_001))
            received = connection.recv(_READ_BYTES)
            has_waited = self._clock.monotonic_seconds() - started_seconds > _AT_ONCE_SECONDS
            if has_waited or self._has_caught_up:
                self.batches += 1
            # A plain socket gives all that has come; an encrypted one a record of it.
            self._has_caught_up = len(received) < _READ_BYTES and not isinstance(connection, ssl.SSLSocket)
            self._response.feed(received)
        except TimeoutError as error:
            raise ExchangeTimeout(repr(error)) from error
        except (OSError, HTTPParseError) as error:
            raise ExchangeBroken(repr(error)) from error
        if not received and not self._response.is_over:
            raise ExchangeBroken("the connection ended before the response did")
        return len(received)

    def _left(self) -> float:
        left = self._deadline_at_seconds - self._clock.monotonic_seconds()
        if left <= 0:
            raise ExchangeTimeout("the deadline has passed")
        return left


class _Response(HTTPResponse):
    """The library's parser. It reads one final response; what follows makes the connection useless."""

    is_over = False
    _has_more = False

    @property
    def is_final_head_complete(self) -> bool:
        return self.is_over or bool(self.headers_complete and self.get_code() >= 200)  # noqa: PLR2004 (1xx are interim)

    @property
    def is_reusable(self) -> bool:
        return self.is_over and not self._has_more and not self.should_close()

    def take_body(self) -> bytes:
        """The bytes of the body that were not taken yet."""
        body = bytes(self._body_buffer)
        if body:
            self._body_buffer.clear()
        return body

    def feed(self, data: str | bytes) -> None:
        if self.is_over:
            self._has_more |= bool(data)
        else:
            super().feed(data)

    def _on_message_begin(self) -> None:
        self._has_more |= self.is_over
        super()._on_message_begin()

    def _on_message_complete(self) -> None:
        super()._on_message_complete()
        self.is_over |= self.get_code() >= 200  # noqa: PLR2004 (1xx are interim)


def _is_readable(connection: Any) -> bool:
    poll = _POLL()
    poll.register(connection.fileno(), select.POLLIN)
    return bool(poll.poll(0))
