"""The memory strategy: the books of one process, under one lock. What fail-open uses, and what a single worker may.

It keeps the same keys, kinds and lives as Redis would (`stored()` shows them), so that the conformance suite can hold
it to the same state.
"""

# ruff: noqa: D102 (what the verbs do is said once, at `contract.Backend`)

import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from backends.clock import US_PER_SECOND, Clock
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
    LIVE_PENDING_BUCKETS,
    RECORD_KEEP_SECONDS,
    SECONDS_PER_DAY,
    BookKeys,
    book_keys,
    bucket_seconds_of,
    idempotency_key,
    pending_bucket_seconds_of,
    reset_key,
)
from backends.records import (
    duplicate_of,
    extended_text,
    in_flight_text,
    owner_of,
    parse_record,
    record_of,
    settled_text,
)
from backends.strategies import arithmetic

if TYPE_CHECKING:
    from backends.store.link import Link

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

    def reserve(self, ask: Ask) -> Verdict:
        with self._lock:
            now_us = self._clock.now_us()
            self._sweep_sometimes(now_us)
            keys = book_keys(ask.reservation_id, ask.identifier, ask.network, now_us // US_PER_SECOND)
            known = self._known_reservation(ask, keys, now_us)
            if known is not None:
                return known
            duplicate = None if ask.idempotency is None else self._find_duplicate(ask.idempotency, now_us)
            if duplicate is not None:
                return duplicate
            decision = self._decision_of_marker(ask, keys, now_us)
            if decision is not None:
                return arithmetic.refusal_of(ask, decision)
            spent = self._read_spent(keys, ask.limits.window_seconds, now_us)
            decision = arithmetic.decide(ask, spent, keys, lambda key: self._ring(key, now_us), now_us)
            if decision.set_marker is not None:
                self._put(keys.marker, decision.set_marker, decision.marker_seconds, now_us)
            if decision.status != arithmetic.ADMITTED:
                return arithmetic.refusal_of(ask, decision)
            return self._admit(ask, decision.held_nanousd, keys, spent, now_us)

    def find(self, ask: Ask) -> Reservation | None:
        with self._lock:
            key = book_keys(ask.reservation_id, ask.identifier, ask.network, 0).record
            return arithmetic.found(ask, self.name, parse_record(self._text(key, self._clock.now_us())))

    def find_duplicate(self, idempotency: Idempotency) -> Duplicate | None:
        with self._lock:
            return self._find_duplicate(idempotency, self._clock.now_us())

    def extend(
        self, reservation: Reservation, to_nanousd: int, limits: Limits, *, at_least_nanousd: int | None = None
    ) -> Reservation | Refusal:
        with self._lock:
            now_us = self._clock.now_us()
            keys = arithmetic.keys_of(reservation)
            record = arithmetic.open_record(reservation, parse_record(self._text(keys.record, now_us)), now_us)
            is_cleared = self._was_cleared(reservation, now_us)
            spent = self._read_spent(keys, reservation.window_seconds, now_us)
            at_least = to_nanousd if at_least_nanousd is None else at_least_nanousd
            places = arithmetic.places_of(limits, spent, is_cleared=is_cleared)
            status, held = arithmetic.decide_extension(places, record.nanousd, to_nanousd, at_least)
            if status != arithmetic.ADMITTED:
                return arithmetic.extension_refused(status, limits)
            more = held - record.nanousd
            if more:
                self._record_extension(reservation, keys, held, more, now_us, is_cleared=is_cleared)
            return arithmetic.extended(reservation, spent, held, more, is_cleared=is_cleared)

    def settle(self, reservation: Reservation, actual_nanousd: int) -> Settlement:
        with self._lock:
            return self._end(reservation, "settled", actual_nanousd)

    def release(self, reservation: Reservation) -> Settlement:
        with self._lock:
            return self._end(reservation, "released", 0)

    def books(self, identifier: str, network: str, window_seconds: int) -> Books:
        with self._lock:
            now_us = self._clock.now_us()
            keys = book_keys("", identifier, network, now_us // US_PER_SECOND)
            recent, opened = (
                self._living(keys.recent, window_seconds, now_us),
                self._ring(keys.pending_identifier, now_us),
            )
            return Books(
                window_nanousd=sum(recent.values()),
                day_nanousd=self._total(keys.daily, now_us),
                network_window_nanousd=sum(self._living(keys.network_recent, window_seconds, now_us).values()),
                network_day_nanousd=self._total(keys.network_daily, now_us),
                global_hour_nanousd=self._total(keys.global_hourly, now_us),
                global_day_nanousd=self._total(keys.global_daily, now_us),
                pending_nanousd=sum(opened.values()),
                pending_today_nanousd=arithmetic.since(
                    opened, now_us // US_PER_SECOND // SECONDS_PER_DAY * SECONDS_PER_DAY
                ),
                window_frees_at_seconds=arithmetic.window_frees_at(recent, window_seconds, now_us) if recent else None,
                marker=arithmetic.marker_of(
                    self._text(keys.marker, now_us), self._left_ms(keys.marker, now_us), now_us
                ),
                as_of_us=now_us,
            )

    def close(self) -> None:
        """Nothing to give back."""

    def stored(self) -> Mapping[str, tuple[Value, int]]:
        """Every living key with its value and the whole seconds that it has left, as Redis would show them."""
        with self._lock:
            now_us = self._clock.now_us()
            self._sweep(now_us)
            return {
                key: (value, -(-(self._gone_at_us[key] - now_us) // US_PER_SECOND))
                for key, value in self._values.items()
            }

    def _known_reservation(self, ask: Ask, keys: BookKeys, now_us: int) -> Reservation | None:
        record = arithmetic.known_record(ask, parse_record(self._text(keys.record, now_us)))
        if record is None:
            return None
        window = ask.limits.window_seconds
        recent = self._living(keys.recent, window, now_us)
        return arithmetic.known_reservation(
            ask,
            self.name,
            record,
            window_nanousd=sum(recent.values()),
            day_nanousd=self._total(keys.daily, now_us),
            window_frees_at_seconds=arithmetic.window_frees_at(recent, window, now_us),
        )

    def _find_duplicate(self, idempotency: Idempotency, now_us: int) -> Duplicate | None:
        text = self._text(idempotency_key(idempotency.digest), now_us)
        return duplicate_of(text, idempotency, now_us)

    def _admit(self, ask: Ask, held_nanousd: int, keys: BookKeys, spent: arithmetic.Spent, now_us: int) -> Reservation:
        reservation = arithmetic.reservation_of(
            ask,
            self.name,
            arithmetic.request_digest_of(ask),
            now_us,
            held_nanousd,
            window_seconds=ask.limits.window_seconds,
            pending_seconds=ask.pending_seconds,
            window_nanousd=sum(spent.recent.values()) + held_nanousd,
            day_nanousd=spent.daily_nanousd + held_nanousd,
            window_frees_at_seconds=arithmetic.window_frees_at(spent.recent, ask.limits.window_seconds, now_us),
        )
        return replace(reservation, expired_nanousd=self._record_reservation(ask, reservation, keys, now_us))

    def _end(self, reservation: Reservation, ending: str, actual_nanousd: int) -> Settlement:
        now_us = self._clock.now_us()
        keys = arithmetic.keys_of(reservation)
        record = parse_record(self._text(keys.record, now_us))
        ended = arithmetic.end_without_booking(reservation, record, now_us)
        if ended is not None:
            return ended
        is_cleared = self._was_cleared(reservation, now_us)
        outcome = Outcome.LATE if record is None else arithmetic.outcome_of(ending, Outcome.SETTLED)
        held = 0 if record is None else record.nanousd
        text = record_of(reservation, ending, actual_nanousd).text()
        self._put(keys.record, text, RECORD_KEEP_SECONDS, now_us)
        self._end_idempotency(reservation, ending, actual_nanousd, now_us)
        self._record_actual(reservation, keys, actual_nanousd - held, now_us, is_cleared=is_cleared)
        expired = self._forget_open(reservation, keys, held, now_us, is_cleared=is_cleared)
        return arithmetic.settlement_of(reservation, outcome, actual_nanousd, expired)

    def _end_idempotency(self, reservation: Reservation, ending: str, actual_nanousd: int, now_us: int) -> None:
        idempotency = reservation.idempotency
        if idempotency is None:
            return
        key = idempotency_key(idempotency.digest)
        known = self._text(key, now_us)
        is_ours = owner_of(known) == reservation.reservation_id
        if ending == "settled" and (known is None or is_ours):
            text = settled_text(reservation, idempotency, actual_nanousd, now_us)
            self._put(key, text, IDEMPOTENCY_KEEP_SECONDS, now_us)
        elif is_ours:
            self._forget(key)

    def _was_cleared(self, reservation: Reservation, now_us: int) -> bool:
        return arithmetic.was_cleared(self._text(reset_key(reservation.identifier), now_us), reservation.made_at_us)

    def _decision_of_marker(self, ask: Ask, keys: BookKeys, now_us: int) -> arithmetic.Decision | None:
        text = self._text(keys.marker, now_us)
        left_ms = self._left_ms(keys.marker, now_us)
        return arithmetic.decision_of_marker(text, left_ms, ask.limits.throttle_seconds, now_us)

    def _left_ms(self, key: str, now_us: int) -> int:
        return (self._gone_at_us.get(key, now_us) - now_us) // 1_000

    def _read_spent(self, keys: BookKeys, window: int, now_us: int) -> arithmetic.Spent:
        return arithmetic.Spent(
            recent=self._living(keys.recent, window, now_us),
            daily_nanousd=self._total(keys.daily, now_us),
            network_recent=self._living(keys.network_recent, window, now_us),
            network_daily_nanousd=self._total(keys.network_daily, now_us),
            global_hourly_nanousd=self._total(keys.global_hourly, now_us),
            global_daily_nanousd=self._total(keys.global_daily, now_us),
        )

    def _record_reservation(self, ask: Ask, reservation: Reservation, keys: BookKeys, now_us: int) -> int:
        held = reservation.cost_nanousd
        record = record_of(reservation, "open", held).text()
        self._put(keys.record, record, ask.pending_seconds + RECORD_KEEP_SECONDS, now_us)
        if ask.idempotency is not None:
            text = in_flight_text(reservation, ask.idempotency, now_us)
            self._put(idempotency_key(ask.idempotency.digest), text, IDEMPOTENCY_KEEP_SECONDS, now_us)
        expired = self._sweep_open(keys, ask.pending_seconds, now_us)
        window = ask.limits.window_seconds
        for charge in arithmetic.charges(keys, window, now_us, now_us) + arithmetic.pending_charges(
            keys, ask.pending_seconds, now_us
        ):
            if self._increment(charge, held, now_us) == held:
                self._gone_at_us[charge.key] = now_us + charge.ttl_seconds * US_PER_SECOND
            elif charge.bucket_ends_at_seconds is not None:
                ends_at_us = charge.bucket_ends_at_seconds * US_PER_SECOND
                self._gone_at_us[charge.key] = max(self._gone_at_us[charge.key], ends_at_us)
        for key in (keys.recent, keys.network_recent):
            self._values[key] = self._living(key, window, now_us)
        return expired

    def _record_extension(
        self, reservation: Reservation, keys: BookKeys, held: int, more: int, now_us: int, *, is_cleared: bool
    ) -> None:
        self._values[keys.record] = record_of(reservation, "open", held).text()
        if reservation.idempotency is not None:
            key = idempotency_key(reservation.idempotency.digest)
            text = extended_text(self._text(key, now_us), reservation.reservation_id, held)
            if text is not None:
                self._values[key] = text
        for charge in arithmetic.extension_charges(reservation, keys, now_us, is_cleared=is_cleared):
            if self._increment(charge, more, now_us) == more:
                self._lengthen(charge, now_us)

    def _sweep_open(self, keys: BookKeys, pending_seconds: int, now_us: int) -> int:
        expired = 0
        for charge in arithmetic.pending_charges(keys, pending_seconds, now_us):
            ring = self._ring(charge.key, now_us)
            if charge.member not in ring and len(ring) > LIVE_PENDING_BUCKETS:
                living = arithmetic.alive(ring, pending_bucket_seconds_of(pending_seconds), pending_seconds, now_us)
                self._drop(charge.key, [start for start in ring if start not in living])
                if charge.key == keys.pending_global:
                    expired = arithmetic.expired_in(ring, pending_seconds, None, 0, now_us)
        return expired

    def _record_actual(
        self, reservation: Reservation, keys: BookKeys, delta: int, now_us: int, *, is_cleared: bool
    ) -> None:
        window, made_at_us = reservation.window_seconds, reservation.made_at_us
        for charge in arithmetic.charges(keys, window, made_at_us, now_us, is_cleared=is_cleared):
            held = self._held(charge, now_us)
            change = arithmetic.change_of(charge, held, delta, reservation.window_seconds, now_us)
            if change == 0:
                continue
            self._increment(charge, change, now_us)
            if held is None:
                self._lengthen(charge, now_us)
            if charge.member is not None and (held or 0) + change <= 0:
                self._drop(charge.key, [charge.member])

    def _forget_open(
        self, reservation: Reservation, keys: BookKeys, held: int, now_us: int, *, is_cleared: bool
    ) -> int:
        pending_seconds, expired = reservation.pending_seconds, 0
        mine = arithmetic.pending_charges(keys, pending_seconds, reservation.made_at_us, is_cleared=is_cleared)
        own_start = {charge.key: charge.member for charge in mine}
        for key in (keys.pending_identifier, keys.pending_network, keys.pending_global):
            own, ring = own_start.get(key) if held else None, self._ring(key, now_us)
            gone, is_left = arithmetic.ended_in(ring, pending_seconds, own, held, now_us)
            if is_left and own is not None:
                self._values[key] = {**ring, own: ring[own] - held}
            self._drop(key, gone)
            if key == keys.pending_global:
                expired = arithmetic.expired_in(ring, pending_seconds, own, held, now_us)
        return expired

    def _lengthen(self, charge: arithmetic.Charge, now_us: int) -> None:
        gone_at_us = now_us + charge.ttl_seconds * US_PER_SECOND
        if charge.member is None or self._gone_at_us.get(charge.key, 0) < gone_at_us:
            self._gone_at_us[charge.key] = gone_at_us

    def _held(self, charge: arithmetic.Charge, now_us: int) -> int | None:
        if charge.member is None:
            return self._total(charge.key, now_us) if self._lives(charge.key, now_us) else None
        return self._ring(charge.key, now_us).get(charge.member)

    def _increment(self, charge: arithmetic.Charge, amount_nanousd: int, now_us: int) -> int:
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
        return arithmetic.amount(self._text(key, now_us))

    def _ring(self, key: str, now_us: int) -> dict[int, int]:
        ring = self._values[key] if self._lives(key, now_us) else {}
        return ring if isinstance(ring, dict) else {}

    def _living(self, key: str, window_seconds: int, now_us: int) -> dict[int, int]:
        return arithmetic.alive(self._ring(key, now_us), bucket_seconds_of(window_seconds), window_seconds, now_us)

    def _put(self, key: str, value: Value, ttl_seconds: int, now_us: int) -> None:
        self._values[key] = value
        self._gone_at_us[key] = now_us + ttl_seconds * US_PER_SECOND

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


def open_memory(link: "Link | None", clock: Clock, *, decide_by_clock: bool = False) -> MemoryBackend:
    """Made by `backends.open_backend`; needs no Redis."""
    _ = link, decide_by_clock
    return MemoryBackend(clock)
