"""What the atomic strategy sends to its scripts, and what their replies mean. The scripts' heads have the tables."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

from backends.budgets import SHARE_STATUS, Budget, Scope, check, enforced_limit, shares_in
from backends.clock import US_PER_SECOND
from backends.contract import Ask, Duplicate, DuplicateState, Outcome, Refusal, Reservation, Settlement, Verdict
from backends.keys import (
    BOUNDARY_SECONDS,
    RECORD_PREFIX,
    Row,
    idempotency_key,
    marker_key,
    reset_key,
    rows_at,
    running_key,
)
from backends.records import NO_OWNER, digest_of, key_digest, pending_suffix, record_in, stored_state
from backends.strategies import arithmetic, outcomes
from backends.strategies.arithmetic import NEVER_SECONDS

TRY_AGAIN = {10, 11}
"""Too late for the deadline, or keys of other periods than Redis'."""
_DUPLICATE_STATE = {1: DuplicateState.IN_FLIGHT, 2: DuplicateState.SETTLED, 3: DuplicateState.EXPIRED}


class ScriptCall(NamedTuple):
    """What a script is sent."""

    keys: tuple[str, ...]
    args: tuple[str | int, ...]
    shape: "Shape"
    request_digest: str


class Now(NamedTuple):
    """The times that a deciding script is sent."""

    text: str
    """Empty in production, where the script takes Redis' own; else unix microseconds."""
    us: int
    """What Redis' time is as far as we know."""
    deadline_us: int
    """The caller has given up then."""


class Shape(NamedTuple):
    """What the scripts are sent of budgets: the same for all owners, while no period ends."""

    key_parts: tuple[tuple[str, str, bool], ...]
    """Of each budget what its key begins and ends with, and whether the owner stands between."""
    windows_at: tuple[int, ...]
    """Which budgets are windows, from 0."""
    pending: tuple[tuple[str, int], ...]
    """Of each owner what its key of pending money begins with, and one of its budgets, from 0; -1 for everybody."""
    pending_format: str
    """With the digests that a record has: what follows the start in the members of these; empty without digests."""
    identifier_at: int
    """Which budget has the identifier as its owner, from 0; -1 without one."""
    network_at: int
    further_at: tuple[int, ...]
    """Which budgets a record names by their keys, from 0."""
    window_seconds: int
    """Of the built-in windows, as a record has it; 0 where not all six are there."""
    counts: str
    """Budgets, windows and owners, and the number of the owner who is everybody, from 1; 0 without."""
    mine: int
    """The number of the owner who is the identifier, from 1; 0 without one."""
    span: str
    """Unix time: from when to when these are the keys of the present periods."""
    limits: str
    shares: str
    plan: str
    kept: str
    renews_at: tuple[int | None, ...]
    """Of each budget the end of its period; of a window 0."""


_RULE = itemgetter(0, 2, 3, 4, 5, 6, 7)
"""Of a budget all but its owner."""


@lru_cache(maxsize=1_024)
def _shape(rules: tuple[tuple[Any, ...], ...], quarter: int) -> Shape:
    budgets = [Budget(name, "", *rest) for name, *rest in rules]
    check(budgets)
    rows = rows_at(budgets, quarter * BOUNDARY_SECONDS)
    scopes = list(dict.fromkeys(row.budget.scope for row in rows))
    owner_of = [scopes.index(row.budget.scope) + 1 for row in rows]
    at = {scope: owner_of.index(number) for number, scope in enumerate(scopes, 1)}
    prefixes = {row.budget.scope: row.layout.pending_prefix for row in rows}
    windows_at = tuple(i for i, row in enumerate(rows) if row.layout.window_seconds)
    built_in = [row.layout.window_seconds for row in rows if row.layout.is_built_in]
    further_at = tuple(i for i, row in enumerate(rows) if not row.layout.is_built_in)
    ends = [row.layout for row in rows if row.layout.end_seconds]
    from_seconds = max((layout.start_seconds for layout in ends), default=0)
    until_seconds = min((layout.end_seconds for layout in ends), default=NEVER_SECONDS)
    limits = ("" if row.budget.limit_nanousd is None else row.budget.limit_nanousd for row in rows)
    everybody = scopes.index(Scope.GLOBAL) + 1 if Scope.GLOBAL in scopes else 0
    return Shape(
        key_parts=tuple((row.layout.prefix, row.layout.suffix, row.layout.names_owner) for row in rows),
        windows_at=windows_at,
        pending=tuple((prefixes[scope], -1 if scope is Scope.GLOBAL else at[scope]) for scope in scopes),
        pending_format="".join(f"{_pending_format(rows, further_at, scope)}," for scope in scopes if further_at),
        identifier_at=at.get(Scope.IDENTIFIER, -1),
        network_at=at.get(Scope.NETWORK, -1),
        further_at=further_at,
        window_seconds=max(built_in, default=0),
        counts=f"{len(rows)} {len(windows_at)} {len(scopes)} {everybody}",
        mine=scopes.index(Scope.IDENTIFIER) + 1 if Scope.IDENTIFIER in scopes else 0,
        span=f"{from_seconds} {until_seconds}",
        limits="".join(f"{limit},{row.layout.window_seconds} " for limit, row in zip(limits, rows, strict=True)),
        shares=_shares_word(budgets),
        plan="".join(
            f"{owner},{row.budget.throttle_seconds},{row.budget.is_shadow:d},{row.layout.plan} "
            for owner, row in zip(owner_of, rows, strict=True)
        ),
        kept="".join(
            f"{owner},{row.layout.window_seconds},{row.layout.keep_until_seconds},{row.layout.status} "
            for owner, row in zip(owner_of, rows, strict=True)
        ),
        renews_at=tuple(
            None if not (row.layout.window_seconds or row.layout.end_seconds) else row.layout.end_seconds
            for row in rows
        ),
    )


def _shares_word(budgets: Sequence[Budget]) -> str:
    return "".join(f"{part + 1},{whole + 1},{share.millionths} " for part, whole, share in shares_in(budgets))


def _pending_format(rows: Sequence[Row], further_at: Sequence[int], scope: Scope) -> str:
    digests = "".join(f"{{{at}}}" for at, i in enumerate(further_at) if rows[i].budget.scope is scope)
    has_the_six = any(row.layout.is_built_in for row in rows if row.budget.scope is scope)
    return pending_suffix(digests, has_the_six=has_the_six)


class Owned(NamedTuple):
    """What the scripts are sent of the budgets of certain owners."""

    shape: Shape
    keys: tuple[str, ...]
    """Of `reserve.lua`, between the record and what belongs to an idempotency key."""
    keys_at_end: tuple[str, ...]
    """The same of the other scripts."""
    charged_to: str
    """What a record says."""
    asked_by: str
    """What a request digest is made of, beside the cost."""
    words: tuple[str, ...]
    """Of `reserve.lua`: from `counts` to `pending`."""
    words_at_end: tuple[str, ...]
    """Of the other scripts: `counts` and `plan`."""


def _owned_at(budgets: tuple[Budget, ...], at_seconds: int, pending_seconds: int) -> Owned:
    return _owned(budgets, at_seconds // BOUNDARY_SECONDS, pending_seconds)


# An end comes to what its reservation came to, and so does the next request of the same visitor.
@lru_cache(maxsize=1_024)
def _owned(budgets: tuple[Budget, ...], quarter: int, pending_seconds: int) -> Owned:
    shape = _shape(tuple(map(_RULE, budgets)), quarter)
    books = [
        f"{prefix}{budget.owner}{suffix}" if names_owner else f"{prefix}{suffix}"
        for (prefix, suffix, names_owner), budget in zip(shape.key_parts, budgets, strict=True)
    ]
    who, network = NO_OWNER, NO_OWNER
    if shape.window_seconds:
        who, network = digest_of(budgets[shape.identifier_at].owner), digest_of(budgets[shape.network_at].owner)
    digests = [key_digest(books[i]) for i in shape.further_at]
    running = [running_key(books[i]) for i in shape.windows_at]
    pending = [prefix if i < 0 else f"{prefix}{budgets[i].owner}" for prefix, i in shape.pending]
    keys = (*books, *running, *pending)
    identifier = budgets[shape.identifier_at].owner if shape.mine else None
    suffixes = shape.pending_format.format(*digests)
    return Owned(
        shape=shape,
        keys=keys if identifier is None else (*keys, marker_key(identifier)),
        keys_at_end=keys if identifier is None else (*keys, reset_key(identifier)),
        charged_to=f"{shape.window_seconds} {pending_seconds} {who} {network} {''.join(digests)}".rstrip(),
        asked_by=outcomes.asked_by(budgets),
        words=(f"{pending_seconds} {shape.counts} {shape.span}", shape.limits, shape.shares, shape.plan, suffixes),
        words_at_end=(f"{pending_seconds} {shape.counts} {shape.mine}", shape.kept),
    )


def reserve_call(ask: Ask, now: Now) -> ScriptCall:
    """The words of `reserve.lua`."""
    owned, idempotency = _owned_at(ask.budgets, now.us // US_PER_SECOND, ask.pending_seconds), ask.idempotency
    request_digest = outcomes.request_digest(owned.asked_by, ask.cost_nanousd)
    keys, args = (
        (f"{RECORD_PREFIX}{ask.reservation_id}", *owned.keys),
        (
            now.text,
            now.deadline_us,
            ask.cost_nanousd,
            "" if ask.at_least_nanousd is None else ask.at_least_nanousd,
            request_digest,
            owned.charged_to,
            ("1" if ask.mark_when_busy else "0") if owned.shape.mine else "",
            *owned.words,
        ),
    )
    if idempotency is not None:
        keys, args = (
            (*keys, idempotency_key(idempotency.digest)),
            (*args, idempotency.body_digest, ask.reservation_id),
        )
    return ScriptCall(keys, args, owned.shape, request_digest)


def read_verdict(ask: Ask, backend: str, call: ScriptCall, reply: Sequence[Any]) -> Verdict:
    """The reply of `reserve.lua` to this call.

    Raises:
        ReservationConflict: the id is known for another request, or has ended.
    """
    status = reply[0]
    if status == arithmetic.ADMITTED:
        return _admitted(ask, backend, call, reply)
    if status == arithmetic.DUPLICATE:
        _, _, _, code, nanousd, same_body, rid = reply
        return Duplicate(rid.decode(errors="replace"), _DUPLICATE_STATE[code], nanousd, same_body=bool(same_body))
    if status in {arithmetic.ENDED, arithmetic.CONFLICT}:
        raise outcomes.conflict(status)
    _, marker_seconds, now_us, wait_seconds, busy, why = reply
    row, cause = None, ""
    if status == arithmetic.THROTTLED:
        cause = why.decode(errors="replace")
    else:
        row = rows_at(ask.budgets, now_us // US_PER_SECOND)[why - 1]
    by_share = status == SHARE_STATUS
    decision = arithmetic.Decision(
        status, now_us, marker_seconds, wait_seconds, bool(busy), row, cause, by_share=by_share
    )
    return outcomes.refusal_of(ask, decision)


def _admitted(ask: Ask, backend: str, call: ScriptCall, reply: Sequence[Any]) -> Reservation:
    shape, request_digest = call.shape, call.request_digest
    budgets, windows_from = ask.budgets, 8 + len(shape.key_parts)
    _, pending_seconds, _, made_at_us, reserved, expired, over_shadow, known = reply[:8]
    spent, renews_at = tuple(reply[8:windows_from]), [*shape.renews_at]
    for i, frees_at in zip(shape.windows_at, reply[windows_from:], strict=True):
        renews_at[i] = frees_at
    if known:
        text = f"open {reserved} {made_at_us} {request_digest} ".encode() + known
        return outcomes.known_reservation(ask, backend, record_in(text), spent, renews_at)
    # By place and not by name: each decision passes here.
    return Reservation(
        ask.reservation_id,
        reserved,
        budgets,
        request_digest,
        made_at_us,
        pending_seconds,
        backend,
        spent,
        tuple(renews_at),
        ask.idempotency,
        expired,
        tuple(budgets[int(number) - 1].name for number in over_shadow.split()) if over_shadow else (),
    )


def extend_call(
    reservation: Reservation, to_nanousd: int, at_least_nanousd: int, budgets: Sequence[Budget], now: Now
) -> ScriptCall:
    """The words of `extend.lua`; `budgets` are the reservation's, with what limits them now."""
    owned, keys = _of_reservation(reservation)
    limits = map(enforced_limit, budgets)
    args = (
        now.text,
        now.deadline_us,
        reservation.request_digest,
        to_nanousd,
        at_least_nanousd,
        reservation.made_at_us,
        *owned.words_at_end,
        "".join(" " if limit is None else f"{limit} " for limit in limits),
        _shares_word(budgets),
        *(() if reservation.idempotency is None else (reservation.reservation_id,)),
    )
    return ScriptCall(keys, args, owned.shape, reservation.request_digest)


def read_extension(reservation: Reservation, budgets: Sequence[Budget], reply: Sequence[Any]) -> Reservation | Refusal:
    """The reply of `extend.lua` about the same `budgets`.

    Raises:
        ReservationConflict: the id is not known, has ended or expired, or stands for another request.
    """
    status, reserved, _, *amounts = reply
    if status == arithmetic.ADMITTED:
        return replace(reservation, cost_nanousd=reserved, spent_nanousd=tuple(amounts))
    if status in {arithmetic.ENDED, arithmetic.CONFLICT}:
        raise outcomes.conflict(status)
    at = amounts[0] - 1
    row = outcomes.rows_of(reservation)[at]._replace(budget=budgets[at])
    return outcomes.extension_refused(row, by_share=status == SHARE_STATUS)


def settle_call(reservation: Reservation, ending: str, actual_nanousd: int, now_text: str) -> ScriptCall:
    """The words of `settle.lua`; `ending` is ``settled`` or ``released``."""
    (owned, keys), idempotency = _of_reservation(reservation), reservation.idempotency
    args = (
        now_text,
        reservation.request_digest,
        stored_state(ending),
        actual_nanousd,
        reservation.made_at_us,
        owned.charged_to,
        *owned.words_at_end,
        *(() if idempotency is None else (idempotency.body_digest, reservation.reservation_id)),
    )
    return ScriptCall(keys, args, owned.shape, reservation.request_digest)


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


def _of_reservation(reservation: Reservation) -> tuple[Owned, tuple[str, ...]]:
    """What `settle.lua` and `extend.lua` are sent of the budgets, and all their keys."""
    made_seconds, idempotency = reservation.made_at_us // US_PER_SECOND, reservation.idempotency
    owned = _owned_at(reservation.budgets, made_seconds, reservation.pending_seconds)
    of_key = () if idempotency is None else (idempotency_key(idempotency.digest),)
    return owned, (f"{RECORD_PREFIX}{reservation.reservation_id}", *owned.keys_at_end, *of_key)
