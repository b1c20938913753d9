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
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from statistics import median, quantiles
from urllib.parse import urlsplit

from backends import open_backend
from backends.clock import US_PER_SECOND, Clock, SystemClock
from backends.contract import Ask, Backend, Limits, Reservation
from backends.errors import ConfigurationError, StoreBusy
from backends.keys import SECONDS_PER_HOUR, book_keys
from backends.progress import Progress, no_progress
from backends.store.link import Link
from flaskapp.lab.delay import HOST, delayed
from flaskapp.lab.wire import Wire

AMPLE_NANOUSD = 10**15
COST_NANOUSD = 4_050_000
WINDOW_SECONDS = 600
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

    whole_ms: list[float]
    alone_ms: list[float]
    """Up to the gap; empty where there is none."""


def race(
    url: str,
    names: Sequence[str] = ("legacy", "atomic"),
    plan: Plan | None = None,
    *,
    rtt_ms: float = 0.0,
    clock: Clock | None = None,
    progress: Progress = no_progress,
    watch: Watcher = lambda _: None,
) -> list[RaceResult]:
    """Race the strategies registered as `names` on the server at `url`, and delete the keys of the race.

    Args:
        url: ``redis://…``; the server of the race.
        names: the strategies, in the order in which they race.
        plan: what is raced.
        rtt_ms: added to each round trip, by a proxy.
        clock: the time.
        progress: called with what is done now.
        watch: called with each round.

    Raises:
        ConfigurationError: no ``redis://`` URL, a name that is not registered, or a database that holds ``llm:`` keys.
        StoreError: Redis failed on the way.
    """
    if not url.startswith("redis://"):
        raise ConfigurationError("a race runs on a redis:// URL: only there are round trips counted on the wire")
    its_plan, wire = plan or Plan(), Wire()
    its_clock = clock or SystemClock()
    with at_distance(url, rtt_ms) as its_url:
        link = Link(
            its_url,
            clock=its_clock,
            timeout_seconds=TIMEOUT_SECONDS,
            pool_size=its_plan.requests,
            before_each_send=wire,
        )
        try:
            refuse_used_database(link)
            return _Race(link, its_clock, its_plan, wire, progress, watch, rtt_ms).run(names)
        finally:
            link.close()


def window_alone(limit_nanousd: int) -> Limits:
    """Limits of which only the identifier's window can refuse; the others are out of reach."""
    return Limits(
        window_nanousd=limit_nanousd,
        day_nanousd=AMPLE_NANOUSD,
        network_window_nanousd=AMPLE_NANOUSD,
        network_day_nanousd=AMPLE_NANOUSD,
        global_hour_nanousd=AMPLE_NANOUSD,
        global_day_nanousd=AMPLE_NANOUSD,
        window_seconds=WINDOW_SECONDS,
        throttle_seconds=30,
        mark_when_busy=True,
    )


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


class _Race:
    def __init__(
        self,
        link: Link,
        clock: Clock,
        plan: Plan,
        wire: Wire,
        progress: Progress,
        watch: Watcher,
        rtt_ms: float,
    ) -> None:
        self._link = link
        self._clock = clock
        self._plan = plan
        self._wire = wire
        self._progress = progress
        self._watch = watch
        self._rtt_ms = rtt_ms
        self._made: list[tuple[Ask, int]] = []

    def run(self, names: Sequence[str]) -> list[RaceResult]:
        try:
            rounds = self._all_rounds(names)
            times = self._check_times(names)
            return [self._result(name, rounds[name], times[name]) for name in names]
        finally:
            self._clear()

    def _all_rounds(self, names: Sequence[str]) -> dict[str, list[Round]]:
        """Race in turns, so that what the machine does meanwhile affects all strategies alike."""
        for name in names:
            self._warm_up(name)
        rounds: dict[str, list[Round]] = {name: [] for name in names}
        for number in range(self._plan.rounds):
            for name in names:
                self._progress(f"{name}: {self._plan.requests} callers at once", number, self._plan.rounds)
                rounds[name].append(self._round(name, number))
                self._watch(rounds[name][-1])
        return rounds

    def _round(self, name: str, number: int) -> Round:
        plan = self._plan
        identifier = f"race-{name}-{number}"
        backend = open_backend(name, self._link, self._clock)
        callers = _Callers(backend, plan, self._wire, self._clock)
        costs_nanousd = plan.costs_nanousd(number)
        limit_nanousd = plan.limit_nanousd(costs_nanousd)
        asks = [self._ask(identifier, each, limit_nanousd, cost) for each, cost in enumerate(costs_nanousd)]
        sent_before = self._wire.round_trips
        calls = callers.at_once(asks)
        round_trips = self._wire.round_trips - sent_before
        books = backend.books(identifier, asks[0].network, WINDOW_SECONDS)
        return Round(name, self._rtt_ms, number, calls, books.window_nanousd, limit_nanousd, round_trips)

    def _warm_up(self, name: str) -> None:
        """Load the scripts, and learn the time of the server: neither belongs to a request."""
        backend = open_backend(name, self._link, self._clock)
        backend.reserve(self._ask(f"race-{name}-warm", 0, AMPLE_NANOUSD))

    def _check_times(self, names: Sequence[str]) -> dict[str, CheckTimes]:
        timers = {name: self._timer(name) for name in names}
        of = self._plan.far_timed_requests if self._rtt_ms else self._plan.timed_requests
        for number in range(of):
            self._progress("the time of the check, in turns", number, of)
            for name, timer in timers.items():
                timer.time(self._ask(f"race-{name}-timed", number, AMPLE_NANOUSD))
        return {name: timer.times for name, timer in timers.items()}

    def _timer(self, name: str) -> "_Timer":
        return _Timer(open_backend(name, self._link, self._clock), self._wire, self._clock)

    def _result(self, name: str, rounds: list[Round], times: CheckTimes) -> RaceResult:
        backend = open_backend(name, self._link, self._clock)
        trips = sum(each.round_trips or 0 for each in rounds) / (self._plan.requests * len(rounds))
        return result_of(
            rounds,
            times,
            promises_atomicity=backend.promises_atomicity,
            was_held=not backend.promises_atomicity and self._plan.think_ms is None,
            round_trips_a_request=trips,
        )

    def _ask(self, identifier: str, number: int, limit_nanousd: int, cost_nanousd: int | None = None) -> Ask:
        """One request, which only its window can refuse; its network has no other."""
        limits = window_alone(limit_nanousd)
        rid = f"{identifier}-{number}"
        ask = Ask(rid, identifier, identifier, cost_nanousd or self._plan.cost_nanousd, limits, PENDING_SECONDS)
        self._made.append((ask, self._clock.now_us() // US_PER_SECOND))
        return ask

    def _clear(self) -> None:
        """Delete the keys of our own requests; of dated keys, those of the hour after too."""
        keys = {
            key
            for ask, at_seconds in self._made
            for seconds in (at_seconds, at_seconds + SECONDS_PER_HOUR)
            for key in book_keys(ask.reservation_id, ask.identifier, ask.network, seconds)
        }
        if keys:
            self._link.run(lambda client: client.delete(*keys))


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


def _before_record(backend: Backend, wire: Wire, do: Callable[[], None]) -> AbstractContextManager[None]:
    """Call `do` in the gap between check and record, if there is one."""
    return nullcontext() if backend.promises_atomicity else wire.before_first_write(do)


class _Timer:
    """Times one caller after another; where there is a gap, the check alone too."""

    def __init__(self, backend: Backend, wire: Wire, clock: Clock) -> None:
        self.times = CheckTimes([], [])
        self._backend = backend
        self._wire = wire
        self._clock = clock

    def time(self, ask: Ask) -> None:
        started_seconds = self._clock.monotonic_seconds()

        def since_start_ms() -> float:
            return (self._clock.monotonic_seconds() - started_seconds) * 1_000

        with _before_record(self._backend, self._wire, lambda: self.times.alone_ms.append(since_start_ms())):
            self._backend.reserve(ask)
        self.times.whole_ms.append(since_start_ms())


class _Callers:
    """As many threads as there are requests, all on one strategy."""

    def __init__(self, backend: Backend, plan: Plan, wire: Wire, clock: Clock) -> None:
        self._backend = backend
        self._plan = plan
        self._wire = wire
        self._clock = clock
        self._started_seconds = 0.0
        self._all_checked = threading.Barrier(plan.requests)

    def at_once(self, asks: Sequence[Ask]) -> tuple[Call, ...]:
        start = threading.Barrier(len(asks), action=self._begin)

        def call(number: int, ask: Ask) -> Call:
            start.wait(self._plan.hold_seconds)
            return self._call(number, ask)

        with ThreadPoolExecutor(len(asks), thread_name_prefix="caller") as callers:
            return tuple(callers.map(call, range(len(asks)), asks))

    def _begin(self) -> None:
        self._started_seconds = self._clock.monotonic_seconds()

    def _call(self, number: int, ask: Ask) -> Call:
        checked_ms: float | None = None

        def in_gap() -> None:
            nonlocal checked_ms
            checked_ms = self._now_ms()
            self._pause()

        asked_ms = self._now_ms()
        try:
            with _before_record(self._backend, self._wire, in_gap):
                is_admitted = isinstance(self._backend.reserve(ask), Reservation)
        except StoreBusy:
            # It gave up against the others: a strategy that tries again and again may.
            is_admitted = False
        return Call(number, ask.cost_nanousd, asked_ms, checked_ms, self._now_ms(), is_admitted)

    def _pause(self) -> None:
        if self._plan.think_ms is not None:
            time.sleep(self._plan.think_ms / 1_000)
            return
        # Broken: one caller did not come in time, so the others go on, and the figures show it.
        with suppress(threading.BrokenBarrierError):
            self._all_checked.wait(self._plan.hold_seconds)

    def _now_ms(self) -> float:
        return (self._clock.monotonic_seconds() - self._started_seconds) * 1_000
