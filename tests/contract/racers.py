"""Callers in processes of their own, let go at one moment. Imported by the processes that `test_race` starts."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

from backends.clock import SystemClock
from backends.contract import Ask, Reservation
from backends.store.link import Link
from backends.strategies.atomic import AtomicBackend
from backends.strategies.legacy import LegacyBackend
from flaskapp.lab.wire import Wire

PATIENCE_SECONDS = 30


@dataclass(frozen=True)
class Race:
    """What one process does: all of `asks` at once, each on the strategy of its place in `names`."""

    url: str
    names: tuple[str, ...]
    asks: tuple[Ask, ...]
    hold_legacy: bool


def run(race, start):
    """How many were admitted; `start` is a barrier of all processes."""
    callers = len(race.asks)
    begin = threading.Barrier(callers, action=lambda: start.wait(PATIENCE_SECONDS))
    between = threading.Barrier(callers, action=lambda: start.wait(PATIENCE_SECONDS))
    wire = Wire()
    link = Link(race.url, clock=SystemClock(), timeout_seconds=10, pool_size=callers, before_each_send=wire)
    backends = {"atomic": AtomicBackend(link), "legacy": LegacyBackend(link, SystemClock())}

    def call(name, ask):
        begin.wait(PATIENCE_SECONDS)
        is_held = race.hold_legacy and name == "legacy"
        with wire.before_first_write(lambda: between.wait(PATIENCE_SECONDS)) if is_held else nullcontext():
            return isinstance(backends[name].reserve(ask), Reservation)

    with ThreadPoolExecutor(callers) as threads:
        admitted = list(threads.map(call, race.names, race.asks))
    link.close()
    return sum(admitted)
