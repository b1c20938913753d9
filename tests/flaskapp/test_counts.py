"""What a request costs in counts that are never noisy: round trips, writes to the client, log lines, functions."""

import logging
import subprocess
import sys
import threading

import pytest

from flaskapp.lab.wire import Wire, commands_in
from tests.docs.pages import ROOT
from tests.upstream import Upstream

ASKED = {"messages": [{"role": "user", "content": "What is Litecoin?"}], "max_tokens": 50}
MOST_FUNCTIONS = 90
"""Of ours, entered by one chat of 20 tokens. The aim is 60: lower this with each step towards it."""


class Wires(Wire):
    def __init__(self):
        super().__init__()
        self.sent = []

    def __call__(self, packed):
        super().__call__(packed)
        self.sent.append([command[0].decode() for command, _ in commands_in(packed)])


@pytest.fixture
def wires():
    return Wires()


@pytest.fixture
def proxied(make_app, wires):
    with Upstream() as upstream:
        yield make_app(before_each_send=wires, LLM_BASE_URL=upstream.base_url, API_KEYS="*"), upstream


def sent_by(wires, request):
    request()
    wires.sent.clear()
    request()
    # The settings, and what is learnt of the upstream, are read by a thread of their own.
    return [commands for commands in wires.sent if commands not in (["GET"], ["MGET"])]


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_takes_three_round_trips(proxied, wires, stream):
    """The request limit, the reservation, the settlement."""
    service, _ = proxied
    body = ASKED | {"stream": stream}
    sent = sent_by(wires, lambda: service.client.post("/v1/chat/completions", json=body, buffered=True).close())
    assert sent == [["EVALSHA"], ["EVALSHA"], ["EVALSHA"]]


def test_a_chat_takes_three_round_trips(make_app, wires):
    service = make_app(before_each_send=wires)
    assert len(sent_by(wires, lambda: service.chat(max_tokens=5))) == 3


def test_what_one_read_of_the_upstream_gives_is_one_write_to_the_client(proxied):
    service, upstream = proxied
    words = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    raw = b"".join(
        b'data: {"id":"x","choices":[{"index":0,"delta":{"content":"%b"},"finish_reason":null}]}\n\n' % word.encode()
        for word in words
    )
    upstream.behave(words=("first",), raw=raw.decode().removeprefix("data: ").removesuffix("\n\n"))
    answer = service.client.post("/v1/chat/completions", json=ASKED | {"stream": True})
    written = [each for each in answer.iter_encoded() if b"three" in each]
    answer.close()
    assert [each.count(b"data: ") >= 10 for each in written] == [True]


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_starts_no_thread(proxied, monkeypatch, stream):
    """Under gevent: no greenlet."""
    service, _ = proxied

    def ask():
        service.client.post("/v1/chat/completions", json=ASKED | {"stream": stream}, buffered=True).close()

    ask()
    started, start = [], threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda thread: started.append(thread.name) or start(thread))
    ask()
    # The upstream is a server of this process, with a thread for each connection.
    assert [name for name in started if name.startswith("tollgate")] == []


def test_a_chat_has_three_lines_in_the_log(make_app, caplog):
    service = make_app()
    service.chat(max_tokens=5)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="tollgate"):
        service.chat(max_tokens=5)
    lines = [record.message for record in caplog.records if record.name == "tollgate"]
    assert lines == ["Cost throttling check called", "Cost recorded for stable_identifier", "Cost settled"]


def test_a_chat_enters_no_more_functions_than_it_did():
    command = [sys.executable, "-m", "benchmarks.service.entered"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=100)
    assert len(done.stdout.splitlines()) <= MOST_FUNCTIONS
