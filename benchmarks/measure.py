"""Timing: the calls take turns, so that other load of the machine slows all of them alike."""

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

WARM_UP_TURNS = 50


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the report: a figure, its baseline, and the promised ratio of the two."""

    name: str
    measured: float
    unit: str
    baseline_name: str = ""
    baseline: float | None = None
    ratio: float | None = None
    percent_less: float | None = None
    target: str = ""
    is_met: bool | None = None
    """None where nothing was promised."""


def medians_us(calls: Mapping[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Median of each call in microseconds; a call that returns a float has timed itself, in seconds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(-min(WARM_UP_TURNS, turns), turns):
            for name, call in calls.items():
                start = time.perf_counter()
                own = call()
                taken = own if isinstance(own, float) else time.perf_counter() - start
                if turn >= 0:
                    times[name].append(taken)
    finally:
        if was_collecting:
            gc.enable()
    return {name: median(taken) * 1e6 for name, taken in times.items()}


def at_most(name: str, measured_us: float, baseline: tuple[str, float], limit: float | None) -> Row:
    """A row that is met while `measured_us` is at most `limit` times the baseline."""
    ratio = measured_us / baseline[1]
    target = "" if limit is None else f"≤ {limit:g} x"
    return Row(name, measured_us, "µs", *baseline, ratio, None, target, None if limit is None else ratio <= limit)


def at_least(name: str, measured_us: float, baseline: tuple[str, float], limit: float | None) -> Row:
    """A row that is met while the baseline is at least `limit` times `measured_us`."""
    ratio = baseline[1] / measured_us
    target = "" if limit is None else f"≥ {limit:g} x"
    less = 100 * (1 - measured_us / baseline[1])
    return Row(name, measured_us, "µs", *baseline, ratio, less, target, None if limit is None else ratio >= limit)


def placements() -> list[str]:
    """How caller and server can share the cores: it changes the cost of a round trip by a factor of two.

    On one core the server runs as soon as the caller waits; on two, one of them must be woken first.
    """
    if not hasattr(os, "sched_setaffinity"):
        return [""]
    return [", one core", ", two cores"] if len(os.sched_getaffinity(0)) > 1 else [", one core"]


@contextmanager
def placed(server_pid: int, placement: str) -> Iterator[None]:
    """Keep caller and server on the cores of `placement`."""
    if not placement:
        yield
        return
    all_cores = os.sched_getaffinity(0)
    cores = sorted(all_cores)
    _pin(server_pid, {cores[0]} if "one" in placement else {cores[1]})
    os.sched_setaffinity(0, {cores[0]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, all_cores)
        _pin(server_pid, all_cores)


def _pin(pid: int, cores: set[int]) -> None:
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)
