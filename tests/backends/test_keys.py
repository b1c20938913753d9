import math
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.budgets import LONGEST_WINDOW_SECONDS, Scope
from backends.conformance.cases import ROOMY
from backends.keys import (
    LIVE_PENDING_BUCKETS,
    WINDOW_BUCKETS,
    KnownKey,
    bucket_seconds_of,
    idempotency_key,
    known_key,
    marker_key,
    pending_bucket_seconds_of,
    record_key,
    reset_key,
    rows_at,
    running_key,
)


@pytest.mark.parametrize(("window_in_rings", "bucket"), [(1, 1), (10, 10), (10.001, 11), (1_440, 1_440)])
def test_a_window_is_cut_into_whole_seconds_and_as_many_buckets_as_a_ring_has(window_in_rings, bucket):
    assert bucket_seconds_of(math.ceil(window_in_rings * WINDOW_BUCKETS)) == bucket
    assert bucket_seconds_of(1) == 1


@given(st.integers(1, LONGEST_WINDOW_SECONDS), st.integers(0, 10**7))
def test_no_more_buckets_live_than_a_ring_may_have(seconds, now):
    for bucket, most in (
        (bucket_seconds_of(seconds), WINDOW_BUCKETS + 1),
        (pending_bucket_seconds_of(seconds), LIVE_PENDING_BUCKETS),
    ):
        oldest = now - bucket - seconds
        living = now // bucket - oldest // bucket
        assert living <= most


def six_rows(identifier, network, at_seconds):
    """Of the built-in budgets, by name."""
    return {row.budget.name: row for row in rows_at(ROOMY.budgets(identifier, network), at_seconds)}


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
    rows = six_rows("id", "net", int(datetime.fromisoformat(moment).replace(tzinfo=UTC).timestamp()))
    assert rows["global_hour"].key == f"llm:global:hourly:{hour}"
    assert rows["global_day"].key == f"llm:global:daily:{date}"
    assert rows["day"].key == f"llm:cost:daily:id:{date}"
    assert rows["network_day"].key == f"llm:network:daily:net:{date}"


def test_the_seeds_keys_to_the_letter():
    rows = six_rows("hash456", "net", 1_773_483_630)
    assert marker_key("hash456") == "llm:throttle:hash456"
    assert rows["window"].key == "llm:cost:recent:hash456"
    assert rows["day"].key == "llm:cost:daily:hash456:2026-03-14"
    assert rows["network_window"].key == "llm:network:recent:net"


WHO, NETWORK = "ip:2001:db8::/64", "2001:db8::/64"
HOUR = 1_773_482_400  # 2026-03-14 10:00:00 UTC
DAY = HOUR - 10 * 3_600


def test_a_key_is_known_for_what_it_is():
    rows = six_rows(WHO, NETWORK, HOUR + 1_200)
    assert {name: known_key(row.key) for name, row in rows.items()} == {
        "day": KnownKey("total", WHO, "day", Scope.IDENTIFIER, DAY),
        "window": KnownKey("window", WHO, "window", Scope.IDENTIFIER),
        "network_window": KnownKey("window", NETWORK, "network_window", Scope.NETWORK),
        "network_day": KnownKey("total", NETWORK, "network_day", Scope.NETWORK, DAY),
        "global_hour": KnownKey("total", "", "global_hour", Scope.GLOBAL, HOUR),
        "global_day": KnownKey("total", "", "global_day", Scope.GLOBAL, DAY),
    }
    assert {name: known_key(row.pending_key) for name, row in rows.items()} == {
        "day": KnownKey("pending", WHO, scope=Scope.IDENTIFIER),
        "window": KnownKey("pending", WHO, scope=Scope.IDENTIFIER),
        "network_window": KnownKey("pending", NETWORK, scope=Scope.NETWORK),
        "network_day": KnownKey("pending", NETWORK, scope=Scope.NETWORK),
        "global_hour": KnownKey("pending", scope=Scope.GLOBAL),
        "global_day": KnownKey("pending", scope=Scope.GLOBAL),
    }
    assert known_key(record_key("rid")) == KnownKey("record", "rid")
    assert known_key(marker_key(WHO)) == KnownKey("marker", WHO)
    assert known_key(reset_key(WHO)) == KnownKey("reset", WHO)
    assert known_key(running_key(rows["window"].key)) == KnownKey("running", f"cost:recent:{WHO}")
    assert known_key(idempotency_key("0" * 32)).kind == "idempotency"
    assert known_key("llm:challenge:" + "0" * 64).kind == "challenge"
    assert known_key("llm:session:" + "0" * 32).kind == "session"
    assert known_key("llm:rate:LIMITS:LIMITER/x").kind == "rate"
    assert known_key("llm:settings:unset:llm_max_tokens").kind == "unset"


@pytest.mark.parametrize(
    "key",
    ["settings", "llm:", "llm:cost:daily:who", "llm:cost:daily:who:2026-13-01", "llm:global:hourly:2026-03-14T24"],
)
def test_other_keys_are_not_known(key):
    assert known_key(key) is None
