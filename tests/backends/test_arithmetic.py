import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.budgets import BUILT_IN, FURTHER_STATUS, Budget, Calendar, Scope
from backends.clock import US_PER_SECOND
from backends.conformance.cases import make_ask
from backends.contract import Ask
from backends.errors import StoreBroken
from backends.keys import (
    IDEMPOTENCY_KEEP_SECONDS,
    LIVE_PENDING_BUCKETS,
    PENDING_BUCKETS,
    RECORD_KEEP_SECONDS,
    WINDOW_BUCKETS,
)
from backends.records import REQUEST_DIGITS, Record, parse_record
from backends.store.scripts import Script
from backends.strategies import arithmetic
from backends.strategies.outcomes import request_digest_of
from backends.strategies.script_words import TRY_AGAIN


def test_terms_tell_requests_apart():
    def request_digest(identifier, network, cost):
        return request_digest_of(make_ask("r0", cost, identifier=identifier, network=network))

    one = request_digest("id", "net", 5)
    assert one == request_digest("id", "net", 5)
    assert len(one) == REQUEST_DIGITS == 8
    others = [("id", "net", 6), ("id2", "net", 5), ("id", "net2", 5), ("id\nnet", "", 5), ("i", "dnet", 5)]
    assert len({one, *(request_digest(*other) for other in others)}) == 6


def test_without_identifier_and_network_requests_are_told_apart_by_their_budgets():
    def request_digest(owner="gpt-4o", name="monthly", **limits):
        budget = Budget(name, owner, Calendar("month"), 1, Scope.MODEL)._replace(**limits)
        return request_digest_of(Ask("r0", 5, (budget,)))

    assert request_digest() == request_digest(limit_nanousd=None, is_shadow=True)
    assert len({request_digest(), request_digest("gpt-4"), request_digest(name="weekly")}) == 3


@pytest.mark.parametrize("text", [b"", b"abc", b"-5", b"1.5", b"1e9", b" 5", b"9" * 17])
def test_a_total_that_is_no_amount_is_a_bug_of_the_store(text):
    with pytest.raises(StoreBroken):
        arithmetic.amount(text)


def test_a_missing_total_is_nothing():
    assert arithmetic.amount(None) == 0
    assert arithmetic.amount(b"9007199254740991") == 2**53 - 1


@given(st.sampled_from(["open", "settled"]), st.integers(0, 2**53), st.integers(0, 2**53))
def test_a_record_is_read_as_it_was_written(state, nanousd, made_at_us):
    digest = "01234567"
    record = Record(state, nanousd, made_at_us, digest, 31 * 86_400, 3_600, digest, digest)
    assert parse_record(record.text().encode()) == record
    assert len(record.text()) < 120


@given(st.binary(max_size=60))
def test_whatever_stands_in_a_record_is_no_error(text):
    record = parse_record(text)
    assert record is not None
    assert parse_record(None) is None


@given(st.binary(max_size=60), st.integers(-1, 10**6))
def test_whatever_stands_in_a_marker_throttles_or_is_over(text, left_ms):
    decision = arithmetic.decision_of_marker(text, left_ms, 30, 10**15)
    assert decision is None or decision.status == arithmetic.THROTTLED


def test_a_bucket_counts_until_its_youngest_content_has_left_the_window():
    ring = {100: 5}
    end_us = (100 + 10 + 600) * US_PER_SECOND
    assert arithmetic.live_buckets(ring, 10, 600, end_us - 1) == ring
    assert arithmetic.live_buckets(ring, 10, 600, end_us) == {}


def test_statuses_are_those_that_are_promised_and_of_one_meaning_each():
    statuses = {name: row.status for name, row in BUILT_IN.items()}
    assert (statuses["day"], statuses["window"]) == (2, 3)
    others = {arithmetic.ADMITTED, arithmetic.THROTTLED, arithmetic.ENDED, arithmetic.CONFLICT, arithmetic.DUPLICATE}
    meanings = [*statuses.values(), FURTHER_STATUS, *others, *TRY_AGAIN]
    assert sorted(meanings) == list(range(14))
    assert f"\n  2 to 7, {FURTHER_STATUS}  refused:" in Script("reserve.lua").text


def test_python_and_lua_say_the_same_numbers():
    """What they do with them is held together by the conformance suite."""
    text = Script("reserve.lua").text
    names = "SECOND, LIVE_PENDING_BUCKETS, RECORD_KEEP_S, IDEMPOTENCY_KEEP_S"
    numbers = f"{US_PER_SECOND}, {LIVE_PENDING_BUCKETS}, {RECORD_KEEP_SECONDS}, {IDEMPOTENCY_KEEP_SECONDS}"
    assert f"local {names}, NEVER_S = {numbers}, 2 ^ 53\n" in text
    assert arithmetic.NEVER_SECONDS == 2**53
    for script in ("reserve.lua", "extend.lua", "settle.lua"):
        assert f"ceil(pending_s / {PENDING_BUCKETS})" in Script(script).text
        assert re.search(rf"ceil\([a-z.]*window_s / {WINDOW_BUCKETS}\)", Script(script).text)
