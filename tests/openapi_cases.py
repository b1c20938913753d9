"""Schemathesis against /openapi.json of a service of its own:  python -m tests.openapi_cases [cases]

Two services are asked, with keys and without. Each case is a request that the document allows, or one that it does not;
each answer has to be documented, in status, media type, headers and body, and must be no 5xx. Left out is one check,
`positive_data_acceptance`: what a schema allows may still be too long to pay for, and 1.0 is no whole number here.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from flaskapp.ops.embedded_redis import EmbeddedServer
from tests.servers import ADMIN_TOKEN, Service

CASES = 5_000
KEY = "house-key"
PLENTY = {
    "HIGH_COST_THRESHOLD_USD": "100000",
    "DAILY_COST_LIMIT_USD": "100000",
    "NETWORK_COST_LIMIT_USD": "0",
    "NETWORK_DAILY_COST_LIMIT_USD": "0",
    "HOURLY_SPEND_LIMIT_USD": "100000",
    "DAILY_SPEND_LIMIT_USD": "100000",
    "CHAT_RATE_LIMIT": "1000000 per minute",
    "DEMO_TOKENS_PER_SECOND": "0",
    "ENABLE_COST_THROTTLING": "true",
    "LLM_MODELS": "gpt-4o,gpt-4o-mini",
}
SERVICES: dict[str, tuple[dict[str, str], list[str]]] = {
    "/v1 open to anyone": ({"API_KEYS": "*"}, ["--exclude-path-regex", "admin"]),
    "a key": ({"API_KEYS": KEY}, ["--header", f"Authorization: Bearer {KEY}", "--exclude-path-regex", "admin"]),
    # Settings that are changed at random: any budget may be used up then, so here those routes alone.
    "the operator": ({}, ["--header", f"Authorization: Bearer {ADMIN_TOKEN}", "--include-path-regex", "admin"]),
}


def run(service: Service, options: Sequence[str], examples: int, *, seed: int | None = None) -> tuple[int, str]:
    """The exit status of one run, and what it printed; so many examples each operation and phase."""
    program = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()"]
    address = f"{service.base_url}/openapi.json"
    how = ["--max-examples", str(examples), "--continue-on-failure", "--exclude-checks", "positive_data_acceptance"]
    how += [] if seed is None else ["--seed", str(seed)]
    done = subprocess.run(
        [*program, "run", address, *how, *options],
        cwd=service.directory,
        env={**service.environment, "NO_COLOR": "1", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def generated(output: str) -> int:
    """How many cases a run says that it made."""
    return int(match[1].replace(",", "")) if (match := re.search(r"([\d,]+) generated", output)) else 0


def main(cases: int) -> int:
    worst, seen = 0, 0
    with tempfile.TemporaryDirectory() as place, EmbeddedServer(Path(place) / "redis") as redis:
        for number, (name, (environment, options)) in enumerate(SERVICES.items()):
            with Service(Path(place) / str(number), redis.url, **PLENTY, **environment) as service:
                # About as many cases as there are examples to an operation, times the operations and the phases.
                status, output = run(service, options, max(1, cases // 25))
            shown = output[max(0, output.find("API Operations:")) :] if status == 0 else output
            sys.stdout.write(f"== {name}\n\n{shown}\n")
            worst, seen = max(worst, status), seen + generated(output)
    sys.stdout.write(f"{seen} cases\n")
    return worst


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else CASES))
