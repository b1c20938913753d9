"""What a request costs the server does not grow with the requests before it."""

from statistics import median

import pytest

from backends.keys import WINDOW_BUCKETS
from backends.store.scripts import Script, all_scripts
from tests.lua.by_hand import (
    BUCKET_KINDS,
    BUCKET_S,
    COST,
    KEY,
    NOW_S,
    NOW_US,
    REQUEST_DIGEST,
    RESERVE_KEYS,
    TOTALS,
    extend,
    key_of,
    keys_of_reserve,
    reserve,
    reserve_args,
    settle,
)

LIMITS = ("window", "day", "network_window", "network_day", "hour_of_all", "day_of_all")


def commands_of(client, call):
    """Command -> how often the server did it during `call`."""
    client.config_resetstat()
    call()
    stats = client.info("commandstats")
    counts = {name.removeprefix("cmdstat_"): entry["calls"] for name, entry in stats.items()}
    return {name: calls for name, calls in counts.items() if not name.startswith(("config", "info", "client"))}


def fill(client, requests, cost=1_000):
    """The books as `requests` requests of `cost`, evenly over the window, leave them."""
    for name in ("recent", "network_recent"):
        for back in range(WINDOW_BUCKETS):
            client.zincrby(RESERVE_KEYS[name], requests * cost // WINDOW_BUCKETS, NOW_S - back * BUCKET_S)
        client.expire(RESERVE_KEYS[name], 600 + BUCKET_S)
    for name in ("pending_identifier", "pending_network", "pending_global"):
        for back in range(12):
            client.zincrby(RESERVE_KEYS[name], requests * cost // 100, NOW_S - back * 10)
        client.expire(RESERVE_KEYS[name], 130)
    for name in TOTALS:
        client.set(RESERVE_KEYS[name], requests * cost, ex=1_000)


@pytest.mark.parametrize("limit", [10**15, 5], ids=["admitted", "refused"])
def test_the_same_commands_at_ten_requests_as_at_a_million(client, limit):
    seen = []
    reserve(client)
    extend(client)
    settle(client)  # the server knows the scripts from here on
    for requests in (10, 1_000_000):
        client.flushdb()
        fill(client, requests)
        seen.append(
            commands_of(
                client,
                lambda: (
                    reserve(client, "r", network_window=limit, window=10**15, day=10**15),
                    extend(client, "r") if limit > 5 else None,
                    settle(client, "r") if limit > 5 else None,
                ),
            )
        )
    few, many = seen
    assert few == many
    assert few["evalsha"] == (3 if limit > 5 else 1)
    assert sum(few.values()) < 90


def test_a_bounded_number_of_commands_and_one_time_a_script(client):
    by_the_server = {"now_us": "", "deadline_us": 2**52}
    seen = commands_of(client, lambda: reserve(client, hour=client.time()[0] // 3600, key=KEY, **by_the_server))
    assert seen["time"] == 2  # one is ours
    assert sum(seen.values()) < 42
    made_at_us = int(client.get(RESERVE_KEYS["record"]).split()[2])
    made = {"made_at_us": made_at_us, "key": KEY}
    seen = commands_of(client, lambda: extend(client, **made, **by_the_server, **dict.fromkeys(LIMITS, 10**15)))
    assert seen["time"] == 1
    assert seen["incrby"] == 4
    assert sum(seen.values()) < 32
    seen = commands_of(client, lambda: settle(client, now_us="", **made))
    assert seen["time"] == 1
    assert sum(seen.values()) < 35


def test_a_thousand_requests_leave_as_many_elements_as_one(client):
    for number in range(1_000):
        reserve(client, "only", cost=1 + number % 7)
        client.delete("llm:reservation:only")
    assert {name: client.zcard(RESERVE_KEYS[name]) for name in BUCKET_KINDS} == dict.fromkeys(BUCKET_KINDS, 1)
    assert client.dbsize() == len(RESERVE_KEYS) - 2


def test_what_a_killed_worker_left_open_is_swept(client):
    for number in range(40):
        now_us = NOW_US + number * 10_000_000
        reserve(client, f"r{number}", now_us=now_us, deadline_us=now_us, hour=now_us // 1_000_000 // 3600)
        settle(client, f"r{number}", now_us=now_us, made_at_us=now_us)
        if number % 2:
            reserve(client, f"left{number}", now_us=now_us, deadline_us=now_us, hour=now_us // 1_000_000 // 3600)
        for name in ("pending_identifier", "pending_network", "pending_global"):
            assert client.zcard(RESERVE_KEYS[name]) <= 14


def bytes_after(client, key, *steps):
    """What a key takes after each step, the median of five tries: now and then the allocator gives another size."""
    tries = []
    for _ in range(5):
        client.flushdb()
        tries.append([(step(), client.memory_usage(key))[1] for step in steps])
    return [median(sizes) for sizes in zip(*tries, strict=True)]


@pytest.mark.parametrize("length_s", [600, 31 * 86_400], ids=["as usual", "the longest"])
def test_a_record_fits_in_200_bytes(client, length_s):
    """In every state, with the largest amount that a setting allows, on each kind of server."""
    rid = "0123456789abcdef0123456789abcdef"
    largest = 10**15 - 1
    room = dict.fromkeys(LIMITS, 10**15)
    lengths = {"window_s": length_s, "open_s": length_s}
    record = f"llm:reservation:{rid}"
    extended = bytes_after(
        client,
        record,
        lambda: reserve(client, rid, cost=COST, **room, **lengths),
        lambda: extend(client, rid, to=largest, **room, **lengths),
        lambda: settle(client, rid, actual=largest, **lengths),
    )
    assert client.get(record).decode().startswith(f"settled {largest} {NOW_US} {REQUEST_DIGEST} {length_s} {length_s} ")
    released = bytes_after(
        client,
        record,
        lambda: reserve(client, rid, cost=largest - COST, **room, **lengths),
        lambda: settle(client, rid, actual=0, ending="released", **lengths),
    )
    assert client.get(record).decode().startswith("released 0 ")
    assert max(extended + released) <= 200


def test_a_callers_key_fits_in_200_bytes(client):
    rid = "0123456789abcdef0123456789abcdef"
    largest = 10**15 - 1
    kept = bytes_after(
        client,
        key_of(KEY),
        lambda: reserve(client, rid, key=KEY, cost=largest, **dict.fromkeys(LIMITS, 10**15)),
        lambda: settle(client, rid, key=KEY, actual=largest),
    )
    assert client.get(key_of(KEY)).decode().startswith("settled ")
    assert max(kept) <= 200


def test_the_totals_of_an_identifier_fit_in_2_kb(client):
    """Its marker, its full window, its day, its pending money; the longest identifier, amounts of ten digits."""
    who = "x" * 128
    names = {
        "marker": f"llm:throttle:{who}",
        "recent": f"llm:cost:recent:{who}",
        "daily": f"llm:cost:daily:{who}:2026-03-14",
        "pending_identifier": f"llm:open:identifier:{who}",
    }
    keys = keys_of_reserve(**names)
    script = Script("reserve.lua")
    for back in reversed(range(WINDOW_BUCKETS + 1)):
        now_us = NOW_US - back * BUCKET_S * 1_000_000
        hour = now_us // 1_000_000 // 3600
        keys[0] = f"llm:reservation:{back}"
        answer = script.run(
            client, keys, reserve_args(cost=1_234_567_890, now_us=now_us, deadline_us=now_us, hour=hour)
        )
        assert answer[0] == 0
    assert client.zcard(names["recent"]) == WINDOW_BUCKETS + 1
    keys[0] = "llm:reservation:refused"
    assert script.run(client, keys, reserve_args(window=0))[0] == 3
    used = {name: client.memory_usage(key, samples=0) for name, key in names.items()}
    assert sum(used.values()) <= 2_048, used
    assert client.object("encoding", names["recent"]) == b"listpack"


def test_every_script_compiles(client):
    scripts = all_scripts()
    names = ["consume.lua", "extend.lua", "reserve.lua", "reset.lua", "settle.lua"]
    assert [script.file_name for script in scripts] == names
    assert [script.compile_error(client) for script in scripts] == [None] * len(names)


def test_a_script_that_does_not_compile_is_told_with_its_line(client):
    script = Script("consume.lua")
    script.text = "local x = 1\nlocal y = = 2\n"
    assert ":2:" in script.compile_error(client)


def test_a_script_that_the_server_has_forgotten_is_sent_again(client):
    reserve(client)
    client.script_flush()
    assert reserve(client, "again")[0] == 0
