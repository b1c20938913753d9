"""run-dev.sh where a Docker engine answers. The engine is a stand-in; what is asked of it, in which order, is ours."""

import json
import os
import signal
import sys

import pytest

from flaskapp.ops.embedded_redis import EmbeddedServer
from flaskapp.ops.running_redis import running_url

STAND_IN = """#!{python}
import http.server, json, os, signal, sys
from pathlib import Path
state = Path({state!r})
words = sys.argv[1:]
if words[:2] == ["compose", "--file"]:
    words = words[3:]
with (state / "asked").open("a") as asked:
    asked.write(json.dumps(words) + "\\n")
if words[0] == "ps" and (state / words[-1].strip("^$").removeprefix("name=^")).exists():
    print("0123456789ab")
if words[0] == "exec" and words[1:] == ["litecoin-redis", "printenv", "REDISCLI_AUTH"]:
    print({password!r})
if words[0] == "port":
    print("127.0.0.1:{redis_port}")
if words[0] == "up":
    (state / ("litecoin-" + words[-1])).touch()
    if words[-1] == "redis":
        (state / "password").write_text(os.environ["TOLLGATE_REDIS_PASSWORD"])
if words[0] == "rm":
    (state / "litecoin-backend").unlink(missing_ok=True)
if words[0] == "up" and words[-1] == "backend":
    (state / "environment").write_text(json.dumps(dict(os.environ)))
    class Healthy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print("the container says hello", flush=True)
    http.server.HTTPServer(("127.0.0.1", int(os.environ["PORT"])), Healthy).serve_forever()
"""


@pytest.fixture
def locked_server(tmp_path):
    """The Redis of the container."""
    with EmbeddedServer(tmp_path / "container", password="of-the-container") as server:
        yield server


@pytest.fixture
def engine(clone, locked_server):
    state = clone / "engine"
    state.mkdir()
    docker = state / "docker"
    known = {"python": sys.executable, "state": str(state), "redis_port": locked_server.port}
    docker.write_text(STAND_IN.format(**known, password="of-the-container"))
    docker.chmod(0o755)
    return state


@pytest.fixture
def start_with_engine(start, engine):
    return lambda **environment: start(PATH=f"{engine}:{os.environ['PATH']}", **environment)


def asked(engine):
    return [words for words in map(json.loads, (engine / "asked").read_text().splitlines()) if words[0] != "info"]


def test_redis_and_the_first_server_run_in_containers(start_with_engine, engine, locked_server, clone):
    server = start_with_engine(LLM_MAX_TOKENS="99").until("Ctrl-C stops it")
    assert "the container says hello" in server.said
    assert f"redis://127.0.0.1:{locked_server.port}/0 (container litecoin-redis)" in server.said
    assert running_url(clone / ".data") == locked_server.url
    assert (engine / "password").read_text() == (clone / ".data" / "redis.password").read_text().strip()
    passed = json.loads((engine / "environment").read_text())
    assert (passed["ENVIRONMENT"], passed["LLM_MAX_TOKENS"]) == ("development", "99")
    assert "REDIS_URL" not in passed
    assert server.end() == 128 + signal.SIGINT
    ups = [words for words in asked(engine) if words[0] == "up"]
    assert [words[-1] for words in ups] == ["redis", "backend"]
    assert "--wait" in ups[0]
    assert [words[0] for words in asked(engine)][-2:] == ["rm", "down"]
    assert "the container says hello" in (clone / ".data" / "app.log").read_text()


def test_debug_decides_the_mode_where_it_is_set(start_with_engine, engine):
    start_with_engine(DEBUG="false").until("Ctrl-C stops it")
    assert json.loads((engine / "environment").read_text())["ENVIRONMENT"] == ""


@pytest.mark.parametrize("first_to_stop", [0, 1])
def test_a_second_server_runs_on_the_host_and_either_may_stop(start_with_engine, engine, first_to_stop):
    pair = [start_with_engine().until("Ctrl-C stops it"), start_with_engine(THROTTLE_BACKEND="legacy")]
    pair[1].until("backend legacy")
    gone, left = pair[first_to_stop], pair[1 - first_to_stop]
    gone.end()
    assert "down" not in [words[0] for words in asked(engine)]
    assert left.get("/healthz") == 200
    left.end()
    assert asked(engine)[-1] == ["down"]
