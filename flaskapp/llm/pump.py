"""Reads an answer in a thread of its own, so that whoever serves the client can wait for it with a time-out."""

import queue
import threading
from collections.abc import Iterator
from enum import Enum, auto

from backends.clock import Clock
from flaskapp.llm import Answer, UpstreamBroken


class Silence(Enum):
    """What the pump hands out in place of text when none came for a while."""

    HEARTBEAT = auto()


class DeadlinePassed(Exception):
    """The answer took longer than it may. It has been closed; its usage says what can be known."""


class _End:
    def __init__(self, failure: Exception | None) -> None:
        self.failure = failure


class Pump:
    """An answer, read ahead by at most `capacity` pieces.

    The reader ends with the answer, at the deadline, or at `close`, and closes the answer in each case, also when
    nobody takes the pieces any more.
    """

    def __init__(
        self,
        answer: Answer,
        *,
        clock: Clock,
        deadline_at_seconds: float,
        heartbeat_seconds: float = 1.0,
        capacity: int = 64,
    ) -> None:
        """Start reading. `deadline_at_seconds` is a moment of the clock's monotonic time."""
        self._answer = answer
        self._clock = clock
        self._deadline_at_seconds = deadline_at_seconds
        self._heartbeat_seconds = heartbeat_seconds
        self._pieces: queue.SimpleQueue[str | _End] = queue.SimpleQueue()
        self._room = threading.Semaphore(capacity)
        self._closed = False
        self._thread = threading.Thread(target=self._read, name="tollgate-answer", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[str | Silence]:
        """Text as it comes, and a heartbeat for every `heartbeat_seconds` without.

        Raises:
            DeadlinePassed: it took too long.
            UpstreamBroken: the answer broke off.
        """
        while True:
            seconds_left = self._seconds_left()
            if not seconds_left:
                self.close()
                raise DeadlinePassed
            try:
                piece = self._pieces.get(timeout=min(self._heartbeat_seconds, seconds_left))
            except queue.Empty:
                yield Silence.HEARTBEAT
                continue
            if isinstance(piece, _End):
                self._raise_failure(piece)
                return
            self._room.release()
            yield piece

    def close(self) -> None:
        """Stop reading and close the answer; may be said twice. What was read ahead and not taken is dropped."""
        self._closed = True
        self._answer.close()
        self._room.release()
        self._thread.join(timeout=2)

    def _read(self) -> None:
        # What stands if this thread is killed: an end that looked like a whole answer would be a lie.
        failure: Exception | None = UpstreamBroken("The answer broke off.")
        try:
            failure = self._read_to_the_end()
        except Exception as error:  # noqa: BLE001 - whatever it is, whoever waits has to get it
            failure = error
        finally:
            self._answer.close()
            self._pieces.put(_End(failure))

    def _read_to_the_end(self) -> Exception | None:
        for piece in self._answer:
            if not self._room.acquire(timeout=self._seconds_left()):
                return DeadlinePassed()
            if self._closed:
                break
            self._pieces.put(piece)
        return None

    def _seconds_left(self) -> float:
        return max(0.0, self._deadline_at_seconds - self._clock.monotonic_seconds())

    @staticmethod
    def _raise_failure(end: _End) -> None:
        if isinstance(end.failure, UpstreamBroken) and end.failure.timed_out:
            raise DeadlinePassed from end.failure
        if end.failure is not None:
            raise end.failure
