"""Does Redis begin to throw keys away while the service runs? What is evicted can be spent again."""

from contextlib import suppress
from typing import Protocol

from backends.clock import Clock
from backends.errors import StoreError
from backends.store.link import Link
from flaskapp.ops.first_worker import FirstOfWorkers

LOOK_SECONDS = 30.0
NO_EVICTION = "noeviction"


class Report(Protocol):
    """Takes the policy, and whether this worker is the first to see it."""

    def __call__(self, policy: str, *, is_first: bool) -> None:  # noqa: D102 (as above)
        ...


class EvictionWatch:
    """Looks at the server's `maxmemory-policy` every `LOOK_SECONDS`, where it may be asked.

    Args:
        report: called at each change to a policy that evicts.
    """

    def __init__(self, link: Link, clock: Clock, report: Report) -> None:
        self._link = link
        self._clock = clock
        self._report = report
        self._next_look_seconds = clock.monotonic_seconds() + LOOK_SECONDS
        self._policy = NO_EVICTION
        self._changes = 0

    def look(self) -> None:
        """Look, if it is time to; never raises `StoreError`."""
        now_seconds = self._clock.monotonic_seconds()
        if now_seconds < self._next_look_seconds:
            return
        self._next_look_seconds = now_seconds + LOOK_SECONDS
        with suppress(StoreError):
            self._take_in(self._link.eviction_policy() or self._policy)

    def _take_in(self, policy: str) -> None:
        if policy == self._policy:
            return
        self._policy = policy
        self._changes += 1
        if policy != NO_EVICTION:
            self._report(policy, is_first=FirstOfWorkers(f"evicts-{self._changes}").is_first())
