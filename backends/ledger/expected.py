"""What the records of the reservations say that each total has to be; `audit` compares it with what is stored."""

from collections import defaultdict
from dataclasses import dataclass, field

from backends.clock import US_PER_SECOND
from backends.keys import SECONDS_PER_DAY, SECONDS_PER_HOUR, BookKeys, pending_bucket_seconds_of
from backends.ledger.snapshot import IDENTIFIER_KINDS, NETWORK_KINDS, PENDING_KINDS, Place, Snapshot
from backends.records import Record
from backends.strategies import arithmetic

_KINDS = BookKeys(*BookKeys._fields)
"""Keys that are called what they are: the same code as in production says where a record is booked."""


@dataclass(slots=True)
class Expected:
    """What the records say of each place."""

    keys: dict[Place, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Keys of the records that are booked there."""
    nanousd: dict[Place, int] = field(default_factory=lambda: defaultdict(int))
    ttl_seconds: dict[tuple[str, str], int] = field(default_factory=dict)
    """(kind, owner) of a key with buckets -> how long after its start a bucket of it counts, at the shortest."""


def expected_by_records(snapshot: Snapshot) -> Expected:
    """What each place has to hold, by the records alone."""
    expected = Expected()
    for key, record in snapshot.records.items():
        is_cleared = record.made_at_us <= snapshot.reset_us.get(record.who, -1)
        for place, ttl_seconds in places_of_record(record, is_cleared=is_cleared):
            expected.keys[place].append(key)
            expected.nanousd[place] += amount_at(place, record)
            if ttl_seconds:
                buckets = (place.kind, place.owner)
                expected.ttl_seconds[buckets] = min(ttl_seconds, expected.ttl_seconds.get(buckets, ttl_seconds))
    return expected


def amount_at(place: Place, record: Record) -> int:
    """Nano-dollars that a record adds to a place that it is booked in."""
    return 0 if place.kind in PENDING_KINDS and record.state != "open" else record.nanousd


def places_of_record(record: Record, *, is_cleared: bool) -> list[tuple[Place, int]]:
    """Where a reservation is booked, and for how many seconds a bucket counts past its start (0 for a total)."""
    window = arithmetic.charges(
        _KINDS, record.window_seconds, record.made_at_us, record.made_at_us, is_cleared=is_cleared
    )
    pending = arithmetic.pending_charges(_KINDS, record.pending_seconds, record.made_at_us, is_cleared=is_cleared)
    # Less than the TTL of its key: a pending bucket that is past its time may be taken out by any settlement.
    pending_ttl = record.pending_seconds + pending_bucket_seconds_of(record.pending_seconds)
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
    period = SECONDS_PER_HOUR if charge.key == "global_hourly" else SECONDS_PER_DAY
    made = record.made_at_us // US_PER_SECOND
    return made - made % period
