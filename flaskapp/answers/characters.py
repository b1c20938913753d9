"""What of an upstream's text would break its readers: half characters, and characters at which some break a line."""

from collections.abc import Hashable, Mapping, MutableMapping
from typing import Any

MAY_BREAK_LINES = (b"\xe2\x80", b"\xc2\x85")
"""Where neither is, `one_line` changes nothing."""
_FIRST_HALVES = ("\ud800", "\udbff")
"""Of surrogate pairs: the first and the last of them."""

Held = MutableMapping[Hashable, str]
"""First halves of surrogate pairs whose second halves are still to come, by the place of their text."""


def one_line(data: bytes) -> bytes:
    r"""JSON with escapes in place of U+0085, U+2028 and U+2029, which JSON itself leaves as they are.

    The specification of server-sent events breaks lines at ``\r`` and ``\n`` alone, but many of its readers break them
    as Python's `splitlines` does: there a model could write an event of its own.
    """
    return (
        data.replace(b"\xc2\x85", rb"\u0085").replace(b"\xe2\x80\xa8", rb"\u2028").replace(b"\xe2\x80\xa9", rb"\u2029")
    )


def whole_characters(text: str, held: Held, place: Hashable = ()) -> str:
    """`text` without halves of surrogate pairs, as some models give them one by one.

    A first half at its end is held, and put before the text that comes next at that place.
    """
    text = held.pop(place, "") + text
    if _FIRST_HALVES[0] <= text[-1:] <= _FIRST_HALVES[1]:
        held[place], text = text[-1], text[:-1]
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def with_whole_characters(value: Any, held: Held, place: tuple[Hashable, ...] = ()) -> Any:
    """The same for each text in JSON; what is in a list stands at the place that its `index` says."""
    if isinstance(value, str):
        return whole_characters(value, held, place)
    if isinstance(value, list):
        return [
            with_whole_characters(
                item, held, (*place, item.get("index", number) if isinstance(item, Mapping) else number)
            )
            for number, item in enumerate(value)
        ]
    if isinstance(value, Mapping):
        return {
            whole_characters(name, {}): with_whole_characters(item, held, (*place, name))
            for name, item in value.items()
        }
    return value
