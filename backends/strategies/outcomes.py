"""What the verbs return, and what they raise: the contract's values, made of what was decided and what is stored."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import compress

from backends.budgets import Budget, Reason, Scope, owner_in
from backends.clock import US_PER_SECOND
from backends.contract import Ask, Outcome, Refusal, Reservation, Settlement
from backends.errors import ReservationConflict
from backends.keys import RECORD_KEEP_SECONDS, Row, cause_of, rows_at
from backends.records import REQUEST_DIGITS, Record, budgets_charged
from backends.strategies import arithmetic
from backends.strategies.arithmetic import Total

_CONFLICT_TEXT = {arithmetic.ENDED: "has ended", arithmetic.CONFLICT: "stands for another request"}


def request_digest_of(ask: Ask) -> str:
    """8 hex digits, the same for an id that is sent again for the same cost and owners, whatever the limits are."""
    return request_digest(asked_by(ask.budgets), ask.cost_nanousd)


def asked_by(budgets: tuple[Budget, ...]) -> str:
    """The identifier and the network; where there is neither, the owners of all budgets."""
    who, network = owner_in(budgets, Scope.IDENTIFIER), owner_in(budgets, Scope.NETWORK)
    if not (who or network):
        who = repr([(budget.name, budget.owner) for budget in budgets])
    return f"{who}\n{network}"


def request_digest(asked_by: str, cost_nanousd: int) -> str:
    """The digest of an ask for so much."""
    # The first digits of what versions before wrote.
    return hashlib.blake2b(f"{asked_by}\n{cost_nanousd}".encode(), digest_size=8).hexdigest()[:REQUEST_DIGITS]


def rows_of(reservation: Reservation) -> list[Row]:
    """The budgets of a reservation with their keys of the periods in which it was made."""
    return rows_at(reservation.budgets, reservation.made_at_us // US_PER_SECOND)


def conflict(status: int) -> ReservationConflict:
    """The error for the status `ENDED` or `CONFLICT`."""
    return ReservationConflict("the reservation id is known, and " + _CONFLICT_TEXT[status])


# Reservations.


def known_reservation(
    ask: Ask,
    backend: str,
    record: Record,
    spent_nanousd: Sequence[int] = (),
    renews_at_seconds: Sequence[int | None] = (),
) -> Reservation:
    """The reservation that `ask` became before: it is charged to what it was charged to then.

    `spent_nanousd` and `renews_at_seconds` are of each budget of the ask, now; empty where they were not read.
    """
    charged = budgets_charged(record, ask.budgets)
    names = {budget.name for budget in charged}
    kept = [budget.name in names for budget in ask.budgets]
    return Reservation(
        reservation_id=ask.reservation_id,
        cost_nanousd=record.nanousd,
        budgets=charged,
        request_digest=record.request_digest,
        made_at_us=record.made_at_us,
        pending_seconds=record.pending_seconds,
        backend=backend,
        spent_nanousd=tuple(compress(spent_nanousd, kept)),
        renews_at_seconds=tuple(compress(renews_at_seconds, kept)),
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
    row = decision.row
    if row is None:
        reason, (cause, budget), scope, limit = Reason.THROTTLED, cause_of(decision.cause), Scope.IDENTIFIER, None
    elif decision.by_share:
        reason, cause, budget, scope, limit = _by_share(row)
    else:
        reason = cause = row.layout.reason
        budget, scope, limit = row.budget.name, row.budget.scope, row.budget.limit_nanousd
    can_never_fit = arithmetic.exceeds_a_limit(ask, ask.least_nanousd)
    return Refusal(
        reason=reason,
        cause=cause,
        scope=scope,
        budget=budget,
        retry_after_seconds=None if can_never_fit or not decision.wait_seconds else decision.wait_seconds,
        in_flight=decision.busy and not can_never_fit,
        can_never_fit=can_never_fit,
        marker_seconds=decision.marker_seconds,
        limit_nanousd=limit,
    )


def _by_share(row: Row) -> tuple[Reason, Reason, str, Scope, None]:
    """What a refusal by a share says: it names the budget that is shared, and no limit, which changes with others."""
    of = row.budget.share.of if row.budget.share else row.budget.name
    return Reason.NETWORK_SHARE, Reason.NETWORK_SHARE, of, Scope.NETWORK, None


def extension_refused(row: Row, *, by_share: bool = False) -> Refusal:
    """The refusal of an extension: the budget that refused, with its limit of now; there is nothing to wait for."""
    reason = cause = row.layout.reason
    budget, scope, limit_nanousd = row.budget.name, row.budget.scope, row.budget.limit_nanousd
    if by_share:
        reason, cause, budget, scope, limit_nanousd = _by_share(row)
    return Refusal(
        reason=reason,
        cause=cause,
        scope=scope,
        budget=budget,
        retry_after_seconds=None,
        in_flight=False,
        can_never_fit=False,
        marker_seconds=0,
        limit_nanousd=limit_nanousd,
    )


# Extensions.


def extendable(reservation: Reservation, record: Record | None, now_us: int) -> Record:
    """The record of a reservation that may be extended.

    Raises:
        ReservationConflict: there is none, it has ended, it has expired, or it stands for another request.
    """
    if record is not None and record.request_digest != reservation.request_digest:
        raise conflict(arithmetic.CONFLICT)
    has_expired = now_us >= reservation.made_at_us + reservation.pending_seconds * US_PER_SECOND
    booked = arithmetic.charges(rows_of(reservation), reservation.made_at_us, now_us)
    is_in_window = all(
        charge.member is None or charge.counts_until_seconds * US_PER_SECOND > now_us for charge in booked
    )
    if record is None or record.state != "open" or has_expired or not is_in_window:
        raise conflict(arithmetic.ENDED)
    return record


def extended(
    reservation: Reservation, totals: Sequence[Total], reserved_nanousd: int, more_nanousd: int, *, is_cleared: bool
) -> Reservation:
    """The reservation with what it holds now."""
    return replace(
        reservation,
        cost_nanousd=reserved_nanousd,
        spent_nanousd=tuple(
            total.nanousd + (0 if is_cleared and total.row.budget.scope is Scope.IDENTIFIER else more_nanousd)
            for total in totals
        ),
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
