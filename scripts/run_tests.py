"""Runs pytest; without arguments the whole suite, with the coverage gate of pyproject.toml."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HINT = "For plain `pytest …`, `flask …` and `redis-cli`:  source {venv}/bin/activate\n"
IN_ONE_PROCESS = (
    ("tests/backends", "tests/flaskapp"),
    ("tests/contract", "tests/docs", "tests/house", "tests/lua"),
)
"""Two runs at the same time, of about the same length, of tests that work in one process: they are measured."""
STARTS_OF_A_CLONE = ("tests/setup",)
"""They start processes, in which nothing is measured, one after the other, beside all others that do."""


def main() -> int:
    # setup.py held them back until here.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    print(HINT.format(venv=os.path.relpath(sys.prefix)), flush=True)
    arguments = sys.argv[1:]
    if arguments:
        return subprocess.call([sys.executable, "-m", "pytest", *arguments])
    status = together(*map(measured, IN_ONE_PROCESS)) | together(unmeasured(others()), unmeasured(STARTS_OF_A_CLONE))
    if status != 0:
        return status
    subprocess.call([sys.executable, "-m", "coverage", "combine", "--quiet"], stderr=subprocess.DEVNULL)
    return subprocess.call([sys.executable, "-m", "coverage", "report"])


def together(seen: list[str], unseen: list[str]) -> int:
    """The first is seen while it runs; the second's output comes when both are over. Not 0 if one failed."""
    places = [word for word in unseen if word.startswith("tests/")]
    print(f"Beside the tests that you see run those of {', '.join(places)}.\n", flush=True)
    with tempfile.TemporaryFile() as output:
        with subprocess.Popen(unseen, stdin=subprocess.DEVNULL, stdout=output, stderr=output) as beside:
            status = subprocess.call(seen)
            status |= beside.wait()
        output.seek(0)
        sys.stdout.buffer.write(output.read())
        sys.stdout.flush()
    return status


def others() -> list[str]:
    """What starts services and looks at the clock, and whatever else there is."""
    files = Path("tests").glob("test_*.py")
    directories = {path.parent for path in Path("tests").glob("*/test_*.py")}
    found = {path.as_posix() for path in (*files, *directories)}
    return sorted(found.difference(*IN_ONE_PROCESS, STARTS_OF_A_CLONE))


def unmeasured(places: Sequence[str]) -> list[str]:
    """The command that runs the tests in those places."""
    return [sys.executable, "-m", "pytest", *places]


def measured(places: Sequence[str]) -> list[str]:
    """The command that runs the tests in those places, and notes what they reach."""
    return [sys.executable, "-m", "coverage", "run", "--parallel-mode", "-m", "pytest", *places]


if __name__ == "__main__":
    sys.exit(main())
