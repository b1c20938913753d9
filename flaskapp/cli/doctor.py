"""`flask doctor`: is what the service stands on as it has to be?"""

import json
from collections.abc import Mapping

import click
from rich.table import Table
from rich.text import Text

from flaskapp.cli.console import print_table
from flaskapp.ops.checks import FAILED, OK, Finding, findings
from flaskapp.tollgate import Tollgate


def make_doctor_cli(tollgate: Tollgate) -> click.Command:
    """The command ``doctor``."""

    @click.command("doctor")
    @click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
    def doctor(*, as_json: bool) -> None:
        """Check Redis, this machine and the settings; exit 1 if a check fails."""
        found = findings(tollgate.config, tollgate.link, tollgate.settings.refresh().values)
        if as_json:
            click.echo(json.dumps([{"check": name, **finding._asdict()} for name, finding in found.items()]))
        else:
            _print(found)
        if any(finding.state == FAILED for finding in found.values()):
            raise SystemExit(1)

    return doctor


def _print(found: Mapping[str, Finding]) -> None:
    table = Table("", "check", "state", "found", "hint", box=None, pad_edge=False)
    for number, (name, finding) in enumerate(found.items(), start=1):
        hint = "" if finding.state == OK else finding.hint
        table.add_row(str(number), name, finding.state, Text(finding.text), Text(hint))
    print_table(table)
