"""Every command of the pages, run in the order of the page against a real service, and what it must show.

A bash block is run with bash; it has to succeed, or to end as its mark says. A text block after it is what it prints,
where `…` stands for anything. Marks above a block:
<!-- not run: why -->  <!-- runs until Ctrl-C -->  <!-- exits 1 -->  <!-- one capture: why -->
"""

import doctest
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import redis

from flaskapp.config import load_config
from flaskapp.ops.embedded_redis import EmbeddedServer
from flaskapp.ops.running_redis import record_redis
from tests.docs.pages import PAGES, ROOT, blocks
from tests.servers import ADMIN_TOKEN, BEARER, SETTINGS, Service, wait_until

ALL = [block for page in PAGES for block in blocks(page)]
RUN = [page for page in PAGES if any(block.language in {"bash", "python"} and block.is_run for block in blocks(page))]
SECOND_SERVER = re.compile(r"[A-Za-z_= ]*THROTTLE_BACKEND=\w+ PORT=\d+ \./scripts/run-dev\.sh")
SECOND_SERVERS = [command for page in PAGES for command in SECOND_SERVER.findall(page.read_text(encoding="utf-8"))]
SWITCHED_ON = {"ENABLE_COST_THROTTLING": "true", "ENABLE_CHALLENGE_RESPONSE": "false", "DEMO_TOKENS_PER_SECOND": "100"}
SECONDS = 20

pytestmark = pytest.mark.skipif(not shutil.which("curl"), reason="the pages use curl, and this machine has none")


class Shell:
    """A second shell in the project root, beside a service on port 8000 and a legacy one on 8001."""

    def __init__(self, place: Path, services: dict[int, Service]) -> None:
        self.place = place
        self.ports = {f"localhost:{usual}": f"127.0.0.1:{service.port}" for usual, service in services.items()}
        self.services = list(services.values())
        first = services[8000]
        self.redis_url = first.redis_url
        for name in ("wsgi.py", "backends", "flaskapp", "docs", "tests"):
            (place / name).symlink_to(ROOT / name)
        (place / ".data" / "app.log").symlink_to(first.directory / "app.log")
        (place / ".data" / "admin-token").write_text(ADMIN_TOKEN)
        record_redis(place / ".data", self.redis_url)
        self._make_programs(place / "programs")
        kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        path = os.pathsep.join([str(place / "programs"), str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment = {**kept, "PATH": path, "PYTHONPATH": str(ROOT), "REDIS_URL": self.redis_url}

    def _make_programs(self, programs: Path) -> None:
        """`redis-cli` talks to the Redis of this test, whatever else runs here, and prints as on a terminal."""
        programs.mkdir()
        client = programs / "redis-cli"
        own = f'"{sys.executable}" "{ROOT / "scripts" / "redis_cli.py"}"'
        client.write_text(f'#!/bin/sh\nexec {own} --no-raw -u "$REDIS_URL" "$@"\n')
        client.chmod(0o755)

    def here(self, text: str) -> str:
        """The text of a page, with the ports of this test."""
        for usual, ours in self.ports.items():
            text = text.replace(usual, ours)
        ours = {usual.rpartition(":")[2]: port.rpartition(":")[2] for usual, port in self.ports.items()}
        text = text.replace("for port in 8000 8001", f"for port in {ours['8000']} {ours['8001']}")
        text = text.replace("redis://127.0.0.1:6379/0", self.redis_url)
        return re.sub(r"^source \.venv/bin/activate$", ":", text, flags=re.MULTILINE)

    def run(self, block) -> str:
        if block.mark == "runs until Ctrl-C":
            return self._run_for_a_while(block)
        done = self._start(["bash", "-e", "-o", "pipefail", "-c", self.here(block.text)])
        try:
            output, errors = done.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(done.pid, signal.SIGKILL)
            raise
        expected = int(block.mark.removeprefix("exits ")) if block.mark.startswith("exits ") else 0
        assert done.returncode == expected, f"{block}: exit status {done.returncode}\n{output}\n{errors}"
        return output + (errors if expected else "")

    def _run_for_a_while(self, block) -> str:
        going = self._start(["bash", "-c", self.here(block.text)])
        try:
            with pytest.raises(subprocess.TimeoutExpired):
                going.communicate(timeout=0.5)
        finally:
            os.killpg(going.pid, signal.SIGINT)
            output, errors = going.communicate(timeout=SECONDS)
        assert not errors, f"{block}: {errors}"
        return output

    def _start(self, command: list[str]) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            command,
            cwd=self.place,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


@pytest.fixture(scope="module")
def _shell(tmp_path_factory):
    base = tmp_path_factory.mktemp("docs")
    (base / "root" / ".data").mkdir(parents=True)
    with EmbeddedServer(base / "redis", password="of-the-pages") as server:
        first = Service(base / "root", server.url, **SWITCHED_ON)
        second = Service(base / "second", server.url, **SWITCHED_ON, THROTTLE_BACKEND="legacy")
        with first, second:
            yield Shell(base / "root", {8000: first, 8001: second})


@pytest.fixture
def shell(_shell):
    """On empty books, with the settings of the start."""
    with redis.Redis.from_url(_shell.redis_url) as client:
        client.flushdb()
    wait_until(lambda: _settings_are_gone(_shell), 5, "the services have noticed that the settings are gone")
    return _shell


def _settings_are_gone(shell: Shell) -> bool:
    # Often enough to meet every worker.
    told = [service.get(SETTINGS, headers=BEARER).text for service in shell.services for _ in range(8)]
    return all('"source": "redis"' not in text for text in told)


@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_works_and_shows_what_the_page_says(page, shell):
    output = None
    for block in blocks(page):
        if block.language == "bash":
            output = shell.run(block) if block.is_run else None
        elif block.language == "text" and output is not None and not block.mark:
            assert _shows(output, block.text), f"{block}: the page says\n{block.text}\nand it is\n{output}"
            output = None
        elif block.language == "python":
            _run_python(shell, block)


def _shows(output: str, expected: str) -> bool:
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    return doctest.OutputChecker().check_output(expected.replace("…", "..."), output, options)


def _run_python(shell, block) -> None:
    """As a script, or under the name that the page gives it: then a later command runs it."""
    named = re.findall(r"Save this as `([^`]+)`", block.page.read_text(encoding="utf-8"))
    script = shell.place / (named[0] if named else "example.py")
    script.write_text(shell.here(block.text))
    if not named:
        done = subprocess.run(
            [sys.executable, script],
            check=False,
            env=shell.environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert done.returncode == 0, f"{block}: {done.stderr}"


@pytest.mark.parametrize("command", SECOND_SERVERS)
def test_a_second_server_of_the_pages_throttles(command):
    environment = dict(word.split("=") for word in command.split() if "=" in word)
    live = load_config({"ENVIRONMENT": "development", **environment}).live_baseline.values
    assert live.enable_cost_throttling
    assert not live.enable_challenge_response


def test_there_are_second_servers_in_the_pages():
    assert SECOND_SERVERS


def test_what_is_not_run_says_why():
    marks = [block.mark for block in ALL if not block.is_run]
    assert marks
    assert all(re.fullmatch(r"not run: .{10,}", mark) for mark in marks)


def test_every_mark_is_one_that_is_understood():
    known = re.compile(r"|not run: .+|runs until Ctrl-C|exits [0-9]+|one capture: .+")
    assert [str(block) for block in ALL if not known.fullmatch(block.mark)] == []


def test_named_tests_are_there():
    named = {
        name
        for page in PAGES
        for name in re.findall(r"(?:tests|backends)/[\w/]+\.py::\w+", page.read_text(encoding="utf-8"))
    }
    assert named
    assert [name for name in sorted(named) if not _is_there(name)] == []


def _is_there(test_id: str) -> bool:
    path, _, name = test_id.partition("::")
    file = ROOT / path
    return file.exists() and f"def {name}(" in file.read_text(encoding="utf-8")
