from types import SimpleNamespace

import pytest
from gunicorn.config import Config

from flaskapp.ops.one_write import OneWrite

HEAD_ENDS = b"\r\n\r\n"


class Connection:
    """Takes at most so many bytes with one `send`, as a full buffer does."""

    def __init__(self, most=100_000):
        self.most = most
        self.writes = []

    def send(self, data):
        self.writes.append(bytes(data[: self.most]))
        return len(self.writes[-1])

    def sendall(self, data):
        self.writes.append(bytes(data))


def answered(connection, parts, headers=(), method="GET"):
    request = SimpleNamespace(method=method, version=(1, 1), should_close=lambda: False)
    response = OneWrite(request, connection, Config())
    response.start_response("200 OK", list(headers))
    for part in parts:
        response.write(part)
    response.close()
    return connection.writes


def test_a_whole_answer_is_one_write():
    (written,) = answered(Connection(), [b"the answer"], [("Content-Length", "10")])
    head, _, body = written.partition(HEAD_ENDS)
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert body == b"the answer"


def test_the_head_of_a_stream_goes_with_its_first_part_and_each_part_is_one_write():
    first, second, end = answered(Connection(), [b"one", b"two"])
    assert first.partition(HEAD_ENDS)[2] == b"3\r\none\r\n"
    assert (second, end) == (b"3\r\ntwo\r\n", b"0\r\n\r\n")


def test_an_empty_stream_is_one_write_and_so_is_an_answer_without_a_body():
    assert [written.partition(HEAD_ENDS)[2] for written in answered(Connection(), [])] == [b"0\r\n\r\n"]
    heads = answered(Connection(), [b"not sent"], [("Content-Length", "8")], method="HEAD")
    assert [written.partition(HEAD_ENDS)[2] for written in heads] == [b""]


def test_what_a_full_buffer_does_not_take_is_sent_after_it():
    assert b"".join(answered(Connection(most=7), [b"the answer"], [("Content-Length", "10")])).endswith(b"the answer")


def test_nothing_is_sent_of_what_is_no_bytes():
    connection = Connection()
    with pytest.raises(TypeError):
        answered(connection, ["text"])
    assert connection.writes == []
