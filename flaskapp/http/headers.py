"""The headers of every guarded route: the idempotency key that it reads, and what it sends with an admitted answer."""

import hashlib
import re
from collections.abc import Callable
from functools import lru_cache

from flask import Request

from backends.clock import US_PER_SECOND
from backends.contract import Idempotency, Limits, Reservation
from backends.keys import SECONDS_PER_DAY
from backends.money import usd_text
from flaskapp.http.refusals import InvalidRequest

UNGUARDED = "off"
IDEMPOTENCY_HEADER = "Idempotency-Key"
_KEY = re.compile(r"[!-~]{1,128}")
_NANOUSD_PER_MICROUSD = 1_000
_UNIT = "tollgate-microusd"


def read_idempotency(request: Request, identifier: str, route: str, body_text: Callable[[], str]) -> Idempotency | None:
    """The idempotency key of `request`, for its identifier and route alone; None without the header.

    `body_text` gives the body as the client sent it, in one spelling.

    Raises:
        InvalidRequest: the header is not 1 to 128 visible ASCII characters.
    """
    key = request.headers.get(IDEMPOTENCY_HEADER)
    if key is None:
        return None
    if not _KEY.fullmatch(key):
        raise InvalidRequest(400, IDEMPOTENCY_HEADER, "has to be 1 to 128 visible ASCII characters")
    scoped = hashlib.sha256(f"{identifier}\n{route}\n{key}".encode()).hexdigest()
    return Idempotency(scoped[:32], hashlib.sha256(body_text().encode()).hexdigest()[:16])


def timing(seconds: float) -> str:
    """``Server-Timing``: the time of the check alone."""
    return f"throttle;dur={seconds * 1_000:.3f}"


def admitted_headers(reservation: Reservation | None, limits: Limits, check_seconds: float) -> dict[str, str]:
    """The headers of an admitted answer; without a reservation only ``X-Throttle-Backend: off``."""
    if reservation is None:
        return {"X-Throttle-Backend": UNGUARDED}
    return {
        "X-Throttle-Backend": reservation.backend,
        "X-Cost-Reserved-USD": usd_text(reservation.cost_nanousd),
        "Server-Timing": timing(check_seconds),
        **rate_limit_headers(reservation, limits),
    }


def rate_limit_headers(reservation: Reservation, limits: Limits) -> dict[str, str]:
    """``RateLimit-Policy`` and ``RateLimit`` after draft-ietf-httpapi-ratelimit-headers, from the reply of `reserve`.

    Amounts are micro-dollars, rounded down; `t` is seconds until the next amount leaves the window, or the day ends.
    """
    made_at_us = reservation.made_at_us
    day_seconds_left = SECONDS_PER_DAY - made_at_us // US_PER_SECOND % SECONDS_PER_DAY
    window_seconds_left = max(
        1, -(-(reservation.window_frees_at_seconds * US_PER_SECOND - made_at_us) // US_PER_SECOND)
    )
    window_left = max(0, limits.window_nanousd - reservation.window_spent_nanousd) // _NANOUSD_PER_MICROUSD
    day_left = max(0, limits.day_nanousd - reservation.day_spent_nanousd) // _NANOUSD_PER_MICROUSD
    return {
        "RateLimit-Policy": _policy(limits),
        "RateLimit": f'"window";r={window_left};t={window_seconds_left}, "day";r={day_left};t={day_seconds_left}',
    }


@lru_cache(maxsize=16)
def _policy(limits: Limits) -> str:
    rows = (
        ("window", limits.window_nanousd, limits.window_seconds),
        ("day", limits.day_nanousd, SECONDS_PER_DAY),
    )
    return ", ".join(
        f'"{name}";q={limit // _NANOUSD_PER_MICROUSD};w={seconds};qu="{_UNIT}"' for name, limit, seconds in rows
    )
