"""One identifier's books, for the operator: `Ledger` reads them, and clears them.

`show` never writes. `reset` is one script (`lua/reset.lua`): the identifier starts from nothing; what its network and
the global scope have spent stays.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from backends.clock import US_PER_SECOND
from backends.contract import Limits
from backends.keys import RECORD_PREFIX, RESET_KEEP_SECONDS, SECONDS_PER_DAY, book_keys, bucket_seconds_of, reset_key
from backends.ledger.snapshot import read_texts, record_keys_of
from backends.progress import Progress, no_progress
from backends.records import Record, buckets_of, number_in, parse_record, state_of
from backends.store.link import Client, Link
from backends.store.scripts import Script
from backends.strategies import arithmetic

MOST_SHOWN = 20
_RESET = Script("reset.lua")
_RECORDS_AT_ONCE = 5_000


@dataclass(frozen=True, slots=True)
class LimitUse:
    """How much of one limit is used. Spent, held and expired together are what the limit counts."""

    name: str
    """window or day."""
    limit_nanousd: int
    spent_nanousd: int
    """Settled, and what expired so long ago that its record is gone."""
    held_nanousd: int
    """By pending reservations."""
    expired_nanousd: int
    """By reservations that were not ended in time: it stays booked."""
    left_nanousd: int
    renews_at_seconds: int | None
    """Unix time: when the oldest amount leaves the window, or the day ends. None where nothing is booked."""


@dataclass(frozen=True, slots=True)
class ListedMarker:
    """A throttle marker that refuses its identifier now."""

    cause: str
    """daily_limit, window_limit, or by_hand."""
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


class Ledger:
    """Shows and clears the books of one identifier in the Redis of `link`. Keeps nothing in memory."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def show(
        self, identifier: str, limits: Limits, *, most: int = MOST_SHOWN, progress: Progress = no_progress
    ) -> IdentifierBooks:
        """What is booked for `identifier`, against `limits`; changes nothing.

        Raises:
            StoreError: Redis could not be asked.
        """
        keys = record_keys_of(self._link, identifier, progress)
        while True:
            read_at_us = self._link.time_us()
            stored = self._read(identifier, read_at_us, keys)
            now_us = stored.now_us
            # Around midnight the day that was read may not be the day of Redis' clock.
            if now_us // US_PER_SECOND // SECONDS_PER_DAY == read_at_us // US_PER_SECOND // SECONDS_PER_DAY:
                return _books_of(identifier, limits, stored, most)
            self._link.learn_time(now_us, self._link.clock.monotonic_seconds())

    def reset(self, identifier: str, *, now_us: int | None = None) -> Cleared:
        """Clear marker, window, pending amounts, and the days of today and yesterday.

        A reservation made before that is out of these books, and its end does not change them; one made after is in.
        `now_us` is for tests: it takes the place of Redis' own time.

        Raises:
            StoreError: Redis could not be asked; whether it was cleared is unknown, and it may be repeated.
        """
        at_us = self._link.time_us() if now_us is None else now_us
        at_seconds = at_us // US_PER_SECOND
        days = [
            book_keys("", identifier, "", at_seconds + offset).daily
            for offset in (0, -SECONDS_PER_DAY, SECONDS_PER_DAY)
        ]
        mine = book_keys("", identifier, "", at_seconds)
        keys = (reset_key(identifier), mine.marker, mine.recent, mine.pending_identifier, *days)
        args: Sequence[str | int] = ("" if now_us is None else now_us, RESET_KEEP_SECONDS)
        reply: Sequence[Any] = self._link.run(lambda client: _RESET.run(client, keys, args))
        cleared_at_us, marker, window, pending, *its_days = reply
        days_nanousd = sum(number_in(day) or 0 for day in its_days)
        return Cleared(identifier, cleared_at_us, bool(marker), int(window), int(pending), days_nanousd)

    def _read(self, identifier: str, at_us: int, record_keys: Sequence[str]) -> "_Stored":
        """Everything as of one moment; only records beyond `_RECORDS_AT_ONCE` are read after it."""
        keys = book_keys("", identifier, "", at_us // US_PER_SECOND)
        first, rest = record_keys[:_RECORDS_AT_ONCE], record_keys[_RECORDS_AT_ONCE:]

        def read(client: Client) -> list[Any]:
            transaction: Any = client.pipeline(transaction=True)
            transaction.time()
            transaction.get(keys.marker).pttl(keys.marker)
            transaction.zrange(keys.recent, 0, -1, withscores=True).get(keys.daily)
            transaction.get(reset_key(identifier)).exists(keys.pending_identifier)
            for key in first:
                transaction.get(key)
            answers: list[Any] = transaction.execute()
            return answers

        (seconds, us), marker, left_ms, recent, daily, reset, has_pending, *texts = self._link.run(read)
        for start in range(0, len(rest), _RECORDS_AT_ONCE):
            texts += read_texts(self._link, rest[start : start + _RECORDS_AT_ONCE])
        read_records = zip(record_keys, map(parse_record, texts), strict=True)
        records = [(key, record) for key, record in read_records if record is not None]
        reset_at_us = int(reset) if reset is not None and reset.isdigit() else None
        return _Stored(
            now_us=int(seconds) * US_PER_SECOND + int(us),
            marker=marker,
            marker_left_ms=int(left_ms),
            recent=buckets_of(recent),
            daily_nanousd=arithmetic.amount(daily),
            reset_at_us=reset_at_us,
            records=records,
            is_known=bool(records or recent or daily is not None or has_pending or marker or reset_at_us),
        )


@dataclass(frozen=True, slots=True)
class _Stored:
    now_us: int
    marker: bytes | None
    marker_left_ms: int
    recent: dict[int, int]
    daily_nanousd: int
    is_known: bool
    reset_at_us: int | None
    records: list[tuple[str, Record]]


def _books_of(identifier: str, limits: Limits, stored: _Stored, most: int) -> IdentifierBooks:
    booked = [record for _, record in stored.records if record.made_at_us > (stored.reset_at_us or -1)]
    lines = [_line(key, record, stored.now_us) for key, record in stored.records]
    lines.sort(key=lambda line: (-line.made_at_us, line.reservation_id))
    return IdentifierBooks(
        identifier=identifier,
        as_of_us=stored.now_us,
        limits=(_window(limits, stored, booked), _day(limits, stored, booked)),
        marker=_marker(stored),
        reset_at_us=stored.reset_at_us,
        reservations=tuple(lines[:most]),
        reservations_in_all=len(lines),
        is_known=stored.is_known,
    )


def _window(limits: Limits, stored: _Stored, booked: Sequence[Record]) -> LimitUse:
    seconds, now_us = limits.window_seconds, stored.now_us
    bucket = bucket_seconds_of(seconds)
    counting = arithmetic.live_buckets(stored.recent, bucket, seconds, now_us)
    counted = [each for each in booked if _is_in_window(each, now_us)]
    renews = arithmetic.window_frees_at(counting, seconds, now_us) if counting else None
    return _limit("window", limits.window_nanousd, sum(counting.values()), counted, now_us, renews)


def _day(limits: Limits, stored: _Stored, booked: Sequence[Record]) -> LimitUse:
    today = stored.now_us // US_PER_SECOND // SECONDS_PER_DAY
    counted = [each for each in booked if each.made_at_us // US_PER_SECOND // SECONDS_PER_DAY == today]
    renews = (today + 1) * SECONDS_PER_DAY if stored.daily_nanousd else None
    return _limit("day", limits.day_nanousd, stored.daily_nanousd, counted, stored.now_us, renews)


def _is_in_window(record: Record, now_us: int) -> bool:
    made = record.made_at_us // US_PER_SECOND
    start = made - made % bucket_seconds_of(record.window_seconds)
    return arithmetic.window_bucket_counts(start, record.window_seconds, now_us)


def _limit(name: str, limit: int, total: int, counted: Sequence[Record], now_us: int, renews: int | None) -> LimitUse:
    amounts = {"open": 0, "expired": 0}
    for record in counted:
        state = state_of(record, now_us)
        if state in amounts:
            amounts[state] += record.nanousd
    spent = max(0, total - sum(amounts.values()))
    return LimitUse(name, limit, spent, amounts["open"], amounts["expired"], max(0, limit - total), renews)


def _marker(stored: _Stored) -> ListedMarker | None:
    decision = arithmetic.decision_of_marker(stored.marker, stored.marker_left_ms, 0, stored.now_us)
    if decision is None or stored.marker is None:
        return None
    cause = stored.marker.split(b" ")[0].decode(errors="replace")
    known = cause if cause in arithmetic.STATUS_OF_CAUSE else "by_hand"
    return ListedMarker(known, decision.busy, decision.marker_seconds)


def _line(key: str, record: Record, now_us: int) -> ListedReservation:
    return ListedReservation(
        reservation_id=key.removeprefix(RECORD_PREFIX),
        state=state_of(record, now_us),
        nanousd=record.nanousd,
        made_at_us=record.made_at_us,
        age_seconds=max(0, now_us - record.made_at_us) // US_PER_SECOND,
    )
