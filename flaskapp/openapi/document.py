"""``GET /openapi.json``: the OpenAPI document of this service, with the models and limits that hold now.

The schemas of bodies come from the models that check them (by pydantic, whose JSON schemas have OpenAPI 3.1's dialect),
those of settings from the table of settings. What is left is a table of routes and their answers, which no library for
Flask knows, and each of them would check the bodies itself. The dashboard is a page for people, and is not here.
"""

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import NamedTuple

from flask import Blueprint, Response

from flaskapp.chat import challenge_route
from flaskapp.chat import routes as chat
from flaskapp.http.headers import IDEMPOTENCY_HEADER, IDEMPOTENCY_KEY
from flaskapp.http.identity import FINGERPRINT, HEADER, WORD
from flaskapp.http.openai_errors import PREFIX
from flaskapp.openai import routes as openai
from flaskapp.openapi import answers
from flaskapp.openapi.answers import ERROR_SCHEMAS, Refused, headers, responses
from flaskapp.openapi.schemas import REFERENCE, Schema, body_schemas, settings_schema
from flaskapp.settings import Setting
from flaskapp.usage import ROUTE as USAGE_ROUTE

ROUTE = "/openapi.json"
SETTINGS_ROUTE = "/api/v1/admin/settings"
_KEEPS = 4
"""How many documents are kept: one for each ceiling of output tokens that held lately."""


class Offer(NamedTuple):
    """What of the configuration the document says."""

    models: tuple[str, ...]
    default_model: str
    max_choices: int
    is_open: bool
    """Whether `/v1` asks for no key."""


def make_openapi(offer: Offer, max_tokens: Callable[[], int], table: Mapping[str, Setting]) -> Blueprint:
    """The blueprint ``openapi``; `max_tokens` is the live ceiling of an answer's output."""
    blueprint = Blueprint("openapi", __name__)

    @lru_cache(maxsize=_KEEPS)
    def written(ceiling: int) -> bytes:
        return json.dumps(document(offer, ceiling, table)).encode()

    @blueprint.get(ROUTE)
    def show() -> Response:
        headers = {"Cache-Control": "no-store"}
        return Response(written(max_tokens()), mimetype="application/json", headers=headers)

    return blueprint


def document(offer: Offer, max_tokens: int, table: Mapping[str, Setting]) -> Schema:
    """The document."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Tollgate",
            "version": "1",
            "summary": "A chat and chat completions, behind budgets.",
            "description": (
                "Bodies are strict JSON in UTF-8: no key twice, nothing unknown, nothing coerced, at most 64 levels "
                "deep. Any other method of a path is a 405, any other path a 404."
            ),
        },
        "servers": [{"url": "/"}],
        "paths": {**_visitors(), **_for_openais_clients(offer), **_operators(), **_machines()},
        "components": {
            "schemas": {
                **body_schemas(offer.models, offer.default_model, max_tokens, offer.max_choices),
                "Settings": settings_schema(table),
                **ERROR_SCHEMAS,
                **_ANSWERS,
            },
            "headers": _HEADERS,
            "securitySchemes": {
                "apiKey": {"type": "http", "scheme": "bearer", "description": "One of API_KEYS."},
                "adminToken": {"type": "http", "scheme": "bearer", "description": "ADMIN_TOKEN."},
            },
        },
    }


# --- routes


def _visitors() -> Schema:
    asked = {
        "operationId": "chat",
        "summary": "Ask the model.",
        "parameters": [_FINGERPRINT_HEADER, _IDEMPOTENCY_HEADER],
        "requestBody": _json_body("ChatBody"),
        "responses": {
            "200": {
                "description": "Server-sent events: the data of each is a ChatEvent. Comments may stand between.",
                "headers": headers(*_OF_ADMITTED),
                "content": {"text/event-stream": {"schema": _events("ChatEvent")}},
            },
            **responses([*answers.GUARDED, answers.NO_CHALLENGE]),
        },
    }
    given = {
        "operationId": "challenge",
        "summary": "Get a challenge, which is good once, for five minutes.",
        "parameters": [_header(HEADER, rf"^{WORD}$", "The hash of the visitor's fingerprint.", is_required=True)],
        "responses": {
            "200": _json("Challenge", "The challenge."),
            **responses([answers.BAD_REQUEST, *answers.COUNTED]),
        },
    }
    used = {
        "operationId": "usage",
        "summary": "What the caller has spent, holds and has left.",
        "parameters": [_FINGERPRINT_HEADER],
        "security": [{}, {"apiKey": []}],
        "responses": {
            "200": _json("Usage", "Of each limit of its own."),
            **responses([answers.BAD_REQUEST, answers.NO_KEY, *answers.COUNTED]),
        },
    }
    return {chat.ROUTE: {"post": asked}, challenge_route.ROUTE: {"get": given}, USAGE_ROUTE: {"get": used}}


def _for_openais_clients(offer: Offer) -> Schema:
    security: list[Schema] = [{}, {"apiKey": []}] if offer.is_open else [{"apiKey": []}]

    def refused(*refusals: Refused) -> Schema:
        return responses([answers.NO_KEY, *refusals], is_openai=True)

    completed = {
        "operationId": "complete",
        "summary": "OpenAI's chat completions, streamed or whole.",
        "security": security,
        "parameters": [_IDEMPOTENCY_HEADER],
        "requestBody": _json_body("CompletionBody"),
        "responses": {
            "200": {
                "description": "The upstream's answer; with stream: true its chunks as server-sent events.",
                "headers": headers(*_OF_ADMITTED),
                "content": {
                    "application/json": {"schema": {"type": "object"}},
                    "text/event-stream": {"schema": _events()},
                },
            },
            **refused(answers.NO_SUCH_MODEL, answers.CHARGED, *answers.GUARDED),
        },
    }
    listed = {
        "operationId": "models",
        "summary": "The models that may be named.",
        "security": security,
        "responses": {"200": _json("Models", "All of them."), **refused(*answers.COUNTED)},
    }
    one = {
        "operationId": "model",
        "summary": "One model.",
        "security": security,
        "parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}],
        "responses": {"200": _json("Model", "It is offered."), **refused(answers.NO_SUCH_MODEL, *answers.COUNTED)},
    }
    return {
        openai.ROUTE: {"post": completed},
        f"{PREFIX}/models": {"get": listed},
        f"{PREFIX}/models/{{name}}": {"get": one},
    }


def _operators() -> Schema:
    settings = _json("CurrentSettings", "All live settings, with value, source and bounds.")
    shown = {
        "operationId": "settings",
        "summary": "The live settings.",
        "security": [{"adminToken": []}],
        "responses": {"200": settings, **responses([answers.NO_TOKEN, *answers.COUNTED])},
    }
    changed = {
        "operationId": "changeSettings",
        "summary": "Change live settings: all that are named, or none.",
        "security": [{"adminToken": []}],
        "requestBody": _json_body("Settings", "application/json", "application/merge-patch+json"),
        "responses": {"200": settings, **responses([answers.NO_TOKEN, *answers.BAD_BODY, *answers.COUNTED])},
    }
    return {SETTINGS_ROUTE: {"get": shown, "patch": changed}}


def _machines() -> Schema:
    def read(operation_id: str, summary: str, answered: Schema, **more: Schema) -> Schema:
        return {
            "get": {
                "operationId": operation_id,
                "summary": summary,
                "responses": {"200": answered, **more, **responses(answers.ALWAYS)},
            }
        }

    numbers = {"description": "In Prometheus' text format.", "content": {"text/plain": {"schema": {"type": "string"}}}}
    unready = {"503": _json("Readiness", "Redis is needed and away, or the emergency budget is used up.")}
    return {
        "/healthz": read("health", "Whether the process runs.", _json("Health", "It runs.")),
        "/readyz": read("readiness", "Whether it may be sent requests.", _json("Readiness", "It may."), **unready),
        "/metrics": read("metrics", "Numbers of all workers.", numbers),
        ROUTE: read(
            "openapi", "This document.", {"description": "OpenAPI 3.1.", "content": _content({"type": "object"})}
        ),
    }


# --- their parts


def _content(schema: Schema, *media_types: str) -> Schema:
    return {media_type: {"schema": schema} for media_type in media_types or ("application/json",)}


def _json(name: str, description: str) -> Schema:
    schema = {"$ref": REFERENCE + name}
    return {"description": description, "headers": headers("X-Request-ID"), "content": _content(schema)}


def _events(name: str | None = None) -> Schema:
    """Each server-sent event; the data are JSON of the schema `name`, where one is given."""
    content = {"contentMediaType": "application/json", "contentSchema": {"$ref": REFERENCE + name}} if name else {}
    return {"type": "object", "required": ["data"], "properties": {"data": {"type": "string", **content}}}


def _json_body(name: str, *media_types: str) -> Schema:
    return {"required": True, "content": _content({"$ref": REFERENCE + name}, *media_types)}


def _header(name: str, pattern: str, description: str, *, is_required: bool = False) -> Schema:
    schema = {"type": "string", "pattern": pattern}
    return {"name": name, "in": "header", "required": is_required, "description": description, "schema": schema}


def _object(properties: Schema, *optional: str) -> Schema:
    """An object of just these properties."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


_FINGERPRINT_HEADER = _header(
    HEADER, f"^{FINGERPRINT}$", "fp:<challenge>:<hash> or <hash>; without it the network is the identifier."
)
_IDEMPOTENCY_HEADER = _header(
    IDEMPOTENCY_HEADER, f"^{IDEMPOTENCY_KEY}$", "The caller's own name for the request: it is charged at most once."
)
_TEXT: Schema = {"type": "string"}
_WHOLE: Schema = {"type": "integer"}
_USD: Schema = {"type": "string", "pattern": r"^[0-9]+\.[0-9]{9}$"}
_OF_ADMITTED = (
    *("X-Request-ID", "X-Throttle-Backend", "X-Cost-Reserved-USD"),
    *("RateLimit-Policy", "RateLimit", "Server-Timing"),
)


def _said(description: str, schema: Schema = _TEXT) -> Schema:
    return {"description": description, "schema": schema}


_HEADERS: dict[str, Schema] = {
    "X-Request-ID": _said(
        "The id of the request: ours, never the caller's.", {"type": "string", "pattern": "^[0-9a-f]{32}$"}
    ),
    "Retry-After": _said(
        "Seconds; never earlier than the refusal can end. Missing where waiting does not help.",
        {"type": "integer", "minimum": 1},
    ),
    "x-should-retry": _said("What OpenAI's clients obey.", {"enum": ["true", "false"]}),
    "X-Throttle-Backend": _said("The strategy that decided; off without cost throttling."),
    "X-Cost-Reserved-USD": _said("The most that the answer can cost.", _USD),
    "RateLimit-Policy": _said("The caller's own budgets."),
    "RateLimit": _said("What is left of them."),
    "Server-Timing": _said("How long the check took."),
}
_TOKENS = _object({"input_tokens": _WHOLE, "output_tokens": _WHOLE})
_LIMIT = _object(
    {
        "window_seconds": _WHOLE,
        "limit_usd": _USD,
        "spent_usd": _USD,
        "held_usd": _USD,
        "left_usd": _USD,
        "renews_at": {"type": ["integer", "null"]},
        "renews_in_seconds": {"type": ["integer", "null"]},
    },
    "window_seconds",
)
_MARKER = _object(
    {
        "reason": _TEXT,
        "budget": _TEXT,
        "ends_in_seconds": _WHOLE,
        "retry_after_seconds": {"type": ["integer", "null"]},
        "in_flight": {"type": "boolean"},
    }
)
_MODEL = _object({"id": _TEXT, "object": {"const": "model"}, "created": _WHOLE, "owned_by": _TEXT})
_SETTING = {
    "type": "object",
    "required": ["value", "source", "bounds", "unit", "allowed", "description"],
    "properties": {"source": {"enum": ["redis", "environment", "default"]}, "unit": _TEXT, "allowed": _TEXT},
}
_ANSWERS: dict[str, Schema] = {
    "ChatEvent": {
        "oneOf": [
            _object({"status": {"const": "streaming"}, "chunk": _TEXT}),
            _object(
                {
                    "status": {"const": "complete"},
                    "request_id": _TEXT,
                    "usage": _TOKENS,
                    "cost_usd": _USD,
                    "finish_reason": {"enum": ["stop", "length", "content_filter", "error"]},
                }
            ),
            _object(
                {
                    "status": {"const": "error"},
                    "request_id": _TEXT,
                    "error": _TEXT,
                    "message": _TEXT,
                    "usage": _TOKENS,
                    "cost_usd": _USD,
                }
            ),
        ]
    },
    "Challenge": _object({"challenge": {"type": "string", "pattern": "^[0-9a-f]{64}$"}, "expires_in_seconds": _WHOLE}),
    "Usage": _object(
        {
            "enabled": {"type": "boolean"},
            "identifier": _TEXT,
            "as_of": _WHOLE,
            "limits": {"type": "object", "additionalProperties": _LIMIT},
            "throttled": {"anyOf": [_MARKER, {"type": "null"}]},
        }
    ),
    "Model": _MODEL,
    "Models": _object({"object": {"const": "list"}, "data": {"type": "array", "items": _MODEL}}),
    "CurrentSettings": _object(
        {
            "mode": {"enum": ["development", "production"]},
            "backend": _TEXT,
            "settings": {"type": "object", "additionalProperties": _SETTING},
        }
    ),
    "Health": _object({"status": {"const": "ok"}}),
    "Readiness": _object(
        {
            "status": {"enum": ["ok", "unavailable"]},
            "backend": _TEXT,
            "redis": {"enum": ["up", "down"]},
            "degraded": {"type": "boolean"},
        }
    ),
}
