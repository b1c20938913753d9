"""Recompute every total from the records of the reservations, and compare the days with one another.

What is compared, and how exactly:

* A bucket, an hour or a day with the records that are booked in it. A record is kept until an hour past its end. So a
  total that began within the last hour has to be equal to its records; of one that began before, records may be gone,
  so it has to be at least as much. A pending bucket has to be equal always: open records outlive it.
* A day with a day: all networks together are the global day, so are all identifiers (or less, where the books of one
  were cleared), and the hours of a day are no more than the day. No records are needed for that.
* Each key by itself: a total is an amount below 2^53, everything but ``settings`` has a TTL, no key is unknown.

It may run beside traffic. A *pass* reads all keys, page by page. What disagrees in a pass is *rechecked*: it is read
again in one step, with all records that belong to it; the next pass has to show that this step missed no record. A
total that is too small even without the missed records is reported, too. Whatever is reported disagreed in two
rechecks, one after the other: a legacy worker leaves a total half booked for a moment. What changed in every pass is
reported as undecided.

Nothing is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from backends.clock import US_PER_SECOND
from backends.keys import RECORD_KEEP_SECONDS, SECONDS_PER_DAY, SECONDS_PER_HOUR, BookKeys, book_keys, reset_key
from backends.ledger.expected import Expected, amount_at, expected_by_records
from backends.ledger.snapshot import (
    BUCKET_KINDS,
    IDENTIFIER_KINDS,
    NETWORK_KINDS,
    PENDING_KINDS,
    Place,
    Snapshot,
    number_in,
    read_snapshot,
    read_texts,
)
from backends.progress import Progress, no_progress
from backends.records import parse_record, state_of
from backends.store.link import Client, Link
from backends.strategies import arithmetic

PASSES = 6
"""At most."""
MOST_AT_ONCE = 10_000
"""Keys that a recheck reads in one step: about five milliseconds of Redis' time."""
SETTLED_DOWN_US = 2 * US_PER_SECOND
MARGIN_SECONDS = 2
"""TTLs are set in whole seconds, and end by Redis' clock."""
_TTL_PAST_START = {
    "daily": 2 * SECONDS_PER_DAY,
    "network_daily": 2 * SECONDS_PER_DAY,
    "global_daily": 2 * SECONDS_PER_DAY,
    "global_hourly": 3 * SECONDS_PER_HOUR,
}


@dataclass(frozen=True, slots=True)
class Disagreement:
    """A total or a key that cannot be right."""

    kind: str
    """total, sum, no_amount, no_ttl, unknown_key, wrong_type, no_record."""
    key: str
    told: str
    """The rest of a sentence that begins with the key."""
    bucket: int | None = None
    stored_nanousd: int | None = None
    expected_nanousd: int | None = None


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What an audit found."""

    keys: int
    records: dict[str, int]
    """By state: open, expired, settled, released."""
    open_nanousd: int
    expired_nanousd: int
    """What reservations hold that were not ended in time. It stays booked."""
    checked_exactly: int
    """Totals that have to be equal to what the records say."""
    checked_at_least: int
    """Totals that have to be no less: older records may be gone."""
    sums_checked: int
    looks: int
    """Passes over all keys."""
    disagreements: tuple[Disagreement, ...]
    undecided: tuple[str, ...]
    """Keys that changed in every pass."""


class _Sum(NamedTuple):
    """A total that parts have to add up to."""

    what: str
    total: Place
    parts: tuple[Place, ...]
    may_be_more: bool
    """Whether the total may be more than its parts."""


@dataclass(slots=True)
class _Recheck:
    """A total and what belongs to it, read in one step."""

    at_us: int
    stored: int
    expected: int
    expected_at_least: int
    """By records that are `SETTLED_DOWN_US` old: a legacy worker may have booked others by half."""
    members: frozenset[str | Place]


@dataclass(slots=True)
class _Pass:
    """One reading of all keys."""

    snapshot: Snapshot
    expected: Expected
    exact: int = 0
    at_least: int = 0
    sums: dict[tuple[str, Place], _Sum] = field(default_factory=dict)
    odd_places: list[Place] = field(default_factory=list)
    """Those that disagree."""
    odd_sums: list[_Sum] = field(default_factory=list)
    """Those that disagree."""

    def stored_at(self, place: Place) -> int:
        return self.snapshot.stored.get(place, 0)

    def expected_at(self, place: Place) -> int:
        return self.expected.nanousd.get(place, 0)

    def record_keys(self, place: Place) -> list[str]:
        return self.expected.keys.get(place, [])

    def name(self, place: Place) -> str:
        """The key of a place; with a digest where no key names the owner."""
        owner = self.snapshot.names.get((place.kind in NETWORK_KINDS, place.owner), f"#{place.owner}")
        keys: BookKeys = book_keys("", owner, owner, place.start_seconds)
        return str(getattr(keys, place.kind))


def audit(link: Link, progress: Progress = no_progress) -> AuditReport:
    """Read all keys, and again while a disagreement may come from traffic alone.

    Raises:
        StoreError: Redis could not be asked.
    """
    return _Audit(link, progress).run()


class _Audit:
    def __init__(self, link: Link, progress: Progress) -> None:
        self._link = link
        self._progress = progress
        self._found: list[Disagreement] = []
        self._off_by: dict[object, int] = {}

    def run(self) -> AuditReport:
        this = first = self._pass(1)
        oddities = set(this.snapshot.oddities)
        places, sums = this.odd_places, this.odd_sums
        passes = 1
        while (places or sums or (oddities and passes == 1)) and passes < PASSES:
            rechecked_places = {place: self._recheck_place(this, place) for place in places}
            rechecked_sums = {its_sum: self._recheck_sum(this, its_sum) for its_sum in sums}
            before, passes = this, passes + 1
            this = self._pass(passes)
            oddities &= set(this.snapshot.oddities)
            places = [at for at, its in rechecked_places.items() if not self._is_decided(before, this, at, its)]
            sums = [one for one, its in rechecked_sums.items() if not self._is_sum_decided(this, one, its)]
        by_themselves = [Disagreement(each.kind, each.key, each.text) for each in sorted(oddities)]
        undecided = [this.name(place) for place in (*places, *(each.total for each in sums))]
        return _report(first, passes, [*self._found, *by_themselves], undecided)

    def _pass(self, number: int) -> _Pass:
        what = "reading the books" if number == 1 else f"reading the books again ({number})"
        snapshot = read_snapshot(self._link, self._progress, what)
        this = _Pass(snapshot, expected_by_records(snapshot))
        for place in {*snapshot.stored, *this.expected.keys}:
            rule = _rule(this, place)
            this.exact += rule == "exact"
            this.at_least += rule == "at_least"
            if _disagree(rule, this.stored_at(place), this.expected_at(place)):
                this.odd_places.append(place)
        for each in _sums(snapshot):
            this.sums[each.what, each.total] = each
            if _is_off(each, this.stored_at(each.total), sum(map(this.stored_at, each.parts))):
                this.odd_sums.append(each)
        return this

    def _recheck_place(self, this: _Pass, place: Place) -> _Recheck | None:
        """The amount and the records that are booked there, as of one moment; None if they are too many for that."""
        keys = this.record_keys(place)
        if len(keys) > MOST_AT_ONCE:
            return None
        name, owner = this.name(place), this.snapshot.names.get((False, place.owner), "")

        def read(client: Client) -> list[Any]:
            transaction: Any = client.pipeline(transaction=True)
            transaction.time()
            if place.kind in BUCKET_KINDS:
                transaction.zscore(name, str(place.start_seconds))
            else:
                transaction.get(name)
            transaction.get(reset_key(owner))
            if keys:
                transaction.mget(keys)
            answers: list[Any] = transaction.execute()
            return answers

        time, stored, reset, *texts = self._link.run(read)
        reset_text = reset if place.kind in IDENTIFIER_KINDS else None
        records = [parse_record(text) for text in (texts[0] if texts else [])]
        counted = [
            record
            for record in records
            if record is not None and not arithmetic.was_cleared(reset_text, record.made_at_us)
        ]
        at_us = int(time[0]) * US_PER_SECOND + int(time[1])
        return _Recheck(
            at_us=at_us,
            stored=int(stored or 0) if isinstance(stored, float) else number_in(stored) or 0,
            expected=sum(amount_at(place, record) for record in counted),
            expected_at_least=sum(
                amount_at(place, record) for record in counted if record.made_at_us + SETTLED_DOWN_US <= at_us
            ),
            members=frozenset(keys),
        )

    def _recheck_sum(self, this: _Pass, its_sum: _Sum) -> _Recheck | None:
        if len(its_sum.parts) > MOST_AT_ONCE:
            return None
        names = [this.name(place) for place in (its_sum.total, *its_sum.parts)]
        amounts = [number_in(text) or 0 for text in read_texts(self._link, names)]
        return _Recheck(0, amounts[0], sum(amounts[1:]), 0, frozenset(its_sum.parts))

    def _is_decided(self, before: _Pass, this: _Pass, place: Place, its: _Recheck | None) -> bool:
        """Whether the recheck is proof, now that a pass has shown which records there were at its moment."""
        was_missed = False
        if its is None:
            # Too many for one step: two passes that are alike in every part stand for a moment.
            if not _is_same(before, this, place):
                return False
            stored, expected = this.stored_at(place), this.expected_at(place)
        else:
            was_missed = _was_missed(this, place, its)
            # Missed records make a total larger: one that is too small without them is too small for certain.
            stored, expected = its.stored, its.expected_at_least if was_missed else its.expected
            if was_missed and stored >= expected:
                return False
        rule = _rule(this, place)
        if not _disagree(rule, stored, expected):
            return True
        if not self._was_seen_before(place, stored - expected, moves=was_missed):
            return False
        self._found.append(_wrong_total(this, place, rule, stored, expected))
        return True

    def _is_sum_decided(self, this: _Pass, its_sum: _Sum, its: _Recheck | None) -> bool:
        now = this.sums.get((its_sum.what, its_sum.total))
        if now is None:
            return True
        if its is None or not set(now.parts) <= its.members:
            return False
        if not _is_off(now, its.stored, its.expected):
            return True
        if not self._was_seen_before((now.what, now.total), its.stored - its.expected, moves=False):
            return False
        self._found.append(_wrong_sum(this, now, its.stored, its.expected))
        return True

    def _was_seen_before(self, what: object, by_nanousd: int, *, moves: bool) -> bool:
        """Whether the recheck before disagreed too: a legacy worker leaves a total half booked for a moment."""
        before = self._off_by.get(what)
        self._off_by[what] = by_nanousd
        return before is not None and (before == by_nanousd or (moves and max(before, by_nanousd) < 0))


def _was_missed(this: _Pass, place: Place, its: _Recheck) -> bool:
    """Whether the recheck missed a record that existed at its moment."""
    records = this.snapshot.records
    return any(key not in its.members for key in this.record_keys(place) if records[key].made_at_us <= its.at_us)


def _is_same(before: _Pass, this: _Pass, place: Place) -> bool:
    keys = this.record_keys(place)
    return (
        before.snapshot.stored.get(place) == this.snapshot.stored.get(place)
        and sorted(before.record_keys(place)) == sorted(keys)
        and all(before.snapshot.records[key] == this.snapshot.records[key] for key in keys)
    )


def _rule(this: _Pass, place: Place) -> str:
    """How a place compares to its records: exact, at_least, or not at all ('')."""
    snapshot = this.snapshot
    now = snapshot.ended_us / US_PER_SECOND
    begins = float(place.start_seconds)
    if place.kind in IDENTIFIER_KINDS:
        begins = max(begins, snapshot.reset_us.get(place.owner, 0) / US_PER_SECOND)
    are_records_whole = begins >= now - RECORD_KEEP_SECONDS + MARGIN_SECONDS
    if place not in this.expected.keys:
        return "exact" if are_records_whole else ""
    if place.kind in BUCKET_KINDS:
        # The shortest TTL of all its buckets: a reservation with a shorter window may have swept this one.
        ends = place.start_seconds + this.expected.ttl_seconds[place.kind, place.owner]
    else:
        ends = place.start_seconds + _TTL_PAST_START[place.kind]
    if ends - MARGIN_SECONDS <= now:
        return ""
    return "exact" if are_records_whole or place.kind in PENDING_KINDS else "at_least"


def _disagree(rule: str, stored: int, expected: int) -> bool:
    return stored < expected if rule == "at_least" else rule == "exact" and stored != expected


def _is_off(its_sum: _Sum, total: int, parts: int) -> bool:
    return total < parts if its_sum.may_be_more else total != parts


def _sums(snapshot: Snapshot) -> list[_Sum]:
    """Three for each day whose keys have to exist still."""
    places: dict[tuple[str, int], list[Place]] = {}
    for place in snapshot.stored:
        if place.kind in _TTL_PAST_START:
            day = place.start_seconds - place.start_seconds % SECONDS_PER_DAY
            places.setdefault((place.kind, day), []).append(place)
    found = []
    for day in sorted({day for _, day in places}):
        if day + 2 * SECONDS_PER_DAY - MARGIN_SECONDS <= snapshot.ended_us // US_PER_SECOND:
            continue
        total = Place("global_daily", "", day)
        was_reset = any(at_us >= day * US_PER_SECOND for at_us in snapshot.reset_us.values())
        for kind, what, may_be_more in (
            ("daily", "its identifiers", was_reset),
            ("network_daily", "its networks", False),
            ("global_hourly", "its hours", True),
        ):
            found.append(_Sum(what, total, tuple(sorted(places.get((kind, day), []))), may_be_more))
    return found


def _wrong_total(this: _Pass, place: Place, rule: str, stored: int, expected: int) -> Disagreement:
    count = len(this.record_keys(place))
    bucket = place.start_seconds if place.kind in BUCKET_KINDS else None
    where = "holds" if bucket is None else f"holds in bucket {bucket}"
    least = "at least " if rule == "at_least" else ""
    kind = "open money" if place.kind in PENDING_KINDS else "money"
    told = f"{where} {stored}, and the {count} reservations there come to {least}{expected} ({kind}, nano-dollars)"
    return Disagreement("total", this.name(place), told, bucket, stored, expected)


def _wrong_sum(this: _Pass, its_sum: _Sum, stored: int, parts: int) -> Disagreement:
    told = f"holds {stored}, and {its_sum.what} come to {parts} (nano-dollars)"
    return Disagreement("sum", this.name(its_sum.total), told, None, stored, parts)


def _report(first: _Pass, passes: int, disagreements: Sequence[Disagreement], undecided: Sequence[str]) -> AuditReport:
    snapshot = first.snapshot
    counts = dict.fromkeys(("open", "expired", "settled", "released"), 0)
    amounts = dict.fromkeys(("open", "expired"), 0)
    for record in snapshot.records.values():
        state = state_of(record, snapshot.ended_us)
        counts[state] += 1
        if state in amounts:
            amounts[state] += record.nanousd
    return AuditReport(
        keys=snapshot.keys,
        records=counts,
        open_nanousd=amounts["open"],
        expired_nanousd=amounts["expired"],
        checked_exactly=first.exact,
        checked_at_least=first.at_least,
        sums_checked=len(first.sums),
        looks=passes,
        disagreements=tuple(disagreements),
        undecided=tuple(undecided),
    )
