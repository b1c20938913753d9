"""The whole database as the books see it, read page by page: nobody waits for us, and nothing is written.

What stands on one page is of one moment, what stands on two is not. `audit` knows how to live with that.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from redis.exceptions import ResponseError

from backends.clock import US_PER_SECOND
from backends.keys import (
    RECORD_PREFIX,
    SECONDS_PER_DAY,
    SECONDS_PER_HOUR,
    BookKeys,
    KnownKey,
    known_key,
    pending_bucket_seconds_of,
)
from backends.progress import Progress, no_progress
from backends.records import Record, buckets_of, digest_of, parse_record
from backends.store.link import Client, Link
from backends.strategies import arithmetic

PAGE_KEYS = 500
WINDOW_KINDS = ("recent", "network_recent")
OPEN_KINDS = ("pending_identifier", "pending_network", "pending_global")
RING_KINDS = WINDOW_KINDS + OPEN_KINDS
TOTAL_KINDS = ("daily", "network_daily", "global_hourly", "global_daily")
NETWORK_KINDS = ("network_recent", "network_daily", "pending_network")
IDENTIFIER_KINDS = ("recent", "daily", "pending_identifier")
LARGEST = 2**53
GONE, FOR_EVER = -2, -1
"""Words of PTTL."""
_KINDS = BookKeys(*BookKeys._fields)
"""Keys that are called what they are: where a record is booked is asked of the same code as in production."""


class Place(NamedTuple):
    """One amount in the books."""

    kind: str
    """A field of `BookKeys`."""
    owner: str
    """Digest of the identifier or network; empty for everybody's."""
    start_seconds: int
    """When its bucket, hour or day begins, unix time."""


class Oddity(NamedTuple):
    """A key that is wrong by itself."""

    key: str
    kind: str
    told: str


@dataclass(slots=True)
class Snapshot:
    """What was read."""

    ended_us: int = 0
    records: dict[str, Record] = field(default_factory=dict)
    """By key."""
    stored: dict[Place, int] = field(default_factory=dict)
    names: dict[tuple[bool, str], str] = field(default_factory=dict)
    """(whether of a network, digest) -> identifier or network, as far as a key told it."""
    reset_us: dict[str, int] = field(default_factory=dict)
    """Digest of an identifier -> when its books were cleared."""
    oddities: list[Oddity] = field(default_factory=list)
    keys: int = 0


def redis_now_us(link: Link) -> int:
    """Redis' own time, asked for."""
    seconds, us = link.run(lambda client: client.time())
    return int(seconds) * US_PER_SECOND + int(us)


def pages(link: Link, match: str, progress: Progress, what: str) -> Iterator[list[str]]:
    """Keys by pages; one that is there all the while comes at least once."""
    of = link.run(lambda client: client.dbsize())
    cursor, done = 0, 0
    while True:
        cursor, found = _scan(link, cursor, match)
        yield [key.decode(errors="surrogateescape") for key in found]
        done += PAGE_KEYS
        progress(what, min(done, of), of)
        if not cursor:
            return


def _scan(link: Link, cursor: int, match: str) -> tuple[int, list[bytes]]:
    answer: Any = link.run(lambda client: client.scan(cursor, match=match, count=PAGE_KEYS))
    return int(answer[0]), answer[1]


def records_of(link: Link, who: str, progress: Progress = no_progress) -> dict[str, Record]:
    """The records of one identifier by key; `who` is its digest."""
    return {
        key: record
        for keys in pages(link, f"{RECORD_PREFIX}*", progress, "reading the reservations")
        for key, record in zip(keys, read_records(link, keys), strict=True)
        if record is not None and record.who == who
    }


def read_records(link: Link, keys: Sequence[str]) -> list[Record | None]:
    """The records at these keys, all of one moment."""
    if not keys:
        return []
    texts: Any = link.run(lambda client: client.mget(keys))
    return [parse_record(text) for text in texts]


def read_all(link: Link, progress: Progress = no_progress, what: str = "reading the books") -> Snapshot:
    """Every key of ours, and Redis' time after the last."""
    snapshot = Snapshot()
    seen: set[str] = set()
    for found in pages(link, "llm:*", progress, what):
        keys = [key for key in found if key not in seen]
        seen.update(keys)
        _read_page(link, snapshot, keys)
    snapshot.keys = len(seen)
    snapshot.ended_us = redis_now_us(link)
    return snapshot


def _read_page(link: Link, snapshot: Snapshot, keys: list[str]) -> None:
    known = [known_key(key) for key in keys]

    def read(client: Client) -> list[Any]:
        pipeline: Any = client.pipeline(transaction=False)
        for key, what in zip(keys, known, strict=True):
            pipeline.pttl(key)
            _ask_for_value(pipeline, key, what.kind if what else "")
        answers: list[Any] = pipeline.execute(raise_on_error=False)
        return answers

    answers = link.run(read) if keys else []
    for key, what, left_ms, value in zip(keys, known, answers[::2], answers[1::2], strict=True):
        if left_ms == GONE or value in (None, [], 0):
            continue
        if left_ms == FOR_EVER:
            snapshot.oddities.append(Oddity(key, "no_ttl", "has no TTL"))
        if what is None:
            snapshot.oddities.append(Oddity(key, "unknown_key", "is not in the key map"))
        elif isinstance(value, ResponseError):
            snapshot.oddities.append(Oddity(key, "wrong_type", "is of another type than the key map says"))
        else:
            _take_in(snapshot, key, what, value)


def _ask_for_value(pipeline: Any, key: str, kind: str) -> None:
    if kind in RING_KINDS:
        pipeline.zrange(key, 0, -1, withscores=True)
    elif kind in {"record", "reset", *TOTAL_KINDS}:
        pipeline.get(key)
    else:
        pipeline.exists(key)


def _take_in(snapshot: Snapshot, key: str, what: KnownKey, value: Any) -> None:
    kind, owner = what.kind, what.owner
    if kind == "record":
        record = parse_record(value)
        if record is None or record.state not in {"open", "settled", "released"}:
            snapshot.oddities.append(Oddity(key, "no_record", "is no record of a reservation"))
        else:
            snapshot.records[key] = record
        return
    is_network = kind in NETWORK_KINDS
    if is_network or kind in {*IDENTIFIER_KINDS, "reset"}:
        snapshot.names[is_network, digest_of(owner)] = owner
    digest = digest_of(owner) if owner else ""
    if kind == "reset" and value.isdigit():
        snapshot.reset_us[digest] = int(value)
    elif kind in RING_KINDS:
        for start, held in _buckets(value):
            _put(snapshot, key, Place(kind, digest, start), held)
    elif kind in TOTAL_KINDS:
        _put(snapshot, key, Place(kind, digest, what.start_seconds), whole(value))


def _buckets(members: list[tuple[bytes, float]]) -> list[tuple[int, int | None]]:
    try:
        return list(buckets_of(members).items())
    except ValueError:
        return [(0, None)]


def whole(text: bytes | None) -> int | None:
    """The number that a string holds, also where it is none that we would write; None if it is no number."""
    try:
        return int(text or b"0")
    except ValueError:
        return None


def _put(snapshot: Snapshot, key: str, place: Place, held: int | None) -> None:
    if held is None or not 0 <= held < LARGEST:
        told = "holds no amount" if held is None else f"holds {held}, which no total can be"
        snapshot.oddities.append(Oddity(key, "no_amount", told))
    if held is not None:
        snapshot.stored[place] = held


@dataclass(slots=True)
class Booked:
    """What the records say of the places."""

    keys: dict[Place, list[str]] = field(default_factory=lambda: defaultdict(list))
    """The records that are booked there, by key."""
    nanousd: dict[Place, int] = field(default_factory=lambda: defaultdict(int))
    ttl_seconds: dict[tuple[str, str], int] = field(default_factory=dict)
    """(kind, owner) of a ring -> the shortest life of a bucket that a record of it stands for."""


def booked_by(snapshot: Snapshot) -> Booked:
    """What each place has to hold, by the records alone."""
    booked = Booked()
    for key, record in snapshot.records.items():
        is_cleared = record.made_at_us <= snapshot.reset_us.get(record.who, -1)
        for place, ttl_seconds in places_of(record, is_cleared=is_cleared):
            booked.keys[place].append(key)
            booked.nanousd[place] += amount_at(place, record)
            if ttl_seconds:
                ring = (place.kind, place.owner)
                booked.ttl_seconds[ring] = min(ttl_seconds, booked.ttl_seconds.get(ring, ttl_seconds))
    return booked


def amount_at(place: Place, record: Record) -> int:
    """What a record that belongs to a place stands for there."""
    return 0 if place.kind in OPEN_KINDS and record.state != "open" else record.nanousd


def places_of(record: Record, *, is_cleared: bool) -> list[tuple[Place, int]]:
    """Where a reservation is booked, and for how long a bucket of it counts past its start (0 for a total)."""
    window = arithmetic.charges(
        _KINDS, record.window_seconds, record.made_at_us, record.made_at_us, is_cleared=is_cleared
    )
    opened = arithmetic.pending_charges(_KINDS, record.pending_seconds, record.made_at_us, is_cleared=is_cleared)
    # Not the life of its key: once nobody's time is left in a bucket of open money, any settlement may take it out.
    open_life = record.pending_seconds + pending_bucket_seconds_of(record.pending_seconds)
    return [
        (Place(charge.key, _owner(charge.key, record), _start(charge, record)), life)
        for charge, life in (
            *((charge, _life(charge)) for charge in window),
            *((charge, open_life) for charge in opened),
        )
    ]


def _owner(kind: str, record: Record) -> str:
    if kind in NETWORK_KINDS:
        return record.network
    return record.who if kind in IDENTIFIER_KINDS else ""


def _life(charge: arithmetic.Charge) -> int:
    return 0 if charge.member is None else charge.ttl_seconds


def _start(charge: arithmetic.Charge, record: Record) -> int:
    if charge.member is not None:
        return charge.member
    period = SECONDS_PER_HOUR if charge.key == "global_hourly" else SECONDS_PER_DAY
    made = record.made_at_us // US_PER_SECOND
    return made - made % period
