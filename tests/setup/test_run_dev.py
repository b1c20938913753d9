import http.client
import os
import re
import signal
import socket
import socketserver
import subprocess
import threading
import time
import urllib.request
from contextlib import contextmanager, suppress

import pytest
import redis

from backends.store.addresses import without_password
from flaskapp.ops.embedded_redis import EmbeddedServer, free_port
from flaskapp.ops.running_redis import record_redis, running_url
from tests.setup.conftest import processes_of


def test_a_warm_start_serves_and_says_where_everything_is(start, clone):
    installed = {path: path.stat().st_mtime_ns for path in (clone / ".venv").rglob("*")}
    server = start().until("Ctrl-C stops it")
    # How long it takes is a figure of the machine; what would make it long is setting up again.
    assert "Setting up" not in server.said
    assert {path: path.stat().st_mtime_ns for path in (clone / ".venv").rglob("*")} == installed
    assert server.get("/healthz") == 200
    base = f"http://127.0.0.1:{server.port}"
    url = running_url(clone / ".data")
    token = (clone / ".data" / "admin-token").read_text().strip()
    for words in (
        f"{base}/api/v1/chat/stream",
        f"{base}/admin",
        f"log in with {token}",
        f"{without_password(url)} (embedded",
        "Cost throttling is off (development mode)",
        "ENABLE_COST_THROTTLING=true",
        f"curl -N {base}/api/v1/chat/stream",
        "source .venv/bin/activate",
    ):
        assert words in server.said
    with redis.Redis.from_url(url) as client:
        assert client.config_get("appendonly")["appendonly"] == "yes"
    log = (clone / ".data" / "app.log").read_text()
    assert "Cost throttling is off" in log
    assert token not in log


def test_no_other_user_of_the_machine_gets_at_redis_or_reads_what_is_kept(start, clone):
    server = start(ENABLE_COST_THROTTLING="true").until("Ctrl-C stops it")
    assert server.get("/healthz") == 200
    url = running_url(clone / ".data")
    password = (clone / ".data" / "redis.password").read_text().strip()
    assert f":{password}@" in url
    with redis.Redis.from_url(without_password(url)) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.set("settings", '{"enable_cost_throttling": false}')
    shown = subprocess.run(["ps", "-eo", "args="], capture_output=True, text=True, check=True).stdout
    logs = [(clone / ".data" / name).read_text() for name in ("app.log", "redis/server.log", "redis.said")]
    assert all(password not in text for text in (shown, server.said, *logs))
    assert others_may_use(clone / ".data") == []
    server.end()
    assert others_may_use(clone / ".data") == []


def test_what_an_older_version_kept_goes_on_and_is_closed_to_others(start, clone):
    with EmbeddedServer(clone / ".data" / "redis", durable=True) as before, redis.Redis.from_url(before.url) as client:
        client.set("settings", '{"enable_cost_throttling": true}')
        record_redis(clone / ".data", before.url)
    (clone / ".data" / "admin-token").write_text("kept by an older version\n")
    for path in (clone / ".data").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (clone / ".data").chmod(0o755)
    server = start().until("Ctrl-C stops it")
    assert "Cost throttling is on (set live, in Redis)" in server.said
    assert "log in with kept by an older version" in server.said
    assert others_may_use(clone / ".data") == []


def test_an_older_version_that_still_runs_is_joined(start, clone):
    with EmbeddedServer(clone / ".data" / "redis", durable=True) as before:
        record_redis(clone / ".data", before.url)
        server = start().until("Ctrl-C stops it")
        assert f"{before.url} (embedded" in server.said
        assert server.end() == 128 + signal.SIGINT


def others_may_use(folder):
    return [path for path in (folder, *folder.rglob("*")) if path.stat().st_mode & 0o077]


def test_throttling_that_is_switched_on_is_said(start):
    server = start(ENABLE_COST_THROTTLING="true").until("Ctrl-C stops it")
    assert "Cost throttling is on (by the environment)" in server.said


def test_where_challenges_are_on_what_to_try_gets_one_first(start, clone):
    server = start(ENVIRONMENT="production").until("Ctrl-C stops it")
    assert "Challenges      are on (production mode)" in server.said
    commands = server.said.partition("  Try ")[2].partition("Ctrl-C stops it")[0]
    assert '"status":"complete"' in in_a_shell(clone, commands)


def test_what_is_set_live_is_not_said_to_be_switched_by_the_environment(start, clone):
    first = start().until("Ctrl-C stops it")
    assert "or at the start with ENABLE_COST_THROTTLING=true|false" in first.said
    in_a_shell(clone, "flask --app wsgi settings set enable_cost_throttling true")
    second = start(ENABLE_COST_THROTTLING="false").until("Ctrl-C stops it")
    assert "Cost throttling is on (set live, in Redis)" in second.said
    assert "settings unset enable_cost_throttling" in second.said
    assert "or at the start with" not in second.said


def test_settings_are_shown_as_the_service_has_them_that_was_started_last(start, clone):
    def shown():
        lines = in_a_shell(clone, "flask --app wsgi settings show").splitlines()
        return next(line.split()[1:3] for line in lines if line.startswith("enable_cost_throttling")), lines[-1]

    first = start().until("Ctrl-C stops it")
    where = f"by the environment of the service on port {first.port}"
    assert shown() == (["false", "default"], f"mode: development ({where})")
    second = start(ENABLE_COST_THROTTLING="true").until("Ctrl-C stops it")
    where = f"by the environment of the service on port {second.port}, the last started of 2"
    assert shown() == (["true", "environment"], f"mode: development ({where})")
    second.end()
    assert shown()[0] == ["false", "default"]
    asked = in_a_shell(clone, "ENABLE_COST_THROTTLING=true flask --app wsgi settings show").splitlines()
    assert next(line.split()[1:3] for line in asked if line.startswith("enable_cost_throttling")) == [
        "true",
        "environment",
    ]
    assert asked[-1] == f"mode: development (by this shell's environment and that of the service on port {first.port})"


def in_a_shell(clone, commands):
    """What they say to somebody who has activated the clone's environment."""
    path = f"{clone / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    python = f'flask() {{ python -m flask "$@"; }}\n{commands}'
    done = subprocess.run(
        ["bash", "-c", python], cwd=clone, env={"PATH": path}, capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("to_group", [False, True])
def test_a_signal_stops_all_that_was_started(start, clone, number, to_group):
    server = start().until("Ctrl-C stops it")
    if to_group:
        os.killpg(server.process.pid, number)
    else:
        server.process.send_signal(number)
    assert server.process.wait(20) == 128 + number
    assert processes_of(clone) == []
    assert "Traceback" not in server.said


@pytest.mark.parametrize("delay_seconds", [0.05, 0.3, 0.6, 0.9, 1.2])
def test_ctrl_c_during_the_start_leaves_nothing_behind(start, clone, delay_seconds):
    server = start()
    time.sleep(delay_seconds)  # the moment is what varies; whatever it hits must hold
    os.killpg(server.process.pid, signal.SIGINT)
    assert server.process.wait(20) in {130, -signal.SIGINT}
    assert processes_of(clone) == []
    assert "Traceback" not in server.said


def test_a_supervisor_that_is_killed_takes_everything_with_it(start, clone):
    server = start().until("Ctrl-C stops it")
    server.end(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while processes_of(clone) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_of(clone) == []


@pytest.mark.parametrize("first_to_stop", [0, 1])
def test_a_second_start_joins_the_redis_and_either_may_stop(start, clone, first_to_stop):
    pair = [start().until("Ctrl-C stops it"), start(THROTTLE_BACKEND="legacy").until("backend legacy")]
    url = running_url(clone / ".data")
    assert all(without_password(url) in server.said for server in pair)
    gone, left = pair[first_to_stop], pair[1 - first_to_stop]
    gone.end()
    assert running_url(clone / ".data") == url
    assert left.get("/healthz") == 200
    left.end()
    assert running_url(clone / ".data") is None
    assert processes_of(clone) == []


def test_what_redis_holds_is_there_at_the_next_start(start, clone):
    server = start().until("Ctrl-C stops it")
    with redis.Redis.from_url(running_url(clone / ".data")) as client:
        client.set("settings", '{"enable_cost_throttling": true}')
    server.end()
    again = start().until("Ctrl-C stops it")
    assert "Cost throttling is on (set live, in Redis)" in again.said


def test_a_redis_that_was_killed_is_brought_back_by_another_start_where_the_others_wait_for_it(start, clone):
    with holding_the_usual_port():  # so that it stands elsewhere, and a new one would go there again by itself
        waiting = start(ENABLE_COST_THROTTLING="true").until("Ctrl-C stops it")
    url = running_url(clone / ".data")
    with redis.Redis.from_url(url) as client:
        client.set("settings", '{"daily_cost_limit_usd": 0.01}')
        client.shutdown(nosave=True)
    waiting.until("The embedded Redis has ended").until(f"PORT={waiting.port + 1} ./scripts/run-dev.sh")
    assert running_url(clone / ".data") is None
    another = start().until("Ctrl-C stops it")
    waiting.until("The embedded Redis is back")
    assert f"{without_password(url)} (embedded, kept in .data/redis; started here)" in another.said
    with redis.Redis.from_url(url) as client:
        assert client.get("settings") == b'{"daily_cost_limit_usd": 0.01}'
    deadline = time.monotonic() + 5
    while '"redis": "up"' not in said_by(waiting, "/readyz"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    another.end()
    assert running_url(clone / ".data") == url


@contextmanager
def holding_the_usual_port():
    with socket.socket() as holder:
        with suppress(OSError):  # somebody else holds it
            holder.bind(("127.0.0.1", 6379))
        yield


def said_by(server, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=5) as answer:
        return answer.read().decode()


def test_a_port_that_is_taken_is_one_line(start):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        server = start(PORT=str(port))
        assert server.process.wait(20) == 1
    assert re.fullmatch(rf"Port {port} of 127\.0\.0\.1 cannot be had .+\n", server.said)


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"HIGH_COST_THRESHOLD_USD": "much"}, r"HIGH_COST_THRESHOLD_USD: .+; got much\n"),
        ({"REDIS_URL": "redis://127.0.0.1/0?nonsense=1"}, r"REDIS_URL: .+; got nonsense\n"),
        (
            {"REDIS_URL": "redis://127.0.0.1/0?socket_timeout=30"},
            r"REDIS_URL: .+ by Tollgate; got socket_timeout\n",
        ),
        ({"HOST": "[::1"}, r"HOST: .+; got \[::1\n"),
        ({"REDIS_URL": "fake://"}, r"WEB_CONCURRENCY: 1 with REDIS_URL=fake://.+; got 2\n"),
        ({"THROTTLE_BACKEND": "memory"}, r"WEB_CONCURRENCY: 1 with THROTTLE_BACKEND=memory.+; got 2\n"),
        ({"THROTTLE_BACKEND": "nobodys"}, r".*nobodys.*\n"),
        ({"LLM_MODEL": "nobodys-model"}, r".*nobodys-model.*\n"),
    ],
)
def test_a_value_that_cannot_be_used_stops_the_start_with_one_line(start, environment, line):
    server = start(**environment)
    assert server.process.wait(30) == 1
    assert re.fullmatch(line, server.said), server.said


class OldRedis(socketserver.StreamRequestHandler):
    """Says of itself that it is Redis 6.0, whatever it is asked."""

    def handle(self):
        about = b"# Server\r\nredis_version:6.0.16\r\n"
        while self.rfile.readline():
            while not self.rfile.readline().lower().startswith(b"server"):
                pass
            self.wfile.write(b"$%d\r\n%b\r\n" % (len(about), about))


def test_a_redis_that_is_too_old_stops_the_start_with_one_line(start):
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), OldRedis) as old:
        old.daemon_threads = True
        threading.Thread(target=old.serve_forever, daemon=True).start()
        server = start(REDIS_URL=f"redis://127.0.0.1:{old.server_address[1]}/0")
        assert server.process.wait(30) == 1
        old.shutdown()
    assert re.fullmatch(r"REDIS_URL: Redis 6\.2 or newer.+6\.0\.16\n", server.said), server.said


def test_a_redis_that_is_away_is_no_reason_not_to_start(start):
    server = start(REDIS_URL=f"redis://:secret@127.0.0.1:{free_port()}/0").until("Ctrl-C stops it")
    assert server.get("/healthz") == 200
    assert "secret" not in server.said


def test_a_short_token_of_the_operator_is_remarked_on_and_not_shown(start):
    server = start(ADMIN_TOKEN="easy-to-guess").until("Ctrl-C stops it")
    assert server.said.count("ADMIN_TOKEN has fewer than 16 characters") == 1
    assert "easy-to-guess" not in server.said


def test_a_redis_that_may_forget_is_remarked_on(start, own_server):
    with redis.Redis.from_url(own_server.url) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
    server = start(REDIS_URL=own_server.url).until("Ctrl-C stops it")
    assert "maxmemory-policy allkeys-lru" in server.said


def test_a_stream_that_runs_is_settled_when_its_server_is_stopped(start, clone):
    server = start(ENABLE_COST_THROTTLING="true", DEMO_TOKENS_PER_SECOND="2").until("Ctrl-C stops it")
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request(
        "POST",
        "/api/v1/chat/stream",
        body='{"query": "What is Litecoin?"}',
        headers={"Content-Type": "application/json", "X-Fingerprint": "fp:a:b"},
    )
    answer = connection.getresponse()
    assert answer.status == 200
    assert answer.readline().startswith(b"data: ")
    with redis.Redis.from_url(running_url(clone / ".data")) as client:
        reserved = int(client.zscore("llm:cost:recent:b", client.zrange("llm:cost:recent:b", 0, 0)[0]))
    assert server.end(signal.SIGTERM) == 128 + signal.SIGTERM
    connection.close()
    again = start().until("Ctrl-C stops it")
    assert again.get("/healthz") == 200
    with redis.Redis.from_url(running_url(clone / ".data")) as client:
        kept = int(client.zscore("llm:cost:recent:b", client.zrange("llm:cost:recent:b", 0, 0)[0]))
    assert 0 < kept < reserved
