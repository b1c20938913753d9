"""A key of another kind, or garbage in it, is an error before anything is written; so is a server without writes."""

import pytest
import redis

from tests.lua.by_hand import (
    BUCKET_KINDS,
    CONSUME,
    COST,
    KEY,
    RESERVE_KEYS,
    RESET,
    TOTALS,
    dump,
    extend,
    key_of,
    reserve,
    settle,
)

GARBAGE = [b"", b"abc", b"-5", b"1.5", b"1e9", b" 5", b"9223372036854775807", b"\xff"]


def put_other_kind(client, name):
    client.delete(RESERVE_KEYS[name])
    client.rpush(RESERVE_KEYS[name], "of another kind")


def of_another_kind(client, key):
    client.delete(key)
    client.rpush(key, "of another kind")


def assert_nothing_changes(client, call):
    before = dump(client)
    lives = {name: client.pexpiretime(name) for name in before} if has_pexpiretime(client) else {}
    with pytest.raises(redis.ResponseError):
        call()
    assert dump(client) == before
    assert lives == {name: client.pexpiretime(name) for name in lives}


def has_pexpiretime(client):
    return int(client.info("server")["redis_version"].split(".")[0]) >= 7


@pytest.mark.parametrize("comes_first", [False, True])
@pytest.mark.parametrize("limit", [10**12, 0], ids=["admitted", "refused"])
@pytest.mark.parametrize("name", RESERVE_KEYS)
def test_reserve_with_a_key_of_another_kind(client, name, limit, comes_first):
    if not comes_first:
        reserve(client, "before")
    put_other_kind(client, name)
    for of in ("day", "window", "network_window", "network_day", "hour_of_all", "day_of_all"):
        assert_nothing_changes(client, lambda of=of: reserve(client, **{of: limit}))


@pytest.mark.parametrize("actual", [0, 7, 10**9])
@pytest.mark.parametrize("name", [name for name in RESERVE_KEYS if name != "marker"])
def test_settle_with_a_key_of_another_kind(client, name, actual):
    reserve(client, "before")
    reserve(client)
    put_other_kind(client, name)
    assert_nothing_changes(client, lambda: settle(client, actual=actual))


@pytest.mark.parametrize("actual", [0, 10**9])
@pytest.mark.parametrize("name", [name for name in RESERVE_KEYS if name not in ("marker", "record")])
def test_a_late_settlement_with_a_key_of_another_kind(client, name, actual):
    put_other_kind(client, name)
    assert_nothing_changes(client, lambda: settle(client, actual=actual))


@pytest.mark.parametrize("to", [COST, COST + 7], ids=["nothing more", "more"])
@pytest.mark.parametrize("name", [name for name in RESERVE_KEYS if name != "marker"])
def test_extend_with_a_key_of_another_kind(client, name, to):
    reserve(client, "before")
    reserve(client)
    put_other_kind(client, name)
    assert_nothing_changes(client, lambda: extend(client, to=to))


def test_a_reset_or_a_callers_key_of_another_kind(client):
    reserve(client, key=KEY)
    of_another_kind(client, key_of(KEY))
    calls = {
        "reserve": lambda: reserve(client, "another", key=KEY),
        "extend": lambda: extend(client, key=KEY),
        "settle": lambda: settle(client, key=KEY),
        "release": lambda: settle(client, key=KEY, actual=0, ending="released"),
        "late": lambda: settle(client, "lost", key=KEY),
    }
    for call in calls.values():
        assert_nothing_changes(client, call)
    client.delete(key_of(KEY))
    of_another_kind(client, RESET)
    for name in ("extend", "settle", "release", "late"):
        assert_nothing_changes(client, calls[name])


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_reset_or_a_callers_key_that_says_nothing(client, garbage):
    """No error: a reset that is no time clears nothing, a key that says nothing is taken and is nobody's."""
    reserve(client, key=KEY)
    client.set(key_of(KEY), garbage, ex=100)
    client.set(RESET, garbage.replace(b"9", b"x").replace(b"1", b"x").replace(b" ", b"x"), ex=100)
    assert reserve(client, "another", key=KEY)[:4] == [12, 0, reserve(client)[2], 1]
    extend(client, key=KEY)
    settle(client, key=KEY, actual=5)
    assert client.get(key_of(KEY)) == garbage
    assert client.get(RESERVE_KEYS["daily"]) == b"5"


@pytest.mark.parametrize("name", TOTALS)
@pytest.mark.parametrize("actual", [0, 1, COST, COST + 1])
def test_a_total_of_nothing_is_an_amount(client, name, actual):
    reserve(client)
    client.set(RESERVE_KEYS[name], 0, ex=1_000)
    assert settle(client, actual=actual)[0] == 0
    assert client.get(RESERVE_KEYS[name]) == (b"1" if actual > COST else b"0")


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("name", TOTALS)
def test_totals_that_are_no_amounts(client, name, garbage):
    reserve(client)
    client.set(RESERVE_KEYS[name], garbage, ex=1_000)
    assert_nothing_changes(client, lambda: reserve(client, "another"))
    assert_nothing_changes(client, lambda: reserve(client, "another", window=0))
    assert_nothing_changes(client, lambda: extend(client))
    assert_nothing_changes(client, lambda: settle(client, actual=10**9))


@pytest.mark.parametrize("score", ["-inf", "inf", "-5", 2.0**63])
@pytest.mark.parametrize("name", ["recent", "network_recent"])
def test_a_bucket_that_is_no_amount(client, name, score):
    reserve(client)
    member = client.zrange(RESERVE_KEYS[name], 0, -1)[0]
    client.zadd(RESERVE_KEYS[name], {member: score})
    assert_nothing_changes(client, lambda: settle(client, actual=7))


@pytest.mark.parametrize("name", BUCKET_KINDS)
def test_a_ring_with_members_that_are_no_times(client, name):
    """It may be served or be an error; nothing is half done and no key lives for ever."""
    client.zadd(RESERVE_KEYS[name], {"abc": 5, "": 7})
    client.expire(RESERVE_KEYS[name], 500)
    before = dump(client)
    calls = [
        lambda: reserve(client),
        lambda: reserve(client, "r2", window=0),
        lambda: extend(client),
        lambda: settle(client),
    ]
    for call in calls:
        try:
            call()
        except redis.ResponseError:
            assert dump(client) == before
        before = dump(client)
    assert all(client.ttl(name) > 0 for name in before)


def test_a_record_or_a_marker_that_was_written_by_hand_is_no_error(client):
    client.set(RESERVE_KEYS["record"], "garbage", ex=100)
    assert reserve(client)[0] == extend(client)[0] == settle(client)[0] == 9
    client.set(RESERVE_KEYS["marker"], "garbage", ex=100)
    assert reserve(client, "other")[0] == 1


def test_a_challenge_of_another_kind(client):
    client.rpush("llm:challenge:c", "x")
    assert_nothing_changes(client, lambda: CONSUME.run(client, ["llm:challenge:c"], ["who net"]))


# --- a server that takes no writes


@pytest.fixture
def own_client(own_server):
    with redis.Redis.from_url(own_server.url) as client:
        yield client


def out_of_memory(client):
    client.config_set("maxmemory-policy", "noeviction")
    client.config_set("maxmemory", 1)


def read_only(client):
    client.replicaof("127.0.0.1", 1)


def without_replicas(client):
    client.config_set("min-replicas-to-write", 1)


@pytest.mark.parametrize("stop_writes", [out_of_memory, read_only, without_replicas])
def test_a_server_that_takes_no_writes_changes_nothing(own_client, stop_writes):
    reserve(own_client, key=KEY)
    for rid in ("a", "b"):
        reserve(own_client, rid)
    calls = {
        "admitted": lambda: reserve(own_client, "new"),
        "refused with a marker": lambda: reserve(own_client, "new", window=0),
        "with a key": lambda: reserve(own_client, "new", key="f" * 32),
        "extended": lambda: extend(own_client),
        "extended with a key": lambda: extend(own_client, key=KEY),
        "settled with a key": lambda: settle(own_client, key=KEY),
        "released": lambda: settle(own_client, actual=0, ending="released", key=KEY),
        "settled": lambda: settle(own_client),
        "settled higher": lambda: settle(own_client, actual=10**9),
        "late": lambda: settle(own_client, "lost"),
    }
    stop_writes(own_client)
    for call in calls.values():
        assert_nothing_changes(own_client, call)
