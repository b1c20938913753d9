"""The verbs as calls to Redis, for the strategies that decide here and not in a script.

A verb is a talk with the store: it looks (`Look`), it decides, it writes (`Write`). What is asked and what follows from
the answers is the same for all of them, and stands here. How the calls travel is the strategy:

* ``legacy`` sends each by itself, as it is needed;
* ``multi`` sends all looks in one transaction and all writes in another;
* ``watch`` ties its writes to its looks: they are done if nobody has changed since what was seen, else all begins anew.

A talk is a generator. It is answered with a function that gives the reply to one of the looks, and with the list of
the replies to the writes. What is written are increments, never totals, so that the books show an overspend instead of
losing it. The reply to an increment decides nothing but whether its key needs a life.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, TypeVar

from backends.clock import US_PER_SECOND
from backends.contract import (
    Ask,
    Duplicate,
    Idempotency,
    Limits,
    Outcome,
    Refusal,
    Reservation,
    Settlement,
    Verdict,
)
from backends.keys import (
    IDEMPOTENCY_KEEP_SECONDS,
    LIVE_PENDING_BUCKETS,
    RECORD_KEEP_SECONDS,
    BookKeys,
    book_keys,
    bucket_seconds_of,
    idempotency_key,
    pending_bucket_seconds_of,
    reset_key,
)
from backends.records import (
    Record,
    duplicate_of,
    extended_text,
    in_flight_text,
    owner_of,
    parse_record,
    record_of,
    settled_text,
)
from backends.store import Words
from backends.strategies import arithmetic

T = TypeVar("T")
Seen = Callable[[Words], Any]
"""Of one of the commands of a look, the reply."""


@dataclass(frozen=True, slots=True)
class Look:
    """All that may have to be seen; changes nothing. The answer is a `Seen`."""

    commands: tuple[Words, ...]

    def seen(self, replies: Sequence[Any]) -> Seen:
        """The answer where all was asked at once."""
        return dict(zip(self.commands, replies, strict=True)).__getitem__

    @property
    def keys(self) -> list[str]:
        """What is looked at."""
        return list(dict.fromkeys(str(words[1]) for words in self.commands))


@dataclass(frozen=True, slots=True)
class Write:
    """What is written, in this order. The answer: the replies."""

    commands: tuple[Words, ...]
    is_charge: bool = False
    """Whether it charges what was found to fit: the race lives right before it."""


Talk = Generator[Look | Write, Any, T]


def held(talk: Talk[T], answer: Callable[[Look | Write], Any]) -> T:
    """What a talk comes to, when each of its steps is answered so."""
    told: Any = None
    while True:
        try:
            step = talk.send(told)
        except StopIteration as end:
            result: T = end.value
            return result
        told = answer(step)


def reserve(ask: Ask, backend: str, now_us: int) -> Talk[Verdict]:
    """As `contract.Backend.reserve`."""
    keys = book_keys(ask.reservation_id, ask.identifier, ask.network, now_us // US_PER_SECOND)
    window = ask.limits.window_seconds
    seen = yield Look(_looks_of_reserve(ask, keys))
    record = arithmetic.known_record(ask, parse_record(seen(_get(keys.record))))
    if record is not None:
        return _known(ask, backend, record, keys, seen, now_us)
    duplicate = _duplicate(ask, seen, now_us)
    if duplicate is not None:
        return duplicate
    decision = _decision_of_marker(ask, keys, seen, now_us)
    if decision is not None:
        return arithmetic.refusal_of(ask, decision)
    spent = _spent(keys, window, seen, now_us)
    decision = arithmetic.decide(ask, spent, keys, lambda key: _ring(seen, key), now_us)
    if decision.set_marker is not None:
        yield Write((_set(keys.marker, decision.set_marker, decision.marker_seconds),))
    if decision.status != arithmetic.ADMITTED:
        return arithmetic.refusal_of(ask, decision)
    reservation = arithmetic.reservation_of(
        ask,
        backend,
        arithmetic.request_digest_of(ask),
        now_us,
        decision.held_nanousd,
        window_seconds=window,
        pending_seconds=ask.pending_seconds,
        window_nanousd=sum(spent.recent.values()) + decision.held_nanousd,
        day_nanousd=spent.daily_nanousd + decision.held_nanousd,
        window_frees_at_seconds=arithmetic.window_frees_at(spent.recent, window, now_us),
    )
    swept, expired = _sweeps(ask, keys, seen, now_us)
    charges = arithmetic.charges(keys, window, now_us, now_us) + arithmetic.pending_charges(
        keys, ask.pending_seconds, now_us
    )
    bookings = [_reserved(charge, decision.held_nanousd, seen, now_us) for charge in charges]
    # The record comes last: one that is found says that all was charged, and may be taken back as a whole.
    last = [*_over(ask, keys, seen, now_us), *_remembered(ask, reservation, keys, now_us)]
    yield from _book(swept, bookings, last, is_charge=True)
    return replace(reservation, expired_nanousd=expired)


def extend(
    reservation: Reservation, to_nanousd: int, at_least_nanousd: int, limits: Limits, now_us: int
) -> Talk[Reservation | Refusal]:
    """As `contract.Backend.extend`."""
    keys = arithmetic.keys_of(reservation)
    seen = yield Look(_looks_of(reservation, keys))
    record = arithmetic.open_record(reservation, parse_record(seen(_get(keys.record))), now_us)
    is_cleared = _was_cleared(reservation, seen)
    spent = _spent(keys, reservation.window_seconds, seen, now_us)
    places = arithmetic.places_of(limits, spent, is_cleared=is_cleared)
    status, held = arithmetic.decide_extension(places, record.nanousd, to_nanousd, at_least_nanousd)
    if status != arithmetic.ADMITTED:
        return arithmetic.extension_refused(status, limits)
    more = held - record.nanousd
    if more:
        first = _extended_records(reservation, keys, held, seen)
        charges = arithmetic.extension_charges(reservation, keys, now_us, is_cleared=is_cleared)
        bookings = [_changed(charge, more, _seen_at(charge, seen)) for charge in charges]
        yield from _book(first, bookings, is_charge=True)
    return arithmetic.extended(reservation, spent, held, more, is_cleared=is_cleared)


def end(reservation: Reservation, ending: str, actual_nanousd: int, now_us: int) -> Talk[Settlement]:
    """As `contract.Backend.settle` and `release`; `ending` is ``settled`` or ``released``."""
    keys = arithmetic.keys_of(reservation)
    seen = yield Look(_looks_of(reservation, keys))
    record = parse_record(seen(_get(keys.record)))
    ended = arithmetic.end_without_booking(reservation, record, now_us)
    if ended is not None:
        return ended
    is_cleared = _was_cleared(reservation, seen)
    outcome = Outcome.LATE if record is None else arithmetic.outcome_of(ending, Outcome.SETTLED)
    held = 0 if record is None else record.nanousd
    text = record_of(reservation, ending, actual_nanousd).text()
    first = [_set(keys.record, text, RECORD_KEEP_SECONDS)]
    first += _ended_idempotency(reservation, ending, actual_nanousd, seen, now_us)
    bookings = _corrections(reservation, keys, actual_nanousd - held, seen, now_us, is_cleared=is_cleared)
    emptied = [_remove_empty(each.charge.key) for each in bookings if each.leaves_nothing]
    forgotten, expired = _forgotten(reservation, keys, held, seen, now_us, is_cleared=is_cleared)
    yield from _book(first, bookings, [*emptied, *forgotten])
    return arithmetic.settlement_of(reservation, outcome, actual_nanousd, expired)


def find(ask: Ask, backend: str) -> Talk[Reservation | None]:
    """As `contract.Backend.find`."""
    look = _get(book_keys(ask.reservation_id, ask.identifier, ask.network, 0).record)
    seen = yield Look((look,))
    return arithmetic.found(ask, backend, parse_record(seen(look)))


def find_duplicate(idempotency: Idempotency, now_us: int) -> Talk[Duplicate | None]:
    """As `contract.Backend.find_duplicate`."""
    look = _get(idempotency_key(idempotency.digest))
    seen = yield Look((look,))
    return duplicate_of(seen(look), idempotency, now_us)


# What is looked at.


def _get(key: str) -> Words:
    return ("GET", key)


def _all_of(key: str) -> Words:
    return ("ZRANGE", key, 0, -1, "WITHSCORES")


def _looks_of_reserve(ask: Ask, keys: BookKeys) -> tuple[Words, ...]:
    """In the order in which they may be needed."""
    known = () if ask.idempotency is None else (_get(idempotency_key(ask.idempotency.digest)),)
    marker = (_get(keys.marker), ("PTTL", keys.marker))
    return (_get(keys.record), *known, *marker, *_looks_at_amounts(keys))


def _looks_of(reservation: Reservation, keys: BookKeys) -> tuple[Words, ...]:
    idempotency = reservation.idempotency
    known = () if idempotency is None else (_get(idempotency_key(idempotency.digest)),)
    return (_get(keys.record), _get(reset_key(reservation.identifier)), *known, *_looks_at_amounts(keys))


def _looks_at_amounts(keys: BookKeys) -> tuple[Words, ...]:
    return (
        _all_of(keys.recent),
        _get(keys.daily),
        _all_of(keys.network_recent),
        _get(keys.network_daily),
        _get(keys.global_hourly),
        _get(keys.global_daily),
        _all_of(keys.pending_identifier),
        _all_of(keys.pending_network),
        _all_of(keys.pending_global),
    )


def _ring(seen: Seen, key: str) -> dict[int, int]:
    flat: Sequence[Any] = seen(_all_of(key))
    return {int(start): int(float(held)) for start, held in zip(flat[::2], flat[1::2], strict=True)}


def _living(seen: Seen, key: str, window_seconds: int, now_us: int) -> dict[int, int]:
    return arithmetic.alive(_ring(seen, key), bucket_seconds_of(window_seconds), window_seconds, now_us)


def _spent(keys: BookKeys, window_seconds: int, seen: Seen, now_us: int) -> arithmetic.Spent:
    return arithmetic.Spent(
        recent=_living(seen, keys.recent, window_seconds, now_us),
        daily_nanousd=arithmetic.amount(seen(_get(keys.daily))),
        network_recent=_living(seen, keys.network_recent, window_seconds, now_us),
        network_daily_nanousd=arithmetic.amount(seen(_get(keys.network_daily))),
        global_hourly_nanousd=arithmetic.amount(seen(_get(keys.global_hourly))),
        global_daily_nanousd=arithmetic.amount(seen(_get(keys.global_daily))),
    )


def _seen_at(charge: arithmetic.Charge, seen: Seen) -> int | None:
    """What was seen where a charge belongs; None where nothing is."""
    if charge.member is not None:
        return _ring(seen, charge.key).get(charge.member)
    text = seen(_get(charge.key))
    return None if text is None else arithmetic.amount(text)


def _duplicate(ask: Ask, seen: Seen, now_us: int) -> Duplicate | None:
    if ask.idempotency is None:
        return None
    return duplicate_of(seen(_get(idempotency_key(ask.idempotency.digest))), ask.idempotency, now_us)


def _decision_of_marker(ask: Ask, keys: BookKeys, seen: Seen, now_us: int) -> arithmetic.Decision | None:
    text = seen(_get(keys.marker))
    left_ms = -1 if text is None else int(seen(("PTTL", keys.marker)))
    return arithmetic.decision_of_marker(text, left_ms, ask.limits.throttle_seconds, now_us)


def _was_cleared(reservation: Reservation, seen: Seen) -> bool:
    return arithmetic.was_cleared(seen(_get(reset_key(reservation.identifier))), reservation.made_at_us)


def _known(ask: Ask, backend: str, record: Record, keys: BookKeys, seen: Seen, now_us: int) -> Reservation:
    window = ask.limits.window_seconds
    recent = _living(seen, keys.recent, window, now_us)
    return arithmetic.known_reservation(
        ask,
        backend,
        record,
        window_nanousd=sum(recent.values()),
        day_nanousd=arithmetic.amount(seen(_get(keys.daily))),
        window_frees_at_seconds=arithmetic.window_frees_at(recent, window, now_us),
    )


# What is written.


def _set(key: str, text: str, ttl_seconds: int) -> Words:
    return ("SET", key, text, "EX", ttl_seconds)


def _remove(key: str, starts: Sequence[int]) -> list[Words]:
    return [("ZREM", key, *starts)] if starts else []


def _remove_empty(key: str) -> Words:
    """By what they hold and not by name: somebody may have booked there since."""
    return ("ZREMRANGEBYSCORE", key, "-inf", 0)


class _Life(Enum):
    """What a booking does to the life of its key."""

    GIVEN = "given"
    """Nothing was there, so it begins."""
    ASKED = "asked"
    """It is asked for, and begins anew if it is too short."""
    KEPT = "kept"


@dataclass(frozen=True, slots=True)
class _Booking:
    """An increment, or what is taken back."""

    charge: arithmetic.Charge
    nanousd: int
    life: _Life
    expiry: Words
    how_long: Words = ()
    """How a life is asked for, where it is."""
    enough: int = 0
    """An answer below this is too short."""
    leaves_nothing: bool = False
    """Whether its bucket of a ring is empty then, by what was seen."""

    @property
    def increment(self) -> Words:
        key, member = self.charge.key, self.charge.member
        return ("INCRBY", key, self.nanousd) if member is None else ("ZINCRBY", key, self.nanousd, member)


def _reserved(charge: arithmetic.Charge, nanousd: int, seen: Seen, now_us: int) -> _Booking:
    """A ring lives to see the end of each bucket; it may not where the window has grown since."""
    if not _seen_at(charge, seen):
        return _Booking(charge, nanousd, _Life.GIVEN, _expiry_of(charge))
    if charge.member is None:
        return _Booking(charge, nanousd, _Life.KEPT, _expiry_of(charge))
    how_long, ends_at = ("PTTL", charge.key), charge.bucket_ends_at_seconds
    if ends_at is None:
        # Whoever made the bucket may have been stopped before it gave the ring its life.
        return _Booking(charge, nanousd, _Life.ASKED, _expiry_of(charge), how_long)
    left_ms = ends_at * 1_000 - now_us // 1_000
    return _Booking(charge, nanousd, _Life.ASKED, ("PEXPIRE", charge.key, left_ms), how_long, left_ms)


def _changed(charge: arithmetic.Charge, nanousd: int, there: int | None) -> _Booking:
    """A life is never shortened, and prolonged only for what was not there."""
    if there:
        is_emptied = charge.member is not None and there + nanousd <= 0
        return _Booking(charge, nanousd, _Life.KEPT, _expiry_of(charge), leaves_nothing=is_emptied)
    if charge.member is None:
        return _Booking(charge, nanousd, _Life.GIVEN, _expiry_of(charge))
    return _Booking(charge, nanousd, _Life.ASKED, _expiry_of(charge), ("TTL", charge.key), charge.ttl_seconds)


def _expiry_of(charge: arithmetic.Charge) -> Words:
    return ("EXPIRE", charge.key, charge.ttl_seconds)


def _book(
    first: Sequence[Words], bookings: Sequence[_Booking], last: Sequence[Words] = (), *, is_charge: bool = False
) -> Talk[None]:
    """Each increment with its expiry; then a life for what is new after all, because somebody emptied it meanwhile."""
    commands, placed = list(first), []
    for each in bookings:
        placed.append(len(commands))
        commands.append(each.increment)
        if each.life is _Life.GIVEN:
            commands.append(each.expiry)
        if each.life is _Life.ASKED:
            commands.append(each.how_long)
    replies = yield Write((*commands, *last), is_charge)
    late = [_late_life(each, replies[at : at + 2]) for each, at in zip(bookings, placed, strict=True)]
    if any(late):
        yield Write(tuple(expiry for expiry in late if expiry))


def _late_life(booking: _Booking, replies: Sequence[Any]) -> Words | None:
    """The expiry that is needed after all, by the replies to the increment and to what came after it."""
    if booking.life is _Life.ASKED:
        left = int(replies[1])
        if left < 0:
            return _expiry_of(booking.charge)
        return booking.expiry if left < booking.enough else None
    is_new = int(float(replies[0])) == booking.nanousd
    return booking.expiry if booking.life is _Life.KEPT and is_new else None


def _remembered(ask: Ask, reservation: Reservation, keys: BookKeys, now_us: int) -> list[Words]:
    record = record_of(reservation, "open", reservation.cost_nanousd).text()
    commands = [_set(keys.record, record, ask.pending_seconds + RECORD_KEEP_SECONDS)]
    if ask.idempotency is not None:
        text = in_flight_text(reservation, ask.idempotency, now_us)
        commands.append(_set(idempotency_key(ask.idempotency.digest), text, IDEMPOTENCY_KEEP_SECONDS))
    return commands


def _extended_records(reservation: Reservation, keys: BookKeys, held: int, seen: Seen) -> list[Words]:
    commands: list[Words] = [("SET", keys.record, record_of(reservation, "open", held).text(), "KEEPTTL")]
    if reservation.idempotency is not None:
        key = idempotency_key(reservation.idempotency.digest)
        text = extended_text(seen(_get(key)), reservation.reservation_id, held)
        if text is not None:
            commands.append(("SET", key, text, "KEEPTTL"))
    return commands


def _over(ask: Ask, keys: BookKeys, seen: Seen, now_us: int) -> list[Words]:
    """The buckets that have left the windows."""
    window, commands = ask.limits.window_seconds, []
    for key in (keys.recent, keys.network_recent):
        living = _living(seen, key, window, now_us)
        commands += _remove(key, [start for start in _ring(seen, key) if start not in living])
    return commands


def _sweeps(ask: Ask, keys: BookKeys, seen: Seen, now_us: int) -> tuple[list[Words], int]:
    """Rings of open money that a new bucket makes too long lose what is over; of everybody's, how much that was."""
    commands, expired = [], 0
    for charge in arithmetic.pending_charges(keys, ask.pending_seconds, now_us):
        ring = _ring(seen, charge.key)
        if charge.member not in ring and len(ring) > LIVE_PENDING_BUCKETS:
            living = arithmetic.alive(ring, pending_bucket_seconds_of(ask.pending_seconds), ask.pending_seconds, now_us)
            commands += _remove(charge.key, [start for start in ring if start not in living])
            if charge.key == keys.pending_global:
                expired = arithmetic.expired_in(ring, ask.pending_seconds, None, 0, now_us)
    return commands, expired


def _ended_idempotency(
    reservation: Reservation, ending: str, actual_nanousd: int, seen: Seen, now_us: int
) -> list[Words]:
    idempotency = reservation.idempotency
    if idempotency is None:
        return []
    key = idempotency_key(idempotency.digest)
    known = seen(_get(key))
    is_ours = owner_of(known) == reservation.reservation_id
    if ending == "settled" and (known is None or is_ours):
        text = settled_text(reservation, idempotency, actual_nanousd, now_us)
        return [_set(key, text, IDEMPOTENCY_KEEP_SECONDS)]
    return [("DEL", key)] if is_ours else []


def _corrections(
    reservation: Reservation, keys: BookKeys, delta: int, seen: Seen, now_us: int, *, is_cleared: bool
) -> list[_Booking]:
    window, made_at_us = reservation.window_seconds, reservation.made_at_us
    bookings = []
    for charge in arithmetic.charges(keys, window, made_at_us, now_us, is_cleared=is_cleared):
        there = _seen_at(charge, seen)
        change = arithmetic.change_of(charge, there, delta, window, now_us)
        if change:
            bookings.append(_changed(charge, change, there))
    return bookings


def _forgotten(
    reservation: Reservation, keys: BookKeys, held: int, seen: Seen, now_us: int, *, is_cleared: bool
) -> tuple[list[Words], int]:
    """This one's money leaves the rings of open money, and so does what is over; of everybody's, how much that was."""
    pending_seconds, commands, expired = reservation.pending_seconds, [], 0
    mine = arithmetic.pending_charges(keys, pending_seconds, reservation.made_at_us, is_cleared=is_cleared)
    own_start = {charge.key: charge.member for charge in mine}
    for key in (keys.pending_identifier, keys.pending_network, keys.pending_global):
        own, ring = own_start.get(key) if held else None, _ring(seen, key)
        living = arithmetic.alive(ring, pending_bucket_seconds_of(pending_seconds), pending_seconds, now_us)
        if own is not None and own in living:
            commands += [("ZINCRBY", key, -held, own), _remove_empty(key)]
        commands += _remove(key, [start for start in ring if start not in living])
        if key == keys.pending_global:
            expired = arithmetic.expired_in(ring, pending_seconds, own, held, now_us)
    return commands, expired
