"""What the hammer's processes do of a seed: which requests ask for how much, and how each ends.

All that a request does is drawn from the seed and its id. So a seed runs the same operations in every run; only their
interleaving depends on the machine.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from multiprocessing.synchronize import Barrier

from backends import open_backend
from backends.budgets import BUILT_IN, EVERYBODY, Budget, Calendar, Forever, Period, Scope, Sliding, Unit
from backends.clock import SystemClock
from backends.contract import Ask, Backend, Duplicate, Idempotency, Outcome, Refusal, Reservation
from backends.errors import ReservationConflict
from backends.store.link import Link

PATIENCE_SECONDS = 60
AMPLE = 10**14
COST = 1_000_000
Step = Callable[[], None]
MOST_FURTHER_BUDGETS = 10
OWNERS = {
    Scope.IDENTIFIER: (1, 3, 20, 100),
    Scope.NETWORK: (1, 2, 8),
    Scope.WIDE_NETWORK: (1, 2),
    Scope.GLOBAL: (1,),
    Scope.KEY: (1, 3, 20),
    Scope.TEAM: (1, 2),
    Scope.MODEL: (1, 3),
}
WINDOWS_SECONDS = (1, 2, 3, 60, 600, 3_600, 86_400)
UNITS: tuple[Unit, ...] = ("hour", "day", "week", "month")
ZONES = ("UTC", "Europe/Berlin", "America/St_Johns", "Asia/Kathmandu")


@dataclass(frozen=True)
class Population:
    """Who asks under a seed, and within which budgets."""

    seed: int
    requests: int
    owners: dict[Scope, int]
    """How many there are of each scope."""
    budgets: tuple[Budget, ...]
    """The six and further ones, of no owner."""
    pending_seconds: int
    mark_when_busy: bool

    @property
    def window_seconds(self) -> int:
        """Of the two built-in windows."""
        return next(each.period.seconds for each in self.budgets if isinstance(each.period, Sliding))

    def owner(self, scope: Scope, who: int) -> str | None:
        """The owner of a scope whose budgets a caller is charged to; None where it has none."""
        number = who % self.owners[scope]
        match scope:
            case Scope.GLOBAL:
                return EVERYBODY
            case Scope.NETWORK:
                return f"198.51.100.{number}" if number % 2 else f"2001:db8:0:{number}::/64"
            case Scope.WIDE_NETWORK:
                return f"2001:db8:{number}::/48"
            case Scope.KEY | Scope.TEAM if who % 4 == 3:
                return None
            case _:
                return f"{scope}{number}"

    def budgets_of(self, who: int) -> tuple[Budget, ...]:
        """What the requests of a caller are charged to."""
        owned = ((budget, self.owner(budget.scope, who)) for budget in self.budgets)
        return tuple(budget._replace(owner=owner) for budget, owner in owned if owner is not None)

    def may_refuse(self, name: str) -> bool:
        """Whether the budget of that name is enforced, and may be spent."""
        return any(budget.name == name and is_tight(budget) for budget in self.budgets)


def is_tight(budget: Budget) -> bool:
    """Whether a budget may refuse."""
    return not budget.is_shadow and budget.limit_nanousd is not None and budget.limit_nanousd < AMPLE


def population_of(seed: int, requests: int) -> Population:
    """Few or many callers; one to three of the six that refuse, and up to ten further budgets; windows that slide while
    the seed runs, or not.
    """
    rng = random.Random(seed)
    owners = {scope: rng.choice(counts) for scope, counts in OWNERS.items()}
    window_seconds = rng.choice(WINDOWS_SECONDS[:5])
    pending_seconds = rng.choice([seconds for seconds in (1, 2, 120) if seconds <= window_seconds])

    def limit(scope: Scope, *, tight: bool) -> int | None:
        share = requests * COST // owners[scope]
        return max(3 * COST, int(share * rng.uniform(0.05, 0.7))) if tight else rng.choice((None, AMPLE))

    tight_names = rng.sample(list(BUILT_IN), rng.randint(1, 3))
    six = [
        Budget(
            name=name,
            owner="",
            period=Sliding(window_seconds) if row.unit is None else Calendar(row.unit),
            limit_nanousd=limit(row.scope, tight=name in tight_names),
            scope=row.scope,
            throttle_seconds={"window": 1, "day": 2}.get(name, 0),
        )
        for name, row in BUILT_IN.items()
    ]
    further = []
    for number in range(rng.randint(0, MOST_FURTHER_BUDGETS)):
        scope = rng.choice(list(Scope))
        amount = limit(scope, tight=rng.random() < 0.3)
        marker_seconds = rng.randint(0, 1) if scope is Scope.IDENTIFIER else 0
        period = _some_period(rng, pending_seconds)
        further.append(Budget(f"further_{number}", "", period, amount, scope, rng.random() < 0.3, marker_seconds))
    return Population(seed, requests, owners, (*six, *further), pending_seconds, rng.random() < 0.2)


def _some_period(rng: random.Random, pending_seconds: int) -> Period:
    """A window is no shorter than a reservation may be pending."""
    kind = rng.choice(("sliding", "forever", *UNITS))
    if kind == "sliding":
        return Sliding(rng.choice([seconds for seconds in WINDOWS_SECONDS if seconds >= pending_seconds]))
    return Forever() if kind == "forever" else Calendar(kind, rng.choice(ZONES))


@dataclass(frozen=True)
class Plan:
    """What a request does."""

    who: int
    cost: int
    extend_by: int
    actual_share: float
    fate: str
    """settle, release, crash."""
    repeats: bool
    idempotency: str | None
    is_shared: bool
    at_least: int | None
    """Nano-dollars that it accepts at least, where a budget has less than `cost` left."""


def plan_of(population: Population, rid: str, *, is_shared: bool) -> Plan:
    """The plan of a request: the same in every process."""
    rng = random.Random(f"{population.seed}:{rid}")
    who = rng.randrange(population.owners[Scope.IDENTIFIER])
    name = rng.randrange(max(2, population.requests // 20))
    overruns = not is_shared and rng.random() < 0.01
    cost = rng.randint(1, 2 * COST)
    return Plan(
        who=who,
        cost=cost,
        extend_by=rng.randint(1, COST) if rng.random() < 0.3 else 0,
        actual_share=1.2 if overruns else rng.random(),
        fate=rng.choices(("settle", "release", "crash"), (85, 10, 5))[0],
        repeats=rng.random() < 0.1,
        idempotency=f"{who}:{name}" if not is_shared and rng.random() < 0.2 else None,
        is_shared=is_shared,
        at_least=rng.randint(1, cost) if not is_shared and rng.random() < 0.3 else None,
    )


def ask_of(population: Population, rid: str, plan: Plan) -> Ask:
    idempotency = None
    if plan.idempotency is not None:
        digest = blake2b(f"{population.seed}:{plan.idempotency}".encode(), digest_size=16).hexdigest()
        idempotency = Idempotency(digest, digest[:16])
    return Ask(
        rid,
        plan.cost,
        population.budgets_of(plan.who),
        population.pending_seconds,
        idempotency,
        plan.at_least,
        population.mark_when_busy,
    )


@dataclass
class Trace:
    """What one process saw of an admitted request; instants are unix microseconds of this host."""

    rid: str
    plan: Plan
    made_at_us: int
    holds: list[tuple[int, int]] = field(default_factory=list)
    """(instant of the reply, nano-dollars held in all): from then on they are certainly held."""
    billed: int = 0
    """Nano-dollars that the pretend upstream bills: noted before the backend is asked to book them."""
    ends: list[tuple[int, int, str, int]] = field(default_factory=list)
    """(instant of sending, instant of the reply, outcome, nano-dollars booked)."""


@dataclass
class ShareReport:
    """What one process saw of a seed."""

    traces: list[Trace] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)

    def count(self, name: str) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1


@dataclass(frozen=True)
class Share:
    """The part of a seed that one process runs."""

    population: Population
    process: int
    processes: int
    url: str
    backend: str


_barrier: Barrier | None = None
_links: dict[str, Link] = {}


def set_up(barrier: Barrier) -> None:
    """Called once in each process, with the barrier at which all begin a seed."""
    global _barrier  # noqa: PLW0603 (a process of a pool has no other place for what it is given at its start)
    _barrier = barrier


def run_share(share: Share) -> ShareReport:
    """Run a share; all processes begin at once."""
    link = _links.setdefault(share.url, Link(share.url, clock=SystemClock(), timeout_seconds=PATIENCE_SECONDS))
    hammering = _Hammering(share, open_backend(share.backend, link))
    if _barrier is not None:
        _barrier.wait(PATIENCE_SECONDS)
    return hammering.run()


def now_us() -> int:
    return time.time_ns() // 1_000


class _Hammering:
    def __init__(self, share: Share, backend: Backend) -> None:
        self._share = share
        self._population = share.population
        self._backend = backend
        self._rng = random.Random(f"{share.population.seed}/{share.process}")
        self._report = ShareReport()
        self._steps: list[list[Step]] = []

    def run(self) -> ShareReport:
        requests = self._population.requests // self._share.processes
        depth = self._rng.choice((1, 5, 30))
        for number in range(requests):
            self._begin(number)
            while len(self._steps) > depth:
                self._go_on()
        while self._steps:
            self._go_on()
        return self._report

    def _go_on(self) -> None:
        place = self._rng.randrange(len(self._steps))
        steps = self._steps[place]
        steps.pop(0)()
        if not steps:
            self._steps[place] = self._steps[-1]
            self._steps.pop()

    def _begin(self, number: int) -> None:
        population = self._population
        is_shared = self._rng.random() < 0.05
        rid = f"{population.seed}-x{self._rng.randrange(max(1, population.requests // 40))}"
        rid = rid if is_shared else f"{population.seed}-{self._share.process}-{number}"
        plan = plan_of(population, rid, is_shared=is_shared)
        ask = ask_of(population, rid, plan)
        made = self._reserve(ask, plan)
        if made is None:
            return
        trace = Trace(rid, plan, made.made_at_us, [(now_us(), made.cost_nanousd)])
        self._report.traces.append(trace)
        steps: list[Step] = []
        if plan.repeats:
            steps.append(lambda: self._repeat(ask, made))
        if plan.extend_by:
            steps.append(lambda: self._extend(made, trace))
        steps.append(lambda: self._bill(trace))
        if plan.fate != "crash":
            steps.append(lambda: self._end(made, trace))
            if plan.repeats:
                steps.append(lambda: self._end(made, trace))
        self._steps.append(steps)

    def _reserve(self, ask: Ask, plan: Plan) -> Reservation | None:
        self._report.count("requests")
        try:
            verdict = self._backend.reserve(ask)
        except ReservationConflict:
            # Another process has ended it already, if the id is shared; otherwise the id is new.
            self._report.count("conflicts")
            if not plan.is_shared:
                self._violated(f"I3: {ask.reservation_id} is new, and was refused as known")
            return None
        if isinstance(verdict, Refusal):
            self._report.count(f"refused: {verdict.reason}")
            if not self._population.may_refuse(verdict.budget):
                self._violated(f"I1: {ask.reservation_id} was refused by {verdict.budget}, which refuses nobody")
            return None
        if isinstance(verdict, Duplicate):
            self._report.count("duplicates")
            return None
        self._report.count("admitted")
        self._check_admitted(ask, plan, verdict)
        return verdict

    def _check_admitted(self, ask: Ask, plan: Plan, verdict: Reservation) -> None:
        if verdict.cost_nanousd < ask.cost_nanousd:
            self._report.count("admitted on the last of a budget")
        if not plan.is_shared and not ask.least_nanousd <= verdict.cost_nanousd <= ask.cost_nanousd:
            self._violated(f"I2: {ask.reservation_id} holds {verdict.cost_nanousd}, asked {ask.cost_nanousd}")
        if not plan.is_shared:
            self._check_limits(ask, verdict)

    def _check_limits(self, ask: Ask, verdict: Reservation) -> None:
        """No enforced budget is over its limit, and the shadow budgets that are have been told."""
        over = {
            budget.name: budget.is_shadow
            for budget in ask.budgets
            if budget.limit_nanousd is not None and verdict.spent(budget.name) > budget.limit_nanousd
        }
        for name in (name for name, is_shadow in over.items() if not is_shadow):
            self._violated(f"I1: admitted with {verdict.spent(name)} in {name}, which is over its limit")
        if sorted(verdict.over_shadow) != sorted(name for name, is_shadow in over.items() if is_shadow):
            self._violated(f"I1: {ask.reservation_id} is told to be over {verdict.over_shadow}, and is over {over}")
        if verdict.over_shadow:
            self._report.count("admitted over a shadow budget")

    def _repeat(self, ask: Ask, made: Reservation) -> None:
        self._report.count("repeats")
        try:
            again = self._backend.reserve(ask)
        except ReservationConflict:
            again = made if ask.reservation_id.split("-")[1].startswith("x") else None
        is_same = isinstance(again, Reservation) and again.made_at_us == made.made_at_us
        if not is_same or again.budgets != made.budgets:
            self._violated(f"I3: {ask.reservation_id} said again is another reservation: {again}")

    def _extend(self, made: Reservation, trace: Trace) -> None:
        self._report.count("extends")
        plan = trace.plan
        to = made.cost_nanousd + plan.extend_by
        try:
            answer = self._backend.extend(made, to, made.budgets, at_least_nanousd=made.cost_nanousd + 1)
        except ReservationConflict:
            # Ended by another process, or so old that its window is over.
            return
        if isinstance(answer, Refusal):
            return
        if not plan.is_shared and not made.cost_nanousd < answer.cost_nanousd <= to:
            self._violated(f"I2: {trace.rid} asked for {to} and holds {answer.cost_nanousd}")
        trace.holds.append((now_us(), answer.cost_nanousd))

    def _bill(self, trace: Trace) -> None:
        """Note what the upstream bills: of a shared request the same in every process."""
        plan = trace.plan
        if plan.fate == "release":
            return
        most = plan.cost if plan.is_shared else trace.holds[-1][1]
        share = min(plan.actual_share, 1) if plan.fate == "crash" else plan.actual_share
        trace.billed = int(most * share)

    def _end(self, made: Reservation, trace: Trace) -> None:
        self._report.count("ends")
        made = replace(made, cost_nanousd=trace.holds[-1][1])
        sent = now_us()
        if trace.plan.fate == "release":
            settlement = self._backend.release(made)
        else:
            settlement = self._backend.settle(made, trace.billed)
        outcome = settlement.outcome
        if not trace.ends and outcome is Outcome.REPEATED and not trace.plan.is_shared:
            self._violated(f"I3: {trace.rid} was told to have ended before its first end")
        trace.ends.append((sent, now_us(), outcome.value, settlement.booked_nanousd))

    def _violated(self, text: str) -> None:
        self._report.violations.append(text)
