"""Many callers in four processes, one server, room for k: atomic admits k; legacy, held half-way, admits all."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest

from backends.budgets import Forever, Scope, Sliding
from backends.clock import SystemClock
from backends.conformance.cases import COST, EVERY, NETWORK, PERIODS, ROOMY, WHO, further_budget, make_ask
from backends.conformance.harness import MemoryHarness
from backends.contract import Ask, Outcome, Reservation
from backends.store.link import Link
from backends.strategies.atomic import AtomicBackend
from backends.strategies.legacy import LegacyBackend
from tests.contract import racers

PROCESSES = 4
COUNTS = [2, 20, 128]


@pytest.fixture(scope="module")
def processes():
    spawn = multiprocessing.get_context("spawn")
    with spawn.Manager() as manager, ProcessPoolExecutor(PROCESSES, mp_context=spawn) as pool:
        yield pool, manager


@pytest.fixture
def race(processes, redis_url):
    pool, manager = processes

    def run(asks, names=("atomic",), *, hold_legacy=False):
        count = min(PROCESSES, len(asks))
        start = manager.Barrier(count)
        names = [names[number % len(names)] for number in range(len(asks))]
        shares = [
            racers.Race(redis_url, tuple(names[part::count]), tuple(asks[part::count]), hold_legacy)
            for part in range(count)
        ]
        return sum(pool.map(racers.run, shares, [start] * count))

    return run


@pytest.fixture
def backend(redis_url):
    link = Link(redis_url, clock=SystemClock())
    yield AtomicBackend(link)
    link.close()


@pytest.fixture
def spent(backend):
    """What is booked in one of the six."""
    return lambda name: backend.books(ROOMY.budgets(WHO, NETWORK)).spent(name)


def room_for(count):
    return replace(ROOMY, window_nanousd=count * COST)


@pytest.mark.parametrize("room", [1, 5])
@pytest.mark.parametrize("callers", COUNTS)
def test_of_many_atomic_callers_exactly_as_many_are_admitted_as_fit(race, spent, callers, room):
    admitted = race([make_ask(f"r{number}", COST, room_for(room)) for number in range(callers)])
    assert admitted == min(callers, room)
    assert spent("window") == spent("global_day") == admitted * COST


def test_the_same_for_an_identifier_that_has_spent_already(race, backend, spent):
    backend.settle(backend.reserve(make_ask("before", COST, room_for(6))), COST - 1)
    assert race([make_ask(f"r{number}", COST, room_for(6)) for number in range(128)]) == 5
    assert spent("window") == 6 * COST - 1


@pytest.mark.parametrize("field", ["network_window_nanousd", "network_day_nanousd", "global_hour_nanousd"])
def test_different_identifiers_share_what_is_shared(race, spent, field):
    limits = replace(ROOMY, **{field: 7 * COST})
    asks = [make_ask(f"r{number}", COST, limits, identifier=f"who{number}") for number in range(128)]
    assert race(asks) == 7
    assert spent("global_hour") == 7 * COST


@pytest.mark.parametrize("period", PERIODS, ids=lambda period: period.word)
def test_a_further_budget_admits_exactly_as_many_as_fit(race, backend, period):
    shared = further_budget("shared", Scope.TEAM, period, 7 * COST)
    asks = [make_ask(f"r{number}", COST, EVERY, identifier=f"who{number}", further=(shared,)) for number in range(128)]
    assert race(asks) == 7
    assert backend.books((shared,)).spent("shared") == 7 * COST


@pytest.mark.parametrize("period", [Sliding(90_000), Forever()], ids=lambda period: period.word)
def test_one_budget_alone_admits_exactly_as_many_as_fit(race, backend, period):
    alone = further_budget("alone", Scope.KEY, period, 7 * COST)
    assert race([Ask(f"r{number}", COST, (alone,)) for number in range(128)]) == 7
    assert backend.books((alone,)).spent("alone") == 7 * COST


def test_one_id_sent_by_all_is_charged_once(race, spent):
    assert race([make_ask("the one", COST, room_for(1))] * 128) == 128
    assert spent("window") == spent("global_day") == COST


def test_of_a_thousand_identical_requests_as_many_are_admitted_as_fit(backend, spent):
    limits = replace(ROOMY, day_nanousd=50 * COST, mark_when_busy=False)
    verdicts = [backend.reserve(make_ask(f"r{number}", COST, limits)) for number in range(1_000)]
    assert sum(isinstance(verdict, Reservation) for verdict in verdicts) == 50
    assert spent("day") == 50 * COST


@pytest.mark.parametrize("callers", COUNTS)
def test_the_legacy_way_overspends_every_time_and_its_books_show_it(race, spent, callers):
    asks = [make_ask(f"r{number}", COST, room_for(1)) for number in range(callers)]
    assert race(asks, ["legacy"], hold_legacy=True) == callers
    assert spent("window") == spent("day") == spent("global_hour") == callers * COST


def test_a_fleet_half_on_each_keeps_one_set_of_books(race, backend):
    asks = [make_ask(f"r{number}", COST + number, EVERY) for number in range(128)]
    assert race(asks, ["atomic", "atomic", "atomic", "atomic", "legacy", "legacy", "legacy", "legacy"]) == 128
    total = sum(each.cost_nanousd for each in asks)
    uses = backend.books(EVERY.budgets(WHO, NETWORK)).uses
    assert {(use.spent_nanousd, use.pending_nanousd) for use in uses} == {(total, total)}


@pytest.mark.parametrize("there_and_back", [False, True])
def test_what_one_strategy_reserves_the_other_settles(backend, redis_url, there_and_back):
    link = Link(redis_url, clock=SystemClock())
    pair = [backend, LegacyBackend(link, SystemClock())]
    one, other = reversed(pair) if there_and_back else pair
    limits = replace(EVERY, window_nanousd=COST)
    made = one.reserve(make_ask("r0", COST, limits))
    assert replace(other.reserve(make_ask("r0", COST, limits)), backend=made.backend) == made
    assert not isinstance(other.reserve(make_ask("r1", 1, limits)), Reservation)
    assert other.settle(made, 7).outcome == Outcome.SETTLED
    assert one.settle(made, 9).outcome == Outcome.REPEATED
    uses = one.books(EVERY.budgets(WHO, NETWORK)).uses
    assert {(use.spent_nanousd, use.pending_nanousd) for use in uses} == {(7, 0)}
    link.close()


def test_memory_is_exact_within_its_process():
    backend = MemoryHarness().backend
    barrier = racers.threading.Barrier(128)

    def call(number):
        barrier.wait(30)
        return isinstance(backend.reserve(make_ask(f"r{number}", COST, room_for(9))), Reservation)

    with racers.ThreadPoolExecutor(128) as threads:
        assert sum(threads.map(call, range(128))) == 9
    assert backend.books(ROOMY.budgets(WHO, NETWORK)).spent("window") == 9 * COST
