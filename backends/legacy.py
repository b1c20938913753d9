"""The legacy strategy: ask Redis in many calls, decide here, write in many calls. It loses the race, on purpose.

Its weaknesses, all of which stay:

* Between the last read and the first write others read the same totals: N callers at once all get in, with room for k.
* A crash between two writes leaves a part of the charge; a lost reply, repeated, may charge twice.
* It trusts the host's clock for periods and buckets, so hosts whose clocks differ disagree about the day.
* It has no deadline: a call that a frozen Redis answers late still charges.

What it writes are increments, never totals, so that the books show its overspend instead of losing it. Keys, units,
limits and answers are those of the atomic strategy; alone, the two cannot be told apart but by the number of round
trips.
"""

# ruff: noqa: D102 (what the verbs do is said once, at `contract.Backend`)

from collections.abc import Callable
from typing import Any

from backends import rules
from backends.books import read_books, read_ring
from backends.clock import Clock
from backends.contract import Ask, Books, Outcome, Refusal, Reservation, Settlement
from backends.errors import ReservationConflict
from backends.keys import (
    LIVING_OPEN_BUCKETS,
    RECORD_KEEP_SECONDS,
    BookKeys,
    book_keys,
    bucket_seconds_of,
    open_bucket_seconds_of,
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

    def reserve(self, ask: Ask) -> Reservation | Refusal:
        now_us = self._clock.now_us()
        keys = book_keys(ask.reservation_id, ask.identifier, ask.network, now_us // rules.US)
        known = self._known_reservation(ask, keys)
        if known is not None:
            return known
        verdict = self._check_marker(ask, keys, now_us)
        if verdict is None:
            spent = self._read_spent(ask, keys, now_us)
            verdict = rules.decide(ask, spent, keys, self._ring, now_us)
        if verdict.set_marker is not None:
            marker, seconds = verdict.set_marker, verdict.marker_seconds
            self._link.run(lambda r: r.set(keys.marker, marker, ex=seconds))
        if verdict.status != rules.ADMITTED:
            return rules.refusal_of(ask, verdict)
        self.between_check_and_record()
        self._record_reservation(ask, keys, now_us)
        window = sum(spent.recent.values()) + ask.cost_nanousd
        return rules.reservation_of(ask, self.name, now_us, window, spent.daily + ask.cost_nanousd)

    def find(self, ask: Ask) -> Reservation | None:
        key = book_keys(ask.reservation_id, ask.identifier, ask.network, 0).record
        text: Any = self._link.run(lambda r: r.get(key))
        return rules.found(ask, self.name, rules.parse_record(text))

    def settle(self, reservation: Reservation, actual_nanousd: int) -> Settlement:
        now_us = self._clock.now_us()
        made_seconds = reservation.made_at_us // rules.US
        keys = book_keys(reservation.reservation_id, reservation.identifier, reservation.network, made_seconds)
        text: Any = self._link.run(lambda r: r.get(keys.record))
        record = rules.parse_record(text)
        terms = rules.terms_of(reservation.identifier, reservation.network, reservation.cost_nanousd)
        ended = rules.end_without_booking(reservation, record, terms, now_us)
        if ended is not None:
            return ended
        outcome = Outcome.LATE if record is None else Outcome.SETTLED
        delta = actual_nanousd - (0 if record is None else reservation.cost_nanousd)
        settled = rules.Record("settled", actual_nanousd, reservation.made_at_us, terms)
        self._link.run(lambda r: r.set(keys.record, settled.text(), ex=RECORD_KEEP_SECONDS))
        self._record_actual(reservation, keys, delta, now_us)
        self._forget_open(reservation, keys, now_us, was_open=record is not None)
        return rules.settlement_of(reservation, outcome, actual_nanousd)

    def books(self, identifier: str, network: str, window_seconds: int) -> Books:
        return read_books(self._link, self._clock, identifier, network, window_seconds)

    def close(self) -> None:
        self._link.close()

    def _known_reservation(self, ask: Ask, keys: BookKeys) -> Reservation | None:
        text: Any = self._link.run(lambda r: r.get(keys.record))
        record = rules.parse_record(text)
        if record is None:
            return None
        if record.terms != rules.terms_of(ask.identifier, ask.network, ask.cost_nanousd):
            raise ReservationConflict("the reservation id is known, and " + rules.CONFLICT_TEXT[rules.CONFLICT])
        if record.state != "open":
            raise ReservationConflict("the reservation id is known, and " + rules.CONFLICT_TEXT[rules.ENDED])
        books = self.books(ask.identifier, ask.network, ask.limits.window_seconds)
        return rules.reservation_of(ask, self.name, record.made_at_us, books.window_nanousd, books.day_nanousd)

    def _check_marker(self, ask: Ask, keys: BookKeys, now_us: int) -> rules.Verdict | None:
        text: Any = self._link.run(lambda r: r.get(keys.marker))
        left_ms: Any = -1 if text is None else self._link.run(lambda r: r.pttl(keys.marker))
        return rules.verdict_of_marker(text, left_ms, ask.limits.throttle_seconds, now_us)

    def _read_spent(self, ask: Ask, keys: BookKeys, now_us: int) -> rules.Spent:
        """Six reads of six moments."""
        return rules.Spent(
            recent=self._living(keys.recent, ask, now_us),
            daily=self._total(keys.daily),
            network_recent=self._living(keys.network_recent, ask, now_us),
            network_daily=self._total(keys.network_daily),
            hourly_of_all=self._total(keys.hourly_of_all),
            daily_of_all=self._total(keys.daily_of_all),
        )

    def _living(self, key: str, ask: Ask, now_us: int) -> dict[int, int]:
        window = ask.limits.window_seconds
        return rules.alive(self._ring(key), bucket_seconds_of(window), window, now_us)

    def _ring(self, key: str) -> dict[int, int]:
        return self._link.run(lambda r: read_ring(r, key))

    def _total(self, key: str) -> int:
        text: Any = self._link.run(lambda r: r.get(key))
        return rules.amount(text)

    def _record_reservation(self, ask: Ask, keys: BookKeys, now_us: int) -> None:
        """Each increment and each expiry by itself, as the old way did."""
        terms = rules.terms_of(ask.identifier, ask.network, ask.cost_nanousd)
        record = rules.Record("open", ask.cost_nanousd, now_us, terms).text()
        self._link.run(lambda r: r.set(keys.record, record, ex=ask.open_seconds + RECORD_KEEP_SECONDS))
        self._sweep_open(keys, ask.open_seconds, now_us)
        window = ask.limits.window_seconds
        booked = rules.charges(keys, window, now_us, now_us) + rules.open_charges(keys, ask.open_seconds, now_us)
        for charge in booked:
            if self._increment(charge, ask.cost_nanousd) == ask.cost_nanousd:
                self._expire(charge)
        for key in (keys.recent, keys.network_recent):
            self._clean_up(key, window, now_us)

    def _increment(self, charge: rules.Charge, amount_nanousd: int) -> int:
        if charge.member is None:
            total: Any = self._link.run(lambda r: r.incrby(charge.key, amount_nanousd))
        else:
            total = self._link.run(lambda r: r.zincrby(charge.key, amount_nanousd, str(charge.member)))
        return int(total)

    def _expire(self, charge: rules.Charge) -> None:
        self._link.run(lambda r: r.expire(charge.key, charge.life_seconds))

    def _remove(self, key: str, starts: list[int]) -> None:
        if starts:
            self._link.run(lambda r: r.zrem(key, *map(str, starts)))

    def _clean_up(self, key: str, window_seconds: int, now_us: int) -> None:
        ring = self._ring(key)
        living = rules.alive(ring, bucket_seconds_of(window_seconds), window_seconds, now_us)
        self._remove(key, [start for start in ring if start not in living])

    def _sweep_open(self, keys: BookKeys, open_seconds: int, now_us: int) -> None:
        for key in (keys.open_identifier, keys.open_network, keys.open_of_all):
            ring = self._ring(key)
            if len(ring) > LIVING_OPEN_BUCKETS:
                living = rules.alive(ring, open_bucket_seconds_of(open_seconds), open_seconds, now_us)
                self._remove(key, [start for start in ring if start not in living])

    def _record_actual(self, reservation: Reservation, keys: BookKeys, delta: int, now_us: int) -> None:
        for charge in rules.charges(keys, reservation.window_seconds, reservation.made_at_us, now_us):
            held = self._held(charge)
            change = rules.change_of(charge, held, delta, reservation.window_seconds, now_us)
            if change == 0:
                continue
            self._increment(charge, change)
            if charge.member is not None and (held or 0) + change <= 0:
                self._remove(charge.key, [charge.member])
            elif held is None:
                self._expire(charge)

    def _held(self, charge: rules.Charge) -> int | None:
        if charge.member is None:
            text: Any = self._link.run(lambda r: r.get(charge.key))
            return None if text is None else rules.amount(text)
        score: Any = self._link.run(lambda r: r.zscore(charge.key, str(charge.member)))
        return None if score is None else int(score)

    def _forget_open(self, reservation: Reservation, keys: BookKeys, now_us: int, *, was_open: bool) -> None:
        bucket = open_bucket_seconds_of(reservation.open_seconds)
        for charge in rules.open_charges(keys, reservation.open_seconds, reservation.made_at_us):
            ring = self._ring(charge.key)
            living = rules.alive(ring, bucket, reservation.open_seconds, now_us)
            gone = [start for start in ring if start not in living]
            if was_open and charge.member in living:
                if living[charge.member] <= reservation.cost_nanousd:
                    gone.append(charge.member)
                else:
                    self._increment(charge, -reservation.cost_nanousd)
            self._remove(charge.key, gone)


def open_legacy(link: Link, clock: Clock, *, decide_by_clock: bool = False) -> LegacyBackend:
    """Made by `backends.open_backend`; always decides by the host's clock (see the head of this file)."""
    _ = decide_by_clock
    return LegacyBackend(link, clock)
