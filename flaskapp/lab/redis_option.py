"""The option ``--redis`` of the lab's commands: a server that is named, or one of their own."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from backends.errors import TollgateError
from flaskapp.ops.embedded_redis import EmbeddedServer
from flaskapp.ops.private_files import new_secret


def redis_option(verb: str) -> Callable[[Any], Any]:
    """The option, as the argument `url` of a command that does what `verb` says."""
    text = f"{verb} on this server instead of one of our own; a database with llm: keys is refused."
    return click.option("--redis", "url", metavar="URL", help=text)


@contextmanager
def server_url(url: str | None) -> Iterator[str]:
    """The address that was given, or that of a Redis which runs as long as this lasts."""
    if url is not None:
        yield url
        return
    with (
        tempfile.TemporaryDirectory(prefix="tollgate-lab-") as directory,
        EmbeddedServer(Path(directory), password=new_secret()) as server,
    ):
        yield server.url


def in_options(error: TollgateError) -> str:
    """The text of an error, with options in place of the variables that the library names."""
    return str(error).replace("REDIS_URL", "--redis").replace("THROTTLE_BACKEND", "--backends")
