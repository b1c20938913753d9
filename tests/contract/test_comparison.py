"""The comparison, proved: which strategies lose the race, in which orders of commands, and that alone they all agree.

What else belongs to it stands elsewhere: `test_race.py` hammers with four processes, and
`test_any_list_of_operations_leaves_what_the_memory_strategy_leaves` of the published suite holds every backend to the
same answers, books and TTLs for the same seeded list of operations. Those that decide in Python share their verbs with
`memory`: for them the independent oracle is the model of `test_state_machine.py`.
"""

import re

import pytest
import redis

from backends import open_backend
from backends.clock import SystemClock
from backends.conformance.cases import COST, ROOMY, make_ask
from backends.conformance.harness import ManualClock, RedisHarness
from backends.conformance.operations import played, some_operations
from backends.conformance.redis_layout import assert_same_stored
from backends.contract import Reservation
from backends.errors import ConfigurationError, StoreBusy
from backends.store.link import Link
from backends.strategies import legacy as legacy_page
from backends.strategies.watch import WatchBackend
from flaskapp.lab.explorer import explore, replay
from flaskapp.lab.race import COST_NANOUSD, Plan, race
from flaskapp.lab.stepped_callers import Caller, Gate
from flaskapp.lab.wire import commands_in
from flaskapp.ops.embedded_redis import EmbeddedServer
from tests.docs.pages import ROOT
from tests.racers import register

LIMIT = COST_NANOUSD
QUICK = Plan(timed_requests=2, hold_seconds=10.0)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with EmbeddedServer(tmp_path_factory.mktemp("comparison")) as server:
        yield server


@pytest.fixture(scope="module")
def legacy(server):
    return explore(server.url, "legacy")


# --- what loses the race


def test_legacy_overspends_in_nearly_every_order(legacy):
    assert legacy.is_exhaustive
    assert (legacy.reduced_orders, legacy.overspending_orders) == (1_091, 963)
    assert legacy.raw_orders > 10**17
    assert legacy.raw_orders - legacy.overspending_raw_orders < legacy.raw_orders // 100_000_000
    assert [each.spent_nanousd for each in legacy.overspending] == [2 * LIMIT] * 963
    assert legacy.is_as_declared


def test_the_page_of_the_race_has_these_counts(server, legacy):
    page = (ROOT / "docs" / "THE_RACE.md").read_text(encoding="utf-8")
    for found in (legacy, *(explore(server.url, name) for name in ("multi", "watch", "atomic"))):
        counts = f"| {found.raw_orders:,} | {found.reduced_orders:,} | **{found.overspending_orders:,}** |"
        assert f"{counts} all but" in page or f"{counts} {found.overspending_raw_orders} |" in page
    assert f"all but {legacy.raw_orders - legacy.overspending_raw_orders:,} |" in page


def test_legacy_does_not_overspend_only_where_one_caller_reads_after_the_other_has_charged_the_window(server, legacy):
    over = {each.number for each in legacy.overspending}
    within = sorted(set(range(1, legacy.reduced_orders + 1)) - over)
    for number in within[:2]:
        found = replay(server.url, "legacy", number)
        assert not found.overspends
        assert len(found.admitted) == 1
        window = [step for step in found.steps if step.keys == ("llm:cost:recent:visitor",)]
        reads = [at for at, step in enumerate(window) if step.command.startswith("ZRANGE")]
        assert any(step.command.startswith("ZINCRBY") for step in window[: reads[1]])


@pytest.mark.parametrize("callers", [2, 3])
def test_a_transaction_without_a_decision_does_not_help(server, callers):
    multi = explore(server.url, "multi", callers)
    assert multi.is_exhaustive
    assert (multi.reduced_orders, multi.overspending_orders) == {2: (3, 1), 3: (25, 16)}[callers]
    assert multi.is_as_declared


def test_nor_where_all_are_held_between_the_two_transactions(server):
    (result,) = race(server.url, ["multi"], QUICK)
    assert result.was_held
    assert result.admitted == 10
    assert result.overspend_nanousd == 6 * QUICK.cost_nanousd


def test_three_legacy_callers_overspend_too(server):
    legacy = explore(server.url, "legacy", 3)
    assert (legacy.reduced_orders, legacy.overspending_orders) == (64, 49)
    assert "taken to commute" in legacy.bound


# --- what does not


@pytest.mark.parametrize("callers", [2, 3])
def test_no_order_of_atomic_overspends(server, callers):
    atomic = explore(server.url, "atomic", callers)
    assert atomic.is_exhaustive
    assert (atomic.raw_orders, atomic.reduced_orders) == {2: (2, 2), 3: (6, 6)}[callers]
    assert (atomic.overspending_orders, atomic.shortest) == (0, None)
    assert atomic.is_as_declared


@pytest.mark.parametrize("callers", [2, 3])
def test_no_order_of_watch_overspends(server, callers):
    watch = explore(server.url, "watch", callers)
    assert watch.is_exhaustive
    assert watch.reduced_orders == {2: 22, 3: 216}[callers]
    assert watch.overspending_orders == 0
    assert watch.is_as_declared


def test_a_strategy_that_breaks_its_promise_is_found_out(server, monkeypatch):
    register(monkeypatch)
    found = explore(server.url, "never_refuses")
    assert found.overspending_orders == found.reduced_orders == 2
    assert not found.is_as_declared


def test_watch_admits_as_many_as_fit(server):
    (alone,) = race(server.url, ["watch"], Plan(requests=2, room=1, timed_requests=2))
    (crowd,) = race(server.url, ["watch"], Plan(requests=30, room=12, timed_requests=2))
    assert (crowd.admitted, crowd.overspend_nanousd) == (12, 0)
    assert alone.overspend_nanousd == 0


@pytest.fixture
def gate(redis_url):
    gate = Gate()
    link = Link(redis_url, clock=SystemClock(), connection_class=gate.connection_class())
    yield gate, link
    link.close()


def test_a_caller_that_is_overtaken_tries_again_and_sees_what_the_other_did(gate):
    gate, link = gate
    backend = WatchBackend(link, ManualClock())
    limits = ROOMY
    slow = Caller(gate, lambda: backend.reserve(make_ask("slow", COST, limits)))
    while not slow.pending.is_transaction:
        slow.take_turn()
    backend.reserve(make_ask("fast", COST, limits))
    assert slow.take_turn().is_overtaken
    while slow.pending:
        slow.take_turn()
    assert isinstance(slow.answer, Reservation)
    assert slow.answer.spent("window") == 2 * COST


def test_a_caller_that_is_overtaken_too_often_is_too_busy_and_has_charged_nothing(gate, redis_url):
    gate, link = gate
    backend = WatchBackend(link, ManualClock(), tries=2)
    slow = Caller(gate, lambda: backend.reserve(make_ask("slow")))
    for number in range(2):
        while not slow.pending.is_transaction:
            slow.take_turn()
        backend.reserve(make_ask(f"fast-{number}"))
        if number == 0:
            slow.take_turn()
    with pytest.raises(StoreBusy, match="2 times"):
        slow.take_turn()
    with redis.Redis.from_url(redis_url) as raw:
        assert not raw.exists("llm:reservation:slow")
        assert int(raw.get(next(iter(raw.scan_iter("llm:cost:daily:*"))))) == 2 * COST


# --- orders have numbers


def test_the_same_order_has_the_same_number_every_time(server, legacy):
    again = explore(server.url, "legacy", most_orders=40)
    assert not again.is_exhaustive
    assert again.bound == "the first 40 of all orders up to commuting commands"
    early = [each for each in legacy.overspending if each.number <= 40]
    assert list(again.overspending) == early


def outline(step):
    """Without digests and times that go by."""
    return step.caller, step.command.partition(" ")[0], step.keys


def test_the_shortest_failing_order_replays(server, legacy):
    (its,) = [each for each in legacy.overspending if each.number == legacy.shortest_number]
    assert its.switches == min(each.switches for each in legacy.overspending) == 2
    found = replay(server.url, "legacy", legacy.shortest_number)
    assert (found.schedule, found.admitted) == (its.schedule, ("A", "B"))
    assert found.spent_nanousd == 2 * found.limit_nanousd
    assert found.overspends
    assert list(map(outline, found.steps)) == list(map(outline, legacy.shortest))


def test_a_step_has_its_caller_its_command_and_the_reply_of_redis(server):
    *_, last = explore(server.url, "multi").shortest
    assert last.caller == "A"
    assert last.command.startswith("MULTI; INCRBY llm:cost:daily:visitor:")
    assert "; ZINCRBY llm:cost:recent:visitor 4050000 " in last.command
    assert "SET llm:reservation:visitor-A " in last.command
    assert last.command.endswith("; EXEC")
    assert last.told.startswith("[8100000, ")
    assert last.is_decisive


def test_nothing_stays_behind(server):
    with redis.Redis.from_url(server.url) as raw:
        raw.set("somebody", "else")
        explore(server.url, "multi")
        replay(server.url, "watch", 3)
        assert raw.keys() == [b"somebody"]
        raw.flushdb()


@pytest.mark.parametrize(
    ("url", "name", "callers", "why"),
    [
        ("fake://", "legacy", 2, "redis://"),
        (None, "nobody", 2, "nobody"),
        (None, "memory", 2, "asks Redis nothing"),
        (None, "legacy", 1, "2 to 3"),
        (None, "legacy", 4, "2 to 3"),
    ],
)
def test_what_cannot_be_explored_is_refused(server, url, name, callers, why):
    with pytest.raises(ConfigurationError, match=why):
        explore(url or server.url, name, callers)


def test_an_order_that_is_not_there_cannot_be_replayed(server):
    with pytest.raises(ConfigurationError, match="no order 4 of 2 callers"):
        replay(server.url, "multi", 4)


def test_a_database_that_holds_books_is_left_alone(server):
    with redis.Redis.from_url(server.url) as raw:
        raw.set("llm:throttle:somebody", "x")
        with pytest.raises(ConfigurationError, match="holds llm: keys"):
            explore(server.url, "atomic")
        assert raw.keys() == [b"llm:throttle:somebody"]
        raw.flushdb()


# --- alone


@pytest.mark.parametrize("name", ["legacy", "multi", "watch"])
def test_alone_they_agree_with_atomic_to_the_nano_dollar(redis_url, name):
    operations = some_operations(7, 120)
    found = []
    for backend in ("atomic", name):
        harness = RedisHarness(backend, redis_url)
        found.append(list(played(harness, operations)))
        harness.close()
    for number, (atomic, other) in enumerate(zip(*found, strict=True)):
        assert atomic[:2] == other[:2], (number, operations[number])
        assert_same_stored(atomic[2], other[2], (number, operations[number]))


OF_SIX = {"the id's record": 1, "the throttle marker": 1, "the key of each budget": 6, "what is pending": 3}
"""How many of each the page of legacy has for a request that is charged to the six."""


def test_the_page_of_legacy_shows_what_it_sends(redis_url):
    """Its docstring has the commands of a first reservation, in their order."""
    sent = []
    link = Link(redis_url, clock=SystemClock(), before_each_send=lambda packed: sent.extend(commands_in(packed)))
    open_backend("legacy", link, ManualClock()).reserve(make_ask("r0", COST, ROOMY))
    link.close()
    commands = [(command[0].decode(), command[1].decode()) for command, _ in sent]
    begin = {
        "the id's record": "llm:reservation:r0",
        "the throttle marker": "llm:throttle:",
        "what is pending": "llm:open:",
    }
    shown = [
        (names.split(" or "), what)
        for names, what in re.findall(rf"\b(GET|ZRANGE|GET or ZRANGE) +({'|'.join(OF_SIX)})", legacy_page.__doc__)
        for _ in range(OF_SIX[what])
    ]
    assert len(shown) == sum(OF_SIX.values())
    reads = commands[: len(shown)]
    for (name, key), (names, what) in zip(reads, shown, strict=True):
        assert name in names, (key, what)
        assert key.startswith(begin.get(what, ("llm:cost:", "llm:network:", "llm:global:"))), (key, what)
    writes = commands[len(shown) :]
    assert len([name for name, _ in writes if name in {"ZINCRBY", "INCRBY"}]) == 9
    assert writes[-1] == ("SET", "llm:reservation:r0")
    assert {name for name, _ in writes} == {"ZINCRBY", "INCRBY", "EXPIRE", "DEL", "SET"}
