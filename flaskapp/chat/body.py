"""The body of a chat request: strict JSON, nothing coerced, nothing unknown."""

import json
import re
from typing import Annotated, Literal

from flask import Request
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from flaskapp.http.json_body import not_usable, read_json_object
from flaskapp.http.refusals import InvalidRequest

_MAX_QUERY_CHARACTERS = 8_000
_MAX_HISTORY_TURNS = 64
_SHOWN = re.compile(
    r"[^\x00-\x20\x7f-\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
    # What formats other characters: the categories Cc (above) and Cf.
    r"\xad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff"
    r"\ufff0-\ufffb\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    # Letters and marks of no width, those that fill a place, and those that choose a form of another character.
    r"\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff]"
)
"""A character that can be seen: a question without one is blank."""


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
    if not _SHOWN.search(body.query):
        raise InvalidRequest(422, "query", "may not be blank")
    given = body.model_fields_set
    if "model" in given and body.model not in models:
        raise InvalidRequest(422, "model", f"has to be one of {', '.join(models)}")
    if "max_tokens" in given and body.max_tokens > max_tokens:
        raise InvalidRequest(422, "max_tokens", f"may be at most {max_tokens} (LLM_MAX_TOKENS)")
    defaults: dict[str, object] = {"model": default_model, "max_tokens": max_tokens}
    missing = {name: value for name, value in defaults.items() if name not in given}
    filled = body.model_copy(update=missing)
    filled._defaults = set(missing)  # noqa: SLF001 (its own module)
    return filled
