"""Installs the project into .venv from its lock file, then becomes the script named in the first argument.

Runs on the machine's own Python with nothing installed. What is there already is kept: a second start takes
milliseconds. TOLLGATE_VENV names another place than .venv.
"""

import _signal
import posix

# Nothing is started yet, and the imports take a moment: those of `signal` and `os` too. These two are part of Python.
_signal.signal(_signal.SIGINT, lambda number, _frame: posix._exit(128 + number))  # noqa: SLF001 - os._exit

import fcntl
import hashlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = Path(os.environ.get("TOLLGATE_VENV") or ROOT / ".venv").absolute()
PYTHON = VENV / "bin" / "python"
LOCK_FILE = ROOT / "requirements-dev.lock"
STAMP = VENV / ".tollgate-installed"
SERVED = (
    "dev",
    "flaskapp.factory",
    "flaskapp.lab.page",
    "flaskapp.lab.race_command",
    "gunicorn.app.wsgiapp",
    "gunicorn.workers.ggevent",
)
"""What a start of the service imports, and what those import."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
ERRORS_ONLY = ("--quiet", "--quiet")
SAY_VERSION = "import sys; print(sys.implementation.cache_tag, getattr(sys, 'abiflags', ''))"
MOST_INSTALLERS = 4
"""At the same time: pip works on one processor, and unpacking is most of a first start."""


def main() -> NoReturn:
    for number in STOP_SIGNALS:
        signal.signal(number, _interrupt)
    # The terminal was closed; who says nohup wants to go on.
    outlives_terminal = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    if not outlives_terminal:
        signal.signal(signal.SIGHUP, _interrupt)
    try:
        install()
    except KeyboardInterrupt:
        sys.exit(130)
    except subprocess.CalledProcessError as error:
        sys.exit(f"Set-up failed: {' '.join(map(str, error.cmd))} ended with status {error.returncode}")
    except OSError as error:
        sys.exit(
            f"Set-up failed: {error.filename or ROOT}: {error.strerror}. .data and {os.path.relpath(VENV)} have to be "
            "yours and writable: chown -R them to you, or clone into a folder of your own"
        )
    # While Python starts anew a Ctrl-C would meet an interpreter that is not ready: the script takes it once it is.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    for number in (*STOP_SIGNALS, *(() if outlives_terminal else (signal.SIGHUP,))):
        signal.signal(number, signal.SIG_DFL)
    os.environ["PATH"] = f"{VENV / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    os.environ["VIRTUAL_ENV"] = str(VENV)
    os.execv(PYTHON, [str(PYTHON), *sys.argv[1:]])


def install() -> None:
    if _is_installed():
        return
    lock_file = ROOT / ".data" / "setup.lock"
    lock_file.parent.mkdir(mode=0o700, exist_ok=True)
    with lock_file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Waiting for another set-up in this folder …", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_installed():
            _install()


def _install() -> None:
    _demand_ours()
    print(f"Setting up {os.path.relpath(VENV)} from {LOCK_FILE.name} (once; about half a minute) …", flush=True)
    _run(sys.executable, "-m", "venv", *(["--clear"] if not _works() else []), str(VENV))
    pip = (
        str(PYTHON),
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--no-input",
        "install",
        *ERRORS_ONLY,
        "--no-compile",
    )
    with tempfile.TemporaryDirectory() as folder:
        # The lock file is complete: pip has nothing to resolve, and no part needs another to be there first.
        parts = _parts_of_lock(Path(folder), min(os.cpu_count() or 1, MOST_INSTALLERS))
        _run_together([[*pip, "--no-deps", "--require-hashes", "--requirement", str(part)] for part in parts])
    _run(*pip, "--no-deps", "--no-index", "--no-build-isolation", "--editable", str(ROOT))
    # Compiled once here, as a part of the installation; all of it would take three times as long. Where the
    # environment forbids to write bytecode, each process of every start would compile it anew.
    compiling = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    imports = f"import sys; sys.path[:0] = ['scripts']; import {', '.join(SERVED)}"
    _run(str(PYTHON), "-c", imports, environment=compiling)
    _put_redis_cli()
    STAMP.write_text(_fingerprint(), encoding="utf-8")
    print("Set up.", flush=True)


def _demand_ours() -> None:
    """What is cleared has to be an environment, or nothing yet: TOLLGATE_VENV may name any folder."""
    if VENV.exists() and not (VENV / "pyvenv.cfg").exists() and (not VENV.is_dir() or any(VENV.iterdir())):
        sys.exit(
            f"{VENV} is there already and no Python environment: name another place in TOLLGATE_VENV, or remove it."
        )


def _parts_of_lock(folder: Path, count: int) -> list[Path]:
    """The lock file in as many files, each package with all of its hashes in one of them."""
    packages = re.split(r"\n(?=\S)", LOCK_FILE.read_text(encoding="utf-8").rstrip())
    parts = [folder / f"{number}.lock" for number in range(count)]
    for number, part in enumerate(parts):
        part.write_text("\n".join([*packages[number::count], ""]), encoding="utf-8")
    return parts


def _works() -> bool:
    """Whether there is an environment whose Python and pip start; one that was cut off half made is made anew."""
    try:
        return subprocess.run([PYTHON, "-c", "import pip"], check=False, capture_output=True).returncode == 0
    except OSError:
        return False


def _put_redis_cli() -> None:
    """One that knows this clone's Redis and its password, also where PATH has another."""
    shim = VENV / "bin" / "redis-cli"
    shim.write_text(f'#!/bin/sh\nexec "{PYTHON}" "{ROOT / "scripts" / "redis_cli.py"}" "$@"\n', encoding="utf-8")
    shim.chmod(0o755)


def _fingerprint() -> str:
    parts = [path.read_bytes() for path in (LOCK_FILE, ROOT / "pyproject.toml", Path(__file__))]
    return hashlib.sha256(b"\0".join([*parts, str(ROOT).encode(), _python_version()])).hexdigest()


def _python_version() -> bytes:
    """Of the environment's Python, which another may have replaced under the same path; empty where there is none."""
    try:
        return subprocess.run([PYTHON, "-I", "-S", "-c", SAY_VERSION], check=False, capture_output=True).stdout
    except OSError:
        return b""


def _is_installed() -> bool:
    try:
        return STAMP.read_text(encoding="utf-8") == _fingerprint() and PYTHON.exists()
    except OSError:
        return False


def _run(*command: str, environment: Mapping[str, str] | None = None) -> None:
    _run_together([command], environment=environment)


def _run_together(commands: Sequence[Sequence[str]], environment: Mapping[str, str] | None = None) -> None:
    """Steps of the set-up side by side, each in a process group of its own, which ends with us or when one fails."""
    running: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            with _held_back():
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, start_new_session=True, cwd=ROOT, env=environment
                )
                running.append(process)
        for process in running:
            if process.wait() != 0:
                raise subprocess.CalledProcessError(process.returncode, process.args)
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextmanager
def _held_back() -> Iterator[None]:
    """A signal waits until this is over: a process that was started is always one that we know."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*STOP_SIGNALS, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
