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

_CLOSING_SECONDS = 2.0


class Silence(Enum):
    """What the pump hands out in place of a piece when none came for a while."""

    HEARTBEAT = auto()


class Take(Enum):
    """What whoever counts the pieces says to one of them."""

    MORE = auto()
    ENOUGH = auto()
    """The answer ends after it; it is read on for its usage only."""
    STOP = auto()
    """The answer ends after it, and the upstream is hung up on; what has come by then is read."""


class DeadlinePassed(Exception):
    """The answer took longer than it may. It has been closed; its usage says what can be known."""


class Stopped(Exception):
    """`UpstreamReader.stop` was said. The answer has been closed; its usage says what can be known."""


class _End:
    def __init__(self, failure: Exception | None) -> None:
        self.failure = failure


class UpstreamReader:
    """An answer, read ahead of whoever takes its pieces.

    Either the reader waits where `capacity` pieces are not taken, and what the upstream generates meanwhile is not
    seen. Or it never waits: where more than `most_unread_characters` are not taken the answer ends, and is
    read on for its usage only.

    The reader ends with the answer, at the deadline, when `take` says so, or at `close` or `stop`; it closes the answer
    in each case and then calls `over`, also when nobody takes the pieces any more.

    Args:
        take: called with each piece as it arrives, also with those that nobody gets.
        over: called once, when the answer has ended and was closed: its usage is final. It is told whether all that
            came was read.
        afterwards: called once, when all is said; it may take its time.
        deadline_at_seconds: a moment of the clock's monotonic time.
    """

    def __init__(  # noqa: PLR0913 (three of them are whom it tells what)
        self,
        answer: Answer,
        *,
        clock: Clock,
        deadline_at_seconds: float,
        take: Callable[[Piece], Take] = lambda _: Take.MORE,
        over: Callable[[bool], None] = lambda _: None,
        afterwards: Callable[[], None] = lambda: None,
        heartbeat_seconds: float = 1.0,
        capacity: int = 64,
        most_unread_characters: int | None = None,
    ) -> None:
        self._answer = answer
        self._clock = clock
        self._deadline_at_seconds = deadline_at_seconds
        self._take = take
        self._over = over
        self._afterwards = afterwards
        self._heartbeat_seconds = heartbeat_seconds
        self._pieces: queue.SimpleQueue[tuple[Piece, int] | _End] = queue.SimpleQueue()
        self._room = threading.Semaphore(capacity)
        self._most_unread_characters = most_unread_characters
        self._unread_characters = 0
        self._unread_lock = threading.Lock()
        self._ended = threading.Event()
        self._closed = False
        self._stopped = False
        self._nobody_listens = False
        self._hung_up = False
        self._is_read_out = False
        self.was_cut = False
        """`take` said that it ends, or too much was not read: what was handed out is whole, but the answer was not."""
        self.is_unread = False
        """It was cut since more waited than may."""
        self._thread = threading.Thread(target=self._read, name="tollgate-answer", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Piece | Silence]:
        """Pieces as they come, and a heartbeat for every `heartbeat_seconds` without.

        It ends with the answer, or where `take` says enough; then `wait` waits for the reader.

        Raises:
            DeadlinePassed: it took too long.
            Stopped: somebody said so.
            UpstreamBroken: the answer broke off.
        """
        while True:
            seconds_left = self._seconds_left()
            if self._stopped or not seconds_left:
                self.close()
                raise Stopped if self._stopped else DeadlinePassed
            try:
                taken = self._pieces.get(timeout=min(self._heartbeat_seconds, seconds_left))
            except queue.Empty:
                yield Silence.HEARTBEAT
                continue
            if isinstance(taken, _End):
                self._raise_failure(taken)
                return
            piece, characters = taken
            with self._unread_lock:
                self._unread_characters -= characters
            self._room.release()
            yield piece

    @property
    def is_over(self) -> bool:
        """Whether the reader has ended, and has said so to `over`."""
        return self._ended.is_set()

    def listen_no_more(self) -> None:
        """Whoever took the pieces has left; the reader goes on, for the usage at the end."""
        self._nobody_listens = True
        self._room.release()

    def wait(self, timeout_seconds: float) -> bool:
        """Wait for the reader's end; whether it came in time."""
        return self._ended.wait(timeout_seconds)

    def stop(self) -> None:
        """End it, from any thread, without waiting: whoever takes the pieces gets `Stopped` in place of the rest."""
        self._stopped = True
        self._break_off()

    def close(self) -> None:
        """Stop reading and close the answer; may be said twice. What was read ahead and not taken is dropped."""
        self._break_off()
        self.wait(_CLOSING_SECONDS)

    def _break_off(self) -> None:
        self._closed = True
        self._answer.close()
        self._room.release()

    def _read(self) -> None:
        # What stands if this thread is killed: an end that looked like a whole answer would be a lie.
        failure: Exception | None = UpstreamBroken("The answer broke off.")
        try:
            failure = self._read_to_the_end()
        except Exception as error:  # noqa: BLE001 - whatever it is, whoever waits has to get it
            failure = error
        finally:
            self._end(Stopped() if self._stopped else failure)
        self._afterwards()

    def _end(self, failure: Exception | None) -> None:
        try:
            self._answer.close()
        finally:
            try:
                self._over(self._is_read_out)
            finally:
                self._pieces.put(_End(failure))
                self._ended.set()

    def _read_to_the_end(self) -> Exception | None:
        for piece in self._answer:
            verdict = self._take(piece)
            if not self._nobody_listens:
                self._hand_out(piece)
            if self._closed:
                break
            if not self._seconds_left():
                return DeadlinePassed()
            if verdict is Take.STOP and not self._hung_up:
                self.was_cut = self._nobody_listens = self._hung_up = True
                self._answer.hang_up()
            elif (verdict is Take.ENOUGH or self.is_unread) and not self.was_cut:
                self.was_cut = True
                # Whoever takes the pieces has had the last one; what comes now is read for its usage alone.
                self._nobody_listens = True
                self._pieces.put(_End(None))
        self._is_read_out = not self._closed
        return None

    def _hand_out(self, piece: Piece) -> None:
        """Give it to whoever takes the pieces, after a wait for room where that may be done; else drop it."""
        characters = 0
        if self._most_unread_characters is None:
            # Whoever closes it, or has left, makes room as well, and gets nothing more.
            has_room = self._room.acquire(timeout=self._seconds_left())
            if not has_room or self._closed or self._nobody_listens or not self._seconds_left():
                return
        else:
            characters = len(repr(piece))
            if not self._keep_unread(characters, self._most_unread_characters):
                self.is_unread = True
                return
        self._pieces.put((piece, characters))

    def _keep_unread(self, characters: int, most: int) -> bool:
        with self._unread_lock:
            # A single piece always has room: how large an event may be is bounded where it is read.
            if self._unread_characters and self._unread_characters + characters > most:
                return False
            self._unread_characters += characters
            return True

    def _seconds_left(self) -> float:
        return max(0.0, self._deadline_at_seconds - self._clock.monotonic_seconds())

    @staticmethod
    def _raise_failure(end: _End) -> None:
        if isinstance(end.failure, UpstreamBroken) and end.failure.timed_out:
            raise DeadlinePassed from end.failure
        if end.failure is not None:
            raise end.failure
