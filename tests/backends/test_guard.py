"""What the guard does, and which events it sends, while the store works; for outages see tests/faults."""

from dataclasses import replace

import pytest

from backends.budgets import Budget, Calendar, Forever, Scope
from backends.conformance.cases import COST, NETWORK, ROOMY, WHO, make_ask
from backends.conformance.harness import ManualClock, MemoryHarness
from backends.contract import Ask, Refusal, Reservation
from backends.errors import ReservationConflict
from backends.guard import EmergencyBudget, FailurePolicy, Guard, Health
from backends.strategies.memory import MemoryBackend
from tests.faults.wire import Told
from tests.servers import wait_until


@pytest.fixture
def events():
    return Told()


@pytest.fixture
def primary():
    return MemoryHarness().backend


@pytest.fixture
def guard(primary, events, tmp_path):
    clock = ManualClock()
    guard = Guard(
        primary,
        MemoryBackend(clock),
        link=None,
        emergency=EmergencyBudget(tmp_path / "emergency", clock),
        clock=clock,
        observer=events,
        policy=lambda: FailurePolicy(is_open=True, emergency_nanousd=10**9),
    )
    yield guard
    guard.close()


def test_a_reservation_and_its_end_are_events(guard, events):
    made = guard.reserve(make_ask("r0", COST))
    guard.settle(made, 7)
    assert isinstance(made, Reservation)
    assert guard.backend_name == made.backend == "memory"
    [reserved] = events.named("reserved")
    assert reserved == {
        "request_id": "r0",
        "identifier": "hash456",
        "cost_nanousd": COST,
        "reservation": made,
        "backend": "memory",
        "script": "memory",
        "check_ms": 0,
    }
    [settled] = events.named("settled")
    assert settled == {
        "request_id": "r0",
        "identifier": "hash456",
        "reserved_nanousd": COST,
        "booked_nanousd": 7,
        "overrun_nanousd": 0,
        "outcome": "settled",
        "backend": "memory",
    }


def test_a_refusal_is_an_event(guard, events):
    verdict = guard.reserve(make_ask("r0", COST, replace(ROOMY, window_nanousd=1)))
    assert isinstance(verdict, Refusal)
    [refused] = events.named("refused")
    assert refused["refusal"] is verdict
    assert refused["script"] == "memory"
    assert not events.named("reserved")


def test_each_shadow_budget_that_was_over_is_an_event(guard, events):
    tiny = Budget("tiny", WHO, Forever(), 1, is_shadow=True)
    made = guard.reserve(make_ask("r0", COST, further=(tiny, tiny._replace(name="ample", limit_nanousd=COST))))
    assert made.over_shadow == ("tiny",)
    assert [event.name for event in events] == ["reserved", "shadow_refused"]
    assert events.named("shadow_refused") == [
        {"request_id": "r0", "identifier": WHO, "cost_nanousd": COST, "budget": "tiny"}
    ]


def test_a_request_without_an_identifier_is_guarded_too(guard, events):
    alone = Budget("monthly", "order desk", Calendar("month"), COST, scope=Scope.TEAM)
    guard.settle(guard.reserve(Ask("r0", COST, (alone,))), 7)
    assert guard.books((alone,)).spent("monthly") == 7
    assert [event.fields["identifier"] for event in events] == ["", ""]


def test_an_overrun_is_in_the_event(guard, events):
    guard.settle(guard.reserve(make_ask("r0", COST)), COST + 3)
    assert events.named("settled")[0]["overrun_nanousd"] == 3


def test_a_second_end_is_a_repeat_with_what_the_first_booked(guard, events):
    made = guard.reserve(make_ask("r0", COST))
    guard.settle(made, 7)
    guard.settle(made, COST)
    assert [(end["outcome"], end["booked_nanousd"]) for end in events.named("settled")] == [
        ("settled", 7),
        ("repeated", 7),
    ]


def test_a_settlement_for_another_request_is_an_event_and_raises_nothing(guard, events):
    made = guard.reserve(make_ask("r0", COST))
    guard.settle(replace(made, request_digest="0" * 8), 7)
    assert events.named("settle_refused")
    assert not events.named("settled")


def test_an_end_that_is_killed_on_its_way_is_made_up_for(guard, primary, events, monkeypatch):
    """As by a worker whose time is up; gevent's own exception for that is no `Exception` either."""
    made, settle, kills = guard.reserve(make_ask("r0", COST)), primary.settle, [SystemExit()]

    def settle_or_be_killed(*what):
        if kills:
            raise kills.pop()
        return settle(*what)

    monkeypatch.setattr(primary, "settle", settle_or_be_killed)
    with pytest.raises(SystemExit):
        guard.settle(made, 7)
    wait_until(lambda: events.named("settled"), 5, "it is settled by another thread")
    assert events.named("settled")[0]["booked_nanousd"] == 7


def test_an_extension_of_what_has_ended_is_refused_with_an_event(guard, events):
    made = guard.reserve(make_ask("r0", COST))
    guard.settle(made, 7)
    assert guard.extend(made, 2 * COST, ROOMY.budgets(WHO, NETWORK), at_least_nanousd=2 * COST) is None
    assert [fields["reserved_nanousd"] for fields in events.named("extension_refused")] == [COST]


def test_a_conflict_gets_through(guard):
    guard.reserve(make_ask("r0", COST))
    with pytest.raises(ReservationConflict):
        guard.reserve(make_ask("r0", COST + 1))


def test_without_a_link_health_is_always_good(guard):
    assert guard.health() is Health.GOOD


def test_an_emergency_reservation_of_another_worker_is_left_alone(guard, events):
    """It was booked in full by the worker that made it, and only that worker knows its hour."""
    guard.settle(replace(guard.reserve(make_ask("r0", COST)), backend="emergency"), 7)
    assert not events.named("settled")
