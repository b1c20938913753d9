"""The atomic strategy: one script a verb, one round trip, all scopes or none.

The decision *is* `lua/reserve.lua`; this file only names the keys, hands over the numbers and reads the reply.
"""

# ruff: noqa: D102 (what the verbs do is said once, at `contract.Backend`)

from collections.abc import Sequence
from typing import Any

from backends import rules
from backends.books import read_books
from backends.clock import Clock
from backends.contract import Ask, Books, Outcome, Refusal, Reservation, Settlement
from backends.errors import ReservationConflict, StoreBusy
from backends.keys import (
    RECORD_KEEP_SECONDS,
    SECONDS_PER_HOUR,
    book_keys,
    bucket_seconds_of,
    open_bucket_seconds_of,
)
from backends.link import Link
from backends.scripts import Script

_RESERVE, _SETTLE = Script("reserve.lua"), Script("settle.lua")
_TRIES = 3

OUTCOME_OF_STATUS = {
    rules.SETTLED: Outcome.SETTLED,
    rules.LATE: Outcome.LATE,
    rules.EXPIRED: Outcome.EXPIRED,
}


class AtomicBackend:
    """Keeps the promise: not a nano-dollar over any limit, under any concurrency.

    Args:
        link: the Redis that holds the books.
        clock: for tests only: decides in place of Redis' own time.
    """

    name = "atomic"
    promises_atomicity = True
    reserve_script = _RESERVE.file_name

    def __init__(self, link: Link, clock: Clock | None = None) -> None:
        self._link = link
        self._clock = clock

    def reserve(self, ask: Ask) -> Reservation | Refusal:
        terms = rules.terms_of(ask.identifier, ask.network, ask.cost_nanousd)
        for _ in range(_TRIES):
            reply = self._ask_redis(ask, terms)
            status = reply[0]
            if status == rules.ADMITTED:
                return rules.reservation_of(ask, self.name, reply[3], reply[4], reply[5])
            if status in rules.REASON_OF_STATUS:
                _, marker_seconds, now_us, wait_seconds, busy, cause = reply
                marker_seconds = marker_seconds if status <= rules.LAST_STATUS_WITH_MARKER else 0
                verdict = rules.Verdict(status, now_us, marker_seconds, wait_seconds, bool(busy), cause)
                return rules.refusal_of(ask, verdict)
            if status in (rules.ENDED, rules.CONFLICT):
                raise ReservationConflict("the reservation id is known, and " + rules.CONFLICT_TEXT[status])
            # Too late or at the turn of an hour: nothing was charged, and the reply has told us Redis' time.
        raise StoreBusy("the question reached Redis only after its deadline")

    def find(self, ask: Ask) -> Reservation | None:
        key = book_keys(ask.reservation_id, ask.identifier, ask.network, 0).record
        text: Any = self._link.run(lambda r: r.get(key))
        return rules.found(ask, self.name, rules.parse_record(text))

    def settle(self, reservation: Reservation, actual_nanousd: int) -> Settlement:
        made_seconds = reservation.made_at_us // rules.US
        keys = book_keys(reservation.reservation_id, reservation.identifier, reservation.network, made_seconds)
        record, _, *totals = keys
        args = (
            self._now_text(),
            rules.terms_of(reservation.identifier, reservation.network, reservation.cost_nanousd),
            reservation.cost_nanousd,
            actual_nanousd,
            reservation.made_at_us,
            reservation.window_seconds,
            bucket_seconds_of(reservation.window_seconds),
            reservation.open_seconds,
            open_bucket_seconds_of(reservation.open_seconds),
            RECORD_KEEP_SECONDS,
        )
        status, booked, _ = self._link.run(lambda client: _SETTLE.run(client, (record, *totals), args))
        if status == rules.CONFLICT:
            raise ReservationConflict("the reservation id is known, and " + rules.CONFLICT_TEXT[status])
        if status == rules.REPEATED:
            return Settlement(reservation.reservation_id, Outcome.REPEATED, booked, 0)
        return rules.settlement_of(reservation, OUTCOME_OF_STATUS[status], booked)

    def books(self, identifier: str, network: str, window_seconds: int) -> Books:
        return read_books(self._link, self._clock, identifier, network, window_seconds)

    def close(self) -> None:
        self._link.close()

    def _ask_redis(self, ask: Ask, terms: str) -> Sequence[int]:
        link, limits = self._link, ask.limits
        now_us = self._clock.now_us() if self._clock else link.time_us()
        deadline_us = now_us + int(link.timeout_seconds * rules.US)
        now_seconds = now_us // rules.US
        keys = book_keys(ask.reservation_id, ask.identifier, ask.network, now_seconds)
        args = (
            self._now_text(),
            deadline_us,
            now_seconds // SECONDS_PER_HOUR,
            ask.cost_nanousd,
            terms,
            limits.window_seconds,
            bucket_seconds_of(limits.window_seconds),
            limits.window_nanousd,
            limits.day_nanousd,
            "" if limits.network_window_nanousd is None else limits.network_window_nanousd,
            "" if limits.network_day_nanousd is None else limits.network_day_nanousd,
            limits.global_hour_nanousd,
            limits.global_day_nanousd,
            limits.throttle_seconds,
            "1" if limits.mark_when_busy else "0",
            ask.open_seconds,
            open_bucket_seconds_of(ask.open_seconds),
            RECORD_KEEP_SECONDS,
        )
        asked_at = link.monotonic_seconds()
        reply: Sequence[int] = link.run(lambda client: _RESERVE.run(client, keys, args))
        if not self._clock:
            link.learn_time(reply[2], asked_at)
        return reply

    def _now_text(self) -> str:
        return str(self._clock.now_us()) if self._clock else ""


def open_atomic(link: Link, clock: Clock, *, decide_by_clock: bool = False) -> AtomicBackend:
    """Made by `backends.open_backend`; decides by Redis' own time unless a test says otherwise."""
    return AtomicBackend(link, clock if decide_by_clock else None)
