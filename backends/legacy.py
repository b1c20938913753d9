"""The legacy strategy: ask Redis in many calls, decide here, write in many calls. It loses the race, on purpose.

Its weaknesses, all of which stay:

* Between the last read and the first write others read the same totals: N callers at once all get in, with room for k.
* A crash between two writes, or the end of its caller's time, leaves a part of the charge, which stays booked; a lost
  reply, repeated, may charge twice.
* It trusts the host's clock for periods and buckets, so hosts whose clocks differ disagree about the day.
* It has no deadline: a call that a frozen Redis answers late still charges.
* An idempotency key is looked up, and remembered later: two requests with one key at once are both admitted.
* An extension is checked and charged in many calls, like the first reservation.

What it writes are increments, never totals, so that the books show its overspend instead of losing it. Keys, units,
limits and answers are those of the atomic strategy; alone, the two cannot be told apart but by the number of round
trips.
"""

# ruff: noqa: D102 (what the verbs do is said once, at `contract.Backend`)

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from backends import rules
from backends.books import read_books, read_ring
from backends.clock import Clock
from backends.contract import (
    Ask,
    Books,
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
    LIVING_OPEN_BUCKETS,
    RECORD_KEEP_SECONDS,
    BookKeys,
    book_keys,
    bucket_seconds_of,
    idempotency_key,
    open_bucket_seconds_of,
    reset_key,
)
from backends.link import Link


class LegacyBackend:
    """Check, then charge: correct when alone, racy when not.

    Args:
        link: the Redis that holds the books.
        clock: the host's clock.
        between_check_and_record: called where the race lives, so that a test or `flask race` can hold callers there;
            an attribute too (`backends/race.py` sets it, since `open_backend` knows no strategy's own arguments).
    """

    name = "legacy"
    promises_atomicity = False
    reserve_script = "legacy"

    def __init__(self, link: Link, clock: Clock, between_check_and_record: Callable[[], None] = lambda: None) -> None:
        self._link = link
        self._clock = clock
        self.between_check_and_record = between_check_and_record

    def reserve(self, ask: Ask) -> Verdict:
        now_us = self._clock.now_us()
        keys = book_keys(ask.reservation_id, ask.identifier, ask.network, now_us // rules.US)
        known = self._known_reservation(ask, keys)
        if known is not None:
            return known
        duplicate = None if ask.idempotency is None else self.find_duplicate(ask.idempotency)
        if duplicate is not None:
            return duplicate
        verdict = self._check_marker(ask, keys, now_us)
        if verdict is not None:
            return rules.refusal_of(ask, verdict)
        spent = self._read_spent(keys, ask.limits.window_seconds, now_us)
        verdict = rules.decide(ask, spent, keys, self._ring, now_us)
        if verdict.set_marker is not None:
            marker, seconds = verdict.set_marker, verdict.marker_seconds
            self._link.run(lambda r: r.set(keys.marker, marker, ex=seconds))
        if verdict.status != rules.ADMITTED:
            return rules.refusal_of(ask, verdict)
        self.between_check_and_record()
        return self._admit(ask, keys, spent, now_us)

    def find(self, ask: Ask) -> Reservation | None:
        key = book_keys(ask.reservation_id, ask.identifier, ask.network, 0).record
        return rules.found(ask, self.name, rules.parse_record(self._text(key)))

    def find_duplicate(self, idempotency: Idempotency) -> Duplicate | None:
        text = self._text(idempotency_key(idempotency.digest))
        return rules.duplicate_of(text, idempotency, self._clock.now_us())

    def extend(
        self, reservation: Reservation, to_nanousd: int, limits: Limits, *, at_least_nanousd: int | None = None
    ) -> Reservation | Refusal:
        now_us = self._clock.now_us()
        keys = _keys_of(reservation)
        record = rules.open_record(reservation, rules.parse_record(self._text(keys.record)), now_us)
        is_cleared = self._was_cleared(reservation)
        spent = self._read_spent(keys, reservation.window_seconds, now_us)
        at_least = to_nanousd if at_least_nanousd is None else at_least_nanousd
        places = rules.places_of(limits, spent, is_cleared=is_cleared)
        status, held = rules.decide_extension(places, record.nanousd, to_nanousd, at_least)
        if status != rules.ADMITTED:
            return rules.extension_refused(status, limits)
        self.between_check_and_record()
        more = held - record.nanousd
        if more:
            self._record_extension(reservation, keys, held, more, now_us, is_cleared=is_cleared)
        return rules.extended(reservation, spent, held, more, is_cleared=is_cleared)

    def settle(self, reservation: Reservation, actual_nanousd: int) -> Settlement:
        return self._end(reservation, "settled", actual_nanousd)

    def release(self, reservation: Reservation) -> Settlement:
        return self._end(reservation, "released", 0)

    def books(self, identifier: str, network: str, window_seconds: int) -> Books:
        return read_books(self._link, self._clock, identifier, network, window_seconds)

    def close(self) -> None:
        self._link.close()

    def _known_reservation(self, ask: Ask, keys: BookKeys) -> Reservation | None:
        record = rules.known_record(ask, rules.parse_record(self._text(keys.record)))
        if record is None:
            return None
        books, window = self.books(ask.identifier, ask.network, ask.limits.window_seconds), ask.limits.window_seconds
        return rules.known_reservation(
            ask,
            self.name,
            record,
            window_nanousd=books.window_nanousd,
            day_nanousd=books.day_nanousd,
            window_frees_at_seconds=books.window_frees_at_seconds or rules.window_frees_at({}, window, books.as_of_us),
        )

    def _admit(self, ask: Ask, keys: BookKeys, spent: rules.Spent, now_us: int) -> Reservation:
        reservation = rules.reservation_of(
            ask,
            self.name,
            now_us,
            ask.cost_nanousd,
            window_nanousd=sum(spent.recent.values()) + ask.cost_nanousd,
            day_nanousd=spent.daily + ask.cost_nanousd,
            window_frees_at_seconds=rules.window_frees_at(spent.recent, ask.limits.window_seconds, now_us),
        )
        return replace(reservation, expired_nanousd=self._record_reservation(ask, reservation, keys, now_us))

    def _end(self, reservation: Reservation, ending: str, actual_nanousd: int) -> Settlement:
        now_us = self._clock.now_us()
        keys = _keys_of(reservation)
        record = rules.parse_record(self._text(keys.record))
        ended = rules.end_without_booking(reservation, record, now_us)
        if ended is not None:
            return ended
        is_cleared = self._was_cleared(reservation)
        outcome = Outcome.LATE if record is None else rules.outcome_of(ending, Outcome.SETTLED)
        held = 0 if record is None else record.nanousd
        text = rules.record_of(reservation, ending, actual_nanousd).text()
        self._link.run(lambda r: r.set(keys.record, text, ex=RECORD_KEEP_SECONDS))
        self._end_idempotency(reservation, ending, actual_nanousd, now_us)
        self._record_actual(reservation, keys, actual_nanousd - held, now_us, is_cleared=is_cleared)
        expired = self._forget_open(reservation, keys, held, now_us, is_cleared=is_cleared)
        return replace(rules.settlement_of(reservation, outcome, actual_nanousd), expired_nanousd=expired)

    def _end_idempotency(self, reservation: Reservation, ending: str, actual_nanousd: int, now_us: int) -> None:
        idempotency = reservation.idempotency
        if idempotency is None:
            return
        key = idempotency_key(idempotency.digest)
        known = self._text(key)
        is_ours = rules.owner_of(known) == reservation.reservation_id
        if ending == "settled" and (known is None or is_ours):
            text = rules.settled_text(reservation, idempotency, actual_nanousd, now_us)
            self._link.run(lambda r: r.set(key, text, ex=IDEMPOTENCY_KEEP_SECONDS))
        elif is_ours:
            self._link.run(lambda r: r.delete(key))

    def _was_cleared(self, reservation: Reservation) -> bool:
        return rules.was_cleared(self._text(reset_key(reservation.identifier)), reservation.made_at_us)

    def _text(self, key: str) -> bytes | None:
        text: Any = self._link.run(lambda r: r.get(key))
        return text if isinstance(text, bytes) else None

    def _check_marker(self, ask: Ask, keys: BookKeys, now_us: int) -> rules.Verdict | None:
        text = self._text(keys.marker)
        left_ms: Any = -1 if text is None else self._link.run(lambda r: r.pttl(keys.marker))
        return rules.verdict_of_marker(text, left_ms, ask.limits.throttle_seconds, now_us)

    def _read_spent(self, keys: BookKeys, window_seconds: int, now_us: int) -> rules.Spent:
        """Six reads of six moments."""
        return rules.Spent(
            recent=self._living(keys.recent, window_seconds, now_us),
            daily=self._total(keys.daily),
            network_recent=self._living(keys.network_recent, window_seconds, now_us),
            network_daily=self._total(keys.network_daily),
            hourly_of_all=self._total(keys.hourly_of_all),
            daily_of_all=self._total(keys.daily_of_all),
        )

    def _living(self, key: str, window_seconds: int, now_us: int) -> dict[int, int]:
        return rules.alive(self._ring(key), bucket_seconds_of(window_seconds), window_seconds, now_us)

    def _ring(self, key: str) -> dict[int, int]:
        return self._link.run(lambda r: read_ring(r, key))

    def _total(self, key: str) -> int:
        return rules.amount(self._text(key))

    def _record_reservation(self, ask: Ask, reservation: Reservation, keys: BookKeys, now_us: int) -> int:
        """Each increment and each expiry by itself, as the old way did; what had expired is told."""
        expired = self._sweep_open(keys, ask.open_seconds, now_us)
        window = ask.limits.window_seconds
        booked = rules.charges(keys, window, now_us, now_us) + rules.open_charges(keys, ask.open_seconds, now_us)
        for charge in booked:
            if self._increment(charge, ask.cost_nanousd) == ask.cost_nanousd:
                self._expire(charge)
            else:
                self._see_bucket_end(charge, now_us)
        for key in (keys.recent, keys.network_recent):
            self._clean_up(key, window, now_us)
        # The record comes last: one that is found says that all was charged, and may be taken back as a whole.
        record = rules.record_of(reservation, "open", ask.cost_nanousd).text()
        self._link.run(lambda r: r.set(keys.record, record, ex=ask.open_seconds + RECORD_KEEP_SECONDS))
        if ask.idempotency is not None:
            key, text = idempotency_key(ask.idempotency.digest), rules.in_flight_text(ask, ask.idempotency, now_us)
            self._link.run(lambda r: r.set(key, text, ex=IDEMPOTENCY_KEEP_SECONDS))
        return expired

    def _record_extension(
        self, reservation: Reservation, keys: BookKeys, held: int, more: int, now_us: int, *, is_cleared: bool
    ) -> None:
        record = rules.record_of(reservation, "open", held).text()
        self._link.run(lambda r: r.set(keys.record, record, keepttl=True))
        if reservation.idempotency is not None:
            key = idempotency_key(reservation.idempotency.digest)
            text = rules.extended_text(self._text(key), reservation.reservation_id, held)
            if text is not None:
                self._link.run(lambda r: r.set(key, text, keepttl=True))
        for charge in rules.extension_charges(reservation, keys, now_us, is_cleared=is_cleared):
            if self._increment(charge, more) == more:
                self._lengthen(charge)

    def _increment(self, charge: rules.Charge, amount_nanousd: int) -> int:
        if charge.member is None:
            total: Any = self._link.run(lambda r: r.incrby(charge.key, amount_nanousd))
        else:
            total = self._link.run(lambda r: r.zincrby(charge.key, amount_nanousd, str(charge.member)))
        return int(total)

    def _expire(self, charge: rules.Charge) -> None:
        self._link.run(lambda r: r.expire(charge.key, charge.life_seconds))

    def _see_bucket_end(self, charge: rules.Charge, now_us: int) -> None:
        ends_at_seconds = charge.bucket_ends_at_seconds
        if ends_at_seconds is None:
            return
        left_ms = ends_at_seconds * 1_000 - now_us // 1_000
        has_ms: Any = self._link.run(lambda r: r.pttl(charge.key))
        if has_ms < left_ms:
            self._link.run(lambda r: r.pexpire(charge.key, left_ms))

    def _lengthen(self, charge: rules.Charge) -> None:
        if charge.member is None or self._left_seconds(charge) < charge.life_seconds:
            self._expire(charge)

    def _left_seconds(self, charge: rules.Charge) -> int:
        left: Any = self._link.run(lambda r: r.ttl(charge.key))
        return int(left)

    def _remove(self, key: str, starts: list[int]) -> None:
        if starts:
            self._link.run(lambda r: r.zrem(key, *map(str, starts)))

    def _clean_up(self, key: str, window_seconds: int, now_us: int) -> None:
        ring = self._ring(key)
        living = rules.alive(ring, bucket_seconds_of(window_seconds), window_seconds, now_us)
        self._remove(key, [start for start in ring if start not in living])

    def _sweep_open(self, keys: BookKeys, open_seconds: int, now_us: int) -> int:
        expired = 0
        for key in (keys.open_identifier, keys.open_network, keys.open_of_all):
            ring = self._ring(key)
            if len(ring) > LIVING_OPEN_BUCKETS:
                living = rules.alive(ring, open_bucket_seconds_of(open_seconds), open_seconds, now_us)
                self._remove(key, [start for start in ring if start not in living])
                if key == keys.open_of_all:
                    expired = rules.expired_in(ring, open_seconds, None, 0, now_us)
        return expired

    def _record_actual(
        self, reservation: Reservation, keys: BookKeys, delta: int, now_us: int, *, is_cleared: bool
    ) -> None:
        window, made_at_us = reservation.window_seconds, reservation.made_at_us
        for charge in rules.charges(keys, window, made_at_us, now_us, is_cleared=is_cleared):
            held = self._held(charge)
            change = rules.change_of(charge, held, delta, reservation.window_seconds, now_us)
            if change == 0:
                continue
            self._increment(charge, change)
            if charge.member is not None and (held or 0) + change <= 0:
                self._remove(charge.key, [charge.member])
            elif held is None:
                self._lengthen(charge)

    def _held(self, charge: rules.Charge) -> int | None:
        if charge.member is None:
            text = self._text(charge.key)
            return None if text is None else rules.amount(text)
        score: Any = self._link.run(lambda r: r.zscore(charge.key, str(charge.member)))
        return None if score is None else int(score)

    def _forget_open(
        self, reservation: Reservation, keys: BookKeys, held: int, now_us: int, *, is_cleared: bool
    ) -> int:
        """Take this one's money out of the rings of open money, and what is over; the latter is told."""
        open_seconds, expired = reservation.open_seconds, 0
        mine = rules.open_charges(keys, open_seconds, reservation.made_at_us, is_cleared=is_cleared)
        own_start = {charge.key: charge.member for charge in mine}
        for key in (keys.open_identifier, keys.open_network, keys.open_of_all):
            own, ring = own_start.get(key) if held else None, self._ring(key)
            gone, is_left = rules.ended_in(ring, open_seconds, own, held, now_us)
            if is_left:
                self._link.run(lambda r, key=key, own=own: r.zincrby(key, -held, str(own)))  # type: ignore[misc]
            self._remove(key, gone)
            if key == keys.open_of_all:
                expired = rules.expired_in(ring, open_seconds, own, held, now_us)
        return expired


def _keys_of(reservation: Reservation) -> BookKeys:
    """Of the periods in which it was made."""
    made_seconds = reservation.made_at_us // rules.US
    return book_keys(reservation.reservation_id, reservation.identifier, reservation.network, made_seconds)


def open_legacy(link: Link, clock: Clock, *, decide_by_clock: bool = False) -> LegacyBackend:
    """Made by `backends.open_backend`; always decides by the host's clock (see the head of this file)."""
    _ = decide_by_clock
    return LegacyBackend(link, clock)
