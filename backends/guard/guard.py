"""The guard: asks one strategy, and decides what happens when the store of that strategy fails.

`reserve` asks the strategy. Where Redis fails, the guard is `open` (the memory strategy decides, and the emergency
budget pays until it is used up) or `closed` (`ThrottleUnavailable`). `settle` and `release` never fail: what cannot be
booked now is booked when Redis is back.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING

from backends import contract
from backends.budgets import SECONDS_PER_HOUR, Budget
from backends.clock import US_PER_SECOND, Clock
from backends.contract import Ask, Backend, Books, Duplicate, Idempotency, Observer, Reservation, Verdict
from backends.errors import ReservationConflict, StoreBroken, StoreBusy, StoreError, ThrottleUnavailable
from backends.guard.emergency_booking import EmergencyBooking
from backends.guard.emergency_budget import EmergencyBudget
from backends.guard.events import GuardEvents
from backends.guard.leased_budget import LeasedBudget
from backends.guard.lending import EMERGENCY, EmergencyLending
from backends.guard.postponed import PostponedJobs

if TYPE_CHECKING:
    from backends.store.link import Link

_UNAVAILABLE_RETRY_SECONDS = 1
_EXHAUSTED_RETRY_SECONDS = 30
_NEVER = float("-inf")
_KEY_UNKNOWN = "an Idempotency-Key cannot be looked up now"
_LOOK_SECONDS = 1.0
_FAILING_SECONDS = 10.0
"""How long `health` remembers a failure that the link does not see, where no request asks the strategy again."""


@dataclass(frozen=True, slots=True)
class FailurePolicy:
    """What to do when the store fails, as the live settings say at this moment."""

    is_open: bool
    emergency_nanousd: int
    """The emergency budget of a UTC hour."""


class Health(Enum):
    """Who decides about requests: the strategy, the emergency budget, or neither."""

    GOOD = "good"
    DEGRADED = "degraded"
    UNAVAILABLE = "unavailable"


class Guard:
    """Reserves, extends and settles, also while the store fails.

    Args:
        primary: the strategy that keeps the books.
        fallback: decides while the store of `primary` fails (the memory strategy).
        link: whose state says whether the store is up; None for a primary without one.
        policy: called at every failure.
    """

    def __init__(
        self,
        primary: Backend,
        fallback: Backend,
        *,
        link: "Link | None",
        emergency: EmergencyBudget | LeasedBudget,
        clock: Clock,
        observer: Observer,
        policy: Callable[[], FailurePolicy],
    ) -> None:
        self.backend_name = primary.name
        """The strategy that decides while the store works."""
        self._primary = primary
        self._link = link
        self._clock = clock
        self._policy = policy
        self._events = GuardEvents(observer)
        self._lending = EmergencyLending(emergency, fallback, self._note_spend)
        self._postponed = PostponedJobs(self._events.postponed_job_failed)
        self._booking: EmergencyBooking | None = None
        self._booking_lock = threading.Lock()
        self._has_unbooked = False
        self._is_booking_postponed = False
        self._failing_until_seconds = _NEVER
        self._busy_until_seconds = _NEVER
        self._next_look_seconds = _NEVER

    def reserve(self, ask: Ask) -> Verdict:
        """Charge the highest possible cost, or refuse.

        Raises:
            ThrottleUnavailable: the store fails, and the emergency budget may not or cannot pay.
            ReservationConflict: the id is known already.
        """
        started_seconds = self._clock.monotonic_seconds()
        backend, script = self.backend_name, self._primary.reserve_script
        try:
            verdict = self._primary.reserve(ask)
        except StoreError as error:
            self._note_failure(ask, error, started_seconds)
            verdict = self._reserve_without_store(ask, error)
            backend, script = EMERGENCY, self._lending.reserve_script
        else:
            self._failing_until_seconds = _NEVER
        check_ms = (self._clock.monotonic_seconds() - started_seconds) * 1_000
        self._events.decided(ask, verdict, {"backend": backend, "script": script, "check_ms": check_ms})
        return verdict

    def find_duplicate(self, idempotency: Idempotency) -> Duplicate | None:
        """The first request with this key, if there is one; `reserve` checks again, and decides.

        Raises:
            ThrottleUnavailable: the store fails, and without it a second charge could not be ruled out.
        """
        try:
            return self._primary.find_duplicate(idempotency)
        except StoreError as error:
            raise ThrottleUnavailable(_KEY_UNKNOWN, _UNAVAILABLE_RETRY_SECONDS) from error

    def extend(
        self, reservation: Reservation, to_nanousd: int, budgets: tuple[Budget, ...], *, at_least_nanousd: int
    ) -> Reservation | None:
        """Reserve `to_nanousd` in all, or what the limits of `budgets` allow, if that is `at_least_nanousd`; else None.

        Where the store fails, the emergency budget pays for the increase, if the policy allows it.
        """
        if reservation.backend == EMERGENCY:
            return self._extend_without_store(reservation, to_nanousd, at_least_nanousd)
        extend = partial(self._primary.extend, reservation, to_nanousd, budgets, at_least_nanousd=at_least_nanousd)
        try:
            verdict: Verdict | None = extend() if self._link is None else self._link.with_whole_timeout(extend)
        except (StoreBusy, ReservationConflict):
            verdict = None
        except StoreError as error:
            if not self._lending.has_lent_to(reservation):
                # Once an answer: it may well be extended again before Redis is back.
                self._events.failed("extension_failed", reservation, error, backend=self._primary.name)
            return self._extend_without_store(reservation, to_nanousd, at_least_nanousd)
        extended = verdict if isinstance(verdict, Reservation) else None
        self._events.extended(reservation, extended)
        return extended

    def settle(
        self,
        reservation: Reservation,
        actual_nanousd: int,
        outcome: contract.Outcome = contract.Outcome.SETTLED,
    ) -> None:
        """Book what was used in place of what was reserved; now, or as soon as the store is back."""
        if reservation.backend == EMERGENCY:
            if self._lending.settle(reservation, actual_nanousd):
                settlement = contract.Settlement(reservation.reservation_id, outcome, actual_nanousd, 0)
                self._events.settled(reservation, settlement)
            return
        loan = self._lending.remove_loan(reservation) if self._lending.loans else {}
        if outcome is contract.Outcome.RELEASED:
            end = partial(self._primary.release, reservation)
        else:
            end = partial(self._primary.settle, reservation, actual_nanousd)
        try:
            self._end_now(reservation, end, loan)
        except StoreError as error:
            self._events.failed("settle_postponed", reservation, error)
            self._postponed.add(partial(self._end_now, reservation, end, loan))
        except BaseException:
            # Whoever waits for the store may be killed there; a second end changes nothing.
            self._postponed.add(partial(self._end_now, reservation, end, loan))
            raise

    def release(self, reservation: Reservation) -> None:
        """Book nothing, since nothing was used, and free the idempotency key; now, or as soon as the store is back."""
        self.settle(reservation, 0, contract.Outcome.RELEASED)

    def books(self, budgets: tuple[Budget, ...]) -> Books:
        """What is booked now in these budgets.

        Raises:
            StoreError: the store could not be asked.
        """
        return self._primary.books(budgets)

    def look(self, budgets: tuple[Budget, ...]) -> None:
        """Find out for `health` what `reserve` would find, also where no request does: writes, and these budgets.

        At most once in `_LOOK_SECONDS`, however often it is called.
        """
        now_seconds = self._clock.monotonic_seconds()
        if self._link is None or now_seconds < self._next_look_seconds:
            return
        self._next_look_seconds = now_seconds + _LOOK_SECONDS
        self.prepare()
        try:
            self._link.check_writes()
            self._primary.books(budgets)
        except StoreBusy:
            self._busy_until_seconds = now_seconds + 2 * _LOOK_SECONDS
        except StoreError as error:
            self._note_fault(error)
        else:
            self._busy_until_seconds = _NEVER

    def prepare(self) -> None:
        """Lease emergency budget for the outage that may come, so that no answer waits for a disk then."""
        policy = self._policy()
        if policy.is_open and self._link is not None:
            self._lending.budget.prepare(policy.emergency_nanousd)

    def book_spend_with(self, booking: EmergencyBooking) -> None:
        """Book with it what is spent of the emergency budget, when the store is back; else that stays unbooked."""
        self._booking = booking

    def book_emergency_spend(self) -> None:
        """Book what this instance has spent of emergency budgets and not booked yet: soon, and when the store is back.

        To be called at the start; what is spent later is booked without it.
        """
        if self._booking is None:
            return
        with self._booking_lock:
            self._has_unbooked = True
            was_postponed, self._is_booking_postponed = self._is_booking_postponed, True
        if not was_postponed:
            self._postponed.add(partial(self._book_spend, self._booking))

    def health(self) -> Health:
        """Whether requests are decided by the strategy, by the emergency budget, or not at all."""
        if self._link is None:
            return Health.GOOD
        if self._clock.monotonic_seconds() < self._busy_until_seconds:
            return Health.UNAVAILABLE
        is_failing = self._clock.monotonic_seconds() < self._failing_until_seconds
        if self._link.is_up and not is_failing:
            return Health.GOOD
        policy = self._policy()
        if not self._link.was_ever_up or not policy.is_open:
            return Health.UNAVAILABLE
        return Health.UNAVAILABLE if self._lending.budget.is_used_up(policy.emergency_nanousd) else Health.DEGRADED

    def close(self) -> None:
        """Stop the background threads; what is still to be settled stays booked in full."""
        self._postponed.stop()
        self._lending.budget.close()
        if self._booking is not None:
            self._booking.close()

    def _note_failure(self, ask: Ask, error: StoreError, started_seconds: float) -> None:
        check_ms = (self._clock.monotonic_seconds() - started_seconds) * 1_000
        checked = {"backend": self.backend_name, "script": self._primary.reserve_script, "check_ms": check_ms}
        self._events.check_failed(ask, error, checked)
        if error.maybe_done:
            self._postponed.add(partial(self._undo, ask))
        self._note_fault(error)

    def _note_fault(self, error: StoreError) -> None:
        is_link_up = self._link is not None and self._link.is_up
        if isinstance(error, StoreBroken) or (is_link_up and not isinstance(error, StoreBusy)):
            # Redis answers, so the link sees no failure; and yet the strategy cannot decide.
            self._failing_until_seconds = self._clock.monotonic_seconds() + _FAILING_SECONDS

    def _reserve_without_store(self, ask: Ask, error: StoreError) -> Verdict:
        if isinstance(error, StoreBusy):
            raise ThrottleUnavailable("the service is too busy to ask for its budgets", 1) from error
        policy = self._policy()
        if not policy.is_open:
            raise ThrottleUnavailable("the budgets cannot be asked now", _UNAVAILABLE_RETRY_SECONDS)
        if ask.idempotency is not None:
            # Whether the key was used before cannot be known now, and a second charge was ruled out.
            raise ThrottleUnavailable(_KEY_UNKNOWN, _UNAVAILABLE_RETRY_SECONDS)
        verdict = self._lending.reserve(ask, policy.emergency_nanousd)
        if verdict is None:
            self._events.emergency_exhausted(ask)
            # The next hour brings a new budget for certain, but Redis may well be back before.
            seconds_to_next_hour = SECONDS_PER_HOUR - self._clock.now_us() // US_PER_SECOND % SECONDS_PER_HOUR
            raise ThrottleUnavailable(
                "the emergency budget is used up, or too little of it is left",
                min(seconds_to_next_hour, _EXHAUSTED_RETRY_SECONDS),
            )
        return verdict

    def _extend_without_store(
        self, reservation: Reservation, to_nanousd: int, at_least_nanousd: int
    ) -> Reservation | None:
        policy, extended = self._policy(), None
        if policy.is_open:
            extended = self._lending.extend(reservation, to_nanousd, at_least_nanousd, policy.emergency_nanousd)
        self._events.extended(replace(reservation, backend=EMERGENCY), extended)
        return extended

    def _end_now(
        self, reservation: Reservation, end: Callable[[], contract.Settlement], loan: Mapping[int, int]
    ) -> None:
        try:
            # Even where the request has used up its own time: the answer has run.
            settlement = end() if self._link is None else self._link.with_whole_timeout(end)
        except ReservationConflict as error:
            self._events.failed("settle_refused", reservation, error)
            return
        self._events.settled(reservation, settlement)
        # One that has expired stays booked as the store knows it, without what was lent: that stays spent.
        if loan and settlement.outcome is not contract.Outcome.EXPIRED:
            self._lending.give_back(loan)

    def _note_spend(self, hour: int, change_nanousd: int) -> None:
        if self._booking is not None:
            self._booking.note(hour, change_nanousd)
            self.book_emergency_spend()

    def _book_spend(self, booking: EmergencyBooking) -> None:
        """One postponed job does it all: more may be spent while it runs, and in an outage it is tried many times."""
        while True:
            with self._booking_lock:
                if not self._has_unbooked:
                    self._is_booking_postponed = False
                    return
                self._has_unbooked = False
            try:
                booking.book_all()
            except StoreError:
                self._has_unbooked = True
                raise
            except BaseException:
                # The job is dropped, so the next spend begins another.
                self._is_booking_postponed = False
                raise

    def _undo(self, ask: Ask) -> None:
        """Undo a reserve whose reply was lost."""
        reservation = self._primary.find(ask)
        if reservation is not None:
            self._end_now(reservation, partial(self._primary.release, reservation), {})
