"""What a gevent worker of gunicorn does with a connection before the application has a request of it.

Requests begin one after another, and between two of them the worker looks at all its connections. So a question of
health is answered soon, however many others came before it: those have turns of their own.

What gunicorn cannot read as a request is refused as everything else is, and nothing of it reaches the log.
"""

import logging
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from ssl import SSLContext
from sys import byteorder

from flask import Flask
from gevent import Timeout, get_hub
from gevent.hub import Waiter
from gevent.pool import Pool
from gevent.server import StreamServer
from gevent.ssl import SSLSocket
from gunicorn.config import Config
from gunicorn.http.errors import NoMoreData, ParseException

from backends.clock import Clock, SystemClock
from flaskapp.http.unreadable import is_of_a_body, refusal

PROBES = ("/healthz", "/readyz")
"""Paths whose requests wait for one another alone."""
_BEGINNINGS = tuple(f"{method} {path} ".encode() for method in ("GET", "HEAD") for path in PROBES)
_LONGEST_BEGINNING = max(map(len, _BEGINNINGS))
_FEW_WAIT, _ACCEPTED_AT_ONCE = 32, 8
"""While more than those few wait, they are accepted first and together. Else one after another and served at once: what
one worker accepts no other can."""
_QUEUE = slice(24, 28)
"""Where `TCP_INFO` of a listening socket has the number of connections that wait to be accepted (Linux)."""
_MOST_WAIT_SECONDS = 0.02
"""How long new connections alone are looked at while more and more come."""
_LINGER_SECONDS = 1


class Turns:
    """Lets one greenlet go on after each look of the loop at its connections."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        # Of what a look has found it comes last.
        self._after_look = get_hub().loop.timer(0, priority=-2)
        self._waiting: deque[Waiter] = deque()
        self._is_taken = False
        self._has_newcomers = False
        self._last_seconds = 0.0

    def take(self) -> None:
        """Come back when it is the caller's turn: at once, where it is the first since the last look."""
        if not self._is_taken:
            self._is_taken = True
            self._after_look.start(self._go_on)
            return
        waiter = Waiter()
        self._waiting.append(waiter)
        waiter.get()

    def announce(self) -> None:
        """There is a new connection, and there are many behind it."""
        self._has_newcomers = True

    def _go_on(self) -> None:
        has_newcomers, self._has_newcomers = self._has_newcomers, False
        if not self._waiting:
            self._is_taken = False
            return
        self._after_look.start(self._go_on)
        now_seconds = self._clock.monotonic_seconds()
        if not has_newcomers or now_seconds - self._last_seconds >= _MOST_WAIT_SECONDS:
            self._last_seconds = now_seconds
            self._waiting.popleft().switch(None)


class Connections:
    """The connections of one worker; to be made after the fork."""

    def __init__(self, app: Flask, config: Config) -> None:
        self._app = app
        self._config = config
        self._turns, self._turns_of_probes = Turns(SystemClock()), Turns(SystemClock())
        self._servers: dict[socket.socket, StreamServer] = {}
        app.extensions["tollgate"].bodies.take_turn = self._turns.take
        logging.getLogger("gunicorn.error").addFilter(without_what_was_sent)

    def listen(
        self, listener: socket.socket, handle: Callable[..., object], pool: Pool, **tls: SSLContext
    ) -> StreamServer:
        """The server that hands each new connection to `handle`; `tls` is gunicorn's, where it has a certificate."""
        server = StreamServer(listener, handle=handle, spawn=pool, **tls)
        server.max_accept = 1
        self._servers[listener] = server
        return server

    def wait_for_turn(self, listener: socket.socket, client: socket.socket) -> bool:
        """Wait for the first bytes of a new connection, and then for its turn; whether there are any."""
        do_many_wait = _waiting(listener) > _FEW_WAIT
        self._servers[listener].max_accept = _ACCEPTED_AT_ONCE if do_many_wait else 1
        if do_many_wait:
            self._turns.announce()
        if isinstance(client, SSLSocket):
            # It cannot be peeked into.
            self._take_turn(is_probe=False)
            return True
        client.settimeout(self._config.keepalive or None)
        try:
            beginning = client.recv(_LONGEST_BEGINNING, socket.MSG_PEEK)
        except OSError:
            return False
        if beginning:
            self._take_turn(is_probe=beginning.startswith(_BEGINNINGS))
        return bool(beginning)

    def wait_for_next_turn(self, path: str) -> None:
        """Wait for the turn of a further request of a connection."""
        self._take_turn(is_probe=path in PROBES)

    def _take_turn(self, *, is_probe: bool) -> None:
        (self._turns_of_probes if is_probe else self._turns).take()

    def refuse(self, client: socket.socket, error: Exception, address: str) -> None:
        """Answer to what cannot be read as a request; the connection ends then."""
        if is_of_a_body(error):
            # The request was answered before.
            return
        with Timeout(_LINGER_SECONDS, exception=False), suppress(OSError):
            client.sendall(refusal(self._app, self._config, error, address))
            # Who is still sending would lose the answer if the connection ended now.
            client.shutdown(socket.SHUT_WR)
            while client.recv(65_536):
                pass


def _waiting(listener: socket.socket) -> int:
    """How many connections wait to be accepted; 0 where the system does not say."""
    with suppress(OSError, AttributeError):
        return int.from_bytes(listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 28)[_QUEUE], byteorder)
    return 0


def without_what_was_sent(record: logging.LogRecord) -> bool:
    """Take out of gunicorn's own lines what it could not read: there may be secrets in it."""
    if isinstance(record.args, tuple):
        record.args = tuple(
            type(each).__name__ if isinstance(each, NoMoreData | ParseException) else each for each in record.args
        )
    return True
