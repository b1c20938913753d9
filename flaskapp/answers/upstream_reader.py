"""Reads an answer in a thread of its own, so that the thread that serves the client can wait with a time-out.

The reader also reports the answer's end, whether or not its pieces are still taken: a client that has left, or that has
stopped reading, keeps no reservation pending.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from enum import Enum, auto

from backends.clock import Clock
from flaskapp.llm import Answer, Piece, UpstreamBroken

_CLOSING_SECONDS = 2.0


class Next(Enum):
    """What the reader does after a piece."""

    CONTINUE = auto()
    DRAIN = auto()
    """The answer ends after this piece; the reader goes on for the usage only."""
    HANG_UP = auto()
    """The answer ends after this piece, and the upstream is hung up on; what has come by then is read."""


class DeadlinePassed(Exception):
    """The answer took longer than it may. It has been closed; its usage says what can be known."""


class Stopped(Exception):
    """`UpstreamReader.stop` was called. The answer has been closed; its usage says what can be known."""


class _End:
    def __init__(self, failure: Exception | None) -> None:
        self.failure = failure


class UpstreamReader:
    """An answer, read ahead of the consumer that iterates it.

    Without `max_unread_characters` the reader waits while what `capacity` reads gave is not taken, and what the
    upstream generates meanwhile is not counted. With it the reader never waits: where more is buffered the answer ends,
    and is read on for its usage only.

    The reader ends with the answer, at the deadline, when `on_piece` says so, or at `close` or `stop`. In each case it
    closes the answer and then calls `on_end`, also when the pieces are no longer taken.

    Args:
        on_piece: called with each piece as it arrives, also with those that are dropped.
        on_end: called once, when the answer has ended and was closed, so that its usage is final. The argument is
            whether every piece that came was read.
        after_end: called once, when the consumer has its end; it may take its time.
        deadline_at_seconds: a moment of the clock's monotonic time.
    """

    def __init__(  # noqa: PLR0913 (three of them are callbacks)
        self,
        answer: Answer,
        *,
        clock: Clock,
        deadline_at_seconds: float,
        on_piece: Callable[[Piece], Next] = lambda _: Next.CONTINUE,
        on_end: Callable[[bool], None] = lambda _: None,
        after_end: Callable[[], None] = lambda: None,
        heartbeat_seconds: float = 1.0,
        capacity: int = 16,
        max_unread_characters: int | None = None,
    ) -> None:
        self._answer = answer
        self._clock = clock
        self._deadline_at_seconds = deadline_at_seconds
        self._on_piece = on_piece
        self._on_end = on_end
        self._after_end = after_end
        self._heartbeat_seconds = heartbeat_seconds
        self._batches: queue.SimpleQueue[tuple[Sequence[Piece], int] | _End] = queue.SimpleQueue()
        self._places = threading.Semaphore(capacity)
        self._max_unread_characters = max_unread_characters
        self._unread_characters = 0
        self._unread_lock = threading.Lock()
        self._ended = threading.Event()
        self._closed = False
        self._stopped = False
        self._drops_pieces = False
        self._hung_up = False
        self._is_fully_read = False
        self.was_cut = False
        """We ended the answer: `on_piece` said so, or too much was buffered. The pieces handed out are whole."""
        self.has_overflowed = False
        """More was buffered than may be, so the answer was cut."""
        self._thread = threading.Thread(target=self._read, name="tollgate-answer", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Sequence[Piece]]:
        """The pieces of each read as they come; none for every `heartbeat_seconds` without one.

        It ends with the answer, or where `on_piece` ends it; then `wait` waits for the reader.

        Raises:
            DeadlinePassed: the answer took too long.
            Stopped: `stop` was called.
            UpstreamBroken: the answer broke off.
        """
        while True:
            seconds_left = self._seconds_left()
            if self._stopped or not seconds_left:
                self.close()
                raise Stopped if self._stopped else DeadlinePassed
            try:
                taken = self._batches.get(timeout=min(self._heartbeat_seconds, seconds_left))
            except queue.Empty:
                yield ()
                continue
            if isinstance(taken, _End):
                self._raise_failure(taken)
                return
            pieces, characters = taken
            with self._unread_lock:
                self._unread_characters -= characters
            self._places.release()
            yield pieces

    @property
    def is_over(self) -> bool:
        """Whether the reader has ended, and `on_end` was called."""
        return self._ended.is_set()

    def drop_pieces(self) -> None:
        """Hand out no more pieces, since the consumer has left; the reader goes on, for the usage at the end."""
        self._drops_pieces = True
        self._places.release()

    def wait(self, timeout_seconds: float) -> bool:
        """Wait for the reader's end; whether it came in time."""
        return self._ended.wait(timeout_seconds)

    def stop(self) -> None:
        """End the reader, from any thread, without waiting; the consumer gets `Stopped` in place of the rest."""
        self._stopped = True
        self._break_off()

    def close(self) -> None:
        """Stop reading and close the answer; may be called twice. What was read and not taken is dropped."""
        self._break_off()
        self.wait(_CLOSING_SECONDS)

    def _break_off(self) -> None:
        self._closed = True
        self._answer.close()
        self._places.release()

    def _read(self) -> None:
        # What stands if this thread is killed: an end that looked like a whole answer would be a lie.
        failure: Exception | None = UpstreamBroken("The answer broke off.")
        try:
            failure = self._read_to_the_end()
        except Exception as error:  # noqa: BLE001 - whatever it is, the consumer has to get it
            failure = error
        finally:
            self._end(Stopped() if self._stopped else failure)
        self._after_end()

    def _end(self, failure: Exception | None) -> None:
        try:
            self._answer.close()
        finally:
            try:
                self._on_end(self._is_fully_read)
            finally:
                self._batches.put(_End(failure))
                self._ended.set()

    def _read_to_the_end(self) -> Exception | None:
        while (pieces := self._answer.read(self._seconds_left())) is not None:
            self._take(pieces)
            if self._closed:
                break
            if not self._seconds_left():
                return DeadlinePassed()
            if self.has_overflowed and not self.was_cut:
                self._cut()
        self._is_fully_read = not self._closed
        return None

    def _take(self, pieces: Sequence[Piece]) -> None:
        """Count the pieces of one read, and hand out those up to the cut."""
        shown, ends_here = [], False
        for piece in pieces:
            following = self._on_piece(piece)
            if not self._drops_pieces:
                shown.append(piece)
            if following is Next.HANG_UP and not self._hung_up:
                self.was_cut = self._drops_pieces = self._hung_up = True
                self._answer.hang_up()
            elif following is Next.DRAIN and not self.was_cut:
                self.was_cut = self._drops_pieces = ends_here = True
        if shown:
            self._hand_out(shown)
        if ends_here:
            # The consumer has had its last piece; what comes now is read for its usage alone.
            self._batches.put(_End(None))

    def _cut(self) -> None:
        self.was_cut = self._drops_pieces = True
        self._batches.put(_End(None))

    def _hand_out(self, pieces: Sequence[Piece]) -> None:
        """Queue pieces for the consumer: after a wait for a place where the reader may wait, else those that fit."""
        characters = 0
        if self._max_unread_characters is None:
            # `close` and `drop_pieces` free a place as well, and no piece is handed out then.
            has_place = self._places.acquire(timeout=self._seconds_left())
            if not has_place or self._closed or not self._seconds_left():
                return
        else:
            pieces, characters = self._fitting(pieces, self._max_unread_characters)
        if pieces:
            self._batches.put((pieces, characters))

    def _fitting(self, pieces: Sequence[Piece], maximum: int) -> tuple[Sequence[Piece], int]:
        """The pieces that still fit into the buffer, and how many characters of it they take."""
        taken = 0
        with self._unread_lock:
            for number, piece in enumerate(pieces):
                characters = len(piece.data) or len(repr(piece))
                # A single piece always fits: how large an event may be is bounded where it is read.
                if self._unread_characters and self._unread_characters + characters > maximum:
                    self.has_overflowed = True
                    return pieces[:number], taken
                self._unread_characters += characters
                taken += characters
        return pieces, taken

    def _seconds_left(self) -> float:
        return max(0.0, self._deadline_at_seconds - self._clock.monotonic_seconds())

    @staticmethod
    def _raise_failure(end: _End) -> None:
        if isinstance(end.failure, UpstreamBroken) and end.failure.timed_out:
            raise DeadlinePassed from end.failure
        if end.failure is not None:
            raise end.failure
