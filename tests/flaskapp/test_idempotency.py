"""`Idempotency-Key` on the chat route: the same request, sent again, never charges again."""

import threading

import pytest

from flaskapp.http.headers import read_idempotency
from flaskapp.lab.thinking_app import hold_reservations
from flaskapp.lab.wire import Wire
from flaskapp.ops.embedded_redis import free_port
from tests.apps import NETWORK, open_app
from tests.flaskapp.test_refusals import members_of
from tests.servers import CHAT, LITECOIN, earliest_wait, events, nanousd

DAY_SECONDS = 86_400


def chat(service, key="one", fingerprint="hash456", **fields):
    return service.chat(fingerprint, headers={"Idempotency-Key": key}, **{"max_tokens": 2, **fields})


def duplicate(refused):
    """What a 409 says; its shape is asserted."""
    assert (refused.status_code, refused.json["error"]) == (409, "duplicate_request")
    assert members_of(refused) == ["first_request_id", "first_state", "cost_usd"]
    assert refused.json["scope"] is None
    assert "throttle;dur=" in refused.headers["Server-Timing"]
    return refused.json["reason"], refused.json["first_request_id"], nanousd(refused.json["cost_usd"])


def booked(service, identifier="hash456"):
    books = service.books(identifier)
    return books.spent("window"), books.spent("day"), books.use("window").pending_nanousd


@pytest.fixture(params=["atomic", "legacy", "memory"])
def backend(request):
    return request.param


@pytest.fixture
def service(make_app, backend):
    return make_app(THROTTLE_BACKEND=backend, DEMO_TOKENS_PER_SECOND="20")


def test_while_the_first_is_under_way(service):
    first = service.open_chat(headers={"Idempotency-Key": "one"}, max_tokens=50)
    before = booked(service)
    again = chat(service, max_tokens=50)
    assert duplicate(again) == ("in_flight", first.headers["X-Request-ID"], before[2])
    assert before[2] == nanousd(first.headers["X-Cost-Reserved-USD"])
    assert booked(service) == before
    assert again.json["request_id"] != first.headers["X-Request-ID"]
    first.close()


def test_after_the_first_is_settled(service):
    first = chat(service)
    cost_nanousd = nanousd(events(first)[-1]["cost_usd"])
    for _ in range(3):
        assert duplicate(chat(service)) == ("settled", first.headers["X-Request-ID"], cost_nanousd)
    assert booked(service) == (cost_nanousd, cost_nanousd, 0)


def test_with_another_body(service):
    first = chat(service)
    cost_nanousd = nanousd(events(first)[-1]["cost_usd"])
    for other in ({"query": "What is Bitcoin?"}, {"max_tokens": 3}, {"model": "gpt-4o"}):
        refused = chat(service, **other)
        assert duplicate(refused) == ("other_body", first.headers["X-Request-ID"], cost_nanousd)
        assert refused.json["first_state"] == "settled"
    assert booked(service)[0] == cost_nanousd


def test_the_same_body_in_another_spelling_is_the_same(service):
    first = chat(service)
    body = '{"max_tokens":2,   "chat_history": [], "query": "What is L\\u0069tecoin?"}'
    headers = {"X-Fingerprint": "hash456", "Idempotency-Key": "one"}
    again = service.client.post(CHAT, data=body, headers=headers, content_type="application/json")
    assert duplicate(again)[:2] == ("settled", first.headers["X-Request-ID"])


def test_a_key_belongs_to_its_identifier(service):
    assert chat(service).status_code == 200
    assert chat(service, fingerprint="another").status_code == 200
    assert chat(service, fingerprint=None).status_code == 200
    assert chat(service, "two").status_code == 200
    assert duplicate(chat(service, fingerprint="fp:anything:another"))[0] == "settled"


def test_a_key_belongs_to_its_route(service):
    with service.app.test_request_context(headers={"Idempotency-Key": "one"}) as context:
        asked = context.request
        digests = {
            read_idempotency(asked, who, route, lambda: "body").digest
            for who in ("hash456", "another")
            for route in (CHAT, "/v1/chat/completions")
        }
    assert len(digests) == 4


@pytest.mark.parametrize("key", ["", " ", "a b", "a\tb", "ü", "\x7f", "x" * 129])
def test_what_is_no_key_is_a_400_that_changes_nothing(service, key):
    refused = chat(service, key)
    assert (refused.status_code, refused.json["error"]) == (400, "invalid_request")
    assert refused.json["field"] == "Idempotency-Key"
    assert booked(service) == (0, 0, 0)
    assert service.stored() == {}


@pytest.mark.parametrize("key", ["!", "~" * 128, '"quoted"', "a,b;c=d", "0b9a7c1e-55f1-4a0e-9c1c-1f8f3a2b7d10"])
def test_any_visible_ascii_is_a_key(service, key):
    assert chat(service, key).status_code == 200
    assert duplicate(chat(service, key))[0] == "settled"


def test_a_first_try_that_was_refused_frees_it(service):
    service.patch(network_cost_limit_usd="0.0001")
    assert [chat(service).json["reason"] for _ in range(2)] == ["network_limit"] * 2
    service.patch(network_cost_limit_usd="1")
    assert chat(service).status_code == 200
    assert duplicate(chat(service))[0] == "settled"


def test_a_first_try_that_a_marker_refused_frees_it(make_app):
    service = make_app(HIGH_COST_THRESHOLD_USD="0.0001")
    assert [chat(service).json["reason"] for _ in range(2)] == ["window_limit", "throttled"]
    assert service.redis.keys("llm:idempotency:*") == []
    service.patch(high_cost_threshold_usd="0.02")
    service.redis.delete("llm:throttle:hash456")
    assert chat(service).status_code == 200


def test_a_first_try_that_the_model_did_not_take_frees_it(make_app, backend):
    service = make_app(THROTTLE_BACKEND=backend, LLM_BASE_URL=f"http://127.0.0.1:{free_port()}/v1")
    for _ in range(2):
        refused = chat(service)
        assert (refused.status_code, refused.json["cost_usd"]) == (502, "0.000000000")
    assert booked(service) == (0, 0, 0)
    assert service.redis.keys("llm:idempotency:*") == []


def test_a_duplicate_is_refused_before_any_limit_is_checked(make_app, backend):
    service = make_app(THROTTLE_BACKEND=backend)
    first = chat(service)
    service.patch(high_cost_threshold_usd="0.0001")
    assert chat(service, "two").json["reason"] == "window_limit"
    assert duplicate(chat(service))[:2] == ("settled", first.headers["X-Request-ID"])


def test_a_duplicate_does_not_use_up_its_challenge(make_app):
    service = make_app(ENABLE_CHALLENGE_RESPONSE="true")

    def fresh():
        headers, home = {"X-Fingerprint": "hash456"}, {"REMOTE_ADDR": NETWORK}
        return service.client.get("/api/v1/auth/challenge", headers=headers, environ_base=home).json["challenge"]

    assert chat(service, fingerprint=f"fp:{fresh()}:hash456").status_code == 200
    challenge = fresh()
    assert duplicate(chat(service, fingerprint=f"fp:{challenge}:hash456"))[0] == "settled"
    assert duplicate(chat(service, fingerprint=f"fp:{challenge}:hash456", query="Another?"))[0] == "other_body"
    # That there is one is looked at before the body, which has the rest of what makes a duplicate.
    assert chat(service).json["reason"] == "missing"
    assert service.redis.exists(f"llm:challenge:{challenge}")
    assert chat(service, "two", fingerprint=f"fp:{challenge}:hash456").status_code == 200
    assert not service.redis.exists(f"llm:challenge:{challenge}")


def test_where_the_key_cannot_be_looked_up_the_challenge_is_kept(make_app):
    service = make_app(ENABLE_CHALLENGE_RESPONSE="true")
    headers, home = {"X-Fingerprint": "hash456"}, {"REMOTE_ADDR": NETWORK}
    challenge = service.client.get("/api/v1/auth/challenge", headers=headers, environ_base=home).json["challenge"]
    assert chat(service, fingerprint=f"fp:{challenge}:hash456").status_code == 200
    challenge = service.client.get("/api/v1/auth/challenge", headers=headers, environ_base=home).json["challenge"]
    (key,) = service.redis.keys("llm:idempotency:*")
    service.redis.delete(key)
    service.redis.lpush(key, "of another kind")
    refused = chat(service, fingerprint=f"fp:{challenge}:hash456")
    assert (refused.status_code, refused.json["error"]) == (503, "throttle_unavailable")
    assert service.redis.exists(f"llm:challenge:{challenge}")


@pytest.mark.parametrize("backend", ["atomic", "legacy"], indirect=True)
def test_it_is_remembered_for_24_hours_from_its_last_word(service):
    first = service.open_chat(headers={"Idempotency-Key": "one"}, max_tokens=2)
    (key,) = service.redis.keys("llm:idempotency:*")
    assert DAY_SECONDS - 2 <= service.redis.ttl(key) <= DAY_SECONDS
    assert key.removeprefix("llm:idempotency:").isalnum()
    service.redis.expire(key, 60)
    first.get_data()
    first.close()
    assert DAY_SECONDS - 2 <= service.redis.ttl(key) <= DAY_SECONDS
    assert len(service.redis.get(key)) <= 200
    service.redis.pexpire(key, 0)
    assert chat(service).status_code == 200


@pytest.mark.parametrize("on_error", ["open", "closed"])
def test_without_redis_nobody_knows_so_nobody_is_admitted(own_server, tmp_path, on_error):
    with open_app(own_server.url, tmp_path, {"THROTTLE_ON_ERROR": on_error}) as service:
        assert chat(service).status_code == 200
        own_server.kill()
        for key in ("one", "two"):
            refused = chat(service, key)
            assert (refused.status_code, refused.json["error"]) == (503, "throttle_unavailable")
            assert earliest_wait(refused) == 1
        assert service.chat(max_tokens=2).status_code == (200 if on_error == "open" else 503)
        own_server.start()


def test_with_throttling_off_keys_mean_nothing(make_app):
    service = make_app(ENABLE_COST_THROTTLING="false")
    assert [chat(service).status_code for _ in range(2)] == [200, 200]
    assert service.stored() == {}


def test_a_bad_body_or_header_is_refused_first_and_leaves_the_key_free(service):
    assert chat(service, max_tokens=-1).status_code == 422
    assert chat(service, fingerprint="a:b").status_code == 400
    assert chat(service).status_code == 200


@pytest.mark.parametrize("backend", ["atomic", "legacy"], indirect=True)
def test_of_many_at_once_one_is_admitted_and_legacy_admits_them_all(make_app, backend):
    """Legacy looks first and remembers later, as declared: held there, all of them have seen that the key is free."""
    wire, callers = Wire(), 6
    limits = {"HIGH_COST_THRESHOLD_USD": "1", "NETWORK_COST_LIMIT_USD": "0"}
    service = make_app(before_each_send=wire, THROTTLE_BACKEND=backend, **limits)
    start, answers = threading.Barrier(callers), []
    hold_reservations(service.app, wire, threading.Barrier(callers, timeout=10).wait, 10)

    def ask():
        client = service.app.test_client()
        headers = {"X-Fingerprint": "hash456", "Idempotency-Key": "one"}
        start.wait(10)
        answers.append(client.post(CHAT, json={**LITECOIN, "max_tokens": 2}, headers=headers, buffered=True))

    threads = [threading.Thread(target=ask) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    admitted = [answer for answer in answers if answer.status_code == 200]
    assert len(admitted) == (1 if backend == "atomic" else callers)
    others = [answer for answer in answers if answer.status_code != 200]
    assert {duplicate(answer)[1] for answer in others} <= {admitted[0].headers["X-Request-ID"]}
    assert {duplicate(answer)[0] for answer in others} <= {"in_flight", "settled"}
