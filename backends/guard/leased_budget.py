"""The emergency budget as one worker spends it: from a lease in memory, so that no answer waits for a disk."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from concurrent.futures import TimeoutError as NotInTime
from contextlib import suppress
from typing import TypeVar

from backends.guard.emergency_budget import LEASES, LEAST_LEASE_NANOUSD, EmergencyBudget

WAIT_SECONDS = 0.25
"""How long a caller waits for the file where the lease does not reach, and after its answer for what comes back."""
MOST_WAITING = 64
"""So many jobs may wait for the file before a further caller is refused at once: a flood must not fill the memory."""

_TRIES = 3
T = TypeVar("T")


class LeasedBudget:
    """Spends what it has leased from `file`; a lease counts as spent there, whatever becomes of this worker.

    Args:
        file: of all workers.
        begin_executor: makes the one thread in which `file` is used; called in the worker, at the first use.
    """

    def __init__(self, file: EmergencyBudget, begin_executor: Callable[[], Executor]) -> None:
        self._file = file
        self._begin_executor = begin_executor
        self._executor: Executor | None = None
        self._lock = threading.Lock()
        self._hour = 0
        self._left_nanousd = 0
        self._kept_nanousd = 0
        """The last lease: so much may stay in memory, and the rest goes back."""
        self._budget_nanousd = 0
        """What the lease is a part of."""
        self._leases: deque[tuple[int, int, int, int]] = deque()
        """What the thread has leased, and no caller has taken in yet: hour, nano-dollars, what may stay of it, and the
        budget."""
        self._is_leasing = False
        self._waiting = 0

    def prepare(self, budget_nanousd: int) -> None:
        """Begin to lease for the outage that may come, unless enough is leased in this hour."""
        self._give_back_where_lowered(budget_nanousd)
        with self._lock:
            is_low = 2 * self._left_nanousd <= self._kept_nanousd
        if is_low and not self._is_leasing and budget_nanousd // LEASES >= LEAST_LEASE_NANOUSD:
            self._is_leasing = True
            self._submit(lambda: self._lease(0, budget_nanousd))

    def take(self, cost_nanousd: int, budget_nanousd: int) -> int | None:
        """As `EmergencyBudget.take`; None also where the lease does not reach and the file cannot be used in time."""
        self._give_back_where_lowered(budget_nanousd)
        hour = self._take_leased(cost_nanousd)
        tries = _TRIES
        # Another caller may be faster to take what was leased for this one.
        while hour is None and tries and self._wait_for(lambda: self._lease(cost_nanousd, budget_nanousd)):
            tries -= 1
            hour = self._take_leased(cost_nanousd)
        if self._kept_nanousd:
            self.prepare(budget_nanousd)
        return hour

    def correct(self, hour: int, delta_nanousd: int) -> None:
        """As `EmergencyBudget.correct`: into the lease, and what may not stay there into the file."""
        with self._lock:
            self._take_in()
            if hour == self._hour:
                left_nanousd = self._left_nanousd - delta_nanousd
                self._left_nanousd = min(max(0, left_nanousd), self._kept_nanousd)
                delta_nanousd = self._left_nanousd - left_nanousd
        if delta_nanousd:
            self._wait_for(lambda: self._file.correct(hour, delta_nanousd), most_waiting=None)

    def spent_nanousd(self) -> int | None:
        """What this hour has cost so far, leases included; None if the file cannot be read in time."""
        return self._wait_for(self._file.spent_nanousd)

    def is_used_up(self, budget_nanousd: int) -> bool:
        """As `EmergencyBudget.is_used_up`; a file that cannot be read in time counts as used up."""
        return self._wait_for(lambda: self._file.is_used_up(budget_nanousd + self._left_nanousd)) is not False

    def close(self) -> None:
        """Give the lease back."""
        with self._lock:
            self._take_in()
            lease = self._let_go()
        self._give_back(*lease)
        if self._executor is not None:
            self._executor.shutdown(wait=False)

    def _give_back_where_lowered(self, budget_nanousd: int) -> None:
        """A budget that is less than when its lease was taken holds at once: what is left has to be asked for anew."""
        with self._lock:
            self._take_in()
            if budget_nanousd >= self._budget_nanousd:
                return
            lease, self._budget_nanousd = self._let_go(), budget_nanousd
        self._give_back(*lease)

    def _let_go(self) -> tuple[int, int]:
        """To be called with the lock: nothing is leased any more; the hour, and what was left."""
        left_nanousd, self._left_nanousd, self._kept_nanousd = self._left_nanousd, 0, 0
        return self._hour, left_nanousd

    def _give_back(self, hour: int, left_nanousd: int) -> None:
        if left_nanousd:
            self._wait_for(lambda: self._file.correct(hour, -left_nanousd), most_waiting=None)

    def _take_leased(self, cost_nanousd: int) -> int | None:
        with self._lock:
            self._take_in()
            if cost_nanousd > self._left_nanousd:
                return None
            self._left_nanousd -= cost_nanousd
            return self._hour

    def _take_in(self) -> None:
        """To be called with the lock: take in what was leased; what is left of an earlier hour is worth nothing."""
        while self._leases:
            hour, leased_nanousd, self._kept_nanousd, self._budget_nanousd = self._leases.popleft()
            self._left_nanousd = leased_nanousd + (self._left_nanousd if hour == self._hour else 0)
            self._hour = hour
        if self._hour < self._file.hour_now():
            self._hour = self._file.hour_now()
            self._left_nanousd = self._kept_nanousd = 0

    def _lease(self, need_nanousd: int, budget_nanousd: int) -> bool:
        """In the thread of the file: whether anything was leased."""
        try:
            lease = self._file.lease(need_nanousd, budget_nanousd)
            if lease is not None:
                self._leases.append((*lease, budget_nanousd))
            return lease is not None
        finally:
            if not need_nanousd:
                self._is_leasing = False

    def _wait_for(self, job: Callable[[], T], *, most_waiting: int | None = MOST_WAITING) -> T | None:
        """What it returns; None where it takes too long, and then it goes on, or where too many wait before it."""
        if most_waiting is not None and self._waiting >= most_waiting:
            return None
        with suppress(NotInTime):
            return self._submit(job).result(WAIT_SECONDS)
        return None

    def _submit(self, job: Callable[[], T]) -> Future[T]:
        with self._lock:
            if self._executor is None:
                self._executor = self._begin_executor()
            self._waiting += 1
        future = self._executor.submit(job)
        future.add_done_callback(self._is_done)
        return future

    def _is_done(self, _: object) -> None:
        with self._lock:
            self._waiting -= 1
