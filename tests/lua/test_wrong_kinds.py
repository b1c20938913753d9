"""A key of another kind, or garbage in it, is an error before anything is written; so is a server without writes."""

import pytest
import redis

from tests.lua.by_hand import (
    BOOKS,
    CONSUME,
    COST,
    ID,
    KEY,
    MARKER,
    OF_TEAM,
    OF_WHO,
    PENDING,
    RECORD,
    RESET,
    RINGS,
    RUNNING,
    SIX,
    TOTALS,
    WHO,
    WINDOWS,
    dump,
    extend,
    for_ever,
    key_of,
    release,
    reserve,
    ring_of,
    settle,
    total,
    window,
    words_of_reserve,
    words_of_settle,
)

GARBAGE = [b"", b"abc", b"-5", b"1.5", b"1e9", b" 5", b"9223372036854775807", b"12345678901234567", b"0x10", b"\xff"]
CALLERS_KEY = key_of(KEY)
# Every key that a script is sent, by its place: but for what windows came to, which is a hint and no error.
RESERVE_KEYS = {"record": RECORD, **BOOKS, **PENDING, "marker": MARKER, "callers_key": CALLERS_KEY}
SETTLE_KEYS = {"record": RECORD, **BOOKS, **PENDING, "reset": RESET, "callers_key": CALLERS_KEY}
ALONE = (window("alone"), total("day_alone"), for_ever("ever_alone"))
KINDS = {
    "list": lambda client, key: client.rpush(key, "of another kind"),
    "hash": lambda client, key: client.hset(key, "of another", "kind"),
    "set": lambda client, key: client.sadd(key, "of another kind"),
}


def of_another_kind(client, key, kind="list"):
    client.delete(key)
    KINDS[kind](client, key)


def assert_nothing_changes(client, call):
    """And the error says nothing of whose key it is."""
    before = dump(client)
    lives = {name: client.pexpiretime(name) for name in before} if has_pexpiretime(client) else {}
    with pytest.raises(redis.ResponseError) as caught:
        call()
    assert dump(client) == before
    assert lives == {name: client.pexpiretime(name) for name in lives}
    assert WHO not in str(caught.value)
    assert "llm:" not in str(caught.value)


def has_pexpiretime(client):
    return int(client.info("server")["redis_version"].split(".")[0]) >= 7


def test_every_place_is_among_those_that_are_tried():
    keys, _ = words_of_reserve(key=KEY)
    assert set(keys) == {*RESERVE_KEYS.values(), *RUNNING.values()}
    keys, _ = words_of_settle(key=KEY)
    assert set(keys) == {*SETTLE_KEYS.values(), *RUNNING.values()}


@pytest.mark.parametrize("comes_first", [False, True])
@pytest.mark.parametrize("limit", [10**12, 0], ids=["admitted", "refused"])
@pytest.mark.parametrize("name", RESERVE_KEYS)
def test_reserve_with_a_key_of_another_kind(client, name, limit, comes_first):
    if not comes_first:
        reserve(client, "before", key="f" * 32)
    of_another_kind(client, RESERVE_KEYS[name])
    for of in BOOKS:
        assert_nothing_changes(client, lambda of=of: reserve(client, key=KEY, **{of: limit}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RESERVE_KEYS)
def test_reserve_with_a_key_of_any_other_kind(client, name, kind):
    reserve(client, "before")
    of_another_kind(client, RESERVE_KEYS[name], kind)
    assert_nothing_changes(client, lambda: reserve(client, key=KEY))


@pytest.mark.parametrize("name", PENDING)
def test_pending_money_that_refuses_leaves_the_buckets_of_the_others_as_they_were(client, name):
    """Those that held nothing, those with other buckets, and those with the present one."""
    for held in ({}, {"5": 7}, {"1773483600": 7}, {"5": 7, "1773483600": 7}):
        client.flushdb()
        for key in PENDING.values():
            client.zadd(key, held) if held else None
        of_another_kind(client, PENDING[name])
        assert_nothing_changes(client, lambda: reserve(client))


@pytest.mark.parametrize("actual", [0, 7, COST, 10**9])
@pytest.mark.parametrize("name", SETTLE_KEYS)
def test_settle_with_a_key_of_another_kind(client, name, actual):
    reserve(client, "before")
    reserve(client, key=KEY)
    of_another_kind(client, SETTLE_KEYS[name])
    assert_nothing_changes(client, lambda: settle(client, actual=actual, key=KEY))
    assert_nothing_changes(client, lambda: release(client, key=KEY))


@pytest.mark.parametrize("actual", [0, 10**9])
@pytest.mark.parametrize("name", [name for name in SETTLE_KEYS if name != "record"])
def test_a_late_settlement_with_a_key_of_another_kind(client, name, actual):
    of_another_kind(client, SETTLE_KEYS[name])
    assert_nothing_changes(client, lambda: settle(client, actual=actual, key=KEY))


@pytest.mark.parametrize("to", [COST, COST + 7], ids=["nothing more", "more"])
@pytest.mark.parametrize("name", SETTLE_KEYS)
def test_extend_with_a_key_of_another_kind(client, name, to):
    reserve(client, "before")
    reserve(client, key=KEY)
    of_another_kind(client, SETTLE_KEYS[name])
    assert_nothing_changes(client, lambda: extend(client, to=to, key=KEY))
    assert_nothing_changes(client, lambda: extend(client, to=to, key=KEY, day=0, global_day=0))


@pytest.mark.parametrize("key", [RECORD, *(row.key for row in ALONE), OF_TEAM])
def test_budgets_without_an_identifier_with_a_key_of_another_kind(client, key):
    reserve(client, "before", ALONE)
    reserve(client, rows=ALONE)
    of_another_kind(client, key)
    rid = ID if key == RECORD else "new"
    assert_nothing_changes(client, lambda: reserve(client, rid, ALONE))
    assert_nothing_changes(client, lambda: reserve(client, rid, ALONE, alone=0))
    assert_nothing_changes(client, lambda: extend(client, rows=ALONE))
    assert_nothing_changes(client, lambda: settle(client, rows=ALONE))


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_reset_or_a_callers_key_that_says_nothing(client, garbage):
    """No error: a reset that is no time clears nothing, a key that says nothing is taken and is nobody's."""
    reserve(client, key=KEY)
    client.set(CALLERS_KEY, garbage, ex=100)
    client.set(RESET, garbage.replace(b"9", b"x").replace(b"1", b"x").replace(b" ", b"x"), ex=100)
    assert reserve(client, "another", key=KEY)[:4] == [12, 0, reserve(client)[2], 1]
    extend(client, key=KEY)
    settle(client, key=KEY, actual=5)
    assert client.get(CALLERS_KEY) == garbage
    assert client.get(BOOKS["day"]) == b"5"


@pytest.mark.parametrize("name", TOTALS)
@pytest.mark.parametrize("actual", [0, 1, COST, COST + 1])
def test_a_total_of_nothing_is_an_amount(client, name, actual):
    reserve(client)
    client.set(BOOKS[name], 0, ex=1_000)
    assert settle(client, actual=actual)[0] == 0
    assert client.get(BOOKS[name]) == (b"1" if actual > COST else b"0")


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("key", [*(BOOKS[name] for name in TOTALS), ALONE[1].key, ALONE[2].key])
def test_totals_that_are_no_amounts(client, key, garbage):
    rows = (*SIX, *ALONE)
    reserve(client, rows=rows)
    client.set(key, garbage, ex=1_000)
    assert_nothing_changes(client, lambda: reserve(client, "another", rows))
    assert_nothing_changes(client, lambda: reserve(client, "another", rows, window=0))
    assert_nothing_changes(client, lambda: reserve(client, rows=rows))
    assert_nothing_changes(client, lambda: extend(client, rows=rows))
    assert_nothing_changes(client, lambda: settle(client, rows=rows, actual=10**9))


def test_the_largest_amount_that_a_total_may_be_is_of_sixteen_digits(client):
    client.set(BOOKS["day"], "9" * 15, ex=1_000)
    assert reserve(client, day=10**16)[0] == 0
    client.set(BOOKS["day"], "1" + "0" * 15, ex=1_000)
    assert reserve(client, "b", day=10**16)[0] == 0
    assert settle(client)[0] == 0


@pytest.mark.parametrize("score", ["-inf", "inf", "-5", 2.0**63, 0.5])
@pytest.mark.parametrize("name", WINDOWS)
def test_a_bucket_that_is_no_amount(client, name, score):
    reserve(client)
    member = client.zrange(BOOKS[name], 0, -1)[0]
    client.zadd(BOOKS[name], {member: score})
    assert_nothing_changes(client, lambda: settle(client, actual=7))


@pytest.mark.parametrize("name", RINGS)
def test_a_ring_with_members_that_are_no_times(client, name):
    """It may be served or be an error; nothing is half done and no key lives for ever."""
    client.zadd(RINGS[name], {"abc": 5, "": 7})
    client.expire(RINGS[name], 500)
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


def test_pending_money_of_no_time_is_swept_by_an_end(client):
    reserve(client)
    client.zadd(PENDING["of_all"], {"abc": 5})
    assert settle(client)[3] == 5
    assert not client.exists(PENDING["of_all"])


@pytest.mark.parametrize("text", ["garbage", "", "open", "open 1 2 3", "open x 1 abc 0 120 - -"])
def test_a_record_or_a_marker_that_was_written_by_hand_is_no_error(client, text):
    client.set(RECORD, text, ex=100)
    before = dump(client)
    assert reserve(client)[0] == extend(client)[0] == settle(client)[0] == 9
    assert dump(client) == before
    client.set(MARKER, text, ex=100)
    assert reserve(client, "other")[0] == 1


def test_a_key_of_another_kind_is_an_error_under_a_marker_too(client):
    client.set(MARKER, "by hand", ex=100)
    of_another_kind(client, BOOKS["window"])
    assert_nothing_changes(client, lambda: reserve(client))


@pytest.mark.parametrize(
    "put", [lambda client, key: client.rpush(key, "x"), lambda client, key: client.zadd(key, {"x": 1})]
)
def test_what_windows_came_to_is_no_error_whatever_its_kind(client, put):
    reserve(client)
    for key in RUNNING.values():
        client.delete(key)
        put(client, key)
    assert reserve(client, "other")[8:14] == [2 * COST] * 6
    for key in RUNNING.values():
        client.delete(key)
        put(client, key)
    assert extend(client)[0] == 0
    assert settle(client)[0] == 0
    assert ring_of(client, OF_WHO) == {1_773_483_600: COST}
    assert reserve(client, "last")[8:14] == [2 * COST + 7] * 6


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
    reserve(own_client, "alone", ALONE)
    calls = {
        "admitted": lambda: reserve(own_client, "new"),
        "refused with a marker": lambda: reserve(own_client, "new", window=0),
        "with a key": lambda: reserve(own_client, "new", key="f" * 32),
        "without an identifier": lambda: reserve(own_client, "new", ALONE),
        "extended": lambda: extend(own_client),
        "extended with a key": lambda: extend(own_client, key=KEY),
        "extended without an identifier": lambda: extend(own_client, "alone", rows=ALONE),
        "settled with a key": lambda: settle(own_client, key=KEY),
        "released": lambda: release(own_client, key=KEY),
        "settled": lambda: settle(own_client),
        "settled without an identifier": lambda: settle(own_client, "alone", rows=ALONE),
        "settled higher": lambda: settle(own_client, actual=10**9),
        "late": lambda: settle(own_client, "lost"),
    }
    stop_writes(own_client)
    for call in calls.values():
        assert_nothing_changes(own_client, call)
