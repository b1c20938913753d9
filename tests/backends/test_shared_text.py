import pytest

from backends.clock import SystemClock
from backends.errors import StoreBroken
from backends.store.link import Link
from backends.store.shared_text import NOT_A_STRING, SharedText
from tests.faults.wire import server_that_says


@pytest.fixture
def link(redis_url):
    link = Link(redis_url, clock=SystemClock())
    yield link
    link.close()


@pytest.fixture
def text(link):
    return SharedText(link, "text")


def test_it_is_made_changed_and_deleted(text, link):
    assert text.read() is None
    assert text.change(lambda _: b"one") == (None, b"one")
    link.run(lambda client: client.expire("text", 100))
    assert text.change(lambda before: before + b" two") == (b"one", b"one two")
    assert text.read() == b"one two"
    assert link.run(lambda client: client.ttl("text")) == -1
    assert text.change(lambda _: None) == (b"one two", None)
    assert text.read() is None


def test_what_stands_beside_a_change_is_done_with_it(text, link):
    text.change(lambda _: b"one", [("SET", "beside", 1, "EX", 100)])
    text.change(lambda _: None, [("INCR", "beside")])
    assert link.run(lambda client: client.mget(["text", "beside"])) == [None, b"2"]


def test_a_key_of_another_type_is_said_and_replaced(text, link):
    link.run(lambda client: client.hset("text", "a", "b"))
    assert text.read() == NOT_A_STRING
    assert text.change(lambda _: b"now a string") == (NOT_A_STRING, b"now a string")
    assert text.read() == b"now a string"


def test_a_change_in_between_is_seen_and_kept(text, link):
    seen = []

    def add(before):
        seen.append(before)
        if len(seen) < 3:
            link.run(lambda client: client.append("text", f"{len(seen)}"))
        return (before or b"") + b" mine"

    assert text.change(add) == (b"12", b"12 mine")
    assert seen == [None, b"1", b"12"]


def test_a_change_that_others_overtake_again_and_again_is_given_up(text, link):
    def too_slow(_before):
        link.run(lambda client: client.append("text", "x"))
        return b"mine"

    assert text.change(too_slow) is None
    assert set(text.read()) == set(b"x")


def test_another_error_is_raised():
    with server_that_says(b"-ERR something else\r\n") as url:
        link = Link(url, clock=SystemClock())
        with pytest.raises(StoreBroken, match="something else"):
            SharedText(link, "text").read()
        link.close()
