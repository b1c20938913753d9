"""``GET /api/v1/usage``: what the caller has spent, has pending and has left of each of its own limits, and until when.

Its own are the enforced budgets of its identifier and of its API key. `window_seconds` is the length of a window or of
the calendar period that now is; what lasts for ever has none, and is never renewed.

It needs no challenge: a caller that knows a hash learns amounts and nothing else, and could already spend that budget.
"""

from collections.abc import Callable

from flask import Blueprint, Request, Response, json, request

from backends.budgets import Calendar, span_at
from backends.clock import US_PER_SECOND, Clock
from backends.contract import Books, BudgetUse, Marker
from backends.errors import StoreError
from backends.guard import Guard
from backends.money import usd_text
from flaskapp.budgets import own
from flaskapp.http.api_keys import ApiKeys
from flaskapp.http.headers import FIRST_NAMED, length_seconds
from flaskapp.http.identity import HEADER, Identity, identify
from flaskapp.http.refusals import THROTTLE_UNAVAILABLE, problem
from flaskapp.settings import LiveSettings

ROUTE = "/api/v1/usage"
_RETRY_SECONDS = 1
_NO_MODEL = ""
"""Whatever budgets models have, they are not the caller's own."""


def make_usage(guard: Guard, settings: Callable[[], LiveSettings], keys: ApiKeys, clock: Clock) -> Blueprint:
    """The blueprint ``usage``; a caller with one of `keys` gets what that key has spent at ``/v1``."""
    blueprint = Blueprint("usage", __name__)

    @blueprint.get(ROUTE, endpoint="tell")  # the endpoint's name is part of its rate counters' keys
    def usage() -> Response:
        who, values = _who_asks(request, keys), settings()
        budgets = own(values.plan.of(who.owners(_NO_MODEL), clock.now_us()))
        try:
            books = guard.books(budgets)
        except StoreError:
            message = "What was spent cannot be looked up now. Please try again."
            return problem(503, THROTTLE_UNAVAILABLE, "store", message, retry_after_seconds=_RETRY_SECONDS)
        body = {
            "enabled": values.enable_cost_throttling,
            "identifier": who.identifier,
            "as_of": books.as_of_us // US_PER_SECOND,
            "limits": _limits(books),
            "throttled": None if books.marker is None else _throttled(books.marker),
        }
        text = json.dumps(body, sort_keys=False) + "\n"
        return Response(text, mimetype="application/json", headers={"Cache-Control": "no-store"})

    return blueprint


def find_asker(request: Request, keys: ApiKeys) -> Identity | None:
    """The identity of a visitor, or of an API key; None where that is not registered.

    Raises:
        InvalidRequest: the fingerprint is not one.
    """
    return keys.find(request) if _brings_a_key(request, keys) else identify(request)


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


def _limits(books: Books) -> dict[str, object]:
    uses = sorted(books.uses, key=lambda use: use.budget.name != FIRST_NAMED)
    return {use.budget.name: _limit(use, books.as_of_us) for use in uses}


def _limit(use: BudgetUse, now_us: int) -> dict[str, object]:
    """What is booked, in two parts, pending and spent, what is left, and when it renews."""
    period, limit_nanousd, now_seconds = use.budget.period, use.budget.limit_nanousd or 0, now_us // US_PER_SECOND
    pending_nanousd = min(use.pending_nanousd, use.spent_nanousd)
    seconds = length_seconds(period, now_seconds)
    # A calendar period ends whether something is booked in it or not.
    ends_at = span_at(period, now_seconds).end_seconds if isinstance(period, Calendar) else use.renews_at_seconds
    return {
        **({} if seconds is None else {"window_seconds": seconds}),
        "limit_usd": usd_text(limit_nanousd),
        "spent_usd": usd_text(use.spent_nanousd - pending_nanousd),
        "held_usd": usd_text(pending_nanousd),
        "left_usd": usd_text(max(0, limit_nanousd - use.spent_nanousd)),
        **_renewal(ends_at, now_us),
    }


def _renewal(at_seconds: int | None, now_us: int) -> dict[str, object]:
    """When the first amount leaves the period; None where nothing is booked, and where it never does."""
    seconds_left = None if at_seconds is None else max(1, -(-(at_seconds * US_PER_SECOND - now_us) // US_PER_SECOND))
    return {"renews_at": at_seconds, "renews_in_seconds": seconds_left}


def _throttled(marker: Marker) -> dict[str, object]:
    return {
        "reason": marker.cause.value,
        "budget": marker.budget,
        "ends_in_seconds": marker.left_seconds,
        "retry_after_seconds": marker.retry_after_seconds,
        "in_flight": marker.in_flight,
    }
