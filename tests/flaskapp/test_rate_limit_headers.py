"""`RateLimit-Policy` and `RateLimit`: the grammar of structured fields, and every number against the stored books."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.budgets import Budget, Calendar, Forever, Scope, Sliding, span_at
from backends.conformance.cases import ROOMY
from backends.conformance.harness import ManualClock
from backends.contract import Reservation
from backends.keys import bucket_seconds_of
from flaskapp.http.headers import admitted_headers
from tests.apps import NETWORK
from tests.servers import earliest_wait, events, nanousd

US = 1_000_000
DAY = 86_400
# RFC 9651: a list of strings, each with parameters that are integers of at most 15 digits, or strings.
ITEM = re.compile(r'"(?P<name>[\x20-\x21\x23-\x5b\x5d-\x7e]*)"(?P<parameters>(?:; *[a-z*][a-z0-9_.*-]*=[^;,]+)*)')
VALUE = re.compile(r'(?P<number>-?[0-9]{1,15})|"(?P<text>[\x20-\x21\x23-\x5b\x5d-\x7e]*)"')


def parsed(field):
    """A list of structured fields: name -> parameters. Whatever is no such list fails."""
    found = {}
    for member in re.split(r"[ \t]*,[ \t]*", field):
        item = ITEM.fullmatch(member)
        assert item, member
        parameters = {}
        for parameter in filter(None, item["parameters"].split(";")):
            key, _, text = parameter.lstrip(" ").partition("=")
            value = VALUE.fullmatch(text)
            assert value, parameter
            assert key not in parameters
            parameters[key] = int(value["number"]) if value["number"] else value["text"]
        assert item["name"] not in found
        found[item["name"]] = parameters
    return found


def test_the_parser_of_this_test_takes_no_nonsense():
    assert parsed('"a";q=1;qu="x", "b";q=999999999999999') == {"a": {"q": 1, "qu": "x"}, "b": {"q": 10**15 - 1}}
    for field in ("", '"a";q=1000000000000000', '"a";q=1.5', '"a";q=1,', "a b", '"a";q=1 "b"', '"a";Q=1', '"a";q="'):
        with pytest.raises(AssertionError):
            parsed(field)


@pytest.mark.parametrize("backend", ["atomic", "legacy"])
def test_every_number_is_what_redis_holds_at_the_reservation(make_app, backend):
    service = make_app(THROTTLE_BACKEND=backend, DEMO_TOKENS_PER_SECOND="20", DAILY_COST_LIMIT_USD="0.123456789")
    service.chat(max_tokens=3)
    under_way = service.open_chat(max_tokens=50)
    window, day = service.window(), service.daily()
    made_at_us = int(service.redis.get(f"llm:reservation:{under_way.headers['X-Request-ID']}").split()[2])
    oldest = min(int(start) for start in service.redis.zrange("llm:cost:recent:hash456", 0, -1))
    assert parsed(under_way.headers["RateLimit-Policy"]) == {
        "window": {"q": 20_000, "w": 600, "qu": "tollgate-microusd"},
        "day": {"q": 123_456, "w": DAY, "qu": "tollgate-microusd"},
    }
    assert parsed(under_way.headers["RateLimit"]) == {
        "window": {
            "r": (20_000_000 - window) // 1_000,
            "t": -(-((oldest + bucket_seconds_of(600) + 600) * US - made_at_us) // US),
        },
        "day": {"r": (123_456_789 - day) // 1_000, "t": DAY - made_at_us // US % DAY},
    }
    assert window > nanousd(under_way.headers["X-Cost-Reserved-USD"])
    under_way.close()


def test_what_is_left_is_reported_after_each_answer_until_nothing_fits(make_app):
    clock = ManualClock()
    service = make_app(clock=clock, THROTTLE_BACKEND="legacy", HIGH_COST_THRESHOLD_USD="0.009999999")
    left, booked = [], 0
    while (answer := service.open_chat()).status_code == 200:
        with_this_one = booked + nanousd(answer.headers["X-Cost-Reserved-USD"])
        parameters = parsed(answer.headers["RateLimit"])
        assert parameters["window"]["r"] == (9_999_999 - with_this_one) // 1_000
        assert parameters["day"]["r"] == (250_000_000 - with_this_one) // 1_000
        left.append(parameters["window"]["r"])
        booked += nanousd(events(answer)[-1]["cost_usd"])
        clock.us += 21 * US
    assert len(left) > 3
    assert left == sorted(left, reverse=True)
    # What a refusal says is never earlier than what the last answer had announced.
    since_then = 21
    assert int(answer.headers["Retry-After"]) >= parameters["window"]["t"] - since_then
    assert "RateLimit" not in answer.headers


@pytest.mark.parametrize("backend", ["legacy", "memory"])
@pytest.mark.parametrize("seconds_early", [0, 1])
@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("HIGH_COST_THRESHOLD_USD", "window_limit"),
        ("DAILY_COST_LIMIT_USD", "daily_limit"),
        ("NETWORK_COST_LIMIT_USD", "network_limit"),
        ("NETWORK_DAILY_COST_LIMIT_USD", "network_daily_limit"),
        ("HOURLY_SPEND_LIMIT_USD", "network_share"),
        ("DAILY_SPEND_LIMIT_USD", "network_share"),
        ("HOURLY_SPEND_LIMIT_USD", "global_hourly_limit"),
        ("DAILY_SPEND_LIMIT_USD", "global_daily_limit"),
    ],
)
def test_a_client_that_waits_as_long_as_it_should_is_admitted_and_a_second_earlier_is_not(
    make_app, backend, seconds_early, setting, reason
):
    clock = ManualClock()
    limit, share = ("0.020", "0.25") if reason == "network_share" else ("0.005", "1")
    changed = {setting: limit, "NETWORK_SHARE": share}
    service = make_app(clock=clock, THROTTLE_BACKEND=backend, CHAT_RATE_LIMIT="1000 per minute", **changed)
    admitted = service.chat()
    clock.us += 123_400_000
    refused = service.chat()
    assert (refused.status_code, refused.json["reason"]) == (429, reason)
    retry_after_seconds = int(refused.headers["Retry-After"]) if reason == "network_share" else earliest_wait(refused)
    if setting == "HIGH_COST_THRESHOLD_USD":
        # Never earlier than the `t` that was sent before: here they are the same moment.
        assert retry_after_seconds == parsed(admitted.headers["RateLimit"])["window"]["t"] - 123
    clock.us += (retry_after_seconds - seconds_early) * US
    assert service.chat().status_code == (429 if seconds_early else 200)


def test_without_a_reservation_nothing_is_reported(make_app):
    service = make_app(ENABLE_COST_THROTTLING="false")
    headers = service.chat(max_tokens=1).headers
    assert headers["X-Throttle-Backend"] == "off"
    assert {"RateLimit", "RateLimit-Policy", "X-Cost-Reserved-USD"}.isdisjoint(headers.keys())


def reservation_of(budgets, spent_nanousd, renews_at_seconds, made_at_us=0):
    return Reservation(
        *("r", 1, budgets, "0" * 16, made_at_us, 120, "atomic"),
        spent_nanousd=tuple(spent_nanousd),
        renews_at_seconds=tuple(renews_at_seconds),
    )


MOST = 1_000_000 * 10**9
"""Nano-dollars: the highest limit that a setting takes."""


@given(
    st.integers(0, MOST), st.integers(0, MOST), st.integers(0, MOST), st.integers(0, 2**40), st.integers(1, 2_678_400)
)
def test_any_amounts_make_fields_that_can_be_parsed(window, day, spent, made_at_us, window_seconds):
    limits = replace(ROOMY, window_nanousd=window, day_nanousd=day, window_seconds=window_seconds)
    made = made_at_us // US
    day_ends, frees = made - made % DAY + DAY, made + bucket_seconds_of(window_seconds)
    headers = admitted_headers(
        reservation_of(
            limits.budgets("who", NETWORK), [spent] * 6, [day_ends, frees, frees, day_ends, 0, 0], made_at_us
        ),
        0.0,
    )
    policy, left = parsed(headers["RateLimit-Policy"]), parsed(headers["RateLimit"])
    assert list(policy) == list(left) == ["window", "day"]
    assert all(list(each) == ["q", "w", "qu"] for each in policy.values())
    assert all(list(each) == ["r", "t"] for each in left.values())
    assert all(0 <= left[name]["r"] <= policy[name]["q"] for name in left)
    assert all(left[name]["t"] >= 1 for name in left)
    assert left["day"]["t"] <= DAY


PERIODS = st.one_of(
    st.integers(60, 2_678_400).map(Sliding),
    st.builds(Calendar, st.sampled_from(["hour", "day", "week", "month"]), st.sampled_from(["UTC", "Europe/Berlin"])),
    st.just(Forever()),
)
FURTHER = st.builds(
    Budget,
    name=st.text("abcdefghijklmnopqrstuvwxyz0123456789_", min_size=1, max_size=32).map(lambda name: f"x{name}"[:32]),
    owner=st.just("somebody"),
    period=PERIODS,
    limit_nanousd=st.integers(1, MOST),
    scope=st.sampled_from(Scope),
    is_shadow=st.booleans(),
)


@given(
    st.lists(FURTHER, max_size=16, unique_by=lambda budget: budget.name), st.integers(0, MOST), st.integers(0, 2**40)
)
def test_of_any_further_budgets_the_callers_own_are_told_and_no_others(further, spent, made_at_us):
    budgets = (*ROOMY.budgets("who", NETWORK), *further)
    made, renews_at = made_at_us // US, []
    for budget in budgets:
        match budget.period:
            case Calendar():
                renews_at.append(span_at(budget.period, made).end_seconds)
            case Sliding(seconds):
                renews_at.append(made + seconds)
            case _:
                renews_at.append(None)
    headers = admitted_headers(reservation_of(budgets, [spent] * len(budgets), renews_at, made_at_us), 0.0)
    policy, left = parsed(headers["RateLimit-Policy"]), parsed(headers["RateLimit"])
    told = [budget for budget in further if budget.scope in {Scope.IDENTIFIER, Scope.KEY} and not budget.is_shadow]
    assert list(policy) == list(left) == ["window", "day", *(budget.name for budget in told)]
    for budget in told:
        lasts_for_ever = budget.period == Forever()
        assert list(policy[budget.name]) == (["q", "qu"] if lasts_for_ever else ["q", "w", "qu"])
        assert left[budget.name] == {"r": max(0, budget.limit_nanousd - spent) // 1_000} | (
            {} if lasts_for_ever else {"t": left[budget.name]["t"]}
        )
        assert lasts_for_ever or 1 <= left[budget.name]["t"] <= policy[budget.name]["w"]
