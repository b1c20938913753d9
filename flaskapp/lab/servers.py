"""Servers of the lab's own: gunicorn as it is deployed, and the upstream. None outlives the process that started it."""

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from backends.errors import ConfigurationError
from flaskapp.config import child_environment
from flaskapp.lab import upstream
from flaskapp.lab.delay import listening
from flaskapp.ops.embedded_redis import free_port
from flaskapp.ops.processes import end_guardian, end_process, guardian_of, wait_until
from flaskapp.ops.running_redis import HOST

ROOT = Path(upstream.__file__).resolve().parents[2]
START_SECONDS = 60.0
STOP_SECONDS = 10.0


class Server:
    """One gunicorn with several workers on a free port; a context manager that starts it, and does not wait for it.

    Args:
        directory: its own; logs and what it keeps.
        workers: how many processes.
        think_ms: how long its strategy pauses between check and record, if there is a gap; None for not at all.
        environment: its variables; of ours it gets only PATH and the like.
    """

    def __init__(self, directory: Path, workers: int, think_ms: float | None, environment: dict[str, str]) -> None:
        self.port = free_port()
        self._directory = directory
        self._workers = workers
        self._application = "wsgi:app" if think_ms is None else f"flaskapp.lab.thinking_app:thinking({think_ms})"
        own = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "HOST": HOST, "PORT": str(self.port)}
        self._environment = child_environment() | own | {"WEB_CONCURRENCY": str(workers)} | environment
        self._process: subprocess.Popen[bytes] | None = None
        self._guardian: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        if not (ROOT / "gunicorn.conf.py").is_file():
            raise ConfigurationError(f"servers are started from a checkout: there is no gunicorn.conf.py in {ROOT}")
        self._directory.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603 (our own interpreter)
                [sys.executable, "-m", "gunicorn", "--config", str(ROOT / "gunicorn.conf.py"), self._application],
                cwd=self._directory,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._guardian = guardian_of(self._process.pid)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is None or self._guardian is None:
            return
        try:
            end_process(self._process, STOP_SECONDS)
        finally:
            # Its workers, if it has left any behind.
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            end_guardian(self._guardian)

    @property
    def _log(self) -> Path:
        return self._directory / "app.log"

    def wait(self) -> None:
        """Return when every worker serves.

        Raises:
            ConfigurationError: it ended, or took too long; with its last line.
        """
        wait_until(lambda: self._has_ended() or self._are_serving() >= self._workers, START_SECONDS)
        if self._are_serving() < self._workers:
            last = (self._said().splitlines() or ["it said nothing"])[-1]
            raise ConfigurationError(f"a server of the race did not start: {last}")

    def _has_ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def _are_serving(self) -> int:
        return self._said().count("Cost throttling is")

    def _said(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")


class UpstreamAccount:
    """What the upstream has billed, by its own account."""

    def __init__(self, port: int) -> None:
        self.port = port

    @property
    def base_url(self) -> str:
        """For `LLM_BASE_URL`."""
        return f"http://{HOST}:{self.port}/v1"

    def billed_nanousd(self, who: str) -> int:
        """What it has billed for `who`."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=STOP_SECONDS)
        try:
            connection.request("GET", "/account")
            account = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        return int(account.get(who, {}).get("billed_nanousd", 0))


@contextmanager
def billing_upstream(input_nanousd: int, output_nanousd: int) -> Iterator[UpstreamAccount]:
    """An upstream that bills so much a token, in a process of its own.

    Raises:
        StoreUnavailable: it did not start.
    """
    command = [sys.executable, "-P", upstream.__file__, str(input_nanousd), str(output_nanousd)]
    with listening(command, "the upstream of the race") as port:
        yield UpstreamAccount(port)
