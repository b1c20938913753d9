"""A snapshot of all keys, read page by page, so that no other client of Redis waits; nothing is written.

The keys of one page are of one moment, those of two pages are not; `audit` allows for that.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from redis.exceptions import ResponseError

from backends.budgets import BUILT_IN, Forever, Scope
from backends.clock import US_PER_SECOND
from backends.keys import RECORD_PREFIX, KnownKey, known_key
from backends.progress import Progress, no_progress
from backends.records import Record, digest_of, key_digest, member_in, number_in, parse_record, start_of
from backends.store.link import Client, Link

PAGE_KEYS = 500
FURTHER_KINDS = FURTHER_TOTAL, FURTHER_WINDOW = "further_total", "further_window"
WINDOWS = frozenset(name for name, row in BUILT_IN.items() if row.unit is None)


def pending_kind(scope: Scope) -> str:
    """The kind of the places where pending money of a scope is."""
    return f"pending_{scope}"


PENDING_KINDS = tuple(map(pending_kind, Scope))
PENDING_OF_OWNER = "pending"
"""The kind of place that a bucket of all scopes of one owner together is."""
NO_KEY = "no_key"
"""The kind of place that a digest stands for which no key has."""
_MONEY = frozenset({"total", "window", "pending"})
"""Kinds of `KnownKey` that hold amounts."""
_RECORDS = frozenset({"record", "emergency"})
"""Kinds of `KnownKey` that say what was booked; emergency spend looks like a reservation that has ended."""
LARGEST = 2**53
GONE, NO_TTL = -2, -1
"""Replies of PTTL."""


class Place(NamedTuple):
    """Where one amount is booked: a bucket, or a total."""

    kind: str
    """The name of a built-in budget, or one of the kinds above."""
    owner: str
    """Digest of the owner, empty for everybody; of a further budget the digest of its key."""
    start_seconds: int
    """Unix time at which the bucket or the period begins; 0 for a total that lasts for ever."""

    @property
    def is_pending(self) -> bool:
        """Whether it is a bucket of pending money."""
        return self.kind in PENDING_KINDS or self.kind == PENDING_OF_OWNER

    @property
    def is_bucket(self) -> bool:
        """Whether it is one of the buckets of a sorted set."""
        return self.is_pending or self.kind in WINDOWS or self.kind == FURTHER_WINDOW


def place_of(key: str, what: KnownKey) -> Place:
    """The place that is a total; of a key with buckets, what the places of all of them have in common."""
    if what.word:
        kind = FURTHER_WINDOW if what.kind == "window" else FURTHER_TOTAL
        return Place(kind, key_digest(key), what.start_seconds)
    kind = pending_kind(what.scope) if what.scope and what.kind == "pending" else what.budget
    return Place(kind, digest_of(what.owner) if what.owner else "", what.start_seconds)


class BudgetKey(NamedTuple):
    """The key of a further budget."""

    key: str
    what: KnownKey


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
    names: dict[str, str] = field(default_factory=dict)
    """Digest of an owner -> the owner, where the name of a key has it."""
    budget_keys: dict[str, BudgetKey] = field(default_factory=dict)
    """Of further budgets, by the digest of the key: records have that."""
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


def record_keys_where(link: Link, is_wanted: Callable[[Record], bool], progress: Progress = no_progress) -> list[str]:
    """Keys of those records, sorted."""
    found = set()
    for keys in key_pages(link, f"{RECORD_PREFIX}*", progress, "reading the reservations"):
        records = zip(keys, map(parse_record, read_texts(link, keys)), strict=True)
        found |= {key for key, record in records if record is not None and is_wanted(record)}
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
        if left_ms == NO_TTL and not (what and what.word == Forever().word):
            snapshot.oddities.append(Oddity(key, "no_ttl", "has no TTL"))
        if what is None:
            snapshot.oddities.append(Oddity(key, "unknown_key", "is not in the key map"))
        elif isinstance(value, ResponseError):
            snapshot.oddities.append(Oddity(key, "wrong_type", "is of another type than the key map says"))
        else:
            _add(snapshot, key, what, value)


def _ask_for_value(pipeline: Any, key: str, kind: str) -> None:
    if kind in {"window", "pending"}:
        pipeline.zrange(key, 0, -1, withscores=True)
    elif kind in {*_RECORDS, "reset", "total"}:
        pipeline.get(key)
    else:
        pipeline.exists(key)


def _add(snapshot: Snapshot, key: str, what: KnownKey, value: Any) -> None:
    kind, owner = what.kind, what.owner
    if kind in _RECORDS:
        record = parse_record(value)
        if record is None or record.state not in {"open", "settled", "released"}:
            snapshot.oddities.append(Oddity(key, "no_record", "is no record of a reservation"))
        else:
            snapshot.records[key] = record
        return
    if kind in {*_MONEY, "reset"}:
        snapshot.names[digest_of(owner)] = owner
    if kind == "reset" and value.isdigit():
        snapshot.reset_us[digest_of(owner)] = int(value)
    elif kind in _MONEY:
        if what.word:
            snapshot.budget_keys[key_digest(key)] = BudgetKey(key, what)
        place = place_of(key, what)
        amounts = [(place.start_seconds, number_in(value))] if kind == "total" else _buckets(kind, value)
        for start, held in amounts:
            _add_amount(snapshot, key, place._replace(start_seconds=start), held)


def _buckets(kind: str, members: list[tuple[bytes, float]]) -> list[tuple[int, int | None]]:
    """By bucket: of pending money all members of it."""
    try:
        return [(start_of(member_in(text)) if kind == "pending" else int(text), int(held)) for text, held in members]
    except ValueError:
        return [(0, None)]


def _add_amount(snapshot: Snapshot, key: str, place: Place, held: int | None) -> None:
    if held is None or not 0 <= held < LARGEST:
        text = "holds no amount" if held is None else f"holds {held}, which no total can be"
        snapshot.oddities.append(Oddity(key, "no_amount", text))
    if held is not None:
        snapshot.stored[place] += held
