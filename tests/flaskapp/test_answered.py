import pytest
from werkzeug.test import EnvironBuilder

from flaskapp.http.answered import Answered


def called(response, method="POST"):
    sent = []
    body = response(EnvironBuilder(method=method).get_environ(), lambda status, headers: sent.append((status, headers)))
    return sent, body


def test_the_server_gets_the_headers_and_the_body_as_they_are():
    body = iter([b"one", b"two"])
    response = Answered(body, 200, [("X-One", "1")], content_type="text/event-stream", direct_passthrough=True)
    sent, given = called(response)
    assert sent == [("200 OK", [("X-One", "1"), ("Content-Type", "text/event-stream")])]
    assert given is body


def test_a_whole_answer_has_its_length():
    [(_, headers)], _ = called(Answered(b"whole", 200, content_type="application/json"))
    assert dict(headers)["Content-Length"] == "5"


@pytest.mark.parametrize("method", ["POST", "HEAD"])
def test_what_is_to_be_done_at_the_end_is_done(method):
    closed = []
    response = Answered(b"whole", 200, content_type="application/json")
    response.call_on_close(lambda: closed.append(True))
    _, body = called(response, method)
    assert b"".join(body) == (b"whole" if method == "POST" else b"")
    body.close()
    assert closed == [True]
