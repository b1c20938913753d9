"""Measures what the report shows: a function for each picture, all of them on a server of the lab's own."""

import itertools
import os
import platform
import random
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from backends import open_backend
from backends.budgets import Budget
from backends.contract import Ask, Reservation
from backends.errors import StoreBusy
from backends.progress import Progress
from backends.store.link import Link
from flaskapp.lab.explorer import Step, explore
from flaskapp.lab.prefilled_books import leave_as_after
from flaskapp.lab.race import (
    AMPLE_NANOUSD,
    CLOCK,
    COST_NANOUSD,
    PENDING_SECONDS,
    TIMEOUT_SECONDS,
    Plan,
    RaceResult,
    Start,
    at_distance,
    race,
    window_alone,
)
from flaskapp.lab.wire import TRANSACTION_WORDS, only_reads

CONCURRENCIES = (5, 10, 20, 40, 80)
RTTS_MS = (0.0, 1.0, 5.0)
IN_WINDOW = (10, 100, 1_000, 10_000, 100_000, 1_000_000)
CALLERS = 16
THROUGHPUT_SECONDS = 0.6
BLOCKS, BLOCK = 5, 60


@dataclass(frozen=True, slots=True)
class Overspend:
    """Dollars spent for each dollar of the limit, by callers at once."""

    backend: str
    was_held: bool
    concurrency: int
    room: int
    spent_to_limit: float


@dataclass(frozen=True, slots=True)
class Throughput:
    """Decisions a second of some callers at once."""

    backend: str
    rtt_ms: float
    a_second: float


@dataclass(frozen=True, slots=True)
class ServerTime:
    """What Redis' process works for one decision."""

    backend: str
    in_window: int
    us: float


def overspends(url: str, names: Sequence[str], plan: Plan, progress: Progress) -> list[Overspend]:
    """Overspend at each concurrency, with callers held in their gap and with callers that only start together."""
    found = []
    for number, concurrency in enumerate(CONCURRENCIES):
        progress("overspend against concurrency", number, len(CONCURRENCIES))
        room = min(plan.room, concurrency - 1)
        held = replace(plan, requests=concurrency, room=room, rounds=1, timed_requests=2, think_ms=None)
        results = race(url, names, held)
        lucky = [result.backend for result in results if result.was_held]
        if lucky:
            results += race(url, lucky, replace(held, rounds=3, think_ms=0.0))
        found += [
            Overspend(each.backend, each.was_held, concurrency, room, each.spent_nanousd / each.limit_nanousd)
            for each in results
        ]
    return found


def distances(url: str, names: Sequence[str], plan: Plan, progress: Progress) -> list[RaceResult]:
    """Race at each distance: round trips, and the time of the check."""
    its_plan = replace(plan, rounds=1, think_ms=None)
    return [each for rtt in RTTS_MS for each in race(url, names, its_plan, rtt_ms=rtt, progress=progress)]


def throughputs(url: str, names: Sequence[str], progress: Progress) -> list[Throughput]:
    """Decisions a second of `CALLERS` threads, each with an identifier of its own."""
    found = []
    for number, (rtt_ms, name) in enumerate(itertools.product(RTTS_MS, names)):
        progress("throughput", number, len(RTTS_MS) * len(names))
        with at_distance(url, rtt_ms) as its_url:
            link = Link(its_url, clock=CLOCK, timeout_seconds=TIMEOUT_SECONDS, pool_size=CALLERS)
            with closing(link):
                found.append(Throughput(name, rtt_ms, _a_second(link, name)))
    return found


def _a_second(link: Link, name: str) -> float:
    backend, serial, start = open_backend(name, link, CLOCK), itertools.count(), Start(CALLERS)

    def decide(who: str) -> int:
        backend.reserve(_ask(f"{who}-warm-{next(serial)}", who))
        start.wait()
        done = 0
        while start.elapsed_ms() < THROUGHPUT_SECONDS * 1_000:
            try:
                backend.reserve(_ask(f"{who}-{next(serial)}", who))
            except StoreBusy:
                # It lost against the others each time: no decision.
                continue
            done += 1
        return done

    with ThreadPoolExecutor(CALLERS) as callers:
        return sum(callers.map(decide, [f"through-{name}-{number}" for number in range(CALLERS)])) / THROUGHPUT_SECONDS


def server_times(link: Link, names: Sequence[str], seed: int, progress: Progress) -> list[ServerTime]:
    """Processor time of the server's process for one decision; blocks of them in turns, the median of the blocks."""
    its_random = random.Random(seed)  # noqa: S311 (seeded on purpose)
    serial = itertools.count()
    found = []
    for number, (in_window, name) in enumerate(itertools.product(IN_WINDOW, names)):
        progress("server time a decision", number, len(IN_WINDOW) * len(names))
        backend, blocks_us, who = open_backend(name, link, CLOCK), [], f"server-{name}-{in_window}"
        for _ in range(BLOCKS):
            leave_as_after(link, _budgets(who), in_window, its_random)
            backend.reserve(_ask(f"{who}-{next(serial)}", who))
            before_us = _worked_us(link)
            for _ in range(BLOCK):
                _admitted(backend.reserve(_ask(f"{who}-{next(serial)}", who)))
            blocks_us.append((_worked_us(link) - before_us) / BLOCK)
        found.append(ServerTime(name, in_window, median(blocks_us)))
    return found


def _worked_us(link: Link) -> float:
    cpu: dict[str, Any] = link.run(lambda client: client.info("cpu"))
    return float(cpu["used_cpu_user"] + cpu["used_cpu_sys"]) * 1e6


def _ask(rid: str, who: str) -> Ask:
    return Ask(rid, COST_NANOUSD, _budgets(who), PENDING_SECONDS)


def _budgets(who: str) -> tuple[Budget, ...]:
    return window_alone(AMPLE_NANOUSD, who, network=f"net-{who}")


def _admitted(verdict: object) -> None:
    if not isinstance(verdict, Reservation):
        raise TypeError(f"refused, though there is room: {verdict}")


@dataclass(frozen=True, slots=True)
class Block:
    """Commands that one caller sends while the other waits."""

    caller: str
    does: str
    """`check`: it only reads; `check_on`: it reads the rest, after a break; `record`: it writes."""
    reads: int
    writes: int
    window_nanousd: int
    """What the window holds when it is over."""


@dataclass(frozen=True, slots=True)
class FailingOrder:
    """One order of two callers that overspends; room for one of them."""

    backend: str
    number: int
    """For `flask explore --replay`."""
    orders: int
    """How many there are, up to commuting commands."""
    overspending_orders: int
    blocks: tuple[Block, ...]
    cost_nanousd: int
    limit_nanousd: int


_CHARGE = re.compile(r"ZINCRBY llm:cost:recent:\S+ (-?[0-9]+) ")


def failing_order(url: str, name: str) -> FailingOrder | None:
    """The order of two callers that overspends with the fewest switches; None where none overspends."""
    found = explore(url, name)
    if found.shortest is None or found.shortest_number is None:
        return None
    return FailingOrder(
        backend=name,
        number=found.shortest_number,
        orders=found.reduced_orders,
        overspending_orders=found.overspending_orders,
        blocks=tuple(_blocks(found.shortest)),
        cost_nanousd=COST_NANOUSD,
        limit_nanousd=found.limit_nanousd,
    )


def _blocks(steps: Sequence[Step]) -> Iterator[Block]:
    """Turns of one caller without a break. Until it has written, its reads are a block apart from its writes."""
    window_nanousd, has_read, has_written = 0, set[str](), set[str]()
    for caller, turn in itertools.groupby(steps, key=lambda step: step.caller):
        commands = [_words_of(step) for step in turn]
        reads = (
            [] if caller in has_written else list(itertools.takewhile(lambda step: all(map(_is_read, step)), commands))
        )
        for part in (reads, commands[len(reads) :]):
            if not part:
                continue
            flat = [command for commands_of_step in part for command in commands_of_step]
            writes = [command for command in flat if not _is_read(command)]
            window_nanousd += sum(int(charge) for command in writes for charge in _CHARGE.findall(f"{command} "))
            does = "record" if writes else "check_on" if caller in has_read else "check"
            yield Block(caller, does, len(flat) - len(writes), len(writes), window_nanousd)
            (has_written if writes else has_read).add(caller)


def _words_of(step: Step) -> list[str]:
    """The commands of one step; of a transaction, those in it."""
    commands = step.command.split("; ")
    return [command for command in commands if _name_of(command) not in TRANSACTION_WORDS] or commands


def _is_read(command: str) -> bool:
    return only_reads(_name_of(command))


def _name_of(command: str) -> bytes:
    return command.partition(" ")[0].encode()


def about(link: Link, seed: int) -> dict[str, str]:
    """Machine, versions, seed, time, and the command that made the figures."""
    return {
        "command": shlex.join(["flask", *sys.argv[1:]]),
        "machine": machine(),
        "server": f"{server_of(link)} on loopback",
        "python": platform.python_version(),
        "tollgate": version("llm-tollgate"),
        "redis-py": version("redis"),
        "hiredis": version("hiredis"),
        "gunicorn": version("gunicorn"),
        "seed": str(seed),
        "measured": datetime.fromtimestamp(CLOCK.now_us() / 1e6, UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def machine() -> str:
    """Processor, cores and system."""
    return f"{_processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"


def server_of(link: Link) -> str:
    """The server's name and version."""
    server: dict[str, Any] = link.run(lambda client: client.info("server"))
    return f"{server.get('server_name', 'redis')} {server.get('valkey_version') or server['redis_version']}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "processor unknown"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "processor unknown")
