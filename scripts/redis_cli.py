"""A small redis-cli: the same words in, the same words out.

Set-up puts it into .venv/bin as `redis-cli`. Without -h, -p, -s or -u it talks to the embedded server of this clone
while that runs, else to REDIS_URL, else to 127.0.0.1:6379. It knows the embedded server's password.
"""

import argparse
import contextlib
import os
import re
import signal
import socket
import ssl
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import parse_qs, unquote, urlsplit

from backends.errors import ConfigurationError
from backends.store.addresses import check_url
from flaskapp.ops.running_redis import running_url

DATA = Path(__file__).resolve().parent.parent / ".data"
STREAMING = {b"monitor", b"subscribe", b"psubscribe", b"ssubscribe"}
ESCAPES = {"n": b"\n", "r": b"\r", "t": b"\t", "b": b"\b", "a": b"\a"}
SHOWN = {0x5C: "\\\\", 0x22: '\\"', 0x0A: "\\n", 0x0D: "\\r", 0x09: "\\t", 0x07: "\\a", 0x08: "\\b"}


class Status(bytes):
    """A short word like OK, which is no value."""


class ErrorReply(bytes):
    """What Redis refused to do."""


Reply = bytes | int | None | list["Reply"]


@dataclass
class Address:
    """Where Redis is and who we are."""

    host: str = "127.0.0.1"
    port: int = 6379
    path: str | None = None
    tls: bool = False
    user: str | None = None
    password: str | None = None
    database: int = 0

    def __str__(self) -> str:
        return self.path or f"{self.host}:{self.port}"


def address_of(url: str) -> Address:
    try:
        check_url(url)
    except ConfigurationError as error:
        sys.exit(str(error).replace("REDIS_URL", "The URL of -u or REDIS_URL"))
    parts = urlsplit(url)
    address = Address(tls=parts.scheme == "rediss")
    address.user = unquote(parts.username) if parts.username else None
    address.password = unquote(parts.password) if parts.password else None
    if parts.scheme == "unix":
        address.path = parts.path
        address.database = int(parse_qs(parts.query).get("db", ["0"])[0])
        return address
    address.host, address.port = parts.hostname or address.host, parts.port or address.port
    address.database = int(parts.path.strip("/") or 0)
    return address


class Connection:
    """One conversation in RESP2."""

    def __init__(self, address: Address) -> None:
        self._socket = _connect(address)
        self._reader: BinaryIO = self._socket.makefile("rb")
        if address.password is not None:
            names = [address.user] if address.user else []
            self._must(b"AUTH", *(word.encode() for word in [*names, address.password]))
        if address.database:
            self._must(b"SELECT", str(address.database).encode())

    def ask(self, words: Sequence[bytes]) -> Reply:
        parts = [b"*%d\r\n" % len(words), *(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)]
        self._socket.sendall(b"".join(parts))
        return self.read()

    def read(self) -> Reply:
        line = self._reader.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError("Server closed the connection")
        kind, rest = line[:1], line[1:-2]
        if kind == b":":
            return int(rest)
        if kind == b"$":
            return None if rest == b"-1" else self._reader.read(int(rest) + 2)[:-2]
        if kind == b"*":
            return None if rest == b"-1" else [self.read() for _ in range(int(rest))]
        return ErrorReply(rest) if kind == b"-" else Status(rest)

    def _must(self, *words: bytes) -> None:
        reply = self.ask(words)
        if isinstance(reply, ErrorReply):
            print(f"{words[0].decode()} failed: {reply.decode(errors='replace')}", file=sys.stderr)


def _connect(address: Address) -> socket.socket:
    if address.path:
        link = socket.socket(socket.AF_UNIX)
        link.connect(address.path)
        return link
    link = socket.create_connection((address.host, address.port))
    if address.tls:
        return ssl.create_default_context().wrap_socket(link, server_hostname=address.host)
    return link


def quoted(value: bytes) -> str:
    return '"' + "".join(SHOWN.get(b) or (chr(b) if 32 <= b < 127 else f"\\x{b:02x}") for b in value) + '"'  # noqa: PLR2004 - ASCII


def for_people(reply: Reply, prefix: str = "") -> str:
    """As redis-cli writes on a terminal."""
    if isinstance(reply, list):
        if not reply:
            return "(empty array)\n"
        width = len(str(len(reply)))
        inner = prefix + " " * (width + 2)
        rows = (f"{number:>{width}}) {for_people(item, inner)}" for number, item in enumerate(reply, 1))
        return prefix.join(rows)
    if reply is None:
        return "(nil)\n"
    if isinstance(reply, int):
        return f"(integer) {reply}\n"
    if isinstance(reply, ErrorReply):
        return f"(error) {reply.decode(errors='replace')}\n"
    return f"{reply.decode(errors='replace')}\n" if isinstance(reply, Status) else f"{quoted(reply)}\n"


def for_programs(reply: Reply) -> bytes:
    """As redis-cli writes into a pipe, without the last line's end."""
    if isinstance(reply, list):
        return b"\n".join(map(for_programs, reply))
    if isinstance(reply, int):
        return b"%d" % reply
    return bytes(reply or b"")


def split(line: str) -> list[bytes]:
    """A command line into words: bare, 'single' and "double" quoted, as redis-cli reads them.

    Raises:
        ValueError: a quote is open, or text sticks to a closing one.
    """
    words: list[bytes] = []
    rest = line.strip()
    while rest:
        word, rest = _word(rest)
        words.append(word)
        rest = rest.lstrip()
    return words


def _word(text: str) -> tuple[bytes, str]:
    found = re.match(
        r"""'((?:[^'\\]|\\.)*)'(?=\s|$)|"((?:[^"\\]|\\.)*)"(?=\s|$)|([^\s"']\S*)(?=\s|$)""", text, re.DOTALL
    )
    if found is None:
        raise ValueError("Invalid argument(s)")
    single, double, bare = found.groups()
    if single is not None:
        word = single.replace("\\'", "'").encode()
    elif double is not None:
        word = b"".join(_unescaped(part) for part in re.findall(r"\\x[0-9a-fA-F]{2}|\\.|[^\\]+", double, re.DOTALL))
    else:
        word = bare.encode()
    return word, text[found.end() :]


def _unescaped(part: str) -> bytes:
    if not part.startswith("\\"):
        return part.encode()
    if len(part) == len("\\x00"):
        return bytes.fromhex(part[2:])
    return ESCAPES.get(part[1], part[1].encode())


class Session:
    """Asks and prints, and connects again where the connection was lost."""

    def __init__(self, address: Address, *, raw: bool) -> None:
        self.address = address
        self._raw = raw
        self._connection: Connection | None = None

    @property
    def prompt(self) -> str:
        if self._connection is None:
            return "not connected> "
        database = f"[{self.address.database}]" if self.address.database else ""
        return f"{self.address}{database}> "

    def open(self) -> bool:
        try:
            self._connection = Connection(self.address)
        except OSError as error:
            reason = error.strerror or error
            print(f"Could not connect to Redis at {self.address}: {reason}", file=sys.stderr)
        return self._connection is not None

    def run(self, words: Sequence[bytes]) -> bool:
        """Ask and print; False where Redis could not be asked."""
        if self._connection is None and not self.open():
            return False
        try:
            self._converse(words)
        except OSError as error:
            self._connection = None
            if isinstance(error, ConnectionError) and words[0].lower() == b"shutdown":
                return True  # that the server does not answer any more is the answer
            print(f"Error: {error}", file=sys.stderr)
            return False
        return True

    def scan(self, pattern: str) -> bool:
        """Print the names of all keys that match; False where Redis could not be asked."""
        if self._connection is None and not self.open():
            return False
        cursor: Reply = b"0"
        try:
            while self._connection is not None:
                reply = self._connection.ask([b"SCAN", bytes(cursor), b"MATCH", os.fsencode(pattern)])
                if not isinstance(reply, list):
                    self._print(reply)
                    return False
                cursor, names = reply
                for name in names:
                    self._print(name)
                if cursor == b"0":
                    return True
        except OSError as error:
            print(f"Error: {error}", file=sys.stderr)
        return False

    def _converse(self, words: Sequence[bytes]) -> None:
        if self._connection is None:
            return
        reply = self._connection.ask(words)
        self._print(reply)
        command = words[0].lower()
        if command == b"select" and isinstance(reply, Status):
            self.address.database = int(words[1])
        while command in STREAMING and not isinstance(reply, ErrorReply):
            self._print(self._connection.read())

    def _print(self, reply: Reply) -> None:
        text = for_programs(reply) + b"\n" if self._raw else for_people(reply).encode()
        try:
            sys.stdout.buffer.write(text)
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            # `| head` has seen enough, and Redis has done nothing wrong.
            os._exit(128 + signal.SIGPIPE)


def run_lines(session: Session, lines: Iterable[str]) -> int:
    status = 0
    for line in lines:
        try:
            words = split(line)
        except ValueError as error:
            print(error)
            continue
        if words and words[0].lower() in {b"exit", b"quit"}:
            break
        if words and not session.run(words):
            status = 1
    return status


def typed_lines(session: Session) -> Iterable[str]:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, PLC0415 - its import gives input() a history
    session.open()
    while True:
        try:
            yield input(session.prompt)
        except EOFError:
            return


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="redis-cli", add_help=False, allow_abbrev=False, description=__doc__)
    parser.add_argument("--help", action="help")
    parser.add_argument("--version", action="version", version="redis-cli of Tollgate")
    parser.add_argument("-h", dest="host")
    parser.add_argument("-p", dest="port", type=int)
    parser.add_argument("-s", dest="path")
    parser.add_argument("-n", dest="database", type=int)
    parser.add_argument("-u", dest="url")
    parser.add_argument("-a", "--pass", dest="password")
    parser.add_argument("--user")
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--raw", action="store_true", default=None)
    parser.add_argument("--no-raw", action="store_false", dest="raw")
    parser.add_argument("--no-auth-warning", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-x", dest="last_from_stdin", action="store_true", help="the last word comes from stdin")
    parser.add_argument("--scan", action="store_true", help="the names of all keys, or of those like --pattern")
    parser.add_argument("--pattern", default="*")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    return parser.parse_args()


def chosen_address(given: argparse.Namespace) -> Address:
    running = running_url(DATA)
    if given.url:
        address = address_of(given.url)
    elif given.host or given.port or given.path:
        address = Address(host=given.host or "127.0.0.1", port=given.port or 6379, path=given.path)
    else:
        url = running or os.environ.get("REDIS_URL")
        address = address_of(url) if url else Address()
    address.tls |= given.tls
    address.user = given.user or address.user
    address.password = given.password or address.password or known_password(address, running)
    address.database = address.database if given.database is None else given.database
    return address


def known_password(address: Address, running: str | None) -> str | None:
    """The embedded server's, if it is that one, by whatever words it was named; else what the caller's shell has."""
    if running is not None and address.user is None and address.path is None:
        embedded = address_of(running)
        if address.port == embedded.port and address.host in {embedded.host, "localhost"}:
            return embedded.password
    return os.environ.get("REDISCLI_AUTH")


def main() -> int:
    given = arguments()
    raw = not sys.stdout.isatty() if given.raw is None else given.raw
    session = Session(chosen_address(given), raw=raw)
    if given.scan:
        return 0 if session.scan(given.pattern) else 1
    if given.command:
        words = [os.fsencode(word) for word in given.command]
        if given.last_from_stdin:
            words.append(sys.stdin.buffer.read())
        return 0 if session.run(words) else 1
    return run_lines(session, typed_lines(session) if sys.stdin.isatty() else sys.stdin)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (KeyboardInterrupt, BrokenPipeError):
        os._exit(130)
