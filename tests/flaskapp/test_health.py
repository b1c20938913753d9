"""/healthz: the process lives. /readyz: it may be sent visitors."""

import pytest

from backends.store.connections import POOL_SIZE
from tests.apps import open_app
from tests.faults.wire import SkippingClock
from tests.servers import wait_until

MEMBERS = ["status", "backend", "redis", "degraded"]


def ready(service):
    answer = service.client.get("/readyz")
    assert list(answer.json) == MEMBERS
    assert answer.headers["Cache-Control"] == "no-store"
    body = answer.json
    return answer.status_code, body["status"], body["redis"], body["degraded"]


@pytest.mark.parametrize("backend", ["atomic", "legacy"])
def test_with_redis_all_is_well(make_app, backend):
    service = make_app(THROTTLE_BACKEND=backend)
    assert ready(service) == (200, "ok", "up", False)
    assert service.client.get("/readyz").json["backend"] == backend
    assert (service.client.get("/healthz").status_code, service.client.get("/healthz").json) == (200, {"status": "ok"})


def test_before_the_first_contact_it_is_not_ready(own_server, tmp_path):
    own_server.kill()
    with open_app(own_server.url, tmp_path, {}) as service:
        assert ready(service) == (503, "unavailable", "down", False)
        assert service.client.get("/healthz").status_code == 200
        own_server.start()
        # As soon as somebody has asked Redis anything, and that the settings do all the time.
        rest_is_over(service)
        assert ready(service) == (200, "ok", "up", False)


def rest_is_over(service):
    wait_until(lambda: service.tollgate.link.is_up, 5, "contact with Redis")


def test_without_redis_it_is_degraded_while_the_emergency_budget_lasts(own_server, tmp_path):
    with open_app(own_server.url, tmp_path, {"FAIL_OPEN_BUDGET_USD": "0.005"}) as service:
        assert ready(service) == (200, "ok", "up", False)
        own_server.kill()
        assert service.chat().headers["X-Throttle-Backend"] == "emergency"
        assert ready(service) == (200, "ok", "down", True)
        while (answer := service.chat()).status_code == 200:
            pass
        assert (answer.status_code, answer.json["error"]) == (503, "throttle_unavailable")
        # Not nothing, but less than a request needs.
        assert 0 < service.tollgate.guard._lending.budget.spent_nanousd() < 5_000_000
        assert ready(service) == (503, "unavailable", "down", False)
        own_server.start()
        rest_is_over(service)
        assert ready(service) == (200, "ok", "up", False)


def test_without_redis_and_without_a_budget_it_is_not_ready(own_server, tmp_path):
    with open_app(own_server.url, tmp_path, {"FAIL_OPEN_BUDGET_USD": "0"}) as service:
        service.chat()
        own_server.kill()
        assert service.chat().status_code == 503
        assert ready(service) == (503, "unavailable", "down", False)


def test_closed_without_redis_is_not_ready(own_server, tmp_path):
    with open_app(own_server.url, tmp_path, {"THROTTLE_ON_ERROR": "closed"}) as service:
        service.chat()
        own_server.kill()
        refused = service.chat()
        assert (refused.status_code, refused.json["error"]) == (503, "throttle_unavailable")
        assert int(refused.headers["Retry-After"]) >= 1
        assert "throttle;dur=" in refused.headers["Server-Timing"]
        assert ready(service) == (503, "unavailable", "down", False)


def test_a_budget_that_cannot_be_read_counts_as_used_up(own_server, tmp_path):
    # So small that no worker has leased a part of it before.
    with open_app(own_server.url, tmp_path, {"FAIL_OPEN_BUDGET_USD": "0.10"}) as service:
        service.chat()
        own_server.kill()
        (tmp_path / ".data").mkdir(exist_ok=True)
        (tmp_path / ".data" / "emergency-budget-127.0.0.1-8000.json").write_text("rubbish")
        found = (tmp_path / ".data").glob("emergency-budget-*")
        assert [each.name for each in found] == ["emergency-budget-127.0.0.1-8000.json"]
        assert service.chat().status_code == 503
        assert ready(service)[0] == 503


@pytest.mark.parametrize("on_error", ["open", "closed"])
def test_a_redis_that_answers_and_cannot_work_is_an_outage_too(own_server, tmp_path, on_error):
    with open_app(own_server.url, tmp_path, {"THROTTLE_ON_ERROR": on_error}) as service:
        assert service.chat().headers["X-Throttle-Backend"] == "atomic"
        service.redis.config_set("maxmemory", "1")
        answer = service.chat()
        if on_error == "open":
            assert (answer.status_code, answer.headers["X-Throttle-Backend"]) == (200, "emergency")
            assert ready(service) == (200, "ok", "down", True)
        else:
            assert (answer.status_code, answer.json["error"]) == (503, "throttle_unavailable")
            assert ready(service) == (503, "unavailable", "down", False)
        service.redis.config_set("maxmemory", "0")
        assert service.chat("another").headers["X-Throttle-Backend"] == "atomic"
        wait_until(lambda: ready(service) == (200, "ok", "up", False), 5, "all is well again")


def spoil_everybodys_hour(service):
    service.chat()
    (key,) = service.redis.keys("llm:global:hourly:*")
    service.redis.delete(key)
    service.redis.lpush(key, "no amount")
    return lambda: service.redis.delete(key)


def take_the_permission(service):
    service.redis.acl_setuser("default", commands=["-evalsha", "-eval"], enabled=True)
    return lambda: service.redis.acl_setuser("default", commands=["+@all"], enabled=True)


@pytest.mark.parametrize("spoil", [spoil_everybodys_hour, take_the_permission])
@pytest.mark.parametrize("on_error", ["open", "closed"])
def test_a_redis_that_answers_with_bugs_is_told_too(own_server, tmp_path, spoil, on_error):
    settings = {"THROTTLE_ON_ERROR": on_error, "FAIL_OPEN_BUDGET_USD": "0.005"}
    with open_app(own_server.url, tmp_path, settings) as service:
        mend = spoil(service)
        answer = service.chat("visitor")
        if on_error == "open":
            assert (answer.status_code, answer.headers["X-Throttle-Backend"]) == (200, "emergency")
            assert ready(service)[::3] == (200, True)
            while service.chat("visitor").status_code == 200:
                pass
        assert ready(service)[::3] == (503, False)
        mend()
        assert service.chat("another").headers["X-Throttle-Backend"] == "atomic"
        wait_until(lambda: ready(service) == (200, "ok", "up", False), 5, "all is well again")


def fill(service):
    service.redis.config_set("maxmemory", "1")
    return lambda: service.redis.config_set("maxmemory", "0")


def miss_the_replicas(service):
    service.redis.config_set("min-replicas-to-write", "1")
    return lambda: service.redis.config_set("min-replicas-to-write", "0")


def make_a_replica(service):
    service.redis.replicaof("127.0.0.1", "1")
    return lambda: service.redis.replicaof("NO", "ONE")


@pytest.mark.parametrize("spoil", [fill, miss_the_replicas, make_a_replica, spoil_everybodys_hour])
def test_it_finds_out_by_itself_what_a_request_would_find(own_server, tmp_path, spoil):
    """No visitor has come since, so that no request has failed."""
    clock = SkippingClock()
    with open_app(own_server.url, tmp_path, {"THROTTLE_ON_ERROR": "closed"}, clock=clock) as service:
        assert ready(service) == (200, "ok", "up", False)
        mend = spoil(service)
        clock.skip(1)
        assert ready(service)[0] == 503
        assert service.chat().status_code == 503
        mend()
        clock.skip(10)
        assert ready(service) == (200, "ok", "up", False)


def test_a_service_that_is_too_busy_is_not_ready(own_server, tmp_path):
    clock = SkippingClock()
    with open_app(own_server.url, tmp_path, {}, clock=clock) as service:
        assert ready(service)[0] == 200
        service.tollgate.settings.stop()
        pool = service.tollgate.link._client.connection_pool
        held = [pool.borrow() for _ in range(POOL_SIZE)]
        clock.skip(1)
        assert ready(service) == (503, "unavailable", "up", False)
        for each in held:
            pool.give_back(each)
        clock.skip(2)
        assert ready(service)[0] == 200


def test_however_often_it_is_asked_redis_is_asked_once_a_second(make_app):
    service = make_app()
    ready(service)
    before = service.redis.info("commandstats")["cmdstat_setrange"]["calls"]
    for _ in range(20):
        ready(service)
    assert service.redis.info("commandstats")["cmdstat_setrange"]["calls"] - before <= 1
    assert service.redis.keys("*") == []


def test_a_redis_with_another_password_is_told_too(own_server, tmp_path):
    with open_app(own_server.url, tmp_path, {}) as service:
        assert service.chat().headers["X-Throttle-Backend"] == "atomic"
        service.redis.config_set("requirepass", "another")
        service.redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        assert service.chat().headers["X-Throttle-Backend"] == "emergency"
        # Also without a visitor: whatever is asked fails.
        assert ready(service)[::3] == (200, True)


def test_what_works_is_said_where_one_right_is_missing(own_server, tmp_path):
    """The settings cannot be read, twice a second; requests are decided."""
    with open_app(own_server.url, tmp_path, {}) as service:
        service.redis.acl_setuser("default", enabled=True, reset_keys=True, keys=["llm:*"])
        service.tollgate.settings.refresh()
        assert not service.tollgate.settings.is_reachable
        answer = service.chat()
        service.tollgate.settings.refresh()
        assert (answer.status_code, answer.headers["X-Throttle-Backend"]) == (200, "atomic")
        assert ready(service) == (200, "ok", "up", False)
