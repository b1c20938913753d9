"""The whole answer in a stream that a server sent although none was asked for."""

import codecs
import json
import re
from collections.abc import Sequence
from typing import Any

from flaskapp.llm.event_stream import EventStream, ServerEvent

_STREAM = re.compile(rb"\s*(?:data|event|id|retry)?:")
"""How a stream begins: with a field, or with a comment."""
_NAMES = {"role", "type", "id", "name"}
"""Texts that are whole in each piece that has them."""


def is_stream(received: bytes) -> bool:
    """Whether a body is a stream of events, under whatever type it came."""
    return _STREAM.match(received.removeprefix(codecs.BOM_UTF8)) is not None


def events_in(received: bytes) -> list[ServerEvent]:
    """All events of a stream that has ended.

    Raises:
        ValueError: an event is too large.
    """
    stream = EventStream()
    return stream.feed(received) + stream.end()


def put_together(events: Sequence[ServerEvent]) -> dict[str, Any]:
    """The completion whose chunks these events are; what is none of it is left out."""
    body: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        chunk = _chunk_in(event)
        body.update({name: value for name, value in chunk.items() if value is not None and name != "choices"})
        for choice in chunk.get("choices", ()):
            index = choice.get("index", 0)
            choices[index] = _joined(choices.get(index), choice)
    return {**body, "object": "chat.completion", "choices": [_whole(choices[index]) for index in sorted(choices)]}


def _chunk_in(event: ServerEvent) -> dict[str, Any]:
    try:
        chunk = json.loads(event.data)
    except ValueError:
        # The end of the stream, or a sign of life.
        return {}
    return chunk if isinstance(chunk, dict) and isinstance(chunk.get("choices"), list) else {}


def _whole(choice: dict[str, Any]) -> dict[str, Any]:
    """A choice with its message in place of the pieces of it."""
    message = choice.pop("delta", None) or {}
    message.setdefault("content", None)
    for call in message.get("tool_calls") or ():
        call.pop("index", None)
    return {**choice, "message": {"role": "assistant", **message}}


def _joined(before: Any, piece: Any, name: str = "") -> Any:
    """A value, and the next piece of it."""
    if piece is None or before is None:
        return before if piece is None else _joined([], piece) if isinstance(piece, list) else piece
    if isinstance(before, str) and isinstance(piece, str):
        return piece if name in _NAMES else before + piece
    if isinstance(before, dict) and isinstance(piece, dict):
        return before | {key: _joined(before.get(key), value, key) for key, value in piece.items()}
    if isinstance(before, list) and isinstance(piece, list):
        return _joined_lists(before, piece)
    return piece


def _joined_lists(before: list[Any], piece: list[Any]) -> list[Any]:
    """Items that name their place are joined to those of that place; others follow."""
    joined = list(before)
    for item in piece:
        place = item.get("index") if isinstance(item, dict) else None
        same = next((at for at, each in enumerate(joined) if place is not None and each.get("index") == place), None)
        if same is None:
            joined.append(item)
        else:
            joined[same] = _joined(joined[same], item)
    return joined
