"""The upstream and the load generator: compiled at the first run; in Python, and slow, where there is no compiler."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.service.processes import ROOT

DATA = ROOT / ".data" / "benchmarks"
_SOURCES = Path(__file__).parent
_FLAGS = ("-O2", "-D_GNU_SOURCE")


@dataclass(frozen=True, slots=True)
class Tools:
    """How the upstream and the load generator are called."""

    upstream: Sequence[str]
    load: Sequence[str]
    remark: str
    """What the output has to say of them."""


@dataclass(frozen=True, slots=True)
class Times:
    """Of all answers of a round, in milliseconds."""

    p50: float
    p99: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one round of requests."""

    seconds: float
    """Until the last answer had ended."""
    answers: int
    """Within the time of the round; `late` are those that ended after it."""
    late: int
    refused: int
    wrong: int
    broken: int
    unfinished: int
    chunks: int
    bytes: int
    first_ms: Times
    whole_ms: Times
    cpu_seconds: float
    """Of the load generator itself."""


def tools() -> Tools:
    """Compiled, if that is possible here."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler and sys.platform == "linux":
        return Tools(
            [_compiled(compiler, "upstream")], [_compiled(compiler, "load")], "upstream and load generator compiled"
        )
    slow = [[sys.executable, "-m", f"benchmarks.service.slow_{name}"] for name in ("upstream", "load")]
    return Tools(
        *slow,
        "NO C COMPILER: upstream and load generator are slow ones in Python; what is fast is measured too slow",
    )


def _compiled(compiler: str, name: str) -> str:
    source = _SOURCES / f"{name}.c"
    digest = hashlib.sha256(source.read_bytes() + repr(_FLAGS).encode()).hexdigest()[:12]
    program = DATA / f"{name}-{digest}"
    if not program.is_file():
        DATA.mkdir(parents=True, exist_ok=True)
        draft = DATA / f"{name}.{os.getpid()}"
        subprocess.run([compiler, *_FLAGS, "-o", draft, source], check=True)
        draft.replace(program)
    return str(program)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a contender is asked, for what, and how its answers end."""

    port: int
    request: bytes
    end: str


def json_request(path: str, body: object, headers: Sequence[str] = ()) -> bytes:
    """A POST as it stands on the wire."""
    content = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(content)}", "", ""]).encode() + content


@dataclass(frozen=True, slots=True)
class Load:
    """So many connections, for so long; `rate` requests a second, or as fast as they can."""

    connections: int = 32
    seconds: float = 2.0
    rate: float = 0.0
    grace_seconds: float = 30.0

    def command(self, program: Sequence[str], target: Target, directory: Path) -> list[str]:
        """The load generator's command line; the request is put into a file of `directory`."""
        request = directory / f"request-{hashlib.sha256(target.request).hexdigest()[:8]}"
        request.write_bytes(target.request)
        numbers = (self.connections, self.seconds, self.rate, self.grace_seconds)
        return [*program, str(target.port), str(request), target.end, *map(str, numbers)]


def outcome_of(text: str) -> Outcome:
    """What the load generator printed."""
    told = json.loads(text)
    return Outcome(**told | {name: Times(**told[name]) for name in ("first_ms", "whole_ms")})
