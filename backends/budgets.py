"""Budgets: what one owner of a scope may spend in one period. A request is charged to all that apply to it, or to none.

The six that the service always has are rows of the table `BUILT_IN`. All that differs from further budgets stands
there: their keys, the statuses of the scripts' replies, and the reasons of their refusals.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta, tzinfo
from enum import StrEnum
from functools import lru_cache
from types import MappingProxyType
from typing import Literal, NamedTuple
from zoneinfo import ZoneInfo

from backends.errors import ConfigurationError

SECONDS_PER_HOUR = 3_600
SECONDS_PER_DAY = 86_400
EVERYBODY = "all"
"""The owner of a budget of the scope `GLOBAL`."""
MOST_BUDGETS = 26
"""That one request may be charged to: the six, four of networks that the service adds, and sixteen more."""
SHORTEST_WINDOW_SECONDS, LONGEST_WINDOW_SECONDS = 60, 31 * SECONDS_PER_DAY
_NAME = re.compile(r"[a-z0-9_]{1,32}")


class Scope(StrEnum):
    """Whose budget it is."""

    IDENTIFIER = "identifier"
    NETWORK = "network"
    WIDE_NETWORK = "wide_network"
    GLOBAL = "global"
    KEY = "key"
    TEAM = "team"
    MODEL = "model"

    # Each decision looks budgets up by their scopes: an enumeration's own way of hashing takes five times as long.
    __hash__ = str.__hash__


class Reason(StrEnum):
    """Why a request is refused."""

    THROTTLED = "throttled"
    DAILY_LIMIT = "daily_limit"
    WINDOW_LIMIT = "window_limit"
    NETWORK_LIMIT = "network_limit"
    NETWORK_DAILY_LIMIT = "network_daily_limit"
    NETWORK_SHARE = "network_share"
    """A network's share of what others have left of a budget: no row of the table has this reason."""
    GLOBAL_HOURLY_LIMIT = "global_hourly_limit"
    GLOBAL_DAILY_LIMIT = "global_daily_limit"
    BUDGET_LIMIT = "budget_limit"
    """The limit of a budget that is not built in."""


Unit = Literal["hour", "day", "week", "month"]
UNITS: tuple[Unit, ...] = ("hour", "day", "week", "month")


class Sliding(NamedTuple):
    """The last so many seconds, at any moment."""

    seconds: int

    @property
    def word(self) -> str:
        """As it stands in keys."""
        return f"sliding{self.seconds}"


class Calendar(NamedTuple):
    """An hour, a day, a week (from Monday) or a month, as the clocks and calendars of `zone` (IANA) show it."""

    unit: Unit
    zone: str = "UTC"

    @property
    def word(self) -> str:
        """As it stands in keys."""
        return self.unit


class Forever(NamedTuple):
    """One period that never ends."""

    @property
    def word(self) -> str:
        """As it stands in keys."""
        return "forever"


Period = Sliding | Calendar | Forever


class Share(NamedTuple):
    """How much of another budget of the same period one owner may have: so much of what all others have left of it.

    What is booked for the owner and the cost are together at most `millionths` / 1,000,000 of the other budget's limit
    without what is booked there for all others, rounded down.
    """

    of: str
    """The name of the other budget, to which all are charged who are charged to this one."""
    millionths: int


class Budget(NamedTuple):
    """What one owner may spend in one period.

    The names of `BUILT_IN` stand for its six rows: a request is charged to all of them, or to none.
    """

    name: str
    """1 to 32 of ``a-z 0-9 _``."""
    owner: str
    """Whose it is, as keys spell it; of the scope `GLOBAL` it is `EVERYBODY`."""
    period: Period
    limit_nanousd: int | None
    """None is no limit: what is spent is booked all the same."""
    scope: Scope = Scope.IDENTIFIER
    is_shadow: bool = False
    """It is decided and booked, and never a reason to refuse."""
    throttle_seconds: int = 0
    """TTL of the throttle marker that a refusal sets: of the scope `IDENTIFIER` alone; 0 sets none."""
    share: Share | None = None
    """What its owner may have of another budget, beside its own limit: of the scopes of networks alone."""


class BuiltIn(NamedTuple):
    """One row of the table of budgets that are always there."""

    scope: Scope
    unit: Unit | None
    """Of UTC; None is a sliding window."""
    key: str
    """With ``{owner}`` and the date of the period, ``{date}`` or ``{hour}``, where the key has them."""
    status: int
    """Of a script's reply that refuses by it."""
    reason: Reason
    keep_seconds: int = SECONDS_PER_DAY
    """How long its key outlives its period."""


BUILT_IN: Mapping[str, BuiltIn] = MappingProxyType(
    {
        "day": BuiltIn(Scope.IDENTIFIER, "day", "llm:cost:daily:{owner}:{date}", 2, Reason.DAILY_LIMIT),
        "window": BuiltIn(Scope.IDENTIFIER, None, "llm:cost:recent:{owner}", 3, Reason.WINDOW_LIMIT),
        "network_window": BuiltIn(Scope.NETWORK, None, "llm:network:recent:{owner}", 4, Reason.NETWORK_LIMIT),
        "network_day": BuiltIn(Scope.NETWORK, "day", "llm:network:daily:{owner}:{date}", 5, Reason.NETWORK_DAILY_LIMIT),
        "global_hour": BuiltIn(
            Scope.GLOBAL, "hour", "llm:global:hourly:{hour}", 6, Reason.GLOBAL_HOURLY_LIMIT, 2 * SECONDS_PER_HOUR
        ),
        "global_day": BuiltIn(Scope.GLOBAL, "day", "llm:global:daily:{date}", 7, Reason.GLOBAL_DAILY_LIMIT),
    }
)
"""By name, in the order in which they are checked, and named by refusals."""
FURTHER_STATUS, SHARE_STATUS = 13, 14
"""Of a script's reply that refuses by a budget that is not built in, and by a share."""
WHOLE_MILLIONTHS = 1_000_000
_SHARED_SCOPES = {Scope.NETWORK, Scope.WIDE_NETWORK}


def owner_in(budgets: tuple[Budget, ...], scope: Scope) -> str:
    """The owner of the budgets of a scope; empty where there is none."""
    for budget in budgets:
        if budget.scope == scope:
            return budget.owner
    return ""


def check(budgets: Sequence[Budget]) -> None:
    """Refuse budgets that one request cannot be charged to; their owners are not looked at.

    Raises:
        ConfigurationError: there are none or too many, two have one name, a name, a length, a zone or a share cannot be
            used, or built-in ones are not all there with their scopes and periods.
    """
    names = {budget.name for budget in budgets}
    if not 0 < len(budgets) <= MOST_BUDGETS:
        raise ConfigurationError(f"budgets: 1 to {MOST_BUDGETS} of them")
    if len(names) < len(budgets):
        raise ConfigurationError("name: no two budgets of a request have one name")
    periods = {budget.name: budget.period for budget in budgets}
    for budget in budgets:
        _check_one(budget)
        _check_share(budget, periods)
    windows = {budget.period for budget in budgets if budget.name in BUILT_IN and isinstance(budget.period, Sliding)}
    if not names.isdisjoint(BUILT_IN) and (not names.issuperset(BUILT_IN) or len(windows) != 1):
        raise ConfigurationError("name: the built-in budgets come together, and their windows have one length")


def _check_one(budget: Budget) -> None:
    name, period = budget.name, budget.period
    if not _NAME.fullmatch(name):
        raise ConfigurationError("name: 1 to 32 of a-z 0-9 _")
    if isinstance(period, Sliding) and not 1 <= period.seconds <= LONGEST_WINDOW_SECONDS:
        raise ConfigurationError(f"period: a window of 1 to {LONGEST_WINDOW_SECONDS} seconds")
    if budget.throttle_seconds and budget.scope is not Scope.IDENTIFIER:
        raise ConfigurationError("throttle_seconds: only a refusal of an identifier's budget sets a marker")
    if isinstance(period, Calendar):
        if period.unit not in UNITS:
            raise ConfigurationError(f"period: one of {', '.join(UNITS)}")
        zone_of(period.zone)
    row = BUILT_IN.get(name)
    expected = None if row is None else Calendar(row.unit) if row.unit else Sliding(getattr(period, "seconds", 0))
    if row is not None and (budget.scope != row.scope or period != expected):
        raise ConfigurationError(f"name: {name} is built in, with another scope or period")


def _check_share(budget: Budget, periods: Mapping[str, Period]) -> None:
    if budget.share is None:
        return
    of, millionths = budget.share
    if budget.scope not in _SHARED_SCOPES or isinstance(budget.period, Sliding):
        raise ConfigurationError("share: only a network has one, and none of a window")
    if of == budget.name or periods.get(of) != budget.period:
        raise ConfigurationError("share: of another budget of the request, with the same period")
    if not 0 < millionths <= WHOLE_MILLIONTHS:
        raise ConfigurationError(f"share: 1 to {WHOLE_MILLIONTHS} millionths")


def share_limit(share: Share, whole_limit_nanousd: int, whole_nanousd: int, own_nanousd: int) -> int:
    """What may be booked in all for the owner of a share, by what is booked of the whole budget and of it for them."""
    of_others = max(0, whole_nanousd - own_nanousd)
    return (whole_limit_nanousd - of_others) * share.millionths // WHOLE_MILLIONTHS


class Shared(NamedTuple):
    """A share that can refuse, by the places of two budgets in a list."""

    part_at: int
    """Whose owner has the share."""
    whole_at: int
    """What is shared."""
    share: Share


def shares_in(budgets: Sequence[Budget]) -> list[Shared]:
    """The shares that can refuse: neither budget is in shadow mode, and what is shared has a limit."""
    place_of = {budget.name: at for at, budget in enumerate(budgets) if enforced_limit(budget) is not None}
    return [
        Shared(at, place_of[budget.share.of], budget.share)
        for at, budget in enumerate(budgets)
        if budget.share is not None and not budget.is_shadow and budget.share.of in place_of
    ]


def enforced_limit(budget: Budget) -> int | None:
    """Its limit; None where it refuses nothing."""
    return None if budget.is_shadow else budget.limit_nanousd


def whole_limits(budgets: Sequence[Budget]) -> list[int]:
    """What each budget that can refuse, and each share, allows where nothing is booked."""
    limits = [enforced_limit(budget) for budget in budgets]
    shares = [(share, limits[whole_at]) for _, whole_at, share in shares_in(budgets)]
    return [
        *(limit for limit in limits if limit is not None),
        *(share_limit(share, limit, 0, 0) for share, limit in shares if limit is not None),
    ]


class Span(NamedTuple):
    """A calendar period: unix seconds, the end not included."""

    start_seconds: int
    end_seconds: int


def span_at(period: Calendar, at_seconds: int) -> Span:
    """The hour, day, week or month that holds a moment, with its real length in its zone."""
    if period.zone == "UTC" and period.unit in {"hour", "day"}:
        length = SECONDS_PER_HOUR if period.unit == "hour" else SECONDS_PER_DAY
        start = at_seconds - at_seconds % length
        return Span(start, start + length)
    zone = zone_of(period.zone)
    if period.unit == "hour":
        return _hour_at(zone, at_seconds)
    today = datetime.fromtimestamp(at_seconds, zone).date()
    first = {
        "day": today,
        "week": today - timedelta(days=today.weekday()),
        "month": today.replace(day=1),
    }[period.unit]
    # 31 days after the first of a month are always in the next one.
    after = {
        "day": first + timedelta(days=1),
        "week": first + timedelta(days=7),
        "month": (first + timedelta(days=31)).replace(day=1),
    }[period.unit]
    return Span(_midnight(zone, first), _midnight(zone, after))


@lru_cache(maxsize=64)
def zone_of(name: str) -> tzinfo:
    """The zone of an IANA name.

    Raises:
        ConfigurationError: there is no such zone.
    """
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (OSError, ValueError, LookupError) as error:
        raise ConfigurationError(f"an IANA time zone such as Europe/Berlin; got {name[:80]!r}") from error


def _midnight(zone: tzinfo, day: date) -> int:
    # Where clocks skip midnight, its first second is the change itself; where they repeat it, the earlier one counts.
    return int(datetime(day.year, day.month, day.day, tzinfo=zone).timestamp())


def _hour_at(zone: tzinfo, at_seconds: int) -> Span:
    """The hour of the clock; where clocks change within it, it begins or ends with the change."""
    offset = _offset(zone, at_seconds)
    start = at_seconds - (at_seconds + offset) % SECONDS_PER_HOUR
    end = start + SECONDS_PER_HOUR
    if _offset(zone, start) != offset:
        start = _change_between(zone, start, at_seconds)
    if _offset(zone, end - 1) != offset:
        end = _change_between(zone, at_seconds, end)
    return Span(start, end)


def _offset(zone: tzinfo, at_seconds: int) -> int:
    offset = datetime.fromtimestamp(at_seconds, zone).utcoffset()
    return 0 if offset is None else int(offset.total_seconds())


def _change_between(zone: tzinfo, low: int, high: int) -> int:
    """The first second with another offset than that of `low`."""
    while high - low > 1:
        middle = (low + high) // 2
        if _offset(zone, middle) == _offset(zone, low):
            low = middle
        else:
            high = middle
    return high
