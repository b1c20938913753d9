import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import redis
from click.testing import CliRunner

from backends import open_backend
from backends.clock import SystemClock
from backends.conformance.cases import ROOMY, WHO, make_ask
from backends.store.link import Link
from flaskapp.budgets import EACH_OWNER, BudgetPlan, BudgetRows, Override
from flaskapp.cli.ledger import identifier_of, make_ledger_cli
from flaskapp.ops.embedded_redis import EmbeddedServer
from flaskapp.ops.running_redis import record_redis

ROOT = Path(__file__).resolve().parents[2]
COST = 4_050_000
LIMITS = replace(ROOMY, window_nanousd=2 * COST, day_nanousd=250_000_000)


@pytest.fixture
def link(redis_url):
    link = Link(redis_url, clock=SystemClock())
    yield link
    link.close()


@pytest.fixture
def raw(redis_url):
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def backend(link):
    return open_backend("atomic", link)


def run(link, *words, further=(), backend_name="atomic"):
    plan = BudgetPlan(LIMITS.budgets(EACH_OWNER, EACH_OWNER), further)
    return CliRunner().invoke(make_ledger_cli(lambda: link, lambda: plan, backend_name, 56), list(words))


def test_show_prints_the_limits_the_marker_and_the_reservations(link, backend):
    backend.settle(backend.reserve(make_ask("r0", COST, LIMITS)), 50_000)
    backend.reserve(make_ask("r1", COST, LIMITS))
    backend.reserve(make_ask("r2", COST, LIMITS))
    shown = run(link, "show", WHO)
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert shown.exit_code == 0
    assert lines[1][:6] == ["window", "0.008100000", "0.000050000", "0.004050000", "0.000000000", "0.004000000"]
    assert lines[2][:3] == ["day", "0.250000000", "0.000050000"]
    assert lines[2][-2:] == ["00:00:00", "UTC"]
    assert "throttle marker: window_limit, 30 s left, only open reservations stood in the way" in shown.stdout
    assert [line[:3] for line in lines[-2:]] == [["r1", "open", "0.004050000"], ["r0", "settled", "0.000050000"]]


def test_show_says_how_many_there_are_where_it_lists_fewer(link, backend):
    for number in range(3):
        backend.release(backend.reserve(make_ask(f"r{number}", COST, LIMITS)))
    assert "reservations: 3, the newest 2\n" in run(link, "show", WHO, "--most", "2").stdout


def test_of_an_unknown_one_nothing_is_booked_and_that_is_no_error(link):
    shown = run(link, "show", "nobody")
    assert (shown.exit_code, shown.stdout, shown.stderr) == (0, "nothing is booked for nobody\n", "")


def test_show_for_machines(link, backend):
    backend.reserve(make_ask("r0", COST, LIMITS))
    told = json.loads(run(link, "show", WHO, "--json").stdout)
    assert (told["identifier"], told["is_known"], told["marker"]) == (WHO, True, None)
    assert told["limits"][0]["held_nanousd"] == told["reservations"][0]["nanousd"] == COST
    assert not json.loads(run(link, "show", "nobody", "--json").stdout)["is_known"]


def test_reset_asks_nothing_and_says_what_it_cleared(link, backend):
    for number in range(3):
        backend.reserve(make_ask(f"r{number}", COST, LIMITS))
    done = run(link, "reset", WHO)
    assert (done.exit_code, done.stdout.splitlines()[1:]) == (
        0,
        [
            "window: 0.008100000 USD, of it open: 0.008100000 USD",
            "today and yesterday: 0.008100000 USD",
            "throttle marker: cleared",
        ],
    )
    shown = run(link, "show", WHO).stdout
    assert "throttle marker: none\nbooks cleared: " in shown
    assert json.loads(run(link, "reset", WHO, "--json").stdout)["window_nanousd"] == 0


FURTHER = BudgetRows("").read(
    [
        {"name": "month", "scope": "identifier", "period": "month", "limit_usd": "0.01", "throttle_seconds": 45},
        {"name": "ever", "scope": "identifier", "period": "forever", "limit_usd": 2, "mode": "shadow"},
        {"name": "others", "scope": "key", "period": "day", "limit_usd": 3},
        {"name": "all", "scope": "global", "period": "day", "limit_usd": 3},
    ]
)
OWN_FURTHER = tuple(row.budget._replace(owner=WHO) for row in FURTHER[:2])


def test_further_budgets_of_the_identifier_are_shown_and_cleared_and_those_of_others_are_not(link, backend):
    for number in range(3):
        backend.reserve(make_ask(f"r{number}", COST, further=OWN_FURTHER))
    shown = run(link, "show", WHO, further=FURTHER)
    lines = [line.split("  ")[0] for line in shown.stdout.splitlines()]
    assert lines[:5] == ["limit", "window", "day", "month", "ever (shadow)"]
    cells = {line.split()[0]: line.split() for line in shown.stdout.splitlines()}
    assert cells["month"][1:6] == ["0.010000000", "0.000000000", "0.008100000", "0.000000000", "0.001900000"]
    assert cells["month"][-1] == "UTC"
    assert cells["ever"][-1] == "1.991900000"  # never renews
    assert "throttle marker: budget_limit (month), 45 s left" in shown.stdout
    done = run(link, "reset", WHO, further=FURTHER)
    assert done.stdout.splitlines()[2:] == [
        "today and yesterday: 0.008100000 USD",
        "month: 0.008100000 USD",
        "ever: 0.008100000 USD",
        "throttle marker: cleared",
    ]
    assert json.loads(run(link, "reset", WHO, "--json", further=FURTHER).stdout)["further_nanousd"] == {
        "month": 0,
        "ever": 0,
    }


def test_further_budgets_for_machines(link, backend):
    backend.reserve(make_ask("r0", COST, further=OWN_FURTHER))
    told = json.loads(run(link, "show", WHO, "--json", further=FURTHER).stdout)
    assert [(limit["name"], limit["is_shadow"]) for limit in told["limits"]] == [
        ("window", False),
        ("day", False),
        ("month", False),
        ("ever", True),
    ]
    assert {limit["held_nanousd"] for limit in told["limits"]} == {COST}


def test_an_override_of_the_identifier_is_its_limit(link):
    override = Override("month", WHO, 7, until_us=None)
    plan = BudgetPlan(LIMITS.budgets(EACH_OWNER, EACH_OWNER), FURTHER, [override])
    shown = CliRunner().invoke(make_ledger_cli(lambda: link, lambda: plan, "atomic", 56), ["show", WHO, "--json"])
    assert json.loads(shown.stdout)["limits"][2]["limit_nanousd"] == 7


def test_a_limit_that_is_none_is_told_as_that(link, backend):
    backend.reserve(make_ask("r0", COST))
    plan = BudgetPlan(replace(LIMITS, day_nanousd=None).budgets(EACH_OWNER, EACH_OWNER))
    shown = CliRunner().invoke(make_ledger_cli(lambda: link, lambda: plan, "atomic", 56), ["show", WHO])
    assert shown.stdout.splitlines()[2].split()[:6] == [
        "day",
        "none",
        "0.000000000",
        "0.004050000",
        "0.000000000",
        "none",
    ]


def test_books_that_agree_are_status_0(link, backend):
    backend.settle(backend.reserve(make_ask("r0", COST, LIMITS)), 50_000)
    backend.reserve(make_ask("r1", COST, LIMITS))
    done = run(link, "audit")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.startswith(f"books in: {link.url}\n")
    assert "reservations: 2 (1 open, 0 expired, 1 settled, 0 released)\n" in done.stdout
    assert "held by open ones: 0.004050000 USD\n" in done.stdout
    assert done.stdout.endswith("disagreements: 0\n")


def test_what_disagrees_is_listed_and_is_status_1(link, backend, raw):
    backend.reserve(make_ask("r0", COST, LIMITS))
    key = f"llm:cost:recent:{WHO}"
    start = raw.zrange(key, 0, -1)[0].decode()
    raw.zincrby(key, 1, start)
    done = run(link, "audit")
    assert done.exit_code == 1
    assert f"total: {key} holds in bucket {start} {COST + 1}, and the 1 reservations there" in done.stdout
    assert done.stdout.endswith("disagreements: 1\n")
    (told,) = json.loads(run(link, "audit", "--json").stdout)["disagreements"]
    assert (told["kind"], told["stored_nanousd"], told["expected_nanousd"]) == ("total", COST + 1, COST)


@pytest.mark.parametrize("words", [["audit"], ["show", "x"], ["reset", "x"]])
def test_what_could_not_run_is_one_line_and_status_2(words):
    link = Link("redis://127.0.0.1:1", clock=SystemClock(), timeout_seconds=0.1)
    done = run(link, *words)
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("Error: ")
    link.close()


@pytest.mark.parametrize("words", [["audit"], ["show", "x"], ["reset", "x"]])
def test_the_memory_backend_has_no_books_to_read(link, words):
    done = run(link, *words, backend_name="memory")
    assert (done.exit_code, done.stderr.count("THROTTLE_BACKEND=memory")) == (2, 1)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("hash456", "hash456"),
        ("a" * 64, "a" * 64),
        ("ip:198.51.100.7", "ip:198.51.100.7"),
        ("ip:2001:db8:0:1ff::7", "ip:2001:db8:0:100::/56"),
        ("ip:2001:db8::/56", "ip:2001:db8::/56"),
        ("ip:2001:db8::/64", "ip:2001:db8::/64"),
        ("ip:unknown", "ip:unknown"),
    ],
)
def test_who_is_meant(typed, meant):
    assert identifier_of(typed, 56) == meant


def test_every_command_finds_the_embedded_server_without_further_set_up(tmp_path):
    with EmbeddedServer(tmp_path / "redis") as server:
        record_redis(tmp_path / ".data", server.url)
        link = Link(server.url, clock=SystemClock())
        open_backend("atomic", link).reserve(make_ask("r0", COST, LIMITS))
        link.close()
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HIGH_COST_THRESHOLD_USD": "0.5"}
        (tmp_path / "wsgi.py").symlink_to(ROOT / "wsgi.py")
        command = [sys.executable, "-m", "flask", "--app", "wsgi", "ledger"]
        shown = subprocess.run(
            [*command, "show", WHO, "--json"],
            check=True,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
    limit = json.loads(shown.stdout)["limits"][0]
    assert (limit["limit_nanousd"], limit["held_nanousd"]) == (500_000_000, COST)
