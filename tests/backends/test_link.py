import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from queue import Full

import pytest
import redis

from backends.errors import ConfigurationError, StoreBroken, StoreBusy, StoreUnavailable
from backends.store import connections
from backends.store.addresses import SET_BY_US, without_password
from backends.store.breaker import REST_SECONDS, UNWILLING_SECONDS
from backends.store.connections import POOL_SIZE, TIMEOUT_SECONDS, FreeConnections, execute, pack_in_python
from backends.store.failures import PoolExhausted
from backends.store.link import SILENT_SECONDS, Link
from flaskapp.ops.embedded_redis import find_server, free_port
from flaskapp.ops.running_redis import answers
from tests.faults.wire import SkippingClock, Told, server_that_says, wait_for

NOWHERE = "redis://127.0.0.1:1/0"


@pytest.fixture
def clock():
    return SkippingClock()


@pytest.fixture
def told():
    return Told()


@pytest.fixture
def new_link(clock, told):
    links = []

    def make(url, **options):
        links.append(Link(url, clock=clock, observer=told, **options))
        return links[-1]

    yield make
    for link in links:
        link.close()


@pytest.fixture
def link(new_link, redis_url):
    return new_link(redis_url)


def test_time_outs_retries_and_pool_are_pinned(link):
    """The library's defaults repeat a command ten times and wait for five seconds each."""
    pool = link._client.connection_pool
    options = pool.connection_kwargs
    assert isinstance(pool, redis.BlockingConnectionPool)
    assert (pool.max_connections, pool.timeout) == (POOL_SIZE, TIMEOUT_SECONDS) == (50, 0.5)
    assert options["socket_timeout"] == options["socket_connect_timeout"] == TIMEOUT_SECONDS
    connection = pool.get_connection()
    try:
        assert connection.retry.get_retries() == 0
        assert connection.retry_on_error == []
        assert connection.health_check_interval == 0
    finally:
        pool.release(connection)
    assert link._client.get_retry().get_retries() == 0


def free_connections(*those):
    free = FreeConnections(2)
    for each in those:
        free.put_nowait(each)
    return free


def test_the_connection_given_back_last_is_taken_first():
    free = free_connections("cold", "warm")
    assert [free.take(), free.get(timeout=0)] == [["warm"], "cold"]


def test_there_are_never_more_free_connections_than_the_pool_is_large():
    free = free_connections("one", "two")
    with pytest.raises(Full):
        free.put_nowait("three")
    assert free.queue == ["one", "two"]


def test_without_a_free_connection_a_caller_that_may_not_wait_fails_at_once():
    free = free_connections()
    assert free.take() == []
    for options in ({"block": False, "timeout": 60}, {"timeout": 0}):
        with pytest.raises(PoolExhausted):
            free.get(**options)


def test_a_connection_given_back_right_after_a_look_ends_the_wait():
    """Between the look and the wait: a caller that gives back then must know that another one will wait."""
    free = free_connections()
    givers = []

    class GivenBackAfterTheFirstLook(list):
        def pop(self):
            if not givers:
                givers.append(threading.Thread(target=free.put_nowait, args=["given back"]))
                givers[0].start()
                # It is there before the wait begins, and its notification comes only in the wait.
                wait_for(lambda: len(self) == 1)
                raise IndexError
            return super().pop()

    free.queue = GivenBackAfterTheFirstLook()
    taken = []
    waiter = threading.Thread(target=lambda: taken.append(free.get(timeout=60)), daemon=True)
    waiter.start()
    waiter.join(10)
    assert taken == ["given back"]
    givers[0].join()


def test_many_callers_share_few_connections(new_link, redis_url):
    link = new_link(redis_url, pool_size=2)
    all_at_once = threading.Barrier(16)

    def ask():
        all_at_once.wait()
        return [link.run(lambda client: execute(client, ("INCR", "count"))) for _ in range(50)]

    with ThreadPoolExecutor(16) as pool:
        replies = [each for asked in [pool.submit(ask) for _ in range(16)] for each in asked.result()]
    assert sorted(replies) == list(range(1, 801))
    assert len(link._client.connection_pool._connections) <= 2
    assert len(link._client.connection_pool.pool.queue) == 2


def test_a_new_connection_says_nothing_of_its_own(new_link, redis_url):
    link = new_link(redis_url, pool_size=1)
    link.run(lambda client: client.config_resetstat())
    link._client.connection_pool.disconnect()
    link.run(lambda client: client.get("x"))
    seen = link.run(lambda client: client.info("commandstats"))
    assert set(seen) - {"cmdstat_info"} <= {"cmdstat_get", "cmdstat_config|resetstat"}


def test_what_is_about_to_be_sent_is_handed_over_once_a_round_trip(new_link, redis_url):
    sent = []
    link = new_link(redis_url, before_each_send=sent.append)
    link.run(lambda client: execute(client, ("SET", "x", 1)))
    link.run(lambda client: client.get("x"))
    link.run(lambda client: client.pipeline(transaction=False).get("x").get("y").execute())
    get = b"*2\r\n$3\r\nGET\r\n$1\r\n%s\r\n"
    assert sent == [b"*3\r\n$3\r\nSET\r\n$1\r\nx\r\n$1\r\n1\r\n", get % b"x", get % b"x" + get % b"y"]


@pytest.mark.parametrize("words", [("PING",), ("SET", "clé", -5), ("EVAL", "", 0, "a\r\nb", 2**63)])
def test_a_command_is_packed_alike_with_and_without_hiredis(words):
    assert connections.pack_command is not pack_in_python
    assert pack_in_python(words) == connections.pack_command(words)


def test_replies_are_bytes(link):
    link.run(lambda client: client.set("x", "ä"))
    assert link.run(lambda client: client.get("x")) == "ä".encode()


@pytest.mark.parametrize("url", ["http://127.0.0.1:6379", "127.0.0.1:6379", "redis://127.0.0.1:port"])
def test_a_url_that_cannot_be_used_stops_the_start_in_one_line(new_link, url):
    with pytest.raises(ConfigurationError) as raised:
        new_link(url)
    assert str(raised.value).startswith("REDIS_URL: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("redis://h/0?nonsense=1", "got nonsense"),
        ("redis://h/0?=1", "got "),
        ("redis://h/0?nonsense", "name=value"),
        *((f"redis://h/0?{option}=1", "set by Tollgate; got ") for option in SET_BY_US),
        ("unix:///s?max_connections=1", "set by Tollgate; got max_connections"),
        ("redis://h/0?ssl_cert_reqs=none", "got ssl_cert_reqs"),
        ("redis://h/x", "the number of a database"),
        ("redis://h/0/1", "the number of a database"),
        ("unix://", "the path of a socket"),
        ("redis://h?db=x", "db has to be the number of a database"),
        ("redis://:hidden#@h", "user and password percent-encoded"),
        ("redis://:4711?x=hidden@h", "user and password percent-encoded"),
        ("redis://me:/4711?hidden@h", "user and password percent-encoded"),
        ("redis://me:4711/?hidden=hidden@h/0", "user and password percent-encoded"),
        ("redis://:hidden@h:port", "user and password percent-encoded"),
        ("redis://h?db=hidden@h", "db has to be the number of a database"),
        ("rediss://h?ssl_cert_reqs=zz", "ssl_cert_reqs has to be"),
        ("rediss://h?ssl_check_hostname=true&ssl_cert_reqs=none&retry=1", "set by Tollgate; got retry"),
    ],
)
def test_an_option_that_cannot_be_set_is_refused_by_its_name(new_link, url, why):
    with pytest.raises(ConfigurationError) as raised:
        new_link(url)
    assert str(raised.value).startswith("REDIS_URL: ")
    assert why in str(raised.value)
    assert str(raised.value).isprintable()
    assert "hidden" not in str(raised.value)
    assert "4711" not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    ["redis://h", "redis://h/", "redis://:p@h:1/15", "unix:///s?db=2&password=p", "rediss://h/1?ssl_cert_reqs=none"],
)
def test_what_an_address_may_say(new_link, url):
    new_link(url)


def test_fake_needs_no_server(new_link):
    link = new_link("fake://")
    assert link.run(lambda client: client.ping())
    # Replies have the form that the strategies read, which is not the newest protocol's.
    link.run(lambda client: client.zadd("key", {"1": 2}))
    assert link.run(lambda client: client.execute_command("ZRANGE", "key", 0, -1, "WITHSCORES")) == [b"1", b"2"]


def test_a_connection_that_the_server_closed_is_replaced_unnoticed(new_link, redis_url, told):
    link = new_link(redis_url, pool_size=3)
    link.run(lambda client: client.ping())
    with redis.Redis.from_url(redis_url) as other:
        other.client_kill_filter(_type="normal", skipme=True)
    assert link.run(lambda client: client.ping())
    assert list(told) == []


def test_whether_it_is_up(new_link, redis_url, clock, told):
    link = new_link(redis_url)
    assert (link.is_up, link.was_ever_up) == (False, False)
    link.run(lambda client: client.ping())
    assert (link.is_up, link.was_ever_up) == (True, True)
    down = new_link(NOWHERE)
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            down.run(lambda client: client.ping())
        clock.skip(REST_SECONDS + 0.01)
    assert (down.is_up, down.was_ever_up) == (False, False)
    assert [event.name for event in told] == ["store_lost"]


def test_a_server_that_is_full_is_not_called_up_for_a_moment(new_link, own_server, clock):
    link = new_link(own_server.url)
    link.run(lambda client: client.config_set("maxmemory", "1"))
    with pytest.raises(StoreUnavailable):
        link.run(lambda client: client.set("x", 1))
    assert link.run(lambda client: client.ping())
    assert not link.is_up
    clock.skip(UNWILLING_SECONDS)
    assert link.is_up


def test_while_it_rests_only_one_tries(new_link, clock):
    link = new_link(NOWHERE)
    with pytest.raises(StoreUnavailable):
        link.run(lambda client: client.ping())
    clock.skip(REST_SECONDS + 0.01)
    inside, leave, tried = threading.Event(), threading.Event(), []

    def hold(client):
        tried.append(client)
        inside.set()
        leave.wait(5)
        return "back"

    trying = threading.Thread(target=link.run, args=(hold,))
    trying.start()
    assert inside.wait(5)
    with pytest.raises(StoreUnavailable) as raised:
        link.run(hold)
    assert not raised.value.maybe_done
    leave.set()
    trying.join()
    assert len(tried) == 1
    assert link.run(lambda _client: "well") == "well"


def test_what_is_raised_in_a_command_and_is_no_fault_of_redis_gets_through(link):
    def command(client):
        raise KeyError("ours")

    with pytest.raises(KeyError):
        link.run(command)
    assert link.run(lambda client: client.ping())


# --- the server's time


def test_redis_time_is_learned_and_never_ahead(link, clock):
    for _ in range(20):
        guess_us = link.time_us()
        seconds, us = link.run(lambda client: client.time())
        assert 0 <= seconds * 1_000_000 + us - guess_us < 1_000_000


def test_a_slow_reply_does_not_spoil_what_a_quick_one_told(new_link, clock):
    link = new_link(NOWHERE)
    asked = clock.monotonic_seconds()
    link.learn_time(5_000_000, asked)
    before = link._offset
    asked = clock.monotonic_seconds()
    clock.skip(0.4)
    link.learn_time(5_200_000, asked)
    assert link._offset == before


def test_a_clock_that_was_set_is_followed(new_link, clock):
    link = new_link(NOWHERE)
    link.learn_time(5_000_000, clock.monotonic_seconds())
    link.learn_time(9_000_000_000, clock.monotonic_seconds())
    assert 9_000_000_000 - 1_000 <= link.time_us() < 9_001_000_000


# --- the server's age


def says(info):
    body = info.encode()
    return b"$%d\r\n%s\r\n" % (len(body), body)


@pytest.mark.parametrize("version", ["6.0.16", "5.0.7", "2.8.0"])
def test_an_older_redis_stops_the_start(new_link, version):
    with server_that_says(says(f"redis_version:{version}\r\n")) as url, pytest.raises(ConfigurationError) as raised:
        new_link(url).check_version()
    assert version in str(raised.value)


@pytest.mark.parametrize(
    ("info", "version"),
    [
        ("redis_version:6.2.0\r\n", "6.2.0"),
        ("redis_version:7.0.15\r\n", "7.0.15"),
        ("redis_version:7.2.4\r\nvalkey_version:9.1.2\r\n", "9.1.2"),
        ("redis_version:10.0.1\r\n", "10.0.1"),
    ],
)
def test_what_is_new_enough(new_link, info, version):
    with server_that_says(says(info)) as url:
        assert new_link(url).check_version() == version


@pytest.mark.parametrize("mode", ["cluster", "sentinel"])
def test_a_part_of_a_cluster_and_a_sentinel_stop_the_start(tmp_path, new_link, mode):
    (tmp_path / "settings").touch()
    # A node of a cluster listens 10,000 above it too.
    port = next(port for port in iter(free_port, None) if port < 55_000)
    options = {"cluster": ["--cluster-enabled", "yes"], "sentinel": ["--sentinel"]}[mode]
    command = [find_server(), tmp_path / "settings", "--port", str(port), "--dir", tmp_path, *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            wait_for(lambda: answers(f"redis://127.0.0.1:{port}/0"))
            with pytest.raises(ConfigurationError, match=f"stands alone.*{mode}") as raised:
                new_link(f"redis://127.0.0.1:{port}/0").check_version()
        finally:
            server.kill()
    assert "\n" not in str(raised.value)


def test_what_is_asked_within_a_time_has_so_long_in_all(link, clock):
    with link.within(1.0):
        assert link.wait_seconds() == TIMEOUT_SECONDS
        # What passes between two questions does not count.
        clock.skip(100)
        assert link.wait_seconds() == TIMEOUT_SECONDS
        link.run(lambda _: clock.skip(0.8))
        assert 0 < link.wait_seconds() <= 0.2
        link.run(lambda client: client.get("x"))
        link.run(lambda _: clock.skip(0.2))
        with pytest.raises(StoreBusy) as raised:
            link.run(lambda _: pytest.fail("nothing is asked any more"))
        assert raised.value.maybe_done
        assert link.with_whole_timeout(link.wait_seconds) == TIMEOUT_SECONDS
        link.with_whole_timeout(lambda: link.run(lambda client: client.get("x")))
        assert link.wait_seconds() <= 0
    assert link.wait_seconds() == TIMEOUT_SECONDS
    link.run(lambda client: client.get("x"))


def test_the_time_of_one_caller_is_not_that_of_a_thread_that_it_starts(link, clock):
    answers = []
    with link.within(0.1):
        link.run(lambda _: clock.skip(1))
        thread = threading.Thread(target=lambda: answers.append(link.run(lambda client: client.echo("me"))))
        thread.start()
        thread.join()
    assert answers == [b"me"]


def test_a_command_of_many_round_trips_ends_when_the_time_is_over(link, clock):
    asked = []

    def command(client):
        for number in range(3):
            asked.append(client.echo(str(number)))
            clock.skip(0.6)

    with link.within(1.0), pytest.raises(StoreBusy):
        link.run(command)
    assert asked == [b"0", b"1"]
    assert link.run(lambda client: client.echo("a whole connection")) == b"a whole connection"


def test_a_wait_that_was_cut_short_says_nothing_about_redis(new_link, own_server, told, clock):
    link = new_link(own_server.url)
    link.run(lambda client: client.ping())
    own_server.freeze()
    with link.within(1.0):
        link.run(lambda _: clock.skip(0.95))
        with pytest.raises(StoreBusy) as raised:
            link.run(lambda client: client.ping())
    own_server.thaw()
    assert raised.value.maybe_done
    assert told.named("store_lost") == []
    # No breaker is open, and the connection that still had an answer to come is not used again.
    assert link.run(lambda client: client.echo("next")) == b"next"


def test_a_cut_wait_is_whole_again_for_the_next_caller(link, clock):
    with link.within(1.0):
        link.run(lambda _: clock.skip(0.95))
        link.run(lambda client: client.ping())
    link.run(lambda client: client.ping())
    connection = link._client.connection_pool.get_connection()
    try:
        assert connection._sock.gettimeout() == TIMEOUT_SECONDS
    finally:
        link._client.connection_pool.release(connection)


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("redis://127.0.0.1:6379/0", "redis://127.0.0.1:6379/0"),
        ("rediss://me:p%40ss@example.org:1/2?ssl_password=x", "rediss://example.org:1/2"),
        ("redis://:secret@localhost", "redis://localhost"),
        ("unix:///tmp/redis.sock?password=secret", "unix:///tmp/redis.sock"),
        ("redis://h/0?password=sec@ret", "redis://h/0"),
    ],
)
def test_where_it_is_can_be_told(url, place):
    assert without_password(url) == place


def test_a_missing_right_is_counted_each_time_and_logged_once_a_minute(own_server, new_link, clock, told):
    with redis.Redis(port=own_server.port) as look:
        look.acl_setuser("weak", enabled=True, passwords=["+pw"], keys=["*"], commands=["+@all", "-get", "-mget"])
    link = new_link(f"redis://weak:pw@127.0.0.1:{own_server.port}/0")

    def ask(command):
        with pytest.raises(StoreBroken):
            link.run(command)
        return told.named("store_broken")[-1].get("is_first", True)

    asked = [ask(lambda client: client.get("x")) for _ in range(3)]
    assert asked == [True, False, False]
    assert ask(lambda client: client.mget("x"))
    clock.skip(SILENT_SECONDS)
    assert ask(lambda client: client.get("x"))
    assert len(told.named("store_broken")) == 5
    link.run(lambda client: client.set("x", "y"))
    assert ask(lambda client: client.get("x")) is False
    assert link.is_up  # the rest works
