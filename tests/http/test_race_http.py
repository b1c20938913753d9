"""`flask race --http`: real services in front of an upstream that bills; small numbers."""

import http.client
import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from click.testing import CliRunner

from backends.errors import ConfigurationError
from flaskapp.lab.over_http import OUTPUT_NANOUSD, race_over_http
from flaskapp.lab.race import Plan
from flaskapp.lab.race_command import make_race_cli
from flaskapp.lab.servers import Server, billing_upstream
from flaskapp.ops.running_redis import HOST
from tests.processes import children_of, is_alive
from tests.servers import ROOT, Service, wait_until


@pytest.fixture(scope="module")
def told():
    """One race of both, two workers each, with a legacy way that thinks long enough for its race to be sure."""
    options = ("--http", "-n", "6", "-k", "2", "--rounds", "2", "--spread", "0.5", "--think", "250", "--json")
    result = CliRunner().invoke(make_race_cli(), options)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_legacy_way_is_billed_for_more_than_its_limit(told):
    legacy, _ = told["backends"]
    assert (legacy["backend"], legacy["measured_by"]) == ("legacy", "the upstream's bill")
    assert legacy["overspend_nanousd"] == legacy["spent_nanousd"] - legacy["limit_nanousd"] > 0
    assert legacy["admitted"] == 12
    # What was billed is what was generated for those who were let in: the costs of the plan, twice, and their input.
    plan = Plan(requests=6, room=2, spread=0.5)
    generated = 2 * sum(round(cost / OUTPUT_NANOUSD) for cost in plan.costs_nanousd(0)) * OUTPUT_NANOUSD
    assert generated < legacy["spent_nanousd"] < generated + 12 * 1_000


def test_the_atomic_way_is_not(told):
    _, atomic = told["backends"]
    assert atomic["overspend_nanousd"] == 0
    assert 4 <= atomic["admitted"] < 12
    assert 0 < atomic["spent_nanousd"] <= atomic["limit_nanousd"]


def test_over_http_nobody_is_held_and_round_trips_are_not_counted(told):
    assert told["http_workers"] == 2
    assert [each["was_held"] for each in told["backends"]] == [False, False]
    assert [each["round_trips_a_request"] for each in told["backends"]] == [None, None]
    assert all(0 < each["check_p50_ms"] <= each["check_p95_ms"] for each in told["backends"])
    assert told["backends"][0]["check_p50_ms"] >= 250


def test_the_table_says_that_it_was_billed():
    result = CliRunner().invoke(
        make_race_cli(), ("--http", "--backends", "atomic", "-n", "3", "-k", "1", "--workers", "1")
    )
    assert result.exit_code == 0, result.output
    assert "3 callers at once, room for 1, over HTTP, 1 workers each" in result.stdout
    assert "billed $" in result.stdout
    assert result.stdout.endswith("atomic stayed within its limit.\n")


def test_a_name_that_nobody_registered_starts_nothing():
    with pytest.raises(ConfigurationError, match="got nobody"):
        race_over_http(["nobody"], Plan())


def test_a_service_that_does_not_start_is_one_line():
    # Its books would live in each worker apart: it refuses two of them.
    result = CliRunner().invoke(make_race_cli(), ("--http", "--backends", "memory"))
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "did not start: WEB_CONCURRENCY: 1 with --backends=memory" in result.stderr


def test_the_upstream_writes_down_what_it_generated_whether_it_is_read_or_not():
    with billing_upstream(input_nanousd=3, output_nanousd=1_000) as account:
        for who, tokens in (("one", 5), ("one", 2), ("two", 4)):
            messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": f"{who} asks"}]
            connection = http.client.HTTPConnection(HOST, account.port, timeout=10)
            connection.request("POST", "/v1/chat/completions", json.dumps({"messages": messages, "max_tokens": tokens}))
            response = connection.getresponse()
            if tokens == 5:
                lines = [line for line in response.read().split(b"\n\n") if line]
                assert sum(b'"content": "coin "' in line for line in lines) == 5
                assert json.loads(lines[-2].removeprefix(b"data: "))["usage"]["completion_tokens"] == 5
                assert lines[-1] == b"data: [DONE]"
            connection.close()
        assert account.billed_nanousd("one") == 2 * 4 * 3 + 7 * 1_000
        assert account.billed_nanousd("two") == 4 * 3 + 4 * 1_000
        assert account.billed_nanousd("three") == 0


def test_a_server_gets_nothing_of_our_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("ADMIN_TOKEN", "hidden")
    its = Server(tmp_path, 1, None, {"THROTTLE_BACKEND": "atomic"})._environment
    assert "ADMIN_TOKEN" not in its
    assert "REDIS_URL" not in its
    assert its["THROTTLE_BACKEND"] == "atomic"


def test_ctrl_c_leaves_no_service_behind():
    command = [sys.executable, "-m", "flaskapp.lab", "--http", "--events", "--rounds", "1000", "--backends", "atomic"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as race:
        assert "round" in race.stdout.readline()
        started = children_of(race.pid)
        # Redis, gunicorn with two workers, the upstream, and who watches over them.
        assert len(started) >= 6
        race.send_signal(signal.SIGINT)
        race.communicate(timeout=30)
    assert race.returncode == 2
    wait_until(lambda: not any(map(is_alive, started)), 10, f"some of {started} live on")


@pytest.mark.parametrize(("name", "admitted"), [("legacy", 10), ("atomic", 4)])
def test_ten_at_once_with_a_redis_that_is_said_to_be_farther_away(redis_of, tmp_path, name, admitted):
    """The seed's ten, with room for four: the longer the check, the surer the race; and no race stays none."""
    environment = {"REDIS_DELAY_MS": "20", "THROTTLE_BACKEND": name, "ENABLE_COST_THROTTLING": "true"}
    # No answer ends, and gives back what it did not use, before the last of them has asked.
    environment["DEMO_TOKENS_PER_SECOND"] = "10"
    with Service(tmp_path, redis_of("delayed").url, **environment) as service:
        service.chat("fp:first:warm")
        with ThreadPoolExecutor(10) as callers:
            answers = list(callers.map(lambda _: service.chat(f"fp:concurrent-test:{name}"), range(10)))
        took_ms = [float(each.headers["Server-Timing"].partition("dur=")[2]) for each in answers]
    assert sum(each.status_code == 200 for each in answers) == admitted
    assert {each.status_code for each in answers} <= {200, 429}
    # A wait never ends early: atomic waits once, and legacy at least as often as its check reads.
    assert min(took_ms) >= 20 * (5 if name == "legacy" else 1)
