"""The scripts as they were before budgets became rows (27 November 2026): data, to measure those of today beside them.

They charge six budgets, each of which has its own place in KEYS and ARGV; the tables are at their heads. The functions
make these words, and take what those of `backends.strategies.script_words` take.
"""

from collections.abc import Iterable, Sequence

from backends.budgets import SECONDS_PER_HOUR, Budget
from backends.clock import US_PER_SECOND
from backends.contract import Ask, Reservation
from backends.keys import (
    RECORD_KEEP_SECONDS,
    Row,
    bucket_seconds_of,
    marker_key,
    pending_bucket_seconds_of,
    record_key,
    reset_key,
    rows_at,
)
from backends.records import digest_of
from backends.strategies.arithmetic import pending_keys
from backends.strategies.outcomes import request_digest_of
from backends.strategies.script_words import Now

Words = tuple[list[str], list[str | int]]
"""KEYS and ARGV."""
ORDER = ("window", "day", "network_window", "network_day", "global_hour", "global_day")


def reserve_call(ask: Ask, now: Now) -> Words:
    """The words of `reserve.lua`, without an idempotency key."""
    now_seconds = now.us // US_PER_SECOND
    rows = _in_order(ask.budgets, now_seconds)
    window, network = rows[0], rows[2]
    keys = [record_key(ask.reservation_id), marker_key(ask.identifier), *(row.key for row in rows), *pending_keys(rows)]
    args: list[str | int] = [
        now.text,
        now.deadline_us,
        now_seconds // SECONDS_PER_HOUR,
        ask.cost_nanousd,
        request_digest_of(ask),
        window.layout.window_seconds,
        *_amounts(row.budget.limit_nanousd for row in rows),
        window.budget.throttle_seconds,
        "1" if ask.mark_when_busy else "0",
        ask.pending_seconds,
        f"{digest_of(window.budget.owner)} {digest_of(network.budget.owner)}",
        "" if ask.at_least_nanousd is None else ask.at_least_nanousd,
    ]
    return keys, args


def extend_call(
    reservation: Reservation, to_nanousd: int, at_least_nanousd: int, budgets: Sequence[Budget], now: Now
) -> Words:
    """The words of `extend.lua`, without an idempotency key."""
    rows, limits = _rows_of(reservation), {budget.name: budget.limit_nanousd for budget in budgets}
    args: list[str | int] = [
        now.text,
        now.deadline_us,
        reservation.request_digest,
        to_nanousd,
        at_least_nanousd,
        reservation.made_at_us,
        *_lengths(reservation, rows),
        *_amounts(limits[name] for name in ORDER),
        RECORD_KEEP_SECONDS,
    ]
    return _keys_of(reservation, rows), args


def settle_call(reservation: Reservation, ending: str, actual_nanousd: int, now_text: str) -> Words:
    """The words of `settle.lua`, without an idempotency key."""
    rows = _rows_of(reservation)
    args: list[str | int] = [
        now_text,
        reservation.request_digest,
        ending,
        actual_nanousd,
        reservation.made_at_us,
        *_lengths(reservation, rows),
        RECORD_KEEP_SECONDS,
        digest_of(rows[0].budget.owner),
        digest_of(rows[2].budget.owner),
    ]
    return _keys_of(reservation, rows), args


def _in_order(budgets: Sequence[Budget], at_seconds: int) -> list[Row]:
    rows = {row.budget.name: row for row in rows_at(budgets, at_seconds)}
    return [rows[name] for name in ORDER]


def _rows_of(reservation: Reservation) -> list[Row]:
    return _in_order(reservation.budgets, reservation.made_at_us // US_PER_SECOND)


def _keys_of(reservation: Reservation, rows: Sequence[Row]) -> list[str]:
    record, reset = record_key(reservation.reservation_id), reset_key(reservation.identifier)
    return [record, *(row.key for row in rows), *pending_keys(rows), reset]


def _lengths(reservation: Reservation, rows: Sequence[Row]) -> tuple[int, ...]:
    window, pending = rows[0].layout.window_seconds, reservation.pending_seconds
    return window, bucket_seconds_of(window), pending, pending_bucket_seconds_of(pending)


def _amounts(limits_nanousd: Iterable[int | None]) -> list[str | int]:
    return ["" if limit is None else limit for limit in limits_nanousd]
