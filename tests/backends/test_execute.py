"""`connections.execute`: one command, by a shorter way than the client library's, and no reply ever read by another."""

import threading

import pytest
import redis

from backends.clock import SystemClock
from backends.errors import StoreBroken, StoreBusy
from backends.store.connections import execute
from backends.store.link import Link
from backends.store.scripts import Script


class Interrupted(BaseException):
    """What a signal handler or a killed greenlet raises."""


class Interruptible(redis.Connection):
    interrupt_next = False

    def read_response(self, *args, **kwargs):
        if Interruptible.interrupt_next:
            Interruptible.interrupt_next = False
            raise Interrupted
        return super().read_response(*args, **kwargs)


@pytest.fixture
def link(redis_url):
    link = Link(redis_url, clock=SystemClock(), pool_size=1, timeout_seconds=0.2, connection_class=Interruptible)
    yield link
    link.close()


def connection_id(link):
    return link.run(lambda client: execute(client, ("CLIENT", "ID")))


def test_words_are_texts_and_numbers_and_the_reply_is_bytes(link):
    assert link.run(lambda client: execute(client, ("SET", "clé", 5))) == b"OK"
    assert link.run(lambda client: execute(client, ("GET", "clé"))) == b"5"
    assert link.run(lambda client: execute(client, ("GET", "missing"))) is None


def test_an_error_is_a_reply_and_its_connection_stays(link):
    before = connection_id(link)
    for _ in range(3):
        with pytest.raises(StoreBroken, match=r"NOSCRIPT|No matching script"):
            link.run(lambda client: execute(client, ("EVALSHA", "0" * 40, 0)))
    assert connection_id(link) == before


def test_the_reply_of_an_interrupted_caller_is_read_by_no_other(link):
    link.run(lambda client: execute(client, ("SET", "one", "of the one")))
    link.run(lambda client: execute(client, ("SET", "other", "of the other")))
    Interruptible.interrupt_next = True
    with pytest.raises(Interrupted):
        link.run(lambda client: execute(client, ("GET", "one")))
    assert link.run(lambda client: execute(client, ("GET", "other"))) == b"of the other"
    assert link.run(lambda client: client.get("other")) == b"of the other"


def test_a_connection_that_redis_closed_meanwhile_is_replaced(link, redis_url):
    before = connection_id(link)
    with redis.Redis.from_url(redis_url) as other:
        other.client_kill_filter(_id=before)
    assert link.run(lambda client: execute(client, ("PING",))) == b"PONG"
    assert connection_id(link) != before


def test_a_caller_that_finds_no_free_connection_in_time_is_busy(link):
    holds, may_go = threading.Event(), threading.Event()

    def hold(client):
        connection = client.connection_pool.borrow()
        holds.set()
        may_go.wait(10)
        client.connection_pool.give_back(connection)

    holder = threading.Thread(target=link.run, args=(hold,))
    holder.start()
    assert holds.wait(10)
    with pytest.raises(StoreBusy):
        link.run(lambda client: execute(client, ("PING",)))
    may_go.set()
    holder.join()
    assert link.run(lambda client: execute(client, ("PING",))) == b"PONG"


def test_fake_servers_are_asked_in_the_ordinary_way():
    link = Link("fake://", clock=SystemClock())
    assert link.run(lambda client: execute(client, ("SET", "a", 1))) in {True, b"OK"}
    assert link.run(lambda client: execute(client, ("GET", "a"))) == b"1"
    link.close()


def test_a_script_that_the_server_has_forgotten_is_sent_again(link, redis_url):
    script = Script("consume.lua")
    with redis.Redis.from_url(redis_url) as other:
        other.script_flush()
    assert link.run(lambda client: script.run(client, ["llm:challenge:none"], ["x"])) == [1]
    assert link.run(lambda client: script.run(client, ["llm:challenge:none"], ["x"])) == [1]
