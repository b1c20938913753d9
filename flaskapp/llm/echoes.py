"""Takes out of an upstream's error what we sent it: many repeat the request, or a part of it, in any spelling."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

GONE = "***"
_MOST_CHARACTERS = 4_096
"""Of a text, what is looked at; the rest is left out. Far less of it is shown."""
_LEAST_ALIKE = 20
"""Letters and digits in a row that a server hardly has in its own words too."""
_STEP = _LEAST_ALIKE // 2
"""Every run of `_LEAST_ALIKE` has a whole step in it."""
_ESCAPE = re.compile(r"(?<!\\)\\++(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|[nrtbf])")


def without_echoes(text: str, sent: Sequence[str]) -> str:
    """`text` with `GONE` in place of what it has of the texts that were sent."""
    text = text[:_MOST_CHARACTERS]
    places, skeleton = _skeleton(text)
    spans: list[tuple[int, int]] = []
    for each in sent:
        if len(each) >= _LEAST_ALIKE:
            spans += _alike(skeleton, "".join(filter(str.isalnum, _ESCAPE.sub(_read, each))))
    for first, last in reversed(_merged(spans)):
        text = text[: places[first][0]] + GONE + text[places[last - 1][1] :]
    return text


def texts_in(value: Any) -> Iterator[str]:
    """All texts in JSON, however deep; names of fields are none."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from texts_in(item)


def _skeleton(text: str) -> tuple[list[tuple[int, int]], str]:
    """The letters and digits of a text, with escapes read, and where each stands."""
    places: list[tuple[int, int]] = []
    characters: list[str] = []
    at = 0
    while at < len(text):
        escape = _ESCAPE.match(text, at) if text[at] == "\\" else None
        character, end = text[at], at + 1
        if escape is not None:
            character, end = _read(escape), escape.end()
        if character.isalnum():
            characters.append(character)
            places.append((at, end))
        at = end
    return places, "".join(characters)


def _read(escape: re.Match[str]) -> str:
    return chr(int(escape[1] or escape[2] or "20", 16))


def _alike(skeleton: str, sent: str) -> Iterator[tuple[int, int]]:
    """Where a text has at least `_LEAST_ALIKE` characters in a row that another has too."""
    at = 0
    while at + _STEP <= len(skeleton):
        found = sent.find(skeleton[at : at + _STEP])
        if found < 0:
            at += _STEP
            continue
        first, last = at, at + _STEP
        while first and found and skeleton[first - 1] == sent[found - 1]:
            first, found = first - 1, found - 1
        while (
            last < len(skeleton) and found + last - first < len(sent) and skeleton[last] == sent[found + last - first]
        ):
            last += 1
        if last - first >= _LEAST_ALIKE:
            yield first, last
        at = max(last, at + _STEP)


def _merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(last, merged[-1][1])
        else:
            merged.append((first, last))
    return merged
