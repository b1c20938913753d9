"""Requests per time: of a network and of a caller, counted together in Redis by one script."""

import time

import pytest
from werkzeug.test import EnvironBuilder, run_wsgi_app

from backends.clock import SystemClock
from backends.keys import counter_key
from backends.store.breaker import REST_SECONDS
from backends.store.link import Link
from backends.store.scripts import Script
from flaskapp.http.limiter import BoundedMemory
from tests.apps import open_app
from tests.faults.wire import SkippingClock
from tests.servers import BEARER, CHAT, SETTINGS, earliest_wait

CHALLENGE, USAGE = "/api/v1/auth/challenge", "/api/v1/usage"
COUNT = Script("count.lua")


@pytest.fixture
def redis_link(redis_url):
    link = Link(redis_url, clock=SystemClock())
    link.run(lambda client: client.flushall())
    yield link
    link.close()


@pytest.fixture
def count(redis_link):
    """`count(keys, windows, free=, most_made=)`: what the script replies."""

    def ask(keys, windows, free=9, most_made=9):
        args = [free, most_made, 3_600, *(bound for window in windows for bound in window)]
        keys = [counter_key(key) for key in (*keys, "made")]
        return redis_link.run(lambda client: COUNT.run(client, keys, args))

    return ask


def test_what_is_refused_by_one_window_counts_in_none(count):
    windows = [(3, 60), (2, 3_600)]
    assert [count(["net", "me"], windows)[0] for _ in range(4)] == [0, 0, 2, 2]
    assert [count(["net", "you"], windows)[0] for _ in range(2)] == [0, 1]


def test_a_refusal_says_when_its_window_ends(count):
    assert count(["net"], [(1, 60)]) == [0, 0]
    number, left_ms = count(["net"], [(1, 60)])
    assert number == 1
    assert 59_000 < left_ms <= 60_000


def test_a_counter_gets_its_life_with_its_first_count_and_keeps_it(redis_link):
    def ask(seconds):
        key = counter_key("x")
        redis_link.run(lambda client: COUNT.run(client, [key, counter_key("made")], [1, 9, 60, 9, seconds]))
        return redis_link.run(lambda client: (int(client.get(key)), client.pttl(key)))

    first, first_ms = ask(60)
    second, second_ms = ask(90)
    assert (first, second) == (1, 2)
    assert 59_000 < first_ms <= 60_000
    assert second_ms <= first_ms


def test_a_network_makes_no_more_counters_than_it_may(count, redis_link):
    assert {count(["net", f"name {n}"], [(1_000, 60), (1, 60)], free=1, most_made=5)[0] for n in range(20)} == {0}
    keys = redis_link.run(lambda client: client.keys("*"))
    # One of the network, five of callers, and how many those are.
    assert len(keys) == 7
    assert all(redis_link.run(lambda client, key=key: client.ttl(key)) > 0 for key in keys)


def test_a_worker_s_own_counters_are_bounded_in_number(monkeypatch):
    monkeypatch.setattr("flaskapp.http.limiter.MOST_LOCAL", 10)
    own = BoundedMemory()
    assert [own.incr(f"{n}", 60) for n in range(50)] == [1] * 10 + [0] * 40
    assert own.incr("3", 60) == 2
    assert len(own.storage) == 10


@pytest.mark.parametrize("rate", ["3 per hour", "3 per 2 hour", "100 per day; 3 per hour"])
@pytest.mark.parametrize("path", [CHAT, CHALLENGE, USAGE])
def test_each_route_counts_its_callers(make_app, rate, path):
    service = make_app(CHAT_RATE_LIMIT=rate, ENABLE_COST_THROTTLING="false")

    def status(who):
        if path == CHAT:
            return service.chat(who, max_tokens=1).status_code
        return service.client.get(path, headers={"X-Fingerprint": who}).status_code

    assert [status("hash456") for _ in range(4)] == [200, 200, 200, 429]
    assert status("another") == 200


# --- the network's limit


@pytest.mark.parametrize("path", [CHALLENGE, USAGE, CHAT, "/v1/models", SETTINGS, "/admin", "/metrics"])
def test_the_requests_of_a_network_are_counted_together(make_app, path):
    service = make_app(NETWORK_RATE_LIMIT="3 per hour")
    for number in range(3):
        assert service.client.get(CHALLENGE, headers={"X-Fingerprint": f"f{number}"}).status_code == 200
    keys = sorted(service.redis.keys("*"))
    refused = service.client.open(path, method="POST" if path == CHAT else "GET", headers={"X-Fingerprint": "fresh"})
    assert refused.status_code == 429
    body = refused.json.get("error") if path.startswith("/v1") else refused.json
    assert (body["reason"], body["scope"]) == ("rate_limit", "network")
    assert body["message"].startswith("Too many requests from your network: 3 per hour are allowed.")
    assert 3_590 <= earliest_wait(refused) <= 3_600
    # It leaves nothing behind.
    assert sorted(service.redis.keys("*")) == keys
    other = {"REMOTE_ADDR": "203.0.113.9"}
    assert service.client.get(CHALLENGE, headers={"X-Fingerprint": "f1"}, environ_base=other).status_code == 200
    assert service.client.get("/healthz").status_code == 200


def test_a_network_is_refused_before_its_body_is_read(make_app):
    class Body:
        def read(self, *_):
            raise AssertionError("the body was read")

    service = make_app(NETWORK_RATE_LIMIT="1 per hour")
    service.client.get(CHALLENGE, headers={"X-Fingerprint": "hash456"})
    environ = EnvironBuilder(CHAT, method="POST").get_environ() | {"REMOTE_ADDR": "127.0.0.1"}
    body, status, _ = run_wsgi_app(service.app, {**environ, "wsgi.input": Body(), "CONTENT_LENGTH": "900000"})
    assert status.startswith("429")
    assert b'"scope": "network"' in b"".join(body)


@pytest.mark.parametrize("rate", ["500/day", "60 per minute; 500/day"])
def test_fresh_names_leave_a_bounded_number_of_short_keys_with_an_end(make_app, monkeypatch, rate):
    monkeypatch.setattr("flaskapp.http.limiter.MOST_MADE", 20)
    service = make_app(CHAT_RATE_LIMIT=rate, NETWORK_RATE_LIMIT="1000/day")
    for number in range(60):
        answer = service.client.get(USAGE, headers={"X-Fingerprint": f"{number}{'x' * 120}"})
        assert answer.status_code == 200
    keys = service.redis.keys("*")
    assert len(keys) == 22
    assert all(len(key) == 41 and 0 < service.redis.ttl(key) <= 86_400 for key in keys)


def test_by_default_a_network_has_ten_times_what_one_caller_has(make_app):
    def held():
        return service.client.get(SETTINGS, headers=BEARER).json["settings"]["network_rate_limit"]

    service = make_app(CHAT_RATE_LIMIT="20 per 2 hours; 7/day")
    assert (held()["value"], held()["source"]) == ("200 per 2 hour; 70 per day", "default")
    service.patch(chat_rate_limit="3 per minute")
    assert held()["value"] == "30 per minute"
    service.patch(network_rate_limit="4 per hour")
    assert (held()["value"], held()["source"]) == ("4 per hour", "redis")


# --- the caller's limit


def test_the_61st_request_of_a_minute_is_refused(make_app):
    service = make_app(ENABLE_COST_THROTTLING="false")
    # The window is a fixed minute: begin again if one ends in between.
    for _ in range(2):
        statuses = [service.chat(max_tokens=1).status_code for _ in range(61)]
        # The network's counter, the caller's, and how many callers there were.
        if len(service.redis.keys("llm:rate:*")) == 3:
            break
    assert statuses == [200] * 60 + [429]
    refused = service.chat()
    assert (refused.status_code, refused.json["error"], refused.json["reason"]) == (429, "rate_limited", "rate_limit")
    assert refused.json["scope"] == "identifier"
    assert refused.mimetype == "application/problem+json"
    assert refused.headers["X-Request-ID"] == refused.json["request_id"]
    left_seconds = max(service.redis.pttl(key) for key in service.redis.keys("llm:rate:*")) / 1_000
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


def test_bad_fingerprints_and_unknown_keys_count_for_their_network(make_app):
    service = make_app(CHAT_RATE_LIMIT="2 per hour", API_KEYS="a-key")

    def statuses(path, header, *values):
        sent = [service.client.post(path, json={}, headers={header: value}) for value in values]
        return [response.status_code for response in sent]

    assert statuses(CHAT, "X-Fingerprint", "{}", "a b", "also bad!") == [400, 400, 429]
    assert statuses("/v1/chat/completions", "Authorization", "Bearer x", "Bearer y", "Bearer z") == [401, 401, 429]
    assert statuses("/v1/chat/completions", "Authorization", "Bearer a-key") == [422]
    assert statuses(CHAT, "X-Fingerprint", "hash456") == [422]


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
    assert len(service.redis.keys("llm:rate:*")) == 3


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
            assert service.chat(max_tokens=1).status_code == 200
            clock.skip(8)
        now = time.time()
        monkeypatch.setattr("time.time", lambda: now - 86_400)
        own_server.start()
        clock.skip(REST_SECONDS)
        assert service.chat(max_tokens=1).status_code == 200
        assert service.redis.keys("llm:rate:*")


def test_while_redis_is_away_a_network_is_counted_as_one(own_server, tmp_path):
    with open_app(own_server.url, tmp_path, {"NETWORK_RATE_LIMIT": "3 per hour"}) as service:
        own_server.kill()
        answers = [service.chat(f"hash{number}", max_tokens=1) for number in range(5)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
        assert answers[-1].json["scope"] == "network"
        assert answers[-1].json["message"].startswith("Too many requests from your network: 3 per hour are allowed.")
        assert 3_590 < int(answers[-1].headers["Retry-After"]) <= 3_600 * 1.05 + 1
        own_server.start()
