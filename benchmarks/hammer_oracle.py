"""Checks what must hold after a seed, by what the processes saw and what the pretend upstream billed.

* **I1** settled + pending ≤ limit, in every limit, at every instant. Proved of this: at each instant of the run, what
  was *certainly* booked stayed within the limit. Certain is what a reply said is held and no end was sent for, and what
  the reply to an end said is booked; while an end is under way, the smaller of the two counts. If this exceeds a limit,
  the limit was exceeded, in whatever order the calls took effect. The reverse is not proved: two overlapping calls that
  exceed a limit only between them could hide. So the processes also compare the figures of each admission with the
  limits. A window counts exactly, without the one more bucket that our sorted sets keep. And what refuses is a budget
  that is enforced and has such a limit; an admission says which shadow budgets it is over.
* **I2** every total is the sum of its reservations' present amounts: by the replies that the processes had, from a
  snapshot read afterwards; and by the records, with `backends.ledger.audit`.
* **I3** a reservation ends once, and each repeat returns the first end's amount; an idempotency key that was not
  released is used by one request.
* **I4** the upstream's bill ≤ what is booked, for each request, and for all.
* **I6** each amount stands in the bucket, and in the period of its time zone, in which its reservation was made.
* **I5, I7, I8** amounts, TTLs, and reservations that were never ended: with `backends.ledger.audit`.

Where an amount belongs is worked out here once more, keys and calendars included, and not with the code under test.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

from backends.budgets import Budget, Calendar, Forever, Scope, Sliding
from backends.clock import US_PER_SECOND
from backends.ledger.audit import audit
from backends.store.link import Link
from benchmarks.hammer_load import Plan, Population, ShareReport, Trace, is_tight

MOST_PRINTED = 5
FIRST_ENDS = {"settled", "released"}
RECORDS, GLOBAL_DAYS = "llm:reservation:", "llm:global:daily:"
AMOUNTS = ("llm:cost:", "llm:network:", "llm:global:", "llm:budget:", "llm:open:")
PAGE_KEYS = 1_000
KEYS_OF_THE_SIX = {
    "day": "llm:cost:daily:{owner}:{start:%Y-%m-%d}",
    "window": "llm:cost:recent:{owner}",
    "network_window": "llm:network:recent:{owner}",
    "network_day": "llm:network:daily:{owner}:{start:%Y-%m-%d}",
    "global_hour": "llm:global:hourly:{start:%Y-%m-%dT%H}",
    "global_day": "llm:global:daily:{start:%Y-%m-%d}",
}


class Place(NamedTuple):
    """Where one amount is booked."""

    key: str
    start_seconds: int | None = None
    """Of a bucket, unix time; None where the key holds one amount."""


@dataclass
class Stored:
    """What Redis holds after a seed."""

    amounts: dict[Place, int] = field(default_factory=dict)
    booked: dict[str, int] = field(default_factory=dict)
    """By the id of each record."""
    ended_us: int = 0
    """When all had been read."""


@dataclass
class History:
    """One reservation, as all processes together saw it."""

    rid: str
    plan: Plan
    made_at_us: int
    holds: list[tuple[int, int]]
    billed: int
    ends: list[tuple[int, int, str, int]]

    @property
    def held(self) -> int:
        """The most that any reply said it holds."""
        return max(held for _, held in self.holds)

    @property
    def first_end(self) -> tuple[int, int, str, int] | None:
        return next((end for end in self.ends if end[2] in FIRST_ENDS), None)

    @property
    def booked(self) -> int:
        """What has to be booked for it now."""
        return self.held if self.first_end is None else self.first_end[3]


def violations(link: Link, population: Population, reports: Iterable[ShareReport]) -> list[str]:
    """Every violation, with the invariant in front; empty if all hold."""
    reports = list(reports)
    histories = _histories(trace for each in reports for trace in each.traces)
    stored = _stored(link)
    found = [violation for each in reports for violation in each.violations]
    for check in (_one_end_each(histories), _keys_used_once(histories), _bills(histories, stored)):
        found += check
    found += _books(population, histories, stored)
    found += _instants(population, histories)
    found += _audited(link, histories)
    return found


def _stored(link: Link) -> Stored:
    stored = Stored()
    keys: list[str] = link.run(lambda client: [key.decode() for key in client.scan_iter("llm:*", count=PAGE_KEYS)])
    for start in range(0, len(keys), PAGE_KEYS):
        _read_page(link, stored, list(dict.fromkeys(keys[start : start + PAGE_KEYS])))
    seconds, us = link.run(lambda client: client.time())
    stored.ended_us = seconds * US_PER_SECOND + us
    return stored


def _read_page(link: Link, stored: Stored, keys: list[str]) -> None:
    def read(client: Any) -> list[Any]:
        pipeline = client.pipeline(transaction=False)
        for key in keys:
            pipeline.get(key)
            pipeline.zrange(key, 0, -1, withscores=True)
        replies: list[Any] = pipeline.execute(raise_on_error=False)
        return replies

    replies = link.run(read)
    # What is of the other kind is answered with an error.
    for key, text, buckets in zip(keys, replies[::2], replies[1::2], strict=True):
        if key.startswith(RECORDS) and isinstance(text, bytes):
            stored.booked[key.removeprefix(RECORDS)] = int(text.split()[1])
        elif key.startswith(AMOUNTS) and isinstance(text, bytes):
            stored.amounts[Place(key)] = int(text)
        elif key.startswith(AMOUNTS) and isinstance(buckets, list):
            for member, held in buckets:
                place = Place(key, int(member.partition(b":")[0]))
                stored.amounts[place] = stored.amounts.get(place, 0) + int(held)


def _histories(traces: Iterable[Trace]) -> dict[str, History]:
    histories: dict[str, History] = {}
    for trace in traces:
        history = histories.get(trace.rid)
        if history is None:
            histories[trace.rid] = History(
                trace.rid, trace.plan, trace.made_at_us, list(trace.holds), trace.billed, list(trace.ends)
            )
        else:
            history.holds += trace.holds
            history.billed = max(history.billed, trace.billed)
            history.ends += trace.ends
    return histories


def _one_end_each(histories: dict[str, History]) -> Iterator[str]:
    for rid, history in histories.items():
        firsts = [end for end in history.ends if end[2] != "repeated"]
        if len(firsts) != (history.plan.fate != "crash") or any(end[2] not in FIRST_ENDS for end in firsts):
            yield f"I3: {rid} ended as {[end[2] for end in history.ends]}"
        elif {end[3] for end in history.ends} > {end[3] for end in firsts}:
            yield f"I3: repeats of the end of {rid} were told other amounts: {[end[3] for end in history.ends]}"


def _keys_used_once(histories: dict[str, History]) -> Iterator[str]:
    used: dict[str, list[str]] = defaultdict(list)
    for history in histories.values():
        if history.plan.idempotency is not None and history.plan.fate != "release":
            used[history.plan.idempotency].append(history.rid)
    for name, rids in used.items():
        if len(rids) > 1:
            yield f"I3: idempotency key {name} reached the upstream as {rids}"


def _bills(histories: dict[str, History], stored: Stored) -> Iterator[str]:
    for rid, history in histories.items():
        booked = stored.booked.get(rid)
        if booked is None:
            yield f"I4: {rid} has no record"
        elif booked < history.billed or booked != history.booked:
            yield f"I4: {rid} was billed {history.billed}, told {history.booked}, and {booked} is booked"
    days = sum(held for place, held in stored.amounts.items() if place.key.startswith(GLOBAL_DAYS))
    billed = sum(history.billed for history in histories.values())
    if billed > days:
        yield f"I4: the upstream billed {billed}, and {days} is booked"


def _books(population: Population, histories: dict[str, History], stored: Stored) -> Iterator[str]:
    """Compare each total with what the replies said; buckets only while they count."""
    expected = _expected(population, histories)
    off: dict[Place, int] = {}
    sums: dict[str, int] = defaultdict(int)
    for place in {*expected, *stored.amounts}:
        by = stored.amounts.get(place, 0) - expected[place]
        if by and removable_at_us(population, place) > stored.ended_us + US_PER_SECOND:
            off[place] = by
            sums[_without_period(place)] += by
    for place, by in off.items():
        # An excess in one period and a lack in another of the same budget: something was booked into the wrong one.
        invariant = "I2" if sums[_without_period(place)] else "I6"
        bucket = "" if place.start_seconds is None else f" in the bucket of {place.start_seconds}"
        yield f"{invariant}: {place.key}{bucket} is off by {by}"


def _without_period(place: Place) -> str:
    """What the keys of one budget and owner have in common."""
    return place.key.rpartition(":")[0] if place.start_seconds is None else place.key


def _expected(population: Population, histories: dict[str, History]) -> dict[Place, int]:
    expected: dict[Place, int] = defaultdict(int)
    for history in histories.values():
        budgets = population.budgets_of(history.plan.who)
        places = {_place(budget, history) for budget in budgets}
        if history.first_end is None:
            places |= {_pending_place(population, budget, history) for budget in budgets}
        for place in places:
            expected[place] += history.booked
    return expected


def removable_at_us(population: Population, place: Place) -> float:
    """Unix microseconds at which a settlement may remove a bucket; infinite for a total."""
    if place.start_seconds is None:
        return float("inf")
    _, kind, name, *_ = place.key.split(":")
    if kind == "open":
        length, buckets = population.pending_seconds, 12
    else:
        further = {each.name: each.period.seconds for each in population.budgets if isinstance(each.period, Sliding)}
        length, buckets = further.get(name, population.window_seconds), 20
    return (place.start_seconds + length + _bucket_seconds(length, buckets)) * US_PER_SECOND


def _bucket_seconds(length: int, buckets: int) -> int:
    return -(-length // buckets)


def _place(budget: Budget, history: History) -> Place:
    """Where a budget keeps what a reservation has booked in it."""
    made, bucket = history.made_at_us // US_PER_SECOND, None
    start, word, its_period = None, "", ""
    match budget.period:
        case Sliding(length):
            each = _bucket_seconds(length, 20)
            bucket, word = made - made % each, f"sliding{length}"
        case Calendar(unit, zone):
            start = _start(unit, datetime.fromtimestamp(made, ZoneInfo(zone)))
            word, its_period = unit, f":{start.timestamp():.0f}"
        case Forever():
            word = "forever"
    if budget.name in KEYS_OF_THE_SIX:
        return Place(KEYS_OF_THE_SIX[budget.name].format(owner=budget.owner, start=start), bucket)
    return Place(f"llm:budget:{budget.name}:{word}:{budget.owner}{its_period}", bucket)


def _start(unit: str, moment: datetime) -> datetime:
    """When the hour, day, week or month of a moment began, by the clock of its zone."""
    hour = moment.replace(minute=0, second=0, microsecond=0)
    if unit == "hour":
        return hour
    day = hour.replace(hour=0, fold=0)
    return {"day": day, "week": day - timedelta(days=day.weekday()), "month": day.replace(day=1)}[unit]


def _pending_place(population: Population, budget: Budget, history: History) -> Place:
    made = history.made_at_us // US_PER_SECOND
    whose = budget.scope if budget.scope is Scope.GLOBAL else f"{budget.scope}:{budget.owner}"
    return Place(f"llm:open:{whose}", made - made % _bucket_seconds(population.pending_seconds, 12))


def _instants(population: Population, histories: dict[str, History]) -> Iterator[str]:
    """Check I1 at every instant."""
    changes: dict[tuple[Budget, str], list[tuple[int, int]]] = defaultdict(list)
    overruns: dict[tuple[Budget, str], int] = defaultdict(int)
    for history in histories.values():
        steps = _steps(history)
        for budget in filter(is_tight, population.budgets_of(history.plan.who)):
            its = budget, _place(budget, history).key
            overruns[its] += max(0, history.booked - history.held)
            if isinstance(budget.period, Sliding):
                changes[its] += _until(steps, history.made_at_us + budget.period.seconds * US_PER_SECOND)
            else:
                changes[its] += steps
    for (budget, key), its_changes in changes.items():
        most, limit = _most(its_changes), budget.limit_nanousd or 0
        if most > limit + overruns[budget, key]:
            yield f"I1: {key} held {most} at one instant, its limit is {limit}"


def _steps(history: History) -> list[tuple[int, int]]:
    """(instant, change) of the nano-dollars that are certainly booked for it."""
    end = history.first_end
    sent = min((each[0] for each in history.ends), default=None)
    steps, held = [], 0
    for at_us, its_held in sorted(history.holds):
        if its_held > held and (sent is None or at_us < sent):
            steps.append((at_us, its_held - held))
            held = its_held
    if end is not None and sent is not None:
        under_way = min(held, end[3])
        steps.append((sent, under_way - held))
        steps.append((max(end[1], sent), end[3] - under_way))
    return steps


def _until(steps: list[tuple[int, int]], until_us: int) -> list[tuple[int, int]]:
    """The same steps in a window that the reservation leaves at `until_us`."""
    kept = [step for step in steps if step[0] < until_us]
    return [*kept, (until_us, -sum(change for _, change in kept))]


def _most(changes: list[tuple[int, int]]) -> int:
    most = total = 0
    # Within one instant, decreases come first: only what is certain counts.
    for _, change in sorted(changes):
        total += change
        most = max(most, total)
    return most


def _audited(link: Link, histories: dict[str, History]) -> Iterator[str]:
    report = audit(link)
    for each in report.disagreements:
        name = {"no_ttl": "I7", "unknown_key": "I7", "no_amount": "I5"}.get(each.kind, "I2")
        yield f"{name}: {each.key} {each.told}"
    for key in report.undecided:
        yield f"I2: {key} moves, and nobody is at work"
    crashed = sum(history.plan.fate == "crash" for history in histories.values())
    unended = report.records["open"] + report.records["expired"]
    if unended != crashed:
        yield f"I8: {unended} reservations are open or expired, and {crashed} were never ended"
