"""What all buckets of a window but the present one came to: kept beside it, and believed while none of them changes.

Whether a text is believed is seen by one that says too much, or too little: `LIE` more than there is.
"""

import random

import pytest

from tests.lua.by_hand import (
    BOOKS,
    BUCKET_S,
    COST,
    DAY_S,
    LATER_US,
    MARKER,
    NOW_S,
    NOW_US,
    OF_WHO,
    RESET,
    RUNNING,
    US,
    WINDOWS,
    dump,
    extend,
    for_ever,
    release,
    reserve,
    ring_of,
    settle,
    six,
    spend,
    total,
    window,
)

LIE = 1_000
LONG, TODAY = window("long"), total("today")
ROWS = (LONG, TODAY)
YESTERDAY = (LONG, total("today", start_s=DAY_S - 86_400, end_s=DAY_S))


def text_of(others, *, window_s=600, bucket=NOW_S, buckets=1, oldest=NOW_S):
    return f"{window_s} {bucket} {buckets} {others} {oldest}".encode()


def put(client, row, text):
    client.set(row.running, text, ex=20)


def told_of_the_window(client, rid="asks", rows=ROWS, **changes):
    """What a new reservation is told that the first window of `rows` holds with it."""
    answer = reserve(client, rid, rows, **changes)
    assert answer[0] == 0
    return answer[8 + next(number for number, row in enumerate(rows) if row.window_s)]


def held_in(client, row):
    return sum(ring_of(client, row.key).values())


def assert_right(client, row=LONG, rows=ROWS, **changes):
    """What the next reservation is told is what the buckets hold."""
    client.delete("llm:reservation:right")
    assert told_of_the_window(client, "right", rows, cost=1, **changes) == held_in(client, row)


def assert_read(client, row=LONG, rows=ROWS, **changes):
    """The next reservation goes by the buckets, whatever the text says, and leaves a text that is right."""
    assert_right(client, row, rows, **changes)
    buckets = ring_of(client, row.key)
    others = {start: nanousd for start, nanousd in buckets.items() if start < max(buckets)}
    which = {"bucket": max(buckets), "window_s": row.window_s, "buckets": len(buckets), "oldest": min(buckets)}
    assert client.get(row.running) == text_of(sum(others.values()), **which)
    assert client.ttl(row.running) == min(60, -(-row.window_s // 20))


# --- what is written, and believed


def test_the_first_charge_of_a_bucket_leaves_a_text_and_those_after_it_leave_it_alone(client):
    reserve(client, rows=ROWS)
    assert client.get(LONG.running) == text_of(0)
    assert client.ttl(LONG.running) == BUCKET_S
    client.expire(LONG.running, 5)
    assert told_of_the_window(client, "b", cost=7) == COST + 7
    assert told_of_the_window(client, "c", cost=1) == COST + 8
    assert (client.get(LONG.running), client.ttl(LONG.running)) == (text_of(0), 5)


def test_what_a_charge_leaves_of_a_window_that_was_there(client):
    client.zadd(LONG.key, {NOW_S - 660: 100, NOW_S - 630: 100, NOW_S - 600: 5, NOW_S: 7})
    reserve(client, rows=ROWS)
    assert client.get(LONG.running) == text_of(5, buckets=2, oldest=NOW_S - 600)
    client.delete(LONG.running)
    assert_read(client)


def test_what_a_charge_that_begins_a_bucket_leaves(client):
    client.zadd(LONG.key, {NOW_S - BUCKET_S: 5, NOW_S - 600: 3})
    assert_read(client)
    assert ring_of(client, LONG.key) == {NOW_S - 600: 3, NOW_S - BUCKET_S: 5, NOW_S: 1}


def test_of_each_window_of_the_six(client):
    spend(client, nanousd=3)
    reserve(client)
    assert [client.get(RUNNING[name]) for name in WINDOWS] == [text_of(0)] * 2


def test_a_text_that_may_be_believed_is(client):
    reserve(client, rows=ROWS)
    put(client, LONG, text_of(LIE))
    assert told_of_the_window(client, cost=5) == COST + LIE + 5
    assert ring_of(client, LONG.key) == {NOW_S: COST + 5}
    # Until the last moment of its bucket.
    last_us = (NOW_S + BUCKET_S) * US - 1
    assert told_of_the_window(client, "b", cost=5, now_us=last_us) == COST + LIE + 10
    assert client.get(LONG.running) == text_of(LIE)


@pytest.mark.parametrize("nanousd", [30, -30, 1 - COST])
def test_with_what_the_present_bucket_holds_by_now(client, nanousd):
    reserve(client, rows=ROWS)
    put(client, LONG, text_of(LIE))
    client.zincrby(LONG.key, nanousd, NOW_S)
    assert told_of_the_window(client, cost=5) == LIE + COST + nanousd + 5


def test_also_by_the_same_id_again(client):
    reserve(client, rows=ROWS)
    put(client, LONG, text_of(LIE, oldest=NOW_S - 30))
    assert reserve(client, rows=ROWS)[8:] == [COST + LIE, COST, NOW_S - 30 + 630]


def test_the_oldest_that_it_says_is_told(client):
    client.zadd(LONG.key, {NOW_S - 300: 5})
    reserve(client, rows=ROWS)
    assert reserve(client, "b", ROWS)[10] == NOW_S - 300 + 630
    put(client, LONG, text_of(5, buckets=2, oldest=NOW_S - 330))
    assert reserve(client, "c", ROWS)[10] == NOW_S - 330 + 630


def test_of_many_windows_each_has_its_own(client):
    short, mine = window("short", window_s=60), window("mine", OF_WHO, window_s=31 * 86_400)
    rows = (LONG, TODAY, short, mine, total("other", OF_WHO))
    client.zadd(short.key, {NOW_S - 3: 7})
    reserve(client, rows=rows)
    its = {"window_s": 60, "buckets": 2, "oldest": NOW_S - 3}
    start = NOW_S - NOW_S % 133_920
    long = {"window_s": 31 * 86_400, "bucket": start, "oldest": start}
    assert [client.get(row.running) for row in rows if row.window_s] == [
        text_of(0),
        text_of(7, **its),
        text_of(0, **long),
    ]
    # However long a bucket is, what was changed by hand in an earlier one counts within a minute.
    assert [client.ttl(row.running) for row in rows if row.window_s] == [30, 3, 60]
    put(client, short, text_of(LIE, **its))
    assert reserve(client, "b", rows, cost=5)[8:13] == [COST + 5, COST + 5, COST + LIE + 5, COST + 5, COST + 5]


# --- what is not believed

OTHERS = {
    "another length": {"window_s": 601},
    "an earlier bucket": {"bucket": NOW_S - BUCKET_S},
    "a later bucket": {"bucket": NOW_S + BUCKET_S},
    "fewer buckets": {"buckets": 0},
    "more buckets": {"buckets": 2},
    "an oldest bucket that is over": {"oldest": NOW_S - 630},
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("lie", [LIE, 0])
def test_a_text_of_something_else(client, other, lie):
    reserve(client, rows=ROWS)
    put(client, LONG, text_of(lie, **OTHERS[other]))
    assert_read(client)


GOOD = text_of(LIE, oldest=NOW_S - 30).decode()
NANOUSD = f"{LIE}"
BY_HAND = [
    "",
    " ",
    "by hand",
    "0",
    "\x00\xff",
    NANOUSD,
    f"1 {NANOUSD} {NOW_S}",
    GOOD[:-10],
    GOOD[:-11],
    GOOD[:-19],
    GOOD + " ",
    GOOD + " 1",
    GOOD + "\n",
    GOOD + "x",
    " " + GOOD,
    "0" + GOOD,
    GOOD.replace(" 1 ", "  1 "),
    GOOD.replace(" 1 ", " 1  "),
    GOOD.replace(NANOUSD, f"-{NANOUSD}"),
    GOOD.replace(NANOUSD, f"{NANOUSD}.5"),
    GOOD.replace(NANOUSD, "1e6"),
    GOOD.replace(NANOUSD, "0x10"),
    GOOD.replace(NANOUSD, "nan"),
    GOOD.replace(NANOUSD, ""),
    GOOD.replace(f" {NANOUSD}", ""),
    GOOD.replace(f"{NANOUSD} ", NANOUSD),
    GOOD.replace(" 1 ", " 1 1 "),
    GOOD.replace(" 1 ", " x "),
    GOOD.replace(f"{NANOUSD} {NOW_S - 30}", f"{NANOUSD} -{NOW_S}"),
    GOOD.replace(f"{NANOUSD} {NOW_S - 30}", f"{NANOUSD} none"),
    GOOD.replace(f"{NANOUSD} {NOW_S - 30}", f"{NANOUSD} 5"),
    f"600 {NOW_S} 1 {COST} {COST} {NOW_S}",
    GOOD.replace(" ", "\t"),
    GOOD * 2,
]


@pytest.mark.parametrize("text", BY_HAND)
def test_a_text_by_hand(client, text):
    reserve(client, rows=ROWS)
    put(client, LONG, text)
    assert_read(client)


@pytest.mark.parametrize("text", BY_HAND)
def test_an_end_or_an_extension_beside_a_text_by_hand(client, text):
    reserve(client, rows=ROWS)
    for call in (extend, settle):
        put(client, LONG, text)
        assert call(client, rows=ROWS)[0] == 0
    assert (ring_of(client, LONG.key), client.get(TODAY.key)) == ({NOW_S: 7}, b"7")
    assert_read(client)


KINDS = {
    "list": lambda client, key: client.rpush(key, GOOD),
    "ring": lambda client, key: client.zadd(key, {GOOD: 1}),
    "hash": lambda client, key: client.hset(key, GOOD, GOOD),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_of_another_kind_is_no_error_and_is_written_over(client, kind):
    reserve(client, rows=ROWS)
    client.delete(LONG.running)
    KINDS[kind](client, LONG.running)
    assert reserve(client, "refused", ROWS, today=0)[0] == 13
    assert extend(client, rows=ROWS)[0] == 0
    assert settle(client, rows=ROWS)[0] == 0
    assert settle(client, "lost", rows=ROWS, made_at_us=NOW_US - 60 * US)[0] == 2
    assert_read(client)


def with_a_bucket_more(client):
    client.zadd(LONG.key, {NOW_S - BUCKET_S: 100})


def with_a_bucket_less(client):
    client.zrem(LONG.key, NOW_S - 60)


def without_the_ring(client):
    client.delete(LONG.key)


def without_the_present_bucket(client):
    client.zrem(LONG.key, NOW_S)


def with_another_in_place_of_the_present_bucket(client):
    client.zrem(LONG.key, NOW_S)
    client.zadd(LONG.key, {NOW_S - BUCKET_S: 5})


CHANGES = [
    with_a_bucket_more,
    with_a_bucket_less,
    without_the_ring,
    without_the_present_bucket,
    with_another_in_place_of_the_present_bucket,
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_by_hand_is_read_anew(client, change):
    client.zadd(LONG.key, {NOW_S - 60: 50})
    reserve(client, rows=ROWS)
    before = client.get(LONG.running)
    change(client)
    assert client.get(LONG.running) == before
    assert_read(client)


@pytest.mark.parametrize("steps", [(), (reserve,), (settle,), (release,), (settle, reserve)])
def test_a_ring_that_is_deleted_by_hand_was_not_spent(client, steps):
    reserve(client, "before", ROWS)
    reserve(client, rows=ROWS)
    client.delete(LONG.key)
    for step in steps:
        assert step(client, "other" if step is reserve else "rid1", rows=ROWS)[0] == 0
    assert held_in(client, LONG) == (COST if reserve in steps else 0)
    assert_right(client)
    client.delete(LONG.key)
    assert told_of_the_window(client, "last", long=COST) == COST


def test_a_ring_that_is_deleted_by_hand_and_filled_by_an_extension_refuses_nobody(client):
    reserve(client, rows=ROWS)
    client.delete(LONG.key)
    extend(client, rows=ROWS)
    assert told_of_the_window(client, long=2 * COST) == 2 * COST


def test_a_bucket_that_goes_over_within_the_present_one(client):
    """Of 590 s the buckets are of 30, and what starts with one is over 620 s later: in the midst of another."""
    row = window("long", window_s=590)
    rows = (row, TODAY)
    reserve(client, "a", rows, cost=100)
    reserve(client, "b", rows, cost=10, now_us=(NOW_S + 601) * US)
    which = {"window_s": 590, "bucket": NOW_S + 600, "buckets": 2, "oldest": NOW_S}
    assert client.get(row.running) == text_of(100, **which)
    put(client, row, text_of(100 + LIE, **which))
    over_us = (NOW_S + 620) * US
    assert told_of_the_window(client, "c", rows, cost=1, now_us=over_us - 1) == 111 + LIE
    assert_read(client, row, rows, now_us=over_us)
    assert ring_of(client, row.key) == {NOW_S + 600: 12}


def test_in_the_next_bucket_the_window_is_read(client):
    reserve(client, rows=ROWS)
    put(client, LONG, text_of(COST + LIE))
    assert_read(client, now_us=(NOW_S + BUCKET_S) * US)


def test_a_day_that_begins_changes_nothing(client):
    reserve(client, "yesterday", YESTERDAY, now_us=(DAY_S - 1) * US)
    reserve(client, "today", ROWS, now_us=DAY_S * US)
    assert client.get(LONG.running) == text_of(COST, bucket=DAY_S, buckets=2, oldest=DAY_S - BUCKET_S)
    put(client, LONG, text_of(COST + LIE, bucket=DAY_S, buckets=2, oldest=DAY_S - BUCKET_S))
    assert told_of_the_window(client, "b", cost=1, now_us=DAY_S * US) == 2 * COST + LIE + 1


def test_a_clock_that_goes_back_and_forth(client):
    """In the earlier bucket another text is left, so that the one of the later bucket is not found again."""
    later_us = (NOW_S + BUCKET_S) * US
    reserve(client, "a", ROWS, cost=100, now_us=later_us)
    reserve(client, "b", ROWS, cost=10)
    assert client.get(LONG.running) == text_of(100, buckets=2, oldest=NOW_S)
    assert told_of_the_window(client, "c", cost=1, now_us=later_us) == 111
    assert_right(client)


# --- a refusal rests on the buckets


def test_what_says_too_much_refuses_nobody(client):
    reserve(client, rows=ROWS)
    put(client, LONG, text_of(10**12))
    assert_read(client, long=COST + 1)
    # Nor is less reserved than asked for.
    put(client, LONG, text_of(10**12))
    assert reserve(client, "b", ROWS, cost=5, at_least=1, long=COST + 6)[4] == 5


def test_what_says_too_little_makes_no_refusal_shorter(client):
    """By the text there would be room in the window, and the other budget alone would refuse."""
    spend(client, "then", 9, ROWS, now_us=NOW_US - BUCKET_S * US)
    spend(client, nanousd=1, rows=ROWS)
    ever, which = for_ever("ever", OF_WHO), {"buckets": 2, "oldest": NOW_S - BUCKET_S}
    put(client, LONG, text_of(0, **which))
    before = dump(client)
    assert reserve(client, "b", (*ROWS, ever), cost=6, long=15, ever=5) == [13, 0, NOW_US, 1, 0, 1]
    to_midnight_s = DAY_S + 86_400 - NOW_S
    assert reserve(client, "b", ROWS, cost=6, long=15, today=15) == [13, 0, NOW_US, to_midnight_s, 0, 1]
    assert dump(client) == before
    # Nor is more reserved than there is room for.
    assert reserve(client, "b", ROWS, cost=6, at_least=1, long=13, today=14)[4] == 3
    assert client.get(LONG.running) == text_of(9, **which)


def test_a_refusal_changes_no_text(client):
    spend(client)
    before = {name: client.get(key) for name, key in RUNNING.items()}
    assert reserve(client, "b", window=COST)[0] == 3
    assert reserve(client, "b")[0] == 1
    client.delete(MARKER)
    assert reserve(client, "b", global_day=COST)[0] == 7
    assert {name: client.get(key) for name, key in RUNNING.items()} == before


def test_a_shadow_budget_without_room_is_told_by_the_buckets(client):
    rows = (LONG._replace(shadow=1), TODAY)
    reserve(client, rows=rows)
    put(client, LONG, text_of(10**12))
    answer = reserve(client, "b", rows, long=2 * COST)
    assert (answer[6], answer[8]) == (b"", 2 * COST)
    assert reserve(client, "c", rows, long=2 * COST)[6] == b"1 "


def test_an_extension_goes_by_the_buckets(client):
    reserve(client, rows=ROWS)
    put(client, LONG, text_of(10**12))
    assert extend(client, rows=ROWS, long=2 * COST) == [0, 2 * COST, LATER_US, 2 * COST, 2 * COST]
    put(client, LONG, text_of(10**12))
    assert extend(client, to=4 * COST, at_least=COST, rows=ROWS, long=3 * COST)[1:] == [
        3 * COST,
        LATER_US,
        *[3 * COST] * 2,
    ]


def test_an_extension_believes_what_may_be_believed(client):
    reserve(client, rows=ROWS)
    put(client, LONG, text_of(LIE))
    assert extend(client, rows=ROWS)[3:] == [2 * COST + LIE, 2 * COST]
    client.zincrby(LONG.key, 7, NOW_S)
    assert extend(client, to=2 * COST, rows=ROWS)[3] == 2 * COST + LIE + 7
    # Also where another bucket than its own is the present one.
    client.zadd(LONG.key, {NOW_S + BUCKET_S: 5})
    put(client, LONG, text_of(LIE, bucket=NOW_S + BUCKET_S, buckets=2))
    later_us = (NOW_S + BUCKET_S) * US
    assert extend(client, to=2 * COST, rows=ROWS, now_us=later_us)[3] == LIE + 5


@pytest.mark.parametrize("other", OTHERS)
def test_an_extension_does_not_believe_a_text_of_something_else(client, other):
    reserve(client, rows=ROWS)
    put(client, LONG, text_of(LIE, **OTHERS[other]))
    assert extend(client, rows=ROWS, now_us=NOW_S * US)[3] == 2 * COST


def test_an_extension_of_two_windows_goes_by_the_text_of_each(client):
    rows = (TODAY, window("short", window_s=60), LONG)
    reserve(client, rows=rows)
    put(client, LONG, text_of(LIE))
    assert extend(client, rows=rows)[3:] == [2 * COST, 2 * COST, 2 * COST + LIE]


@pytest.mark.parametrize("text", BY_HAND)
def test_an_extension_does_not_believe_a_text_by_hand(client, text):
    reserve(client, rows=ROWS)
    put(client, LONG, text)
    assert extend(client, rows=ROWS)[3] == 2 * COST


# --- what ends and extensions leave

EARLIER_US = NOW_US - BUCKET_S * US
ITS = {"now_us": NOW_US, "made_at_us": EARLIER_US}
BOTH = {"buckets": 2, "oldest": NOW_S - BUCKET_S}


def noted(client):
    """A reservation in the bucket before, one in the present, and a text that would be believed and is not right."""
    reserve(client, "earlier", ROWS, now_us=EARLIER_US)
    reserve(client, "present", ROWS)
    assert client.get(LONG.running) == text_of(COST, **BOTH)
    put(client, LONG, text_of(COST + LIE, **BOTH))


@pytest.mark.parametrize("actual", [0, 1, 7, COST - 1, COST + 7, 10**15])
def test_after_an_end_in_the_present_bucket_the_text_goes_on_to_be_right(client, actual):
    reserve(client, "earlier", ROWS, now_us=EARLIER_US)
    reserve(client, "present", ROWS)
    settle(client, "present", actual, ROWS)
    assert client.get(LONG.running) == text_of(COST, **BOTH)
    assert_right(client, long=10**16, today=10**16)


@pytest.mark.parametrize("call", [settle, release, extend])
def test_a_change_of_the_present_bucket_leaves_the_text(client, call):
    noted(client)
    assert call(client, "present", rows=ROWS)[0] == 0
    assert client.get(LONG.running) == text_of(COST + LIE, **BOTH)


@pytest.mark.parametrize("call", [settle, release, extend])
def test_a_change_of_an_earlier_bucket_takes_it_away(client, call):
    noted(client)
    assert call(client, "earlier", rows=ROWS, **ITS)[0] == 0
    assert not client.exists(LONG.running)
    assert_read(client)


@pytest.mark.parametrize("call", [settle, extend])
@pytest.mark.parametrize("minutes", [0, 1])
def test_it_goes_by_the_bucket_of_the_text_and_not_by_the_time(client, call, minutes):
    """The clock may have gone back before: then the text is of a later bucket than the present one."""
    noted(client)
    assert call(client, "earlier", rows=ROWS, now_us=EARLIER_US + minutes, made_at_us=EARLIER_US)[0] == 0
    assert not client.exists(LONG.running)
    client.delete(LONG.running)
    later_us = NOW_US + 3 * BUCKET_S * US
    reserve(client, "later", ROWS, now_us=later_us)
    put(client, LONG, text_of(LIE, bucket=NOW_S, **BOTH))
    assert call(client, "present", rows=ROWS, now_us=later_us)[0] == 0
    assert client.exists(LONG.running)


@pytest.mark.parametrize("call", [settle, extend])
def test_a_change_that_makes_its_bucket_anew_takes_it_away(client, call):
    """The ring may have been deleted by hand meanwhile."""
    noted(client)
    client.zrem(LONG.key, NOW_S)
    more = {"actual": COST + 1} if call is settle else {}
    assert call(client, "present", rows=ROWS, **more)[0] == 0
    assert not client.exists(LONG.running)
    assert_right(client)


@pytest.mark.parametrize(
    "call", [lambda *at, **its: settle(*at, actual=COST, **its), lambda *at, **its: extend(*at, to=1, **its)]
)
def test_what_changes_nothing_leaves_the_text_alone(client, call):
    noted(client)
    assert call(client, "earlier", rows=ROWS, **ITS)[0] == 0
    assert client.get(LONG.running) == text_of(COST + LIE, **BOTH)


def test_an_extension_that_is_refused_leaves_the_text_alone(client):
    noted(client)
    assert extend(client, "earlier", rows=ROWS, today=COST, **ITS)[0] == 13
    assert client.get(LONG.running) == text_of(COST + LIE, **BOTH)


def test_a_repeated_end_leaves_the_text_alone(client):
    noted(client)
    settle(client, "earlier", rows=ROWS, **ITS)
    put(client, LONG, text_of(COST + LIE, **BOTH))
    before = dump(client)
    settle(client, "earlier", rows=ROWS, **ITS)
    assert dump(client) == before


@pytest.mark.parametrize("made_at_us", [NOW_US, EARLIER_US, NOW_US - 300 * US])
def test_after_a_late_end(client, made_at_us):
    noted(client)
    assert settle(client, rows=ROWS, made_at_us=made_at_us, now_us=NOW_US)[0] == 2
    assert client.exists(LONG.running) == (made_at_us == NOW_US)
    client.delete(LONG.running) if made_at_us == NOW_US else None
    assert_right(client)


def test_after_an_end_of_what_has_left_one_window_and_not_another(client):
    short = window("short", window_s=60)
    rows, later_us = (LONG, TODAY, short), NOW_US + 70 * US
    reserve(client, rows=rows)
    reserve(client, "other", rows, now_us=later_us)
    settle(client, rows=rows, now_us=later_us)
    assert (client.exists(LONG.running), client.exists(short.running)) == (0, 1)
    assert reserve(client, "b", rows, cost=1, now_us=later_us)[8:11] == [COST + 8, COST + 8, COST + 1]


@pytest.mark.parametrize("call", [settle, extend])
@pytest.mark.parametrize("turn", [1, -1])
def test_of_two_windows_each_has_its_own_text_taken_away(client, call, turn):
    hour = window("hour", window_s=3_600)
    rows, later_us = (hour, TODAY, LONG)[::turn], NOW_US + BUCKET_S * US
    reserve(client, rows=rows)
    reserve(client, "other", rows, now_us=later_us)
    assert call(client, rows=rows, now_us=later_us)[0] == 0
    assert (client.exists(LONG.running), client.exists(hour.running)) == (0, 1)
    held = sum(ring_of(client, LONG.key).values()) + 1
    assert reserve(client, "b", rows, cost=1, now_us=later_us)[8:11] == [held] * 3


@pytest.mark.parametrize("call", [settle, extend])
def test_what_was_cleared_is_not_changed_and_what_others_have_is(client, call):
    rows = (window("mine", OF_WHO), total("mine_too", OF_WHO), *ROWS)
    reserve(client, rows=rows, now_us=EARLIER_US)
    reserve(client, "other", rows)
    client.set(RESET, EARLIER_US, ex=1_000)
    call(client, rows=rows, **ITS)
    assert (client.exists(rows[0].running), client.exists(LONG.running)) == (1, 0)
    now = sum(ring_of(client, LONG.key).values()) + 1
    assert reserve(client, "b", rows, cost=1)[8:12] == [2 * COST + 1, 2 * COST + 1, now, now]


# --- a window of the six


def test_the_window_may_grow_and_shrink(client):
    reserve(client, "a")
    long = six(window_s=1_200)
    assert reserve(client, "b", long)[9] == 2 * COST
    assert client.get(RUNNING["window"]) == text_of(0, window_s=1_200)
    assert reserve(client, "c")[9] == 3 * COST
    assert client.get(RUNNING["window"]) == text_of(0)
    assert client.ttl(BOOKS["window"]) == 1_260


def test_networks_and_identifiers_have_their_own(client):
    reserve(client)
    client.set(RUNNING["network_window"], text_of(LIE), ex=20)
    assert reserve(client, "b", cost=5)[8:14] == [*[COST + 5] * 2, COST + LIE + 5, *[COST + 5] * 3]


# --- any order


def live_in(client, row, now_us):
    """Of a window what counts; nothing of a total."""
    lasts_s = -(-row.window_s // 20) + row.window_s
    buckets = ring_of(client, row.key) if row.window_s else {}
    return sum(nanousd for start, nanousd in buckets.items() if (start + lasts_s) * US > now_us)


def play(client, rng, lists, jumps=(0, 0, 1, US, 9 * US, 40 * US), losses=()):
    """Requests and their ends; of each window of an admitted one: what is told of it, and what its buckets hold."""
    made, now_us = [], NOW_US
    for number in range(250):
        now_us += rng.choice(jumps)
        rows, rid = rng.choice(lists), f"r{number}"
        held = [live_in(client, row, now_us) for row in rows]
        answer = reserve(client, rid, rows, cost=rng.randrange(1, 50), now_us=now_us)
        if answer[0] == 0:
            made.append((rid, rows, now_us, answer[4]))
            told = zip(rows, answer[8:], held, strict=False)
            yield from ((number, row.name, each, own + answer[4]) for row, each, own in told if row.window_s)
        if made and rng.random() < 0.7:
            rid, rows, made_at_us, cost = made.pop(rng.randrange(len(made)))
            its = {"rows": rows, "now_us": now_us, "made_at_us": made_at_us}
            if rng.random() < 0.3:
                extend(client, rid, cost + rng.randrange(9), **its)
            if losses and rng.random() < 0.05:
                client.delete(f"llm:reservation:{rid}")
            settle(client, rid, rng.choice([0, 1, cost, cost + 5]), **its)
        if losses and rng.random() < 0.05:
            client.delete(rng.choice(losses))


SHORT = window("short", window_s=59, limit=600)
LISTED = (LONG._replace(limit=600), TODAY, SHORT)
LONGER = LONG._replace(window_s=1_203, limit=600)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "lists", [[LISTED], [LISTED[:2], (TODAY, LONGER)]], ids=["one", "the window grows and shrinks"]
)
def test_whatever_came_before_what_is_told_is_what_the_buckets_hold(client, lists, seed):
    for number, name, told, held in play(client, random.Random(seed), lists):
        assert told == held, (number, name)


@pytest.mark.parametrize("seed", range(5))
def test_whatever_is_lost_and_however_the_clock_goes_not_too_little_is_told(client, seed):
    jumps = (0, 0, 1, US, 9 * US, 40 * US, -US, -40 * US)
    losses = [LONG.key, TODAY.key, SHORT.key, LONG.running, SHORT.running]
    for number, name, told, held in play(client, random.Random(seed), [LISTED], jumps, losses):
        assert told >= held, (number, name)
