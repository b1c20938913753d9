"""Challenge-response: good once, for one hash from one network."""

import re
import threading
from contextlib import contextmanager

import pytest

from tests.apps import open_app
from tests.servers import CHAT, LITECOIN, earliest_wait

URL = "/api/v1/auth/challenge"
HOME = {"REMOTE_ADDR": "198.51.100.7"}
HEADERS = {"X-Fingerprint": "hash456"}


@pytest.fixture
def service(make_app):
    return make_app(ENABLE_CHALLENGE_RESPONSE="true", HIGH_COST_THRESHOLD_USD="1", NETWORK_COST_LIMIT_USD="0")


def challenge_for(service, hash_="hash456", address="198.51.100.7"):
    answer = service.client.get(URL, headers={"X-Fingerprint": hash_}, environ_base={"REMOTE_ADDR": address})
    assert answer.status_code == 200
    return answer.json["challenge"]


def chat(service, fingerprint, address="198.51.100.7"):
    headers = {} if fingerprint is None else {"X-Fingerprint": fingerprint}
    return service.client.post(
        CHAT, json={**LITECOIN, "max_tokens": 1}, headers=headers, buffered=True, environ_base={"REMOTE_ADDR": address}
    )


def reason_of(answer):
    assert (answer.status_code, answer.json["error"]) == (403, "invalid_challenge")
    assert answer.mimetype == "application/problem+json"
    assert "Retry-After" not in answer.headers
    return answer.json["reason"]


def test_a_challenge_is_64_hex_digits_for_five_minutes_and_each_is_another(service):
    answer = service.client.get(URL, headers={"X-Fingerprint": "hash456"}, environ_base=HOME)
    assert list(answer.json) == ["challenge", "expires_in_seconds"]
    assert re.fullmatch(r"[0-9a-f]{64}", answer.json["challenge"])
    assert answer.json["expires_in_seconds"] == 300
    assert answer.headers["Cache-Control"] == "no-store"
    assert 299 <= service.redis.ttl(f"llm:challenge:{answer.json['challenge']}") <= 300
    assert challenge_for(service) != challenge_for(service)
    assert len(service.stored()) == 3


def test_it_is_good_once(service):
    challenge = challenge_for(service)
    assert chat(service, f"fp:{challenge}:hash456").status_code == 200
    assert service.redis.keys("llm:challenge:*") == []
    booked = service.daily()
    assert reason_of(chat(service, f"fp:{challenge}:hash456")) == "unknown"
    assert service.daily() == booked


def test_of_many_at_once_one_is_accepted(service):
    challenge = challenge_for(service)
    statuses, start = [], threading.Barrier(20)

    def use():
        start.wait()
        statuses.append(chat(service, f"fp:{challenge}:hash456").status_code)

    threads = [threading.Thread(target=use) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200] + [403] * 19


@pytest.mark.parametrize("fingerprint", [None, "hash456"])
def test_without_one_it_is_missing(service, fingerprint):
    assert reason_of(chat(service, fingerprint)) == "missing"
    assert service.stored() == {}


@pytest.mark.parametrize("challenge", ["test123", "0" * 64, "A" * 64, "0" * 128, "-"])
def test_one_that_was_never_given_is_unknown(service, challenge):
    assert reason_of(chat(service, f"fp:{challenge}:hash456")) == "unknown"
    assert service.stored() == {}


def test_one_that_is_over_is_unknown(service):
    challenge = challenge_for(service)
    service.redis.pexpire(f"llm:challenge:{challenge}", 0)
    assert reason_of(chat(service, f"fp:{challenge}:hash456")) == "unknown"


@pytest.mark.parametrize(("hash_", "address"), [("hash457", "198.51.100.7"), ("hash456", "198.51.100.8")])
def test_a_challenge_of_another_caller_is_a_mismatch_and_charges_nothing(service, hash_, address):
    challenge = challenge_for(service)
    assert reason_of(chat(service, f"fp:{challenge}:{hash_}", address)) == "mismatch"
    assert service.redis.keys("llm:cost:*") == []


def test_an_ipv6_neighbour_of_the_same_64_is_the_same_network(service):
    challenge = challenge_for(service, address="2001:db8::1")
    assert chat(service, f"fp:{challenge}:hash456", "2001:db8::2").status_code == 200


def test_the_switch_is_live(service):
    service.patch(enable_challenge_response=False)
    assert chat(service, "fp:test123:hash456").status_code == 200
    service.patch(enable_challenge_response=True)
    assert reason_of(chat(service, "fp:test123:hash456")) == "unknown"
    service.patch(enable_challenge_response=None)
    assert reason_of(chat(service, "fp:test123:hash456")) == "unknown"


def test_off_in_development_and_on_in_production_by_default(make_app):
    assert chat(make_app(), "fp:test123:hash456").status_code == 200
    production = make_app(ENVIRONMENT="production")
    assert reason_of(chat(production, "fp:test123:hash456")) == "unknown"


@pytest.mark.parametrize("fingerprint", [None, "", "fp:a:b", "{}", "x" * 129])
def test_only_a_hash_is_given_one(service, fingerprint):
    headers = {} if fingerprint is None else {"X-Fingerprint": fingerprint}
    answer = service.client.get(URL, headers=headers)
    assert (answer.status_code, answer.json["error"], answer.json["field"]) == (400, "invalid_request", "X-Fingerprint")
    assert service.stored() == {}


def test_a_refused_challenge_is_refused_before_any_budget_is_asked(service):
    service.redis.set("settings", '{"high_cost_threshold_usd": 0.000001, "enable_challenge_response": true}')
    service.tollgate.settings.refresh()
    answer = chat(service, "fp:test123:hash456")
    assert reason_of(answer) == "unknown"
    assert service.redis.keys("llm:throttle:*") == []


def test_while_redis_is_away_open_lets_pass_and_says_so(own_server, tmp_path, caplog):
    with open_app(own_server.url, tmp_path, {"ENABLE_CHALLENGE_RESPONSE": "true"}) as service:
        challenge = challenge_for(service)
        own_server.kill()
        drawn = challenge_for(service)
        assert re.fullmatch(r"[0-9a-f]{64}", drawn)
        answer = chat(service, f"fp:{challenge}:hash456")
        assert (answer.status_code, answer.headers["X-Throttle-Backend"]) == (200, "emergency")
        assert [record for record in caplog.records if record.message.startswith("Challenge not checked")]
        # A challenge of the wrong form is none, also now.
        assert reason_of(chat(service, "hash456")) == "missing"
        assert reason_of(chat(service, "fp:test123:hash456")) == "unknown"


def test_while_redis_is_away_closed_refuses_both(own_server, tmp_path):
    environment = {"ENABLE_CHALLENGE_RESPONSE": "true", "THROTTLE_ON_ERROR": "closed"}
    with open_app(own_server.url, tmp_path, environment) as service:
        challenge = challenge_for(service)
        own_server.kill()
        for answer in (
            service.client.get(URL, headers={"X-Fingerprint": "hash456"}),
            chat(service, f"fp:{challenge}:hash456"),
        ):
            assert (answer.status_code, answer.json["error"]) == (503, "throttle_unavailable")
            assert earliest_wait(answer) == 1


@contextmanager
def no_connection_left(service):
    """Every connection of the pool is in use, and the wait for one is short."""
    link = service.tollgate.link
    pool = link._client.connection_pool
    borrowed = [pool.borrow() for _ in range(pool.max_connections)]
    waits, link.timeout_seconds = link.timeout_seconds, 0.05
    try:
        yield
    finally:
        link.timeout_seconds = waits
        for connection in borrowed:
            pool.give_back(connection)


@pytest.mark.parametrize("on_error", ["open", "closed"])
def test_a_busy_pool_switches_neither_challenges_nor_the_counting_off(make_app, on_error):
    service = make_app(ENABLE_CHALLENGE_RESPONSE="true", CHAT_RATE_LIMIT="2 per hour", THROTTLE_ON_ERROR=on_error)
    challenge = challenge_for(service)
    service.tollgate.settings.stop()
    with no_connection_left(service):
        for ask in (lambda: chat(service, f"fp:{challenge}:hash456"), lambda: service.client.get(URL, headers=HEADERS)):
            answer = ask()
            assert (answer.status_code, answer.json["error"]) == (503, "throttle_unavailable")
            assert earliest_wait(answer) == 1
    with no_counting(service), no_connection_left(service):
        refused = chat(service, f"fp:{challenge}:hash456")
        assert (refused.status_code, refused.json["error"]) == (503, "throttle_unavailable")
        assert "throttle;dur=" in refused.headers["Server-Timing"]
        assert service.client.get(URL, headers=HEADERS).status_code == 503
    assert chat(service, f"fp:{challenge}:hash456").status_code == 200


@contextmanager
def no_counting(service):
    """What stands behind the limiter is reached."""
    before = service.app.before_request_funcs[None]
    service.app.before_request_funcs[None] = [each for each in before if each.__name__ != "check_request"]
    yield
    service.app.before_request_funcs[None] = before


@pytest.mark.parametrize(
    ("fingerprint", "reason"),
    [
        (None, "missing"),
        ("hash456", "missing"),
        ("fp:test123:hash456", "unknown"),
        (f"fp:{'A' * 64}:hash456", "unknown"),
    ],
)
def test_whether_there_is_a_challenge_is_looked_at_before_the_body(make_app, fingerprint, reason):
    class Body:
        def read(self, *_):
            raise AssertionError("the body was read")

    service = make_app(ENABLE_CHALLENGE_RESPONSE="true")
    headers = {} if fingerprint is None else {"X-Fingerprint": fingerprint}
    environ = {"wsgi.input": Body(), "CONTENT_LENGTH": "900", "CONTENT_TYPE": "application/json"}
    refused = service.client.post(CHAT, headers=headers, environ_overrides=environ)
    assert (refused.status_code, refused.json["reason"]) == (403, reason)


def test_every_refusal_of_a_challenge_has_its_server_timing(service, own_server, tmp_path):
    given = challenge_for(service, "somebody-else")
    for fingerprint in ("hash456", f"fp:{'0' * 64}:hash456", f"fp:{given}:hash456"):
        answer = chat(service, fingerprint)
        assert answer.status_code == 403
        assert "throttle;dur=" in answer.headers["Server-Timing"]
    closed = {"ENABLE_CHALLENGE_RESPONSE": "true", "THROTTLE_ON_ERROR": "closed"}
    with open_app(own_server.url, tmp_path, closed) as other:
        given = challenge_for(other)
        own_server.kill()
        answer = chat(other, f"fp:{given}:hash456")
        assert (answer.status_code, answer.json["error"]) == (503, "throttle_unavailable")
        assert "throttle;dur=" in answer.headers["Server-Timing"]


def test_fresh_hashes_do_not_fill_redis_from_one_network(make_app):
    service = make_app(ENABLE_CHALLENGE_RESPONSE="true", CHAT_RATE_LIMIT="1 per hour; 2 per day")
    answers = [
        service.client.get(URL, headers={"X-Fingerprint": f"fresh-{number}"}, environ_base=HOME) for number in range(12)
    ]
    assert [each.status_code for each in answers] == [200] * 10 + [429] * 2
    assert (answers[-1].json["error"], answers[-1].json["scope"]) == ("rate_limited", "network")
    assert int(answers[-1].headers["Retry-After"]) >= 1
    assert len(service.redis.keys("llm:challenge:*")) == 10
    assert challenge_for(service, "a-neighbour", "198.51.100.8")


@pytest.mark.parametrize(("full", "clear"), [(("maxmemory", "1"), ("maxmemory", "0"))])
def test_an_unknown_challenge_is_no_refusal_where_none_can_be_kept(own_server, tmp_path, full, clear):
    with open_app(own_server.url, tmp_path, {"ENABLE_CHALLENGE_RESPONSE": "true"}) as service:
        service.redis.config_set(*full)
        challenge = challenge_for(service)
        assert chat(service, f"fp:{challenge}:hash456").headers["X-Throttle-Backend"] == "emergency"
        service.redis.config_set(*clear)
        assert reason_of(chat(service, f"fp:{challenge}:hash456")) == "unknown"
        assert service.redis.keys("llm:challenge:*") == []
