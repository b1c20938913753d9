"""Refusals and errors: their shapes, to the letter."""

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.budgets import Budget, Forever, Reason, Scope
from backends.conformance.harness import ManualClock
from backends.contract import Refusal
from flaskapp.http.refusals import cost_refused, later
from tests.servers import BEARER, CHAT, SETTINGS, earliest_wait

MEMBERS = [
    "error",
    "message",
    "reason",
    "retry_after_seconds",
    "scope",
    "request_id",
    "type",
    "title",
    "status",
    "detail",
]


def members_of(answer):
    """The members in the order of the wire; what holds for every refusal is asserted."""
    assert answer.mimetype == "application/problem+json"
    assert answer.headers["Cache-Control"] == "no-store"
    pairs = json.loads(answer.data, object_pairs_hook=list)
    body = dict(pairs)
    assert [name for name, _ in pairs][: len(MEMBERS)] == MEMBERS
    assert body["detail"] == body["message"]
    assert body["status"] == answer.status_code
    assert body["request_id"] == answer.headers["X-Request-ID"]
    assert re.fullmatch(r"[0-9a-f]{32}", body["request_id"])
    assert answer.headers.get("Retry-After") == (
        None if body["retry_after_seconds"] is None else str(body["retry_after_seconds"])
    )
    return [name for name, _ in pairs][len(MEMBERS) :]


@pytest.fixture
def service(make_app):
    return make_app()


def test_a_cost_refusal(service):
    service.patch(high_cost_threshold_usd="0.005")
    service.chat()
    refused = service.chat()
    assert refused.status_code == 429
    assert members_of(refused) == ["budget"]
    assert refused.json["budget"] == "window"
    assert refused.json["error"] == "cost_throttled"
    assert refused.json["scope"] == "identifier"
    assert int(refused.headers["Retry-After"]) >= 1
    assert re.fullmatch(r"throttle;dur=\d+\.\d{3}", refused.headers["Server-Timing"])


def test_one_that_can_never_fit_has_no_retry_after(service):
    service.patch(high_cost_threshold_usd="0.001")
    refused = service.chat()
    assert members_of(refused) == ["budget", "can_never_fit"]
    assert refused.json["can_never_fit"] is True
    assert refused.json["message"].startswith("High usage detected")
    assert "0.001000000 USD" in refused.json["message"]


def test_one_that_only_open_reservations_cause_says_so(make_app):
    service = make_app(HIGH_COST_THRESHOLD_USD="0.005", DEMO_TOKENS_PER_SECOND="10")
    under_way = service.open_chat()
    refused = service.chat()
    assert members_of(refused) == ["budget", "in_flight"]
    assert refused.json["in_flight"] is True
    # The marker refuses until its TTL ends.
    assert earliest_wait(refused) == 30
    under_way.close()


def test_callers_that_are_refused_together_do_not_come_back_together_and_none_too_early(make_app):
    clock = ManualClock()
    service = make_app(clock=clock, THROTTLE_BACKEND="memory", HOURLY_SPEND_LIMIT_USD="0.005", NETWORK_SHARE="1")
    service.chat("first")
    hour_ends_in_seconds = 3_600 - clock.us // 1_000_000 % 3_600
    refused = [service.chat(f"visitor-{number}") for number in range(40)]
    assert {each.json["reason"] for each in refused} == {"global_hourly_limit"}
    waits = [int(each.headers["Retry-After"]) for each in refused]
    assert waits == [each.json["retry_after_seconds"] for each in refused]
    assert all(hour_ends_in_seconds <= each <= hour_ends_in_seconds + 10 for each in waits)
    # Eleven are possible; that forty have fewer than five of them is one chance in 10^11.
    assert len(set(waits)) >= 5


@given(st.integers(1, 40_000_000), st.uuids(version=4))
def test_what_is_put_on_top_of_a_wait_is_bounded_and_the_same_for_the_same_request(wait_seconds, request_id):
    told_seconds = later(wait_seconds, request_id.hex)
    assert told_seconds == later(wait_seconds, request_id.hex)
    assert wait_seconds <= told_seconds <= wait_seconds + max(2, min(10, wait_seconds // 20))
    # OpenAI's clients do not wait longer by themselves.
    assert (wait_seconds <= 60) == (told_seconds <= 60)


@pytest.mark.parametrize(("wait_seconds", "least", "most"), [(1, 1, 3), (30, 30, 32), (60, 60, 60), (600, 600, 610)])
def test_every_part_of_the_spread_is_used(wait_seconds, least, most):
    told = {later(wait_seconds, f"{number:08x}") for number in range(0, 2**32, 2**24)}
    assert told == set(range(least, most + 1))
    assert (later(wait_seconds, "0" * 32), later(wait_seconds, "f" * 32)) == (least, most)


REFUSAL = Refusal(
    Reason.BUDGET_LIMIT,
    Reason.BUDGET_LIMIT,
    Scope.MODEL,
    "dear_model",
    retry_after_seconds=100,
    in_flight=False,
    can_never_fit=False,
    marker_seconds=0,
    limit_nanousd=1_000,
)


@pytest.fixture
def told(service):
    """`told(budgets, **changes)`: the answer to `REFUSAL` with these changes."""

    def tell(budgets=(), **changes):
        with service.app.test_request_context():
            return cost_refused(replace(REFUSAL, **changes), budgets)

    return tell


@pytest.mark.parametrize(
    ("reason", "cause", "words"),
    [
        (Reason.THROTTLED, Reason.DAILY_LIMIT, "Daily usage limit reached."),
        (Reason.THROTTLED, Reason.WINDOW_LIMIT, "High usage detected."),
        (Reason.THROTTLED, Reason.BUDGET_LIMIT, "Usage limit reached (x)."),
        (Reason.DAILY_LIMIT, Reason.DAILY_LIMIT, "Daily usage limit reached."),
        (Reason.WINDOW_LIMIT, Reason.WINDOW_LIMIT, "High usage detected."),
        (Reason.NETWORK_LIMIT, Reason.NETWORK_LIMIT, "High usage detected from your network."),
        (Reason.NETWORK_DAILY_LIMIT, Reason.NETWORK_DAILY_LIMIT, "Your network has reached its daily usage limit."),
        (Reason.GLOBAL_HOURLY_LIMIT, Reason.GLOBAL_HOURLY_LIMIT, "This service has reached its usage limit for this"),
        (Reason.GLOBAL_DAILY_LIMIT, Reason.GLOBAL_DAILY_LIMIT, "This service has reached its usage limit for today."),
        (Reason.BUDGET_LIMIT, Reason.BUDGET_LIMIT, "Usage limit reached (x)."),
    ],
)
def test_the_message_names_the_limit(told, reason, cause, words):
    answer = told(reason=reason, cause=cause, scope=Scope.NETWORK, budget="x")
    assert answer.json["message"].startswith(f"{words} " if words.endswith(".") else words)
    assert (answer.json["reason"], answer.json["scope"], answer.json["budget"]) == (reason.value, "network", "x")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(1, "1 second."), (119, "119 seconds."), (120, "2 minutes."), (121, "3 minutes."), (7_201, "3 hours.")],
)
def test_a_wait_is_given_in_words_that_are_never_too_short(told, seconds, words):
    answer = told(retry_after_seconds=seconds)
    assert answer.json["message"] == f"Usage limit reached (dear_model). Please try again in {words}"
    assert answer.headers["Retry-After"] == str(seconds)


def test_where_waiting_never_helps_it_says_so_and_has_no_retry_after(told):
    answer = told(retry_after_seconds=None)
    assert answer.json["message"] == (
        "Usage limit reached (dear_model). Waiting does not help: this limit is not renewed."
    )
    assert answer.json["retry_after_seconds"] is None
    assert "Retry-After" not in answer.headers


def budget(limit_nanousd, **more):
    return Budget("a", "b", Forever(), limit_nanousd, **more)


def test_what_can_never_fit_is_told_the_smallest_limit_that_is_enforced(told):
    budgets = (budget(3_000), budget(2_000), budget(None), budget(1, is_shadow=True))
    # Also where the limit that refuses is another one, and it would fit into that.
    answer = told(budgets, can_never_fit=True, retry_after_seconds=None, limit_nanousd=3_000)
    assert answer.json["message"] == (
        "Usage limit reached (dear_model). "
        "This request alone is larger than a whole limit of 0.000002000 USD: ask for less."
    )
    assert answer.json["can_never_fit"] is True


@pytest.mark.parametrize("limit_nanousd", [0, None])
def test_who_is_blocked_is_not_told_to_ask_for_less(told, limit_nanousd):
    """Under the throttle marker too, where no limit is told."""
    budgets = (budget(3_000), budget(0))
    answer = told(budgets, can_never_fit=True, retry_after_seconds=None, limit_nanousd=limit_nanousd)
    assert answer.json["message"] == (
        "Usage limit reached (dear_model). Nothing may be spent here now: a limit is set to 0."
    )


def test_in_openais_shape_the_budget_is_named_too(service):
    with service.app.test_request_context("/v1/chat/completions"):
        answer = cost_refused(replace(REFUSAL, in_flight=True), ())
    assert list(answer.json["error"].items())[5:] == [
        ("reason", "budget_limit"),
        ("scope", "model"),
        ("retry_after_seconds", 100),
        ("budget", "dear_model"),
        ("in_flight", True),
    ]


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "error"),
    [
        ("GET", "/nowhere", {}, 404, "not_found"),
        ("GET", CHAT, {}, 405, "method_not_allowed"),
        ("GET", SETTINGS, {}, 401, "unauthorized"),
        ("GET", SETTINGS, {"Authorization": "Bearer wrong"}, 401, "unauthorized"),
        ("PATCH", SETTINGS, {"Authorization": "Basic x"}, 401, "unauthorized"),
        ("POST", SETTINGS, BEARER, 405, "method_not_allowed"),
        ("PATCH", SETTINGS, {**BEARER, "Content-Type": "text/plain"}, 415, "invalid_request"),
        ("POST", CHAT, {"Content-Type": "text/plain"}, 415, "invalid_request"),
        ("POST", CHAT, {}, 415, "invalid_request"),
        ("GET", "/api/v1/auth/challenge", {}, 400, "invalid_request"),
        ("GET", "/api/v1/auth/challenge", {"X-Fingerprint": "fp:a:b"}, 400, "invalid_request"),
    ],
)
def test_refusals_of_http_are_problems_too(service, method, path, headers, status, error):
    answer = service.client.open(path, method=method, headers=headers)
    assert (answer.status_code, answer.json["error"]) == (status, error)
    members_of(answer)
    assert (answer.headers.get("Allow") is not None) == (status == 405)
    assert (answer.headers.get("WWW-Authenticate") is not None) == (status == 401)


def test_the_request_id_is_ours_and_never_the_callers(service):
    mine = {"X-Request-ID": "mine", "X-Fingerprint": "hash456"}
    first, second = (service.client.post(CHAT, json={"query": "x"}, headers=mine, buffered=True) for _ in range(2))
    ids = {first.headers["X-Request-ID"], second.headers["X-Request-ID"]}
    assert len(ids) == 2
    assert all(re.fullmatch(r"[0-9a-f]{32}", each) for each in ids)


def test_a_bug_of_ours_is_a_500_without_a_word_about_it(service, monkeypatch, caplog):
    def broken(*_):
        raise ValueError("secret")

    monkeypatch.setattr(service.tollgate.guard, "reserve", broken)
    answer = service.chat()
    assert (answer.status_code, answer.json["error"]) == (500, "internal_error")
    members_of(answer)
    assert b"secret" not in answer.data
    (logged,) = [record for record in caplog.records if record.message == "Unexpected error"]
    assert logged.exc_info[0] is ValueError
