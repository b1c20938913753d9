"""The atomic strategy: one script a verb, one round trip, all scopes or none.

The decision *is* `lua/reserve.lua` (and `lua/extend.lua`); this file only names the keys, hands over the numbers and
reads the reply.
"""

# ruff: noqa: D102 (what the verbs do is said once, at `contract.Backend`)

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

from backends.clock import US_PER_SECOND, Clock
from backends.contract import (
    Ask,
    Books,
    Duplicate,
    DuplicateState,
    Idempotency,
    Limits,
    Outcome,
    Refusal,
    Reservation,
    Settlement,
    Verdict,
)
from backends.errors import ReservationConflict, StoreBusy
from backends.keys import (
    IDEMPOTENCY_KEEP_SECONDS,
    RECORD_KEEP_SECONDS,
    SECONDS_PER_HOUR,
    book_keys,
    bucket_seconds_of,
    idempotency_key,
    pending_bucket_seconds_of,
    reset_key,
)
from backends.ledger.books import read_books
from backends.records import digest_of, duplicate_of, parse_record
from backends.store.link import Link
from backends.store.scripts import Script
from backends.strategies import arithmetic

_RESERVE, _EXTEND, _SETTLE = Script("reserve.lua"), Script("extend.lua"), Script("settle.lua")
_TRIES = 3

OUTCOME_OF_STATUS = {
    arithmetic.SETTLED: Outcome.SETTLED,
    arithmetic.LATE: Outcome.LATE,
    arithmetic.EXPIRED: Outcome.EXPIRED,
}
STATE_OF_CODE = {1: DuplicateState.IN_FLIGHT, 2: DuplicateState.SETTLED, 3: DuplicateState.EXPIRED}


class AtomicBackend:
    """Keeps the promise: not a nano-dollar over any limit, under any concurrency.

    Args:
        link: the Redis that holds the books.
        clock: for tests only: decides in place of Redis' own time.
    """

    name = "atomic"
    promises_atomicity = True
    keeps_our_layout = True
    reserve_script = _RESERVE.file_name

    def __init__(self, link: Link, clock: Clock | None = None) -> None:
        self._link = link
        self._clock = clock

    def reserve(self, ask: Ask) -> Verdict:
        request_digest = arithmetic.request_digest_of(ask)
        for _ in range(_TRIES):
            reply = self._ask_redis(ask, request_digest)
            status = reply[0]
            if status == arithmetic.ADMITTED:
                return self._admitted(ask, request_digest, reply)
            if status in arithmetic.REASON_OF_STATUS:
                _, marker_seconds, now_us, wait_seconds, busy, cause = reply
                marker_seconds = marker_seconds if status <= arithmetic.LAST_STATUS_WITH_MARKER else 0
                decision = arithmetic.Decision(status, now_us, marker_seconds, wait_seconds, bool(busy), cause)
                return arithmetic.refusal_of(ask, decision)
            if status == arithmetic.DUPLICATE:
                _, _, _, code, nanousd, same_body, rid = reply
                return Duplicate(rid.decode(errors="replace"), STATE_OF_CODE[code], nanousd, same_body=bool(same_body))
            if status in arithmetic.CONFLICT_TEXT:
                _conflict(status)
            # Too late or at the turn of an hour: nothing was charged, and the reply has told us Redis' time.
        raise StoreBusy("the question reached Redis only after its deadline")

    def find(self, ask: Ask) -> Reservation | None:
        key = book_keys(ask.reservation_id, ask.identifier, ask.network, 0).record
        text: Any = self._link.run(lambda r: r.get(key))
        return arithmetic.found(ask, self.name, parse_record(text))

    def find_duplicate(self, idempotency: Idempotency) -> Duplicate | None:
        text: Any = self._link.run(lambda r: r.get(idempotency_key(idempotency.digest)))
        return duplicate_of(text, idempotency, self._now_us())

    def extend(
        self, reservation: Reservation, to_nanousd: int, limits: Limits, *, at_least_nanousd: int | None = None
    ) -> Reservation | Refusal:
        at_least = to_nanousd if at_least_nanousd is None else at_least_nanousd
        for _ in range(_TRIES):
            reply = self._ask_for_more(reservation, to_nanousd, at_least, limits)
            status = reply[0]
            if status == arithmetic.ADMITTED:
                _, held, _, window_nanousd, day_nanousd = reply
                return replace(
                    reservation,
                    cost_nanousd=held,
                    window_spent_nanousd=window_nanousd,
                    day_spent_nanousd=day_nanousd,
                )
            if status in arithmetic.REASON_OF_STATUS:
                return arithmetic.extension_refused(status, limits)
            if status in arithmetic.CONFLICT_TEXT:
                _conflict(status)
            # Too late: nothing was charged, and the reply has told us Redis' time.
        raise StoreBusy("the question reached Redis only after its deadline")

    def settle(self, reservation: Reservation, actual_nanousd: int) -> Settlement:
        return self._end(reservation, "settled", actual_nanousd)

    def release(self, reservation: Reservation) -> Settlement:
        return self._end(reservation, "released", 0)

    def books(self, identifier: str, network: str, window_seconds: int) -> Books:
        return read_books(self._link, self._clock, identifier, network, window_seconds)

    def close(self) -> None:
        self._link.close()

    def _admitted(self, ask: Ask, request_digest: str, reply: Sequence[Any]) -> Reservation:
        _, pending_seconds, _, made_at_us, window_nanousd, day_nanousd, frees_at_seconds, held, expired, window = reply
        # Said again, it has the lengths of the first time, whatever the limits say now.
        return arithmetic.reservation_of(
            ask,
            self.name,
            request_digest,
            made_at_us,
            held,
            window_seconds=window,
            pending_seconds=pending_seconds,
            window_nanousd=window_nanousd,
            day_nanousd=day_nanousd,
            window_frees_at_seconds=frees_at_seconds,
            expired_nanousd=expired,
        )

    def _ask_redis(self, ask: Ask, request_digest: str) -> Sequence[Any]:
        link, limits = self._link, ask.limits
        now_us = self._now_us()
        now_seconds = now_us // US_PER_SECOND
        keys: Sequence[str] = book_keys(ask.reservation_id, ask.identifier, ask.network, now_seconds)
        args: Sequence[str | int] = (
            self._now_text(),
            self._deadline_us(now_us),
            now_seconds // SECONDS_PER_HOUR,
            ask.cost_nanousd,
            request_digest,
            limits.window_seconds,
            *_amounts(limits),
            limits.throttle_seconds,
            "1" if limits.mark_when_busy else "0",
            ask.pending_seconds,
            f"{digest_of(ask.identifier)} {digest_of(ask.network)}",
            "" if ask.at_least_nanousd is None else ask.at_least_nanousd,
        )
        if ask.idempotency is not None:
            keys = (*keys, idempotency_key(ask.idempotency.digest))
            args = (*args, ask.idempotency.body_digest, ask.reservation_id)
        asked_at = link.monotonic_seconds()
        reply: Sequence[Any] = link.run(lambda client: _RESERVE.run(client, keys, args))
        self._learn_time(reply[2], asked_at)
        return reply

    def _ask_for_more(
        self, reservation: Reservation, to_nanousd: int, at_least_nanousd: int, limits: Limits
    ) -> Sequence[Any]:
        keys: Sequence[str] = _keys_of(reservation)
        args: Sequence[str | int] = (
            self._now_text(),
            self._deadline_us(self._now_us()),
            reservation.request_digest,
            to_nanousd,
            at_least_nanousd,
            reservation.made_at_us,
            *_lengths(reservation),
            *_amounts(limits),
            RECORD_KEEP_SECONDS,
        )
        if reservation.idempotency is not None:
            keys = (*keys, idempotency_key(reservation.idempotency.digest))
            args = (*args, reservation.reservation_id)
        asked_at = self._link.monotonic_seconds()
        reply: Sequence[Any] = self._link.run(lambda client: _EXTEND.run(client, keys, args))
        self._learn_time(reply[2], asked_at)
        return reply

    def _end(self, reservation: Reservation, ending: str, actual_nanousd: int) -> Settlement:
        keys: Sequence[str] = _keys_of(reservation)
        args: Sequence[str | int] = (
            self._now_text(),
            reservation.request_digest,
            ending,
            actual_nanousd,
            reservation.made_at_us,
            *_lengths(reservation),
            RECORD_KEEP_SECONDS,
            digest_of(reservation.identifier),
            digest_of(reservation.network),
        )
        if reservation.idempotency is not None:
            keys = (*keys, idempotency_key(reservation.idempotency.digest))
            body = reservation.idempotency.body_digest
            args = (*args, body, reservation.reservation_id, IDEMPOTENCY_KEEP_SECONDS)
        status, booked, _, expired = self._link.run(lambda client: _SETTLE.run(client, keys, args))
        if status == arithmetic.CONFLICT:
            _conflict(status)
        if status == arithmetic.REPEATED:
            return Settlement(reservation.reservation_id, Outcome.REPEATED, booked, 0)
        if status == arithmetic.EXPIRED:
            return arithmetic.settlement_of(reservation, Outcome.EXPIRED, reservation.cost_nanousd)
        outcome = arithmetic.outcome_of(ending, OUTCOME_OF_STATUS[status])
        return arithmetic.settlement_of(reservation, outcome, booked, expired)

    def _now_us(self) -> int:
        return self._clock.now_us() if self._clock else self._link.time_us()

    def _deadline_us(self, now_us: int) -> int:
        return now_us + int(self._link.wait_seconds() * US_PER_SECOND)

    def _learn_time(self, redis_now_us: int, asked_at_seconds: float) -> None:
        if not self._clock:
            self._link.learn_time(redis_now_us, asked_at_seconds)

    def _now_text(self) -> str:
        return str(self._clock.now_us()) if self._clock else ""


def _keys_of(reservation: Reservation) -> tuple[str, ...]:
    """In the order of `settle.lua` and `extend.lua`."""
    record, _, *totals = arithmetic.keys_of(reservation)
    return (record, *totals, reset_key(reservation.identifier))


def _lengths(reservation: Reservation) -> tuple[int, ...]:
    window, open_ = reservation.window_seconds, reservation.pending_seconds
    return (window, bucket_seconds_of(window), open_, pending_bucket_seconds_of(open_))


def _amounts(limits: Limits) -> tuple[str | int, ...]:
    return (
        limits.window_nanousd,
        limits.day_nanousd,
        "" if limits.network_window_nanousd is None else limits.network_window_nanousd,
        "" if limits.network_day_nanousd is None else limits.network_day_nanousd,
        limits.global_hour_nanousd,
        limits.global_day_nanousd,
    )


def _conflict(status: int) -> NoReturn:
    raise ReservationConflict("the reservation id is known, and " + arithmetic.CONFLICT_TEXT[status])


def open_atomic(link: Link, clock: Clock, *, decide_by_clock: bool = False) -> AtomicBackend:
    """Made by `backends.open_backend`; decides by Redis' own time unless a test says otherwise."""
    return AtomicBackend(link, clock if decide_by_clock else None)
