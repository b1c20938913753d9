"""A network in front of Redis: every byte arrives later by a fixed time, and none waits for another.

``python -m flaskapp.lab.delay HOST PORT DELAY_US`` listens on a free port of 127.0.0.1, prints it, and forwards to
HOST:PORT until its standard input ends, as it does when the process that started it ends. It delays and does not
throttle: what was read is forwarded `DELAY_US` later, each way, while the next bytes are read already. It is a process
of its own, so that it takes no time from the one that measures.
"""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue

from backends.clock import SystemClock
from backends.errors import StoreUnavailable
from flaskapp.ops.running_redis import HOST

_CLOCK = SystemClock()
_Late = SimpleQueue[tuple[float, bytes]]


@contextmanager
def listening(command: list[str], what: str) -> Iterator[int]:
    """Run a program that prints its port, and serves until its standard input ends; yield the port.

    Raises:
        StoreUnavailable: it did not start; the text says `what`.
    """
    with subprocess.Popen(  # noqa: S603 (our own programs)
        # A session of its own: a Ctrl-C is for the process that started it, which needs it until its end.
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            port = process.stdout.readline() if process.stdout else ""
            if not port:
                raise StoreUnavailable(f"{what} did not start")
            yield int(port)
        finally:
            process.terminate()


@contextmanager
def delayed(port: int, round_trip_us: int, host: str = HOST) -> Iterator[int]:
    """Yield a port of this machine behind which the server at `host`:`port` is `round_trip_us` farther away.

    Raises:
        StoreUnavailable: the proxy did not start.
    """
    command = [sys.executable, "-m", "flaskapp.lab.delay", host, str(port), str(round_trip_us // 2)]
    with listening(command, "the proxy that delays") as its_port:
        yield its_port


def serve(target: tuple[str, int], delay_us: int) -> None:
    """Listen on a free port, print it, and forward to `target` until standard input ends."""
    listener = socket.create_server((HOST, 0))
    print(listener.getsockname()[1], flush=True)  # noqa: T201 (that is how it is found)
    threading.Thread(target=_accept, args=(listener, target, delay_us / 1e6), daemon=True).start()
    sys.stdin.read()


def _accept(listener: socket.socket, target: tuple[str, int], delay_seconds: float) -> None:
    while True:
        client, _ = listener.accept()
        try:
            server = socket.create_connection(target)
        except OSError:
            client.close()
            continue
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
        late.put((_CLOCK.monotonic_seconds() + delay_seconds, chunk))


def _write(sink: socket.socket, late: _Late) -> None:
    while True:
        due_seconds, chunk = late.get()
        time.sleep(max(0.0, due_seconds - _CLOCK.monotonic_seconds()))
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
    serve((sys.argv[1], int(sys.argv[2])), int(sys.argv[3]))
