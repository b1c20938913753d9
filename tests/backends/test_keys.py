import math
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.keys import (
    LIVE_PENDING_BUCKETS,
    WINDOW_BUCKETS,
    KnownKey,
    book_keys,
    bucket_seconds_of,
    idempotency_key,
    known_key,
    pending_bucket_seconds_of,
    reset_key,
)

LONGEST_SECONDS = 31 * 86_400


@pytest.mark.parametrize(("window_in_rings", "bucket"), [(1, 1), (10, 10), (10.001, 11), (1_440, 1_440)])
def test_a_window_is_cut_into_whole_seconds_and_as_many_buckets_as_a_ring_has(window_in_rings, bucket):
    assert bucket_seconds_of(math.ceil(window_in_rings * WINDOW_BUCKETS)) == bucket
    assert bucket_seconds_of(1) == 1


@given(st.integers(1, LONGEST_SECONDS), st.integers(0, 10**7))
def test_no_more_buckets_live_than_a_ring_may_have(seconds, now):
    for bucket, most in (
        (bucket_seconds_of(seconds), WINDOW_BUCKETS + 1),
        (pending_bucket_seconds_of(seconds), LIVE_PENDING_BUCKETS),
    ):
        oldest = now - bucket - seconds
        living = now // bucket - oldest // bucket
        assert living <= most


@pytest.mark.parametrize(
    ("moment", "hour", "date"),
    [
        ("2026-03-14T10:20:30", "2026-03-14T10", "2026-03-14"),
        ("2026-12-31T23:59:59", "2026-12-31T23", "2026-12-31"),
        ("2027-01-01T00:00:00", "2027-01-01T00", "2027-01-01"),
        ("2028-02-29T12:00:00", "2028-02-29T12", "2028-02-29"),
    ],
)
def test_dates_are_utc(monkeypatch, moment, hour, date):
    monkeypatch.setenv("TZ", "America/Los_Angeles")
    keys = book_keys("rid", "id", "net", int(datetime.fromisoformat(moment).replace(tzinfo=UTC).timestamp()))
    assert keys.global_hourly == f"llm:global:hourly:{hour}"
    assert keys.global_daily == f"llm:global:daily:{date}"
    assert keys.daily == f"llm:cost:daily:id:{date}"
    assert keys.network_daily == f"llm:network:daily:net:{date}"


def test_the_seeds_keys_to_the_letter():
    keys = book_keys("rid", "hash456", "net", 1_773_483_630)
    assert keys.marker == "llm:throttle:hash456"
    assert keys.recent == "llm:cost:recent:hash456"
    assert keys.daily == "llm:cost:daily:hash456:2026-03-14"
    assert all(key.startswith("llm:") for key in keys)
    assert len(set(keys)) == len(keys)


WHO, NETWORK = "ip:2001:db8::/64", "2001:db8::/64"
HOUR = 1_773_482_400  # 2026-03-14 10:00:00 UTC
OWNERS = dict.fromkeys(("marker", "recent", "daily", "pending_identifier"), WHO)
OWNERS |= dict.fromkeys(("network_recent", "network_daily", "pending_network"), NETWORK)
STARTS = {"global_hourly": HOUR} | dict.fromkeys(("daily", "network_daily", "global_daily"), HOUR - 10 * 3_600)


def test_a_key_is_known_for_what_it_is():
    for kind, key in book_keys("rid", WHO, NETWORK, HOUR + 1_200)._asdict().items():
        owner = "rid" if kind == "record" else OWNERS.get(kind, "")
        assert known_key(key) == KnownKey(kind, owner, STARTS.get(kind, 0))
    assert known_key(reset_key(WHO)) == KnownKey("reset", WHO, 0)
    assert known_key(idempotency_key("0" * 32)).kind == "idempotency"
    assert known_key("llm:challenge:" + "0" * 64).kind == "challenge"
    assert known_key("llm:rate:LIMITS:LIMITER/x").kind == "rate"


@pytest.mark.parametrize(
    "key",
    ["settings", "llm:", "llm:cost:daily:who", "llm:cost:daily:who:2026-13-01", "llm:global:hourly:2026-03-14T24"],
)
def test_other_keys_are_not_known(key):
    assert known_key(key) is None
