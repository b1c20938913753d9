"""The memory strategy: the books of one process, under one lock. What fail-open uses, and what a single worker may.

It keeps the same keys, kinds and lives as Redis would (`stored()` shows them), so that the conformance suite can hold
it to the same state.
"""

# ruff: noqa: D102 (what the verbs do is said once, at `contract.Backend`)

import threading
from collections.abc import Mapping

from backends import rules
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

_SWEEP_EVERY = 1_000

Value = str | int | dict[int, int]


class MemoryBackend:
    """Keeps the promise within one process, and forgets everything with it.

    Args:
        clock: decides the periods and collects what is over.
    """

    name = "memory"
    promises_atomicity = True
    reserve_script = "memory"

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._values: dict[str, Value] = {}
        self._gone_at_us: dict[str, int] = {}
        self._reservations_since_sweep = 0

    def reserve(self, ask: Ask) -> Reservation | Refusal:
        with self._lock:
            now_us = self._clock.now_us()
            self._sweep_sometimes(now_us)
            keys = book_keys(ask.reservation_id, ask.identifier, ask.network, now_us // rules.US)
            known = self._known_reservation(ask, keys, now_us)
            if known is not None:
                return known
            verdict = self._check_marker(ask, keys, now_us)
            if verdict is None:
                spent = self._read_spent(ask, keys, now_us)
                verdict = rules.decide(ask, spent, keys, lambda key: self._ring(key, now_us), now_us)
            if verdict.set_marker is not None:
                self._put(keys.marker, verdict.set_marker, verdict.marker_seconds, now_us)
            if verdict.status != rules.ADMITTED:
                return rules.refusal_of(ask, verdict)
            self._record_reservation(ask, keys, now_us)
            window = sum(spent.recent.values()) + ask.cost_nanousd
            return rules.reservation_of(ask, self.name, now_us, window, spent.daily + ask.cost_nanousd)

    def find(self, ask: Ask) -> Reservation | None:
        with self._lock:
            key = book_keys(ask.reservation_id, ask.identifier, ask.network, 0).record
            return rules.found(ask, self.name, rules.parse_record(self._text(key, self._clock.now_us())))

    def settle(self, reservation: Reservation, actual_nanousd: int) -> Settlement:
        with self._lock:
            now_us = self._clock.now_us()
            made_seconds = reservation.made_at_us // rules.US
            keys = book_keys(reservation.reservation_id, reservation.identifier, reservation.network, made_seconds)
            record = rules.parse_record(self._text(keys.record, now_us))
            terms = rules.terms_of(reservation.identifier, reservation.network, reservation.cost_nanousd)
            ended = rules.end_without_booking(reservation, record, terms, now_us)
            if ended is not None:
                return ended
            outcome = Outcome.LATE if record is None else Outcome.SETTLED
            delta = actual_nanousd - (0 if record is None else reservation.cost_nanousd)
            settled = rules.Record("settled", actual_nanousd, reservation.made_at_us, terms)
            self._put(keys.record, settled.text(), RECORD_KEEP_SECONDS, now_us)
            self._record_actual(reservation, keys, delta, now_us)
            self._forget_open(reservation, keys, now_us, was_open=record is not None)
            return rules.settlement_of(reservation, outcome, actual_nanousd)

    def books(self, identifier: str, network: str, window_seconds: int) -> Books:
        with self._lock:
            now_us = self._clock.now_us()
            keys = book_keys("", identifier, network, now_us // rules.US)
            return Books(
                window_nanousd=sum(self._living(keys.recent, window_seconds, now_us).values()),
                day_nanousd=self._total(keys.daily, now_us),
                network_window_nanousd=sum(self._living(keys.network_recent, window_seconds, now_us).values()),
                network_day_nanousd=self._total(keys.network_daily, now_us),
                global_hour_nanousd=self._total(keys.hourly_of_all, now_us),
                global_day_nanousd=self._total(keys.daily_of_all, now_us),
                open_nanousd=sum(self._ring(keys.open_identifier, now_us).values()),
            )

    def close(self) -> None:
        """Nothing to give back."""

    def stored(self) -> Mapping[str, tuple[Value, int]]:
        """Every living key with its value and the whole seconds that it has left, as Redis would show them."""
        with self._lock:
            now_us = self._clock.now_us()
            self._sweep(now_us)
            return {
                key: (value, -(-(self._gone_at_us[key] - now_us) // rules.US)) for key, value in self._values.items()
            }

    def _known_reservation(self, ask: Ask, keys: BookKeys, now_us: int) -> Reservation | None:
        record = rules.parse_record(self._text(keys.record, now_us))
        if record is None:
            return None
        if record.terms != rules.terms_of(ask.identifier, ask.network, ask.cost_nanousd):
            raise ReservationConflict("the reservation id is known, and " + rules.CONFLICT_TEXT[rules.CONFLICT])
        if record.state != "open":
            raise ReservationConflict("the reservation id is known, and " + rules.CONFLICT_TEXT[rules.ENDED])
        window = sum(self._living(keys.recent, ask.limits.window_seconds, now_us).values())
        return rules.reservation_of(ask, self.name, record.made_at_us, window, self._total(keys.daily, now_us))

    def _check_marker(self, ask: Ask, keys: BookKeys, now_us: int) -> rules.Verdict | None:
        text = self._text(keys.marker, now_us)
        left_ms = -1 if text is None else (self._gone_at_us[keys.marker] - now_us) // 1_000
        return rules.verdict_of_marker(text, left_ms, ask.limits.throttle_seconds, now_us)

    def _read_spent(self, ask: Ask, keys: BookKeys, now_us: int) -> rules.Spent:
        window = ask.limits.window_seconds
        return rules.Spent(
            recent=self._living(keys.recent, window, now_us),
            daily=self._total(keys.daily, now_us),
            network_recent=self._living(keys.network_recent, window, now_us),
            network_daily=self._total(keys.network_daily, now_us),
            hourly_of_all=self._total(keys.hourly_of_all, now_us),
            daily_of_all=self._total(keys.daily_of_all, now_us),
        )

    def _record_reservation(self, ask: Ask, keys: BookKeys, now_us: int) -> None:
        terms = rules.terms_of(ask.identifier, ask.network, ask.cost_nanousd)
        record = rules.Record("open", ask.cost_nanousd, now_us, terms).text()
        self._put(keys.record, record, ask.open_seconds + RECORD_KEEP_SECONDS, now_us)
        self._sweep_open(keys, ask.open_seconds, now_us)
        window = ask.limits.window_seconds
        for charge in rules.charges(keys, window, now_us, now_us) + rules.open_charges(keys, ask.open_seconds, now_us):
            if self._increment(charge, ask.cost_nanousd, now_us) == ask.cost_nanousd:
                self._gone_at_us[charge.key] = now_us + charge.life_seconds * rules.US
        for key in (keys.recent, keys.network_recent):
            self._values[key] = self._living(key, window, now_us)

    def _sweep_open(self, keys: BookKeys, open_seconds: int, now_us: int) -> None:
        for key in (keys.open_identifier, keys.open_network, keys.open_of_all):
            ring = self._ring(key, now_us)
            if len(ring) > LIVING_OPEN_BUCKETS:
                living = rules.alive(ring, open_bucket_seconds_of(open_seconds), open_seconds, now_us)
                self._drop(key, [start for start in ring if start not in living])

    def _record_actual(self, reservation: Reservation, keys: BookKeys, delta: int, now_us: int) -> None:
        for charge in rules.charges(keys, reservation.window_seconds, reservation.made_at_us, now_us):
            held = self._held(charge, now_us)
            change = rules.change_of(charge, held, delta, reservation.window_seconds, now_us)
            if change == 0:
                continue
            self._increment(charge, change, now_us)
            if held is None:
                self._gone_at_us[charge.key] = now_us + charge.life_seconds * rules.US
            if charge.member is not None and (held or 0) + change <= 0:
                self._drop(charge.key, [charge.member])

    def _forget_open(self, reservation: Reservation, keys: BookKeys, now_us: int, *, was_open: bool) -> None:
        bucket = open_bucket_seconds_of(reservation.open_seconds)
        for charge in rules.open_charges(keys, reservation.open_seconds, reservation.made_at_us):
            ring = self._ring(charge.key, now_us)
            living = rules.alive(ring, bucket, reservation.open_seconds, now_us)
            gone = [start for start in ring if start not in living]
            if was_open and charge.member in living:
                if living[charge.member] <= reservation.cost_nanousd:
                    gone.append(charge.member)
                else:
                    self._increment(charge, -reservation.cost_nanousd, now_us)
            self._drop(charge.key, gone)

    def _held(self, charge: rules.Charge, now_us: int) -> int | None:
        if charge.member is None:
            return self._total(charge.key, now_us) if self._lives(charge.key, now_us) else None
        return self._ring(charge.key, now_us).get(charge.member)

    def _increment(self, charge: rules.Charge, amount_nanousd: int, now_us: int) -> int:
        if charge.member is None:
            total = self._total(charge.key, now_us) + amount_nanousd
            self._values[charge.key] = total
            return total
        ring = self._ring(charge.key, now_us)
        held = ring.get(charge.member, 0) + amount_nanousd
        self._values[charge.key] = {**ring, charge.member: held}
        return held

    def _drop(self, key: str, starts: list[int]) -> None:
        ring = self._values.get(key)
        if not isinstance(ring, dict):
            return
        self._values[key] = left = {start: held for start, held in ring.items() if start not in starts}
        if not left:
            self._forget(key)

    def _lives(self, key: str, now_us: int) -> bool:
        if key in self._values and self._gone_at_us[key] <= now_us:
            self._forget(key)
        return key in self._values

    def _text(self, key: str, now_us: int) -> bytes | None:
        return str(self._values[key]).encode() if self._lives(key, now_us) else None

    def _total(self, key: str, now_us: int) -> int:
        return rules.amount(self._text(key, now_us))

    def _ring(self, key: str, now_us: int) -> dict[int, int]:
        ring = self._values[key] if self._lives(key, now_us) else {}
        return ring if isinstance(ring, dict) else {}

    def _living(self, key: str, window_seconds: int, now_us: int) -> dict[int, int]:
        return rules.alive(self._ring(key, now_us), bucket_seconds_of(window_seconds), window_seconds, now_us)

    def _put(self, key: str, value: Value, life_seconds: int, now_us: int) -> None:
        self._values[key] = value
        self._gone_at_us[key] = now_us + life_seconds * rules.US

    def _forget(self, key: str) -> None:
        del self._values[key]
        del self._gone_at_us[key]

    def _sweep_sometimes(self, now_us: int) -> None:
        self._reservations_since_sweep += 1
        if self._reservations_since_sweep >= _SWEEP_EVERY:
            self._reservations_since_sweep = 0
            self._sweep(now_us)

    def _sweep(self, now_us: int) -> None:
        for key in [key for key, gone_at_us in self._gone_at_us.items() if gone_at_us <= now_us]:
            self._forget(key)


def open_memory(link: Link, clock: Clock, *, decide_by_clock: bool = False) -> MemoryBackend:
    """Made by `backends.open_backend`; needs no Redis."""
    _ = link, decide_by_clock
    return MemoryBackend(clock)
