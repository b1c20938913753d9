"""Play one fault: load, the fault, what mends it, and what came of it."""

import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.outages.fault import CannotInject, Fault
from benchmarks.outages.load import Answer, Saw, counted
from benchmarks.outages.stage import CLIENTS, SETTLING_SECONDS, Stage

FIRST_BYTE_SECONDS = 2.0
BACK_SECONDS = 3.0
OUR_TRACEBACK = re.compile(r'^  File ".*/(?:backends|flaskapp)/', re.MULTILINE)
"""Not gevent's, where a connection cannot be accepted."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How long there is load before a fault and after it was mended."""

    before_seconds: float = 1.0
    after_seconds: float = 3.5
    by_the_clock: bool = True
    """Whether times count for what is missed."""


@dataclass(slots=True)
class Result:
    """What came of a fault."""

    name: str
    section: str
    title: str
    skipped: str = ""
    """Why it was not injected."""
    requests: int = 0
    saw: dict[str, int] = field(default_factory=dict)
    """By those that asked while it lasted."""
    slowest_seconds: float = 0.0
    """Until an answer or a refusal began, while it lasted and after."""
    usual_seconds: float = 0.0
    """The same before it: what this machine takes without a fault."""
    births: int = 0
    billed_nanousd: int = 0
    booked_nanousd: int = 0
    """In Redis."""
    emergency_nanousd: int = 0
    back_seconds: float = 0.0
    """How long after it was mended the last request began that was not booked."""
    missed: list[str] = field(default_factory=list)
    """What is not as it should be."""

    @property
    def beyond_nanousd(self) -> int:
        """What the books hold beyond the bill."""
        return self.booked_nanousd + self.emergency_nanousd - self.billed_nanousd


def play(fault: Fault, pace: Pace = Pace()) -> Result:
    """Inject it into a service of its own."""
    result = Result(fault.name, fault.section, fault.title)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="tollgate-outages-") as directory,
            Stage(Path(directory), fault.parts, fault.environment) as stage,
        ):
            _play(fault, stage, result, pace)
    except CannotInject as error:
        result.skipped = str(error)
    except Exception as error:  # noqa: BLE001 - the other faults go on
        result.missed.append(f"it could not be played: {type(error).__name__}: {error}")
    return result


def _play(fault: Fault, stage: Stage, result: Result, pace: Pace) -> None:
    if fault.settings:
        stage.service.set_by_hand(stage.look, **fault.settings)
    stage.load.add(CLIENTS)
    time.sleep(pace.before_seconds)
    births = stage.births()
    begins = time.monotonic()
    mend = fault.inject(stage)
    stage.load.add(fault.burst)
    time.sleep(fault.seconds)
    if fault.felt is not None and not fault.felt(stage):
        result.missed.append("it was not felt: was it injected?")
    mend()
    mended = time.monotonic()
    time.sleep(pace.after_seconds)
    result.births = stage.births() - births
    stage.load.stop()
    result.missed += _look_into_the_books(fault, stage)
    stage.service.stop()
    result.missed += _look_into_the_service(fault, stage)
    _count(result, stage, begins, mended)
    judge(fault, result, _during(stage.load.answers, begins, mended))
    if pace.by_the_clock:
        judge_times(fault, result)


def _look_into_the_books(fault: Fault, stage: Stage) -> Iterator[str]:
    if not fault.left_booked and not stage.wait(stage.is_settled, SETTLING_SECONDS):
        yield "reservations stay pending"
    disagreements = stage.audit().disagreements
    if fault.keeps_time:
        yield from (f"{each.key} {each.told}" for each in disagreements)


def _look_into_the_service(fault: Fault, stage: Stage) -> Iterator[str]:
    """At what it has left; it has ended."""
    log = stage.service.log()
    if fault.logged not in log:
        yield f"{fault.logged!r} is not in the log"
    if OUR_TRACEBACK.search(log):
        yield "there is a traceback of ours in the log"
    if stage.emergency_charged_nanousd() > stage.emergency_limit_nanousd():
        yield "the emergency budget was exceeded"


def _during(answers: list[Answer], begins: float, mended: float) -> list[Answer]:
    """Those that the fault may have met."""
    return [each for each in answers if each.ended_seconds >= begins and each.began_seconds <= mended + BACK_SECONDS]


def _count(result: Result, stage: Stage, begins: float, mended: float) -> None:
    answers = stage.load.answers
    result.requests = len(answers)
    result.saw = counted(_during(answers, begins, mended))
    before = [each.first_seconds for each in answers if each.ended_seconds < begins]
    result.usual_seconds = max(before, default=0.0)
    result.slowest_seconds = max((each.first_seconds for each in answers if each.ended_seconds >= begins), default=0.0)
    ill = [each.began_seconds for each in answers if each.saw is not Saw.BOOKED]
    result.back_seconds = max(0.0, max(ill, default=mended) - mended)
    result.booked_nanousd = stage.booked_nanousd()
    result.emergency_nanousd = stage.emergency_nanousd()
    result.billed_nanousd = stage.billed_nanousd()


def judge(fault: Fault, result: Result, met: list[Answer]) -> None:
    """Say what is not as it should be, of the answers that the fault may have met."""
    seen = set(result.saw)
    missed = result.missed
    if result.beyond_nanousd < 0 and not fault.forgets:
        missed.append(f"the books hold {-result.beyond_nanousd} nano-dollars less than the bill")
    if unexpected := seen - {Saw.BOOKED} - fault.may:
        missed.append(f"clients saw {', '.join(sorted(unexpected))}")
    if unfelt := fault.must - seen:
        missed.append(f"no client saw {', '.join(sorted(unfelt))}: was it injected?")
    share = result.saw.get(Saw.EMERGENCY, 0) / max(1, len(met))
    if share > fault.most_emergency:
        missed.append(f"{share:.0%} of the answers were on the emergency budget")
    if result.births != fault.births and not (fault.more_births and result.births > fault.births):
        missed.append(f"{result.births} workers were born")


def judge_times(fault: Fault, result: Result) -> None:
    """The same of the times, which depend on the machine, too."""
    if fault.in_time and result.slowest_seconds > FIRST_BYTE_SECONDS + result.usual_seconds:
        result.missed.append(f"an answer began after {result.slowest_seconds:.1f} s")
    if result.back_seconds > BACK_SECONDS:
        result.missed.append(f"{result.back_seconds:.1f} s until every request was booked again")
