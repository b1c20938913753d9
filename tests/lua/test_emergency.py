"""Emergency spend is booked into everybody's hour and day: by the head of its script."""

import itertools

import pytest
import redis

from tests.lua.by_hand import BOOK, BOOKS, DAY_S, HOUR, HOUR_S, LATER_US, US, dump, spend

INSTANCE = "0123456789abcdef"
RECORD = f"llm:emergency:{INSTANCE}:{HOUR}"
HOUR_KEY, DAY_KEY = BOOKS["global_hour"], BOOKS["global_day"]
HOUR_KEEP_S, DAY_KEEP_S = HOUR_S + 3 * 3_600, DAY_S + 2 * 86_400


def book(client, edition, nanousd, now_us=LATER_US, began_s=HOUR_S):
    words = [now_us, edition, nanousd, began_s * US, HOUR_KEEP_S, DAY_KEEP_S]
    return BOOK.run(client, [RECORD, HOUR_KEY, DAY_KEY], words)


def held(client):
    return [int(client.get(key) or 0) for key in (HOUR_KEY, DAY_KEY)]


def test_the_worked_example_of_emergency_spend(client):
    assert book(client, 1, 4_050_000) == [0, 4_050_000, LATER_US]
    assert held(client) == [4_050_000, 4_050_000]
    assert book(client, 2, 3_037_500) == [0, -1_012_500, LATER_US]
    for edition in (2, 1):
        assert book(client, edition, 4_050_000) == [1, 0, LATER_US]
    assert held(client) == [3_037_500, 3_037_500]
    assert client.get(RECORD) == b"settled 3037500 %d 2 0 0 - -" % (HOUR_S * US)


def test_it_is_added_to_what_reservations_have_booked(client):
    spend(client, nanousd=100)
    ttls = [client.ttl(HOUR_KEY), client.ttl(DAY_KEY)]
    book(client, 1, 7)
    assert held(client) == [107, 107]
    assert [client.ttl(HOUR_KEY), client.ttl(DAY_KEY)] == ttls


def test_each_key_of_emergency_spend_has_the_ttl_of_its_total(client):
    book(client, 1, 7)
    now_s = LATER_US // US
    assert client.ttl(HOUR_KEY) == HOUR_KEEP_S - now_s
    assert client.ttl(DAY_KEY) == client.ttl(RECORD) == DAY_KEEP_S - now_s


@pytest.mark.parametrize("order", [*itertools.permutations((1, 2, 3)), (1, 1, 2, 3, 3, 2), (3, 3)])
def test_whatever_comes_in_whatever_order_the_latest_edition_is_booked_once(client, order):
    spend(client, nanousd=100)
    changes = [book(client, edition, {1: 50, 2: 90, 3: 70}[edition])[1] for edition in order]
    assert held(client) == [170, 170]
    assert sum(changes) == 70


@pytest.mark.parametrize(
    ("now_s", "booked"),
    [(HOUR_KEEP_S - 1, [7, 7]), (HOUR_KEEP_S, [0, 7]), (DAY_KEEP_S - 1, [0, 7]), (DAY_KEEP_S, [0, 0])],
)
def test_a_total_that_has_aged_out_is_not_made_again(client, now_s, booked):
    status, change, _ = book(client, 1, 7, now_us=now_s * US)
    assert held(client) == booked
    assert (status, change, client.exists(RECORD)) == ((0, 7, 1) if any(booked) else (2, 0, 0))


def test_a_total_that_has_outlived_its_time_is_left_alone(client):
    client.set(HOUR_KEY, 5)
    book(client, 1, 7, now_us=HOUR_KEEP_S * US)
    assert held(client) == [5, 7]


@pytest.mark.parametrize(("ahead_s", "status"), [(86_400, 0), (86_401, 2)])
def test_an_hour_that_comes_only_tomorrow_is_left_alone(client, ahead_s, status):
    assert book(client, 1, 7, now_us=(HOUR_S - ahead_s) * US)[0] == status


def test_emergency_spend_takes_no_total_below_zero(client):
    book(client, 1, 50)
    client.set(HOUR_KEY, 10)
    book(client, 2, 20)
    assert held(client) == [0, 20]


def test_emergency_spend_of_sixteen_digits_is_booked_whole(client):
    most = 2**53 - 1
    assert book(client, 1, most)[:2] == [0, most]
    assert held(client) == [most, most]


def test_by_the_servers_own_time_an_hour_of_long_ago_is_over(client):
    assert book(client, 1, 7, now_us="")[0] == 2


@pytest.mark.parametrize("key", [HOUR_KEY, DAY_KEY, RECORD])
@pytest.mark.parametrize("value", ["abc", "-5", "12345678901234567", ["of another kind"]])
def test_emergency_spend_on_a_key_of_another_kind_changes_nothing(client, key, value):
    if key == RECORD and isinstance(value, str):
        return  # Taken for the record of nothing.
    client.rpush(key, *value) if isinstance(value, list) else client.set(key, value)
    before = dump(client)
    with pytest.raises(redis.ResponseError) as caught:
        book(client, 1, 7)
    assert dump(client) == before
    assert INSTANCE not in str(caught.value)
