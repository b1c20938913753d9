"""One identifier's books, for the operator: look at them, and clear them.

`show` reads and never writes. `reset` is one script (`lua/reset.lua`): the identifier starts from nothing, and what its
network and everybody have spent stays.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from backends.clock import US_PER_SECOND
from backends.contract import Limits
from backends.keys import RECORD_PREFIX, RESET_KEEP_SECONDS, SECONDS_PER_DAY, book_keys, bucket_seconds_of, reset_key
from backends.ledger.snapshot import records_of, whole
from backends.progress import Progress, no_progress
from backends.records import Record, buckets_of, digest_of, parse_record, state_of
from backends.store.link import Client, Link
from backends.store.scripts import Script
from backends.strategies import arithmetic

MOST_SHOWN = 20
_RESET = Script("reset.lua")
_RECORDS_AT_ONCE = 5_000


@dataclass(frozen=True, slots=True)
class LimitBooks:
    """One limit of an identifier. Spent, held and expired together are what the limit counts."""

    name: str
    """window or day."""
    limit_nanousd: int
    spent_nanousd: int
    """Settled, and what expired so long ago that its record is gone."""
    held_nanousd: int
    """By open reservations."""
    expired_nanousd: int
    """By reservations that nobody ended in time: it stays booked."""
    left_nanousd: int
    renews_at_seconds: int | None
    """Unix time: of the window, when its oldest amount leaves it; of the day, its end. None where nothing is booked."""


@dataclass(frozen=True, slots=True)
class MarkerLine:
    """A throttle marker that lives, as it is listed."""

    cause: str
    """daily_limit, window_limit, or by_hand."""
    busy: bool
    """Only open reservations stood in the way."""
    left_seconds: int


@dataclass(frozen=True, slots=True)
class ReservationLine:
    """One reservation, as its record tells it."""

    reservation_id: str
    state: str
    """open, expired, settled, released."""
    nanousd: int
    made_at_us: int
    age_seconds: int


@dataclass(frozen=True, slots=True)
class IdentifierBooks:
    """What is known of an identifier, as of one moment."""

    identifier: str
    as_of_us: int
    limits: tuple[LimitBooks, ...]
    marker: MarkerLine | None
    reset_at_us: int | None
    """When its books were last cleared, if that is remembered still."""
    reservations: tuple[ReservationLine, ...]
    """The newest first, those made before the books were cleared too; at most as many as were asked for."""
    reservations_in_all: int
    is_known: bool
    """Whether anything of it is stored."""


@dataclass(frozen=True, slots=True)
class Cleared:
    """What `reset` took out of the identifier's books."""

    identifier: str
    at_us: int
    marker: bool
    window_nanousd: int
    """All that its ring held; buckets that had left the window among it."""
    open_nanousd: int
    days_nanousd: int
    """Of today and yesterday."""


class Ledger:
    """The books of single identifiers.

    Args:
        link: the Redis that holds them.
    """

    def __init__(self, link: Link) -> None:
        self._link = link

    def show(
        self, identifier: str, limits: Limits, *, most: int = MOST_SHOWN, progress: Progress = no_progress
    ) -> IdentifierBooks:
        """Read what is booked under `identifier`, against `limits`; changes nothing.

        Raises:
            StoreError: Redis could not be asked.
        """
        keys = sorted(records_of(self._link, digest_of(identifier), progress))
        while True:
            read_at_us = self._link.time_us()
            answers = self._read(identifier, read_at_us, keys)
            now_us = answers.now_us
            # At midnight the day that was read is another one than Redis' own.
            if now_us // US_PER_SECOND // SECONDS_PER_DAY == read_at_us // US_PER_SECOND // SECONDS_PER_DAY:
                return _books_of(identifier, limits, answers, most)
            self._link.learn_time(now_us, self._link.monotonic_seconds())

    def reset(self, identifier: str, *, now_us: int | None = None) -> Cleared:
        """Clear the identifier's books: marker, window, open money, the days of today and yesterday.

        A reservation that was made before is not in them any more, and its end leaves them alone; one made after is.
        `now_us` is for tests: it decides in place of Redis' own time.

        Raises:
            StoreError: Redis could not be asked; whether it was cleared is unknown, and it may be said again.
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
        cleared_at_us, marker, window, opened, *its_days = reply
        return Cleared(
            identifier,
            cleared_at_us,
            bool(marker),
            int(window),
            int(opened),
            sum(whole(day) or 0 for day in its_days),
        )

    def _read(self, identifier: str, at_us: int, record_keys: Sequence[str]) -> "_Answers":
        """Everything of one moment; only records beyond `_RECORDS_AT_ONCE` are of the moments after."""
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

        (seconds, us), marker, left_ms, recent, daily, reset, has_open, *texts = self._link.run(read)
        for start in range(0, len(rest), _RECORDS_AT_ONCE):
            page = rest[start : start + _RECORDS_AT_ONCE]
            more: Any = self._link.run(lambda client, page=page: client.mget(page))  # type: ignore[misc] # mypy cannot see through the default
            texts += more
        records = [(key, parse_record(text)) for key, text in zip(record_keys, texts, strict=True)]
        return _Answers(
            now_us=int(seconds) * US_PER_SECOND + int(us),
            marker=marker,
            marker_left_ms=int(left_ms),
            recent=buckets_of(recent),
            daily_nanousd=arithmetic.amount(daily),
            has_daily=daily is not None,
            has_open=bool(has_open),
            reset_at_us=int(reset) if reset is not None and reset.isdigit() else None,
            records=[(key, record) for key, record in records if record is not None],
        )


@dataclass(frozen=True, slots=True)
class _Answers:
    now_us: int
    marker: bytes | None
    marker_left_ms: int
    recent: dict[int, int]
    daily_nanousd: int
    has_daily: bool
    has_open: bool
    reset_at_us: int | None
    records: list[tuple[str, Record]]


def _books_of(identifier: str, limits: Limits, read: _Answers, most: int) -> IdentifierBooks:
    booked = [record for _, record in read.records if record.made_at_us > (read.reset_at_us or -1)]
    lines = [_line(key, record, read.now_us) for key, record in read.records]
    lines.sort(key=lambda line: (-line.made_at_us, line.reservation_id))
    is_known = bool(lines or read.recent or read.has_daily or read.has_open or read.marker or read.reset_at_us)
    return IdentifierBooks(
        identifier=identifier,
        as_of_us=read.now_us,
        limits=(_window(limits, read, booked), _day(limits, read, booked)),
        marker=_marker(read),
        reset_at_us=read.reset_at_us,
        reservations=tuple(lines[:most]),
        reservations_in_all=len(lines),
        is_known=is_known,
    )


def _window(limits: Limits, read: _Answers, booked: Sequence[Record]) -> LimitBooks:
    seconds, now_us = limits.window_seconds, read.now_us
    bucket = bucket_seconds_of(seconds)
    living = arithmetic.live_buckets(read.recent, bucket, seconds, now_us)
    counted = [each for each in booked if _is_in_window(each, now_us)]
    renews = arithmetic.window_frees_at(living, seconds, now_us) if living else None
    return _limit("window", limits.window_nanousd, sum(living.values()), counted, now_us, renews)


def _day(limits: Limits, read: _Answers, booked: Sequence[Record]) -> LimitBooks:
    today = read.now_us // US_PER_SECOND // SECONDS_PER_DAY
    counted = [each for each in booked if each.made_at_us // US_PER_SECOND // SECONDS_PER_DAY == today]
    renews = (today + 1) * SECONDS_PER_DAY if read.daily_nanousd else None
    return _limit("day", limits.day_nanousd, read.daily_nanousd, counted, read.now_us, renews)


def _is_in_window(record: Record, now_us: int) -> bool:
    made = record.made_at_us // US_PER_SECOND
    start = made - made % bucket_seconds_of(record.window_seconds)
    return arithmetic.window_bucket_counts(start, record.window_seconds, now_us)


def _limit(
    name: str,
    limit_nanousd: int,
    total_nanousd: int,
    counted: Sequence[Record],
    now_us: int,
    renews: int | None,
) -> LimitBooks:
    amounts = {"open": 0, "expired": 0}
    for record in counted:
        state = state_of(record, now_us)
        if state in amounts:
            amounts[state] += record.nanousd
    spent = max(0, total_nanousd - sum(amounts.values()))
    left = max(0, limit_nanousd - total_nanousd)
    return LimitBooks(name, limit_nanousd, spent, amounts["open"], amounts["expired"], left, renews)


def _marker(read: _Answers) -> MarkerLine | None:
    decision = arithmetic.decision_of_marker(read.marker, read.marker_left_ms, 0, read.now_us)
    if decision is None or read.marker is None:
        return None
    cause = read.marker.split(b" ")[0].decode(errors="replace")
    known = cause if cause in arithmetic.STATUS_OF_CAUSE else "by_hand"
    return MarkerLine(known, decision.busy, decision.marker_seconds)


def _line(key: str, record: Record, now_us: int) -> ReservationLine:
    return ReservationLine(
        reservation_id=key.removeprefix(RECORD_PREFIX),
        state=state_of(record, now_us),
        nanousd=record.nanousd,
        made_at_us=record.made_at_us,
        age_seconds=max(0, now_us - record.made_at_us) // US_PER_SECOND,
    )
