"""What the verbs return, and what they raise: the contract's values, made of what was decided and what is stored."""

import hashlib
from dataclasses import replace

from backends.clock import US_PER_SECOND
from backends.contract import Ask, Limits, Outcome, Reason, Refusal, Reservation, Settlement
from backends.errors import ReservationConflict
from backends.keys import RECORD_KEEP_SECONDS, BookKeys, book_keys, bucket_seconds_of
from backends.records import Record
from backends.strategies import arithmetic

_CONFLICT_TEXT = {arithmetic.ENDED: "has ended", arithmetic.CONFLICT: "stands for another request"}


def request_digest_of(ask: Ask) -> str:
    """16 hex digits, the same for an id that is sent again for the same request."""
    text = f"{ask.identifier}\n{ask.network}\n{ask.cost_nanousd}"
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def keys_of(reservation: Reservation) -> BookKeys:
    """The keys of the periods in which a reservation was made."""
    made_seconds = reservation.made_at_us // US_PER_SECOND
    return book_keys(reservation.reservation_id, reservation.identifier, reservation.network, made_seconds)


def conflict(status: int) -> ReservationConflict:
    """The error for the status `ENDED` or `CONFLICT`."""
    return ReservationConflict("the reservation id is known, and " + _CONFLICT_TEXT[status])


# Reservations.


def known_reservation(
    ask: Ask,
    backend: str,
    record: Record,
    *,
    window_nanousd: int = 0,
    day_nanousd: int = 0,
    window_frees_at_seconds: int = 0,
) -> Reservation:
    """The reservation that `ask` became before: its lengths are those of then, whatever the limits are now."""
    return Reservation(
        reservation_id=ask.reservation_id,
        identifier=ask.identifier,
        network=ask.network,
        cost_nanousd=record.nanousd,
        request_digest=record.request_digest,
        made_at_us=record.made_at_us,
        window_seconds=record.window_seconds,
        pending_seconds=record.pending_seconds,
        backend=backend,
        window_spent_nanousd=window_nanousd,
        day_spent_nanousd=day_nanousd,
        window_frees_at_seconds=window_frees_at_seconds,
        idempotency=ask.idempotency,
    )


def known_record(ask: Ask, record: Record | None) -> Record | None:
    """The record of a pending reservation whose ask is sent again; None for a new one.

    Raises:
        ReservationConflict: the id stands for another request, or has ended.
    """
    if record is None:
        return None
    if record.request_digest != request_digest_of(ask):
        raise conflict(arithmetic.CONFLICT)
    if record.state != "open":
        raise conflict(arithmetic.ENDED)
    return record


def found(ask: Ask, backend: str, record: Record | None) -> Reservation | None:
    """The pending reservation that a record stands for, if it is the one of `ask`."""
    if record is None or record.state != "open" or record.request_digest != request_digest_of(ask):
        return None
    return known_reservation(ask, backend, record)


# Refusals.


def refusal_of(ask: Ask, decision: arithmetic.Decision) -> Refusal:
    """The refusal that a decision stands for."""
    reason, cause = arithmetic.REASON_OF_STATUS[decision.status], arithmetic.REASON_OF_STATUS[decision.cause]
    can_never_fit = arithmetic.exceeds_a_limit(ask.limits, ask.least_nanousd)
    return Refusal(
        reason=reason,
        cause=cause,
        scope=arithmetic.BUDGET_OF_REASON[cause].scope,
        retry_after_seconds=None if can_never_fit else max(1, decision.wait_seconds),
        in_flight=decision.busy and not can_never_fit,
        can_never_fit=can_never_fit,
        marker_seconds=decision.marker_seconds,
        limit_nanousd=_limit_of(ask.limits, reason),
    )


def extension_refused(status: int, limits: Limits) -> Refusal:
    """The refusal of an extension: a reason and a scope; there is nothing to wait for."""
    reason = arithmetic.REASON_OF_STATUS[status]
    scope, limit = arithmetic.BUDGET_OF_REASON[reason].scope, _limit_of(limits, reason)
    return Refusal(
        reason, reason, scope, None, in_flight=False, can_never_fit=False, marker_seconds=0, limit_nanousd=limit
    )


def _limit_of(limits: Limits, reason: Reason) -> int | None:
    budget = arithmetic.BUDGET_OF_REASON.get(reason)
    return None if budget is None else budget.is_limited_by(limits)


# Extensions.


def extendable(reservation: Reservation, record: Record | None, now_us: int) -> Record:
    """The record of a reservation that may be extended.

    Raises:
        ReservationConflict: there is none, it has ended, it has expired, or it stands for another request.
    """
    if record is not None and record.request_digest != reservation.request_digest:
        raise conflict(arithmetic.CONFLICT)
    window, made = reservation.window_seconds, reservation.made_at_us // US_PER_SECOND
    start = made - made % bucket_seconds_of(window)
    has_expired = now_us >= reservation.made_at_us + reservation.pending_seconds * US_PER_SECOND
    is_in_window = arithmetic.window_bucket_counts(start, window, now_us)
    if record is None or record.state != "open" or has_expired or not is_in_window:
        raise conflict(arithmetic.ENDED)
    return record


def extended(
    reservation: Reservation, totals: arithmetic.Totals, reserved_nanousd: int, more_nanousd: int, *, is_cleared: bool
) -> Reservation:
    """The reservation with what it holds now."""
    own_nanousd = 0 if is_cleared else more_nanousd
    return replace(
        reservation,
        cost_nanousd=reserved_nanousd,
        window_spent_nanousd=totals.amounts["recent"] + own_nanousd,
        day_spent_nanousd=totals.amounts["daily"] + own_nanousd,
    )


# Ends.


def end_without_booking(reservation: Reservation, record: Record | None, now_us: int) -> Settlement | None:
    """The settlement of a reservation that leaves nothing to book, or None.

    Raises:
        ReservationConflict: the id stands for another request.
    """
    if record is None:
        # An end, which may come at once, is remembered for `RECORD_KEEP_SECONDS`. From then on a repeated settlement
        # must not pass for one whose record was lost, or it would be booked twice.
        has_aged_out = now_us >= reservation.made_at_us + RECORD_KEEP_SECONDS * US_PER_SECOND
        return settlement_of(reservation, Outcome.EXPIRED, reservation.cost_nanousd) if has_aged_out else None
    if record.request_digest != reservation.request_digest:
        raise conflict(arithmetic.CONFLICT)
    if record.state != "open":
        return Settlement(reservation.reservation_id, Outcome.REPEATED, record.nanousd, 0)
    return None


def outcome_of(ending: str, *, is_late: bool) -> Outcome:
    """The outcome of ``settled`` or ``released``; `is_late` where the record was lost with its booking."""
    if is_late:
        return Outcome.LATE
    return Outcome.RELEASED if ending == "released" else Outcome.SETTLED


def settlement_of(
    reservation: Reservation, outcome: Outcome, booked_nanousd: int, expired_nanousd: int = 0
) -> Settlement:
    """A settlement with its overrun."""
    overrun = max(0, booked_nanousd - reservation.cost_nanousd)
    return Settlement(reservation.reservation_id, outcome, booked_nanousd, overrun, expired_nanousd)
