"""What a `Link` sends, seen right before it leaves: round trips are counted, and callers held before they write.

No strategy has a hook for that. Where one promises no atomicity, the race is between its last read and its first write:
right before the first send whose commands do more than read, if a send that only reads came before it.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Command = tuple[bytes, ...]

TRANSACTION_WORDS = frozenset({b"MULTI", b"EXEC", b"WATCH"})
_READS = frozenset(
    b"GET MGET STRLEN EXISTS TYPE TTL PTTL HGET HGETALL ZRANGE ZSCORE ZCARD UNWATCH PING TIME INFO".split()
)
_MARKER = b"llm:throttle:"


class Wire:
    """Stands before each send of a `Link`, as its `before_each_send`. Thread-safe (greenlet-safe)."""

    def __init__(self) -> None:
        self.round_trips = 0
        """One send is one round trip, however many commands it carries."""
        self._lock = threading.Lock()
        self._mine = threading.local()

    def __call__(self, packed: bytes) -> None:
        """Count the round trip; call what the sending thread has waiting for its first write."""
        with self._lock:
            self.round_trips += 1
        do: Callable[[], object] | None = getattr(self._mine, "do", None)
        if do is None:
            return
        if not writes(packed):
            self._mine.has_read = True
        else:
            self._mine.do = None
            if self._mine.has_read:
                do()

    @contextmanager
    def before_first_write(self, do: Callable[[], object]) -> Iterator[None]:
        """Call `do` once, right before this thread sends its first command in here that writes.

        It is not called where nothing was read before: what decides in one step has no gap.
        """
        self._mine.do, self._mine.has_read = do, False
        try:
            yield
        finally:
            self._mine.do = None


def writes(packed: bytes) -> bool:
    """Whether one of the packed commands does more than read. A throttle marker is no booking, so it does not count."""
    return any(not only_reads(command[0]) and not _sets_marker(command) for command, _ in commands_in(packed))


def only_reads(name: bytes) -> bool:
    """Whether a command of that name changes nothing, as far as is known here."""
    return name.upper() in _READS | TRANSACTION_WORDS


def _sets_marker(command: Command) -> bool:
    return len(command) > 1 and command[1].startswith(_MARKER)


def commands_in(packed: bytes) -> Iterator[tuple[Command, bytes]]:
    """The commands that were packed, each with its bytes."""
    at = 0
    while at < len(packed):
        start = at
        end = packed.index(b"\r\n", at)
        words, at = [], end + 2
        for _ in range(int(packed[start + 1 : end])):
            end = packed.index(b"\r\n", at)
            length = int(packed[at + 1 : end])
            words.append(packed[end + 2 : end + 2 + length])
            at = end + 4 + length
        yield tuple(words), packed[start:at]
