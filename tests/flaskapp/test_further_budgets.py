"""Further budgets as callers and operators meet them: refusals, headers, usage, lines in the log, numbers."""

import hashlib
import json
import logging
from datetime import UTC, datetime

import pytest

from backends.conformance.harness import ManualClock
from backends.keys import bucket_seconds_of
from tests.apps import NETWORK, open_app
from tests.flaskapp.test_metrics import numbers
from tests.flaskapp.test_openai_api import ASKED, error_of
from tests.flaskapp.test_openai_api import ROUTE as COMPLETIONS
from tests.flaskapp.test_rate_limit_headers import parsed
from tests.flaskapp.test_refusals import members_of
from tests.flaskapp.test_usage import URL as USAGE
from tests.flaskapp.test_usage import amounts, usage
from tests.servers import CHAT, LITECOIN, earliest_wait, events, nanousd
from tests.upstream import Upstream

COST_USD, COST = "0.004192500", 4_192_500
"""What the seed's question reserves."""
DAY = 86_400
FEBRUARY = int(datetime(2024, 2, 1, tzinfo=UTC).timestamp())
MARCH = int(datetime(2024, 3, 1, tzinfo=UTC).timestamp())
NOW = int(datetime(2024, 2, 20, 12, 0, 5, tzinfo=UTC).timestamp())
MODELS = {"LLM_MODELS": "gpt-4o,gpt-4o-mini"}
KEYS = {"API_KEYS": "web@marketing=sk-web,app@marketing=sk-app,ci@engineering=sk-ci,sk-bare"}


def budget(name, scope, limit_usd, period="month", **more):
    return {"name": name, "scope": scope, "period": period, "limit_usd": limit_usd, **more}


def chat_from(service, address, visitor):
    headers, home = {"X-Fingerprint": visitor}, {"REMOTE_ADDR": address}
    return service.client.post(CHAT, json=LITECOIN, headers=headers, environ_base=home, buffered=True)


def complete(service, key, **fields):
    headers = {"Authorization": f"Bearer {key}"}
    return service.client.post(COMPLETIONS, json={**ASKED, "max_tokens": 20, **fields}, headers=headers, buffered=True)


@pytest.fixture(params=["atomic", "legacy", "memory"])
def backend(request):
    return request.param


@pytest.fixture
def make(make_app, backend):
    """`make(budget, …, NAME="value")`: the application with these further budgets, by each backend."""

    def with_budgets(*budgets, **environment):
        return make_app(THROTTLE_BACKEND=backend, BUDGETS=json.dumps(budgets), **MODELS, **environment)

    return with_budgets


@pytest.fixture
def make_timed(make_app):
    """The same with a clock that stands still in a February of 29 days; `legacy` decides by it."""

    def with_budgets(*budgets, **environment):
        clock = ManualClock(NOW * 1_000_000 + 250_000)
        text = json.dumps(budgets)
        return make_app(clock=clock, THROTTLE_BACKEND="legacy", BUDGETS=text, **MODELS, **environment), clock

    return with_budgets


# --- who is charged, and what a refusal says


def test_a_models_budget_counts_for_all_callers_of_that_model_and_for_no_other(make):
    service = make(budget("dear_month", "model", "0.005", owner="gpt-4o"))
    assert service.chat("one", model="gpt-4o").status_code == 200
    refused = service.chat("two", model="gpt-4o")
    assert refused.status_code == 429
    assert members_of(refused) == ["budget"]
    told = {name: refused.json[name] for name in ("error", "reason", "scope", "budget")}
    assert told == {"error": "cost_throttled", "reason": "budget_limit", "scope": "model", "budget": "dear_month"}
    assert refused.json["message"].startswith("Usage limit reached (dear_month). Please try again in ")
    # Where the caller names no model, it is the default that is asked.
    assert service.chat("three").json["budget"] == "dear_month"
    assert service.chat("two", model="gpt-4o-mini").status_code == 200


def test_a_models_month_is_kept_under_its_key_and_renews_at_the_first(make_timed):
    service, clock = make_timed(budget("dear_month", "model", "0.005"))
    cost = nanousd(events(service.chat("one"))[-1]["cost_usd"])
    assert service.redis.get(f"llm:budget:dear_month:month:gpt-4o:{FEBRUARY}") == str(cost)
    before = service.stored()
    refused = service.chat("two")
    assert earliest_wait(refused) == MARCH - NOW
    assert refused.json["message"].endswith(f"in {-(-refused.json['retry_after_seconds'] // 86_400)} days.")
    assert service.stored() == before
    clock.us = (MARCH - 1) * 1_000_000
    assert service.chat("two").status_code == 429
    clock.us = MARCH * 1_000_000
    assert service.chat("two").status_code == 200


def test_a_request_is_charged_to_all_of_them_or_to_none(make):
    service = make(
        budget("model_day", "model", "1", "day"),
        budget("everybody", "global", "0.005", "week"),
        budget("mine", "identifier", "1", "hour"),
    )
    assert service.chat(max_tokens=100).status_code == 200
    before, used = service.stored(), usage(service).json["limits"]["mine"]
    refused = service.chat()
    assert (refused.json["budget"], refused.json["scope"]) == ("everybody", "global")
    assert service.stored() == before
    assert amounts(usage(service).json["limits"]["mine"]) == amounts(used)


def test_a_key_has_a_budget_of_its_own(make):
    service = make(budget("per_key", "key", "0.0003"), **KEYS)
    assert complete(service, "sk-web").status_code == 200
    error = error_of(refused := complete(service, "sk-web"), 429)
    told = {name: error[name] for name in ("type", "code", "reason", "scope", "budget")}
    assert told == {
        "type": "rate_limit_error",
        "code": "cost_throttled",
        "reason": "budget_limit",
        "scope": "key",
        "budget": "per_key",
    }
    assert error["message"].startswith("Usage limit reached (per_key). Please try again in ")
    assert int(refused.headers["Retry-After"]) == error["retry_after_seconds"]
    assert complete(service, "sk-app").status_code == 200
    # It has no given name.
    assert complete(service, "sk-bare").status_code == 200
    assert error_of(complete(service, "sk-bare"), 429)["budget"] == "per_key"
    # A visitor has no key.
    assert service.chat().status_code == service.chat().status_code == 200


def test_the_keys_of_a_team_share_a_budget(make):
    service = make(budget("per_team", "team", "0.0003", {"sliding_seconds": 3_600}), **KEYS)
    assert complete(service, "sk-web").status_code == 200
    error = error_of(complete(service, "sk-app"), 429)
    assert (error["budget"], error["scope"]) == ("per_team", "team")
    assert complete(service, "sk-ci").status_code == 200
    # Without a team there is nothing to charge to.
    assert [complete(service, "sk-bare").status_code for _ in range(2)] == [200, 200]


@pytest.mark.parametrize(
    ("scope", "alike", "other"),
    [
        ("network", ("198.51.100.7", "198.51.100.7"), "198.51.100.8"),
        ("wide_network", ("198.51.100.7", "198.51.100.8"), "198.51.101.7"),
        ("wide_network", ("2001:db8:1:2::1", "2001:db8:1:3::1"), "2001:db8:2:2::1"),
    ],
)
def test_a_network_has_a_budget_in_any_period(make, scope, alike, other):
    service = make(budget("theirs", scope, "0.005", "week"))
    visitors = zip((*alike, other), ("one", "two", "three"), strict=True)
    answers = [chat_from(service, address, visitor) for address, visitor in visitors]
    assert [answer.status_code for answer in answers] == [200, 429, 200]
    assert (answers[1].json["scope"], answers[1].json["budget"]) == (scope, "theirs")


def test_a_budget_of_one_owner_is_nobody_elses(make):
    service = make(budget("that_one", "identifier", "0.005", "day", owner="hash456"))
    assert service.chat().status_code == service.chat("another").status_code == 200
    assert service.chat().json["budget"] == "that_one"
    other = service.chat("another")
    assert other.status_code == 200
    assert "that_one" not in other.headers["RateLimit"]


def test_what_lasts_for_ever_is_spent_for_ever(make):
    service = make(budget("trial", "identifier", "0.005", "forever"))
    admitted = service.chat()
    left = 5_000_000 - COST
    assert ', "trial";q=5000;qu="tollgate-microusd"' in admitted.headers["RateLimit-Policy"]
    assert admitted.headers["RateLimit"].endswith(f', "trial";r={left // 1_000}')
    refused = service.chat()
    assert members_of(refused) == ["budget"]
    assert refused.json["message"] == "Usage limit reached (trial). Waiting does not help: this limit is not renewed."
    assert refused.json["retry_after_seconds"] is None
    trial = usage(service).json["limits"]["trial"]
    assert list(trial) == ["limit_usd", "spent_usd", "held_usd", "left_usd", "renews_at", "renews_in_seconds"]
    assert (trial["renews_at"], trial["renews_in_seconds"]) == (None, None)
    assert amounts(trial)["spent"] == nanousd(events(admitted)[-1]["cost_usd"])


def test_under_a_marker_the_budget_that_set_it_is_named(make):
    service = make(budget("hourly", "identifier", "0.005", "hour", throttle_seconds=20))
    assert service.chat().status_code == 200
    first, second = service.chat(), service.chat()
    assert [each.json["reason"] for each in (first, second)] == ["budget_limit", "throttled"]
    assert [each.json["budget"] for each in (first, second)] == ["hourly"] * 2
    assert second.json["message"].startswith("Usage limit reached (hourly). Please try again in ")
    throttled = usage(service).json["throttled"]
    assert (throttled["reason"], throttled["budget"]) == ("budget_limit", "hourly")
    assert numbers(service)["checks_total", (service.tollgate.guard.backend_name, "hourly", "throttled")] == 1


def test_open_reservations_are_told_as_busy_here_too(make):
    service = make(budget("dear", "model", "0.005", "day"), DEMO_TOKENS_PER_SECOND="10")
    under_way = service.open_chat("one")
    refused = service.chat("two")
    assert members_of(refused) == ["budget", "in_flight"]
    assert refused.json["message"].startswith(
        "Usage limit reached (dear). Answers that are still under way hold the rest of it. Please try again in "
    )
    under_way.close()


def test_an_override_blocks_one_owner_or_gives_it_more(make):
    overrides = [
        {"budget": "window", "owner": "blocked", "limit_usd": 0},
        {"budget": "window", "owner": "rich", "limit_usd": 1},
        {"budget": "window", "owner": "was-rich", "limit_usd": 1, "until": "2020-01-01T00:00:00Z"},
        {"budget": "dear", "owner": "gpt-4o-mini", "limit_usd": 0},
    ]
    service = make(budget("dear", "model", "1"), BUDGET_OVERRIDES=json.dumps(overrides), NETWORK_COST_LIMIT_USD="0")
    for refused in (service.chat("blocked"), service.chat("blocked")):
        assert refused.json["message"] == "High usage detected. Nothing may be spent here now: a limit is set to 0."
        assert (refused.json["budget"], refused.json["can_never_fit"]) == ("window", True)
        assert "Retry-After" not in refused.headers
    assert usage(service, "blocked").json["limits"]["window"]["limit_usd"] == "0.000000000"
    rich = service.chat("rich")
    assert parsed(rich.headers["RateLimit-Policy"])["window"]["q"] == 1_000_000
    assert parsed(service.chat("was-rich").headers["RateLimit-Policy"])["window"]["q"] == 20_000
    refused = service.chat(model="gpt-4o-mini")
    assert refused.json["message"] == "Usage limit reached (dear). Nothing may be spent here now: a limit is set to 0."


# --- what a caller is told of its own, and of nobody else


OTHERS = (
    budget("of_model", "model", "1"),
    budget("of_network", "network", "1"),
    budget("of_wide_network", "wide_network", "1"),
    budget("of_everybody", "global", "1"),
    budget("of_team", "team", "1"),
    budget("in_shadow", "identifier", "1", mode="shadow"),
    budget("shadow_of_key", "key", "1", mode="shadow"),
    budget("of_another", "identifier", "1", owner="another"),
)
OWN = (
    budget("of_key", "key", "0.02"),
    budget("mine", "identifier", "0.03", {"sliding_seconds": 900}),
    budget("once", "identifier", "0.04", "forever"),
)


@pytest.mark.parametrize(("key", "named"), [(None, ["mine", "once"]), ("sk-web", ["of_key", "mine", "once"])])
def test_headers_and_usage_tell_the_callers_own_budgets_and_never_those_of_others(make_timed, key, named):
    service, _ = make_timed(*OTHERS, *OWN, **KEYS)
    answer = service.chat() if key is None else complete(service, key)
    policy, left = parsed(answer.headers["RateLimit-Policy"]), parsed(answer.headers["RateLimit"])
    assert list(policy) == list(left) == ["window", "day", *named]
    lengths = {"window": 600, "day": DAY, "of_key": 29 * DAY, "mine": 900}
    assert {name: each["w"] for name, each in policy.items() if "w" in each} == {
        name: seconds for name, seconds in lengths.items() if name in policy
    }
    assert policy["once"] == {"q": 40_000, "qu": "tollgate-microusd"}
    reserved = nanousd(answer.headers["X-Cost-Reserved-USD"])
    assert {name: each["r"] for name, each in left.items()} == {
        name: (each["q"] * 1_000 - reserved) // 1_000 for name, each in policy.items()
    }
    assert left["mine"]["t"] == 900 + bucket_seconds_of(900) - NOW % bucket_seconds_of(900)
    assert "t" not in left["once"]
    if key is not None:
        assert left["of_key"]["t"] == MARCH - NOW
    headers = {"X-Fingerprint": "hash456"} if key is None else {"Authorization": f"Bearer {key}"}
    limits = service.client.get(USAGE, headers=headers, environ_base={"REMOTE_ADDR": NETWORK}).json["limits"]
    assert list(limits) == ["window", "day", *named]
    assert {name: each.get("window_seconds") for name, each in limits.items()} == {
        name: lengths.get(name) for name in limits
    }
    spent = {amounts(each)["spent"] for each in limits.values()}
    assert len(spent) == 1
    assert spent.pop() > 0


def test_the_usage_of_a_calendar_period_has_its_real_length_and_its_end(make_timed):
    berlin = {"BUDGET_TIME_ZONE": "Europe/Berlin"}
    service, clock = make_timed(
        budget("mine", "identifier", "0.03"), budget("my_day", "identifier", "1", "day"), **berlin
    )
    clock.us = int(datetime(2024, 3, 31, 12, tzinfo=UTC).timestamp()) * 1_000_000
    limits = usage(service).json["limits"]
    april = int(datetime(2024, 3, 31, 22, tzinfo=UTC).timestamp())
    assert limits["my_day"]["window_seconds"] == 23 * 3_600
    assert limits["mine"]["window_seconds"] == 31 * DAY - 3_600
    assert [limits[name]["renews_at"] for name in ("mine", "my_day")] == [april, april]
    assert limits["mine"]["renews_in_seconds"] == 10 * 3_600
    policy = parsed(service.chat().headers["RateLimit-Policy"])
    assert {name: policy[name]["w"] for name in ("day", "my_day", "mine")} == {
        "day": DAY,
        "my_day": 23 * 3_600,
        "mine": 31 * DAY - 3_600,
    }


def test_a_budget_that_comes_and_goes_while_the_service_runs(make):
    service = make()
    service.chat(max_tokens=10)
    assert service.patch(budgets=[budget("new", "identifier", "0.005", "day")]).status_code == 200
    admitted = service.chat()
    assert parsed(admitted.headers["RateLimit"])["new"]["r"] == (5_000_000 - COST) // 1_000
    assert service.chat().json["budget"] == "new"
    assert service.patch(budgets=None).status_code == 200
    assert list(parsed(service.chat().headers["RateLimit"])) == ["window", "day"]
    assert list(usage(service).json["limits"]) == ["window", "day"]


def test_what_an_answer_under_way_holds_is_not_held_in_a_budget_that_came_after_it(make):
    service = make(DEMO_TOKENS_PER_SECOND="10")
    under_way = service.open_chat()
    service.patch(budgets=[budget("new", "identifier", "0.005", "day")])
    limits = usage(service).json["limits"]
    assert amounts(limits["day"])["held"] == COST
    assert amounts(limits["new"]) == {"limit": 5_000_000, "spent": 0, "held": 0, "left": 5_000_000}
    under_way.close()
    assert amounts(usage(service).json["limits"]["new"])["spent"] == 0


# --- shadow


def test_a_shadow_budget_refuses_nobody_and_is_booked_logged_and_counted(make, caplog):
    service = make(budget("trial", "model", "0.005", "day", mode="shadow"))
    first = service.chat()
    with caplog.at_level(logging.INFO, "tollgate"):
        second = service.chat()
    assert (first.status_code, second.status_code) == (200, 200)
    (line,) = [record for record in caplog.records if record.message == "Shadow budget would have refused"]
    assert line.fields == {
        "request_id": second.headers["X-Request-ID"],
        "identifier": "hash…",
        "cost_usd": COST_USD,
        "budget": "trial",
    }
    counted = numbers(service)
    assert counted["shadow_refusals_total", ("trial",)] == 1
    assert counted["checks_total", (service.tollgate.guard.backend_name, "admitted")] == 2
    assert service.redis.exists("llm:throttle:hash456") == 0


# --- in the log, and while Redis is away


def test_the_line_of_a_refusal_names_the_budget_and_that_of_an_admission_its_window_and_day(make, caplog):
    service = make(budget("dear", "model", "0.005", "day"))
    with caplog.at_level(logging.INFO, "tollgate"):
        service.chat()
        service.chat()
    lines = {record.message: record.fields for record in caplog.records if record.name == "tollgate"}
    refused = lines["Cost-based throttling triggered"]
    assert (refused["reason"], refused["budget"]) == ("budget_limit", "dear")
    recorded = lines["Cost recorded for stable_identifier"]
    assert recorded["window_usd"] == recorded["day_usd"] == COST_USD
    assert list(recorded)[:6] == ["request_id", "identifier", "cost_usd", "window_usd", "day_usd", "backend"]


def test_while_redis_is_away_the_emergency_budget_keeps_to_further_budgets(own_server, tmp_path):
    environment = {"BUDGETS": json.dumps([budget("dear", "model", "0.005", "day")])}
    with open_app(own_server.url, tmp_path, environment) as service:
        assert service.chat("one", max_tokens=1).status_code == 200
        own_server.kill()
        assert service.chat("two").headers["X-Throttle-Backend"] == "emergency"
        refused = service.chat("three")
        assert (refused.status_code, refused.json["budget"]) == (429, "dear")


# --- extensions


@pytest.mark.parametrize("scope", ["model", "key"])
def test_an_answer_is_extended_within_the_budgets_of_its_model_and_its_key(make_app, scope):
    """For the owners of its admission: for others its budget would have no limit, and the answer would go on."""
    with Upstream() as upstream:
        upstream.behave(words=tuple(f"word{number} " for number in range(300)), pause_seconds=0.002)
        service = make_app(
            LLM_BASE_URL=upstream.base_url,
            RESERVATION_POLICY="slices",
            RESERVATION_SLICE_TOKENS="10",
            BUDGETS=json.dumps([budget("theirs", scope, "0.001", "forever")]),
            **KEYS,
        )
        answer = complete(service, "sk-web", stream=True, max_tokens=400)
        assert answer.status_code == 200
        assert b'"finish_reason":"length"' in answer.data
        owner = {"model": "gpt-4o", "key": "web"}[scope]
        booked = int(service.redis.get(f"llm:budget:theirs:forever:{owner}"))
        assert 900_000 < booked == service.daily(hashlib.sha256(b"sk-web").hexdigest()) <= 1_000_000
