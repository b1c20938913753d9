"""The service as it is deployed, for tests: gunicorn with gevent workers, on a free port, in a directory of its own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TypeVar

import pytest
import redis
import requests

from flaskapp.http.refusals import later
from flaskapp.ops.embedded_redis import EmbeddedServer, free_port, guardian_of
from tests.processes import children_of

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent
CHAT = "/api/v1/chat/stream"
SETTINGS = "/api/v1/admin/settings"
ADMIN_TOKEN = "the operator's word"
BEARER = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
LITECOIN = {"query": "What is Litecoin?", "chat_history": []}
START_SECONDS = 20.0
STOP_SECONDS = 15.0


def signed_by_itself(folder: Path, subject: str = "/CN=localhost") -> tuple[Path, Path]:
    """A certificate for localhost, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-subj", subject, "-addext", "subjectAltName=DNS:localhost,IP:::1",
         "-keyout", folder / "key", "-out", folder / "certificate"],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder / "certificate", folder / "key"


class Service:
    """One gunicorn; a context manager. It may be stopped and started again, on the same port."""

    application = "wsgi:app"
    config = "gunicorn.conf.py"

    def __init__(self, directory: Path, redis_url: str, **environment: str) -> None:
        self.directory = directory
        self.port = free_port()
        self.redis_url = redis_url
        kept = {name: os.environ[name] for name in os.environ if name in {"PATH", "HOME"} or name.startswith("COV")}
        self.environment = {
            **kept,
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "PORT": str(self.port),
            "REDIS_URL": redis_url,
            "ADMIN_TOKEN": ADMIN_TOKEN,
            "ENVIRONMENT": "development",
            # What those tests send as their Host that write a request byte by byte.
            "ALLOWED_HOSTS": "x",
            **environment,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._guardian: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def workers(self) -> int:
        return int(self.environment.get("WEB_CONCURRENCY", "2"))

    def start(self) -> None:
        """Come back when every worker serves."""
        seen = len(self.log_lines())
        self._process = self.launch()
        self._guardian = guardian_of(self._process.pid)
        try:
            wait_until(lambda: self._is_serving(seen), START_SECONDS, f"gunicorn: {self.log()[-2000:]}")
        except BaseException:
            self.kill()
            raise

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "gunicorn", "--config", str(ROOT / self.config), self.application]

    def launch(self) -> "subprocess.Popen[bytes]":
        with (self.directory / "app.log").open("ab") as log:
            return subprocess.Popen(
                self.command,
                cwd=self.directory,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def stop(self) -> int:
        """As Ctrl-C in run-dev.sh does; its exit status."""
        process, self._process = self._process, None
        guardian, self._guardian = self._guardian, None
        if process is None:
            return 0
        process.terminate()
        try:
            return process.wait(STOP_SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if guardian is not None:
                guardian.kill()
                guardian.communicate()

    def kill(self) -> None:
        """At once, workers and all."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self.stop()

    def log(self) -> str:
        try:
            return (self.directory / "app.log").read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""

    def log_lines(self) -> list[str]:
        return self.log().splitlines()

    def lines_with(self, words: str, since: int = 0, *, at_least: int = 1, within_seconds: float = 5) -> list[str]:
        """The log's lines from number `since` on that have these words; waits for them."""
        found: list[str] = []

        def are_there() -> bool:
            found[:] = [line for line in self.log_lines()[since:] if words in line]
            return len(found) >= at_least

        wait_until(
            are_there,
            within_seconds,
            f"{at_least} × {words!r} in the log since line {since}: {self.log_lines()[since:]}",
        )
        return found

    def get(self, path: str, timeout: float = 30, **options: Any) -> requests.Response:
        return requests.get(self.base_url + path, timeout=timeout, **options)

    def chat(
        self, fingerprint: str | None = "fp:test123:hash456", *, stream: bool = False, **fields: object
    ) -> requests.Response:
        """Ask, and read the answer to its end, unless it is to be streamed."""
        headers = {"X-Fingerprint": fingerprint} if fingerprint is not None else {}
        content = {**LITECOIN, **fields}
        return requests.post(self.base_url + CHAT, json=content, headers=headers, timeout=30, stream=stream)

    def by_each_worker(self, ask: Callable[[], T]) -> list[T]:
        """What `ask` comes to when each worker in turn has to answer it: the others are stopped meanwhile.

        Asked without that, however often, all of it may be answered by one. For when they have nothing to do: one that
        is stopped with a lock in its hand would be waited for.
        """
        assert self._process is not None
        workers = children_of(self._process.pid)
        assert len(workers) == self.workers
        answers = []
        for each in workers:
            others = [pid for pid in workers if pid != each]
            try:
                for pid in others:
                    os.kill(pid, signal.SIGSTOP)
                answers.append(ask())
            finally:
                for pid in others:
                    os.kill(pid, signal.SIGCONT)
        return answers

    def number_files(self) -> set[Path]:
        """The files of metrics that the workers have mapped."""
        assert self._process is not None
        maps = [Path(f"/proc/{pid}/maps").read_text(encoding="utf-8") for pid in children_of(self._process.pid)]
        return {Path(line.split(maxsplit=5)[5]) for line in "\n".join(maps).splitlines() if line.endswith(".db")}

    def patch(self, **changes: object) -> requests.Response:
        return requests.patch(self.base_url + SETTINGS, json=changes, headers=BEARER, timeout=30)

    def set_by_hand(self, client: redis.Redis, **settings: object) -> None:
        """As with `redis-cli SET settings`; the contract allows the workers a second to notice."""
        client.set("settings", json.dumps(settings))
        self.notice()

    @staticmethod
    def notice() -> None:
        """What the contract allows the workers before every one of them obeys a change."""
        time.sleep(1)

    def _is_serving(self, seen: int) -> bool:
        if self._process is None or self._process.poll() is not None:
            raise AssertionError(f"gunicorn ended: {self.log()[-2000:]}")
        said = [line for line in self.log_lines()[seen:] if "Cost throttling is" in line]
        return len(said) >= self.workers


def events(response: Any) -> list[dict[str, Any]]:
    """The events of a whole answer, of `requests` or of Flask's test client; comments are left out."""
    return parse_events(response.content if isinstance(response, requests.Response) else response.data)


def parse_events(stream: bytes) -> list[dict[str, Any]]:
    parts = [part for part in stream.decode().split("\n\n") if part and not part.startswith(":")]
    assert all(part.startswith("data: ") and "\n" not in part for part in parts), parts
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def nanousd(text: str) -> int:
    """Of a decimal string with nine places."""
    whole, point, places = text.partition(".")
    assert point == "."
    assert len(places) == 9, text
    return int(whole) * 10**9 + int(places)


def earliest_wait(refused: Any) -> int:
    """When the refusal can end, in seconds: `Retry-After` without what its request's id has put on top."""
    request_id, told = refused.headers["X-Request-ID"], int(refused.headers["Retry-After"])
    return max(each for each in range(1, told + 1) if later(each, request_id) == told)


def wait_until(holds: Callable[[], bool], timeout_seconds: float, what: str) -> None:
    end = time.monotonic() + timeout_seconds
    while not holds():
        assert time.monotonic() < end, f"not in {timeout_seconds} s: {what}"
        time.sleep(0.02)


def client_of(server: EmbeddedServer) -> redis.Redis:
    return redis.Redis(port=server.port, decode_responses=True)
