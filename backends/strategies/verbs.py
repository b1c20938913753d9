"""The verbs as commands to a store, for the strategies that decide in Python: one set for all of them.

A verb is a generator of steps. It yields what it reads (`Read`), decides, and yields what it writes (`Write`). What is
read and what follows from it stands here; how the commands travel is the strategy:

* ``legacy`` sends each command by itself, when it is needed;
* ``multi`` sends all reads in one transaction and all writes in another;
* ``watch`` ties its writes to its reads: they are done if nothing that was read has changed, else all begins anew;
* ``memory`` hands them to a dictionary, under a lock.

A `Read` is answered with a function that gives the reply to one of its commands, a `Write` with the list of replies.
Amounts are written as increments, never as totals, so that the books show an overspend instead of losing it. The reply
to an increment decides nothing but whether its key needs a TTL.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from backends import records
from backends.budgets import Budget, Scope, check, owner_in
from backends.clock import US_PER_SECOND
from backends.contract import (
    Ask,
    Books,
    BudgetUse,
    Duplicate,
    Idempotency,
    Refusal,
    Reservation,
    Settlement,
    Verdict,
)
from backends.keys import (
    IDEMPOTENCY_KEEP_SECONDS,
    LIVE_PENDING_BUCKETS,
    RECORD_KEEP_SECONDS,
    Row,
    idempotency_key,
    marker_key,
    record_key,
    reset_key,
    rows_at,
    running_key,
)
from backends.store import Words
from backends.strategies import arithmetic, outcomes
from backends.strategies.arithmetic import Charge, Total

T = TypeVar("T")
Replies = Callable[[Words], Any]
"""The reply to one of the commands of a `Read`."""


@dataclass(frozen=True, slots=True)
class Read:
    """All that a decision may need to see, in the order in which it may be needed. It changes nothing."""

    commands: tuple[Words, ...]

    def replies(self, replies: Sequence[Any]) -> Replies:
        """The answer, where all were sent at once."""
        return dict(zip(self.commands, replies, strict=True)).__getitem__

    @property
    def keys(self) -> list[str]:
        """The keys that are read."""
        return list(dict.fromkeys(str(words[1]) for words in self.commands))


@dataclass(frozen=True, slots=True)
class Write:
    """Commands that are done in this order."""

    commands: tuple[Words, ...]


Verb = Generator[Read | Write, Any, T]


def perform(verb: Verb[T], answer: Callable[[Read | Write], Any]) -> T:
    """The result of a verb whose steps are answered by `answer`."""
    reply: Any = None
    while True:
        try:
            step = verb.send(reply)
        except StopIteration as end:
            result: T = end.value
            return result
        reply = answer(step)


def reserve(ask: Ask, backend: str, now_us: int) -> Verb[Verdict]:
    """See `contract.Backend.reserve`."""
    check(ask.budgets)
    rows = rows_at(ask.budgets, now_us // US_PER_SECOND)
    seen = yield Read(_reads_of_reserve(ask, rows))
    record = outcomes.known_record(ask, records.parse_record(seen(_get(record_key(ask.reservation_id)))))
    if record is not None:
        totals = _totals(rows, seen, now_us)
        spent, renews_at = [total.nanousd for total in totals], [total.renews_at(now_us) for total in totals]
        return outcomes.known_reservation(ask, backend, record, spent, renews_at)
    duplicate = _duplicate(ask, seen, now_us)
    if duplicate is not None:
        return duplicate
    decision = _decision_of_marker(ask, seen, now_us)
    if decision is not None:
        return outcomes.refusal_of(ask, decision)
    totals = _totals(rows, seen, now_us)
    decision = arithmetic.decide(ask, totals, lambda key: _pending(seen, key), now_us)
    if decision.set_marker is not None:
        yield Write((_set(marker_key(ask.identifier), decision.set_marker, decision.marker_seconds),))
    if decision.status != arithmetic.ADMITTED:
        return outcomes.refusal_of(ask, decision)
    reservation = _admitted(ask, backend, decision, totals)
    expired = yield from _book_reservation(ask, reservation, rows, seen, now_us)
    return replace(reservation, expired_nanousd=expired)


def extend(
    reservation: Reservation, to_nanousd: int, at_least_nanousd: int, budgets: Sequence[Budget], now_us: int
) -> Verb[Reservation | Refusal]:
    """See `contract.Backend.extend`."""
    rows = outcomes.rows_of(reservation)
    seen = yield Read(_reads_of(reservation, rows))
    record = outcomes.extendable(reservation, _record(reservation, seen), now_us)
    is_cleared = _was_cleared(reservation, seen)
    booked = arithmetic.still_booked(rows, is_cleared=is_cleared)
    totals = _totals(rows, seen, now_us)
    counted = [total for total in totals if total.row in booked]
    refusing, reserved = arithmetic.decide_extension(counted, budgets, record.nanousd, to_nanousd, at_least_nanousd)
    if refusing is not None:
        return outcomes.extension_refused(refusing.total.row, by_share=refusing.share is not None)
    more = reserved - record.nanousd
    if more:
        charges = arithmetic.charges(booked, reservation.made_at_us, now_us)
        charges += _own_pending(reservation, record, booked, seen)
        bookings = [_changed(charge, more, _booked_at(charge, seen)) for charge in charges]
        yield from _book(_extended_records(reservation, record, reserved, seen), bookings, _forget_running(booked))
    return outcomes.extended(reservation, totals, reserved, more, is_cleared=is_cleared)


def end(reservation: Reservation, ending: str, actual_nanousd: int, now_us: int) -> Verb[Settlement]:
    """See `contract.Backend.settle` and `release`; `ending` is ``settled`` or ``released``."""
    rows = outcomes.rows_of(reservation)
    seen = yield Read(_reads_of(reservation, rows))
    record = _record(reservation, seen)
    ended = outcomes.end_without_booking(reservation, record, now_us)
    if ended is not None:
        return ended
    booked = arithmetic.still_booked(rows, is_cleared=_was_cleared(reservation, seen))
    outcome = outcomes.outcome_of(ending, is_late=record is None)
    reserved = 0 if record is None else record.nanousd
    text = _record_text(reservation, rows, ending, actual_nanousd)
    first = [_set(record_key(reservation.reservation_id), text, RECORD_KEEP_SECONDS)]
    first += _ended_idempotency(reservation, ending, actual_nanousd, seen, now_us)
    delta = actual_nanousd - reserved
    bookings = _corrections(reservation, booked, delta, seen, now_us)
    forgotten = _forget_running(booked) if bookings else []
    emptied = [_remove_empty(each.charge.key) for each in bookings if each.leaves_nothing]
    own = [] if record is None else _own_pending(reservation, record, booked, seen)
    removed, expired = _no_more_pending(reservation, rows, own, reserved, seen, now_us)
    yield from _book(first, bookings, [*forgotten, *emptied, *removed])
    return outcomes.settlement_of(reservation, outcome, actual_nanousd, expired)


def find(ask: Ask, backend: str) -> Verb[Reservation | None]:
    """See `contract.Backend.find`."""
    command = _get(record_key(ask.reservation_id))
    seen = yield Read((command,))
    return outcomes.found(ask, backend, records.parse_record(seen(command)))


def find_duplicate(idempotency: Idempotency, now_us: int) -> Verb[Duplicate | None]:
    """See `contract.Backend.find_duplicate`."""
    command = _get(idempotency_key(idempotency.digest))
    seen = yield Read((command,))
    return records.duplicate_of(seen(command), idempotency, now_us)


def books(budgets: tuple[Budget, ...], now_us: int) -> Verb[Books]:
    """See `contract.Backend.books`; the one `Read` is answered as of one moment."""
    rows, identifier = rows_at(budgets, now_us // US_PER_SECOND), owner_in(budgets, Scope.IDENTIFIER)
    reads = _reads_of_marker(identifier) if identifier else ()
    seen = yield Read((*_reads_of_totals(rows), *_reads_of_pending(rows), *reads))
    uses = tuple(_use(total, _pending(seen, total.row.pending_key), now_us) for total in _totals(rows, seen, now_us))
    marker = arithmetic.marker_of(seen(reads[0]), int(seen(reads[1])), now_us) if reads else None
    return Books(uses, marker, now_us)


def _use(total: Total, pending: arithmetic.Pending, now_us: int) -> BudgetUse:
    since, row = total.row.layout.start_seconds, total.row
    held = sum(
        nanousd
        for member, nanousd in pending.items()
        if records.start_of(member) >= since and records.is_charged_to(member, row)
    )
    is_empty = not total.buckets if total.row.layout.window_seconds else not total.nanousd
    return BudgetUse(total.row.budget, total.nanousd, held, None if is_empty else total.renews_at(now_us))


# What is read.


def _get(key: str) -> Words:
    return ("GET", key)


def _all_of(key: str) -> Words:
    return ("ZRANGE", key, 0, -1, "WITHSCORES")


def _reads_of_marker(identifier: str) -> tuple[Words, Words]:
    return (_get(marker_key(identifier)), ("PTTL", marker_key(identifier)))


def _reads_of_reserve(ask: Ask, rows: Sequence[Row]) -> tuple[Words, ...]:
    known = () if ask.idempotency is None else (_get(idempotency_key(ask.idempotency.digest)),)
    marker = _reads_of_marker(ask.identifier) if ask.identifier else ()
    first = (_get(record_key(ask.reservation_id)), *known, *marker)
    return (*first, *_reads_of_totals(rows), *_reads_of_pending(rows))


def _reads_of(reservation: Reservation, rows: Sequence[Row]) -> tuple[Words, ...]:
    idempotency, identifier = reservation.idempotency, reservation.identifier
    known = () if idempotency is None else (_get(idempotency_key(idempotency.digest)),)
    reset = (_get(reset_key(identifier)),) if identifier else ()
    first = (_get(record_key(reservation.reservation_id)), *reset, *known)
    return (*first, *_reads_of_totals(rows), *_reads_of_pending(rows))


def _reads_of_totals(rows: Sequence[Row]) -> tuple[Words, ...]:
    return tuple((_all_of if row.layout.window_seconds else _get)(row.key) for row in rows)


def _reads_of_pending(rows: Sequence[Row]) -> tuple[Words, ...]:
    return tuple(map(_all_of, arithmetic.pending_keys(rows)))


def _buckets(seen: Replies, key: str) -> dict[int, int]:
    flat: Sequence[Any] = seen(_all_of(key))
    return {int(start): int(float(nanousd)) for start, nanousd in zip(flat[::2], flat[1::2], strict=True)}


def _pending(seen: Replies, key: str) -> dict[records.Member, int]:
    flat: Sequence[Any] = seen(_all_of(key))
    pairs = zip(flat[::2], flat[1::2], strict=True)
    return {records.member_in(member): int(float(nanousd)) for member, nanousd in pairs}


def _totals(rows: Sequence[Row], seen: Replies, now_us: int) -> list[Total]:
    return [_total(row, seen, now_us) for row in rows]


def _total(row: Row, seen: Replies, now_us: int) -> Total:
    window = row.layout.window_seconds
    if not window:
        return Total(row, arithmetic.amount(seen(_get(row.key))), {})
    live = arithmetic.live_buckets(_buckets(seen, row.key), row.bucket_seconds, window, now_us)
    return Total(row, sum(live.values()), live)


def _booked_at(charge: Charge, seen: Replies) -> int | None:
    """What is booked where a charge belongs; None where there is nothing."""
    if charge.member is not None:
        return _pending(seen, charge.key).get(charge.member)
    text = seen(_get(charge.key))
    return None if text is None else arithmetic.amount(text)


def _record(reservation: Reservation, seen: Replies) -> records.Record | None:
    return records.parse_record(seen(_get(record_key(reservation.reservation_id))))


def _duplicate(ask: Ask, seen: Replies, now_us: int) -> Duplicate | None:
    if ask.idempotency is None:
        return None
    return records.duplicate_of(seen(_get(idempotency_key(ask.idempotency.digest))), ask.idempotency, now_us)


def _decision_of_marker(ask: Ask, seen: Replies, now_us: int) -> arithmetic.Decision | None:
    if not ask.identifier:
        return None
    marker, marker_ttl = _reads_of_marker(ask.identifier)
    text = seen(marker)
    left_ms = -1 if text is None else int(seen(marker_ttl))
    return arithmetic.decision_of_marker(text, left_ms, arithmetic.by_hand_seconds(ask), now_us)


def _was_cleared(reservation: Reservation, seen: Replies) -> bool:
    if not reservation.identifier:
        return False
    return arithmetic.was_cleared(seen(_get(reset_key(reservation.identifier))), reservation.made_at_us)


def _admitted(ask: Ask, backend: str, decision: arithmetic.Decision, totals: Sequence[Total]) -> Reservation:
    reserved, now_us = decision.reserved_nanousd, decision.now_us
    return Reservation(
        reservation_id=ask.reservation_id,
        cost_nanousd=reserved,
        budgets=ask.budgets,
        request_digest=outcomes.request_digest_of(ask),
        made_at_us=now_us,
        pending_seconds=ask.pending_seconds,
        backend=backend,
        spent_nanousd=tuple(total.nanousd + reserved for total in totals),
        renews_at_seconds=tuple(total.renews_at(now_us) for total in totals),
        idempotency=ask.idempotency,
        over_shadow=decision.over_shadow,
    )


# What is written.


def _set(key: str, text: str, ttl_seconds: int) -> Words:
    return ("SET", key, text, "EX", ttl_seconds)


def _remove(key: str, members: Sequence[records.Member]) -> list[Words]:
    return [("ZREM", key, *members)] if members else []


def _remove_empty(key: str) -> Words:
    """By what they hold and not by name: another caller may have booked there since."""
    return ("ZREMRANGEBYSCORE", key, "-inf", 0)


@dataclass(frozen=True, slots=True)
class _Booking:
    """An increment, up or down."""

    charge: Charge
    nanousd: int
    expiry: Words
    then: Words = ()
    """Sent after the increment: the expiry where the key is new, or what reads a TTL that may be too short."""
    least_ttl: int = 0
    """A TTL below this is too short."""
    leaves_nothing: bool = False
    """Whether its bucket is empty then, by what was read."""

    @property
    def increment(self) -> Words:
        key, member = self.charge.key, self.charge.member
        return ("INCRBY", key, self.nanousd) if member is None else ("ZINCRBY", key, self.nanousd, member)


def _reserved(charge: Charge, nanousd: int, seen: Replies, now_us: int) -> _Booking:
    """A window has to live until each of its buckets ends; its TTL may be shorter where the window has grown since."""
    expiry, read_ttl = _expiry_of(charge), ("PTTL", charge.key)
    if not _booked_at(charge, seen):
        return _Booking(charge, nanousd, expiry, expiry)
    if charge.member is None:
        return _Booking(charge, nanousd, expiry)
    if charge.is_pending:
        # The caller that made the bucket may have been stopped before it gave the key its TTL. The length of pending
        # money changes with a restart at most, and limits nothing.
        return _Booking(charge, nanousd, expiry, read_ttl)
    left_ms = charge.counts_until_seconds * 1_000 - now_us // 1_000
    return _Booking(charge, nanousd, ("PEXPIRE", charge.key, left_ms), read_ttl, left_ms)


def _changed(charge: Charge, nanousd: int, booked: int | None) -> _Booking:
    """A TTL is never shortened, and prolonged only for what was not there."""
    expiry = _expiry_of(charge)
    if booked:
        is_emptied = charge.member is not None and booked + nanousd <= 0
        return _Booking(charge, nanousd, expiry, leaves_nothing=is_emptied)
    if charge.member is None:
        return _Booking(charge, nanousd, expiry, expiry)
    return _Booking(charge, nanousd, expiry, ("TTL", charge.key), charge.ttl_seconds or 0)


def _expiry_of(charge: Charge) -> Words:
    return () if charge.ttl_seconds is None else ("EXPIRE", charge.key, charge.ttl_seconds)


def _book(first: Sequence[Words], bookings: Sequence[_Booking], last: Sequence[Words] = ()) -> Verb[None]:
    """Each increment with its expiry; then a TTL for what is new after all, because another caller emptied it since."""
    commands, placed = list(first), []
    for each in bookings:
        placed.append(len(commands))
        commands += [each.increment, each.then] if each.then else [each.increment]
    replies = yield Write((*commands, *last))
    late = [_late_expiry(each, replies[at : at + 2]) for each, at in zip(bookings, placed, strict=True)]
    if any(late):
        yield Write(tuple(expiry for expiry in late if expiry))


def _late_expiry(booking: _Booking, replies: Sequence[Any]) -> Words | None:
    """The expiry that is needed after all, by the replies to the increment and to what came after it."""
    if not booking.then:
        is_new = int(float(replies[0])) == booking.nanousd
        return booking.expiry if is_new else None
    if booking.then == booking.expiry:
        return None
    left = int(replies[1])
    if left < 0:
        return _expiry_of(booking.charge)
    return booking.expiry if left < booking.least_ttl else None


def _book_reservation(ask: Ask, reservation: Reservation, rows: Sequence[Row], seen: Replies, now_us: int) -> Verb[int]:
    """Book all of it; of the reservations that had expired, how much was swept (nano-dollars)."""
    charges = arithmetic.charges(rows, now_us, now_us)
    charges += arithmetic.pending_charges(rows, ask.pending_seconds, now_us)
    swept, expired = _sweeps(ask, rows, seen, now_us)
    bookings = [_reserved(charge, reservation.cost_nanousd, seen, now_us) for charge in charges]
    # The record comes last: one that is found proves that all was charged, and may be taken back as a whole.
    after = [*_forget_running(rows), *_over(rows, seen, now_us), *_records(ask, reservation, rows, now_us)]
    yield from _book(swept, bookings, after)
    return expired


def _record_text(reservation: Reservation, rows: Sequence[Row], state: str, nanousd: int) -> str:
    charged_to = records.charged_to(rows, reservation.pending_seconds)
    return records.record_text(state, nanousd, reservation.made_at_us, reservation.request_digest, charged_to)


def _records(ask: Ask, reservation: Reservation, rows: Sequence[Row], now_us: int) -> list[Words]:
    text = _record_text(reservation, rows, "open", reservation.cost_nanousd)
    commands = [_set(record_key(ask.reservation_id), text, ask.pending_seconds + RECORD_KEEP_SECONDS)]
    if ask.idempotency is not None:
        text = records.in_flight_text(reservation, ask.idempotency, now_us)
        commands.append(_set(idempotency_key(ask.idempotency.digest), text, IDEMPOTENCY_KEEP_SECONDS))
    return commands


def _extended_records(reservation: Reservation, record: records.Record, reserved: int, seen: Replies) -> list[Words]:
    text = replace(record, nanousd=reserved).text()
    commands: list[Words] = [("SET", record_key(reservation.reservation_id), text, "KEEPTTL")]
    if reservation.idempotency is not None:
        key = idempotency_key(reservation.idempotency.digest)
        known = records.extended_text(seen(_get(key)), reservation.reservation_id, reserved)
        if known is not None:
            commands.append(("SET", key, known, "KEEPTTL"))
    return commands


def _over(rows: Sequence[Row], seen: Replies, now_us: int) -> list[Words]:
    """Remove the buckets that have left the windows."""
    commands = []
    for row in rows:
        if row.layout.window_seconds:
            live = _total(row, seen, now_us).buckets
            commands += _remove(row.key, [start for start in _buckets(seen, row.key) if start not in live])
    return commands


def _sweeps(ask: Ask, rows: Sequence[Row], seen: Replies, now_us: int) -> tuple[list[Words], int]:
    """Where a new member makes pending money's too many, remove what is over; of the global one, how much that was."""
    scopes, commands, expired = arithmetic.pending_keys(rows), [], 0
    for charge in arithmetic.pending_charges(rows, ask.pending_seconds, now_us):
        pending = _pending(seen, charge.key)
        if charge.member not in pending and len(pending) > LIVE_PENDING_BUCKETS:
            live = arithmetic.live_pending(pending, ask.pending_seconds, now_us)
            commands += _remove(charge.key, [member for member in pending if member not in live])
            if scopes[charge.key] is Scope.GLOBAL:
                expired = arithmetic.expired_in(pending, ask.pending_seconds, None, 0, now_us)
    return commands, expired


def _ended_idempotency(
    reservation: Reservation, ending: str, actual_nanousd: int, seen: Replies, now_us: int
) -> list[Words]:
    idempotency = reservation.idempotency
    if idempotency is None:
        return []
    key = idempotency_key(idempotency.digest)
    known = seen(_get(key))
    is_ours = records.owner_of(known) == reservation.reservation_id
    if ending == "settled" and (known is None or is_ours):
        text = records.settled_text(reservation, idempotency, actual_nanousd, now_us)
        return [_set(key, text, IDEMPOTENCY_KEEP_SECONDS)]
    return [("DEL", key)] if is_ours else []


def _corrections(
    reservation: Reservation, booked_in: Sequence[Row], delta: int, seen: Replies, now_us: int
) -> list[_Booking]:
    bookings = []
    for charge in arithmetic.charges(booked_in, reservation.made_at_us, now_us):
        booked = _booked_at(charge, seen)
        change = arithmetic.change_of(charge, booked, delta, now_us)
        if change:
            bookings.append(_changed(charge, change, booked))
    return bookings


def _forget_running(rows: Sequence[Row]) -> list[Words]:
    """What `reserve.lua` has noted of windows holds while nothing but its present bucket changes.

    Which that is depends on Redis' clock. It comes after the increments: what is noted between has to go too.
    """
    windows = [row for row in rows if row.layout.window_seconds]
    return [("DEL", *(running_key(row.key) for row in windows))] if windows else []


def _own_pending(
    reservation: Reservation, record: records.Record, booked_in: Sequence[Row], seen: Replies
) -> list[Charge]:
    """Where the reservation of a record has its pending money, by what the record says and not by today's budgets."""
    start = arithmetic.pending_start(reservation.pending_seconds, reservation.made_at_us)
    return [
        arithmetic.pending_charge(
            key, scope, reservation.pending_seconds, records.own_member(_pending(seen, key), record, start)
        )
        for key, scope in arithmetic.pending_keys(booked_in).items()
    ]


def _no_more_pending(
    reservation: Reservation, rows: Sequence[Row], own: Sequence[Charge], reserved: int, seen: Replies, now_us: int
) -> tuple[list[Words], int]:
    """Remove this reservation's `own` pending money and what has expired; of the global, how much has expired."""
    pending_seconds, commands, expired = reservation.pending_seconds, [], 0
    own_at = {charge.key: charge.member for charge in own} if reserved else {}
    for key, scope in arithmetic.pending_keys(rows).items():
        member, pending = own_at.get(key), _pending(seen, key)
        live = arithmetic.live_pending(pending, pending_seconds, now_us)
        if member is not None and member in live:
            commands += [("ZINCRBY", key, -reserved, member), _remove_empty(key)]
        commands += _remove(key, [each for each in pending if each not in live])
        if scope is Scope.GLOBAL:
            expired = arithmetic.expired_in(pending, pending_seconds, member, reserved, now_us)
    return commands, expired
