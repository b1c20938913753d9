"""The race, driven: N callers with room for k, on one strategy after another, against one server.

All callers of a round are let go at once, on an identifier that nobody has used. A strategy that has a gap between
its check and its record says so with an attribute ``between_check_and_record``, a function that it calls there; its
callers are then held in the gap until all have passed the check, so that the race is shown every time and not by
luck. The attribute is found by its name on whatever `open_backend` returns: no strategy is named here, and one from
another package can have a gap too. Without it (one step of the store) the callers only start together.

What was spent is read from the books, never added up from the answers. Round trips are counted where they leave: in the
connection, as what is sent. The time of the check is measured apart, one caller at a time, all strategies in turns, so
that nobody's wait at the barrier counts.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from statistics import quantiles
from typing import Any, Protocol, cast

import redis

from backends import open_backend
from backends.clock import Clock, SystemClock
from backends.contract import Ask, Backend, Limits, Reservation, Verdict
from backends.errors import ConfigurationError
from backends.keys import SECONDS_PER_HOUR, book_keys
from backends.link import Link

AMPLE_NANOUSD = 10**15
WINDOW_SECONDS = 600
OPEN_SECONDS = 120
TIMEOUT_SECONDS = 5.0
_GAP = "between_check_and_record"

Progress = Callable[[str, int, int], None]
"""Told what is done now, how much of it is done, and how much there is."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is raced: `requests` callers at once with room for `room`, `rounds` times, each on fresh books."""

    requests: int = 10
    room: int = 4
    rounds: int = 1
    timed_requests: int = 200
    """How many checks, one after another, the time is measured over."""
    cost_nanousd: int = 4_050_000
    hold_seconds: float = 5.0
    """The longest that callers are held in the gap for one that does not come (it was refused, say)."""

    def __post_init__(self) -> None:
        if not 1 <= self.room < self.requests:
            raise ConfigurationError("a race needs room for at least one request, and more requests than that")
        if self.rounds < 1 or self.timed_requests < 2:  # noqa: PLR2004 (a quantile needs two)
            raise ConfigurationError("a race needs at least one round and two timed requests")


@dataclass(frozen=True, slots=True)
class RaceResult:
    """How one strategy did, all rounds together."""

    backend: str
    promises_atomicity: bool
    was_held: bool
    """Whether the callers were held between check and record."""
    admitted: int
    refused: int
    spent_nanousd: int
    """What the books hold in the identifiers' windows."""
    limit_nanousd: int
    overspend_nanousd: int
    """What was over in each round, added up: a round below its limit makes up for nothing."""
    round_trips_a_request: float
    check_p50_ms: float
    check_p95_ms: float

    @property
    def is_as_declared(self) -> bool:
        """What promises atomicity never overspends; what does not and was held in its gap does."""
        if self.promises_atomicity:
            return self.overspend_nanousd == 0
        return self.overspend_nanousd > 0 or not self.was_held


@dataclass(frozen=True, slots=True)
class _Round:
    admitted: int
    spent_nanousd: int
    limit_nanousd: int
    round_trips: int


class _HasGap(Protocol):
    between_check_and_record: Callable[[], None]


class WireCount:
    """Counts what is sent to Redis and waited for: one send is one round trip, a pipeline's too."""

    def __init__(self) -> None:
        self.round_trips = 0
        self._lock = threading.Lock()

    def connection_class(self) -> type[redis.Connection]:
        """For `Link`: a connection that counts here what it sends, once it stands."""
        counter = self

        class CountingConnection(redis.Connection):
            is_set_up = False

            def on_connect_check_health(self, check_health: bool = True) -> None:  # noqa: FBT001, FBT002 (theirs)
                self.is_set_up = False
                super().on_connect_check_health(check_health)
                self.is_set_up = True

            def send_packed_command(self, command: Any, check_health: bool = True) -> None:  # noqa: FBT001, FBT002
                if self.is_set_up:
                    counter.add_one()
                super().send_packed_command(command, check_health)  # type: ignore[no-untyped-call] # redis-py

        return CountingConnection

    def add_one(self) -> None:
        """Something was sent."""
        with self._lock:
            self.round_trips += 1


def race(
    url: str,
    names: Sequence[str] = ("legacy", "atomic"),
    plan: Plan | None = None,
    *,
    clock: Clock | None = None,
    progress: Progress = lambda _what, _done, _of: None,
) -> list[RaceResult]:
    """Race the strategies registered as `names` on the server at `url`, and clear away what that left.

    Raises:
        ConfigurationError: no ``redis://`` URL, a name that nobody registered, or a database that holds ``llm:`` keys.
        StoreError: Redis failed on the way.
    """
    if not url.startswith("redis://"):
        raise ConfigurationError("a race runs on a redis:// URL: only there are round trips counted on the wire")
    its_plan, wire = plan or Plan(), WireCount()
    its_clock = clock or SystemClock()
    link = Link(
        url,
        clock=its_clock,
        timeout_seconds=TIMEOUT_SECONDS,
        pool_size=its_plan.requests,
        connection_class=wire.connection_class(),
    )
    try:
        refuse_used_database(link)
        return _Race(link, its_clock, its_plan, wire, progress).run(names)
    finally:
        link.close()


def refuse_used_database(link: Link) -> None:
    """A database with ``llm:`` keys is somebody's books: nobody races on them.

    Raises:
        ConfigurationError: there is such a key.
        StoreError: Redis could not be asked.
    """
    if link.run(lambda client: next(iter(client.scan_iter(match="llm:*", count=10_000)), None)) is not None:
        raise ConfigurationError("that database holds llm: keys; race on one that is not in use")


class _Race:
    def __init__(self, link: Link, clock: Clock, plan: Plan, wire: WireCount, progress: Progress) -> None:
        self._link = link
        self._clock = clock
        self._plan = plan
        self._wire = wire
        self._progress = progress
        self._made: list[tuple[Ask, int]] = []

    def run(self, names: Sequence[str]) -> list[RaceResult]:
        try:
            rounds = {name: self._all_rounds(name) for name in names}
            times_ms = self._check_times_ms(names)
            return [self._result(name, rounds[name], times_ms[name]) for name in names]
        finally:
            self._clear()

    def _all_rounds(self, name: str) -> list[_Round]:
        self._warm_up(name)
        rounds = []
        for number in range(self._plan.rounds):
            self._progress(f"{name}: {self._plan.requests} callers at once", number, self._plan.rounds)
            rounds.append(self._round(name, f"race-{name}-{number}"))
        return rounds

    def _round(self, name: str, identifier: str) -> _Round:
        plan = self._plan
        backend = open_backend(name, self._link, self._clock)
        _hold_in_gap(backend, plan)
        limit_nanousd = plan.room * plan.cost_nanousd
        asks = [self._ask(identifier, number, limit_nanousd) for number in range(plan.requests)]
        sent_before = self._wire.round_trips
        answers = _at_once(backend, asks, plan.hold_seconds)
        round_trips = self._wire.round_trips - sent_before
        books = backend.books(identifier, asks[0].network, WINDOW_SECONDS)
        admitted = sum(isinstance(answer, Reservation) for answer in answers)
        return _Round(admitted, books.window_nanousd, limit_nanousd, round_trips)

    def _warm_up(self, name: str) -> None:
        """The server learns the scripts, and we its time: neither belongs to a request."""
        backend = open_backend(name, self._link, self._clock)
        backend.reserve(self._ask(f"race-{name}-warm", 0, AMPLE_NANOUSD))

    def _check_times_ms(self, names: Sequence[str]) -> dict[str, list[float]]:
        backends = {name: open_backend(name, self._link, self._clock) for name in names}
        times_ms: dict[str, list[float]] = {name: [] for name in names}
        of = self._plan.timed_requests
        for number in range(of):
            self._progress("the time of the check, in turns", number, of)
            for name, backend in backends.items():
                ask = self._ask(f"race-{name}-timed", number, AMPLE_NANOUSD)
                start_seconds = self._clock.monotonic_seconds()
                backend.reserve(ask)
                times_ms[name].append((self._clock.monotonic_seconds() - start_seconds) * 1_000)
        return times_ms

    def _result(self, name: str, rounds: list[_Round], times_ms: list[float]) -> RaceResult:
        backend = open_backend(name, self._link, self._clock)
        requests = self._plan.requests * len(rounds)
        admitted = sum(each.admitted for each in rounds)
        percentiles = quantiles(times_ms, n=100, method="inclusive")
        return RaceResult(
            backend=name,
            promises_atomicity=backend.promises_atomicity,
            was_held=_has_gap(backend),
            admitted=admitted,
            refused=requests - admitted,
            spent_nanousd=sum(each.spent_nanousd for each in rounds),
            limit_nanousd=sum(each.limit_nanousd for each in rounds),
            overspend_nanousd=sum(max(0, each.spent_nanousd - each.limit_nanousd) for each in rounds),
            round_trips_a_request=sum(each.round_trips for each in rounds) / requests,
            check_p50_ms=percentiles[49],
            check_p95_ms=percentiles[94],
        )

    def _ask(self, identifier: str, number: int, limit_nanousd: int) -> Ask:
        """One request; only its window can refuse it, and its network is its own."""
        limits = Limits(
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
        rid = f"{identifier}-{number}"
        ask = Ask(rid, identifier, identifier, self._plan.cost_nanousd, limits, OPEN_SECONDS)
        self._made.append((ask, self._clock.now_us() // 1_000_000))
        return ask

    def _clear(self) -> None:
        """Only the keys of our own requests; of the dated ones, those of the hour after too."""
        keys = {
            key
            for ask, at_seconds in self._made
            for seconds in (at_seconds, at_seconds + SECONDS_PER_HOUR)
            for key in book_keys(ask.reservation_id, ask.identifier, ask.network, seconds)
        }
        if keys:
            self._link.run(lambda client: client.delete(*keys))


def _has_gap(backend: Backend) -> bool:
    return hasattr(backend, _GAP)


def _hold_in_gap(backend: Backend, plan: Plan) -> None:
    if not _has_gap(backend):
        return
    barrier = threading.Barrier(plan.requests)

    def hold() -> None:
        # Broken: somebody did not come in time, so the others go on, and the figures tell.
        with suppress(threading.BrokenBarrierError):
            barrier.wait(plan.hold_seconds)

    cast("_HasGap", backend).between_check_and_record = hold


def _at_once(backend: Backend, asks: Sequence[Ask], wait_seconds: float) -> list[Verdict]:
    start = threading.Barrier(len(asks))

    def call(ask: Ask) -> Verdict:
        start.wait(wait_seconds)
        return backend.reserve(ask)

    with ThreadPoolExecutor(len(asks), thread_name_prefix="caller") as callers:
        return list(callers.map(call, asks))
