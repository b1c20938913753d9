"""What a network and a failing server do: a server that says one thing, and a proxy that loses replies."""

import socket
import threading
from contextlib import contextmanager

from backends.clock import SystemClock


class SkippingClock(SystemClock):
    """The host's clock, which a test may move forward."""

    def __init__(self):
        self.skipped_seconds = 0.0

    def skip(self, seconds):
        self.skipped_seconds += seconds

    def now_us(self):
        return super().now_us() + int(self.skipped_seconds * 1_000_000)

    def monotonic_seconds(self):
        return super().monotonic_seconds() + self.skipped_seconds


class Told(list):
    """An observer that remembers."""

    def __call__(self, event):
        self.append(event)

    def named(self, name):
        return [event.fields for event in self if event.name == name]


@contextmanager
def listening(serve):
    """A TCP server on a free port of the loopback; `serve(connection)` runs in a thread for each caller."""
    server = socket.create_server(("127.0.0.1", 0))
    connections = []

    def accept():
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            connections.append(connection)
            threading.Thread(target=served, args=(connection,), daemon=True).start()

    def served(connection):
        with connection:
            try:
                serve(connection)
            except OSError:
                return

    acceptor = threading.Thread(target=accept, daemon=True)
    acceptor.start()
    try:
        yield server.getsockname()[1]
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        acceptor.join()
        for connection in connections:
            connection.close()


@contextmanager
def server_that_says(reply):
    """A server whose every answer is `reply`; None hangs up instead."""

    def serve(connection):
        while connection.recv(65_536):
            if reply is None:
                return
            connection.sendall(reply)

    with listening(serve) as port:
        yield f"redis://127.0.0.1:{port}/0"


class Proxy:
    """Between a client and the server at `port`.

    What `lose` says yes to is done, but its reply is lost with the connection; with `swallow` it just never comes.
    """

    def __init__(self, port):
        self.port = port
        self.lose = lambda _request: False
        self.swallow = lambda _request: False
        self.lost = 0

    @contextmanager
    def running(self):
        with listening(self._serve) as port:
            yield f"redis://127.0.0.1:{port}/0"

    def _serve(self, client):
        with socket.create_connection(("127.0.0.1", self.port)) as server:
            while request := client.recv(65_536):
                server.sendall(request)
                reply = server.recv(65_536)
                if self.lose(request):
                    self.lost += 1
                    return
                if not self.swallow(request):
                    client.sendall(reply)


def wait_for(holds, timeout_seconds=5.0):
    """Poll until `holds()`; for what other threads and processes do, which tell nobody."""
    clock, tick = SystemClock(), threading.Event()
    end_seconds = clock.monotonic_seconds() + timeout_seconds
    while not holds():
        assert clock.monotonic_seconds() < end_seconds, "it did not come in time"
        tick.wait(0.01)
