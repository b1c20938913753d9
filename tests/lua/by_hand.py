"""The scripts without the strategy around them: KEYS and ARGV made here, from what the head of each script says."""

import hashlib
from typing import NamedTuple

from backends.records import THE_SIX, digest_of, key_digest
from backends.store.scripts import Script

RESERVE, EXTEND, SETTLE = Script("reserve.lua"), Script("extend.lua"), Script("settle.lua")
CONSUME, RESET_BOOKS = Script("consume.lua"), Script("reset.lua")
US = 1_000_000
NOW_S = 1_773_483_600  # 2026-03-14 10:20:00 UTC
NOW_US = NOW_S * US + 250_000
LATER_US = NOW_US + US  # when extensions and ends come, unless a test says otherwise
DATE, HOUR = "2026-03-14", "2026-03-14T10"
DAY_S, HOUR_S = NOW_S - 37_200, NOW_S - 1_200  # when they began
NEVER_S = 2**53
BUCKET_S = 30  # of a window of 600 s
RECORD_KEEP_S, KEY_KEEP_S = 3_600, 86_400
ROOM = 10**12
COST = 4_000_000
WHO, NETWORK, ID = "hash456", "198.51.100.7", "rid1"
RECORD, MARKER, RESET = f"llm:reservation:{ID}", f"llm:throttle:{WHO}", f"llm:reset:{WHO}"
OF_WHO, OF_NETWORK, OF_ALL = f"llm:open:identifier:{WHO}", f"llm:open:network:{NETWORK}", "llm:open:global"
OF_TEAM = "llm:open:team:red"
KEY, BODY = "0123456789abcdef" * 2, "fedcba9876543210"
REQUEST_DIGEST = hashlib.blake2b(b"anything", digest_size=4).hexdigest()


class Row(NamedTuple):
    """One budget of a request."""

    name: str
    key: str
    owner: str
    """The key of what is pending of its owner."""
    limit: int | str = ROOM
    window_s: int = 0
    start_s: int = 0
    end_s: int = 0
    keep_until_s: int = 0
    status: int = 13
    marker_s: int = 0
    shadow: int = 0
    cause: str = ""

    @property
    def running(self):
        return f"llm:running:{self.key.removeprefix('llm:')}"


def window(name, owner=OF_TEAM, window_s=600, **changes):
    key = f"llm:budget:{name}:sliding{window_s}:{owner.rpartition(':')[2]}"
    return Row(name, key, owner, window_s=window_s, cause=f"budget:{name}")._replace(**changes)


def total(name, owner=OF_TEAM, start_s=DAY_S, end_s=DAY_S + 86_400, **changes):
    key = f"llm:budget:{name}:day:{owner.rpartition(':')[2]}:{start_s}"
    times = {"start_s": start_s, "end_s": end_s, "keep_until_s": end_s + 86_400}
    return Row(name, key, owner, cause=f"budget:{name}", **times)._replace(**changes)


def for_ever(name, owner=OF_TEAM, **changes):
    return Row(name, f"llm:budget:{name}:forever:{owner.rpartition(':')[2]}", owner, cause=f"budget:{name}")._replace(
        **changes
    )


def six(window_s=600):
    """The budgets that a request of the service is always charged to."""
    day = {"start_s": DAY_S, "end_s": DAY_S + 86_400, "keep_until_s": DAY_S + 2 * 86_400}
    hour = {"start_s": HOUR_S, "end_s": HOUR_S + 3_600, "keep_until_s": HOUR_S + 3 * 3_600}
    return (
        Row("day", f"llm:cost:daily:{WHO}:{DATE}", OF_WHO, **day, status=2, marker_s=60, cause="daily_limit"),
        Row(
            "window",
            f"llm:cost:recent:{WHO}",
            OF_WHO,
            window_s=window_s,
            status=3,
            marker_s=30,
            cause="window_limit",
        ),
        Row(
            "network_window",
            f"llm:network:recent:{NETWORK}",
            OF_NETWORK,
            window_s=window_s,
            status=4,
            cause="network_limit",
        ),
        Row(
            "network_day",
            f"llm:network:daily:{NETWORK}:{DATE}",
            OF_NETWORK,
            **day,
            status=5,
            cause="network_daily_limit",
        ),
        Row("global_hour", f"llm:global:hourly:{HOUR}", OF_ALL, **hour, status=6, cause="global_hourly_limit"),
        Row("global_day", f"llm:global:daily:{DATE}", OF_ALL, **day, status=7, cause="global_daily_limit"),
    )


SIX = six()
BY_NAME = {row.name: row for row in SIX}
WINDOWS = tuple(row.name for row in SIX if row.window_s)
TOTALS = tuple(row.name for row in SIX if not row.window_s)
RUNNING = {name: BY_NAME[name].running for name in WINDOWS}
PENDING = {"of_who": OF_WHO, "of_network": OF_NETWORK, "of_all": OF_ALL}
BOOKS = {row.name: row.key for row in SIX}
RINGS = {name: BOOKS[name] for name in WINDOWS} | PENDING


class Places(NamedTuple):
    """What the three scripts are sent of the budgets of a request."""

    keys: list
    owner_of: list
    counts: str
    mine: int


def places_of(rows):
    owners = list(dict.fromkeys(row.owner for row in rows))
    running = [row.running for row in rows if row.window_s]
    everybody = owners.index(OF_ALL) + 1 if OF_ALL in owners else 0
    return Places(
        [*(row.key for row in rows), *running, *owners],
        [owners.index(row.owner) + 1 for row in rows],
        f"{len(rows)} {len(running)} {len(owners)} {everybody}",
        owners.index(OF_WHO) + 1 if OF_WHO in owners else 0,
    )


def charged_to(rows, pending_s=120):
    """What a record says after its request's digest."""
    keys = [row.key for row in rows]
    further = "".join(key_digest(key) for key in keys if key not in BOOKS.values())
    if not set(BOOKS.values()) <= set(keys):
        return f"0 {pending_s} - - {further}"
    length = next(row.window_s for row in rows if row.key == BOOKS["window"])
    return f"{length} {pending_s} {digest_of(WHO)} {digest_of(NETWORK)} {further}".rstrip()


def suffix_of(owner, rows):
    """What follows a bucket's start in the pending money of an owner who is charged to these of its budgets."""
    its = [row for row in rows if row.owner == owner]
    digests = "".join(key_digest(row.key) for row in its if row.key not in BOOKS.values())
    six = any(row.key in BOOKS.values() for row in its)
    return f":{THE_SIX * six}{digests}" if digests else ""


def pending_word(rows):
    suffixes = [suffix_of(owner, rows) for owner in dict.fromkeys(row.owner for row in rows)]
    return "".join(f"{suffix}," for suffix in suffixes) if any(suffixes) else ""


def limited(rows, changes):
    """The budgets, with the limits that `changes` has by their names, and the rest of `changes`."""
    rows = [row._replace(limit=changes.pop(row.name, row.limit)) for row in rows]
    return rows, changes


def words(defaults, changes):
    assert changes.keys() <= defaults.keys()
    return list({**defaults, **changes}.values())


def plan_of_reserve(rows, owner_of):
    told = [row[row._fields.index("start_s") : row._fields.index("status")] for row in rows]
    return "".join(
        f"{owner},{row.marker_s},{row.shadow},{row.status},{','.join(map(str, times))},{row.cause} "
        for row, owner, times in zip(rows, owner_of, told, strict=True)
    )


def words_of_reserve(rid=ID, rows=SIX, key=None, **changes):
    """KEYS and ARGV; with `key`, the digest of a caller's own, what belongs to that too."""
    rows, changes = limited(rows, changes)
    places, pending_s = places_of(rows), changes.pop("pending_s", 120)
    ends = [row for row in rows if row.end_s]
    from_s = changes.pop("from_s", max((row.start_s for row in ends), default=0))
    until_s = changes.pop("until_s", min((row.end_s for row in ends), default=NEVER_S))
    defaults = {
        "now_us": NOW_US,
        "deadline_us": changes.get("now_us", NOW_US) or 2**52,
        "cost": COST,
        "at_least": "",
        "request_digest": REQUEST_DIGEST,
        "charged_to": charged_to(rows, pending_s),
        "mark_when_busy": "1" if places.mine else "",
        "counts": f"{pending_s} {places.counts} {from_s} {until_s}",
        "budgets": "".join(f"{row.limit},{row.window_s} " for row in rows),
        "shares": "",
        "plan": plan_of_reserve(rows, places.owner_of),
        "pending": pending_word(rows),
    }
    keys = [f"llm:reservation:{rid}", *places.keys, *([MARKER] if places.mine else []), *keys_of_key(key)]
    return keys, words(defaults, changes) + ([BODY, rid] if key else [])


def words_of_extend(rid=ID, to=2 * COST, rows=SIX, key=None, **changes):
    rows, changes = limited(rows, changes)
    places = places_of(rows)
    defaults = {
        "now_us": LATER_US,
        "deadline_us": changes.get("now_us", LATER_US) or 2**52,
        "request_digest": REQUEST_DIGEST,
        "to": to,
        "at_least": to,
        "made_at_us": NOW_US,
        "counts": f"{changes.pop('pending_s', 120)} {places.counts} {places.mine}",
        "plan": plan_of_settle(rows, places.owner_of),
        "limits": "".join(f"{row.limit} " for row in rows),
        "shares": "",
    }
    return keys_of_settle(rid, places, key), words(defaults, changes) + ([rid] if key else [])


def words_of_settle(rid=ID, actual=7, rows=SIX, key=None, **changes):
    places, pending_s = places_of(rows), changes.pop("pending_s", 120)
    defaults = {
        "now_us": LATER_US,
        "request_digest": REQUEST_DIGEST,
        "end": "paid",
        "actual": actual,
        "made_at_us": NOW_US,
        "charged_to": charged_to(rows, pending_s),
        "counts": f"{pending_s} {places.counts} {places.mine}",
        "plan": plan_of_settle(rows, places.owner_of),
    }
    return keys_of_settle(rid, places, key), words(defaults, changes) + ([BODY, rid] if key else [])


def plan_of_settle(rows, owner_of):
    its = zip(rows, owner_of, strict=True)
    return "".join(f"{owner},{row.window_s},{row.keep_until_s},{row.status} " for row, owner in its)


def keys_of_settle(rid, places, key):
    return [f"llm:reservation:{rid}", *places.keys, *([RESET] if places.mine else []), *keys_of_key(key)]


def keys_of_key(digest):
    return [key_of(digest)] if digest else []


def key_of(digest):
    return f"llm:idempotency:{digest}"


# `changes` are limits by the names of their budgets, and words by the names that they have above.


def reserve(client, rid=ID, rows=SIX, key=None, **changes):
    return RESERVE.run(client, *words_of_reserve(rid, rows, key, **changes))


def extend(client, rid=ID, to=2 * COST, rows=SIX, key=None, **changes):
    return EXTEND.run(client, *words_of_extend(rid, to, rows, key, **changes))


def settle(client, rid=ID, actual=7, rows=SIX, key=None, **changes):
    return SETTLE.run(client, *words_of_settle(rid, actual, rows, key, **changes))


def release(client, rid=ID, rows=SIX, key=None, **changes):
    return settle(client, rid, 0, rows, key, end="released", **changes)


def reset(client, rows=(), now_us=LATER_US):
    """Clear the identifier's books: of these budgets of its own, of the six unless others are given."""
    rows = rows or [row for row in SIX if row.owner == OF_WHO]
    windows, totals = [row for row in rows if row.window_s], [row for row in rows if not row.window_s]
    keys = [RESET, MARKER, OF_WHO, *(row.key for row in (*windows, *totals)), *(row.running for row in windows)]
    return RESET_BOOKS.run(client, keys, [now_us, 172_800, len(windows), len(totals)])


def spend(client, rid="spent", nanousd=COST, rows=SIX, now_us=NOW_US, **changes):
    """Reserve and settle, of which nothing stays pending."""
    assert reserve(client, rid, rows, cost=nanousd, now_us=now_us, **changes)[0] == 0
    assert settle(client, rid, nanousd, rows, now_us=now_us, made_at_us=now_us)[0] == 0


def dump(client):
    """Every key, byte for byte."""
    return {name: client.dump(name) for name in client.keys("*")}


def members_of(client, key):
    """The members of a window or of pending money, as they are stored: member -> nano-dollars."""
    return {member.decode(): int(nanousd) for member, nanousd in client.zrange(key, 0, -1, withscores=True)}


def ring_of(client, key):
    """The buckets of a window or of pending money: start -> nano-dollars."""
    ring = {}
    for member, nanousd in members_of(client, key).items():
        start = int(member.partition(":")[0])
        ring[start] = ring.get(start, 0) + nanousd
    return ring
