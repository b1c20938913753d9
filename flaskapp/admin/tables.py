"""The settings that are lists, as tables of text fields: what a form shows of a row, and what was typed into it."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import get_args

from backends.budgets import Scope, Unit
from flaskapp.budgets import FurtherBudget, Override
from flaskapp.value_types import RowProblem

Texts = Mapping[str, str]
"""What stands in the fields of one row."""
_SLIDING = "sliding"
_SECONDS = "sliding_seconds"
_NUMBERS = {_SECONDS, "throttle_seconds"}
_DIGITS = 18


@dataclass(frozen=True, slots=True)
class Column:
    """A field of each row of a table."""

    name: str
    label: str
    hint: str = ""
    """What may be typed, where nothing is yet."""
    options: tuple[str, ...] = ()
    """What can be chosen, the first of them in a blank row; none where text is typed."""
    is_detail: bool = False
    """Whether it stands in the cell of the column before it, and counts where that has its last option."""
    is_budget: bool = False
    """Whether the names of budgets are suggested."""


TABLES: Mapping[str, tuple[Column, ...]] = {
    "budgets": (
        Column("name", "name"),
        Column("scope", "scope", options=("", *Scope)),
        Column("owner", "owner", "* (each)"),
        Column("period", "period", options=("", *get_args(Unit), "forever", _SLIDING)),
        Column(_SECONDS, "seconds of the window", "seconds", is_detail=True),
        Column("limit_usd", "limit, USD"),
        Column("mode", "mode", options=("enforce", "shadow")),
        Column("throttle_seconds", "throttle, s", "0"),
    ),
    "budget_overrides": (
        Column("budget", "budget", is_budget=True),
        Column("owner", "owner"),
        Column("limit_usd", "limit, USD"),
        Column("until", "until", "for good"),
    ),
}
"""By name of the setting."""
HELP = {
    "budgets": "The owner * stands for each owner of the scope: each has a budget of its own. Hours, days, weeks and "
    "months are those of {zone}. Only budgets of the scope identifier may have a throttle.",
    "budget_overrides": "An owner is spelt as in the keys of Redis. Until is a date and time with an offset, such as "
    "2030-12-31T18:00:00+01:00. Of two rows for one owner the later one counts.",
}


@dataclass(frozen=True, slots=True)
class Draft:
    """A list as it was typed; it is not saved."""

    name: str
    """Of the setting."""
    rows: Sequence[Texts]
    seen: str
    """The digest of the list that the form was made from."""
    problems: Mapping[int, RowProblem] = field(default_factory=dict)
    """By number of the row."""


@dataclass(frozen=True, slots=True)
class TableRow:
    """One row of a table."""

    number: int
    texts: Texts
    problem: RowProblem | None = None

    def is_wrong(self, column: Column) -> bool:
        """Whether its problem is in the field of that column; one of the whole row is in its first field."""
        if self.problem is None:
            return False
        where = self.problem.field or next(iter(self.texts))
        if where == "period" and self.texts["period"] == _SLIDING:
            where = _SECONDS
        return column.name == where


@dataclass(frozen=True, slots=True)
class Table:
    """A list, ready to be shown."""

    columns: tuple[Column, ...]
    rows: tuple[TableRow, ...]
    """The last is blank."""
    help: str
    seen: str
    """The digest of the list that the form is made from."""
    focus: tuple[int, str] | None
    """Row and column of the field that a person goes on with; None where nothing was typed before."""


def blank(name: str) -> Texts:
    """A row of that setting in which nothing was typed."""
    return {column.name: (*column.options, "")[0] for column in TABLES[name]}


def without_blanks(name: str, rows: Sequence[Texts]) -> list[Texts]:
    """The rows in which something was typed or chosen."""
    return [row for row in rows if {key: text.strip() for key, text in row.items()} != blank(name)]


def digest(text: str) -> str:
    """Another one for each list, by its text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def table(name: str, value: Sequence[FurtherBudget | Override], zone: str, seen: str, draft: Draft | None) -> Table:
    """The list as it is, with its digest `seen`, or as it was typed."""
    texts = [_texts(name, row) for row in value] if draft is None else [*draft.rows]
    if not texts or texts[-1] != blank(name):
        texts.append(blank(name))
    problems = {} if draft is None else draft.problems
    rows = tuple(TableRow(number, row, problems.get(number)) for number, row in enumerate(texts, 1))
    columns, words = TABLES[name], HELP[name].format(zone=zone)
    if draft is None:
        return Table(columns, rows, words, seen, focus=None)
    wrong = ((row.number, column.name) for row in rows for column in columns if row.is_wrong(column))
    return Table(columns, rows, words, draft.seen, focus=next(wrong, (len(rows), columns[0].name)))


def json_row(texts: Texts) -> dict[str, object]:
    """The row that was typed, as strict JSON would give it; what was left blank is left out."""
    row: dict[str, object] = {name: _value(name, text.strip()) for name, text in texts.items() if text.strip()}
    seconds = row.pop(_SECONDS, "")
    if row.get("period") == _SLIDING:
        row["period"] = {_SECONDS: seconds}
    return row


def _value(name: str, text: str) -> object:
    is_number = name in _NUMBERS and text.isascii() and text.isdecimal() and len(text) <= _DIGITS
    return int(text) if is_number else text


def _texts(name: str, row: FurtherBudget | Override) -> Texts:
    fields = row.as_json()
    if isinstance(period := fields.get("period"), dict):
        fields |= {"period": _SLIDING, **period}
    return {**blank(name), **{key: _text(value) for key, value in fields.items()}}


def _text(value: object) -> str:
    return format(value, "f") if isinstance(value, Decimal) else str(value)
