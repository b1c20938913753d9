"""A network's share of what others leave of everybody's hour and day, beside a plain list of all that was reserved."""

from dataclasses import dataclass
from fractions import Fraction
from math import floor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backends.budgets import Budget, Calendar, Reason, Scope, Share
from backends.conformance.harness import START_US, MemoryHarness, RedisHarness
from backends.contract import Ask, Refusal, Reservation

US = 1_000_000
HOUR, DAY = Calendar("hour"), Calendar("day")
PENDING_SECONDS = 120
NETWORKS = {"a": "near", "b": "near", "c": "near", "x": "far", "y": "farther"}
"""The wide network of each."""
STRATEGIES = ("memory", "legacy", "multi", "watch", "atomic")


@pytest.fixture(params=STRATEGIES)
def harness(request):
    if request.param == "memory":
        made = MemoryHarness()
    else:
        made = RedisHarness(request.param, request.getfixturevalue("redis_url"))
    yield made
    made.close()


def budgets(network, *, hour=1_000, day=3_000, millionths=250_000):
    """As the service makes them: of a network and its wide network, and of all."""
    of_hour, of_day = Share("all_hour", millionths), Share("all_day", millionths)
    wide = NETWORKS[network]
    return (
        Budget("its_day", network, DAY, None, Scope.NETWORK, share=of_day),
        Budget("all_hour", "all", HOUR, hour, Scope.GLOBAL),
        Budget("all_day", "all", DAY, day, Scope.GLOBAL),
        Budget("wide_day", wide, DAY, None, Scope.WIDE_NETWORK, share=of_day),
        Budget("its_hour", network, HOUR, None, Scope.NETWORK, share=of_hour),
        Budget("wide_hour", wide, HOUR, None, Scope.WIDE_NETWORK, share=of_hour),
    )


def ask(number, network, cost, *, at_least=None, **limits):
    return Ask(f"r{number}", cost, budgets(network, **limits), PENDING_SECONDS, at_least_nanousd=at_least)


@dataclass
class Booked:
    made_us: int
    network: str
    amount: int
    is_pending: bool = True


class Model:
    """All that was ever reserved, and what it came to."""

    def __init__(self, limits):
        self.limits = limits
        self.list = []

    def room(self, network, now_us, *, without_pending=False):
        """How much more that network may have: all limits and shares in exact fractions."""
        counted = [each for each in self.list if not (without_pending and each.is_pending)]
        rooms = []
        for length_us, limit in ((3_600 * US, self.limits["hour"]), (86_400 * US, self.limits["day"])):
            now = [each for each in counted if each.made_us // length_us == now_us // length_us]
            everybody = sum(each.amount for each in now)
            rooms.append(limit - everybody)
            for is_mine in (
                lambda each: each.network == network,
                lambda each: NETWORKS[each.network] == NETWORKS[network],
            ):
                mine = sum(each.amount for each in now if is_mine(each))
                share = Fraction(self.limits["millionths"], 1_000_000)
                rooms.append(floor(share * (limit - (everybody - mine))) - mine)
        return min(rooms)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("reserve"), st.sampled_from(sorted(NETWORKS)), st.integers(1, 400)),
        st.tuples(st.just("settle"), st.integers(0, 30), st.integers(0, 120)),
        st.tuples(st.just("pass"), st.sampled_from([0, 1, 30 * US, 1_800 * US, 20_000 * US]), st.just(0)),
    ),
    min_size=1,
    max_size=30,
)
LIMITS = st.fixed_dictionaries(
    {
        "hour": st.sampled_from([1_000, 997, 10**15 + 7]),
        "day": st.sampled_from([3_000, 1_501, 2**53 - 1]),
        "millionths": st.sampled_from([10_000, 250_000, 333_333, 999_999, 1_000_000]),
    }
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LIMITS, STEPS)
def test_whatever_happens_a_network_has_no_more_than_its_share_and_may_have_all_of_it(harness, limits, steps):
    harness.clear()
    model, made = Model(limits), []
    for number, (what, one, other) in enumerate(steps):
        now_us = harness.clock.now_us()
        if what == "pass":
            harness.pass_time(one)
        elif what == "reserve":
            verdict = harness.backend.reserve(ask(number, one, other, **limits))
            room = model.room(one, now_us)
            assert isinstance(verdict, Reservation) is (other <= room), (room, verdict)
            if isinstance(verdict, Reservation):
                model.list.append(Booked(now_us, one, other))
                made.append((verdict, model.list[-1]))
        elif made:
            reservation, booked = made.pop(one % len(made))
            harness.backend.settle(reservation, other)
            # Once its record is gone, too late for its holder to end it: all of it stays booked.
            if now_us < booked.made_us + (3_600 + PENDING_SECONDS) * US:
                booked.amount = other
            booked.is_pending = False
    for network in NETWORKS:
        has_exactly(harness, model.room(network, harness.clock.now_us()), network, limits)


def has_exactly(harness, room, network, limits):
    assert isinstance(harness.backend.reserve(ask(f"-{network}-over", network, max(1, room + 1), **limits)), Refusal)
    if room > 0:
        fits = harness.backend.reserve(ask(f"-{network}-fits", network, room, **limits))
        assert isinstance(fits, Reservation)
        harness.backend.release(fits)


def test_one_network_has_a_quarter_and_each_further_one_a_quarter_of_what_is_left(harness):
    harness.clear()
    had = []
    for number, network in enumerate("axy"):
        verdict = harness.backend.reserve(ask(number, network, 1_000, at_least=1))
        had.append(verdict.cost_nanousd)
        harness.backend.settle(verdict, verdict.cost_nanousd)
    # A quarter of 1,000, of 750, and of 562, rounded down.
    assert had == [250, 187, 140]


def test_the_networks_of_a_wide_one_have_together_no_more_than_one(harness):
    harness.clear()
    first = harness.backend.reserve(ask(1, "a", 200))
    harness.backend.settle(first, 200)
    second = harness.backend.reserve(ask(2, "b", 1_000, at_least=1))
    assert second.cost_nanousd == 50
    harness.backend.settle(second, 50)
    assert isinstance(harness.backend.reserve(ask(3, "c", 1)), Refusal)


def test_a_refusal_by_a_share_says_whose_and_ends_with_the_period_of_what_is_shared(harness):
    harness.clear()
    made = harness.backend.reserve(ask(1, "a", 250))
    harness.backend.settle(made, 250)
    harness.pass_time(600 * US)
    refused = harness.backend.reserve(ask(2, "a", 1))
    to_the_hour = 3_600 - harness.clock.now_us() // US % 3_600
    assert (refused.reason, refused.cause, refused.scope) == (
        Reason.NETWORK_SHARE,
        Reason.NETWORK_SHARE,
        Scope.NETWORK,
    )
    assert (refused.budget, refused.retry_after_seconds) == ("all_hour", to_the_hour)
    assert (refused.marker_seconds, refused.in_flight, refused.can_never_fit) == (0, False, False)
    harness.pass_time(to_the_hour * US - 1)
    assert isinstance(harness.backend.reserve(ask(3, "a", 1)), Refusal)
    harness.pass_time(1)
    assert isinstance(harness.backend.reserve(ask(4, "a", 1)), Reservation)


def test_the_day_has_a_share_of_its_own(harness):
    harness.clear()
    for number in range(3):
        made = harness.backend.reserve(ask(number, "a", 250, day=4_000))
        harness.backend.settle(made, 200)
        harness.pass_time(3_600 * US)
    assert harness.clock.now_us() // (86_400 * US) == START_US // (86_400 * US)
    refused = harness.backend.reserve(ask(3, "a", 101, hour=10_000, day=2_800))
    assert (refused.reason, refused.budget) == (Reason.NETWORK_SHARE, "all_day")
    assert refused.retry_after_seconds == 86_400 - harness.clock.now_us() // US % 86_400


def test_where_only_pending_money_stands_in_the_way_it_is_busy(harness):
    harness.clear()
    mine = harness.backend.reserve(ask(1, "a", 250))
    busy = harness.backend.reserve(ask(2, "a", 1))
    assert (busy.reason, busy.in_flight, busy.retry_after_seconds) == (Reason.NETWORK_SHARE, True, 1)
    harness.backend.release(mine)
    others = harness.backend.reserve(ask(3, "x", 250))
    # 750 are left by others: 187 of them; once those have ended 250.
    busy = harness.backend.reserve(ask(4, "a", 188))
    assert (busy.reason, busy.in_flight) == (Reason.NETWORK_SHARE, True)
    harness.backend.settle(others, 250)
    spent = harness.backend.reserve(ask(5, "a", 188))
    assert (spent.reason, spent.in_flight) == (Reason.NETWORK_SHARE, False)


def test_what_is_larger_than_a_whole_share_can_never_fit(harness):
    harness.clear()
    refused = harness.backend.reserve(ask(1, "a", 251))
    assert (refused.reason, refused.can_never_fit, refused.retry_after_seconds) == (Reason.NETWORK_SHARE, True, None)
    assert isinstance(harness.backend.reserve(ask(2, "a", 250)), Reservation)


def test_it_is_named_before_the_budgets_that_are_shared_and_after_those_before_them(harness):
    harness.clear()
    full = harness.backend.reserve(ask(1, "x", 250))
    harness.backend.settle(full, 1_000)
    assert harness.backend.reserve(ask(2, "a", 1)).reason is Reason.NETWORK_SHARE
    own_limit = (budgets("a")[0]._replace(limit_nanousd=0), *budgets("a")[1:])
    assert harness.backend.reserve(Ask("r3", 1, own_limit, PENDING_SECONDS)).budget == "its_day"
    without = tuple(each._replace(share=None) for each in budgets("a"))
    assert harness.backend.reserve(Ask("r4", 1, without, PENDING_SECONDS)).budget == "all_hour"


def test_what_is_booked_for_a_network_that_everybodys_total_does_not_know_counts_as_its_own(harness):
    harness.clear()
    made = harness.backend.reserve(ask(1, "a", 250))
    harness.backend.settle(made, 700)  # an overrun, beyond what may be had
    refused = harness.backend.reserve(ask(2, "x", 76))
    assert refused.reason is Reason.NETWORK_SHARE
    assert isinstance(harness.backend.reserve(ask(3, "x", 75)), Reservation)


def test_an_extension_has_no_more_than_the_share_of_now(harness):
    harness.clear()
    made = harness.backend.reserve(ask(1, "a", 100))
    more = harness.backend.extend(made, 400, budgets("a"), at_least_nanousd=101)
    assert more.cost_nanousd == 250
    refused = harness.backend.extend(more, 251, budgets("a"))
    assert (refused.reason, refused.budget, refused.scope) == (Reason.NETWORK_SHARE, "all_hour", Scope.NETWORK)
    lowered = harness.backend.extend(more, 251, budgets("a", millionths=10_000))
    assert lowered.reason is Reason.NETWORK_SHARE
    raised = harness.backend.extend(more, 251, budgets("a", millionths=1_000_000))
    assert raised.cost_nanousd == 251


def test_a_limitless_total_is_shared_without_end(harness):
    harness.clear()
    limitless = tuple(each._replace(limit_nanousd=None) for each in budgets("a"))
    assert isinstance(harness.backend.reserve(Ask("r1", 10**12, limitless, PENDING_SECONDS)), Reservation)


def test_in_shadow_mode_a_share_refuses_none(harness):
    harness.clear()
    shadow = tuple(each._replace(is_shadow=each.share is not None) for each in budgets("a"))
    assert isinstance(harness.backend.reserve(Ask("r1", 1_000, shadow, PENDING_SECONDS)), Reservation)
