"""`flask scripts`: the Lua scripts on the command line."""

import re
from collections.abc import Callable

import click

from backends.store.link import Link
from backends.store.scripts import Script, all_scripts
from flaskapp.cli.console import failures

# What Redis and Valkey put before the line: "user_script:12: …", "@user_script: 12: …".
_LINE = re.compile(r"user_script: ?(?P<line>\d+): ?(?P<error>.*)")


def make_scripts_cli(get_link: Callable[[], Link]) -> click.Group:
    """The group ``scripts``; the link is opened only when a command needs it."""

    @click.group("scripts")
    def group() -> None:
        """Look after the Lua scripts."""

    @group.command("check")
    def check() -> None:
        """Load every script into Redis; say file, line and error of one that does not compile."""
        with failures():
            are_good = [_check(script, get_link()) for script in all_scripts()]
        if not all(are_good):
            raise SystemExit(1)

    return group


def _check(script: Script, link: Link) -> bool:
    error = link.run(script.compile_error)
    click.echo(f"{script.file_name}: ok" if error is None else place_of(script.file_name, error))
    return error is None


def place_of(file_name: str, error: str) -> str:
    """``FILE:LINE: error`` of the error that the server gave; without a line where it gave none."""
    found = _LINE.search(" ".join(error.split()))
    if found is None:
        return f"{file_name}: {error}"
    return f"{file_name}:{found['line']}: {found['error']}"
