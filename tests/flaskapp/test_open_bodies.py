"""The places of unfinished bodies: how many, whose, and for how long."""

import socket
from contextlib import suppress

import pytest

from flaskapp.http import open_bodies
from flaskapp.http.open_bodies import SMALL_BYTES, OpenBodies, TooManyBodies
from tests.servers import CHAT


class HandClock:
    seconds = 1_000.0

    def monotonic_seconds(self):
        return self.seconds


@pytest.fixture
def clock():
    return HandClock()


@pytest.fixture
def bodies(clock, monkeypatch):
    for name, number in (("SMALL", 4), ("LARGE", 3)):
        monkeypatch.setattr(open_bodies, f"MOST_{name}", number)
        monkeypatch.setattr(open_bodies, f"MOST_{name}_OF_NETWORK", 2)
    return OpenBodies(clock, 10)


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.mark.parametrize(("size", "of_all"), [(SMALL_BYTES, 4), (SMALL_BYTES + 1, 3)])
def test_a_network_has_some_of_the_places_and_all_networks_the_rest(bodies, size, of_all):
    opened = [bodies.begin("a", size, None) for _ in range(2)]
    with pytest.raises(TooManyBodies) as refused:
        bodies.begin("a", size, None)
    assert refused.value.is_of_network
    opened += [bodies.begin(f"b{number}", size, None) for number in range(of_all - 2)]
    with pytest.raises(TooManyBodies) as refused:
        bodies.begin("c", size, None)
    assert not refused.value.is_of_network
    bodies.end(opened[0])
    opened[0] = bodies.begin("c", size, None)
    for body in opened:
        bodies.end(body)
    assert [bodies.begin("a", size, None) for _ in range(2)]


def test_large_ones_do_not_keep_out_small_ones(bodies):
    for network in ("a", "a", "b"):
        bodies.begin(network, SMALL_BYTES + 1, None)
    assert bodies.begin("a", SMALL_BYTES, None)


def test_what_takes_too_long_is_cut_off_for_its_reader_alone(bodies, clock, ends):
    ours, theirs = ends
    early = bodies.begin("a", 1, ours)
    clock.seconds += 1
    late = bodies.begin("a", 1, None)
    clock.seconds += 8.9
    bodies.cut_late()
    assert (early.is_late, late.is_late) == (False, False)
    clock.seconds += 0.1
    bodies.cut_late()
    assert (early.is_late, late.is_late) == (True, False)
    assert ours.recv(1) == b""
    ours.sendall(b"408")
    assert theirs.recv(3) == b"408"


def test_many_that_are_late_together_are_cut_off_in_turn(clock):
    bodies = OpenBodies(clock, 10)
    opened = [bodies.begin(f"net-{number}", 1, None) for number in range(50)]
    clock.seconds += 10
    cut = []
    for _ in range(3):
        bodies.cut_late()
        cut.append(sum(body.is_late for body in opened))
    assert cut == [open_bodies.MOST_AT_ONCE, 2 * open_bodies.MOST_AT_ONCE, 50]


def test_a_body_may_have_less_time_than_others_and_a_closed_connection_does_no_harm(bodies, clock, ends):
    body = bodies.begin("a", 1, ends[0], 2)
    ends[0].close()
    clock.seconds += 2
    bodies.cut_late()
    assert body.is_late


class Breaking:
    def __init__(self, error=None):
        self.error = error

    def read(self, _size):
        if self.error:
            raise self.error
        return b"{"


@pytest.mark.parametrize("error", [None, OSError("gone"), ValueError("no chunk")])
@pytest.mark.parametrize("length", ["100", "70000"])
def test_a_broken_body_gives_its_place_back(make_app, error, length):
    service = make_app(CHAT_RATE_LIMIT="1000 per minute")
    for _ in range(open_bodies.MOST_SMALL_OF_NETWORK + 1):
        with suppress(AttributeError):
            environ = {"wsgi.input": Breaking(error), "CONTENT_LENGTH": length, "CONTENT_TYPE": "application/json"}
            answer = service.client.open(CHAT, method="POST", environ_overrides=environ)
        assert (answer.status_code, answer.json["field"]) == (400, "body")


@pytest.mark.parametrize(
    ("path", "most"), [("/admin/login", 4_096), ("/admin/logout", 262_144), ("/api/v1/admin/settings", 262_144)]
)
def test_the_admin_s_bodies_are_shorter(make_app, path, most):
    service = make_app()
    method = "PATCH" if "api" in path else "POST"
    headers = {"Authorization": "Bearer the operator's word"}
    media = "application/json" if "api" in path else "application/x-www-form-urlencoded"
    service.client.post("/admin/login", data={"token": "the operator's word"})

    def ask(size):
        return service.client.open(path, method=method, data=b" " * size, headers=headers, content_type=media)

    refused = ask(most + 1)
    assert (refused.status_code, refused.json["reason"]) == (
        413,
        f"body: may have at most {most} bytes here, whatever MAX_REQUEST_BYTES is",
    )
    assert ask(most).status_code != 413


def test_a_form_of_too_many_parts_is_refused_by_their_number(make_app):
    service = make_app()
    part = '--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n'
    session = service.client.post("/admin/login", data={"token": "the operator's word"})
    assert session.status_code == 303
    refused = service.client.post(
        "/admin/settings", data=part * 1_001 + "--x--\r\n", content_type="multipart/form-data; boundary=x"
    )
    assert (refused.status_code, refused.json["field"]) == (413, "body")
    assert "at most 1000 parts, whatever MAX_REQUEST_BYTES is" in refused.json["reason"]


@pytest.mark.parametrize(
    ("path", "body", "setting"),
    [
        (CHAT, {"query": "\u0bb3\u0bbf" * 4_000}, "LLM_MAX_INPUT_TOKENS"),
        (CHAT, {"query": "x", "max_tokens": 10**6}, "LLM_MAX_TOKENS"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 90_000}]}, "LLM_MAX_INPUT_TOKENS"),
        (CHAT, {"query": "x" * 2_000_000}, "MAX_REQUEST_BYTES"),
    ],
)
def test_what_is_too_large_names_the_setting(make_app, path, body, setting):
    service = make_app(API_KEYS="*")
    answer = service.client.post(path, json=body, headers={"X-Fingerprint": "hash456"})
    assert answer.status_code in {400, 413, 422}
    assert f"({setting})" in answer.text
