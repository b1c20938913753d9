"""Every key that the guard keeps in Redis is made here, and nowhere else.

==================================  ======  =======================================  ===========================
key                                 type    holds                                    TTL
==================================  ======  =======================================  ===========================
``settings``                        string  live settings, one JSON object           for ever
``llm:throttle:<id>``               string  cause, its end (us), the cause's end     the marker's own
                                            (us), busy or spent
``llm:cost:recent:<id>``            zset    bucket start (s) -> nano-dollars         window + one bucket
``llm:cost:daily:<id>:<date>``      string  nano-dollars of that UTC day             a day past its end
``llm:network:recent:<net>``        zset    bucket start (s) -> nano-dollars         window + one bucket
``llm:network:daily:<net>:<date>``  string  nano-dollars of that UTC day             a day past its end
``llm:global:hourly:<date>T<hour>`` string  nano-dollars of that UTC hour            two hours past its end
``llm:global:daily:<date>``         string  nano-dollars of that UTC day             a day past its end
``llm:open:identifier:<id>``        zset    bucket start (s) -> nano-dollars pending  stream deadline + 5 s + bucket
``llm:open:network:<net>``          zset    the same                                 the same
``llm:open:global``                 zset    the same                                 an hour longer
``llm:reservation:<rid>``           string  state, nano-dollars, made (us), request  an hour past its end
                                            digest, window and pending (s), owners
``llm:idempotency:<digest>``        string  state, body, rid, nano-dollars, until    24 hours
``llm:reset:<id>``                  string  when its books were cleared (us)         two days
``llm:challenge:<challenge>``       string  the hash and network it was given to     300 s
``llm:session:<digest>``            string  that a session of the dashboard ended    8 hours
``llm:rate:…``                      string  flask-limiter's request counters         their own window
==================================  ======  =======================================  ===========================

The buckets of a window are at most `WINDOW_BUCKETS` + 1, those of pending money `PENDING_BUCKETS` + 2, however many
requests they stand for.
"""

import re
from datetime import UTC, date, datetime
from functools import lru_cache
from typing import NamedTuple

SETTINGS_KEY = "settings"
RATE_PREFIX = "llm:rate"
CHALLENGE_PREFIX = "llm:challenge:"
ENDED_SESSION_PREFIX = "llm:session:"
RECORD_PREFIX = "llm:reservation:"

WINDOW_BUCKETS = 20
PENDING_BUCKETS = 12
LIVE_PENDING_BUCKETS = PENDING_BUCKETS + 1
"""So many can count at once; where there are more, expired ones are removed when a new one comes."""
RECORD_KEEP_SECONDS = 3_600
IDEMPOTENCY_KEEP_SECONDS = 86_400
RESET_KEEP_SECONDS = 172_800
"""Longer than the TTL of any total that it may have cleared, and of any reservation that was pending then."""
SECONDS_PER_HOUR = 3_600
SECONDS_PER_DAY = 86_400


@lru_cache(maxsize=64)
def bucket_seconds_of(window_seconds: int) -> int:
    """Length of a bucket of the window: at most `WINDOW_BUCKETS` + 1 of them count at once."""
    return -(-window_seconds // WINDOW_BUCKETS)


@lru_cache(maxsize=64)
def pending_bucket_seconds_of(pending_seconds: int) -> int:
    """Length of a bucket of pending money."""
    return -(-pending_seconds // PENDING_BUCKETS)


@lru_cache(maxsize=8)
def _hour_text(unix_hour: int) -> str:
    return datetime.fromtimestamp(unix_hour * SECONDS_PER_HOUR, UTC).strftime("%Y-%m-%dT%H")


class BookKeys(NamedTuple):
    """The keys of one reservation, in the order in which `reserve.lua` takes them."""

    record: str
    marker: str
    recent: str
    daily: str
    network_recent: str
    network_daily: str
    global_hourly: str
    global_daily: str
    pending_identifier: str
    pending_network: str
    pending_global: str


def book_keys(reservation_id: str, identifier: str, network: str, at_seconds: int) -> BookKeys:
    """The keys of a reservation that is made at `at_seconds` (unix time)."""
    hour = _hour_text(at_seconds // SECONDS_PER_HOUR)
    day = hour[:10]
    # By place and not by name: each decision passes here.
    return BookKeys(
        f"{RECORD_PREFIX}{reservation_id}",
        f"llm:throttle:{identifier}",
        f"llm:cost:recent:{identifier}",
        f"llm:cost:daily:{identifier}:{day}",
        f"llm:network:recent:{network}",
        f"llm:network:daily:{network}:{day}",
        f"llm:global:hourly:{hour}",
        f"llm:global:daily:{day}",
        f"llm:open:identifier:{identifier}",
        f"llm:open:network:{network}",
        "llm:open:global",
    )


def idempotency_key(digest: str) -> str:
    """The key that remembers a caller's idempotency key."""
    return f"llm:idempotency:{digest}"


def reset_key(identifier: str) -> str:
    """The key that says when an identifier's books were cleared: what was reserved before is not in them any more."""
    return f"llm:reset:{identifier}"


class KnownKey(NamedTuple):
    """What a key of the table above is: `kind` is a field of `BookKeys`, or the word after ``llm:``."""

    kind: str
    owner: str
    """Identifier or network, where the kind has one; of a record the reservation id."""
    start_seconds: int
    """Unix time at which its day or hour begins; 0 where it has none."""


_DATE, _HOUR = r"(?P<date>\d{4}-\d\d-\d\d)", r"T(?P<hour>[01]\d|2[0-3])"
_KINDS = {
    "record": rf"{RECORD_PREFIX}(?P<owner>.+)",
    "recent": r"llm:cost:recent:(?P<owner>.+)",
    "daily": rf"llm:cost:daily:(?P<owner>.+):{_DATE}",
    "network_recent": r"llm:network:recent:(?P<owner>.+)",
    "network_daily": rf"llm:network:daily:(?P<owner>.+):{_DATE}",
    "global_hourly": rf"llm:global:hourly:{_DATE}{_HOUR}",
    "global_daily": rf"llm:global:daily:{_DATE}",
    "pending_identifier": r"llm:open:identifier:(?P<owner>.+)",
    "pending_network": r"llm:open:network:(?P<owner>.+)",
    "pending_global": r"llm:open:global",
    "marker": r"llm:throttle:(?P<owner>.+)",
    "reset": r"llm:reset:(?P<owner>.+)",
    "idempotency": r"llm:idempotency:(?P<owner>[0-9a-f]{32})",
    "challenge": rf"{CHALLENGE_PREFIX}(?P<owner>[0-9a-f]{{64}})",
    "session": rf"{ENDED_SESSION_PREFIX}(?P<owner>[0-9a-f]{{32}})",
    "rate": rf"{RATE_PREFIX}(?P<owner>.+)",
}
_PATTERNS = {kind: re.compile(pattern, re.DOTALL) for kind, pattern in _KINDS.items()}


def known_key(key: str) -> KnownKey | None:
    """What a key is; None for one that is not in the table."""
    for kind, pattern in _PATTERNS.items():
        match = pattern.fullmatch(key)
        if match is not None:
            parts = match.groupdict()
            try:
                start_seconds = _start_of(parts.get("date"), parts.get("hour"))
            except ValueError:  # no such day
                return None
            return KnownKey(kind, parts.get("owner") or "", start_seconds)
    return None


def _start_of(day: str | None, hour: str | None) -> int:
    if day is None:
        return 0
    days = date.fromisoformat(day).toordinal() - date(1970, 1, 1).toordinal()
    return days * SECONDS_PER_DAY + int(hour or 0) * SECONDS_PER_HOUR
