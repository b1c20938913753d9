"""The Lua scripts: what you read in `lua/` is what runs."""

import hashlib
from collections.abc import Sequence
from importlib import resources
from typing import Any

from redis.exceptions import NoScriptError, ResponseError

from backends.store.connections import execute
from backends.store.link import Client


class Script:
    """One script, sent by its digest; the text follows only when the server does not know it yet."""

    def __init__(self, file_name: str) -> None:
        self.file_name = file_name
        self.text = resources.files("backends").joinpath("lua", file_name).read_text(encoding="utf-8")
        self.digest = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()

    def run(self, client: Client, keys: Sequence[str], args: Sequence[str | int]) -> Any:
        """The reply of the script; one round trip, or two where the server has forgotten it."""
        try:
            return execute(client, ("EVALSHA", self.digest, len(keys), *keys, *args))
        except NoScriptError:
            return execute(client, ("EVAL", self.text, len(keys), *keys, *args))

    def compile_error(self, client: Client) -> str | None:
        """The server's error for a script that does not compile, or None."""
        try:
            client.script_load(self.text)
        except ResponseError as error:
            return str(error)
        return None


def load_all(client: Client) -> None:
    """Make every script known to the server, so that the first decision costs one round trip."""
    together = client.pipeline(transaction=False)
    for script in all_scripts():
        together.script_load(script.text)
    together.execute()


def all_scripts() -> list[Script]:
    """Every script of the package, by name."""
    names = (entry.name for entry in resources.files("backends").joinpath("lua").iterdir())
    return [Script(name) for name in sorted(names) if name.endswith(".lua")]
