"""JSON from outside, read strictly: no duplicate keys, no NaN, no float, bounded depth.

Numbers with a fraction or an exponent, and whole numbers of more than 18 digits, are read as `Decimal`;
so a `float` never appears, and an enormous number costs no time.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, NoReturn

MAX_DEPTH = 64
MOST_STRUCTURE = 10_000
_STRUCTURE = b"{[:,"
_INT_DIGITS = 18


class StrictJsonError(ValueError):
    """The text is not acceptable JSON; the message is one line that names the reason."""


def loads(text: bytes | str) -> object:
    """Read one JSON value.

    Raises:
        StrictJsonError: bad syntax or Unicode, a key twice, NaN or Infinity, or nested deeper than `MAX_DEPTH`.
    """
    try:
        characters = text.decode() if isinstance(text, bytes) else text
        if not characters.strip():
            raise StrictJsonError("empty")
        if characters.startswith("\ufeff"):
            raise StrictJsonError("not valid JSON: it begins with a byte order mark")
        decoder = _DECODER_OF_LONG_NUMBERS if _MANY_DIGITS.search(characters) else _DECODER
        value: object = decoder.decode(characters)
    except UnicodeDecodeError as error:
        raise StrictJsonError("not valid UTF-8") from error
    except json.JSONDecodeError as error:
        raise StrictJsonError(f"not valid JSON: {error.msg}, line {error.lineno} column {error.colno}") from error
    except RecursionError as error:
        raise StrictJsonError("nested too deeply") from error
    except ArithmeticError as error:
        raise StrictJsonError("a number is out of every range") from error
    # Half a surrogate pair is an escape, or comes in a text that was decoded elsewhere.
    if "\\u" in characters or characters.count("[") + characters.count("{") >= MAX_DEPTH or not isinstance(text, bytes):
        _check_depth_and_unicode(value)
    return value


def refuse_much_structure(text: bytes) -> None:
    """Look at the bytes before anything is parsed: parsing and checking a value takes much longer than reading a byte.

    Raises:
        StrictJsonError: outside its texts there are more than `MOST_STRUCTURE` braces, brackets, colons and commas.
    """
    if _count_structure(text) <= MOST_STRUCTURE:
        return
    # What is left of quotes begins or ends a text. A backslash outside of one ends the parser's work, too.
    bare = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    # Each text follows one of the marks.
    has_too_many_texts = bare.count(b'"') > 2 * (MOST_STRUCTURE + 1)
    if has_too_many_texts or _count_structure(b"".join(bare.split(b'"')[::2])) > MOST_STRUCTURE:
        marks = f"more than {MOST_STRUCTURE} braces, brackets, colons and commas outside of texts"
        raise StrictJsonError(f"nested too deeply, or too many values: {marks}")


def _count_structure(text: bytes) -> int:
    return len(text) - len(text.translate(None, _STRUCTURE))


def dumps(value: object) -> str:
    """Write what `loads` reads; a `Decimal` becomes a number and keeps every digit.

    An object of our own is written as what its method `as_json` returns.
    """
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {dumps(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(dumps(item) for item in value) + "]"
    if isinstance(value, Decimal):
        # Short numbers are written out (0.000000001, not 1E-9); one with a huge exponent stays as it is.
        return format(value, "f") if abs(value.adjusted()) <= _INT_DIGITS else str(value)
    as_json = getattr(value, "as_json", None)
    return json.dumps(value) if as_json is None else dumps(as_json())


def _integer(digits: str) -> int | Decimal:
    return int(digits) if len(digits) <= _INT_DIGITS else Decimal(digits)


def _no_constant(word: str) -> NoReturn:
    raise StrictJsonError(f"{word} is not a JSON number")


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise StrictJsonError(f"the key {twice[:80]!a} is there twice")
    return fields


# Made once: `json.loads` makes one for each text. Nearly none has a long number, and Python reads the others by itself.
_MANY_DIGITS = re.compile(rf"[0-9]{{{_INT_DIGITS + 1}}}|-[0-9]{{{_INT_DIGITS}}}")
_STRICT: Mapping[str, Any] = {
    "parse_float": Decimal,
    "parse_constant": _no_constant,
    "object_pairs_hook": _no_duplicates,
}
_DECODER = json.JSONDecoder(**_STRICT)
_DECODER_OF_LONG_NUMBERS = json.JSONDecoder(**_STRICT, parse_int=_integer)


def _check_depth_and_unicode(value: object) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for item in level for child in _children(item)]
        if not level:
            return
    raise StrictJsonError("nested too deeply")


def _children(item: object) -> list[object]:
    if isinstance(item, dict):
        return [*item.keys(), *item.values()]
    if isinstance(item, list):
        return item
    if isinstance(item, str):
        try:
            item.encode()
        except UnicodeEncodeError as error:
            raise StrictJsonError("not valid Unicode: half a surrogate pair") from error
    return []
