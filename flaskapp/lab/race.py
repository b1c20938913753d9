"""The race in this process: N callers with room for k, on one strategy after another, against one server.

All callers of a round start at once, on an identifier that is new. A strategy that promises no atomicity has a gap
between its check and its record: its callers are held right before the first command that writes (`wire.py`) until all
have come there, so that the race is shown every time and not by luck. No strategy is named here, and one from another
package is held in the same way. Callers of a strategy that promises atomicity only start together. With
`Plan.think_ms` callers are not held: each pauses in the gap, as an application does that has something to do there, and
the race is as likely as it is there.

What was spent is read from the books, never added up from the answers. Round trips are counted on the wire. The time of
the check is measured apart, one caller at a time, all strategies in turns, so that no wait at the barrier counts.
"""

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from statistics import median, quantiles
from urllib.parse import urlsplit

from backends import open_backend
from backends.budgets import BUILT_IN, EVERYBODY, SECONDS_PER_HOUR, Budget, Calendar, Scope, Sliding
from backends.clock import US_PER_SECOND, SystemClock
from backends.contract import Ask, Backend, Reservation
from backends.errors import ConfigurationError, StoreBusy
from backends.keys import marker_key, record_key, rows_at, running_key
from backends.progress import Progress, no_progress
from backends.store.link import Link
from flaskapp.lab.delay import delayed
from flaskapp.lab.wire import Wire
from flaskapp.ops.running_redis import HOST

CLOCK = SystemClock()
AMPLE_NANOUSD = 10**15
COST_NANOUSD = 4_050_000
WINDOW = "window"
"""The budget that refuses in a race."""
WINDOW_SECONDS = 600
THROTTLE_SECONDS = 30
PENDING_SECONDS = 120
TIMEOUT_SECONDS = 5.0
MAX_SPREAD = 0.9


@dataclass(frozen=True, slots=True)
class Plan:
    """What is raced: `requests` callers at once with room for `room`, `rounds` times, each on fresh books."""

    requests: int = 10
    room: int = 4
    rounds: int = 1
    timed_requests: int = 200
    """How many checks, one after another, the time is measured over."""
    far_timed_requests: int = 20
    """The same where Redis is some milliseconds away."""
    cost_nanousd: int = COST_NANOUSD
    spread: float = 0.0
    """By which share of `cost_nanousd` a request's cost may be more or less than that."""
    seed: int = 1
    """Of the costs; every strategy is given the same."""
    think_ms: float | None = None
    """How long callers pause between check and record; None holds them there until all have come."""
    hold_seconds: float = 5.0
    """The longest that callers are held in the gap for one that does not come (it was refused, say)."""

    def __post_init__(self) -> None:
        if not 1 <= self.room < self.requests:
            raise ConfigurationError("a race needs room for at least one request, and more requests than that")
        if self.rounds < 1 or self.timed_requests < 2 or self.far_timed_requests < 2:  # noqa: PLR2004 (a quantile)
            raise ConfigurationError("a race needs at least one round and two timed requests")
        if not 0 <= self.spread <= MAX_SPREAD:
            raise ConfigurationError(f"the spread of the costs is from 0 to {MAX_SPREAD}")
        if self.think_ms is not None and not 0 <= self.think_ms <= self.hold_seconds * 1_000:
            raise ConfigurationError(f"callers think for 0 to {self.hold_seconds * 1_000:.0f} ms")

    def costs_nanousd(self, number: int) -> list[int]:
        """What the requests of that round may cost."""
        most = int(self.cost_nanousd * self.spread)
        its = random.Random(f"{self.seed} {number}")  # noqa: S311 (seeded on purpose)
        return [self.cost_nanousd + its.randint(-most, most) for _ in range(self.requests)]

    def limit_nanousd(self, costs_nanousd: Sequence[int]) -> int:
        """Room for any `room` of them, and never for all."""
        return sum(sorted(costs_nanousd)[-self.room :])


@dataclass(frozen=True, slots=True)
class Call:
    """One caller of a round, in milliseconds from its start."""

    number: int
    cost_nanousd: int
    asked_ms: float
    checked_ms: float | None
    """When it came to its gap; None where there is none, or it was refused before."""
    answered_ms: float
    is_admitted: bool


@dataclass(frozen=True, slots=True)
class Round:
    """What one round showed."""

    backend: str
    rtt_ms: float
    number: int
    """From 0."""
    calls: tuple[Call, ...]
    spent_nanousd: int
    limit_nanousd: int
    round_trips: int | None
    """None where they are not counted (over HTTP)."""

    @property
    def admitted(self) -> int:
        """How many were admitted."""
        return sum(call.is_admitted for call in self.calls)

    @property
    def overspend_nanousd(self) -> int:
        """By how much the limit was exceeded."""
        return max(0, self.spent_nanousd - self.limit_nanousd)


Watcher = Callable[[Round], None]
"""Called with each round when it is over."""


@dataclass(frozen=True, slots=True)
class RaceResult:
    """The result of one strategy, all rounds together."""

    backend: str
    promises_atomicity: bool
    was_held: bool
    """Whether the callers were held between check and record."""
    admitted: int
    refused: int
    spent_nanousd: int
    """What the books hold in the identifiers' windows; over HTTP what the upstream billed."""
    limit_nanousd: int
    overspend_nanousd: int
    """The sum of what each round spent beyond its limit; a round below its limit lowers it by nothing."""
    round_trips_a_request: float | None
    check_p50_ms: float
    """Check and record together: all that a request waits for."""
    check_p95_ms: float
    check_alone_p50_ms: float | None = None
    """The check without the record, where there is a gap between them."""
    rtt_ms: float = 0.0
    """The round trip that was added."""
    measured_by: str = "books"
    """Where `spent_nanousd` comes from: the books, or the upstream's own bill."""

    @property
    def is_as_declared(self) -> bool:
        """A strategy that promises atomicity never overspends; one that does not, and was held in its gap, does."""
        if self.promises_atomicity:
            return self.overspend_nanousd == 0
        return self.overspend_nanousd > 0 or not self.was_held


@dataclass(frozen=True, slots=True)
class CheckTimes:
    """How long checks took, one after another."""

    whole_ms: list[float] = field(default_factory=list)
    alone_ms: list[float] = field(default_factory=list)
    """Up to the gap; empty where there is none."""


class Start(threading.Barrier):
    """Where callers wait for one another; their time counts from then on."""

    def __init__(self, callers: int) -> None:
        super().__init__(callers, action=self._begin)
        self.at_seconds = 0.0

    def elapsed_ms(self) -> float:
        """Time since the start."""
        return (CLOCK.monotonic_seconds() - self.at_seconds) * 1_000

    def _begin(self) -> None:
        self.at_seconds = CLOCK.monotonic_seconds()


def race(
    url: str,
    names: Sequence[str] = ("legacy", "atomic"),
    plan: Plan | None = None,
    *,
    rtt_ms: float = 0.0,
    progress: Progress = no_progress,
    watch: Watcher = lambda _: None,
) -> list[RaceResult]:
    """Race the strategies registered as `names` on the server at `url`, and delete the keys of the race.

    With `rtt_ms` a proxy makes each round trip so much longer.

    Raises:
        ConfigurationError: no ``redis://`` URL, a name that is not registered, or a database that holds ``llm:`` keys.
        StoreError: Redis failed on the way.
    """
    if not url.startswith("redis://"):
        raise ConfigurationError("a race runs on a redis:// URL: only there are round trips counted on the wire")
    plan, wire = plan or Plan(), Wire()
    with at_distance(url, rtt_ms) as its_url:
        link = Link(
            its_url, clock=CLOCK, timeout_seconds=TIMEOUT_SECONDS, pool_size=plan.requests, before_each_send=wire
        )
        with closing(link):
            refuse_used_database(link)
            backends = {name: open_backend(name, link, CLOCK) for name in names}
            return _Race(link, backends, plan, wire, progress, watch, rtt_ms).run()


def window_alone(limit_nanousd: int, identifier: str, network: str) -> tuple[Budget, ...]:
    """The built-in budgets, of which only the identifier's window can refuse; the others are out of reach."""
    owners = {Scope.IDENTIFIER: identifier, Scope.NETWORK: network, Scope.GLOBAL: EVERYBODY}
    return tuple(
        Budget(
            name=name,
            owner=owners[row.scope],
            period=Sliding(WINDOW_SECONDS) if row.unit is None else Calendar(row.unit),
            limit_nanousd=limit_nanousd if name == WINDOW else AMPLE_NANOUSD,
            scope=row.scope,
            throttle_seconds=THROTTLE_SECONDS if name == WINDOW else 0,
        )
        for name, row in BUILT_IN.items()
    )


def keys_of(ask: Ask, at_seconds: int) -> set[str]:
    """Every key that a request may leave behind which was made at a moment (unix time)."""
    keys = {record_key(ask.reservation_id), marker_key(ask.identifier)}
    for row in rows_at(ask.budgets, at_seconds):
        keys |= {row.key, row.pending_key}
        if row.layout.window_seconds:
            keys.add(running_key(row.key))
    return keys


@contextmanager
def at_distance(url: str, rtt_ms: float) -> Iterator[str]:
    """Yield the URL under which the server at `url` is `rtt_ms` farther away; the same one for 0.

    Raises:
        ConfigurationError: the URL cannot be read.
    """
    if rtt_ms == 0:
        yield url
        return
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or HOST, parts.port or 6_379
    except ValueError as error:
        raise ConfigurationError(f"REDIS_URL: {error}") from error
    with delayed(port, int(rtt_ms * 1_000), host) as its_port:
        who = parts.netloc.rpartition("@")
        yield parts._replace(netloc=f"{who[0]}{who[1]}{HOST}:{its_port}").geturl()


def refuse_used_database(link: Link) -> None:
    """Check that the database holds no books.

    Raises:
        ConfigurationError: there is such a key.
        StoreError: Redis could not be asked.
    """
    if link.run(lambda client: next(iter(client.scan_iter(match="llm:*", count=10_000)), None)) is not None:
        raise ConfigurationError("that database holds llm: keys; race on one that is not in use")


@dataclass(frozen=True, slots=True)
class _Race:
    link: Link
    backends: dict[str, Backend]
    plan: Plan
    wire: Wire
    progress: Progress
    watch: Watcher
    rtt_ms: float
    made: list[tuple[Ask, int]] = field(default_factory=list)
    """What was asked, and when in unix seconds."""

    def run(self) -> list[RaceResult]:
        try:
            rounds = self._all_rounds()
            times = self._check_times()
            return [self._result(name, rounds[name], times[name]) for name in self.backends]
        finally:
            self._clear()

    def _all_rounds(self) -> dict[str, list[Round]]:
        """Race in turns, so that what the machine does meanwhile affects all strategies alike."""
        for name, backend in self.backends.items():
            # This loads the scripts and learns the time of the server: neither belongs to a request.
            backend.reserve(self._ask(f"race-{name}-warm", 0, AMPLE_NANOUSD))
        rounds: dict[str, list[Round]] = {name: [] for name in self.backends}
        for number in range(self.plan.rounds):
            for name in self.backends:
                self.progress(f"{name}: {self.plan.requests} callers at once", number, self.plan.rounds)
                rounds[name].append(self._round(name, number))
                self.watch(rounds[name][-1])
        return rounds

    def _round(self, name: str, number: int) -> Round:
        identifier = f"race-{name}-{number}"
        costs_nanousd = self.plan.costs_nanousd(number)
        limit_nanousd = self.plan.limit_nanousd(costs_nanousd)
        asks = [self._ask(identifier, each, limit_nanousd, cost) for each, cost in enumerate(costs_nanousd)]
        sent_before = self.wire.round_trips
        calls = self._at_once(self.backends[name], asks)
        round_trips = self.wire.round_trips - sent_before
        spent_nanousd = self.backends[name].books(asks[0].budgets).spent(WINDOW)
        return Round(name, self.rtt_ms, number, calls, spent_nanousd, limit_nanousd, round_trips)

    def _at_once(self, backend: Backend, asks: Sequence[Ask]) -> tuple[Call, ...]:
        """As many threads as there are requests."""
        start, all_checked = Start(len(asks)), threading.Barrier(len(asks))

        def call(number: int, ask: Ask) -> Call:
            checked_ms: float | None = None

            def in_gap() -> None:
                nonlocal checked_ms
                checked_ms = start.elapsed_ms()
                self._pause(all_checked)

            start.wait(self.plan.hold_seconds)
            asked_ms = start.elapsed_ms()
            try:
                with self._before_record(backend, in_gap):
                    is_admitted = isinstance(backend.reserve(ask), Reservation)
            except StoreBusy:
                # It gave up against the others: a strategy that tries again and again may.
                is_admitted = False
            return Call(number, ask.cost_nanousd, asked_ms, checked_ms, start.elapsed_ms(), is_admitted)

        with ThreadPoolExecutor(len(asks), thread_name_prefix="caller") as callers:
            return tuple(callers.map(call, range(len(asks)), asks))

    def _pause(self, all_checked: threading.Barrier) -> None:
        if self.plan.think_ms is not None:
            time.sleep(self.plan.think_ms / 1_000)
            return
        # Broken: one caller did not come in time, so the others go on, and the figures show it.
        with suppress(threading.BrokenBarrierError):
            all_checked.wait(self.plan.hold_seconds)

    def _before_record(self, backend: Backend, do: Callable[[], None]) -> AbstractContextManager[None]:
        """Call `do` in the gap between check and record, if there is one."""
        return nullcontext() if backend.promises_atomicity else self.wire.before_first_write(do)

    def _check_times(self) -> dict[str, CheckTimes]:
        times = {name: CheckTimes() for name in self.backends}
        of = self.plan.far_timed_requests if self.rtt_ms else self.plan.timed_requests
        for number in range(of):
            self.progress("the time of the check, in turns", number, of)
            for name, backend in self.backends.items():
                self._time_check(backend, self._ask(f"race-{name}-timed", number, AMPLE_NANOUSD), times[name])
        return times

    def _time_check(self, backend: Backend, ask: Ask, times: CheckTimes) -> None:
        start_seconds = CLOCK.monotonic_seconds()

        def elapsed_ms() -> float:
            return (CLOCK.monotonic_seconds() - start_seconds) * 1_000

        with self._before_record(backend, lambda: times.alone_ms.append(elapsed_ms())):
            backend.reserve(ask)
        times.whole_ms.append(elapsed_ms())

    def _result(self, name: str, rounds: list[Round], times: CheckTimes) -> RaceResult:
        has_gap = any(call.checked_ms is not None for each in rounds for call in each.calls)
        return result_of(
            rounds,
            times,
            promises_atomicity=self.backends[name].promises_atomicity,
            was_held=has_gap and self.plan.think_ms is None,
            round_trips_a_request=sum(each.round_trips or 0 for each in rounds) / (self.plan.requests * len(rounds)),
        )

    def _ask(self, identifier: str, number: int, limit_nanousd: int, cost_nanousd: int | None = None) -> Ask:
        """One request, which only its window can refuse; its network has no other."""
        budgets = window_alone(limit_nanousd, identifier, network=identifier)
        cost_nanousd = cost_nanousd or self.plan.cost_nanousd
        ask = Ask(f"{identifier}-{number}", cost_nanousd, budgets, PENDING_SECONDS)
        self.made.append((ask, CLOCK.now_us() // US_PER_SECOND))
        return ask

    def _clear(self) -> None:
        """Delete the keys of our own requests; of dated keys, those of the hour after too."""
        keys = {
            key
            for ask, at_seconds in self.made
            for seconds in (at_seconds, at_seconds + SECONDS_PER_HOUR)
            for key in keys_of(ask, seconds)
        }
        if keys:
            self.link.run(lambda client: client.delete(*keys))


def result_of(
    rounds: Sequence[Round],
    times: CheckTimes,
    *,
    promises_atomicity: bool,
    was_held: bool,
    round_trips_a_request: float | None,
    measured_by: str = "books",
) -> RaceResult:
    """The rounds of one strategy, added up."""
    admitted = sum(each.admitted for each in rounds)
    percentiles = quantiles(times.whole_ms, n=100, method="inclusive")
    return RaceResult(
        backend=rounds[0].backend,
        promises_atomicity=promises_atomicity,
        was_held=was_held,
        admitted=admitted,
        refused=sum(len(each.calls) for each in rounds) - admitted,
        spent_nanousd=sum(each.spent_nanousd for each in rounds),
        limit_nanousd=sum(each.limit_nanousd for each in rounds),
        overspend_nanousd=sum(each.overspend_nanousd for each in rounds),
        round_trips_a_request=round_trips_a_request,
        check_p50_ms=percentiles[49],
        check_p95_ms=percentiles[94],
        check_alone_p50_ms=median(times.alone_ms) if times.alone_ms else None,
        rtt_ms=rounds[0].rtt_ms,
        measured_by=measured_by,
    )
