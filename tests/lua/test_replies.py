import pytest

from tests.lua.by_hand import (
    BODY,
    BUCKET_S,
    CONSUME,
    COST,
    KEY,
    NETWORK_DIGEST,
    NOW_S,
    NOW_US,
    REQUEST_DIGEST,
    RESERVE_KEYS,
    RESET,
    US,
    WHO_DIGEST,
    dump,
    extend,
    key_of,
    reserve,
    settle,
)

TO_NEXT_HOUR_S, TO_MIDNIGHT_S = 40 * 60, 13 * 3600 + 40 * 60
WINDOW_ENDS_S = 600 + BUCKET_S
REST = f"600 120 {WHO_DIGEST} {NETWORK_DIGEST}"
FREES_AT_S = NOW_S - NOW_S % BUCKET_S + BUCKET_S + 600


def spend(client, rid="spent"):
    reserve(client, rid)
    settle(client, rid, COST)


def test_admitted(client):
    spend(client)
    assert reserve(client) == [0, 120, NOW_US, NOW_US, 2 * COST, 2 * COST, FREES_AT_S, COST, 0, 600]


def test_the_same_id_again_is_told_when_it_was_made(client):
    reserve(client)
    later_us = NOW_US + 3 * US
    answer = reserve(client, now_us=later_us, deadline_us=later_us)
    assert answer == [0, 120, later_us, NOW_US, COST, COST, FREES_AT_S, COST, 0, 600]


@pytest.mark.parametrize(
    ("limit", "reply"),
    [
        ("day", [2, 60, NOW_US, TO_MIDNIGHT_S, 0, 2]),
        ("window", [3, 30, NOW_US, WINDOW_ENDS_S, 0, 3]),
        ("network_window", [4, WINDOW_ENDS_S, NOW_US, WINDOW_ENDS_S, 0, 4]),
        ("network_day", [5, TO_MIDNIGHT_S, NOW_US, TO_MIDNIGHT_S, 0, 5]),
        ("hour_of_all", [6, TO_NEXT_HOUR_S, NOW_US, TO_NEXT_HOUR_S, 0, 6]),
        ("day_of_all", [7, TO_MIDNIGHT_S, NOW_US, TO_MIDNIGHT_S, 0, 7]),
    ],
)
def test_refused(client, limit, reply):
    spend(client)
    assert reserve(client, **{limit: COST}) == reply


@pytest.mark.parametrize("status", [2, 3])
def test_under_a_marker(client, status):
    spend(client)
    limit, marker_s, wait_s = {2: ("day", 60, TO_MIDNIGHT_S), 3: ("window", 30, WINDOW_ENDS_S)}[status]
    reserve(client, **{limit: COST})
    later_us = NOW_US + 10 * US
    answer = reserve(client, now_us=later_us, deadline_us=later_us)
    assert answer == [1, marker_s - 10, later_us, wait_s - 10, 0, status]


def test_busy(client):
    reserve(client, "open")
    assert reserve(client, window=COST) == [3, 30, NOW_US, 30, 1, 3]
    assert reserve(client, window=COST) == [1, 30, NOW_US, 30, 1, 3]


def test_busy_without_a_marker(client):
    reserve(client, "open")
    assert reserve(client, window=COST, mark_when_busy="0") == [3, 0, NOW_US, 1, 1, 3]
    assert not client.exists(RESERVE_KEYS["marker"])


def test_an_id_that_has_ended_and_one_for_another_request(client):
    reserve(client)
    assert reserve(client, request_digest="0123456789abcdef") == [9, 0, NOW_US]
    settle(client, actual=7)
    assert reserve(client) == [8, 0, NOW_US, 7]


def test_past_the_deadline_nothing_is_written(client):
    assert reserve(client, deadline_us=NOW_US)[0] == 0
    before = dump(client)
    assert reserve(client, "late", deadline_us=NOW_US - 1) == [10, 0, NOW_US]
    assert reserve(client, "late", deadline_us=NOW_US - 1, window=0) == [10, 0, NOW_US]
    assert dump(client) == before


@pytest.mark.parametrize("other", [-1, 1])
def test_with_the_keys_of_another_hour_nothing_is_written(client, other):
    assert reserve(client, hour=NOW_S // 3600 + other) == [11, 0, NOW_US]
    assert reserve(client, hour=NOW_S // 3600 + other, window=0) == [11, 0, NOW_US]
    assert client.dbsize() == 0


def test_by_the_servers_own_time(client):
    before_s, before_part_us = client.time()
    hour = before_s // 3600
    answer = reserve(client, now_us="", deadline_us=2**52, hour=hour)
    if answer[0] == 11:  # the hour has just turned
        answer = reserve(client, now_us="", deadline_us=2**52, hour=hour + 1)
    after_s, after_part_us = client.time()
    assert answer[0] == 0
    assert before_s * US + before_part_us <= answer[2] <= after_s * US + after_part_us
    assert answer[3] == answer[2]


def test_settled_repeated_late_expired_conflict(client):
    later_us = NOW_US + US
    reserve(client)
    assert settle(client, request_digest="0123456789abcdef") == [9, 0, later_us, 0]
    assert settle(client, actual=7) == [0, 7, later_us, 0]
    assert settle(client, actual=8) == [1, 7, later_us, 0]
    client.flushdb()
    assert settle(client, actual=7) == [2, 7, later_us, 0]
    assert settle(client, actual=7) == [1, 7, later_us, 0]
    over_us = NOW_US + 3600 * US
    assert settle(client, "lost", now_us=over_us - 1)[0] == 2
    assert settle(client, "over", now_us=over_us) == [3, 0, over_us, 0]


def test_extended(client):
    spend(client)
    reserve(client)
    later_us = NOW_US + US
    assert extend(client, to=3 * COST) == [0, 3 * COST, later_us, 4 * COST, 4 * COST]
    before = dump(client)
    assert extend(client, to=3 * COST) == [0, 3 * COST, later_us, 4 * COST, 4 * COST]
    assert extend(client, to=1) == [0, 3 * COST, later_us, 4 * COST, 4 * COST]
    assert dump(client) == before


@pytest.mark.parametrize(
    ("limit", "status"),
    [
        ("day", 2),
        ("window", 3),
        ("network_window", 4),
        ("network_day", 5),
        ("hour_of_all", 6),
        ("day_of_all", 7),
    ],
)
def test_an_extension_refused_or_granted_in_part(client, limit, status):
    reserve(client)
    before = dump(client)
    later_us = NOW_US + US
    assert extend(client, **{limit: 2 * COST - 1}) == [status, COST, later_us, COST, COST]
    assert extend(client, at_least=COST + 7, **{limit: COST + 6}) == [status, COST, later_us, COST, COST]
    assert extend(client, at_least=COST, **{limit: 1}) == [0, COST, later_us, COST, COST]
    assert dump(client) == before
    assert extend(client, at_least=COST + 6, **{limit: COST + 6}) == [0, COST + 6, later_us, COST + 6, COST + 6]
    assert extend(client, **{limit: 2 * COST}) == [0, 2 * COST, later_us, 2 * COST, 2 * COST]


def test_the_worked_example_of_an_extension(client):
    reserve(client, cost=1_000)
    spend(client)
    answer = extend(client, to=1_500, at_least=1_100, window=COST + 1_300)
    assert answer == [0, 1_300, NOW_US + US, COST + 1_300, COST + 1_300]


def test_no_extension_of_what_is_over_unknown_or_another_request(client):
    later_us = NOW_US + US
    assert extend(client) == [8, 0, later_us]
    reserve(client)
    assert extend(client, request_digest="0123456789abcdef") == [9, 0, later_us]
    over_us = NOW_US + 120 * US
    assert extend(client, now_us=over_us, deadline_us=over_us) == [8, COST, over_us]
    settle(client, actual=7)
    before = dump(client)
    assert extend(client) == [8, 7, later_us]
    assert dump(client) == before


def test_past_the_deadline_nothing_is_extended(client):
    reserve(client)
    before = dump(client)
    assert extend(client, deadline_us=NOW_US + US - 1) == [10, 0, NOW_US + US]
    assert dump(client) == before
    assert extend(client, deadline_us=NOW_US + US)[0] == 0


def test_released(client):
    reserve(client)
    assert settle(client, actual=0, ending="released") == [0, 0, NOW_US + US, 0]
    assert client.get(RESERVE_KEYS["record"]).decode() == f"released 0 {NOW_US} {REQUEST_DIGEST} {REST}"
    assert settle(client, actual=7) == [1, 0, NOW_US + US, 0]


def test_a_callers_key(client):
    reserve(client, "first", key=KEY)
    until_us = NOW_US + 120 * US
    assert client.get(key_of(KEY)).decode() == f"open {BODY} first {COST} {until_us}"
    assert reserve(client, key=KEY) == [12, 0, NOW_US, 1, COST, 1, b"first"]
    assert reserve(client, "first", key=KEY)[0] == 0
    extend(client, "first", to=2 * COST, key=KEY)
    assert client.get(key_of(KEY)).decode() == f"open {BODY} first {2 * COST} {until_us}"
    assert reserve(client, key=KEY, now_us=until_us, deadline_us=until_us) == [
        12,
        0,
        until_us,
        3,
        2 * COST,
        1,
        b"first",
    ]
    client.set(key_of(KEY), client.get(key_of(KEY)).replace(BODY.encode(), b"0" * 16), keepttl=True)
    assert reserve(client, key=KEY) == [12, 0, NOW_US, 1, 2 * COST, 0, b"first"]
    settle(client, "first", actual=7, key=KEY)
    assert client.get(key_of(KEY)).decode() == f"settled {BODY} first 7 {NOW_US + US}"
    assert reserve(client, key=KEY) == [12, 0, NOW_US, 2, 7, 1, b"first"]


def test_a_callers_key_is_free_after_a_release(client):
    reserve(client, "first", key=KEY)
    settle(client, "first", actual=0, ending="released", key=KEY)
    assert not client.exists(key_of(KEY))
    assert reserve(client, key=KEY)[0] == 0


def test_expired_money_is_told(client):
    reserve(client, "left")
    reserve(client, "mine", cost=5)
    over_us = NOW_US + 131 * US
    assert settle(client, "mine", actual=5, now_us=over_us) == [0, 5, over_us, COST]
    assert settle(client, "left", actual=5, now_us=over_us) == [0, 5, over_us, 0]


def test_amounts_of_sixteen_digits_are_written_whole(client):
    most = 2**53 - 1
    room = dict.fromkeys(("window", "day", "network_window", "network_day", "hour_of_all", "day_of_all"), most)
    first, more = 1_234_567_890_123_457, 6_543_210_987_654_321
    reserve(client, cost=first, **room)
    assert extend(client, to=more, **room) == [0, more, NOW_US + US, more, more]
    assert client.get(RESERVE_KEYS["daily"]) == str(more).encode()
    assert client.zrange(RESERVE_KEYS["recent"], 0, -1, withscores=True)[0][1] == more
    assert client.get(RESERVE_KEYS["record"]).decode() == f"open {more} {NOW_US} {REQUEST_DIGEST} {REST}"
    assert extend(client, to=most + 1, **room)[0] == 2
    assert settle(client, actual=first) == [0, first, NOW_US + US, 0]
    assert client.get(RESERVE_KEYS["global_daily"]) == str(first).encode()
    assert client.zrange(RESERVE_KEYS["network_recent"], 0, -1, withscores=True)[0][1] == first


def test_what_was_cleared_is_not_taken_from_the_identifier(client):
    reserve(client)
    client.set(RESET, NOW_US, ex=1_000)
    assert extend(client, to=COST + 5, window=1, day=1) == [0, COST + 5, NOW_US + US, COST, COST]
    settle(client, actual=7)
    assert client.get(RESERVE_KEYS["daily"]) == str(COST).encode()
    assert client.get(RESERVE_KEYS["network_daily"]) == b"7"


def test_a_challenge_is_good_once_and_for_its_owner_only(client):
    client.set("llm:challenge:c", "hash net", ex=300)
    assert CONSUME.run(client, ["llm:challenge:c"], ["hash other"]) == [2]
    assert client.ttl("llm:challenge:c") > 290
    assert CONSUME.run(client, ["llm:challenge:c"], ["hash net"]) == [0]
    assert CONSUME.run(client, ["llm:challenge:c"], ["hash net"]) == [1]


def test_the_record_is_written_as_the_head_of_the_script_says(client):
    reserve(client)
    assert client.get(RESERVE_KEYS["record"]).decode() == f"open {COST} {NOW_US} {REQUEST_DIGEST} {REST}"
    settle(client, actual=COST)
    assert client.get(RESERVE_KEYS["record"]).decode() == f"settled {COST} {NOW_US} {REQUEST_DIGEST} {REST}"
    reserve(client, "r2", window=COST)
    marker = client.get(RESERVE_KEYS["marker"]).decode()
    assert marker == f"window_limit {NOW_US + 30 * US} {NOW_US + WINDOW_ENDS_S * US} spent"
    client.delete(RESERVE_KEYS["marker"])
    reserve(client, "r3", window=COST - 1)
    marker = client.get(RESERVE_KEYS["marker"]).decode()
    # What can never fit is nobody else's doing: its marker ends by itself.
    assert marker == f"window_limit {NOW_US + 30 * US} {NOW_US + 30 * US} spent"
