"""Refusals and errors as responses: RFC 9457 problems, with their statuses, words and headers in one place."""

from collections.abc import Callable, Mapping, Sequence

from flask import Flask, Response, current_app, g, has_request_context, json, request
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound, RequestEntityTooLarge
from werkzeug.http import HTTP_STATUS_CODES

from backends.budgets import Budget, Reason, whole_limits
from backends.contract import Duplicate, DuplicateState, Refusal
from backends.errors import ThrottleUnavailable
from backends.money import usd_text
from flaskapp.http.not_offered import is_googles, not_offered
from flaskapp.http.open_bodies import TooManyBodies
from flaskapp.http.openai_errors import (
    MOST_WAIT_SECONDS,
    error_object,
    retry_headers,
    speaks_openai,
    status_for_openai,
)

COST_THROTTLED = "cost_throttled"
RATE_LIMITED = "rate_limited"
INVALID_CHALLENGE = "invalid_challenge"
INVALID_REQUEST = "invalid_request"
UPSTREAM_ERROR = "upstream_error"
UPSTREAM_REFUSED = "upstream_refused"
UPSTREAM_BUSY = "upstream_busy"
THROTTLE_UNAVAILABLE = "throttle_unavailable"
DUPLICATE_REQUEST = "duplicate_request"
INTERNAL_ERROR = "internal_error"

_NOTHING_HERE = (
    "There is nothing here. The chat is POST /api/v1/chat/stream, for OpenAI's clients POST /v1/chat/completions; "
    "the dashboard is GET /admin."
)
_SPREAD = {COST_THROTTLED, RATE_LIMITED, THROTTLE_UNAVAILABLE}
"""What many callers are refused for at one moment."""
_NOT_SPREAD = {Reason.NETWORK_SHARE.value}
"""Few are refused for it at one moment, and it ends at the latest with the hour or the day."""
_LEAST_SPREAD_SECONDS, _MOST_SPREAD_SECONDS = 2, 10
_SPREAD_PART = 20
_PASSED_HEADERS = {"Allow", "WWW-Authenticate"}
_TITLES = {
    COST_THROTTLED: "Cost limit reached",
    RATE_LIMITED: "Too many requests",
    INVALID_CHALLENGE: "Challenge not accepted",
    "unauthorized": "Not authorized",
    INVALID_REQUEST: "Request not usable",
    UPSTREAM_ERROR: "The model did not answer",
    UPSTREAM_REFUSED: "The model refused the request",
    UPSTREAM_BUSY: "The model takes no requests now",
    THROTTLE_UNAVAILABLE: "Budgets cannot be asked",
    DUPLICATE_REQUEST: "Request sent before",
}
_MESSAGES = {
    Reason.DAILY_LIMIT: "Daily usage limit reached.",
    Reason.WINDOW_LIMIT: "High usage detected.",
    Reason.NETWORK_LIMIT: "High usage detected from your network.",
    Reason.NETWORK_DAILY_LIMIT: "Your network has reached its daily usage limit.",
    Reason.NETWORK_SHARE: "Your network has had its share of what this service may spend.",
    Reason.GLOBAL_HOURLY_LIMIT: "This service has reached its usage limit for this hour.",
    Reason.GLOBAL_DAILY_LIMIT: "This service has reached its usage limit for today.",
}


def problem(  # noqa: PLR0913 (each is a field of RFC 9457 or a header)
    status: int,
    error: str,
    reason: str,
    message: str | Callable[[int | None], str],
    *,
    retry_after_seconds: int | None = None,
    scope: str | None = None,
    headers: Mapping[str, str] | None = None,
    extra: Mapping[str, object] | None = None,
) -> Response:
    """An ``application/problem+json`` response; `retry_after_seconds` also becomes ``Retry-After``.

    Where many may be refused together it comes a little later, see `later`; a `message` that names the wait is made
    of what the caller gets. On the routes for OpenAI's clients the response has OpenAI's shape.
    """
    if retry_after_seconds is not None and error in _SPREAD and reason not in _NOT_SPREAD:
        retry_after_seconds = later(retry_after_seconds, g.get("request_id") if has_request_context() else None)
    if not isinstance(message, str):
        message = message(retry_after_seconds)
    if has_request_context() and speaks_openai(request.path):
        details = {"reason": reason, "scope": scope, "retry_after_seconds": retry_after_seconds, **(extra or {})}
        content = error_object(status, error, message, request_id=g.get("request_id"), details=details)
        status = status_for_openai(status, error, details)
        response = Response(json.dumps({"error": content}, sort_keys=False) + "\n", status, mimetype="application/json")
        response.headers.extend(retry_headers(status, retry_after_seconds, details))
        return _with_headers(response, retry_after_seconds, headers)
    body = {
        "error": error,
        "message": message,
        "reason": reason,
        "retry_after_seconds": retry_after_seconds,
        "scope": scope,
        "request_id": g.get("request_id"),
        "type": f"urn:tollgate:problem:{error}",
        "title": _TITLES.get(error, HTTP_STATUS_CODES.get(status, "Error")),
        "status": status,
        "detail": message,
        **(extra or {}),
    }
    response = Response(json.dumps(body, sort_keys=False) + "\n", status, mimetype="application/problem+json")
    return _with_headers(response, retry_after_seconds, headers)


def later(wait_seconds: int, request_id: str | None) -> int:
    """`wait_seconds`, and a part that the request's id chooses: up to a twentieth of it, but 2 to 10 seconds.

    So callers that are refused together do not come back together, and none comes too early. What OpenAI's clients
    wait for by themselves stays within what they wait for.
    """
    if request_id is None:
        return wait_seconds
    most = min(_MOST_SPREAD_SECONDS, max(_LEAST_SPREAD_SECONDS, wait_seconds // _SPREAD_PART))
    if wait_seconds <= MOST_WAIT_SECONDS:
        most = min(most, MOST_WAIT_SECONDS - wait_seconds)
    return wait_seconds + (int(request_id[:8], 16) * (most + 1) >> 32)


def _with_headers(response: Response, retry_after_seconds: int | None, headers: Mapping[str, str] | None) -> Response:
    response.headers["Cache-Control"] = "no-store"
    response.headers.extend(headers or {})
    if retry_after_seconds is not None:
        response.headers["Retry-After"] = str(retry_after_seconds)
    return response


def cost_refused(refusal: Refusal, budgets: Sequence[Budget]) -> Response:
    """429 for a refusal by the guard; `budgets` are those that the request would have been charged to."""
    flags = {"can_never_fit": refusal.can_never_fit, "in_flight": refusal.in_flight}
    return problem(
        429,
        COST_THROTTLED,
        refusal.reason.value,
        lambda wait_seconds: _cost_message(refusal, budgets, wait_seconds),
        retry_after_seconds=refusal.retry_after_seconds,
        scope=refusal.scope.value,
        extra={"budget": refusal.budget, **{name: True for name, is_set in flags.items() if is_set}},
    )


OTHER_BODY = "other_body"
"""The reason of a duplicate that is none of the states of the first request."""
_DUPLICATE_MESSAGES = {
    DuplicateState.IN_FLIGHT.value: "A request with this Idempotency-Key is under way: wait for its answer.",
    DuplicateState.SETTLED.value: "A request with this Idempotency-Key was charged; it is not sent again.",
    DuplicateState.EXPIRED.value: "A request with this Idempotency-Key broke off; its whole reservation is booked.",
    OTHER_BODY: "This Idempotency-Key came with another body before: take a new key for a new request.",
}


def duplicate_refused(duplicate: Duplicate) -> Response:
    """409 for a request that was sent before; `first_request_id` and `cost_usd` are those of the first one."""
    reason = duplicate.state.value if duplicate.same_body else OTHER_BODY
    extra = {
        "first_request_id": duplicate.reservation_id,
        "first_state": duplicate.state.value,
        "cost_usd": usd_text(duplicate.cost_nanousd),
    }
    return problem(409, DUPLICATE_REQUEST, reason, _DUPLICATE_MESSAGES[reason], extra=extra)


def store_unavailable(error: ThrottleUnavailable) -> Response:
    """503: the budgets cannot be checked."""
    message = f"This service cannot check its budgets: {error}. Please try again later."
    return problem(503, THROTTLE_UNAVAILABLE, "store", message, retry_after_seconds=error.retry_after_seconds)


def _cost_message(refusal: Refusal, budgets: Sequence[Budget], wait_seconds: int | None) -> str:
    message = _MESSAGES.get(refusal.cause) or f"Usage limit reached ({refusal.budget})."
    if refusal.can_never_fit:
        # What refuses may have room for it one day; what it can never fit into has the smallest limit of all.
        limits = whole_limits(budgets)
        if 0 in limits:
            return f"{message} Nothing may be spent here now: a limit is set to 0."
        limit = f" of {usd_text(min(limits))} USD" if limits else ""
        return f"{message} This request alone is larger than a whole limit{limit}: ask for less."
    if wait_seconds is None:
        return f"{message} Waiting does not help: this limit is not renewed."
    if refusal.in_flight:
        message += " Answers that are still under way hold the rest of it."
    return f"{message} Please try again in {_duration(wait_seconds)}."


def _duration(seconds: int) -> str:
    for size, unit in ((86_400, "day"), (3_600, "hour"), (60, "minute")):
        if seconds >= 2 * size:
            return f"{-(-seconds // size)} {unit}s"
    return f"{seconds} second{'' if seconds == 1 else 's'}"


def _not_offered(error: NotFound | MethodNotAllowed) -> Response | None:
    """404 for a route of a model's API that is not offered; None for any other path, and for a method of ours."""
    if isinstance(error, MethodNotAllowed) and not is_googles(request.path):
        return None
    found = not_offered(request.method, request.path, request.headers, g.request_id)
    if found is None:
        return None
    response = Response(json.dumps(found.body, sort_keys=False) + "\n", 404, mimetype="application/json")
    return _with_headers(response, None, found.headers)


class InvalidRequest(Exception):
    """The request cannot be used; `field` is where, `reason` is why."""

    def __init__(self, status: int, field: str, reason: str, *, code: str | None = None) -> None:
        super().__init__(f"{field}: {reason}")
        self.code = code
        """OpenAI's code for it, where there is one."""
        self.status = status
        self.field = field
        self.reason = reason


def _too_many_bodies(error: TooManyBodies) -> Response:
    if error.is_of_network:
        message = "Too many requests from your network have not arrived whole. Please try again."
        return problem(429, RATE_LIMITED, "rate_limit", message, retry_after_seconds=1, scope="network")
    message = "Too many requests have not arrived whole. Please try again."
    return problem(503, THROTTLE_UNAVAILABLE, "busy", message, retry_after_seconds=1)


def register_error_handlers(app: Flask) -> None:
    """Make every exception a problem, so that no traceback reaches a client."""
    app.register_error_handler(TooManyBodies, _too_many_bodies)

    @app.errorhandler(InvalidRequest)
    def invalid(error: InvalidRequest) -> Response:
        message = f"The request cannot be used: {error}."
        extra = {"field": error.field} | ({} if error.code is None else {"code": error.code})
        return problem(error.status, INVALID_REQUEST, f"{error.field}: {error.reason}", message, extra=extra)

    @app.errorhandler(RequestEntityTooLarge)
    def too_large(_: RequestEntityTooLarge) -> Response:
        # The body itself is short enough by now.
        reason = f"a form may have at most {request.max_form_parts} parts, whatever MAX_REQUEST_BYTES is"
        return invalid(InvalidRequest(413, "body", reason))

    @app.errorhandler(HTTPException)
    def http(error: HTTPException) -> Response:
        if isinstance(error, NotFound | MethodNotAllowed) and (answer := _not_offered(error)) is not None:
            return answer
        status = error.code or 500
        if status == 400:  # noqa: PLR2004 (a status of HTTP)
            return problem(400, INVALID_REQUEST, "request: cannot be read", "The request cannot be read.")
        name = HTTP_STATUS_CODES.get(status, "Error")
        headers = {name: value for name, value in error.get_headers() if name in _PASSED_HEADERS}
        word = name.lower().replace(" ", "_")
        message = _NOTHING_HERE if isinstance(error, NotFound) else error.description or name
        return problem(status, word, word, message, headers=headers)

    @app.errorhandler(Exception)
    def unexpected(error: Exception) -> Response:
        current_app.extensions["tollgate"].emit("unexpected_error", error=type(error).__name__, exception=error)
        message = "Something went wrong on our side; the request id helps to find it in the log."
        extra = {"cost_usd": usd_text(g.charged_nanousd)} if "charged_nanousd" in g else None
        return problem(500, INTERNAL_ERROR, INTERNAL_ERROR, message, extra=extra)
