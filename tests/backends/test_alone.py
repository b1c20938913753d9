"""`backends` by itself: what is not installed is not missed by those who do not use it."""

import subprocess
import sys

import pytest

WITHOUT = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ImportError(f"no package {{name}}")

sys.meta_path.insert(0, Blocker())

from backends import Ask, Budget, Calendar, Outcome, Refusal, Reservation, Sliding, SystemClock, open_backend

BUDGETS = (Budget("monthly", "who", Calendar("month"), 1_000), Budget("minute", "who", Sliding(60), None))

def reserve_and_settle(backend):
    reservation = backend.reserve(Ask("r1", 600, BUDGETS))
    assert isinstance(reservation, Reservation), reservation
    refusal = backend.reserve(Ask("r2", 600, BUDGETS))
    assert isinstance(refusal, Refusal), refusal
    assert refusal.budget == "monthly", refusal
    settlement = backend.settle(reservation, 400)
    assert (settlement.outcome, settlement.booked_nanousd) == (Outcome.SETTLED, 400)
    assert [use.spent_nanousd for use in backend.books(BUDGETS).uses] == [400, 400]
"""
OF_THE_SERVICE = ["pydantic", "flask", "werkzeug", "click", "gevent", "genai_prices", "rs_bpe", "prometheus_client"]


def run_without(missing, code, *args):
    command = [sys.executable, "-c", WITHOUT.format(missing=missing) + code, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_memory_needs_no_redis():
    ended = run_without(
        ["redis", "hiredis", "fakeredis", *OF_THE_SERVICE],
        """
from pathlib import Path

from backends.guard import EmergencyBudget, FailurePolicy, Guard

backend, clock = open_backend("memory", None), SystemClock()
reserve_and_settle(backend)
policy, emergency = FailurePolicy(is_open=False, emergency_nanousd=0), EmergencyBudget(Path("none"), clock)
guard = Guard(backend, backend, link=None, emergency=emergency, clock=clock, observer=print, policy=lambda: policy)
assert isinstance(guard.reserve(Ask("r3", 600, BUDGETS)), Reservation)
assert guard.books(BUDGETS).spent("minute") == 1_000
""",
    )
    assert ended.returncode == 0, ended.stderr


def test_without_redis_the_link_says_what_is_missing():
    ended = run_without(["redis"], "from backends import Link")
    assert ended.returncode == 1
    assert "ImportError: no package redis" in ended.stderr


@pytest.mark.parametrize("name", ["atomic", "legacy", "multi", "watch"])
def test_the_strategies_on_redis_need_redis_py_alone(redis_url, name):
    ended = run_without(
        ["hiredis", "fakeredis", *OF_THE_SERVICE],
        f"""
from backends import Link

link = Link(sys.argv[1], clock=SystemClock())
reserve_and_settle(open_backend({name!r}, link))
link.close()
""",
        redis_url,
    )
    assert ended.returncode == 0, ended.stderr


def test_no_other_name_is_made_up():
    import backends

    with pytest.raises(AttributeError, match="no attribute 'Lnk'"):
        _ = backends.Lnk
    assert backends.Link.__module__ == "backends.store.link"
