"""What the suites ask with: one ordinary ask, and each limit that it can meet in the order of the checks.

The limits are the six built-in ones, and further ones: each scope and each kind of period is among them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from backends.budgets import BUILT_IN, EVERYBODY, Budget, Calendar, Forever, Period, Reason, Scope, Sliding
from backends.clock import US_PER_SECOND
from backends.contract import Ask, Idempotency
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
ZONE = "Europe/Berlin"
"""Of the calendar periods of further budgets: it has daylight saving."""
OWNERS = {
    Scope.IDENTIFIER: WHO,
    Scope.NETWORK: NETWORK,
    Scope.WIDE_NETWORK: "198.51.100.0",
    Scope.GLOBAL: EVERYBODY,
    Scope.KEY: "web",
    Scope.TEAM: "marketing",
    Scope.MODEL: "gpt-4o",
}
PERIODS: tuple[Period, ...] = (
    Sliding(3_600),
    Calendar("hour", ZONE),
    Calendar("day", ZONE),
    Calendar("week", ZONE),
    Calendar("month", ZONE),
    Forever(),
)


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits that one request of the suites meets: of the six budgets, and of further ones. None is no limit."""

    window_nanousd: int | None = AMPLE
    day_nanousd: int | None = AMPLE
    network_window_nanousd: int | None = AMPLE
    network_day_nanousd: int | None = AMPLE
    global_hour_nanousd: int | None = AMPLE
    global_day_nanousd: int | None = AMPLE
    window_seconds: int = WINDOW_SECONDS
    throttle_seconds: int = THROTTLE_SECONDS
    """TTL of the throttle marker after a window refusal; after a daily refusal it is twice that."""
    mark_when_busy: bool = True
    further: tuple[Budget, ...] = ()
    """Their markers, if they set any, live for `throttle_seconds`."""

    def budgets(self, identifier: str, network: str) -> tuple[Budget, ...]:
        """All for these owners: the six in the order of the table, then the further ones."""
        owners = OWNERS | {Scope.IDENTIFIER: identifier, Scope.NETWORK: network}
        marker_seconds = {"day": 2 * self.throttle_seconds, "window": self.throttle_seconds}
        six = tuple(
            Budget(
                name=name,
                owner=owners[row.scope],
                period=Sliding(self.window_seconds) if row.unit is None else Calendar(row.unit),
                limit_nanousd=getattr(self, f"{name}_nanousd"),
                scope=row.scope,
                throttle_seconds=marker_seconds.get(name, 0),
            )
            for name, row in BUILT_IN.items()
        )
        return six + tuple(
            budget._replace(
                owner=owners[budget.scope], throttle_seconds=budget.throttle_seconds and self.throttle_seconds
            )
            for budget in self.further
        )


ROOMY = Limits()


@dataclass(frozen=True, slots=True)
class LimitCase:
    """One limit: the name of its budget, what its refusal says, and the TTL of the marker that it sets (0: none)."""

    name: str
    reason: Reason
    scope: Scope
    marker_seconds: int = 0
    period: Period | None = None
    """Of a further budget; None for a built-in one."""

    def set_to(self, nanousd: int | None, limits: Limits = ROOMY) -> Limits:
        """`limits` with this one at so many nano-dollars."""
        if self.period is None:
            changes: dict[str, Any] = {f"{self.name}_nanousd": nanousd}
            return replace(limits, **changes)
        others = tuple(budget for budget in limits.further if budget.name != self.name)
        mine = further_budget(self.name, self.scope, self.period, nanousd, throttle_seconds=self.marker_seconds)
        return replace(limits, further=(*others, mine))


def further_budget(
    name: str, scope: Scope, period: Period, limit_nanousd: int | None = AMPLE, **changes: Any
) -> Budget:
    """A budget of the usual owner of its scope that is not built in; `changes` replaces its other fields."""
    return Budget(name, OWNERS[scope], period, limit_nanousd, scope)._replace(**changes)


def _further_case(name: str, scope: Scope, period: Period, marker_seconds: int = 0) -> LimitCase:
    return LimitCase(name, Reason.BUDGET_LIMIT, scope, marker_seconds, period)


LIMITS_IN_ORDER = (
    LimitCase("day", Reason.DAILY_LIMIT, Scope.IDENTIFIER, 2 * THROTTLE_SECONDS),
    LimitCase("window", Reason.WINDOW_LIMIT, Scope.IDENTIFIER, THROTTLE_SECONDS),
    LimitCase("network_window", Reason.NETWORK_LIMIT, Scope.NETWORK),
    LimitCase("network_day", Reason.NETWORK_DAILY_LIMIT, Scope.NETWORK),
    LimitCase("global_hour", Reason.GLOBAL_HOURLY_LIMIT, Scope.GLOBAL),
    LimitCase("global_day", Reason.GLOBAL_DAILY_LIMIT, Scope.GLOBAL),
    _further_case("who_hour", Scope.IDENTIFIER, Calendar("hour", ZONE), THROTTLE_SECONDS),
    _further_case("network_long", Scope.NETWORK, Sliding(3_600)),
    _further_case("around_day", Scope.WIDE_NETWORK, Calendar("day", ZONE)),
    _further_case("all_week", Scope.GLOBAL, Calendar("week", ZONE)),
    _further_case("key_month", Scope.KEY, Calendar("month", ZONE)),
    _further_case("team_ever", Scope.TEAM, Forever()),
    _further_case("model_long", Scope.MODEL, Sliding(90_000)),
)
SLIDING = (Reason.WINDOW_LIMIT, Reason.NETWORK_LIMIT)


def _all_roomy() -> Limits:
    limits = ROOMY
    for case in LIMITS_IN_ORDER:
        limits = case.set_to(AMPLE, limits)
    return limits


EVERY = _all_roomy()
"""Every limit that there is, and none that is met."""


def make_ask(
    reservation_id: str,
    cost_nanousd: int = COST,
    limits: Limits = ROOMY,
    *,
    identifier: str = WHO,
    network: str = NETWORK,
    further: tuple[Budget, ...] = (),
    **changes: Any,
) -> Ask:
    """An ask that is charged to the budgets of `limits` and to `further`; `changes` replaces its other fields."""
    ask = Ask(
        reservation_id,
        cost_nanousd,
        (*limits.budgets(identifier, network), *further),
        PENDING_SECONDS,
        mark_when_busy=limits.mark_when_busy,
    )
    return replace(ask, **changes)


@contextmanager
def conflict() -> Iterator[None]:
    """The body must raise a `ReservationConflict`."""
    try:
        yield
    except ReservationConflict:
        return
    raise AssertionError("no ReservationConflict")
