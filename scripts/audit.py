"""Whether a package of requirements.lock has a known weakness, by the advisories of the Python Package Index.

Without a way to them this says so and passes: they belong to the network, and the other gates do not need it.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

LOCK_FILE = Path(__file__).resolve().parent.parent / "requirements.lock"
SECONDS = 300.0


class Outcome(NamedTuple):
    """What to print, and the exit status."""

    text: str
    status: int


def main() -> int:
    outcome = read(*audited())
    print(outcome.text)
    return outcome.status


def audited() -> tuple[str, str]:
    """What pip-audit reports, and what it says beside that."""
    options = ("--disable-pip", "--require-hashes", "--format", "json", "--progress-spinner", "off")
    command = [sys.executable, "-m", "pip_audit", *options, "--requirement", str(LOCK_FILE)]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return "", f"no end after {SECONDS:.0f} s"
    return done.stdout, done.stderr


def read(report: str, errors: str) -> Outcome:
    """Pass where nothing is known against any package, and where nothing could be asked."""
    try:
        packages: list[dict[str, Any]] = json.loads(report)["dependencies"]
    except ValueError:
        why = errors.strip().splitlines()
        return Outcome(f"skipped: the advisories cannot be had ({why[-1][:200] if why else 'no report'})", 0)
    asked = [package for package in packages if "vulns" in package]
    if not asked:
        return Outcome(f"skipped: the registry in use has advisories for none of {len(packages)} packages", 0)
    known = [f"{each['name']} {each['version']}: {found['id']}" for each in asked for found in each["vulns"]]
    heading = f"{len(asked)} of {len(packages)} packages audited, {len(known)} known weaknesses"
    return Outcome("\n".join([heading, *known]), 1 if known else 0)


if __name__ == "__main__":
    sys.exit(main())
