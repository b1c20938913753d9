"""The benchmarks: each case yields its rows. All run on a server of their own."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from backends import Ask, Backend, Budget, Calendar, Link, Reservation, Scope, open_backend
from backends.keys import WINDOW_BUCKETS, marker_key, record_key, rows_at, running_key
from benchmarks.bench import IN_WINDOW, Bench, the_six
from benchmarks.measure import Row, at_least, at_most, medians_us, placed, placements
from benchmarks.server_time import server_time_of_the_scripts
from flaskapp.lab.delay import delayed
from flaskapp.lab.race import AMPLE_NANOUSD, COST_NANOUSD
from flaskapp.lab.wire import Wire

ATOMIC_TO_NO_OP, LEGACY_TO_ATOMIC, LEGACY_TO_ATOMIC_AT_1_MS = 1.9, 4.0, 5.0
BYTES_AN_IDENTIFIER, BYTES_A_RESERVATION, BYTES_WITH_FURTHER_BUDGETS = 2_048, 200, 300
FURTHER_BUDGETS = 16


def reserve_beside_no_op(bench: Bench) -> Iterator[Row]:
    """A reserve as its caller sees it, beside a script that does nothing, on the same connection."""
    link = bench.link()
    backend = open_backend("atomic", link)
    for placement in placements():
        for requests in IN_WINDOW:
            who = f"reserve-{requests}"
            bench.leave_as_after(requests, who)
            calls = {"no-op": _no_op(bench, link), "reserve": _reserve(bench, backend, who)}
            with placed(bench.pid, placement):
                us = medians_us(calls, bench.turns)
            name = f"reserve, {requests:,} in the window ({_buckets(requests)}){placement}"
            yield at_most(name, us["reserve"], ("no-op EVALSHA", us["no-op"]), ATOMIC_TO_NO_OP)
    link.close()


def _buckets(requests: int) -> str:
    filled = min(requests, WINDOW_BUCKETS + 1)
    return "1 bucket" if filled == 1 else f"{filled} buckets"


def settle_beside_no_op(bench: Bench) -> Iterator[Row]:
    link = bench.link()
    backend = open_backend("atomic", link)
    made: list[Reservation] = []

    def reserve() -> None:
        made.append(_admitted(backend, bench.ask("settle")))

    def settle() -> None:
        backend.settle(made.pop(), COST_NANOUSD // 4)

    for placement in placements():
        bench.leave_as_after(10, "settle")
        with placed(bench.pid, placement):
            us = medians_us({"no-op": _no_op(bench, link), "reserve": reserve, "settle": settle}, bench.turns)
        yield at_most(f"settle (10 buckets){placement}", us["settle"], ("no-op EVALSHA", us["no-op"]), None)
    link.close()


def legacy_beside_atomic(bench: Bench) -> Iterator[Row]:
    """Both strategies on loopback, and with 1 ms to Redis."""
    yield from _legacy_beside_atomic(bench, bench.port, "loopback", bench.turns // 4, LEGACY_TO_ATOMIC)
    with delayed(bench.port, round_trip_us=1_000) as port:
        turns = max(20, bench.turns // 40)
        yield _round_trip(bench, port, turns)
        yield from _legacy_beside_atomic(bench, port, "1 ms to Redis", turns, LEGACY_TO_ATOMIC_AT_1_MS)


def _round_trip(bench: Bench, port: int, turns: int) -> Row:
    near, far = bench.link(), bench.link(port)
    us = medians_us({"near": lambda: near.run(_ping), "far": lambda: far.run(_ping)}, turns)
    near.close()
    far.close()
    return at_most("PING, 1 ms to Redis", us["far"], ("PING, loopback", us["near"]), None)


def _legacy_beside_atomic(bench: Bench, port: int, where: str, turns: int, limit: float) -> Iterator[Row]:
    link, wire = bench.link(port), Wire()
    watched = bench.link(port, wire)
    for who in ("atomic", "legacy"):
        bench.leave_as_after(10, who)
    legacy = open_backend("legacy", watched)

    def check_the_old_way() -> float:
        start = written_at = time.perf_counter()

        def note_the_time() -> None:
            nonlocal written_at
            written_at = time.perf_counter()

        with wire.before_first_write(note_the_time):
            _admitted(legacy, bench.ask("legacy"))
        return written_at - start

    calls = {
        "atomic": _reserve(bench, open_backend("atomic", link), "atomic"),
        "legacy": _reserve(bench, open_backend("legacy", link), "legacy"),
        "check": check_the_old_way,
    }
    us = medians_us(calls, turns)
    link.close()
    watched.close()
    yield at_least(f"reserve, {where}", us["atomic"], ("legacy, check and record", us["legacy"]), limit)
    yield at_least(f"reserve, {where}", us["atomic"], ("legacy, its check alone", us["check"]), None)


def memory(bench: Bench) -> Iterator[Row]:
    """What Redis keeps of an identifier with all buckets filled, of its network, and of one reservation."""
    link = bench.link()
    backend = open_backend("atomic", link)
    who = "memory"
    bench.leave_as_after(1_000_000, who)
    further = [Budget(f"further_{number}", who, Calendar("day"), AMPLE_NANOUSD) for number in range(FURTHER_BUDGETS)]
    alone = _admitted(backend, bench.ask(who))
    bench.raw.set(marker_key(who), "window_limit 1700000000000000 1700000000000000 spent", ex=30)
    its_keys = {marker_key(who), *_keys_of(who, Scope.IDENTIFIER)}
    yield _bytes(bench, "memory of an identifier, windows full", its_keys, BYTES_AN_IDENTIFIER)
    network_keys = _keys_of(who, Scope.NETWORK)
    yield _bytes(bench, "memory of its network, windows full", network_keys, BYTES_AN_IDENTIFIER)
    # Only now: what is pending says by which budgets it is charged, and takes more room where there are many.
    with_further = _admitted(backend, bench.ask(who, further))
    for name, made, limit in (
        ("memory of a reservation's record", alone, BYTES_A_RESERVATION),
        (f"the same with {FURTHER_BUDGETS} further budgets", with_further, BYTES_WITH_FURTHER_BUDGETS),
    ):
        yield _bytes(bench, name, {record_key(made.reservation_id)}, limit)
    link.close()


def _keys_of(who: str, scope: Scope) -> set[str]:
    """What is kept of the owner of a scope, without further budgets."""
    rows = [row for row in rows_at(the_six(who), int(time.time())) if row.budget.scope is scope]
    notes = {running_key(row.key) for row in rows if row.layout.window_seconds}
    return {row.key for row in rows} | {row.pending_key for row in rows} | notes


def _bytes(bench: Bench, name: str, keys: Iterable[str], limit: int) -> Row:
    used = sum(int(bench.raw.memory_usage(key, samples=0) or 0) for key in keys)
    return Row(name, used, "bytes", target=f"≤ {limit:,}", is_met=used <= limit)


def _no_op(bench: Bench, link: Link) -> Callable[[], object]:
    """A script that does nothing, on the backend's connection and without our own code."""
    client = link.run(lambda its: its)
    execute: Callable[..., Any] = client.execute_command
    return lambda: execute("EVALSHA", bench.no_op, 0)


def _reserve(bench: Bench, backend: Backend, who: str) -> Callable[[], float]:
    def reserve() -> float:
        ask = bench.ask(who)
        start = time.perf_counter()
        answer = backend.reserve(ask)
        taken = time.perf_counter() - start
        if not isinstance(answer, Reservation):
            raise TypeError(f"refused, though there is room: {answer}")
        return taken

    return reserve


def _admitted(backend: Backend, ask: Ask) -> Reservation:
    answer = backend.reserve(ask)
    if not isinstance(answer, Reservation):
        raise TypeError(f"refused, though there is room: {answer}")
    return answer


def _ping(client: Any) -> object:
    return client.ping()


Case = Callable[[Bench], Iterator[Row]]
CASES: tuple[Case, ...] = (
    reserve_beside_no_op,
    settle_beside_no_op,
    legacy_beside_atomic,
    server_time_of_the_scripts,
    memory,
)
