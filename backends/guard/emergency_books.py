"""What an instance has spent of its emergency budgets, hour by hour, and what of that the store has booked.

A lease counts as spent in `EmergencyBudget`, and here only what was lent of it counts. The file outlives the workers,
so that what a killed one has spent is booked too.
"""

import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path

from backends.guard.locked_page import locked_page

_BYTES = 4_096
MOST_HOURS = 50
"""Two days: what is older is in no total any more."""


@dataclass(frozen=True, slots=True)
class HourSpent:
    """What was spent in one UTC hour."""

    hour: int
    """Its number since 1970."""
    nanousd: int
    edition: int
    """It grows with each change: the store takes a later one for an earlier one, and never the other way round."""
    booked_edition: int = 0
    """What the store is known to have booked; 0 is nothing."""

    @property
    def is_booked(self) -> bool:
        """Whether the store has all of it."""
        return self.booked_edition >= self.edition


@dataclass(frozen=True, slots=True)
class _Spent:
    instance: str
    """Names the file to the store: one that is lost, and made anew, has another name."""
    hours: Mapping[int, HourSpent] = field(default_factory=dict)


class EmergencyBooks:
    """The file at `path`. Its methods raise `OSError` where it cannot be used."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, changes_nanousd: Mapping[int, int]) -> None:
        """Add to what was spent, by hour."""
        with locked_page(self._path, _BYTES) as page:
            spent = _read(page.text)
            hours = dict(spent.hours)
            for hour, change_nanousd in changes_nanousd.items():
                before = hours.get(hour, HourSpent(hour, 0, 0))
                nanousd = max(0, before.nanousd + change_nanousd)
                if nanousd != before.nanousd:
                    hours[hour] = replace(before, nanousd=nanousd, edition=before.edition + 1)
            page.write(_text(spent.instance, hours.values()))

    def unbooked(self) -> tuple[str, list[HourSpent]]:
        """The name of this file to the store, and the hours that it has not booked yet as they are now.

        A file that is not there is made: in an outage its disk may be full.
        """
        with locked_page(self._path, _BYTES) as page:
            spent = _read(page.text)
            if not page.text:
                page.write(_text(spent.instance, ()))
        return spent.instance, [each for each in spent.hours.values() if not each.is_booked]

    def remember(self, booked: Iterable[HourSpent]) -> None:
        """Note that the store has booked these."""
        with locked_page(self._path, _BYTES) as page:
            spent = _read(page.text)
            hours = dict(spent.hours)
            for each in booked:
                if each.hour in hours:
                    edition = max(each.edition, hours[each.hour].booked_edition)
                    hours[each.hour] = replace(hours[each.hour], booked_edition=edition)
            page.write(_text(spent.instance, hours.values()))


def _text(instance: str, hours: Iterable[HourSpent]) -> bytes:
    # What is booked goes first, and of that the oldest.
    latest = sorted(hours, key=lambda each: (not each.is_booked, each.hour))[-MOST_HOURS:]
    return json.dumps({"instance": instance, "hours": [astuple(each) for each in latest]}).encode()


def _read(text: bytes) -> _Spent:
    """What a file says; one that says nothing begins anew, under another name."""
    try:
        stored = json.loads(text)
        hours = [HourSpent(*map(int, each)) for each in stored["hours"]]
        return _Spent(str(stored["instance"]), {each.hour: each for each in hours})
    except (ValueError, LookupError, TypeError):
        return _Spent(secrets.token_hex(8))
