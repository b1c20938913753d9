"""The figures of the report: what is measured, what it is compared with, and what would make it lie."""

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from benchmarks.service.contenders import Contender, Stage, bare, chat, completion
from benchmarks.service.processes import ROOT, machine_seconds
from benchmarks.service.programs import Load
from benchmarks.service.rounds import Progress, Sample, Spread, measured, ratio, spread, take_turns

FLOOR, CHAT, SHORT_CHAT = "floor", "ours, chat", "ours, chat of 20 tokens"
STREAMED, WHOLE = "ours, /v1 streamed", "ours, /v1 whole"
_PACE_US, _PACED_STREAMS = 20_000, 100
_OPENING_SECONDS = 60.0
_FULL_SHARE, _LOADED_SHARE, _BUSY_SHARE = 0.8, 0.3, 0.8
"""Of a core: from where on a figure is doubted. The last is of all but the worker, upstream and clients among it."""
_IDLE_SECONDS = 30.0
"""Longer than clients that left are read on for."""


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure of the table: what it has to be, and what would make it lie."""

    name: str
    is_least: bool
    bound: float
    aim: float
    unit: str
    lies: str


_TABLE = """
streamed/floor   | ≥ 0.45 | 0.7 |    | /v1 streamed, over the bare floor
streamed/hardcap | ≥ 0.8  | 1.2 |    | /v1 streamed, over Hardcap 0.1.0
whole/hardcap    | ≥ 0.5  | 1   |    | /v1 whole, over Hardcap 0.1.0
chat/floor       | ≥ 0.45 | 0.7 |    | chat of 20 tokens with the built-in model, over the bare floor
streamed/litellm | ≥ 30   | 50  |    | /v1 streamed, over the LiteLLM proxy
token            | ≤ 2.5  | 1.5 |    | one event a read: processor a token, over the floor's write
first p50        | ≤ 2    | 1   | ms | added to the first chunk at half load, p50
first p99        | ≤ 6    | 3   | ms | added to the first chunk at half load, p99
memory           | ≤ 100  | 50  | KB | memory a stream, many open in one worker
two workers      | ≥ 0.85 | 1   |    | two workers over one, to the floor's own gain
functions        | ≤ 90   | 60  |    | functions of ours entered by one chat of 20 tokens
"""
_LIES = {
    "streamed/floor": "Another run: only turns of one compare. The floor asks no upstream; ours does.",
    "streamed/hardcap": "Other programs on these cores. Hardcap keeps one budget, in tokens; ours six.",
    "whole/hardcap": "The same.",
    "chat/floor": "The model works in our own process, and gives its 20 tokens in one read: one write, the floor's 21.",
    "streamed/litellm": "Rounds too short for its long answers. LiteLLM keeps no budget here.",
    "token": "A worker that is full, or waits for a core, reads several events at once, and then each costs less.",
    "first p50": "The half of a load that others held down. The bare application asks no upstream.",
    "first p99": "Whatever else runs on these cores is in it.",
    "memory": "What Python had before is used again and does not show; few streams carry what is there once.",
    "two workers": "Two workers, Redis, upstream and clients share the cores; one worker may get most connections.",
    "functions": "Nothing of the machine: it is a count.",
}


def _goals() -> Iterator[tuple[str, Goal]]:
    for row in _TABLE.strip().splitlines():
        key, bound, aim, unit, name = (cell.strip() for cell in row.split("|"))
        sign, number = bound.split()
        yield key, Goal(name, sign == "≥", float(number), float(aim), unit, _LIES[key])


GOALS = dict(_goals())


@dataclass(frozen=True, slots=True)
class Figure:
    """What was measured for one goal."""

    key: str
    measured: Spread
    by_processor: Spread | None = None
    """Of a ratio of requests a second: the same of processor time, which a loaded machine moves less."""
    remark: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """How long everything takes."""

    turns: int = 7
    seconds: float = 3.0
    open_streams: int = 1_000
    window_seconds: float = 5.0
    paced_turns: int = 3


QUICK = Plan(turns=3, seconds=1.0, open_streams=200, window_seconds=3.0, paced_turns=1)


@dataclass(frozen=True, slots=True)
class Books:
    """What ours booked and what its upstream generated, at some moment when nothing was under way."""

    after: str
    booked_nanousd: int
    billed_nanousd: int


@dataclass(slots=True)
class Results:
    """Everything that a run found."""

    figures: list[Figure] = field(default_factory=list)
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    books: list[Books] = field(default_factory=list)

    @property
    def is_overspent(self) -> bool:
        """The upstream generated more than our books show."""
        return any(each.booked_nanousd < each.billed_nanousd for each in self.books)


class Bench:
    """Measures figure after figure on one stage."""

    def __init__(self, stage: Stage, plan: Plan, progress: Progress) -> None:
        self._stage, self._plan, self._progress = stage, plan, progress
        self.results = Results()
        progress("starting the floor and ours")
        self._floor, self._builtin, self._proxied = stage.floor(), stage.builtin(), stage.proxied()

    def throughput(self, peers: Sequence[Contender]) -> None:
        """Requests a second and processor a request of all contenders."""
        contenders = [
            self._floor,
            self._builtin,
            self._builtin.asked(SHORT_CHAT, chat(max_tokens=20), self._builtin.target.end),
            self._proxied,
            self._proxied.asked(WHOLE, completion(streamed=False), '"usage"'),
            *peers,
        ]
        samples = self._turns(contenders, Load(seconds=self._plan.seconds))
        self.results.samples = samples
        pairs = {
            "streamed/floor": (STREAMED, FLOOR),
            "streamed/hardcap": (STREAMED, "Hardcap, streamed"),
            "whole/hardcap": (WHOLE, "Hardcap, whole"),
            "chat/floor": (SHORT_CHAT, FLOOR),
            "streamed/litellm": (STREAMED, "LiteLLM, streamed"),
        }
        for key, (one, other) in pairs.items():
            if other in samples:
                self._add(_over(key, samples[one], samples[other]))
        self.books("full speed")

    def two_workers(self) -> None:
        """What a second worker gives, beside what it gives to the floor."""
        self._progress("starting two workers each")
        doubled = [
            each.asked(f"{each.name}, two workers", each.target.request, each.target.end)
            for each in (self._stage.floor(2), self._stage.proxied(2))
        ]
        named = [self._floor, self._proxied, *doubled]
        floor, ours, floors, both = self._turns(named, Load(seconds=self._plan.seconds)).values()
        gains = [
            two.a_second / one.a_second / (bare_two.a_second / bare_one.a_second)
            for one, two, bare_one, bare_two in zip(ours, both, floor, floors, strict=True)
        ]
        floor_gain = ratio(floors, floor, _rate).median
        remark = f"ours {ratio(both, ours, _rate).median:.2f} times one worker, the floor {floor_gain:.2f}"
        self._add(Figure("two workers", spread(gains), remark=remark))
        self.books("two workers", doubled[1])

    def first_chunk(self) -> None:
        """How much later than the bare application's the first chunk comes, at half of what ours can."""
        rate = spread([each.a_second for each in self.results.samples[STREAMED]]).median / 2
        load = Load(connections=128, seconds=2 * self._plan.seconds, rate=rate)
        bare_ones, ours = self._turns([self._floor, self._proxied], load).values()
        pairs = list(zip(ours, bare_ones, strict=True))
        at = f"at {rate:.0f} requests a second, the bare application's own"
        p50 = spread([one.first_p50_ms - other.first_p50_ms for one, other in pairs])
        p99 = spread([one.first_p99_ms - other.first_p99_ms for one, other in pairs])
        bare_p50, bare_p99 = (spread([getattr(each, name) for each in bare_ones]).median for name in _FIRST)
        self._add(Figure("first p50", p50, remark=f"{at} {bare_p50:.1f} ms"))
        self._add(Figure("first p99", p99, remark=f"{at} {bare_p99:.1f} ms"))

    def token(self) -> None:
        """What one token costs that comes alone, beside a write of the floor at the same pace."""
        tokens = int((self._plan.window_seconds + _OPENING_SECONDS) * 1e6 / _PACE_US)
        floor = self._floor.asked(FLOOR, bare(tokens, _PACE_US), "[DONE]")
        ours = self._proxied.asked(STREAMED, completion(tokens=tokens, pace_us=_PACE_US), "[DONE]")
        turns = [(self._paced_us(floor), self._paced_us(ours)) for _ in range(self._plan.paced_turns)]
        writes, reads = (spread(costs).median for costs in zip(*turns, strict=True))
        remark = f"{reads:.0f} µs a token, {writes:.0f} µs a paced write of the floor"
        self._add(Figure("token", spread([one / write for write, one in turns]), remark=remark))

    def _paced_us(self, contender: Contender) -> float:
        """Processor microseconds a token while many streams get one at a time."""
        self._progress(f"{_PACED_STREAMS} streams of {1e6 / _PACE_US:.0f} tokens a second: {contender.name}")
        window = self._plan.window_seconds
        with self._open_streams(contender, _PACED_STREAMS) as opened:
            cpu, machine = contender.server.cpu_seconds(), machine_seconds()
            generated = contender.generated()["output_tokens"]
            time.sleep(window)
            used, others = contender.server.cpu_seconds() - cpu, machine_seconds() - machine
            tokens = contender.generated()["output_tokens"] - generated
        if used > _FULL_SHARE * window or others - used > _BUSY_SHARE * window or opened < _PACED_STREAMS:
            self.results.remarks.append(
                f"{contender.name}, {opened} paced streams: the worker used {used / window:.1f} cores and all else "
                f"{(others - used) / window:.1f}, so several tokens may have come in one read"
            )
        _wait_until_idle(contender)
        return used * 1e6 / max(1, tokens)

    def memory(self) -> None:
        """What a worker holds for each open stream."""
        wanted, pace_us = self._plan.open_streams, 1_000_000
        request = completion(tokens=int(2 * _OPENING_SECONDS * 1e6 / pace_us), pace_us=pace_us)
        self._progress(f"opening {wanted} streams")
        before = self._proxied.server.memory_bytes()
        with self._open_streams(self._proxied.asked(STREAMED, request, "[DONE]"), wanted) as opened:
            held = self._proxied.server.memory_bytes() - before
        remark = f"{opened} open"
        if opened < wanted:
            self.results.remarks.append(f"memory a stream: of {wanted} streams only {opened} were let in")
        self._add(Figure("memory", spread([held / 1e3 / max(1, opened)]), remark=remark))
        self.books("clients that left")

    def functions(self) -> None:
        """How many functions of ours one chat enters."""
        self._progress("counting functions")
        command = [sys.executable, "-m", "benchmarks.service.entered"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        self._add(Figure("functions", spread([len(done.stdout.splitlines())])))

    def books(self, after: str, *contenders: Contender) -> None:
        """The upstream's own count against our books, once all that was given up has ended."""
        for each in contenders or (self._proxied,):
            _wait_until_idle(each)
            self.results.books.append(Books(after, *each.books_and_bill()))

    def _turns(self, contenders: Sequence[Contender], load: Load) -> dict[str, list[Sample]]:
        samples = take_turns(
            contenders, lambda each: measured(self._stage, each, load), self._plan.turns, self._progress
        )
        self.results.remarks += doubts(samples)
        return samples

    def _add(self, figure: Figure) -> None:
        self.results.figures.append(figure)
        # Said at once too: what breaks a later one does not take it.
        value, goal = figure.measured, GOALS[figure.key]
        self._progress(f"{goal.name}: {value.median:.3g} {goal.unit} ({value.least:.3g} to {value.most:.3g})")

    @contextmanager
    def _open_streams(self, contender: Contender, count: int) -> Iterator[int]:
        """So many long answers under way, or as many as are let in; their clients leave at the end."""
        streamed = self.results.samples.get(contender.name)
        rate = spread([each.a_second for each in streamed]).median / 2 if streamed else 20.0
        load = Load(connections=count, seconds=count / rate, rate=rate, grace_seconds=10 * _OPENING_SECONDS)
        clients = subprocess.Popen(self._stage.load_command(load, contender.target), stdout=subprocess.DEVNULL)
        try:
            end = time.monotonic() + load.seconds + _IDLE_SECONDS
            while (opened := contender.generated()["open"]) < count and time.monotonic() < end:
                time.sleep(0.1)
            yield opened
        finally:
            clients.kill()
            clients.wait()


_FIRST = ("first_p50_ms", "first_p99_ms")


def _wait_until_idle(contender: Contender) -> None:
    end = time.monotonic() + _IDLE_SECONDS
    while contender.generated()["open"] and time.monotonic() < end:
        time.sleep(0.2)
    # What is read to its end for its bill is settled just after that.
    time.sleep(0.5)


def _rate(sample: Sample) -> float:
    return sample.a_second


def _over(key: str, ours: Sequence[Sample], others: Sequence[Sample]) -> Figure:
    return Figure(key, ratio(ours, others, _rate), ratio(others, ours, lambda sample: sample.cpu_ms))


def doubts(samples: Mapping[str, Sequence[Sample]]) -> Iterator[str]:
    """What speaks against these samples."""
    for name, rows in samples.items():
        for what, share in (
            ("the load generator", max(each.load_share for each in rows)),
            ("the upstream", max(each.upstream_share for each in rows)),
        ):
            if share > _FULL_SHARE:
                yield f"{name}: {what} used {share:.2f} of a core and may be the bottleneck"
        if bad := sum((Counter(each.bad) for each in rows), Counter[str]()):
            yield f"{name}: answers {', '.join(f'{kind} {count}' for kind, count in bad.items())}"
    others = spread([each.others_share for rows in samples.values() for each in rows]).median
    if others > _LOADED_SHARE:
        yield f"{next(iter(samples))} to {name}: other programs used {others:.1f} cores meanwhile"
