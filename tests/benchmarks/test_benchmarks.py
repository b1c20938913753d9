import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis

from backends import open_backend
from backends.strategies import script_words
from benchmarks import scripts_before
from benchmarks.__main__ import program_of
from benchmarks.bench import Bench, the_six
from benchmarks.measure import at_least, at_most, medians_us
from benchmarks.server_time import Scripts
from flaskapp.lab.delay import delayed
from flaskapp.lab.race import COST_NANOUSD
from flaskapp.ops.embedded_redis import bundled_server
from flaskapp.ops.running_redis import HOST

ROOT = Path(__file__).resolve().parents[2]


def test_every_benchmark_runs_beside_its_baseline_in_one_run(tmp_path):
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks", "--quick", "--json", str(figures)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    written = json.loads(figures.read_text())
    missed = [row["name"] for row in written["rows"] if row["is_met"] is False]
    # Whether a ratio is met depends on the machine; the exit status has to say so.
    assert done.returncode == (1 if missed else 0), done.stderr
    assert all(f"missed: {name}" in done.stderr for name in missed)
    names = " | ".join(row["name"] for row in written["rows"])
    for part in (
        "1,000,000 in the window",
        "settle",
        "1 ms to Redis",
        "server time",
        "12 budgets",
        "ten budgets with four shares",
        "memory of an identifier",
        "16 further budgets",
    ):
        assert part in names
    beside_before = [row for row in written["rows"] if row["baseline_name"] == "before budgets were rows"]
    assert {row["target"] for row in beside_before} == {"≤ 1 x", ""}
    assert all(row["baseline"] for row in written["rows"] if row["unit"] == "µs")
    assert {"machine", "server", "python", "redis-py", "seed"} <= written["about"].keys()
    assert written["about"]["machine"] in done.stdout


@pytest.fixture
def bench(redis_server):
    bench = Bench(redis_server.port, redis_server.pid, seed=1, turns=1)
    bench.raw.flushdb()
    yield bench
    bench.close()


@pytest.mark.parametrize("words", [scripts_before, script_words], ids=["before", "now"])
def test_the_scripts_of_both_times_book_the_same(bench, words):
    scripts = Scripts(bench, words)
    kept, more = scripts.reserve(bench.ask("me")), scripts.reserve(bench.ask("me"))
    scripts.extend(more)
    scripts.settle(kept)
    backend = open_backend("atomic", bench.own_link)
    its_spent = {use.spent_nanousd for use in backend.books(the_six("me")).uses}
    assert its_spent == {COST_NANOUSD + 2 * (COST_NANOUSD // 4)}


def test_a_server_is_chosen_by_its_name(monkeypatch, tmp_path):
    program = tmp_path / "redis-server"
    program.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert program_of("redis") == program
    assert program_of("valkey") == bundled_server()
    assert program_of(None) is None
    program.unlink()
    with pytest.raises(SystemExit, match="not on PATH"):
        program_of("redis")


def test_the_proxy_delays(redis_server):
    with delayed(redis_server.port, round_trip_us=20_000) as port, redis.Redis(HOST, port) as far:
        far.ping()
        start = time.perf_counter()
        far.ping()
        assert time.perf_counter() - start >= 0.02


def test_the_proxy_does_not_throttle(redis_server):
    with delayed(redis_server.port, round_trip_us=200_000) as port, redis.Redis(HOST, port) as far:
        pipe = far.pipeline(transaction=False)
        for _ in range(100):
            pipe.execute_command("ECHO", "x" * 10_000)
        start = time.perf_counter()
        assert len(pipe.execute()) == 100
        # A hundred delays one after another would be twenty seconds, on however fast a machine.
        assert time.perf_counter() - start < 10


@pytest.mark.parametrize(("limit", "is_met"), [(2.0, True), (1.9, False), (None, None)])
def test_at_most_compares_with_its_baseline(limit, is_met):
    row = at_most("x", 20.0, ("y", 10.0), limit)
    assert (row.ratio, row.is_met) == (2.0, is_met)


@pytest.mark.parametrize(("limit", "is_met"), [(4.0, True), (4.1, False), (None, None)])
def test_at_least_compares_with_its_baseline(limit, is_met):
    row = at_least("x", 10.0, ("y", 40.0), limit)
    assert (row.ratio, row.percent_less, row.is_met) == (4.0, 75.0, is_met)


def test_a_call_that_times_itself_is_believed():
    assert medians_us({"its own": lambda: 0.5, "ours": lambda: None}, 3)["its own"] == 500_000
