"""JSON schemas of bodies, made from what reads them: the models of the two bodies, and the table of settings."""

import json
import re
from collections.abc import Mapping
from decimal import Decimal
from functools import cache
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, models_json_schema
from pydantic_core import core_schema

from flaskapp.chat.body import ChatBody
from flaskapp.openai.body import _Body as CompletionBody
from flaskapp.settings import Setting
from flaskapp.value_types import MAX_PLACES, Amount, Choice, Rate, Switch, ValueType, Whole

Schema = dict[str, Any]

REFERENCE = "#/components/schemas/"
_NAMES = {"_Body": "CompletionBody"}
_BOUNDS = {"ge": "minimum", "le": "maximum"}


class _OfStrictJson(GenerateJsonSchema):
    """As our readers take it: a `Decimal` is a number and never a text."""

    def decimal_schema(self, schema: core_schema.DecimalSchema) -> Schema:
        del schema
        return {"type": "number"}

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Without titles, which would say the fields' names again."""
        del schema
        return False


@cache
def _of_bodies() -> str:
    """The schemas of both bodies and of all that they hold, as JSON."""
    _, found = models_json_schema(
        [(ChatBody, "validation"), (CompletionBody, "validation")],
        ref_template=f"{REFERENCE}{{model}}",
        schema_generator=_OfStrictJson,
    )
    return json.dumps({_public(name): _plain(schema) for name, schema in found["$defs"].items()})


def body_schemas(models: tuple[str, ...], default_model: str, max_tokens: int, max_choices: int) -> dict[str, Schema]:
    """The schemas of both bodies by name, with what is allowed here and now."""
    schemas: dict[str, Schema] = json.loads(_of_bodies())
    chat, completion = schemas["ChatBody"]["properties"], schemas["CompletionBody"]["properties"]
    chat["model"] |= {"enum": list(models), "default": default_model}
    chat["max_tokens"] |= {"maximum": max_tokens, "default": max_tokens}
    completion["model"] = {"enum": [*models, None], "default": default_model}
    completion["n"] = {"anyOf": [{"type": "integer", "minimum": 1, "maximum": max_choices}, {"type": "null"}]}
    return schemas


def settings_schema(table: Mapping[str, Setting]) -> Schema:
    """What a change of live settings may hold; `null` goes back to the environment."""
    properties = {name: _nullable(row.value_type) for name, row in table.items()}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _nullable(value_type: ValueType[Any]) -> Schema:
    return {"anyOf": [*_choices(value_type), {"type": "null"}], "description": value_type.description}


def _choices(value_type: ValueType[Any]) -> list[Schema]:
    """What strict JSON may hold for a value type."""
    bounds = {name: _number(bound) for name, bound in value_type.bounds.items() if name in {"minimum", "maximum"}}
    match value_type:
        case Switch():
            return [{"type": "boolean"}]
        case Amount():
            return [{"type": "number", **bounds}, {"type": "string", "pattern": rf"^[0-9]*\.?[0-9]{{0,{MAX_PLACES}}}$"}]
        case Whole():
            return [{"type": "integer", **bounds}]
        case Choice():
            return [{"enum": list(value_type.values)}]
        case Rate():
            return [{"type": "string", "description": value_type.allowed}]
        case _:
            return [{"type": "array", "items": {"type": "object"}, "description": value_type.allowed}]


def _number(bound: object) -> object:
    return float(bound) if isinstance(bound, Decimal) else bound


def _public(name: str) -> str:
    return _NAMES.get(name, name.lstrip("_"))


def _plain(value: Any) -> Any:
    """A schema under its public names, with bounds in the words of JSON Schema."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, str) and value.startswith(REFERENCE):
        return REFERENCE + _public(value.removeprefix(REFERENCE))
    if not isinstance(value, dict):
        return value
    is_number = value.get("type") == "number"
    plain = {_BOUNDS.get(name, name) if is_number else name: _plain(item) for name, item in value.items()}
    if isinstance(plain.get("title"), str):
        plain["title"] = re.sub("^_", "", plain["title"])
    return plain
