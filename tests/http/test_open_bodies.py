"""Bodies that never end, over sockets: they are cut off, counted, and keep nobody out. With gevent and with threads."""

import json
import os
import select
import signal
import socket
from contextlib import ExitStack, suppress

import pytest
import requests

from flaskapp.http.open_bodies import MOST_LARGE_OF_NETWORK, MOST_SMALL_OF_NETWORK
from tests.processes import children_of
from tests.servers import CHAT, Service, wait_until

COMPLETIONS = "/v1/chat/completions"
SECONDS = 2
EACH_WAY = ["gevent", "threads"]


class Threads(Service):
    config = "tests/http/gthread.conf.py"


@pytest.fixture(scope="module")
def services(redis_of, tmp_path_factory):
    environment = {
        "REQUEST_BODY_SECONDS": str(SECONDS),
        "MAX_REQUEST_BYTES": "200000",
        "WEB_CONCURRENCY": "1",
        "TRUSTED_PROXY_HOPS": "1",
        "CHAT_RATE_LIMIT": "100000 per minute",
    }
    with ExitStack() as running:
        yield {
            name: running.enter_context(
                kind(tmp_path_factory.mktemp(name), redis_of(f"bodies-{name}").url, **environment)
            )
            for name, kind in (("gevent", Service), ("threads", Threads))
        }


@pytest.fixture(params=EACH_WAY)
def slow(request, services):
    return services[request.param]


def head(path=CHAT, *, length=None, address="198.51.100.7"):
    framing = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nX-Fingerprint: hash456\r\n"
        f"X-Forwarded-For: {address}\r\n{framing}\r\n\r\n"
    ).encode()


def begin(service, request):
    connection = socket.create_connection(("127.0.0.1", service.port), timeout=SECONDS + 8)
    connection.sendall(request)
    return connection


def answer_of(connection):
    """Status and body; the connection may be kept."""
    received = b""
    while b"\r\n\r\n" not in received:
        piece = connection.recv(65_536)
        assert piece, received
        received += piece
    top, _, body = received.partition(b"\r\n\r\n")
    (length,) = [int(line.split(b":")[1]) for line in top.split(b"\r\n") if line.lower().startswith(b"content-length")]
    while len(body) < length:
        body += connection.recv(65_536)
    return int(top.split()[1]), json.loads(body)


def is_admitted(service, address="198.51.100.7"):
    with begin(service, head(length=13, address=address) + b'{"query":"x"}') as connection:
        return connection.recv(12) == b"HTTP/1.1 200"


TRICKLES = {
    "nothing more": (head(length=900) + b'{"query":', b""),
    "a byte now and then": (head(length=900) + b'{"query":"', b"x"),
    "a large one": (head(length=190_000) + b'{"query":"', b"x"),
    "a chunk that never ends": (head() + b'20000\r\n{"query":"', b"x"),
    "small chunks": (head(), b"1\r\n \r\n"),
    "a chunk size that never ends": (head(), b"0"),
    "trailers that never end": (head() + b"0\r\n", b"X-A: b\r\n"),
}


@pytest.mark.parametrize("case", TRICKLES.values(), ids=TRICKLES)
def test_a_body_that_takes_too_long_is_a_408(slow, case):
    request, more = case
    with begin(slow, request) as connection:
        connection.settimeout(0.2)
        for _ in range(SECONDS * 5 + 10):
            with suppress(TimeoutError):
                connection.recv(1, socket.MSG_PEEK)
                break
            connection.sendall(more)
        connection.settimeout(5)
        status, body = answer_of(connection)
        assert (status, body["error"], body["field"]) == (408, "invalid_request", "body")
        assert body["reason"] == f"body: did not arrive within {SECONDS} seconds (REQUEST_BODY_SECONDS)"
        with suppress(ConnectionResetError):
            assert connection.recv(1) == b""


def test_on_v1_it_is_an_error_of_openai_s(slow):
    with begin(slow, head(COMPLETIONS, length=900)) as connection:
        status, body = answer_of(connection)
    assert status == 408
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["param"] == "body"
    assert "REQUEST_BODY_SECONDS" in body["error"]["message"]


def test_a_question_of_health_does_not_wait_for_those_that_came_before(services):
    service, many = services["gevent"], 400
    request = "GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: {}\r\n\r\n"
    (worker,) = children_of(service._process.pid)
    with ExitStack() as opened:
        os.kill(worker, signal.SIGSTOP)
        try:
            connections = [
                opened.enter_context(begin(service, request.format(f"198.51.{number >> 8}.{number & 255}").encode()))
                for number in range(many)
            ]
            probe = opened.enter_context(begin(service, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"))
            os.kill(worker, signal.SIGCONT)
            assert answer_of(probe)[0] == 200
            os.kill(worker, signal.SIGSTOP)
            answered, _, _ = select.select(connections, [], [], 0)
        finally:
            os.kill(worker, signal.SIGCONT)
        assert len(answered) < many / 2
        # Each has its turn.
        assert {connection.recv(12) for connection in connections} == {b"HTTP/1.1 200"}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_longer_body_is_a_413_that_names_its_setting(slow, path):
    answer = requests.post(
        slow.base_url + path, data=b" " * 200_001, timeout=10, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 413
    assert "may have at most 200000 bytes (MAX_REQUEST_BYTES)" in answer.text


@pytest.mark.parametrize("size", [3_000, 150_000, 3_000_000])
def test_after_a_refusal_with_its_body_unread_the_connection_goes_on(slow, size):
    """It was sent whole, so it can be read and thrown away."""
    with requests.Session() as session:
        for _ in range(3):
            refused = session.post(
                f"{slow.base_url}{CHAT}", data=b"x" * size, headers={"X-Fingerprint": "?"}, timeout=10
            )
            assert refused.status_code == 400
            assert refused.json()["field"] == "X-Fingerprint"
        assert session.get(f"{slow.base_url}/healthz", timeout=10).status_code == 200


def test_a_body_of_many_tiny_chunks_is_refused(slow):
    with begin(slow, head() + b"1\r\n \r\n" * 2_500 + b"0\r\n\r\n") as connection:
        status, body = answer_of(connection)
    assert (status, body["field"]) == (400, "body")
    assert "more than 2000 chunks" in body["reason"]


@pytest.mark.parametrize(("length", "most"), [(900, MOST_SMALL_OF_NETWORK), (190_000, MOST_LARGE_OF_NETWORK)])
def test_a_network_holds_so_many_bodies_open_and_others_are_not_kept_out(slow, length, most):
    with ExitStack() as stack:
        opened = [stack.enter_context(begin(slow, head(length=length))) for _ in range(most + 1)]
        # What is one too many is answered while the others are still waited for.
        ready, _, _ = select.select(opened, [], [], SECONDS + 8)
        status, body = answer_of(ready[0])
        assert (status, body["error"], body["reason"], body["scope"]) == (429, "rate_limited", "rate_limit", "network")
        assert is_admitted(slow, "203.0.113.9")
        assert slow.get("/healthz").status_code == 200
    # Their places are given back.
    wait_until(lambda: is_admitted(slow), 10, "an honest request")


@pytest.mark.parametrize("networks", [1, 300])
def test_health_is_answered_while_bodies_are_held_open(services, networks):
    service = services["gevent"]
    with ExitStack() as stack:
        for number in range(600):
            address = f"10.0.{number % networks // 250}.{number % networks % 250}"
            stack.enter_context(begin(service, head(length=900 if number % 2 else 190_000, address=address)))
        assert service.get("/healthz").status_code == 200


@pytest.mark.parametrize("length", [300_000_000, None], ids=["announced", "in chunks"])
def test_what_is_refused_is_not_read_for_ever(slow, length):
    piece = b" " * 1_000_000
    sent = 0
    with begin(slow, head(length=length)) as connection, suppress(OSError):
        while sent < 300:
            connection.sendall(piece if length else b"f4240\r\n" + piece + b"\r\n")
            sent += 1
    # Eight are read, and the rest stood in the buffers on the way.
    assert 1 < sent < 100
