"""Runs pytest; the whole suite is measured against the coverage gate of pyproject.toml."""

import os
import signal
import subprocess
import sys

HINT = "For plain `pytest …`, `flask …` and `redis-cli`:  source {venv}/bin/activate\n"


def main() -> int:
    # setup.py held them back until here.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    print(HINT.format(venv=os.path.relpath(sys.prefix)), flush=True)
    arguments = sys.argv[1:]
    if arguments:
        return subprocess.call([sys.executable, "-m", "pytest", *arguments])
    status = subprocess.call([sys.executable, "-m", "coverage", "run", "-m", "pytest"])
    if status != 0:
        return status
    subprocess.call([sys.executable, "-m", "coverage", "combine", "--quiet"], stderr=subprocess.DEVNULL)
    return subprocess.call([sys.executable, "-m", "coverage", "report"])


if __name__ == "__main__":
    sys.exit(main())
