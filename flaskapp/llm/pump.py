"""Reads an answer in a thread of its own, so that whoever serves the client can wait for it with a time-out.

The reader also says when the answer is over, whether or not anybody takes its pieces any more: a client that has left,
or that has stopped reading, keeps no reservation open.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from enum import Enum, auto

from backends.clock import Clock
from flaskapp.llm import Answer, Piece, UpstreamBroken


class Silence(Enum):
    """What the pump hands out in place of a piece when none came for a while."""

    HEARTBEAT = auto()


class DeadlinePassed(Exception):
    """The answer took longer than it may. It has been closed; its usage says what can be known."""


class _End:
    def __init__(self, failure: Exception | None) -> None:
        self.failure = failure


class Pump:
    """An answer, read ahead by at most `capacity` pieces.

    The reader ends with the answer, at the deadline, when `take` says no, or at `close`; it closes the answer in each
    case and then calls `over`, also when nobody takes the pieces any more.

    Args:
        take: called with each piece as it arrives; False cuts the answer after it.
        over: called once, when the answer has ended and was closed: its usage is final.
        deadline_at_seconds: a moment of the clock's monotonic time.
    """

    def __init__(
        self,
        answer: Answer,
        *,
        clock: Clock,
        deadline_at_seconds: float,
        take: Callable[[Piece], bool] = lambda _: True,
        over: Callable[[], None] = lambda: None,
        heartbeat_seconds: float = 1.0,
        capacity: int = 64,
    ) -> None:
        self._answer = answer
        self._clock = clock
        self._deadline_at_seconds = deadline_at_seconds
        self._take = take
        self._over = over
        self._heartbeat_seconds = heartbeat_seconds
        self._pieces: queue.SimpleQueue[Piece | _End] = queue.SimpleQueue()
        self._room = threading.Semaphore(capacity)
        self._closed = False
        self._nobody_listens = False
        self.was_cut = False
        """`take` said no: what was read is whole, but the answer was not."""
        self._thread = threading.Thread(target=self._read, name="tollgate-answer", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Piece | Silence]:
        """Pieces as they come, and a heartbeat for every `heartbeat_seconds` without.

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

    @property
    def is_over(self) -> bool:
        """Whether the reader has ended."""
        return not self._thread.is_alive()

    def listen_no_more(self) -> None:
        """Whoever took the pieces has left; the reader goes on, for the usage at the end."""
        self._nobody_listens = True
        self._room.release()

    def wait(self, timeout_seconds: float) -> bool:
        """Wait for the reader's end; whether it came in time."""
        self._thread.join(timeout=timeout_seconds)
        return self.is_over

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
            try:
                self._over()
            finally:
                self._pieces.put(_End(failure))

    def _read_to_the_end(self) -> Exception | None:
        for piece in self._answer:
            goes_on = self._take(piece)
            if not self._nobody_listens and not self._room.acquire(timeout=self._seconds_left()):
                return DeadlinePassed()
            if self._closed:
                break
            if not self._seconds_left():
                return DeadlinePassed()
            if not self._nobody_listens:
                self._pieces.put(piece)
            if not goes_on:
                self.was_cut = True
                break
        return None

    def _seconds_left(self) -> float:
        return max(0.0, self._deadline_at_seconds - self._clock.monotonic_seconds())

    @staticmethod
    def _raise_failure(end: _End) -> None:
        if isinstance(end.failure, UpstreamBroken) and end.failure.timed_out:
            raise DeadlinePassed from end.failure
        if end.failure is not None:
            raise end.failure
