"""An identifier's books are cleared: by the head of its script, and what the other scripts make of it."""

import pytest
import redis

from tests.lua.by_hand import (
    BOOKS,
    COST,
    DATE,
    DAY_S,
    KEY,
    LATER_US,
    MARKER,
    NOW_S,
    OF_ALL,
    OF_NETWORK,
    OF_WHO,
    RESET,
    RUNNING,
    SIX,
    US,
    WHO,
    dump,
    extend,
    for_ever,
    reserve,
    reset,
    ring_of,
    settle,
    spend,
    total,
    window,
)

MINE = (window("long", OF_WHO), for_ever("ever", OF_WHO), total("week", OF_WHO))
OTHERS = {*BOOKS.values()} - {BOOKS["day"], BOOKS["window"]}


def test_the_worked_example(client):
    client.set(MARKER, "by hand", ex=100)
    client.zadd(BOOKS["window"], {NOW_S: 4_050_000})
    client.zadd(OF_WHO, {NOW_S: 4_050_000})
    client.set(BOOKS["day"], 9_000_000)
    days = [BOOKS["day"].replace(DATE, other) for other in (DATE, "2026-03-13", "2026-03-15")]
    rows = [SIX[1], *(SIX[0]._replace(key=key) for key in days)]
    assert reset(client, rows) == [LATER_US, 1, b"4050000", b"4050000", b"9000000", b"0", b"0"]
    assert client.keys("*") == [RESET.encode()]
    assert (client.get(RESET), client.ttl(RESET)) == (b"%d" % LATER_US, 172_800)
    assert reset(client, rows) == [LATER_US, 0, *[b"0"] * 5]


def test_what_is_not_the_identifiers_stays(client):
    reserve(client, rows=(*SIX, *MINE))
    assert reset(client, (*SIX[:2], *MINE)) == [LATER_US, 0, *[b"%d" % COST] * 6]
    kept = {RESET, *OTHERS, OF_NETWORK, OF_ALL, "llm:reservation:rid1", RUNNING["network_window"]}
    assert {name.decode() for name in client.keys("*")} == kept


def test_what_was_made_before_is_out_of_the_books_and_what_comes_after_is_in(client):
    rows = (*SIX, *MINE)
    spend(client, "spent", 100, rows)
    reserve(client, rows=rows, key=KEY)
    reset(client, (*SIX[:2], *MINE))
    # What windows came to is gone too: it would be believed as soon as as much was booked as before.
    answer = reserve(client, "after", rows, now_us=LATER_US + 1)
    told = dict(zip((row.name for row in rows), answer[8:], strict=False))
    assert {name for name, each in told.items() if each == COST} == {"day", "window", "long", "ever", "week"}
    assert {each for each in told.values() if each != COST} == {2 * COST + 100}
    extend(client, rows=rows, key=KEY, now_us=LATER_US + 2)
    settle(client, rows=rows, key=KEY, now_us=LATER_US + 2)
    assert client.get(BOOKS["day"]) == client.get(MINE[1].key) == b"%d" % COST
    assert ring_of(client, BOOKS["window"]) == ring_of(client, OF_WHO) == {NOW_S: COST}
    assert client.get(BOOKS["network_day"]) == b"%d" % (COST + 107)


def test_amounts_of_sixteen_digits_are_told_whole(client):
    most = 2**53 - 1
    client.zadd(BOOKS["window"], {NOW_S: most - 5, NOW_S - 30: 5})
    client.set(BOOKS["day"], most)
    assert reset(client)[3:] == [b"%d" % most] * 2


def test_by_the_servers_own_time_nothing_that_follows_is_of_the_same_microsecond(client):
    now_s, _ = client.time()
    for _ in range(50):
        cleared_at_us = reset(client, now_us="")[0]
        assert client.get(RESET) == b"%d" % cleared_at_us
        assert reserve(client, "r", now_us="", from_s=0, until_s=now_s + 600)[2] > cleared_at_us


@pytest.mark.parametrize("key", [OF_WHO, BOOKS["window"], BOOKS["day"], MINE[0].key, MINE[1].key])
def test_a_key_of_another_kind_changes_nothing(client, key):
    rows = (*SIX, *MINE)
    reserve(client, rows=rows)
    client.delete(key)
    client.rpush(key, "of another kind")
    before = dump(client)
    with pytest.raises(redis.ResponseError) as caught:
        reset(client, (*SIX[:2], *MINE))
    assert dump(client) == before
    assert WHO not in str(caught.value)


def test_a_total_of_garbage_is_told_as_it_is_and_goes(client):
    client.set(BOOKS["day"], "abc")
    assert reset(client)[4] == b"abc"
    assert not client.exists(BOOKS["day"])


def test_yesterdays_reservation_is_out_of_the_books_too(client):
    day = SIX[0]._replace(key=f"llm:cost:daily:{WHO}:2026-03-13", start_s=DAY_S - 86_400, end_s=DAY_S)
    rows = (day._replace(keep_until_s=DAY_S + 86_400), SIX[1])
    made_at_us, now_us = (DAY_S - 1) * US, (DAY_S + 1) * US
    reserve(client, rows=rows, now_us=made_at_us)
    assert reset(client, (*rows, SIX[0]), now_us=now_us)[2:] == [b"%d" % COST, b"%d" % COST, b"%d" % COST, b"0"]
    assert settle(client, rows=rows, made_at_us=made_at_us, now_us=now_us + 1)[0] == 0
    assert not client.exists(day.key, BOOKS["window"], BOOKS["day"])
