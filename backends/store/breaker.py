"""The breaker: while Redis is away its callers learn that at once, instead of waiting for a time-out each."""

import threading

from backends.clock import Clock
from backends.contract import Event, Observer
from backends.errors import StoreUnavailable
from backends.store.failures import one_line

REST_SECONDS = 0.5
UNWILLING_SECONDS = 2.0
"""How long an answer "not now" (full, read-only, …) counts against `is_up`."""


class Breaker:
    """After a failure it refuses for `REST_SECONDS`; then one caller tries, and the others wait for the outcome.

    Args:
        clock: durations.
        observer: gets ``store_lost`` (`error`) and ``store_back``.
        trial_seconds: how long the one caller may take before another one tries.
    """

    def __init__(self, clock: Clock, observer: Observer, trial_seconds: float) -> None:
        self._clock = clock
        self._observer = observer
        self._trial_seconds = trial_seconds
        self._lock = threading.Lock()
        self.is_resting = False
        """Whether Redis did not answer the last caller."""
        self._resting_until_seconds = float("-inf")
        self._last_failure = ""
        self._unwilling_until_seconds = float("-inf")
        self.was_ever_up = False

    @property
    def is_up(self) -> bool:
        """Whether Redis answers, and has not said "not now" within `UNWILLING_SECONDS`."""
        if not self.was_ever_up or self.is_resting:
            return False
        return self._clock.monotonic_seconds() >= self._unwilling_until_seconds

    def let_one_through(self) -> None:
        """To be called before Redis is asked while it `is_resting`.

        Raises:
            StoreUnavailable: this caller is not the one that tries.
        """
        with self._lock:
            if not self.is_resting:
                return
            now = self._clock.monotonic_seconds()
            if now < self._resting_until_seconds:
                raise self.unavailable()
            self._resting_until_seconds = now + self._trial_seconds + REST_SECONDS

    def unavailable(self) -> StoreUnavailable:
        """The failure of a caller that Redis was not asked for."""
        return StoreUnavailable(f"Redis does not answer ({self._last_failure})")

    def succeeded(self) -> None:
        """Redis did what it was asked; to be called where that is news."""
        self.was_ever_up = True
        self.answered()

    def answered(self) -> None:
        """Redis answered, be it with an error: the rest ends."""
        with self._lock:
            was_down, self.is_resting = self.is_resting, False
        if was_down:
            self._observer(Event("store_back", {}))

    def not_now(self) -> None:
        """Redis answered that it may not do this. It gets no rest: it may do the next command."""
        self._unwilling_until_seconds = self._clock.monotonic_seconds() + UNWILLING_SECONDS

    def cut_off(self, error: Exception) -> None:
        """Redis could not be reached, or did not answer in time: a rest begins."""
        with self._lock:
            was_up, self.is_resting = not self.is_resting, True
            self._last_failure = one_line(error)
            self._resting_until_seconds = self._clock.monotonic_seconds() + REST_SECONDS
        if was_up:
            self._observer(Event("store_lost", {"error": one_line(error)}))
