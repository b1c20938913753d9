import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaskapp.llm.event_stream import MAX_EVENT_BYTES, EventStream, ServerEvent


def events_of(sent, cuts=()):
    stream, found = EventStream(), []
    for start, stop in zip([0, *cuts], [*cuts, len(sent)], strict=True):
        found += stream.feed(sent[start:stop])
    return found + list(stream.end())


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"data: a\n\n", [("", b"a")]),
        (b"data:a\n\ndata:  b\n\n", [("", b"a"), ("", b" b")]),
        (b"data: a\r\n\r\ndata: b\r\rdata: c\n\n", [("", b"a"), ("", b"b"), ("", b"c")]),
        (b"data: a\rdata: b\n\n", [("", b"a\nb")]),
        (b"data: a\r\ndata: b\r\n\r\n", [("", b"a\nb")]),
        (b"data: a\ndata: b\ndata\n\n", [("", b"a\nb\n")]),
        (b": ping\n\n:\n\ndata: a\n: in between\n\n", [("", b"a")]),
        (b"event: error\ndata: a\n\ndata: b\n\n", [("error", b"a"), ("", b"b")]),
        (b"event: nothing\n\ndata: b\n\n", [("", b"b")]),
        (b"id: 1\nretry: 5\nother: x\ndata: a\n\n", [("", b"a")]),
        (b"\xef\xbb\xbfdata: a\n\n", [("", b"a")]),
        (b"data: a\n\n\n\n\r\n\r\ndata: b\n\n", [("", b"a"), ("", b"b")]),
        (b"data: a", [("", b"a")]),
        (b"data: a\n", [("", b"a")]),
        (b"data: \xff\n\n", [("", b"\xff")]),
        (b"data: a\x85b\xe2\x80\xa8c\x0bd\n\n", [("", b"a\x85b\xe2\x80\xa8c\x0bd")]),
        (b"", []),
    ],
)
def test_what_comes_out(sent, expected):
    assert events_of(sent) == [ServerEvent(name, data) for name, data in expected]
    assert events_of(sent, range(1, len(sent))) == events_of(sent)


@given(
    st.lists(st.sampled_from([b"data: x", b"data", b":", b"event: e", b"\r", b"\n", b"\r\n", "é😀".encode()])).map(
        b"".join
    ),
    st.data(),
)
def test_the_cuts_do_not_matter(sent, data):
    cuts = sorted(data.draw(st.sets(st.integers(0, len(sent)))))
    assert events_of(sent, cuts) == events_of(sent)


@pytest.mark.parametrize("piece", [b"x" * 1_000, b"data: x\n" * 100, b": x\n" * 100])
def test_an_event_is_bounded(piece):
    stream = EventStream()
    for _ in range(MAX_EVENT_BYTES // len(piece)):
        assert list(stream.feed(piece)) == []
    with pytest.raises(ValueError, match="too large"):
        list(stream.feed(piece))


def test_the_bound_is_per_event_and_not_per_stream():
    stream = EventStream()
    for _ in range(30):
        assert len(list(stream.feed(b"data: " + b"x" * 100_000 + b"\n\n"))) == 1
