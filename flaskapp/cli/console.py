"""What the commands share: tables that a pipe does not cut, progress that only a terminal sees, how they give up."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from backends.errors import TollgateError
from flaskapp.ops.embedded_redis import EmbeddedServer

# Nobody watches the width of a pipe; what is cut there is lost.
_PIPE_WIDTH = 200


def print_table(table: Table) -> None:
    """On standard output."""
    console = Console()
    (console if console.is_terminal else Console(width=_PIPE_WIDTH)).print(table)


def fail(line: str, status: int = 1) -> NoReturn:
    """End the command with one line on standard error."""
    click.echo(f"Error: {line}", err=True)
    raise SystemExit(status)


def in_options(error: TollgateError) -> str:
    """What an error says, to who gave options: the library names the variables by which the service is told."""
    return str(error).replace("REDIS_URL", "--redis").replace("THROTTLE_BACKEND", "--backends")


@contextmanager
def server_url(url: str | None) -> Iterator[str]:
    """The address that was asked for, or that of a Redis which lives as long as this."""
    if url is not None:
        yield url
        return
    with tempfile.TemporaryDirectory(prefix="tollgate-lab-") as directory, EmbeddedServer(Path(directory)) as server:
        yield server.url


class Shown:
    """Told what is done now, how much of it is done, and how much there is; None: nobody knows yet."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._task = bars.add_task("", total=None)

    def __call__(self, what: str, done: int, of: int | None) -> None:
        """Show it."""
        self._bars.update(self._task, description=what, completed=done, total=of)


@contextmanager
def shown_progress() -> Iterator[Shown]:
    """Progress on standard error; nothing where nobody looks."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        yield Shown(bars)
