"""What a race shows on a terminal: a table that fills while it runs, the table of the results, and the verdict."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import click
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from backends.money import usd_text
from flaskapp.cli import console
from flaskapp.lab.race import Plan, RaceResult, Round

_DIGITS = 4


class LiveTable:
    """A row for each strategy at each distance, growing with its rounds; and, below it, what is done now."""

    def __init__(self, plan: Plan, where: str) -> None:
        self._plan = plan
        self._where = where
        self._rounds: dict[tuple[float, str], list[Round]] = {}
        self._doing = "begins"

    def progress(self, what: str, done: int, of: int | None) -> None:
        """What is done now."""
        self._doing = f"{what} ({done} of {of})" if of and of > 1 else what

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
    """Shown on stderr while this lasts, if that is a terminal."""
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


def by_backend(results: Sequence[RaceResult]) -> dict[str, list[RaceResult]]:
    """What belongs to each strategy, in the sequence in which they come first."""
    its: dict[str, list[RaceResult]] = {}
    for result in results:
        its.setdefault(result.backend, []).append(result)
    return its


def verdicts(results: Sequence[RaceResult]) -> list[str]:
    """What each strategy showed, in a line of its own."""
    return list(map(verdict, by_backend(results).values()))


def verdict(its: Sequence[RaceResult]) -> str:
    """What one strategy showed, at all distances."""
    over = [each for each in its if each.overspend_nanousd]
    within = [each for each in its if not each.overspend_nanousd]
    parts = []
    if over:
        where = [f" at {each.rtt_ms:g} ms" if len(its) > 1 else "" for each in over]
        sums = (f"${usd_text(each.overspend_nanousd)}{at}" for each, at in zip(over, where, strict=True))
        parts.append(f"overspent by {', '.join(sums)}")
        if its[0].promises_atomicity:
            parts.append("which it promises never to do")
    if within:
        where_all = f" at {', '.join(f'{each.rtt_ms:g}' for each in within)} ms" if len(its) > 1 else ""
        parts.append(f"stayed within its limit{where_all}")
        if not all(each.is_as_declared for each in within):
            parts.append("though its callers were held between check and record")
    return f"{its[0].backend} {', '.join(parts)}."


def print_table(plan: Plan, results: Sequence[RaceResult], where: str = "") -> None:
    """The results, and the verdict. Narrow enough for a terminal of eighty columns."""
    has_distance = any(result.rtt_ms for result in results)
    has_trips = any(result.round_trips_a_request is not None for result in results)
    spent = "spent $" if results[0].measured_by == "books" else "billed $"
    titles = (
        *(["rtt\nms"] if has_distance else []),
        "admitted",
        "refused",
        spent,
        "overspend $",
        *(["round\ntrips"] if has_trips else []),
        "check\np50\nms",
        "check\np95\nms",
    )
    table = Table(
        Column("backend", no_wrap=True),
        *(Column(title, justify="right", no_wrap=True) for title in titles),
        title=title_of(plan, where),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        # Every strategy is given the same.
        caption=f"limit ${usd_text(results[0].limit_nanousd)}" + (", all rounds together" if plan.rounds > 1 else ""),
    )
    for result in results:
        distance = [f"{result.rtt_ms:g}"] if has_distance else []
        table.add_row(Text(result.backend), *map(Text, [*distance, *_cells(result)]))
    console.print_table(table)
    for line in verdicts(results):
        click.echo(line)


def _cells(result: RaceResult) -> Iterator[str]:
    yield str(result.admitted)
    yield str(result.refused)
    yield usd_text(result.spent_nanousd)
    yield usd_text(result.overspend_nanousd)
    if result.round_trips_a_request is not None:
        yield f"{result.round_trips_a_request:.1f}"
    for time_ms in (result.check_p50_ms, result.check_p95_ms):
        yield f"{time_ms:.{max(0, _DIGITS - len(str(int(time_ms))))}f}"
