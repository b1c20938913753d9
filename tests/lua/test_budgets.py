"""Any list of budgets: one alone, as many as there may be, without an identifier, without a limit, without an end."""

import pytest

from backends.records import key_digest
from tests.lua.by_hand import (
    BOOKS,
    BUCKET_S,
    COST,
    DAY_S,
    HOUR_S,
    KEY,
    LATER_US,
    MARKER,
    NETWORK,
    NEVER_S,
    NOW_S,
    NOW_US,
    OF_ALL,
    OF_NETWORK,
    OF_TEAM,
    OF_WHO,
    RECORD,
    REQUEST_DIGEST,
    RESET,
    SIX,
    US,
    WHO,
    charged_to,
    dump,
    extend,
    for_ever,
    key_of,
    release,
    reserve,
    ring_of,
    settle,
    spend,
    total,
    window,
    words_of_reserve,
)

SHORT = window("short", window_s=60)
TODAY, EVER = total("today"), for_ever("ever")
TO_MIDNIGHT_S = DAY_S + 86_400 - NOW_S
OF_MODEL, OF_KEY, OF_AROUND = "llm:open:model:gpt-4o", "llm:open:key:web", "llm:open:wide_network:198.51.100.0"


def stored(client):
    """Key -> what it holds, but for what windows came to."""
    names = [name.decode() for name in client.keys("*") if not name.startswith(b"llm:running:")]
    kinds = {name: client.type(name) for name in names}
    return {name: ring_of(client, name) if kinds[name] == b"zset" else client.get(name).decode() for name in names}


# --- one alone


@pytest.mark.parametrize("row", [window("alone"), total("alone"), for_ever("alone")], ids=["window", "day", "ever"])
def test_one_budget_alone_without_an_identifier(client, row):
    rows = (row,)
    frees_at = [NOW_S + 630] if row.window_s else []
    assert reserve(client, rows=rows, key=KEY) == [0, 120, NOW_US, NOW_US, COST, 0, b"", b"", COST, *frees_at]
    held = {NOW_S: COST} if row.window_s else str(COST)
    rest = charged_to(rows)
    assert stored(client) == {
        RECORD: f"open {COST} {NOW_US} {REQUEST_DIGEST} {rest}",
        row.key: held,
        OF_TEAM: {NOW_S: COST},
        key_of(KEY): f"open fedcba9876543210 rid1 {COST} {NOW_US + 120 * US}",
    }
    assert reserve(client, rows=rows)[7] == rest.encode()
    assert reserve(client, "other", rows, key=KEY)[0] == 12
    assert extend(client, rows=rows, key=KEY) == [0, 2 * COST, LATER_US, 2 * COST]
    assert extend(client, rows=rows, alone=2 * COST, to=3 * COST) == [13, 2 * COST, LATER_US, 1]
    assert reserve(client, "other", rows, alone=2 * COST)[:6] == [13, 0, NOW_US, 1, 1, 1]
    assert settle(client, rows=rows, key=KEY) == [0, 7, LATER_US, 0]
    assert stored(client) == {
        RECORD: f"paid 7 {NOW_US} {REQUEST_DIGEST} {rest}",
        row.key: {NOW_S: 7} if row.window_s else "7",
        key_of(KEY): f"settled fedcba9876543210 rid1 7 {LATER_US}",
    }
    assert reserve(client, "other", rows, cost=10, alone=16)[4:] == [0, 1]


def test_without_an_identifier_there_is_no_marker_and_no_reset(client):
    client.set(MARKER, "by hand", ex=100)
    client.set(RESET, NOW_US, ex=100)
    assert reserve(client, rows=(TODAY,))[0] == 0
    assert extend(client, rows=(TODAY,), today=COST)[0] == 13
    settle(client, rows=(TODAY,))
    assert client.get(TODAY.key) == b"7"
    keys, _ = words_of_reserve(rows=(TODAY,))
    assert len(keys) == 3


def test_the_identifier_and_everybody_are_told_by_their_numbers(client):
    """Whatever their place among the owners is: the marker, the reset, and what has expired."""
    mine, all_of_us = total("mine", OF_WHO, marker_s=20), total("ours", OF_ALL)
    rows = (all_of_us, TODAY, mine)
    reserve(client, "left", rows)
    reserve(client, rows=rows, cost=5)
    client.set(RESET, NOW_US, ex=1_000)
    over_us = (NOW_S + 130) * US
    assert settle(client, rows=rows, now_us=over_us) == [0, 7, over_us, COST]
    assert [client.get(row.key) for row in rows] == [b"%d" % (COST + 7)] * 2 + [b"%d" % (COST + 5)]
    assert reserve(client, "refused", rows, mine=0) == [13, 20, NOW_US, 20, 0, 3]
    assert client.get(MARKER).decode() == f"budget:mine {NOW_US + 20 * US} {NOW_US + 20 * US} spent"
    assert reserve(client, "refused", rows) == [1, 20, NOW_US, 20, 0, b"budget:mine"]


def test_what_is_swept_of_everybody_is_reported_whatever_their_place_is(client):
    rows = (total("ours", OF_ALL), TODAY)
    for owner, amount in ((OF_ALL, 3), (OF_TEAM, 500)):
        client.zadd(owner, {NOW_S - 1_000 + back: amount for back in range(14)})
    assert reserve(client, rows=rows)[5] == 14 * 3
    assert ring_of(client, OF_ALL) == ring_of(client, OF_TEAM) == {NOW_S: COST}


def test_as_much_pending_money_as_counts_is_left_where_it_is(client):
    """Of buckets that are shorter than these, before a restart."""
    client.zadd(OF_ALL, {NOW_S - back: 3 for back in range(1, 20)})
    assert reserve(client, rows=(total("ours", OF_ALL),))[5] == 0
    assert client.zcard(OF_ALL) == 20


def test_only_everybodys_pending_money_is_kept_longer_and_reported(client):
    reserve(client, "left", (TODAY,))
    assert client.ttl(OF_TEAM) == 130
    over_us = (NOW_S + 130) * US
    assert settle(client, "lost", rows=(TODAY,), now_us=over_us) == [2, 7, over_us, 0]
    assert not client.exists(OF_TEAM)


# --- as many as there may be


def many():
    owners = {OF_WHO: "who", OF_NETWORK: "net", OF_ALL: "all", OF_TEAM: "team", OF_MODEL: "model", OF_KEY: "key"}
    rows = list(SIX)
    for owner, name in owners.items():
        rows += (window(f"{name}_w", owner, 3_600), for_ever(f"{name}_e", owner))
    rows += (total("who_d", OF_WHO, marker_s=45), window("around_w", OF_AROUND, 90_000), total("around_d", OF_AROUND))
    return [*rows, window("model_w2", OF_MODEL, 61)]


def test_twenty_two_budgets(client):
    rows = many()
    assert len(rows) == 22
    spend(client, nanousd=3, rows=rows)
    answer = reserve(client, rows=rows, key=KEY)
    buckets = [-(-row.window_s // 20) for row in rows if row.window_s]
    starts = [NOW_S - NOW_S % bucket for bucket in buckets]
    lengths = [row.window_s for row in rows if row.window_s]
    frees_at = [start + bucket + length for start, bucket, length in zip(starts, buckets, lengths, strict=True)]
    assert answer == [0, 120, NOW_US, NOW_US, COST, 0, b"", b"", *[COST + 3] * 22, *frees_at]
    assert extend(client, rows=rows, key=KEY) == [0, 2 * COST, LATER_US, *[2 * COST + 3] * 22]
    assert settle(client, rows=rows, key=KEY) == [0, 7, LATER_US, 0]
    for row in rows:
        held = ring_of(client, row.key) if row.window_s else int(client.get(row.key))
        assert held == ({NOW_S - NOW_S % -(-row.window_s // 20): 10} if row.window_s else 10), row.name
    assert not any(client.exists(row.owner) for row in rows)
    for_ever_kept = {row.key for row in rows if not row.window_s and not row.end_s}
    assert {name.decode() for name in client.keys("*") if client.ttl(name) < 0} == for_ever_kept


@pytest.mark.parametrize("number", range(1, 23))
def test_each_of_twenty_two_refuses_and_is_told_by_its_number(client, number):
    rows = many()
    row = rows[number - 1]
    spend(client, nanousd=3, rows=rows)
    reserve(client, rows=rows, cost=1)
    before = dump(client)
    later_ones = {other.name: 0 for other in rows[number:]}
    told = reserve(client, "other", rows, cost=10, **later_ones | {row.name: 12})
    assert (told[0], told[1], told[4], told[5]) == (row.status, row.marker_s, 0, number)
    client.delete(MARKER)
    assert extend(client, rows=rows, to=11, **later_ones | {row.name: 13}) == [row.status, 1, LATER_US, number]
    assert dump(client) == before
    assert reserve(client, "other", rows, cost=10, **{row.name: 14})[0] == 0


# --- what never ends


def test_a_total_that_lasts_for_ever_has_no_ttl_whoever_makes_it(client):
    rows = (EVER,)
    reserve(client, rows=rows)
    assert (client.get(EVER.key), client.ttl(EVER.key)) == (b"%d" % COST, -1)
    client.delete(EVER.key)
    extend(client, rows=rows)
    assert (client.get(EVER.key), client.ttl(EVER.key)) == (b"%d" % COST, -1)
    client.flushdb()
    assert settle(client, rows=rows) == [2, 7, LATER_US, 0]
    assert (client.get(EVER.key), client.ttl(EVER.key)) == (b"7", -1)
    # It is there for ever, so it is never too late to take from it.
    client.flushdb()
    reserve(client, rows=rows)
    assert settle(client, rows=rows, now_us=NOW_US + 3_000 * US)[0] == 0
    assert (client.get(EVER.key), client.ttl(EVER.key)) == (b"7", -1)


def test_waiting_never_helps_where_what_never_ends_is_spent(client):
    spend(client, rows=(EVER, TODAY))
    assert reserve(client, rows=(EVER,), ever=COST) == [13, 0, NOW_US, 0, 0, 1]
    assert reserve(client, rows=(TODAY, EVER), ever=COST, today=COST) == [13, 0, NOW_US, 0, 0, 1]
    assert reserve(client, rows=(TODAY, EVER), today=COST) == [13, 0, NOW_US, TO_MIDNIGHT_S, 0, 1]
    assert reserve(client, rows=(EVER,), ever=COST - 1) == [13, 0, NOW_US, 1, 0, 1]
    assert client.ttl(EVER.key) == -1


def test_a_marker_ends_though_what_set_it_never_does(client):
    rows = (for_ever("mine", OF_WHO, marker_s=30),)
    spend(client, rows=rows)
    assert reserve(client, rows=rows, mine=COST) == [13, 30, NOW_US, 0, 0, 1]
    assert client.get(MARKER).decode() == f"budget:mine {NOW_US + 30 * US} 0 spent"
    assert reserve(client, rows=rows) == [1, 30, NOW_US, 0, 0, b"budget:mine"]
    over_us = NOW_US + 30 * US
    assert reserve(client, rows=rows, now_us=over_us)[0] == 0


def test_what_is_pending_counts_in_what_never_ends_whenever_it_was_made(client):
    now_us = (DAY_S + 5) * US
    client.set(EVER.key, 12)
    client.zadd(OF_TEAM, {f"{DAY_S - 10}:{key_digest(EVER.key)}": 7})
    rows = (EVER, total("today", limit=15))
    assert reserve(client, rows=rows, now_us=now_us, cost=10, ever=15) == [13, 0, now_us, 1, 1, 1]


# --- without a limit, and limits of nothing


def test_without_a_limit_all_is_booked_and_nothing_refused(client):
    rows = (SHORT, TODAY, EVER)
    none = dict.fromkeys(("short", "today", "ever"), "")
    for rid in "ab":
        spend(client, rid, 10**15, rows, **none)
    assert client.get(EVER.key) == b"%d" % (2 * 10**15)
    assert reserve(client, "c", rows, **none | {"today": 0}) == [13, 0, NOW_US, 1, 0, 2]
    assert reserve(client, "c", rows, cost=7, at_least=1, **none | {"today": 2 * 10**15 + 3})[4] == 3


# --- shadow


def test_a_shadow_budget_is_booked_and_told_and_refuses_nothing(client):
    rows = (window("first", shadow=1), TODAY, total("third", shadow=1), for_ever("fourth", shadow=1))
    full = {"first": COST - 1, "third": COST, "fourth": 0}
    assert reserve(client, rows=rows, **full) == [
        *[0, 120, NOW_US, NOW_US, COST, 0, b"1 4 ", b"", COST, COST, COST, COST],
        NOW_S + 630,
    ]
    assert reserve(client, "b", rows, **full)[6] == b"1 3 4 "
    assert client.get(rows[3].key) == b"%d" % (2 * COST)
    assert ring_of(client, rows[0].key) == {NOW_S: 2 * COST}
    assert not client.exists(MARKER)
    # An enforced one refuses, and is the one that is told.
    assert reserve(client, "c", rows, today=2 * COST, **full)[4:] == [1, 2]
    assert reserve(client, rows=rows, **full)[6] == b""


def test_a_shadow_budget_says_nothing_of_how_long_a_refusal_lasts_nor_of_what_is_left(client):
    rows = (total("shade", shadow=1), for_ever("dark", shadow=1), SHORT)
    spend(client, rows=rows)
    frees_at_s = NOW_S + 63 - NOW_S % 3
    assert reserve(client, "c", rows, shade=0, dark=0, short=COST) == [13, 0, NOW_US, frees_at_s - NOW_S, 0, 3]
    answer = reserve(client, "c", rows, cost=10, at_least=1, shade=1, dark=COST + 1, short=COST + 4)
    assert (answer[4], answer[6]) == (4, b"1 2 ")
    reserve(client, "d", rows, cost=10)
    assert reserve(client, "e", rows, cost=10, shade=0, dark=0, short=COST + 20)[4:] == [1, 3]


# --- markers of further budgets


def test_the_marker_of_a_further_budget_and_its_cause(client):
    rows = (total("plain", OF_WHO), total("marked", OF_WHO, marker_s=45), *SIX)
    spend(client, rows=rows)
    before = dump(client)
    assert reserve(client, rows=rows, plain=COST) == [13, 0, NOW_US, TO_MIDNIGHT_S, 0, 1]
    assert dump(client) == before
    assert reserve(client, rows=rows, marked=COST, window=COST) == [13, 45, NOW_US, TO_MIDNIGHT_S, 0, 2]
    assert client.ttl(MARKER) == 45
    assert client.get(MARKER).decode() == f"budget:marked {NOW_US + 45 * US} {NOW_US + TO_MIDNIGHT_S * US} spent"
    assert reserve(client, now_us=LATER_US) == [1, 44, LATER_US, TO_MIDNIGHT_S - 1, 0, b"budget:marked"]


def test_the_shortest_marker_is_of_a_second(client):
    rows = (total("mine", OF_WHO, marker_s=1),)
    assert reserve(client, rows=rows, mine=0) == [13, 1, NOW_US, 1, 0, 1]
    assert client.get(MARKER).decode() == f"budget:mine {NOW_US + US} {NOW_US + US} spent"
    client.set(MARKER, "by hand")
    assert reserve(client, rows=rows) == [1, 1, NOW_US, 1, 0, b""]


def test_a_marker_by_hand_lasts_as_long_as_the_shortest_that_a_budget_sets(client):
    client.set(MARKER, "by hand")
    rows = (total("a", OF_WHO), total("b", OF_WHO, marker_s=45), window("c", OF_WHO, marker_s=20), TODAY)
    assert reserve(client, rows=rows) == [1, 20, NOW_US, 20, 0, b""]
    assert reserve(client, rows=(rows[0], TODAY)) == [1, 1, NOW_US, 1, 0, b""]


# --- owners


def test_pending_money_is_kept_once_for_each_owner(client):
    rows = (window("a"), total("b"), for_ever("c"), total("d", OF_MODEL), window("e", OF_MODEL))
    reserve(client, rows=rows)
    assert (ring_of(client, OF_TEAM), ring_of(client, OF_MODEL)) == ({NOW_S: COST}, {NOW_S: COST})
    extend(client, rows=rows)
    assert (ring_of(client, OF_TEAM), ring_of(client, OF_MODEL)) == ({NOW_S: 2 * COST}, {NOW_S: 2 * COST})
    settle(client, rows=rows)
    assert not client.exists(OF_TEAM, OF_MODEL)


def test_only_what_is_the_identifiers_was_cleared(client):
    rows = (TODAY, total("mine", OF_WHO), window("recent", OF_WHO), window("net", OF_NETWORK))
    reserve(client, rows=rows)
    client.set(RESET, NOW_US, ex=1_000)
    assert extend(client, rows=rows, mine=0, recent=0)[3:] == [2 * COST, COST, COST, 2 * COST]
    release(client, rows=rows)
    assert stored(client).keys() == {RECORD, RESET, TODAY.key, rows[1].key, rows[2].key, OF_WHO}
    assert (client.get(TODAY.key), client.get(rows[1].key)) == (b"0", b"%d" % COST)
    assert ring_of(client, OF_WHO) == {NOW_S: COST}


# --- periods


def test_the_keys_are_those_of_the_periods_from_the_latest_start_to_the_earliest_end(client):
    hour, day = total("hour", start_s=HOUR_S, end_s=HOUR_S + 3_600), TODAY
    for rows, (start_s, end_s) in {
        (day,): (DAY_S, DAY_S + 86_400),
        (day, hour): (HOUR_S, HOUR_S + 3_600),
        (hour, day, EVER, SHORT): (HOUR_S, HOUR_S + 3_600),
    }.items():
        for now_us in (start_s * US - 1, end_s * US):
            assert reserve(client, rows=rows, now_us=now_us) == [11, 0, now_us]
            assert client.dbsize() == 0
        for now_us in (start_s * US, end_s * US - 1):
            assert reserve(client, rows=rows, now_us=now_us)[0] == 0
            client.flushdb()
    for now_us in (0, 2**52):
        assert reserve(client, rows=(EVER, SHORT), now_us=now_us, until_s=NEVER_S)[0] == 0


def test_a_total_is_kept_until_its_budget_says(client):
    rows = (total("long", keep_until_s=NOW_S + 5_000), total("short", keep_until_s=NOW_S + 4_000))
    reserve(client, rows=rows)
    assert [client.ttl(row.key) for row in rows] == [5_000, 4_000]
    client.delete(*(row.key for row in rows))
    extend(client, rows=rows)
    assert [client.ttl(row.key) for row in rows] == [4_999, 3_999]
    client.flushdb()
    settle(client, rows=rows)
    assert [client.ttl(row.key) for row in rows] == [4_999, 3_999]
    client.flushdb()
    settle(client, rows=rows, now_us=(NOW_S + 4_000) * US, made_at_us=NOW_US + 3_000 * US)
    assert [client.exists(row.key) for row in rows] == [1, 0]


def test_a_reservation_is_ended_in_the_periods_in_which_it_was_made(client):
    yesterday = total("today", start_s=DAY_S - 86_400, end_s=DAY_S)
    made_at_us, now_us = (DAY_S - 1) * US, (DAY_S + 1) * US
    reserve(client, rows=(yesterday,), now_us=made_at_us)
    reserve(client, "other", (TODAY,), now_us=now_us)
    assert extend(client, rows=(yesterday,), now_us=now_us, made_at_us=made_at_us)[3] == 2 * COST
    assert settle(client, rows=(yesterday,), now_us=now_us, made_at_us=made_at_us)[0] == 0
    assert (client.get(yesterday.key), client.get(TODAY.key)) == (b"7", b"%d" % COST)


# --- lengths


@pytest.mark.parametrize("window_s", [1, 19, 20, 21, 61, 599, 601, 31 * 86_400])
def test_a_window_of_any_length_has_buckets_of_a_twentieth_rounded_up(client, window_s):
    row, bucket_s = window("any", window_s=window_s), -(-window_s // 20)
    start_s = NOW_S - NOW_S % bucket_s
    assert reserve(client, rows=(row,))[9] == start_s + bucket_s + window_s
    assert client.ttl(row.key) == window_s + bucket_s
    assert ring_of(client, row.key) == {start_s: COST}
    extend(client, rows=(row,), now_us=NOW_US)
    assert ring_of(client, row.key) == {start_s: 2 * COST}
    settle(client, rows=(row,), now_us=NOW_US)
    assert ring_of(client, row.key) == {start_s: 7}
    ends_us = (start_s + bucket_s + window_s) * US
    assert reserve(client, "b", (row,), cost=1, any=7, now_us=ends_us - 1)[3] == 1
    assert reserve(client, "b", (row,), cost=1, any=7, now_us=ends_us)[8] == 1


@pytest.mark.parametrize("pending_s", [1, 11, 12, 13, 120, 3_600])
def test_pending_money_has_buckets_of_a_twelfth_rounded_up(client, pending_s):
    bucket_s = -(-pending_s // 12)
    start_s, its = NOW_S - NOW_S % bucket_s, {"pending_s": pending_s}
    assert reserve(client, rows=(TODAY,), **its)[1] == pending_s
    assert client.ttl(OF_TEAM) == pending_s + bucket_s
    assert client.ttl(RECORD) == pending_s + 3_600
    assert ring_of(client, OF_TEAM) == {start_s: COST}
    assert extend(client, rows=(TODAY,), now_us=NOW_US + pending_s * US, **its)[0] == 8
    extend(client, rows=(TODAY,), now_us=NOW_US + pending_s * US - 1, **its)
    assert ring_of(client, OF_TEAM) == {start_s: 2 * COST}
    settle(client, rows=(TODAY,), **its)
    assert not client.exists(OF_TEAM)


def test_two_windows_of_one_owner_with_the_other_buckets_of_each(client):
    rows = (window("long", window_s=6_000), SHORT)
    client.zadd(rows[0].key, {NOW_S - 3_000: 5})
    client.zadd(SHORT.key, {NOW_S - 63: 100, NOW_S - 30: 7})
    assert reserve(client, rows=rows)[8:] == [
        COST + 5,
        COST + 7,
        NOW_S - 3_000 + 6_300,
        NOW_S - 30 + 63,
    ]
    assert ring_of(client, SHORT.key) == {NOW_S - 30: 7, NOW_S: COST}


# --- amounts


def test_amounts_below_2_to_the_53_are_exact_in_every_kind_of_budget(client):
    rows, most = (window("w"), TODAY, EVER), 2**53 - 1
    room = dict.fromkeys(("w", "today", "ever"), most)
    assert reserve(client, rows=rows, cost=most - 3, **room)[8:11] == [most - 3] * 3
    assert reserve(client, "b", rows, cost=4, **room)[0] == 13
    assert reserve(client, "b", rows, cost=2, **room)[8:11] == [most - 1] * 3
    assert extend(client, "b", 4, rows, **room)[0] == 13
    assert extend(client, "b", 4, rows, at_least=3, **room) == [0, 3, LATER_US, *[most] * 3]
    assert stored(client)[TODAY.key] == stored(client)[EVER.key] == str(most)
    assert ring_of(client, rows[0].key) == ring_of(client, OF_TEAM) == {NOW_S: most}
    settle(client, actual=most - 4, rows=rows)
    assert stored(client)[TODAY.key] == stored(client)[EVER.key] == str(most - 1)
    assert (ring_of(client, rows[0].key), ring_of(client, OF_TEAM)) == ({NOW_S: most - 1}, {NOW_S: 3})


# --- errors


@pytest.mark.parametrize("garbage", [b"abc", b"12345678901234567"])
def test_an_error_names_the_place_and_no_key(client, garbage):
    rows = (window("a", OF_WHO), total("b", OF_WHO), total("c", OF_NETWORK))
    reserve(client, rows=rows)
    client.set(rows[2].key, garbage)
    calls = {reserve: {"rid": "other"}, extend: {}, settle: {"actual": 10**9}}
    for call, words in calls.items():
        with pytest.raises(Exception, match="KEYS 4 holds no amount") as caught:
            call(client, rows=rows, **words)
        assert not {WHO, NETWORK, "llm:"} & {word for word in (WHO, NETWORK, "llm:") if word in str(caught.value)}


def test_the_six_and_further_ones_are_told_in_the_order_of_the_list(client):
    rows = (window("a"), *SIX, total("b"))
    assert reserve(client, rows=rows)[8:] == [*[COST] * 8, *[NOW_S + 600 + BUCKET_S] * 3]
    assert client.get(RECORD).decode().endswith(charged_to(rows))
    assert client.exists(*BOOKS.values()) == 6
