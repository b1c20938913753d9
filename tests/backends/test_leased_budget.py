"""The emergency budget as a worker spends it: nothing waits for the disk, and never is more spent than there is."""

import fcntl
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from backends.conformance.cases import US
from backends.conformance.harness import ManualClock
from backends.guard import EmergencyBudget, LeasedBudget, leased_budget
from backends.guard.emergency_budget import LEASES
from tests.faults.wire import wait_for

HOUR_US = 3_600 * US
BUDGET = 10**9
LEASE = BUDGET // LEASES


class SlowFile(EmergencyBudget):
    """A file whose disk a test holds up."""

    def __init__(self, path, clock):
        super().__init__(path, clock)
        self.goes_on = threading.Event()
        self.goes_on.set()

    def lease(self, *amounts):
        self.goes_on.wait(20)
        return super().lease(*amounts)

    def correct(self, *amounts):
        self.goes_on.wait(20)
        super().correct(*amounts)


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def file(tmp_path, clock):
    file = SlowFile(tmp_path / "emergency", clock)
    yield file
    file.goes_on.set()


@pytest.fixture
def new_worker(file):
    workers = []

    def make():
        workers.append(LeasedBudget(file, lambda: ThreadPoolExecutor(1)))
        return workers[-1]

    yield make
    file.goes_on.set()
    for each in workers:
        each.close()


def prepared(worker, file, budget=BUDGET):
    before = file.spent_nanousd()
    worker.prepare(budget)
    wait_for(lambda: file.spent_nanousd() > before)
    wait_for(lambda: not worker._is_leasing)
    return worker


def test_with_a_lease_nothing_waits_for_the_disk(new_worker, file):
    worker = prepared(new_worker(), file)
    file.goes_on.clear()
    hours = [worker.take(1_000_000, BUDGET) for _ in range(40)]
    worker.correct(hours[0], -500_000)
    assert None not in hours
    # The one thread still waits for the disk: none of this has come back from it.
    assert worker._is_leasing
    assert file.spent_nanousd() == LEASE


def test_a_file_that_somebody_has_locked_holds_nobody_up(new_worker, file, tmp_path):
    worker = prepared(new_worker(), file)
    with (tmp_path / "emergency").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert [worker.take(1_000_000, BUDGET) is not None for _ in range(40)] == [True] * 40


def test_where_the_lease_does_not_reach_and_the_disk_is_stuck_nothing_is_admitted(new_worker, file):
    worker = prepared(new_worker(), file)
    file.goes_on.clear()
    assert worker.take(LEASE, BUDGET) is not None
    assert worker.take(1, BUDGET) is None
    file.goes_on.set()
    wait_for(lambda: worker.take(1, BUDGET) is not None)


def test_a_worker_that_is_killed_leaves_its_lease_spent(new_worker, file):
    prepared(new_worker(), file).take(5, BUDGET)
    assert file.spent_nanousd() == LEASE
    assert prepared(new_worker(), file).take(BUDGET - LEASE, BUDGET) is None


def test_one_that_ends_in_good_order_gives_it_back(new_worker, file):
    worker = prepared(new_worker(), file)
    worker.take(5, BUDGET)
    worker.close()
    wait_for(lambda: file.spent_nanousd() == 5)


def test_what_is_not_used_of_a_lease_is_worth_nothing_in_the_next_hour(new_worker, file, clock):
    worker = prepared(new_worker(), file)
    hour = worker.take(5, BUDGET)
    clock.us += HOUR_US
    assert worker.take(BUDGET, BUDGET) == hour + 1
    assert file.spent_nanousd() == BUDGET
    worker.correct(hour, -5)
    assert worker.take(1, BUDGET) is None


def test_a_clock_that_went_back_refills_nothing(new_worker, file, clock):
    worker = prepared(new_worker(), file)
    clock.us -= 5 * HOUR_US
    taken = 0
    while worker.take(LEASE // 2, BUDGET) is not None:
        taken += LEASE // 2
    assert BUDGET - LEASE <= taken <= BUDGET


@pytest.mark.parametrize("budget", [0, 10_000_000, 100_000_000])
def test_a_small_budget_is_not_leased_and_spent_to_the_last_nano_dollar(new_worker, file, tmp_path, budget):
    one, other = new_worker(), new_worker()
    one.prepare(budget)
    assert not (tmp_path / "emergency").exists()
    taken = sum(each.take(budget // 10, budget) is not None for each in (one, other) * 10 if budget)
    assert taken == (10 if budget else 0)
    assert one.take(1, budget) is None
    assert other.is_used_up(budget)
    assert (file.spent_nanousd() or 0) == budget


def test_what_many_spend_is_never_more_than_there_is_and_nearly_all(new_worker, file):
    cost, workers = 4_000_000, [new_worker() for _ in range(4)]

    def spend(worker):
        taken = 0
        while (hour := worker.take(cost, BUDGET)) is not None:
            worker.correct(hour, -cost // 2)
            taken += cost // 2
        return taken

    with ThreadPoolExecutor(8) as pool:
        spent = sum(pool.map(spend, workers * 2))
    assert spent <= BUDGET
    assert spent > BUDGET - len(workers) * LEASE
    assert file.spent_nanousd() <= BUDGET


@pytest.mark.parametrize("lowered", [0, 1_000])
def test_a_budget_that_is_lowered_holds_at_once(new_worker, file, lowered):
    worker = new_worker()
    worker.prepare(BUDGET)
    wait_for(lambda: file.spent_nanousd() == LEASE)
    assert worker.take(1_001, lowered) is None
    assert (worker.take(1_000, lowered) is not None) == (lowered == 1_000)
    assert worker.take(1, lowered) is None
    wait_for(lambda: file.spent_nanousd() == lowered)
    assert worker.take(1_000, BUDGET) is not None


def test_an_overrun_is_charged_beyond_the_lease(new_worker, file):
    worker = prepared(new_worker(), file)
    hour = worker.take(LEASE, BUDGET)
    before = file.spent_nanousd()
    wait_for(lambda: not worker._is_leasing)
    worker.correct(hour, 2 * LEASE + 7)
    assert file.spent_nanousd() >= before + 7


def test_a_flood_on_a_disk_that_is_stuck_leaves_a_bounded_number_of_jobs(new_worker, file, monkeypatch):
    monkeypatch.setattr(leased_budget, "WAIT_SECONDS", 0)
    worker, small = new_worker(), 10_000_000
    file.goes_on.clear()
    assert [worker.take(1, small) for _ in range(500)] == [None] * 500
    assert worker._executor._work_queue.qsize() < leased_budget.MOST_WAITING
    file.goes_on.set()
    wait_for(lambda: worker._waiting == 0)
    assert worker.take(1, small) is not None
