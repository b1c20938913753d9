"""What run-dev.sh needs to look after processes: one flag for the signals, one journal, locks between its instances."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / ".data"
REDIS_PASSWORD_FILE = DATA / "redis.password"
"""Of the Redis that run-dev.sh starts."""
POLL_SECONDS = 0.05
LOCK_SECONDS = 40.0


class Interrupted(Exception):
    """A signal asked us to stop before we served."""


class StartFailed(Exception):
    """We cannot serve; the text is the reason in one line."""


class Stop:
    """Whether a signal asked us to end: Ctrl-C, SIGTERM, or the terminal was closed."""

    def __init__(self) -> None:
        self.count = 0
        self.status = 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: object) -> None:
        self.count += 1
        # The status that a shell gives a program that such a signal ended.
        self.status = 128 + number

    def wait_for(self, holds: Callable[[], bool], timeout_seconds: float) -> bool:
        """Wait until `holds()`; False after the time-out.

        Raises:
            Interrupted: a signal asked us to end.
        """
        end = time.monotonic() + timeout_seconds
        while not holds():
            if self.count:
                raise Interrupted
            if time.monotonic() > end:
                return False
            time.sleep(POLL_SECONDS)
        return True


class Journal:
    """Writes to the terminal and, a line at a time, to `.data/app.log`, which two servers may share."""

    def __init__(self, path: Path) -> None:
        self._log = path.open("ab", buffering=0)
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._log.close()

    def say(self, text: str, secret: str | None = None) -> None:
        """Write a text; the log, which is kept, does not get the secret."""
        self._write(f"{text}\n".encode(), (f"{text}\n".replace(secret, "…") if secret else f"{text}\n").encode())

    def copy(self, stream: IO[bytes]) -> threading.Thread:
        """Copy what a process prints, to its end."""

        def pass_on() -> None:
            for line in stream:
                self._write(line, line)

        thread = threading.Thread(target=pass_on, daemon=True)
        thread.start()
        return thread

    def _write(self, shown: bytes, kept: bytes) -> None:
        with self._lock:
            self._log.write(kept)
            # A terminal that is gone, or `| head`, is no reason to stop.
            with suppress(OSError, ValueError):
                sys.stdout.buffer.write(shown)
                sys.stdout.buffer.flush()


@dataclass(frozen=True)
class Store:
    """The Redis to use, and a description of it."""

    url: str
    words: str
    is_embedded: bool = False
    in_container: bool = False
    """Whether the first server runs beside it in a container."""


@contextmanager
def locked(stop: Stop, place: Path, kind: int) -> Iterator[None]:
    """Hold a lock that this clone's run-dev.sh share (LOCK_SH: its users) or have alone (LOCK_EX). Waits for it."""
    with place.open("a") as file:
        if not stop.wait_for(lambda: locks(file, kind), LOCK_SECONDS):
            raise StartFailed(f"{place.name} is locked: another run-dev.sh of this clone hangs")
        yield


def locks(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def program(
    stop: Stop, journal: Journal, command: Sequence[str], environment: dict[str, str], stop_seconds: float
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a server in a session of its own, so that a Ctrl-C reaches it through us and it ends in good order."""
    server = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    if server.stdout is None:
        raise RuntimeError("no pipe")
    copier = journal.copy(server.stdout)
    guardian = guard(server.pid)
    try:
        yield server
    finally:
        end(stop, server, stop_seconds)
        copier.join(timeout=2)
        guardian.kill()
        guardian.communicate()


def guard(pid: int) -> "subprocess.Popen[bytes]":
    """A shell that ends `pid` if we end without having done so."""
    return subprocess.Popen(
        ["/bin/sh", "-c", 'read -r _; kill -TERM "$0"', str(pid)], stdin=subprocess.PIPE, start_new_session=True
    )


def end(stop: Stop, server: "subprocess.Popen[bytes]", stop_seconds: float) -> None:
    """Ask it to end, and let it settle its streams; a second Ctrl-C, or too long a wait, ends it at once."""
    with suppress(ProcessLookupError):
        server.terminate()
    asked = stop.count
    deadline = time.monotonic() + stop_seconds
    while server.poll() is None and stop.count <= max(asked, 1) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def stop_or_end(stop: Stop, server: "subprocess.Popen[bytes]", holds: Callable[[], bool]) -> bool:
    """Wait until `holds()`; False if we are to stop, or the server has ended, before that."""
    while not stop.count and server.poll() is None:
        if holds():
            return True
        time.sleep(POLL_SECONDS)
    return False
