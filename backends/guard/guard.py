"""The guard: one strategy, and what is done when its store fails.

`reserve` asks the strategy. Where Redis fails it is `open` (the memory strategy decides, and the emergency budget
pays, until that is used up) or `closed` (`ThrottleUnavailable`). `settle` and `release` never fail: what cannot be
booked now is booked when Redis is back.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial

from backends.clock import US_PER_SECOND, Clock
from backends.contract import (
    Ask,
    Backend,
    Books,
    Duplicate,
    Event,
    Idempotency,
    Limits,
    Observer,
    Outcome,
    Refusal,
    Reservation,
    Settlement,
    Verdict,
)
from backends.errors import (
    ReservationConflict,
    StoreBroken,
    StoreBusy,
    StoreError,
    ThrottleUnavailable,
)
from backends.guard.emergency_budget import EmergencyBudget
from backends.keys import SECONDS_PER_HOUR
from backends.store.link import Link

EMERGENCY = "emergency"
RETRY_SECONDS = 0.25
BROKEN_RETRY_SECONDS = 2.0
_UNAVAILABLE_RETRY_SECONDS = 1
_EXHAUSTED_RETRY_SECONDS = 30
_KEY_UNKNOWN = "an Idempotency-Key cannot be looked up now"
# So long a failure of the books is remembered where nobody asks them again.
_FAILING_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class FailurePolicy:
    """What to do when the store fails, as the live settings say at this moment."""

    is_open: bool
    emergency_nanousd: int


class Health(Enum):
    """How the guard is."""

    GOOD = "good"
    DEGRADED = "degraded"
    UNAVAILABLE = "unavailable"


class Guard:
    """Reserve and settle for whoever sells answers.

    Args:
        primary: the strategy that keeps the books.
        fallback: decides while the store of `primary` is away (the memory strategy).
        link: whose state tells whether the store is away; None for a primary without one.
        policy: asked at every failure.
    """

    def __init__(
        self,
        primary: Backend,
        fallback: Backend,
        *,
        link: Link | None,
        emergency: EmergencyBudget,
        clock: Clock,
        observer: Observer,
        policy: Callable[[], FailurePolicy],
    ) -> None:
        self._primary = primary
        self._fallback = fallback
        self._link = link
        self._emergency = emergency
        self._clock = clock
        self._observer = observer
        self._policy = policy
        self._hours: dict[str, int] = {}
        self._lent: dict[str, dict[int, int]] = {}
        """What the emergency budget lent to extensions, by reservation and hour."""
        self._later = _Later(observer)
        self._failing_until_seconds = float("-inf")

    @property
    def primary(self) -> Backend:
        """The strategy that decides when all is well; for the race lab, which looks for its gap."""
        return self._primary

    @property
    def backend_name(self) -> str:
        """The strategy that decides when all is well."""
        return self._primary.name

    def reserve(self, ask: Ask) -> Verdict:
        """Charge the highest possible cost, or refuse.

        Raises:
            ThrottleUnavailable: the store fails and nobody else may decide.
            ReservationConflict: the id is known already.
        """
        started = self._clock.monotonic_seconds()
        backend, script = self._primary.name, self._primary.reserve_script
        try:
            verdict = self._primary.reserve(ask)
            self._failing_until_seconds = float("-inf")
        except StoreBusy as error:
            self._tell_failed(ask, error, started)
            if error.maybe_done:
                self._later.add(lambda: self._undo(ask))
            raise ThrottleUnavailable("the service is too busy to ask for its budgets", 1) from error
        except StoreError as error:
            self._tell_failed(ask, error, started)
            if isinstance(error, StoreBroken) or (self._link is not None and self._link.is_up):
                # The link does not see it: Redis answers, and yet the books cannot be asked.
                self._failing_until_seconds = self._clock.monotonic_seconds() + _FAILING_SECONDS
            if error.maybe_done:
                self._later.add(lambda: self._undo(ask))
            verdict = self._decide_without_store(ask)
            backend, script = EMERGENCY, self._fallback.reserve_script
        check_ms = (self._clock.monotonic_seconds() - started) * 1_000
        self._tell_verdict(ask, verdict, backend=backend, script=script, check_ms=check_ms)
        return verdict

    def find_duplicate(self, idempotency: Idempotency) -> Duplicate | None:
        """The first request with this key, if there is one; `reserve` looks again, and decides.

        Raises:
            ThrottleUnavailable: nobody can know now, and "never again" was promised.
        """
        try:
            return self._primary.find_duplicate(idempotency)
        except StoreError as error:
            raise ThrottleUnavailable(_KEY_UNKNOWN, _UNAVAILABLE_RETRY_SECONDS) from error

    def extend(
        self, reservation: Reservation, to_nanousd: int, limits: Limits, *, at_least_nanousd: int
    ) -> Reservation | None:
        """Set aside `to_nanousd` in all, or what there is room for from `at_least_nanousd` on; None: the answer ends.

        Where the store fails the emergency budget pays for what is asked on top, if it may.
        """
        if reservation.backend == EMERGENCY:
            return self._extend_on_emergency(reservation, to_nanousd, at_least_nanousd)
        try:
            with self._time_to_book():
                verdict = self._primary.extend(reservation, to_nanousd, limits, at_least_nanousd=at_least_nanousd)
        except (StoreBusy, ReservationConflict):
            verdict = None
        except StoreError as error:
            if reservation.reservation_id not in self._lent:
                # Once an answer: it may well ask again before Redis is back.
                self._tell_extension_failed(reservation, error)
            return self._extend_on_emergency(reservation, to_nanousd, at_least_nanousd)
        extended = verdict if isinstance(verdict, Reservation) else None
        self._tell_extension(reservation, extended)
        return extended

    def settle(self, reservation: Reservation, actual_nanousd: int) -> None:
        """Book what was used in place of what was reserved; now, or as soon as the store is back."""
        end = partial(self._primary.settle, reservation, actual_nanousd)
        self._end(reservation, actual_nanousd, end, Outcome.SETTLED)

    def release(self, reservation: Reservation) -> None:
        """It was never used: book nothing, and free its idempotency key; now, or as soon as the store is back."""
        self._end(reservation, 0, partial(self._primary.release, reservation), Outcome.RELEASED)

    def books(self, identifier: str, network: str, window_seconds: int) -> Books:
        """What is booked now.

        Raises:
            StoreError: the store could not be asked.
        """
        return self._primary.books(identifier, network, window_seconds)

    def health(self) -> Health:
        """Whether requests are decided by the books, by the emergency budget, or not at all."""
        if self._link is None:
            return Health.GOOD
        is_failing = self._clock.monotonic_seconds() < self._failing_until_seconds
        if self._link.is_up and not is_failing:
            return Health.GOOD
        policy = self._policy()
        if not self._link.was_ever_up or not policy.is_open:
            return Health.UNAVAILABLE
        return Health.UNAVAILABLE if self._emergency.is_used_up(policy.emergency_nanousd) else Health.DEGRADED

    def close(self) -> None:
        """Stop what runs in the background; what is still to be booked stays booked in full."""
        self._later.stop()

    def _decide_without_store(self, ask: Ask) -> Verdict:
        policy = self._policy()
        if not policy.is_open:
            raise ThrottleUnavailable("the budgets cannot be asked now", _UNAVAILABLE_RETRY_SECONDS)
        if ask.idempotency is not None:
            # Whether the key was used before cannot be known now, and "never again" was promised.
            raise ThrottleUnavailable(_KEY_UNKNOWN, _UNAVAILABLE_RETRY_SECONDS)
        verdict = self._fallback.reserve(ask)
        if not isinstance(verdict, Reservation):
            return verdict
        if ask.reservation_id in self._hours:
            return replace(verdict, backend=EMERGENCY)
        hour = self._emergency.take(verdict.cost_nanousd, policy.emergency_nanousd)
        if hour is None:
            self._fallback.release(verdict)
            self._tell("emergency_exhausted", ask)
            raise ThrottleUnavailable(
                "the emergency budget is used up, or too little of it is left", self._seconds_to_better_times()
            )
        self._hours[ask.reservation_id] = hour
        return replace(verdict, backend=EMERGENCY)

    def _extend_on_emergency(
        self, reservation: Reservation, to_nanousd: int, at_least_nanousd: int
    ) -> Reservation | None:
        """A whole slice where there is money for it: each one is a write to a file."""
        lent = replace(reservation, backend=EMERGENCY)
        for amount_nanousd in dict.fromkeys((to_nanousd, at_least_nanousd)):
            hour = self._take_from_emergency(amount_nanousd - reservation.cost_nanousd)
            if hour is not None:
                hours = self._lent.setdefault(reservation.reservation_id, {})
                hours[hour] = hours.get(hour, 0) + amount_nanousd - reservation.cost_nanousd
                self._tell_extension(lent, replace(lent, cost_nanousd=amount_nanousd))
                return replace(reservation, cost_nanousd=amount_nanousd)
        self._tell_extension(lent, None)
        return None

    def _take_from_emergency(self, amount_nanousd: int) -> int | None:
        policy = self._policy()
        if not policy.is_open or amount_nanousd <= 0:
            return None
        return self._emergency.take(amount_nanousd, policy.emergency_nanousd)

    def _seconds_to_better_times(self) -> int:
        # The next hour brings a new budget for certain, but Redis may well be back before.
        seconds_to_next_hour = SECONDS_PER_HOUR - self._clock.now_us() // US_PER_SECOND % SECONDS_PER_HOUR
        return min(seconds_to_next_hour, _EXHAUSTED_RETRY_SECONDS)

    def _end(
        self, reservation: Reservation, actual_nanousd: int, end: Callable[[], Settlement], outcome: Outcome
    ) -> None:
        lent = self._lent.pop(reservation.reservation_id, {})
        if reservation.backend == EMERGENCY:
            self._end_emergency(reservation, actual_nanousd, lent, outcome)
            return

        def end_and_give_back() -> None:
            with self._time_to_book():
                self._end_now(reservation, end)
            # The store has the whole amount now: what the emergency budget lent comes back.
            for hour, amount in lent.items():
                self._emergency.correct(hour, -amount)

        try:
            end_and_give_back()
        except StoreError as error:
            self._observer(Event("settle_postponed", {"request_id": reservation.reservation_id, "error": str(error)}))
            self._later.add(end_and_give_back)

    @contextmanager
    def _time_to_book(self) -> Iterator[None]:
        """What was reserved is booked with a time-out of its own, also where its request has used up its time."""
        if self._link is None:
            yield
            return
        with self._link.at_least(self._link.timeout_seconds):
            yield

    def _end_emergency(
        self, reservation: Reservation, actual_nanousd: int, lent: Mapping[int, int], outcome: Outcome
    ) -> None:
        first_hour = self._hours.pop(reservation.reservation_id, None)
        if first_hour is None:
            return
        self._fallback.settle(replace(reservation, backend=self._fallback.name), actual_nanousd)
        taken = dict(lent)
        taken[first_hour] = taken.get(first_hour, 0) + reservation.cost_nanousd - sum(lent.values())
        self._give_back(taken, reservation.cost_nanousd - actual_nanousd)
        self._tell_settled(reservation, outcome, actual_nanousd, 0)

    def _give_back(self, taken: Mapping[int, int], unused_nanousd: int) -> None:
        """What an emergency answer did not use, the latest hour first; what it used stays where it was taken.

        An overrun counts in the latest.
        """
        for hour in sorted(taken, reverse=True):
            back = min(unused_nanousd, taken[hour])
            if back:
                self._emergency.correct(hour, -back)
            unused_nanousd -= back

    def _end_now(self, reservation: Reservation, end: Callable[[], Settlement]) -> None:
        try:
            settlement = end()
        except ReservationConflict as error:
            self._observer(Event("settle_refused", {"request_id": reservation.reservation_id, "error": str(error)}))
            return
        self._tell_settled(reservation, settlement.outcome, settlement.booked_nanousd, settlement.overrun_nanousd)
        self._tell_expired(settlement.expired_nanousd)

    def _undo(self, ask: Ask) -> None:
        """The question went out and no answer came; if it was charged after all, nobody uses it."""
        reservation = self._primary.find(ask)
        if reservation is not None:
            self._end_now(reservation, lambda: self._primary.release(reservation))

    def _tell(self, name: str, ask: Ask, **fields: object) -> None:
        own = {"request_id": ask.reservation_id, "identifier": ask.identifier, "cost_nanousd": ask.cost_nanousd}
        self._observer(Event(name, {**own, **fields}))

    def _tell_failed(self, ask: Ask, error: StoreError, started_seconds: float) -> None:
        self._tell(
            "check_failed",
            ask,
            error=str(error),
            is_bug=isinstance(error, StoreBroken),
            backend=self._primary.name,
            script=self._primary.reserve_script,
            check_ms=(self._clock.monotonic_seconds() - started_seconds) * 1_000,
        )

    def _tell_verdict(self, ask: Ask, verdict: Verdict, *, backend: str, script: str, check_ms: float) -> None:
        decision: dict[str, object] = {"backend": backend, "script": script, "check_ms": check_ms}
        if isinstance(verdict, Refusal):
            self._tell("refused", ask, refusal=verdict, **decision)
            return
        if isinstance(verdict, Duplicate):
            self._tell("duplicate", ask, first_request_id=verdict.reservation_id, state=verdict.state.value, **decision)
            return
        self._tell_expired(verdict.expired_nanousd)
        spent = {"window_nanousd": verdict.window_spent_nanousd, "day_nanousd": verdict.day_spent_nanousd}
        self._tell("reserved", ask, cost_nanousd=verdict.cost_nanousd, **spent, **decision)

    def _tell_extension_failed(self, reservation: Reservation, error: StoreError) -> None:
        fields: dict[str, object] = {"request_id": reservation.reservation_id, "error": str(error)}
        self._observer(Event("extension_failed", {**fields, "backend": self._primary.name}))

    def _tell_extension(self, reservation: Reservation, extended: Reservation | None) -> None:
        fields: dict[str, object] = {
            "request_id": reservation.reservation_id,
            "identifier": reservation.identifier,
            "reserved_nanousd": reservation.cost_nanousd if extended is None else extended.cost_nanousd,
            "more_nanousd": 0 if extended is None else extended.cost_nanousd - reservation.cost_nanousd,
            "backend": reservation.backend,
        }
        self._observer(Event("extension_refused" if extended is None else "extended", fields))

    def _tell_expired(self, expired_nanousd: int) -> None:
        if expired_nanousd:
            self._observer(Event("expired", {"expired_nanousd": expired_nanousd}))

    def _tell_settled(self, reservation: Reservation, outcome: Outcome, booked: int, overrun: int) -> None:
        fields: dict[str, object] = {
            "request_id": reservation.reservation_id,
            "identifier": reservation.identifier,
            "reserved_nanousd": reservation.cost_nanousd,
            "booked_nanousd": booked,
            "overrun_nanousd": overrun,
            "outcome": outcome.value,
            "backend": reservation.backend,
        }
        self._observer(Event("settled", fields))


class _Later:
    """Jobs that wait for the store, done by one thread that lives only while there are any."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._jobs: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, job: Callable[[], None]) -> None:
        with self._lock:
            self._jobs.append(job)
            if self._thread is None and not self._stopped.is_set():
                self._thread = threading.Thread(target=self._work, name="tollgate-settle-later", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._jobs or self._stopped.is_set():
                    self._thread = None
                    return
                job = self._jobs[0]
            try:
                job()
            except StoreError as error:
                # The others go first next time: one key of the wrong kind must not keep them all waiting.
                with self._lock:
                    self._jobs.rotate(-1)
                # A wrong command stays wrong until somebody mends the key: it need not be told four times a second.
                self._stopped.wait(BROKEN_RETRY_SECONDS if isinstance(error, StoreBroken) else RETRY_SECONDS)
                continue
            except Exception as error:  # noqa: BLE001 (a backend's bug; the thread lives on, and it is told)
                # The reservation stays booked in full.
                self._observer(Event("settle_refused", {"error": repr(error)[:200]}))
            with self._lock:
                self._jobs.popleft()
