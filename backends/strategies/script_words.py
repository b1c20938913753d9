"""What the atomic strategy sends to its scripts, and what their replies mean. The scripts' heads have the tables."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

from backends import keys
from backends.clock import US_PER_SECOND
from backends.contract import Ask, Duplicate, DuplicateState, Limits, Outcome, Refusal, Reservation, Settlement, Verdict
from backends.records import digest_of
from backends.strategies import arithmetic, outcomes

TRY_AGAIN = {10, 11}
"""Too late for the deadline, or keys of another hour than Redis'."""
_DUPLICATE_STATE = {1: DuplicateState.IN_FLIGHT, 2: DuplicateState.SETTLED, 3: DuplicateState.EXPIRED}

ScriptCall = tuple[Sequence[str], Sequence[str | int]]
"""KEYS and ARGV."""


class Now(NamedTuple):
    """The times that a deciding script is sent."""

    text: str
    """Empty in production, where the script takes Redis' own; else unix microseconds."""
    us: int
    """What Redis' time is as far as we know."""
    deadline_us: int
    """The caller has given up then."""


def reserve_call(ask: Ask, request_digest: str, now: Now) -> ScriptCall:
    """The words of `reserve.lua`."""
    limits, now_seconds = ask.limits, now.us // US_PER_SECOND
    script_keys: Sequence[str] = keys.book_keys(ask.reservation_id, ask.identifier, ask.network, now_seconds)
    args: Sequence[str | int] = (
        now.text,
        now.deadline_us,
        now_seconds // keys.SECONDS_PER_HOUR,
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
    if ask.idempotency is None:
        return script_keys, args
    return (
        (*script_keys, keys.idempotency_key(ask.idempotency.digest)),
        (*args, ask.idempotency.body_digest, ask.reservation_id),
    )


def read_verdict(ask: Ask, backend: str, request_digest: str, reply: Sequence[Any]) -> Verdict:
    """The reply of `reserve.lua`.

    Raises:
        ReservationConflict: the id is known for another request, or has ended.
    """
    status = reply[0]
    if status == arithmetic.ADMITTED:
        return _admitted(ask, backend, request_digest, reply)
    if status in arithmetic.REASON_OF_STATUS:
        _, marker_seconds, now_us, wait_seconds, busy, cause = reply
        marker_seconds = marker_seconds if status <= arithmetic.LAST_STATUS_WITH_MARKER else 0
        decision = arithmetic.Decision(status, now_us, marker_seconds, wait_seconds, bool(busy), cause)
        return outcomes.refusal_of(ask, decision)
    if status == arithmetic.DUPLICATE:
        _, _, _, code, nanousd, same_body, rid = reply
        return Duplicate(rid.decode(errors="replace"), _DUPLICATE_STATE[code], nanousd, same_body=bool(same_body))
    raise outcomes.conflict(status)


def _admitted(ask: Ask, backend: str, request_digest: str, reply: Sequence[Any]) -> Reservation:
    _, pending_seconds, _, made_at_us, window_nanousd, day_nanousd, frees_at, reserved, expired, window_seconds = reply
    # By place and not by name: each decision passes here. An ask that is sent again has the lengths of its first time.
    return Reservation(
        ask.reservation_id,
        ask.identifier,
        ask.network,
        reserved,
        request_digest,
        made_at_us,
        window_seconds,
        pending_seconds,
        backend,
        window_nanousd,
        day_nanousd,
        frees_at,
        ask.idempotency,
        expired,
    )


def extend_call(
    reservation: Reservation, to_nanousd: int, at_least_nanousd: int, limits: Limits, now: Now
) -> ScriptCall:
    """The words of `extend.lua`."""
    script_keys = _keys_of(reservation)
    args: Sequence[str | int] = (
        now.text,
        now.deadline_us,
        reservation.request_digest,
        to_nanousd,
        at_least_nanousd,
        reservation.made_at_us,
        *_lengths(reservation),
        *_amounts(limits),
        keys.RECORD_KEEP_SECONDS,
    )
    if reservation.idempotency is None:
        return script_keys, args
    return (*script_keys, keys.idempotency_key(reservation.idempotency.digest)), (*args, reservation.reservation_id)


def read_extension(reservation: Reservation, limits: Limits, reply: Sequence[Any]) -> Reservation | Refusal:
    """The reply of `extend.lua`.

    Raises:
        ReservationConflict: the id is not known, has ended or expired, or stands for another request.
    """
    status = reply[0]
    if status == arithmetic.ADMITTED:
        _, reserved, _, window_nanousd, day_nanousd = reply
        return replace(
            reservation, cost_nanousd=reserved, window_spent_nanousd=window_nanousd, day_spent_nanousd=day_nanousd
        )
    if status in arithmetic.REASON_OF_STATUS:
        return outcomes.extension_refused(status, limits)
    raise outcomes.conflict(status)


def settle_call(reservation: Reservation, ending: str, actual_nanousd: int, now_text: str) -> ScriptCall:
    """The words of `settle.lua`; `ending` is ``settled`` or ``released``."""
    script_keys = _keys_of(reservation)
    args: Sequence[str | int] = (
        now_text,
        reservation.request_digest,
        ending,
        actual_nanousd,
        reservation.made_at_us,
        *_lengths(reservation),
        keys.RECORD_KEEP_SECONDS,
        digest_of(reservation.identifier),
        digest_of(reservation.network),
    )
    idempotency = reservation.idempotency
    if idempotency is None:
        return script_keys, args
    return (
        (*script_keys, keys.idempotency_key(idempotency.digest)),
        (*args, idempotency.body_digest, reservation.reservation_id, keys.IDEMPOTENCY_KEEP_SECONDS),
    )


def read_settlement(reservation: Reservation, ending: str, reply: Sequence[Any]) -> Settlement:
    """The reply of `settle.lua`.

    Raises:
        ReservationConflict: the id stands for another request.
    """
    status, booked, _, expired = reply
    if status == arithmetic.CONFLICT:
        raise outcomes.conflict(status)
    if status == arithmetic.REPEATED:
        return Settlement(reservation.reservation_id, Outcome.REPEATED, booked, 0)
    if status == arithmetic.EXPIRED:
        return outcomes.settlement_of(reservation, Outcome.EXPIRED, reservation.cost_nanousd)
    outcome = outcomes.outcome_of(ending, is_late=status == arithmetic.LATE)
    return outcomes.settlement_of(reservation, outcome, booked, expired)


def _keys_of(reservation: Reservation) -> tuple[str, ...]:
    """In the order of `settle.lua` and `extend.lua`."""
    record, _, *totals = outcomes.keys_of(reservation)
    return (record, *totals, keys.reset_key(reservation.identifier))


def _lengths(reservation: Reservation) -> tuple[int, ...]:
    window, pending = reservation.window_seconds, reservation.pending_seconds
    return (window, keys.bucket_seconds_of(window), pending, keys.pending_bucket_seconds_of(pending))


@lru_cache(maxsize=64)
def _amounts(limits: Limits) -> tuple[str | int, ...]:
    return (
        limits.window_nanousd,
        limits.day_nanousd,
        "" if limits.network_window_nanousd is None else limits.network_window_nanousd,
        "" if limits.network_day_nanousd is None else limits.network_day_nanousd,
        limits.global_hour_nanousd,
        limits.global_day_nanousd,
    )
