"""The emergency budget: what an instance may spend in a UTC hour while Redis is away.

It is kept in a file that all workers of the instance share under a lock, so neither a restart nor a second outage
refills it. A file that cannot be read or written counts as used up.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from backends.clock import Clock
from backends.guard.locked_page import locked_page

_US_PER_HOUR = 3_600_000_000
_PAGE_BYTES = 120
LEASES = 16
LEAST_LEASE_NANOUSD = 8_000_000
"""A smaller one is not worth what it keeps from the other workers."""


@dataclass(frozen=True, slots=True)
class _Page:
    hour: int
    spent_nanousd: int
    refused_nanousd: int = 0
    """The cheapest request that was refused in this hour; 0 without one."""


class EmergencyBudget:
    """Spends from the file at `path`. Nothing is kept in memory."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self._path = path
        self._clock = clock

    def take(self, cost_nanousd: int, budget_nanousd: int) -> int | None:
        """Charge `cost_nanousd` to this hour; its number since 1970, or None where the budget has too little left."""
        with contextlib.suppress(OSError, ValueError), self._page() as (page, write):
            if page.spent_nanousd + cost_nanousd <= budget_nanousd:
                write(replace(page, spent_nanousd=page.spent_nanousd + cost_nanousd))
                return page.hour
            if not page.refused_nanousd or cost_nanousd < page.refused_nanousd:
                write(replace(page, refused_nanousd=cost_nanousd))
        return None

    def lease(self, need_nanousd: int, budget_nanousd: int) -> tuple[int, int, int] | None:
        """Charge `need_nanousd` and a lease beside it, which a worker spends without this file.

        A lease is a sixteenth of what is left, as long as that is much: at the end every worker takes what it needs.

        Returns:
            The hour, all that is charged, and the lease of that; None where nothing is.
        """
        with contextlib.suppress(OSError, ValueError), self._page() as (page, write):
            left_nanousd = budget_nanousd - page.spent_nanousd
            lease_nanousd = left_nanousd // LEASES
            if lease_nanousd < max(LEAST_LEASE_NANOUSD, 2 * need_nanousd):
                lease_nanousd = 0
            charged_nanousd = need_nanousd + lease_nanousd
            if 0 < charged_nanousd <= left_nanousd:
                write(replace(page, spent_nanousd=page.spent_nanousd + charged_nanousd))
                return page.hour, charged_nanousd, lease_nanousd
            if need_nanousd and (not page.refused_nanousd or need_nanousd < page.refused_nanousd):
                write(replace(page, refused_nanousd=need_nanousd))
        return None

    def hour_now(self) -> int:
        """The number of this hour since 1970."""
        return self._clock.now_us() // _US_PER_HOUR

    def prepare(self, budget_nanousd: int) -> None:
        """Does nothing: nothing is leased."""

    def close(self) -> None:
        """Does nothing, for the same reason."""

    def correct(self, hour: int, delta_nanousd: int) -> None:
        """Add the difference between what was taken in `hour` and what was used, unless that hour is over."""
        with contextlib.suppress(OSError, ValueError), self._page() as (page, write):
            if page.hour == hour:
                write(replace(page, spent_nanousd=max(0, page.spent_nanousd + delta_nanousd)))

    def spent_nanousd(self) -> int | None:
        """What this hour has cost so far; None if the file cannot be read."""
        page = self._read()
        return None if page is None else page.spent_nanousd

    def is_used_up(self, budget_nanousd: int) -> bool:
        """Whether nothing is left, or too little for the cheapest request that was refused in this hour."""
        page = self._read()
        return page is None or page.spent_nanousd + max(1, page.refused_nanousd) > budget_nanousd

    def _read(self) -> _Page | None:
        with contextlib.suppress(OSError, ValueError), self._page() as (page, _):
            return page
        return None

    @contextlib.contextmanager
    def _page(self) -> Iterator[tuple[_Page, Callable[[_Page], None]]]:
        with locked_page(self._path, _PAGE_BYTES) as file:
            page = _current(file.text, self.hour_now(), file.written_us // _US_PER_HOUR)
            yield page, lambda page: file.write(json.dumps(asdict(page)).encode())


def _current(text: bytes, hour: int, written_hour: int) -> _Page:
    try:
        page = _read_page(text) if text else _Page(hour, 0)
    except ValueError:
        if written_hour >= hour:
            raise
        # The budget of the hour that spoilt the file counted as used up; a new hour begins anew.
        return _Page(hour, 0)
    # A clock that went back must not refill the budget.
    return page if page.hour >= hour else _Page(hour, 0)


def _read_page(text: bytes) -> _Page:
    stored = json.loads(text)
    if not isinstance(stored, dict) or not all(isinstance(stored.get(each.name), int) for each in fields(_Page)):
        raise ValueError("not a page of the emergency budget")
    return _Page(**{each.name: stored[each.name] for each in fields(_Page)})
