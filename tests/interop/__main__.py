"""The matrix of clients:  python -m tests.interop [NAME …] [--install WHAT]

Each client is installed by version into an environment of its own below ``.data/interop``, with pip or npm. It asks a
service that is started for it, in front of an upstream that fails on purpose. The table is that of docs/CLIENTS.md; the
exit status is 1 if a cell is wrong, and 2 if a client could not be run. What happens meanwhile is said on stderr.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

import click

from tests.interop.environments import NotInstalled
from tests.interop.matrix import CASES, CLIENTS, Client, Front, row_of


def main(arguments: Sequence[str] | None = None) -> int:
    options = read(arguments)
    chosen = {name: CLIENTS[name] for name in options.names or CLIENTS}
    if options.install:
        (name,) = chosen
        chosen[name] = replace(chosen[name], requirements=tuple(options.install))
    worst = 0
    with Front() as front:
        click.echo(f"| client | {' | '.join(case.title for case in CASES)} |\n|---|{'---|' * len(CASES)}")
        for name, client in chosen.items():
            try:
                status = shown(name, client, front)
            except NotInstalled as error:
                click.echo(f"{name} could not be run: {error}", err=True)
                status = 2
            worst = max(worst, status)
    return worst


def read(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.interop", description="Runs clients that others wrote against the service."
    )
    # Not `choices`: with them an empty list of names is refused.
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CLIENTS)}; all of them by default")
    parser.add_argument(
        "--install",
        nargs="+",
        metavar="WHAT",
        help="of one NAME, other packages or versions than usual, as pip or npm names them: openai==2.0.0",
    )
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.names) - CLIENTS.keys()):
        parser.error(f"no such client: {', '.join(unknown)}; there are {', '.join(CLIENTS)}")
    if options.install and len(options.names) != 1:
        parser.error("--install goes with one NAME")
    return options


def shown(name: str, client: Client, front: Front) -> int:
    """Prints the row of a client; 1 if a cell of it is wrong."""
    cells, are_right = [], True
    for case, cell, is_right in row_of(name, client, front):
        click.echo(f"{name}: {case.title}: {cell}", err=True)
        cells.append(cell)
        are_right &= is_right
    name_cell = "<br>".join(f"`{each}`" for each in (*client.requirements, *filter(None, [client.setting])))
    click.echo(f"| {name_cell} | {' | '.join(cells)} |")
    return 0 if are_right else 1


if __name__ == "__main__":
    sys.exit(main())
