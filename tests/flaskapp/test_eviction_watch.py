"""A change of what Redis does when it is full is found while the service runs, and logged once."""

from contextlib import closing

import pytest
import redis

from backends.conformance.cases import US
from backends.conformance.harness import ManualClock
from backends.store.link import Link
from flaskapp.ops.eviction_watch import LOOK_SECONDS, EvictionWatch


@pytest.fixture
def raw(own_server):
    with redis.Redis(port=own_server.port) as client:
        yield client


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def new_watch(own_server, clock):
    """Makes the watch of a worker; what it has reported is `reports`."""
    links = []

    def make():
        links.append(Link(own_server.url, clock=clock))
        reports = []
        watch = EvictionWatch(links[-1], clock, lambda policy, is_first: reports.append((policy, is_first)))
        watch.reports = reports
        return watch

    yield make
    for link in links:
        link.close()


def pass_time(clock, seconds=LOOK_SECONDS):
    clock.us += int(seconds * US)


def test_a_change_is_found_within_the_time_that_is_stated_and_reported_once(new_watch, raw, clock):
    watch = new_watch()
    pass_time(clock)
    watch.look()
    raw.config_set("maxmemory-policy", "allkeys-lru")
    pass_time(clock, LOOK_SECONDS - 1)
    watch.look()
    assert watch.reports == []
    for _ in range(4):
        pass_time(clock)
        watch.look()
    assert watch.reports == [("allkeys-lru", True)]
    raw.config_set("maxmemory-policy", "noeviction")
    pass_time(clock)
    watch.look()
    raw.config_set("maxmemory-policy", "volatile-ttl")
    pass_time(clock)
    watch.look()
    assert watch.reports == [("allkeys-lru", True), ("volatile-ttl", True)]


def test_of_several_workers_one_is_the_first(new_watch, raw, clock, monkeypatch, tmp_path):
    monkeypatch.setenv("TOLLGATE_WORKER", "0")
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    workers = [new_watch() for _ in range(3)]
    raw.config_set("maxmemory-policy", "allkeys-lru")
    pass_time(clock)
    for worker in workers:
        worker.look()
    assert [each.reports for each in workers] == [[("allkeys-lru", number == 0)] for number in range(3)]


def test_a_server_that_does_not_say_is_no_alarm(own_server, raw, clock):
    raw.acl_setuser("default", commands=["-info"], enabled=True)
    events = []
    with closing(Link(own_server.url, clock=clock, observer=events.append)) as link:
        watch = EvictionWatch(link, clock, lambda policy, is_first: events.append((policy, is_first)))
        pass_time(clock)
        watch.look()
    raw.acl_setuser("default", commands=["+info"], enabled=True)
    assert events == []


def test_a_redis_that_is_away_is_asked_again(new_watch, own_server, raw, clock):
    watch = new_watch()
    raw.config_set("maxmemory-policy", "allkeys-lru")
    own_server.stop()
    pass_time(clock)
    watch.look()
    assert watch.reports == []
