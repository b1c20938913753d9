"""`flask race`: strategies side by side in one table, with a verdict and an exit status."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

from backends.errors import ConfigurationError, TollgateError
from backends.progress import Progress
from flaskapp.cli.console import fail
from flaskapp.lab import report
from flaskapp.lab.race import MAX_SPREAD, Plan, RaceResult, Round, Watcher, race
from flaskapp.lab.redis_option import in_options, redis_option, server_url
from flaskapp.lab.tables import live_table, print_table, verdicts

MAX_REQUESTS = 500
MAX_ROUNDS = 1_000
MAX_RTT_MS = 100
MAX_THINK_MS = 5_000
MAX_WORKERS = 16
PLANNED = ("requests", "room", "rounds", "seed", "spread", "think_ms")
"""What the options say of the plan, and the figures repeat."""
NOT_AS_DECLARED, COULD_NOT_RUN = 1, 2


@dataclass(frozen=True, slots=True)
class Lab:
    """One call of the command: who races, how far from Redis, and over what."""

    names: tuple[str, ...]
    plan: Plan
    rtts_ms: tuple[float, ...]
    url: str | None
    """The Redis to race on; None for one of our own."""
    http_workers: int | None
    """Processes of each service over HTTP; None for the library."""

    @property
    def where(self) -> str:
        """For the title."""
        return "" if self.http_workers is None else f", over HTTP, {self.http_workers} workers each"

    def run(self, progress: Progress, watch: Watcher) -> list[RaceResult]:
        """All races, one distance after another.

        Raises:
            TollgateError: one could not be run.
        """
        if self.http_workers is not None:
            # It knows the service's configuration, and so Flask: no other race needs them.
            from flaskapp.lab.over_http import race_over_http  # noqa: PLC0415

            run = partial(race_over_http, self.names, self.plan, workers=self.http_workers)
            return [each for rtt in self.rtts_ms for each in run(rtt_ms=rtt, progress=progress, watch=watch)]
        with server_url(self.url) as url:
            run_here = partial(race, url, self.names, self.plan, progress=progress, watch=watch)
            return [each for rtt in self.rtts_ms for each in run_here(rtt_ms=rtt)]


def _names(_context: click.Context, _option: click.Parameter, text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise click.BadParameter("name at least one backend")
    return names


def _rtts_ms(_context: click.Context, _option: click.Parameter, text: str) -> tuple[float, ...]:
    try:
        rtts_ms = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        rtts_ms = ()
    if not rtts_ms or not all(0 <= rtt <= MAX_RTT_MS for rtt in rtts_ms):
        raise click.BadParameter(f"milliseconds from 0 to {MAX_RTT_MS}, several with commas between them")
    return rtts_ms


_shown = partial(click.option, show_default=True)


def _plan_options(names: Sequence[str]) -> list[Callable[[Any], Any]]:
    """What is raced."""
    return [
        _shown(
            "--backends",
            "names",
            default=",".join(names),
            callback=_names,
            help="Who races: registered names, with commas between them.",
        ),
        _shown("-n", "--requests", type=click.IntRange(2, MAX_REQUESTS), default=10, help="How many callers at once."),
        _shown(
            "-k",
            "--room",
            type=click.IntRange(1, MAX_REQUESTS),
            default=4,
            help="For how many of them the limit has room.",
        ),
        _shown("--rounds", type=click.IntRange(1, MAX_ROUNDS), default=1, help="How many times, each on fresh books."),
        _shown("--seed", type=int, default=1, help="Of the costs; every backend is given the same."),
        _shown(
            "--spread",
            type=click.FloatRange(0, MAX_SPREAD),
            default=0.0,
            help="Costs differ by up to this share; the limit then is the sum of the K largest.",
        ),
        click.option(
            "--think",
            "think_ms",
            type=click.FloatRange(0, MAX_THINK_MS),
            metavar="MS",
            help="Hold nobody at a barrier: callers pause so long between check and record, and luck decides.",
        ),
    ]


def _run_options() -> list[Callable[[Any], Any]]:
    """Where it is raced, and what is printed."""
    return [
        _shown(
            "--rtt",
            "rtts_ms",
            default="0",
            callback=_rtts_ms,
            metavar="MS,…",
            help="Race once with Redis so many milliseconds farther away, each.",
        ),
        click.option(
            "--http",
            "over_http",
            is_flag=True,
            help="Over HTTP, against services started for it; what was spent is what their upstream billed.",
        ),
        _shown(
            "--workers", type=click.IntRange(1, MAX_WORKERS), default=2, help="With --http: processes of each service."
        ),
        redis_option("Race"),
        click.option(
            "--report",
            "directory",
            type=click.Path(path_type=Path, file_okay=False),
            metavar="DIR",
            help="Measure more, and write a page with pictures there; needs matplotlib.",
        ),
        click.option("--json", "as_json", is_flag=True, help="The figures as JSON, money in nano-dollars."),
        click.option(
            "--events", "as_events", is_flag=True, help="Each round as a line of JSON at once, then the figures as one."
        ),
    ]


def make_race_cli(names: Sequence[str] = ("legacy", "atomic")) -> click.Command:
    """The command ``race``, between the strategies registered as `names` unless others are asked for."""

    def command(
        *, names: tuple[str, ...], as_json: bool, as_events: bool, over_http: bool, workers: int, **given: Any
    ) -> None:
        """Race backends against each other: N callers at once, with room for K.

        Callers of a backend that has a gap between its check and its record, as legacy has, are held at a barrier
        there. Exit status 1 if one that promises atomicity overspends, or if one that was held does not; 2 if the race
        could not be run. Over HTTP nobody is held.
        """
        if over_http and given["url"]:
            raise click.UsageError("--http brings a Redis of its own: leave out --redis")
        lab = Lab(
            names=names,
            plan=_plan(**{name: given[name] for name in PLANNED}),
            rtts_ms=given["rtts_ms"],
            url=given["url"],
            http_workers=workers if over_http else None,
        )
        results, page = _run(lab, _print_round if as_events else lambda _: None, given["directory"])
        status = 0 if all(result.is_as_declared for result in results) else NOT_AS_DECLARED
        if as_json or as_events:
            click.echo(json.dumps(figures(lab, results, status), indent=None if as_events else 2))
        else:
            print_table(lab.plan, results, lab.where)
            if page is not None:
                click.echo(f"The report is {page}")
        raise SystemExit(status)

    for option in reversed([*_plan_options(names), *_run_options()]):
        command = option(command)
    return click.command("race")(command)


def figures(lab: Lab, results: Sequence[RaceResult], status: int) -> dict[str, Any]:
    """The figures of the table and more, money in nano-dollars."""
    return {
        **{name: getattr(lab.plan, name) for name in PLANNED},
        "http_workers": lab.http_workers,
        "backends": [asdict(result) | {"is_as_declared": result.is_as_declared} for result in results],
        "verdict": "\n".join(verdicts(results)),
        "exit_status": status,
    }


def _plan(**given: Any) -> Plan:
    try:
        return Plan(**given)
    except ConfigurationError as error:
        raise click.UsageError(str(error)) from error


def _run(lab: Lab, emit: Watcher, directory: Path | None) -> tuple[list[RaceResult], Path | None]:
    """The results and, where it was asked for, the page of the report."""
    try:
        if directory is not None:
            report.check_can_be_made(directory)
        with live_table(lab.plan, lab.where) as table:

            def watch(seen: Round) -> None:
                table.watch(seen)
                emit(seen)

            results = lab.run(table.progress, watch)
            if directory is None:
                return results, None
            found = report.measured(lab.names, lab.plan, table.progress)
        return results, report.write(directory, lab.plan, results, lab.where, found)
    except TollgateError as error:
        fail(in_options(error), COULD_NOT_RUN)
    except KeyboardInterrupt:
        fail("interrupted; all that was started has ended", COULD_NOT_RUN)


def _print_round(seen: Round) -> None:
    fields = asdict(seen) | {"admitted": seen.admitted, "overspend_nanousd": seen.overspend_nanousd}
    click.echo(json.dumps({"round": fields}))
