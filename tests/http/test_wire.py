"""Bad input as it comes over a socket: what no test client would send."""

import json
import re
import select
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from urllib.parse import quote_plus

import pytest

from tests.servers import ADMIN_TOKEN, CHAT, Service

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
    is_problem(service, say(service, with_body(b'{"query": "x"}', head)), 400, "X-Fingerprint")


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


SECRET = b"s3cret-of-a-caller"
LINE = b"POST PATH HTTP/1.1\r\nHost: x\r\n"
UNREADABLE = {
    "no HTTP": (b"\x16\x03\x01%b\r\n\r\n" % SECRET, 400, "request line"),
    "no path": (b"GET\r\n\r\n", 400, "request line"),
    "another method": (b"%b /v1/models HTTP/1.1\r\n\r\n" % SECRET, 400, "request line"),
    "a line that is too long": (b"GET /%b HTTP/1.1\r\n\r\n" % (SECRET * 400), 414, "request line"),
    "bare line ends": (b"GET / HTTP/1.1\nAuthorization: %b\n\n" % SECRET, 400, "request line"),
    "another version": (LINE.replace(b"1.1", SECRET), 400, "request line"),
    "too many headers": (LINE + b"A: %b\r\n" % SECRET * 120 + b"\r\n", 431, "headers"),
    "a header that is too long": (LINE + b"Authorization: %b\r\n\r\n" % (SECRET * 2_000), 431, "headers"),
    "no colon": (LINE + b"Authorization Bearer %b\r\n\r\n" % SECRET, 400, "headers"),
    "no name": (LINE + b": %b\r\n\r\n" % SECRET, 400, "headers"),
    "a name that is none": (LINE + b"%b key: x\r\n\r\n" % SECRET, 400, "headers"),
    "a value that is none": (LINE + b"Authorization: %b\x01\r\n\r\n" % SECRET, 400, "Authorization"),
    "a value under another name": (LINE + b"%b: \x01\r\n\r\n" % SECRET, 400, "headers"),
    "a folded line": (LINE + b"Authorization: Bearer\r\n %b\r\n\r\n" % SECRET, 400, "Authorization"),
    "two hosts": (LINE + b"Host: %b\r\n\r\n" % SECRET, 400, "Host"),
    "an expectation": (LINE + b"Expect: %b\r\n\r\n" % SECRET, 417, "Expect"),
    "a length that is none": (LINE + b"Content-Length: %b\r\n\r\n" % SECRET, 400, "Content-Length"),
    "a negative length": (LINE + b"Content-Length: -1\r\n\r\n", 400, "Content-Length"),
    "a length of many digits": (LINE + b"Content-Length: %b\r\n\r\n" % (b"9" * 5_000), 400, "Content-Length"),
    "two lengths": (LINE + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400, "Content-Length"),
    "a length and chunks": (
        LINE + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
        "Content-Length",
    ),
    "chunks that are not last": (LINE + b"Transfer-Encoding: chunked, gzip\r\n\r\n", 400, "Transfer-Encoding"),
    "another coding": (LINE + b"Transfer-Encoding: %b, chunked\r\n\r\n0\r\n\r\n" % SECRET, 415, "Transfer-Encoding"),
}


@pytest.mark.parametrize("path", [CHAT, "/v1/chat/completions"])
@pytest.mark.parametrize("name", UNREADABLE)
def test_what_the_server_cannot_read_is_refused_in_the_words_of_the_route(service, untouched, name, path):
    request_, status, field = UNREADABLE[name]
    since = len(service.log_lines())
    has_path = b"PATH" in request_ and status != 414
    got, head, body = say(service, request_.replace(b"PATH", path.encode()))
    told = json.loads(body)
    error = told.get("error") if isinstance(told.get("error"), str) else told["error"]
    if has_path and path.startswith("/v1"):
        assert (got, error["type"], error["param"]) == (status, "invalid_request_error", field)
        assert "x-should-retry: false" in head
        request_id = error["request_id"]
    else:
        assert (got, error, told["field"], told["status"]) == (status, "invalid_request", field, status)
        request_id = told["request_id"]
    assert f"X-Request-ID: {request_id}\r\n" in head
    assert "Connection: close" in head
    (line,) = service.lines_with(request_id, since)
    assert "A request that the server cannot read" in line
    logged = "\n".join(service.log_lines()[since:])
    for words in (head, body.decode(), logged):
        assert SECRET.decode() not in words.lower()
        assert "Traceback" not in words


def test_a_refusal_of_the_server_has_a_date_and_a_head_alone_no_body(service, untouched):
    _, head, body = say(service, b"HEAD /healthz HTTP/1.1\r\nHo st: x\r\n\r\n")
    assert re.search(r"^Date: \w{3}, \d\d \w{3} \d{4} [\d:]{8} GMT\r$", head, re.MULTILINE)
    assert body == b""


def goes_on_sending(link, times):
    for _ in range(times):
        link.sendall(b"x")
        select.select([], [], [], 0.1)


def test_who_goes_on_sending_after_a_refusal_is_hung_up_on(service, untouched):
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as link:
        link.sendall(b"GET\r\n\r\n")
        assert link.recv(12) == b"HTTP/1.1 400"
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            goes_on_sending(link, 100)


def test_a_request_that_breaks_off_leaves_nothing_in_the_log(books, tmp_path, redis_of):
    with Service(tmp_path, redis_of("books").url, LOG_LEVEL="DEBUG", WEB_CONCURRENCY="1") as service:
        with socket.create_connection(("127.0.0.1", service.port), timeout=10) as link:
            link.sendall(b"GET /healthz HTTP/1.1\r\nAuthorization: Bearer %b" % SECRET)
            link.shutdown(socket.SHUT_WR)
            assert link.recv(1) == b""
        service.get(f"/{SECRET.decode()}?key={SECRET.decode()}")
        service.lines_with("Ignored premature client disconnection")
        assert SECRET.decode() not in service.log()


def test_chunks_that_are_none_behind_a_refusal_get_no_second_answer(service, untouched):
    head = HEAD.replace(b"hash456", b"?").replace(b"Connection: close\r\n", b"")
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as link:
        link.sendall(head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n")
        answer = b""
        with suppress(ConnectionResetError):
            while piece := link.recv(65_536):
                answer += piece
    assert answer.startswith(b"HTTP/1.1 400")
    assert answer.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("coding", ["gzip, chunked", "deflate, chunked"])
def test_a_body_in_a_coding_that_the_server_lets_pass_is_a_415(service, untouched, coding):
    head = HEAD + f"Transfer-Encoding: {coding}\r\n\r\n".encode()
    is_problem(service, say(service, head, more=chunked(b'{"query": "x"}')), 415, "Transfer-Encoding")


@pytest.mark.parametrize("framing", [b"Content-Length: 900000\r\n", b"Transfer-Encoding: chunked\r\n"])
def test_an_encoded_body_is_refused_before_it_is_read(service, untouched, framing):
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as link:
        link.sendall(HEAD + b"Content-Encoding: gzip\r\n" + framing + b"\r\n")
        # Nothing of the body was sent.
        assert link.recv(12) == b"HTTP/1.1 415"


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
