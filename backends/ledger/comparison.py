"""A snapshot compared with itself: its totals with its records, and its days with one another. No Redis is asked.

A record names the owners of the six, and each other budget by the digest of its key. Where the snapshot has a key of
that digest, the record is booked there. Of the scope of a further budget neither says anything, so what is pending is
certain of an identifier, a network and everybody, as far as the six are charged. Of the other scopes, and of what is
charged without the six, this is certain:

* A record may be in the pending money of an owner only if a key of that owner has one of its digests, or if one of its
  digests belongs to no key. So a bucket holds no more than all of these together.
* A record is in the pending money of the owner of each of its keys, in one scope or another. So all scopes of an owner
  together hold no less than these records.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

from backends.budgets import (
    BUILT_IN,
    EVERYBODY,
    SECONDS_PER_DAY,
    SECONDS_PER_HOUR,
    SHORTEST_WINDOW_SECONDS,
    Budget,
    Calendar,
    Forever,
    Scope,
    Sliding,
)
from backends.clock import US_PER_SECOND
from backends.keys import (
    FURTHER_PREFIX,
    PENDING_PREFIX,
    RECORD_KEEP_SECONDS,
    bucket_seconds_of,
    known_key,
    pending_bucket_seconds_of,
    rows_at,
    window_seconds_of,
)
from backends.ledger.snapshot import (
    FURTHER_KINDS,
    FURTHER_TOTAL,
    NO_KEY,
    PENDING_KINDS,
    PENDING_OF_OWNER,
    BudgetKey,
    Place,
    Snapshot,
    pending_kind,
    place_of,
)
from backends.records import Record, digest_of, key_digest

MARGIN_SECONDS = 2
"""TTLs are set in whole seconds, and end by Redis' clock."""
MOST_TRIED = 100_000
"""Keys that are made up, for each owner, to find those that digests stand for: half a second."""
_ANY = "*"
"""In place of an owner that is not known."""
_PENDING_OF_ONE = tuple(pending_kind(scope) for scope in Scope if scope is not Scope.GLOBAL)
_OF_ANY_OWNER = tuple(Place(kind, _ANY, 0) for kind in PENDING_KINDS)
_LENGTHS_SECONDS: Mapping[str | None, int] = {"hour": SECONDS_PER_HOUR, "day": SECONDS_PER_DAY}
_TOTALS_SECONDS = {name: _LENGTHS_SECONDS[row.unit] for name, row in BUILT_IN.items() if row.unit in _LENGTHS_SECONDS}
"""The totals of the six, and how long their periods are."""
_SCOPES_OF_THE_SIX = frozenset(row.scope for row in BUILT_IN.values())
_PENDING_OF_THE_SIX = frozenset(map(pending_kind, _SCOPES_OF_THE_SIX))
_OF_IDENTIFIERS = frozenset(
    {pending_kind(Scope.IDENTIFIER), *(name for name, row in BUILT_IN.items() if row.scope is Scope.IDENTIFIER)}
)


class Expected(NamedTuple):
    """What a place holds by its records."""

    least: int
    most: int

    def missed_by(self, rule: str, stored: int) -> int:
        """By how much a total is too large, or, negative, too small, by the rule for its place."""
        if rule and stored < self.least:
            return stored - self.least
        return max(0, stored - self.most) if rule == "exact" else 0


class Sum(NamedTuple):
    """A total that parts have to add up to."""

    what: str
    total: Place
    parts: tuple[Place, ...]
    emergency: tuple[str, ...]
    """Keys of the records of emergency spend, which are a part of it too."""
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
    possible: dict[Place, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Keys of the records that may be booked in a bucket of pending money, for all that is known."""
    pending_of: dict[str, set[Place]] = field(default_factory=lambda: defaultdict(set))
    """Digest of an owner -> what the buckets of its pending money have in common, by each scope that has any."""
    ttl_seconds: dict[tuple[str, str], int] = field(default_factory=dict)
    """(kind, owner) of a key with buckets -> how long after its start a bucket of it counts, at the shortest."""
    last_made_seconds: dict[Place, int] = field(default_factory=dict)
    """Of a further total: when the last of its records was made."""
    exact: int = 0
    at_least: int = 0
    sums: dict[tuple[str, Place], Sum] = field(default_factory=dict)
    odd_places: list[Place] = field(default_factory=list)
    """Those that disagree with their records."""
    odd_sums: list[Sum] = field(default_factory=list)
    """Those that disagree with their parts."""

    def key_name(self, place: Place) -> str:
        """The key of a place; with a digest where no key names its owner, and with a star for all scopes."""
        owner = self.snapshot.names.get(place.owner, f"#{place.owner}")
        if place.kind in {*FURTHER_KINDS, NO_KEY}:
            named = self.snapshot.budget_keys.get(place.owner)
            return f"{FURTHER_PREFIX}{owner}" if named is None else named.key
        if place.kind == PENDING_OF_OWNER:
            return f"{PENDING_PREFIX}*:{owner}"
        if place.kind in PENDING_KINDS:
            return _pending_key(place.kind, owner)
        row = BUILT_IN[place.kind]
        period = Sliding(1) if row.unit is None else Calendar(row.unit)
        return rows_at([Budget(place.kind, owner, period, None, row.scope)], place.start_seconds)[0].key

    def key_names(self, place: Place) -> list[str]:
        """The keys that hold the amount of a place together."""
        if place.kind == PENDING_OF_OWNER:
            owner = self.snapshot.names[place.owner]
            return [_pending_key(kind, owner) for kind in _PENDING_OF_ONE]
        return [] if place.kind == NO_KEY else [self.key_name(place)]

    def whose_reset_counts(self, place: Place) -> str:
        """Digest of the owner whose records are not booked there any more if its books were cleared since; or empty."""
        if place.kind in FURTHER_KINDS:
            named = self.snapshot.budget_keys.get(place.owner)
            return "" if named is None else digest_of(named.what.owner)
        return place.owner if place.kind in _OF_IDENTIFIERS or place.kind == PENDING_OF_OWNER else ""

    def stored(self, place: Place) -> int:
        """What a place holds."""
        if place.kind == PENDING_OF_OWNER:
            return sum(self.snapshot.stored[place._replace(kind=kind)] for kind in _PENDING_OF_ONE)
        return self.snapshot.stored[place]

    def possible_keys(self, place: Place) -> list[str]:
        """Keys of the records that may be booked there too."""
        if place.kind not in PENDING_KINDS:
            return []
        return [*self.possible.get(place, ()), *self.possible.get(place._replace(owner=_ANY), ())]

    def expected(self, place: Place) -> Expected:
        """What the records say of a place."""
        records, least = self.snapshot.records, self.nanousd[place]
        return Expected(least, least + sum(amount_at(place, records[key]) for key in self.possible_keys(place)))

    def rule(self, place: Place) -> str:
        """How the place compares with its records: exact, at_least, or not at all ('')."""
        now = self.snapshot.ended_us / US_PER_SECOND
        if place in self.keys:
            if self._counts_until(place) - MARGIN_SECONDS <= now:
                return ""
            is_exact = place.kind in PENDING_KINDS or self._are_records_whole(place, now)
            return "exact" if is_exact else "at_least"
        return "exact" if self._are_records_whole(place, now) else ""

    def _are_records_whole(self, place: Place, now: float) -> bool:
        if place.kind in {NO_KEY, PENDING_OF_OWNER}:
            return False
        if place.kind in FURTHER_KINDS and place.owner not in self.snapshot.budget_keys:
            # Its key is gone by now.
            return False
        begins = float(place.start_seconds)
        reset = self.snapshot.reset_us.get(self.whose_reset_counts(place), 0) / US_PER_SECOND
        if place.kind in FURTHER_KINDS and reset >= begins:
            # Whether it was cleared is not known: that depends on its scope, and on the budgets that there were then.
            return False
        return max(begins, reset) >= now - RECORD_KEEP_SECONDS + MARGIN_SECONDS

    def _counts_until(self, place: Place) -> float:
        """Until when what its records booked there has to be there."""
        if place.kind == NO_KEY:
            return inf
        if place.kind == FURTHER_TOTAL:
            # Its period has not ended before that, and it is kept for a day more.
            return self.last_made_seconds[place] + SECONDS_PER_DAY
        if place.kind in _TOTALS_SECONDS:
            return place.start_seconds + _TOTALS_SECONDS[place.kind] + BUILT_IN[place.kind].keep_seconds
        # The shortest of all its buckets: a reservation with a shorter window may have removed this one.
        kinds = (place.kind, *_PENDING_OF_ONE) if place.kind == PENDING_OF_OWNER else (place.kind,)
        ttls = (self.ttl_seconds.get((kind, owner), inf) for kind in kinds for owner in (place.owner, _ANY))
        return place.start_seconds + min(ttls)

    def book(self, key: str, record: Record, place: Place, ttl_seconds: int = 0) -> None:
        """Count a record where it is booked; `ttl_seconds` as in the field, of a bucket."""
        self.keys[place].append(key)
        self.nanousd[place] += amount_at(place, record)
        if ttl_seconds:
            self.shorten(place.kind, place.owner, ttl_seconds)

    def shorten(self, kind: str, owner: str, ttl_seconds: int) -> None:
        """A bucket of that key counts no longer."""
        self.ttl_seconds[kind, owner] = min(ttl_seconds, self.ttl_seconds.get((kind, owner), ttl_seconds))


def _pending_key(kind: str, owner: str) -> str:
    scope = next(scope for scope in Scope if pending_kind(scope) == kind)
    return rows_at([Budget("any", owner, Forever(), None, scope)], 0)[0].pending_key


def compare(snapshot: Snapshot) -> Comparison:
    """Compare every total with its records, and every day with its parts."""
    comparison = Comparison(snapshot)
    _find_names(snapshot)
    _find_pending(comparison)
    for key, record in snapshot.records.items():
        _add_record(comparison, key, record)
    for place in {*snapshot.stored, *comparison.keys}:
        rule, expected = comparison.rule(place), comparison.expected(place)
        comparison.exact += rule == "exact" and expected.least == expected.most
        comparison.at_least += rule == "at_least"
        if expected.missed_by(rule, comparison.stored(place)):
            comparison.odd_places.append(place)
    for each in _sums(snapshot):
        comparison.sums[each.what, each.total] = each
        parts = sum(snapshot.stored[part] for part in each.parts)
        parts += sum(snapshot.records[key].nanousd for key in each.emergency)
        if each.is_off(snapshot.stored[each.total], parts):
            comparison.odd_sums.append(each)
    return comparison


def amount_at(place: Place, record: Record) -> int:
    """Nano-dollars that a record adds to a place that it is booked in."""
    return 0 if place.is_pending and record.state != "open" else record.nanousd


# What the digests of records stand for.


def _find_names(snapshot: Snapshot) -> None:
    """Find keys that are gone: each budget that is left is tried with a record's owners, unless that is too much."""
    unknown: dict[tuple[str, str], set[str]] = defaultdict(set)
    for record in snapshot.records.values():
        digests = set(record.further) - snapshot.budget_keys.keys()
        if digests:
            unknown[record.who, record.network] |= digests
    around = _around_the_owner(snapshot)
    if len(unknown) * len(around) > MOST_TRIED:
        return
    for whose, digests in unknown.items():
        owners = [EVERYBODY, *(snapshot.names[its] for its in whose if its in snapshot.names)]
        for key in (f"{beginning}{owner}{end}" for owner in owners for beginning, end in around):
            found = known_key(key) if key_digest(key) in digests else None
            if found is not None:
                snapshot.budget_keys[key_digest(key)] = BudgetKey(key, found)


def _around_the_owner(snapshot: Snapshot) -> list[tuple[str, str]]:
    """What the keys of further budgets begin and end with; of each budget two periods, since records are not older."""
    ends: dict[str, set[str]] = defaultdict(set)
    for key, what in snapshot.budget_keys.values():
        end = f":{what.start_seconds}" if what.start_seconds else ""
        ends[key.removesuffix(f"{what.owner}{end}")].add(end)
    return [(beginning, end) for beginning, its in ends.items() for end in sorted(its)[-2:]]


def _find_pending(comparison: Comparison) -> None:
    for place in comparison.snapshot.stored:
        if place.kind in PENDING_KINDS:
            comparison.pending_of[place.owner or digest_of(EVERYBODY)].add(place._replace(start_seconds=0))


# Where a record is booked.


def _add_record(comparison: Comparison, key: str, record: Record) -> None:
    if record.has_the_six:
        _add_to_the_six(comparison, key, record)
    if record.is_emergency:
        made = record.made_at_us // US_PER_SECOND
        comparison.book(key, record, Place("global_hour", "", made))
        comparison.book(key, record, Place("global_day", "", made - made % SECONDS_PER_DAY))
    if record.further:
        named = [comparison.snapshot.budget_keys.get(digest) for digest in record.further]
        known = [each for each in named if each is not None]
        for each in known:
            _add_to_budget(comparison, each, key, record)
        if len(known) < len(named) and _must_have_a_key(comparison.snapshot, record):
            for digest in record.further:
                if digest not in comparison.snapshot.budget_keys:
                    comparison.book(key, record, Place(NO_KEY, digest, 0))
        owners = {each.what.owner for each in known}
        _add_pending(comparison, key, record, owners, is_whole=len(known) == len(named))


def _add_pending(comparison: Comparison, key: str, record: Record, owners: set[str], *, is_whole: bool) -> None:
    """Count a record in the pending money of the owners of its further budgets; they are all of them if `is_whole`."""
    bucket, ttl_seconds = _pending_bucket(record)
    around: set[Place] = set()
    for owner in owners:
        its = digest_of(owner)
        around |= comparison.pending_of.get(its, set())
        was_cleared = record.made_at_us <= comparison.snapshot.reset_us.get(its, -1)
        if owner != EVERYBODY and its not in {record.who, record.network} and not was_cleared:
            comparison.book(key, record, Place(PENDING_OF_OWNER, its, bucket), ttl_seconds)
    for kind, its, _ in around if is_whole else _OF_ANY_OWNER:
        # With the six it is certain what is pending of these scopes.
        if not (record.has_the_six and kind in _PENDING_OF_THE_SIX):
            _add_possible(comparison, key, record, Place(kind, its, bucket), ttl_seconds)


def _add_possible(comparison: Comparison, key: str, record: Record, place: Place, ttl_seconds: int) -> None:
    was_cleared = record.made_at_us <= comparison.snapshot.reset_us.get(comparison.whose_reset_counts(place), -1)
    comparison.shorten(place.kind, place.owner, ttl_seconds)
    if not was_cleared:
        comparison.possible[place].append(key)


def _add_to_the_six(comparison: Comparison, key: str, record: Record) -> None:
    made = record.made_at_us // US_PER_SECOND
    owners = {Scope.IDENTIFIER: record.who, Scope.NETWORK: record.network, Scope.GLOBAL: ""}
    if record.made_at_us <= comparison.snapshot.reset_us.get(record.who, -1):
        del owners[Scope.IDENTIFIER]
    window = bucket_seconds_of(record.window_seconds)
    for name, row in BUILT_IN.items():
        if row.scope in owners:
            length = _TOTALS_SECONDS.get(name)
            start = made - made % (length or window)
            ttl_seconds = 0 if length else record.window_seconds + window
            comparison.book(key, record, Place(name, owners[row.scope], start), ttl_seconds)
    bucket, ttl_seconds = _pending_bucket(record)
    for scope, owner in owners.items():
        comparison.book(key, record, Place(pending_kind(scope), owner, bucket), ttl_seconds)


def _add_to_budget(comparison: Comparison, named: BudgetKey, key: str, record: Record) -> None:
    """Count a record in the further budget whose key has one of its digests."""
    place, made = place_of(*named), record.made_at_us // US_PER_SECOND
    if record.made_at_us <= comparison.snapshot.reset_us.get(comparison.whose_reset_counts(place), -1):
        return
    if not place.is_bucket:
        comparison.book(key, record, place)
        comparison.last_made_seconds[place] = max(made, comparison.last_made_seconds.get(place, 0))
    else:
        window = window_seconds_of(named.what.word)
        bucket = bucket_seconds_of(window)
        comparison.book(key, record, place._replace(start_seconds=made - made % bucket), window + bucket)


def _must_have_a_key(snapshot: Snapshot, record: Record) -> bool:
    """Whether every further budget that a record is charged to has a key still, whatever its period is.

    None goes before that of a window, which is no shorter than `SHORTEST_WINDOW_SECONDS`, or else no shorter than its
    reservations may be pending. Without the six it is a library's, which may have any length.
    """
    if not (record.has_the_six and record.nanousd):
        return False
    shortest = min(SHORTEST_WINDOW_SECONDS, record.pending_seconds) - MARGIN_SECONDS
    is_young = record.made_at_us + shortest * US_PER_SECOND > snapshot.ended_us
    return is_young and record.made_at_us > snapshot.reset_us.get(record.who, -1)


def _pending_bucket(record: Record) -> tuple[int, int]:
    """Where a record's pending money is, and for how long that counts."""
    bucket, made = pending_bucket_seconds_of(record.pending_seconds), record.made_at_us // US_PER_SECOND
    # Less than the TTL of its key: a pending bucket that is past its time may be taken out by any settlement.
    return made - made % bucket, record.pending_seconds + bucket


# Days.


def _sums(snapshot: Snapshot) -> Iterator[Sum]:
    """Three for each day whose keys have to exist still: each request is charged to all six, or to none of them.

    Emergency spend is charged to everybody alone, and to an hour only if that was not over when it was booked.
    """
    places: dict[tuple[str, int], list[Place]] = {}
    for place in snapshot.stored:
        if place.kind in _TOTALS_SECONDS:
            day = place.start_seconds - place.start_seconds % SECONDS_PER_DAY
            places.setdefault((place.kind, day), []).append(place)
    emergency: dict[int, list[str]] = defaultdict(list)
    for key, record in snapshot.records.items():
        if record.is_emergency:
            made = record.made_at_us // US_PER_SECOND
            emergency[made - made % SECONDS_PER_DAY].append(key)
    for day in sorted({day for _, day in places}):
        if day + 2 * SECONDS_PER_DAY - MARGIN_SECONDS <= snapshot.ended_us // US_PER_SECOND:
            continue
        total = Place("global_day", "", day)
        was_reset = any(at_us >= day * US_PER_SECOND for at_us in snapshot.reset_us.values())
        its_emergency = tuple(sorted(emergency[day]))
        for kind, what, also, may_be_more in (
            ("day", "its identifiers", its_emergency, was_reset),
            ("network_day", "its networks", its_emergency, False),
            ("global_hour", "its hours", (), True),
        ):
            yield Sum(what, total, tuple(sorted(places.get((kind, day), []))), also, may_be_more)
