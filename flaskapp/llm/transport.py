"""Connections with a deadline. httpcore has a time-out for each read, so a trickle of bytes could keep it for ever.

Here a "time-out" is a moment of the monotonic clock by which a request must be through; each wait on the socket gets
what is left until then. Another thread can break a connection off, which wakes the thread that reads from it.
"""

import contextlib
import socket
import ssl
from collections.abc import Iterable
from typing import Any

import httpcore2

from backends.clock import Clock

_AT_ONCE_SECONDS = 0.000_5
"""A read that took no longer found its bytes already there."""


class TimedStream(httpcore2.NetworkStream):
    """A connection; every `timeout` is a moment, not a length."""

    def __init__(self, stream: httpcore2.NetworkStream, clock: Clock, *, is_encrypted: bool = False) -> None:
        self._stream = stream
        self._clock = clock
        self._is_encrypted = is_encrypted
        self.hurry_until_seconds: float | None = None
        """If set, reading ends at this moment, unless its time-out is earlier."""
        self.batches = 0
        """How often the reader had caught up; what it reads until the next time may have come before."""
        self._has_caught_up = False

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """The bytes that have come, at most `max_bytes`; empty at the end."""
        if timeout is not None and self.hurry_until_seconds is not None:
            timeout = min(timeout, self.hurry_until_seconds)
        left = seconds_until(timeout, self._clock)
        if left == 0:
            raise httpcore2.ReadTimeout
        asked_at_seconds = self._clock.monotonic_seconds()
        received = self._stream.read(max_bytes, left)
        has_waited = self._clock.monotonic_seconds() - asked_at_seconds > _AT_ONCE_SECONDS
        if has_waited or self._has_caught_up:
            self.batches += 1
        # A plain socket gives all that has come; an encrypted one a record of it.
        self._has_caught_up = not self._is_encrypted and len(received) < max_bytes
        return received

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send all of `buffer`."""
        left = seconds_until(timeout, self._clock)
        if left == 0:
            raise httpcore2.WriteTimeout
        self._stream.write(buffer, left)

    def close(self) -> None:
        """Close the socket."""
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        """The same connection, encrypted."""
        left = seconds_until(timeout, self._clock)
        if left == 0:
            raise httpcore2.ConnectTimeout
        return TimedStream(self._stream.start_tls(ssl_context, server_hostname, left), self._clock, is_encrypted=True)

    def get_extra_info(self, info: str) -> Any:
        """See httpcore."""
        return self._stream.get_extra_info(info)

    def break_off(self) -> None:
        """Shut the connection down: a reader in any thread gets what has come, and then the end."""
        # The plain socket's shutdown also under TLS: that of an SSLSocket makes it a plain one under its reader.
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.get_extra_info("socket"), socket.SHUT_RDWR)


class TimedBackend(httpcore2.NetworkBackend):
    """Opens `TimedStream` connections. It reads no environment, so no proxy is ever used."""

    def __init__(self, clock: Clock) -> None:
        self._backend = httpcore2.SyncBackend()
        self._clock = clock

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        """Connect until the moment `timeout`."""
        left = seconds_until(timeout, self._clock)
        if left == 0:
            raise httpcore2.ConnectTimeout
        stream = self._backend.connect_tcp(host, port, left, local_address, socket_options)
        return TimedStream(stream, self._clock)


def seconds_until(moment_seconds: float | None, clock: Clock) -> float | None:
    """The seconds left until then, never below 0; None without such a moment."""
    return None if moment_seconds is None else max(0.0, moment_seconds - clock.monotonic_seconds())
