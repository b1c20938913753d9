"""Exchanges over real sockets, with servers that do what they should not. The last test runs all of it under gevent."""

import contextlib
import gc
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from backends.clock import SystemClock
from flaskapp.llm import UpstreamNotTaken, exchange
from flaskapp.llm.exchange import Connections, Exchange, ExchangeBroken, ExchangeTimeout, NotSent, Proxy
from flaskapp.llm.openai_compatible import OpenAICompatibleModel, _tls_context
from tests.models import model_request
from tests.servers import signed_by_itself, wait_until

HEAD = b"HTTP/1.1 200 OK\r\n"
REQUEST = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nhi"
WHOLE = HEAD + b"Content-Length: 2\r\n\r\nab"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
CLOCK = SystemClock()


class Server:
    """Calls `serve(connection, number)` with each connection, in a thread of its own, after TLS where it has any."""

    def __init__(self, serve, *, host="127.0.0.1", tls=None, backlog=50):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.listener = socket.create_server((host, 0), family=family, backlog=backlog)
        self.port = self.listener.getsockname()[1]
        self.serve, self.tls = serve, tls
        self.requests = []
        self.closing = threading.Event()
        self.threads = [threading.Thread(target=self.accept, daemon=True)]
        self.threads[0].start()

    def accept(self):
        number = 0
        self.listener.settimeout(0.02)
        while not self.closing.is_set():
            with contextlib.suppress(TimeoutError):
                connection, _ = self.listener.accept()
                connection.settimeout(10)
                thread = threading.Thread(target=self.one, args=(connection, number), daemon=True)
                self.threads.append(thread)
                thread.start()
                number += 1

    def one(self, connection, number):
        with contextlib.suppress(OSError), connection:
            if self.tls is not None:
                with self.tls.wrap_socket(connection, server_side=True) as encrypted:
                    self.serve(encrypted, number)
            else:
                self.serve(connection, number)

    def close(self):
        self.closing.set()
        for thread in self.threads:
            thread.join(10)
        self.listener.close()


@pytest.fixture
def start():
    servers, pools = [], []

    def begin(serve, *, client_tls=None, name=None, host="127.0.0.1", **options):
        servers.append(Server(serve, host=host, **options))
        pools.append(Connections(name or host, servers[-1].port, client_tls, clock=CLOCK))
        servers[-1].pool = pools[-1]
        return servers[-1]

    yield begin
    for pool in pools:
        pool.close()
    for server in servers:
        server.close()


def request_of(connection):
    """A whole request; empty at the end."""
    received = b""
    while not received.endswith(b"hi"):
        part = connection.recv(65_536)
        if not part:
            return b""
        received += part
    return received


def answering(*parts, pause_seconds=0.0):
    """Answers every request of a connection with the parts, and closes it where the last is None."""

    def serve(connection, _):
        while request_of(connection):
            for part in parts:
                if part is None:
                    return
                connection.sendall(part)
                time.sleep(pause_seconds)

    return serve


def hold(connection):
    """Until the client has gone."""
    while connection.recv(65_536):
        pass


class Begun(Exchange):
    def __init__(self, pool, ends_seconds):
        super().__init__(pool, CLOCK)
        self.ends_seconds = ends_seconds

    def send(self, request):
        super().send(request, self.ends_seconds)


def begin(pool, deadline_seconds=10.0):
    return Begun(pool, CLOCK.monotonic_seconds() + deadline_seconds)


def body_of(one):
    body = b""
    while (part := one.read(10)) != b"":
        body += part or b""
    return body


def rest_of(one):
    """What has come, whether then it ends or is broken off."""
    body = b""
    with contextlib.suppress(ExchangeBroken):
        while part := one.read(10):
            body += part
    return body


def whole(pool, request=REQUEST):
    one = begin(pool)
    try:
        one.send(request)
        return one.status, body_of(one)
    finally:
        one.release()


@contextlib.contextmanager
def within(seconds):
    started = time.perf_counter()
    yield
    assert time.perf_counter() - started < seconds


# --- what comes back


def test_one_connection_serves_one_exchange_after_the_other(start):
    server = start(answering(WHOLE))
    assert [whole(server.pool) for _ in range(3)] == [(200, b"ab")] * 3
    assert len(server.threads) == 2
    assert (server.pool.in_use, server.pool.idle) == (0, 1)


def test_a_response_without_a_length_ends_with_its_connection(start):
    server = start(answering(HEAD + b"\r\nabc", b"def", None, pause_seconds=0.02))
    assert whole(server.pool) == (200, b"abcdef")
    assert (server.pool.in_use, server.pool.idle) == (0, 0)


@pytest.mark.parametrize(
    "interim", [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 E\r\nContent-Type: text/x\r\n\r\n"]
)
def test_an_interim_response_is_not_the_response(start, interim):
    server = start(answering(interim, interim + HEAD + b"Content-Length: 2\r\nContent-Type: A/B ; c\r\n\r\nab"))
    one = begin(server.pool)
    one.send(REQUEST)
    assert (one.status, one.media_type, body_of(one)) == (200, "a/b", b"ab")
    one.release()
    assert server.pool.idle == 1


@pytest.mark.parametrize("extra", [b"x", b"HTTP/1.1 500 No\r\nContent-Length: 3\r\n\r\nbad", b"\0" * 70_000])
@pytest.mark.parametrize("pause_seconds", [0, 0.05])
def test_what_comes_after_a_response_is_not_taken_for_the_next(start, extra, pause_seconds):
    def serve(connection, number):
        while request_of(connection):
            connection.sendall(WHOLE + b"" if number else (WHOLE if pause_seconds else WHOLE + extra))
            if pause_seconds and not number:
                time.sleep(pause_seconds)
                connection.sendall(extra)
                sent.set()

    sent = threading.Event()
    server = start(serve)
    assert whole(server.pool) == (200, b"ab")
    if pause_seconds:
        assert sent.wait(5)
    assert whole(server.pool) == (200, b"ab")
    assert len(server.threads) == 3, "the second came over a connection of its own"


def test_the_fields_after_a_body_are_dropped(start):
    server = start(answering(CHUNKED + b"2\r\nab\r\n0\r\nContent-Type: text/evil\r\n\r\n"))
    one = begin(server.pool)
    one.send(REQUEST)
    assert (body_of(one), one.media_type) == (b"ab", None)
    one.release()


def test_what_came_before_rubbish_is_handed_out_and_then_it_breaks_at_once(start):
    def serve(connection, _):
        request_of(connection)
        connection.sendall(CHUNKED + b"2\r\nab\r\nrubbish")
        hold(connection)

    server = start(serve)
    one = begin(server.pool)
    one.send(REQUEST)
    assert one.read(10) == b"ab"
    with within(1), pytest.raises(ExchangeBroken):
        one.read(10)
    one.release()
    assert (server.pool.in_use, server.pool.idle) == (0, 0)


@pytest.mark.parametrize("response", [HEAD + b"Content-Length: 5\r\n\r\nab", CHUNKED + b"5\r\nab"])
def test_a_body_that_is_cut_broke_off(start, response):
    server = start(answering(response, None))
    one = begin(server.pool)
    one.send(REQUEST)
    assert one.read(10) == b"ab"
    with pytest.raises(ExchangeBroken) as caught:
        one.read(10)
    assert not isinstance(caught.value, ExchangeTimeout)
    one.release()


@pytest.mark.parametrize(
    "response",
    [
        b"",
        b"HTTP/1.1 200",
        b"hello world\r\n\r\n",
        b"HTTP/1.1 000 OK\r\nContent-Length: 2\r\n\r\nab" + WHOLE,
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nab",
        b"HTTP/1.1 200 OK\nContent-Length: 2\n\nab",
        HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nab",
        HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Content-Length: -1\r\n\r\nab",
        HEAD + b"Content-Length: 99999999999999999999999\r\n\r\nab",
    ],
)
def test_what_is_no_response_broke_off(start, response):
    server = start(answering(response, None))
    one = begin(server.pool)
    with pytest.raises(ExchangeBroken):
        one.send(REQUEST)
    one.release()
    assert (server.pool.in_use, server.pool.idle) == (0, 0)


# --- what has no end


def endless(first, then):
    def serve(connection, _):
        request_of(connection)
        connection.sendall(first)
        while True:
            connection.sendall(then)

    return serve


@pytest.mark.parametrize(
    ("first", "then"),
    [(HEAD, b"X-More: x\r\n" * 100), (HEAD + b"X: ", b"x" * 5_000), (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100)],
    ids=["fields", "one_field", "interim_responses"],
)
def test_an_endless_head_is_given_up(start, first, then):
    server = start(endless(first, then))
    one = begin(server.pool)
    with within(5), pytest.raises(ExchangeBroken, match="too large"):
        one.send(REQUEST)
    one.release()


@pytest.mark.parametrize(
    ("first", "then"),
    [(CHUNKED + b"2\r\nab\r\n0\r\n", b"X-More: x\r\n" * 100), (CHUNKED + b"2\r\nab\r\n2;", b"x" * 5_000)],
    ids=["trailers", "chunk_extension"],
)
def test_a_body_of_which_nothing_more_comes_is_given_up(start, first, then):
    server = start(endless(first, then))
    one = begin(server.pool)
    one.send(REQUEST)
    with within(5), pytest.raises(ExchangeBroken, match="too little"):
        body_of(one)
    one.release()


def test_what_trickles_and_is_no_body_does_not_prolong_a_read(start):
    def serve(connection, _):
        request_of(connection)
        connection.sendall(CHUNKED + b"2;")
        with contextlib.suppress(OSError):
            for _ in range(100):
                connection.sendall(b"x")
                time.sleep(0.02)
            connection.sendall(b"\r\nab\r\n")
        hold(connection)

    server = start(serve)
    one = begin(server.pool)
    one.send(REQUEST)
    with within(1):
        assert one.read(0.2) is None
    assert one.read(10) == b"ab"
    one.release()


def test_silence_gives_nothing_and_then_the_deadline(start):
    def serve(connection, _):
        request_of(connection)
        connection.sendall(CHUNKED + b"2\r\nab\r\n")
        hold(connection)

    server = start(serve)
    one = begin(server.pool, deadline_seconds=0.4)
    one.send(REQUEST)
    assert one.read(0.1) == b"ab"
    assert one.read(0) is None
    assert one.read(0.05) is None
    with within(2), pytest.raises(ExchangeTimeout):
        one.read(10)
    with pytest.raises(ExchangeTimeout):
        one.read(0)
    one.release()


def test_a_server_that_does_not_read_the_request_is_given_up_at_the_deadline(start):
    server = start(lambda _connection, _: server.closing.wait(10))
    one = begin(server.pool, deadline_seconds=0.3)
    with within(3), pytest.raises(ExchangeTimeout):
        one.send(b"x" * 50_000_000)
    one.release()


def test_a_refusal_before_the_request_was_read_is_the_response(start):
    def serve(connection, _):
        connection.recv(1_000)
        connection.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
        connection.shutdown(socket.SHUT_WR)
        time.sleep(0.2)

    server = start(serve)
    assert whole(server.pool, b"x" * 20_000_000) == (413, b"no")
    assert (server.pool.in_use, server.pool.idle) == (0, 0), "half a request was sent over it"


# --- connecting


@pytest.fixture
def full():
    """The address of a server that takes no more connections: to connect to it waits."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, contextlib.ExitStack() as waiting:
        for _ in range(3):
            client = waiting.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield listener.getsockname()


def test_a_server_that_does_not_take_the_connection_was_not_reached(full):
    pool = Connections(*full, None, clock=CLOCK)
    with within(3), pytest.raises(NotSent):
        begin(pool, deadline_seconds=0.3).send(REQUEST)
    assert pool.in_use == 0


def named(monkeypatch, *addresses):
    """A name with these addresses."""
    found = [
        (socket.AF_INET6 if ":" in each[0] else socket.AF_INET, socket.SOCK_STREAM, 6, "", each) for each in addresses
    ]
    look_up(monkeypatch, lambda: found)


def look_up(monkeypatch, answer):
    """Names are looked up by `answer`; no name is an address."""
    monkeypatch.setattr(exchange, "_look_up", lambda _ask, _host, _port, flags=0: no_address() if flags else answer())


def no_address():
    raise socket.gaierror("no address")


def test_each_address_of_a_name_gets_a_share_of_the_time(start, full, monkeypatch):
    server = start(answering(WHOLE), name="many")
    monkeypatch.setattr(exchange, "_CONNECT_SECONDS", 1.0)
    refused = ("127.0.0.1", free_port())
    named(monkeypatch, full, refused, ("127.0.0.1", server.port))
    with within(2):
        assert whole(server.pool) == (200, b"ab")
    named(monkeypatch, *[full] * 10)
    server.pool.close()
    with within(2), pytest.raises(NotSent):
        whole(server.pool)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_name_without_an_address_was_not_reached(start, monkeypatch):
    server = start(answering(WHOLE), name="none")
    named(monkeypatch)
    with pytest.raises(NotSent):
        whole(server.pool)
    look_up(monkeypatch, no_address)
    with pytest.raises(NotSent, match="no address"):
        whole(server.pool)


def test_a_look_up_that_takes_too_long_is_given_up(start, monkeypatch):
    server, go_on = start(answering(WHOLE), name="slow"), threading.Event()
    look_up(monkeypatch, lambda: go_on.wait(10))
    with within(3), pytest.raises(NotSent, match="not looked up"):
        begin(server.pool, deadline_seconds=0.2).send(REQUEST)
    go_on.set()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1"])
def test_names_and_addresses_of_both_kinds(start, host):
    try:
        server = start(answering(WHOLE), host="::1" if ":" in host else "127.0.0.1", name=host)
    except OSError:
        pytest.skip("no IPv6 here")
    assert whole(server.pool) == (200, b"ab")


def test_where_all_connections_are_in_use_there_is_none(start, monkeypatch):
    monkeypatch.setattr(exchange, "_CONNECTIONS", 2)
    monkeypatch.setattr(exchange, "_POOL_WAIT_SECONDS", 0.05)
    server = start(answering(WHOLE))
    used = [begin(server.pool) for _ in range(2)]
    for one in used:
        one.send(REQUEST)
    with pytest.raises(NotSent, match="in use"):
        begin(server.pool).send(REQUEST)
    used[0].release()
    used[0].release()
    assert whole(server.pool) == (200, b"ab")
    used[1].release()
    for _ in range(5):
        with pytest.raises(NotSent):
            begin(server.pool, deadline_seconds=-1).send(REQUEST)
    assert whole(server.pool) == (200, b"ab")


# --- idle connections


class HandClock:
    seconds = 0.0

    def monotonic_seconds(self):
        return self.seconds


def test_a_connection_that_was_idle_for_long_is_not_used_again_and_is_closed(start):
    server = start(answering(WHOLE))
    clock = HandClock()
    pool = Connections("127.0.0.1", server.port, None, clock=clock)
    first, second = (Exchange(pool, clock) for _ in range(2))
    for one in (first, second):
        one.send(REQUEST, 60)
        assert body_of(one) == b"ab"
    first.release()
    assert pool.idle == 1
    clock.seconds = 4.5
    second.release()
    assert pool.idle == 1, "what nobody takes is closed when the next is given back"
    clock.seconds = 9.0
    third = Exchange(pool, clock)
    third.send(REQUEST, 60)
    third.release()
    assert len(server.threads) == 4
    pool.close()


def test_closing_breaks_off_what_runs_and_keeps_nothing(start):
    server = start(answering(WHOLE))
    ended, running = begin(server.pool), begin(server.pool)
    ended.send(REQUEST)
    assert body_of(ended) == b"ab"
    running.send(REQUEST)
    server.pool.close()
    server.pool.close()
    ended.release()
    running.release()
    assert (server.pool.in_use, server.pool.idle) == (0, 0)


def test_an_exchange_that_is_dropped_hangs_up_also_within_a_circle(start):
    left = threading.Event()

    def serve(connection, _):
        request_of(connection)
        connection.sendall(CHUNKED)
        hold(connection)
        left.set()

    server = start(serve)
    one = begin(server.pool)
    one.send(REQUEST)
    one.itself = one
    del one
    gc.collect()
    assert left.wait(5)
    assert server.pool.in_use == 0


# --- breaking off


def break_off_while_it_runs(pool, arrived, request=REQUEST):
    """What `send` and the reads raise, where another thread breaks them off once `arrived` holds."""
    one, failures = begin(pool), []

    def run():
        try:
            one.send(request)
            body_of(one)
        except (NotSent, ExchangeBroken) as error:
            failures.append(error)
        finally:
            one.release()

    runner = threading.Thread(target=run, daemon=True)
    runner.start()
    wait_until(lambda: arrived(one), 5, "it waits")
    time.sleep(0.05)
    with within(2):
        one.break_off()
        runner.join(5)
    assert not runner.is_alive()
    assert (pool.in_use, pool.idle) == (0, 0)
    one.break_off()
    return failures


def test_a_look_up_is_broken_off(monkeypatch):
    looks, go_on = threading.Event(), threading.Event()
    look_up(monkeypatch, lambda: looks.set() or go_on.wait(10))
    (failure,) = break_off_while_it_runs(Connections("slow", 1, None, clock=CLOCK), lambda _: looks.is_set())
    assert isinstance(failure, NotSent)
    go_on.set()


def test_connecting_is_broken_off_and_no_other_address_is_tried(full, monkeypatch):
    look_up(monkeypatch, lambda: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", full)] * 3)
    pool = Connections("full", full[1], None, clock=CLOCK)
    (failure,) = break_off_while_it_runs(pool, lambda one: one._wake is not None)
    assert isinstance(failure, NotSent)


def test_a_handshake_is_broken_off(start):
    arrived, go_on = threading.Event(), threading.Event()

    def serve(connection, _):
        connection.recv(65_536)
        arrived.set()
        go_on.wait(10)

    server = start(serve, client_tls=ssl.create_default_context())
    (failure,) = break_off_while_it_runs(server.pool, lambda _: arrived.is_set())
    assert isinstance(failure, NotSent)
    go_on.set()


@pytest.mark.parametrize(
    ("request_sent", "response"),
    [(b"x" * 50_000_000, b""), (REQUEST, b""), (REQUEST, HEAD), (REQUEST, CHUNKED + b"2\r\nab\r\n")],
    ids=["request", "before_the_head", "head", "body"],
)
def test_what_was_sent_is_broken_off(start, request_sent, response):
    arrived, go_on = threading.Event(), threading.Event()

    def serve(connection, _):
        connection.recv(len(REQUEST))
        connection.sendall(response)
        arrived.set()
        go_on.wait(10)

    server = start(serve)
    (failure,) = break_off_while_it_runs(server.pool, lambda _: arrived.is_set(), request_sent)
    assert type(failure) is ExchangeBroken
    go_on.set()


def test_what_is_broken_off_before_it_begins_is_not_sent(start):
    server = start(answering(WHOLE))
    assert whole(server.pool) == (200, b"ab")
    one = begin(server.pool)
    one.break_off()
    with pytest.raises(NotSent):
        one.send(REQUEST)
    one.release()
    assert (server.pool.in_use, server.pool.idle) == (0, 0)


def test_what_had_come_is_read_after_it_was_broken_off(start):
    sent = threading.Event()

    def serve(connection, _):
        request_of(connection)
        connection.sendall(HEAD + b"\r\n")
        connection.sendall(b"x" * 100_000)
        sent.set()
        hold(connection)

    server = start(serve)
    one = begin(server.pool)
    one.send(REQUEST)
    assert sent.wait(5)
    time.sleep(0.2)  # what is under way when it is broken off is answered with a reset
    one.break_off()
    assert len(rest_of(one)) == 100_000
    one.release()
    assert server.pool.idle == 0


def test_twelve_threads_share_the_connections(start):
    server = start(answering(CHUNKED + b"2\r\nab\r\n", b"0\r\n\r\n"))
    results = []

    def run():
        results.extend(whole(server.pool) for _ in range(25))

    threads = [threading.Thread(target=run) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == [(200, b"ab")] * 300
    assert server.pool.in_use == 0
    assert server.pool.idle <= 12
    assert server.pool._places.qsize() == 1_024


# --- TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    return signed_by_itself(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def server_tls(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return context


@pytest.fixture
def client_tls(certificate):
    return ssl.create_default_context(cafile=certificate[0])


def test_a_certificate_that_signed_itself_is_refused(start, server_tls):
    server = start(answering(WHOLE), tls=server_tls, name="localhost", client_tls=_tls_context())
    with pytest.raises(NotSent, match="CERTIFICATE_VERIFY_FAILED"):
        whole(server.pool)
    assert server.pool.in_use == 0


def test_a_certificate_of_another_name_is_refused(start, server_tls, client_tls):
    server = start(answering(WHOLE), tls=server_tls, client_tls=client_tls)
    with pytest.raises(NotSent, match="CERTIFICATE_VERIFY_FAILED"):
        whole(server.pool)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_over_tls_too_one_connection_serves_one_exchange_after_the_other(start, server_tls, client_tls, version):
    server_tls.maximum_version = version
    response = HEAD + b"Content-Length: 200000\r\n\r\n" + b"x" * 200_000
    server = start(answering(response), tls=server_tls, client_tls=client_tls, name="localhost")
    assert [whole(server.pool, b"y" * 300_000 + b"hi") for _ in range(3)] == [(200, b"x" * 200_000)] * 3
    assert len(server.threads) == 2


def test_tls_to_an_address(start, server_tls, client_tls):
    try:
        server = start(answering(WHOLE), tls=server_tls, client_tls=client_tls, host="::1")
    except OSError:
        pytest.skip("no IPv6 here")
    assert whole(server.pool) == (200, b"ab")


def test_tls_through_a_tunnel(start, server_tls, client_tls):
    """The proxy's head comes in pieces; the certificate is that of the server behind it."""
    server = start(answering(WHOLE), tls=server_tls)
    heads = []

    def pass_on(connection, _):
        heads.append(connection.recv(65_536))
        for part in (b"HTTP/1.1 200 Conn", b"ection established\r\nX: y\r\n", b"\r\n"):
            connection.sendall(part)
            time.sleep(0.01)
        with socket.create_connection(("127.0.0.1", server.port)) as behind:
            back = threading.Thread(target=copy, args=(behind, connection), daemon=True)
            back.start()
            copy(connection, behind)

    def copy(source, target):
        with contextlib.suppress(OSError):
            while part := source.recv(65_536):
                target.sendall(part)
            target.shutdown(socket.SHUT_RDWR)

    hand = start(pass_on)
    pool = Connections("localhost", server.port, client_tls, clock=CLOCK, proxy=Proxy("127.0.0.1", hand.port, "dTpw"))
    assert [whole(pool) for _ in range(2)] == [(200, b"ab")] * 2
    pool.close()
    name = f"localhost:{server.port}"
    expected = f"CONNECT {name} HTTP/1.1\r\nHost: {name}\r\nProxy-Authorization: Basic dTpw\r\n\r\n"
    assert heads == [expected.encode()]


@pytest.mark.parametrize("trust", ["file", "directory", "another_file_and_directory", "nothing"])
def test_the_model_trusts_only_the_certificates_that_the_environment_names(
    start, server_tls, certificate, monkeypatch, tmp_path, trust
):
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
    if trust == "file":
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    if "directory" in trust:
        shutil.copy(certificate[0], tmp_path / "one.pem")
        subprocess.run(["openssl", "rehash", tmp_path], check=True)
        monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    if "another" in trust:
        monkeypatch.setenv("SSL_CERT_FILE", str(signed_by_itself(tmp_path, "/CN=another")[0]))
    server = start(answering(WHOLE), tls=server_tls, name="localhost", client_tls=_tls_context())
    if trust in {"file", "directory"}:
        assert whole(server.pool) == (200, b"ab")
    else:
        with pytest.raises(NotSent, match="CERTIFICATE_VERIFY_FAILED"):
            whole(server.pool)


def test_a_model_over_tls(start, server_tls, certificate, monkeypatch):
    body = b'{"choices": [{"message": {"content": "yes"}}]}'

    def serve(connection, _):
        connection.recv(65_536)
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        hold(connection)

    server = start(serve, tls=server_tls)
    for is_trusted in (False, True):
        if is_trusted:
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        model = OpenAICompatibleModel(f"https://localhost:{server.port}/v1", clock=CLOCK)
        with contextlib.nullcontext() if is_trusted else pytest.raises(UpstreamNotTaken, match="not be reached"):
            assert model.ask(model_request()).whole().body["choices"]
        model.close()


def test_a_record_that_trickles_does_not_prolong_a_read(start, server_tls, client_tls):
    """The server's own bytes of TLS go through a hand that passes the second record on one by one."""

    def serve(connection, _):
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = server_tls.wrap_bio(incoming, outgoing, server_side=True)

        def pump(step):
            while True:
                try:
                    return step()
                except ssl.SSLWantReadError:
                    connection.sendall(outgoing.read())
                    incoming.write(connection.recv(65_536))

        pump(tls.do_handshake)
        pump(lambda: tls.read(65_536))
        tls.write(CHUNKED)
        connection.sendall(outgoing.read())
        tls.write(b"2\r\nab\r\n")
        record = outgoing.read()
        for number in range(len(record)):
            connection.sendall(record[number : number + 1])
            time.sleep(0.03)
        hold(connection)

    server = start(serve, client_tls=client_tls, name="localhost")
    one = begin(server.pool)
    one.send(REQUEST)
    with within(1):
        assert one.read(0.3) is None
    assert one.read(10) == b"ab"
    one.release()


def test_a_handshake_that_trickles_is_given_up(start, client_tls):
    def serve(connection, _):
        connection.recv(65_536)
        # The beginning of a record of 16 KiB.
        connection.sendall(b"\x16\x03\x03\x40\x00")
        while True:
            connection.sendall(b"\2")
            time.sleep(0.02)

    server = start(serve, client_tls=client_tls, name="localhost")
    with within(3), pytest.raises(NotSent):
        begin(server.pool, deadline_seconds=0.3).send(REQUEST)
    assert server.pool.in_use == 0


@pytest.mark.parametrize("goodbye", [True, False])
def test_the_end_of_an_encrypted_response_without_a_length(start, server_tls, client_tls, goodbye):
    def serve(connection, _):
        request_of(connection)
        connection.sendall(HEAD + b"\r\nabc")
        if goodbye:
            # It says that nothing more comes, and keeps the connection.
            with contextlib.suppress(OSError):
                connection.settimeout(0.1)
                connection.unwrap()
            server.closing.wait(3)
        else:
            os.close(connection.detach())

    server = start(serve, tls=server_tls, client_tls=client_tls, name="localhost")
    with within(2):
        assert whole(server.pool) == (200, b"abc")


def test_over_tls_too_what_had_come_is_read_after_it_was_broken_off(start, server_tls, client_tls):
    sent = threading.Event()

    def serve(connection, _):
        request_of(connection)
        connection.sendall(HEAD + b"\r\n" + b"x" * 50_000)
        sent.set()
        hold(connection)

    server = start(serve, tls=server_tls, client_tls=client_tls, name="localhost")
    one = begin(server.pool)
    one.send(REQUEST)
    assert sent.wait(5)
    time.sleep(0.2)  # what is under way when it is broken off is answered with a reset
    one.break_off()
    assert len(rest_of(one)) == 50_000
    one.release()


@pytest.mark.skipif("GEVENT_HERE" in os.environ, reason="this is it")
def test_all_of_this_under_gevent():
    program = "from gevent import monkey; monkey.patch_all(); import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", program, "-q", "-x", "-p", "no:cacheprovider", __file__],
        cwd=Path(__file__).parents[2], env={**os.environ, "GEVENT_HERE": "1"}, capture_output=True, text=True,
        timeout=110, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5_000:] + done.stderr[-2_000:]
