import ast
from pathlib import Path

import backends
from backends import contract


def names_of_the_contract():
    """What its page defines for others: classes, and names for types."""
    tree = ast.parse(Path(contract.__file__).read_text(encoding="utf-8"))
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    types = {node.targets[0].id for node in tree.body if isinstance(node, ast.Assign)}
    return {name for name in classes | types if not name.startswith("_")}


def test_every_name_of_the_contract_is_on_the_public_face():
    names = names_of_the_contract()
    assert {"Backend", "Verdict", "Idempotency"} <= names
    assert names - set(backends.__all__) == set()


def test_what_is_on_the_public_face_is_there():
    assert [name for name in backends.__all__ if not hasattr(backends, name)] == []
