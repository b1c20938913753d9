import json
import os
import threading

import pytest

from backends.conformance.cases import US
from backends.conformance.harness import START_US, ManualClock
from backends.guard import EmergencyBudget

HOUR_US = 3_600 * US
HOUR = START_US // HOUR_US


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data" / "emergency"


@pytest.fixture
def budget(path, clock):
    return EmergencyBudget(path, clock)


def test_it_is_taken_until_it_is_used_up_to_the_last_nano_dollar(budget):
    assert budget.take(60, 100) == HOUR
    assert budget.take(41, 100) is None
    assert budget.take(40, 100) == HOUR
    assert budget.take(1, 100) is None
    assert budget.spent_nanousd() == 100


def test_the_next_hour_brings_a_new_one(budget, clock):
    budget.take(100, 100)
    clock.us += HOUR_US
    assert budget.spent_nanousd() == 0
    assert budget.take(100, 100) == HOUR + 1


def test_neither_a_restart_nor_a_clock_that_went_back_refills_it(budget, path, clock):
    budget.take(100, 100)
    assert EmergencyBudget(path, clock).take(1, 100) is None
    clock.us -= 5 * HOUR_US
    assert EmergencyBudget(path, clock).take(1, 100) is None


def test_what_was_not_used_is_given_back_within_its_hour(budget, clock):
    hour = budget.take(100, 100)
    budget.correct(hour, -30)
    assert budget.spent_nanousd() == 70
    clock.us += HOUR_US
    budget.take(10, 100)
    budget.correct(hour, -30)
    assert budget.spent_nanousd() == 10


def test_it_never_goes_below_nothing(budget):
    budget.correct(budget.take(10, 100), -50)
    assert budget.spent_nanousd() == 0


@pytest.mark.parametrize(
    "text",
    [
        "garbage",
        "[]",
        "{}",
        '{"hour": 1}',
        '{"hour": "1", "spent_nanousd": 0}',
        '{"hour": 1.5, "spent_nanousd": 0}',
        "1",
    ],
)
def test_a_page_that_cannot_be_read_counts_as_used_up(budget, path, text):
    budget.take(1, 100)
    path.write_text(text)
    assert budget.take(1, 100) is None
    assert budget.spent_nanousd() is None
    budget.correct(HOUR, -1)
    assert path.read_text() == text


def test_what_an_earlier_hour_spoilt_is_used_up_for_that_hour_only(budget, path, clock):
    budget.take(1, 100)
    path.write_text("garbage")
    os.utime(path, (clock.us // US, clock.us // US))
    assert budget.take(1, 100) is None
    clock.us += HOUR_US
    assert budget.take(1, 100) == HOUR + 1


def test_a_place_that_cannot_be_written_counts_as_used_up(tmp_path, clock):
    (tmp_path / "file").write_text("in the way")
    budget = EmergencyBudget(tmp_path / "file" / "emergency", clock)
    assert budget.take(1, 100) is None
    assert budget.spent_nanousd() is None


def test_a_shorter_page_leaves_nothing_of_a_longer_one(budget, path):
    budget.correct(budget.take(10**15, 10**15), -(10**15) + 1)
    assert json.loads(path.read_text())["spent_nanousd"] == 1


def test_threads_share_it_exactly(path, clock):
    taken = []

    def take():
        budget = EmergencyBudget(path, clock)
        while budget.take(7, 700) is not None:
            taken.append(7)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(taken) == 700
