"""Programs that are started for a measurement, what they use of the machine, and that all of them end."""

import http.client
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from flaskapp.config import child_environment
from flaskapp.ops.embedded_redis import HOST, guardian_of

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 120.0
STOP_SECONDS = 10.0
_PROC = Path("/proc")


class NotStarted(Exception):
    """A program that does not run; the text says why."""


class Program:
    """A running program and all that it started; its standard output and errors are in `log`."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self._process = process
        self._log = log

    def wait_for_port(self) -> int:
        """The number that the program prints first."""
        self._wait(lambda: self._log.read_text().endswith("\n"))
        return int(self._log.read_text().split()[0])

    def wait_for_answer(self, port: int, path: str) -> None:
        """Come back when `path` is answered with 200."""
        self._wait(lambda: _status(port, path) == http.client.OK)

    def _wait(self, holds: Callable[[], bool]) -> None:
        end = time.monotonic() + START_SECONDS
        while not holds():
            if self._process.poll() is not None or time.monotonic() > end:
                last = self._log.read_text(errors="replace").strip().splitlines()[-1:]
                raise NotStarted(f"{self._process.args[0]} does not run: {' '.join(last) or 'it said nothing'}")
            time.sleep(0.05)

    def cpu_seconds(self) -> float:
        """Processor time of all its processes so far."""
        return session_cpu_seconds(self._process.pid)

    def memory_bytes(self) -> int:
        """What its processes hold; of shared pages their part."""
        return sum(pss_bytes(pid) for pid, _ in _session(self._process.pid))


@contextmanager
def running(command: Sequence[str], directory: Path, environment: Mapping[str, str]) -> Iterator[Program]:
    """A program in a session of its own, that ends with this block, or with this process however it ends."""
    directory.mkdir(parents=True, exist_ok=True)
    own = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "LC_ALL": "C.UTF-8"}
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=directory,
            env=child_environment() | own | environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    guardian = guardian_of(process.pid)
    try:
        yield Program(process, directory / "log")
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        guardian.kill()
        guardian.communicate()


def session_cpu_seconds(leader: int) -> float:
    """Processor time so far of the processes in the session of this one."""
    ticks = sum(int(fields[11]) + int(fields[12]) for _, fields in _session(leader))
    return ticks / os.sysconf("SC_CLK_TCK")


def machine_seconds() -> float:
    """Processor time of everything on this machine so far, with what a hypervisor gave to others."""
    user, nice, system, _idle, _iowait, *others = (_PROC / "stat").read_text().split("\n", 1)[0].split()[1:9]
    return sum(map(int, (user, nice, system, *others))) / os.sysconf("SC_CLK_TCK")


def fetch(port: int, path: str) -> bytes:
    """The body of a GET."""
    connection = http.client.HTTPConnection(HOST, port, timeout=STOP_SECONDS)
    try:
        connection.request("GET", path)
        return connection.getresponse().read()
    finally:
        connection.close()


def _status(port: int, path: str) -> int | None:
    connection = http.client.HTTPConnection(HOST, port, timeout=STOP_SECONDS)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except OSError:
        return None
    finally:
        connection.close()


def _session(leader: int) -> Iterator[tuple[int, list[str]]]:
    """The processes of a session, each with what /proc says of it from its state on."""
    for place in _PROC.glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = place.read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[3]) == leader:
                yield int(place.parent.name), fields


def pss_bytes(pid: int) -> int:
    """What a process holds; of shared pages its part."""
    with suppress(OSError):
        for line in (_PROC / str(pid) / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0
