"""Checks what must hold after a seed, by what the processes saw and what the pretend upstream billed.

* **I1** settled + pending ≤ limit, in every limit, at every instant. Proved of this: at each instant of the run, what
  was *certainly* booked stayed within the limit. Certain is what a reply said is held and no end was sent for, and what
  the reply to an end said is booked; while an end is under way, the smaller of the two counts. If this exceeds a limit,
  the limit was exceeded, in whatever order the calls took effect. The reverse is not proved: two overlapping calls that
  exceed a limit only between them could hide. So the processes also compare the figures of window and day in each
  admission with the limits. The window counts exactly, without the one more bucket that our sorted sets keep.
* **I2** every total is the sum of its reservations' present amounts: by the replies that the processes had, from a
  snapshot read afterwards; and by the records, with `backends.ledger.audit`.
* **I3** a reservation ends once, and each repeat returns the first end's amount; an idempotency key that was not
  released is used by one request.
* **I4** the upstream's bill ≤ what is booked, for each request, and for all.
* **I6** each amount stands in the bucket, hour and day in which its reservation was made.
* **I5, I7, I8** amounts, TTLs, and reservations that were never ended: with `backends.ledger.audit`.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from backends.clock import US_PER_SECOND
from backends.keys import (
    RECORD_PREFIX,
    SECONDS_PER_DAY,
    SECONDS_PER_HOUR,
    bucket_seconds_of,
    pending_bucket_seconds_of,
)
from backends.ledger.audit import audit
from backends.ledger.snapshot import PENDING_KINDS, Place, Snapshot, read_snapshot
from backends.records import digest_of
from backends.store.link import Link
from benchmarks.hammer_load import AMPLE, Plan, Population, ShareReport, Trace

MOST_PRINTED = 5
FIRST_ENDS = {"settled", "released"}


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
    snapshot = read_snapshot(link)
    found = [violation for each in reports for violation in each.violations]
    for check in (_one_end_each(histories), _keys_used_once(histories), _bills(histories, snapshot)):
        found += check
    found += _books(population, histories, snapshot)
    found += _instants(population, histories)
    found += _audited(link, histories)
    return found


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


def _bills(histories: dict[str, History], snapshot: Snapshot) -> Iterator[str]:
    for rid, history in histories.items():
        record = snapshot.records.get(f"{RECORD_PREFIX}{rid}")
        if record is None:
            yield f"I4: {rid} has no record"
        elif record.nanousd < history.billed or record.nanousd != history.booked:
            yield f"I4: {rid} was billed {history.billed}, told {history.booked}, and {record.nanousd} is booked"
    days = sum(held for place, held in snapshot.stored.items() if place.kind == "global_daily")
    billed = sum(history.billed for history in histories.values())
    if billed > days:
        yield f"I4: the upstream billed {billed}, and {days} is booked"


def _books(population: Population, histories: dict[str, History], snapshot: Snapshot) -> Iterator[str]:
    """Compare each total with what the replies said; buckets only while they count."""
    expected = _expected(population, histories)
    off: dict[Place, int] = {}
    sums: dict[tuple[str, str], int] = defaultdict(int)
    for place in {*expected, *snapshot.stored}:
        by = snapshot.stored.get(place, 0) - expected[place]
        if by and removable_at_us(population, place) > snapshot.ended_us + US_PER_SECOND:
            off[place] = by
            sums[place.kind, place.owner] += by
    for place, by in off.items():
        # An excess in one bucket and a lack in another of the same key: something was booked into the wrong period.
        invariant = "I2" if sums[place.kind, place.owner] else "I6"
        whose = place.owner or "everybody"
        yield f"{invariant}: {place.kind} of {whose} (digest) from {place.start_seconds} is off by {by}"


def _expected(population: Population, histories: dict[str, History]) -> dict[Place, int]:
    expected: dict[Place, int] = defaultdict(int)
    for history in histories.values():
        places = _places(population, history, population.limits.window_seconds)
        if history.first_end is None:
            places += _pending_places(population, history, population.pending_seconds)
        for place in places:
            expected[place] += history.booked
    return expected


def removable_at_us(population: Population, place: Place) -> float:
    """Unix microseconds at which a settlement may remove a bucket; infinite for a total."""
    window, pending = population.limits.window_seconds, population.pending_seconds
    if place.kind.endswith("recent"):
        return (place.start_seconds + window + bucket_seconds_of(window)) * US_PER_SECOND
    if place.kind in PENDING_KINDS:
        return (place.start_seconds + pending + pending_bucket_seconds_of(pending)) * US_PER_SECOND
    return float("inf")


def _places(population: Population, history: History, window_seconds: int) -> list[Place]:
    made = history.made_at_us // US_PER_SECOND
    bucket = made - made % bucket_seconds_of(window_seconds)
    day, hour = made - made % SECONDS_PER_DAY, made - made % SECONDS_PER_HOUR
    who, network = _owners(population, history)
    return [
        Place("recent", who, bucket),
        Place("daily", who, day),
        Place("network_recent", network, bucket),
        Place("network_daily", network, day),
        Place("global_hourly", "", hour),
        Place("global_daily", "", day),
    ]


def _pending_places(population: Population, history: History, pending_seconds: int) -> list[Place]:
    made = history.made_at_us // US_PER_SECOND
    bucket = made - made % pending_bucket_seconds_of(pending_seconds)
    who, network = _owners(population, history)
    return [
        Place("pending_identifier", who, bucket),
        Place("pending_network", network, bucket),
        Place("pending_global", "", bucket),
    ]


def _owners(population: Population, history: History) -> tuple[str, str]:
    number = history.plan.who
    return digest_of(population.identifier(number)), digest_of(population.network(number))


def _instants(population: Population, histories: dict[str, History]) -> Iterator[str]:
    """Check I1 at every instant."""
    limits, window_us = population.limits, population.limits.window_seconds * US_PER_SECOND
    amounts = {
        "recent": limits.window_nanousd,
        "daily": limits.day_nanousd,
        "network_recent": limits.network_window_nanousd or AMPLE,
        "network_daily": limits.network_day_nanousd or AMPLE,
        "global_hourly": limits.global_hour_nanousd,
        "global_daily": limits.global_day_nanousd,
    }
    changes: dict[tuple[str, str, int], list[tuple[int, int]]] = defaultdict(list)
    overruns: dict[tuple[str, str, int], int] = defaultdict(int)
    for history in histories.values():
        steps = _steps(history)
        for place in _places(population, history, limits.window_seconds):
            if amounts[place.kind] >= AMPLE:
                continue
            is_window = place.kind.endswith("recent")
            scope = (place.kind, place.owner, 0 if is_window else place.start_seconds)
            changes[scope] += _until(steps, history.made_at_us + window_us) if is_window else steps
            overruns[scope] += max(0, history.booked - history.held)
    for (kind, owner, start), its_changes in changes.items():
        most = _most(its_changes)
        if most > amounts[kind] + overruns[kind, owner, start]:
            yield f"I1: {kind} of {owner or 'everybody'} held {most} at one instant, its limit is {amounts[kind]}"


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
