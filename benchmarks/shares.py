"""How long everybody's hour lasts under attack, and what it leaves for a newcomer:  python -m benchmarks.shares

Attackers take as much as they can in every minute of an hour, each answer from a fresh fingerprint and at the highest
cost. At the end of each minute a newcomer's network asks how much it could spend. The decisions are the service's own,
with its default limits, in memory and with a clock of their own: no figure depends on the machine.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Network

from backends import Ask, Reason, Refusal, Reservation, Scope, Verdict
from backends.money import NANOUSD_PER_USD, usd_text
from backends.strategies.memory import MemoryBackend
from flaskapp.http.networks import IPV6_PREFIX, network_of, wide_network_of
from flaskapp.settings import LiveSettings

US_PER_MINUTE = 60_000_000
START_US = 1_767_225_600_000_000
"""The first moment of an hour, and of a day."""
MINUTES = 60
ANSWER_NANOUSD = 4_192_500
"""The most that a short question to the default model can cost."""
NEWCOMER = "203.0.113.9"
SHARES = ("1", "0.25")
MANY_USD = "1000"
UNTIL_THE_END = {Reason.NETWORK_SHARE, Reason.GLOBAL_HOURLY_LIMIT}
"""Reasons of refusals that last until the hour is over, since all that is taken is used."""


class Clock:
    """A clock that is set by hand."""

    us = START_US

    def now_us(self) -> int:
        return self.us

    def monotonic_seconds(self) -> float:
        return self.us / 1_000_000


@dataclass(frozen=True)
class Course:
    """How one attack went."""

    attack: str
    share: str
    left_nanousd: tuple[int, ...]
    """For a newcomer, at the end of each minute."""
    taken_nanousd: int
    """By the attackers, in the hour."""

    @property
    def closed_after_minutes(self) -> int | None:
        """When a newcomer got no answer for the first time; None if it always got one."""
        closed = (minute for minute, left in enumerate(self.left_nanousd, 1) if left < ANSWER_NANOUSD)
        return next(closed, None)


def attacks() -> Mapping[str, tuple[str, ...]]:
    """The addresses of each attack."""
    wide = IPv6Network("2001:db8:1::/48")
    # Each in a /24 of its own, as rented machines are.
    rented = (str(IPv4Address("198.18.0.1") + 256 * number) for number in range(1_000))
    return {
        "one /56": (str(wide.network_address),),
        "one /48": tuple(str(each.network_address) for each in wide.subnets(new_prefix=IPV6_PREFIX)),
        "1,000 addresses": tuple(rented),
    }


def course_of(attack: str, addresses: tuple[str, ...], share: str) -> Course:
    """Let them attack for an hour."""
    clock = Clock()
    # A fingerprint's own limits are no hindrance: a fresh one costs nothing.
    settings = LiveSettings(network_share=share, high_cost_threshold_usd=MANY_USD, daily_cost_limit_usd=MANY_USD)
    asker = _Asker(MemoryBackend(clock), settings)
    left, taken, attackers = [], 0, list(addresses)
    for minute in range(MINUTES):
        clock.us = START_US + minute * US_PER_MINUTE
        for address in tuple(attackers):
            while (reason := asker.spend(address)) is None:
                taken += ANSWER_NANOUSD
            # What refuses until the hour or the day is over need not be asked again.
            if reason in UNTIL_THE_END:
                attackers.remove(address)
        clock.us += US_PER_MINUTE - 1
        left.append(asker.room(NEWCOMER))
    return Course(attack, share, tuple(left), taken)


class _Asker:
    def __init__(self, backend: MemoryBackend, settings: LiveSettings) -> None:
        self._backend = backend
        self._settings = settings
        self._ids: Iterator[int] = itertools.count()

    def spend(self, address: str) -> Reason | None:
        """One answer, used to the last nano-dollar; why it is refused, where it is."""
        verdict = self._reserve(address, ANSWER_NANOUSD)
        if isinstance(verdict, Reservation):
            self._backend.settle(verdict, ANSWER_NANOUSD)
        return verdict.reason if isinstance(verdict, Refusal) else None

    def room(self, address: str) -> int:
        """How much all callers of that network could spend now."""
        verdict = self._reserve(address, NANOUSD_PER_USD, at_least_nanousd=1)
        if not isinstance(verdict, Reservation):
            return 0
        self._backend.release(verdict)
        return verdict.cost_nanousd

    def _reserve(self, address: str, cost_nanousd: int, at_least_nanousd: int | None = None) -> Verdict:
        number, network = next(self._ids), network_of(address, IPV6_PREFIX)
        owners = {
            Scope.IDENTIFIER: f"fresh-{number}",
            Scope.NETWORK: network,
            Scope.WIDE_NETWORK: wide_network_of(network),
        }
        budgets = self._settings.plan.of(owners, START_US)
        return self._backend.reserve(Ask(f"r{number}", cost_nanousd, budgets, at_least_nanousd=at_least_nanousd))


def main() -> int:
    """Print every attack beside every share."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shares", description=__doc__)
    parser.add_argument("--shares", default=",".join(SHARES), help="values of NETWORK_SHARE, with commas between them")
    parser.add_argument("--json", action="store_true", help="all minutes, for programs")
    arguments = parser.parse_args()
    courses = [
        course_of(attack, addresses, share)
        for attack, addresses in attacks().items()
        for share in arguments.shares.split(",")
    ]
    print(_json(courses) if arguments.json else _table(courses))
    return 0


def _table(courses: list[Course]) -> str:
    shown = (1, 2, 5, 10, 20, 30, 40, 50, 60)
    rows = [["attack", "share", "taken $", "closed after", *(f"{minute} min" for minute in shown)]]
    for course in courses:
        after = course.closed_after_minutes
        left = (usd_text(course.left_nanousd[minute - 1])[:7] for minute in shown)
        rows.append(
            [
                course.attack,
                course.share,
                usd_text(course.taken_nanousd)[:6],
                "never" if after is None else f"{after} min",
                *left,
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(["what a newcomer's network could spend at the end of a minute, $:", *lines])


def _json(courses: list[Course]) -> str:
    return json.dumps(
        [
            {
                "attack": course.attack,
                "share": course.share,
                "taken_usd": usd_text(course.taken_nanousd),
                "closed_after_minutes": course.closed_after_minutes,
                "left_usd": list(map(usd_text, course.left_nanousd)),
            }
            for course in courses
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
