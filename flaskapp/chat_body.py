"""The body of a chat request: strict JSON, nothing coerced, nothing unknown."""

import json
from typing import Annotated, Literal

from flask import Request
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from backends.strict_json import StrictJsonError, loads
from flaskapp.llm import Turn
from flaskapp.refusals import InvalidRequest

_MAX_QUERY_CHARACTERS = 8_000
_MAX_HISTORY_TURNS = 64


class HistoryTurn(BaseModel):
    """One earlier message."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    role: Literal["user", "assistant"]
    content: str


class ChatBody(BaseModel):
    """What a visitor asks; `model` and `max_tokens` are None where the body leaves them out (and never null in it)."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    query: Annotated[str, Field(min_length=1, max_length=_MAX_QUERY_CHARACTERS)]
    chat_history: Annotated[list[HistoryTurn], Field(max_length=_MAX_HISTORY_TURNS)] = []
    model: str = ""
    max_tokens: Annotated[int, Field(ge=1)] = 0

    _sent: str = PrivateAttr("")

    @property
    def text(self) -> str:
        """The body as it was sent, without our defaults, in one spelling."""
        return self._sent

    @property
    def history(self) -> list[Turn]:
        """The earlier messages, oldest first."""
        return [Turn(turn.role, turn.content) for turn in self.chat_history]


def read_chat_body(request: Request, *, default_model: str, models: tuple[str, ...], max_tokens: int) -> ChatBody:
    """The body of `request` with its defaults filled in.

    Raises:
        InvalidRequest: 400, 415 or 422, with the field and the reason.
    """
    if request.mimetype != "application/json":
        raise InvalidRequest(415, "Content-Type", "has to be application/json")
    try:
        content = loads(request.get_data(cache=False))
    except StrictJsonError as error:
        raise InvalidRequest(400, "body", str(error)) from error
    if not isinstance(content, dict):
        raise InvalidRequest(422, "body", "has to be a JSON object")
    try:
        body = ChatBody.model_validate(content)
    except ValidationError as error:
        raise _invalid(error) from error
    given = body.model_fields_set
    if "model" in given and body.model not in models:
        raise InvalidRequest(422, "model", f"has to be one of {', '.join(models)}")
    if "max_tokens" in given and body.max_tokens > max_tokens:
        raise InvalidRequest(422, "max_tokens", f"may be at most {max_tokens}")
    defaults: dict[str, object] = {"model": default_model, "max_tokens": max_tokens}
    filled = body.model_copy(update={name: value for name, value in defaults.items() if name not in given})
    filled._sent = json.dumps(body.model_dump(exclude_unset=True), sort_keys=True)  # noqa: SLF001 (its own module)
    return filled


def _invalid(error: ValidationError) -> InvalidRequest:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    return InvalidRequest(422, place[:200] or "body", first["msg"][:1].lower() + first["msg"][1:200])
