"""The arithmetic of the six budgets in Python, for the strategies whose decision is not a script.

Pure functions over what was read. `lua/reserve.lua`, `lua/extend.lua` and `lua/settle.lua` follow the same rules in the
same order; the conformance suite holds both to the same answers, amounts and TTLs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from backends.clock import US_PER_SECOND
from backends.contract import Ask, Limits, Marker, Reason, Scope
from backends.errors import StoreBroken
from backends.keys import (
    RECORD_KEEP_SECONDS,
    SECONDS_PER_DAY,
    SECONDS_PER_HOUR,
    BookKeys,
    bucket_seconds_of,
    pending_bucket_seconds_of,
)
from backends.records import MARKER

MOST_DIGITS = 16
"""Of an amount: beyond 2^53 Lua's numbers are not exact."""
# Statuses of the scripts' replies. 10 (too late) and 11 (the turn of an hour) have no name here: only `atomic` sees
# them, and asks again.
ADMITTED, THROTTLED, ENDED, CONFLICT, DUPLICATE = 0, 1, 8, 9, 12
SETTLED, REPEATED, LATE, EXPIRED = 0, 1, 2, 3

Buckets = Mapping[int, int]
"""Bucket start (unix seconds) -> nano-dollars."""


@dataclass(frozen=True, slots=True)
class Budget:
    """One of the six budgets: whose it is, where its total is kept, and what limits it."""

    status: int
    """Of a script's reply; the order in which the budgets are checked."""
    reason: Reason
    scope: Scope
    total: str
    """The field of `BookKeys` with its key: a total, or the buckets of the window."""
    pending: str
    """The field of `BookKeys` with what is pending in this scope."""
    limit: str
    """The field of `Limits` with its limit."""
    period_seconds: int | None = None
    """A UTC hour or day; None is the sliding window."""
    keep_seconds: int = 0
    """How long a total outlives its period."""
    marker_lasts: int = 0
    """TTL of the marker that a refusal sets, in times of `throttle_seconds`; 0 sets none."""

    def is_limited_by(self, limits: Limits) -> int | None:
        """The limit in nano-dollars; None for no limit."""
        limit: int | None = getattr(limits, self.limit)
        return limit


_ID, _NET, _ALL = Scope.IDENTIFIER, Scope.NETWORK, Scope.GLOBAL
_DAY, _HOUR = SECONDS_PER_DAY, SECONDS_PER_HOUR
BUDGETS = (
    Budget(3, Reason.WINDOW_LIMIT, _ID, "recent", "pending_identifier", "window_nanousd", marker_lasts=1),
    Budget(2, Reason.DAILY_LIMIT, _ID, "daily", "pending_identifier", "day_nanousd", _DAY, _DAY, marker_lasts=2),
    Budget(4, Reason.NETWORK_LIMIT, _NET, "network_recent", "pending_network", "network_window_nanousd"),
    Budget(5, Reason.NETWORK_DAILY_LIMIT, _NET, "network_daily", "pending_network", "network_day_nanousd", _DAY, _DAY),
    Budget(
        6, Reason.GLOBAL_HOURLY_LIMIT, _ALL, "global_hourly", "pending_global", "global_hour_nanousd", _HOUR, 2 * _HOUR
    ),
    Budget(7, Reason.GLOBAL_DAILY_LIMIT, _ALL, "global_daily", "pending_global", "global_day_nanousd", _DAY, _DAY),
)
"""In the order in which they are read and charged."""
AS_CHECKED = sorted(BUDGETS, key=lambda budget: budget.status)
PENDING = tuple(dict.fromkeys((budget.scope, budget.pending) for budget in BUDGETS))
REASON_OF_STATUS = {THROTTLED: Reason.THROTTLED} | {budget.status: budget.reason for budget in BUDGETS}
BUDGET_OF_REASON = {budget.reason: budget for budget in BUDGETS}
WINDOW_STATUS = BUDGET_OF_REASON[Reason.WINDOW_LIMIT].status
STATUS_OF_CAUSE = {budget.reason.value: budget.status for budget in AS_CHECKED if budget.marker_lasts}
LAST_STATUS_WITH_MARKER = max(STATUS_OF_CAUSE.values())


def amount(text: bytes | None) -> int:
    """The nano-dollars that a key holds; a missing key holds none.

    Raises:
        StoreBroken: it holds something else.
    """
    if text is None:
        return 0
    if not text.isdigit() or len(text) > MOST_DIGITS:
        raise StoreBroken("a total holds no amount")
    return int(text)


# Buckets.


def live_buckets(buckets: Buckets, bucket_seconds: int, ttl_seconds: int, now_us: int) -> dict[int, int]:
    """The buckets whose youngest possible content still counts."""
    over_us = now_us - (bucket_seconds + ttl_seconds) * US_PER_SECOND
    return {start: nanousd for start, nanousd in buckets.items() if start * US_PER_SECOND > over_us}


def live_pending(buckets: Buckets, pending_seconds: int, now_us: int) -> dict[int, int]:
    """The buckets of pending money whose reservations may still be ended in time."""
    return live_buckets(buckets, pending_bucket_seconds_of(pending_seconds), pending_seconds, now_us)


def window_bucket_counts(start_seconds: int, window_seconds: int, now_us: int) -> bool:
    """Whether a bucket of the window still counts."""
    return (start_seconds + bucket_seconds_of(window_seconds) + window_seconds) * US_PER_SECOND > now_us


def window_frees_at(buckets: Buckets, window_seconds: int, now_us: int) -> int:
    """Unix time at which the oldest amount leaves the window; of an empty one, what is booked now."""
    bucket = bucket_seconds_of(window_seconds)
    now = now_us // US_PER_SECOND
    return min(buckets, default=now - now % bucket) + bucket + window_seconds


def expired_in(buckets: Buckets, pending_seconds: int, own_start: int | None, own_nanousd: int, now_us: int) -> int:
    """Pending nano-dollars of reservations that have expired, without the caller's own in the bucket `own_start`."""
    live = live_pending(buckets, pending_seconds, now_us)
    return sum(
        max(0, nanousd - (own_nanousd if start == own_start else 0))
        for start, nanousd in buckets.items()
        if start not in live
    )


# Decisions.


@dataclass(frozen=True, slots=True)
class Totals:
    """What is booked before this request."""

    amounts: Mapping[str, int]
    """By the budget's `total`."""
    windows: Mapping[str, Buckets]
    """Of the sliding budgets: the buckets that count."""

    def rows(self, limits: Limits, *, is_cleared: bool = False) -> Iterator[tuple[Budget, int, int]]:
        """Each budget that has a limit, its total and its limit, in the order in which they are checked.

        With `is_cleared` the identifier's own budgets are left out: its books were cleared after the reservation.
        """
        for budget in AS_CHECKED:
            limit = budget.is_limited_by(limits)
            if limit is not None and not (is_cleared and budget.scope is Scope.IDENTIFIER):
                yield budget, self.amounts[budget.total], limit


@dataclass(frozen=True, slots=True)
class Decision:
    """A decision: the reply of `reserve.lua`, with names. `set_marker` is the marker to write, if any."""

    status: int
    now_us: int
    marker_seconds: int = 0
    wait_seconds: int = 0
    busy: bool = False
    cause: int = 0
    set_marker: str | None = None
    reserved_nanousd: int = 0
    """What is set aside, where it is admitted."""


def decide(ask: Ask, totals: Totals, keys: BookKeys, read_pending: Callable[[str], Buckets], now_us: int) -> Decision:
    """Whether every budget has room for `ask`; `read_pending` is called only where one has not.

    Where there is no room for all of it, and pending reservations will not make any by ending, `at_least_nanousd` of
    what is left will do.
    """
    decision = _decide(ask, ask.cost_nanousd, totals, keys, read_pending, now_us)
    if decision.status == ADMITTED or decision.busy or ask.at_least_nanousd is None:
        return decision
    left_nanousd = min(limit - total for _, total, limit in totals.rows(ask.limits))
    if left_nanousd >= ask.at_least_nanousd:
        return Decision(ADMITTED, now_us, reserved_nanousd=left_nanousd)
    return _decide(ask, ask.at_least_nanousd, totals, keys, read_pending, now_us)


def _decide(
    ask: Ask, cost: int, totals: Totals, keys: BookKeys, read_pending: Callable[[str], Buckets], now_us: int
) -> Decision:
    """The decision about `cost` nano-dollars, all of it or nothing."""
    status, busy, ends_at = ADMITTED, True, 0
    for budget, total, limit in totals.rows(ask.limits):
        if total + cost <= limit:
            continue
        status = status or budget.status
        pending = _pending_in(budget, ask, read_pending(getattr(keys, budget.pending)), now_us)
        busy = busy and total - pending + cost <= limit
        ends_at = max(ends_at, _fits_at(budget, ask, totals, limit, cost, now_us))
    if status == ADMITTED:
        return Decision(ADMITTED, now_us, reserved_nanousd=cost)
    # What can never fit waits for nothing that was spent: its marker ends by itself.
    is_over_soon = busy or exceeds_a_limit(ask.limits, cost)
    wait = 1 if is_over_soon else max(1, -(-(ends_at * US_PER_SECOND - now_us) // US_PER_SECOND))
    return _refused(ask.limits, status, wait, now_us, busy=busy)


def _pending_in(budget: Budget, ask: Ask, pending: Buckets, now_us: int) -> int:
    """How much of a budget's total is pending."""
    now, bucket = now_us // US_PER_SECOND, pending_bucket_seconds_of(ask.pending_seconds)
    if budget.period_seconds is None:
        # Where the window is hardly longer than an answer may take, expired money may leave the window before it leaves
        # the pending buckets: only what is surely in both counts.
        since = now - ask.limits.window_seconds + bucket - 1
    else:
        since = now - now % budget.period_seconds
    live = live_pending(pending, ask.pending_seconds, now_us)
    return sum(nanousd for start, nanousd in live.items() if start + bucket > since)


def _fits_at(budget: Budget, ask: Ask, totals: Totals, limit: int, cost: int, now_us: int) -> int:
    """Unix seconds at which time alone has made room for `cost`."""
    now, window = now_us // US_PER_SECOND, ask.limits.window_seconds
    if budget.period_seconds is not None:
        return now - now % budget.period_seconds + budget.period_seconds
    buckets, bucket = totals.windows[budget.total], bucket_seconds_of(window)
    left = sum(buckets.values())
    for start in sorted(buckets):
        left -= buckets[start]
        if left + cost <= limit:
            return start + bucket + window
    return now + window + bucket


def exceeds_a_limit(limits: Limits, cost_nanousd: int) -> bool:
    """Whether `cost_nanousd` is more than a whole limit."""
    amounts = (budget.is_limited_by(limits) for budget in BUDGETS)
    return any(limit is not None and cost_nanousd > limit for limit in amounts)


def _refused(limits: Limits, status: int, wait: int, now_us: int, *, busy: bool) -> Decision:
    reason = REASON_OF_STATUS[status]
    seconds = limits.throttle_seconds * BUDGET_OF_REASON[reason].marker_lasts
    if not seconds or (busy and not limits.mark_when_busy):
        return Decision(status, now_us, 0, wait, busy, status)
    wait = max(wait, seconds)
    ends_us, refusal_ends_us = now_us + seconds * US_PER_SECOND, now_us + wait * US_PER_SECOND
    marker = f"{reason.value} {ends_us} {refusal_ends_us} {'busy' if busy else 'spent'}"
    return Decision(status, now_us, seconds, wait, busy, status, marker)


def decision_of_marker(text: bytes | None, left_ms: int, throttle_seconds: int, now_us: int) -> Decision | None:
    """The refusal under a marker that has not ended, or None.

    Args:
        text: what the marker's key holds.
        left_ms: the key's TTL, which counts for a marker that was set by hand; negative without one.
        throttle_seconds: how long a marker without a TTL counts.
        now_us: unix time.
    """
    if text is None:
        return None
    match = MARKER.fullmatch(text)
    if match is None:
        left = -(-left_ms // 1_000) if left_ms >= 0 else throttle_seconds
        return Decision(THROTTLED, now_us, left, left, busy=False, cause=WINDOW_STATUS)
    left = -(-(int(match[2]) - now_us) // US_PER_SECOND)
    if left <= 0:
        return None
    wait = max(left, -(-(int(match[3]) - now_us) // US_PER_SECOND))
    cause = STATUS_OF_CAUSE.get(match[1].decode(), WINDOW_STATUS)
    return Decision(THROTTLED, now_us, left, wait, match[4] == b"busy", cause)


def marker_of(text: bytes | None, left_ms: int, now_us: int) -> Marker | None:
    """The throttle marker as `Books` show it; one that was set by hand without a TTL has a second left."""
    decision = decision_of_marker(text, left_ms, 1, now_us)
    if decision is None:
        return None
    seconds = max(1, decision.marker_seconds)
    return Marker(REASON_OF_STATUS[decision.cause], seconds, max(seconds, decision.wait_seconds), decision.busy)


def decide_extension(
    rows: Sequence[tuple[Budget, int, int]], reserved_nanousd: int, to_nanousd: int, at_least_nanousd: int
) -> tuple[int, int]:
    """The status of an extension, and what is reserved in all; `rows` as `Totals.rows` gives them."""
    more, status = max(0, to_nanousd - reserved_nanousd), ADMITTED
    for budget, total, limit in rows:
        left = limit - total
        if left < at_least_nanousd - reserved_nanousd and status == ADMITTED:
            status = budget.status
        more = min(more, max(0, left))
    if status != ADMITTED and at_least_nanousd > reserved_nanousd:
        return status, reserved_nanousd
    return ADMITTED, reserved_nanousd + more


# What a reservation is charged to.


@dataclass(frozen=True, slots=True)
class Charge:
    """An increment that `reserve` makes and `settle` corrects. `member` is a bucket's start, None for a total."""

    key: str
    member: int | None
    ttl_seconds: int
    """From now until the key may go, as a reservation sets it."""
    is_pending: bool = False


def charges(
    keys: BookKeys, window_seconds: int, made_at_us: int, now_us: int, *, is_cleared: bool = False
) -> list[Charge]:
    """Where a reservation made at `made_at_us` is booked: two windows and four totals.

    With `is_cleared` its identifier's books were cleared since: it is not in them any more.
    """
    made, now = made_at_us // US_PER_SECOND, now_us // US_PER_SECOND
    bucket = bucket_seconds_of(window_seconds)
    start, window_ttl = made - made % bucket, window_seconds + bucket
    booked = []
    for budget in BUDGETS:
        if is_cleared and budget.scope is Scope.IDENTIFIER:
            continue
        key, period = getattr(keys, budget.total), budget.period_seconds
        if period is None:
            booked.append(Charge(key, start, window_ttl))
        else:
            booked.append(Charge(key, None, made - made % period + period + budget.keep_seconds - now))
    return booked


def pending_charges(keys: BookKeys, pending_seconds: int, made_at_us: int, *, is_cleared: bool = False) -> list[Charge]:
    """Where a reservation's pending money is remembered, by scope."""
    bucket = pending_bucket_seconds_of(pending_seconds)
    made = made_at_us // US_PER_SECOND
    start, ttl = made - made % bucket, pending_seconds + bucket
    # The global one is kept as long as records are: the first request after a lull reports what has expired before it.
    return [
        Charge(getattr(keys, pending), start, ttl + (RECORD_KEEP_SECONDS if scope is _ALL else 0), is_pending=True)
        for scope, pending in PENDING
        if not (is_cleared and scope is _ID)
    ]


def change_of(charge: Charge, booked: int | None, delta: int, window_seconds: int, now_us: int) -> int:
    """What a settlement adds to one place: nothing goes below zero, and what has aged out is not made again."""
    if charge.member is None:
        is_over = charge.ttl_seconds <= 0
    else:
        is_over = not window_bucket_counts(charge.member, window_seconds, now_us)
    if is_over or (booked is None and delta < 0):
        return 0
    return max(delta, -(booked or 0))


def was_cleared(reset_text: bytes | None, made_at_us: int) -> bool:
    """Whether an identifier's books were cleared after a reservation was made."""
    return reset_text is not None and reset_text.isdigit() and made_at_us <= int(reset_text)
