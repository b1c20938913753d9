"""What the commands share: tables that a pipe does not cut, progress that only a terminal shows, how they fail."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from backends.errors import TollgateError

# A pipe has no width; what is cut there is lost.
_PIPE_WIDTH = 200


def print_table(table: Table) -> None:
    """Print it on standard output."""
    console = Console()
    (console if console.is_terminal else Console(width=_PIPE_WIDTH)).print(table)


def fail(line: str, status: int = 1) -> NoReturn:
    """End the command with one line on standard error."""
    click.echo(f"Error: {line}", err=True)
    raise SystemExit(status)


@contextmanager
def failures(status: int = 1) -> Iterator[None]:
    """End the command as `fail` does where the library raises."""
    try:
        yield
    except TollgateError as error:
        fail(str(error), status)


class ProgressDisplay:
    """Shows what is done now, how much of it is done, and how much there is (None: not known yet)."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._task = bars.add_task("", total=None)

    def __call__(self, what: str, done: int, of: int | None) -> None:
        """Show it."""
        self._bars.update(self._task, description=what, completed=done, total=of)


@contextmanager
def shown_progress() -> Iterator[ProgressDisplay]:
    """Progress on standard error; nothing where that is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        yield ProgressDisplay(bars)
