from dataclasses import replace

import pytest
import redis

from backends.clock import SystemClock
from backends.embedded import EmbeddedServer
from backends.errors import ConfigurationError, StoreUnavailable
from backends.link import Link
from backends.race import Plan, WireCount, race
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
    wire = WireCount()
    link = Link(race_server.url, clock=SystemClock(), connection_class=wire.connection_class())
    link.run(lambda client: client.ping())
    assert wire.round_trips == 1
    link.run(lambda client: [client.get("one"), client.get("two")])
    assert wire.round_trips == 3
    link.run(lambda client: client.pipeline(transaction=False).get("one").get("two").execute())
    assert wire.round_trips == 4
    link.close()


def test_the_set_up_of_a_connection_is_no_round_trip_of_a_request(race_server, raw):
    wire = WireCount()
    link = Link(race_server.url.replace("/0", "/5"), clock=SystemClock(), connection_class=wire.connection_class())
    link.run(lambda client: client.ping())
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


def test_one_that_promises_nothing_and_has_no_gap_to_be_held_in_is_not_blamed(race_server, raw):
    result = replace(raced(race_server, "atomic"), promises_atomicity=False)
    assert not result.was_held
    assert result.is_as_declared


def test_a_server_that_is_not_there_is_an_outage():
    with pytest.raises(StoreUnavailable):
        race("redis://127.0.0.1:1/0", plan=QUICK)


def test_only_what_can_be_counted_is_raced_on():
    with pytest.raises(ConfigurationError, match="redis://"):
        race("fake://", plan=QUICK)


@pytest.mark.parametrize(
    "wrong", [{"room": 0}, {"room": 10}, {"requests": 3, "room": 4}, {"rounds": 0}, {"timed_requests": 1}]
)
def test_a_plan_without_a_race_is_refused(wrong):
    with pytest.raises(ConfigurationError):
        Plan(**wrong)


def test_progress_is_told(race_server, raw):
    told = []
    race(race_server.url, ["atomic"], replace(QUICK, rounds=2), progress=lambda *args: told.append(args))
    assert ("atomic: 10 callers at once", 1, 2) in told
    assert told[-1] == ("the time of the check, in turns", 4, 5)
