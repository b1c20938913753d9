"""Everything that may happen, in any order, beside a model that keeps a plain list and adds it up.

The model knows no rings, no totals and no keys: each question is answered by going through all reservations that there
ever were. After each step the answers, all that is stored, and the money invariants (I1 to I8) must agree.

The budgets are drawn, and change as settings may while reservations are pending: the six or none of them, and up to 16
further ones of any scope and period. What is reserved is settled into what it was charged to, and extended within the
limits of today. To the model two moments are in one calendar period if the clocks and calendars of its zone show the
same one; where it ends is found by looking for the second at which they do not. The clock comes to changes of daylight
saving, ends of months and a leap day. A caller that is refused, and comes back at the time that was named, is admitted.

Where the backend keeps hints of what its windows came to (`llm:running:`), each that would be believed must be right.

`STATE_MACHINE_EXAMPLES=2000 pytest tests/contract/test_state_machine.py` runs it for longer than the suite does.
"""

import math
import os
from collections import defaultdict
from dataclasses import dataclass, field, replace
from datetime import datetime
from fractions import Fraction
from functools import lru_cache
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from backends.budgets import EVERYBODY, MOST_BUDGETS, Budget, Calendar, Forever, Reason, Scope, Share, Sliding
from backends.conformance.cases import BUCKET_SECONDS, PENDING_BUCKET_SECONDS, PENDING_SECONDS, US, WINDOW_SECONDS
from backends.conformance.cases import Limits as Six
from backends.conformance.harness import MemoryHarness, RedisHarness
from backends.contract import (
    Ask,
    Duplicate,
    DuplicateState,
    Idempotency,
    Marker,
    Outcome,
    Refusal,
    Reservation,
)
from backends.errors import ConfigurationError, ReservationConflict
from backends.keys import (
    IDEMPOTENCY_KEEP_SECONDS,
    PENDING_BUCKETS,
    RECORD_KEEP_SECONDS,
    WINDOW_BUCKETS,
    known_key,
    record_key,
    rows_at,
    running_key,
)
from backends.records import charged_to, key_digest
from backends.strategies.outcomes import request_digest_of


def mixed(*shares):
    """One of some strategies, each with how often it is taken; `one_of` takes each as often as any other."""
    among = [strategy for times, strategy in shares for _ in range(times)]
    return st.integers(0, len(among) - 1).flatmap(among.__getitem__)


EXAMPLES = int(os.environ.get("STATE_MACHINE_EXAMPLES", "50"))
HOUR, DAY = 3_600, 86_400
OFTEN = 30
PICKS = st.integers(0, OFTEN + 7)
"""Mostly one of those that are pending, one of the youngest or of the two oldest."""
AMOUNTS = st.sampled_from([1, 50, 333, 333, 700, 999, 1_000, 1_001, 2_500])

# Time.

PAUSES_S = mixed(
    (6, st.integers(1, 30)),
    (3, st.sampled_from([20, 60, PENDING_SECONDS, PENDING_SECONDS + PENDING_BUCKET_SECONDS])),
    (2, st.sampled_from([WINDOW_SECONDS - PENDING_SECONDS, WINDOW_SECONDS + BUCKET_SECONDS, 1_800])),
    (
        1,
        st.sampled_from(
            [RECORD_KEEP_SECONDS - PENDING_SECONDS, RECORD_KEEP_SECONDS, 23 * HOUR, DAY, 25 * HOUR, 7 * DAY]
        ),
    ),
)
"""Mostly short: what is pending is to be gone on with. Whole seconds, as TTLs are: on a busy machine the server's own
clock must not decide whether a key is still there.
"""
FRACTIONS_US = st.sampled_from([0, 1, 500_000, 999_999])
MOMENTS = tuple(
    int(datetime.fromisoformat(f"{text}+00:00").timestamp())
    for text in (
        "2026-03-08T05:00",  # New York: a day of 23 hours begins
        "2026-03-08T07:00",  # its clocks go forward
        "2026-03-14T10:20",
        *["2026-03-14T11:00"] * 2,
        *["2026-03-15T00:00"] * 5,
        "2026-03-28T23:00",  # Berlin: a day of 23 hours begins
        "2026-03-29T01:00",
        "2026-03-31T22:00",  # Berlin: a month ends
        "2026-04-04T13:00",  # Lord Howe: a day of 24 hours and a half begins
        *["2026-04-04T15:00"] * 2,  # its clocks go back by half an hour
        "2026-10-03T15:30",
        "2026-10-24T22:00",  # Berlin: a day of 25 hours begins
        "2026-10-25T00:00",
        "2026-10-25T01:00",
        "2026-11-01T04:00",  # New York: the same, and a month
        "2026-11-01T05:00",
        "2026-11-01T06:00",
        "2026-12-31T18:30",  # Kolkata: a year ends, and not its week
        "2027-01-01T00:00",
        "2028-02-29T00:00",
        "2028-02-29T13:00",  # Lord Howe: the leap month ends
        "2028-02-29T23:00",
        "2028-03-01T00:00",
    )
)
BEFORE_S = st.sampled_from([0, 1, 30, 30, 90, 90, 600, 2_400])

# Who asks.

OWNERS = {
    Scope.IDENTIFIER: ("a", "b"),
    Scope.NETWORK: ("192.0.2.1", "2001:db8::/64"),
    Scope.WIDE_NETWORK: ("192.0.2.1", "2001:db8::/48"),
    Scope.GLOBAL: (EVERYBODY,),
    Scope.KEY: ("k1", "k2"),
    Scope.TEAM: ("k1",),
    Scope.MODEL: ("k1", "m2"),
}
"""An owner of one scope may be spelled as one of another."""
MISSING = {Scope.KEY: 1, Scope.TEAM: 1, Scope.IDENTIFIER: 8, Scope.NETWORK: 8}
"""Scopes for which a request may have no owner, and how often it has each of them beside that."""
CALLERS = st.tuples(
    *(st.sampled_from(owners * MISSING.get(scope, 1) + ("",) * (scope in MISSING)) for scope, owners in OWNERS.items())
)
"""The owner in each scope, in the order of the scopes."""
KEYS = ("k1", "k2")
BUSY_SECONDS = 5
"""How exact a TTL is on a busy machine."""

# What the settings say.

EACH_OWNER = "*"
ZONES = ("UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "Australia/Lord_Howe")
ZONES_OF_HOURS = ("Australia/Lord_Howe", "UTC", "Australia/Lord_Howe", "Asia/Kolkata", "Europe/Berlin")
"""By the number of a name: hours of two zones may begin at once, and would be kept in one place."""
FURTHER_NAMES = tuple(f"b{number}" for number in range(20))
REASONS = {
    "day": Reason.DAILY_LIMIT,
    "window": Reason.WINDOW_LIMIT,
    "network_window": Reason.NETWORK_LIMIT,
    "network_day": Reason.NETWORK_DAILY_LIMIT,
    "global_hour": Reason.GLOBAL_HOURLY_LIMIT,
    "global_day": Reason.GLOBAL_DAILY_LIMIT,
}
WINDOWS = ("window", "network_window")
THE_SIX = "...six"
LENGTHS = st.sampled_from([WINDOW_SECONDS, WINDOW_SECONDS, 61, 1_210, HOUR])
PERIODS = mixed(
    (3, st.sampled_from([60, 75, 600, 1_001, HOUR, DAY, 31 * DAY]).map(Sliding)),
    (4, st.builds(Calendar, st.sampled_from(["hour", "day", "week", "month"]), st.sampled_from(ZONES))),
    (1, st.just(Forever())),
)
LIMITS = st.sampled_from([None, 1_000, 2_500, 2_500, 4_000, 4_000, 8_000, 8_000, 20_000, 50_000])
WIDE = Six(
    window_nanousd=50_000,
    day_nanousd=50_000,
    network_window_nanousd=None,
    network_day_nanousd=None,
    global_hour_nanousd=90_000,
    global_day_nanousd=90_000,
    throttle_seconds=1,
)


def as_a_name_may_have_it(budget):
    if isinstance(budget.period, Calendar) and budget.period.unit == "hour":
        zone = ZONES_OF_HOURS[FURTHER_NAMES.index(budget.name) % len(ZONES_OF_HOURS)]
        budget = budget._replace(period=Calendar("hour", zone))
    return budget


NETWORKS = (Scope.NETWORK, Scope.WIDE_NETWORK)
LIKE = "like"
"""As what is shared: the first other budget that has the same period."""
SHARES = st.builds(
    Share, st.sampled_from([LIKE, "global_hour", "global_day"]), st.sampled_from([250_000, 333_333, 700_000, 1_000_000])
)


def further(name, scope, period, limit, is_shadow, throttle_seconds, whose, share):
    owners = OWNERS[scope]
    if share is not None and share.of != LIKE and scope in NETWORKS:
        period = Calendar(share.of.removeprefix("global_"))
        number = FURTHER_NAMES.index(name)
        name = FURTHER_NAMES[number - number % len(ZONES_OF_HOURS) + ZONES_OF_HOURS.index("UTC")]
    owner = EACH_OWNER if whose is None or scope is Scope.GLOBAL else owners[whose % len(owners)]
    marker_seconds = throttle_seconds if scope is Scope.IDENTIFIER else 0
    return as_a_name_may_have_it(
        Budget(
            name,
            EVERYBODY if scope is Scope.GLOBAL else owner,
            period,
            limit,
            scope,
            is_shadow,
            marker_seconds,
            share if scope in NETWORKS else None,
        )
    )


ROWS = st.builds(
    further,
    st.sampled_from(FURTHER_NAMES),
    st.sampled_from([*Scope, *NETWORKS, *[Scope.IDENTIFIER] * 3]),
    PERIODS,
    LIMITS,
    st.sampled_from([False, False, False, True]),
    st.sampled_from([0, 0, 2, 30]),
    st.sampled_from([None, None, None, 0, 1]),
    mixed((1, st.none()), (1, SHARES)),
)
FURTHER = mixed(
    (1, st.just([])),
    (2, st.lists(ROWS, min_size=1, max_size=3, unique_by=lambda row: row.name)),
    (3, st.lists(ROWS, min_size=5, max_size=MOST_BUDGETS - len(REASONS), unique_by=lambda row: row.name)),
)
SIX = st.builds(
    lambda narrow, throttle_seconds, seconds, share: [
        row._replace(share=share if row.name == "network_day" else None)
        for row in replace(WIDE, **narrow, throttle_seconds=throttle_seconds, window_seconds=seconds).budgets(
            EACH_OWNER, EACH_OWNER
        )
    ],
    st.dictionaries(
        st.sampled_from([f"{name}_nanousd" for name in REASONS]),
        st.sampled_from([700, 1_000, 2_000, 4_000]),
        max_size=2,
    ),
    st.sampled_from([2, 2, 30]),
    LENGTHS,
    mixed((2, st.none()), (1, SHARES)),
)
BUDGETS = st.builds(
    lambda six, more, turn: [*six, *more][turn:] + [*six, *more][:turn],
    mixed((5, SIX), (1, st.just([]))),
    FURTHER,
    st.sampled_from([0, 0, 0, 2, 7]),
)


def one_changed(what, number, row):
    """A function from the budgets before a change of one of them to those after it."""
    changes = {
        "removed": lambda _: [],
        "added": lambda its: [its, row],
        "renamed": lambda its: [as_a_name_may_have_it(its._replace(name=row.name))],
        "period": lambda its: [as_a_name_may_have_it(its._replace(period=row.period))],
        "limit": lambda its: [its._replace(limit_nanousd=row.limit_nanousd)],
        "share": lambda its: [its._replace(share=row.share if its.scope in NETWORKS else None)],
        "shadow": lambda its: [its._replace(is_shadow=not its.is_shadow)],
    }

    def change(rows):
        at = number % max(1, len(rows))
        if what in {"removed", "renamed", "period"}:
            at = next((place for place, each in enumerate(rows) if place >= at and each.name not in REASONS), len(rows))
        return usable([*rows[:at], *(new for its in rows[at : at + 1] for new in changes[what](its)), *rows[at + 1 :]])

    return change


def other_windows(seconds):
    return lambda rows: [row._replace(period=Sliding(seconds)) if row.name in WINDOWS else row for row in rows]


def the_six_come_or_go(six):
    def change(rows):
        further = [row for row in rows if row.name not in REASONS]
        return further if len(further) < len(rows) else [*six, *further]

    return change


def usable(rows):
    """The first of each name, and not too many."""
    first = {row.name: row for row in reversed(rows)}
    further = [row for row in rows if row.name not in REASONS and first[row.name] is row]
    return [row for row in rows if first[row.name] is row and row not in further[MOST_BUDGETS - len(REASONS) :]]


CHANGES = mixed(
    (
        5,
        st.builds(
            one_changed,
            st.sampled_from(["removed", "added", "added", "renamed", "period", "limit", "limit", "share", "shadow"]),
            st.integers(0, MOST_BUDGETS),
            ROWS,
        ),
    ),
    (1, LENGTHS.map(other_windows)),
    (1, SIX.map(the_six_come_or_go)),
    (1, BUDGETS.map(lambda rows: lambda _: rows)),
)


def budgets_for(rows, caller):
    """The budgets that apply to a request, in the order in which they are told."""
    owners = dict(zip(OWNERS, caller, strict=True))
    budgets = [
        row._replace(owner=owners[row.scope])
        for row in rows
        if owners[row.scope] and row.owner in {EACH_OWNER, owners[row.scope]}
    ]
    return tuple(budget._replace(share=usable_share(budget, budgets)) for budget in budgets)


def usable_share(budget, budgets):
    """Its share, of a budget that there is and has the same period."""
    if budget.share is None or isinstance(budget.period, Sliding):
        return None
    names = [other.name for other in budgets if other.period == budget.period and other.name != budget.name]
    of = names[0] if budget.share.of == LIKE and names else budget.share.of
    return budget.share._replace(of=of) if of in names else None


# Calendars.


def shown(period, at_seconds):
    """What the clocks and calendars of a zone show of the period that holds a moment."""
    at = datetime.fromtimestamp(at_seconds, ZoneInfo(period.zone))
    return {
        "hour": (at.year, at.month, at.day, at.hour, at.utcoffset()),
        "day": (at.year, at.month, at.day),
        "week": at.isocalendar()[:2],
        "month": (at.year, at.month),
    }[period.unit]


@lru_cache(4_096)
def end_of(period, at_seconds):
    """The first second that is not in the period any more."""
    return _other_side(period, at_seconds, at_seconds + 32 * DAY)


@lru_cache(4_096)
def begin_of(period, at_seconds):
    return _other_side(period, at_seconds, at_seconds - 32 * DAY) + 1


def _other_side(period, inside, outside):
    what = shown(period, inside)
    while abs(outside - inside) > 1:
        middle = (inside + outside) // 2
        if shown(period, middle) == what:
            inside = middle
        else:
            outside = middle
    return outside


def place_of(budget, at_seconds):
    """What is booked in one place is limited together: a text or tuple that is the same for it alone."""
    name, owner, period = budget.name, budget.owner, budget.period
    if isinstance(period, Calendar):
        return name, owner, period, shown(period, at_seconds)
    # The six go on in the window that they have, whatever its length is.
    return name, owner, "window" if name in REASONS else period


def bucket_seconds(window_seconds):
    return -(-window_seconds // WINDOW_BUCKETS)


def lifetime(window_seconds):
    """From the start of a bucket until it counts no more."""
    return bucket_seconds(window_seconds) + window_seconds


# What the model keeps.


@dataclass(eq=False)
class Charge:
    """What one reservation has in one budget."""

    budget: Budget
    nanousd: int
    key: str
    """Only its name is of interest: what is stored there must be the sum."""
    start: int | None
    """Of a window: of the bucket; None for a total."""
    over_seconds: float
    """When nothing is booked there any more."""

    def counts(self, window_seconds, now_us):
        return self.start is None or (self.start + lifetime(window_seconds)) * US > now_us


@dataclass(eq=False)
class Held:
    """One reservation, all its life."""

    ask: Ask
    caller: tuple
    made_us: int
    booked: int
    """What its record says, or would."""
    open: int
    """What of it counts as pending money."""
    record_gone_us: int
    known: Reservation
    """What its caller knows of it: less than is held where an answer was lost."""
    charges: dict[tuple, Charge]
    """By place: those that the books still have."""
    pending_keys: dict[tuple, str]
    """By scope and owner."""
    state: str = "open"
    booked_at_end: int = 0
    is_lost: bool = False
    """Its record is."""
    ends: list[Outcome] = field(default_factory=list)
    ended_late: int = 0
    """What was pending of it when it ended past its time: it may have been told as expired before."""
    used: int = 0
    """What the upstream billed for it."""

    @property
    def made_seconds(self):
        return self.made_us // US

    def has_record(self, now_us):
        return not self.is_lost and now_us < self.record_gone_us

    @property
    def pending_start(self):
        return self.made_seconds // PENDING_BUCKET_SECONDS * PENDING_BUCKET_SECONDS

    def is_open_until_us(self):
        return (self.pending_start + PENDING_BUCKET_SECONDS + PENDING_SECONDS) * US

    def extendable_until_us(self):
        windows = [budget.period.seconds for budget in self.ask.budgets if isinstance(budget.period, Sliding)]
        ends = [
            (self.made_seconds // bucket_seconds(window) * bucket_seconds(window) + lifetime(window)) * US
            for window in windows
        ]
        return min([self.made_us + PENDING_SECONDS * US, *ends])

    def of_owner(self, scope, owner):
        """Its budgets of one owner, as `named` has them: what is pending of the owner is kept by them."""
        its = [each for each in self.charges.values() if (each.budget.scope, each.budget.owner) == (scope, owner)]
        return frozenset(THE_SIX if each.budget.name in REASONS else key_digest(each.key) for each in its)

    def is_everybodys(self):
        return (Scope.GLOBAL, EVERYBODY) in self.pending_keys


@dataclass
class Remembered:
    """What stands for a caller's key."""

    rid: str
    body: str
    booked: int
    is_settled: bool
    until_us: int
    gone_us: int


@dataclass
class Throttle:
    cause: Reason
    budget: str
    until_us: int
    ends_us: int
    busy: bool


class Books(RuleBasedStateMachine):
    """The machine; `harness` holds the backend that is asked beside the model."""

    harness = None

    def __init__(self):
        super().__init__()
        self.every = []
        self.callers = []
        self.throttles = {}
        self.remembered = {}
        self.window_ends = {}
        """Place of a window -> when its key goes, with all that is in it."""
        self.key_of, self.place_at = {}, {}
        self.number = 0
        self.told_expired = 0
        self.swept = False

    # --- what the model makes of it

    @property
    def now_us(self):
        return self.harness.clock.us

    @property
    def now_seconds(self):
        return self.harness.clock.us // US

    def seconds_until(self, at_us):
        """In whole seconds, and one at least."""
        return max(1, -((self.now_us - at_us) // US))

    def charges_in(self, place):
        return [held.charges[place] for held in self.every if place in held.charges]

    def counting(self, budget, at_seconds=None):
        """What is booked in a budget, in the period of a moment: that of now, if none is given."""
        place = place_of(budget, self.now_seconds if at_seconds is None else at_seconds)
        window = budget.period.seconds if isinstance(budget.period, Sliding) else 0
        return [charge for charge in self.charges_in(place) if charge.counts(window, self.now_us)]

    def spent(self, budget, at_seconds=None):
        return sum(charge.nanousd for charge in self.counting(budget, at_seconds))

    def there(self, place, start):
        """What is booked in a total, or in one bucket of a window."""
        return sum(charge.nanousd for charge in self.charges_in(place) if charge.start == start)

    def filled(self, budget):
        """Which buckets of a window are not empty; of a total, whether it is not."""
        place = place_of(budget, self.now_seconds)
        return {charge.start for charge in self.counting(budget) if self.there(place, charge.start)}

    def renews_at(self, budget):
        period = budget.period
        if isinstance(period, Calendar):
            return end_of(period, self.now_seconds)
        if isinstance(period, Forever):
            return None
        bucket = bucket_seconds(period.seconds)
        return min(self.filled(budget), default=self.now_seconds // bucket * bucket) + lifetime(period.seconds)

    def fits_us(self, budget, cost):
        """When there is room for `cost`, if nothing else happens; infinity: never."""
        if not isinstance(budget.period, Sliding):
            end = self.renews_at(budget)
            return math.inf if end is None else end * US
        members = self.counting(budget)
        for start in sorted({charge.start for charge in members}):
            left = sum(charge.nanousd for charge in members if charge.start > start)
            if left + cost <= budget.limit_nanousd:
                return (start + lifetime(budget.period.seconds)) * US
        return (self.now_seconds + lifetime(budget.period.seconds)) * US

    def pending(self, budget):
        """What reservations hold that are charged to it and not past their time, if they are surely in its window."""
        since = 0
        if isinstance(budget.period, Sliding):
            since = self.now_seconds - budget.period.seconds + PENDING_BUCKET_SECONDS - 1
        return sum(
            held.open
            for held in self.charged_to(budget)
            if held.is_open_until_us() > self.now_us and held.pending_start + PENDING_BUCKET_SECONDS > since
        )

    def charged_to(self, budget):
        """The reservations that are charged to a budget in its present period."""
        place = place_of(budget, self.now_seconds)
        return [held for held in self.every if place in held.charges]

    def expected_verdict(self, ask):
        """A `Refusal` or `Duplicate`; a number: so much is set aside."""
        key = ask.idempotency and self.known_key(ask.idempotency.digest)
        if key:
            return self.duplicate(key, ask.idempotency)
        throttle = self.throttles.get(ask.identifier)
        if throttle and throttle.until_us > self.now_us:
            return self.throttled(ask, throttle)
        cost, least = ask.cost_nanousd, ask.at_least_nanousd
        full = self.full(ask, cost)
        if not full:
            return cost
        if least is None or self.are_busy(full, cost):
            return self.refusal(ask, full, cost)
        room = min(map(self.left, bounds(ask.budgets)))
        full = self.full(ask, least)
        return self.refusal(ask, full, least) if full else room

    def full(self, ask, cost):
        return [bound for bound in bounds(ask.budgets) if cost > self.left(bound)]

    def left(self, bound, at_seconds=None):
        """How much more may be booked."""
        budget, whole = bound
        return allowed(bound, self.spent(budget, at_seconds), self.spent(whole, at_seconds) if whole else 0)

    def are_busy(self, full, cost):
        return all(
            cost
            <= allowed(
                (budget, whole),
                self.spent(budget) - self.pending(budget),
                self.spent(whole) - self.pending(whole) if whole else 0,
            )
            for budget, whole in full
        )

    def known_key(self, digest):
        key = self.remembered.get(digest)
        return key if key and key.gone_us > self.now_us else None

    def duplicate(self, key, idempotency):
        late = DuplicateState.EXPIRED if key.until_us <= self.now_us else DuplicateState.IN_FLIGHT
        state = DuplicateState.SETTLED if key.is_settled else late
        return Duplicate(key.rid, state, key.booked, same_body=key.body == idempotency.body_digest)

    def throttled(self, ask, throttle):
        marker = self.marker(throttle)
        never = can_never_fit(ask)
        return Refusal(
            reason=Reason.THROTTLED,
            cause=throttle.cause,
            scope=Scope.IDENTIFIER,
            budget=throttle.budget,
            retry_after_seconds=None if never else marker.retry_after_seconds,
            in_flight=throttle.busy and not never,
            can_never_fit=never,
            marker_seconds=marker.left_seconds,
            limit_nanousd=None,
        )

    def marker(self, throttle):
        left = self.seconds_until(throttle.until_us)
        wait = None if throttle.ends_us == math.inf else self.seconds_until(throttle.ends_us)
        return Marker(throttle.cause, throttle.budget, left, wait, throttle.busy)

    def refusal(self, ask, full, cost):
        (first, whole), never, busy = full[0], can_never_fit(ask), self.are_busy(full, cost)
        end_us = max(self.fits_us(budget, cost) for budget, _ in full)
        # Nothing that was spent stands in the way of what can never fit: its marker ends by itself.
        wait = 1 if busy or never else math.inf if end_us == math.inf else self.seconds_until(end_us)
        if whole:
            return by_share(
                whole, wait=None if never or wait == math.inf else wait, busy=busy and not never, never=never
            )
        seconds = first.throttle_seconds if ask.mark_when_busy or not busy else 0
        if seconds:
            ends_us = self.now_us + max(seconds, wait) * US
            reason = REASONS.get(first.name, Reason.BUDGET_LIMIT)
            self.throttles[ask.identifier] = Throttle(reason, first.name, self.now_us + seconds * US, ends_us, busy)
        return Refusal(
            reason=REASONS.get(first.name, Reason.BUDGET_LIMIT),
            cause=REASONS.get(first.name, Reason.BUDGET_LIMIT),
            scope=first.scope,
            budget=first.name,
            retry_after_seconds=None if never or wait == math.inf else max(wait, seconds),
            in_flight=busy and not never,
            can_never_fit=never,
            marker_seconds=seconds,
            limit_nanousd=first.limit_nanousd,
        )

    def admit(self, ask, caller, made):
        over_shadow = tuple(
            budget.name
            for budget in ask.budgets
            if budget.is_shadow
            and budget.limit_nanousd is not None
            and self.spent(budget) + made.cost_nanousd > budget.limit_nanousd
        )
        held = Held(
            ask,
            caller,
            self.now_us,
            booked=made.cost_nanousd,
            open=made.cost_nanousd,
            record_gone_us=self.now_us + (PENDING_SECONDS + RECORD_KEEP_SECONDS) * US,
            known=made,
            charges={},
            pending_keys={},
        )
        renews_at = tuple(map(self.renews_at, ask.budgets))
        for row in rows_at(ask.budgets, self.now_seconds):
            self.charge(held, row)
        self.every.append(held)
        self.callers.append(held)
        assert (made.budgets, made.made_at_us, made.pending_seconds) == (ask.budgets, self.now_us, PENDING_SECONDS)
        assert made.spent_nanousd == tuple(self.spent(budget) for budget in ask.budgets)
        assert made.renews_at_seconds == renews_at
        assert made.over_shadow == over_shadow
        assert all(self.left(bound) >= 0 for bound in bounds(ask.budgets)), "I1"
        if ask.idempotency:
            self.remembered[ask.idempotency.digest] = Remembered(
                ask.reservation_id,
                ask.idempotency.body_digest,
                made.cost_nanousd,
                is_settled=False,
                until_us=self.now_us + PENDING_SECONDS * US,
                gone_us=self.now_us + IDEMPOTENCY_KEEP_SECONDS * US,
            )

    def charge(self, held, row):
        budget, cost = row.budget, held.booked
        place = place_of(budget, self.now_seconds)
        start, over_seconds = None, math.inf
        if isinstance(budget.period, Sliding):
            length, bucket = lifetime(budget.period.seconds), bucket_seconds(budget.period.seconds)
            start = self.now_seconds // bucket * bucket
            over_seconds = start + length
            # What has left a window is not there any more, should the window grow again.
            for charge in self.charges_in(place):
                if not charge.counts(budget.period.seconds, self.now_us):
                    charge.nanousd = 0
            if self.there(place, start):
                self.window_ends[place] = max(self.window_ends[place], over_seconds * US)
            else:
                self.window_ends[place] = self.now_us + length * US
        elif isinstance(budget.period, Calendar):
            kept = 2 * HOUR if budget.name == "global_hour" else DAY
            over_seconds = end_of(budget.period, self.now_seconds) + kept
        held.charges[place] = Charge(budget, cost, row.key, start, over_seconds)
        held.pending_keys[budget.scope, budget.owner] = row.pending_key

    def add(self, held, nanousd):
        """Add to what a reservation has in each budget, or take from it; nothing goes below zero."""
        for place, charge in held.charges.items():
            if charge.over_seconds * US <= self.now_us:
                continue
            there = self.there(place, charge.start)
            change = max(nanousd, -there)
            if charge.start is not None and change and not there:
                ends_us = self.now_us + lifetime(charge.budget.period.seconds) * US
                is_empty = not any(self.there(place, other.start) for other in self.charges_in(place))
                self.window_ends[place] = ends_us if is_empty else max(self.window_ends[place], ends_us)
            charge.nanousd += change

    def pick(self, number):
        open_ones = [held for held in self.callers if held.state == "open" and held.has_record(self.now_us)]
        among = open_ones[-4:] + open_ones[:2] if open_ones and number < OFTEN else self.callers[-8:]
        return among[number % len(among)]

    def over_open_money(self, but):
        """What is stored as open money and past its time, without what `but` holds of it."""
        if not but.is_everybodys():
            return 0
        ring = self.harness.stored().get("llm:open:global", ({}, 0))[0]
        total, mine = 0, (but.pending_start, but.of_owner(Scope.GLOBAL, EVERYBODY))
        for member, amount in ring.items():
            start, _ = named(member)
            if (start + PENDING_BUCKET_SECONDS + PENDING_SECONDS) * US <= self.now_us:
                own = but.open if mine == named(member) and but.has_record(self.now_us) else 0
                total += max(0, amount - own)
        return total

    # --- what happens

    @initialize(
        moment=st.sampled_from(MOMENTS),
        before=BEFORE_S,
        fraction_us=FRACTIONS_US,
        visitors=st.lists(CALLERS, min_size=1, max_size=4),
        rows=BUDGETS,
        mark=st.booleans(),
    )
    def begin(self, moment, before, fraction_us, visitors, rows, mark):
        self.harness.clear()
        self.harness.clock.us = (moment - before) * US + fraction_us
        self.visitors, self.rows, self.mark_when_busy = visitors, rows, mark

    @rule(change=CHANGES, mark=st.booleans())
    def the_settings_change(self, change, mark):
        self.rows, self.mark_when_busy = change(self.rows), mark

    @rule(until=mixed((6, PAUSES_S), (1, st.tuples(st.sampled_from(MOMENTS), BEFORE_S))))
    def time_passes_until(self, until):
        if isinstance(until, tuple):
            moment, before = until
            until = max(1, moment - before - self.now_seconds)
        self.time_passes(until)

    def time_passes(self, seconds):
        self.harness.pass_time(seconds * US)
        self.swept = False
        for place, ends_us in self.window_ends.items():
            if ends_us <= self.now_us:
                for charge in self.charges_in(place):
                    charge.nanousd = 0

    @rule(
        visitor=st.integers(0, 3),
        cost=AMOUNTS,
        key=mixed((2, st.none()), (1, st.sampled_from(KEYS))),
        body=st.sampled_from("01"),
        least=st.one_of(st.none(), AMOUNTS),
        times=st.sampled_from([1, 1, 2, 4]),
        comes_back=st.sampled_from([False] * 7 + [True]),
    )
    def reserve(self, visitor, cost, key, body, least, times, comes_back):
        caller = self.visitors[visitor % len(self.visitors)]
        idempotency = key and Idempotency((f"{ord(caller[0] or 'z'):02x}{key[1]}" * 11)[:32], body * 16)
        ask = Ask(
            "",
            cost,
            budgets_for(self.rows, caller),
            PENDING_SECONDS,
            idempotency,
            least and min(cost, least),
            self.mark_when_busy,
        )
        self.the_books_are_read(ask)
        if not can_be_charged_to(ask.budgets):
            with pytest.raises(ConfigurationError):
                self.harness.backend.reserve(replace(ask, reservation_id="none"))
            return
        refusals = [self.ask_for(ask, caller) for _ in range(times)]
        # What is pending may end at once: then, and under another request's marker, there is no such promise.
        if comes_back and (last := refusals[-1]) and not last.in_flight and last.reason is not Reason.THROTTLED:
            self.the_caller_comes_back(ask, caller, last.retry_after_seconds)

    reserve_too = reserve
    """To a machine that is twice as much."""

    def the_caller_comes_back(self, ask, caller, seconds):
        """Where waiting helps, time alone lets in whoever comes when he was told."""
        if seconds is not None:
            self.time_passes(seconds)
            assert self.ask_for(ask, caller) is None, "early"

    def ask_for(self, ask, caller):
        """The refusal, if it is refused."""
        self.number += 1
        ask = replace(ask, reservation_id=f"r{self.number}")
        expected = self.expected_verdict(ask)
        if ask.idempotency:
            known = self.harness.backend.find_duplicate(ask.idempotency)
            assert known == (expected if isinstance(expected, Duplicate) else None)
        verdict = self.harness.backend.reserve(ask)
        if not isinstance(expected, int):
            assert verdict == expected
            return expected if isinstance(expected, Refusal) else None
        assert isinstance(verdict, Reservation), (verdict, "expected to be admitted")
        assert verdict.cost_nanousd == expected
        self.told_expired += verdict.expired_nanousd
        self.admit(ask, caller, verdict)
        return None

    @precondition(lambda self: self.callers)
    @rule(number=PICKS, is_other=st.booleans())
    def the_same_id_is_sent_again(self, number, is_other):
        held = self.pick(number)
        if not held.has_record(self.now_us):
            return
        ask = replace(
            held.ask,
            budgets=budgets_for(self.rows, held.caller),
            cost_nanousd=held.ask.cost_nanousd + is_other,
            mark_when_busy=self.mark_when_busy,
        )
        is_usable = can_be_charged_to(ask.budgets)
        if not is_usable or request(ask) != request(held.ask) or held.state != "open":
            with pytest.raises(ReservationConflict if is_usable else ConfigurationError):
                self.harness.backend.reserve(ask)
            return
        again = self.harness.backend.reserve(ask)
        its = {budget.name: budget for budget in held.ask.budgets}
        charged = [
            budget
            for budget in ask.budgets
            if budget.name in its
            and place_of(budget, held.made_seconds) == place_of(its[budget.name], held.made_seconds)
        ]
        assert (again.cost_nanousd, again.made_at_us, again.request_digest) == (
            held.booked,
            held.made_us,
            held.known.request_digest,
        )
        assert again.budgets == tuple(budget._replace(period=its[budget.name].period) for budget in charged)
        assert again.spent_nanousd == tuple(map(self.spent, charged))
        assert again.renews_at_seconds == tuple(map(self.renews_at, charged))
        assert (again.expired_nanousd, again.over_shadow) == (0, ())
        found = self.harness.backend.find(ask)
        assert (found.cost_nanousd, found.made_at_us, found.budgets) == (held.booked, held.made_us, again.budgets)
        if len(charged) == len(its):
            held.known = again

    @precondition(lambda self: self.callers)
    @rule(number=PICKS, more=AMOUNTS, least=st.one_of(st.none(), AMOUNTS), is_answer_lost=st.booleans())
    def extend(self, number, more, least, is_answer_lost):
        held = self.pick(number)
        to = held.known.cost_nanousd + more
        at_least = to if least is None else min(to, held.known.cost_nanousd + least)
        today = budgets_for(self.rows, held.caller)

        def ask():
            return self.harness.backend.extend(held.known, to, today, at_least_nanousd=at_least)

        is_over = self.now_us >= held.extendable_until_us()
        if not held.has_record(self.now_us) or held.state != "open" or is_over:
            with pytest.raises(ReservationConflict):
                ask()
            return
        room, refusal = self.room(held, today, at_least)
        verdict = ask()
        if refusal is not None and at_least > held.booked:
            assert verdict == refusal
            return
        granted = min(max(0, to - held.booked), room)
        self.add(held, granted)
        held.booked += granted
        held.open += granted
        assert isinstance(verdict, Reservation)
        assert verdict.cost_nanousd == held.booked >= at_least
        assert verdict.spent_nanousd == tuple(self.spent(budget, held.made_seconds) for budget in held.known.budgets)
        if granted and (key := self.own_key(held)) and not key.is_settled:
            key.booked = held.booked
        if not is_answer_lost:
            held.known = verdict

    def room(self, held, today, at_least):
        """How much an extension may get, and the refusal of the first limit that has less than it must."""
        limits = {budget.name: budget for budget in today}
        room, refusal = math.inf, None
        charged = [
            budget._replace(
                limit_nanousd=limits[budget.name].limit_nanousd,
                is_shadow=limits[budget.name].is_shadow,
                share=limits[budget.name].share,
            )
            for budget in held.known.budgets
            if budget.name in limits and place_of(budget, held.made_seconds) in held.charges
        ]
        for budget, whole in bounds(charged):
            left = self.left((budget, whole), held.made_seconds)
            if left < at_least - held.booked and refusal is None:
                reason = REASONS.get(budget.name, Reason.BUDGET_LIMIT)
                refusal = (
                    by_share(whole)
                    if whole
                    else Refusal(
                        reason,
                        reason,
                        budget.scope,
                        budget.name,
                        retry_after_seconds=None,
                        in_flight=False,
                        can_never_fit=False,
                        marker_seconds=0,
                        limit_nanousd=budget.limit_nanousd,
                    )
                )
            room = min(room, max(0, left))
        return room, refusal

    def own_key(self, held):
        key = held.ask.idempotency and self.known_key(held.ask.idempotency.digest)
        return key if key and key.rid == held.ask.reservation_id else None

    @precondition(lambda self: self.callers)
    @rule(number=PICKS, share=st.sampled_from([None, 0, 0.1, 0.5, 1, 1, 1.2]))
    def it_ends(self, number, share):
        held = self.pick(number)
        if share is None:
            self.end(held, "released", 0)
        else:
            self.end(held, "settled", int(held.known.cost_nanousd * share))

    it_ends_too = it_ends

    def end(self, held, ending, actual):
        backend, before = self.harness.backend, self.over_open_money(held)
        end = backend.settle(held.known, actual) if ending == "settled" else backend.release(held.known)
        held.ends.append(end.outcome)
        if held.has_record(self.now_us) and held.state != "open":
            assert (end.outcome, end.booked_nanousd) == (Outcome.REPEATED, held.booked_at_end)
        elif held.has_record(self.now_us):
            assert end.outcome is (Outcome.SETTLED if ending == "settled" else Outcome.RELEASED)
            self.book(held, ending, actual, end, before)
            if held.is_open_until_us() <= self.now_us:
                held.ended_late = held.open
            self.add(held, actual - held.booked)
            held.booked, held.open = actual, 0
        elif self.now_us >= held.made_us + RECORD_KEEP_SECONDS * US:
            assert (end.outcome, end.booked_nanousd) == (Outcome.EXPIRED, held.known.cost_nanousd)
        else:
            assert end.outcome is Outcome.LATE
            self.book(held, ending, actual, end, before)
            # Only its record was lost: what was booked stays booked, and the late end beside it.
            self.add(held, actual)
            held.booked += actual
            held.is_lost = False

    def book(self, held, ending, actual, end, over_before):
        assert end.booked_nanousd == actual
        assert end.overrun_nanousd == max(0, actual - held.known.cost_nanousd)
        assert end.expired_nanousd == over_before
        self.told_expired += end.expired_nanousd
        self.swept |= held.is_everybodys()
        held.used = actual
        held.state, held.booked_at_end = ending, actual
        held.record_gone_us = self.now_us + RECORD_KEEP_SECONDS * US
        idempotency = held.ask.idempotency
        if idempotency is None:
            return
        known, own = self.known_key(idempotency.digest), self.own_key(held)
        if ending == "settled" and (own or not known):
            self.remembered[idempotency.digest] = Remembered(
                held.ask.reservation_id,
                idempotency.body_digest,
                actual,
                is_settled=True,
                until_us=self.now_us,
                gone_us=self.now_us + IDEMPOTENCY_KEEP_SECONDS * US,
            )
        elif own:
            del self.remembered[idempotency.digest]

    def the_books_are_read(self, ask):
        books = self.harness.backend.books(ask.budgets)
        assert tuple(use.budget for use in books.uses) == ask.budgets
        assert books.as_of_us == self.now_us
        for use in books.uses:
            assert use.spent_nanousd == self.spent(use.budget)
            assert use.renews_at_seconds == (self.renews_at(use.budget) if self.filled(use.budget) else None)
            since = begin_of(use.budget.period, self.now_seconds) if isinstance(use.budget.period, Calendar) else 0
            pending = [held for held in self.charged_to(use.budget) if held.pending_start >= since]
            living = sum(held.open for held in pending if held.is_open_until_us() > self.now_us)
            assert living <= use.pending_nanousd <= sum(held.open for held in pending)
        throttle = self.throttles.get(ask.identifier)
        is_over = throttle is None or throttle.until_us <= self.now_us
        assert books.marker == (None if is_over else self.marker(throttle))

    @precondition(lambda self: self.callers)
    @rule(
        what=st.sampled_from(["a record is lost"] * 3 + ["the callers are gone", "the books are cleared"]),
        number=PICKS,
    )
    def something_happens(self, what, number):
        held = self.pick(number)
        if what == "the callers are gone":
            # What they hold stays booked in full.
            self.callers.clear()
        elif what == "the books are cleared" and held.caller[0]:
            self.clear(held.caller[0])
        elif held.has_record(self.now_us) and held.state == "open":
            # An end is not lost alone: one script wrote its record and its booking.
            self.harness.lose(record_key(held.ask.reservation_id))
            held.is_lost = True

    def clear(self, who):
        for key in self.harness.stored():
            what = meaning_of(key)
            if what.owner == who and what.kind in {"total", "window", "pending", "marker"}:
                self.harness.lose(key)
        self.harness.put(f"llm:reset:{who}", str(self.now_us), 172_800)
        self.throttles.pop(who, None)
        for held in self.every:
            if (Scope.IDENTIFIER, who) in held.pending_keys:
                del held.pending_keys[Scope.IDENTIFIER, who]
                held.charges = {
                    place: charge
                    for place, charge in held.charges.items()
                    if charge.budget.scope is not Scope.IDENTIFIER
                }
        # What is reserved in the same microsecond would count as before it.
        self.time_passes(1)

    # --- what must hold after each step

    @invariant()
    def the_books_agree(self):
        if self.every:
            stored = self.harness.stored()
            self.every_total_is_the_sum_of_its_reservations(stored)
            self.money_is_never_negative_nor_without_a_life(stored)
            self.what_is_told_of_windows_is_what_is_in_them(stored)

    def every_total_is_the_sum_of_its_reservations(self, stored):
        totals, rings, pending = defaultdict(int), defaultdict(dict), defaultdict(dict)
        for held in self.every:
            for place, charge in held.charges.items():
                assert self.key_of.setdefault(place, charge.key) == charge.key, "one place has two keys"
                assert self.place_at.setdefault(charge.key, place) == place, "two places have one key"
                if charge.start is not None:
                    add_to(rings[charge.key], charge.start, charge.nanousd)
                elif self.now_seconds <= charge.over_seconds:
                    totals[charge.key] += charge.nanousd
            if held.is_open_until_us() > self.now_us:
                for (scope, owner), key in held.pending_keys.items():
                    add_to(pending[key], (held.pending_start, held.of_owner(scope, owner)), held.open)
        found = {kind: {} for kind in ("total", "window", "pending")}
        for key, (value, _) in stored.items():
            found.setdefault(meaning_of(key).kind, {})[key] = value
        # A total's key goes in the second at which it is over, sooner or later.
        ends_now = {
            charge.key
            for held in self.every
            for charge in held.charges.values()
            if charge.start is None and charge.over_seconds == self.now_seconds
        }
        assert {key: int(text) for key, text in found["total"].items() if key not in ends_now} == {
            key: total for key, total in totals.items() if key not in ends_now
        }, "I2, I6"
        assert found["window"] == {key: ring for key, ring in rings.items() if ring}, "I2, I6"
        assert not_empty(self.living(found["pending"])) == not_empty(pending), "I2, I6"

    def living(self, rings):
        """What is pending that has not expired."""
        living = {}
        for key, ring in rings.items():
            members = {named(member): amount for member, amount in ring.items()}
            starts = {start for start, _ in members}
            over = {start for start in starts if (start + PENDING_BUCKET_SECONDS + PENDING_SECONDS) * US <= self.now_us}
            assert len(starts) <= PENDING_BUCKETS + 2
            assert not (self.swept and key == "llm:open:global" and over), "I8"
            living[key] = {member: amount for member, amount in members.items() if member[0] not in over}
        return living

    def money_is_never_negative_nor_without_a_life(self, stored):
        for key, (value, left) in stored.items():
            what = meaning_of(key)
            assert left > 0 or what.word == "forever", ("I7", key)
            amounts = value.values() if isinstance(value, dict) else [int(value)] if what.kind == "total" else []
            assert all(0 <= amount < 2**53 for amount in amounts), ("I5", key)
            if key in self.place_at and left > 0:
                place = self.place_at[key]
                ends = [charge.over_seconds for charge in self.charges_in(place)]
                end = self.window_ends[place] / US if place in self.window_ends else ends[0]
                assert abs(left - (end - self.now_us / US)) <= BUSY_SECONDS, ("I7", key)

    def what_is_told_of_windows_is_what_is_in_them(self, stored):
        """An id that is known is told what is booked, and changes nothing: so no hint is believed that is wrong."""
        hints = {key for key in stored if meaning_of(key).kind == "running"}
        assert not hints or self.harness.backend.name == "atomic"
        for visitor in self.visitors if hints else ():
            ask = Ask("known", 1, budgets_for(self.rows, visitor), PENDING_SECONDS)
            rows = rows_at(ask.budgets, self.now_seconds)
            its = hints.intersection(running_key(row.key) for row in rows)
            if its and can_be_charged_to(ask.budgets):
                hints -= its
                record = f"open 1 {self.now_us} {request_digest_of(ask)} {charged_to(rows, PENDING_SECONDS)}"
                self.harness.put(record_key("known"), record, 60)
                told = self.harness.backend.reserve(ask)
                assert told.spent_nanousd == tuple(map(self.spent, ask.budgets)), "a hint is wrong"
                self.harness.lose(record_key("known"))

    @invariant()
    def each_ends_once_and_what_was_billed_is_booked(self):
        for held in self.every:
            first_ends = [end for end in held.ends if end in {Outcome.SETTLED, Outcome.RELEASED, Outcome.LATE}]
            assert len(first_ends) <= 1, "I3"
            assert held.used <= held.booked, "I4"
            assert all(held.used <= charge.nanousd for charge in held.charges.values() if charge.start is None), "I4"
        everybodys = [held for held in self.every if held.is_everybodys()]
        expired = sum(held.open for held in everybodys if held.is_open_until_us() <= self.now_us)
        assert self.told_expired <= expired + sum(held.ended_late for held in everybodys), "told more than once"


def bounds(budgets):
    """What may refuse, each with what it is a share of: all shares stand before the first budget that is shared."""
    enforced = {budget.name: budget for budget in budgets if budget.limit_nanousd is not None and not budget.is_shadow}
    shares = [
        (budget, enforced[budget.share.of])
        for budget in budgets
        if budget.share and not budget.is_shadow and budget.share.of in enforced
    ]
    shared = {whole.name for _, whole in shares}
    limits = [(budget, None) for budget in budgets if budget.name in enforced]
    first = next((place for place, (budget, _) in enumerate(limits) if budget.name in shared), 0)
    return [*limits[:first], *shares, *limits[first:]]


def allowed(bound, own, whole_nanousd):
    """How much more may be booked, where so much is booked of a budget, and of what it is a share of."""
    budget, whole = bound
    if whole is None:
        return budget.limit_nanousd - own
    of_others = max(0, whole_nanousd - own)
    return math.floor(Fraction(budget.share.millionths, 1_000_000) * (whole.limit_nanousd - of_others)) - own


def by_share(whole, wait=None, *, busy=False, never=False):
    return Refusal(
        reason=Reason.NETWORK_SHARE,
        cause=Reason.NETWORK_SHARE,
        scope=Scope.NETWORK,
        budget=whole.name,
        retry_after_seconds=wait,
        in_flight=busy,
        can_never_fit=never,
        marker_seconds=0,
        limit_nanousd=None,
    )


def can_be_charged_to(budgets):
    """The six come together; and without any there is nothing to decide."""
    return len(REASONS) == sum(budget.name in REASONS for budget in budgets) or (
        len(budgets) > 0 and all(budget.name not in REASONS for budget in budgets)
    )


def can_never_fit(ask):
    least = ask.cost_nanousd if ask.at_least_nanousd is None else ask.at_least_nanousd
    return any(least > allowed(bound, 0, 0) for bound in bounds(ask.budgets))


def request(ask):
    """What an id stands for: an ask that differs in it is another request."""
    owners = {budget.scope: budget.owner for budget in ask.budgets}
    who = owners.get(Scope.IDENTIFIER), owners.get(Scope.NETWORK)
    return ask.cost_nanousd, who if any(who) else [(budget.name, budget.owner) for budget in ask.budgets]


def add_to(ring, start, nanousd):
    ring[start] = ring.get(start, 0) + nanousd
    if not ring[start]:
        del ring[start]


def named(member):
    """Of pending money the start of the bucket, and what it is charged to: digests of keys, and the six together."""
    start, _, digests = str(member).partition(":")
    return int(start), frozenset(digests[at : at + 6] for at in range(0, len(digests), 6)) or frozenset({THE_SIX})


def not_empty(rings):
    return {key: ring for key, ring in rings.items() if ring}


@lru_cache(4_096)
def meaning_of(key):
    return known_key(key)


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize("unit", ["hour", "day", "week", "month"])
def test_a_key_is_that_of_one_period_as_the_clocks_and_calendars_of_its_zone_show_it(unit, zone):
    period, places = Calendar(unit, zone), {}
    for at_seconds in sorted({moment + quarter * 900 for moment in MOMENTS for quarter in range(-50, 50)}):
        row = rows_at([Budget("b0", "o", period, None)], at_seconds)[0]
        place = shown(period, at_seconds)
        if row.key not in places:
            span = row.layout.start_seconds, row.layout.end_seconds
            assert span == (begin_of(period, at_seconds), end_of(period, at_seconds))
        assert places.setdefault(row.key, place) == place
    assert len(set(places.values())) == len(places)


@pytest.fixture(params=["atomic", "legacy", "memory", "multi", "watch"])
def harness(request, redis_url):
    harness = MemoryHarness() if request.param == "memory" else RedisHarness(request.param, redis_url)
    yield harness
    harness.close()


@pytest.mark.timeout(120 + 3 * EXAMPLES)
def test_whatever_happens_the_books_are_the_sum_of_all_reservations(harness):
    machine = type("Machine", (Books,), {"harness": harness})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=80,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
