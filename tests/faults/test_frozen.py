"""A server that is stopped and goes on: nothing is charged twice, and nobody's late question is answered."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from backends.conformance.cases import COST, KEY, NETWORK, ROOMY, WHO, make_ask
from backends.contract import Outcome, Reservation
from backends.errors import StoreUnavailable
from backends.guard import EMERGENCY, Health
from backends.store.breaker import REST_SECONDS
from backends.strategies.atomic import AtomicBackend
from tests.faults.wire import wait_for

SIX = ROOMY.budgets(WHO, NETWORK)


def evalshas(look):
    return look.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"]


def spent(look):
    [total] = look.mget(look.keys("llm:global:daily:*")) or [0]
    return int(total)


def reserve(backend, number):
    """Whether it was admitted; None if nobody knows."""
    try:
        return isinstance(backend.reserve(make_ask(f"r{number}", COST)), Reservation)
    except StoreUnavailable:
        return None


def extend(backend, made):
    """What is held then; None if nobody knows."""
    try:
        return backend.extend(made, 2 * COST, SIX).cost_nanousd
    except StoreUnavailable:
        return None


def end(backend, made):
    """How it ended, half of them released; None if nobody knows."""
    is_released = made.reservation_id.endswith(("1", "3", "5", "7", "9"))
    try:
        return (backend.release(made) if is_released else backend.settle(made, 7)).outcome
    except StoreUnavailable:
        return None


def use_once(backend):
    """The server knows every script from here on."""
    made = backend.reserve(make_ask("first", COST))
    backend.extend(made, COST + 1, SIX)
    backend.settle(made, 0)


@pytest.fixture
def backend(new_link):
    backend = AtomicBackend(new_link())
    use_once(backend)
    return backend


@pytest.mark.parametrize("milliseconds", [120, 150, 250])
def test_a_short_freeze_charges_everybody_once(own_server, look, backend, milliseconds):
    with ThreadPoolExecutor(10) as callers:
        own_server.freeze()
        thaw = threading.Timer(milliseconds / 1_000, own_server.thaw)
        thaw.start()
        answers = list(callers.map(lambda number: reserve(backend, number), range(10)))
        thaw.join()
    assert answers.count(None) == 0
    assert spent(look) == answers.count(True) * COST == 10 * COST


@pytest.mark.parametrize("milliseconds", [120, 150, 250])
def test_a_short_freeze_extends_and_ends_everybody_once(own_server, look, backend, milliseconds):
    made = [backend.reserve(make_ask(f"r{number}", COST)) for number in range(10)]
    with ThreadPoolExecutor(10) as callers:
        for call, answers in (
            (extend, [2 * COST] * 10),
            (end, [Outcome.SETTLED, Outcome.RELEASED] * 5),
            (end, [Outcome.REPEATED] * 10),
        ):
            own_server.freeze()
            thaw = threading.Timer(milliseconds / 1_000, own_server.thaw)
            thaw.start()
            assert list(callers.map(call, [backend] * 10, made)) == answers
            thaw.join()
            assert spent(look) == (20 * COST if call is extend else 5 * 7)


def test_after_a_long_freeze_nothing_is_extended_for_who_gave_up(own_server, look, new_link):
    backend = AtomicBackend(new_link(timeout_seconds=0.1))
    use_once(backend)
    made = [
        backend.reserve(make_ask(f"r{number}", COST, idempotency=KEY if number == 0 else None)) for number in range(20)
    ]
    before, records = evalshas(look), {key: look.get(key) for key in look.keys("llm:[ri]*")}
    own_server.freeze()
    with ThreadPoolExecutor(20) as callers:
        answers = list(callers.map(extend, [backend] * 20, made))
    own_server.thaw()
    assert answers == [None] * 20
    wait_for(lambda: evalshas(look) == before + 20)
    assert spent(look) == 20 * COST
    assert {key: look.get(key) for key in records} == records


def test_what_ended_in_a_long_freeze_is_booked_once_and_nothing_used_is_missing(own_server, look, new_guard, told):
    guard = new_guard()
    use_once(AtomicBackend(guard._link))
    made = [guard.reserve(make_ask(f"r{number}", COST)) for number in range(10)]
    own_server.freeze()
    thaw = threading.Timer(2.0, own_server.thaw)
    thaw.start()
    extended = [guard.extend(reservation, 3 * COST, SIX, at_least_nanousd=2 * COST) for reservation in made]
    assert [reservation.cost_nanousd for reservation in extended] == [3 * COST] * 10
    told.clear()
    for reservation in extended[:5]:
        guard.settle(reservation, 2 * COST - 1)
    for reservation in extended[5:]:
        guard.release(reservation)
    thaw.join()
    wait_for(lambda: len(told.named("settled")) == 10)
    assert spent(look) == 5 * (2 * COST - 1)
    # What was lent comes back after that.
    wait_for(lambda: guard._lending.budget.spent_nanousd() == 0)


def test_after_a_long_freeze_there_are_no_ghosts(own_server, look, backend):
    before = evalshas(look)
    own_server.freeze()
    with ThreadPoolExecutor(20) as callers:
        answers = list(callers.map(lambda number: reserve(backend, number), range(20)))
    own_server.thaw()
    assert answers == [None] * 20
    wait_for(lambda: evalshas(look) == before + 20)
    look.ping()
    assert spent(look) == 0
    assert look.keys("llm:reservation:r*") == []


def test_no_ghost_even_where_the_answer_was_given_up_very_soon(own_server, look, new_link):
    backend = AtomicBackend(new_link(timeout_seconds=0.1))
    backend.settle(backend.reserve(make_ask("first", COST)), 0)
    before = evalshas(look)
    own_server.freeze()
    assert reserve(backend, 1) is None
    own_server.thaw()
    wait_for(lambda: evalshas(look) == before + 1)
    assert spent(look) == 0


def test_two_seconds_of_silence_are_bridged_and_leave_no_trace(own_server, look, new_guard, told, clock):
    guard = new_guard()
    guard.settle(guard.reserve(make_ask("first", COST)), 0)
    own_server.freeze()
    thaw = threading.Timer(2.0, own_server.thaw)
    thaw.start()
    bridged = [guard.reserve(make_ask(f"r{number}", COST)) for number in range(20)]
    assert {verdict.backend for verdict in bridged} == {EMERGENCY}
    assert guard.health() is Health.DEGRADED
    for verdict in bridged:
        guard.settle(verdict, 1)
    thaw.join()
    wait_for(lambda: guard.reserve(make_ask(f"back{len(told)}", COST)).backend == "atomic", 3)
    assert guard.health() is Health.GOOD
    wait_for(lambda: not look.keys("llm:reservation:r*") or b"open" not in look.get(look.keys("llm:reservation:r*")[0]))
    assert spent(look) == COST
    assert [event.name for event in told if event.name.startswith("store")] == ["store_lost", "store_back"]


def test_the_breaker_spares_a_frozen_server_and_lets_one_try(own_server, look, new_link, clock, told):
    link = new_link(timeout_seconds=0.1)
    link.run(lambda client: client.ping())
    assert link.is_up
    own_server.freeze()
    asked = []

    def ping(client):
        asked.append(client)
        return client.ping()

    for _ in range(5):
        with pytest.raises(StoreUnavailable):
            link.run(ping)
    assert len(asked) == 1
    assert not link.is_up
    clock.skip(REST_SECONDS + 0.01)
    with pytest.raises(StoreUnavailable):
        link.run(ping)
    with pytest.raises(StoreUnavailable):
        link.run(ping)
    assert len(asked) == 2
    own_server.thaw()
    look.ping()
    clock.skip(REST_SECONDS + 0.01)
    assert link.run(ping)
    assert link.is_up
    assert [event.name for event in told] == ["store_lost", "store_back"]


def test_the_books_name_the_same_after_a_freeze(own_server, backend):
    made = backend.reserve(make_ask("kept", COST))
    own_server.freeze()
    thaw = threading.Timer(0.12, own_server.thaw)
    thaw.start()
    assert backend.reserve(make_ask("kept", COST)) == made
    thaw.join()
    assert backend.books(SIX).spent("window") == COST
