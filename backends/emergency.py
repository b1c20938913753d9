"""The emergency budget: what an instance may spend in a UTC hour while Redis is away.

It lives in a file that all workers of the instance share under a lock, so neither a restart nor a second outage refills it.
A file that cannot be read or written counts as used up.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from backends.clock import Clock

_US_PER_HOUR = 3_600_000_000


@dataclass(frozen=True, slots=True)
class _Page:
    hour: int
    spent_nanousd: int


class EmergencyBudget:
    """Spends from the file at `path`; money is integer nano-dollars."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self._path = path
        self._clock = clock

    def take(self, cost_nanousd: int, budget_nanousd: int) -> int | None:
        """Charge `cost_nanousd` to this hour if the budget has room; the hour, or None."""
        with contextlib.suppress(OSError, ValueError), self._page() as (page, write):
            if page.spent_nanousd + cost_nanousd <= budget_nanousd:
                write(_Page(page.hour, page.spent_nanousd + cost_nanousd))
                return page.hour
        return None

    def correct(self, hour: int, delta_nanousd: int) -> None:
        """Book the difference between what was taken in `hour` and what was used; an hour that is over stays as it was."""
        with contextlib.suppress(OSError, ValueError), self._page() as (page, write):
            if page.hour == hour:
                write(_Page(hour, max(0, page.spent_nanousd + delta_nanousd)))

    def spent_nanousd(self) -> int | None:
        """What this hour has cost so far; None if the file cannot be read."""
        try:
            with self._page() as (page, _):
                return page.spent_nanousd
        except (OSError, ValueError):
            return None

    @contextlib.contextmanager
    def _page(self) -> Iterator[tuple[_Page, "_Writer"]]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield _current(file.read(), self._clock.now_us() // _US_PER_HOUR), _Writer(descriptor)


class _Writer:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __call__(self, page: _Page) -> None:
        text = json.dumps({"hour": page.hour, "spent_nanousd": page.spent_nanousd}).encode()
        # Padded to one length and written in place, so that a crash leaves the old page or the new one.
        os.pwrite(self._descriptor, text.ljust(80), 0)
        os.fsync(self._descriptor)


def _current(text: bytes, hour: int) -> _Page:
    if not text:
        return _Page(hour, 0)
    stored = json.loads(text)
    if not isinstance(stored, dict) or not all(isinstance(stored.get(name), int) for name in ("hour", "spent_nanousd")):
        raise ValueError("not a page of the emergency budget")
    page = _Page(stored["hour"], stored["spent_nanousd"])
    # A clock that went back must not refill the budget.
    return page if page.hour >= hour else _Page(hour, 0)
