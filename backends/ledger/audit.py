"""Recompute every total from the records of the reservations, and compare the days with one another.

What is compared, and how exactly:

* A bucket, or a total of an hour, a day or another period, with the records that are booked in it. A record is kept
  until an hour past its end. So a total that began within the last hour has to be equal to its records; of one that
  began before, records may be gone, so it has to be at least as much. A further budget of an owner whose books were
  cleared since it began has to be at least as much as the records since then.
* A bucket of what is pending. Open records outlive it, so it has to be equal always, with an identifier, a network and
  everybody. Of the other scopes the records say less: see `comparison`.
* The days with one another: all networks and the emergency spend together are the global day, so are all identifiers
  with it (or less, where the books of one were cleared), and the hours of a day are no more than the day. No records of
  reservations are needed for that; those of emergency spend live as long as the day.
* Each key by itself: a total is an amount below 2^53, everything but ``settings`` and the total of a budget that lasts
  for ever has a TTL, no key is unknown.

A key that is missing holds nothing. Of a further budget's key the records have the digest alone: where its name can be
found by the keys that are left, it is checked like one that is there; else it is reported, by the digest, while a
record is so young that no key of it can have reached its TTL. ``llm:running:`` keys are hints, whose values are not
compared.

It may run beside traffic. A *pass* reads all keys, page by page. What disagrees in a pass is *rechecked*: it is read
again in one step, with all records that belong to it; the next pass has to show that this step missed no record. A
total that is too small even without the missed records is reported, too. Whatever is reported disagreed in two
rechecks, one after the other: a legacy worker leaves a total half booked for a moment. What changed in every pass is
reported as undecided.

Nothing is written.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from backends.clock import US_PER_SECOND
from backends.keys import reset_key
from backends.ledger.comparison import Comparison, Expected, Sum, amount_at, compare
from backends.ledger.snapshot import Place, read_snapshot, read_texts
from backends.progress import Progress, no_progress
from backends.records import member_in, number_in, parse_record, start_of, state_of
from backends.store.link import Client, Link
from backends.strategies import arithmetic

PASSES = 6
"""At most."""
MOST_AT_ONCE = 10_000
"""Keys that a recheck reads in one step: about five milliseconds of Redis' time."""
SETTLED_DOWN_US = 2 * US_PER_SECOND


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


@dataclass(slots=True)
class _Recheck:
    """A total and what belongs to it, read in one step."""

    at_us: int
    stored: int
    expected: Expected
    settled_down: int
    """What the records come to that are `SETTLED_DOWN_US` old: a legacy worker may have booked others by half."""
    members: frozenset[str | Place]


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
        """By how much a total disagreed in its last recheck."""

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
        undecided = [this.key_name(place) for place in (*places, *(each.total for each in sums))]
        return _report(first, passes, [*self._found, *by_themselves], undecided)

    def _pass(self, number: int) -> Comparison:
        what = "reading the books" if number == 1 else f"reading the books again ({number})"
        return compare(read_snapshot(self._link, self._progress, what))

    def _recheck_place(self, this: Comparison, place: Place) -> _Recheck | None:
        """The amount and the records that may be booked there, as of one moment; None if they are too many for that."""
        certain, possible = this.keys.get(place, []), this.possible_keys(place)
        if len(certain) + len(possible) > MOST_AT_ONCE:
            return None
        owner = this.snapshot.names.get(this.whose_reset_counts(place), "")
        read = partial(
            _read_place, place=place, names=this.key_names(place), owner=owner, record_keys=[*certain, *possible]
        )
        (seconds, us), reset, texts, *amounts = self._link.run(read)
        at_us = int(seconds) * US_PER_SECOND + int(us)
        held, settled_down = [], 0
        for text in texts:
            record = parse_record(text)
            is_booked = record is not None and not arithmetic.was_cleared(reset, record.made_at_us)
            held.append(amount_at(place, record) if record is not None and is_booked else 0)
            if record is not None and len(held) <= len(certain) and record.made_at_us + SETTLED_DOWN_US <= at_us:
                settled_down += held[-1]
        return _Recheck(
            at_us=at_us,
            stored=sum(_amount_in(place, amount) for amount in amounts),
            expected=Expected(sum(held[: len(certain)]), sum(held)),
            settled_down=settled_down,
            members=frozenset([*certain, *possible]),
        )

    def _recheck_sum(self, this: Comparison, its_sum: Sum) -> _Recheck | None:
        if len(its_sum.parts) > MOST_AT_ONCE:
            return None
        names = [this.key_name(place) for place in (its_sum.total, *its_sum.parts)]
        texts = read_texts(self._link, [*names, *its_sum.emergency])
        stored, *parts = (number_in(text) or 0 for text in texts[: len(names)])
        parts += [record.nanousd for record in map(parse_record, texts[len(names) :]) if record is not None]
        members: frozenset[str | Place] = frozenset([*its_sum.parts, *its_sum.emergency])
        return _Recheck(0, stored, Expected(sum(parts), sum(parts)), 0, members)

    def _is_decided(self, before: Comparison, this: Comparison, place: Place, its: _Recheck | None) -> bool:
        """Whether the recheck is proof, now that a pass has shown which records there were at its moment."""
        was_missed = False
        if its is None:
            # Too many for one step: two passes that are alike in every part stand for a moment.
            if not _is_same(before, this, place):
                return False
            stored, expected = this.stored(place), this.expected(place)
        else:
            was_missed = _was_missed(this, place, its)
            stored, expected = its.stored, its.expected
            if was_missed:
                # Missed records make a total larger: one that is too small without them is too small for certain.
                expected = Expected(its.settled_down, its.settled_down)
                if stored >= its.settled_down:
                    return False
        rule = this.rule(place)
        missed_by = expected.missed_by(rule, stored)
        if not missed_by:
            return True
        if not self._was_seen_before(place, missed_by, moves=was_missed):
            return False
        self._found.append(_wrong_total(this, place, rule, stored, expected))
        return True

    def _is_sum_decided(self, this: Comparison, its_sum: Sum, its: _Recheck | None) -> bool:
        now = this.sums.get((its_sum.what, its_sum.total))
        if now is None:
            return True
        if its is None or not {*now.parts, *now.emergency} <= its.members:
            return False
        parts = its.expected.least
        if not now.is_off(its.stored, parts):
            return True
        if not self._was_seen_before((now.what, now.total), its.stored - parts, moves=False):
            return False
        self._found.append(_wrong_sum(this, now, its.stored, parts))
        return True

    def _was_seen_before(self, what: object, by_nanousd: int, *, moves: bool) -> bool:
        """Whether the recheck before disagreed too: a legacy worker leaves a total half booked for a moment."""
        before = self._off_by.get(what)
        self._off_by[what] = by_nanousd
        return before is not None and (before == by_nanousd or (moves and max(before, by_nanousd) < 0))


def _read_place(client: Client, *, place: Place, names: list[str], owner: str, record_keys: list[str]) -> list[Any]:
    """Time, reset, records and amounts, in one transaction."""
    transaction: Any = client.pipeline(transaction=True)
    transaction.time()
    transaction.get(reset_key(owner))
    if record_keys:
        transaction.mget(record_keys)
    for name in names:
        if place.is_pending:
            transaction.zrange(name, 0, -1, withscores=True)
        elif place.is_bucket:
            transaction.zscore(name, str(place.start_seconds))
        else:
            transaction.get(name)
    answers: list[Any] = transaction.execute()
    return answers if record_keys else [*answers[:2], [], *answers[2:]]


def _amount_in(place: Place, answer: Any) -> int:
    if place.is_pending:
        return sum(int(held) for text, held in answer if start_of(member_in(text)) == place.start_seconds)
    return int(answer) if isinstance(answer, float) else number_in(answer) or 0


def _was_missed(this: Comparison, place: Place, its: _Recheck) -> bool:
    """Whether the recheck missed a record that existed at its moment."""
    records, keys = this.snapshot.records, (*this.keys.get(place, ()), *this.possible_keys(place))
    return any(key not in its.members for key in keys if records[key].made_at_us <= its.at_us)


def _is_same(before: Comparison, this: Comparison, place: Place) -> bool:
    keys = [*this.keys.get(place, ()), *this.possible_keys(place)]
    return (
        before.stored(place) == this.stored(place)
        and sorted([*before.keys.get(place, ()), *before.possible_keys(place)]) == sorted(keys)
        and all(before.snapshot.records[key] == this.snapshot.records[key] for key in keys)
    )


def _wrong_total(this: Comparison, place: Place, rule: str, stored: int, expected: Expected) -> Disagreement:
    count = len(this.keys.get(place, ())) + len(this.possible_keys(place))
    bucket = place.start_seconds if place.is_bucket else None
    where = "holds" if bucket is None else f"holds in bucket {bucket}"
    bound, word = expected.least, "at least " if rule == "at_least" else ""
    if expected.least < expected.most:
        bound, word = (expected.least, "at least ") if stored < expected.least else (expected.most, "at most ")
    kind = "open money" if place.is_pending else "money"
    told = f"{where} {stored}, and the {count} reservations there come to {word}{bound} ({kind}, nano-dollars)"
    return Disagreement("total", this.key_name(place), told, bucket, stored, bound)


def _wrong_sum(this: Comparison, its_sum: Sum, stored: int, parts: int) -> Disagreement:
    told = f"holds {stored}, and {its_sum.what} come to {parts} (nano-dollars)"
    return Disagreement("sum", this.key_name(its_sum.total), told, None, stored, parts)


def _report(first: Comparison, passes: int, disagreements: list[Disagreement], undecided: list[str]) -> AuditReport:
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
