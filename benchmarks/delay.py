"""A network in front of Redis: every byte arrives later by a fixed time, and none waits for another.

``python -m benchmarks.delay PORT DELAY_US`` listens on a free port of 127.0.0.1, prints it, and passes on to PORT
until its standard input ends. It delays and does not throttle: what was read is passed on `DELAY_US` after it was
read, each way, while the next is being read already. A process of its own, so that it takes no time from whoever
measures.
"""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue

HOST = "127.0.0.1"
_Late = SimpleQueue[tuple[float, bytes]]


@contextmanager
def delayed(port: int, round_trip_us: int) -> Iterator[int]:
    """The port behind which the server at `port` is `round_trip_us` away."""
    command = [sys.executable, "-m", "benchmarks.delay", str(port), str(round_trip_us // 2)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as proxy:
        try:
            yield int(proxy.stdout.readline())  # type: ignore[union-attr] # it is a pipe
        finally:
            proxy.terminate()


def serve(target_port: int, delay_us: int) -> None:
    listener = socket.create_server((HOST, 0))
    print(listener.getsockname()[1], flush=True)
    threading.Thread(target=_accept, args=(listener, target_port, delay_us / 1e6), daemon=True).start()
    sys.stdin.read()


def _accept(listener: socket.socket, target_port: int, delay_seconds: float) -> None:
    while True:
        client, _ = listener.accept()
        server = socket.create_connection((HOST, target_port))
        for one, other in ((client, server), (server, client)):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            late: _Late = SimpleQueue()
            threading.Thread(target=_read, args=(one, late, delay_seconds), daemon=True).start()
            threading.Thread(target=_write, args=(other, late), daemon=True).start()


def _read(source: socket.socket, late: _Late, delay_seconds: float) -> None:
    chunk = b"-"
    while chunk:
        try:
            chunk = source.recv(65_536)
        except OSError:
            chunk = b""
        late.put((time.monotonic() + delay_seconds, chunk))


def _write(sink: socket.socket, late: _Late) -> None:
    while True:
        due_seconds, chunk = late.get()
        time.sleep(max(0.0, due_seconds - time.monotonic()))
        if not chunk:
            break
        try:
            sink.sendall(chunk)
        except OSError:
            break
    with suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)
    sink.close()


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
