import json

import pytest
from click.testing import CliRunner

from flaskapp.lab.explore_command import make_explore_cli
from flaskapp.lab.explorer import explore
from flaskapp.ops.embedded_redis import EmbeddedServer
from tests.racers import register


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with EmbeddedServer(tmp_path_factory.mktemp("explore")) as server:
        yield server


@pytest.fixture
def run(server):
    return lambda *args: CliRunner().invoke(make_explore_cli(), ["--redis", server.url, *args])


def test_a_row_each_the_shortest_failing_order_and_a_verdict(run):
    result = run("--backends", "multi, watch,atomic")
    assert result.exit_code == 0, result.output
    rows = {line.split()[1]: line.split()[3:10:2] for line in result.stdout.splitlines() if line.startswith("│ ")}
    assert rows["multi"] == ["6", "3", "1", "2"]
    assert rows["watch"] == ["40,116,600", "22", "0", "–"]
    assert rows["atomic"] == ["2", "2", "0", "–"]
    assert "multi, order 2: the commands that decide" in result.stdout
    *_, bound, verdict = result.stdout.strip().splitlines()
    assert bound == "Explored: all orders up to commuting commands."
    assert verdict == (
        "multi overspends in 1 of 3 orders; no order of watch overspends; no order of atomic overspends."
    )


def test_on_a_server_of_its_own(monkeypatch):
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1/0")  # would fail
    result = CliRunner().invoke(make_explore_cli(), ["--backends", "atomic"])
    assert result.exit_code == 0, result.output


def test_json_has_everything(run):
    result = run("--backends", "multi", "--callers", "3", "--json")
    assert result.exit_code == 0, result.output
    (told,) = json.loads(result.stdout)
    assert (told["backend"], told["callers"], told["room"]) == ("multi", 3, 2)
    assert (told["reduced_orders"], told["overspending_orders"]) == (25, 16)
    assert len(told["overspending"]) == 16
    assert told["is_as_declared"]
    assert {step["caller"] for step in told["shortest"]} == {"A", "B", "C"}


def test_an_order_is_replayed_by_its_number(run):
    result = run("--backends", "multi", "--replay", "2")
    assert result.exit_code == 0, result.output
    assert "multi, order 2: A×1 B×2 A×1" in result.stdout
    assert result.stdout.endswith("Admitted: A, B. Booked $0.008100000 of $0.004050000: $0.004050000 too much.\n")
    fine = run("--backends", "multi", "--replay", "1", "--json")
    assert json.loads(fine.stdout)["overspends"] is False


def test_one_that_breaks_its_promise_ends_with_1(run, monkeypatch):
    register(monkeypatch)
    result = run("--backends", "never_refuses")
    assert result.exit_code == 1
    assert result.stdout.strip().endswith("never_refuses overspends in 2 of 2 orders, which it promises never to do.")


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (("--backends", "nobody"), "--backends: one of "),
        (("--backends", "memory"), "memory asks Redis nothing"),
        (("--backends", "multi", "--replay", "9"), "multi has no order 9 of 2 callers"),
        (("--backends", "multi", "--redis", "redis://127.0.0.1:1/0"), ""),
    ],
)
def test_what_cannot_be_run_is_one_line(run, args, line):
    result = run(*args)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: {line}")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    "args", [("--callers", "4"), ("--replay", "1"), ("--replay", "0", "--backends", "multi"), ("--backends", ",")]
)
def test_what_makes_no_sense_is_a_usage_error(run, args):
    result = run(*args)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


def test_it_tells_how_many_orders_it_has_run(server):
    told = []
    found = explore(server.url, "multi", progress=lambda *what: told.append(what))
    assert told == [("orders of multi", number, None) for number in range(1, found.reduced_orders + 1)]
