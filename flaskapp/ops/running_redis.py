"""Where the embedded Redis of this clone runs: written by its keeper, read by the services and commands beside it."""

import os
import socket
from pathlib import Path

from backends.errors import StoreUnavailable

HOST = "127.0.0.1"
RECORD = "redis.url"


def record_redis(data_dir: Path, port: int) -> None:
    """Record that the embedded Redis listens on `port`, for `running_url`.

    Raises:
        StoreUnavailable: it does not answer.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    draft = data_dir / f"{RECORD}.{os.getpid()}"
    draft.write_text(f"redis://{HOST}:{port}/0 {_run_id(port)}\n", encoding="utf-8")
    draft.replace(data_dir / RECORD)


def running_url(data_dir: Path) -> str | None:
    """The URL that was recorded, if that very server answers now."""
    try:
        url, port, run_id = _recorded(data_dir)
        return url if _run_id(port) == run_id else None
    except (OSError, ValueError, StoreUnavailable):
        return None


def recorded_port(data_dir: Path) -> int | None:
    """The port that was recorded, whether or not a server answers on it."""
    try:
        return _recorded(data_dir)[1]
    except (OSError, ValueError):
        return None


def _recorded(data_dir: Path) -> tuple[str, int, str]:
    url, run_id = (data_dir / RECORD).read_text(encoding="utf-8").split()
    return url, int(url.rpartition(":")[2].partition("/")[0]), run_id


def answers(port: int, timeout_seconds: float = 0.5) -> bool:
    """Whether a server on that port of 127.0.0.1 answers PONG."""
    try:
        return _reply(port, b"PING\r\n", timeout_seconds).startswith(b"+PONG")
    except OSError:
        return False


def _run_id(port: int) -> str:
    try:
        reply = _reply(port, b"INFO server\r\n", 1.0).decode("utf-8", "replace")
    except OSError as error:
        raise StoreUnavailable(f"no answer on port {port}") from error
    for line in reply.splitlines():
        name, _, value = line.partition(":")
        if name == "run_id":
            return value
    raise StoreUnavailable(f"what answers on port {port} does not say who it is")


def _reply(port: int, command: bytes, timeout_seconds: float) -> bytes:
    with socket.create_connection((HOST, port), timeout=timeout_seconds) as connection:
        connection.settimeout(timeout_seconds)
        connection.sendall(command)
        return connection.recv(65_536)
