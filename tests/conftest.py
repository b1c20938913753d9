import os
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis
from hypothesis import HealthCheck, settings

from flaskapp.ops import embedded_redis as embedded
from flaskapp.ops.embedded_redis import EmbeddedServer
from tests.embedded import FragileServer

# Before any test module imports it: once imported it could not be rewritten any more.
pytest.register_assert_rewrite("backends.conformance")

# How fast examples are made says nothing but how busy the machine is.
settings.register_profile("house", suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")

ROOT = Path(__file__).resolve().parent.parent


def store_program():
    """The server to test with: TEST_REDIS_BINARY, else the Valkey that set-up installed."""
    given = os.environ.get("TEST_REDIS_BINARY")
    return Path(given).absolute() if given else embedded.bundled_server()


def pytest_configure(config):
    """Put the store under test first on PATH, as `redis-server`: what the tests start finds it there too."""
    place = tempfile.TemporaryDirectory(prefix="tollgate-store-")
    config.add_cleanup(place.cleanup)
    (Path(place.name) / "redis-server").symlink_to(store_program())
    os.environ["PATH"] = os.pathsep.join((place.name, os.environ["PATH"]))


def pytest_report_header():
    program = [embedded.find_server(), "--version"]
    return f"store: {subprocess.run(program, capture_output=True, text=True, check=True).stdout.strip()}"


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory):
    """The server of this run, on a port of its own."""
    with EmbeddedServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def own_server(tmp_path):
    """A durable server for one test, to be frozen, killed and started again."""
    with FragileServer(tmp_path / "own-redis", durable=True) as server:
        yield server


@pytest.fixture(scope="session")
def _test_database(request):
    given = os.environ.get("TEST_REDIS_URL")
    if not given:
        yield request.getfixturevalue("redis_server").url
        return
    with redis.Redis.from_url(given) as client:
        found = client.randomkey()
        if found is not None:
            pytest.exit(f"TEST_REDIS_URL: a database without keys, for the tests empty it; it holds {found!r}", 1)
        yield given
        client.flushdb()


@pytest.fixture
def redis_url(_test_database):
    """An empty database; never the one in REDIS_URL."""
    with redis.Redis.from_url(_test_database) as client:
        client.flushdb()
    return _test_database


@pytest.fixture
def make_app(redis_url, tmp_path):
    """`make_app(NAME="value", …)`: the application in this process, with an empty database."""
    from tests.apps import open_app

    with ExitStack() as stack:

        def make(clock=None, before_each_send=None, **environment):
            given = {"clock": clock, "before_each_send": before_each_send}
            return stack.enter_context(open_app(redis_url, tmp_path, environment, **given))

        yield make


@pytest.fixture(autouse=True)
def _an_environment_of_its_own(monkeypatch):
    """What the caller's shell sets must not decide what the tests find."""
    from flaskapp.config import variables

    for variable in variables():
        monkeypatch.delenv(variable.name, raising=False)
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
