"""The arithmetic of budgets in Python, for the strategies whose decision is not a script.

Pure functions over what was read. `lua/reserve.lua`, `lua/extend.lua` and `lua/settle.lua` follow the same rules in the
same order; the conformance suite holds both to the same answers, amounts and TTLs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from backends.budgets import (
    SHARE_STATUS,
    Budget,
    Scope,
    Share,
    enforced_limit,
    share_limit,
    shares_in,
    whole_limits,
)
from backends.clock import US_PER_SECOND
from backends.contract import Ask, Marker
from backends.errors import StoreBroken
from backends.keys import RECORD_KEEP_SECONDS, Row, bucket_seconds_of, cause_of, pending_bucket_seconds_of
from backends.records import MARKER, Member, is_charged_to, pending_member, start_of

MOST_DIGITS = 16
"""Of an amount: beyond 2^53 Lua's numbers are not exact."""
# Statuses of the scripts' replies; a refusal has the status of its budget. 10 (too late) and 11 (the keys are of other
# periods) have no name here: only `atomic` sees them, and asks again.
ADMITTED, THROTTLED, ENDED, CONFLICT, DUPLICATE = 0, 1, 8, 9, 12
SETTLED, REPEATED, LATE, EXPIRED = 0, 1, 2, 3
NEVER_SECONDS = 2**53
"""When a period ends that does not."""

Buckets = Mapping[int, int]
"""Bucket start (unix seconds) -> nano-dollars."""
Pending = Mapping[Member, int]
"""What is pending of an owner -> nano-dollars."""


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


def live_pending(pending: Pending, pending_seconds: int, now_us: int) -> dict[Member, int]:
    """The members of pending money whose reservations may still be ended in time."""
    over_us = now_us - (pending_bucket_seconds_of(pending_seconds) + pending_seconds) * US_PER_SECOND
    return {member: nanousd for member, nanousd in pending.items() if start_of(member) * US_PER_SECOND > over_us}


def window_bucket_counts(start_seconds: int, window_seconds: int, now_us: int) -> bool:
    """Whether a bucket of the window still counts."""
    return (start_seconds + bucket_seconds_of(window_seconds) + window_seconds) * US_PER_SECOND > now_us


def window_frees_at(buckets: Buckets, window_seconds: int, now_us: int) -> int:
    """Unix time at which the oldest amount leaves the window; of an empty one, what is booked now."""
    bucket = bucket_seconds_of(window_seconds)
    now = now_us // US_PER_SECOND
    return min(buckets, default=now - now % bucket) + bucket + window_seconds


def expired_in(pending: Pending, pending_seconds: int, own: Member | None, own_nanousd: int, now_us: int) -> int:
    """Pending nano-dollars of reservations that have expired, without the caller's own in the member `own`."""
    live = live_pending(pending, pending_seconds, now_us)
    return sum(
        max(0, nanousd - (own_nanousd if member == own else 0))
        for member, nanousd in pending.items()
        if member not in live
    )


# Decisions.


@dataclass(frozen=True, slots=True)
class Total:
    """What is booked in one budget before this request."""

    row: Row
    nanousd: int
    buckets: Buckets
    """Of a window: those that count."""

    def renews_at(self, now_us: int) -> int | None:
        """Unix time at which the oldest amount leaves the window, or the period ends; None: never."""
        layout = self.row.layout
        if layout.window_seconds:
            return window_frees_at(self.buckets, layout.window_seconds, now_us)
        return layout.end_seconds or None


@dataclass(frozen=True, slots=True)
class Decision:
    """A decision: the reply of `reserve.lua`, with names. `set_marker` is the marker to write, if any."""

    status: int
    now_us: int
    marker_seconds: int = 0
    wait_seconds: int = 0
    """0: no waiting helps."""
    busy: bool = False
    row: Row | None = None
    """The budget that refuses; None under a marker."""
    cause: str = ""
    """Under a marker: what set it."""
    set_marker: str | None = None
    reserved_nanousd: int = 0
    """What is set aside, where it is admitted."""
    by_share: bool = False
    """Whether it is not the limit of `row` that refuses, but its owner's share of another budget."""
    over_shadow: tuple[str, ...] = ()


def decide(ask: Ask, totals: Sequence[Total], read_pending: Callable[[str], Pending], now_us: int) -> Decision:
    """Whether every budget has room for `ask`; `read_pending` is called only where one has not.

    Where there is no room for all of it, and pending reservations will not make any by ending, `at_least_nanousd` of
    what is left will do.
    """
    decision = _decide(ask, ask.cost_nanousd, totals, read_pending, now_us)
    if decision.status == ADMITTED or decision.busy or ask.at_least_nanousd is None:
        return decision
    left_nanousd = min(bound.left_nanousd for bound in bounds(totals))
    if left_nanousd >= ask.at_least_nanousd:
        return _admitted(left_nanousd, totals, now_us)
    return _decide(ask, ask.at_least_nanousd, totals, read_pending, now_us)


class Bound(NamedTuple):
    """What a total may come to: by its budget's limit, or by its owner's share of another budget."""

    total: Total
    limit_nanousd: int
    """The budget's, or that of the budget that is shared."""
    share: Share | None = None
    whole_nanousd: int = 0
    """What is booked of the budget that is shared."""
    whole_row: Row | None = None

    @property
    def left_nanousd(self) -> int:
        """What may still be booked; below 0 where more is booked than may be."""
        return self.after(0, 0)

    def after(self, own_nanousd: int, whole_nanousd: int) -> int:
        """The same, once so much less is booked of the total, and of what is shared."""
        own, whole = self.total.nanousd - own_nanousd, self.whole_nanousd - whole_nanousd
        limit = self.limit_nanousd if self.share is None else share_limit(self.share, self.limit_nanousd, whole, own)
        return limit - own


def bounds(totals: Sequence[Total]) -> Iterator[Bound]:
    """All that may refuse, in the order in which refusals name it: shares before the first budget that is shared."""
    limits = [enforced_limit(total.row.budget) for total in totals]
    shares = shares_in([total.row.budget for total in totals])
    first_shared_at = min((shared.whole_at for shared in shares), default=None)
    for at, total in enumerate(totals):
        if at == first_shared_at:
            for part_at, whole_at, share in shares:
                limit, whole = limits[whole_at], totals[whole_at]
                if limit is not None:
                    yield Bound(totals[part_at], limit, share, whole.nanousd, whole.row)
        limit = limits[at]
        if limit is not None:
            yield Bound(total, limit)


def _decide(
    ask: Ask, cost: int, totals: Sequence[Total], read_pending: Callable[[str], Pending], now_us: int
) -> Decision:
    """The decision about `cost` nano-dollars, all of it or nothing."""
    refusing, busy, ends_at = None, True, 0

    def pending_in(row: Row | None) -> int:
        return 0 if row is None else _pending_in(row, ask, read_pending(row.pending_key), now_us)

    for bound in bounds(totals):
        if cost <= bound.left_nanousd:
            continue
        refusing = refusing or bound
        busy = busy and cost <= bound.after(pending_in(bound.total.row), pending_in(bound.whole_row))
        ends_at = max(ends_at, _fits_at(bound.total, bound.limit_nanousd, cost, now_us))
    if refusing is None:
        return _admitted(cost, totals, now_us)
    # What can never fit waits for nothing that was spent: its marker ends by itself.
    if busy or exceeds_a_limit(ask, cost):
        wait = 1
    else:
        wait = 0 if ends_at == NEVER_SECONDS else max(1, -(-(ends_at * US_PER_SECOND - now_us) // US_PER_SECOND))
    return _refused(ask, refusing, wait, now_us, busy=busy)


def _admitted(cost: int, totals: Sequence[Total], now_us: int) -> Decision:
    over = tuple(total.row.budget.name for total in totals if _is_over(total.row.budget, total.nanousd + cost))
    return Decision(ADMITTED, now_us, reserved_nanousd=cost, over_shadow=over)


def _is_over(budget: Budget, nanousd: int) -> bool:
    return budget.is_shadow and budget.limit_nanousd is not None and nanousd > budget.limit_nanousd


def _pending_in(row: Row, ask: Ask, pending: Pending, now_us: int) -> int:
    """How much of a budget's total is pending."""
    bucket = pending_bucket_seconds_of(ask.pending_seconds)
    since = row.layout.start_seconds
    if row.layout.window_seconds:
        # Where the window is hardly longer than an answer may take, expired money may leave the window before it leaves
        # the pending buckets: only what is surely in both counts.
        since = now_us // US_PER_SECOND - row.layout.window_seconds + bucket - 1
    live = live_pending(pending, ask.pending_seconds, now_us)
    return sum(
        nanousd for member, nanousd in live.items() if start_of(member) + bucket > since and is_charged_to(member, row)
    )


def _fits_at(total: Total, limit: int, cost: int, now_us: int) -> int:
    """Unix seconds at which time alone has made room for `cost`."""
    window = total.row.layout.window_seconds
    if not window:
        return total.row.layout.end_seconds or NEVER_SECONDS
    buckets, bucket = total.buckets, bucket_seconds_of(window)
    left = sum(buckets.values())
    for start in sorted(buckets):
        left -= buckets[start]
        if left + cost <= limit:
            return start + bucket + window
    return now_us // US_PER_SECOND + window + bucket


def exceeds_a_limit(ask: Ask, cost_nanousd: int) -> bool:
    """Whether `cost_nanousd` is more than a whole limit, or than a whole share of one."""
    return any(cost_nanousd > limit for limit in whole_limits(ask.budgets))


def _refused(ask: Ask, bound: Bound, wait: int, now_us: int, *, busy: bool) -> Decision:
    row = bound.total.row
    if bound.share is not None:
        return Decision(SHARE_STATUS, now_us, 0, wait, busy, row, by_share=True)
    status, seconds = row.layout.status, row.budget.throttle_seconds
    if not seconds or (busy and not ask.mark_when_busy):
        return Decision(status, now_us, 0, wait, busy, row)
    wait = max(wait, seconds) if wait else 0
    ends_us, refusal_ends_us = now_us + seconds * US_PER_SECOND, now_us + wait * US_PER_SECOND if wait else 0
    marker = f"{row.layout.cause} {ends_us} {refusal_ends_us} {'busy' if busy else 'spent'}"
    return Decision(status, now_us, seconds, wait, busy, row, set_marker=marker)


def decision_of_marker(text: bytes | None, left_ms: int, by_hand_seconds: int, now_us: int) -> Decision | None:
    """The refusal under a marker that has not ended, or None.

    Args:
        text: what the marker's key holds.
        left_ms: the key's TTL, which counts for a marker that was set by hand; negative without one.
        by_hand_seconds: how long a marker without a TTL counts.
        now_us: unix time.
    """
    if text is None:
        return None
    match = MARKER.fullmatch(text)
    if match is None:
        left = -(-left_ms // 1_000) if left_ms >= 0 else by_hand_seconds
        return Decision(THROTTLED, now_us, left, left, busy=False)
    left = -(-(int(match[2]) - now_us) // US_PER_SECOND)
    if left <= 0:
        return None
    wait = max(left, -(-(int(match[3]) - now_us) // US_PER_SECOND)) if int(match[3]) else 0
    return Decision(THROTTLED, now_us, left, wait, match[4] == b"busy", cause=match[1].decode())


def marker_of(text: bytes | None, left_ms: int, now_us: int) -> Marker | None:
    """The throttle marker as `Books` show it; one that was set by hand without a TTL has a second left."""
    decision = decision_of_marker(text, left_ms, 1, now_us)
    if decision is None:
        return None
    seconds = max(1, decision.marker_seconds)
    reason, name = cause_of(decision.cause)
    wait = max(seconds, decision.wait_seconds) if decision.wait_seconds else None
    return Marker(reason, name, seconds, wait, decision.busy)


def by_hand_seconds(ask: Ask) -> int:
    """How long a marker counts that was set by hand and has no TTL: as long as the shortest that a budget sets."""
    seconds = [budget.throttle_seconds for budget in ask.budgets if budget.throttle_seconds]
    return min(seconds, default=1)


def decide_extension(
    totals: Sequence[Total], budgets: Sequence[Budget], reserved_nanousd: int, to_nanousd: int, at_least: int
) -> tuple[Bound | None, int]:
    """What refuses an extension, if anything does, and what is reserved in all; limits and shares are of `budgets`."""
    more, refusing = max(0, to_nanousd - reserved_nanousd), None
    now = budgets_of_now([total.row.budget for total in totals], budgets)
    counted = [replace(total, row=total.row._replace(budget=budget)) for total, budget in zip(totals, now, strict=True)]
    for bound in bounds(counted):
        left = bound.left_nanousd
        if left < at_least - reserved_nanousd and refusing is None:
            refusing = bound
        more = min(more, max(0, left))
    if refusing is not None and at_least > reserved_nanousd:
        return refusing, reserved_nanousd
    return None, reserved_nanousd + more


def budgets_of_now(charged: Sequence[Budget], budgets: Sequence[Budget]) -> list[Budget]:
    """What a reservation is charged to, with what limits it now: nothing, where it is none of `budgets`."""
    by_name = {budget.name: budget for budget in budgets}
    now = []
    for budget in charged:
        its = by_name.get(budget.name)
        limit, share, is_shadow = (None, None, False) if its is None else (its.limit_nanousd, its.share, its.is_shadow)
        now.append(budget._replace(limit_nanousd=limit, share=share, is_shadow=is_shadow))
    return now


# What a reservation is charged to.


@dataclass(frozen=True, slots=True)
class Charge:
    """An increment that `reserve` makes and `settle` corrects. `member` is that of a bucket, None for a total."""

    key: str
    member: Member | None
    ttl_seconds: int | None
    """From now until the key may go, as a reservation sets it; None: it stays for ever."""
    is_pending: bool = False
    counts_until_seconds: int = 0
    """Of a window's bucket: when it counts no more."""


def charges(rows: Sequence[Row], made_at_us: int, now_us: int) -> list[Charge]:
    """Where a reservation made at `made_at_us` is booked."""
    made, now = made_at_us // US_PER_SECOND, now_us // US_PER_SECOND
    booked = []
    for row in rows:
        window = row.layout.window_seconds
        if window:
            start, ttl = made - made % row.bucket_seconds, window + row.bucket_seconds
            booked.append(Charge(row.key, start, ttl, counts_until_seconds=start + ttl))
        else:
            until = row.layout.keep_until_seconds
            booked.append(Charge(row.key, None, until - now if until else None))
    return booked


def pending_keys(rows: Sequence[Row]) -> dict[str, Scope]:
    """The keys of pending money of the owners, each once."""
    return {row.pending_key: row.budget.scope for row in rows}


def pending_start(pending_seconds: int, made_at_us: int) -> int:
    """The start of the bucket of pending money of a reservation."""
    made = made_at_us // US_PER_SECOND
    return made - made % pending_bucket_seconds_of(pending_seconds)


def pending_charges(rows: Sequence[Row], pending_seconds: int, made_at_us: int) -> list[Charge]:
    """Where the pending money of a new reservation is remembered, by owner."""
    start = pending_start(pending_seconds, made_at_us)
    return [
        pending_charge(
            key, scope, pending_seconds, pending_member(start, [row for row in rows if row.pending_key == key])
        )
        for key, scope in pending_keys(rows).items()
    ]


def pending_charge(key: str, scope: Scope, pending_seconds: int, member: Member) -> Charge:
    """Where a reservation's pending money is remembered for one owner."""
    ttl = pending_seconds + pending_bucket_seconds_of(pending_seconds)
    # The global one is kept as long as records are: the first request after a lull reports what has expired before it.
    kept = RECORD_KEEP_SECONDS if scope is Scope.GLOBAL else 0
    return Charge(key, member, ttl + kept, is_pending=True)


def change_of(charge: Charge, booked: int | None, delta: int, now_us: int) -> int:
    """What a settlement adds to one place: nothing goes below zero, and what has aged out is not made again."""
    if charge.member is None:
        is_over = charge.ttl_seconds is not None and charge.ttl_seconds <= 0
    else:
        is_over = charge.counts_until_seconds * US_PER_SECOND <= now_us
    if is_over or (booked is None and delta < 0):
        return 0
    return max(delta, -(booked or 0))


def still_booked(rows: Sequence[Row], *, is_cleared: bool) -> list[Row]:
    """Where a reservation is still booked: not with its identifier, if its books were cleared since."""
    return [row for row in rows if not (is_cleared and row.budget.scope is Scope.IDENTIFIER)]


def was_cleared(reset_text: bytes | None, made_at_us: int) -> bool:
    """Whether an identifier's books were cleared after a reservation was made."""
    return reset_text is not None and reset_text.isdigit() and made_at_us <= int(reset_text)
