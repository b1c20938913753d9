import ast
import subprocess
import sys
from pathlib import Path

import pytest

import backends
from backends import contract, pricing


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


def test_what_a_budget_is_made_of_is_on_the_public_face():
    assert {"Budget", "Calendar", "Forever", "Reason", "Scope", "Sliding"} <= set(backends.__all__)
    assert not hasattr(backends, "Limits")


def test_what_is_on_the_public_face_is_there():
    assert [name for module in (backends, pricing) for name in module.__all__ if not hasattr(module, name)] == []


@pytest.mark.parametrize(
    ("name", "needed", "other"), [("Price", "genai_prices", "rs_bpe"), ("bound_for", "rs_bpe", "genai_prices")]
)
def test_a_name_of_pricing_loads_its_own_part_only(name, needed, other):
    program = (
        f"import sys; from backends.pricing import {name}; print([n in sys.modules for n in ('{needed}', '{other}')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[True, False]\n"
