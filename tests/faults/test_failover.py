"""The primary changes under one address: old connections still lead to the old one, which is a replica now."""

import pytest

from backends.conformance.cases import COST, make_ask
from backends.errors import StoreError
from backends.guard import EMERGENCY
from tests.embedded import FragileServer


@pytest.fixture
def other_server(tmp_path):
    with FragileServer(tmp_path / "other-redis") as server:
        yield server


def fails_over(look, proxy, other_server):
    look.replicaof("127.0.0.1", str(other_server.port))
    proxy.port = other_server.port


def test_after_a_failover_the_next_connections_lead_to_the_new_primary(
    own_server, other_server, look, proxy, new_link, new_guard
):
    link = new_link(proxy.url)
    guard = new_guard(link)
    assert guard.reserve(make_ask("before", COST)).backend == "atomic"
    fails_over(look, proxy, other_server)
    # The one that meets the replica is bridged. No clock moves, and the next is decided by the books.
    assert guard.reserve(make_ask("r0", COST)).backend == EMERGENCY
    assert guard.reserve(make_ask("r1", COST)).backend == "atomic"


def test_a_replica_that_has_lost_its_primary_is_left_too(own_server, other_server, look, proxy, new_link):
    link = new_link(proxy.url)
    link.run(lambda client: client.set("x", 1))
    look.config_set("replica-serve-stale-data", "no")
    fails_over(look, proxy, other_server)
    with pytest.raises(StoreError):
        link.run(lambda client: client.get("x"))
    assert link.run(lambda client: client.get("x")) is None
