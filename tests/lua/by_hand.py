"""The scripts without the strategy around them: KEYS and ARGV made here, from what the head of each script says."""

import hashlib

from backends.keys import bucket_seconds_of
from backends.records import digest_of
from backends.store.scripts import Script

RESERVE, EXTEND, SETTLE = Script("reserve.lua"), Script("extend.lua"), Script("settle.lua")
CONSUME = Script("consume.lua")
US = 1_000_000
NOW_S = 1_773_483_600  # 2026-03-14 10:20:00 UTC
BUCKET_S = bucket_seconds_of(600)
NOW_US = NOW_S * US + 250_000
DATE, HOUR = "2026-03-14", "2026-03-14T10"
ROOM = 10**12
COST = 4_000_000
WHO, NETWORK, ID = "hash456", "198.51.100.7", "rid1"

RESERVE_KEYS = {
    "record": f"llm:reservation:{ID}",
    "marker": f"llm:throttle:{WHO}",
    "recent": f"llm:cost:recent:{WHO}",
    "daily": f"llm:cost:daily:{WHO}:{DATE}",
    "network_recent": f"llm:network:recent:{NETWORK}",
    "network_daily": f"llm:network:daily:{NETWORK}:{DATE}",
    "global_hourly": f"llm:global:hourly:{HOUR}",
    "global_daily": f"llm:global:daily:{DATE}",
    "pending_identifier": f"llm:open:identifier:{WHO}",
    "pending_network": f"llm:open:network:{NETWORK}",
    "pending_global": "llm:open:global",
}
RESET = f"llm:reset:{WHO}"
KEY, BODY, KEY_KEEP_S = "0123456789abcdef" * 2, "fedcba9876543210", 86_400
BUCKET_KINDS = ("recent", "network_recent", "pending_identifier", "pending_network", "pending_global")
TOTALS = ("daily", "network_daily", "global_hourly", "global_daily")
WHO_DIGEST, NETWORK_DIGEST = digest_of(WHO), digest_of(NETWORK)
REQUEST_DIGEST = hashlib.blake2b(b"anything", digest_size=6).hexdigest()


def reserve_args(**changes):
    args = {
        "now_us": NOW_US,
        "deadline_us": NOW_US + 500_000,
        "hour": NOW_S // 3600,
        "cost": COST,
        "request_digest": REQUEST_DIGEST,
        "window_s": 600,
        "window": ROOM,
        "day": ROOM,
        "network_window": ROOM,
        "network_day": ROOM,
        "hour_of_all": ROOM,
        "day_of_all": ROOM,
        "throttle_s": 30,
        "mark_when_busy": "1",
        "open_s": 120,
        "whose": f"{WHO_DIGEST} {NETWORK_DIGEST}",
        "at_least": "",
    }
    return list({**args, **changes}.values())


def extend_args(to=2 * COST, **changes):
    args = {
        "now_us": NOW_US + US,
        "deadline_us": NOW_US + 2 * US,
        "request_digest": REQUEST_DIGEST,
        "to": to,
        "at_least": to,
        "made_at_us": NOW_US,
        "window_s": 600,
        "bucket_s": BUCKET_S,
        "open_s": 120,
        "open_bucket_s": 10,
        "window": ROOM,
        "day": ROOM,
        "network_window": ROOM,
        "network_day": ROOM,
        "hour_of_all": ROOM,
        "day_of_all": ROOM,
        "keep_s": 3600,
    }
    return list({**args, **changes}.values())


def settle_args(actual=7, **changes):
    args = {
        "now_us": NOW_US + US,
        "request_digest": REQUEST_DIGEST,
        "ending": "settled",
        "actual": actual,
        "made_at_us": NOW_US,
        "window_s": 600,
        "bucket_s": BUCKET_S,
        "open_s": 120,
        "open_bucket_s": 10,
        "keep_s": 3600,
        "who": WHO_DIGEST,
        "network_digest": NETWORK_DIGEST,
    }
    return list({**args, **changes}.values())


def keys_of_reserve(rid=ID, **changes):
    return list({**RESERVE_KEYS, "record": f"llm:reservation:{rid}", **changes}.values())


def keys_of_settle(rid=ID):
    record, _, *books = keys_of_reserve(rid)
    return [record, *books, RESET]


def reserve(client, rid=ID, key=None, **changes):
    """With `key`, the digest of a caller's own: KEYS 12 and its two arguments too."""
    keys, args = ([key_of(key)], [BODY, rid]) if key else ([], [])
    return RESERVE.run(client, keys_of_reserve(rid) + keys, reserve_args(**changes) + args)


def extend(client, rid=ID, to=2 * COST, key=None, **changes):
    keys, args = ([key_of(key)], [rid]) if key else ([], [])
    return EXTEND.run(client, keys_of_settle(rid) + keys, extend_args(to, **changes) + args)


def settle(client, rid=ID, actual=7, key=None, **changes):
    keys, args = ([key_of(key)], [BODY, rid, KEY_KEEP_S]) if key else ([], [])
    return SETTLE.run(client, keys_of_settle(rid) + keys, settle_args(actual, **changes) + args)


def key_of(digest):
    return f"llm:idempotency:{digest}"


def dump(client):
    """Every key, byte for byte."""
    return {name: client.dump(name) for name in client.keys("*")}
