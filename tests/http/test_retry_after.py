"""Over HTTP, on Redis' own clock: refusals and answers report what the stored buckets say."""

import re

import pytest

from backends.keys import bucket_seconds_of
from tests.servers import earliest_wait, events, nanousd

WINDOW_SECONDS = 600
RING_SECONDS = bucket_seconds_of(WINDOW_SECONDS) + WINDOW_SECONDS


def now_seconds(books):
    seconds, microseconds = books.time()
    return seconds + microseconds / 1_000_000


@pytest.mark.parametrize(
    ("setting", "reason", "ring"),
    [
        ("high_cost_threshold_usd", "window_limit", "llm:cost:recent:hash456"),
        ("network_cost_limit_usd", "network_limit", "llm:network:recent:127.0.0.1"),
    ],
)
def test_the_wait_is_until_the_bucket_that_stands_in_the_way_has_left(service, books, setting, reason, ring):
    events(service.chat(max_tokens=2))
    service.set_by_hand(books, **{setting: 0.0043, "throttle_when_busy": False})
    asked_at = now_seconds(books)
    refused = service.chat()
    answered_at = now_seconds(books)
    assert (refused.status_code, refused.json()["reason"]) == (429, reason)
    (start,) = books.zrange(ring, 0, -1)
    frees_at = int(start) + RING_SECONDS
    assert frees_at - answered_at <= earliest_wait(refused) <= frees_at - asked_at + 1
    assert "RateLimit" not in refused.headers


def test_what_is_left_over_http(service, books):
    first = service.chat(max_tokens=2)
    spent = nanousd(events(first)[-1]["cost_usd"])
    asked_at = now_seconds(books)
    second = service.chat(max_tokens=2)
    answered_at = now_seconds(books)
    left = 20_000_000 - spent - nanousd(second.headers["X-Cost-Reserved-USD"])
    window = re.match(r'"window";r=(\d+);t=(\d+), "day";r=\d+;t=\d+$', second.headers["RateLimit"])
    assert int(window[1]) == left // 1_000
    frees_at = min(map(int, books.zrange("llm:cost:recent:hash456", 0, -1))) + RING_SECONDS
    assert frees_at - answered_at <= int(window[2]) <= frees_at - asked_at + 1
    used = service.get("/api/v1/usage", headers={"X-Fingerprint": "hash456"}).json()
    assert nanousd(used["limits"]["window"]["spent_usd"]) == spent + nanousd(events(second)[-1]["cost_usd"])
