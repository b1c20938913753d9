"""`flask explore`: every order in which callers' commands can reach Redis, and which of them overspend."""

import json
from collections.abc import Sequence
from dataclasses import asdict

import click
from rich.table import Column, Table
from rich.text import Text

from backends.errors import TollgateError
from backends.money import usd_text
from flaskapp.cli.console import fail, print_table, shown_progress
from flaskapp.lab.explorer import MOST_CALLERS, Exploration, Replay, Step, explore, replay
from flaskapp.lab.redis_option import in_options, redis_option, server_url

NOT_AS_DECLARED, COULD_NOT_RUN = 1, 2
DEFAULT_NAMES = "legacy,multi,watch,atomic"
_MOST_SHOWN = 90


def make_explore_cli() -> click.Command:
    """The command ``explore``."""

    @click.command("explore")
    @click.option(
        "--backends",
        "names",
        default=DEFAULT_NAMES,
        show_default=True,
        metavar="NAMES",
        help="Which strategies, with commas between.",
    )
    @click.option(
        "--callers", type=click.IntRange(2, MOST_CALLERS), default=2, show_default=True, help="How many at once."
    )
    @click.option("--replay", "number", type=click.IntRange(1), help="Run order N of one strategy again, step by step.")
    @redis_option("Explore")
    @click.option("--json", "as_json", is_flag=True, help="Everything as JSON, money in nano-dollars.")
    def command(names: str, callers: int, number: int | None, url: str | None, *, as_json: bool) -> None:
        """Run every order in which callers' commands can reach Redis; room is for all of them but one.

        Orders that differ only by commands that commute are run once. Exit status 1 if a strategy that promises
        atomicity has an order that overspends, or one that does not has none; 2 if nothing could be run.
        """
        wanted = [name.strip() for name in names.split(",") if name.strip()]
        if not wanted:
            raise click.UsageError("--backends: at least one name")
        if number is not None and len(wanted) != 1:
            raise click.UsageError("--replay runs an order of one strategy: name it with --backends")
        try:
            with server_url(url) as its_url:
                if number is not None:
                    _replay(its_url, wanted[0], number, callers, as_json=as_json)
                    return
                with shown_progress() as progress:
                    found = [explore(its_url, name, callers, progress=progress) for name in wanted]
        except TollgateError as error:
            fail(in_options(error), COULD_NOT_RUN)
        status = 0 if all(each.is_as_declared for each in found) else NOT_AS_DECLARED
        if as_json:
            click.echo(json.dumps([asdict(each) | {"is_as_declared": each.is_as_declared} for each in found], indent=2))
        else:
            _print(found)
        raise SystemExit(status)

    return command


def verdict(found: Exploration) -> str:
    """What one strategy showed, in half a sentence."""
    if not found.overspending_orders:
        text = f"no order of {found.backend} overspends"
        return text if found.promises_atomicity else f"{text}, though nothing in it forbids that"
    text = f"{found.backend} overspends in {found.overspending_orders:,} of {found.reduced_orders:,} orders"
    return f"{text}, which it promises never to do" if found.promises_atomicity else text


def _replay(url: str, name: str, number: int, callers: int, *, as_json: bool) -> None:
    found = replay(url, name, number, callers)
    if as_json:
        click.echo(json.dumps(asdict(found) | {"overspends": found.overspends}, indent=2))
        return
    print_table(_steps_table(f"{found.backend}, order {number}: {found.schedule}", found.steps))
    click.echo(_outcome(found))


def _outcome(found: Replay) -> str:
    spent, limit = usd_text(found.spent_nanousd), usd_text(found.limit_nanousd)
    return f"Admitted: {', '.join(found.admitted)}. Booked ${spent} of ${limit}" + (
        f": ${usd_text(found.spent_nanousd - found.limit_nanousd)} too much." if found.overspends else "."
    )


def _print(found: Sequence[Exploration]) -> None:
    titles = ("orders of\nsingle commands", "up to\ncommuting", "of these\noverspend", "shortest\nfailing", "seconds")
    table = Table(
        Column("backend", no_wrap=True),
        *(Column(title, justify="right", no_wrap=True) for title in titles),
        title=f"{found[0].callers} callers at once, room for {found[0].room}",
    )
    for each in found:
        table.add_row(
            each.backend,
            f"{each.raw_orders:,}",
            f"{each.reduced_orders:,}",
            f"{each.overspending_orders:,}",
            "–" if each.shortest_number is None else f"{each.shortest_number}",
            f"{each.seconds:.1f}",
        )
    print_table(table)
    for each in found:
        if each.shortest is not None:
            title = f"{each.backend}, order {each.shortest_number}: the commands that decide"
            print_table(_steps_table(title, [step for step in each.shortest if step.is_decisive]))
    for bound in dict.fromkeys(each.bound for each in found):
        click.echo(f"Explored: {bound}.")
    click.echo("; ".join(verdict(each) for each in found) + ".")


def _steps_table(title: str, steps: Sequence[Step]) -> Table:
    callers = sorted({step.caller for step in steps})
    table = Table("", *callers, "Redis says", title=title)
    for number, step in enumerate(steps, start=1):
        lanes = (_cut(step.command) if caller == step.caller else "" for caller in callers)
        table.add_row(*map(Text, (str(number), *lanes, _cut(step.told))))
    return table


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 1] + "…"
