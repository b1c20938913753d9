"""When to come back, against a model that adds up every single amount: never early, and right to the bucket."""

from dataclasses import dataclass, replace
from math import inf

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from backends.budgets import Scope, Sliding
from backends.conformance.behaviour import renews_at
from backends.conformance.cases import (
    BUCKET_SECONDS,
    LIMITS_IN_ORDER,
    NETWORK,
    ROOMY,
    US,
    WHO,
    WINDOW_SECONDS,
    make_ask,
)
from backends.conformance.harness import HAIR_MS, START_US, MemoryHarness, RedisHarness
from backends.contract import Refusal, Reservation
from backends.keys import bucket_seconds_of
from tests.contract.sqlite_backend import span_us

HOUR_US, DAY_US = 3_600 * US, 86_400 * US
WINDOW_US, BUCKET_US = WINDOW_SECONDS * US, BUCKET_SECONDS * US
VISITORS = {"me": (WHO, NETWORK), "neighbour": ("another", NETWORK), "stranger": ("third", "203.0.113.9")}
SHARED = {Scope.IDENTIFIER: {"me"}, Scope.NETWORK: {"me", "neighbour"}}
"""Whose spending counts for me; of all other scopes everybody's."""
EARLIER_US = 2 * HAIR_MS * 1_000
"""A harness on Redis deletes a key within a hair of its end: a window, say, of which one bucket is left."""

AMOUNTS = st.integers(1, 700)
PAUSES_US = st.one_of(
    st.sampled_from([0, 1, US, BUCKET_US, WINDOW_US - 1, WINDOW_US, 1_800 * US, DAY_US, 5 * DAY_US]),
    st.integers(0, 2 * WINDOW_US),
)
STEPS = st.lists(st.tuples(PAUSES_US, st.sampled_from(list(VISITORS)), AMOUNTS), min_size=1, max_size=25)


def limits_of(chosen):
    limits = replace(ROOMY, throttle_seconds=1)
    for case in LIMITS_IN_ORDER:
        if case.name in chosen:
            limits = case.set_to(chosen[case.name], limits)
    return limits


LIMITS = st.dictionaries(
    st.sampled_from([case.name for case in LIMITS_IN_ORDER]), st.sampled_from([700, 1_500, 2_500]), max_size=6
).map(limits_of)
# From the start of the clock: the same hour, another one, another day, and the last hour before clocks are put forward.
OFFSETS_US = st.sampled_from([0, HOUR_US // 2, 13 * HOUR_US + HOUR_US // 2, 14 * DAY_US + 14 * HOUR_US])


@dataclass(frozen=True)
class Spend:
    at_us: int
    visitor: str
    amount: int


def ends_us(limits, spends, cost, now_us):
    """Of each limit that has no room now: when it has, to the microsecond, and how much a bucket may add to that."""
    ends = []
    for budget in limits.budgets(WHO, NETWORK):
        limit, period = budget.limit_nanousd, budget.period
        mine = [each for each in spends if each.visitor in SHARED.get(budget.scope, VISITORS)]
        if isinstance(period, Sliding):
            window_us, bucket_us = period.seconds * US, bucket_seconds_of(period.seconds) * US
            if spent_since(mine, now_us - window_us - bucket_us) + cost > limit:
                moments = [now_us, *(each.at_us + window_us for each in mine if each.at_us + window_us > now_us)]
                ends.append(
                    (next(end for end in moments if spent_since(mine, end - window_us) + cost <= limit), bucket_us)
                )
        else:
            start_us, end_us = span_us(period, now_us)
            if spent_since(mine, start_us - 1) + cost > limit:
                ends.append((end_us, 0))
    return ends


def spent_since(spends, at_us):
    """After that moment."""
    return sum(each.amount for each in spends if each.at_us > at_us)


@pytest.fixture(params=["atomic", "legacy", "memory"])
def harness(request, redis_url):
    harness = MemoryHarness() if request.param == "memory" else RedisHarness(request.param, redis_url)
    yield harness
    harness.close()


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(OFFSETS_US, LIMITS, STEPS, AMOUNTS)
@example(0, limits_of({"window": 700, "global_hour": 700}), [(0, "me", 700)], 1)
@example(0, limits_of({"network_window": 700}), [(0, "neighbour", 700)], 1)
@example(0, limits_of({"window": 700}), [(0, "me", 700), (WINDOW_US - 1, "stranger", 1)], 1)
@example(13 * HOUR_US, limits_of({"day": 700, "window": 700}), [(0, "me", 700)], 1)
@example(14 * DAY_US + 14 * HOUR_US, limits_of({"around_day": 700, "all_week": 700}), [(0, "stranger", 700)], 1)
@example(0, limits_of({"key_month": 700, "team_ever": 700}), [(0, "neighbour", 700)], 1)
def test_retry_after_is_never_early_and_right_to_the_bucket(harness, offset_us, limits, steps, cost):
    harness.clear()
    harness.pass_time(offset_us)
    spends = []
    for number, (pause_us, visitor, amount) in enumerate(steps):
        harness.pass_time(pause_us)
        identifier, network = VISITORS[visitor]
        verdict = harness.backend.reserve(
            make_ask(f"r{number}", amount, limits, identifier=identifier, network=network)
        )
        if isinstance(verdict, Reservation):
            harness.backend.settle(verdict, amount)
            spends.append(Spend(harness.clock.us, visitor, amount))
        elif visitor == "me":
            check(harness, limits, spends, amount, verdict)
            lose_marker(harness)
        else:
            lose_marker(harness, identifier)
    verdict = harness.backend.reserve(make_ask("last", cost, limits))
    if isinstance(verdict, Refusal) and check(harness, limits, spends, cost, verdict):
        a_caller_that_returns_then_is_admitted(harness, limits, cost, verdict)


def check(harness, limits, spends, cost, refusal):
    """What the refusal says; whether it ends at all."""
    now_us = harness.clock.us
    if refusal.can_never_fit:
        assert refusal.retry_after_seconds is None
        return False
    ends = ends_us(limits, spends, cost, now_us)
    latest = max(end + slack for end, slack in ends)
    if latest == inf:
        assert refusal.retry_after_seconds is None
        return False
    said_us = now_us + refusal.retry_after_seconds * US
    assert said_us >= max(end for end, _ in ends), "early"
    # Whole seconds, and never before the marker that this refusal has set.
    assert said_us < max(latest + US, now_us + max(1, refusal.marker_seconds) * US + 1), "late"
    return True


def lose_marker(harness, identifier=WHO):
    if f"llm:throttle:{identifier}" in harness.stored():
        harness.lose(f"llm:throttle:{identifier}")


def a_caller_that_returns_then_is_admitted(harness, limits, cost, refusal):
    by_the_marker_alone = refusal.retry_after_seconds <= max(1, refusal.marker_seconds)
    if not by_the_marker_alone:
        harness.pass_time((refusal.retry_after_seconds - 1) * US - EARLIER_US)
        assert isinstance(harness.backend.reserve(make_ask("early", cost, limits)), Refusal)
        lose_marker(harness)
        harness.pass_time(US + EARLIER_US)
    else:
        harness.pass_time(refusal.retry_after_seconds * US)
    assert isinstance(harness.backend.reserve(make_ask("then", cost, limits)), Reservation)


def test_of_a_limit_that_is_busy_and_one_that_is_spent_the_spent_one_is_waited_for(harness):
    harness.clear()
    limits = replace(ROOMY, throttle_seconds=1)
    spent = harness.backend.reserve(make_ask("r0", 100, limits))
    harness.backend.settle(spent, 100)
    harness.backend.reserve(make_ask("r1", 100, limits))
    both = replace(limits, window_nanousd=250, global_hour_nanousd=150)
    refusal = harness.backend.reserve(make_ask("r2", 100, both))
    assert not refusal.in_flight
    assert refusal.reason == "window_limit"
    assert refusal.retry_after_seconds == (START_US // HOUR_US + 1) * 3_600 - START_US // US


@pytest.mark.parametrize("microseconds", [0, 1, 999_999])
def test_the_ends_of_hours_and_days_are_exact(harness, microseconds):
    for field, period_us in (
        ("day_nanousd", DAY_US),
        ("network_day_nanousd", DAY_US),
        ("global_hour_nanousd", HOUR_US),
    ):
        harness.clear()
        limits = replace(ROOMY, throttle_seconds=1, **{field: 100})
        harness.pass_time(37 * US + microseconds)
        harness.backend.settle(harness.backend.reserve(make_ask("r0", 100, limits)), 100)
        left_us = period_us - harness.clock.us % period_us
        assert harness.backend.reserve(make_ask("r1", 1, limits)).retry_after_seconds == -(-left_us // US), field


def test_the_answer_before_never_promised_a_later_moment(harness):
    """`t` of the last admitted answer, which is when the oldest amount leaves, and `Retry-After` of the refusal."""
    harness.clear()
    limits = replace(ROOMY, window_nanousd=250, throttle_seconds=1)
    for number in range(2):
        last = harness.backend.reserve(make_ask(f"r{number}", 100, limits))
        harness.backend.settle(last, 100)
        harness.pass_time(33 * US + 7)
    refusal = harness.backend.reserve(make_ask("r2", 100, limits))
    assert harness.clock.us + refusal.retry_after_seconds * US >= renews_at(last, "window") * US
