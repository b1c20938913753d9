"""`GET /api/v1/usage`: what it reports, to which caller, from which books; and that it changes nothing."""

import hashlib
import json
from datetime import UTC, datetime

import pytest

from backends.conformance.harness import ManualClock
from backends.keys import bucket_seconds_of
from tests.apps import NETWORK, open_app
from tests.servers import earliest_wait, nanousd

URL = "/api/v1/usage"
NOON = int(datetime(2026, 3, 14, 12, 0, 5, tzinfo=UTC).timestamp())
MIDNIGHT = int(datetime(2026, 3, 15, tzinfo=UTC).timestamp())
BUCKET = bucket_seconds_of(600)
BACKENDS = ["atomic", "legacy", "memory"]


def usage(service, fingerprint="hash456", **options):
    headers = {} if fingerprint is None else {"X-Fingerprint": fingerprint}
    return service.client.get(URL, headers=headers, environ_base={"REMOTE_ADDR": NETWORK}, **options)


def amounts(body):
    return {name.removesuffix("_usd"): nanousd(value) for name, value in body.items() if name.endswith("_usd")}


def booked(service, identifier="hash456"):
    """What the strategy itself says is booked: window, day."""
    books = service.books(identifier)
    return books.spent("window"), books.spent("day")


@pytest.fixture(params=BACKENDS)
def service(request, make_app):
    return make_app(THROTTLE_BACKEND=request.param, DEMO_TOKENS_PER_SECOND="20")


@pytest.fixture(params=["legacy", "memory"])
def timed(request, make_app):
    """Strategies that decide by the application's clock, and the clock; `atomic` decides by Redis' own."""
    clock = ManualClock(NOON * 1_000_000 + 250_000)
    return make_app(clock=clock, THROTTLE_BACKEND=request.param), clock


def test_who_spent_nothing_has_all_of_it(service):
    answer = usage(service)
    assert answer.status_code == 200
    assert answer.mimetype == "application/json"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["X-Request-ID"]
    pairs = json.loads(answer.data, object_pairs_hook=list)
    assert [name for name, _ in pairs] == ["enabled", "identifier", "as_of", "limits", "throttled"]
    body = answer.json
    assert (body["enabled"], body["identifier"], body["throttled"]) == (True, "hash456", None)
    nothing = "0.000000000"
    assert body["limits"]["window"] == {
        "window_seconds": 600,
        "limit_usd": "0.020000000",
        "spent_usd": nothing,
        "held_usd": nothing,
        "left_usd": "0.020000000",
        "renews_at": None,
        "renews_in_seconds": None,
    }
    day = body["limits"]["day"]
    assert (day["limit_usd"], day["spent_usd"], day["left_usd"]) == ("0.250000000", nothing, "0.250000000")
    assert day["renews_at"] % 86_400 == 0
    assert day["renews_at"] - body["as_of"] - 1 <= day["renews_in_seconds"] <= day["renews_at"] - body["as_of"]


def test_spent_held_and_left_are_reported_apart_and_add_up(service):
    service.chat(max_tokens=2)
    spent = booked(service)[0]
    under_way = service.open_chat(max_tokens=50)
    held = nanousd(under_way.headers["X-Cost-Reserved-USD"])
    limits = usage(service).json["limits"]
    assert amounts(limits["window"]) == {
        "limit": 20_000_000,
        "spent": spent,
        "held": held,
        "left": 20_000_000 - spent - held,
    }
    assert amounts(limits["day"]) == {
        "limit": 250_000_000,
        "spent": spent,
        "held": held,
        "left": 250_000_000 - spent - held,
    }
    under_way.close()
    after = amounts(usage(service).json["limits"]["window"])
    assert (after["held"], after["spent"]) == (0, booked(service)[0])


def test_it_is_what_the_headers_of_the_last_answer_said(service):
    under_way = service.open_chat(max_tokens=50)
    left = {name: amounts(body)["left"] // 1_000 for name, body in usage(service).json["limits"].items()}
    assert under_way.headers["RateLimit"].startswith(f'"window";r={left["window"]};t=')
    assert f', "day";r={left["day"]};t=' in under_way.headers["RateLimit"]
    under_way.close()


def test_when_it_renews_to_the_second(timed):
    service, clock = timed
    service.chat()
    clock.us += 31_000_000
    service.chat()
    first_bucket_ends_to_count = NOON - NOON % BUCKET + BUCKET + 600
    window, day = (usage(service).json["limits"][name] for name in ("window", "day"))
    assert window["renews_at"] == first_bucket_ends_to_count
    # The clock stands at a quarter of a second past: rounded up, so that no client comes too early.
    assert window["renews_in_seconds"] == first_bucket_ends_to_count - (NOON + 31)
    assert (day["renews_at"], day["renews_in_seconds"]) == (MIDNIGHT, MIDNIGHT - (NOON + 31))
    before = amounts(window)["spent"]
    clock.us += window["renews_in_seconds"] * 1_000_000
    later = usage(service).json["limits"]["window"]
    assert amounts(later)["spent"] == before // 2 > 0
    assert later["renews_at"] == window["renews_at"] + BUCKET
    clock.us += later["renews_in_seconds"] * 1_000_000
    assert usage(service).json["limits"]["window"]["renews_at"] is None


def test_midnight_gives_a_new_day_and_what_is_held_stays_in_the_old_one(timed):
    service, clock = timed
    # No token is due while the clock stands still.
    service.tollgate.model._seconds_per_token = 3_600
    clock.us = MIDNIGHT * 1_000_000 - 1
    under_way = service.open_chat()
    held = nanousd(under_way.headers["X-Cost-Reserved-USD"])
    assert usage(service).json["limits"]["day"]["renews_in_seconds"] == 1
    assert amounts(usage(service).json["limits"]["day"])["held"] == held
    clock.us += 1
    limits = usage(service).json["limits"]
    assert amounts(limits["day"]) == {"limit": 250_000_000, "spent": 0, "held": 0, "left": 250_000_000}
    assert amounts(limits["window"])["held"] == held
    under_way.close()


def test_a_marker_is_reported_with_what_set_it_and_when_it_ends(timed):
    service, clock = timed
    service.chat()
    service.patch(high_cost_threshold_usd="0.0045")
    refused = service.chat()
    clock.us += 12_000_000
    body = usage(service).json["throttled"]
    assert body == {
        "reason": "window_limit",
        "budget": "window",
        "ends_in_seconds": 30 - 12,
        "retry_after_seconds": earliest_wait(refused) - 12,
        "in_flight": False,
    }
    again = service.chat()
    assert (again.json["reason"], earliest_wait(again)) == ("throttled", body["retry_after_seconds"])
    clock.us += 18_000_000
    assert usage(service).json["throttled"] is None


def test_a_marker_of_the_atomic_way_and_one_set_by_hand(make_app):
    service = make_app(HIGH_COST_THRESHOLD_USD="0.005", DEMO_TOKENS_PER_SECOND="10")
    under_way = service.open_chat()
    service.chat()
    body = usage(service).json["throttled"]
    assert (body["reason"], body["in_flight"]) == ("window_limit", True)
    assert 28 <= body["ends_in_seconds"] <= 30
    assert body["retry_after_seconds"] == body["ends_in_seconds"]
    under_way.close()
    service.redis.set("llm:throttle:byhand", "stop", ex=60)
    service.redis.set("llm:throttle:forever", "stop")
    assert 58 <= usage(service, "byhand").json["throttled"]["ends_in_seconds"] <= 60
    assert usage(service, "forever").json["throttled"]["ends_in_seconds"] == 1
    service.redis.delete("llm:throttle:forever")


def test_a_limit_lowered_below_what_is_spent_leaves_nothing_and_never_less(service):
    service.chat(max_tokens=2)
    service.patch(high_cost_threshold_usd="0.0001", daily_cost_limit_usd="0.0002")
    limits = usage(service).json["limits"]
    assert limits["window"]["left_usd"] == limits["day"]["left_usd"] == "0.000000000"
    assert limits["window"]["limit_usd"] == "0.000100000"
    assert amounts(limits["window"])["spent"] == booked(service)[0] > 100_000


def test_each_caller_gets_its_own(service):
    service.chat("mine", max_tokens=1)
    service.chat(None, max_tokens=1)
    bodies = {who: usage(service, who).json for who in ("mine", "fp:anything:mine", "other", None)}
    assert (
        bodies["fp:anything:mine"]["limits"]["window"]["spent_usd"] == bodies["mine"]["limits"]["window"]["spent_usd"]
    )
    assert amounts(bodies["mine"]["limits"]["day"])["spent"] == booked(service, "mine")[1] > 0
    assert amounts(bodies["other"]["limits"]["day"])["spent"] == 0
    assert bodies[None]["identifier"] == f"ip:{NETWORK}"
    assert amounts(bodies[None]["limits"]["day"])["spent"] == booked(service, f"ip:{NETWORK}")[1] > 0


def with_key(service, key, **headers):
    given = {"Authorization": f"Bearer {key}", **headers}
    return service.client.get(URL, headers=given, environ_base={"REMOTE_ADDR": NETWORK})


def test_a_registered_key_gets_what_it_has_spent(make_app):
    service = make_app(API_KEYS="sk-good")
    digest = hashlib.sha256(b"sk-good").hexdigest()
    asked = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    headers = {"Authorization": "Bearer sk-good"}
    assert service.client.post("/v1/chat/completions", json=asked, headers=headers).status_code == 200
    body = with_key(service, "sk-good").json
    assert body["identifier"] == digest
    assert amounts(body["limits"]["window"])["spent"] == booked(service, digest)[0] > 0
    # A visitor is one whatever token its page sends along.
    assert with_key(service, "some-other-token", **{"X-Fingerprint": "hash456"}).json["identifier"] == "hash456"


def test_a_key_that_is_not_registered_is_a_401_and_learns_nothing_of_its_network(make_app):
    for service in (
        make_app(API_KEYS="sk-good"),
        make_app(ENVIRONMENT="production", ENABLE_CHALLENGE_RESPONSE="false"),
    ):
        refused = with_key(service, "sk-bad")
        assert (refused.status_code, refused.json["error"]) == (401, "unauthorized")
        assert usage(service, None).json["identifier"] == f"ip:{NETWORK}"


def test_open_to_anyone_no_key_is_looked_at(make_app):
    assert with_key(make_app(API_KEYS="*"), "anything").json["identifier"] == f"ip:{NETWORK}"


def test_a_key_counts_for_itself(make_app):
    service = make_app(API_KEYS="sk-good", CHAT_RATE_LIMIT="1 per day")
    assert [with_key(service, "sk-good").status_code for _ in range(2)] == [200, 429]
    assert usage(service, None).status_code == 200


@pytest.mark.parametrize("fingerprint", ["", "a:b", "fp::x", f"ip:{NETWORK}", "x" * 129, "hash 456"])
def test_a_fingerprint_that_is_none_is_a_400(service, fingerprint):
    refused = usage(service, fingerprint)
    assert (refused.status_code, refused.json["error"]) == (400, "invalid_request")
    assert refused.json["field"] == "X-Fingerprint"


def test_asking_changes_nothing_and_takes_one_round_trip(make_app):
    service = make_app()
    service.chat()
    before = service.stored()
    lives = {key: service.redis.ttl(key) for key in before}
    link = service.tollgate.link
    trips = []
    run = link.run
    link.run = lambda command: (trips.append(1), run(command))[1]
    service.books()
    link.run = run
    assert len(trips) == 1
    assert usage(service).status_code == 200
    assert service.stored() == before
    assert all(service.redis.ttl(key) <= left for key, left in lives.items())


def test_a_challenge_is_neither_asked_for_nor_used_up(make_app):
    service = make_app(ENABLE_CHALLENGE_RESPONSE="true")
    headers, home = {"X-Fingerprint": "hash456"}, {"REMOTE_ADDR": NETWORK}
    challenge = service.client.get("/api/v1/auth/challenge", headers=headers, environ_base=home).json["challenge"]
    assert usage(service, f"fp:{challenge}:hash456").status_code == usage(service).status_code == 200
    assert service.chat(f"fp:{challenge}:hash456", max_tokens=1).status_code == 200


def test_with_throttling_off_it_still_answers_and_says_so(service):
    service.chat(max_tokens=1)
    service.patch(enable_cost_throttling=False)
    body = usage(service).json
    assert body["enabled"] is False
    assert amounts(body["limits"]["window"])["spent"] == booked(service)[0] > 0


@pytest.mark.parametrize("on_error", ["open", "closed"])
def test_without_redis_it_says_that_it_cannot_know(own_server, tmp_path, on_error):
    with open_app(own_server.url, tmp_path, {"THROTTLE_ON_ERROR": on_error}) as service:
        assert usage(service).status_code == 200
        own_server.kill()
        refused = usage(service)
        assert (refused.status_code, refused.json["error"]) == (503, "throttle_unavailable")
        assert refused.mimetype == "application/problem+json"
        assert earliest_wait(refused) == 1
        own_server.start()


def test_books_that_cannot_be_read_are_no_500(make_app):
    service = make_app()
    service.redis.lpush("llm:cost:recent:hash456", "x")
    assert usage(service).status_code == 503


def test_it_counts_like_the_other_routes(make_app):
    service = make_app(CHAT_RATE_LIMIT="3 per hour")
    for _ in range(2):
        # The hour is a fixed window: begin again if one ends in between.
        statuses = [usage(service).status_code for _ in range(4)]
        if len(service.redis.keys("llm:rate:*")) == 3:
            break
    assert statuses == [200] * 3 + [429]
    refused = usage(service)
    assert refused.json["error"] == "rate_limited"
    assert usage(service, "another").status_code == 200
    assert service.client.post(URL, headers={"X-Fingerprint": "hash456"}).status_code == 405


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_networks_share_is_told_to_nobody_and_booked_while_there_is_one(make_app, backend):
    """Its own network's neither: it would say what others spend."""
    service = make_app(THROTTLE_BACKEND=backend)
    answer = service.chat()
    assert set(usage(service).json["limits"]) == {"window", "day"}
    for header in ("RateLimit", "RateLimit-Policy"):
        assert [part.partition(";")[0] for part in answer.headers[header].split(", ")] == ['"window"', '"day"']
    service.patch(network_share=1)
    service.chat()
    if service.tollgate.config.throttle_backend != "memory":
        hours = {name: f"llm:budget:{name}:hour:" for name in ("network_share_hour", "wide_share_hour")}
        (network,) = service.redis.keys(f"{hours['network_share_hour']}{NETWORK}:*")
        (wide,) = service.redis.keys(f"{hours['wide_share_hour']}*")
        spent = sum(booked(service)) // 4
        assert [int(service.redis.get(key)) for key in (network, wide)] == [spent, spent]
        assert all(service.redis.ttl(key) > 86_400 for key in (network, wide))
