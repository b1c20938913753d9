"""Recompute every total from the records of the reservations, and the totals from one another.

What is compared, and how exactly:

* A bucket, an hour or a day against the records that are booked in it. A record lives until an hour past its end, so
  what began within the last hour has to be equal; of what began before, records may be gone, so it has to be at least
  as much. A living bucket of open money has to be equal always: open records outlive it.
* A day against a day: all networks together are everybody, so are all identifiers (or less, where the books of one
  were cleared), and the hours of a day are no more than the day. No records are needed for that.
* Each key by itself: a total is an amount below 2^53, everything but ``settings`` has a TTL, nothing is unknown.

It may run beside traffic. Whatever disagrees at the first look is read again, all that belongs to it in one step, and
the next full look has to show that nothing was overlooked in that step; only then it is told. A total that is too small
even without what was overlooked is told, too. Whatever is told was off at two readings, one after the other: a legacy
worker leaves a total half booked for a moment. What never stood still for more is told as undecided.

Nothing is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from backends.clock import US_PER_SECOND
from backends.keys import RECORD_KEEP_SECONDS, SECONDS_PER_DAY, SECONDS_PER_HOUR, BookKeys, book_keys, reset_key
from backends.ledger.snapshot import (
    IDENTIFIER_KINDS,
    NETWORK_KINDS,
    OPEN_KINDS,
    RING_KINDS,
    Booked,
    Place,
    Snapshot,
    amount_at,
    booked_by,
    read_all,
    whole,
)
from backends.progress import Progress, no_progress
from backends.records import parse_record, state_of
from backends.store.link import Client, Link
from backends.strategies import arithmetic

PASSES = 6
"""Full looks, at most."""
MOST_AT_ONCE = 10_000
"""Keys that are read in one step: about five milliseconds of Redis' time."""
SETTLED_DOWN_US = 2 * US_PER_SECOND
MARGIN_SECONDS = 2
"""Lives are set in whole seconds, and end where Redis says."""
_LIFE_PAST_START = {
    "daily": 2 * SECONDS_PER_DAY,
    "network_daily": 2 * SECONDS_PER_DAY,
    "global_daily": 2 * SECONDS_PER_DAY,
    "global_hourly": 3 * SECONDS_PER_HOUR,
}


@dataclass(frozen=True, slots=True)
class Disagreement:
    """Something in the books that cannot be."""

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
    """What reservations hold that nobody ended in time. It stays booked."""
    checked_exactly: int
    """Amounts that have to be equal to what the records say."""
    checked_at_least: int
    """Amounts that have to be no less: older records may be gone."""
    sums_checked: int
    looks: int
    disagreements: tuple[Disagreement, ...]
    undecided: tuple[str, ...]
    """Keys that moved at every look."""


class _Sum(NamedTuple):
    """A total that parts have to add up to."""

    what: str
    total: Place
    parts: tuple[Place, ...]
    may_be_more: bool
    """Whether the total may be more than its parts."""


@dataclass(slots=True)
class _Reading:
    """Several keys, read in one step."""

    at_us: int
    stored: int
    expected: int
    expected_at_least: int
    """Of records that are `SETTLED_DOWN_US` old: others may be half booked, by a legacy worker."""
    members: frozenset[str | Place]


@dataclass(slots=True)
class _Look:
    snapshot: Snapshot
    booked: Booked
    exact: int = 0
    at_least: int = 0
    places: list[Place] = field(default_factory=list)
    sums: list[_Sum] = field(default_factory=list)
    """What disagrees."""
    all_sums: dict[tuple[str, Place], _Sum] = field(default_factory=dict)


def audit(link: Link, progress: Progress = no_progress) -> AuditReport:
    """Look until whatever disagrees has been told from what only moved.

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
        look = first = self._look(1)
        odd = set(look.snapshot.oddities)
        places, sums = look.places, look.sums
        looks = 1
        while (places or sums or (odd and looks == 1)) and looks < PASSES:
            place_readings = {place: self._read_place(look, place) for place in places}
            sum_readings = {its_sum: self._read_sum(look, its_sum) for its_sum in sums}
            before, looks = look, looks + 1
            look = self._look(looks)
            odd &= set(look.snapshot.oddities)
            places = [at for at, read in place_readings.items() if not self._is_decided(before, look, at, read)]
            sums = [one for one, read in sum_readings.items() if not self._is_sum_decided(look, one, read)]
        oddities = [Disagreement(each.kind, each.key, each.told) for each in sorted(odd)]
        undecided = [_name(look.snapshot, place) for place in (*places, *(each.total for each in sums))]
        return _report(first, looks, [*self._found, *oddities], undecided)

    def _look(self, number: int) -> _Look:
        what = "reading the books" if number == 1 else f"reading the books again ({number})"
        snapshot = read_all(self._link, self._progress, what)
        look = _Look(snapshot, booked_by(snapshot))
        for place in {*snapshot.stored, *look.booked.keys}:
            rule = _rule(look, place)
            look.exact += rule == "exact"
            look.at_least += rule == "at_least"
            stored, expected = snapshot.stored.get(place, 0), look.booked.nanousd.get(place, 0)
            if _disagree(rule, stored, expected):
                look.places.append(place)
        for each in _sums(snapshot):
            look.all_sums[each.what, each.total] = each
            stored = snapshot.stored.get(each.total, 0)
            if _is_off(each, stored, sum(snapshot.stored.get(part, 0) for part in each.parts)):
                look.sums.append(each)
        return look

    def _read_place(self, look: _Look, place: Place) -> _Reading | None:
        """The amount and the records that are booked there, as of one moment; None if they are too many for that."""
        keys = look.booked.keys.get(place, [])
        if len(keys) > MOST_AT_ONCE:
            return None
        name, owner = _name(look.snapshot, place), look.snapshot.names.get((False, place.owner), "")

        def read(client: Client) -> list[Any]:
            transaction: Any = client.pipeline(transaction=True)
            transaction.time()
            if place.kind in RING_KINDS:
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
        return _Reading(
            at_us=at_us,
            stored=int(stored or 0) if isinstance(stored, float) else whole(stored) or 0,
            expected=sum(amount_at(place, record) for record in counted),
            expected_at_least=sum(
                amount_at(place, record) for record in counted if record.made_at_us + SETTLED_DOWN_US <= at_us
            ),
            members=frozenset(keys),
        )

    def _read_sum(self, look: _Look, its_sum: _Sum) -> _Reading | None:
        if len(its_sum.parts) > MOST_AT_ONCE:
            return None
        names = [_name(look.snapshot, place) for place in (its_sum.total, *its_sum.parts)]
        texts: Any = self._link.run(lambda client: client.mget(names))
        amounts = [whole(text) or 0 for text in texts]
        return _Reading(0, amounts[0], sum(amounts[1:]), 0, frozenset(its_sum.parts))

    def _is_decided(self, before: _Look, look: _Look, place: Place, read: _Reading | None) -> bool:
        """Whether the reading is proof, now that a look has shown which records there were when it was made."""
        was_overlooked = False
        if read is None:
            # Too many for one step: two looks that are alike in every part stand for a moment.
            if not _is_same(before, look, place):
                return False
            stored, expected = look.snapshot.stored.get(place, 0), look.booked.nanousd.get(place, 0)
        else:
            was_overlooked = _was_overlooked(look, place, read)
            # What was overlooked makes a total larger: one that is too small without it is too small for certain.
            stored, expected = read.stored, read.expected_at_least if was_overlooked else read.expected
            if was_overlooked and stored >= expected:
                return False
        rule = _rule(look, place)
        if not _disagree(rule, stored, expected):
            return True
        if not self._was_seen_before(place, stored - expected, moves=was_overlooked):
            return False
        self._found.append(_told_place(look, place, rule, stored, expected))
        return True

    def _is_sum_decided(self, look: _Look, its_sum: _Sum, read: _Reading | None) -> bool:
        now = look.all_sums.get((its_sum.what, its_sum.total))
        if now is None:
            return True
        if read is None or not set(now.parts) <= read.members:
            return False
        if not _is_off(now, read.stored, read.expected):
            return True
        if not self._was_seen_before((now.what, now.total), read.stored - read.expected, moves=False):
            return False
        self._found.append(_told_sum(look, now, read.stored, read.expected))
        return True

    def _was_seen_before(self, what: object, by_nanousd: int, *, moves: bool) -> bool:
        """Whether it was off at the reading before as well: a legacy worker leaves a total half booked for a moment."""
        before = self._off_by.get(what)
        self._off_by[what] = by_nanousd
        return before is not None and (before == by_nanousd or (moves and max(before, by_nanousd) < 0))


def _was_overlooked(look: _Look, place: Place, read: _Reading) -> bool:
    """Whether there were records at the reading that it did not know of."""
    records, present = look.snapshot.records, look.booked.keys.get(place, [])
    return any(key not in read.members for key in present if records[key].made_at_us <= read.at_us)


def _is_same(before: _Look, look: _Look, place: Place) -> bool:
    keys = look.booked.keys.get(place, [])
    return (
        before.snapshot.stored.get(place) == look.snapshot.stored.get(place)
        and sorted(before.booked.keys.get(place, [])) == sorted(keys)
        and all(before.snapshot.records[key] == look.snapshot.records[key] for key in keys)
    )


def _rule(look: _Look, place: Place) -> str:
    """How a place compares to its records: exact, at_least, or not at all ('')."""
    snapshot = look.snapshot
    now = snapshot.ended_us / US_PER_SECOND
    begins = float(place.start_seconds)
    if place.kind in IDENTIFIER_KINDS:
        begins = max(begins, snapshot.reset_us.get(place.owner, 0) / US_PER_SECOND)
    are_records_whole = begins >= now - RECORD_KEEP_SECONDS + MARGIN_SECONDS
    if place not in look.booked.keys:
        return "exact" if are_records_whole else ""
    if place.kind in RING_KINDS:
        # The shortest life of all in the ring: one with a shorter window may have swept the bucket.
        ends = place.start_seconds + look.booked.ttl_seconds[place.kind, place.owner]
    else:
        ends = place.start_seconds + _LIFE_PAST_START[place.kind]
    if ends - MARGIN_SECONDS <= now:
        return ""
    return "exact" if are_records_whole or place.kind in OPEN_KINDS else "at_least"


def _disagree(rule: str, stored: int, expected: int) -> bool:
    return stored < expected if rule == "at_least" else rule == "exact" and stored != expected


def _is_off(its_sum: _Sum, total: int, parts: int) -> bool:
    return total < parts if its_sum.may_be_more else total != parts


def _sums(snapshot: Snapshot) -> list[_Sum]:
    """For each day that has to be there still."""
    places: dict[tuple[str, int], list[Place]] = {}
    for place in snapshot.stored:
        if place.kind in _LIFE_PAST_START:
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


def _name(snapshot: Snapshot, place: Place) -> str:
    """The key of a place; with a digest where no key tells whose it is."""
    owner = snapshot.names.get((place.kind in NETWORK_KINDS, place.owner), f"#{place.owner}")
    keys: BookKeys = book_keys("", owner, owner, place.start_seconds)
    return str(getattr(keys, place.kind))


def _told_place(look: _Look, place: Place, rule: str, stored: int, expected: int) -> Disagreement:
    count = len(look.booked.keys.get(place, []))
    bucket = place.start_seconds if place.kind in RING_KINDS else None
    where = "holds" if bucket is None else f"holds in bucket {bucket}"
    least = "at least " if rule == "at_least" else ""
    kind = "open money" if place.kind in OPEN_KINDS else "money"
    told = f"{where} {stored}, and the {count} reservations there come to {least}{expected} ({kind}, nano-dollars)"
    return Disagreement("total", _name(look.snapshot, place), told, bucket, stored, expected)


def _told_sum(look: _Look, its_sum: _Sum, stored: int, parts: int) -> Disagreement:
    told = f"holds {stored}, and {its_sum.what} come to {parts} (nano-dollars)"
    return Disagreement("sum", _name(look.snapshot, its_sum.total), told, None, stored, parts)


def _report(look: _Look, looks: int, disagreements: Sequence[Disagreement], undecided: Sequence[str]) -> AuditReport:
    snapshot = look.snapshot
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
        checked_exactly=look.exact,
        checked_at_least=look.at_least,
        sums_checked=len(look.all_sums),
        looks=looks,
        disagreements=tuple(disagreements),
        undecided=tuple(undecided),
    )
