"""How many tokens a whole chat completion's input can have at most: messages, images, tools and schemas.

Counted without a network, and from above:

* Text that the model reads as text (contents, names, arguments of tool calls) is counted by `token_bounds.bound_for`.
* Definitions (tools, functions, schemas, a tool choice) stand in the prompt in a form of the model's own, so every byte
  of their JSON counts as a token, and each has an allowance. An unknown model's template may write them with line
  breaks: then the bytes are those of JSON with an indent of four. The target of a ``$ref`` or ``$dynamicRef`` counts
  once for each pointer to it, in case the template expands it, until it leads back into itself.
* Fields that are not known stand there too, name and value: as many tokens as their JSON has bytes, and an allowance
  for each. A server may put any of them into the prompt.
* An image counts as the documented maximum of its model. Without a documented maximum there is no bound, and images
  are refused.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from backends.pricing.token_bounds import InputTooLong, TokenBound, bound_for, most_bytes

_DEFINITIONS = ("tools", "functions", "tool_choice", "function_call", "response_format")
_STEERING = ("reasoning_effort", "verbosity", "parallel_tool_calls")
"""Options that may add words to the prompt of a few models."""
_TEXT_KEYS = ("name", "tool_call_id", "refusal", "reasoning_content")
_MESSAGE_FIELDS = frozenset({"role", "content", "tool_calls", "function_call", "annotations", "audio", *_TEXT_KEYS})
_CALL_FIELDS = {"": frozenset({"id", "type", "function", "custom"})} | dict.fromkeys(
    ("function", "custom"), frozenset({"name", "arguments", "input"})
)
_PART_FIELDS = {
    "text": frozenset({"type", "text"}),
    "refusal": frozenset({"type", "refusal"}),
    "image_url": frozenset({"type", "image_url"}),
}
_IMAGE_FIELDS = frozenset({"url", "detail"})
"""What is counted as what it is; any other field is counted as JSON."""
_POINTERS = {"$ref", "$dynamicRef", "$recursiveRef"}
_IDS = {"$id", "id"}
_ANCHORS = {"$anchor", "$dynamicAnchor"}
"""Words of JSON Schema, in its drafts from 4 on."""
_MOST_NODES = 64
"""That are looked at for one pointer."""
_PLACE = re.compile(r"[0-9]{1,7}")
"""An index of a list, in a pointer."""
_PIECE_TOKENS = 16
"""For what wraps a part of a message, an image or a tool call."""
_DEFINITION_TOKENS = 32
"""For what wraps one definition, and for one steering option."""


@dataclass(frozen=True, slots=True)
class _ImageRule:
    models: re.Pattern[str]
    low_tokens: int
    most_tokens: int
    """Of any image, whatever its size."""


def _tiled(models: str, base: int, tile: int) -> _ImageRule:
    # Scaled down to fit 2048 × 2048 and then to 768 on the shorter side: at most 4 × 2 tiles of 512 × 512.
    return _ImageRule(re.compile(models), base, base + 8 * tile)


def _patched(models: str, per_hundred: int) -> _ImageRule:
    # At most 1,536 patches of 32 × 32, times the model's factor; `low` saves nothing there.
    most = -(-1_536 * per_hundred // 100)
    return _ImageRule(re.compile(models), most, most)


_DATED = r"(-\d{4}-\d\d-\d\d)?"
_IMAGE_RULES = (
    _tiled(rf"(chatgpt-4o-latest|gpt-4o{_DATED}|gpt-4\.1{_DATED}|gpt-4\.5-preview{_DATED})", 85, 170),
    _tiled(rf"gpt-4o-mini{_DATED}", 2_833, 5_667),
    _tiled(rf"gpt-5({_DATED}|-chat-latest)", 70, 140),
    _tiled(rf"(o1|o3){_DATED}", 75, 150),
    _patched(rf"(gpt-4\.1-mini|gpt-5-mini){_DATED}", 162),
    _patched(rf"(gpt-4\.1-nano|gpt-5-nano){_DATED}", 246),
    _patched(rf"o4-mini{_DATED}", 172),
)


class ImagesNotBounded(ValueError):
    """No maximum is documented for the tokens of an image with this model."""


def image_tokens(model: str, detail: str | None) -> int:
    """The most tokens of one image; `detail` is `low`, `high`, `auto` or None.

    Raises:
        ImagesNotBounded: no maximum is documented for this model.
    """
    name = model.lower().rpartition("/")[2]
    for rule in _IMAGE_RULES:
        if rule.models.fullmatch(name):
            return _PIECE_TOKENS + (rule.low_tokens if detail == "low" else rule.most_tokens)
    raise ImagesNotBounded(model)


def prompt_tokens(
    model: str, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any], max_input_tokens: int
) -> int:
    """The bound, in tokens, of a request whose shape was checked.

    Raises:
        InputTooLong: it is above `max_input_tokens`; counting stops there.
        ImagesNotBounded: there is an image, and no maximum for it.
    """
    counter = _Counter(model, max_input_tokens)
    for message in messages:
        counter.add_message(message)
    for name in _DEFINITIONS:
        for definition in _definitions(options.get(name)):
            counter.add_definition(definition)
    counter.add(_DEFINITION_TOKENS * sum(options.get(name) is not None for name in _STEERING))
    return counter.tokens


class _Counter:
    """Adds up tokens, and raises as soon as there are too many."""

    def __init__(self, model: str, max_input_tokens: int) -> None:
        self._model = model
        self._bound: TokenBound = bound_for(model)
        self._most = max_input_tokens
        self._has_definitions = False
        self.tokens = 0
        self.add(self._bound.request_tokens)

    def add(self, tokens: int) -> None:
        self.tokens += tokens
        if self.tokens > self._most:
            raise InputTooLong(self._most)

    def add_text(self, text: object) -> None:
        if isinstance(text, str) and text:
            tokens = self._bound.count_within(text, self._most - self.tokens)
            self.add(self._most + 1 if tokens is None else tokens)

    def add_message(self, message: Mapping[str, Any]) -> None:
        self.add(self._bound.message_tokens)
        content = message.get("content")
        self.add_text(content)
        for part in content if isinstance(content, list) else ():
            self._add_part(part)
        for key in _TEXT_KEYS:
            if message.get(key):
                self.add(_PIECE_TOKENS)
                self._add_text_or_json(message[key])
        for call in message.get("tool_calls") or ():
            self.add(_PIECE_TOKENS)
            self._add_call(call)
        if message.get("function_call"):
            self.add(_PIECE_TOKENS)
            self._add_named(message["function_call"], _CALL_FIELDS["function"])
        for annotation in message.get("annotations") or ():
            self.add_definition(annotation)
        self._add_unknown(message, _MESSAGE_FIELDS)

    def add_definition(self, definition: object) -> None:
        if not self._has_definitions:
            self._has_definitions = True
            self.add(self._bound.definitions_tokens)
        self.add(_DEFINITION_TOKENS)
        self.add(self._size(definition))
        if isinstance(definition, dict):
            for schema in _schemas(definition):
                _Pointers(schema, self._size).add_to(self.add)

    def _add_part(self, part: Mapping[str, Any]) -> None:
        self.add(_PIECE_TOKENS)
        kind = part.get("type")
        if kind == "image_url":
            self.add(image_tokens(self._model, part["image_url"].get("detail")))
            self._add_unknown(part["image_url"], _IMAGE_FIELDS)
        known = _PART_FIELDS.get(str(kind), frozenset())
        for key in known & {"text", "refusal"}:
            self.add_text(part.get(key))
        self._add_unknown(part, known)

    def _add_call(self, call: Mapping[str, Any]) -> None:
        self._add_named(call, _CALL_FIELDS[""])
        for kind in ("function", "custom"):
            if isinstance(call.get(kind), dict):
                self._add_named(call[kind], _CALL_FIELDS[kind])

    def _add_named(self, value: Mapping[str, Any], known: frozenset[str]) -> None:
        for key in known:
            self.add_text(value.get(key))
        self._add_unknown(value, known)

    def _add_unknown(self, value: Mapping[str, Any], known: frozenset[str]) -> None:
        if value.keys() <= known:
            return
        for key, item in value.items():
            if key not in known:
                self.add(_PIECE_TOKENS)
                self.add(self._size({key: item}))

    def _add_text_or_json(self, value: object) -> None:
        if isinstance(value, str):
            self.add_text(value)
        else:
            self.add(self._size(value))

    def _size(self, value: object) -> int:
        indent = self._bound.definition_indent
        # Non-ASCII characters are counted as JSON escapes, which are longer than UTF-8.
        escaped = json.dumps(value, indent=indent, default=str)
        if "\\u" not in escaped:
            return len(escaped)
        # But not always longer than what a tokenizer's normalisation makes of them.
        return max(len(escaped), most_bytes(json.dumps(value, indent=indent, default=str, ensure_ascii=False)))


@dataclass(frozen=True, slots=True)
class _Target:
    """What a pointer may stand for: its own size, and its own pointers."""

    size: int
    pointers: Sequence[str]


class _Pointers:
    """What the pointers of a schema add if each is expanded; one that leads back into itself adds nothing more.

    A pointer is a path, an anchor or an `$id`, and readers differ in what they take it for where an `$id` has changed
    the base: whatever it may stand for counts, all of it together.

    Each step adds its size at once, so that the counter stops it where there is too much. A target's total is not
    cached: where pointers lead in a circle, it depends on the way to the target.
    """

    def __init__(self, schema: Mapping[str, Any], size: Callable[[object], int]) -> None:
        self._size = size
        self._targets: dict[str, _Target | None] = {}
        self._bases: list[Mapping[str, Any]] = [schema]
        """Where paths may begin: the schema, and what has an `$id` in it."""
        self._named: dict[str, list[Mapping[str, Any]]] = {}
        """By the last part of an `$id`, and by anchor."""
        for node in _nodes(schema):
            if isinstance(node, dict):
                self._note_names(node)

    def add_to(self, add: Callable[[int], None]) -> None:
        """Expand the schema to any depth; that may be deeper than Python's stack."""
        path: dict[str, None] = {}
        ways = [iter(_pointers(self._bases[0]))]
        while ways:
            pointer = next(ways[-1], None)
            if pointer is None:
                ways.pop()
                if path:
                    path.popitem()
            elif pointer not in path and (target := self._target(pointer)) is not None:
                add(target.size)
                path[pointer] = None
                ways.append(iter(target.pointers))

    def _note_names(self, node: Mapping[str, Any]) -> None:
        for key in _IDS & node.keys():
            if isinstance(node[key], str):
                self._bases.append(node)
                self._named.setdefault(_last_part(node[key]), []).append(node)
        for key in _ANCHORS & node.keys():
            if isinstance(node[key], str):
                self._named.setdefault(node[key], []).append(node)

    def _target(self, pointer: str) -> _Target | None:
        if pointer not in self._targets:
            nodes = self._found(pointer)
            pointers = tuple(each for node in nodes for each in _pointers(node))
            self._targets[pointer] = _Target(sum(map(self._size, nodes)), pointers) if nodes else None
        return self._targets[pointer]

    def _found(self, pointer: str) -> Sequence[object]:
        """All nodes that a pointer may stand for, each once; where they are very many, the whole schema."""
        base, _, fragment = pointer.partition("#")
        is_path = fragment.startswith("/")
        if fragment and not is_path:
            bases = self._named.get(unquote(fragment), [])
        elif base:
            bases = self._named.get(_last_part(base), [])
        else:
            bases = self._bases if is_path else self._bases[:1]
        if len(bases) > _MOST_NODES:
            return self._bases[:1]
        if not is_path:
            return bases
        found = {id(node): node for start in bases if (node := _at(start, fragment)) is not None}
        return list(found.values())


def _last_part(address: str) -> str:
    """What says which `$id` it is, since that may be relative to another; of an old kind of anchor, its word."""
    return unquote(address.rstrip("#/").rpartition("/")[2].rpartition("#")[2])


def _at(node: object, path: str) -> object | None:
    for key in path.split("/")[1:]:
        node = _child(node, unquote(key).replace("~1", "/").replace("~0", "~"))
    return node


def _child(node: object, key: str) -> object | None:
    if isinstance(node, list):
        return node[int(key)] if _PLACE.fullmatch(key) and int(key) < len(node) else None
    return node.get(key) if isinstance(node, dict) else None


def _definitions(value: object) -> Sequence[object]:
    """The definitions in an option; a bare word has none."""
    if isinstance(value, list):
        return value
    return [value] if isinstance(value, dict) else []


def _schemas(definition: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for holder in (definition, definition.get("function"), definition.get("json_schema")):
        for key in ("parameters", "schema"):
            if isinstance(holder, dict) and isinstance(holder.get(key), dict):
                yield holder[key]


def _pointers(value: object) -> Iterator[str]:
    for node in _nodes(value):
        if isinstance(node, dict):
            yield from (node[key] for key in _POINTERS & node.keys() if isinstance(node[key], str))


def _nodes(value: object) -> Iterator[object]:
    yield value
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        yield from _nodes(child)
