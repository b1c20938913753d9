"""Who is measured: the floor, ours, and the peers, each a server with an upstream and a database of its own."""

import itertools
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import redis

from benchmarks.service.processes import ROOT, Program, fetch, running
from benchmarks.service.programs import Load, Target, Tools, json_request
from flaskapp.ops.embedded_redis import HOST, EmbeddedServer, free_port

INPUT_NANOUSD, OUTPUT_NANOUSD = 2_500, 10_000
"""What the upstream bills a token."""
WRITES = 21
"""Of the floor: 20 tokens and an end."""
_OURS = {
    "API_KEYS": "*",
    "LLM_PRICE_INPUT_USD_PER_MTOK": "2.5",
    "LLM_PRICE_OUTPUT_USD_PER_MTOK": "10",
    "DEMO_TOKENS_PER_SECOND": "0",
    "ENABLE_CHALLENGE_RESPONSE": "false",
    "CHAT_RATE_LIMIT": "1000000 per minute",
    "LLM_MAX_TOKENS": "10000",
    "STREAM_DEADLINE_SECONDS": "600",
    "DRAIN_SECONDS": "2",
    "HIGH_COST_THRESHOLD_USD": "1000000",
    "DAILY_COST_LIMIT_USD": "1000000",
    "NETWORK_COST_LIMIT_USD": "0",
    "NETWORK_DAILY_COST_LIMIT_USD": "0",
    "HOURLY_SPEND_LIMIT_USD": "1000000",
    "DAILY_SPEND_LIMIT_USD": "1000000",
}
"""Limits so high that nothing is refused, and a short drain, since it is waited for between figures. All else, the log
too, is as by default."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A server that answers one kind of request."""

    name: str
    target: Target
    server: Program
    upstream: Program | None = None
    upstream_port: int = 0
    redis_url: str = ""

    def asked(self, name: str, request: bytes, end: str) -> "Contender":
        """The same server, asked for something else."""
        return replace(self, name=name, target=replace(self.target, request=request, end=end))

    def generated(self) -> dict[str, int]:
        """What its upstream, or the floor itself, has generated so far."""
        port, path = (self.upstream_port, "/stats") if self.upstream else (self.target.port, "/written")
        generated: dict[str, int] = json.loads(fetch(port, path))
        return generated

    def books_and_bill(self) -> tuple[int, int]:
        """Of ours: nano-dollars in everybody's days, and what its upstream generated, at the upstream's prices."""
        with redis.Redis.from_url(self.redis_url) as client:
            booked = sum(int(client.get(key) or 0) for key in client.scan_iter("llm:global:daily:*"))
        bill = self.generated()
        return booked, bill["input_tokens"] * INPUT_NANOUSD + bill["output_tokens"] * OUTPUT_NANOUSD


def completion(*, tokens: int = 20, pace_us: int = 0, streamed: bool = True, headers: Sequence[str] = ()) -> bytes:
    """A request for a completion of so many tokens, for all that speak OpenAI's API."""
    prompt = f"tokens={tokens} pace_us={pace_us} What is Litecoin, and who released it?"
    body = {"model": "gpt-4o", "max_tokens": max(tokens, 100), "messages": [{"role": "user", "content": prompt}]}
    return json_request("/v1/chat/completions", body | ({"stream": True} if streamed else {}), headers)


def chat(**fields: object) -> bytes:
    """A request of the chat page."""
    body = {"query": "What is Litecoin?", "chat_history": [], **fields}
    return json_request("/api/v1/chat/stream", body, ["X-Fingerprint: a-visitor"])


def bare(writes: int = WRITES, pace_us: int = 0) -> bytes:
    """A request of the floor."""
    return json_request(f"/stream?events={writes}&pace_us={pace_us}", {})


class Stage:
    """Starts contenders, and ends them all."""

    def __init__(self, directory: Path, tools: Tools) -> None:
        self.directory = directory
        self.tools = tools
        self._stack = ExitStack()
        self._databases = itertools.count()
        self.redis = EmbeddedServer(directory / "redis")

    def __enter__(self) -> Self:
        self._stack.enter_context(self.redis)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def floor(self, workers: int = 1) -> Contender:
        """A bare Flask application under gunicorn."""
        port = free_port()
        command = [*_GUNICORN, "-k", "gevent", "-w", str(workers), "--worker-connections", "1000"]
        command += [
            "--keep-alive",
            "2",
            "--no-control-socket",
            "-b",
            f"{HOST}:{port}",
            "benchmarks.service.bare_app:app",
        ]
        server = self.started(f"floor-{workers}", command, {"REDIS_URL": self.free_database_url()}, (port, "/written"))
        return Contender("floor", Target(port, bare(), "[DONE]"), server)

    def builtin(self) -> Contender:
        """Ours, with the model that is built in."""
        contender = self._ours("chat", {}, 1)
        return contender.asked("ours, chat", chat(), '"status":"complete"')

    def proxied(self, workers: int = 1) -> Contender:
        """Ours, before an upstream."""
        upstream, port = self.upstream(f"ours-{workers}")
        contender = self._ours(f"proxied-{workers}", {"LLM_BASE_URL": f"http://{HOST}:{port}/v1"}, workers)
        return replace(contender, upstream=upstream, upstream_port=port)

    def _ours(self, name: str, environment: dict[str, str], workers: int) -> Contender:
        port, url = free_port(), self.free_database_url()
        own = {"REDIS_URL": url, "PORT": str(port), "WEB_CONCURRENCY": str(workers)}
        command = [*_GUNICORN, "--config", str(ROOT / "gunicorn.conf.py"), "wsgi:app"]
        server = self.started(name, command, _OURS | own | environment, (port, "/readyz"))
        return Contender("ours, /v1 streamed", Target(port, completion(), "[DONE]"), server, redis_url=url)

    def upstream(self, name: str) -> tuple[Program, int]:
        """An upstream of one contender's own."""
        program = self._stack.enter_context(running(self.tools.upstream, self.directory / f"upstream-{name}", {}))
        return program, program.wait_for_port()

    def started(
        self, name: str, command: Sequence[str], environment: dict[str, str], answers: tuple[int, str]
    ) -> Program:
        """A server, once it answers."""
        program = self._stack.enter_context(running(command, self.directory / name, environment))
        program.wait_for_answer(*answers)
        return program

    def load_command(self, load: Load, target: Target) -> list[str]:
        """The load generator's command line."""
        return load.command(self.tools.load, target, self.directory)

    def free_database_url(self) -> str:
        """A database that nobody else has."""
        return f"redis://{HOST}:{self.redis.port}/{next(self._databases)}"


_GUNICORN = (sys.executable, "-m", "gunicorn")
