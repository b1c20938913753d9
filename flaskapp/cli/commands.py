"""The commands of `flask`. Each is imported when it is run, and not by each worker of the service."""

from functools import cached_property
from typing import Any

import click
from flask import Flask
from werkzeug.utils import import_string

from flaskapp.tollgate import Tollgate


def register_commands(app: Flask, tollgate: Tollgate) -> None:
    """Add every command to `app.cli`."""
    for command in (
        LazyCommand("settings", "Show and change the live settings.", "flaskapp.cli.settings.settings_cli", tollgate),
        LazyCommand(
            "scripts", "Look after the Lua scripts.", "flaskapp.cli.scripts.make_scripts_cli", lambda: tollgate.link
        ),
        LazyCommand(
            "doctor",
            "Check Redis, this machine and the settings.",
            "flaskapp.cli.doctor.make_doctor_cli",
            tollgate,
        ),
        LazyCommand(
            "ledger",
            "Look into the books, clear an identifier's, and recompute them all.",
            "flaskapp.cli.ledger.make_ledger_cli",
            lambda: tollgate.link,
            lambda: tollgate.settings.refresh().values.plan,
            tollgate.config.throttle_backend,
            tollgate.config.network_ipv6_prefix,
        ),
        LazyCommand(
            "race",
            "Race backends against each other: N callers at once, with room for K.",
            "flaskapp.lab.race_command.make_race_cli",
        ),
        LazyCommand(
            "explore",
            "Run every order in which callers' commands can reach Redis; room is for all of them but one.",
            "flaskapp.lab.explore_command.make_explore_cli",
        ),
    ):
        app.cli.add_command(command)


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
