"""`flask doctor`: each check on what it is there to find."""

import json
import resource

import pytest
import redis

from flaskapp.config import load_config
from flaskapp.factory import create_app
from flaskapp.ops.running_redis import record_redis
from flaskapp.ops.start import check_start
from tests.apps import open_app


@pytest.fixture
def examine(own_server, tmp_path):
    """`examine(spoil, VARIABLE="value", …)`: the exit status, and by name of the check what it found."""

    def run(spoil=lambda _service: None, **environment):
        with open_app(own_server.url, tmp_path, environment) as service:
            spoil(service)
            done = service.app.test_cli_runner().invoke(args=["doctor", "--json"])
            return done.exit_code, {each["check"]: each for each in json.loads(done.output)}

    return run


def states(found):
    return {name: each["state"] for name, each in found.items() if each["state"] != "ok"}


def test_where_all_is_well_it_says_so(examine):
    status, found = examine()
    assert (status, states(found)) == (0, {})
    assert found["outage"]["text"] == "costs at most 1.00 USD an hour and instance"


def evicts(service):
    service.redis.config_set("maxmemory-policy", "allkeys-lru")


def is_a_replica(service):
    service.redis.replicaof("127.0.0.1", "1")


def is_full(service):
    service.redis.config_set("maxmemory", "1")


def keeps_nothing(service):
    service.redis.config_set("appendonly", "no")


def takes_few_clients(service):
    service.redis.config_set("maxclients", "50")


def forbids_scripts(service):
    service.redis.acl_setuser("default", commands=["-evalsha"], enabled=True)


def hides_itself(service):
    service.redis.acl_setuser("default", commands=["-info"], enabled=True)


@pytest.mark.parametrize(
    ("spoil", "check", "state", "status"),
    [
        (evicts, "eviction", "failed", 1),
        (is_a_replica, "role", "failed", 1),
        (is_a_replica, "writes", "failed", 1),
        (is_full, "writes", "failed", 1),
        (keeps_nothing, "persistence", "warning", 0),
        (takes_few_clients, "clients", "warning", 0),
        (forbids_scripts, "scripts", "failed", 1),
        (hides_itself, "redis", "failed", 1),
    ],
)
def test_what_is_wrong_with_redis_is_found_with_a_hint(examine, spoil, check, state, status):
    code, found = examine(spoil)
    assert (code, found[check]["state"]) == (status, state)
    assert found[check]["hint"]


@pytest.mark.parametrize(
    ("environment", "check"),
    [
        ({"THROTTLE_BACKEND": "legacy"}, "backend"),
        ({"NETWORK_COST_LIMIT_USD": "0"}, "network limits"),
        ({"HOST": "0.0.0.0"}, "metrics"),
        ({"HOST": "0.0.0.0", "ENVIRONMENT": "production"}, "proxies"),
    ],
)
def test_what_is_risky_in_the_settings_is_a_warning(examine, environment, check):
    code, found = examine(**environment)
    assert (code, found[check]["state"]) == (0, "warning")


def test_a_directory_that_cannot_be_written_fails(examine, tmp_path):
    (tmp_path / ".data").write_text("in the way")
    code, found = examine()
    assert (code, found["disk"]["state"]) == (1, "failed")


@pytest.fixture
def few_descriptors(monkeypatch):
    """The hard limit can be given back by root alone: what is found is made to look so."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1_024, 1_024))


def test_few_descriptors_are_a_warning(examine, few_descriptors):
    _, found = examine()
    assert found["descriptors"]["state"] == "warning"


@pytest.mark.parametrize("given", [True, False], ids=["REDIS_URL=fake://", "the embedded server"])
def test_a_start_says_what_is_wrong_with_this_machine_whichever_redis_it_has(
    tmp_path, monkeypatch, own_server, few_descriptors, given
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WEB_CONCURRENCY", "1")
    if given:
        monkeypatch.setenv("REDIS_URL", "fake://")
    else:
        monkeypatch.delenv("REDIS_URL", raising=False)
        record_redis(tmp_path / ".data", own_server.url)
        with redis.Redis.from_url(own_server.url) as look:
            look.config_set("maxmemory-policy", "allkeys-lru")
    checks = [remark.partition(":")[0] for remark in check_start()["remarks"]]
    assert checks == ["descriptors"] if given else ["eviction", "descriptors"]


def test_books_in_memory_are_a_warning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    app = create_app(load_config({"REDIS_URL": "fake://"}))
    done = app.test_cli_runner().invoke(args=["doctor", "--json"])
    found = {each["check"]: each["state"] for each in json.loads(done.output)}
    assert (done.exit_code, found["redis"], "writes" in found) == (0, "warning", False)


def test_without_redis_the_rest_is_checked_all_the_same(own_server, examine):
    own_server.kill()
    code, found = examine()
    assert (code, states(found)) == (1, {"redis": "failed"})
    assert "disk" in found


def test_for_people_each_check_has_a_number(make_app):
    done = make_app().app.test_cli_runner().invoke(args=["doctor"])
    lines = [line.split() for line in done.output.splitlines()]
    assert ["1", "redis", "ok"] in [line[:3] for line in lines]
