import os
import pty
import runpy
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis

from flaskapp.ops.embedded_redis import EmbeddedServer
from flaskapp.ops.running_redis import record_redis
from tests.servers import wait_until

ROOT = Path(__file__).resolve().parent.parent.parent
SHIM = ROOT / "scripts" / "redis_cli.py"


@pytest.fixture
def cli(redis_url):
    def run(*words, stdin="", url=redis_url):
        done = subprocess.run(
            [sys.executable, str(SHIM), *(["-u", url] if url else []), *words],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
        )
        return done.stdout

    return run


@pytest.fixture
def books(redis_url):
    with redis.Redis.from_url(redis_url) as client:
        # So long that its first digits stay.
        client.set("llm:throttle:hash456", "window_limit", ex=29_555)
        client.zadd("llm:cost:recent:hash456", {"1700000000": 4050000, "1700000010": 8100000})
        yield client


@pytest.mark.parametrize(
    ("command", "shown", "piped"),
    [
        (["PING"], "PONG\n", "PONG\n"),
        (["KEYS", "llm:throttle:*"], '1) "llm:throttle:hash456"\n', "llm:throttle:hash456\n"),
        (["KEYS", "nothing:*"], "(empty array)\n", "\n"),
        (["TTL", "llm:throttle:hash456"], "(integer) 295", "295"),
        (["GET", "settings"], "(nil)\n", "\n"),
        (["GET", "llm:throttle:hash456"], '"window_limit"\n', "window_limit\n"),
        (
            ["ZRANGE", "llm:cost:recent:hash456", "0", "-1", "WITHSCORES"],
            '1) "1700000000"\n2) "4050000"\n3) "1700000010"\n4) "8100000"\n',
            "1700000000\n4050000\n1700000010\n8100000\n",
        ),
        (["NOSUCH"], "(error) ERR unknown command 'NOSUCH'", "ERR unknown command 'NOSUCH'"),
        (
            ["EVAL", "return {1, {'a', 'b\\n'}, false}", "0"],
            '1) (integer) 1\n2) 1) "a"\n   2) "b\\n"\n3) (nil)\n',
            "1\na\nb\n\n\n",
        ),
    ],
)
def test_answers_look_like_those_of_redis_cli(cli, books, command, shown, piped):
    assert cli("--no-raw", *command).startswith(shown)
    assert cli(*command).startswith(piped)


def test_a_json_argument_arrives_intact(cli, books):
    text = '{"daily_cost_limit_usd": 0.01}'
    assert cli("SET", "settings", text) == "OK\n"
    assert books.get("settings") == text.encode()
    assert cli("--no-raw", "GET", "settings") == '"{\\"daily_cost_limit_usd\\": 0.01}"\n'


def test_the_names_of_all_keys_or_of_some_can_be_listed(cli, books):
    assert cli("--scan", "--pattern", "llm:cost:*") == "llm:cost:recent:hash456\n"
    assert sorted(cli("--scan").split()) == sorted(key.decode() for key in books.keys())  # noqa: SIM118 - a command
    assert cli("--scan", "--pattern", "nobody:*") == ""


def test_commands_come_from_stdin_too(cli, books):
    lines = 'SET settings \'{"a": 1}\'\nGET settings\nSET x "two\\nlines\\x41"\n"open\nTTL settings\nexit\nFLUSHALL\n'
    assert cli(stdin=lines) == 'OK\n{"a": 1}\nOK\nInvalid argument(s)\n-1\n'
    assert books.get("x") == b"two\nlinesA"


def test_the_last_word_can_come_from_stdin(cli, books):
    cli("-x", "SET", "settings", stdin='{"b": 2}')
    assert books.get("settings") == b'{"b": 2}'


def test_another_database_is_another(cli, books):
    assert cli("-n", "3", "DBSIZE") == "0\n"


def test_a_server_that_is_not_there_is_one_line():
    done = subprocess.run(
        [sys.executable, str(SHIM), "-p", "1", "PING"], capture_output=True, text=True, check=False, timeout=20
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "Could not connect to Redis at 127.0.0.1:1: Connection refused\n"


def test_a_server_that_was_asked_to_end_has_nothing_to_say(tmp_path):
    with EmbeddedServer(tmp_path, durable=True) as server:
        words = [sys.executable, str(SHIM), "-u", server.url, "SHUTDOWN"]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=20)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        wait_until(lambda: not server.is_running, 5, "the server has ended")


def test_redis_url_is_asked_where_nothing_else_is_named(books, redis_url, tmp_path):
    shim = tmp_path / "scripts" / "redis_cli.py"  # a clone without an embedded server
    shim.parent.mkdir()
    shim.write_bytes(SHIM.read_bytes())
    environment = {**os.environ, "REDIS_URL": redis_url, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(shim), "DBSIZE"], env=environment, capture_output=True, text=True, check=False, timeout=20
    )
    assert done.stdout == "2\n"


class Clone:
    """The folder of a clone, as far as its redis-cli looks into it."""

    def __init__(self, place):
        self.data = place / ".data"
        self.shim = place / "scripts" / "redis_cli.py"
        self.shim.parent.mkdir(parents=True)
        self.shim.write_bytes(SHIM.read_bytes())

    def run(self, *words, **environment):
        return subprocess.run(
            [sys.executable, str(self.shim), *words],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
        ).stdout


@pytest.fixture
def neighbours(tmp_path):
    """Two clones side by side, each with an embedded server that has a password of its own."""
    with ExitStack() as stack:
        pair = []
        for name in ("first", "second"):
            clone = Clone(tmp_path / name)
            server = EmbeddedServer(clone.data / "redis", password=f"of-the-{name}")
            stack.enter_context(server)
            record_redis(clone.data, server.url)
            with redis.Redis.from_url(server.url) as client:
                client.set("settings", name)
            pair.append((clone, server.port))
        yield pair


def test_each_clone_reaches_its_own_redis_without_further_words(neighbours):
    assert [clone.run("GET", "settings") for clone, _ in neighbours] == ["first\n", "second\n"]


@pytest.mark.parametrize(
    "words", [["-p", "{}"], ["-h", "localhost", "-p", "{}"], ["-u", "redis://127.0.0.1:{}/0"], ["-n", "0"]]
)
def test_it_logs_in_by_whatever_words_the_embedded_server_is_named(neighbours, words):
    clone, port = neighbours[0]
    named = [word.format(port) for word in words]
    assert clone.run(*named, "GET", "settings") == "first\n"
    assert clone.run(*named, "GET", "settings", REDISCLI_AUTH="of-another-server") == "first\n"


def test_the_password_is_for_no_other_server(neighbours):
    (clone, _), (_, other_port) = neighbours
    assert clone.run("-p", str(other_port), "GET", "settings") == "NOAUTH Authentication required.\n"
    assert clone.run("-p", str(other_port), "GET", "settings", REDISCLI_AUTH="of-the-second") == "second\n"
    assert clone.run("-p", str(other_port), "-a", "of-the-second", "GET", "settings") == "second\n"


def test_set_up_puts_it_there_whatever_stands_on_path(tmp_path, monkeypatch):
    place = tmp_path / "a clone"
    another = tmp_path / "redis-cli"
    another.write_text("#!/bin/sh\necho another\n")
    another.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    handler = signal.getsignal(signal.SIGINT)  # which set-up takes first of all
    put = runpy.run_path(str(ROOT / "scripts" / "setup.py"), run_name="set-up")["_put_redis_cli"]
    signal.signal(signal.SIGINT, handler)
    (place / "bin").mkdir(parents=True)
    put.__globals__.update(VENV=place, PYTHON=Path(sys.executable))
    put()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = subprocess.run([place / "bin" / "redis-cli", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == "redis-cli of Tollgate\n"


def test_somebody_at_a_terminal_gets_a_prompt(books, redis_url):
    inside, outside = pty.openpty()
    with subprocess.Popen(
        [sys.executable, str(SHIM), "-u", redis_url], stdin=outside, stdout=outside, stderr=outside, close_fds=True
    ) as process:
        os.close(outside)
        os.write(inside, b"TTL llm:throttle:hash456\nexit\n")
        text = b""
        try:
            while chunk := os.read(inside, 1024):
                text += chunk
        except OSError:  # how Linux says that the terminal has closed
            pass
        finally:
            os.close(inside)
    assert process.returncode == 0
    assert redis_url.split("/")[2].encode() + b"> " in text
    assert b"(integer) 295" in text
