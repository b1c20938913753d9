"""A snapshot compared with itself: its totals with its records, and its days with one another. No Redis is asked."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

from backends import keys
from backends.clock import US_PER_SECOND
from backends.ledger.snapshot import BUCKET_KINDS, IDENTIFIER_KINDS, NETWORK_KINDS, PENDING_KINDS, Place, Snapshot
from backends.records import Record
from backends.strategies import arithmetic

MARGIN_SECONDS = 2
"""TTLs are set in whole seconds, and end by Redis' clock."""
_TTL_PAST_START = {
    "daily": 2 * keys.SECONDS_PER_DAY,
    "network_daily": 2 * keys.SECONDS_PER_DAY,
    "global_daily": 2 * keys.SECONDS_PER_DAY,
    "global_hourly": 3 * keys.SECONDS_PER_HOUR,
}
_KINDS = keys.BookKeys(*keys.BookKeys._fields)
"""Keys that are called what they are: the same code as in production says where a record is booked."""


class Sum(NamedTuple):
    """A total that parts have to add up to."""

    what: str
    total: Place
    parts: tuple[Place, ...]
    may_be_more: bool
    """Whether the total may be more than its parts."""

    def is_off(self, total: int, parts: int) -> bool:
        """Whether these amounts disagree."""
        return total < parts if self.may_be_more else total != parts


@dataclass(slots=True)
class Comparison:
    """What the records of a snapshot say that its totals have to be, and which disagree."""

    snapshot: Snapshot
    keys: dict[Place, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Keys of the records that are booked in a place."""
    nanousd: Counter[Place] = field(default_factory=Counter)
    """What these records come to."""
    bucket_ttl_seconds: dict[tuple[str, str], int] = field(default_factory=dict)
    """(kind, owner) of a key with buckets -> how long after its start a bucket of it counts, at the shortest."""
    exact: int = 0
    at_least: int = 0
    sums: dict[tuple[str, Place], Sum] = field(default_factory=dict)
    odd_places: list[Place] = field(default_factory=list)
    """Those that disagree with their records."""
    odd_sums: list[Sum] = field(default_factory=list)
    """Those that disagree with their parts."""

    def key_name(self, place: Place) -> str:
        """The key of a place; with a digest where no key names the owner."""
        owner = self.snapshot.names.get((place.kind in NETWORK_KINDS, place.owner), f"#{place.owner}")
        return str(getattr(keys.book_keys("", owner, owner, place.start_seconds), place.kind))

    def rule(self, place: Place) -> str:
        """How the place compares with its records: exact, at_least, or not at all ('')."""
        now = self.snapshot.ended_us / US_PER_SECOND
        begins = float(place.start_seconds)
        if place.kind in IDENTIFIER_KINDS:
            begins = max(begins, self.snapshot.reset_us.get(place.owner, 0) / US_PER_SECOND)
        are_records_whole = begins >= now - keys.RECORD_KEEP_SECONDS + MARGIN_SECONDS
        if place not in self.keys:
            return "exact" if are_records_whole else ""
        if place.kind in BUCKET_KINDS:
            # The shortest of all its buckets: a reservation with a shorter window may have removed this one.
            ends = place.start_seconds + self.bucket_ttl_seconds[place.kind, place.owner]
        else:
            ends = place.start_seconds + _TTL_PAST_START[place.kind]
        if ends - MARGIN_SECONDS <= now:
            return ""
        return "exact" if are_records_whole or place.kind in PENDING_KINDS else "at_least"


def compare(snapshot: Snapshot) -> Comparison:
    """Compare every total with its records, and every day with its parts."""
    comparison = Comparison(snapshot)
    for key, record in snapshot.records.items():
        _add_record(comparison, key, record)
    for place in {*snapshot.stored, *comparison.keys}:
        rule = comparison.rule(place)
        comparison.exact += rule == "exact"
        comparison.at_least += rule == "at_least"
        if disagree(rule, snapshot.stored[place], comparison.nanousd[place]):
            comparison.odd_places.append(place)
    for each in _sums(snapshot):
        comparison.sums[each.what, each.total] = each
        if each.is_off(snapshot.stored[each.total], sum(snapshot.stored[part] for part in each.parts)):
            comparison.odd_sums.append(each)
    return comparison


def disagree(rule: str, stored: int, expected: int) -> bool:
    """Whether a total disagrees with its records, by the rule for its place."""
    return stored < expected if rule == "at_least" else rule == "exact" and stored != expected


def amount_at(place: Place, record: Record) -> int:
    """Nano-dollars that a record adds to a place that it is booked in."""
    return 0 if place.kind in PENDING_KINDS and record.state != "open" else record.nanousd


def _add_record(comparison: Comparison, key: str, record: Record) -> None:
    is_cleared = record.made_at_us <= comparison.snapshot.reset_us.get(record.who, -1)
    for place, ttl_seconds in _places_of_record(record, is_cleared=is_cleared):
        comparison.keys[place].append(key)
        comparison.nanousd[place] += amount_at(place, record)
        if ttl_seconds:
            ttls, owner = comparison.bucket_ttl_seconds, (place.kind, place.owner)
            ttls[owner] = min(ttl_seconds, ttls.get(owner, ttl_seconds))


def _places_of_record(record: Record, *, is_cleared: bool) -> list[tuple[Place, int]]:
    """Where a reservation is booked, and for how many seconds a bucket counts past its start (0 for a total)."""
    window = arithmetic.charges(
        _KINDS, record.window_seconds, record.made_at_us, record.made_at_us, is_cleared=is_cleared
    )
    pending = arithmetic.pending_charges(_KINDS, record.pending_seconds, record.made_at_us, is_cleared=is_cleared)
    # Less than the TTL of its key: a pending bucket that is past its time may be taken out by any settlement.
    pending_ttl = record.pending_seconds + keys.pending_bucket_seconds_of(record.pending_seconds)
    return [
        (Place(charge.key, _owner(charge.key, record), _start(charge, record)), ttl_seconds)
        for charge, ttl_seconds in (
            *((charge, 0 if charge.member is None else charge.ttl_seconds) for charge in window),
            *((charge, pending_ttl) for charge in pending),
        )
    ]


def _owner(kind: str, record: Record) -> str:
    if kind in NETWORK_KINDS:
        return record.network
    return record.who if kind in IDENTIFIER_KINDS else ""


def _start(charge: arithmetic.Charge, record: Record) -> int:
    if charge.member is not None:
        return charge.member
    period = keys.SECONDS_PER_HOUR if charge.key == "global_hourly" else keys.SECONDS_PER_DAY
    made = record.made_at_us // US_PER_SECOND
    return made - made % period


def _sums(snapshot: Snapshot) -> list[Sum]:
    """Three for each day whose keys have to exist still."""
    places: dict[tuple[str, int], list[Place]] = {}
    for place in snapshot.stored:
        if place.kind in _TTL_PAST_START:
            day = place.start_seconds - place.start_seconds % keys.SECONDS_PER_DAY
            places.setdefault((place.kind, day), []).append(place)
    found = []
    for day in sorted({day for _, day in places}):
        if day + 2 * keys.SECONDS_PER_DAY - MARGIN_SECONDS <= snapshot.ended_us // US_PER_SECOND:
            continue
        total = Place("global_daily", "", day)
        was_reset = any(at_us >= day * US_PER_SECOND for at_us in snapshot.reset_us.values())
        for kind, what, may_be_more in (
            ("daily", "its identifiers", was_reset),
            ("network_daily", "its networks", False),
            ("global_hourly", "its hours", True),
        ):
            found.append(Sum(what, total, tuple(sorted(places.get((kind, day), []))), may_be_more))
    return found
