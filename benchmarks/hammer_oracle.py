"""What must hold after a seed, by what the processes saw and what the pretend upstream billed; never by our ledger.

* **I1** settled + open ≤ limit, in every limit, at every instant. Proved of this: at each instant of the run, what was
  *certainly* booked then stayed within the limit. Certain is what a process had been told to hold and not yet begun to
  end, and what an end had been told to have booked; while an end is under way the smaller of the two counts. Whatever
  order the calls took effect in between their beginning and their end, a limit that this exceeds was exceeded. The
  other way round, two calls that overlap and exceed a limit only between them could hide; so the processes also hold
  each admission's own figures of window and day against the limits. A window counts as the true one, without the
  bucket that our rings add.
* **I2** every total is the sum of its reservations' present amounts: by what the processes were told, from our books
  read afterwards; and by the records, with `backends.ledger.audit`.
* **I3** one end for a reservation, and each repeat told the first one's amount; one request for an idempotency key that
  was not released.
* **I4** the upstream's bill ≤ what is booked, for each request, and for all.
* **I6** each amount stands in the bucket, hour and day in which its reservation was made.
* **I5, I7, I8** amounts, lives, and what nobody ended: with `backends.ledger.audit`.
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
from backends.ledger.snapshot import Place, Snapshot, read_all
from backends.records import digest_of
from backends.store.link import Link
from benchmarks.hammer_load import AMPLE, Plan, Population, Told, Trace

MOST_TOLD = 5
FIRST_ENDS = {"settled", "released"}


@dataclass
class Story:
    """One reservation, as all processes together saw it."""

    rid: str
    plan: Plan
    made_at_us: int
    holds: list[tuple[int, int]]
    billed: int
    ends: list[tuple[int, int, str, int]]

    @property
    def held(self) -> int:
        """The most that anybody was told it holds."""
        return max(held for _, held in self.holds)

    @property
    def first_end(self) -> tuple[int, int, str, int] | None:
        return next((end for end in self.ends if end[2] in FIRST_ENDS), None)

    @property
    def booked(self) -> int:
        """What the books have to hold for it now."""
        return self.held if self.first_end is None else self.first_end[3]


def violations(link: Link, population: Population, told: Iterable[Told]) -> list[str]:
    """Every wrong, with the invariant in front; empty if all hold."""
    told = list(told)
    stories = _stories(trace for each in told for trace in each.traces)
    snapshot = read_all(link)
    found = [wrong for each in told for wrong in each.wrongs]
    for check in (_one_end_each(stories), _keys_used_once(stories), _bills(stories, snapshot)):
        found += check
    found += _books(population, stories, snapshot)
    found += _instants(population, stories)
    found += _audited(link, stories)
    return found


def _stories(traces: Iterable[Trace]) -> dict[str, Story]:
    stories: dict[str, Story] = {}
    for trace in traces:
        story = stories.get(trace.rid)
        if story is None:
            stories[trace.rid] = Story(
                trace.rid, trace.plan, trace.made_at_us, list(trace.holds), trace.billed, list(trace.ends)
            )
        else:
            story.holds += trace.holds
            story.billed = max(story.billed, trace.billed)
            story.ends += trace.ends
    return stories


def _one_end_each(stories: dict[str, Story]) -> Iterator[str]:
    for rid, story in stories.items():
        firsts = [end for end in story.ends if end[2] != "repeated"]
        if len(firsts) != (story.plan.fate != "crash") or any(end[2] not in FIRST_ENDS for end in firsts):
            yield f"I3: {rid} ended as {[end[2] for end in story.ends]}"
        elif {end[3] for end in story.ends} > {end[3] for end in firsts}:
            yield f"I3: repeats of the end of {rid} were told other amounts: {[end[3] for end in story.ends]}"


def _keys_used_once(stories: dict[str, Story]) -> Iterator[str]:
    used: dict[str, list[str]] = defaultdict(list)
    for story in stories.values():
        if story.plan.idempotency is not None and story.plan.fate != "release":
            used[story.plan.idempotency].append(story.rid)
    for name, rids in used.items():
        if len(rids) > 1:
            yield f"I3: idempotency key {name} reached the upstream as {rids}"


def _bills(stories: dict[str, Story], snapshot: Snapshot) -> Iterator[str]:
    for rid, story in stories.items():
        record = snapshot.records.get(f"{RECORD_PREFIX}{rid}")
        if record is None:
            yield f"I4: {rid} has no record"
        elif record.nanousd < story.billed or record.nanousd != story.booked:
            yield f"I4: {rid} was billed {story.billed}, told {story.booked}, and {record.nanousd} is booked"
    days = sum(held for place, held in snapshot.stored.items() if place.kind == "global_daily")
    billed = sum(story.billed for story in stories.values())
    if billed > days:
        yield f"I4: the upstream billed {billed}, and {days} is booked"


def _books(population: Population, stories: dict[str, Story], snapshot: Snapshot) -> Iterator[str]:
    """Each total by what the processes were told; buckets, while they live."""
    expected = _expected(population, stories)
    off: dict[Place, int] = {}
    sums: dict[tuple[str, str], int] = defaultdict(int)
    for place in {*expected, *snapshot.stored}:
        by = snapshot.stored.get(place, 0) - expected[place]
        if by and _ends_at_us(population, place) > snapshot.ended_us + US_PER_SECOND:
            off[place] = by
            sums[place.kind, place.owner] += by
    for place, by in off.items():
        # What one bucket has too much and another of the same ring too little has been booked into another period.
        invariant = "I2" if sums[place.kind, place.owner] else "I6"
        whose = place.owner or "everybody"
        yield f"{invariant}: {place.kind} of {whose} (digest) from {place.start_seconds} is off by {by}"


def _expected(population: Population, stories: dict[str, Story]) -> dict[Place, int]:
    expected: dict[Place, int] = defaultdict(int)
    for story in stories.values():
        places = _places(population, story, population.limits.window_seconds)
        if story.first_end is None:
            places += _open_places(population, story, population.pending_seconds)
        for place in places:
            expected[place] += story.booked
    return expected


def _ends_at_us(population: Population, place: Place) -> float:
    """When it may be swept."""
    window, opened = population.limits.window_seconds, population.pending_seconds
    if place.kind.endswith("recent"):
        return (place.start_seconds + window + bucket_seconds_of(window)) * US_PER_SECOND
    if place.kind.startswith("open"):
        return (place.start_seconds + opened + pending_bucket_seconds_of(opened)) * US_PER_SECOND
    return float("inf")


def _places(population: Population, story: Story, window_seconds: int) -> list[Place]:
    made = story.made_at_us // US_PER_SECOND
    bucket = made - made % bucket_seconds_of(window_seconds)
    day, hour = made - made % SECONDS_PER_DAY, made - made % SECONDS_PER_HOUR
    who, network = _owners(population, story)
    return [
        Place("recent", who, bucket),
        Place("daily", who, day),
        Place("network_recent", network, bucket),
        Place("network_daily", network, day),
        Place("global_hourly", "", hour),
        Place("global_daily", "", day),
    ]


def _open_places(population: Population, story: Story, pending_seconds: int) -> list[Place]:
    made = story.made_at_us // US_PER_SECOND
    bucket = made - made % pending_bucket_seconds_of(pending_seconds)
    who, network = _owners(population, story)
    return [
        Place("pending_identifier", who, bucket),
        Place("pending_network", network, bucket),
        Place("pending_global", "", bucket),
    ]


def _owners(population: Population, story: Story) -> tuple[str, str]:
    number = story.plan.who
    return digest_of(population.identifier(number)), digest_of(population.network(number))


def _instants(population: Population, stories: dict[str, Story]) -> Iterator[str]:
    """I1, at every instant."""
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
    for story in stories.values():
        steps = _steps(story)
        for place in _places(population, story, limits.window_seconds):
            if amounts[place.kind] >= AMPLE:
                continue
            is_window = place.kind.endswith("recent")
            scope = (place.kind, place.owner, 0 if is_window else place.start_seconds)
            changes[scope] += _cut(steps, story.made_at_us + window_us) if is_window else steps
            overruns[scope] += max(0, story.booked - story.held)
    for (kind, owner, start), its_changes in changes.items():
        most = _most(its_changes)
        if most > amounts[kind] + overruns[kind, owner, start]:
            yield f"I1: {kind} of {owner or 'everybody'} held {most} at one instant, its limit is {amounts[kind]}"


def _steps(story: Story) -> list[tuple[int, int]]:
    """(instant, change) of what is certainly booked for it."""
    end = story.first_end
    sent = min((each[0] for each in story.ends), default=None)
    steps, held = [], 0
    for at_us, its_held in sorted(story.holds):
        if its_held > held and (sent is None or at_us < sent):
            steps.append((at_us, its_held - held))
            held = its_held
    if end is not None and sent is not None:
        under_way = min(held, end[3])
        steps.append((sent, under_way - held))
        steps.append((max(end[1], sent), end[3] - under_way))
    return steps


def _cut(steps: list[tuple[int, int]], until_us: int) -> list[tuple[int, int]]:
    """The same in a window that it leaves at `until_us`."""
    kept = [step for step in steps if step[0] < until_us]
    return [*kept, (until_us, -sum(change for _, change in kept))]


def _most(changes: list[tuple[int, int]]) -> int:
    most = total = 0
    # Of one instant what goes comes first: only what is certain counts.
    for _, change in sorted(changes):
        total += change
        most = max(most, total)
    return most


def _audited(link: Link, stories: dict[str, Story]) -> Iterator[str]:
    report = audit(link)
    for each in report.disagreements:
        name = {"no_ttl": "I7", "unknown_key": "I7", "no_amount": "I5"}.get(each.kind, "I2")
        yield f"{name}: {each.key} {each.told}"
    for key in report.undecided:
        yield f"I2: {key} moves, and nobody is at work"
    crashed = sum(story.plan.fate == "crash" for story in stories.values())
    unended = report.records["open"] + report.records["expired"]
    if unended != crashed:
        yield f"I8: {unended} reservations are open or expired, and {crashed} were never ended"
