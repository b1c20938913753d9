"""The body of ``POST /v1/chat/completions``: what cannot multiply the cost passes, everything else is refused.

A parameter that is not here is unknown, or is one whose cost cannot be bounded or is not in the price table: audio,
predictions, hosted tools, web search, moderation, caches without a price, dearer service tiers. Types are not coerced.
`null` stands for a parameter that is not there.

Messages, parts, tools and calls may have any further fields: servers put fields of their own into their answers, and
clients hand them back. They are passed on, and counted byte by byte.
"""

import json
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, get_args

from flask import Request
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

from backends.contract import frozen_for_the_type_checker
from backends.pricing.prompt_bounds import ImagesNotBounded, prompt_tokens
from backends.pricing.token_bounds import InputTooLong
from flaskapp.http.json_body import CHOICE, NO_NAME, not_usable, read_json_object
from flaskapp.http.refusals import InvalidRequest
from flaskapp.llm import MAX_CHOICES

_MOST_TOKENS = 10**9
"""More than any model gives: a larger maximum is a mistake."""
_MAX_MESSAGES = 2_048
_MAX_DEFINITIONS = 128
_WordsType: TypeAlias = Literal["thinking", "redacted_thinking", "reasoning", "reference", "output_text"]
_WORDS_PARTS = frozenset(get_args(_WordsType))
_USUAL_TTL, _LONG_TTL = "5m", "1h"
_ASSISTANT = "assistant"
_NOT_OFFERED = "is not offered here: it is unknown, or what it costs cannot be bounded"


def _priced_cache(value: object, info: ValidationInfo) -> object:
    """A cache that lasts longer costs more; the context says whether the model has a price for that of an hour."""
    ttls = (_USUAL_TTL, _LONG_TTL) if info.context else (_USUAL_TTL,)
    if isinstance(value, dict) and value.get("ttl") not in (None, *ttls):
        raise PydanticCustomError(
            "cache", "may have no other ttl than {ttls} with this model", {"ttls": " or ".join(ttls)}
        )
    return value


_CacheControl: TypeAlias = Annotated[Any, BeforeValidator(_priced_cache)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: object) -> object:
        """An unknown field that is `null` is one that is not there."""
        if isinstance(value, dict) and None in value.values():
            return {name: item for name, item in value.items() if item is not None}
        return value


class _Open(BaseModel):
    """It may have further fields."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    cache_control: _CacheControl | None = None


def _tag(name: str) -> Tag:
    """The tag of a union's choice; `not_usable` leaves it out."""
    return Tag(CHOICE + name)


def _by_type(value: object) -> str:
    """The tag of a union's choice, from the value's `type`."""
    return f"{CHOICE}{value.get('type')}" if isinstance(value, dict) else CHOICE


def _by_kind(value: object) -> str:
    return CHOICE + ("text" if isinstance(value, str) else "list" if isinstance(value, list) else "object")


def _number(value: object) -> Decimal:
    """A number of JSON, as `Decimal`; anything else is an error."""
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        raise PydanticCustomError("number", "has to be a number")
    return Decimal(value)


def _by_part(value: object) -> str:
    """As `_by_type`; the parts that have only words are alike."""
    tag = _by_type(value)
    return f"{CHOICE}words" if tag.removeprefix(CHOICE) in _WORDS_PARTS else tag


def _by_call(value: object) -> str:
    """As `_by_type`; a call in a stream has its type only once, and some clients lose it."""
    is_function = isinstance(value, dict) and value.get("type") is None and "function" in value
    return f"{CHOICE}function" if is_function else _by_type(value)


_T = TypeVar("_T")
_List: TypeAlias = Annotated[list[_T], Field(fail_fast=True)]
"""Only the first error is said, so no others are looked for."""
_Name: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=256)]
_Id: TypeAlias = Annotated[str, StringConstraints(max_length=512)]
_Number: TypeAlias = Annotated[Decimal, BeforeValidator(_number)]
_Tokens: TypeAlias = Annotated[int, Field(ge=1, le=_MOST_TOKENS)]
_Object: TypeAlias = dict[str, Any]


# --- messages


class _TextPart(_Open):
    type: Literal["text"]
    text: str


class _RefusalPart(_Open):
    type: Literal["refusal"]
    refusal: str


class _ImageUrl(_Open):
    url: Annotated[str, StringConstraints(pattern=r"^(https?://|data:image/)")]
    detail: Literal["auto", "low", "high"] | None = None


class _ImagePart(_Open):
    type: Literal["image_url"]
    image_url: _ImageUrl


class _WordsPart(_Open):
    """A part of an answer that has nothing but words, in fields of its own."""

    type: _WordsType


_Part: TypeAlias = Annotated[
    Annotated[_TextPart, _tag("text")]
    | Annotated[_RefusalPart, _tag("refusal")]
    | Annotated[_ImagePart, _tag("image_url")]
    | Annotated[_WordsPart, _tag("words")],
    Discriminator(
        _by_part,
        custom_error_type="part",
        custom_error_message="has to be a part of the type text, image_url or refusal",
    ),
]
_Content: TypeAlias = Annotated[
    Annotated[str, _tag("text")] | Annotated[_List[_Part], _tag("list")],
    Discriminator(_by_kind, custom_error_type="content", custom_error_message="has to be a text or a list of parts"),
]


class _FunctionCall(_Open):
    name: _Name
    arguments: str | None = None


class _CustomCall(_Open):
    name: _Name
    input: str | None = None


class _FunctionToolCall(_Open):
    id: str | None = None
    type: Literal["function"] | None = None
    function: _FunctionCall


class _CustomToolCall(_Open):
    id: str | None = None
    type: Literal["custom"]
    custom: _CustomCall


_ToolCall: TypeAlias = Annotated[
    Annotated[_FunctionToolCall, _tag("function")] | Annotated[_CustomToolCall, _tag("custom")],
    Discriminator(
        _by_call, custom_error_type="call", custom_error_message="has to be a call of the type function or custom"
    ),
]


class _Message(_Open):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: _Content | None = None
    name: _Id | None = None
    tool_calls: _List[_ToolCall] | None = None
    # Some servers keep what they thought in it, so it may be long.
    tool_call_id: str | None = None
    function_call: _FunctionCall | None = None
    # An answer in sound is handed back by its number, and what it costs then is not bounded.
    audio: None = None


# --- tools and formats


class _Function(_Open):
    name: _Name
    description: str | None = None
    parameters: _Object | None = None
    strict: bool | None = None


class _FunctionTool(_Open):
    type: Literal["function"]
    function: _Function


class _Custom(_Open):
    name: _Name
    description: str | None = None
    format: _Object | None = None


class _CustomTool(_Open):
    type: Literal["custom"]
    custom: _Custom


_Tool: TypeAlias = Annotated[
    Annotated[_FunctionTool, _tag("function")] | Annotated[_CustomTool, _tag("custom")],
    Discriminator(
        _by_type,
        custom_error_type="tool",
        custom_error_message="has to be a tool of the type function or custom: what a hosted one costs is not bounded",
    ),
]


class _Named(_Strict):
    name: _Name


class _FunctionChoice(_Strict):
    type: Literal["function"]
    function: _Named


class _CustomChoice(_Strict):
    type: Literal["custom"]
    custom: _Named


class _Allowed(_Strict):
    mode: Literal["auto", "required"]
    tools: Annotated[
        list[
            Annotated[
                Annotated[_FunctionChoice, _tag("function")] | Annotated[_CustomChoice, _tag("custom")],
                Discriminator(
                    _by_type,
                    custom_error_type="choice",
                    custom_error_message="has to be of the type function or custom",
                ),
            ]
        ],
        Field(max_length=_MAX_DEFINITIONS),
    ]


class _AllowedChoice(_Strict):
    type: Literal["allowed_tools"]
    allowed_tools: _Allowed


def _by_word_or_type(value: object) -> str:
    return f"{CHOICE}word" if isinstance(value, str) else _by_type(value)


_ToolChoice: TypeAlias = Annotated[
    Annotated[Literal["none", "auto", "required"], _tag("word")]
    | Annotated[_FunctionChoice, _tag("function")]
    | Annotated[_CustomChoice, _tag("custom")]
    | Annotated[_AllowedChoice, _tag("allowed_tools")],
    Discriminator(
        _by_word_or_type,
        custom_error_type="choice",
        custom_error_message="has to be none, auto, required, or of the type function, custom or allowed_tools",
    ),
]
_FunctionCallChoice: TypeAlias = Annotated[
    Annotated[Literal["none", "auto"], _tag("text")] | Annotated[_Named, _tag("object")],
    Discriminator(_by_kind, custom_error_type="choice", custom_error_message="has to be none, auto, or an object"),
]


class _PlainFormat(_Strict):
    type: Literal["text", "json_object"]


class _Schema(_Strict):
    name: _Name
    description: str | None = None
    schema_: Annotated[_Object | None, Field(alias="schema")] = None
    strict: bool | None = None


class _SchemaFormat(_Strict):
    type: Literal["json_schema"]
    json_schema: _Schema


_Format: TypeAlias = Annotated[
    Annotated[_PlainFormat, _tag("text")]
    | Annotated[_PlainFormat, _tag("json_object")]
    | Annotated[_SchemaFormat, _tag("json_schema")],
    Discriminator(
        _by_type,
        custom_error_type="format",
        custom_error_message="has to be of the type text, json_object or json_schema",
    ),
]


class _StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


_Stop: TypeAlias = Annotated[
    Annotated[str, _tag("text")] | Annotated[Annotated[list[str], Field(max_length=4)], _tag("list")],
    Discriminator(_by_kind, custom_error_type="stop", custom_error_message="has to be a text or a list of at most 4"),
]


class _Body(_Strict):
    messages: Annotated[_List[_Message], Field(min_length=1, max_length=_MAX_MESSAGES)]
    model: str | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    # What is priced.
    max_tokens: _Tokens | None = None
    max_completion_tokens: _Tokens | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    # What is counted into the input.
    tools: Annotated[_List[_Tool], Field(max_length=_MAX_DEFINITIONS)] | None = None
    tool_choice: _ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[_List[_Function], Field(max_length=_MAX_DEFINITIONS)] | None = None
    function_call: _FunctionCallChoice | None = None
    response_format: _Format | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    # What costs nothing.
    temperature: Annotated[_Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[_Number, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[_Number, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[_Number, Field(ge=-2, le=2)] | None = None
    stop: _Stop | None = None
    seed: int | None = None
    logit_bias: dict[str, Annotated[int, Field(ge=-100, le=100)]] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    user: _Id | None = None
    safety_identifier: _Id | None = None
    prompt_cache_key: _Id | None = None
    metadata: Annotated[dict[str, _Id], Field(max_length=16)] | None = None
    store: bool | None = None
    modalities: list[Literal["text"]] | None = None
    # The price table is that of the default tier. `auto` would let the upstream's account choose another one.
    service_tier: Literal["auto", "default"] | None = None


_READ_HERE = {"messages", "model", "stream", "stream_options", "max_tokens", "max_completion_tokens", "n"}


@frozen_for_the_type_checker
class CompletionBody:
    """A request whose cost is bounded."""

    model: str
    messages: Sequence[Mapping[str, Any]]
    options: Mapping[str, Any]
    """What is passed on, as the client sent it."""
    max_tokens: int
    """Of each choice."""
    choices: int
    input_tokens: int
    """The bound of the input."""
    stream: bool
    include_usage: bool
    content: Mapping[str, object]
    """The body as the client sent it."""

    def text(self) -> str:
        """The body as the client sent it, in one spelling."""
        return json.dumps(self.content, sort_keys=True, default=lambda number: {"number": str(number)})


@frozen_for_the_type_checker
class Bounds:
    """What the service allows."""

    default_model: str
    models: tuple[str, ...]
    max_tokens: int
    max_input_tokens: int
    max_choices: int
    long_cache_models: tuple[str, ...]
    """Of the models, those that have a price for caches that last an hour."""


def read_completion_body(request: Request, bounds: Bounds) -> CompletionBody:
    """The body of `request`, its maximum cut to the ceiling, with the bound of its input.

    Raises:
        InvalidRequest: 400, 415 or 422, with the field and the reason.
    """
    content = read_json_object(request)
    body = _checked(content, bounds)
    model = _model(body, bounds)
    choices = body.n or 1
    if choices > bounds.max_choices:
        raise InvalidRequest(422, "n", f"may be at most {bounds.max_choices} here")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest(422, "stream_options", "goes only with stream: true")
    requested = [maximum for maximum in (body.max_tokens, body.max_completion_tokens) if maximum is not None]
    options = _options(content, body)
    messages: Sequence[Mapping[str, Any]] = content["messages"]  # type: ignore[assignment] # was checked
    return CompletionBody(
        model=model,
        messages=messages,
        options=options,
        max_tokens=min([bounds.max_tokens, *requested]),
        choices=choices,
        input_tokens=_input_tokens(model, messages, options, bounds.max_input_tokens),
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        content=content,
    )


def _checked(content: Mapping[str, object], bounds: Bounds) -> _Body:
    unknown = sorted(name for name in content.keys() - _Body.model_fields.keys() if content[name] is not None)
    if unknown:
        raise InvalidRequest(422, unknown[0][:64] or NO_NAME, _NOT_OFFERED)
    try:
        has_long_cache = (content.get("model") or bounds.default_model) in bounds.long_cache_models
        return _Body.model_validate(content, context=has_long_cache)
    except ValidationError as error:
        if not _mend_roles(content.get("messages")):
            raise not_usable(error) from error
    return _checked(content, bounds)


def _mend_roles(messages: object) -> bool:
    """Make one word of roles like `assistantassistant`; whether there were any.

    Some servers send the role with each piece of a stream, and clients that put the pieces together hand that back.
    """
    mended = False
    for message in messages if isinstance(messages, list) else ():
        role = message.get("role") if isinstance(message, dict) else None
        if isinstance(role, str) and role not in {"", _ASSISTANT} and not role.replace(_ASSISTANT, ""):
            message["role"] = _ASSISTANT
            mended = True
    return mended


def _model(body: _Body, bounds: Bounds) -> str:
    if body.model is None:
        return bounds.default_model
    if body.model not in bounds.models:
        reason = f"has to be one of {', '.join(bounds.models)}"
        raise InvalidRequest(404, "model", reason, code="model_not_found")
    return body.model


def _options(content: Mapping[str, Any], body: _Body) -> dict[str, Any]:
    options = {name: value for name, value in content.items() if value is not None and name not in _READ_HERE}
    options.pop("modalities", None)
    if "service_tier" in options:
        options["service_tier"] = "default"
    if body.stream_options is not None and body.stream_options.include_obfuscation is not None:
        options["stream_options"] = {"include_obfuscation": body.stream_options.include_obfuscation}
    return options


def _input_tokens(
    model: str, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any], max_input_tokens: int
) -> int:
    try:
        return prompt_tokens(model, messages, options, max_input_tokens)
    except InputTooLong as error:
        # Clients look for the first five words to know that they have to shorten a conversation.
        reason = (
            f"This model's maximum context length is {max_input_tokens} tokens here, and the messages, with tools and "
            "images, are longer: reduce their length (LLM_MAX_INPUT_TOKENS)"
        )
        raise InvalidRequest(400, "messages", reason, code="context_length_exceeded") from error
    except ImagesNotBounded as error:
        raise InvalidRequest(
            422, "messages", f"hold an image, and what one costs with {model} is not bounded"
        ) from error
