"""Routes of models' APIs that are not offered here: which one it was and the way out, in one sentence.

The answer has the shape that the client who asks can read: OpenAI's, Anthropic's, Google's, Ollama's or Cohere's. It is
known by the headers that the client's library always sends, else by the route.
"""

import re
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import NamedTuple

from werkzeug.datastructures import Headers

from flaskapp.http.openai_errors import error_object, speaks_openai

_MAX_PATH_CHARACTERS = 200
_CHAT = "POST /v1/chat/completions"
_BEFORE_A_ROUTE = r"(?:/+(?:api|openai|anthropic|inference|v\d\w*|(?:deployments|engines)/[^/]+))*"
_ROUTE = re.compile(rf"{_BEFORE_A_ROUTE}/+(?P<route>chat/+completions|[^/]+)(?P<rest>(?:/.*)?)")
"""What clients put before a route that they know, and the route: `/openai/deployments/mine/chat/completions`."""
_IS_KEPT = re.compile(r"/+(?!chat/)[^/]+(?:/messages)?/*")
"""What follows the route where a client asks for a completion that OpenAI would have kept."""
_GOOGLES = re.compile(r"/models/+[^/]+:\w+$")
_OWN_ADDRESS = "give the client that needs it the base URL of a provider that has it"
_WAYS_OUT = {
    "chat/completions": (
        f"set the client's base URL to one that ends in /v1, so that it asks {_CHAT} (for Azure's clients: OpenAI in "
        "place of AzureOpenAI, ChatOpenAI in place of AzureChatOpenAI)"
    ),
    "responses": (
        f"switch the client to chat completions, {_CHAT}: client.chat.completions.create in OpenAI's clients, "
        "openai.chat(model) in the AI SDK, use_responses_api=False (useResponsesApi: false) in LangChain, "
        'set_default_openai_api("chat_completions") in the Agents SDK, OpenAIChatModel (openai-chat:<model>) in '
        "pydantic-ai, and for Codex, which has no such switch, a proxy in between that translates"
    ),
    "completions": (
        f"switch the client to chat completions, {_CHAT}: client.chat.completions.create in OpenAI's clients, "
        "ChatOpenAI in LangChain, .chat(model) or .chatModel(model) in the AI SDK, openai/<model> in LiteLLM, "
        "is_chat_model=True of OpenAILike in LlamaIndex"
    ),
    "messages": (
        f"use a client for OpenAI's chat completions, {_CHAT}: openai/<model> in LiteLLM, ChatOpenAI in LangChain, "
        "createOpenAICompatible in the AI SDK, and for Claude Code a proxy in between that translates, such as "
        "LiteLLM's"
    ),
    "embeddings": (
        "give the embedder the base URL of a provider of embeddings: base_url of OpenAIEmbeddings in LangChain, "
        "api_base of OpenAIEmbedding in LlamaIndex, a client of its own elsewhere"
    ),
    "moderations": f"leave the moderation out, or {_OWN_ADDRESS}",
    "assistants": f"keep the conversation in the client and send it to {_CHAT}",
    "batches": f"send each request of the batch to {_CHAT}",
    "realtime": f"use {_CHAT} with stream: true, or {_OWN_ADDRESS}",
    "generateContent": (
        f"use a client for OpenAI's chat completions, {_CHAT}: openai/<model> in LiteLLM, ChatOpenAI in LangChain, "
        "createOpenAICompatible in the AI SDK, as Google's own OpenAI-compatible endpoint is used"
    ),
    "chat": (
        "set the client's provider to one that is OpenAI-compatible, with a base URL that ends in /v1, so that it "
        f"asks {_CHAT}"
    ),
}
_SAME_AS = {
    "conversations": "responses",
    "complete": "messages",
    "completion": "completions",
    "edits": "completions",
    "engines": "completions",
    "embed": "embeddings",
    "threads": "assistants",
    "files": "batches",
    "uploads": "batches",
}
_ANYTHING_ELSE = f"offered are {_CHAT} and GET /v1/models alone, so {_OWN_ADDRESS}"
_ROUTES = _WAYS_OUT.keys() - {"generateContent", "chat"}


class NotOffered(NamedTuple):
    """What is said of a route that is not offered."""

    body: Mapping[str, object]
    headers: Mapping[str, str]


def not_offered(method: str, path: str, headers: Headers, request_id: str) -> NotOffered | None:
    """The answer to a request that has no route here; None where the route is of no model's API that is known."""
    name, shape = _known(path)
    if name is None and not speaks_openai(path):
        return None
    shape = _shape_of_client(headers) or shape
    way_out = _ANYTHING_ELSE if name is None else _WAYS_OUT[name]
    message = f"{method} {path[:_MAX_PATH_CHARACTERS]} is not offered here: {way_out}."
    more = {"request-id": request_id} if shape is _anthropic else {}
    return NotOffered(shape(message, request_id), {"x-should-retry": "false", **more})


def is_googles(path: str) -> bool:
    """Whether a path names a method of Google's API, which is written behind a model's name."""
    return _GOOGLES.search(path) is not None


def _known(path: str) -> "tuple[str | None, _Shape]":
    """The row of `_WAYS_OUT`, and the shape of errors that belongs to the route."""
    for pattern, name, shape in _OTHER_APIS:
        if pattern.search(path):
            return name, shape
    match = _ROUTE.fullmatch(path)
    if match is None:
        return None, _openai
    route = re.sub("/+", "/", match["route"])
    name, rest = _SAME_AS.get(route, route), match["rest"]
    if name == "chat/completions" and _IS_KEPT.fullmatch(rest):
        return None, _openai
    return (name if name in _ROUTES else None), _anthropic if name == "messages" else _openai


def _shape_of_client(headers: Headers) -> "_Shape | None":
    if "anthropic-version" in headers:
        return _anthropic
    return _google if "x-goog-api-key" in headers or "x-goog-api-client" in headers else None


_Shape = Callable[[str, str], dict[str, object]]


def _openai(message: str, request_id: str) -> dict[str, object]:
    details = {"reason": "not_found"}
    return {"error": error_object(HTTPStatus.NOT_FOUND, "not_found", message, request_id=request_id, details=details)}


def _anthropic(message: str, request_id: str) -> dict[str, object]:
    return {"type": "error", "error": {"type": "not_found_error", "message": message}, "request_id": request_id}


def _google(message: str, request_id: str) -> dict[str, object]:
    del request_id
    return {"error": {"code": int(HTTPStatus.NOT_FOUND), "message": message, "status": "NOT_FOUND"}}


def _ollama(message: str, request_id: str) -> dict[str, object]:
    del request_id
    return {"error": message}


def _cohere(message: str, request_id: str) -> dict[str, object]:
    return {"id": request_id, "message": message}


_OTHER_APIS = (
    (_GOOGLES, "generateContent", _google),
    (re.compile(r"^/api/(?:chat|generate|embed|embeddings|tags|show|ps|pull|push|create|delete)/?$"), "chat", _ollama),
    (re.compile(r"^/(?:v1|v2)/(?:chat|embed|generate|classify|tokenize|summarize)/?$"), "chat", _cohere),
)
"""Patterns of paths that no client of OpenAI's asks."""
