"""The race as the dashboard runs it: a process of its own, on a Redis of its own, one at a time and bounded.

What it prints, a line of JSON each round, is passed on as it comes.
"""

import fcntl
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from flaskapp.config import child_environment
from flaskapp.ops.processes import end_process
from flaskapp.value_types import Whole

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = "legacy,atomic"
MAX_SECONDS = 120.0
STOP_SECONDS = 10.0
FIELDS = {
    "requests": Whole("Callers at once", minimum=2, maximum=40),
    "room": Whole("Room for", minimum=1, maximum=39),
    "rounds": Whole("Rounds", minimum=1, maximum=20),
    "rtt": Whole("Redis farther away by", unit="milliseconds", minimum=0, maximum=10),
}
"""The fields of the form, with bounds such that a race is over in about a minute."""
DEFAULTS = {"requests": 10, "room": 4, "rounds": 5, "rtt": 1}


class RaceRefused(ValueError):
    """The form is no race; the text names what is allowed."""


class RaceRuns(Exception):
    """Another race runs."""


def start_race(data_dir: Path, form: Mapping[str, str]) -> "RunningRace":
    """Begin a race, one at a time for all workers of this instance; their lock is in `data_dir`.

    Raises:
        RaceRefused: the form is no race.
        RaceRuns: one runs already.
    """
    asked = {name: _number(name, form.get(name, "")) for name in FIELDS}
    if asked["room"] >= asked["requests"]:
        raise RaceRefused("room: fewer than the callers, or there is no race")
    data_dir.mkdir(parents=True, exist_ok=True)
    # A lock that ends with the process that holds it, for whatever reason. The process of the race holds it on.
    with (data_dir / "race.lock").open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RaceRuns from error
        return RunningRace(lock.fileno(), [f"--{name}={number}" for name, number in asked.items()])


class RunningRace:
    """One race, and what it prints."""

    def __init__(self, lock: int, options: list[str]) -> None:
        self._process = subprocess.Popen(  # noqa: S603 (our own interpreter; the options are numbers)
            [sys.executable, "-m", "flaskapp.lab", "--events", f"--backends={BACKENDS}", *options],
            env=child_environment() | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(lock,),
            text=True,
            start_new_session=True,
        )
        self._end = threading.Timer(MAX_SECONDS, self._process.kill)
        self._end.daemon = True
        self._end.start()

    def lines(self) -> Iterator[str]:
        """A line of JSON each round, then one of all figures; or one with `error`."""
        if self._process.stdout is None or self._process.stderr is None:
            return
        yield from self._process.stdout
        status = self._process.wait()
        if status not in {0, 1}:
            error = (self._process.stderr.read().strip().splitlines() or ["The race ended without a word."])[-1]
            if status == -signal.SIGKILL:
                error = f"The race was ended after {MAX_SECONDS:.0f} seconds: let fewer callers run, or fewer rounds."
            yield json.dumps({"error": error}) + "\n"

    def close(self) -> None:
        """End it, and all that it started, if it has not ended. A second call does nothing."""
        self._end.cancel()
        end_process(self._process, STOP_SECONDS, signal.SIGINT)
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


def _number(name: str, text: str) -> int:
    value_type = FIELDS[name]
    try:
        return value_type.read_text(text)
    except ValueError:
        raise RaceRefused(f"{name}: {value_type.allowed}") from None
