from dataclasses import replace

import pytest
import redis

from backends.clock import SystemClock
from backends.errors import ConfigurationError, StoreUnavailable
from backends.store.connections import execute, pack_command
from backends.store.link import Link
from flaskapp.lab.race import Plan, race
from flaskapp.lab.wire import Wire, writes
from flaskapp.ops.embedded_redis import EmbeddedServer
from tests.racers import register

QUICK = Plan(timed_requests=5, hold_seconds=10.0)


@pytest.fixture(scope="module")
def race_server(tmp_path_factory):
    with EmbeddedServer(tmp_path_factory.mktemp("race")) as server:
        yield server


@pytest.fixture
def raw(race_server):
    with redis.Redis.from_url(race_server.url) as client:
        yield client
        client.flushall()


@pytest.fixture
def racers(monkeypatch):
    register(monkeypatch)


def raced(server, name, plan=QUICK):
    (result,) = race(server.url, [name], plan)
    return result


@pytest.mark.parametrize(("requests", "room"), [(2, 1), (10, 4), (40, 7)])
def test_the_atomic_one_admits_exactly_those_for_whom_there_is_room(race_server, raw, requests, room):
    plan = replace(QUICK, requests=requests, room=room, rounds=3)
    result = raced(race_server, "atomic", plan)
    assert result.admitted == 3 * room
    assert result.refused == 3 * (requests - room)
    assert result.spent_nanousd == result.limit_nanousd == 3 * room * plan.cost_nanousd
    assert result.overspend_nanousd == 0
    assert not result.was_held
    assert result.is_as_declared


@pytest.mark.parametrize(("requests", "room"), [(2, 1), (10, 4), (40, 7)])
def test_the_legacy_one_admits_everybody_every_time(race_server, raw, requests, room):
    plan = replace(QUICK, requests=requests, room=room, rounds=2)
    result = raced(race_server, "legacy", plan)
    assert result.was_held
    assert result.admitted == 2 * requests
    assert result.refused == 0
    assert result.spent_nanousd == 2 * requests * plan.cost_nanousd
    assert result.overspend_nanousd == 2 * (requests - room) * plan.cost_nanousd
    assert result.is_as_declared


def test_round_trips_are_one_for_the_atomic_and_many_for_the_legacy_one(race_server, raw):
    legacy, atomic = race(race_server.url, plan=QUICK)
    assert atomic.round_trips_a_request == 1.0
    # Every one of them is admitted: a check of at least five, and a record of at least as many.
    assert legacy.round_trips_a_request >= 10
    assert 0 < atomic.check_p50_ms <= atomic.check_p95_ms
    assert 0 < legacy.check_p50_ms <= legacy.check_p95_ms


def test_what_is_sent_is_what_redis_is_asked(race_server, raw):
    wire = Wire()
    link = Link(race_server.url, clock=SystemClock(), before_each_send=wire)
    link.run(lambda client: client.ping())
    assert wire.round_trips == 1
    link.run(lambda client: [client.get("one"), client.get("two")])
    assert wire.round_trips == 3
    link.run(lambda client: client.pipeline(transaction=False).get("one").get("two").execute())
    assert wire.round_trips == 4
    link.close()


def test_the_set_up_of_a_connection_is_no_round_trip_of_a_request(race_server, raw):
    wire = Wire()
    link = Link(race_server.url.replace("/0", "/5"), clock=SystemClock(), before_each_send=wire)
    link.run(lambda client: client.ping())
    assert wire.round_trips == 1
    link.close()


def test_the_first_command_of_a_connection_is_counted_on_every_way(race_server, raw):
    for said in (
        lambda client: client.ping(),
        lambda client: client.pipeline(transaction=False).ping().execute(),
        lambda client: execute(client, ("PING",)),
    ):
        wire = Wire()
        link = Link(race_server.url.replace("/0", "/5"), clock=SystemClock(), before_each_send=wire)
        link.run(said)
        assert wire.round_trips == 1
        link.close()


def test_nothing_stays_behind(race_server, raw):
    raw.set("somebody", "else")
    race(race_server.url, plan=QUICK)
    assert raw.keys() == [b"somebody"]


def test_a_database_that_holds_books_is_refused_and_left_alone(race_server, raw):
    raw.set("llm:cost:daily:somebody:2026-01-01", 5)
    with pytest.raises(ConfigurationError, match="holds llm: keys"):
        race(race_server.url, plan=QUICK)
    assert raw.keys() == [b"llm:cost:daily:somebody:2026-01-01"]


def test_one_that_promises_and_overspends_is_not_as_declared(race_server, raw, racers):
    result = raced(race_server, "never_refuses")
    assert result.admitted == 10
    assert result.overspend_nanousd == 6 * QUICK.cost_nanousd
    assert not result.is_as_declared


def test_one_that_is_held_in_its_gap_and_does_not_overspend_is_not_as_declared(race_server, raw, racers):
    result = raced(race_server, "has_no_race")
    assert result.was_held
    assert result.overspend_nanousd == 0
    assert not result.is_as_declared


def test_one_that_promises_nothing_and_has_no_gap_to_be_held_in_is_not_blamed(race_server, raw, racers):
    result = raced(race_server, "one_step")
    assert not result.promises_atomicity
    assert result.overspend_nanousd == 0
    assert not result.was_held
    assert result.is_as_declared


def test_a_thread_is_called_before_its_first_write_and_only_there(race_server, raw):
    wire, seen = Wire(), []
    link = Link(race_server.url, clock=SystemClock(), before_each_send=wire)

    def send(*words):
        link.run(lambda client: client.execute_command(*words))
        seen.append(words[0])

    with wire.before_first_write(lambda: seen.append("held")):
        for words in (("GET", "one"), ("SET", "llm:throttle:me", "x"), ("set", "one", "1"), ("SET", "one", "2")):
            send(*words)
    send("SET", "one", "3")
    assert seen == ["GET", "SET", "held", "set", "SET", "SET"]
    link.close()


def test_a_transaction_that_only_reads_writes_nothing():
    read = b"".join(pack_command(words) for words in (("MULTI",), ("GET", "x"), ("ZRANGE", "y", 0, -1), ("EXEC",)))
    assert not writes(read)
    assert writes(read + pack_command(("EVALSHA", "0" * 40, 0)))
    assert writes(pack_command(("NOT_KNOWN_HERE",)))


def test_a_server_that_is_not_there_is_an_outage():
    with pytest.raises(StoreUnavailable):
        race("redis://127.0.0.1:1/0", plan=QUICK)


def test_only_what_can_be_counted_is_raced_on():
    with pytest.raises(ConfigurationError, match="redis://"):
        race("fake://", plan=QUICK)


@pytest.mark.parametrize(
    "wrong",
    [
        {"room": 0},
        {"room": 10},
        {"requests": 3, "room": 4},
        {"rounds": 0},
        {"timed_requests": 1},
        {"spread": 1.0},
        {"spread": -0.1},
        {"think_ms": -1.0},
    ],
)
def test_a_plan_without_a_race_is_refused(wrong):
    with pytest.raises(ConfigurationError):
        Plan(**wrong)


def test_progress_is_told(race_server, raw):
    told = []
    race(race_server.url, ["atomic"], replace(QUICK, rounds=2), progress=lambda *args: told.append(args))
    assert ("atomic: 10 callers at once", 1, 2) in told
    assert told[-1] == ("the time of the check, in turns", 4, 5)


def test_costs_differ_by_the_spread_and_are_the_seeds():
    plan = Plan(requests=50, spread=0.5, seed=7)
    costs = plan.costs_nanousd(0)
    assert costs == plan.costs_nanousd(0)
    assert costs != plan.costs_nanousd(1)
    assert costs != replace(plan, seed=8).costs_nanousd(0)
    assert len(set(costs)) > 40
    assert plan.cost_nanousd // 2 <= min(costs) < max(costs) <= plan.cost_nanousd * 3 // 2
    assert set(replace(plan, spread=0.0).costs_nanousd(0)) == {plan.cost_nanousd}


@pytest.mark.parametrize(("requests", "room", "spread"), [(2, 1, 0.9), (10, 9, 0.9), (10, 4, 0.3)])
def test_the_limit_has_room_for_any_k_and_never_for_all(requests, room, spread):
    plan = Plan(requests=requests, room=room, spread=spread)
    for number in range(20):
        costs = plan.costs_nanousd(number)
        assert sum(sorted(costs)[-room:]) <= plan.limit_nanousd(costs) < sum(costs)


@pytest.mark.parametrize("room", [4, 9])
def test_costs_that_differ_change_no_verdict(race_server, raw, room):
    seen = []
    plan = replace(QUICK, room=room, rounds=3, spread=0.9, seed=5)
    legacy, atomic = race(race_server.url, plan=plan, watch=seen.append)
    assert legacy.admitted == 30
    assert legacy.overspend_nanousd == legacy.spent_nanousd - legacy.limit_nanousd > 0
    assert 3 * room <= atomic.admitted < 30
    assert atomic.overspend_nanousd == 0
    # Both are given the same.
    by_name = {each.backend: [] for each in seen}
    for each in seen:
        by_name[each.backend].append([call.cost_nanousd for call in each.calls])
    assert by_name["legacy"] == by_name["atomic"]


def test_each_round_is_told_with_the_moments_of_its_callers(race_server, raw):
    seen = []
    race(race_server.url, plan=replace(QUICK, rounds=2), watch=seen.append)
    assert [(each.backend, each.number) for each in seen] == [
        ("legacy", 0),
        ("atomic", 0),
        ("legacy", 1),
        ("atomic", 1),
    ]
    for each in seen:
        assert [call.number for call in each.calls] == list(range(10))
        assert each.spent_nanousd == sum(call.cost_nanousd for call in each.calls if call.is_admitted)
        assert all(0 <= call.asked_ms <= call.answered_ms for call in each.calls)
    for each in seen[::2]:
        # Held: nobody was answered before all had checked.
        assert max(call.checked_ms for call in each.calls) <= min(call.answered_ms for call in each.calls)
        assert each.overspend_nanousd == 6 * QUICK.cost_nanousd
    assert {call.checked_ms for each in seen[1::2] for call in each.calls} == {None}


def test_callers_that_think_are_not_held(race_server, raw):
    seen = []
    result = raced(race_server, "legacy", replace(QUICK, requests=2, room=1, think_ms=50.0))
    race(race_server.url, ["legacy"], replace(QUICK, requests=2, room=1, think_ms=50.0), watch=seen.append)
    assert not result.was_held
    assert result.is_as_declared
    assert all(call.answered_ms - call.checked_ms >= 50 for call in seen[0].calls if call.checked_ms is not None)


def test_one_that_was_not_held_and_stayed_within_its_limit_is_as_declared(race_server, raw, racers):
    assert raced(race_server, "has_no_race", replace(QUICK, think_ms=0.0)).is_as_declared


def test_a_redis_farther_away_is_waited_for_once_a_round_trip(race_server, raw):
    plan = replace(QUICK, far_timed_requests=3)
    legacy, atomic = race(race_server.url, plan=plan, rtt_ms=4.0)
    assert (legacy.rtt_ms, atomic.rtt_ms) == (4.0, 4.0)
    assert atomic.round_trips_a_request == 1.0
    # A wait never ends early: the least that it can be is known, and nothing is said about the most.
    assert atomic.check_p50_ms >= 4.0
    assert legacy.check_p50_ms >= 4.0 * 10
    assert legacy.check_alone_p50_ms >= 4.0 * 5
    assert atomic.check_alone_p50_ms is None
    assert legacy.check_alone_p50_ms < legacy.check_p50_ms
    assert raw.keys() == []


def test_one_that_gives_up_against_the_others_is_refused(race_server, raw, racers):
    result = raced(race_server, "gives_up")
    assert (result.admitted, result.refused, result.overspend_nanousd) == (0, 10, 0)


def test_one_that_tries_again_is_held_once(race_server, raw, racers):
    seen = []
    result = race(race_server.url, ["tries_again"], replace(QUICK, hold_seconds=30.0), watch=seen.append)
    assert result[0].admitted == 10
    # Whoever is held a second time waits for all ten again, and nine of them have gone.
    assert max(call.answered_ms for call in seen[0].calls) < 30_000
