"""`flask doctor`: is what the service stands on as it has to be?"""

import json
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPException

import click
from prometheus_client.parser import text_string_to_metric_families
from rich.table import Table
from rich.text import Text

from flaskapp.cli.console import print_table
from flaskapp.config import Config
from flaskapp.ops.checks import FAILED, OK, Finding, findings
from flaskapp.tollgate import Tollgate

_SERVICE_SECONDS = 2
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1", "[::]": "::1", "localhost": "127.0.0.1"}  # noqa: S104 (where a service is asked that listens everywhere)


def make_doctor_cli(tollgate: Tollgate) -> click.Command:
    """The command ``doctor``."""

    @click.command("doctor")
    @click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
    def doctor(*, as_json: bool) -> None:
        """Check Redis, this machine and the settings; exit 1 if a check fails."""
        config = tollgate.config
        values = tollgate.settings.refresh().values
        found = findings(config, tollgate.link, values, _events_of_the_service(config))
        if as_json:
            click.echo(json.dumps([{"check": name, **finding._asdict()} for name, finding in found.items()]))
        else:
            _print(found)
        if any(finding.state == FAILED for finding in found.values()):
            raise SystemExit(1)

    return doctor


def _events_of_the_service(config: Config) -> set[str]:
    """What the service of this configuration has counted, if it runs."""
    host = _LOOPBACK.get(config.host, config.host.strip("[]"))
    # As the proxies would send it: this request must not be what it asks for.
    as_expected = {"X-Forwarded-For": ", ".join([host] * config.trusted_proxy_hops)}
    connection = HTTPConnection(host, config.port, timeout=_SERVICE_SECONDS)
    try:
        connection.request("GET", "/metrics", headers=as_expected if config.trusted_proxy_hops else {})
        text = connection.getresponse().read().decode()
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    except (OSError, HTTPException, ValueError):
        return set()
    finally:
        connection.close()
    return {each.labels["name"] for each in samples if each.name == "tollgate_events_total" and each.value}


def _print(found: Mapping[str, Finding]) -> None:
    table = Table("", "check", "state", "found", "hint", box=None, pad_edge=False)
    for number, (name, finding) in enumerate(found.items(), start=1):
        hint = "" if finding.state == OK else finding.hint
        table.add_row(str(number), name, finding.state, Text(finding.text), Text(hint))
    print_table(table)
