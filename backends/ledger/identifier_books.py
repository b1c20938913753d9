"""One identifier's books, for the operator: `Ledger` reads them, and clears them.

Its books are its budgets of the scope `IDENTIFIER`. `show` never writes. `reset` is one script (`lua/reset.lua`): the
identifier starts from nothing; what others have spent with it, its network and everybody among them, stays.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from backends.budgets import BUILT_IN, Budget, Calendar, Reason, Scope, Sliding
from backends.clock import US_PER_SECOND
from backends.keys import (
    RECORD_PREFIX,
    RESET_KEEP_SECONDS,
    Row,
    bucket_seconds_of,
    cause_of,
    marker_key,
    reset_key,
    rows_at,
    running_key,
)
from backends.ledger.snapshot import read_texts, record_keys_where
from backends.progress import Progress, no_progress
from backends.records import (
    Record,
    buckets_of,
    budgets_charged,
    digest_of,
    key_digest,
    number_in,
    parse_record,
    state_of,
)
from backends.store.link import Client, Link
from backends.store.scripts import Script
from backends.strategies import arithmetic

MOST_SHOWN = 20
_RESET = Script("reset.lua")
_RECORDS_AT_ONCE = 5_000
_FIRST = {"window": 0, "day": 1}
"""The order in which budgets are listed; the others follow."""


@dataclass(frozen=True, slots=True)
class LimitUse:
    """How much of one budget is used. Spent, held and expired together are what its limit counts."""

    name: str
    """Of the budget."""
    limit_nanousd: int | None
    """None: there is no limit."""
    spent_nanousd: int
    """Settled, and what expired so long ago that its record is gone."""
    held_nanousd: int
    """By pending reservations."""
    expired_nanousd: int
    """By reservations that were not ended in time: it stays booked."""
    left_nanousd: int | None
    """None where there is no limit."""
    renews_at_seconds: int | None
    """Unix time: when the oldest amount leaves the window, or the period ends. None: never, or nothing is booked."""
    is_shadow: bool
    """It is booked, and never a reason to refuse."""


@dataclass(frozen=True, slots=True)
class ListedMarker:
    """A throttle marker that refuses its identifier now."""

    cause: str
    """daily_limit, window_limit, budget_limit, or by_hand."""
    budget: str
    """The name of the budget that set it; empty if it was set by hand."""
    busy: bool
    """Only pending reservations stood in the way."""
    left_seconds: int


@dataclass(frozen=True, slots=True)
class ListedReservation:
    """One reservation, by its record."""

    reservation_id: str
    state: str
    """open, expired, settled, released."""
    nanousd: int
    made_at_us: int
    age_seconds: int


@dataclass(frozen=True, slots=True)
class IdentifierBooks:
    """What is stored of an identifier, as of one moment."""

    identifier: str
    as_of_us: int
    limits: tuple[LimitUse, ...]
    """Window and day first, then the others in the order in which they were asked for."""
    marker: ListedMarker | None
    reset_at_us: int | None
    """When its books were last cleared; None once that is forgotten."""
    reservations: tuple[ListedReservation, ...]
    """The newest first, with those made before the books were cleared; at most `most` of `show`."""
    reservations_in_all: int
    is_known: bool
    """Whether anything is stored."""


@dataclass(frozen=True, slots=True)
class Cleared:
    """What `reset` took out of the identifier's books."""

    identifier: str
    at_us: int
    marker: bool
    window_nanousd: int
    """In all buckets, also in those that had left the window."""
    open_nanousd: int
    days_nanousd: int
    """Of today and yesterday."""
    further_nanousd: dict[str, int]
    """Of each further budget, by name: of the present period and its neighbours."""


class Ledger:
    """Shows and clears the books of one identifier in the Redis of `link`. Keeps nothing in memory."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def show(
        self,
        identifier: str,
        budgets: tuple[Budget, ...],
        *,
        most: int = MOST_SHOWN,
        progress: Progress = no_progress,
    ) -> IdentifierBooks:
        """What is booked for `identifier` in its budgets, those of the scope `IDENTIFIER`; changes nothing.

        Raises:
            StoreError: Redis could not be asked.
        """
        budgets = tuple(sorted(budgets, key=lambda budget: _FIRST.get(budget.name, len(_FIRST))))
        who = digest_of(identifier)
        keys = record_keys_where(self._link, lambda record: _is_of(record, who, budgets), progress)
        while True:
            rows = rows_at(budgets, self._link.time_us() // US_PER_SECOND)
            stored = self._read(identifier, rows, keys)
            # Around midnight the day that was read may not be the day of Redis' clock.
            if rows == rows_at(budgets, stored.now_us // US_PER_SECOND):
                return _books_of(identifier, stored, most)
            self._link.learn_time(stored.now_us, self._link.clock.monotonic_seconds())

    def reset(self, identifier: str, budgets: tuple[Budget, ...] = (), *, now_us: int | None = None) -> Cleared:
        """Clear marker, window, pending amounts, today and yesterday, and the same of its further `budgets`.

        A reservation made before that is out of these books, and its end does not change them; one made after is in.
        `now_us` is for tests: it takes the place of Redis' own time.

        Raises:
            StoreError: Redis could not be asked; whether it was cleared is unknown, and it may be repeated.
        """
        at_us = self._link.time_us() if now_us is None else now_us
        further = (budget for budget in budgets if budget.name not in BUILT_IN)
        rows = [*_open_rows([*_built_in(identifier), *further], at_us // US_PER_SECOND)]
        windows = [row for row in rows if row.layout.window_seconds]
        totals = [row for row in rows if not row.layout.window_seconds]
        keys = [reset_key(identifier), marker_key(identifier), rows[0].pending_key]
        keys += [*(row.key for row in (*windows, *totals)), *(running_key(row.key) for row in windows)]
        args = ("" if now_us is None else now_us, RESET_KEEP_SECONDS, len(windows), len(totals))
        reply: Sequence[Any] = self._link.run(lambda client: _RESET.run(client, keys, args))
        cleared_at_us, marker, pending, *amounts = reply
        nanousd: Counter[str] = Counter()
        for row, amount in zip((*windows, *totals), amounts, strict=True):
            nanousd[row.budget.name] += number_in(amount) or 0
        return Cleared(
            identifier,
            cleared_at_us,
            bool(marker),
            nanousd.pop("window"),
            int(pending),
            nanousd.pop("day"),
            {**nanousd},
        )

    def _read(self, identifier: str, rows: Sequence[Row], record_keys: Sequence[str]) -> "_Stored":
        """Everything as of one moment; only records beyond `_RECORDS_AT_ONCE` are read after it."""
        first, rest = record_keys[:_RECORDS_AT_ONCE], record_keys[_RECORDS_AT_ONCE:]
        (day, *_), marker = rows_at(_built_in(identifier), 0), marker_key(identifier)

        def read(client: Client) -> list[Any]:
            transaction: Any = client.pipeline(transaction=True)
            transaction.time().get(marker).pttl(marker).get(reset_key(identifier)).exists(day.pending_key)
            for row in rows:
                if row.layout.window_seconds:
                    transaction.zrange(row.key, 0, -1, withscores=True)
                else:
                    transaction.get(row.key)
            for key in first:
                transaction.get(key)
            answers: list[Any] = transaction.execute()
            return answers

        (seconds, us), marker_text, left_ms, reset, has_pending, *answers = self._link.run(read)
        held, texts = answers[: len(rows)], answers[len(rows) :]
        for start in range(0, len(rest), _RECORDS_AT_ONCE):
            texts += read_texts(self._link, rest[start : start + _RECORDS_AT_ONCE])
        read_records = zip(record_keys, map(parse_record, texts), strict=True)
        records = [(key, record) for key, record in read_records if record is not None]
        reset_at_us = int(reset) if reset is not None and reset.isdigit() else None
        now_us = int(seconds) * US_PER_SECOND + int(us)
        return _Stored(
            now_us=now_us,
            marker=marker_text,
            marker_left_ms=int(left_ms),
            totals=[_total(row, its, now_us) for row, its in zip(rows, held, strict=True)],
            reset_at_us=reset_at_us,
            records=records,
            is_known=bool(records or any(held) or has_pending or marker_text or reset_at_us),
        )


def _built_in(identifier: str) -> list[Budget]:
    """The identifier's built-in budgets, as far as their keys depend on them."""
    return [
        Budget(name, identifier, Sliding(1) if row.unit is None else Calendar(row.unit), None)
        for name, row in BUILT_IN.items()
        if row.scope is Scope.IDENTIFIER
    ]


def _open_rows(budgets: Sequence[Budget], at_seconds: int) -> Iterator[Row]:
    """The budgets in every period that may be the present one, whatever Redis' clock says."""
    for row in rows_at(budgets, at_seconds):
        yield row
        if row.layout.end_seconds:
            for beside_seconds in (row.layout.start_seconds - 1, row.layout.end_seconds):
                yield from rows_at([row.budget], beside_seconds)


def _is_of(record: Record, who: str, budgets: tuple[Budget, ...]) -> bool:
    """Whether it is the reservation of the identifier whose digest and budgets these are."""
    return record.who == who if record.has_the_six else bool(budgets_charged(record, budgets))


def _total(row: Row, held: Any, now_us: int) -> arithmetic.Total:
    window = row.layout.window_seconds
    if not window:
        return arithmetic.Total(row, arithmetic.amount(held), {})
    counting = arithmetic.live_buckets(buckets_of(held), row.bucket_seconds, window, now_us)
    return arithmetic.Total(row, sum(counting.values()), counting)


@dataclass(frozen=True, slots=True)
class _Stored:
    now_us: int
    marker: bytes | None
    marker_left_ms: int
    totals: list[arithmetic.Total]
    is_known: bool
    reset_at_us: int | None
    records: list[tuple[str, Record]]


def _books_of(identifier: str, stored: _Stored, most: int) -> IdentifierBooks:
    booked = [record for _, record in stored.records if record.made_at_us > (stored.reset_at_us or -1)]
    lines = [_line(key, record, stored.now_us) for key, record in stored.records]
    lines.sort(key=lambda line: (-line.made_at_us, line.reservation_id))
    return IdentifierBooks(
        identifier=identifier,
        as_of_us=stored.now_us,
        limits=tuple(_use(total, booked, stored.now_us) for total in stored.totals),
        marker=_marker(stored),
        reset_at_us=stored.reset_at_us,
        reservations=tuple(lines[:most]),
        reservations_in_all=len(lines),
        is_known=stored.is_known,
    )


def _use(total: arithmetic.Total, booked: Sequence[Record], now_us: int) -> LimitUse:
    amounts = {"open": 0, "expired": 0}
    for record in booked:
        state = state_of(record, now_us)
        if state in amounts and _is_booked_in(total.row, record, now_us):
            amounts[state] += record.nanousd
    budget, is_empty = total.row.budget, not (total.buckets or total.nanousd)
    limit = budget.limit_nanousd
    return LimitUse(
        name=budget.name,
        limit_nanousd=limit,
        spent_nanousd=max(0, total.nanousd - sum(amounts.values())),
        held_nanousd=amounts["open"],
        expired_nanousd=amounts["expired"],
        left_nanousd=None if limit is None else max(0, limit - total.nanousd),
        renews_at_seconds=None if is_empty else total.renews_at(now_us),
        is_shadow=budget.is_shadow,
    )


def _is_booked_in(row: Row, record: Record, now_us: int) -> bool:
    """Whether a reservation counts in the present period of a budget of its identifier."""
    layout, made = row.layout, record.made_at_us // US_PER_SECOND
    window = layout.window_seconds
    if layout.is_built_in and record.has_the_six:
        window = window and record.window_seconds
        is_in_period = bool(window) or layout.start_seconds <= made < layout.end_seconds
    else:
        is_in_period = key_digest(row.key) in record.further
    if not (window and is_in_period):
        return is_in_period
    return arithmetic.window_bucket_counts(made - made % bucket_seconds_of(window), window, now_us)


def _marker(stored: _Stored) -> ListedMarker | None:
    decision = arithmetic.decision_of_marker(stored.marker, stored.marker_left_ms, 0, stored.now_us)
    if decision is None:
        return None
    reason, budget = cause_of(decision.cause)
    if reason is not Reason.BUDGET_LIMIT and reason != decision.cause:
        return ListedMarker("by_hand", "", decision.busy, decision.marker_seconds)
    return ListedMarker(reason.value, budget, decision.busy, decision.marker_seconds)


def _line(key: str, record: Record, now_us: int) -> ListedReservation:
    return ListedReservation(
        reservation_id=key.removeprefix(RECORD_PREFIX),
        state=state_of(record, now_us),
        nanousd=record.nanousd,
        made_at_us=record.made_at_us,
        age_seconds=max(0, now_us - record.made_at_us) // US_PER_SECOND,
    )
