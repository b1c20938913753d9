"""Strategies that are not what they declare, registered as those of another package would be."""

import sys
from dataclasses import replace
from importlib.metadata import EntryPoint
from types import ModuleType

import backends
from backends import ENTRY_POINT_GROUPS, open_backend
from backends.errors import StoreBusy


def without_limits(ask):
    return replace(ask, budgets=tuple(budget._replace(limit_nanousd=None) for budget in ask.budgets))


class NeverRefuses:
    """Promises atomicity and has no limit."""

    name = "never_refuses"
    promises_atomicity = True

    def __init__(self, link, clock):
        self._real = open_backend("atomic", link, clock)

    def reserve(self, ask):
        return self._real.reserve(without_limits(ask))

    def books(self, *args):
        return self._real.books(*args)


class OneStep:
    """Promises nothing, and decides in one step: it has no gap."""

    name = "one_step"
    promises_atomicity = False

    def __init__(self, link, clock):
        self._link = link
        self._real = open_backend("atomic", link, clock)

    def reserve(self, ask):
        return self._real.reserve(ask)

    def books(self, *args):
        return self._real.books(*args)

    def read(self):
        self._link.run(lambda client: client.get("llm:reservation:another"))


class HasNoRace(OneStep):
    """Promises nothing, is held between a read and its write, and yet never overspends."""

    name = "has_no_race"

    def reserve(self, ask):
        self.read()
        return self._real.reserve(ask)


class GivesUp(HasNoRace):
    """Too busy with others to decide, whenever there are any."""

    name = "gives_up"

    def reserve(self, ask):
        if "warm" in ask.reservation_id or "timed" in ask.reservation_id:
            return self._real.reserve(ask)
        self.read()
        self._link.run(lambda client: client.delete(f"llm:reservation:{ask.reservation_id}"))
        raise StoreBusy("somebody else was faster")


class TriesAgain(HasNoRace):
    """One caller begins to write twice; and it has no limit."""

    name = "tries_again"

    def reserve(self, ask):
        self.read()
        if ask.reservation_id.endswith("-0"):
            self._link.run(lambda client: client.delete(f"llm:reservation:{ask.reservation_id}"))
        return self._real.reserve(without_limits(ask))


def register(monkeypatch):
    module = ModuleType("racers_from_elsewhere")
    points = [point for group in ENTRY_POINT_GROUPS for point in backends.entry_points(group=group)]
    for strategy in (NeverRefuses, OneStep, HasNoRace, GivesUp, TriesAgain):
        setattr(module, strategy.name, _factory(strategy))
        points.append(EntryPoint(strategy.name, f"{module.__name__}:{strategy.name}", ENTRY_POINT_GROUPS[-1]))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(backends, "entry_points", lambda **_: points)


def _factory(strategy):
    def open_it(link, clock, *, decide_by_clock=False):
        return strategy(link, clock)

    return open_it
