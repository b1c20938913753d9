"""What a race shows on a terminal: a table that fills while it runs, the table of the results, and the verdict."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import click
from rich.console import Console, Group
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from backends.money import usd_text
from backends.race import Plan, RaceResult, Round
from flaskapp import console


class LiveTable:
    """A row for each strategy at each distance, growing with its rounds; and, below it, what is done now."""

    def __init__(self, plan: Plan, where: str) -> None:
        self._plan = plan
        self._where = where
        self._rounds: dict[tuple[float, str], list[Round]] = {}
        self._doing = "begins"

    def progress(self, what: str, done: int, of: int) -> None:
        """What is done now."""
        self._doing = f"{what} ({done} of {of})" if of > 1 else what

    def watch(self, seen: Round) -> None:
        """One more round."""
        self._rounds.setdefault((seen.rtt_ms, seen.backend), []).append(seen)

    def __rich__(self) -> Group:
        columns = (
            Column(title, justify="right") for title in ("rtt ms", "rounds", "admitted", "refused", "overspend $")
        )
        table = Table("backend", *columns, title=title_of(self._plan, self._where))
        for (rtt_ms, name), rounds in self._rounds.items():
            table.add_row(Text(name), *self._cells(rtt_ms, rounds))
        return Group(table, Text(f"{self._doing} …", style="dim"))

    def _cells(self, rtt_ms: float, rounds: Sequence[Round]) -> Iterator[str]:
        admitted = sum(each.admitted for each in rounds)
        yield f"{rtt_ms:g}"
        yield f"{len(rounds)} of {self._plan.rounds}"
        yield str(admitted)
        yield str(len(rounds) * self._plan.requests - admitted)
        yield usd_text(sum(each.overspend_nanousd for each in rounds))


@contextmanager
def live_table(plan: Plan, where: str) -> Iterator[LiveTable]:
    """On stderr while this lasts; nothing where nobody looks."""
    screen, table = Console(stderr=True), LiveTable(plan, where)
    if not screen.is_terminal:
        yield table
        return
    with Live(table, console=screen, transient=True, refresh_per_second=8):
        yield table


def title_of(plan: Plan, where: str = "") -> str:
    """What is raced, in one line."""
    rounds = "" if plan.rounds == 1 else f", {plan.rounds} rounds"
    return f"{plan.requests} callers at once, room for {plan.room}{rounds}{where}"


def verdict(result: RaceResult, where: str = "") -> str:
    """What one strategy showed, in half a sentence."""
    if result.overspend_nanousd:
        told = f"{result.backend} overspent by ${usd_text(result.overspend_nanousd)}{where}"
        return f"{told}, which it promises never to do" if result.promises_atomicity else told
    told = f"{result.backend} stayed within its limit{where}"
    return told if result.is_as_declared else f"{told}, though its callers were held between check and record"


def verdict_of_all(results: Sequence[RaceResult]) -> str:
    """What all of them showed; where Redis was, if it was not always at its place."""
    has_distance = any(result.rtt_ms for result in results)
    return "; ".join(verdict(each, f" at {each.rtt_ms:g} ms" if has_distance else "") for each in results) + "."


def print_table(plan: Plan, results: Sequence[RaceResult], where: str = "") -> None:
    """The results, and the verdict."""
    has_distance = any(result.rtt_ms for result in results)
    spent = "spent $" if results[0].measured_by == "books" else "billed $"
    titles = (
        *(["rtt\nms"] if has_distance else []),
        "admitted",
        "refused",
        spent,
        "limit $",
        "overspend $",
        "round trips\na request",
        "check\np50 ms",
        "check\np95 ms",
    )
    table = Table(
        Column("backend", no_wrap=True),
        *(Column(title, justify="right", no_wrap=True) for title in titles),
        title=title_of(plan, where),
    )
    for result in results:
        distance = [f"{result.rtt_ms:g}"] if has_distance else []
        table.add_row(Text(result.backend), *map(Text, [*distance, *_cells(result)]))
    console.print_table(table)
    click.echo(verdict_of_all(results))


def _cells(result: RaceResult) -> list[str]:
    trips = result.round_trips_a_request
    return [
        str(result.admitted),
        str(result.refused),
        usd_text(result.spent_nanousd),
        usd_text(result.limit_nanousd),
        usd_text(result.overspend_nanousd),
        "not counted" if trips is None else f"{trips:.1f}",
        f"{result.check_p50_ms:.3f}",
        f"{result.check_p95_ms:.3f}",
    ]
