"""Requests a minute: flask-limiter on the same Redis, through our own link."""

import time
from types import SimpleNamespace

import pytest

from backends.clock import SystemClock
from backends.errors import StoreUnavailable
from backends.store.breaker import REST_SECONDS
from backends.store.link import Link
from flaskapp.http.limiter import LinkStorage
from tests.apps import open_app
from tests.faults.wire import SkippingClock
from tests.servers import BEARER, SETTINGS, earliest_wait

CHALLENGE = "/api/v1/auth/challenge"


@pytest.fixture
def storage(redis_url):
    clock = SystemClock()
    link = Link(redis_url, clock=clock)
    yield LinkStorage("tollgate://", link=link, clock=clock)
    link.close()


def test_a_counter_gets_its_life_with_its_first_count_and_keeps_it(storage):
    def life_ms():
        return storage._link.run(lambda client: client.pttl("llm:rate:x"))

    assert storage.get("x") == 0
    assert storage.count("x", 60) == 1
    first_ms = life_ms()
    assert 59_000 < first_ms <= 60_000
    assert storage.count("x", 90, amount=2) == 3
    assert life_ms() <= first_ms
    assert storage.get("x") == 3
    left_seconds = storage.get_expiry("x") - SystemClock().now_us() / 1_000_000
    assert 58 < left_seconds <= 60
    storage.clear("x")
    assert storage.get("x") == 0
    assert storage.check() is True
    assert storage.reset() is None


def test_while_redis_is_away_it_says_so_and_nothing_worse(own_server):
    clock = SystemClock()
    link = Link(own_server.url, clock=clock)
    storage = LinkStorage("tollgate://", link=link, clock=clock)
    own_server.kill()
    assert storage.check() is False
    with pytest.raises(storage.base_exceptions):
        storage.count("x", 60)
    assert issubclass(StoreUnavailable, storage.base_exceptions)
    link.close()


def commands_of(service, ask):
    """What is sent to Redis for the counters, and what came of it."""
    service.redis.flushall()
    counted, (limiter,) = [], service.app.extensions["limiter"]
    count = limiter.storage.count
    limiter.storage.count = lambda key, expiry, amount=1: (
        counted.append((key, expiry, amount)) or count(key, expiry, amount)
    )
    try:
        return [ask() for _ in range(4)], counted, sorted(service.redis.keys("llm:rate:*"))
    finally:
        limiter.storage.count = count


@pytest.mark.parametrize("rate", ["3 per hour", "3 per 2 hour", "100 per day; 3 per hour"])
@pytest.mark.parametrize("route", ["chat", "challenge", "usage"])
def test_the_short_way_counts_and_refuses_as_the_library_does(make_app, rate, route):
    def statuses():
        headers = {"X-Fingerprint": "hash456"}
        if route == "chat":
            return service.chat(max_tokens=1).status_code
        return service.client.get(paths[route], headers=headers).status_code

    paths = {"challenge": "/api/v1/auth/challenge", "usage": "/api/v1/usage"}
    service = make_app(CHAT_RATE_LIMIT=rate, ENABLE_COST_THROTTLING="false")
    short = commands_of(service, statuses)
    (limiter,) = service.app.extensions["limiter"]
    limiter._limits_of.clear()
    assert short == commands_of(service, statuses)
    assert short[0] == [200, 200, 200, 429]


def test_the_61st_request_of_a_minute_is_refused(make_app):
    service = make_app(ENABLE_COST_THROTTLING="false")
    # The window is a fixed minute: begin again if one ends in between.
    for _ in range(2):
        statuses = [service.chat(max_tokens=1).status_code for _ in range(61)]
        if len(service.redis.keys("llm:rate:*")) == 1:
            break
    assert statuses == [200] * 60 + [429]
    refused = service.chat()
    assert (refused.status_code, refused.json["error"], refused.json["reason"]) == (429, "rate_limited", "rate_limit")
    assert refused.json["scope"] == "identifier"
    assert refused.mimetype == "application/problem+json"
    assert refused.headers["X-Request-ID"] == refused.json["request_id"]
    (counter,) = sorted(service.redis.keys("llm:rate:*"))
    left_seconds = service.redis.pttl(counter) / 1_000
    # Never earlier than the refusal can end.
    assert int(refused.headers["Retry-After"]) == refused.json["retry_after_seconds"]
    assert left_seconds <= refused.json["retry_after_seconds"] <= 60
    assert refused.json["message"].startswith("Too many requests: 60 per minute are allowed.")
    assert service.chat("somebody-else").status_code == 200


def test_what_is_refused_for_its_number_costs_nothing(make_app):
    service = make_app(CHAT_RATE_LIMIT="1 per hour")
    service.chat()
    before = service.stored()
    assert service.chat().json["error"] == "rate_limited"
    assert service.stored() == before


def test_the_limit_is_live(make_app):
    service = make_app(ENABLE_COST_THROTTLING="false")
    assert service.chat().status_code == 200
    service.patch(chat_rate_limit="2 per hour")
    assert [service.chat().status_code for _ in range(3)] == [200, 200, 429]
    service.patch(chat_rate_limit="4 per hour; 1000 per day")
    # A new limit counts anew.
    assert [service.chat().status_code for _ in range(5)] == [200, 200, 200, 200, 429]


def test_challenges_count_for_the_same_identifier_but_for_themselves(make_app):
    service = make_app(CHAT_RATE_LIMIT="2 per hour")
    headers = {"X-Fingerprint": "hash456"}
    assert [service.client.get(CHALLENGE, headers=headers).status_code for _ in range(3)] == [200, 200, 429]
    assert service.client.get(CHALLENGE, headers={"X-Fingerprint": "another"}).status_code == 200
    assert service.chat(max_tokens=1).status_code == 200


def test_the_admin_counts_by_network_with_or_without_its_token(make_app):
    service = make_app()
    for _ in range(2):
        statuses = [service.client.get(SETTINGS, headers={"X-Fingerprint": f"f{n}"}).status_code for n in range(61)]
        if statuses[-1] == 429:
            break
    assert statuses[-1] == 429
    assert service.client.get(SETTINGS, headers=BEARER).status_code == 429
    assert service.client.get("/healthz").status_code == 200


def test_forged_addresses_do_not_give_a_new_counter(make_app):
    service = make_app(CHAT_RATE_LIMIT="1 per hour", ENABLE_COST_THROTTLING="false")
    for number in range(20):
        service.client.post(
            "/api/v1/chat/stream", json={"query": "x"}, headers={"X-Forwarded-For": f"1.2.3.{number}"}, buffered=True
        )
    assert len(service.redis.keys("llm:rate:*")) == 1


def test_the_loss_of_redis_never_becomes_a_500_and_the_count_goes_on(own_server, tmp_path):
    with open_app(own_server.url, tmp_path, {"CHAT_RATE_LIMIT": "3 per hour"}) as service:
        assert service.chat(max_tokens=1).status_code == 200
        own_server.kill()
        # From now on in the worker's own memory.
        statuses = [service.chat(max_tokens=1).status_code for _ in range(6)]
        assert statuses == [200, 200, 200, 429, 429, 429]
        own_server.start()


@pytest.mark.parametrize("rate", ["100 per hour", "1000 per day; 100 per hour"])
def test_requests_are_counted_in_redis_again_when_it_is_back_whatever_the_hosts_clock_did(
    own_server, tmp_path, monkeypatch, rate
):
    clock = SkippingClock()
    with open_app(own_server.url, tmp_path, {"CHAT_RATE_LIMIT": rate}, clock=clock) as service:
        own_server.kill()
        for _ in range(8):
            # An outage of a minute, in which the library has asked often enough to ask rarely now.
            assert service.chat(max_tokens=1).status_code == 200
            clock.skip(8)
        now = time.time()
        monkeypatch.setattr("flask_limiter._extension.time.time", lambda: now - 86_400)
        own_server.start()
        clock.skip(REST_SECONDS)
        assert service.chat(max_tokens=1).status_code == 200
        assert service.redis.keys("llm:rate:*")


def test_redis_lost_between_the_count_and_the_refusal_is_no_500_either(make_app, monkeypatch):
    service = make_app(CHAT_RATE_LIMIT="1 per 2 hours")
    service.chat(max_tokens=1)

    def lost(*_):
        raise StoreUnavailable("gone")

    monkeypatch.setattr(LinkStorage, "get_expiry", lost)
    refused = service.chat()
    assert (refused.status_code, refused.json["error"]) == (429, "rate_limited")
    assert earliest_wait(refused) == 7_200


def test_a_refusal_without_a_known_limit_still_waits_a_second(make_app):
    from flask_limiter import RateLimitExceeded

    service = make_app()
    limit = SimpleNamespace(key_func=None, error_message=None, limit="x", shared=False)

    @service.app.get("/refused")
    def refused():
        raise RateLimitExceeded(limit)

    answer = service.client.get("/refused")
    assert (answer.status_code, earliest_wait(answer)) == (429, 1)
