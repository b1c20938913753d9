"""A connection that can be cut, held up, delayed, or lose replies, between a client and a server on this machine."""

import random
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Self

from flaskapp.ops.running_redis import HOST

_CHUNK_BYTES = 65_536


class Wire:
    """Forwards to `target`, a port that may change for the connections that follow; a context manager."""

    def __init__(self, target: int, seed: int = 1) -> None:
        self.target = target
        self.lost = 0
        """Replies, so far."""
        self._random = random.Random(seed)
        self._listener = socket.create_server((HOST, 0), backlog=1_024)
        self.port: int = self._listener.getsockname()[1]
        self._connections: list[socket.socket] = []
        self._passes = threading.Event()
        self.mend()

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()
        self._passes.set()
        # Wakes up whoever accepts.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def mend(self) -> None:
        """Forward everything at once."""
        self._lost_share = self._delay_seconds = 0.0
        self._is_cut = False
        self._passes.set()

    def lose(self, share: float) -> None:
        """Lose this share of the replies, each with its connection; the server has done what it was asked."""
        self._lost_share = share

    def delay(self, seconds: float) -> None:
        """Every reply comes later."""
        self._delay_seconds = seconds

    def hold(self) -> None:
        """Forward nothing until it is mended; connections stay, and new ones are taken."""
        self._passes.clear()

    def cut(self) -> None:
        """End all connections; new ones end at once until it is mended."""
        self._is_cut = True
        for each in self._connections:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._connections.clear()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._is_cut:
                client.close()
                continue
            threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection((HOST, self.target))
        except OSError:
            client.close()
            return
        self._connections += [client, server]
        for each in (client, server):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=self._forward, args=(client, server, lambda: True), daemon=True).start()
        self._forward(server, client, self._comes_through)

    def _comes_through(self) -> bool:
        time.sleep(self._delay_seconds)
        is_lost = self._random.random() < self._lost_share
        self.lost += is_lost
        return not is_lost

    def _forward(self, source: socket.socket, sink: socket.socket, comes_through: Callable[[], bool]) -> None:
        with suppress(OSError):
            while chunk := source.recv(_CHUNK_BYTES):
                self._passes.wait()
                if not comes_through():
                    break
                sink.sendall(chunk)
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        source.close()
