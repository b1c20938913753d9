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
from backends.clock import SystemClock
from backends.contract import Ask, Backend, Duplicate, Idempotency, Limits, Outcome, Refusal, Reservation
from backends.errors import ReservationConflict
from backends.store.link import Link

PATIENCE_SECONDS = 60
AMPLE = 10**14
COST = 1_000_000
Step = Callable[[], None]
LIMIT_NAMES = (
    "window_nanousd",
    "day_nanousd",
    "network_window_nanousd",
    "network_day_nanousd",
    "global_hour_nanousd",
    "global_day_nanousd",
)


@dataclass(frozen=True)
class Population:
    """Who asks under a seed, and within which limits."""

    seed: int
    requests: int
    identifiers: int
    networks: int
    limits: Limits
    pending_seconds: int

    def identifier(self, number: int) -> str:
        return f"who{number}"

    def network(self, number: int) -> str:
        return f"198.51.100.{number % self.networks}"


def population_of(seed: int, requests: int) -> Population:
    """Few or many callers; one to three limits that refuse; windows that slide while the seed runs, or not."""
    rng = random.Random(seed)
    identifiers, networks = rng.choice((1, 3, 20, 100)), rng.choice((1, 2, 8))
    window_seconds = rng.choice((1, 2, 3, 60, 600))
    demand = requests * COST
    owners = (identifiers, identifiers, networks, networks, 1, 1)
    amounts: dict[str, int] = dict.fromkeys(LIMIT_NAMES, AMPLE)
    for place in rng.sample(range(len(LIMIT_NAMES)), rng.randint(1, 3)):
        share = demand // owners[place]
        amounts[LIMIT_NAMES[place]] = max(3 * COST, int(share * rng.uniform(0.05, 0.7)))
    limits = Limits(**amounts, window_seconds=window_seconds, throttle_seconds=1, mark_when_busy=rng.random() < 0.2)
    pending_seconds = rng.choice([seconds for seconds in (1, 2, 120) if seconds <= window_seconds])
    return Population(seed, requests, identifiers, networks, limits, pending_seconds)


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
    who = rng.randrange(population.identifiers)
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
        population.identifier(plan.who),
        population.network(plan.who),
        plan.cost,
        population.limits,
        population.pending_seconds,
        idempotency,
        plan.at_least,
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
            return None
        if isinstance(verdict, Duplicate):
            self._report.count("duplicates")
            return None
        self._report.count("admitted")
        self._check_admitted(ask, plan, verdict)
        return verdict

    def _check_admitted(self, ask: Ask, plan: Plan, verdict: Reservation) -> None:
        limits = ask.limits
        if verdict.cost_nanousd < ask.cost_nanousd:
            self._report.count("admitted on the last of a budget")
        if not plan.is_shared and not ask.least_nanousd <= verdict.cost_nanousd <= ask.cost_nanousd:
            self._violated(f"I2: {ask.reservation_id} holds {verdict.cost_nanousd}, asked {ask.cost_nanousd}")
        if not plan.is_shared and verdict.window_spent_nanousd > limits.window_nanousd:
            self._violated(f"I1: admitted with {verdict.window_spent_nanousd} in the window of {limits.window_nanousd}")
        if not plan.is_shared and verdict.day_spent_nanousd > limits.day_nanousd:
            self._violated(f"I1: admitted with {verdict.day_spent_nanousd} in the day of {limits.day_nanousd}")

    def _repeat(self, ask: Ask, made: Reservation) -> None:
        self._report.count("repeats")
        try:
            again = self._backend.reserve(ask)
        except ReservationConflict:
            again = made if ask.reservation_id.split("-")[1].startswith("x") else None
        if not isinstance(again, Reservation) or again.made_at_us != made.made_at_us:
            self._violated(f"I3: {ask.reservation_id} said again is another reservation: {again}")

    def _extend(self, made: Reservation, trace: Trace) -> None:
        self._report.count("extends")
        plan = trace.plan
        to = made.cost_nanousd + plan.extend_by
        try:
            answer = self._backend.extend(made, to, self._population.limits, at_least_nanousd=made.cost_nanousd + 1)
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
