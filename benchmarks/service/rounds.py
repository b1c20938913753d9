"""Rounds in turns, so that whatever the machine does meanwhile happens to all contenders."""

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.service.contenders import Contender, Stage
from benchmarks.service.processes import machine_seconds, session_cpu_seconds
from benchmarks.service.programs import Load, Outcome, outcome_of

Progress = Callable[[str], None]
_BAD = ("refused", "wrong", "broken", "unfinished")


@dataclass(frozen=True, slots=True)
class Sample:
    """One round of one contender. Shares are of one core."""

    a_second: float
    cpu_ms: float
    """Processor of the server's processes for one answer."""
    first_p50_ms: float
    first_p99_ms: float
    writes: float
    """Parts that one answer came in."""
    server_share: float
    upstream_share: float
    load_share: float
    redis_share: float
    others_share: float
    """What everything else on this machine took."""
    bad: Mapping[str, int]
    """Answers that were refused, broken, unfinished, or wrong: those that are not what they should be."""


def take_turns(
    contenders: Sequence[Contender], run: Callable[[Contender], Sample], turns: int, progress: Progress
) -> dict[str, list[Sample]]:
    """The samples of each, in the order of their turns; one more turn before warms up."""
    samples: dict[str, list[Sample]] = {each.name: [] for each in contenders}
    for turn in range(turns + 1):
        for each in contenders:
            progress(f"{each.name}, " + (f"turn {turn} of {turns}" if turn else "warming up"))
            sample = run(each)
            if turn:
                samples[each.name].append(sample)
    return samples


def measured(stage: Stage, contender: Contender, load: Load) -> Sample:
    """One round."""

    def used_so_far() -> list[float]:
        upstream = contender.upstream.cpu_seconds() if contender.upstream else 0.0
        return [contender.server.cpu_seconds(), upstream, session_cpu_seconds(stage.redis.pid), machine_seconds()]

    began, before = time.monotonic(), used_so_far()
    done = subprocess.run(stage.load_command(load, contender.target), capture_output=True, text=True, check=True)
    seconds = time.monotonic() - began
    used = [now - earlier for now, earlier in zip(used_so_far(), before, strict=True)]
    return _sample(outcome_of(done.stdout), seconds, *used)


def _sample(outcome: Outcome, seconds: float, server: float, upstream: float, store: float, machine: float) -> Sample:
    whole = max(1, outcome.answers + outcome.late)
    return Sample(
        a_second=whole / outcome.seconds,
        cpu_ms=server / whole * 1e3,
        first_p50_ms=outcome.first_ms.p50,
        first_p99_ms=outcome.first_ms.p99,
        writes=outcome.chunks / whole,
        server_share=server / seconds,
        upstream_share=upstream / seconds,
        load_share=outcome.cpu_seconds / seconds,
        redis_share=store / seconds,
        others_share=max(0.0, machine - server - upstream - store - outcome.cpu_seconds) / seconds,
        bad={name: count for name in _BAD if (count := getattr(outcome, name))},
    )


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with the least and the most beside it."""

    median: float
    least: float
    most: float


def spread(values: Sequence[float]) -> Spread:
    """Of the turns."""
    return Spread(median(values), min(values), max(values))


def ratio(samples: Sequence[Sample], others: Sequence[Sample], of: Callable[[Sample], float]) -> Spread:
    """Turn by turn, so that a slow moment of the machine is in both."""
    return spread([of(one) / max(of(other), 1e-9) for one, other in zip(samples, others, strict=True)])
