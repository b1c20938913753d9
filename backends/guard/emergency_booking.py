"""Emergency spend is written down as it is spent, and booked into the store when that is back, once."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from concurrent.futures import TimeoutError as NotInTime
from contextlib import suppress
from typing import TypeVar

from backends.errors import StoreBroken, StoreUnavailable
from backends.guard.emergency_books import EmergencyBooks, HourSpent

_CLOSE_SECONDS = 0.25
T = TypeVar("T")
Book = Callable[[str, int, int, int], int]
"""Has the store hold so much for an instance: its name, the hour, the nano-dollars and their edition; the change."""


class EmergencyBooking:
    """Notes what a worker spends, and books what all workers of the instance have noted.

    Args:
        file: of all workers.
        book: may be repeated, by any worker, in any order. It raises `StoreError`.
        begin_executor: makes the one thread in which `file` is used; called in the worker, at the first use.
        on_booked: called with the number of an hour since 1970 and the change in nano-dollars.
    """

    def __init__(
        self,
        file: EmergencyBooks,
        book: Book,
        begin_executor: Callable[[], Executor],
        on_booked: Callable[[int, int], None],
    ) -> None:
        self._file = file
        self._book = book
        self._begin_executor = begin_executor
        self._on_booked = on_booked
        self._executor: Executor | None = None
        self._lock = threading.Lock()
        self._noted: deque[tuple[int, int]] = deque()
        """Hours and nano-dollars that are not in the file yet."""
        self._is_writing = False

    def note(self, hour: int, change_nanousd: int) -> None:
        """Begin to write down that so much more was spent, or less; no caller waits for the disk."""
        self._noted.append((hour, change_nanousd))
        if not self._is_writing:
            self._is_writing = True
            self._submit(self._try_to_write)

    def book_all(self) -> None:
        """Book what is not booked yet, of this worker and of others, and remember that in the file.

        A worker that dies before it remembers leaves that to the next one, for whom the store has nothing more to do.

        Raises:
            StoreError: the store could not be asked, or the file could not be used; repeat it later.
        """
        instance, spent = self._done(self._unbooked)
        booked, broken = [], None
        for each in spent:
            try:
                change_nanousd = self._book(instance, each.hour, each.nanousd, each.edition)
            except StoreBroken as error:
                # The key of that hour or day alone may be wrong.
                broken = error
                continue
            booked.append(each)
            if change_nanousd:
                self._on_booked(each.hour, change_nanousd)
        if booked:
            self._done(lambda: self._file.remember(booked))
        if broken is not None:
            raise broken

    def close(self) -> None:
        """Write down what is not in the file yet, and wait for a write that has begun."""
        executor, self._executor = self._executor, None
        if executor is not None:
            with suppress(NotInTime):
                # In one thread: what began before it is over when this is.
                executor.submit(self._try_to_write).result(_CLOSE_SECONDS)
            executor.shutdown(wait=False)

    def _done(self, job: Callable[[], T]) -> T:
        try:
            return self._submit(job).result()
        except OSError as error:
            raise StoreUnavailable("the file of the emergency spend cannot be used") from error

    def _unbooked(self) -> tuple[str, list[HourSpent]]:
        self._write()
        return self._file.unbooked()

    def _try_to_write(self) -> None:
        with suppress(OSError):
            self._write()

    def _write(self) -> None:
        """In the thread of the file."""
        self._is_writing = False
        changes_nanousd: dict[int, int] = {}
        while self._noted:
            hour, change_nanousd = self._noted.popleft()
            changes_nanousd[hour] = changes_nanousd.get(hour, 0) + change_nanousd
        if not any(changes_nanousd.values()):
            return
        try:
            self._file.add(changes_nanousd)
        except OSError:
            self._noted.extend(changes_nanousd.items())
            raise

    def _submit(self, job: Callable[[], T]) -> Future[T]:
        with self._lock:
            if self._executor is None:
                self._executor = self._begin_executor()
        return self._executor.submit(job)
