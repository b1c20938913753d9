"""Errors of ``/v1`` in OpenAI's shape, and whether OpenAI's clients should try again by themselves.

`type` is OpenAI's class of error, `code` the contract's word for it (or OpenAI's where it has one for the same error).
Our other fields stand beside them: `reason`, `scope`, `in_flight`, `cost_usd`, `request_id` and so on.
"""

from collections.abc import Mapping
from decimal import Decimal
from http import HTTPStatus

PREFIX = "/v1"
MOST_WAIT_SECONDS = 60
"""Official clients wait no longer than this by themselves; newer ones up to twice as long."""
_CODES: dict[str, str | None] = {"invalid_request": None, "unauthorized": "invalid_api_key"}
_CHARGEABLE = {"upstream_error", "upstream_refused", "upstream_busy", "internal_error"}
"""Not `duplicate_request`: its cost is that of an earlier request."""
_WAITS = {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE}
_FAILS = {HTTPStatus.BAD_GATEWAY, HTTPStatus.GATEWAY_TIMEOUT}
_PASSING = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.CONFLICT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}
"""Statuses of an upstream after which a second try may succeed; so may it after all from 500 on."""


def speaks_openai(path: str) -> bool:
    """Whether errors of this path have OpenAI's shape."""
    return path == PREFIX or path.startswith(f"{PREFIX}/")


def openai_code(error: str) -> str | None:
    """OpenAI's code for one of our errors, where it has no other of its own."""
    return _CODES.get(error, error)


def error_object(
    status: int, error: str, message: str, *, request_id: str | None, details: Mapping[str, object]
) -> dict[str, object]:
    """The content of ``error``; `details` of None are left out, `field` becomes `param`, `code` replaces the code."""
    kept = {name: value for name, value in details.items() if value is not None}
    return {
        "message": message,
        "type": _type(status),
        "param": kept.pop("field", None),
        "code": kept.pop("code", openai_code(error)),
        "request_id": request_id,
        **kept,
    }


def status_for_openai(status: int, error: str, details: Mapping[str, object]) -> int:
    """The status, or 424 for a failure that was charged: many clients repeat every 5xx, and would buy it again.

    A model that the upstream does not have is a 404, as with OpenAI.
    """
    was_charged = bool(Decimal(str(details.get("cost_usd", 0))))
    if not was_charged and details.get("code") == "model_not_found":
        return HTTPStatus.NOT_FOUND.value
    return HTTPStatus.FAILED_DEPENDENCY.value if was_charged and error in _CHARGEABLE else status


def retry_headers(status: int, retry_after_seconds: int | None, details: Mapping[str, object]) -> dict[str, str]:
    """``x-should-retry``, which the official clients obey, and how long they should wait."""
    if not _helps_to_retry(status, retry_after_seconds, details):
        return {"x-should-retry": "false"}
    wait = {} if retry_after_seconds is None else {"retry-after-ms": str(retry_after_seconds * 1_000)}
    return {"x-should-retry": "true", **wait}


def _helps_to_retry(status: int, retry_after_seconds: int | None, details: Mapping[str, object]) -> bool:
    """Whether nothing was charged, the same request may get another answer, and a short wait is enough."""
    if status in _WAITS and retry_after_seconds is None and "upstream_status" in details:
        # The upstream did not say how long to wait; the client's own pauses will do.
        return details.get("reason") != "quota"
    if status in _WAITS:
        return retry_after_seconds is not None and retry_after_seconds <= MOST_WAIT_SECONDS
    if status in _FAILS and not Decimal(str(details.get("cost_usd", 1))):
        answered = details.get("upstream_status")
        return not isinstance(answered, int) or answered in _PASSING or answered >= HTTPStatus.INTERNAL_SERVER_ERROR
    return False


def _type(status: int) -> str:
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return "rate_limit_error"
    return "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
