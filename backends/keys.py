"""Every key that the guard keeps in Redis is made here, and nowhere else.

==================================  ======  =======================================  ===========================
key                                 type    holds                                    TTL
==================================  ======  =======================================  ===========================
``settings``                        string  live settings, one JSON object           for ever
``llm:settings:unset:<setting>``    string  that a change took it out on purpose     31 days
``llm:throttle:<id>``               string  cause, its end (us), the cause's end     the marker's own
                                            (us), busy or spent
``llm:cost:recent:<id>``            zset    bucket start (s) -> nano-dollars         window + one bucket
``llm:cost:daily:<id>:<date>``      string  nano-dollars of that UTC day             a day past its end
``llm:network:recent:<net>``        zset    bucket start (s) -> nano-dollars         window + one bucket
``llm:network:daily:<net>:<date>``  string  nano-dollars of that UTC day             a day past its end
``llm:global:hourly:<date>T<hour>`` string  nano-dollars of that UTC hour            two hours past its end
``llm:global:daily:<date>``         string  nano-dollars of that UTC day             a day past its end
``llm:budget:<name>:sliding<n>:``   zset    bucket start (s) -> nano-dollars         window + one bucket
``<owner>``
``llm:budget:<name>:<unit>:``       string  nano-dollars of that hour, day, week or  a day past its end
``<owner>:<start>``                         month, which starts then (unix s)
``llm:budget:<name>:forever:``      string  nano-dollars                             for ever
``<owner>``
``llm:running:…``                   string  what all buckets of a window but the     one bucket, at most a minute
                                            present one came to
``llm:open:<scope>:<owner>``        zset    bucket start (s), with what of the       stream deadline + 5 s + bucket
                                            owner it is charged to -> nano-dollars
``llm:open:global``                 zset    the same                                 an hour longer
``llm:reservation:<rid>``           string  state, nano-dollars, made (us), request  an hour past its end
                                            digest, window and pending (s), owners,
                                            digests of the keys of further budgets
``llm:idempotency:<digest>``        string  state, body, rid, nano-dollars, until    24 hours
``llm:reset:<id>``                  string  when its books were cleared (us)         two days
``llm:emergency:<instance>:``       string  as a reservation's: nano-dollars, the    a day past its day's end
``<date>T<hour>``                           hour (us), how often it changed
``llm:challenge:<challenge>``       string  the hash and network it was given to     300 s
``llm:session:<digest>``            string  that a session of the dashboard ended    8 hours
``llm:overhead:<model>``            string  tokens that its template adds            30 days
``llm:rate:<digest>``               string  how many requests, or counters           their own window
==================================  ======  =======================================  ===========================

The buckets of a window are at most `WINDOW_BUCKETS` + 1, those of pending money `PENDING_BUCKETS` + 2 for each list of
budgets that reservations of the owner are charged to, however many requests they stand for.
"""

import hashlib
import re
from collections.abc import Sequence
from datetime import UTC, date, datetime
from functools import lru_cache
from typing import NamedTuple

from backends.budgets import (
    BUILT_IN,
    EVERYBODY,
    FURTHER_STATUS,
    SECONDS_PER_DAY,
    SECONDS_PER_HOUR,
    Budget,
    Calendar,
    Period,
    Reason,
    Scope,
    Sliding,
    span_at,
)

SETTINGS_KEY = "settings"
SETTING_UNSET_PREFIX = "llm:settings:unset:"
RATE_PREFIX = "llm:rate:"
CHALLENGE_PREFIX = "llm:challenge:"
ENDED_SESSION_PREFIX = "llm:session:"
OVERHEAD_PREFIX = "llm:overhead:"
RECORD_PREFIX = "llm:reservation:"
EMERGENCY_PREFIX = "llm:emergency:"
MARKER_PREFIX = "llm:throttle:"
FURTHER_PREFIX = "llm:budget:"
RUNNING_PREFIX = "llm:running:"
PENDING_PREFIX = "llm:open:"

WINDOW_BUCKETS = 20
PENDING_BUCKETS = 12
LIVE_PENDING_BUCKETS = PENDING_BUCKETS + 1
"""So many can count at once; where there are more, expired ones are removed when a new one comes."""
RECORD_KEEP_SECONDS = 3_600
IDEMPOTENCY_KEEP_SECONDS = 86_400
RESET_KEEP_SECONDS = 172_800
"""Longer than the TTL of any daily total that it may have cleared, and of any reservation that was pending then."""
BOUNDARY_SECONDS = 900
"""Periods begin and end at multiples of this, whatever the zone."""


@lru_cache(maxsize=64)
def bucket_seconds_of(window_seconds: int) -> int:
    """Length of a bucket of the window: at most `WINDOW_BUCKETS` + 1 of them count at once."""
    return -(-window_seconds // WINDOW_BUCKETS)


@lru_cache(maxsize=64)
def pending_bucket_seconds_of(pending_seconds: int) -> int:
    """Length of a bucket of pending money."""
    return -(-pending_seconds // PENDING_BUCKETS)


# Where budgets are kept.


class Layout(NamedTuple):
    """How the budgets of one name, scope and period are kept, around one moment."""

    prefix: str
    """Of the key: then the owner comes, if `names_owner`, and the suffix."""
    suffix: str
    names_owner: bool
    pending_prefix: str
    window_seconds: int
    """0 for a total."""
    start_seconds: int
    """Of the period; 0 for a window, and for what lasts for ever."""
    end_seconds: int
    """0 for a window, and for what never ends."""
    keep_until_seconds: int
    """When the key of a total may go; 0 where it stays for ever."""
    status: int
    reason: Reason
    cause: str
    """What a throttle marker says that its refusal set."""
    is_built_in: bool
    plan: str
    """What `reserve.lua` is sent of it."""


class Row(NamedTuple):
    """One budget of a request, and where it is kept in the period of one moment."""

    budget: Budget
    key: str
    """A total, or the buckets of a window."""
    pending_key: str
    """The buckets of what is pending of its owner."""
    layout: Layout

    @property
    def bucket_seconds(self) -> int:
        """Length of a bucket of a window."""
        return bucket_seconds_of(self.layout.window_seconds)


def rows_at(budgets: Sequence[Budget], at_seconds: int) -> list[Row]:
    """Each budget with its keys of the period that holds a moment (unix time)."""
    quarter = at_seconds // BOUNDARY_SECONDS
    rows = []
    # Each decision passes here: what does not depend on the owner is made once a quarter of an hour.
    for budget in budgets:
        name, owner, period, _, scope, *_ = budget
        layout = _layout(name, scope, period, quarter)
        key = f"{layout.prefix}{owner}{layout.suffix}" if layout.names_owner else f"{layout.prefix}{layout.suffix}"
        pending = layout.pending_prefix
        rows.append(Row(budget, key, pending if scope == Scope.GLOBAL else f"{pending}{owner}", layout))
    return rows


@lru_cache(maxsize=1_024)
def _layout(name: str, scope: Scope, period: Period, quarter: int) -> Layout:
    pending_prefix = f"{PENDING_PREFIX}{scope}" + ("" if scope == Scope.GLOBAL else ":")
    window = period.seconds if isinstance(period, Sliding) else 0
    start, end = span_at(period, quarter * BOUNDARY_SECONDS) if isinstance(period, Calendar) else (0, 0)
    row = BUILT_IN.get(name)
    if row is None:
        prefix, suffix = f"{FURTHER_PREFIX}{name}:{period.word}:", f":{start}" if end else ""
        if scope == Scope.GLOBAL:
            prefix += EVERYBODY
        kept, status, reason, cause = end + SECONDS_PER_DAY, FURTHER_STATUS, Reason.BUDGET_LIMIT, f"budget:{name}"
    else:
        hour = datetime.fromtimestamp(start, UTC).strftime("%Y-%m-%dT%H")
        prefix, _, suffix = row.key.replace("{date}", hour[:10]).replace("{hour}", hour).partition("{owner}")
        kept, status, reason, cause = end + row.keep_seconds, row.status, row.reason, row.reason.value
    keep_until = kept if end else 0
    return Layout(
        prefix=prefix,
        suffix=suffix,
        names_owner=scope != Scope.GLOBAL,
        pending_prefix=pending_prefix,
        window_seconds=window,
        start_seconds=start,
        end_seconds=end,
        keep_until_seconds=keep_until,
        status=status,
        reason=reason,
        cause=cause,
        is_built_in=row is not None,
        plan=f"{status},{start},{end},{keep_until},{cause}",
    )


def cause_of(word: str) -> tuple[Reason, str]:
    """The reason and the budget's name that a throttle marker stands for; one that was set by hand is the window's."""
    for name, row in BUILT_IN.items():
        if row.reason.value == word:
            return row.reason, name
    kind, _, name = word.partition(":")
    return (Reason.BUDGET_LIMIT, name) if kind == "budget" and name else (Reason.WINDOW_LIMIT, "window")


def running_key(key: str) -> str:
    """The key that says what the window at `key` came to."""
    return f"{RUNNING_PREFIX}{key[4:]}"


# Other keys.


def record_key(reservation_id: str) -> str:
    """The key of a reservation's record."""
    return f"{RECORD_PREFIX}{reservation_id}"


def marker_key(identifier: str) -> str:
    """The key of an identifier's throttle marker."""
    return f"{MARKER_PREFIX}{identifier}"


def idempotency_key(digest: str) -> str:
    """The key that remembers a caller's idempotency key."""
    return f"llm:idempotency:{digest}"


def emergency_key(instance: str, began_seconds: int) -> str:
    """The key of what an instance has spent of its emergency budget in the UTC hour that began then."""
    return f"{EMERGENCY_PREFIX}{instance}:{datetime.fromtimestamp(began_seconds, UTC):%Y-%m-%dT%H}"


def counter_key(text: str) -> str:
    """The key of a counter of requests; short, however long the text is that says whose it is."""
    return RATE_PREFIX + hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def reset_key(identifier: str) -> str:
    """The key that says when an identifier's books were cleared: what was reserved before is not in them any more."""
    return f"llm:reset:{identifier}"


# What a key is.


class KnownKey(NamedTuple):
    """What a key of the table above is."""

    kind: str
    """``total``, ``window``, ``pending``, ``record``, or the word after ``llm:``."""
    owner: str = ""
    """Of what it belongs to; of a record the reservation id."""
    budget: str = ""
    """The name of the budget of a total or a window."""
    scope: Scope | None = None
    """Of a built-in budget and of pending money: the keys of further ones do not say it."""
    start_seconds: int = 0
    """Unix time at which the period of a total begins; 0 where it has none."""
    word: str = ""
    """The period word of a further budget's key."""


_DATE, _HOUR = r"(?P<date>\d{4}-\d\d-\d\d)", r"(?P<date>\d{4}-\d\d-\d\d)T(?P<hour>[01]\d|2[0-3])"
_OTHERS = {
    "record": rf"{RECORD_PREFIX}(?P<owner>.+)",
    "emergency": rf"{EMERGENCY_PREFIX}(?P<owner>[0-9a-f]{{16}}:\d{{4}}-\d\d-\d\dT\d\d)",
    "marker": rf"{MARKER_PREFIX}(?P<owner>.+)",
    "reset": r"llm:reset:(?P<owner>.+)",
    "running": rf"{RUNNING_PREFIX}(?P<owner>.+)",
    "idempotency": r"llm:idempotency:(?P<owner>[0-9a-f]{32})",
    "challenge": rf"{CHALLENGE_PREFIX}(?P<owner>[0-9a-f]{{64}})",
    "session": rf"{ENDED_SESSION_PREFIX}(?P<owner>[0-9a-f]{{32}})",
    "overhead": rf"{OVERHEAD_PREFIX}(?P<owner>.+)",
    "unset": rf"{SETTING_UNSET_PREFIX}(?P<owner>[a-z_]+)",
    "rate": rf"{RATE_PREFIX}(?P<owner>.+)",
}
_FURTHER = (
    rf"{FURTHER_PREFIX}(?P<budget>[a-z0-9_]{{1,32}}):"
    r"(?:(?P<long>sliding[1-9]\d{0,6}|forever):(?P<owner>.+)|(?P<unit>hour|day|week|month):(?P<whose>.+):(?P<start>\d{1,12}))"
)
_WINDOW_WORD = "sliding"
_PATTERNS = {
    (name, row.scope): row.key.replace("{date}", _DATE).replace("{hour}", _HOUR).replace("{owner}", "(?P<owner>.+)")
    for name, row in BUILT_IN.items()
}
_BUILT_IN = {which: re.compile(pattern, re.DOTALL | re.ASCII) for which, pattern in _PATTERNS.items()}
_SCOPES = "|".join(scope for scope in Scope if scope != Scope.GLOBAL)
_PENDING = re.compile(rf"{PENDING_PREFIX}(?:(?P<all>global)|(?P<scope>{_SCOPES}):(?P<owner>.+))", re.DOTALL)
_BUDGET = re.compile(_FURTHER, re.DOTALL | re.ASCII)
_OTHER = {kind: re.compile(pattern, re.DOTALL) for kind, pattern in _OTHERS.items()}


def known_key(key: str) -> KnownKey | None:
    """What a key is; None for one that is not in the table."""
    for (name, scope), pattern in _BUILT_IN.items():
        if match := pattern.fullmatch(key):
            parts = match.groupdict()
            try:
                start_seconds = _start_of(parts.get("date"), parts.get("hour"))
            except ValueError:  # no such day
                return None
            kind = "total" if "date" in parts else "window"
            return KnownKey(kind, parts.get("owner") or "", name, scope, start_seconds)
    if match := _PENDING.fullmatch(key):
        return KnownKey("pending", match["owner"] or "", scope=Scope(match["scope"] or match["all"]))
    if match := _BUDGET.fullmatch(key):
        word, owner = match["long"] or match["unit"], match["owner"] or match["whose"]
        kind = "window" if word.startswith(_WINDOW_WORD) else "total"
        return KnownKey(kind, owner, match["budget"], None, int(match["start"] or 0), word)
    for kind, pattern in _OTHER.items():
        if match := pattern.fullmatch(key):
            return KnownKey(kind, match["owner"])
    return None


def window_seconds_of(word: str) -> int:
    """The length of a window by the period word of its key."""
    return int(word.removeprefix(_WINDOW_WORD))


def _start_of(day: str | None, hour: str | None) -> int:
    if day is None:
        return 0
    days = date.fromisoformat(day).toordinal() - date(1970, 1, 1).toordinal()
    return days * SECONDS_PER_DAY + int(hour or 0) * SECONDS_PER_HOUR
