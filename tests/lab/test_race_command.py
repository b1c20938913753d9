import json
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import redis
from click.testing import CliRunner

from backends.clock import SystemClock
from backends.store import scripts
from backends.store.link import Link
from flaskapp.cli import console
from flaskapp.cli.scripts import make_scripts_cli, place_of
from flaskapp.lab.race import Plan, RaceResult
from flaskapp.lab.race_command import make_race_cli
from flaskapp.lab.tables import print_table, verdict
from flaskapp.ops.embedded_redis import EmbeddedServer
from tests.processes import children_of, is_alive
from tests.racers import register
from tests.servers import ROOT, wait_until

GOOD = RaceResult(
    backend="atomic",
    promises_atomicity=True,
    was_held=False,
    admitted=4,
    refused=6,
    spent_nanousd=16_200_000,
    limit_nanousd=16_200_000,
    overspend_nanousd=0,
    round_trips_a_request=1.0,
    check_p50_ms=0.1,
    check_p95_ms=0.2,
)
BROKEN = replace(GOOD, spent_nanousd=20_250_000, overspend_nanousd=4_050_000)
RACY = replace(BROKEN, backend="legacy", promises_atomicity=False, was_held=True)
NOT_RACY = replace(RACY, spent_nanousd=16_200_000, overspend_nanousd=0)


@pytest.fixture(scope="module")
def race_server(tmp_path_factory):
    with EmbeddedServer(tmp_path_factory.mktemp("race")) as server:
        yield server


def run(*args):
    return CliRunner().invoke(make_race_cli(), args)


def test_a_race_on_a_server_of_its_own_ends_well_with_a_row_each_and_a_verdict(monkeypatch):
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1/0")  # would fail
    result = run()
    assert result.exit_code == 0, result.output
    *_, limit, of_legacy, of_atomic = result.stdout.strip().splitlines()
    assert limit.strip() == "limit $0.016200000"
    assert (of_legacy, of_atomic) == ("legacy overspent by $0.024300000.", "atomic stayed within its limit.")
    rows = {words[0]: words for words in map(str.split, result.stdout.splitlines()) if len(words) == 8}
    assert rows["legacy"][1:5] == ["10", "0", "0.040500000", "0.024300000"]
    assert rows["atomic"][1:6] == ["4", "6", "0.016200000", "0.000000000", "1.0"]
    assert result.stderr == ""


def test_json_has_every_figure(race_server):
    result = run("--redis", race_server.url, "--json", "-n", "6", "-k", "2", "--rounds", "2")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["requests"], told["room"], told["rounds"], told["exit_status"]) == (6, 2, 2, 0)
    legacy, atomic = told["backends"]
    assert (legacy["backend"], legacy["admitted"], legacy["refused"]) == ("legacy", 12, 0)
    assert legacy["overspend_nanousd"] == legacy["spent_nanousd"] - legacy["limit_nanousd"] > 0
    assert (atomic["backend"], atomic["admitted"], atomic["refused"]) == ("atomic", 4, 8)
    assert atomic["overspend_nanousd"] == 0
    assert atomic["round_trips_a_request"] == 1.0
    assert 0 < atomic["check_p50_ms"] <= atomic["check_p95_ms"]


@pytest.mark.parametrize("name", ["never_refuses", "has_no_race"])
@pytest.mark.parametrize("as_json", [True, False])
def test_one_that_is_not_as_declared_ends_the_race_with_1(monkeypatch, race_server, name, as_json):
    register(monkeypatch)
    args = ["--redis", race_server.url, "-n", "6", *(["--json"] if as_json else [])]
    result = CliRunner().invoke(make_race_cli(["legacy", name]), args)
    assert result.exit_code == 1, result.output


def test_the_verdict_tells_what_each_showed():
    assert verdict([GOOD]) == "atomic stayed within its limit."
    assert verdict([BROKEN]) == "atomic overspent by $0.004050000, which it promises never to do."
    assert verdict([RACY]) == "legacy overspent by $0.004050000."
    assert verdict([NOT_RACY]) == (
        "legacy stayed within its limit, though its callers were held between check and record."
    )


def test_the_verdict_is_one_line_a_strategy_however_many_distances():
    by_luck = replace(NOT_RACY, was_held=False)
    far, farther = replace(RACY, was_held=False, rtt_ms=1.0), replace(RACY, was_held=False, rtt_ms=5.0)
    assert verdict([by_luck, far, farther]) == (
        "legacy overspent by $0.004050000 at 1 ms, $0.004050000 at 5 ms, stayed within its limit at 0 ms."
    )
    assert verdict([GOOD, replace(GOOD, rtt_ms=1.0)]) == "atomic stayed within its limit at 0, 1 ms."


@pytest.mark.parametrize("trips", [28.0, None])
def test_the_table_fits_eighty_columns_and_counts_only_round_trips_that_were_counted(monkeypatch, capsys, trips):
    monkeypatch.setattr(console, "_PIPE_WIDTH", 80)
    far = replace(RACY, rtt_ms=5.0, round_trips_a_request=trips, check_p50_ms=164.007, check_p95_ms=1171.7)
    print_table(Plan(requests=500, room=4, rounds=3), [far], ", over HTTP, 2 workers each")
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert "164.0" in shown
    assert "1172" in shown
    assert ("trips" in shown) == (trips is not None)
    assert "limit $0.016200000, all rounds together" in shown


def test_books_of_somebody_are_refused_in_one_line(race_server):
    with redis.Redis.from_url(race_server.url) as client:
        client.set("llm:throttle:somebody", "x")
        result = run("--redis", race_server.url)
        assert client.keys() == [b"llm:throttle:somebody"]
        client.flushall()
    assert result.exit_code == 2
    assert result.stderr == "Error: that database holds llm: keys; race on one that is not in use\n"
    assert result.stdout == ""


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1/0", "fake://", "http://127.0.0.1", "redis://127.0.0.1:nowhere/0"])
def test_a_server_that_cannot_be_used_is_one_line(url):
    result = run("--redis", url)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert "REDIS_URL" not in result.stderr


@pytest.mark.parametrize(
    "args",
    [
        ("-n", "4", "-k", "4"),
        ("-n", "1"),
        ("-k", "0"),
        ("--rounds", "0"),
        ("--rtt", "x"),
        ("--rtt", "-1"),
        ("--spread", "1"),
        ("--backends", ","),
        ("--http", "--redis", "redis://h"),
    ],
)
def test_what_is_no_race_is_a_usage_error(args):
    result = run(*args)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


@pytest.fixture
def check_scripts(race_server):
    link = Link(race_server.url, clock=SystemClock())
    yield lambda: CliRunner().invoke(make_scripts_cli(lambda: link), ["check"])
    link.close()


def test_every_script_compiles(check_scripts):
    result = check_scripts()
    assert result.exit_code == 0, result.output
    assert {"consume.lua: ok", "reserve.lua: ok", "settle.lua: ok"} <= set(result.stdout.splitlines())


def test_one_that_does_not_compile_is_told_with_its_line(check_scripts, monkeypatch, tmp_path):
    (tmp_path / "lua").mkdir()
    (tmp_path / "lua" / "broken.lua").write_text("local a = 1\nlocal b = = 2\nreturn a\n")
    (tmp_path / "lua" / "good.lua").write_text("return 1\n")
    monkeypatch.setattr(scripts, "resources", SimpleNamespace(files=lambda _: tmp_path))
    result = check_scripts()
    assert result.exit_code == 1
    broken, good = result.stdout.splitlines()
    assert broken.startswith("broken.lua:2: unexpected symbol near '='")
    assert good == "good.lua: ok"


def test_a_server_that_is_away_is_one_line():
    link = Link("redis://127.0.0.1:1/0", clock=SystemClock())
    result = CliRunner().invoke(make_scripts_cli(lambda: link), ["check"])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1


def test_an_error_without_a_line_is_told_whole():
    assert place_of("x.lua", "ERR something else") == "x.lua: ERR something else"
    redis_7 = "ERR Error compiling script (new function): user_script:7: '=' expected near 'x'"
    assert place_of("x.lua", redis_7) == "x.lua:7: '=' expected near 'x'"


def test_each_distance_is_a_row_and_the_verdict_says_which(race_server):
    result = run("--redis", race_server.url, "--backends", "atomic,legacy", "--rtt", "0,2", "-n", "3", "-k", "1")
    assert result.exit_code == 0, result.output
    rows = [words[:2] for words in map(str.split, result.stdout.splitlines()) if len(words) == 9 and words[1].isdigit()]
    assert rows == [["atomic", "0"], ["legacy", "0"], ["atomic", "2"], ["legacy", "2"]]
    *_, of_atomic, of_legacy = result.stdout.strip().splitlines()
    assert of_atomic == "atomic stayed within its limit at 0, 2 ms."
    assert of_legacy == "legacy overspent by $0.008100000 at 0 ms, $0.008100000 at 2 ms."


def test_events_are_a_line_each_round_and_then_the_figures(race_server):
    options = ("--events", "--rounds", "2", "-n", "4", "-k", "2", "--spread", "0.5", "--seed", "3")
    result = run("--redis", race_server.url, *options)
    assert result.exit_code == 0, result.output
    *rounds, last = map(json.loads, result.stdout.splitlines())
    seen = [each["round"] for each in rounds]
    assert [(each["backend"], each["number"]) for each in seen] == [
        ("legacy", 0),
        ("atomic", 0),
        ("legacy", 1),
        ("atomic", 1),
    ]
    assert [len(each["calls"]) for each in seen] == [4] * 4
    assert (last["seed"], last["spread"], last["think_ms"], last["http_workers"]) == (3, 0.5, None, None)
    over = {name: sum(each["overspend_nanousd"] for each in seen if each["backend"] == name) for name in ("legacy",)}
    assert [each["overspend_nanousd"] for each in last["backends"]] == [over["legacy"], 0]


def test_a_legacy_way_that_nobody_holds_may_stay_within_its_limit(race_server):
    # Room for one of two, and a pause that lasts: whatever happens, luck is no failure.
    result = run("--redis", race_server.url, "--think", "0", "-n", "2", "-k", "1", "--backends", "legacy", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["backends"][0]["was_held"] is False


def test_a_name_that_nobody_registered_is_one_line(race_server):
    result = run("--redis", race_server.url, "--backends", "legacy,nobody")
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: --backends: one of atomic, legacy, ")
    assert result.stderr.endswith("got nobody\n")


def test_ctrl_c_leaves_no_process_behind():
    command = [sys.executable, "-m", "flaskapp.lab", "--events", "--rounds", "1000", "--rtt", "1"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as race:
        assert "round" in race.stdout.readline()
        started = children_of(race.pid)
        # The server, who watches over it, and the proxy.
        assert len(started) >= 3
        race.send_signal(signal.SIGINT)
        _, said = race.communicate(timeout=20)
    assert race.returncode == 2
    assert said == "Error: interrupted; all that was started has ended\n"
    wait_until(lambda: not any(map(is_alive, started)), 10, f"some of {started} live on")


def test_a_killed_race_leaves_no_process_behind():
    command = [sys.executable, "-m", "flaskapp.lab", "--events", "--rounds", "1000", "--rtt", "1"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as race:
        assert "round" in race.stdout.readline()
        started = children_of(race.pid)
        race.kill()
    wait_until(lambda: not any(map(is_alive, started)), 10, f"some of {started} live on")
