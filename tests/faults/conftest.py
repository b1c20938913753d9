import pytest
import redis

from backends.guard import EmergencyBudget, FailurePolicy, Guard
from backends.store.link import Link
from backends.strategies.atomic import AtomicBackend
from backends.strategies.memory import MemoryBackend
from tests.faults.wire import Proxy, SkippingClock, Told


@pytest.fixture
def clock():
    return SkippingClock()


@pytest.fixture
def told():
    return Told()


@pytest.fixture
def look(own_server):
    """A client of the test's own, without time-outs worth the name."""
    with redis.Redis.from_url(own_server.url, socket_timeout=10) as client:
        yield client


@pytest.fixture
def new_link(own_server, clock, told):
    links = []

    def make(url=own_server.url, **options):
        links.append(Link(url, clock=clock, observer=told, **options))
        return links[-1]

    yield make
    for link in links:
        link.close()


@pytest.fixture
def proxy(own_server):
    proxy = Proxy(own_server.port)
    with proxy.running() as url:
        proxy.url = url
        yield proxy


@pytest.fixture
def new_guard(new_link, clock, told, tmp_path):
    guards = []

    def make(link=None, *, primary=None, is_open=True, emergency_nanousd=10**9):
        link = link or new_link()
        guard = Guard(
            primary or AtomicBackend(link),
            MemoryBackend(clock),
            link=link,
            emergency=EmergencyBudget(tmp_path / "emergency", clock),
            clock=clock,
            observer=told,
            policy=lambda: FailurePolicy(is_open, emergency_nanousd),
        )
        guards.append(guard)
        return guard

    yield make
    for guard in guards:
        guard.close()
