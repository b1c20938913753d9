"""All schedules in which callers can take their turns, up to turns that commute: a search that knows nothing of Redis.

Each caller does one turn after the other; what it does next may depend on what it has met so far, so a schedule is
found by running it. Two schedules are equivalent if one becomes the other by swapping neighbouring turns of different
callers that commute. The search runs one schedule of each class: wherever two turns of a run conflict, it also tries
the other one first (dynamic partial-order reduction with source sets and sleep sets, after Abdulla, Aronis, Jonsson and
Sagonas, 2014).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import factorial, prod
from typing import Protocol, TypeVar

READ, ADD, PUT = "read", "add", "put"

Touches = Mapping[str, str]
"""What a turn touches -> how: `READ`, `ADD`, `PUT`, or a text for what has the same effect if it is done twice."""


class Run(Protocol):
    """One run, from the same beginning every time."""

    def pending(self) -> Mapping[int, Touches]:
        """What the next turn of each caller that has one may touch: at least what it then touches."""

    def take(self, caller: int) -> Touches:
        """Do a caller's turn, and return what it touched."""

    def abandon(self) -> None:
        """End the run before its end."""


R = TypeVar("R", bound=Run)


@dataclass(frozen=True)
class Schedule:
    """One schedule of its class, as it was run."""

    callers: tuple[int, ...]
    """Whose turn it was, from the first to the last."""
    needs: tuple[tuple[int, ...], ...]
    """For each turn: how many turns of each caller come before it in every schedule of this class."""

    def lexical(self) -> tuple[int, ...]:
        """The schedule of its class in which the first caller that can goes at each point: a name for the class."""
        walk = _Walk(self)
        done = walk.start
        callers = []
        while not walk.is_over(done):
            caller = next(walk.ready(done))
            callers.append(caller)
            done = walk.after(done, caller)
        return tuple(callers)

    def count(self) -> int:
        """How many schedules are in this class."""
        walk = _Walk(self)
        ways = {walk.start: 1}
        for _ in self.callers:
            later: dict[tuple[int, ...], int] = {}
            for done, count in ways.items():
                for caller in walk.ready(done):
                    after = walk.after(done, caller)
                    later[after] = later.get(after, 0) + count
            ways = later
        return sum(ways.values())

    def calmest(self) -> tuple[int, ...]:
        """The schedule of its class with the fewest switches from one caller to another."""
        walk = _Walk(self)
        # To let a caller go on for as long as it can costs no switch and stops no other caller.
        reached: dict[tuple[tuple[int, ...], int], tuple[int, ...]] = {(walk.start, -1): ()}
        while True:
            further: dict[tuple[tuple[int, ...], int], tuple[int, ...]] = {}
            for (done, last), callers in reached.items():
                for caller in walk.ready(done):
                    if caller == last:
                        continue
                    after, block = done, 0
                    while caller in walk.ready(after):
                        after, block = walk.after(after, caller), block + 1
                    longer = callers + (caller,) * block
                    if walk.is_over(after):
                        return longer
                    further.setdefault((after, caller), longer)
            reached = further


class _Walk:
    """The ways through one class of schedules. A position is how many turns each caller has done."""

    def __init__(self, schedule: Schedule) -> None:
        self._callers = range(max(schedule.callers) + 1)
        self._needs: list[list[tuple[int, ...]]] = [[] for _ in self._callers]
        for caller, need in zip(schedule.callers, schedule.needs, strict=True):
            self._needs[caller].append(need)
        self.start = tuple(0 for _ in self._callers)
        self._end = tuple(map(len, self._needs))

    def ready(self, done: tuple[int, ...]) -> Iterator[int]:
        for caller in self._callers:
            at = done[caller]
            if at == self._end[caller]:
                continue
            if all(done[other] >= least for other, least in enumerate(self._needs[caller][at]) if other != caller):
                yield caller

    def after(self, done: tuple[int, ...], caller: int) -> tuple[int, ...]:
        return (*done[:caller], done[caller] + 1, *done[caller + 1 :])

    def is_over(self, done: tuple[int, ...]) -> bool:
        return done == self._end


def switches(callers: Sequence[int]) -> int:
    """How often the turn goes from one caller to another."""
    return len([caller for caller, _ in groupby(callers)]) - 1


def multinomial(counts: Sequence[int]) -> int:
    """How many schedules there are of so many turns of each caller."""
    return factorial(sum(counts)) // prod(map(factorial, counts))


def commute(one: Touches, other: Touches) -> bool:
    """Whether two turns have the same effect in either order."""
    small, large = (one, other) if len(one) < len(other) else (other, one)
    return all(place not in large or _agree(how, large[place]) for place, how in small.items())


def _agree(one: str, other: str) -> bool:
    return one == other != PUT


@dataclass
class _Point:
    """A point of a run at which a caller was chosen."""

    pending: Mapping[int, Touches]
    asleep: dict[int, Touches]
    """Callers that need not be tried here: what follows has been seen."""
    chosen: int
    to_try: set[int]
    tried: set[int] = field(default_factory=set)

    def asleep_after(self, touched: Touches) -> dict[int, Touches]:
        seen = {**self.asleep, **{caller: self.pending[caller] for caller in self.tried}}
        return {caller: what for caller, what in seen.items() if caller != self.chosen and commute(what, touched)}

    def choose_another(self) -> bool:
        self.tried.add(self.chosen)
        left = sorted(self.to_try - self.tried - self.asleep.keys())
        if left:
            self.chosen = left[0]
        return bool(left)


def search(begin: Callable[[], R]) -> Iterator[tuple[Schedule, R]]:
    """Yield one schedule of each class with its run, which has just ended; always in the same sequence.

    Raises:
        RuntimeError: a caller did something else than before, after the same turns.
    """
    points: list[_Point] = []
    known: set[tuple[int, ...]] = set()
    while True:
        run = begin()
        history = _History()
        is_whole = _run_to_end(run, points, history)
        for at, callers in history.races():
            if not callers & points[at].to_try:
                points[at].to_try.add(min(callers))
        schedule = history.schedule() if is_whole else None
        if schedule is None or schedule.lexical() in known:
            run.abandon()
        else:
            known.add(schedule.lexical())
            yield schedule, run
        while points and not points[-1].choose_another():
            points.pop()
        if not points:
            return


def follow(run: Run, callers: Sequence[int]) -> None:
    """Run a schedule that is known.

    Raises:
        RuntimeError: as `search`.
    """
    for caller in callers:
        _take(run, caller)
    if run.pending():
        raise RuntimeError("the callers are not done, where they were before")


def _run_to_end(run: Run, points: list[_Point], history: "_History") -> bool:
    """Run what is chosen, and then on to the end; False where all that could follow has been seen."""
    asleep: dict[int, Touches] = {}
    for point in points:
        touched = _take(run, point.chosen)
        history.add(point.chosen, touched)
        asleep = point.asleep_after(touched)
    while pending := run.pending():
        awake = [caller for caller in pending if caller not in asleep]
        if not awake:
            return False
        last = history.callers[-1] if history.callers else awake[0]
        chosen = last if last in awake else awake[0]
        point = _Point(pending, asleep, chosen, {chosen})
        points.append(point)
        touched = _take(run, chosen)
        history.add(chosen, touched)
        asleep = point.asleep_after(touched)
    return True


def _take(run: Run, caller: int) -> Touches:
    if caller not in run.pending():
        raise RuntimeError("a caller has no turn left, where it had one before")
    return run.take(caller)


class _History:
    """What was done in a run, and what had to come before what. The bits of an integer are a set of turns."""

    def __init__(self) -> None:
        self.callers: list[int] = []
        self._before: list[int] = []
        """For each turn: those that come before it in every schedule of this class."""
        self._conflicts: list[list[int]] = []
        """For each turn: the earlier ones of other callers that it conflicts with."""
        self._at: dict[str, list[tuple[int, str]]] = {}
        self._last_of: dict[int, int] = {}

    def add(self, caller: int, touched: Touches) -> None:
        here = len(self.callers)
        earlier: set[int] = set()
        for place, how in touched.items():
            visits = self._at.setdefault(place, [])
            earlier.update(at for at, its in visits if not _agree(its, how) and self.callers[at] != caller)
            visits.append((here, how))
        before = 0
        for at in earlier | ({self._last_of[caller]} if caller in self._last_of else set()):
            before |= self._before[at] | 1 << at
        self.callers.append(caller)
        self._before.append(before)
        self._conflicts.append(sorted(earlier))
        self._last_of[caller] = here

    def schedule(self) -> Schedule:
        count = max(self.callers) + 1
        of_caller = [0] * count
        for at, caller in enumerate(self.callers):
            of_caller[caller] |= 1 << at
        needs = tuple(tuple((before & mine).bit_count() for mine in of_caller) for before in self._before)
        return Schedule(tuple(self.callers), needs)

    def races(self) -> Iterator[tuple[int, set[int]]]:
        """Where two turns conflict and nothing between ties them: where the first is, and who could go there."""
        for second, conflicts in enumerate(self._conflicts):
            before = self._before[second]
            for first in conflicts:
                between = before & ~((1 << (first + 1)) - 1)
                if any(between >> at & 1 and self._before[at] >> first & 1 for at in range(first + 1, second)):
                    continue
                yield first, self._callers_instead(first, second)

    def _callers_instead(self, first: int, second: int) -> set[int]:
        """Callers of the turns up to the second that depend neither on the first nor on each other."""
        ahead, callers = 0, set()
        for at in (*range(first + 1, second), second):
            if at != second and self._before[at] >> first & 1:
                continue
            if not self._before[at] & ahead:
                callers.add(self.callers[at])
            ahead |= 1 << at
        return callers
