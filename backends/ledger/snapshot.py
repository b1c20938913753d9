"""A snapshot of all keys, read page by page, so that no other client of Redis waits; nothing is written.

The keys of one page are of one moment, those of two pages are not; `audit` allows for that.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from redis.exceptions import ResponseError

from backends.clock import US_PER_SECOND
from backends.keys import RECORD_PREFIX, KnownKey, known_key
from backends.progress import Progress, no_progress
from backends.records import Record, buckets_of, digest_of, number_in, parse_record
from backends.store.link import Client, Link

PAGE_KEYS = 500
PENDING_KINDS = ("pending_identifier", "pending_network", "pending_global")
BUCKET_KINDS = ("recent", "network_recent", *PENDING_KINDS)
"""Sorted sets, each of which holds the buckets of one owner."""
TOTAL_KINDS = ("daily", "network_daily", "global_hourly", "global_daily")
NETWORK_KINDS = ("network_recent", "network_daily", "pending_network")
IDENTIFIER_KINDS = ("recent", "daily", "pending_identifier")
LARGEST = 2**53
GONE, NO_TTL = -2, -1
"""Replies of PTTL."""


class Place(NamedTuple):
    """Where one amount is booked: a bucket, an hour or a day of one owner."""

    kind: str
    """A field of `BookKeys`."""
    owner: str
    """Digest of the identifier or network; empty for the global scope."""
    start_seconds: int
    """Unix time at which the bucket, hour or day begins."""


class Oddity(NamedTuple):
    """A key that is wrong by itself."""

    key: str
    kind: str
    text: str
    """The rest of a sentence that begins with the key."""


@dataclass(slots=True)
class Snapshot:
    """The keys of ours, as they were read."""

    ended_us: int = 0
    """Redis' time after the last key was read."""
    records: dict[str, Record] = field(default_factory=dict)
    """By key."""
    stored: Counter[Place] = field(default_factory=Counter)
    """Nano-dollars."""
    names: dict[tuple[bool, str], str] = field(default_factory=dict)
    """(whether it is a network, digest) -> identifier or network, where the name of a key has it."""
    reset_us: dict[str, int] = field(default_factory=dict)
    """Digest of an identifier -> when its books were cleared."""
    oddities: list[Oddity] = field(default_factory=list)
    keys: int = 0


def key_pages(link: Link, match: str, progress: Progress, what: str) -> Iterator[list[str]]:
    """Keys by pages; a key that exists all the while comes at least once."""
    keys = link.run(lambda client: client.dbsize())
    cursor, done = 0, 0
    while True:
        cursor, found = _scan(link, cursor, match)
        yield [key.decode(errors="surrogateescape") for key in found]
        done += PAGE_KEYS
        progress(what, min(done, keys), keys)
        if not cursor:
            return


def _scan(link: Link, cursor: int, match: str) -> tuple[int, list[bytes]]:
    answer: Any = link.run(lambda client: client.scan(cursor, match=match, count=PAGE_KEYS))
    return int(answer[0]), answer[1]


def read_texts(link: Link, keys: Sequence[str]) -> list[bytes | None]:
    """The strings at these keys, as of one moment; None for a missing key."""
    texts: Any = link.run(lambda client: client.mget(keys)) if keys else []
    return list(texts)


def record_keys_of(link: Link, identifier: str, progress: Progress = no_progress) -> list[str]:
    """Keys of the records of one identifier, sorted."""
    who, found = digest_of(identifier), set()
    for keys in key_pages(link, f"{RECORD_PREFIX}*", progress, "reading the reservations"):
        records = zip(keys, map(parse_record, read_texts(link, keys)), strict=True)
        found |= {key for key, record in records if record is not None and record.who == who}
    return sorted(found)


def read_snapshot(link: Link, progress: Progress = no_progress, what: str = "reading the books") -> Snapshot:
    """Read every key of ours."""
    snapshot = Snapshot()
    seen: set[str] = set()
    for found in key_pages(link, "llm:*", progress, what):
        keys = [key for key in found if key not in seen]
        seen.update(keys)
        _read_page(link, snapshot, keys)
    snapshot.keys = len(seen)
    seconds, us = link.run(lambda client: client.time())
    snapshot.ended_us = int(seconds) * US_PER_SECOND + int(us)
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
        if left_ms == NO_TTL:
            snapshot.oddities.append(Oddity(key, "no_ttl", "has no TTL"))
        if what is None:
            snapshot.oddities.append(Oddity(key, "unknown_key", "is not in the key map"))
        elif isinstance(value, ResponseError):
            snapshot.oddities.append(Oddity(key, "wrong_type", "is of another type than the key map says"))
        else:
            _add(snapshot, key, what, value)


def _ask_for_value(pipeline: Any, key: str, kind: str) -> None:
    if kind in BUCKET_KINDS:
        pipeline.zrange(key, 0, -1, withscores=True)
    elif kind in {"record", "reset", *TOTAL_KINDS}:
        pipeline.get(key)
    else:
        pipeline.exists(key)


def _add(snapshot: Snapshot, key: str, what: KnownKey, value: Any) -> None:
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
    elif kind in BUCKET_KINDS:
        for start, held in _buckets(value):
            _add_amount(snapshot, key, Place(kind, digest, start), held)
    elif kind in TOTAL_KINDS:
        _add_amount(snapshot, key, Place(kind, digest, what.start_seconds), number_in(value))


def _buckets(members: list[tuple[bytes, float]]) -> list[tuple[int, int | None]]:
    try:
        return list(buckets_of(members).items())
    except ValueError:
        return [(0, None)]


def _add_amount(snapshot: Snapshot, key: str, place: Place, held: int | None) -> None:
    if held is None or not 0 <= held < LARGEST:
        text = "holds no amount" if held is None else f"holds {held}, which no total can be"
        snapshot.oddities.append(Oddity(key, "no_amount", text))
    if held is not None:
        snapshot.stored[place] = held
