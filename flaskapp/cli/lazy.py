"""A command whose module is imported when it is run, and not by each worker of the service."""

from functools import cached_property
from typing import Any

import click
from werkzeug.utils import import_string


class LazyCommand(click.Command):
    """Stands for a command in the list of them; all else is the command's own.

    Args:
        name: under which it is run.
        summary: the first sentence of its help.
        factory: the dotted name of the function that makes it.
        args: for that function.
    """

    def __init__(self, name: str, summary: str, factory: str, *args: object) -> None:
        super().__init__(name, help=summary)
        self._factory = factory
        self._args = args

    @cached_property
    def command(self) -> click.Command:
        """The command itself, imported now."""
        made: click.Command = import_string(self._factory)(*self._args)
        return made

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,  # click's own signature
    ) -> click.Context:
        """As of the command itself, which is what then runs."""
        return self.command.make_context(info_name, args, parent, **extra)
