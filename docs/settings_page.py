"""Writes the tables of docs/SETTINGS.md from the one table in the code:  python docs/settings_page.py"""
# ruff: noqa: INP001 (a command beside the page that it writes)

from collections.abc import Iterable, Iterator
from pathlib import Path

from flaskapp.config import Variable, variables
from flaskapp.value_types import ValueType

PAGE = Path(__file__).with_name("SETTINGS.md")
HEADS = {
    "live": "| setting | variable | default | allowed | meaning |\n|---|---|---|---|---|",
    "boot": "| variable | default | allowed | meaning |\n|---|---|---|---|",
}
NOT_IN_THE_TABLE = {
    "ENVIRONMENT": "`development` is development mode: both switches are off unless set. Else production.",
    "DEBUG": "`true` is development mode too.",
}
OWN_DEFAULTS = {
    "ALLOWED_HOSTS": "none",
    "API_KEYS": "none; `*` in development mode",
    "CORS_ORIGINS": "none",
    "LLM_MODELS": "`LLM_MODEL` alone",
    "LLM_SYSTEM_PROMPT": "a short one of our own",
    "REDIS_URL": "the embedded server of this directory, else `redis://127.0.0.1:6379/0`",
}


def main() -> None:
    """Put fresh tables into the page."""
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def renewed(page: str) -> str:
    """The page with the tables as the code has them now."""
    for name in HEADS:
        begin, end = f"<!-- table: {name} -->\n", f"<!-- end of table: {name} -->"
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        page = f"{before}{begin}{table(name)}\n{end}{after}"
    return page


def table(name: str) -> str:
    """One table, as Markdown."""
    rows = _live_rows() if name == "live" else _boot_rows()
    return "\n".join([HEADS[name], *(f"| {' | '.join(cells)} |" for cells in rows)])


def _live_rows() -> Iterator[Iterable[str]]:
    for row in variables():
        if row.live and row.value_type is not None:
            yield (
                f"`{row.name.lower()}`",
                f"`{row.name}`",
                _default(row, row.value_type),
                row.value_type.allowed,
                row.value_type.description,
            )


def _boot_rows() -> Iterator[Iterable[str]]:
    for row in variables():
        if row.value_type is None:
            yield f"`{row.name}`", "none", "any text", NOT_IN_THE_TABLE[row.name]
        elif not row.live:
            yield f"`{row.name}`", _default(row, row.value_type), row.value_type.allowed, row.value_type.description


def _default(row: Variable, value_type: ValueType[object]) -> str:
    own = OWN_DEFAULTS.get(row.name)
    return own or ("none" if row.default is None else f"`{value_type.text(row.default)}`")


if __name__ == "__main__":
    main()
