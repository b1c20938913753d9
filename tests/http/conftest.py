"""Real servers: gunicorn over HTTP on a real Redis. Each start costs a second or two, so they are shared."""

import pytest

from tests.embedded import FragileServer
from tests.servers import Service, client_of
from tests.upstream import Upstream


def empty(client):
    """Forget everything, and where there were settings, wait until the workers have noticed."""
    had_settings = client.delete("settings")
    client.flushall()
    if had_settings:
        Service.notice()


@pytest.fixture(scope="session")
def redis_of(tmp_path_factory):
    """`redis_of(name)`: a server of its own for each service, so that one may be emptied."""
    servers = {}

    def of(name):
        if name not in servers:
            servers[name] = FragileServer(tmp_path_factory.mktemp(f"redis-{name}"), durable=True)
            servers[name].start()
        return servers[name]

    yield of
    for server in servers.values():
        server.stop()


@pytest.fixture(scope="session")
def _atomic(redis_of, tmp_path_factory):
    """As the seed starts it."""
    environment = {"ENABLE_COST_THROTTLING": "true", "ENABLE_CHALLENGE_RESPONSE": "false"}
    with Service(tmp_path_factory.mktemp("atomic"), redis_of("books").url, **environment) as service:
        yield service


@pytest.fixture(scope="session")
def _legacy(redis_of, tmp_path_factory):
    """The racy way on the same books, with its log as JSON."""
    environment = {"THROTTLE_BACKEND": "legacy", "LOG_FORMAT": "json", "ENABLE_COST_THROTTLING": "true"}
    with Service(tmp_path_factory.mktemp("legacy"), redis_of("books").url, **environment) as service:
        yield service


@pytest.fixture
def books(redis_of):
    """The Redis of both, emptied."""
    with client_of(redis_of("books")) as client:
        empty(client)
        yield client


@pytest.fixture
def atomic(_atomic, books):
    return _atomic


@pytest.fixture
def legacy(_legacy, books):
    return _legacy


@pytest.fixture(params=["atomic", "legacy"])
def service(request):
    """Both."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def _upstream():
    with Upstream() as upstream:
        yield upstream


@pytest.fixture(scope="session")
def _in_front(redis_of, _upstream, tmp_path_factory):
    """In front of an upstream that writes down what it bills; answers may take two seconds."""
    environment = {
        "LLM_BASE_URL": _upstream.base_url,
        "LLM_API_KEY": "key-of-the-upstream",
        "LLM_MODELS": "gpt-4o,gpt-4o-mini",
        "API_KEYS": "web@house=key-of-a-client,app@house=key-of-another",
        "STREAM_DEADLINE_SECONDS": "2",
        "ENABLE_COST_THROTTLING": "true",
        "HIGH_COST_THRESHOLD_USD": "1",
        "NETWORK_COST_LIMIT_USD": "0",
        "DAILY_COST_LIMIT_USD": "5",
        "CHAT_RATE_LIMIT": "1000 per minute",
    }
    with Service(tmp_path_factory.mktemp("front"), redis_of("front").url, **environment) as service:
        yield service


@pytest.fixture
def upstream(_upstream):
    """The upstream, with no memory of other tests."""
    _upstream.ledger.clear()
    _upstream.scripts.clear()
    _upstream.behave()
    return _upstream


@pytest.fixture
def front(_in_front, upstream):
    """The service in front of it."""
    return _in_front


@pytest.fixture
def stored(redis_of, front):
    """The Redis of that service, emptied."""
    with client_of(redis_of("front")) as client:
        empty(client)
        yield client
