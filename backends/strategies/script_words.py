"""What the atomic strategy sends to its scripts, and what their replies mean. The scripts' heads have the tables."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

from backends.budgets import BUILT_IN, Budget, Scope, check
from backends.clock import US_PER_SECOND
from backends.contract import Ask, Duplicate, DuplicateState, Outcome, Refusal, Reservation, Settlement, Verdict
from backends.keys import (
    BOUNDARY_SECONDS,
    MARKER_PREFIX,
    RECORD_PREFIX,
    RUNNING_PREFIX,
    Row,
    idempotency_key,
    reset_key,
    rows_at,
)
from backends.records import NO_OWNER, digest_of, key_digest, pending_suffix, record_in
from backends.strategies import arithmetic, outcomes
from backends.strategies.arithmetic import NEVER_SECONDS

TRY_AGAIN = {10, 11}
"""Too late for the deadline, or keys of other periods than Redis'."""
_DUPLICATE_STATE = {1: DuplicateState.IN_FLIGHT, 2: DuplicateState.SETTLED, 3: DuplicateState.EXPIRED}


class ScriptCall(NamedTuple):
    """What a script is sent."""

    keys: Sequence[str]
    args: Sequence[str | int]
    shape: "Shape"


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

    from_seconds: int
    until_seconds: int
    """Unix time: from when to when its keys are those of the present periods."""
    key_parts: tuple[tuple[str, str, bool], ...]
    """Of each budget what its key begins and ends with, and whether the owner stands between."""
    windows_at: tuple[int, ...]
    """Which budgets are windows, from 0."""
    pending: tuple[tuple[str, int], ...]
    """Of each owner what its key of pending money begins with, and one of its budgets, from 0; -1 for everybody."""
    identifier_at: int
    """Which budget has the identifier as its owner, from 0; -1 without one."""
    network_at: int
    further_at: tuple[int, ...]
    """Which budgets a record names by their keys, from 0."""
    pending_format: str
    """With the digests of these keys: what follows the start in the members of pending money; empty without any."""
    window_seconds: int
    """Of the built-in windows, as a record has it; 0 where not all six are there."""
    plan: str
    kept: str
    kept_with_status: str
    mine: int
    """The number of the owner who is the identifier, from 1; 0 without one."""
    everybody: int
    """The number of the owner who is everybody, from 1; 0 without."""
    counts: tuple[str, str, str]
    """Budgets, windows, owners. Words are texts, which are packed in half the time of numbers."""
    limits: tuple[str, ...]
    windows: tuple[str, ...]
    renews_at: tuple[int | None, ...]
    """Of each budget the end of its period; of a window 0."""


_RULE = itemgetter(0, 2, 3, 4, 5, 6)
"""Of a budget all but its owner."""


def _shape_at(budgets: tuple[Budget, ...], at_seconds: int) -> Shape:
    return _shape(tuple(map(_RULE, budgets)), at_seconds // BOUNDARY_SECONDS)


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
    has_the_six = sum(row.layout.is_built_in for row in rows) == len(BUILT_IN)
    further_at = tuple(i for i, row in enumerate(rows) if not (has_the_six and row.layout.is_built_in))
    ends = [row.layout for row in rows if row.layout.end_seconds]
    kept = [f"{owner},{row.layout.keep_until_seconds}" for owner, row in zip(owner_of, rows, strict=True)]
    return Shape(
        from_seconds=max((layout.start_seconds for layout in ends), default=0),
        until_seconds=min((layout.end_seconds for layout in ends), default=NEVER_SECONDS),
        key_parts=tuple((row.layout.prefix, row.layout.suffix, row.layout.names_owner) for row in rows),
        windows_at=windows_at,
        pending=tuple((prefixes[scope], -1 if scope is Scope.GLOBAL else at[scope]) for scope in scopes),
        identifier_at=at.get(Scope.IDENTIFIER, -1),
        network_at=at.get(Scope.NETWORK, -1),
        further_at=further_at,
        pending_format="".join(f"{_pending_format(rows, further_at, scope)}," for scope in scopes if further_at),
        window_seconds=max(rows[i].layout.window_seconds * rows[i].layout.is_built_in for i in windows_at)
        if has_the_six
        else 0,
        plan="".join(
            f"{owner},{row.budget.throttle_seconds},{row.budget.is_shadow:d},{row.layout.plan} "
            for owner, row in zip(owner_of, rows, strict=True)
        ),
        kept="".join(f"{each} " for each in kept),
        kept_with_status="".join(f"{each},{row.layout.status} " for each, row in zip(kept, rows, strict=True)),
        mine=scopes.index(Scope.IDENTIFIER) + 1 if Scope.IDENTIFIER in scopes else 0,
        everybody=scopes.index(Scope.GLOBAL) + 1 if Scope.GLOBAL in scopes else 0,
        counts=(
            str(len(rows)),
            str(len(windows_at)),
            str(len(scopes)),
        ),
        limits=tuple("" if budget.limit_nanousd is None else str(budget.limit_nanousd) for budget in budgets),
        windows=tuple(
            str(word)
            for i in windows_at
            for word in (
                i + 1,
                rows[i].layout.window_seconds,
                _witness(rows, i, quarter * BOUNDARY_SECONDS),
            )
        ),
        renews_at=tuple(
            None if not (row.layout.window_seconds or row.layout.end_seconds) else row.layout.end_seconds
            for row in rows
        ),
    )


def _pending_format(rows: Sequence[Row], further_at: Sequence[int], scope: Scope) -> str:
    digests = "".join(f"{{{at}}}" for at, i in enumerate(further_at) if rows[i].budget.scope is scope)
    has_the_six = any(row.layout.is_built_in for row in rows if row.budget.scope is scope)
    return pending_suffix(digests, has_the_six=has_the_six)


def _witness(rows: Sequence[Row], window_at: int, now_seconds: int) -> int:
    """The number of the day of a built-in window's owner, if nothing that counts in the window is older; else 0.

    A window and its witness have to be charged together, always: the six are, and no other budgets are for certain.
    """
    window = rows[window_at]
    if not window.layout.is_built_in:
        return 0
    since = now_seconds - window.layout.window_seconds - 2 * window.bucket_seconds
    for number, row in enumerate(rows, 1):
        layout = row.layout
        if layout.is_built_in and layout.end_seconds and row.budget.scope is window.budget.scope:
            return number if layout.start_seconds <= since else 0
    return 0


def _keys_of(
    shape: Shape, reservation_id: str, budgets: tuple[Budget, ...], pending_seconds: int
) -> tuple[list[str], str, list[str]]:
    """The keys of a record, of budgets, of what windows came to, and of pending money.

    Then what the record says, and the digests in it of the keys of further budgets.
    """
    books = [
        f"{prefix}{budget[1]}{suffix}" if names_owner else f"{prefix}{suffix}"
        for (prefix, suffix, names_owner), budget in zip(shape.key_parts, budgets, strict=True)
    ]
    who, network = NO_OWNER, NO_OWNER
    if shape.window_seconds:
        who, network = digest_of(budgets[shape.identifier_at].owner), digest_of(budgets[shape.network_at].owner)
    charged_to = f"{shape.window_seconds} {pending_seconds} {who} {network}"
    digests = [key_digest(books[i]) for i in shape.further_at]
    if digests:
        charged_to = f"{charged_to} {''.join(digests)}"
    running = [f"{RUNNING_PREFIX}{books[i][4:]}" for i in shape.windows_at]
    pending = [prefix if i < 0 else f"{prefix}{budgets[i][1]}" for prefix, i in shape.pending]
    return [f"{RECORD_PREFIX}{reservation_id}", *books, *running, *pending], charged_to, digests


def reserve_call(ask: Ask, request_digest: str, now: Now) -> ScriptCall:
    """The words of `reserve.lua`."""
    budgets = ask.budgets
    shape = _shape_at(budgets, now.us // US_PER_SECOND)
    keys, charged_to, digests = _keys_of(shape, ask.reservation_id, budgets, ask.pending_seconds)
    mark = ""
    if shape.mine:
        keys.append(f"{MARKER_PREFIX}{budgets[shape.identifier_at].owner}")
        mark = "1" if ask.mark_when_busy else "0"
    args: list[str | int] = [
        now.text,
        now.deadline_us,
        shape.from_seconds,
        shape.until_seconds,
        request_digest,
        ask.cost_nanousd,
        "" if ask.at_least_nanousd is None else ask.at_least_nanousd,
        ask.pending_seconds,
        charged_to,
        mark,
        shape.plan,
        *shape.counts,
        shape.everybody,
        shape.pending_format.format(*digests) if digests else "",
        *shape.limits,
        *shape.windows,
    ]
    if ask.idempotency is not None:
        keys.append(idempotency_key(ask.idempotency.digest))
        args += (ask.idempotency.body_digest, ask.reservation_id)
    return ScriptCall(keys, args, shape)


def read_verdict(ask: Ask, backend: str, request_digest: str, shape: Shape, reply: Sequence[Any]) -> Verdict:
    """The reply of `reserve.lua` to a call of this shape.

    Raises:
        ReservationConflict: the id is known for another request, or has ended.
    """
    status = reply[0]
    if status == arithmetic.ADMITTED:
        return _admitted(ask, backend, request_digest, shape, reply)
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
    decision = arithmetic.Decision(status, now_us, marker_seconds, wait_seconds, bool(busy), row, cause)
    return outcomes.refusal_of(ask, decision)


def _admitted(ask: Ask, backend: str, request_digest: str, shape: Shape, reply: Sequence[Any]) -> Reservation:
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
    reservation: Reservation, to_nanousd: int, at_least_nanousd: int, limits: Mapping[str, int | None], now: Now
) -> ScriptCall:
    """The words of `extend.lua`; `limits` are by name."""
    shape, keys, _ = _of_reservation(reservation)
    its_limits = (limits.get(budget.name) for budget in reservation.budgets)
    args: list[str | int] = [
        now.text,
        now.deadline_us,
        reservation.request_digest,
        to_nanousd,
        at_least_nanousd,
        reservation.made_at_us,
        reservation.pending_seconds,
        shape.mine,
        shape.everybody,
        shape.kept_with_status,
        *shape.counts,
        *("" if limit is None else limit for limit in its_limits),
        *shape.windows,
    ]
    if reservation.idempotency is not None:
        args.append(reservation.reservation_id)
    return ScriptCall(keys, args, shape)


def read_extension(
    reservation: Reservation, limits: Mapping[str, int | None], reply: Sequence[Any]
) -> Reservation | Refusal:
    """The reply of `extend.lua`.

    Raises:
        ReservationConflict: the id is not known, has ended or expired, or stands for another request.
    """
    status, reserved, _, *amounts = reply
    if status == arithmetic.ADMITTED:
        return replace(reservation, cost_nanousd=reserved, spent_nanousd=tuple(amounts))
    if status in {arithmetic.ENDED, arithmetic.CONFLICT}:
        raise outcomes.conflict(status)
    return outcomes.extension_refused(outcomes.rows_of(reservation)[amounts[0] - 1], limits)


def settle_call(reservation: Reservation, ending: str, actual_nanousd: int, now_text: str) -> ScriptCall:
    """The words of `settle.lua`; `ending` is ``settled`` or ``released``."""
    shape, keys, charged_to = _of_reservation(reservation)
    args: list[str | int] = [
        now_text,
        reservation.request_digest,
        ending,
        actual_nanousd,
        reservation.made_at_us,
        reservation.pending_seconds,
        charged_to,
        shape.mine,
        shape.everybody,
        shape.kept,
        *shape.counts,
        *shape.windows,
    ]
    idempotency = reservation.idempotency
    if idempotency is not None:
        args += (idempotency.body_digest, reservation.reservation_id)
    return ScriptCall(keys, args, shape)


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


def _of_reservation(reservation: Reservation) -> tuple[Shape, list[str], str]:
    """What `settle.lua` and `extend.lua` are sent of the budgets, all their keys, and what the record says."""
    budgets = reservation.budgets
    shape = _shape_at(budgets, reservation.made_at_us // US_PER_SECOND)
    keys, charged_to, _ = _keys_of(shape, reservation.reservation_id, budgets, reservation.pending_seconds)
    if shape.mine:
        keys.append(reset_key(budgets[shape.identifier_at].owner))
    if reservation.idempotency is not None:
        keys.append(idempotency_key(reservation.idempotency.digest))
    return shape, keys, charged_to
