"""How an upstream wants to be asked where servers differ: the name of the maximum, and whether to ask for the usage.

`auto` begins with what most servers take, and learns from a refusal that names what was wrong: the request costs
nothing then, and is sent once more in the other way. Only if the server takes that, it is the way from then on.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Literal

import orjson

from flaskapp.llm import ModelRequest
from flaskapp.strict_json import dumps

MaxTokensName = Literal["max_tokens", "max_completion_tokens"]
OLDER: MaxTokensName = "max_tokens"
NEWER: MaxTokensName = "max_completion_tokens"
_NEWER_ONLY = re.compile(r"(ft:)?(o[1-9]|gpt-[5-9]|gpt-[1-9][0-9])(?![0-9a-z])")
"""OpenAI's newer models refuse `max_tokens` and take `max_completion_tokens`, which older servers do not know."""
_USAGE_REFUSED = re.compile(r"stream_options|include_usage")
_NOT_TAKEN = re.compile(
    r"(un|not )(supported|known|recogni[sz]ed|permitted|allowed|expected)|extra|forbidden|instead|no such"
    r"|invalid_?(field|arg)",
    re.IGNORECASE,
)
"""A server that only finds the number too large says nothing of the kind."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """One way to ask."""

    max_tokens_name: MaxTokensName
    asks_for_usage: bool
    """In a stream."""

    def body(self, request: ModelRequest, *, stream: bool) -> bytes:
        """The request as JSON."""
        options = dict(request.options)
        if stream:
            options["stream"] = True
        if stream and self.asks_for_usage:
            # Whatever the caller asked for: the usage has to be known.
            options["stream_options"] = {**options.get("stream_options", {}), "include_usage": True}
        else:
            options.pop("stream_options", None)
        if request.choices > 1:
            options["n"] = request.choices
        body = {
            **options,
            "model": request.model,
            "messages": [dict(message) for message in request.messages],
            self.max_tokens_name: request.max_tokens,
        }
        return orjson.dumps(body, default=_number)


class Dialects:
    """The ways of one upstream, model by model.

    Args:
        max_tokens_parameter: `max_tokens`, `max_completion_tokens` or `auto`.
        stream_usage: `true`, `false` or `auto`.
        on_learnt: called with a model and what to say of it, once each.
    """

    def __init__(
        self,
        max_tokens_parameter: str = "auto",
        stream_usage: str = "auto",
        on_learnt: Callable[[str, dict[str, object]], object] = lambda _model, _fields: None,
    ) -> None:
        self._max_tokens_parameter = max_tokens_parameter
        self._stream_usage = stream_usage
        self._on_learnt = on_learnt
        self._known: dict[str, Dialect] = {}

    def of(self, model: str) -> Dialect:
        """How to ask for an answer of `model`."""
        known = self._known.get(model)
        return known if known is not None else self._known.setdefault(model, self._first(model))

    def instead(self, dialect: Dialect, refusal: str, *, stream: bool) -> Dialect | None:
        """Another way after a refusal with this text; None where nothing else would help."""
        if stream and dialect.asks_for_usage and self._stream_usage == "auto" and _USAGE_REFUSED.search(refusal):
            return replace(dialect, asks_for_usage=False)
        name = dialect.max_tokens_name
        if self._max_tokens_parameter == "auto" and _names(name, refusal) and _NOT_TAKEN.search(refusal):
            return replace(dialect, max_tokens_name=OLDER if name == NEWER else NEWER)
        return None

    def learn(self, model: str, dialect: Dialect) -> None:
        """The server takes this way, after it refused another."""
        before = self.of(model)
        if dialect == before:
            return
        self._known[model] = dialect
        fields: dict[str, object] = {}
        if dialect.max_tokens_name != before.max_tokens_name:
            fields["max_tokens_parameter"] = dialect.max_tokens_name
        if dialect.asks_for_usage != before.asks_for_usage:
            fields["stream_usage"] = dialect.asks_for_usage
        self._on_learnt(model, fields)

    def _first(self, model: str) -> Dialect:
        name = self._max_tokens_parameter
        is_newer = name == NEWER or (name == "auto" and bool(_NEWER_ONLY.match(model.lower().rpartition("/")[2])))
        return Dialect(NEWER if is_newer else OLDER, self._stream_usage != "false")


def _names(parameter: str, text: str) -> bool:
    return re.search(rf"(?<![a-z_]){parameter}(?![a-z_])", text) is not None


def _number(number: Decimal) -> orjson.Fragment:
    """A number with a fraction: it passes with every digit."""
    return orjson.Fragment(dumps(number))
