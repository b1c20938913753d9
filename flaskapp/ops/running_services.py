"""What the services of this clone were started with, for the commands that run beside them.

`run-dev.sh` notes it down while they run on the embedded Redis, where such commands find it: a shell beside them has
neither their mode nor their variables.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from flaskapp.settings import settings_table

_NOTED = {
    "ENVIRONMENT",
    "DEBUG",
    "STREAM_DEADLINE_SECONDS",
    "BUDGET_TIME_ZONE",
    *(row.variable for row in settings_table().values()),
}
"""What settings fall back to; no secret is among them."""


@dataclass(frozen=True, slots=True)
class RunningService:
    """A service that runs."""

    port: int
    variables: Mapping[str, str]


@contextmanager
def note_service(data_dir: Path, port: int, environment: Mapping[str, str]) -> Iterator[None]:
    """Note a service down for as long as this lasts."""
    place = _notes(data_dir) / f"{port}.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    variables = {name: text for name, text in environment.items() if name in _NOTED}
    place.write_text(json.dumps({"pid": os.getpid(), "variables": variables}), encoding="utf-8")
    try:
        yield
    finally:
        place.unlink(missing_ok=True)


def running_services(data_dir: Path) -> list[RunningService]:
    """The services that run, the one that was started last first; none where another user's are not to be seen."""
    found: list[RunningService] = []
    places: list[Path] = []
    with suppress(OSError):
        places = sorted(_notes(data_dir).glob("*.json"), key=_started_at, reverse=True)
    for place in places:
        # It may end at any moment, and one that was killed has left its note behind.
        with suppress(OSError, ValueError, KeyError, TypeError, OverflowError):
            note = json.loads(place.read_text(encoding="utf-8"))
            os.kill(note["pid"], 0)
            found.append(RunningService(int(place.stem), note["variables"]))
    return found


def _notes(data_dir: Path) -> Path:
    return data_dir / "served"


def _started_at(place: Path) -> int:
    try:
        return place.stat().st_mtime_ns
    except OSError:
        return 0
