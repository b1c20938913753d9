"""Shares in the scripts: what one owner may have of what others leave of another budget."""

import pytest

from tests.lua.by_hand import (
    BOOKS,
    COST,
    DAY_S,
    HOUR_S,
    LATER_US,
    MARKER,
    NOW_S,
    NOW_US,
    OF_NETWORK,
    RESET,
    SIX,
    dump,
    extend,
    reserve,
    settle,
    spend,
    total,
)

ITS_HOUR = total("its_hour", OF_NETWORK, HOUR_S, HOUR_S + 3_600, limit="")
ROWS = (*SIX, ITS_HOUR)
NETWORK_DAY, GLOBAL_HOUR, GLOBAL_DAY, NUMBER = 4, 5, 6, 7
TO_THE_HOUR_S, TO_MIDNIGHT_S = HOUR_S + 3_600 - NOW_S, DAY_S + 86_400 - NOW_S
QUARTER = f"{NUMBER},{GLOBAL_HOUR},250000 "
MOST = 2**53 - 1


def of_day(millionths):
    return f"{NETWORK_DAY},{GLOBAL_DAY},{millionths} "


def booked(client, everybody, its_own):
    client.set(BOOKS["global_hour"], everybody)
    client.set(ITS_HOUR.key, its_own)


@pytest.mark.parametrize(
    ("limit", "everybody", "its_own", "millionths", "room"),
    [
        (1_000, 0, 0, 250_000, 250),
        (1_000, 100, 100, 250_000, 150),
        (999, 0, 0, 250_000, 249),
        (1_000, 600, 100, 250_000, 25),
        (1_000, 100, 200, 250_000, 50),
        (1_001, 0, 0, 999_999, 1_000),
        (1_999_999, 0, 0, 999_999, 1_999_997),
        (10**15, 7, 0, 10_001, 10_000_999_999_999 + 930_000 // 1_000_000),
        (MOST, 0, 0, 999_999, MOST * 999_999 // 10**6),
        (MOST, 0, 0, 333_333, MOST * 333_333 // 10**6),
        (9_007_199_253_999_999, 0, 0, 999_999, 9_007_199_253_999_999 * 999_999 // 10**6),
        (9_007_199_254_000_000, 0, 0, 123_457, 9_007_199_254_000_000 * 123_457 // 10**6),
    ],
)
def test_a_share_to_the_nano_dollar(client, limit, everybody, its_own, millionths, room):
    ways = {"global_hour": limit, "global_day": "", "day": "", "window": "", "network_window": "", "network_day": ""}
    ways["shares"] = f"{NUMBER},{GLOBAL_HOUR},{millionths} "
    assert room == (limit - max(0, everybody - its_own)) * millionths // 10**6 - its_own
    booked(client, everybody, its_own)
    before = dump(client)
    assert reserve(client, "over", ROWS, cost=room + 1, **ways)[0] == 14
    assert dump(client) == before
    assert reserve(client, rows=ROWS, cost=room, **ways)[0] == 0
    assert client.get(ITS_HOUR.key) == b"%d" % (its_own + room)


def test_a_share_of_a_limit_that_was_lowered_is_less_than_nothing(client):
    booked(client, 2_000, 0)
    assert reserve(client, rows=ROWS, cost=1, global_hour=1_000, shares=QUARTER)[0] == 14


def test_a_refusal_by_a_share_lasts_until_its_period_ends_and_sets_no_marker(client):
    spend(client, nanousd=250, rows=ROWS)
    refused = reserve(client, rows=ROWS, cost=1, global_hour=1_000, shares=QUARTER)
    assert refused == [14, 0, NOW_US, TO_THE_HOUR_S, 0, NUMBER]
    assert not client.exists(MARKER)


def test_a_limit_that_fails_is_not_mended_by_a_share_that_fits(client):
    booked(client, 900, 0)
    assert reserve(client, rows=ROWS, cost=101, global_hour=1_000, shares=f"{NUMBER},{GLOBAL_HOUR},1000000 ")[0] == 14
    assert reserve(client, rows=ROWS, cost=1, global_hour=1_000, day=0, shares=QUARTER)[0] == 2


@pytest.mark.parametrize("word", [QUARTER + of_day(250_000), of_day(250_000) + QUARTER])
def test_shares_are_told_before_all_that_is_shared_and_after_what_comes_before_that(client, word):
    spend(client, nanousd=250, rows=ROWS)
    limits = {"global_hour": 250, "global_day": 1_000}
    first = int(word[0])
    assert reserve(client, rows=ROWS, cost=1, **limits, shares=word) == [14, 0, NOW_US, TO_MIDNIGHT_S, 0, first]
    limits["global_day"] = 2_000
    assert reserve(client, rows=ROWS, cost=1, **limits, shares=word) == [14, 0, NOW_US, TO_THE_HOUR_S, 0, NUMBER]
    refused = reserve(client, rows=ROWS, cost=1, **limits, network_day=250, shares=word)
    assert refused == [5, 0, NOW_US, TO_MIDNIGHT_S, 0, NETWORK_DAY]
    assert reserve(client, rows=ROWS, cost=1, **limits, day=250, shares=word)[::5] == [2, 1]


def test_what_its_owner_holds_makes_a_share_busy(client):
    reserve(client, "held", ROWS, cost=250)
    refused = reserve(client, rows=ROWS, cost=1, global_hour=1_000, shares=QUARTER)
    assert refused == [14, 0, NOW_US, 1, 1, NUMBER]
    settle(client, "held", 250, ROWS)
    assert reserve(client, rows=ROWS, cost=1, global_hour=1_000, shares=QUARTER)[4] == 0


def test_what_others_hold_makes_a_share_busy_as_far_as_it_would_do(client):
    """Others hold 400 of everybody's hour, and none of the network's."""
    reserve(client, "held", SIX, cost=400)
    assert reserve(client, rows=ROWS, cost=150, global_hour=1_000, shares=QUARTER)[0] == 0
    settle(client, rows=ROWS, actual=0)
    assert reserve(client, "b", ROWS, cost=151, global_hour=1_000, shares=QUARTER) == [14, 0, NOW_US, 1, 1, NUMBER]
    spend(client, "spent", 4, SIX)
    assert reserve(client, "b", ROWS, cost=249, global_hour=1_000, shares=QUARTER)[4] == 1
    assert reserve(client, "b", ROWS, cost=250, global_hour=1_000, shares=QUARTER)[4] == 0


def test_where_a_share_is_busy_and_a_limit_is_spent_it_is_not_busy(client):
    spend(client, nanousd=100)
    reserve(client, "held", ROWS, cost=250)
    refused = reserve(client, rows=ROWS, cost=1, global_hour=1_000, global_day=100, shares=QUARTER)
    assert refused == [14, 0, NOW_US, TO_MIDNIGHT_S, 0, NUMBER]


def test_what_is_more_than_a_whole_share_waits_for_nothing_that_was_spent(client):
    spend(client, nanousd=250, rows=ROWS)
    ways = {"global_hour": 1_000, "shares": QUARTER}
    assert reserve(client, rows=ROWS, cost=251, **ways) == [14, 0, NOW_US, 1, 0, NUMBER]
    assert reserve(client, rows=ROWS, cost=250, **ways) == [14, 0, NOW_US, TO_THE_HOUR_S, 0, NUMBER]


def test_of_what_is_left_of_a_share_less_will_do(client):
    spend(client, nanousd=100, rows=ROWS)
    spend(client, "of others", 100)
    ways = {"global_hour": 1_000, "shares": QUARTER}
    assert reserve(client, rows=ROWS, at_least=126, **ways)[0] == 14
    assert reserve(client, rows=ROWS, at_least=125, **ways)[4] == 125
    assert client.get(ITS_HOUR.key) == b"225"


def test_an_extension_to_the_last_nano_dollar_of_a_share(client):
    spend(client, nanousd=200)
    reserve(client, rows=ROWS, cost=100)
    ways = {"rows": ROWS, "global_hour": 1_000, "shares": QUARTER}
    before = dump(client)
    assert extend(client, to=201, **ways) == [14, 100, LATER_US, NUMBER]
    assert dump(client) == before
    assert extend(client, to=500, at_least=101, **ways) == [0, 200, LATER_US, *[400] * 6, 200]
    assert extend(client, to=201, **ways)[0] == 14
    assert extend(client, to=201, **ways | {"shares": ""})[0] == 0


def test_an_extension_of_what_is_over_its_share_keeps_what_it_holds(client):
    reserve(client, rows=ROWS, cost=COST)
    ways = {"rows": ROWS, "global_hour": 1_000, "shares": QUARTER}
    assert extend(client, to=COST + 1, at_least=COST, **ways)[:2] == [0, COST]


@pytest.mark.parametrize("word", [QUARTER + of_day(250_000), of_day(250_000) + QUARTER])
def test_an_extension_is_refused_in_the_same_order(client, word):
    reserve(client, rows=ROWS, cost=250)
    ways = {"rows": ROWS, "to": 251, "global_hour": 250, "shares": word}
    assert extend(client, **ways, global_day=1_000) == [14, 250, LATER_US, int(word[0])]
    assert extend(client, **ways, global_day=2_000) == [14, 250, LATER_US, NUMBER]
    assert extend(client, **ways, global_day=2_000, network_day=250) == [5, 250, LATER_US, NETWORK_DAY]
    assert extend(client, **ways | {"shares": ""}) == [6, 250, LATER_US, GLOBAL_HOUR]


def test_what_an_extension_counts_of_others_is_never_below_nothing(client):
    reserve(client, rows=ROWS, cost=100)
    client.set(BOOKS["global_hour"], 0)
    ways = {"rows": ROWS, "global_hour": 1_000, "shares": QUARTER}
    assert extend(client, to=251, **ways)[0] == 14
    assert extend(client, to=250, **ways)[0] == 0


@pytest.mark.parametrize("word", ["1,6,250000 ", "4,1,250000 "])
def test_an_extension_is_held_to_no_share_of_what_was_cleared(client, word):
    reserve(client, cost=100)
    ways = {"day": 1_000, "global_day": 1_000, "shares": word}
    assert extend(client, to=251, **ways)[0] == 14
    client.set(RESET, NOW_US, ex=100)
    assert extend(client, to=251, **ways)[0] == 0


@pytest.mark.parametrize("limit", [9_007_199_253_999_999, 9_007_199_254_000_000, MOST, 1_999_999])
@pytest.mark.parametrize("millionths", [999_999, 333_333, 250_000, 1])
def test_an_extension_knows_a_share_to_the_nano_dollar(client, limit, millionths):
    none = dict.fromkeys(BOOKS, "")
    reserve(client, rows=ROWS, cost=1, **none)
    room = limit * millionths // 10**6
    ways = {"rows": ROWS, "shares": f"{NUMBER},{GLOBAL_HOUR},{millionths} ", **none, "global_hour": limit}
    assert extend(client, to=room + 1, **ways)[0] == 14
    assert extend(client, to=room + 1, at_least=1, **ways)[1] == max(room, 1)
