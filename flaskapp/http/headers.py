"""The headers of every guarded route: the idempotency key that it reads, and what it sends with an admitted answer."""

import hashlib
import re
from collections.abc import Callable
from functools import lru_cache

from flask import Request

from backends.budgets import Calendar, Period, Sliding, span_at
from backends.clock import US_PER_SECOND
from backends.contract import Idempotency, Reservation
from backends.money import usd_text
from flaskapp.budgets import OWN_SCOPES
from flaskapp.http.refusals import InvalidRequest

UNGUARDED = "off"
IDEMPOTENCY_HEADER, IDEMPOTENCY_VARIABLE = "Idempotency-Key", "HTTP_IDEMPOTENCY_KEY"
"""As clients send it, and as the server hands it on."""
IDEMPOTENCY_KEY = r"[!-~]{1,128}"
_KEY = re.compile(IDEMPOTENCY_KEY)
_NANOUSD_PER_MICROUSD = 1_000
_UNIT = "tollgate-microusd"
FIRST_NAMED = "window"
"""The budget that the headers name first."""
timing: Callable[[float], str] = "throttle;dur={:.3f}".format
"""``Server-Timing``: the time of the check alone, in milliseconds."""


def read_idempotency(request: Request, identifier: str, route: str, body_text: Callable[[], str]) -> Idempotency:
    """The idempotency key that came with `request`, for its identifier and route alone.

    `body_text` gives the body as the client sent it, in one spelling.

    Raises:
        InvalidRequest: the header is not 1 to 128 visible ASCII characters.
    """
    key = request.environ[IDEMPOTENCY_VARIABLE]
    if not _KEY.fullmatch(key):
        raise InvalidRequest(400, IDEMPOTENCY_HEADER, "has to be 1 to 128 visible ASCII characters")
    scoped = hashlib.sha256(f"{identifier}\n{route}\n{key}".encode()).hexdigest()
    return Idempotency(scoped[:32], hashlib.sha256(body_text().encode()).hexdigest()[:16])


def admitted_headers(reservation: Reservation | None, check_seconds: float) -> dict[str, str]:
    """The headers of an admitted answer; without a reservation only ``X-Throttle-Backend: off``.

    ``RateLimit-Policy`` and ``RateLimit`` are as draft-ietf-httpapi-ratelimit-headers has them, from the reply of
    `reserve`. They name the caller's own budgets and no others. Amounts are micro-dollars, rounded down; `w` is the
    length of the window or of this period, `t` is seconds until the next amount leaves the window, or the period ends.
    """
    if reservation is None:
        return {"X-Throttle-Backend": UNGUARDED}
    policies: list[_Named] = []
    left: list[str] = []
    booked = zip(reservation.budgets, reservation.spent_nanousd, reservation.renews_at_seconds, strict=True)
    for (name, _, period, limit_nanousd, scope, is_shadow, *_), spent_nanousd, renews_at_seconds in booked:
        if limit_nanousd is None or is_shadow or scope not in OWN_SCOPES:
            continue
        item = f'"{name}";r={max(0, limit_nanousd - spent_nanousd) // _NANOUSD_PER_MICROUSD}'
        if renews_at_seconds is not None:
            us_left = renews_at_seconds * US_PER_SECOND - reservation.made_at_us
            item = f"{item};t={max(1, -(-us_left // US_PER_SECOND))}"
        place = 0 if name == FIRST_NAMED else len(left)
        left.insert(place, item)
        ends_at_seconds = renews_at_seconds if isinstance(period, Calendar) else None
        policies.insert(place, (name, limit_nanousd, period, ends_at_seconds))
    return {
        "X-Throttle-Backend": reservation.backend,
        "X-Cost-Reserved-USD": usd_text(reservation.cost_nanousd),
        "Server-Timing": timing(check_seconds * 1_000),
        "RateLimit-Policy": _policy(tuple(policies)),
        "RateLimit": ", ".join(left),
    }


def length_seconds(period: Period, at_seconds: int) -> int | None:
    """The length of a window, or of the calendar period that holds a moment; None of what lasts for ever."""
    if isinstance(period, Calendar):
        start_seconds, end_seconds = span_at(period, at_seconds)
        return end_seconds - start_seconds
    return period.seconds if isinstance(period, Sliding) else None


_Named = tuple[str, int, Period, int | None]
"""A budget's name, limit (nano-dollars) and period, and when that ends, if it is one of a calendar (unix time)."""


@lru_cache(maxsize=64)
def _policy(named: tuple[_Named, ...]) -> str:
    items = []
    for name, limit_nanousd, period, ends_at_seconds in named:
        seconds = length_seconds(period, (ends_at_seconds or 1) - 1)
        length = "" if seconds is None else f";w={seconds}"
        items.append(f'"{name}";q={limit_nanousd // _NANOUSD_PER_MICROUSD}{length};qu="{_UNIT}"')
    return ", ".join(items)
