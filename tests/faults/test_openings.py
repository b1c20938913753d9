"""A connection cannot be opened, or one reply is lost: no outage while other connections work."""

import errno
import os
import resource
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from backends.conformance.cases import COST, make_ask
from backends.errors import StoreBusy, StoreError, StoreUnavailable, ThrottleUnavailable
from backends.store import connections
from backends.store.connections import OPENING_REST_SECONDS, POOL_SIZE, TIMEOUT_SECONDS, conversation
from tests.faults.wire import wait_for

CALLERS = 12


def opened(link, number):
    """Have so many connections open."""
    all_at_once = threading.Barrier(number)

    def hold_one(client):
        with conversation(client) as send:
            all_at_once.wait()
            send([("PING",)])

    with ThreadPoolExecutor(number) as pool:
        for each in [pool.submit(link.run, hold_one) for _ in range(number)]:
            each.result()


def at_once(link, callers=CALLERS):
    """What so many callers get that all hold a connection at once where they can: a reply, or an error's type."""
    begin = threading.Barrier(callers)

    def ask():
        begin.wait()
        try:
            return link.run(lambda client: client.eval("for i = 1, 20000 do end return 7", 0))
        except StoreError as error:
            return type(error)

    with ThreadPoolExecutor(callers) as pool:
        return [each.result() for each in [pool.submit(ask) for _ in range(callers)]]


def open_sockets(link):
    return [each._sock for each in link._client.connection_pool._connections if each._sock is not None]


def fills_the_server(look, *_):
    look.config_set("maxclients", len(look.client_list()))
    return lambda: look.config_set("maxclients", 10_000)


def takes_all_descriptors(*_):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.dup(0)]
    # Low, so that it does not take long to fill.
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken[0] + 100, before[1]))
    with suppress(OSError):
        while True:
            taken.append(os.dup(0))

    def mend():
        for each in taken:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)

    return mend


def takes_the_name_away(_look, monkeypatch):
    def refuse(*_):
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(connections.redis.connection.socket, "getaddrinfo", refuse)
    return monkeypatch.undo


def lets_the_name_wait(_look, monkeypatch):
    over = threading.Event()

    def wait(*_):
        over.wait(20)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(connections.redis.connection.socket, "getaddrinfo", wait)

    def mend():
        monkeypatch.undo()
        over.set()

    return mend


@pytest.mark.parametrize("spoil", [fills_the_server, takes_all_descriptors, takes_the_name_away, lets_the_name_wait])
def test_what_cannot_be_opened_is_no_outage_while_others_are_open(own_server, look, new_link, told, monkeypatch, spoil):
    link = new_link(own_server.url.replace("127.0.0.1", "localhost"))
    opened(link, 3)
    before = open_sockets(link)
    mend = spoil(look, monkeypatch)
    try:
        replies = at_once(link)
        assert set(replies) <= {7, StoreBusy}
        assert replies.count(7) >= CALLERS // 2
        assert open_sockets(link) == before, "those that work are not cut"
        assert link.is_up
    finally:
        mend()
    assert told.named("store_lost") == []
    assert told.named("store_broken") == []


def test_a_flood_on_a_full_server_opens_no_guard(own_server, look, new_link, new_guard, tmp_path):
    link = new_link()
    guard = new_guard(link)
    guard.reserve(make_ask("before", COST))
    mend = fills_the_server(look)

    def ask(number):
        try:
            return guard.reserve(make_ask(f"r{number}", 1, identifier=f"who{number}")).backend
        except ThrottleUnavailable:
            return 503

    with ThreadPoolExecutor(30) as pool:
        answers = set(pool.map(ask, range(200)))
    mend()
    assert answers <= {"atomic", 503}
    assert "atomic" in answers
    assert not (tmp_path / "emergency").exists()


def test_new_ones_are_opened_again_when_it_is_over(own_server, look, new_link, clock):
    link = new_link()
    opened(link, 1)
    mend = fills_the_server(look)
    at_once(link, 4)
    mend()
    clock.skip(OPENING_REST_SECONDS)
    opened(link, 4)
    assert len(open_sockets(link)) == 4


def test_without_an_open_one_a_server_that_takes_none_is_an_outage(own_server, look, new_link, told):
    mend = fills_the_server(look)
    try:
        with pytest.raises(StoreUnavailable):
            new_link().run(lambda client: client.ping())
    finally:
        mend()
    assert len(told.named("store_lost")) == 1


def test_without_a_descriptor_the_service_is_busy_and_redis_is_not_away(own_server, new_link, told):
    link = new_link()
    mend = takes_all_descriptors()
    try:
        with pytest.raises(StoreBusy, match=os.strerror(errno.EMFILE)):
            link.run(lambda client: client.ping())
    finally:
        mend()
    assert told.named("store_lost") == []
    assert link.run(lambda client: client.ping())


def test_a_name_that_nobody_looks_up_is_waited_for_as_long_as_for_a_reply(own_server, new_link, monkeypatch, clock):
    link = new_link(own_server.url.replace("127.0.0.1", "localhost"))
    mend = lets_the_name_wait(None, monkeypatch)
    asked_at = clock.monotonic_seconds()
    with pytest.raises(StoreUnavailable, match="name was not found in time"):
        link.run(lambda client: client.ping())
    assert clock.monotonic_seconds() - asked_at < 2, "the contract's time for the beginning of an answer"
    mend()
    wait_for(lambda: "tollgate-connect" not in {thread.name for thread in threading.enumerate()})


def test_one_lost_reply_is_no_outage(own_server, proxy, new_link, told):
    link = new_link(proxy.url)
    opened(link, 2)
    lost = iter([True, True])
    # Lost twice: the link says it once more by itself.
    proxy.lose = lambda request: b"INCR" in request and next(lost, False)
    with pytest.raises(StoreUnavailable) as raised:
        link.run(lambda client: client.incr("x"))
    assert raised.value.maybe_done
    assert link.is_up
    assert link.run(lambda client: client.ping())
    assert told.named("store_lost") == []


def test_a_reply_that_never_comes_on_one_connection_is_no_outage(own_server, look, new_link, told):
    link = new_link()
    opened(link, 2)
    with pytest.raises(StoreUnavailable):
        link.run(lambda client: client.blpop("nothing", 3 * TIMEOUT_SECONDS))
    assert link.is_up
    assert told.named("store_lost") == []


def test_where_the_probe_is_lost_too_it_is_an_outage(proxy, new_link, told):
    link = new_link(proxy.url)
    opened(link, 2)
    proxy.lose = lambda _request: True
    with pytest.raises(StoreUnavailable):
        link.run(lambda client: client.incr("x"))
    assert not link.is_up
    assert len(told.named("store_lost")) == 1


def test_of_many_lost_replies_few_answers_are_bridged(proxy, new_link, new_guard, clock):
    """One reply in twenty; of a silent connection, as a network that drops packets leaves it."""
    link = new_link(proxy.url, timeout_seconds=0.05)
    guard = new_guard(link)
    seen = iter(range(10**6))
    proxy.swallow = lambda _request: next(seen) % 20 == 19
    backends = [guard.reserve(make_ask(f"r{number}", 1, identifier=f"who{number}")).backend for number in range(200)]
    assert 0 < backends.count("emergency") <= 20


def test_no_caller_gets_a_connection_that_is_just_looked_at(own_server, new_link):
    """Under gevent the look gives way to other callers, and two of them must not read from one connection."""
    link = new_link()
    opened(link, 3)
    pool, seen = link._client.connection_pool, []
    for connection in pool._connections:
        connection.can_read = lambda connection=connection: seen.append(connection in pool.pool.queue)
    pool.close_dead()
    assert seen == [False] * 3
    assert len(pool.pool.queue) == POOL_SIZE
