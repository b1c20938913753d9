"""The race on the dashboard: development only, behind the log-in, one at a time, on a Redis of its own."""

import json
import os
import re

import pytest

from tests.processes import children_of, is_alive
from tests.servers import ADMIN_TOKEN, wait_until

SMALL = {"requests": "4", "room": "2", "rounds": "2", "rtt": "0"}
LONG = {"requests": "10", "room": "4", "rounds": "20", "rtt": "10"}


@pytest.fixture
def service(make_app):
    service = make_app()
    service.client.post("/admin/login", data={"token": ADMIN_TOKEN})
    return service


@pytest.fixture
def csrf_token(service):
    return re.search(r'name="csrf_token" value="([0-9a-f]+)"', service.client.get("/admin/race").text)[1]


@pytest.fixture
def run(service, csrf_token):
    def send(form, *, buffered=True):
        """Read to its end and closed, unless it is to be left open."""
        data = {**form, "csrf_token": csrf_token}
        return service.client.post("/admin/race/run", data=data, buffered=buffered)

    return send


def test_a_race_is_told_round_by_round_and_leaves_the_services_redis_alone(service, run):
    before = service.stored()
    answer = run(SMALL)
    assert (answer.status_code, answer.mimetype) == (200, "application/x-ndjson")
    *rounds, last = map(json.loads, answer.text.splitlines())
    seen = [(each["round"]["backend"], each["round"]["number"]) for each in rounds]
    assert seen == [("legacy", 0), ("atomic", 0), ("legacy", 1), ("atomic", 1)]
    legacy, atomic = last["backends"]
    assert (legacy["admitted"], atomic["admitted"]) == (8, 4)
    assert legacy["overspend_nanousd"] > 0 == atomic["overspend_nanousd"]
    assert last["exit_status"] == 0
    assert service.stored() == before


def test_the_page_may_run_its_own_script_and_nothing_else(service):
    answer = service.client.get("/admin/race")
    policy = answer.headers["Content-Security-Policy"]
    nonce = re.search(r"script-src 'nonce-([^']+)'", policy)[1]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert answer.text.count("<script") == answer.text.count(f'<script nonce="{nonce}">') == 1
    assert " style=" not in answer.text
    assert not re.search(r"(src|href)=\"https?:", answer.text)
    assert answer.headers["Cache-Control"] == "no-store"


def test_the_settings_page_runs_no_script_and_leads_here(service):
    answer = service.client.get("/admin")
    assert "script-src" not in answer.headers["Content-Security-Policy"]
    assert 'href="/admin/race"' in answer.text


def test_in_production_there_is_no_such_page(make_app):
    service = make_app(ENVIRONMENT="production")
    service.client.post("/admin/login", data={"token": ADMIN_TOKEN})
    assert service.client.get("/admin").status_code == 200
    assert service.client.get("/admin/race").status_code == 404
    assert service.client.post("/admin/race/run", data=SMALL).status_code == 404
    assert "/admin/race" not in service.client.get("/admin").text


def test_a_stranger_sees_the_log_in_and_starts_nothing(make_app):
    client = make_app().client
    answer = client.get("/admin/race")
    assert answer.status_code == 401
    assert 'name="token"' in answer.text
    assert client.post("/admin/race/run", data=SMALL).status_code == 401


def test_a_form_of_another_session_starts_nothing(service):
    answer = service.client.post("/admin/race/run", data={**SMALL, "csrf_token": "0" * 64})
    assert (answer.status_code, answer.json["reason"]) == (403, "csrf_token")


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"requests": "41"}, "requests"),
        ({"requests": "1"}, "requests"),
        ({"room": "4"}, "room"),
        ({"rounds": "21"}, "rounds"),
        ({"rtt": "11"}, "rtt"),
        ({"rtt": "-1"}, "rtt"),
        ({"rtt": "--http"}, "rtt"),
        ({"rounds": ""}, "rounds"),
    ],
)
def test_what_is_asked_for_is_bounded(run, wrong, field):
    answer = run({**SMALL, **wrong})
    assert answer.status_code == 422
    assert answer.json["reason"].startswith(f"{field}: ")


def test_a_second_one_is_told_that_one_runs_and_the_first_goes_on(run):
    first = run(LONG, buffered=False)
    lines = iter(first.response)
    assert b"round" in next(lines)
    second = run(SMALL)
    assert (second.status_code, second.json["error"]) == (409, "race_running")
    assert b"round" in next(lines)
    first.close()
    assert run(SMALL).status_code == 200


def test_one_that_is_left_ends_with_all_that_it_started(run):
    before = set(children_of(os.getpid()))
    answer = run(LONG, buffered=False)
    assert b"round" in next(iter(answer.response))
    wait_until(lambda: len(set(children_of(os.getpid())) - before) >= 3, 10, "the race and its server")
    started = set(children_of(os.getpid())) - before
    answer.close()
    # At once: closing waits for it.
    assert [pid for pid in started if is_alive(pid)] == []


def test_one_that_cannot_run_says_why(run, monkeypatch):
    monkeypatch.setattr("flaskapp.lab.race_runner.BACKENDS", "nobody")
    (line,) = run(SMALL).text.splitlines()
    assert json.loads(line)["error"].startswith("Error: --backends: one of ")


def test_one_that_takes_too_long_is_ended(run, monkeypatch):
    monkeypatch.setattr("flaskapp.lab.race_runner.MAX_SECONDS", 0.0)
    *_, last = run(LONG).text.splitlines()
    assert json.loads(last)["error"].startswith("The race was ended after 0 seconds: let fewer callers run")
