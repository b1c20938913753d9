"""What the guard does and tells when all is well; what it does in an outage is in tests/faults."""

from dataclasses import replace

import pytest

from backends.conformance.cases import COST, ROOMY, make_ask
from backends.conformance.harness import ManualClock, MemoryHarness
from backends.contract import Refusal, Reservation
from backends.errors import ReservationConflict
from backends.guard.emergency_budget import EmergencyBudget
from backends.guard.guard import FailurePolicy, Guard, Health
from backends.strategies.memory import MemoryBackend
from tests.faults.wire import Told


@pytest.fixture
def told():
    return Told()


@pytest.fixture
def primary():
    return MemoryHarness().backend


@pytest.fixture
def guard(primary, told, tmp_path):
    clock = ManualClock()
    guard = Guard(
        primary,
        MemoryBackend(clock),
        link=None,
        emergency=EmergencyBudget(tmp_path / "emergency", clock),
        clock=clock,
        observer=told,
        policy=lambda: FailurePolicy(is_open=True, emergency_nanousd=10**9),
    )
    yield guard
    guard.close()


def test_a_reservation_and_its_end_are_told(guard, told):
    made = guard.reserve(make_ask("r0", COST))
    guard.settle(made, 7)
    assert isinstance(made, Reservation)
    assert guard.backend_name == made.backend == "memory"
    [reserved] = told.named("reserved")
    assert reserved == {
        "request_id": "r0",
        "identifier": "hash456",
        "cost_nanousd": COST,
        "window_nanousd": COST,
        "day_nanousd": COST,
        "backend": "memory",
        "script": "memory",
        "check_ms": 0,
    }
    [settled] = told.named("settled")
    assert settled == {
        "request_id": "r0",
        "identifier": "hash456",
        "reserved_nanousd": COST,
        "booked_nanousd": 7,
        "overrun_nanousd": 0,
        "outcome": "settled",
        "backend": "memory",
    }


def test_a_refusal_is_told(guard, told):
    verdict = guard.reserve(make_ask("r0", COST, replace(ROOMY, window_nanousd=1)))
    assert isinstance(verdict, Refusal)
    [refused] = told.named("refused")
    assert refused["refusal"] is verdict
    assert refused["script"] == "memory"
    assert not told.named("reserved")


def test_an_overrun_is_told(guard, told):
    guard.settle(guard.reserve(make_ask("r0", COST)), COST + 3)
    assert told.named("settled")[0]["overrun_nanousd"] == 3


def test_a_second_end_is_told_as_a_repeat_with_what_the_first_booked(guard, told):
    made = guard.reserve(make_ask("r0", COST))
    guard.settle(made, 7)
    guard.settle(made, COST)
    assert [(end["outcome"], end["booked_nanousd"]) for end in told.named("settled")] == [
        ("settled", 7),
        ("repeated", 7),
    ]


def test_a_settlement_for_another_request_is_told_and_raises_nothing(guard, told):
    made = guard.reserve(make_ask("r0", COST))
    guard.settle(replace(made, request_digest="0" * 16), 7)
    assert told.named("settle_refused")
    assert not told.named("settled")


def test_an_extension_of_what_has_ended_ends_the_answer_and_is_told(guard, told):
    made = guard.reserve(make_ask("r0", COST))
    guard.settle(made, 7)
    assert guard.extend(made, 2 * COST, ROOMY, at_least_nanousd=2 * COST) is None
    assert [fields["reserved_nanousd"] for fields in told.named("extension_refused")] == [COST]


def test_a_conflict_gets_through(guard):
    guard.reserve(make_ask("r0", COST))
    with pytest.raises(ReservationConflict):
        guard.reserve(make_ask("r0", COST + 1))


def test_without_a_store_all_is_always_well(guard):
    assert guard.health() is Health.GOOD


def test_an_emergency_reservation_of_another_worker_is_left_alone(guard, told):
    """It was booked in full by the worker that made it, and nobody else knows its hour."""
    guard.settle(replace(guard.reserve(make_ask("r0", COST)), backend="emergency"), 7)
    assert not told.named("settled")
