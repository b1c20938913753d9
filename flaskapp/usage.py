"""``GET /api/v1/usage``: what the caller has spent, has pending and has left of each of its own limits, and until when.

It needs no challenge: a caller that knows a hash learns amounts and nothing else, and could already spend that budget.
"""

from collections.abc import Callable

from flask import Blueprint, Request, Response, json, request

from backends.clock import US_PER_SECOND
from backends.contract import Books, Marker
from backends.errors import StoreError
from backends.guard import Guard
from backends.keys import SECONDS_PER_DAY
from backends.money import usd_text
from flaskapp.http.api_keys import ApiKeys
from flaskapp.http.identity import HEADER, Identity, identify, rate_key
from flaskapp.http.refusals import THROTTLE_UNAVAILABLE, problem
from flaskapp.settings import LiveSettings

ROUTE = "/api/v1/usage"
_RETRY_SECONDS = 1


def make_usage(guard: Guard, settings: Callable[[], LiveSettings], keys: ApiKeys) -> Blueprint:
    """The blueprint ``usage``; a caller with one of `keys` gets what that key has spent at ``/v1``."""
    blueprint = Blueprint("usage", __name__)

    @blueprint.get(ROUTE, endpoint="tell")  # the endpoint's name is part of its rate counters' keys
    def usage() -> Response:
        who, values = _who_asks(request, keys), settings()
        try:
            books = guard.books(who.identifier, who.network, values.limits.window_seconds)
        except StoreError:
            message = "What was spent cannot be looked up now. Please try again."
            return problem(503, THROTTLE_UNAVAILABLE, "store", message, retry_after_seconds=_RETRY_SECONDS)
        body = {
            "enabled": values.enable_cost_throttling,
            "identifier": who.identifier,
            "as_of": books.as_of_us // US_PER_SECOND,
            "limits": _limits(books, values),
            "throttled": None if books.marker is None else _throttled(books.marker),
        }
        text = json.dumps(body, sort_keys=False) + "\n"
        return Response(text, mimetype="application/json", headers={"Cache-Control": "no-store"})

    return blueprint


def usage_rate_key(request: Request, keys: ApiKeys) -> str:
    """The key of the request counter; it never fails."""
    return keys.rate_key(request) if _brings_a_key(request, keys) else rate_key(request)


def _who_asks(request: Request, keys: ApiKeys) -> Identity:
    """The identity of a visitor, or of an API key.

    Raises:
        InvalidRequest: the fingerprint is not one.
        Unauthorized: the key is not registered.
    """
    return keys.identify(request) if _brings_a_key(request, keys) else identify(request)


def _brings_a_key(request: Request, keys: ApiKeys) -> bool:
    """Whether the caller is an API key; with a fingerprint it is a visitor, whose token may be another service's."""
    scheme = request.headers.get("Authorization", "").partition(" ")[0].lower()
    return scheme == "bearer" and HEADER not in request.headers and not keys.is_open


def _limits(books: Books, values: LiveSettings) -> dict[str, object]:
    limits = values.limits
    day_ends_at = (books.as_of_us // US_PER_SECOND // SECONDS_PER_DAY + 1) * SECONDS_PER_DAY
    window = _amounts(limits.window_nanousd, books.window_nanousd, books.pending_nanousd)
    day = _amounts(limits.day_nanousd, books.day_nanousd, books.pending_today_nanousd)
    return {
        "window": {
            "window_seconds": limits.window_seconds,
            **window,
            **_renewal(books.window_frees_at_seconds, books.as_of_us),
        },
        "day": {"window_seconds": SECONDS_PER_DAY, **day, **_renewal(day_ends_at, books.as_of_us)},
    }


def _amounts(limit_nanousd: int, booked_nanousd: int, pending_nanousd: int) -> dict[str, object]:
    """What is booked, in two parts, pending and spent, and what is left."""
    pending_nanousd = min(pending_nanousd, booked_nanousd)
    return {
        "limit_usd": usd_text(limit_nanousd),
        "spent_usd": usd_text(booked_nanousd - pending_nanousd),
        "held_usd": usd_text(pending_nanousd),
        "left_usd": usd_text(max(0, limit_nanousd - booked_nanousd)),
    }


def _renewal(at_seconds: int | None, now_us: int) -> dict[str, object]:
    """When the first amount leaves the period; None where nothing is booked."""
    seconds_left = None if at_seconds is None else max(1, -(-(at_seconds * US_PER_SECOND - now_us) // US_PER_SECOND))
    return {"renews_at": at_seconds, "renews_in_seconds": seconds_left}


def _throttled(marker: Marker) -> dict[str, object]:
    return {
        "reason": marker.cause.value,
        "ends_in_seconds": marker.left_seconds,
        "retry_after_seconds": marker.retry_after_seconds,
        "in_flight": marker.in_flight,
    }
