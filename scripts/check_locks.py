"""Whether the lock files still answer to pyproject.toml: all that is asked for is locked, fits, and has hashes.

What it cannot see without a registry: whether what the locked packages themselves need is locked. pip does: set-up
installs from the lock alone, and `pip check` looks at the result.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PIN = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)(?:\[[^]]*\])?==(?P<version>[^ ;\\]+)")


def main() -> int:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    runtime = project["project"]["dependencies"]
    extras = project["project"]["optional-dependencies"]
    demands = {
        "requirements.lock": runtime,
        "requirements-dev.lock": [*runtime, *extras["dev"]],
        "requirements-gates.lock": [*runtime, *extras["dev"], *extras["gates"]],
        "requirements-build.lock": project["build-system"]["requires"],
    }
    problems = [problem for name, wanted in demands.items() for problem in problems_of(name, wanted)]
    print("\n".join(problems) or "in step")
    return 1 if problems else subprocess.call([sys.executable, "-m", "pip", "--disable-pip-version-check", "check"])


def problems_of(lock_name: str, wanted: list[str]) -> list[str]:
    text = (ROOT / lock_name).read_text(encoding="utf-8")
    pins = pins_of(text)
    problems = [f"{lock_name}: {line}" for line in text.splitlines() if "://" in line or line.startswith(("-", "/"))]
    for demand in map(Requirement, wanted):
        version = pins.get(canonicalize_name(demand.name))
        if version is None:
            problems.append(f"{lock_name}: {demand} is not locked; run scripts/lock.sh")
        elif not demand.specifier.contains(version, prereleases=True):
            problems.append(f"{lock_name}: {demand.name} {version} does not fit {demand}; run scripts/lock.sh")
    blocks = re.split(r"\n(?=\S)", text.strip())
    return problems + [f"{lock_name}: no hash for {block}" for block in blocks if "--hash=sha256:" not in block]


def pins_of(text: str) -> dict[str, Version]:
    found = (PIN.match(line) for line in text.splitlines())
    return {canonicalize_name(pin["name"]): Version(pin["version"]) for pin in found if pin}


if __name__ == "__main__":
    sys.exit(main())
