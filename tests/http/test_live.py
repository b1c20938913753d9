"""Settings that reach every worker within a second, and numbers of all workers together."""

import json
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.servers import BEARER, SETTINGS, earliest_wait, events, nanousd

WITHIN_SECONDS = 1.0


def obeyed_after(service, question, obeys):
    """Seconds from now, when something was changed, until the last question that the old rule answered."""
    changed = time.monotonic()
    last = 0.0
    count = 0
    while time.monotonic() - changed < WITHIN_SECONDS + 0.5:
        begun = time.monotonic() - changed
        count += 1
        if not obeys(question(count)):
            last = begun
    assert count > 20
    return last


def test_a_daily_limit_set_by_hand_is_obeyed_by_every_worker_within_a_second(service, books):
    assert service.chat(max_tokens=5).status_code == 200
    books.set("settings", '{"daily_cost_limit_usd": 0.0001, "throttle_when_busy": false}')
    # Each a visitor of his own, so that no marker answers in place of the limit.
    last = obeyed_after(
        service, lambda count: service.chat(f"visitor-{count}", max_tokens=1), lambda answer: answer.status_code == 429
    )
    assert last < WITHIN_SECONDS


def test_a_change_through_the_api_is_in_redis_at_once_and_reaches_every_worker(atomic, books):
    assert atomic.patch(high_cost_threshold_usd="0.0001", throttle_when_busy=False).status_code == 200
    assert json.loads(books.get("settings")) == {"high_cost_threshold_usd": 0.0001, "throttle_when_busy": False}
    last = obeyed_after(
        atomic, lambda count: atomic.chat(f"visitor-{count}", max_tokens=1), lambda answer: answer.status_code == 429
    )
    assert last < WITHIN_SECONDS
    assert atomic.chat().json()["can_never_fit"] is True
    shown = atomic.get(SETTINGS, headers=BEARER).json()["settings"]["high_cost_threshold_usd"]
    assert (shown["value"], shown["source"]) == (0.0001, "redis")


def test_the_number_of_requests_a_minute_is_live(atomic, books):
    books.set("settings", '{"chat_rate_limit": "3 per hour", "enable_cost_throttling": false}')
    atomic.notice()
    answers = [atomic.chat(max_tokens=1) for _ in range(6)]
    # One count for all workers.
    assert [each.status_code for each in answers] == [200, 200, 200, 429, 429, 429]
    assert answers[0].headers["X-Throttle-Backend"] == "off"
    refused = answers[-1]
    assert (refused.json()["error"], refused.json()["reason"]) == ("rate_limited", "rate_limit")
    assert 3_590 <= earliest_wait(refused) <= 3_601
    assert books.keys("llm:cost:*") == []


@pytest.mark.parametrize("path", ["/api/v1/admin/settings", "/admin"])
def test_the_admin_is_closed_to_others(atomic, path):
    for headers in (
        {},
        {"Authorization": "Bearer x"},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer ÿ".encode()},
    ):
        answer = atomic.get(path, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")


def totals(service):
    """By name and the values of the labels, in the order of the alphabet; empty ones are left out."""
    sums = {}
    for family in text_string_to_metric_families(service.get("/metrics").text):
        for sample in family.samples:
            name = sample.name.removeprefix("tollgate_")
            sums[name, tuple(filter(None, sample.labels.values()))] = sample.value
    return sums


def test_metrics_are_those_of_all_workers_whichever_is_asked(service, books):
    name = service.environment.get("THROTTLE_BACKEND", "atomic")
    before = totals(service)
    answers = [service.chat(f"visitor-{number}", max_tokens=3) for number in range(12)]
    books.set("llm:throttle:hash456", "1", ex=20)
    assert service.chat().json()["reason"] == "throttled"
    spent = sum(nanousd(events(each)[-1]["cost_usd"]) for each in answers)
    seen = [totals(service) for _ in range(6)]

    def rise(*key):
        rises = {after[key] - before.get(key, 0) for after in seen}
        assert len(rises) == 1
        return rises.pop()

    assert rise("checks_total", (name, "admitted")) == 12
    assert rise("checks_total", (name, "window", "throttled")) == 1
    assert rise("booked_nanousd_total", (name, "settled")) == spent
    assert rise("reserved_nanousd_total", (name,)) == sum(
        nanousd(each.headers["X-Cost-Reserved-USD"]) for each in answers
    )
    assert rise("check_seconds_count", (name,)) == 13
    workers = {path.stem.rpartition("_")[2] for path in service.number_files()}
    assert workers == {"0", "1"}
