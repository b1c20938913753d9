"""Further budgets over HTTP: on every worker, on Redis' own clock, and with many callers at once."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest
import requests

from backends.budgets import Calendar, span_at
from tests.http.test_live import totals
from tests.servers import earliest_wait, events, nanousd
from tests.upstream import bill_nanousd

ASKED = {"model": "gpt-4o", "messages": [{"role": "user", "content": "What is Litecoin?"}], "max_tokens": 5}
PLENTY = {"network_cost_limit_usd": 0, "hourly_spend_limit_usd": 100, "daily_spend_limit_usd": 100}


def now_seconds(client):
    seconds, microseconds = client.time()
    return seconds + microseconds / 1_000_000


def complete(front, key, **fields):
    headers = {"Authorization": f"Bearer {key}"}
    return requests.post(f"{front.base_url}/v1/chat/completions", json={**ASKED, **fields}, headers=headers, timeout=30)


def test_a_models_monthly_budget(service, books):
    row = {"name": "dear_month", "scope": "model", "owner": "gpt-4o", "period": "month", "limit_usd": 0.005}
    service.set_by_hand(books, budgets=[row])
    asked_at = now_seconds(books)
    admitted = service.chat("one")
    refused = service.by_each_worker(lambda: service.chat("another"))
    answered_at = now_seconds(books)
    start, end = span_at(Calendar("month"), int(asked_at))
    assert datetime.fromtimestamp(start, UTC).strftime("%d %H:%M:%S") == "01 00:00:00"
    for each in refused:
        body = each.json()
        told = {name: body[name] for name in ("status", "error", "reason", "scope", "budget")}
        assert told == {
            "status": 429,
            "error": "cost_throttled",
            "reason": "budget_limit",
            "scope": "model",
            "budget": "dear_month",
        }
        assert body["message"].startswith("Usage limit reached (dear_month). Please try again in ")
        assert end - answered_at <= earliest_wait(each) <= end - asked_at + 1
    key = f"llm:budget:dear_month:month:gpt-4o:{start}"
    assert books.get(key) == str(nanousd(events(admitted)[-1]["cost_usd"]))
    assert books.ttl(key) >= end + 86_400 - answered_at - 1
    assert "dear_month" not in admitted.headers["RateLimit"]
    name = service.environment.get("THROTTLE_BACKEND", "atomic")
    assert totals(service)["checks_total", (name, "dear_month", "budget_limit")] >= service.workers


def test_many_callers_at_once_stay_within_a_models_budget(atomic, books):
    """Each reserves as much as all others, and the limit has room for six of them."""
    row = {"name": "dear", "scope": "model", "period": "forever", "limit_usd": 0.0252}
    atomic.set_by_hand(books, budgets=[row], **PLENTY)
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda number: atomic.chat(f"visitor-{number}"), range(24)))
    admitted = [each for each in answers if each.status_code == 200]
    assert len(admitted) >= 6
    assert {each.json()["budget"] for each in answers if each.status_code != 200} == {"dear"}
    spent = sum(nanousd(events(each)[-1]["cost_usd"]) for each in admitted)
    assert books.get("llm:budget:dear:forever:gpt-4o") == str(spent)
    assert spent <= 25_200_000
    assert books.ttl("llm:budget:dear:forever:gpt-4o") == -1


@pytest.mark.parametrize(
    ("scope", "owner", "other_status"), [("key", "web", 200), ("team", "house", 429), ("model", "gpt-4o", 429)]
)
def test_a_budget_of_a_key_a_team_or_a_model_on_v1(front, stored, upstream, scope, owner, other_status):
    row = {"name": "theirs", "scope": scope, "period": {"sliding_seconds": 3600}, "limit_usd": 0.00015}
    front.set_by_hand(stored, budgets=[row])
    admitted = complete(front, "key-of-a-client")
    assert admitted.status_code == 200
    booked = stored.zrange(f"llm:budget:theirs:sliding3600:{owner}", 0, -1, withscores=True)
    assert sum(nanousd for _, nanousd in booked) == bill_nanousd(upstream.ledger[0])
    refused = complete(front, "key-of-a-client")
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["reason"]) == (429, "cost_throttled", "budget_limit")
    assert (error["scope"], error["budget"]) == (scope, "theirs")
    assert complete(front, "key-of-another").status_code == other_status
    # Only its own are told to a key.
    assert ("theirs" in admitted.headers["RateLimit-Policy"]) == (scope == "key")
    used = front.get("/api/v1/usage", headers={"Authorization": "Bearer key-of-a-client"}).json()["limits"]
    assert list(used) == ["window", "day", *(["theirs"] if scope == "key" else [])]


def test_a_shadow_budget_is_told_to_the_operator_alone(atomic, books):
    row = {"name": "trial", "scope": "identifier", "period": "day", "limit_usd": 0.0001, "mode": "shadow"}
    atomic.set_by_hand(books, budgets=[row])
    before, seen = totals(atomic).get(("shadow_refusals_total", ("trial",)), 0), len(atomic.log_lines())
    answers = [atomic.chat(max_tokens=50) for _ in range(2)]
    assert [each.status_code for each in answers] == [200, 200]
    assert all("trial" not in each.headers["RateLimit"] for each in answers)
    lines = atomic.lines_with("Shadow budget would have refused", seen, at_least=2)
    assert all(line.endswith(" budget=trial") for line in lines)
    assert totals(atomic)["shadow_refusals_total", ("trial",)] == before + 2
    (key,) = books.keys("llm:budget:trial:day:hash456:*")
    assert int(books.get(key)) == sum(nanousd(events(each)[-1]["cost_usd"]) for each in answers)
