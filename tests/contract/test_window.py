"""The sliding window against a model that adds up every single amount."""

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from backends.budgets import Reason, Scope, Sliding
from backends.conformance.cases import BUCKET_SECONDS, LIMITS_IN_ORDER, US, WHO, WINDOW_SECONDS, LimitCase, make_ask
from backends.conformance.harness import MemoryHarness, RedisHarness
from backends.contract import Reservation

LIMIT = 1_000
WINDOWS = (
    *(case for case in LIMITS_IN_ORDER if case.name in {"window", "network_window"}),
    LimitCase("mine", Reason.BUDGET_LIMIT, Scope.IDENTIFIER, period=Sliding(WINDOW_SECONDS)),
    LimitCase("of_a_key", Reason.BUDGET_LIMIT, Scope.KEY, period=Sliding(WINDOW_SECONDS)),
)

PAUSES_US = st.one_of(
    st.sampled_from([0, 0, 1, US, BUCKET_SECONDS * US, WINDOW_SECONDS * US, (WINDOW_SECONDS + BUCKET_SECONDS) * US]),
    st.integers(0, 3 * BUCKET_SECONDS * US),
    st.integers(0, 2 * WINDOW_SECONDS * US),
)
AMOUNTS = st.one_of(st.sampled_from([1, 1, 2, LIMIT // 2, LIMIT]), st.integers(1, LIMIT))
STEPS = st.lists(st.tuples(PAUSES_US, AMOUNTS), min_size=1, max_size=40)


@pytest.fixture(params=["atomic", "legacy", "memory", "multi", "watch"])
def harness(request, redis_url):
    harness = MemoryHarness() if request.param == "memory" else RedisHarness(request.param, redis_url)
    yield harness
    harness.close()


@pytest.mark.parametrize("limit", WINDOWS, ids=lambda limit: limit.name)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(steps=STEPS)
@example(steps=[(0, 500), (0, 500), (0, 1), (WINDOW_SECONDS * US, 1), (BUCKET_SECONDS * US, LIMIT)])
@example(steps=[(9_999_999, LIMIT), (WINDOW_SECONDS * US - 1, 1), (1, 1)])
@example(steps=[(0, 1)] * 40)
def test_the_true_window_never_exceeds_the_limit_and_refuses_at_most_a_bucket_too_long(harness, limit, steps):
    harness.clear()
    limits = limit.set_to(LIMIT)
    spent = []
    for number, (pause_us, amount) in enumerate(steps):
        harness.pass_time(pause_us)
        now_us = harness.clock.us
        verdict = harness.backend.reserve(make_ask(f"r{number}", amount, limits))
        longest = sum(held for at_us, held in spent if at_us > now_us - (WINDOW_SECONDS + BUCKET_SECONDS) * US)
        if isinstance(verdict, Reservation):
            spent.append((now_us, amount))
            harness.backend.settle(verdict, amount)
        else:
            assert longest + amount > LIMIT, "refused although the window and one bucket had room"
            if verdict.marker_seconds:
                harness.lose(f"llm:throttle:{WHO}")
        true = sum(held for at_us, held in spent if at_us > now_us - WINDOW_SECONDS * US)
        assert true <= LIMIT
        if isinstance(verdict, Reservation):
            assert true <= verdict.spent(limit.name) <= longest + amount
