"""What a request costs the server does not grow with the requests before it."""

from statistics import median

import pytest

from backends.budgets import MOST_BUDGETS
from backends.keys import WINDOW_BUCKETS
from backends.store.scripts import Script, all_scripts
from tests.lua.by_hand import (
    BOOKS,
    BUCKET_S,
    COST,
    KEY,
    MARKER,
    NOW_S,
    NOW_US,
    PENDING,
    RECORD,
    REQUEST_DIGEST,
    RESERVE,
    RINGS,
    RUNNING,
    TOTALS,
    US,
    WHO,
    WINDOWS,
    charged_to,
    extend,
    key_of,
    release,
    reserve,
    ring_of,
    settle,
    six,
    total,
    window,
    words_of_reserve,
)

MUCH = 10**15
LENGTHS = [600, 31 * 86_400]


def commands_of(client, call):
    """Command -> how often the server did it during `call`."""
    client.config_resetstat()
    call()
    stats = client.info("commandstats")
    counts = {name.removeprefix("cmdstat_"): entry["calls"] for name, entry in stats.items()}
    return {name: calls for name, calls in counts.items() if not name.startswith(("config", "info", "client"))}


def fill(client, requests, cost=1_000):
    """The books as `requests` requests of `cost`, evenly over the window, leave them."""
    for name in WINDOWS:
        for back in range(WINDOW_BUCKETS):
            client.zincrby(BOOKS[name], requests * cost // WINDOW_BUCKETS, NOW_S - back * BUCKET_S)
        client.expire(BOOKS[name], 600 + BUCKET_S)
    for key in PENDING.values():
        for back in range(12):
            client.zincrby(key, requests * cost // 100, NOW_S - back * 10)
        client.expire(key, 130)
    for name in TOTALS:
        client.set(BOOKS[name], requests * cost, ex=1_000)


@pytest.mark.parametrize("limit", [MUCH, 5], ids=["admitted", "refused"])
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
                    reserve(client, "r", network_window=limit, window=MUCH, day=MUCH),
                    extend(client, "r") if limit > 5 else None,
                    settle(client, "r") if limit > 5 else None,
                ),
            )
        )
    few, many = seen
    assert few == many
    assert few["evalsha"] == (3 if limit > 5 else 1)
    assert sum(few.values()) < 75


def test_a_bounded_number_of_commands_and_one_time_a_script(client):
    now_s, _ = client.time()
    periods = {"from_s": now_s - 60, "until_s": now_s + 600}
    seen = commands_of(client, lambda: reserve(client, key=KEY, now_us="", **periods))
    assert seen["time"] == 1
    assert sum(seen.values()) < 42
    made_at_us = int(client.get(RECORD).split()[2])
    made = {"made_at_us": made_at_us, "key": KEY, "now_us": ""}
    seen = commands_of(client, lambda: extend(client, **made, **dict.fromkeys(BOOKS, MUCH)))
    assert seen["time"] == 1
    assert seen["incrby"] == 4
    assert sum(seen.values()) < 34
    seen = commands_of(client, lambda: settle(client, **made))
    assert seen["time"] == 1
    assert sum(seen.values()) < 32


def test_a_window_is_not_read_while_what_it_came_to_is_known(client):
    fill(client, 1_000)
    first = commands_of(client, lambda: reserve(client, "a"))
    assert first["zrange"] == 2
    again = commands_of(client, lambda: reserve(client, "b"))
    assert "zrange" not in again
    assert sum(again.values()) < sum(first.values())
    refused = commands_of(client, lambda: reserve(client, "c", global_day=0))
    assert refused["zrange"] == 3
    room = dict.fromkeys(BOOKS, MUCH)
    assert "zrange" not in commands_of(client, lambda: extend(client, "a", **room))
    assert commands_of(client, lambda: extend(client, "b", 10**9, **room | {"window": 1}))["zrange"] == 2


def test_a_budget_takes_as_many_commands_whatever_others_there_are(client):
    """All budgets of one owner, who has one key of pending money: each takes the same few commands more."""
    reserve(client)

    def commands(rows):
        client.flushdb()
        first = sum(commands_of(client, lambda: reserve(client, "a", rows)).values())
        return first, sum(commands_of(client, lambda: reserve(client, "b", rows)).values())

    counts = [commands([total(f"t{i}") for i in range(1, number + 1)]) for number in (1, 2, MOST_BUDGETS)]
    (first, again), (second, _), (most, most_again) = counts
    assert most - first == (MOST_BUDGETS - 1) * (second - first)
    assert second - first <= 3
    assert most_again - again == MOST_BUDGETS - 1  # an INCRBY each
    windows = [window(f"w{number}") for number in range(MOST_BUDGETS - 1)]
    (_, again), (_, most_again) = [commands([total("t"), *windows[:number]]) for number in (1, MOST_BUDGETS - 1)]
    assert most_again - again == (MOST_BUDGETS - 2) * 3  # each is looked at twice and charged


def test_a_thousand_requests_leave_as_many_elements_as_one(client):
    for number in range(1_000):
        reserve(client, "only", cost=1 + number % 7)
        client.delete("llm:reservation:only")
    assert {name: client.zcard(key) for name, key in RINGS.items()} == dict.fromkeys(RINGS, 1)
    assert client.dbsize() == len(BOOKS) + len(PENDING) + len(RUNNING)


def test_what_a_killed_worker_left_open_is_swept(client):
    for number in range(40):
        now_us = NOW_US + number * 10 * US
        reserve(client, f"r{number}", now_us=now_us)
        settle(client, f"r{number}", now_us=now_us, made_at_us=now_us)
        if number % 2:
            reserve(client, f"left{number}", now_us=now_us)
        for key in PENDING.values():
            assert client.zcard(key) <= 14


def bytes_after(client, key, *steps):
    """What a key takes after each step, the median of five tries: now and then the allocator gives another size."""
    tries = []
    for _ in range(5):
        client.flushdb()
        tries.append([(step(), client.memory_usage(key))[1] for step in steps])
    return [median(sizes) for sizes in zip(*tries, strict=True)]


def bytes_of_a_record(client, rows, length_s, largest=MUCH - 1):
    """In every state; by default with the largest amount that a setting allows."""
    rid = "0123456789abcdef0123456789abcdef"
    room = {row.name: MUCH for row in rows}
    its, record = {"rows": rows, "pending_s": length_s}, f"llm:reservation:{rid}"
    extended = bytes_after(
        client,
        record,
        lambda: reserve(client, rid, cost=COST, **room, **its),
        lambda: extend(client, rid, to=largest, **room, **its),
        lambda: settle(client, rid, actual=largest, **its),
    )
    rest = charged_to(rows, length_s)
    assert client.get(record).decode() == f"paid {largest} {NOW_US} {REQUEST_DIGEST} {rest}"
    released = bytes_after(
        client,
        record,
        lambda: reserve(client, rid, cost=largest - COST, **room, **its),
        lambda: release(client, rid, **its),
    )
    assert client.get(record).decode().startswith("released 0 ")
    return max(extended + released)


@pytest.mark.parametrize("length_s", LENGTHS, ids=["as usual", "the longest"])
def test_a_record_fits_in_200_bytes(client, length_s):
    """On each kind of server."""
    assert bytes_of_a_record(client, six(length_s), length_s) <= 200


@pytest.mark.parametrize("further", [1, 16])
def test_a_record_of_further_budgets_fits_in_300_bytes(client, further):
    """On each kind of server, with the longest numbers."""
    rows = [window(f"w{number}", window_s=31 * 86_400) for number in range(further)]
    assert bytes_of_a_record(client, [*six(31 * 86_400), *rows], 31 * 86_400) <= 300


@pytest.mark.parametrize(("own", "further", "most_bytes"), [(2, 0, 200), (2, 16, 300), (4, 0, 200), (4, 16, 300)])
def test_a_record_of_the_service_fits_with_usual_lengths_and_amounts_and_else_nearly(client, own, further, most_bytes):
    """On each kind of server: two budgets of the wide network, and two more with shares, stand beside the others.

    Usual are windows of less than 17 minutes and amounts below 10 USD.
    """
    rows = [window(f"w{number}", window_s=31 * 86_400) for number in range(own + further)]
    assert bytes_of_a_record(client, [*six(600), *rows], 125, largest=10**10 - 1) <= most_bytes
    assert bytes_of_a_record(client, [*six(31 * 86_400), *rows], 31 * 86_400) <= most_bytes + 28


def test_a_callers_key_fits_in_200_bytes(client):
    rid = "0123456789abcdef0123456789abcdef"
    kept = bytes_after(
        client,
        key_of(KEY),
        lambda: reserve(client, rid, key=KEY, cost=MUCH - 1, **dict.fromkeys(BOOKS, MUCH)),
        lambda: settle(client, rid, key=KEY, actual=MUCH - 1),
    )
    assert client.get(key_of(KEY)).decode().startswith("settled ")
    assert max(kept) <= 200


def test_the_totals_of_an_identifier_fit_in_2_kb(client):
    """Its marker, its full window, its day, its pending money; the longest identifier, amounts of ten digits."""
    who = "x" * 128
    theirs = [key.replace(WHO, who) for key in (MARKER, BOOKS["window"], BOOKS["day"], PENDING["of_who"])]
    theirs.append(RUNNING["window"].replace(WHO, who))

    def asked(rid, **changes):
        keys, args = words_of_reserve(rid, **changes)
        return RESERVE.run(client, [key.replace(WHO, who) for key in keys], args)

    for back in reversed(range(WINDOW_BUCKETS + 1)):
        assert asked(f"{back}", cost=1_234_567_890, now_us=NOW_US - back * BUCKET_S * US)[0] == 0
    assert client.zcard(theirs[1]) == WINDOW_BUCKETS + 1
    assert asked("refused", window=0)[0] == 3
    used = {key: client.memory_usage(key, samples=0) for key in theirs}
    assert sum(used.values()) <= 2_048, used
    assert client.object("encoding", theirs[1]) == b"listpack"


def test_a_full_window_is_bounded_whatever_its_length_is(client):
    for length_s in (60, 600, 90_000):
        row = window("w", window_s=length_s)
        bucket_s = -(-length_s // 20)
        for number in range(50):
            reserve(client, f"{length_s}-{number}", (row,), cost=1, now_us=NOW_US + number * bucket_s * US)
            assert len(ring_of(client, row.key)) <= WINDOW_BUCKETS + 1


def test_every_script_compiles(client):
    scripts = all_scripts()
    names = ["consume.lua", "count.lua", "extend.lua", "reserve.lua", "reset.lua", "settle.lua"]
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
