"""What the suites ask with: one ordinary ask, its limits, and each limit in the order in which they are checked."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from backends.clock import US_PER_SECOND
from backends.contract import Ask, Idempotency, Limits, Reason, Scope
from backends.errors import ReservationConflict
from backends.keys import bucket_seconds_of, pending_bucket_seconds_of

US = US_PER_SECOND
WINDOW_SECONDS = 600
BUCKET_SECONDS = bucket_seconds_of(WINDOW_SECONDS)
PENDING_SECONDS = 120
PENDING_BUCKET_SECONDS = pending_bucket_seconds_of(PENDING_SECONDS)
THROTTLE_SECONDS = 30
COST = 4_000_000
AMPLE = 10**12
WHO, NETWORK = "hash456", "198.51.100.7"
KEY = Idempotency("0123456789abcdef" * 2, "fedcba9876543210")

ROOMY = Limits(
    window_nanousd=AMPLE,
    day_nanousd=AMPLE,
    network_window_nanousd=AMPLE,
    network_day_nanousd=AMPLE,
    global_hour_nanousd=AMPLE,
    global_day_nanousd=AMPLE,
    window_seconds=WINDOW_SECONDS,
    throttle_seconds=THROTTLE_SECONDS,
    mark_when_busy=True,
)


@dataclass(frozen=True, slots=True)
class LimitCase:
    """One limit: its field in `Limits`, what its refusal says, and the TTL of the marker that it sets (0: none)."""

    field: str
    reason: Reason
    scope: Scope
    marker_seconds: int = 0

    def set_to(self, nanousd: int | None, limits: Limits = ROOMY) -> Limits:
        """`limits` with this one at so many nano-dollars."""
        changes: dict[str, Any] = {self.field: nanousd}
        return replace(limits, **changes)


LIMITS_IN_ORDER = (
    LimitCase("day_nanousd", Reason.DAILY_LIMIT, Scope.IDENTIFIER, 2 * THROTTLE_SECONDS),
    LimitCase("window_nanousd", Reason.WINDOW_LIMIT, Scope.IDENTIFIER, THROTTLE_SECONDS),
    LimitCase("network_window_nanousd", Reason.NETWORK_LIMIT, Scope.NETWORK),
    LimitCase("network_day_nanousd", Reason.NETWORK_DAILY_LIMIT, Scope.NETWORK),
    LimitCase("global_hour_nanousd", Reason.GLOBAL_HOURLY_LIMIT, Scope.GLOBAL),
    LimitCase("global_day_nanousd", Reason.GLOBAL_DAILY_LIMIT, Scope.GLOBAL),
)
SLIDING = (Reason.WINDOW_LIMIT, Reason.NETWORK_LIMIT)


def make_ask(reservation_id: str, cost_nanousd: int = COST, limits: Limits = ROOMY, **changes: Any) -> Ask:
    """An ask of `WHO` from `NETWORK`; `changes` replaces its other fields."""
    return replace(Ask(reservation_id, WHO, NETWORK, cost_nanousd, limits, PENDING_SECONDS), **changes)


@contextmanager
def conflict() -> Iterator[None]:
    """The body must raise a `ReservationConflict`."""
    try:
        yield
    except ReservationConflict:
        return
    raise AssertionError("no ReservationConflict")
