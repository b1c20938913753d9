"""What Redis itself says that a script took: of today's scripts, and of those of before, in alternating blocks."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from statistics import median
from types import ModuleType
from typing import Any, NamedTuple

from backends import Ask, Budget, Calendar, Reservation, Scope, Share
from backends.keys import rows_at, running_key
from backends.strategies import arithmetic, outcomes, script_words
from backends.strategies.script_words import Now
from benchmarks import scripts_before
from benchmarks.bench import IN_WINDOW, Bench, six_further, the_six
from benchmarks.measure import Row, at_most
from flaskapp.lab.race import COST_NANOUSD

BLOCK = 100
PATIENCE_US = 60_000_000
FEW, _, FULL = IN_WINDOW
BEFORE = "before budgets were rows"
NOW_TO_BEFORE, FULL_TO_ONE_BUCKET, TWELVE_TO_SIX, WITH_SHARES_TO_WITHOUT = 1.0, 1.15, 1.6, 1.25
SCRIPTS = {script_words: ("backends", "lua"), scripts_before: ("benchmarks", "scripts_before")}
"""Where the scripts of each time are, by what makes their words."""


class Contender(NamedTuple):
    """What is measured in a block, and what is done before it."""

    begin: Callable[[], None]
    call: Callable[[], object]


class Scripts:
    """The scripts of one time, sent word by word, without a strategy around them."""

    def __init__(self, bench: Bench, words: ModuleType) -> None:
        self._bench = bench
        self._words = words
        package, directory = SCRIPTS[words]
        place = resources.files(package).joinpath(directory)
        self._digests = {
            name: bench.raw.script_load(place.joinpath(f"{name}.lua").read_text(encoding="utf-8"))
            for name in ("reserve", "extend", "settle")
        }

    def reserve(self, ask: Ask) -> Reservation:
        digest = outcomes.request_digest_of(ask)
        reply = self._run("reserve", self._words.reserve_call(ask, _now()))
        made_at_us = reply[3]
        return Reservation(
            ask.reservation_id, ask.cost_nanousd, ask.budgets, digest, made_at_us, ask.pending_seconds, "atomic"
        )

    def extend(self, made: Reservation) -> None:
        to = made.cost_nanousd + COST_NANOUSD // 4
        self._run("extend", self._words.extend_call(made, to, to, made.budgets, _now()))

    def settle(self, made: Reservation) -> None:
        self._run("settle", self._words.settle_call(made, "settled", COST_NANOUSD // 4, ""))

    def _run(self, name: str, words: Sequence[Any]) -> Sequence[int]:
        keys, args = words[:2]
        reply: Sequence[int] = self._bench.raw.evalsha(self._digests[name], len(keys), *keys, *args)
        if reply[0] != arithmetic.ADMITTED:
            raise TypeError(f"{name} was answered {reply}, though there is room")
        return reply


def _now() -> Now:
    us = time.time_ns() // 1_000
    return Now("", us, us + PATIENCE_US)


def server_time_of_the_scripts(bench: Bench) -> Iterator[Row]:
    """Reserve by what is in the window, by the number of budgets, and all three scripts beside those of before."""
    now, before = Scripts(bench, script_words), Scripts(bench, scripts_before)
    contenders = {f"now, {requests}": _reserves(bench, now, requests) for requests in IN_WINDOW}
    contenders |= {f"before, {requests}": _reserves(bench, before, requests) for requests in (FEW, FULL)}
    contenders["12 budgets"] = _reserves(bench, now, FULL, six_further)
    contenders |= {name: _reserves_as_the_service(bench, now, name) for name in ("with shares", "without shares")}
    contenders["unnoted"] = _reserves_unnoted(bench, now)
    for name in ("extend", "settle"):
        contenders[f"{name}, now"] = _follows(bench, now, name)
        contenders[f"{name}, before"] = _follows(bench, before, name)
    us = _medians_us(bench, contenders)
    reserve = "server time of reserve"
    for requests in IN_WINDOW:
        limit = FULL_TO_ONE_BUCKET if requests == FULL else None
        one_bucket = f"{FEW} in the window", us[f"now, {FEW}"]
        yield at_most(f"{reserve}, {requests:,} in the window", us[f"now, {requests}"], one_bucket, limit)
    six = "the six alone", us[f"now, {FULL}"]
    yield at_most(f"{reserve}, 12 budgets, windows full", us["12 budgets"], six, TWELVE_TO_SIX)
    without = "without shares", us["without shares"]
    yield at_most(
        f"{reserve}, ten budgets with four shares, windows full", us["with shares"], without, WITH_SHARES_TO_WITHOUT
    )
    full_before = BEFORE, us[f"before, {FULL}"]
    yield at_most(f"{reserve}, windows full", us[f"now, {FULL}"], full_before, NOW_TO_BEFORE)
    yield at_most(f"{reserve}, windows full, first of a bucket", us["unnoted"], full_before, None)
    yield at_most(f"{reserve}, one bucket", us[f"now, {FEW}"], (BEFORE, us[f"before, {FEW}"]), None)
    for name in ("extend", "settle"):
        its_before = BEFORE, us[f"{name}, before"]
        yield at_most(f"server time of {name}, windows full", us[f"{name}, now"], its_before, None)


def _reserves(
    bench: Bench, scripts: Scripts, requests: int, further_of: Callable[[str], Sequence[Budget]] = lambda _: ()
) -> Contender:
    who = f"server-{requests}"
    further = further_of(who)

    def begin() -> None:
        bench.leave_as_after(requests, who, further)
        scripts.reserve(bench.ask(who, further))

    return Contender(begin, lambda: scripts.reserve(bench.ask(who, further)))


def _reserves_as_the_service(bench: Bench, scripts: Scripts, name: str) -> Contender:
    """Charged to the six and to what the service adds for networks: the same budgets with and without shares."""
    who = f"server-{name}"
    six = the_six(who)
    network_window, network_day = six[2:4]
    wide = {"owner": f"wide-{who}", "scope": Scope.WIDE_NETWORK}
    budgets = [
        *six,
        network_window._replace(name="wide_window", **wide),
        network_day._replace(name="wide_day", **wide),
        Budget("network_share_hour", network_day.owner, Calendar("hour"), None, Scope.NETWORK),
        Budget("wide_share_hour", period=Calendar("hour"), limit_nanousd=None, **wide),
    ]
    if name == "with shares":
        for at, of in {3: "global_day", 7: "global_day", 8: "global_hour", 9: "global_hour"}.items():
            budgets[at] = budgets[at]._replace(share=Share(of, 250_000))
    return Contender(
        lambda: bench.leave_as_after(FULL, who, budgets[6:]),
        lambda: scripts.reserve(replace(bench.ask(who), budgets=tuple(budgets))),
    )


def _reserves_unnoted(bench: Bench, scripts: Scripts) -> Contender:
    """As the first charge of each bucket: nothing says what the windows came to, so they are read."""
    who = f"server-{FULL}"
    windows = [row.key for row in rows_at(the_six(who), int(time.time())) if row.layout.window_seconds]
    notes = list(map(running_key, windows))

    def call() -> None:
        bench.raw.delete(*notes)
        scripts.reserve(bench.ask(who))

    return Contender(lambda: bench.leave_as_after(FULL, who), call)


def _follows(bench: Bench, scripts: Scripts, name: str) -> Contender:
    """What comes after a reservation: each of a block has one of its own."""
    who, made = f"server-{FULL}", list[Reservation]()
    verb: Callable[[Reservation], None] = getattr(scripts, name)

    def begin() -> None:
        bench.leave_as_after(FULL, who)
        made.extend(scripts.reserve(bench.ask(who)) for _ in range(BLOCK))

    return Contender(begin, lambda: verb(made.pop()))


def _medians_us(bench: Bench, contenders: Mapping[str, Contender]) -> dict[str, float]:
    blocks_us: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(max(5, bench.turns // 200)):
        for name, contender in contenders.items():
            contender.begin()
            bench.raw.config_resetstat()
            for _ in range(BLOCK):
                contender.call()
            blocks_us[name].append(float(bench.raw.info("commandstats")["cmdstat_evalsha"]["usec_per_call"]))
    return {name: median(taken) for name, taken in blocks_us.items()}
