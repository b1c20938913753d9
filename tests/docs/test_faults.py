import re

from tests.docs.pages import ROOT, rows

PAGE = ROOT / "docs" / "FAULTS.md"
TEST_ID = re.compile(r"`[\w/]+\.py::\w+`")


HEAD = "| fault | state | by |"


def fault_rows():
    """Of all sections: the tables have the same head, and the one of what was measured has another."""
    tables = PAGE.read_text(encoding="utf-8").split("\n\n")
    lines = [line for table in tables if table.startswith(HEAD) for line in table.splitlines()[2:]]
    return [line.split(" | ") for line in lines]


def test_every_fault_has_a_state():
    assert len(fault_rows()) > len(rows(PAGE, "fault"))
    assert {row[1] for row in fault_rows()} == {"held", "partly", "open"}


def test_what_is_held_names_its_test():
    held = [row for row in fault_rows() if row[1] == "held"]
    assert [row[0] for row in held if not TEST_ID.search(row[2]) and "the same tests" not in row[2]] == []


def test_what_is_not_held_says_its_bound():
    bounds = re.compile(r"Bound: |due with|not measured|One window, then it is exact")
    assert [row[0] for row in fault_rows() if row[1] != "held" and not bounds.search(row[2])] == []
