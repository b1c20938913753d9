"""Where the embedded Redis of this clone runs: written by its keeper, read by the services and commands beside it."""

import socket
from pathlib import Path
from urllib.parse import urlsplit

from backends.errors import StoreUnavailable
from flaskapp.ops.private_files import write_private

HOST = "127.0.0.1"
RECORD = "redis.url"
_MAX_REPLY_BYTES = 65_536


def url_of(port: int, password: str | None = None) -> str:
    """The address of database 0 of a server on this machine; a password is of letters, digits, - and _."""
    return f"redis://{f':{password}@' if password else ''}{HOST}:{port}/0"


def record_redis(data_dir: Path, url: str) -> None:
    """Record the address of the embedded Redis, for `running_url`.

    Raises:
        StoreUnavailable: it does not answer.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    write_private(data_dir / RECORD, f"{url} {_run_id(url)}\n")


def running_url(data_dir: Path) -> str | None:
    """The URL that was recorded, with its password, if that very server answers now."""
    try:
        url, run_id = _recorded(data_dir)
        return url if _run_id(url) == run_id else None
    except (OSError, ValueError, StoreUnavailable):
        return None


def recorded_port(data_dir: Path) -> int | None:
    """The port that was recorded, whether or not a server answers on it."""
    try:
        return urlsplit(_recorded(data_dir)[0]).port
    except (OSError, ValueError):
        return None


def answers(url: str, timeout_seconds: float = 0.5) -> bool:
    """Whether a server of this machine answers PONG at that address."""
    try:
        return _reply(url, b"PING", timeout_seconds).startswith(b"+PONG")
    except (OSError, ValueError):
        return False


def _recorded(data_dir: Path) -> tuple[str, str]:
    url, run_id = (data_dir / RECORD).read_text(encoding="utf-8").split()
    return url, run_id


def _run_id(url: str) -> str:
    port = urlsplit(url).port
    try:
        reply = _reply(url, b"INFO server", 1.0).decode("utf-8", "replace")
    except OSError as error:
        raise StoreUnavailable(f"no answer on port {port}") from error
    for line in reply.splitlines():
        name, _, value = line.partition(":")
        if name == "run_id":
            return value
    raise StoreUnavailable(f"what answers on port {port} does not say who it is")


def _reply(url: str, command: bytes, timeout_seconds: float) -> bytes:
    """One line, or the text that a line announces."""
    parts = urlsplit(url)
    login = b"AUTH %b\r\n" % parts.password.encode() if parts.password else b""
    with (
        socket.create_connection((HOST, parts.port), timeout=timeout_seconds) as connection,
        connection.makefile("rb") as replies,
    ):
        connection.sendall(b"%b%b\r\n" % (login, command))
        if login:
            replies.readline(_MAX_REPLY_BYTES)  # where it is refused, so is the command
        line = replies.readline(_MAX_REPLY_BYTES)
        return replies.read(min(int(line[1:]), _MAX_REPLY_BYTES)) if line.startswith(b"$") else line
