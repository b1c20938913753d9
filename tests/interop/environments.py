"""Environments for what others wrote: each in a directory of its own below ``.data/interop``, by version."""

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from tests.servers import ROOT

ENVIRONMENTS = ROOT / ".data" / "interop"
INSTALL_SECONDS = 900


class NotInstalled(Exception):
    """It cannot be run on this machine; the message says why in one line."""


def python_environment(name: str, requirements: Sequence[str]) -> Path:
    """The ``bin`` of a virtual environment that has these packages; it is made where it is not there."""
    place = _place(name, requirements)
    if not (place / "installed").exists():
        _announce(requirements)
        _run([sys.executable, "-m", "venv", "--clear", str(place)])
        pip = [str(place / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet"]
        _run([*pip, "install", *requirements])
        (place / "installed").touch()
    return place / "bin"


def node_environment(name: str, requirements: Sequence[str]) -> Path:
    """A directory whose ``node_modules`` has these packages; it is made where it is not there."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            raise NotInstalled(f"no {program} on PATH")
    place = _place(name, requirements)
    if not (place / "installed").exists():
        _announce(requirements)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        (place / "package.json").write_text('{"private": true}')
        _run(["npm", "install", "--prefix", str(place), "--silent", "--no-audit", "--no-fund", *requirements])
        (place / "installed").touch()
    return place


def _place(name: str, requirements: Sequence[str]) -> Path:
    versions = "-".join(re.split(r"==|(?<=.)@", requirement)[-1] for requirement in requirements)
    return ENVIRONMENTS / f"{name}-{versions}"


def _announce(requirements: Sequence[str]) -> None:
    click.echo(f"installing {' '.join(requirements)} …", err=True)


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotInstalled(str(error)) from error
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or error.stdout or "").strip().splitlines() or [f"exit status {error.returncode}"]
        raise NotInstalled(f"{Path(command[0]).name}: {lines[-1][:200]}") from error
