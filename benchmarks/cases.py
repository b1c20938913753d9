"""The benchmarks: each case yields its rows. All run on a server of their own."""

import random
import time
from collections.abc import Callable, Iterator
from itertools import count
from statistics import median
from typing import Any

import redis

from backends import Ask, Backend, Link, Reservation, SystemClock, open_backend
from backends.keys import WINDOW_BUCKETS, book_keys
from benchmarks.measure import Row, at_least, at_most, medians_us, placed, placements
from flaskapp.lab.delay import delayed
from flaskapp.lab.prefilled_books import leave_as_after
from flaskapp.lab.race import AMPLE_NANOUSD, COST_NANOUSD, PENDING_SECONDS, window_alone
from flaskapp.lab.wire import Wire
from flaskapp.ops.running_redis import HOST

LIMITS = window_alone(AMPLE_NANOUSD)
IN_WINDOW = (1, 10, 1_000_000)
SERVER_BLOCK = 100

ATOMIC_TO_NO_OP, LEGACY_TO_ATOMIC, LEGACY_TO_ATOMIC_AT_1_MS = 2.0, 4.0, 5.0
BYTES_AN_IDENTIFIER, BYTES_A_RESERVATION = 2_048, 200


class Bench:
    """A server, links to it, and as many asks as a case needs."""

    def __init__(self, port: int, pid: int, seed: int, turns: int) -> None:
        self.port = port
        self.pid = pid
        self.turns = turns
        self.random = random.Random(seed)
        self.raw: Any = redis.Redis(HOST, port)
        self.no_op = self.raw.script_load("return 0")
        self.own_link = self.link()
        self._numbers = count()

    def close(self) -> None:
        """Give back the connections."""
        self.own_link.close()
        self.raw.close()

    def link(self, port: int | None = None, wire: Wire | None = None) -> Link:
        """As the service has it; to another port of this machine where one is named."""
        return Link(f"redis://{HOST}:{port or self.port}/0", clock=SystemClock(), before_each_send=wire)

    def ask(self, who: str) -> Ask:
        """One more request, within every limit."""
        return Ask(f"bench-{next(self._numbers)}", who, f"net-{who}", COST_NANOUSD, LIMITS, PENDING_SECONDS)

    def leave_as_after(self, requests: int, who: str) -> None:
        """Write what `requests` reservations, spread over the window, would have left in the store."""
        leave_as_after(self.own_link, who, requests, self.random)


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


def server_time_a_decision(bench: Bench) -> Iterator[Row]:
    """What Redis itself says that a decision took, by the requests in the window; in alternating blocks."""
    link = bench.link()
    backend = open_backend("atomic", link)
    blocks_us: dict[int, list[float]] = {requests: [] for requests in IN_WINDOW}
    for _ in range(max(5, bench.turns // 200)):
        for requests, taken_us in blocks_us.items():
            who = f"server-{requests}"
            bench.leave_as_after(requests, who)
            _admitted(backend, bench.ask(who))
            bench.raw.config_resetstat()
            for _ in range(SERVER_BLOCK):
                _admitted(backend, bench.ask(who))
            taken_us.append(float(bench.raw.info("commandstats")["cmdstat_evalsha"]["usec_per_call"]))
    link.close()
    fewest = (f"{IN_WINDOW[0]:,} in the window", median(blocks_us[IN_WINDOW[0]]))
    for requests, taken_us in blocks_us.items():
        yield at_most(f"server time of reserve, {requests:,} in the window", median(taken_us), fewest, None)


def memory(bench: Bench) -> Iterator[Row]:
    """What Redis keeps of an identifier with all buckets filled, of its network, and of one reservation."""
    link = bench.link()
    backend = open_backend("atomic", link)
    who = "memory"
    bench.leave_as_after(1_000_000, who)
    reservation = _admitted(backend, bench.ask(who))
    keys = book_keys(reservation.reservation_id, who, f"net-{who}", int(time.time()))
    bench.raw.set(keys.marker, "window_limit 1700000000000000 1700000000000000 spent", ex=30)
    yield _bytes(
        bench,
        "memory of an identifier, windows full",
        (keys.marker, keys.recent, keys.daily, keys.pending_identifier),
        BYTES_AN_IDENTIFIER,
    )
    yield _bytes(
        bench,
        "memory of its network, windows full",
        (keys.network_recent, keys.network_daily, keys.pending_network),
        BYTES_AN_IDENTIFIER,
    )
    yield _bytes(bench, "memory of a reservation's record", (keys.record,), BYTES_A_RESERVATION)
    link.close()


def _bytes(bench: Bench, name: str, keys: tuple[str, ...], limit: int) -> Row:
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
    server_time_a_decision,
    memory,
)
