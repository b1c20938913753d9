"""Every answer that is no success: which status, with which words, on which routes."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from backends.budgets import Reason, Scope
from backends.contract import DuplicateState
from flaskapp.http.challenges import ChallengeResult
from flaskapp.http.openai_errors import openai_code
from flaskapp.http.refusals import (
    COST_THROTTLED,
    DUPLICATE_REQUEST,
    INTERNAL_ERROR,
    INVALID_CHALLENGE,
    INVALID_REQUEST,
    OTHER_BODY,
    RATE_LIMITED,
    THROTTLE_UNAVAILABLE,
    UPSTREAM_BUSY,
    UPSTREAM_ERROR,
    UPSTREAM_REFUSED,
)
from flaskapp.openapi.schemas import REFERENCE, Schema

CONTEXT_LENGTH, MODEL_NOT_FOUND = "context_length_exceeded", "model_not_found"


class Refused(NamedTuple):
    """One way in which a request is refused or fails."""

    status: int
    error: str
    words: str
    reasons: tuple[str, ...] = ()
    """All that there are; none where the reason says what is wrong, and where."""
    other_codes: tuple[str, ...] = ()
    """On ``/v1``: codes that stand in place of the error."""


BAD_REQUEST = Refused(400, INVALID_REQUEST, "What is wrong with the request, and where.")
BAD_BODY = (
    BAD_REQUEST,
    Refused(408, INVALID_REQUEST, "The body took too long to arrive: `REQUEST_BODY_SECONDS`."),
    Refused(413, INVALID_REQUEST, "The body is too large: `MAX_REQUEST_BYTES`."),
    Refused(415, INVALID_REQUEST, "The body is of another media type, or encoded."),
    Refused(
        422,
        INVALID_REQUEST,
        "A field cannot be used: which one, and why.",
        other_codes=(CONTEXT_LENGTH, MODEL_NOT_FOUND),
    ),
)
NO_KEY = Refused(401, "unauthorized", "A registered key is needed.", ("unauthorized",))
NO_TOKEN = Refused(401, "unauthorized", "The operator's token is needed.", ("token",))
NO_SUCH_MODEL = Refused(404, "not_found", "This model is not offered.", other_codes=(MODEL_NOT_FOUND,))
TOO_MANY = Refused(429, RATE_LIMITED, "Too many requests.", ("rate_limit",))
BUG = Refused(500, INTERNAL_ERROR, "Something went wrong on our side.", (INTERNAL_ERROR,))
NO_STORE = Refused(503, THROTTLE_UNAVAILABLE, "Redis cannot be asked, or not now.", ("store", "busy"))
OTHER_HOST = Refused(421, INVALID_REQUEST, "In development mode: this service is not asked by that name.")
ALWAYS = (OTHER_HOST, BUG)
"""What every route may answer."""
COUNTED = (*ALWAYS, TOO_MANY, NO_STORE)
"""What every route may answer whose requests are counted."""
NO_CHALLENGE = Refused(
    403,
    INVALID_CHALLENGE,
    "A fresh challenge of this visitor is needed.",
    ("missing", *(each.name.lower() for each in ChallengeResult if each is not ChallengeResult.GOOD)),
)
GUARDED = (
    *BAD_BODY,
    Refused(
        400, UPSTREAM_REFUSED, "The model's server refuses the request: its reason.", other_codes=(CONTEXT_LENGTH,)
    ),
    Refused(400, CONTEXT_LENGTH, "The input is longer than the model takes."),
    Refused(
        409,
        DUPLICATE_REQUEST,
        "A request with this Idempotency-Key was sent before.",
        (*(state.value for state in DuplicateState), OTHER_BODY),
    ),
    Refused(429, COST_THROTTLED, "A budget has nothing left for it.", tuple(reason.value for reason in Reason)),
    Refused(429, UPSTREAM_BUSY, "The model's server takes no more requests now."),
    Refused(502, UPSTREAM_ERROR, "The model's server failed."),
    Refused(503, UPSTREAM_BUSY, "The model's server takes no more requests now."),
    Refused(504, UPSTREAM_ERROR, "The model's server took too long."),
    *COUNTED,
)
"""What the routes that reach a model may answer, the bodies' faults among it."""
CHARGED = Refused(424, UPSTREAM_ERROR, "The model's server failed, and what it did is charged.")
"""On ``/v1`` alone."""


def responses(refusals: Iterable[Refused], *, is_openai: bool = False) -> dict[str, Schema]:
    """The responses of a route by status, with the errors and reasons that each may have."""
    by_status: dict[int, list[Refused]] = {}
    for refused in refusals:
        by_status.setdefault(refused.status, []).append(refused)
    return {str(status): _response(each, is_openai=is_openai) for status, each in sorted(by_status.items())}


def _response(refusals: Sequence[Refused], *, is_openai: bool) -> Schema:
    status = refusals[0].status
    names = [
        "X-Request-ID",
        *(["Retry-After"] if status in {429, 503} else []),
        *(["x-should-retry"] if is_openai else []),
    ]
    schema = {"anyOf": [_error(each) if is_openai else _problem(each) for each in refusals]}
    media_type = "application/json" if is_openai else "application/problem+json"
    return {
        "description": " ".join(dict.fromkeys(each.words for each in refusals)),
        "headers": headers(*names),
        "content": {media_type: {"schema": schema["anyOf"][0] if len(refusals) == 1 else schema}},
    }


def headers(*names: str) -> Schema:
    """References to headers of the components."""
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _problem(refused: Refused) -> Schema:
    properties: Schema = {"error": {"const": refused.error}, "status": {"const": refused.status}}
    return {"allOf": [{"$ref": f"{REFERENCE}Problem"}, {"properties": {**properties, **_reason(refused)}}]}


def _error(refused: Refused) -> Schema:
    codes = [openai_code(refused.error), *refused.other_codes]
    properties = {"code": {"enum": codes}, **_reason(refused)}
    return {"allOf": [{"$ref": f"{REFERENCE}OpenAIError"}, {"properties": {"error": {"properties": properties}}}]}


def _reason(refused: Refused) -> Schema:
    return {"reason": {"enum": list(refused.reasons)}} if refused.reasons else {}


def _nullable(type_name: str, **more: Any) -> Schema:
    return {"type": [type_name, "null"], **more}


_USD = {"type": "string", "pattern": r"^[0-9]+\.[0-9]{9}$", "description": "Dollars, with nine places."}
_EXTRA: dict[str, Schema] = {
    "budget": {"type": "string", "description": "The budget that refuses; under a marker the one that set it."},
    "can_never_fit": {"const": True, "description": "The request alone is larger than a whole limit."},
    "in_flight": {"const": True, "description": "Only answers that are still under way stand in its way."},
    "cost_usd": {**_USD, "description": "What is charged for it."},
    "first_request_id": {"type": "string"},
    "first_state": {"enum": [state.value for state in DuplicateState]},
    "upstream_status": {"type": "integer"},
    "field": {"type": "string", "description": "Where in the request."},
    "fields": {"type": "object", "additionalProperties": {"type": "string"}},
}
_WAIT = _nullable("integer", minimum=1, description="The same as Retry-After: never earlier than the refusal can end.")
_SCOPE = {"enum": [*(scope.value for scope in Scope), None]}
_REQUEST_ID = {"type": "string", "pattern": "^[0-9a-f]{32}$"}
_OF_PROBLEM: dict[str, Schema] = {
    "error": {"type": "string"},
    "message": {"type": "string"},
    "reason": {"type": "string"},
    "retry_after_seconds": _WAIT,
    "scope": _SCOPE,
    "request_id": _REQUEST_ID,
    "type": {"type": "string", "pattern": "^urn:tollgate:problem:"},
    "title": {"type": "string"},
    "status": {"type": "integer"},
    "detail": {"type": "string"},
}
_OF_ERROR: dict[str, Schema] = {
    "message": {"type": "string"},
    "type": {"enum": ["invalid_request_error", "rate_limit_error", "server_error"]},
    "param": _nullable("string"),
    "code": _nullable("string"),
    "request_id": _REQUEST_ID,
}
ERROR_SCHEMAS: dict[str, Schema] = {
    "Problem": {
        "type": "object",
        "description": "A problem of RFC 9457.",
        "required": list(_OF_PROBLEM),
        "properties": {**_OF_PROBLEM, **_EXTRA},
    },
    "OpenAIError": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": list(_OF_ERROR),
                "properties": {
                    **_OF_ERROR,
                    "reason": {"type": "string"},
                    "retry_after_seconds": _WAIT,
                    "scope": _SCOPE,
                    **_EXTRA,
                },
            }
        },
    },
}
