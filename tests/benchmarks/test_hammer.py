"""The hammer, in short: the atomic strategy holds, the legacy one is caught, the oracle notices each kind of wrong."""

import subprocess
import sys
from pathlib import Path

import pytest
import redis

from backends.budgets import BUILT_IN, Calendar, Forever, Scope, Sliding
from backends.clock import SystemClock
from backends.store.link import Link
from benchmarks.hammer import Hammer
from benchmarks.hammer_load import MOST_FURTHER_BUDGETS, Share, is_tight, plan_of, population_of, run_share
from benchmarks.hammer_oracle import Place, removable_at_us, violations

ROOT = Path(__file__).resolve().parents[2]
PROCESSES = 4


def test_nothing_breaks_the_atomic_strategy(redis_url):
    with Hammer(redis_url, processes=PROCESSES, requests=1_000) as hammer:
        # The tenth is audited while it is hammered, too.
        assert {seed: hammer.run(seed) for seed in (7, 10)} == {7: [], 10: []}
        counts = hammer.figures.counts
    assert counts["requests"] == 2 * 1_000
    assert {"admitted", "duplicates", "conflicts", "extends", "repeats"} <= set(counts)
    assert any(name.startswith("refused") for name in counts)


def test_the_legacy_strategy_is_caught(redis_url):
    with Hammer(redis_url, processes=PROCESSES, requests=400, backend="legacy") as hammer:
        assert any(hammer.run(seed) for seed in range(1, 30))


def test_a_seed_is_the_same_population_and_plans_again():
    assert population_of(5, 100) == population_of(5, 100) != population_of(6, 100)
    assert plan_of(population_of(5, 100), "r", is_shared=False) == plan_of(population_of(5, 100), "r", is_shared=False)
    assert len({population_of(seed, 100).window_seconds for seed in range(50)}) == 5


def test_seeds_have_all_kinds_of_further_budgets():
    lists = [population_of(seed, 100).budgets[len(BUILT_IN) :] for seed in range(100)]
    assert {len(further) for further in lists} == set(range(MOST_FURTHER_BUDGETS + 1))
    budgets = [budget for further in lists for budget in further]
    assert {budget.scope for budget in budgets} == set(Scope)
    assert {type(budget.period) for budget in budgets} == {Sliding, Calendar, Forever}
    assert {budget.is_shadow for budget in budgets} == {True, False}
    assert any(is_tight(budget) for budget in budgets)


def test_the_command_prints_figures_and_its_status_is_0(tmp_path):
    command = [sys.executable, "-m", "benchmarks.hammer", "--seeds", "1", "--requests", "200", "--processes", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "requests: 200\n" in done.stdout
    assert done.stdout.endswith("violations: 0\n")


def test_a_pending_bucket_may_be_removed_once_its_time_is_over():
    """Otherwise the oracle would miss it in every seed that outlasts it."""
    short = next(found for found in (population_of(seed, 400) for seed in range(100)) if found.pending_seconds == 2)
    keys = ("llm:open:identifier:me", "llm:open:team:ours", "llm:open:global")
    assert [removable_at_us(short, Place(key, 60)) for key in keys] == [63_000_000] * 3


# --- the oracle can fail


def has_what_is_falsified(population):
    """Pending for two minutes: nothing has left a window when it is checked. And further budgets of either type."""
    further = population.budgets[len(BUILT_IN) :]
    kinds = {type(budget.period) for budget in further if budget.scope is Scope.GLOBAL}
    return population.pending_seconds == 120 and {Sliding, Calendar} <= kinds


class Bench:
    """A seed that was hammered by this process alone, to be falsified."""

    def __init__(self, url):
        self.population = next(filter(has_what_is_falsified, (population_of(seed, 400) for seed in range(1_000))))
        self.link = Link(url, clock=SystemClock(), timeout_seconds=10)
        self.raw = redis.Redis.from_url(url, decode_responses=True)
        self.report = run_share(Share(self.population, 0, 1, url, "atomic"))

    def violated(self):
        return {violation[:2] for violation in violations(self.link, self.population, [self.report])}

    def first(self, fate):
        return next(trace for trace in self.report.traces if trace.plan.fate == fate and not trace.plan.is_shared)

    def key(self, pattern):
        return min(self.raw.scan_iter(pattern))

    def close(self):
        self.raw.close()
        self.link.close()


@pytest.fixture
def bench(redis_url):
    bench = Bench(redis_url)
    assert bench.violated() == set()
    yield bench
    bench.close()


def more_at_one_instant(bench):
    for trace in bench.report.traces:
        trace.holds[0] = (bench.report.traces[-1].made_at_us, 10**15)


def wrong_total(bench):
    bench.raw.incrby(bench.key("llm:global:daily:*"), 1)


def wrong_bucket(bench):
    key = bench.key("llm:network:recent:*")
    bench.raw.zincrby(key, 1, bench.raw.zrange(key, 0, -1)[0])


def settled_in_another_bucket(bench):
    key = bench.key("llm:cost:recent:*")
    start, held = bench.raw.zrange(key, 0, -1, withscores=True)[0]
    bench.raw.zrem(key, start)
    bench.raw.zadd(key, {str(int(start) - 2): held})


def wrong_further_total(bench):
    bench.raw.incrby(bench.key("llm:budget:*:all:*"), 1)


def wrong_further_bucket(bench):
    key = bench.key("llm:budget:*:sliding*:all")
    bench.raw.zincrby(key, 1, bench.raw.zrange(key, 0, -1)[0])


def further_total_in_another_period(bench):
    key = bench.key("llm:budget:*:all:*")
    budget_and_owner, _, start = key.rpartition(":")
    bench.raw.rename(key, f"{budget_and_owner}:{int(start) - 900}")


def two_ends(bench):
    trace = bench.first("settle")
    trace.ends.append((*trace.ends[0][:2], "settled", trace.ends[0][3]))


def other_answer_to_a_repeat(bench):
    trace = bench.first("settle")
    trace.ends.append((*trace.ends[0][:2], "repeated", trace.ends[0][3] + 1))


def no_end(bench):
    bench.first("settle").ends.clear()


def key_used_twice(bench):
    one, other = [trace for trace in bench.report.traces if trace.plan.fate == "settle"][:2]
    object.__setattr__(one.plan, "idempotency", "the same")
    object.__setattr__(other.plan, "idempotency", "the same")


def bill_above_booking(bench):
    bench.first("settle").billed += 1


def record_lost(bench):
    bench.raw.delete(f"llm:reservation:{bench.first('settle').rid}")


def negative_total(bench):
    bench.raw.set("llm:cost:daily:nobody:2026-03-14", -1, ex=60)


def no_ttl(bench):
    bench.raw.persist(bench.key("llm:open:global"))


def record_of_an_end_that_never_was(bench):
    key = f"llm:reservation:{bench.first('crash').rid}"
    bench.raw.set(key, bench.raw.get(key).replace("open", "settled"), keepttl=True)


@pytest.mark.parametrize(
    ("falsify", "invariant"),
    [
        (more_at_one_instant, "I1"),
        (wrong_total, "I2"),
        (wrong_bucket, "I2"),
        (wrong_further_total, "I2"),
        (wrong_further_bucket, "I2"),
        (further_total_in_another_period, "I6"),
        (two_ends, "I3"),
        (other_answer_to_a_repeat, "I3"),
        (no_end, "I3"),
        (key_used_twice, "I3"),
        (bill_above_booking, "I4"),
        (record_lost, "I4"),
        (negative_total, "I5"),
        (settled_in_another_bucket, "I6"),
        (no_ttl, "I7"),
        (record_of_an_end_that_never_was, "I8"),
    ],
    ids=lambda what: what if isinstance(what, str) else what.__name__,
)
def test_the_oracle_notices(bench, falsify, invariant):
    falsify(bench)
    assert invariant in bench.violated()
