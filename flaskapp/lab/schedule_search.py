"""All orders in which callers can take their turns, up to turns that commute: a search that knows nothing of Redis.

Each caller does one turn after the other; what it does next may depend on what it has met so far, so an order is found
by running it. Two orders are the same if one becomes the other by swapping neighbouring turns of different callers that
commute. The search runs one order of each kind: wherever two turns of a run clash, it also tries the other one first
(dynamic partial-order reduction with source sets and sleep sets, after Abdulla, Aronis, Jonsson and Sagonas, 2014).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import factorial, prod
from typing import Protocol, TypeVar

LOOK, ADD, PUT = "look", "add", "put"

Touches = Mapping[str, str]
"""What a turn touches -> how: `LOOK`, `ADD`, `PUT`, or a text for what comes to the same if it is done twice."""


class Run(Protocol):
    """One run, from the same beginning every time."""

    def pending(self) -> Mapping[int, Touches]:
        """Of each caller that has a turn left, what that will touch: at least what it then really touches."""

    def take(self, caller: int) -> Touches:
        """Do a caller's turn; what it has really touched."""

    def abandon(self) -> None:
        """Nobody goes on with this run."""


R = TypeVar("R", bound=Run)


@dataclass(frozen=True)
class Order:
    """One order of its kind, as it was run."""

    callers: tuple[int, ...]
    """Whose turn it was, from the first to the last."""
    needs: tuple[tuple[int, ...], ...]
    """Of each turn, how many turns of each caller have to be done before, in every order of this kind."""

    def lexical(self) -> tuple[int, ...]:
        """The one of its kind in which, at each point, the first caller goes that can: a name for the kind."""
        walk = _Walk(self)
        done = walk.start
        callers = []
        while not walk.is_over(done):
            caller = next(walk.ready(done))
            callers.append(caller)
            done = walk.after(done, caller)
        return tuple(callers)

    def count(self) -> int:
        """How many orders are of this kind."""
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
        """The one of its kind with the fewest changes from one caller to another."""
        walk = _Walk(self)
        # To let a caller go on for as long as it can costs nothing and bars nobody.
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
    """The ways through one kind of order; where one is, is how many turns each caller has done."""

    def __init__(self, order: Order) -> None:
        self._callers = range(max(order.callers) + 1)
        self._needs: list[list[tuple[int, ...]]] = [[] for _ in self._callers]
        for caller, need in zip(order.callers, order.needs, strict=True):
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
    """How often another caller's turn comes than the one before."""
    return len([caller for caller, _ in groupby(callers)]) - 1


def multinomial(counts: Sequence[int]) -> int:
    """How many orders there are of so many turns of each caller."""
    return factorial(sum(counts)) // prod(map(factorial, counts))


def commute(one: Touches, other: Touches) -> bool:
    """Whether two turns come to the same in either order."""
    small, large = (one, other) if len(one) < len(other) else (other, one)
    return all(place not in large or _agree(how, large[place]) for place, how in small.items())


def _agree(one: str, other: str) -> bool:
    return one == other != PUT


@dataclass
class _Point:
    """A point of a run at which somebody's turn came."""

    pending: Mapping[int, Touches]
    asleep: dict[int, Touches]
    """Whose turn need not be tried here: what it leads to has been seen."""
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


def search(begin: Callable[[], R]) -> Iterator[tuple[Order, R]]:
    """One order of each kind with its run, which has just ended; always in the same sequence.

    Raises:
        RuntimeError: a caller did something else than before, after the same turns.
    """
    points: list[_Point] = []
    known: set[tuple[int, ...]] = set()
    while True:
        run = begin()
        history = _History()
        is_whole = _played(run, points, history)
        for at, callers in history.races():
            if not callers & points[at].to_try:
                points[at].to_try.add(min(callers))
        order = history.order() if is_whole else None
        if order is None or order.lexical() in known:
            run.abandon()
        else:
            known.add(order.lexical())
            yield order, run
        while points and not points[-1].choose_another():
            points.pop()
        if not points:
            return


def follow(run: Run, callers: Sequence[int]) -> None:
    """Play an order that is known.

    Raises:
        RuntimeError: as `search`.
    """
    for caller in callers:
        _take(run, caller)
    if run.pending():
        raise RuntimeError("the callers are not done, where they were before")


def _played(run: Run, points: list[_Point], history: "_History") -> bool:
    """Play what is chosen, and then on to the end; False where all that could follow has been seen."""
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
    """What was done in a run, and what had to come before what. Sets of turns are the bits of a number."""

    def __init__(self) -> None:
        self.callers: list[int] = []
        self._before: list[int] = []
        """Of each turn, those that come before it in every order of this kind."""
        self._clashes: list[list[int]] = []
        """Of each turn, the earlier ones of other callers that it clashes with."""
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
        self._clashes.append(sorted(earlier))
        self._last_of[caller] = here

    def order(self) -> Order:
        count = max(self.callers) + 1
        of_caller = [0] * count
        for at, caller in enumerate(self.callers):
            of_caller[caller] |= 1 << at
        needs = tuple(tuple((before & mine).bit_count() for mine in of_caller) for before in self._before)
        return Order(tuple(self.callers), needs)

    def races(self) -> Iterator[tuple[int, set[int]]]:
        """Where two turns clash and nothing between ties them: where the first is, and who could go there instead."""
        for second, clashes in enumerate(self._clashes):
            before = self._before[second]
            for first in clashes:
                between = before & ~((1 << (first + 1)) - 1)
                if any(between >> at & 1 and self._before[at] >> first & 1 for at in range(first + 1, second)):
                    continue
                yield first, self._who_could_go(first, second)

    def _who_could_go(self, first: int, second: int) -> set[int]:
        """Of what does not depend on the first, up to the second: those whose turn depends on nothing of it."""
        ahead, callers = 0, set()
        for at in (*range(first + 1, second), second):
            if at != second and self._before[at] >> first & 1:
                continue
            if not self._before[at] & ahead:
                callers.add(self.callers[at])
            ahead |= 1 << at
        return callers
