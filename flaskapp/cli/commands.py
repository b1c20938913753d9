"""The commands of `flask`. Each is imported when it is run."""

from flask import Flask

from flaskapp.cli.lazy import LazyCommand
from flaskapp.tollgate import Tollgate


def register_commands(app: Flask, tollgate: Tollgate) -> None:
    """Add every command to `app.cli`."""
    for command in (
        LazyCommand("settings", "Show and change the live settings.", "flaskapp.cli.settings.settings_cli", tollgate),
        LazyCommand(
            "scripts", "Look after the Lua scripts.", "flaskapp.cli.scripts.make_scripts_cli", lambda: tollgate.link
        ),
        LazyCommand(
            "ledger",
            "Look into the books, clear an identifier's, and recompute them all.",
            "flaskapp.cli.ledger.make_ledger_cli",
            lambda: tollgate.link,
            lambda: tollgate.settings.refresh().values.limits,
            tollgate.config.throttle_backend,
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
