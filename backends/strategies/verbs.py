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
from backends.clock import US_PER_SECOND
from backends.contract import Ask, Books, Duplicate, Idempotency, Limits, Refusal, Reservation, Settlement, Verdict
from backends.keys import (
    IDEMPOTENCY_KEEP_SECONDS,
    LIVE_PENDING_BUCKETS,
    RECORD_KEEP_SECONDS,
    SECONDS_PER_DAY,
    BookKeys,
    book_keys,
    bucket_seconds_of,
    idempotency_key,
    reset_key,
)
from backends.store import Words
from backends.strategies import arithmetic, outcomes
from backends.strategies.arithmetic import BUDGETS, PENDING, Charge, Totals

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
    keys = book_keys(ask.reservation_id, ask.identifier, ask.network, now_us // US_PER_SECOND)
    seen = yield Read(_reads_of_reserve(ask, keys))
    record = outcomes.known_record(ask, records.parse_record(seen(_get(keys.record))))
    if record is not None:
        return _known(ask, backend, record, keys, seen, now_us)
    duplicate = _duplicate(ask, seen, now_us)
    if duplicate is not None:
        return duplicate
    decision = _decision_of_marker(ask, keys, seen, now_us)
    if decision is not None:
        return outcomes.refusal_of(ask, decision)
    totals = _totals(keys, ask.limits.window_seconds, seen, now_us)
    decision = arithmetic.decide(ask, totals, keys, lambda key: _buckets(seen, key), now_us)
    if decision.set_marker is not None:
        yield Write((_set(keys.marker, decision.set_marker, decision.marker_seconds),))
    if decision.status != arithmetic.ADMITTED:
        return outcomes.refusal_of(ask, decision)
    reservation = _admitted(ask, backend, decision.reserved_nanousd, totals, now_us)
    expired = yield from _book_reservation(ask, reservation, keys, seen, now_us)
    return replace(reservation, expired_nanousd=expired)


def extend(
    reservation: Reservation, to_nanousd: int, at_least_nanousd: int, limits: Limits, now_us: int
) -> Verb[Reservation | Refusal]:
    """See `contract.Backend.extend`."""
    keys = outcomes.keys_of(reservation)
    seen = yield Read(_reads_of(reservation, keys))
    record = outcomes.extendable(reservation, records.parse_record(seen(_get(keys.record))), now_us)
    is_cleared = _was_cleared(reservation, seen)
    totals = _totals(keys, reservation.window_seconds, seen, now_us)
    rows = list(totals.rows(limits, is_cleared=is_cleared))
    status, reserved = arithmetic.decide_extension(rows, record.nanousd, to_nanousd, at_least_nanousd)
    if status != arithmetic.ADMITTED:
        return outcomes.extension_refused(status, limits)
    more = reserved - record.nanousd
    if more:
        first = _extended_records(reservation, keys, reserved, seen)
        made_at_us, pending = reservation.made_at_us, reservation.pending_seconds
        charges = arithmetic.charges(keys, reservation.window_seconds, made_at_us, now_us, is_cleared=is_cleared)
        charges += arithmetic.pending_charges(keys, pending, made_at_us, is_cleared=is_cleared)
        bookings = [_changed(charge, more, _booked_at(charge, seen)) for charge in charges]
        yield from _book(first, bookings)
    return outcomes.extended(reservation, totals, reserved, more, is_cleared=is_cleared)


def end(reservation: Reservation, ending: str, actual_nanousd: int, now_us: int) -> Verb[Settlement]:
    """See `contract.Backend.settle` and `release`; `ending` is ``settled`` or ``released``."""
    keys = outcomes.keys_of(reservation)
    seen = yield Read(_reads_of(reservation, keys))
    record = records.parse_record(seen(_get(keys.record)))
    ended = outcomes.end_without_booking(reservation, record, now_us)
    if ended is not None:
        return ended
    is_cleared = _was_cleared(reservation, seen)
    outcome = outcomes.outcome_of(ending, is_late=record is None)
    reserved = 0 if record is None else record.nanousd
    text = records.record_of(reservation, ending, actual_nanousd).text()
    first = [_set(keys.record, text, RECORD_KEEP_SECONDS)]
    first += _ended_idempotency(reservation, ending, actual_nanousd, seen, now_us)
    bookings = _corrections(reservation, keys, actual_nanousd - reserved, seen, now_us, is_cleared=is_cleared)
    emptied = [_remove_empty(each.charge.key) for each in bookings if each.leaves_nothing]
    removed, expired = _no_more_pending(reservation, keys, reserved, seen, now_us, is_cleared=is_cleared)
    yield from _book(first, bookings, [*emptied, *removed])
    return outcomes.settlement_of(reservation, outcome, actual_nanousd, expired)


def find(ask: Ask, backend: str) -> Verb[Reservation | None]:
    """See `contract.Backend.find`."""
    command = _get(book_keys(ask.reservation_id, ask.identifier, ask.network, 0).record)
    seen = yield Read((command,))
    return outcomes.found(ask, backend, records.parse_record(seen(command)))


def find_duplicate(idempotency: Idempotency, now_us: int) -> Verb[Duplicate | None]:
    """See `contract.Backend.find_duplicate`."""
    command = _get(idempotency_key(idempotency.digest))
    seen = yield Read((command,))
    return records.duplicate_of(seen(command), idempotency, now_us)


def books(identifier: str, network: str, window_seconds: int, now_us: int) -> Verb[Books]:
    """See `contract.Backend.books`; the one `Read` is answered as of one moment."""
    keys = book_keys("", identifier, network, now_us // US_PER_SECOND)
    totals_of, pending_of = _reads_of_totals(keys), _all_of(keys.pending_identifier)
    marker, marker_ttl = _reads_of_marker(keys)
    seen = yield Read((*totals_of, pending_of, marker, marker_ttl))
    totals = _totals(keys, window_seconds, seen, now_us)
    pending, recent = _buckets(seen, keys.pending_identifier), totals.windows["recent"]
    today = now_us // US_PER_SECOND // SECONDS_PER_DAY * SECONDS_PER_DAY
    return Books(
        window_nanousd=totals.amounts["recent"],
        day_nanousd=totals.amounts["daily"],
        network_window_nanousd=totals.amounts["network_recent"],
        network_day_nanousd=totals.amounts["network_daily"],
        global_hour_nanousd=totals.amounts["global_hourly"],
        global_day_nanousd=totals.amounts["global_daily"],
        pending_nanousd=sum(pending.values()),
        pending_today_nanousd=sum(nanousd for start, nanousd in pending.items() if start >= today),
        window_frees_at_seconds=arithmetic.window_frees_at(recent, window_seconds, now_us) if recent else None,
        marker=arithmetic.marker_of(seen(marker), int(seen(marker_ttl)), now_us),
        as_of_us=now_us,
    )


# What is read.


def _get(key: str) -> Words:
    return ("GET", key)


def _all_of(key: str) -> Words:
    return ("ZRANGE", key, 0, -1, "WITHSCORES")


def _reads_of_marker(keys: BookKeys) -> tuple[Words, Words]:
    return (_get(keys.marker), ("PTTL", keys.marker))


def _reads_of_reserve(ask: Ask, keys: BookKeys) -> tuple[Words, ...]:
    known = () if ask.idempotency is None else (_get(idempotency_key(ask.idempotency.digest)),)
    return (_get(keys.record), *known, *_reads_of_marker(keys), *_reads_of_totals(keys), *_reads_of_pending(keys))


def _reads_of(reservation: Reservation, keys: BookKeys) -> tuple[Words, ...]:
    idempotency = reservation.idempotency
    known = () if idempotency is None else (_get(idempotency_key(idempotency.digest)),)
    first = (_get(keys.record), _get(reset_key(reservation.identifier)), *known)
    return (*first, *_reads_of_totals(keys), *_reads_of_pending(keys))


def _reads_of_totals(keys: BookKeys) -> tuple[Words, ...]:
    return tuple(
        (_all_of if budget.period_seconds is None else _get)(getattr(keys, budget.total)) for budget in BUDGETS
    )


def _reads_of_pending(keys: BookKeys) -> tuple[Words, ...]:
    return tuple(_all_of(getattr(keys, pending)) for _, pending in PENDING)


def _buckets(seen: Replies, key: str) -> dict[int, int]:
    flat: Sequence[Any] = seen(_all_of(key))
    return {int(start): int(float(nanousd)) for start, nanousd in zip(flat[::2], flat[1::2], strict=True)}


def _window(seen: Replies, key: str, window_seconds: int, now_us: int) -> dict[int, int]:
    """The buckets that count."""
    return arithmetic.live_buckets(_buckets(seen, key), bucket_seconds_of(window_seconds), window_seconds, now_us)


def _totals(keys: BookKeys, window_seconds: int, seen: Replies, now_us: int) -> Totals:
    amounts, windows = {}, {}
    for budget in BUDGETS:
        key = getattr(keys, budget.total)
        if budget.period_seconds is None:
            windows[budget.total] = _window(seen, key, window_seconds, now_us)
            amounts[budget.total] = sum(windows[budget.total].values())
        else:
            amounts[budget.total] = arithmetic.amount(seen(_get(key)))
    return Totals(amounts, windows)


def _booked_at(charge: Charge, seen: Replies) -> int | None:
    """What is booked where a charge belongs; None where there is nothing."""
    if charge.member is not None:
        return _buckets(seen, charge.key).get(charge.member)
    text = seen(_get(charge.key))
    return None if text is None else arithmetic.amount(text)


def _duplicate(ask: Ask, seen: Replies, now_us: int) -> Duplicate | None:
    if ask.idempotency is None:
        return None
    return records.duplicate_of(seen(_get(idempotency_key(ask.idempotency.digest))), ask.idempotency, now_us)


def _decision_of_marker(ask: Ask, keys: BookKeys, seen: Replies, now_us: int) -> arithmetic.Decision | None:
    marker, marker_ttl = _reads_of_marker(keys)
    text = seen(marker)
    left_ms = -1 if text is None else int(seen(marker_ttl))
    return arithmetic.decision_of_marker(text, left_ms, ask.limits.throttle_seconds, now_us)


def _was_cleared(reservation: Reservation, seen: Replies) -> bool:
    return arithmetic.was_cleared(seen(_get(reset_key(reservation.identifier))), reservation.made_at_us)


def _known(ask: Ask, backend: str, record: records.Record, keys: BookKeys, seen: Replies, now_us: int) -> Reservation:
    window = ask.limits.window_seconds
    recent = _window(seen, keys.recent, window, now_us)
    return outcomes.known_reservation(
        ask,
        backend,
        record,
        window_nanousd=sum(recent.values()),
        day_nanousd=arithmetic.amount(seen(_get(keys.daily))),
        window_frees_at_seconds=arithmetic.window_frees_at(recent, window, now_us),
    )


def _admitted(ask: Ask, backend: str, reserved_nanousd: int, totals: Totals, now_us: int) -> Reservation:
    window = ask.limits.window_seconds
    return Reservation(
        reservation_id=ask.reservation_id,
        identifier=ask.identifier,
        network=ask.network,
        cost_nanousd=reserved_nanousd,
        request_digest=outcomes.request_digest_of(ask),
        made_at_us=now_us,
        window_seconds=window,
        pending_seconds=ask.pending_seconds,
        backend=backend,
        window_spent_nanousd=totals.amounts["recent"] + reserved_nanousd,
        day_spent_nanousd=totals.amounts["daily"] + reserved_nanousd,
        window_frees_at_seconds=arithmetic.window_frees_at(totals.windows["recent"], window, now_us),
        idempotency=ask.idempotency,
    )


# What is written.


def _set(key: str, text: str, ttl_seconds: int) -> Words:
    return ("SET", key, text, "EX", ttl_seconds)


def _remove(key: str, starts: Sequence[int]) -> list[Words]:
    return [("ZREM", key, *starts)] if starts else []


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
    left_ms = (charge.member + charge.ttl_seconds) * 1_000 - now_us // 1_000
    return _Booking(charge, nanousd, ("PEXPIRE", charge.key, left_ms), read_ttl, left_ms)


def _changed(charge: Charge, nanousd: int, booked: int | None) -> _Booking:
    """A TTL is never shortened, and prolonged only for what was not there."""
    expiry = _expiry_of(charge)
    if booked:
        is_emptied = charge.member is not None and booked + nanousd <= 0
        return _Booking(charge, nanousd, expiry, leaves_nothing=is_emptied)
    if charge.member is None:
        return _Booking(charge, nanousd, expiry, expiry)
    return _Booking(charge, nanousd, expiry, ("TTL", charge.key), charge.ttl_seconds)


def _expiry_of(charge: Charge) -> Words:
    return ("EXPIRE", charge.key, charge.ttl_seconds)


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


def _book_reservation(ask: Ask, reservation: Reservation, keys: BookKeys, seen: Replies, now_us: int) -> Verb[int]:
    """Book all of it; of the reservations that had expired, how much was swept (nano-dollars)."""
    window, reserved = ask.limits.window_seconds, reservation.cost_nanousd
    charges = arithmetic.charges(keys, window, now_us, now_us)
    charges += arithmetic.pending_charges(keys, ask.pending_seconds, now_us)
    swept, expired = _sweeps(ask, keys, seen, now_us)
    bookings = [_reserved(charge, reserved, seen, now_us) for charge in charges]
    # The record comes last: one that is found proves that all was charged, and may be taken back as a whole.
    yield from _book(swept, bookings, [*_over(ask, keys, seen, now_us), *_records(ask, reservation, keys, now_us)])
    return expired


def _records(ask: Ask, reservation: Reservation, keys: BookKeys, now_us: int) -> list[Words]:
    record = records.record_of(reservation, "open", reservation.cost_nanousd).text()
    commands = [_set(keys.record, record, ask.pending_seconds + RECORD_KEEP_SECONDS)]
    if ask.idempotency is not None:
        text = records.in_flight_text(reservation, ask.idempotency, now_us)
        commands.append(_set(idempotency_key(ask.idempotency.digest), text, IDEMPOTENCY_KEEP_SECONDS))
    return commands


def _extended_records(reservation: Reservation, keys: BookKeys, reserved: int, seen: Replies) -> list[Words]:
    commands: list[Words] = [("SET", keys.record, records.record_of(reservation, "open", reserved).text(), "KEEPTTL")]
    if reservation.idempotency is not None:
        key = idempotency_key(reservation.idempotency.digest)
        text = records.extended_text(seen(_get(key)), reservation.reservation_id, reserved)
        if text is not None:
            commands.append(("SET", key, text, "KEEPTTL"))
    return commands


def _over(ask: Ask, keys: BookKeys, seen: Replies, now_us: int) -> list[Words]:
    """Remove the buckets that have left the windows."""
    window, commands = ask.limits.window_seconds, []
    for key in (keys.recent, keys.network_recent):
        live = _window(seen, key, window, now_us)
        commands += _remove(key, [start for start in _buckets(seen, key) if start not in live])
    return commands


def _sweeps(ask: Ask, keys: BookKeys, seen: Replies, now_us: int) -> tuple[list[Words], int]:
    """Where a new bucket makes pending buckets too many, remove what is over; of the global ones, how much that was."""
    commands, expired = [], 0
    for charge in arithmetic.pending_charges(keys, ask.pending_seconds, now_us):
        buckets = _buckets(seen, charge.key)
        if charge.member not in buckets and len(buckets) > LIVE_PENDING_BUCKETS:
            live = arithmetic.live_pending(buckets, ask.pending_seconds, now_us)
            commands += _remove(charge.key, [start for start in buckets if start not in live])
            if charge.key == keys.pending_global:
                expired = arithmetic.expired_in(buckets, ask.pending_seconds, None, 0, now_us)
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
    reservation: Reservation, keys: BookKeys, delta: int, seen: Replies, now_us: int, *, is_cleared: bool
) -> list[_Booking]:
    window, made_at_us = reservation.window_seconds, reservation.made_at_us
    bookings = []
    for charge in arithmetic.charges(keys, window, made_at_us, now_us, is_cleared=is_cleared):
        booked = _booked_at(charge, seen)
        change = arithmetic.change_of(charge, booked, delta, window, now_us)
        if change:
            bookings.append(_changed(charge, change, booked))
    return bookings


def _no_more_pending(
    reservation: Reservation, keys: BookKeys, reserved: int, seen: Replies, now_us: int, *, is_cleared: bool
) -> tuple[list[Words], int]:
    """Remove this reservation's pending money and what has expired; of the global one, how much has expired."""
    pending_seconds, commands, expired = reservation.pending_seconds, [], 0
    own = arithmetic.pending_charges(keys, pending_seconds, reservation.made_at_us, is_cleared=is_cleared)
    own_start = {charge.key: charge.member for charge in own} if reserved else {}
    for _, pending in PENDING:
        key = getattr(keys, pending)
        start, buckets = own_start.get(key), _buckets(seen, key)
        live = arithmetic.live_pending(buckets, pending_seconds, now_us)
        if start is not None and start in live:
            commands += [("ZINCRBY", key, -reserved, start), _remove_empty(key)]
        commands += _remove(key, [each for each in buckets if each not in live])
        if key == keys.pending_global:
            expired = arithmetic.expired_in(buckets, pending_seconds, start, reserved, now_us)
    return commands, expired
