"""Bodies that are being read: they are bounded in number, in size and in time.

A body that has not arrived whole holds a connection and memory. Small and large ones are counted apart, so that a few
large ones cannot keep out the many small ones; a network may have a part of each. Together a process holds at most
`MOST_LARGE` x `MAX_REQUEST_BYTES` + `MOST_SMALL` x `SMALL_BYTES` for them.
"""

import socket
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING

from backends.clock import Clock

if TYPE_CHECKING:
    from collections.abc import Callable

SMALL_BYTES = 65_536
MOST_SMALL, MOST_SMALL_OF_NETWORK = 512, 64
MOST_LARGE, MOST_LARGE_OF_NETWORK = 32, 8
_CHECK_SECONDS, MOST_AT_ONCE = 0.05, 20
"""A worker answers each that is cut off: those that began together are cut off one after another."""


class TooManyBodies(Exception):
    """There is no space for one more unfinished body: of this network, or of any."""

    def __init__(self, *, is_of_network: bool) -> None:
        super().__init__("too many unfinished bodies")
        self.is_of_network = is_of_network


@dataclass(slots=True)
class _Space:
    """How many bodies of one size there may be, and how many there are."""

    most: int
    most_of_network: int
    taken: int = 0
    taken_by: Counter[str] = field(default_factory=Counter)


@dataclass(eq=False, slots=True)
class OpenBody:
    """A body that is being read."""

    network: str
    space: _Space
    deadline_seconds: float
    connection: socket.socket | None
    is_late: bool = False


class OpenBodies:
    """The unfinished bodies of this process. A thread of its own cuts off those that take too long."""

    def __init__(self, clock: Clock, most_seconds: int) -> None:
        self.most_seconds = most_seconds
        self.take_turn: Callable[[], object] = lambda: None
        """Called before the work on a large body: the server may let others go first."""
        self._clock = clock
        self._small = _Space(MOST_SMALL, MOST_SMALL_OF_NETWORK)
        self._large = _Space(MOST_LARGE, MOST_LARGE_OF_NETWORK)
        self._open: set[OpenBody] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(
        self, network: str, size: int, connection: socket.socket | None, most_seconds: int | None = None
    ) -> OpenBody:
        """Begin to read a body of at most `size` bytes from `connection`; `end` has to follow.

        Raises:
            TooManyBodies: it may not be read now.
        """
        space = self._small if size <= SMALL_BYTES else self._large
        ends_seconds = self._clock.monotonic_seconds() + (most_seconds or self.most_seconds)
        body = OpenBody(network, space, ends_seconds, connection)
        with self._lock:
            if space.taken_by[network] >= space.most_of_network:
                raise TooManyBodies(is_of_network=True)
            if space.taken >= space.most:
                raise TooManyBodies(is_of_network=False)
            space.taken += 1
            space.taken_by[network] += 1
            self._open.add(body)
        return body

    def end(self, body: OpenBody) -> None:
        """The body was read, or is given up."""
        space = body.space
        with self._lock:
            self._open.discard(body)
            space.taken -= 1
            space.taken_by[body.network] -= 1
            if not space.taken_by[body.network]:
                del space.taken_by[body.network]

    def cut_late(self) -> None:
        """End some of what takes too long: the reader finds the end of the stream, and can still send an answer."""
        now_seconds = self._clock.monotonic_seconds()
        with self._lock:
            late = [body for body in self._open if body.deadline_seconds <= now_seconds and not body.is_late]
        for body in sorted(late, key=attrgetter("deadline_seconds"))[:MOST_AT_ONCE]:
            body.is_late = True
            if body.connection is not None:
                with suppress(OSError):
                    body.connection.shutdown(socket.SHUT_RD)

    def start(self) -> None:
        """Begin to watch, in a thread of this process: to be called after the fork."""
        self._thread = threading.Thread(target=self._watch, name="bodies", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, if there is one."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=2)
            self._thread = None

    def _watch(self) -> None:
        while not self._stop.wait(_CHECK_SECONDS):
            self.cut_late()
