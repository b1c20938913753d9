"""``python -m benchmarks.hammer``: many processes, no pause, every invariant checked by an oracle after each seed.

On a server of its own. A seed is a population of callers and budgets and all that they do: reserve, say again, extend,
settle, release, or never end; ids that several processes hold, idempotency keys that many use. What must hold, and what
of it is proved, is at the head of `hammer_oracle.py`. Exit status 1 if anything did not hold.
"""

import argparse
import multiprocessing
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from backends.clock import SystemClock
from backends.ledger.audit import audit
from backends.store.link import Link
from benchmarks.hammer_load import Share, population_of, run_share, set_up
from benchmarks.hammer_oracle import MOST_PRINTED, violations
from flaskapp.ops.embedded_redis import EmbeddedServer

CALLS = ("requests", "repeats", "extends", "ends")
PRINTED_EVERY = 10
AUDIT_BESIDE_EVERY = 10
"""One seed in so many is audited while it is hammered, too."""


@dataclass
class Figures:
    """The figures of a run."""

    seeds: int = 0
    hammering_seconds: float = 0.0
    """Without the checks."""
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    violations: dict[int, list[str]] = field(default_factory=dict)
    """By seed."""

    @property
    def calls(self) -> int:
        """Calls of the backend's verbs."""
        return sum(self.counts.get(name, 0) for name in CALLS)


class Hammer:
    """Processes that are started once and hammer one seed after another; a context manager.

    Args:
        url: a server whose database is emptied before each seed.
        backend: the registered name of a strategy.
    """

    def __init__(self, url: str, *, processes: int = 4, requests: int = 10_000, backend: str = "atomic") -> None:
        self._url = url
        self._processes = processes
        self._requests = requests
        self._backend = backend
        self._clock = SystemClock()
        self._link = Link(url, clock=self._clock, timeout_seconds=60)
        spawn = multiprocessing.get_context("spawn")
        # Each share waits for the others, so that no process takes two of a seed, and all begin at once.
        self._pool = ProcessPoolExecutor(
            processes, mp_context=spawn, initializer=set_up, initargs=(spawn.Barrier(processes),)
        )
        self.figures = Figures()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        self._link.close()

    def run(self, seed: int) -> list[str]:
        """Hammer one seed; the violations."""
        population = population_of(seed, self._requests)
        self._link.run(lambda client: client.flushdb())
        shares = [
            Share(population, number, self._processes, self._url, self._backend) for number in range(self._processes)
        ]
        start = self._clock.monotonic_seconds()
        going = self._pool.map(run_share, shares)
        beside = audit(self._link).disagreements if seed % AUDIT_BESIDE_EVERY == 0 else ()
        reports = list(going)
        hammered = self._clock.monotonic_seconds()
        found = [f"I2: beside traffic: {each.key} {each.told}" for each in beside]
        found += violations(self._link, population, reports)
        figures = self.figures
        figures.seeds += 1
        figures.hammering_seconds += hammered - start
        figures.seconds += self._clock.monotonic_seconds() - start
        for each in reports:
            for name, count in each.counts.items():
                figures.counts[name] = figures.counts.get(name, 0) + count
        if found:
            figures.violations[seed] = found
        return found


def main() -> int:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="tollgate-hammer-") as directory, EmbeddedServer(Path(directory)) as server:
        hammer = Hammer(
            server.url, processes=arguments.processes, requests=arguments.requests, backend=arguments.backend
        )
        with hammer:
            _run(hammer, arguments)
    _print(hammer.figures, arguments)
    return 1 if hammer.figures.violations else 0


def _run(hammer: Hammer, arguments: argparse.Namespace) -> None:
    clock = SystemClock()
    start = clock.monotonic_seconds()
    with _progress(arguments.seeds) as show:
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            found = hammer.run(seed)
            for violation in found[:MOST_PRINTED]:
                print(f"seed {seed}: {violation}", file=sys.stderr)
            if found:
                print(_how_to_repeat(seed, len(found), arguments), file=sys.stderr)
            show(hammer.figures)
            if arguments.minutes and clock.monotonic_seconds() - start > arguments.minutes * 60:
                return


def _how_to_repeat(seed: int, count: int, arguments: argparse.Namespace) -> str:
    return (
        f"seed {seed}: {count} in all; the same operations again: python -m benchmarks.hammer --first-seed {seed} "
        f"--seeds 1 --requests {arguments.requests} --processes {arguments.processes} --backend {arguments.backend}"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hammer", description=__doc__)
    parser.add_argument("--seeds", type=int, default=200, help="how many (%(default)s)")
    parser.add_argument("--first-seed", type=int, default=1, help="the first of them (%(default)s)")
    parser.add_argument("--requests", type=int, default=10_000, help="of a seed, all processes together (%(default)s)")
    parser.add_argument("--processes", type=int, default=4, help="how many (%(default)s)")
    parser.add_argument("--backend", default="atomic", help="name of a registered strategy (%(default)s)")
    parser.add_argument("--minutes", type=float, help="begin no further seed after so long")
    return parser.parse_args()


class _ProgressLine:
    """A bar on a terminal; in a log, a line for every `PRINTED_EVERY` seeds."""

    def __init__(self, bars: Progress, seeds: int, *, is_terminal: bool) -> None:
        self._bars = bars
        self._task = bars.add_task("hammering", total=seeds)
        self._is_terminal = is_terminal

    def __call__(self, figures: Figures) -> None:
        text = _in_short(figures)
        self._bars.update(self._task, description=text, completed=figures.seeds)
        if not self._is_terminal and figures.seeds % PRINTED_EVERY == 0:
            print(text, file=sys.stderr, flush=True)


@contextmanager
def _progress(seeds: int) -> Iterator[_ProgressLine]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        yield _ProgressLine(bars, seeds, is_terminal=console.is_terminal)


def _in_short(figures: Figures) -> str:
    rate = figures.calls / max(figures.hammering_seconds, 1e-9)
    violations = f", {len(figures.violations)} seeds with violations" if figures.violations else ""
    return f"{figures.seeds} seeds, {figures.calls:,} calls, {rate:,.0f} a second{violations}"


def _print(figures: Figures, arguments: argparse.Namespace) -> None:
    print(f"{arguments.backend}, {arguments.processes} processes: {_in_short(figures)}")
    print(f"{figures.seconds:,.0f} s in all, {figures.hammering_seconds:,.0f} s of them without the checks")
    for name, count in sorted(figures.counts.items()):
        print(f"{name}: {count:,}")
    count = sum(map(len, figures.violations.values()))
    print(f"violations: {count}" + (f" in {len(figures.violations)} seeds" if count else ""))


if __name__ == "__main__":
    sys.exit(main())
