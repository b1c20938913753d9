"""`flask race`: the two ways side by side, on one server, in one table, with a verdict and an exit status."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import click
from rich.table import Column, Table
from rich.text import Text

from backends.embedded import EmbeddedServer
from backends.errors import ConfigurationError, TollgateError
from backends.money import usd_text
from backends.race import Plan, RaceResult, race
from flaskapp.console import print_table, shown_progress

MAX_REQUESTS = 500
MAX_ROUNDS = 1_000
NOT_AS_DECLARED, COULD_NOT_RUN = 1, 2


def make_race_cli(names: Sequence[str] = ("legacy", "atomic")) -> click.Command:
    """The command ``race``, between the strategies registered as `names`."""

    @click.command("race")
    @click.option(
        "-n",
        "--requests",
        type=click.IntRange(2, MAX_REQUESTS),
        default=10,
        show_default=True,
        help="How many callers at once.",
    )
    @click.option(
        "-k",
        "--room",
        type=click.IntRange(1, MAX_REQUESTS),
        default=4,
        show_default=True,
        help="For how many of them the limit has room.",
    )
    @click.option(
        "--rounds",
        type=click.IntRange(1, MAX_ROUNDS),
        default=1,
        show_default=True,
        help="How many times, each on fresh books.",
    )
    @click.option(
        "--redis",
        "url",
        metavar="URL",
        help="Race on this server instead of one of our own; a database with llm: keys is refused.",
    )
    @click.option("--json", "as_json", is_flag=True, help="The figures as JSON, money in nano-dollars.")
    def command(requests: int, room: int, rounds: int, url: str | None, *, as_json: bool) -> None:
        """Race the legacy and the atomic backend: N callers at once, with room for K.

        The legacy backend's callers are held at a barrier between their check and their record. Exit status 1 if the
        atomic one overspends, or if the legacy one does not; 2 if the race could not be run.
        """
        try:
            plan = Plan(requests=requests, room=room, rounds=rounds)
        except ConfigurationError as error:
            raise click.UsageError(str(error)) from error
        results = _run(url, names, plan)
        status = 0 if all(result.is_as_declared for result in results) else NOT_AS_DECLARED
        if as_json:
            _print_json(plan, results, status)
        else:
            _print_table(plan, results)
        raise SystemExit(status)

    return command


def verdict(result: RaceResult) -> str:
    """What one strategy showed, in half a sentence."""
    if result.overspend_nanousd:
        told = f"{result.backend} overspent by ${usd_text(result.overspend_nanousd)}"
        return f"{told}, which it promises never to do" if result.promises_atomicity else told
    told = f"{result.backend} stayed within its limit"
    return told if result.is_as_declared else f"{told}, though its callers were held between check and record"


def _run(url: str | None, names: Sequence[str], plan: Plan) -> list[RaceResult]:
    try:
        with _server_url(url) as its_url, shown_progress() as progress:
            return race(its_url, names, plan, progress=progress)
    except TollgateError as error:
        # The library names the variable by which the service is told its Redis; here it is an option.
        _fail(str(error).replace("REDIS_URL", "--redis"))


@contextmanager
def _server_url(url: str | None) -> Iterator[str]:
    """The address that was asked for, or that of a server which lives as long as this."""
    if url is not None:
        yield url
        return
    with tempfile.TemporaryDirectory(prefix="tollgate-race-") as directory, EmbeddedServer(Path(directory)) as server:
        yield server.url


def _print_table(plan: Plan, results: Sequence[RaceResult]) -> None:
    titles = (
        "admitted",
        "refused",
        "spent $",
        "limit $",
        "overspend $",
        "round trips\na request",
        "check\np50 ms",
        "check\np95 ms",
    )
    table = Table(
        Column("backend", no_wrap=True),
        *(Column(title, justify="right", no_wrap=True) for title in titles),
        title=f"{plan.requests} callers at once, room for {plan.room}" + _times(plan.rounds),
    )
    for result in results:
        table.add_row(*map(Text, _cells(result)))
    print_table(table)
    click.echo("; ".join(verdict(result) for result in results) + ".")


def _times(rounds: int) -> str:
    return "" if rounds == 1 else f", {rounds} rounds"


def _cells(result: RaceResult) -> list[str]:
    return [
        result.backend,
        str(result.admitted),
        str(result.refused),
        usd_text(result.spent_nanousd),
        usd_text(result.limit_nanousd),
        usd_text(result.overspend_nanousd),
        f"{result.round_trips_a_request:.1f}",
        f"{result.check_p50_ms:.3f}",
        f"{result.check_p95_ms:.3f}",
    ]


def _print_json(plan: Plan, results: Sequence[RaceResult], status: int) -> None:
    told = {
        "requests": plan.requests,
        "room": plan.room,
        "rounds": plan.rounds,
        "backends": [asdict(result) | {"is_as_declared": result.is_as_declared} for result in results],
        "verdict": "; ".join(verdict(result) for result in results) + ".",
        "exit_status": status,
    }
    click.echo(json.dumps(told, indent=2))


def _fail(line: str) -> NoReturn:
    click.echo(f"Error: {line}", err=True)
    raise SystemExit(COULD_NOT_RUN)
