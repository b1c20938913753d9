"""What the scripts reply and write for the six budgets, to the letter, by what stands at the scripts' heads."""

import pytest

from tests.lua.by_hand import (
    BODY,
    BOOKS,
    BUCKET_S,
    BY_NAME,
    CONSUME,
    COST,
    DAY_S,
    HOUR_S,
    ID,
    KEY,
    LATER_US,
    MARKER,
    NOW_S,
    NOW_US,
    OF_ALL,
    OF_WHO,
    PENDING,
    RECORD,
    REQUEST_DIGEST,
    RESET,
    RUNNING,
    SIX,
    TOTALS,
    US,
    WINDOWS,
    charged_to,
    dump,
    extend,
    for_ever,
    key_of,
    release,
    reserve,
    ring_of,
    settle,
    six,
    spend,
    total,
)

TO_NEXT_HOUR_S, TO_MIDNIGHT_S = 40 * 60, 13 * 3600 + 40 * 60
WINDOW_ENDS_S = 600 + BUCKET_S
FREES_AT_S = NOW_S + WINDOW_ENDS_S
REST = charged_to(SIX)
OTHER_DIGEST = "0123456789abcdef"
# Of each budget: the status of its refusal, its number, the marker that it sets, and when what was spent now is over.
REFUSALS = {
    "day": (2, 1, 60, TO_MIDNIGHT_S),
    "window": (3, 2, 30, WINDOW_ENDS_S),
    "network_window": (4, 3, 0, WINDOW_ENDS_S),
    "network_day": (5, 4, 0, TO_MIDNIGHT_S),
    "global_hour": (6, 5, 0, TO_NEXT_HOUR_S),
    "global_day": (7, 6, 0, TO_MIDNIGHT_S),
}


def admitted(spent, *, now_us=NOW_US, made_at_us=NOW_US, held=COST, known=b""):
    return [0, 120, now_us, made_at_us, held, 0, b"", known, *[spent] * 6, FREES_AT_S, FREES_AT_S]


# --- reserve


def test_admitted(client):
    spend(client)
    assert reserve(client) == admitted(2 * COST)


def test_each_budget_tells_what_it_has_itself(client):
    for number, row in enumerate(SIX, 1):
        if row.window_s:
            client.zadd(row.key, {NOW_S - number * BUCKET_S: number}) and client.expire(row.key, 600)
        else:
            client.set(row.key, number, ex=600)
    frees_at = [FREES_AT_S - number * BUCKET_S for number in (2, 3)]
    assert reserve(client)[8:] == [*(COST + number for number in range(1, 7)), *frees_at]


def test_the_worked_example_of_a_reservation(client):
    cost = 4_050_000
    for rid in "abc":
        reserve(client, rid, cost=cost)
    assert reserve(client, "d", cost=cost, window=20_000_000)[:10] == [0, 120, NOW_US, NOW_US, cost, 0, b"", b""] + (
        [4 * cost] * 2
    )
    assert reserve(client, "e", cost=cost, window=20_000_000 - 1) == [3, 30, NOW_US, 30, 1, 2]


def test_the_same_id_again_is_told_when_it_was_made_and_what_it_is_charged_to(client):
    reserve(client)
    before = dump(client)
    later_us = NOW_US + 3 * US
    again = admitted(COST, now_us=later_us, known=REST.encode())
    assert reserve(client, now_us=later_us) == again
    assert reserve(client, now_us=later_us, cost=7, pending_s=300, window=0, charged_to="others") == [*again]
    assert dump(client) == before
    extend(client)
    again = admitted(2 * COST, now_us=later_us, held=2 * COST, known=REST.encode())
    assert reserve(client, now_us=later_us) == again


def test_the_same_id_again_comes_before_a_marker_and_a_callers_key(client):
    reserve(client, key=KEY)
    client.set(MARKER, "by hand", ex=100)
    assert reserve(client, key=KEY)[0] == 0
    assert reserve(client, "other", key=KEY)[0] == 12
    assert reserve(client, "other")[0] == 1


@pytest.mark.parametrize("limit", REFUSALS)
def test_refused(client, limit):
    status, number, marker_s, ends_s = REFUSALS[limit]
    spend(client)
    before = dump(client)
    # One nano-dollar of room is missing.
    assert reserve(client, **{limit: 2 * COST - 1}) == [status, marker_s, NOW_US, ends_s, 0, number]
    assert {name: held for name, held in dump(client).items() if name != MARKER.encode()} == before
    assert client.ttl(MARKER) == (marker_s or -2)
    client.delete(MARKER)
    assert reserve(client, **{limit: 2 * COST})[0] == 0


@pytest.mark.parametrize("limit", REFUSALS)
def test_the_first_that_fails_is_told_and_the_latest_end(client, limit):
    spend(client)
    first = list(REFUSALS).index(limit)
    failing = dict.fromkeys(list(REFUSALS)[first:], COST)
    status, number, marker_s, _ = REFUSALS[limit]
    assert reserve(client, **failing) == [status, marker_s, NOW_US, TO_MIDNIGHT_S, 0, number]


@pytest.mark.parametrize("limit", [name for name in REFUSALS if REFUSALS[name][2]])
def test_under_a_marker(client, limit):
    _, _, marker_s, ends_s = REFUSALS[limit]
    spend(client)
    reserve(client, **{limit: COST})
    later_us = NOW_US + 10 * US
    cause = BY_NAME[limit].cause.encode()
    assert reserve(client, now_us=later_us) == [1, marker_s - 10, later_us, ends_s - 10, 0, cause]
    over_us = NOW_US + marker_s * US
    assert reserve(client, now_us=over_us - 1) == [1, 1, over_us - 1, ends_s - marker_s + 1, 0, cause]
    assert reserve(client, now_us=over_us)[0] == 0


def test_a_marker_set_by_hand(client):
    client.set(MARKER, "by hand", px=19_500)
    assert reserve(client) == [1, 20, NOW_US, 20, 0, b""]
    client.persist(MARKER)
    assert reserve(client) == [1, 30, NOW_US, 30, 0, b""]  # as long as the shortest that a budget sets
    shortest_first = [row._replace(marker_s=7 if row.name == "day" else row.marker_s) for row in SIX]
    assert reserve(client, rows=shortest_first) == [1, 7, NOW_US, 7, 0, b""]
    without = [row._replace(marker_s=0) for row in SIX]
    assert reserve(client, rows=without) == [1, 1, NOW_US, 1, 0, b""]
    for text in ("", "window_limit 1 2", "window_limit 1 2 busy ", "window-limit 1 2 busy", "window_limit 1.5 2 busy"):
        client.set(MARKER, text, px=19_500)
        assert reserve(client) == [1, 20, NOW_US, 20, 0, b""]


def test_busy(client):
    reserve(client, "open")
    assert reserve(client, window=COST) == [3, 30, NOW_US, 30, 1, 2]
    assert client.get(MARKER).decode() == f"window_limit {NOW_US + 30 * US} {NOW_US + 30 * US} busy"
    assert reserve(client, window=COST) == [1, 30, NOW_US, 30, 1, b"window_limit"]


def test_busy_without_a_marker(client):
    reserve(client, "open")
    before = dump(client)
    assert reserve(client, window=COST, mark_when_busy="0") == [3, 0, NOW_US, 1, 1, 2]
    assert reserve(client, global_day=COST) == [7, 0, NOW_US, 1, 1, 6]
    assert dump(client) == before
    settle(client, "open", COST)
    assert reserve(client, window=COST, mark_when_busy="0") == [3, 30, NOW_US, WINDOW_ENDS_S, 0, 2]


@pytest.mark.parametrize("limit", REFUSALS)
def test_busy_is_what_the_pending_money_of_its_own_owner_alone_makes_of_it(client, limit):
    number, owner = REFUSALS[limit][1], BY_NAME[limit].owner
    spend(client, nanousd=5)
    reserve(client, "open", cost=7)
    assert reserve(client, cost=10, **{limit: 15})[4:] == [1, number]
    client.delete(MARKER)
    assert reserve(client, cost=11, **{limit: 15})[4:] == [0, number]
    client.delete(MARKER, owner)
    assert reserve(client, cost=10, **{limit: 15})[4:] == [0, number]


def test_where_one_is_busy_and_another_spent_it_is_not_busy(client):
    spend(client, nanousd=5)
    reserve(client, "open", cost=7)
    assert reserve(client, cost=10, network_day=15, global_day=20)[4:] == [1, 4]
    assert reserve(client, cost=10, network_day=15, global_day=14)[4:] == [0, 4]
    assert reserve(client, cost=10, network_day=14, global_day=15)[4:] == [0, 4]


def test_pending_money_counts_as_long_as_it_may_end_in_time(client):
    """Buckets of 10 s, and 120 s to end: those of 10:20:00 are over at 10:22:10."""
    reserve(client, "open")
    over_us = (NOW_S + 130) * US
    assert reserve(client, now_us=over_us - 1, global_day=COST)[4:] == [1, 6]
    assert reserve(client, now_us=over_us, global_day=COST)[4:] == [0, 6]


def test_pending_money_of_yesterday_is_not_in_the_limit_of_today(client):
    now_us = (DAY_S + 5) * US
    client.zadd(OF_ALL, {DAY_S - 10: 100, DAY_S: 5, DAY_S - 20: 1, DAY_S + 10: 2})
    client.set(BOOKS["global_day"], 12, ex=1_000)
    assert reserve(client, now_us=now_us, from_s=0, cost=10, global_day=15)[4:] == [1, 6]
    assert reserve(client, now_us=now_us, from_s=0, cost=10, global_day=14)[4:] == [0, 6]


def test_pending_money_that_may_have_left_a_short_window_makes_it_not_busy(client):
    """Of the pending money, in buckets of 10 s, what was surely made in the last 60 s."""
    rows = six(window_s=60)
    client.zadd(BOOKS["window"], {NOW_S: 12})
    client.zadd(OF_WHO, {NOW_S - 60: 7})
    assert reserve(client, rows=rows, cost=10, window=15)[4:] == [1, 2]
    client.delete(MARKER)
    assert reserve(client, rows=rows, now_us=NOW_US + US, cost=10, window=15)[4:] == [0, 2]


def test_a_refusal_ends_when_enough_has_left_the_window(client):
    for back, nanousd in ((20, 1), (10, 2), (0, 4)):
        client.zadd(BOOKS["window"], {NOW_S - back * BUCKET_S: nanousd})
    for cost, back in ((4, 20), (5, 10), (6, 10), (7, 0)):
        client.delete(MARKER)
        ends_s = max(30, FREES_AT_S - back * BUCKET_S - NOW_S)
        assert reserve(client, cost=cost, window=10) == [3, 30, NOW_US, ends_s, 0, 2]
    # What is over already is not waited for.
    client.delete(MARKER)
    client.zadd(BOOKS["window"], {NOW_S - 630: 100})
    assert reserve(client, cost=7, window=10)[3] == WINDOW_ENDS_S
    client.zrem(BOOKS["window"], NOW_S - 630)
    # What is over a fraction of a second from now is waited for a second.
    client.delete(MARKER)
    unmarked = [row._replace(marker_s=0) for row in SIX]
    assert reserve(client, rows=unmarked, cost=4, window=10) == [3, 0, NOW_US, 30, 0, 2]
    almost_us = (NOW_S + 30) * US - 1
    assert reserve(client, rows=unmarked, cost=4, window=10, now_us=almost_us) == [3, 0, almost_us, 1, 0, 2]


def test_buckets_count_until_their_youngest_has_left(client):
    client.zadd(BOOKS["window"], {NOW_S - 600 - BUCKET_S: 100, NOW_S - 600: 7})
    assert reserve(client, cost=1, window=8, now_us=NOW_S * US)[9] == 8
    assert ring_of(client, BOOKS["window"]) == {NOW_S - 600: 7, NOW_S: 1}
    over_us = (NOW_S + BUCKET_S) * US
    answer = reserve(client, "b", cost=1, window=8, now_us=over_us - 1)
    assert answer[0] == 3
    client.delete(MARKER)
    answer = reserve(client, "b", cost=1, window=8, now_us=over_us)
    assert (answer[9], answer[14]) == (2, FREES_AT_S)
    assert ring_of(client, BOOKS["window"]) == {NOW_S: 1, NOW_S + BUCKET_S: 1}


def test_what_can_never_fit(client):
    spend(client)
    assert reserve(client, global_day=COST - 1) == [7, 0, NOW_US, 1, 0, 6]
    assert reserve(client, window=COST - 1) == [3, 30, NOW_US, 30, 0, 2]
    # What can never fit is nobody else's doing: its marker ends by itself.
    assert client.get(MARKER).decode() == f"window_limit {NOW_US + 30 * US} {NOW_US + 30 * US} spent"


def test_less_than_all_where_that_will_do(client):
    spend(client, nanousd=100)
    room = {"window": 1_100, "network_day": 1_090, "global_hour": 1_080}
    assert reserve(client, cost=1_000, at_least=981, **room)[0] == 6
    answer = reserve(client, cost=1_000, at_least=980, **room)
    assert answer == admitted(1_080, held=980)
    assert client.get(RECORD).decode().startswith("open 980 ")
    assert {client.get(BOOKS[name]) for name in TOTALS} == {b"1080"}
    assert [ring_of(client, BOOKS[name]) for name in WINDOWS] == [{NOW_S: 1_080}] * 2
    assert [ring_of(client, key) for key in PENDING.values()] == [{NOW_S: 980}] * 3


def test_all_of_it_where_that_fits_and_nothing_less_while_it_is_busy(client):
    assert reserve(client, "a", cost=1_000, at_least=1, window=1_000) == admitted(1_000, held=1_000)
    assert reserve(client, "b", cost=1_000, at_least=1, global_day=1_001) == [7, 0, NOW_US, 1, 1, 6]
    # More than the whole limit does not fit when the pending money ends, but the least of it may.
    assert reserve(client, "b", cost=1_002, at_least=1, global_day=1_001) == admitted(1_001, held=1)
    assert reserve(client, "c", cost=1_002, at_least=1, global_day=1_001) == [7, 0, NOW_US, 1, 1, 6]
    assert reserve(client, "c", cost=1_002, at_least=1_002, global_day=1_001) == [7, 0, NOW_US, 1, 0, 6]


def test_what_is_refused_at_the_least_is_waited_for_at_the_least(client):
    for back, nanousd in ((10, 5), (0, 5)):
        client.zadd(BOOKS["window"], {NOW_S - back * BUCKET_S: nanousd})
    assert reserve(client, cost=8, window=10)[3] == WINDOW_ENDS_S
    client.delete(MARKER)
    assert reserve(client, cost=8, at_least=5, window=10)[3] == WINDOW_ENDS_S - 10 * BUCKET_S


def test_an_id_that_has_ended_and_one_for_another_request(client):
    reserve(client)
    assert reserve(client, request_digest=OTHER_DIGEST) == [9, 0, NOW_US]
    settle(client, actual=7)
    assert reserve(client) == [8, 0, NOW_US, 7]
    assert reserve(client, request_digest=OTHER_DIGEST) == [9, 0, NOW_US]


def test_past_the_deadline_nothing_is_written(client):
    assert reserve(client, deadline_us=NOW_US)[0] == 0
    before = dump(client)
    assert reserve(client, "late", deadline_us=NOW_US - 1) == [10, 0, NOW_US]
    assert reserve(client, "late", deadline_us=NOW_US - 1, window=0) == [10, 0, NOW_US]
    assert dump(client) == before


@pytest.mark.parametrize("other_s", [HOUR_S - 1, HOUR_S + 3_600])
def test_with_the_keys_of_other_periods_nothing_is_written(client, other_s):
    now_us = other_s * US
    assert reserve(client, now_us=now_us) == [11, 0, now_us]
    assert reserve(client, now_us=now_us, window=0) == [11, 0, now_us]
    assert client.dbsize() == 0


@pytest.mark.parametrize("now_us", [HOUR_S * US, (HOUR_S + 3_600) * US - 1])
def test_the_first_and_the_last_moment_of_a_period_are_in_it(client, now_us):
    assert reserve(client, now_us=now_us)[0] == 0


def test_by_the_servers_own_time(client):
    before_s, before_part_us = client.time()
    asked = {"now_us": "", "from_s": before_s - 60, "until_s": before_s + 600}
    answer = reserve(client, **asked)
    after_s, after_part_us = client.time()
    assert answer[0] == 0
    assert before_s * US + before_part_us <= answer[2] <= after_s * US + after_part_us
    assert answer[3] == answer[2]
    assert reserve(client, "late", **asked, deadline_us=answer[2] - 1)[0] == 10
    assert reserve(client, "other", **asked | {"until_s": before_s})[0] == 11
    made = {"now_us": "", "made_at_us": answer[3]}
    times_us = [answer[2], extend(client, **made)[2], settle(client, **made)[2]]
    after_s, after_part_us = client.time()
    assert times_us == sorted(times_us)
    assert times_us[-1] <= after_s * US + after_part_us


def test_what_is_kept_and_for_how_long(client):
    reserve(client, key=KEY)
    lives = {name.decode(): client.ttl(name) for name in client.keys("*")}
    assert lives == {
        RECORD: 120 + 3_600,
        key_of(KEY): 86_400,
        **dict.fromkeys((BOOKS[name] for name in WINDOWS), 630),
        **{row.key: row.keep_until_s - NOW_S for row in SIX if not row.window_s},
        **dict.fromkeys(PENDING.values(), 130),
        OF_ALL: 130 + 3_600,
        **dict.fromkeys(RUNNING.values(), BUCKET_S),
    }
    settle(client, key=KEY)
    lives = {name.decode(): client.ttl(name) for name in client.keys("*")}
    assert (lives[RECORD], lives[key_of(KEY)]) == (3_600, 86_400)


def test_a_ttl_is_set_with_a_new_bucket_or_a_first_amount_only(client):
    reserve(client)
    for name in client.keys("*"):
        client.expire(name, 50_000)
    reserve(client, "same buckets")
    assert {client.ttl(key) for key in (*BOOKS.values(), *PENDING.values())} == {50_000}
    later_us = NOW_US + 10 * US
    reserve(client, "new pending buckets", now_us=later_us)
    assert [client.ttl(key) for key in PENDING.values()] == [130, 130, 3_730]
    assert {client.ttl(key) for key in BOOKS.values()} == {50_000}
    later_us = NOW_US + BUCKET_S * US
    reserve(client, "new buckets", now_us=later_us)
    assert {client.ttl(BOOKS[name]) for name in WINDOWS} == {630}
    assert {client.ttl(BOOKS[name]) for name in TOTALS} == {50_000}


def test_a_window_outlasts_its_youngest_bucket(client):
    """Its TTL is that of a shorter window from before; what it came to is not known."""
    reserve(client)
    client.delete(*RUNNING.values())
    client.expire(BOOKS["window"], 600)
    client.expire(BOOKS["network_window"], 700)
    reserve(client, "b", now_us=NOW_US + 5 * US)
    left_ms = 630_000 - 5_250
    assert left_ms - 200 <= client.pttl(BOOKS["window"]) <= left_ms
    assert client.ttl(BOOKS["network_window"]) == 700


def test_pending_money_never_grows_though_nobody_settles(client):
    """What is over is removed with the new bucket that would be the fifteenth, and reported of everybody once."""
    for number in range(14):
        assert reserve(client, f"r{number}", cost=number + 1, now_us=NOW_US + number * 10 * US)[5] == 0
    assert {client.zcard(key) for key in PENDING.values()} == {14}
    client.zadd(OF_WHO, {NOW_S - 10: 500})
    client.zadd(PENDING["of_network"], {NOW_S - 10: 700})
    now_us = NOW_US + 140 * US
    answer = reserve(client, "r14", cost=100, now_us=now_us)
    assert answer[5] == 1 + 2
    assert {tuple(sorted(ring_of(client, key))) for key in PENDING.values()} == {
        tuple(NOW_S + number * 10 for number in range(2, 15))
    }
    assert reserve(client, "r15", cost=100, now_us=now_us)[5] == 0


# --- settle


def test_settled_repeated_late_expired_conflict(client):
    reserve(client)
    assert settle(client, request_digest=OTHER_DIGEST) == [9, 0, LATER_US, 0]
    assert settle(client, actual=7) == [0, 7, LATER_US, 0]
    before = dump(client)
    assert settle(client, actual=8) == [1, 7, LATER_US, 0]
    assert release(client) == [1, 7, LATER_US, 0]
    assert dump(client) == before
    client.flushdb()
    assert settle(client, actual=7) == [2, 7, LATER_US, 0]
    assert settle(client, actual=7) == [1, 7, LATER_US, 0]
    over_us = NOW_US + 3600 * US
    assert settle(client, "lost", now_us=over_us - 1)[0] == 2
    assert settle(client, "over", now_us=over_us) == [3, 0, over_us, 0]


def test_a_record_that_is_still_there_may_be_ended_at_any_time(client):
    reserve(client)
    over_us = NOW_US + 3_700 * US
    assert settle(client, actual=7, now_us=over_us) == [0, 7, over_us, 0]


def test_between_two_buckets_the_one_that_has_begun_counts(client):
    now_s = NOW_S + 17
    made_at_us = now_s * US + 999_999
    assert reserve(client, now_us=made_at_us)[14:] == [FREES_AT_S] * 2
    assert extend(client, now_us=made_at_us, made_at_us=made_at_us)[0] == 0
    assert [ring_of(client, BOOKS[name]) for name in WINDOWS] == [{NOW_S: 2 * COST}] * 2
    assert [ring_of(client, key) for key in PENDING.values()] == [{NOW_S + 10: 2 * COST}] * 3
    reserve(client, "other", cost=5, now_us=made_at_us)
    settle(client, now_us=made_at_us, made_at_us=made_at_us)
    assert [ring_of(client, BOOKS[name]) for name in WINDOWS] == [{NOW_S: 12}] * 2
    assert [ring_of(client, key) for key in PENDING.values()] == [{NOW_S + 10: 5}] * 3
    over_us = FREES_AT_S * US
    settle(client, "lost", now_us=over_us - 1, made_at_us=made_at_us)
    assert ring_of(client, BOOKS["window"]) == {NOW_S: 19}
    settle(client, "lost too", now_us=over_us, made_at_us=made_at_us)
    assert ring_of(client, BOOKS["window"]) == {NOW_S: 19}


@pytest.mark.parametrize("cost", [1, 2])
def test_a_nano_dollar_is_an_amount(client, cost):
    reserve(client, cost=cost)
    reserve(client, "other", cost=1)
    settle(client, actual=0)
    assert [ring_of(client, key) for key in (BOOKS["window"], OF_WHO)] == [{NOW_S: 1}] * 2
    assert client.get(BOOKS["day"]) == b"1"
    settle(client, "other", 1)
    assert not client.exists(OF_WHO)
    client.flushdb()
    settle(client, actual=1)
    assert (client.get(BOOKS["day"]), ring_of(client, BOOKS["window"])) == (b"1", {NOW_S: 1})
    reserve(client, "b", cost=1)
    assert extend(client, "b", 2)[1] == 2
    assert ring_of(client, OF_WHO) == {NOW_S: 2}
    assert client.get("llm:reservation:b").startswith(b"open 2 ")


@pytest.mark.parametrize("actual", [0, 7, COST, COST + 7])
def test_a_settlement_books_what_was_used_in_place_of_what_was_reserved(client, actual):
    spend(client, nanousd=100)
    reserve(client)
    reserve(client, "other", cost=3)
    assert settle(client, actual=actual) == [0, actual, LATER_US, 0]
    assert {client.get(BOOKS[name]) for name in TOTALS} == {b"%d" % (103 + actual)}
    assert [ring_of(client, BOOKS[name]) for name in WINDOWS] == [{NOW_S: 103 + actual}] * 2
    assert [ring_of(client, key) for key in PENDING.values()] == [{NOW_S: 3}] * 3


def test_a_bucket_of_nothing_is_removed_and_a_total_of_nothing_is_not(client):
    client.zadd(BOOKS["window"], {NOW_S - BUCKET_S: 5})
    reserve(client)
    settle(client, actual=0)
    assert ring_of(client, BOOKS["window"]) == {NOW_S - BUCKET_S: 5}
    assert not client.exists(BOOKS["network_window"], *PENDING.values())
    assert {client.get(BOOKS[name]) for name in TOTALS} == {b"0"}


def test_an_end_books_in_the_buckets_of_its_reservation(client):
    reserve(client)
    now_us = NOW_US + 100 * US
    reserve(client, "other", cost=3, now_us=now_us)
    settle(client, actual=7, now_us=now_us)
    assert ring_of(client, BOOKS["window"]) == {NOW_S: 7, NOW_S + 90: 3}
    assert ring_of(client, OF_WHO) == {NOW_S + 100: 3}


@pytest.mark.parametrize("actual", [0, 7, COST + 7])
def test_nothing_goes_below_nothing_and_nothing_that_is_lost_is_made_by_taking_from_it(client, actual):
    reserve(client)
    client.set(BOOKS["day"], COST - 10, keepttl=True)
    client.zadd(BOOKS["window"], {NOW_S: COST - 10})
    client.delete(BOOKS["network_day"], BOOKS["network_window"])
    settle(client, actual=actual)
    left = max(0, actual - 10)
    assert client.get(BOOKS["day"]) == b"%d" % left
    assert ring_of(client, BOOKS["window"]) == ({NOW_S: left} if left else {})
    more = actual - COST
    assert client.get(BOOKS["network_day"]) == (b"%d" % more if more > 0 else None)
    assert ring_of(client, BOOKS["network_window"]) == ({NOW_S: more} if more > 0 else {})


def test_what_a_settlement_makes_anew_has_its_ttl(client):
    client.zadd(BOOKS["window"], {NOW_S - BUCKET_S: 5})
    client.expire(BOOKS["window"], 600)
    client.zadd(BOOKS["network_window"], {NOW_S - BUCKET_S: 5})
    client.expire(BOOKS["network_window"], 1_000)
    settle(client)
    assert {row.name: client.ttl(row.key) for row in SIX} == {
        "window": 630,
        "network_window": 1_000,
        **{row.name: row.keep_until_s - NOW_S - 1 for row in SIX if not row.window_s},
    }


def test_what_there_is_keeps_its_ttl(client):
    reserve(client)
    client.zadd(BOOKS["window"], {NOW_S - BUCKET_S: 5})
    for key in BOOKS.values():
        client.expire(key, 500)
    settle(client, actual=COST + 7)
    assert {client.ttl(key) for key in BOOKS.values()} == {500}


def test_what_has_aged_out_is_not_made_again(client):
    """Each budget until its own end: a bucket when it has left the window, a total when its key may go."""
    for row in SIX:
        client.flushdb()
        over_us = (NOW_S + 630 if row.window_s else row.keep_until_s) * US
        made_at_us = NOW_US if row.window_s else over_us - 60 * US
        settle(client, rows=(row,), now_us=over_us - 1, made_at_us=made_at_us)
        assert client.exists(row.key) == 1
        client.flushdb()
        settle(client, rows=(row,), now_us=over_us, made_at_us=made_at_us)
        assert client.exists(row.key) == 0


def test_released(client):
    reserve(client)
    assert release(client) == [0, 0, LATER_US, 0]
    assert client.get(RECORD).decode() == f"released 0 {NOW_US} {REQUEST_DIGEST} {REST}"
    assert settle(client, actual=7) == [1, 0, LATER_US, 0]


@pytest.mark.parametrize("rows", [SIX, (*SIX, total("t"), for_ever("ever", OF_WHO))], ids=["the six", "more"])
def test_a_record_of_a_version_before_is_said_again_extended_and_ended(client, rows):
    """It has eight more digits of what it stands for, and another word for what is settled."""
    reserve(client, rows=rows)
    rest, more = charged_to(rows), "f" * 8
    client.set(RECORD, f"open {COST} {NOW_US} {REQUEST_DIGEST}{more} {rest}", keepttl=True)
    assert reserve(client, rows=rows)[:8] == [0, 120, NOW_US, NOW_US, COST, 0, b"", rest.encode()]
    other = "0" * 8
    assert reserve(client, rows=rows, request_digest=other)[0] == 9
    assert extend(client, rows=rows, request_digest=other)[0] == 9
    assert settle(client, rows=rows, request_digest=other)[0] == 9
    assert extend(client, rows=rows)[:2] == [0, 2 * COST]
    assert client.get(RECORD).decode() == f"open {2 * COST} {NOW_US} {REQUEST_DIGEST} {rest}"
    client.set(RECORD, f"open {2 * COST} {NOW_US} {REQUEST_DIGEST}{more} {rest}", keepttl=True)
    assert settle(client, rows=rows) == [0, 7, LATER_US, 0]
    assert not client.exists(*PENDING.values())
    client.set(RECORD, f"settled 7 {NOW_US} {REQUEST_DIGEST}{more} {rest}", ex=60)
    assert settle(client, rows=rows, actual=9) == [1, 7, LATER_US, 0]
    assert reserve(client, rows=rows) == [8, 0, NOW_US, 7]
    assert extend(client, rows=rows) == [8, 7, LATER_US]


def test_expired_money_is_told(client):
    reserve(client, "left")
    reserve(client, "mine", cost=5)
    over_us = (NOW_S + 130) * US
    assert settle(client, "mine", actual=5, now_us=over_us) == [0, 5, over_us, COST]
    assert not client.exists(*PENDING.values())
    assert settle(client, "left", actual=5, now_us=over_us) == [0, 5, over_us, 0]


def test_what_has_expired_is_never_less_than_nothing(client):
    reserve(client)
    client.zadd(OF_ALL, {NOW_S: 1})
    over_us = (NOW_S + 130) * US
    assert settle(client, now_us=over_us) == [0, 7, over_us, 0]
    assert not client.exists(OF_ALL)


def test_all_that_has_expired_is_told_together(client):
    for number in range(3):
        reserve(client, f"left{number}", cost=10 + number, now_us=NOW_US + number * 10 * US)
    over_us = (NOW_S + 150) * US
    assert settle(client, "left1", actual=5, made_at_us=NOW_US + 10 * US, now_us=over_us) == [0, 5, over_us, 10 + 12]
    assert not client.exists(*PENDING.values())


def test_pending_money_is_over_to_the_microsecond(client):
    reserve(client, "left")
    now_us = NOW_US + 30 * US
    reserve(client, "mine", cost=5, now_us=now_us)
    over_us = (NOW_S + 130) * US
    made = {"made_at_us": now_us, "actual": 5}
    assert settle(client, "mine", **made, now_us=over_us - 1)[3] == 0
    assert ring_of(client, OF_ALL) == {NOW_S: COST}
    assert settle(client, "lost", **made, now_us=over_us) == [2, 5, over_us, COST]


def test_a_late_end_takes_nothing_from_what_others_hold(client):
    reserve(client, "other", cost=3)
    assert settle(client) == [2, 7, LATER_US, 0]
    assert [ring_of(client, key) for key in PENDING.values()] == [{NOW_S: 3}] * 3
    assert {client.get(BOOKS[name]) for name in TOTALS} == {b"10"}


# --- extend


def test_extended(client):
    spend(client)
    reserve(client)
    assert extend(client, to=3 * COST) == [0, 3 * COST, LATER_US, *[4 * COST] * 6]
    before = dump(client)
    assert extend(client, to=3 * COST) == [0, 3 * COST, LATER_US, *[4 * COST] * 6]
    assert extend(client, to=1) == [0, 3 * COST, LATER_US, *[4 * COST] * 6]
    assert dump(client) == before
    assert {client.get(BOOKS[name]) for name in TOTALS} == {b"%d" % (4 * COST)}
    assert [ring_of(client, BOOKS[name]) for name in WINDOWS] == [{NOW_S: 4 * COST}] * 2
    assert [ring_of(client, key) for key in PENDING.values()] == [{NOW_S: 3 * COST}] * 3


def test_an_extension_that_adds_nothing_makes_nothing(client):
    reserve(client)
    client.delete(*BOOKS.values(), *PENDING.values())
    before = dump(client)
    assert extend(client, to=COST) == [0, COST, LATER_US, *[0] * 6]
    assert dump(client) == before


def test_an_extension_tells_what_each_budget_has_itself(client):
    reserve(client, cost=1)
    for number, row in enumerate(SIX, 1):
        client.zadd(row.key, {NOW_S - number * BUCKET_S: number}) if row.window_s else client.incrby(row.key, number)
    assert extend(client, to=11)[3:] == [11 + number for number in range(1, 7)]


@pytest.mark.parametrize("limit", REFUSALS)
def test_an_extension_refused_or_granted_in_part(client, limit):
    status, number, *_ = REFUSALS[limit]
    reserve(client)
    before = dump(client)
    assert extend(client, **{limit: 2 * COST - 1}) == [status, COST, LATER_US, number]
    assert extend(client, at_least=COST + 7, **{limit: COST + 6}) == [status, COST, LATER_US, number]
    assert extend(client, at_least=COST, **{limit: 1}) == [0, COST, LATER_US, *[COST] * 6]
    assert dump(client) == before
    assert extend(client, at_least=COST + 6, **{limit: COST + 6}) == [0, COST + 6, LATER_US, *[COST + 6] * 6]
    assert extend(client, **{limit: 2 * COST}) == [0, 2 * COST, LATER_US, *[2 * COST] * 6]


def test_the_first_that_fails_refuses_an_extension(client):
    reserve(client)
    assert extend(client, network_window=COST + 5, global_hour=COST) == [4, COST, LATER_US, 3]
    assert extend(client, at_least=COST + 1, network_window=COST + 5, global_hour=COST) == [6, COST, LATER_US, 5]


def test_without_a_limit_there_is_always_room(client):
    none = dict.fromkeys(BOOKS, "")
    assert reserve(client, cost=10**13, **none)[0] == 0
    assert extend(client, to=10**14, **none)[:2] == [0, 10**14]
    assert reserve(client, "b", **none | {"global_day": 0})[0] == 7


def test_the_worked_example_of_an_extension(client):
    reserve(client, cost=1_000)
    spend(client)
    answer = extend(client, to=1_500, at_least=1_100, window=COST + 1_300)
    assert answer == [0, 1_300, LATER_US, *[COST + 1_300] * 6]
    assert client.get(RECORD).decode() == f"open 1300 {NOW_US} {REQUEST_DIGEST} {REST}"


def test_no_extension_of_what_is_over_unknown_or_another_request(client):
    assert extend(client) == [8, 0, LATER_US]
    reserve(client)
    assert extend(client, request_digest=OTHER_DIGEST) == [9, 0, LATER_US]
    over_us = NOW_US + 120 * US
    assert extend(client, now_us=over_us) == [8, COST, over_us]
    assert extend(client, now_us=over_us - 1)[:2] == [0, 2 * COST]
    settle(client, actual=7)
    before = dump(client)
    assert extend(client) == [8, 7, LATER_US]
    assert dump(client) == before


def test_no_extension_of_what_has_left_the_shortest_window(client):
    rows = [row._replace(window_s=60) if row.name == "network_window" else row for row in SIX]
    reserve(client, rows=rows)
    over_us = (NOW_S + 63) * US
    assert extend(client, rows=rows, now_us=over_us) == [8, COST, over_us]
    assert extend(client, rows=rows, now_us=over_us - 1)[0] == 0


def test_an_extension_goes_to_the_buckets_of_its_reservation_and_counts_what_counts_now(client):
    client.zadd(BOOKS["window"], {NOW_S - 600: 5, NOW_S - 570: 7})
    reserve(client)
    now_us = (NOW_S + 30) * US
    assert extend(client, now_us=now_us - 1)[4] == 2 * COST + 12
    assert extend(client, to=3 * COST, now_us=now_us)[4] == 3 * COST + 7
    assert ring_of(client, BOOKS["window"])[NOW_S] == 3 * COST
    assert ring_of(client, OF_WHO) == {NOW_S: 3 * COST}


def test_an_extension_makes_what_was_lost_again_with_its_ttl(client):
    reserve(client)
    client.delete(*BOOKS.values(), *PENDING.values())
    client.zadd(BOOKS["network_window"], {NOW_S - BUCKET_S: 5})
    client.expire(BOOKS["network_window"], 600)
    client.zadd(OF_WHO, {NOW_S - 10: 5})
    client.expire(OF_WHO, 1_000)
    extend(client)
    assert {row.name: client.ttl(row.key) for row in SIX} == {
        **dict.fromkeys(WINDOWS, 630),
        **{row.name: row.keep_until_s - NOW_S - 1 for row in SIX if not row.window_s},
    }
    assert [client.ttl(key) for key in PENDING.values()] == [1_000, 130, 3_730]


def test_no_extension_prolongs_a_ttl(client):
    reserve(client, key=KEY)
    for name in client.keys("*"):
        client.expire(name, 50)
    extend(client, key=KEY)
    assert {client.ttl(name) for name in client.keys("*")} == {50}


def test_past_the_deadline_nothing_is_extended(client):
    reserve(client)
    before = dump(client)
    assert extend(client, deadline_us=LATER_US - 1) == [10, 0, LATER_US]
    assert dump(client) == before
    assert extend(client, deadline_us=LATER_US)[0] == 0


# --- a caller's key


def test_a_callers_key(client):
    reserve(client, "first", key=KEY)
    until_us = NOW_US + 120 * US
    assert client.get(key_of(KEY)).decode() == f"open {BODY} first {COST} {until_us}"
    assert reserve(client, key=KEY) == [12, 0, NOW_US, 1, COST, 1, b"first"]
    assert reserve(client, "first", key=KEY)[0] == 0
    extend(client, "first", to=2 * COST, key=KEY)
    assert client.get(key_of(KEY)).decode() == f"open {BODY} first {2 * COST} {until_us}"
    for now_us, code in ((until_us, 3), (until_us - 1, 1)):
        assert reserve(client, key=KEY, now_us=now_us) == [12, 0, now_us, code, 2 * COST, 1, b"first"]
    client.set(key_of(KEY), client.get(key_of(KEY)).replace(BODY.encode(), b"0" * 16), keepttl=True)
    assert reserve(client, key=KEY) == [12, 0, NOW_US, 1, 2 * COST, 0, b"first"]
    settle(client, "first", actual=7, key=KEY)
    assert client.get(key_of(KEY)).decode() == f"settled {BODY} first 7 {LATER_US}"
    assert reserve(client, key=KEY) == [12, 0, NOW_US, 2, 7, 1, b"first"]


def test_a_callers_key_comes_before_a_marker_and_every_limit(client):
    reserve(client, "first", key=KEY)
    client.set(MARKER, "by hand", ex=100)
    before = dump(client)
    assert reserve(client, key=KEY, window=0)[0] == 12
    assert dump(client) == before


def test_a_callers_key_is_free_after_a_release_and_a_refusal(client):
    reserve(client, "refused", key=KEY, global_day=0)
    reserve(client, "first", key=KEY)
    release(client, "first", key=KEY)
    assert not client.exists(key_of(KEY))
    assert reserve(client, key=KEY)[0] == 0


@pytest.mark.parametrize("text", [f"open {BODY} other 5 {NOW_US}", f"settled {BODY} other 5 {NOW_US}", "by hand"])
def test_the_key_of_another_request_is_left_alone(client, text):
    for name, call in {"extended": extend, "settled": settle, "released": release, "late": settle}.items():
        client.flushdb()
        if name != "late":
            reserve(client, key=KEY)
        client.set(key_of(KEY), text, ex=50)
        call(client, key=KEY)
        assert (client.get(key_of(KEY)).decode(), client.ttl(key_of(KEY))) == (text, 50), name


def test_a_key_that_was_lost_is_written_by_a_settlement_only(client):
    for call, is_there in {extend: 0, release: 0, settle: 1}.items():
        client.flushdb()
        reserve(client, key=KEY)
        client.delete(key_of(KEY))
        call(client, key=KEY)
        assert client.exists(key_of(KEY)) == is_there


def test_a_key_that_has_ended_is_not_opened_by_an_extension(client):
    reserve(client, key=KEY)
    text = f"settled {BODY} {ID} 5 {NOW_US}"
    client.set(key_of(KEY), text, ex=50)
    extend(client, key=KEY)
    assert client.get(key_of(KEY)).decode() == text


def test_what_stands_for_a_key_set_by_hand(client):
    client.set(key_of(KEY), "by hand", ex=50)
    assert reserve(client, key=KEY) == [12, 0, NOW_US, 1, 0, 0, b""]


# --- amounts


def test_amounts_of_sixteen_digits_are_written_whole(client):
    most = 2**53 - 1
    room = dict.fromkeys(BOOKS, most)
    first, more = 1_234_567_890_123_457, 6_543_210_987_654_321
    reserve(client, cost=first, key=KEY, **room)
    assert client.get(key_of(KEY)).split()[3] == b"%d" % first
    assert reserve(client, **room) == admitted(first, held=first, known=REST.encode())
    assert extend(client, to=more, key=KEY, **room) == [0, more, LATER_US, *[more] * 6]
    assert client.get(key_of(KEY)).split()[3] == b"%d" % more
    assert {client.get(BOOKS[name]) for name in TOTALS} == {b"%d" % more}
    assert [ring_of(client, BOOKS[name]) for name in WINDOWS] == [{NOW_S: more}] * 2
    assert client.get(RECORD).decode() == f"open {more} {NOW_US} {REQUEST_DIGEST} {REST}"
    assert extend(client, to=most + 1, **room)[0] == 2
    assert settle(client, actual=first) == [0, first, LATER_US, 0]
    assert {client.get(BOOKS[name]) for name in TOTALS} == {b"%d" % first}
    assert [ring_of(client, BOOKS[name]) for name in WINDOWS] == [{NOW_S: first}] * 2
    left = most - first
    assert reserve(client, "rest", cost=most, at_least=1, **room)[4] == left
    assert client.get("llm:reservation:rest").decode().startswith(f"open {left} ")
    assert {client.get(BOOKS[name]) for name in TOTALS} == {b"%d" % most}
    assert [ring_of(client, BOOKS[name]) for name in WINDOWS] == [{NOW_S: most}] * 2
    assert reserve(client, "one more", cost=1, **room)[0] == 2


# --- books that were cleared


def test_what_was_cleared_is_not_taken_from_the_identifier(client):
    reserve(client)
    client.set(RESET, NOW_US, ex=1_000)
    told = [COST, COST, *[COST + 5] * 4]
    assert extend(client, to=COST + 5, window=1, day=1) == [0, COST + 5, LATER_US, *told]
    assert ring_of(client, OF_WHO) == {NOW_S: COST}
    settle(client, actual=7)
    assert client.get(BOOKS["day"]) == b"%d" % COST
    assert ring_of(client, BOOKS["window"]) == {NOW_S: COST}
    assert ring_of(client, OF_WHO) == {NOW_S: COST}
    assert client.get(BOOKS["network_day"]) == b"7"
    assert not client.exists(PENDING["of_network"], OF_ALL)


def test_what_was_cleared_may_be_extended_in_part_as_the_others_allow(client):
    reserve(client)
    client.set(RESET, NOW_US, ex=1_000)
    assert extend(client, at_least=COST + 1, day=1, global_day=COST + 3)[1] == COST + 3


@pytest.mark.parametrize("reset", [NOW_US - 1, "", "abc"])
def test_a_reset_before_the_reservation_or_one_that_is_no_time_clears_nothing(client, reset):
    reserve(client)
    client.set(RESET, reset, ex=1_000)
    assert extend(client, day=1)[0] == 2
    settle(client, actual=7)
    assert client.get(BOOKS["day"]) == b"7"
    assert not client.exists(OF_WHO)


# --- challenges


def test_a_challenge_is_good_once_and_for_its_owner_only(client):
    client.set("llm:challenge:c", "hash net", ex=300)
    assert CONSUME.run(client, ["llm:challenge:c"], ["hash other"]) == [2]
    assert client.ttl("llm:challenge:c") > 290
    assert CONSUME.run(client, ["llm:challenge:c"], ["hash net"]) == [0]
    assert CONSUME.run(client, ["llm:challenge:c"], ["hash net"]) == [1]


# --- texts


def test_the_record_and_the_marker_are_written_as_the_head_of_the_script_says(client):
    reserve(client)
    assert client.get(RECORD).decode() == f"open {COST} {NOW_US} {REQUEST_DIGEST} {REST}"
    settle(client, actual=COST)
    assert client.get(RECORD).decode() == f"paid {COST} {NOW_US} {REQUEST_DIGEST} {REST}"
    reserve(client, "r2", window=COST)
    marker = client.get(MARKER).decode()
    assert marker == f"window_limit {NOW_US + 30 * US} {NOW_US + WINDOW_ENDS_S * US} spent"
