"""What came of the faults: a table for a terminal, and one for the page."""

from collections.abc import Sequence

from rich.table import Column, Table

from benchmarks.outages.play import Result
from flaskapp.cli.console import print_table

_NANOUSD = 10**9
_TEXTS = ("fault", "what clients saw")
_FIGURES = ("slowest", "born", "billed", "booked", "emergency", "beyond", "back", "as expected")


def summary(result: Result) -> str:
    """One line."""
    if result.skipped:
        return f"not injected: {result.skipped}"
    return "as expected" if not result.missed else "NOT AS EXPECTED: " + "; ".join(result.missed)


def print_report(results: Sequence[Result]) -> None:
    table = Table(*_TEXTS, *(Column(title, justify="right") for title in _FIGURES))
    for each in results:
        table.add_row(*_cells(each))
    print_table(table)
    for each in results:
        if each.missed or each.skipped:
            print(f"{each.name}: {summary(each)}")
    injected = [each for each in results if not each.skipped]
    missed = sum(bool(each.missed) for each in injected)
    print(f"{len(injected)} faults injected, {len(results) - len(injected)} not; {missed} not as expected")


def markdown(results: Sequence[Result]) -> str:
    """The table of docs/FAULTS.md."""
    titles = ("injected", *_TEXTS[1:], *_FIGURES)
    lines = [f"| {' | '.join(titles)} |", "|---|---|" + "---:|" * len(_FIGURES)]
    lines += [f"| {each.title} | {' | '.join(_cells(each)[1:])} |" for each in results]
    return "\n".join(lines) + "\n"


def _cells(result: Result) -> list[str]:
    if result.skipped:
        return [result.name, f"not injected: {result.skipped}", *[""] * len(_FIGURES)]
    saw = ", ".join(f"{count} × {kind}" for kind, count in result.saw.items())
    money = (result.billed_nanousd, result.booked_nanousd, result.emergency_nanousd, result.beyond_nanousd)
    return [
        result.name,
        saw,
        f"{result.slowest_seconds:.2f} s",
        str(result.births),
        *(f"{each / _NANOUSD:.4f}" for each in money),
        f"{result.back_seconds:.1f} s",
        "NO" if result.missed else "yes",
    ]
