"""Random faults under load for so many minutes: what the service holds stays flat, and the books stay right.

Once a minute the clients pause, and all answers end. Then memory, descriptors and threads of the workers and the keys
of Redis are counted, the books are audited and held beside the upstream's bill, and one identifier's small limit is
looked at. The same seed draws the same faults in the same order.
"""

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

from backends.keys import known_key
from benchmarks.outages.fault import Part
from benchmarks.outages.faults import FAULTS
from benchmarks.outages.load import Saw, counted
from benchmarks.outages.play import OUR_TRACEBACK
from benchmarks.outages.stage import CLIENTS, SETTLING_SECONDS, Stage
from benchmarks.service.processes import pss_bytes
from tests.servers import nanousd

LIMITED, LIMIT_USD = "visitor1-0", "0.020000000"
"""An identifier that is refused soon, and the most that it may spend in a day."""
SAMPLE_SECONDS = 60.0
_FAULT_SECONDS = (0.5, 4.0)
_REST_SECONDS = (3.0, 6.0)
_MOST_GROWTH = {"memory_mb": 5, "descriptors": 10, "threads": 2, "keys": 10}
"""Of the last third of the samples beyond the one before, and a tenth of it: a pool may open a few connections more."""
_EMERGENCY_USD = "100"
_KEPT_AN_HOUR = "record"
"""The kind of key of which each request leaves one, for an hour past its end."""


@dataclass(slots=True)
class Sample:
    """One minute."""

    minute: float
    memory_mb: float
    """Of all workers; of shared pages their part."""
    descriptors: int
    threads: int
    keys: int
    """Without those that each request leaves for an hour."""
    keys_by_kind: dict[str, int]
    requests: int
    faults: int
    births: int
    beyond_nanousd: int
    """What the books and the emergency budget have beyond the bill."""
    by_worker: dict[str, dict[str, float]]
    missed: list[str]


@dataclass(slots=True)
class Soak:
    """All of it."""

    seed: int
    minutes: float
    samples: list[Sample] = field(default_factory=list)
    saw: dict[str, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    emergency_nanousd: int = 0
    missed: list[str] = field(default_factory=list)


def run_soak(
    minutes: float, seed: int, directory: Path, say: Callable[[str], None], sample_seconds: float = SAMPLE_SECONDS
) -> Soak:
    """Until the time is over; `say` is called with a line for each sample."""
    soak = Soak(seed, minutes)
    environment = {
        "FAIL_OPEN_BUDGET_USD": _EMERGENCY_USD,
        "BUDGET_OVERRIDES": json.dumps([{"budget": "day", "owner": LIMITED, "limit_usd": LIMIT_USD}]),
    }
    with Stage(directory, frozenset({Part.WIRE}), environment) as stage:
        watch = _Watch(stage, soak)
        stage.load.add(CLIENTS)
        for _ in _minutes(minutes):
            watch.play(sample_seconds)
            sample = watch.sample()
            soak.samples.append(sample)
            say(_in_short(sample))
        stage.load.stop()
        soak.saw = counted(stage.load.answers)
        soak.emergency_nanousd = stage.emergency_nanousd()
        soak.missed = [f"minute {each.minute:.0f}: {text}" for each in soak.samples for text in each.missed]
        soak.missed += list(growths(soak.samples))
        if Saw.OTHER in soak.saw:
            soak.missed.append(f"{soak.saw[Saw.OTHER]} clients saw another status")
        if OUR_TRACEBACK.search(stage.service.log()):
            soak.missed.append("there is a traceback of ours in the log")
    return soak


def _minutes(minutes: float) -> Iterator[int]:
    end, number = time.monotonic() + minutes * 60, 0
    while time.monotonic() < end:
        number += 1
        yield number


class _Watch:
    """Draws the faults of a stage, and looks at it between them."""

    def __init__(self, stage: Stage, soak: Soak) -> None:
        self._stage = stage
        self._soak = soak
        self._random = random.Random(soak.seed)
        self._begins = time.monotonic()
        self._births = stage.births()
        self._choices = [fault for fault in FAULTS if fault.soak]

    def play(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            fault = self._random.choice(self._choices)
            lasts, rests = self._random.uniform(*_FAULT_SECONDS), self._random.uniform(*_REST_SECONDS)
            mend = fault.inject(self._stage)
            time.sleep(lasts)
            mend()
            counts = self._soak.faults
            counts[fault.name] = counts.get(fault.name, 0) + 1
            time.sleep(rests)

    def sample(self) -> Sample:
        stage = self._stage
        stage.load.pause()
        stage.wait(lambda: len(stage.workers()) == stage.service.workers, SETTLING_SECONDS)
        missed = []
        # What a killed worker held stays pending until its time is over; the rest has to be settled.
        stage.wait(stage.is_settled, SETTLING_SECONDS / 2)
        known = (known_key(key) for key in stage.look.scan_iter("*", 1_000))
        kinds = Counter(each.kind if each else "unknown" for each in known)
        missed += [f"{each.key} {each.told}" for each in stage.audit().disagreements]
        beyond = stage.booked_nanousd() + stage.emergency_nanousd() - stage.billed_nanousd()
        if beyond < 0:
            missed.append(f"the books hold {-beyond} nano-dollars less than the bill")
        spent = self._spent_by_the_limited()
        if spent > nanousd(LIMIT_USD):
            missed.append(f"{LIMITED} has spent {spent} nano-dollars")
        workers = {str(pid): _use_of(pid) for pid in stage.workers()}
        sample = Sample(
            minute=(time.monotonic() - self._begins) / 60,
            memory_mb=sum(each["memory_mb"] for each in workers.values()),
            descriptors=int(sum(each["descriptors"] for each in workers.values())),
            threads=int(sum(each["threads"] for each in workers.values())),
            keys=sum(count for kind, count in kinds.items() if kind != _KEPT_AN_HOUR),
            keys_by_kind=dict(kinds),
            requests=len(stage.load.answers),
            faults=sum(self._soak.faults.values()),
            births=stage.births() - self._births,
            beyond_nanousd=beyond,
            by_worker=workers,
            missed=missed,
        )
        stage.load.resume()
        return sample

    def _spent_by_the_limited(self) -> int:
        days = self._stage.look.scan_iter(f"llm:cost:daily:{LIMITED}:*", 1_000)
        return max((int(self._stage.look.get(key) or 0) for key in days), default=0)


def _use_of(pid: int) -> dict[str, float]:
    place = Path("/proc") / str(pid)
    with suppress(OSError):
        return {
            "memory_mb": pss_bytes(pid) / 1e6,
            "descriptors": sum(1 for _ in (place / "fd").iterdir()),
            "threads": sum(1 for _ in (place / "task").iterdir()),
        }
    return {"memory_mb": 0.0, "descriptors": 0, "threads": 0}


def growths(samples: list[Sample]) -> Iterator[str]:
    """What is not flat: the last third of the samples beside the third before."""
    third = len(samples) // 3
    if third == 0:
        return
    for name, most in _MOST_GROWTH.items():
        values = [getattr(each, name) for each in samples]
        before, after = median(values[-2 * third : -third]), median(values[-third:])
        if after > before * 1.1 + most:
            yield f"{name} grew from {before:.0f} to {after:.0f}"


def _in_short(sample: Sample) -> str:
    figures = (
        f"{sample.minute:.1f} min: {sample.requests} requests, {sample.faults} faults, {sample.births} workers born, "
        f"{sample.memory_mb:.0f} MB, {sample.descriptors} descriptors, {sample.threads} threads, {sample.keys} keys, "
        f"books {sample.beyond_nanousd / 1e9:+.4f} USD beside the bill"
    )
    return f"{figures}; {'; '.join(sample.missed)}" if sample.missed else figures


def draw(soak: Soak, path: Path) -> bool:
    """The lines as a PNG; False where matplotlib is not installed."""
    try:
        from matplotlib import pyplot as plt  # noqa: PLC0415 - an extra
    except ImportError:
        return False
    plt.switch_backend("Agg")
    names = ("memory_mb", "descriptors", "threads", "keys", "beyond_nanousd", "requests")
    figure, axes = plt.subplots(len(names), 1, figsize=(9, 12), sharex=True, layout="constrained")
    minutes = [each.minute for each in soak.samples]
    for name, axis in zip(names, axes, strict=True):
        axis.plot(minutes, [getattr(each, name) for each in soak.samples], marker=".")
        axis.set_ylabel(name)
        axis.set_ylim(bottom=min(0, *axis.get_ylim()))
    axes[-1].set_xlabel("minutes")
    axes[0].set_title(f"{sum(soak.faults.values())} random faults, seed {soak.seed}")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def write(soak: Soak, path: Path) -> None:
    path.write_text(json.dumps(asdict(soak), indent=2) + "\n", encoding="utf-8")
