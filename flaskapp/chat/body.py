"""The body of a chat request: strict JSON, nothing coerced, nothing unknown."""

import json
from typing import Annotated, Literal

from flask import Request
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from flaskapp.http.json_body import not_usable, read_json_object
from flaskapp.http.refusals import InvalidRequest

_MAX_QUERY_CHARACTERS = 8_000
_MAX_HISTORY_TURNS = 64


class HistoryTurn(BaseModel):
    """One earlier message."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    role: Literal["user", "assistant"]
    content: str


class ChatBody(BaseModel):
    """A visitor's question. Where the body lacks `model` or `max_tokens`, `read_chat_body` fills them in."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    query: Annotated[str, Field(min_length=1, max_length=_MAX_QUERY_CHARACTERS)]
    chat_history: Annotated[list[HistoryTurn], Field(max_length=_MAX_HISTORY_TURNS, fail_fast=True)] = []
    model: str = ""
    max_tokens: Annotated[int, Field(ge=1)] = 0

    def text(self) -> str:
        """The body as the client sent it, without our defaults, in one spelling."""
        sent = self.model_dump(exclude_unset=True, exclude=self._defaults)
        return json.dumps(sent, sort_keys=True)

    _defaults: set[str] = PrivateAttr(default_factory=set)
    """The fields that the client did not send."""


def read_chat_body(request: Request, *, default_model: str, models: tuple[str, ...], max_tokens: int) -> ChatBody:
    """The body of `request` with its defaults filled in.

    Raises:
        InvalidRequest: 400, 415 or 422, with the field and the reason.
    """
    content = read_json_object(request)
    try:
        body = ChatBody.model_validate(content)
    except ValidationError as error:
        raise not_usable(error) from error
    if body.query.isspace():
        raise InvalidRequest(422, "query", "may not be blank")
    given = body.model_fields_set
    if "model" in given and body.model not in models:
        raise InvalidRequest(422, "model", f"has to be one of {', '.join(models)}")
    if "max_tokens" in given and body.max_tokens > max_tokens:
        raise InvalidRequest(422, "max_tokens", f"may be at most {max_tokens}")
    defaults: dict[str, object] = {"model": default_model, "max_tokens": max_tokens}
    missing = {name: value for name, value in defaults.items() if name not in given}
    filled = body.model_copy(update=missing)
    filled._defaults = set(missing)  # noqa: SLF001 (its own module)
    return filled
