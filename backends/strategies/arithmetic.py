"""The arithmetic of the limits in Python, for the strategies whose decision is not a script.

Pure functions over what was read; `lua/reserve.lua`, `lua/extend.lua` and `lua/settle.lua` are the same rules in the
same order, and the conformance suite holds the two to the same answers, books and lives of keys.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from backends.clock import US_PER_SECOND
from backends.contract import (
    Ask,
    Limits,
    Marker,
    Outcome,
    Reason,
    Refusal,
    Reservation,
    Scope,
    Settlement,
)
from backends.errors import ReservationConflict, StoreBroken
from backends.keys import (
    RECORD_KEEP_SECONDS,
    SECONDS_PER_DAY,
    SECONDS_PER_HOUR,
    BookKeys,
    book_keys,
    bucket_seconds_of,
    pending_bucket_seconds_of,
)
from backends.records import MARKER, Record

MOST_DIGITS = 16
"""Of an amount: beyond 2^53 Lua's numbers are not exact."""
# Statuses of the scripts' replies. 10 (too late) and 11 (the turn of an hour) have no name here: only `atomic` sees
# them, and asks again.
ADMITTED, THROTTLED, ENDED, CONFLICT, DUPLICATE = 0, 1, 8, 9, 12
DAILY_LIMIT, WINDOW_LIMIT, NETWORK_LIMIT, NETWORK_DAILY_LIMIT, GLOBAL_HOURLY_LIMIT, GLOBAL_DAILY_LIMIT = range(2, 8)
SETTLED, REPEATED, LATE, EXPIRED = 0, 1, 2, 3

REASON_OF_STATUS = {
    THROTTLED: Reason.THROTTLED,
    DAILY_LIMIT: Reason.DAILY_LIMIT,
    WINDOW_LIMIT: Reason.WINDOW_LIMIT,
    NETWORK_LIMIT: Reason.NETWORK_LIMIT,
    NETWORK_DAILY_LIMIT: Reason.NETWORK_DAILY_LIMIT,
    GLOBAL_HOURLY_LIMIT: Reason.GLOBAL_HOURLY_LIMIT,
    GLOBAL_DAILY_LIMIT: Reason.GLOBAL_DAILY_LIMIT,
}
SCOPE_OF_REASON = {
    Reason.DAILY_LIMIT: Scope.IDENTIFIER,
    Reason.WINDOW_LIMIT: Scope.IDENTIFIER,
    Reason.NETWORK_LIMIT: Scope.NETWORK,
    Reason.NETWORK_DAILY_LIMIT: Scope.NETWORK,
    Reason.GLOBAL_HOURLY_LIMIT: Scope.GLOBAL,
    Reason.GLOBAL_DAILY_LIMIT: Scope.GLOBAL,
}
STATUS_OF_CAUSE = {"daily_limit": DAILY_LIMIT, "window_limit": WINDOW_LIMIT}
LAST_STATUS_WITH_MARKER = WINDOW_LIMIT
CONFLICT_TEXT = {ENDED: "has ended", CONFLICT: "stands for another request"}

Buckets = Mapping[int, int]
"""Bucket start (unix seconds) -> nano-dollars."""


def request_digest_of(ask: Ask) -> str:
    """Tells whether an id, sent again, stands for the same request."""
    text = f"{ask.identifier}\n{ask.network}\n{ask.cost_nanousd}"
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


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


def alive(ring: Buckets, bucket_seconds: int, ttl_seconds: int, now_us: int) -> dict[int, int]:
    """The buckets whose youngest possible content still counts."""
    return {
        start: held for start, held in ring.items() if (start + bucket_seconds + ttl_seconds) * US_PER_SECOND > now_us
    }


def keys_of(reservation: Reservation) -> BookKeys:
    """The keys of the periods in which a reservation was made."""
    made_seconds = reservation.made_at_us // US_PER_SECOND
    return book_keys(reservation.reservation_id, reservation.identifier, reservation.network, made_seconds)


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
    held_nanousd: int = 0
    """What is set aside, where it is admitted."""


def decision_of_marker(text: bytes | None, left_ms: int, throttle_seconds: int, now_us: int) -> Decision | None:
    """The refusal under a living marker; None if there is none. `left_ms` is asked for markers set by hand only."""
    if text is None:
        return None
    match = MARKER.fullmatch(text)
    if match is None:
        left = -(-left_ms // 1_000) if left_ms >= 0 else throttle_seconds
        return Decision(THROTTLED, now_us, left, left, busy=False, cause=WINDOW_LIMIT)
    left = -(-(int(match[2]) - now_us) // US_PER_SECOND)
    if left <= 0:
        return None
    wait = max(left, -(-(int(match[3]) - now_us) // US_PER_SECOND))
    return Decision(
        THROTTLED, now_us, left, wait, match[4] == b"busy", STATUS_OF_CAUSE.get(match[1].decode(), WINDOW_LIMIT)
    )


def marker_of(text: bytes | None, left_ms: int, now_us: int) -> Marker | None:
    """A living marker as it is told to whom it stops; one without a life of its own (set by hand) has a second left."""
    decision = decision_of_marker(text, left_ms, 1, now_us)
    if decision is None:
        return None
    seconds = max(1, decision.marker_seconds)
    return Marker(REASON_OF_STATUS[decision.cause], seconds, max(seconds, decision.wait_seconds), decision.busy)


@dataclass(frozen=True, slots=True)
class Spent:
    """What the books hold before this request; rings hold living buckets only."""

    recent: Buckets
    daily_nanousd: int
    network_recent: Buckets
    network_daily_nanousd: int
    global_hourly_nanousd: int
    global_daily_nanousd: int


@dataclass(frozen=True, slots=True)
class _Limit:
    status: int
    spent_nanousd: int
    limit_nanousd: int | None
    open_key: str
    since_seconds: int
    """Unix time: what is open in buckets that end later stands in this limit."""
    ends_at_seconds: int | None
    ring: Buckets | None = None


def _limits(ask: Ask, spent: Spent, keys: BookKeys, now_us: int) -> list[_Limit]:
    limits = ask.limits
    # Where the window is hardly longer than an answer may take, money that nobody ended may leave it before it leaves
    # the ring of open money: there only what is surely in both is open.
    window = now_us // US_PER_SECOND - limits.window_seconds + pending_bucket_seconds_of(ask.pending_seconds) - 1
    day = now_us // US_PER_SECOND // SECONDS_PER_DAY * SECONDS_PER_DAY
    hour = now_us // US_PER_SECOND // SECONDS_PER_HOUR * SECONDS_PER_HOUR
    day_ends, hour_ends = day + SECONDS_PER_DAY, hour + SECONDS_PER_HOUR
    mine, net, all_ = keys.pending_identifier, keys.pending_network, keys.pending_global
    recent, network_recent = spent.recent, spent.network_recent
    network_window = limits.network_window_nanousd
    return [
        _Limit(DAILY_LIMIT, spent.daily_nanousd, limits.day_nanousd, mine, day, day_ends),
        _Limit(WINDOW_LIMIT, sum(recent.values()), limits.window_nanousd, mine, window, None, recent),
        _Limit(NETWORK_LIMIT, sum(network_recent.values()), network_window, net, window, None, network_recent),
        _Limit(NETWORK_DAILY_LIMIT, spent.network_daily_nanousd, limits.network_day_nanousd, net, day, day_ends),
        _Limit(GLOBAL_HOURLY_LIMIT, spent.global_hourly_nanousd, limits.global_hour_nanousd, all_, hour, hour_ends),
        _Limit(GLOBAL_DAILY_LIMIT, spent.global_daily_nanousd, limits.global_day_nanousd, all_, day, day_ends),
    ]


def _ring_fits_at(ring: Buckets, limit: int, cost: int, bucket_seconds: int, window_seconds: int, now_us: int) -> int:
    left = sum(ring.values())
    for start in sorted(ring):
        left -= ring[start]
        if left + cost <= limit:
            return start + bucket_seconds + window_seconds
    return now_us // US_PER_SECOND + window_seconds + bucket_seconds


def decide(ask: Ask, spent: Spent, keys: BookKeys, read_open: Callable[[str], Buckets], now_us: int) -> Decision:
    """Whether all limits have room for `ask`; `read_open` is asked only where one has not."""
    limits = _limits(ask, spent, keys, now_us)
    decision = _decide(ask, ask.cost_nanousd, limits, read_open, now_us)
    if decision.status == ADMITTED or decision.busy or ask.at_least_nanousd is None:
        return decision
    room = min(each.limit_nanousd - each.spent_nanousd for each in limits if each.limit_nanousd is not None)
    if room >= ask.at_least_nanousd:
        return Decision(ADMITTED, now_us, held_nanousd=room)
    return _decide(ask, ask.at_least_nanousd, limits, read_open, now_us)


def _decide(
    ask: Ask, cost_nanousd: int, limits: Sequence[_Limit], read_open: Callable[[str], Buckets], now_us: int
) -> Decision:
    """The same for so much, all of it or nothing."""
    window = ask.limits.window_seconds
    bucket = bucket_seconds_of(window)
    status, busy, ends_at = ADMITTED, True, 0
    for each in limits:
        if each.limit_nanousd is None or each.spent_nanousd + cost_nanousd <= each.limit_nanousd:
            continue
        status = status or each.status
        held = _open_since(read_open(each.open_key), ask.pending_seconds, each.since_seconds, now_us)
        busy = busy and each.spent_nanousd - held + cost_nanousd <= each.limit_nanousd
        ring_end = _ring_fits_at(each.ring or {}, each.limit_nanousd, cost_nanousd, bucket, window, now_us)
        ends_at = max(ends_at, each.ends_at_seconds or ring_end)
    if status == ADMITTED:
        return Decision(ADMITTED, now_us, held_nanousd=cost_nanousd)
    # Nothing that was spent stands in the way of what can never fit: its marker ends by itself.
    is_own_fault = _exceeds_a_limit(ask.limits, cost_nanousd)
    wait = 1 if busy or is_own_fault else max(1, -(-(ends_at * US_PER_SECOND - now_us) // US_PER_SECOND))
    return _refused(ask.limits, status, wait, now_us, busy=busy)


def _open_since(ring: Buckets, pending_seconds: int, since_seconds: int, now_us: int) -> int:
    bucket = pending_bucket_seconds_of(pending_seconds)
    living = alive(ring, bucket, pending_seconds, now_us)
    return sum(held for start, held in living.items() if start + bucket > since_seconds)


def _refused(limits: Limits, status: int, wait: int, now_us: int, *, busy: bool) -> Decision:
    if status not in STATUS_OF_CAUSE.values() or (busy and not limits.mark_when_busy):
        return Decision(status, now_us, 0, wait, busy, status)
    seconds = limits.throttle_seconds * (2 if status == STATUS_OF_CAUSE["daily_limit"] else 1)
    wait = max(wait, seconds)
    cause = REASON_OF_STATUS[status].value
    marker = f"{cause} {now_us + seconds * US_PER_SECOND} {now_us + wait * US_PER_SECOND} {'busy' if busy else 'spent'}"
    return Decision(status, now_us, seconds, wait, busy, status, marker)


def limit_of(limits: Limits, reason: Reason) -> int | None:
    """The amount that `reason` compares with, in nano-dollars."""
    return {
        Reason.DAILY_LIMIT: limits.day_nanousd,
        Reason.WINDOW_LIMIT: limits.window_nanousd,
        Reason.NETWORK_LIMIT: limits.network_window_nanousd,
        Reason.NETWORK_DAILY_LIMIT: limits.network_day_nanousd,
        Reason.GLOBAL_HOURLY_LIMIT: limits.global_hour_nanousd,
        Reason.GLOBAL_DAILY_LIMIT: limits.global_day_nanousd,
    }.get(reason)


def can_never_fit(ask: Ask) -> bool:
    """Whether it asks for more than a whole limit."""
    return _exceeds_a_limit(ask.limits, ask.least_nanousd)


def _exceeds_a_limit(limits: Limits, cost_nanousd: int) -> bool:
    amounts = [limit_of(limits, each) for each in SCOPE_OF_REASON]
    return any(limit is not None and cost_nanousd > limit for limit in amounts)


def refusal_of(ask: Ask, decision: Decision) -> Refusal:
    """The refusal that a decision stands for."""
    reason, cause = REASON_OF_STATUS[decision.status], REASON_OF_STATUS[decision.cause]
    never_fits = can_never_fit(ask)
    return Refusal(
        reason=reason,
        cause=cause,
        scope=SCOPE_OF_REASON[cause],
        retry_after_seconds=None if never_fits else max(1, decision.wait_seconds),
        in_flight=decision.busy and not never_fits,
        can_never_fit=never_fits,
        marker_seconds=decision.marker_seconds,
        limit_nanousd=limit_of(ask.limits, reason),
    )


def known_record(ask: Ask, record: Record | None) -> Record | None:
    """The open record of a request that is sent again; None for a new one.

    Raises:
        ReservationConflict: the id stands for another request, or has ended.
    """
    if record is None:
        return None
    if record.request_digest != request_digest_of(ask):
        raise ReservationConflict("the reservation id is known, and " + CONFLICT_TEXT[CONFLICT])
    if record.state != "open":
        raise ReservationConflict("the reservation id is known, and " + CONFLICT_TEXT[ENDED])
    return record


def open_record(reservation: Reservation, record: Record | None, now_us: int) -> Record:
    """The record of a reservation that may be extended.

    Raises:
        ReservationConflict: there is none, it has ended, it is past its time, or it stands for another request.
    """
    if record is not None and record.request_digest != reservation.request_digest:
        raise ReservationConflict("the reservation id is known, and " + CONFLICT_TEXT[CONFLICT])
    window, made = reservation.window_seconds, reservation.made_at_us // US_PER_SECOND
    start = made - made % bucket_seconds_of(window)
    is_past_its_time = now_us >= reservation.made_at_us + reservation.pending_seconds * US_PER_SECOND
    is_over = is_past_its_time or not bucket_counts(start, window, now_us)
    if record is None or record.state != "open" or is_over:
        raise ReservationConflict("the reservation id is known, and " + CONFLICT_TEXT[ENDED])
    return record


def found(ask: Ask, backend: str, record: Record | None) -> Reservation | None:
    """The open reservation that a record stands for, if it is the one of `ask`."""
    if record is None or record.state != "open":
        return None
    if record.request_digest != request_digest_of(ask):
        return None
    return known_reservation(ask, backend, record)


def known_reservation(
    ask: Ask,
    backend: str,
    record: Record,
    *,
    window_nanousd: int = 0,
    day_nanousd: int = 0,
    window_frees_at_seconds: int = 0,
) -> Reservation:
    """The reservation that `ask` became before: its lengths are those of then, whatever the limits say now."""
    return reservation_of(
        ask,
        backend,
        record.request_digest,
        record.made_at_us,
        record.nanousd,
        window_seconds=record.window_seconds,
        pending_seconds=record.pending_seconds,
        window_nanousd=window_nanousd,
        day_nanousd=day_nanousd,
        window_frees_at_seconds=window_frees_at_seconds,
    )


def reservation_of(  # noqa: PLR0913 (what only the decision knows)
    ask: Ask,
    backend: str,
    request_digest: str,
    made_at_us: int,
    held_nanousd: int,
    *,
    window_seconds: int,
    pending_seconds: int,
    window_nanousd: int = 0,
    day_nanousd: int = 0,
    window_frees_at_seconds: int = 0,
    expired_nanousd: int = 0,
) -> Reservation:
    """The reservation that an admitted `ask` became. The lengths are those of its first time."""
    return Reservation(
        ask.reservation_id,
        ask.identifier,
        ask.network,
        held_nanousd,
        request_digest,
        made_at_us,
        window_seconds,
        pending_seconds,
        backend,
        window_nanousd,
        day_nanousd,
        window_frees_at_seconds,
        ask.idempotency,
        expired_nanousd,
    )


def since(ring: Buckets, since_seconds: int) -> int:
    """What a ring holds in buckets that start at `since_seconds` or later."""
    return sum(held for start, held in ring.items() if start >= since_seconds)


def window_frees_at(ring: Buckets, window_seconds: int, now_us: int) -> int:
    """Unix time at which the oldest amount leaves the window; of an empty one, what is booked now."""
    bucket = bucket_seconds_of(window_seconds)
    now = now_us // US_PER_SECOND
    return min(ring, default=now - now % bucket) + bucket + window_seconds


@dataclass(frozen=True, slots=True)
class Charge:
    """An increment that `reserve` makes and `settle` corrects. `member` is the bucket of a ring, None for a total."""

    key: str
    member: int | None
    ttl_seconds: int
    """From now until the key may go, as a reservation sets it."""
    is_pending: bool = False

    @property
    def bucket_ends_at_seconds(self) -> int | None:
        """Unix time that a ring of a window must live to see: it may not where the window has grown since.

        None for a total, and for a ring of open money: that length changes with a restart at most, and limits nothing.
        """
        return None if self.member is None or self.is_pending else self.member + self.ttl_seconds


def charges(
    keys: BookKeys, window_seconds: int, made_at_us: int, now_us: int, *, is_cleared: bool = False
) -> list[Charge]:
    """Where a reservation made at `made_at_us` is booked: two rings and four totals.

    With `is_cleared` its identifier's books were cleared since: it is not in them any more.
    """
    made, now = made_at_us // US_PER_SECOND, now_us // US_PER_SECOND
    bucket = bucket_seconds_of(window_seconds)
    start, ring_life = made - made % bucket, window_seconds + bucket
    day_life = (made // SECONDS_PER_DAY + 2) * SECONDS_PER_DAY - now
    hour_life = (made // SECONDS_PER_HOUR + 3) * SECONDS_PER_HOUR - now
    mine = [] if is_cleared else [Charge(keys.recent, start, ring_life), Charge(keys.daily, None, day_life)]
    return [
        *mine,
        Charge(keys.network_recent, start, ring_life),
        Charge(keys.network_daily, None, day_life),
        Charge(keys.global_hourly, None, hour_life),
        Charge(keys.global_daily, None, day_life),
    ]


def pending_charges(keys: BookKeys, pending_seconds: int, made_at_us: int, *, is_cleared: bool = False) -> list[Charge]:
    """Where its open money is remembered."""
    bucket = pending_bucket_seconds_of(pending_seconds)
    made = made_at_us // US_PER_SECOND
    start = made - made % bucket
    life = pending_seconds + bucket
    mine = [] if is_cleared else [Charge(keys.pending_identifier, start, life, is_pending=True)]
    # Everybody's is kept as long as records are: whoever comes after a lull tells what nobody ended before it.
    return [
        *mine,
        Charge(keys.pending_network, start, life, is_pending=True),
        Charge(keys.pending_global, start, life + RECORD_KEEP_SECONDS, is_pending=True),
    ]


def was_cleared(reset_text: bytes | None, made_at_us: int) -> bool:
    """Whether an identifier's books were cleared after a reservation was made."""
    return reset_text is not None and reset_text.isdigit() and made_at_us <= int(reset_text)


def expired_in(ring: Buckets, pending_seconds: int, own_start: int | None, own_nanousd: int, now_us: int) -> int:
    """What a ring of open money holds of reservations whose time is over, but for one's own."""
    living = alive(ring, pending_bucket_seconds_of(pending_seconds), pending_seconds, now_us)
    return sum(
        max(0, held - (own_nanousd if start == own_start else 0)) for start, held in ring.items() if start not in living
    )


def ended_in(
    ring: Buckets, pending_seconds: int, own_start: int | None, held_nanousd: int, now_us: int
) -> tuple[list[int], bool]:
    """Of a ring of open money: the buckets that go, and whether something is left in the bucket of one's own."""
    living = alive(ring, pending_bucket_seconds_of(pending_seconds), pending_seconds, now_us)
    gone = [start for start in ring if start not in living]
    if own_start not in living or own_start is None:
        return gone, False
    if living[own_start] <= held_nanousd:
        return [*gone, own_start], False
    return gone, True


def places_of(limits: Limits, spent: Spent, *, is_cleared: bool) -> list[tuple[int, int, int | None]]:
    """Of each limit in the order in which they are checked: its status, what is spent, the limit."""
    return [
        (DAILY_LIMIT, spent.daily_nanousd, None if is_cleared else limits.day_nanousd),
        (WINDOW_LIMIT, sum(spent.recent.values()), None if is_cleared else limits.window_nanousd),
        (NETWORK_LIMIT, sum(spent.network_recent.values()), limits.network_window_nanousd),
        (NETWORK_DAILY_LIMIT, spent.network_daily_nanousd, limits.network_day_nanousd),
        (GLOBAL_HOURLY_LIMIT, spent.global_hourly_nanousd, limits.global_hour_nanousd),
        (GLOBAL_DAILY_LIMIT, spent.global_daily_nanousd, limits.global_day_nanousd),
    ]


def extended(
    reservation: Reservation, spent: Spent, held_nanousd: int, more_nanousd: int, *, is_cleared: bool
) -> Reservation:
    """A reservation that holds more now."""
    mine = 0 if is_cleared else more_nanousd
    return replace(
        reservation,
        cost_nanousd=held_nanousd,
        window_spent_nanousd=sum(spent.recent.values()) + mine,
        day_spent_nanousd=spent.daily_nanousd + mine,
    )


def extension_charges(reservation: Reservation, keys: BookKeys, now_us: int, *, is_cleared: bool) -> list[Charge]:
    """Where an extension is booked: in the periods in which its reservation was made."""
    made_at_us = reservation.made_at_us
    return [
        *charges(keys, reservation.window_seconds, made_at_us, now_us, is_cleared=is_cleared),
        *pending_charges(keys, reservation.pending_seconds, made_at_us, is_cleared=is_cleared),
    ]


def decide_extension(
    places: Sequence[tuple[int, int, int | None]], held_nanousd: int, to_nanousd: int, at_least_nanousd: int
) -> tuple[int, int]:
    """Status and what is held in all; of each limit in order: its status, what is spent, the limit."""
    more, status = max(0, to_nanousd - held_nanousd), ADMITTED
    for its_status, spent, limit in places:
        if limit is None:
            continue
        room = limit - spent
        if room < at_least_nanousd - held_nanousd and status == ADMITTED:
            status = its_status
        more = min(more, max(0, room))
    if status != ADMITTED and at_least_nanousd > held_nanousd:
        return status, held_nanousd
    return ADMITTED, held_nanousd + more


def extension_refused(status: int, limits: Limits) -> Refusal:
    """A refusal of an extension: the reason and the scope; there is nothing to wait for."""
    reason = REASON_OF_STATUS[status]
    return Refusal(
        reason=reason,
        cause=reason,
        scope=SCOPE_OF_REASON[reason],
        retry_after_seconds=None,
        in_flight=False,
        can_never_fit=False,
        marker_seconds=0,
        limit_nanousd=limit_of(limits, reason),
    )


def bucket_counts(start_seconds: int, window_seconds: int, now_us: int) -> bool:
    """Whether a bucket of the window still counts."""
    return (start_seconds + bucket_seconds_of(window_seconds) + window_seconds) * US_PER_SECOND > now_us


def is_past_keeping(reservation: Reservation, now_us: int) -> bool:
    """Whether a missing record may be gone because its time is over; before that it was lost.

    An end, which may come at once, is remembered for `RECORD_KEEP_SECONDS`: from then on a settlement said again must
    not be taken for one whose record was lost, or it would be booked twice.
    """
    return now_us >= reservation.made_at_us + RECORD_KEEP_SECONDS * US_PER_SECOND


def change_of(charge: Charge, held: int | None, delta: int, window_seconds: int, now_us: int) -> int:
    """What a settlement adds to one place: nothing goes below zero, and what has aged out is not made again."""
    over = (
        charge.ttl_seconds <= 0 if charge.member is None else not bucket_counts(charge.member, window_seconds, now_us)
    )
    if over or (held is None and delta < 0):
        return 0
    return max(delta, -(held or 0))


def end_without_booking(reservation: Reservation, record: Record | None, now_us: int) -> Settlement | None:
    """The answer to a settlement that has nothing left to book, or None.

    Raises:
        ReservationConflict: the id stands for another request.
    """
    if record is None:
        if is_past_keeping(reservation, now_us):
            return settlement_of(reservation, Outcome.EXPIRED, reservation.cost_nanousd)
        return None
    if record.request_digest != reservation.request_digest:
        raise ReservationConflict("the reservation id is known, and " + CONFLICT_TEXT[CONFLICT])
    if record.state != "open":
        return Settlement(reservation.reservation_id, Outcome.REPEATED, record.nanousd, 0)
    return None


def outcome_of(ending: str, outcome: Outcome) -> Outcome:
    """How an end is told: a release is one only where there was something to release."""
    return Outcome.RELEASED if ending == "released" and outcome is Outcome.SETTLED else outcome


def settlement_of(
    reservation: Reservation, outcome: Outcome, booked_nanousd: int, expired_nanousd: int = 0
) -> Settlement:
    """A settlement with its overrun."""
    overrun = max(0, booked_nanousd - reservation.cost_nanousd)
    return Settlement(reservation.reservation_id, outcome, booked_nanousd, overrun, expired_nanousd)
