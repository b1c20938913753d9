"""Bad input as it comes over a socket: what no test client would send."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from urllib.parse import quote_plus

import pytest

from tests.servers import ADMIN_TOKEN, CHAT

HEAD = (
    f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    "X-Fingerprint: hash456\r\n"
).encode()


def say(service, request, *, more=()):
    """The status and the body that come back, whatever is sent."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as link:
        link.sendall(request)
        # It may have answered, and hung up, before all of it was sent.
        with suppress(OSError):
            for piece in more:
                link.sendall(piece)
        answer = b""
        with suppress(ConnectionResetError):
            while piece := link.recv(65_536):
                answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1]), head.decode("latin-1"), body


def with_body(body, head=HEAD):
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def chunked(*pieces):
    return [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces] + [b"0\r\n\r\n"]


def is_problem(service, answer, status, field):
    got, head, body = answer
    assert got == status, (head, body)
    told = json.loads(body)
    assert (told["error"], told["field"], told["status"]) == ("invalid_request", field, status)
    assert f"X-Request-ID: {told['request_id']}" in head
    assert "Traceback" not in body.decode()


@pytest.fixture
def untouched(books):
    """No key of the guard is made."""
    yield
    assert [key for key in books.keys("*") if not key.startswith("llm:rate:")] == []


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        (b"", 400, "body"),
        (b"{", 400, "body"),
        (b'{"query": "\xff"}', 400, "body"),
        (b'{"query": "x", "max_tokens": NaN}', 400, "body"),
        (b'{"query": "x", "query": "x"}', 400, "body"),
        (b"[" * 100_000, 400, "body"),
        (b'{"a":' * 100_000, 400, "body"),
        (b'{"query": "\\ud800"}', 400, "body"),
        (b'{"query": "' + b"x" * 100_000 + b'"}', 422, "query"),
        (b'{"query": "x", "max_tokens": ' + b"9" * 4_301 + b"}", 422, "max_tokens"),
        (b'{"query": "x", "max_tokens": true}', 422, "max_tokens"),
    ],
)
def test_bodies(service, untouched, body, status, field):
    is_problem(service, say(service, with_body(body)), status, field)


@pytest.mark.parametrize(
    "fingerprint",
    [
        b"",
        b"x" * 10_000,
        b"{x}",
        b"a:b",
        b"fp::x",
        b"fp:a:",
        b"a\x01b",
        b"a\x7f",
        "хэш".encode(),
        b"\xff\xfe",
        b"fp:{a}:b",
    ],
)
def test_fingerprints(service, untouched, fingerprint):
    head = HEAD.replace(b"hash456", fingerprint)
    status, head, body = say(service, with_body(b'{"query": "x"}', head))
    assert status == 400
    # A control character already stops the server, before us: its own page names the header.
    assert b"x-fingerprint" in body.lower()
    if not fingerprint.endswith((b"\x01b", b"\x7f")):
        is_problem(service, (status, head, body), 400, "X-Fingerprint")


def test_two_fingerprints_are_none(service, untouched):
    head = HEAD + b"X-Fingerprint: another\r\n"
    is_problem(service, say(service, with_body(b'{"query": "x"}', head)), 400, "X-Fingerprint")


def test_more_than_a_megabyte_is_a_413_by_what_is_announced(service, untouched):
    is_problem(service, say(service, HEAD + b"Content-Length: 1000001\r\n\r\n"), 413, "body")


def test_more_than_a_megabyte_is_a_413_in_chunks_too(service, untouched):
    head = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    pieces = [b'{"query": "', *[b"x" * 100_000] * 11, b'"}']
    is_problem(service, say(service, head, more=chunked(*pieces)), 413, "body")


def test_what_stands_behind_the_megabyte_is_not_overlooked(service, untouched):
    head = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    whole = b'{"query": "x", "max_tokens": 1}'
    padded = whole + b" " * (1_000_000 - len(whole))
    is_problem(service, say(service, head, more=chunked(padded, b"}")), 413, "body")


def test_a_megabyte_in_chunks_is_read(service, untouched):
    head = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    pieces = [b'{"query": "', b"x" * (1_000_000 - 13), b'"}']
    is_problem(service, say(service, head, more=chunked(*pieces)), 422, "query")


def test_a_body_in_chunks_is_a_body(service, books):
    head = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    status, _, body = say(service, head, more=chunked(b'{"query": ', b'"x", "max', b'_tokens": 3}'))
    assert status == 200
    assert b'"status":"complete"' in body
    assert len(books.keys("llm:cost:daily:hash456:*")) == 1


def test_a_body_that_breaks_off_charges_nothing(service, untouched):
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as link:
        link.sendall(HEAD + b'Content-Length: 100\r\n\r\n{"query": "x"')
        link.shutdown(socket.SHUT_WR)
        answer = link.recv(65_536)
    assert not answer or answer.split(b" ", 2)[1] == b"400"


LOGIN = b"POST /admin/login HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\n"
PATCH = (
    b"PATCH /api/v1/admin/settings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Authorization: Bearer " + ADMIN_TOKEN.encode() + b"\r\n"
)


@pytest.mark.parametrize("head", [HEAD, LOGIN, PATCH], ids=["chat", "login", "settings"])
@pytest.mark.parametrize(
    "chunks",
    [
        b"zz\r\nabc\r\n0\r\n\r\n",
        b"-3\r\nabc\r\n0\r\n\r\n",
        b"3\r\nabcXX0\r\n\r\n",
        b"3\r\nabc\r\n0\r\nbad trailer\r\n\r\n",
    ],
    ids=["no size", "negative size", "no terminator", "bad trailer"],
)
def test_chunks_that_are_none_are_a_400(service, untouched, head, chunks):
    before = service.log().count("Traceback")
    is_problem(service, say(service, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks), 400, "body")
    assert service.log().count("Traceback") == before


def test_headers_of_an_untrusted_proxy_change_nothing(service, untouched):
    forged = (
        b"SCRIPT_NAME: /elsewhere\r\nPATH_INFO: /metrics\r\nX-Forwarded-Proto: https\r\n"
        b"X-Forwarded-Protocol: ssl\r\nConnection: close\r\n"
    )
    status, _, body = say(service, b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + forged + b"\r\n")
    assert (status, json.loads(body)) == (200, {"status": "ok"})
    form = b"token=" + quote_plus(ADMIN_TOKEN).encode()
    status, head, _ = say(service, with_body(form, LOGIN + forged))
    assert status == 303
    assert "Location: /admin" in head
    (cookie,) = [line for line in head.splitlines() if line.startswith("Set-Cookie: ")]
    assert "Secure" not in cookie


def test_a_forwarded_address_that_is_not_believed_is_logged_once_by_all_workers(service):
    with ThreadPoolExecutor(8) as callers:
        list(callers.map(lambda _: service.get("/healthz", headers={"X-Forwarded-For": "203.0.113.9"}), range(40)))
    service.lines_with("X-Forwarded-For is ignored")
    assert service.log().count("X-Forwarded-For is ignored") == 1


def test_as_json_the_lines_of_the_server_are_objects_too(legacy):
    (line, *_) = legacy.lines_with("Listening at")
    assert json.loads(line)["level"] == "INFO"
    assert [line for line in legacy.log_lines() if not line.startswith("{")] == []


@pytest.mark.parametrize(
    "request_",
    [b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"POST " + b"/" * 9_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"],
)
def test_what_is_no_http_does_no_harm(service, untouched, request_):
    answer = b""
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as link:
        # It may hang up before all of it was sent.
        with suppress(OSError):
            link.sendall(request_)
            link.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            answer = link.recv(65_536)
    assert b"Traceback" not in answer
    assert not answer or 400 <= int(answer.split(b" ", 2)[1]) < 500
    assert service.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        *(
            "//metrics",
            "///metrics",
            "/%6detrics",
            "/%6Detrics",
            "/metrics/",
            "/./metrics",
            "/metrics%2F",
            "/%2Fmetrics",
        ),
        *("/metrics%3F", "/metrics;x", "/METRICS", "/x/../metrics", "/metrics%00", "/metrics%20", "/metrics#x"),
        *("//admin", "/%61dmin", "/admin/", "/./admin", "/admin%2Flogin", "/admin#x", "/.//admin", "/admin%2f"),
        *(
            "//api/v1/admin/settings",
            "/api/v1/admin%2Fsettings",
            "/api/v1/%61dmin/settings",
            "//v1/models",
            "/%68ealthz",
        ),
    ],
)
def test_another_spelling_of_a_path_is_none_of_ours(service, path):
    """A proxy in front may keep a path from the world, and knows one spelling of it."""
    status, _, body = say(service, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert (status, b"not_found" in body) == (404, True)


def test_a_path_in_the_spelling_that_it_has_is_found(service):
    for path, status in (("/metrics?a=%6d", 200), ("/admin", 401), ("/v1/models/org%2Fmodel", 404), ("/healthz", 200)):
        assert service.get(path).status_code == status, path
    assert service.get("/v1/models/gpt%2D4o", headers={"Authorization": "Bearer x"}).status_code in {200, 401}
