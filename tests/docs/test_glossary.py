"""Words that the glossary replaces do not come back, in names and docstrings of the packages."""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.docs.pages import ROOT

INSTEAD = {
    "lobby": "factory",
    "life": "TTL",
    "lives": "TTL",
    "nobody": "name who it is",
    "pump": "reader of the upstream",
    "ring": "window, buckets",
    "rings": "windows, buckets",
    "room": "what fits, what is left",
    "sale": "admission",
    "somebody": "name who it is",
    "strongroom": "backends",
    "tell": "emit, report, return",
    "tells": "emits, reports, returns",
    "terms": "request digest",
    "till": "admission",
    "told": "emitted, reported, returned",
    "voice": "stream format",
    "whoever": "name who it is",
}
ALLOWED = {
    "backends/pricing": {"till"},  # `count_till_limit` of the tokenizers' library
    "backends/ledger/audit.py": {"told"},  # a field of `flask ledger audit --json`
    "flaskapp/lab": {"room"},  # `flask race --room`
    "flaskapp/lab/explorer.py": {"told"},  # a field of `flask explore --json`
    "flaskapp/lab/race_command.py": {"nobody"},  # its help
}
"""Words that others chose there."""
PLAIN = re.compile(r"\broom[ _](?=for\b)|(?<=_)room_(?=for)")
"""A limit may have room for a request; what is no longer there is a room of a house."""
WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
FILES = [path for package in ("backends", "flaskapp") for path in sorted((ROOT / package).rglob("*.py"))]


def banned_in(text: str) -> set[str]:
    """Whole words, also those between underscores and capitals; quoted code is what the outside sees."""
    return INSTEAD.keys() & {word.lower() for word in WORDS.findall(PLAIN.sub("", text))}


def names_and_docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        match node:
            case ast.ClassDef(name=text) | ast.FunctionDef(name=text) | ast.AsyncFunctionDef(name=text):
                yield node.lineno, text
            case ast.arg(arg=text) | ast.Name(id=text, ctx=ast.Store()) | ast.Attribute(attr=text, ctx=ast.Store()):
                yield node.lineno, text
            case ast.Expr(value=ast.Constant(value=str(text))):
                prose = re.sub(r"``?[^`]*``?", lambda code: "\n" * code[0].count("\n"), text)
                yield from enumerate(prose.split("\n"), node.lineno)


def found_in(code: str) -> list[tuple[int, str]]:
    return [(line, word) for line, text in names_and_docstrings(ast.parse(code)) for word in sorted(banned_in(text))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_word_that_the_glossary_replaces(path):
    name = path.relative_to(ROOT).as_posix()
    allowed = {word for place, words in ALLOWED.items() if name.startswith(place) for word in words}
    found = [(line, word) for line, word in found_in(path.read_text(encoding="utf-8")) if word not in allowed]
    assert [f"{name}:{line}: {word}: {INSTEAD[word]}" for line, word in found] == []


def test_such_a_word_would_be_noticed():
    code = 'class ChatRoom:\n    """The till; `told` is a field."""\n    def f(self, open_terms): self.was_told = 1\n'
    assert [word for _, word in found_in(code)] == ["room", "till", "terms", "told"]
    assert found_in('def during(string, herring): """Storing; roommate."""\n') == []
