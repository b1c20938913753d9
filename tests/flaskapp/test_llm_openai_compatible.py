import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from backends.clock import SystemClock
from backends.errors import ConfigurationError
from backends.pricing.token_bounds import Message, counter_for
from flaskapp.llm import UpstreamBroken, UpstreamNotTaken, Usage
from flaskapp.llm.exchange import ExchangeTimeout, _is_readable
from flaskapp.llm.openai_compatible import OpenAICompatibleModel
from tests.models import Texts, batches_of, model_request, opened
from tests.upstream import WORDS, Script, Upstream

TURNS = (Message("system", "Be brief."), Message("user", "What is Litecoin?"))
TEXT = "".join(WORDS)


@pytest.fixture
def upstream():
    with Upstream() as server:
        yield server


@pytest.fixture
def model(upstream):
    client = OpenAICompatibleModel(upstream.base_url, "sk-secret", clock=SystemClock())
    yield client
    client.close()


def open_answer(model, *, name="gpt-4o", max_tokens=400, deadline_seconds=10.0):
    return Texts(
        opened(model, model_request(TURNS, model=name, max_tokens=max_tokens, deadline_seconds=deadline_seconds))
    )


def connections(model):
    """How many are in use, and how many wait for their next use."""
    return model.connections.in_use, model.connections.idle


def billed(exchange):
    return Usage(exchange.input_tokens, exchange.generated_tokens)


# What is asked


def test_the_request_says_what_the_reservation_assumes(upstream, model):
    assert "".join(open_answer(model, max_tokens=123)) == TEXT
    exchange = upstream.ledger[0]
    assert exchange.path == "/v1/chat/completions"
    assert exchange.request == {
        "model": "gpt-4o",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is Litecoin?"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 123,
    }
    assert exchange.headers["Authorization"] == "Bearer sk-secret"
    assert exchange.headers["Accept-Encoding"] == "identity"
    assert exchange.headers["Host"] == f"127.0.0.1:{upstream.port}"


@pytest.mark.parametrize("name", ["o1", "o3-mini", "o4-mini-2025-04-16", "gpt-5", "gpt-5.2-mini", "openai/gpt-5"])
def test_newer_models_get_max_completion_tokens(upstream, model, name):
    list(open_answer(model, name=name, max_tokens=7))
    assert upstream.ledger[0].request["max_completion_tokens"] == 7
    assert "max_tokens" not in upstream.ledger[0].request


@pytest.mark.parametrize("name", ["gpt-4o", "gpt-4.1", "gpt-3.5-turbo", "llama-3", "olmo-2", "gpt-oss-120b"])
def test_all_others_get_max_tokens(upstream, model, name):
    list(open_answer(model, name=name, max_tokens=7))
    assert upstream.ledger[0].request["max_tokens"] == 7


@pytest.mark.parametrize(
    ("suffix", "path"),
    [("/v1", "/v1/chat/completions"), ("/v1//", "/v1/chat/completions"), ("", "/chat/completions"),
     ("/a b?api-version=2", "/a%20b/chat/completions?api-version=2")],
)  # fmt: skip
def test_the_base_url_in_its_spellings(upstream, suffix, path):
    client = OpenAICompatibleModel(f"http://127.0.0.1:{upstream.port}{suffix}", clock=SystemClock())
    list(open_answer(client))
    assert upstream.ledger[0].path == path
    assert "Authorization" not in upstream.ledger[0].headers
    client.close()


def test_credentials_in_the_url_become_basic_ones_unless_there_is_a_key(upstream):
    for key, expected in ((None, "Basic dXNlcjpwQHNz"), ("sk-1", "Bearer sk-1")):
        client = OpenAICompatibleModel(f"http://user:p%40ss@127.0.0.1:{upstream.port}/v1", key, clock=SystemClock())
        list(open_answer(client))
        assert upstream.ledger[-1].headers["Authorization"] == expected
        assert upstream.ledger[-1].headers["Host"] == f"127.0.0.1:{upstream.port}"
        client.close()


@pytest.mark.parametrize("url", ["", "api.openai.com/v1", "ftp://h/v1", "http://", "http://h:99999/", "http://[::1/"])
def test_a_base_url_that_cannot_be_used_stops_the_start(url):
    with pytest.raises(ConfigurationError, match=r"^LLM_BASE_URL: [^\n]*; got [^\n]*$"):
        OpenAICompatibleModel(url, clock=SystemClock())


def test_neither_a_password_nor_a_key_is_shown():
    with pytest.raises(ConfigurationError) as caught:
        OpenAICompatibleModel("ftp://user:hunter2@h/v1", clock=SystemClock())
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ConfigurationError) as caught:
        OpenAICompatibleModel("http://h/v1", "sk-bad\r\nX: y", clock=SystemClock())
    assert "sk-bad" not in str(caught.value)


def test_no_proxy_is_taken_from_the_environment(upstream, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    client = OpenAICompatibleModel(upstream.base_url, clock=SystemClock())
    assert "".join(open_answer(client)) == TEXT
    client.close()


# What comes back


@pytest.mark.parametrize("piece_bytes", [0, 1, 3, 1_000])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_however_the_stream_is_cut(upstream, model, line_end, piece_bytes):
    upstream.behave(line_end=line_end, piece_bytes=piece_bytes, comments=True, words=("Grüße ", "😀 ", "“x”"))
    answer = open_answer(model)
    assert "".join(answer) == "Grüße 😀 “x”"
    assert answer.usage == billed(upstream.ledger[0])


@pytest.mark.parametrize("usage", ["end", "twice", "twice_less", "every", "with_finish"])
@pytest.mark.parametrize("ending", ["done", "no_done", "no_blank_line"])
def test_the_bill_is_what_the_server_says_wherever_it_says_it(upstream, model, usage, ending):
    upstream.behave(usage=usage, ending=ending)
    answer = open_answer(model)
    assert "".join(answer) == TEXT
    assert answer.finish_reason == "stop"
    assert answer.usage == billed(upstream.ledger[0])
    assert answer.usage.output_tokens == 20


@pytest.mark.parametrize(
    "usage", ["none", "first_only", "zero", "zero_input", "zero_output", "absurd", "rubbish", "negative"]
)
def test_a_usage_that_says_nothing_is_unknown_and_not_zero(upstream, model, usage):
    upstream.behave(usage=usage)
    answer = open_answer(model)
    assert "".join(answer) == TEXT
    assert answer.usage is None


def test_an_empty_answer_may_have_used_no_output(upstream, model):
    upstream.behave(words=())
    answer = open_answer(model)
    assert list(answer) == []
    assert answer.usage == Usage(upstream.ledger[0].input_tokens, 0)


def test_cached_tokens_are_reported(upstream, model):
    upstream.behave(cached_tokens=5)
    answer = open_answer(model)
    list(answer)
    assert answer.usage.cached_input_tokens == 5


def test_reasoning_and_tool_calls_are_counted_and_not_shown(upstream, model):
    upstream.behave(reasoning_words=30, tool_words=4, words=("Yes.",))
    answer = open_answer(model)
    assert list(answer) == ["Yes."]
    assert answer.usage == Usage(upstream.ledger[0].input_tokens, 35, reasoning_tokens=30)


def test_reasoning_that_is_told_beside_an_output_of_zero_was_used(upstream, model):
    upstream.behave(reasoning_words=30, words=(), usage="zero_output")
    answer = open_answer(model)
    assert list(answer) == []
    assert answer.usage == Usage(upstream.ledger[0].input_tokens, 30, reasoning_tokens=30)


def test_max_tokens_cuts_the_answer(upstream, model):
    answer = open_answer(model, max_tokens=3)
    assert "".join(answer) == "".join(WORDS[:3])
    assert answer.finish_reason == "length"
    assert answer.usage.output_tokens == 3


def test_each_piece_arrives_before_the_next_is_sent(upstream, model):
    go_on = threading.Event()
    upstream.behave(wait_for=go_on)
    texts = iter(open_answer(model))
    assert next(texts) == WORDS[0]  # the server does not send the second before this one was seen
    go_on.set()
    assert next(texts).startswith(WORDS[1])


# What breaks


@pytest.mark.parametrize("status", [401, 402, 403, 404, 409, 500, 502])
def test_an_error_status_was_not_taken(upstream, model, status):
    upstream.behave(status=status, body='{"error": {"message": "no\u0007 key sk-secret\\n' + "x" * 9_000 + '"}}')
    with pytest.raises(UpstreamNotTaken) as caught:
        open_answer(model)
    assert str(caught.value) == f"The model's server refused the request with status {status}."
    assert "no key ***" in caught.value.detail
    assert "sk-secret" not in caught.value.detail
    assert len(caught.value.detail) <= 200
    assert caught.value.detail.isprintable()
    assert [exchange.taken for exchange in upstream.ledger] == [False]  # asked once, no retry


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(upstream, model, status):
    upstream.behave(status=status, headers=(("Location", upstream.base_url + "/elsewhere"),))
    with pytest.raises(UpstreamNotTaken, match=str(status)):
        open_answer(model)
    assert len(upstream.ledger) == 1


def test_a_server_that_is_not_there_was_not_reached():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        client = OpenAICompatibleModel(f"http://127.0.0.1:{free.getsockname()[1]}/v1", clock=SystemClock())
        with pytest.raises(UpstreamNotTaken, match="could not be reached"):
            open_answer(client)
    client.close()


def test_a_name_that_does_not_exist_was_not_reached():
    client = OpenAICompatibleModel("http://nowhere.invalid/v1", clock=SystemClock())
    with pytest.raises(UpstreamNotTaken):
        open_answer(client)
    client.close()


def test_a_server_without_tls_was_not_reached(upstream):
    client = OpenAICompatibleModel(upstream.base_url.replace("http:", "https:"), clock=SystemClock())
    with pytest.raises(UpstreamNotTaken):
        open_answer(client, deadline_seconds=5)
    client.close()


def test_a_reset_before_the_headers_may_have_cost_something(upstream, model):
    upstream.behave(before_headers="reset")
    with pytest.raises(UpstreamBroken) as caught:
        open_answer(model)
    assert not caught.value.timed_out
    assert len(upstream.ledger) == 1  # and it is not sent again


@pytest.mark.parametrize("before_headers", ["stall", "trickle"])
def test_no_headers_until_the_deadline(upstream, model, before_headers):
    upstream.behave(before_headers=before_headers)
    start = time.perf_counter()
    with pytest.raises(UpstreamBroken) as caught:
        open_answer(model, deadline_seconds=0.3)
    assert caught.value.timed_out
    assert time.perf_counter() - start > 0.25
    assert upstream.ledger[0].over.wait(5)


@pytest.mark.parametrize("content_type", ["image/png", "text/html; charset=utf-8"])
def test_a_body_that_is_no_stream(upstream, model, content_type):
    upstream.behave(content_type=content_type)
    with pytest.raises(UpstreamBroken, match="no answer"):
        open_answer(model)


def test_a_stream_without_a_content_type_is_taken_for_one(upstream, model):
    upstream.behave(content_type=None)
    assert "".join(open_answer(model)) == TEXT


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        ("reset", "broke off"),
        ("late_reset", "broke off"),
        ("late_error_event", "reported an error"),
        ("cut", "broke off"),
        ("no_finish", "broke off"),
        ("error_event", "reported an error"),
        ("named_error", "reported an error"),
        ("rubbish", "no answer"),
        ("not_an_object", "no answer"),
        ("deep", "no answer"),
        ("huge_line", "no answer"),
    ],
)
@pytest.mark.parametrize("usage", ["none", "end", "every"])
def test_an_answer_that_breaks_off_is_of_unknown_cost(upstream, model, ending, words, usage):
    upstream.behave(ending=ending, usage=usage if ending != "no_finish" else "none")
    answer = open_answer(model)
    shown = []
    with pytest.raises(UpstreamBroken, match=words) as caught:
        shown.extend(answer)
    assert not caught.value.timed_out
    assert answer.usage is None
    assert upstream.ledger[0].over.wait(5)
    answer.close()


def test_a_stall_ends_at_the_deadline(upstream, model):
    upstream.behave(ending="stall")
    answer = open_answer(model, deadline_seconds=0.3)
    with pytest.raises(UpstreamBroken) as caught:
        list(answer)
    assert caught.value.timed_out
    assert answer.usage is None
    assert upstream.ledger[0].over.wait(5)


def test_a_trickle_ends_at_the_deadline(upstream, model):
    upstream.behave(words=("x ",) * 1_000, pause_seconds=0.02)
    answer = open_answer(model, max_tokens=1_000, deadline_seconds=0.3)
    with pytest.raises(UpstreamBroken) as caught:
        list(answer)
    assert caught.value.timed_out


# Closing and pooling


def test_closing_on_the_way_hangs_up_and_leaves_the_cost_unknown(upstream, model):
    upstream.behave(wait_for=threading.Event())
    answer = open_answer(model)
    texts = iter(answer)
    assert next(texts) == WORDS[0]
    answer.close()
    answer.close()
    assert upstream.ledger[0].over.wait(5)
    assert upstream.ledger[0].client_left
    assert answer.usage is None
    assert list(texts) == []
    assert connections(model) == (0, 0)


def test_closing_wakes_a_reader_in_another_thread(upstream, model):
    upstream.behave(wait_for=threading.Event())
    answer = open_answer(model)
    first, shown = threading.Event(), []

    def read():
        for text in answer:
            shown.append(text)
            first.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert first.wait(5)
    answer.close()
    reader.join(5)
    assert not reader.is_alive()
    assert shown == [WORDS[0]]
    assert upstream.ledger[0].over.wait(5)
    assert connections(model) == (0, 0)


@pytest.mark.parametrize("close", [lambda answer: answer.close(), lambda _: None], ids=["closed", "dropped"])
def test_an_unread_answer_is_hung_up(upstream, model, close):
    upstream.behave(wait_for=threading.Event())
    close(open_answer(model))
    assert upstream.ledger[0].over.wait(5)
    assert upstream.ledger[0].client_left
    assert connections(model) == (0, 0)


@pytest.mark.parametrize("ending", ["done", "no_done"])
def test_a_connection_serves_one_answer_after_the_other(upstream, model, ending):
    upstream.behave(ending=ending)
    for _ in range(3):
        answer = open_answer(model)
        assert "".join(answer) == TEXT
        answer.close()  # after the end: must not hurt the connection
    assert len({exchange.connection for exchange in upstream.ledger}) == 1


def test_hung_up_on_it_gives_what_had_come_and_the_upstream_generates_no_more(upstream, model):
    upstream.behave(wait_for=threading.Event(), wait_at="end")
    answer = open_answer(model)
    pieces = iter(answer)
    assert next(pieces) == WORDS[0]
    assert upstream.ledger[0].waits.wait(5)
    answer.hang_up()
    assert "".join(pieces) == "".join(WORDS[1:])
    assert answer.usage is None
    answer.close()
    assert connections(model) == (0, 0)


def test_hung_up_on_after_all_had_come_it_has_its_usage_and_its_connection_is_not_used_again(upstream, model):
    answer = open_answer(model)
    assert upstream.ledger[0].over.wait(5)
    answer.hang_up()
    assert "".join(answer) == "".join(WORDS)
    assert answer.usage == billed(upstream.ledger[0])
    assert "".join(open_answer(model)) == "".join(WORDS)
    first, second = upstream.ledger
    assert first.connection != second.connection


@pytest.mark.parametrize("failure", [ValueError("rubbish"), ExchangeTimeout("late")])
def test_after_a_hang_up_only_the_end_of_the_connection_is_the_end_of_what_had_come(upstream, model, failure):
    def fail(_):
        raise failure

    upstream.behave(wait_for=threading.Event(), wait_at="end")
    answer = opened(model, model_request(TURNS))
    answer.hang_up()
    answer._read = fail
    with pytest.raises(UpstreamBroken):
        answer.read(10)
    assert (answer.usage, connections(model)) == (None, (0, 0))


def test_what_was_read_when_it_is_closed_by_another_is_handed_out(upstream, model):
    answer = opened(model, model_request(TURNS))
    read = answer._read
    answer._read = lambda wait_seconds: (read(wait_seconds), answer.close())[0]
    assert answer.read(10).pieces
    assert answer.read(10) is None
    assert connections(model)[0] == 0


def test_an_upstream_that_goes_on_after_its_end_is_not_waited_for(upstream, model):
    class Clock:
        seconds = 0.0

        def monotonic_seconds(self):
            self.seconds += 0.01
            return self.seconds

    answer = opened(model, model_request(TURNS))
    answer._clock, answer._is_whole, reads = Clock(), True, []
    answer._exchange.read_until = lambda moment: reads.append(moment) or b"more"
    assert answer.read(10) is None
    assert 0 < len(reads) < 30


class StillClock:
    """By it no read ever takes any time."""

    def monotonic_seconds(self):
        return 0.0


def test_what_comes_in_one_read_is_ahead_of_its_reader_and_the_next_read_begins_anew(upstream):
    model = OpenAICompatibleModel(upstream.base_url, clock=StillClock())
    events = [json.dumps({"choices": [{"index": 0, "delta": {"content": word}}]}) for word in WORDS[:10]]
    go_on = threading.Event()
    upstream.behave(wait_for=go_on, wait_at="first", words=("x y",), raw="\n\ndata: ".join(events))
    leads = []
    for batch in batches_of(opened(model, model_request(TURNS))):
        if batch.tokens:
            leads.append((batch.tokens, batch.lead_tokens))
            go_on.set()
    tokens = counter_for("gpt-4o")("".join(WORDS[:10]))
    model.close()
    assert leads == [(tokens, tokens), (1, 1)]


def test_a_refusal_leaves_no_connection_behind_that_is_in_use(upstream, model):
    upstream.behave(status=500)
    for _ in range(3):
        with pytest.raises(UpstreamNotTaken):
            open_answer(model)
    assert connections(model) == (0, 1)
    assert len({exchange.connection for exchange in upstream.ledger}) == 1


def test_a_connection_that_the_server_has_closed_meanwhile_is_not_used(upstream, model):
    list(open_answer(model))
    (idle,) = model.connections._idle
    upstream._server.drop_connections()
    deadline = time.perf_counter() + 5
    while not _is_readable(idle.plain):
        assert time.perf_counter() < deadline
    assert "".join(open_answer(model)) == TEXT
    assert idle.plain.fileno() == -1


def test_two_hundred_streams_at_once(upstream, model):
    go_on = threading.Event()
    upstream.behave(wait_for=go_on)
    answers = [open_answer(model) for _ in range(200)]
    texts = [iter(answer) for answer in answers]
    assert [next(text) for text in texts] == [WORDS[0]] * 200
    go_on.set()
    assert ["".join(text) for text in texts] == ["".join(WORDS[1:])] * 200
    assert [answer.usage for answer in answers] == [billed(exchange) for exchange in upstream.ledger]


def test_under_gevent_streams_run_side_by_side_and_unbuffered(upstream):
    """Forty streams of 20 words, 20 ms apart: every one of them has begun before the first has ended."""
    upstream.behave(pause_seconds=0.02)
    program = """
import gevent.monkey; gevent.monkey.patch_all()
import gevent, json, sys
from backends.clock import SystemClock
from backends.pricing.token_bounds import Message
from flaskapp.llm.openai_compatible import OpenAICompatibleModel
from backends.pricing.token_bounds import counter_for
from tests.models import batches_of, model_request, opened
counter_for("gpt-4o")  # as the factory does: a vocabulary takes a while to load
clock = SystemClock()
model = OpenAICompatibleModel(sys.argv[1], clock=clock)
def one(number):
    answer = opened(model, model_request([Message("user", "hi")]))
    texts = 0
    for batch in batches_of(answer):
        texts += sum(len(piece.texts) or bool(piece.text) for piece in batch.pieces)
        order.append((number, texts))
    return texts, answer.usage.output_tokens
def leave(number):
    answer = opened(model, model_request([Message("user", "hi")]))
    next(batches_of(answer))
    answer.close()
    return answer.read(0) is not None
order = []
jobs = [gevent.spawn(one, number) for number in range(40)]
left = [gevent.spawn(leave, number) for number in range(10)]
results = [job.get() for job in jobs]
print(json.dumps([results, [job.get() for job in left], order, model.connections.in_use]))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, upstream.base_url],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results, left, order, in_use = json.loads(done.stdout)
    assert results == [[20, 20]] * 40
    begun, ended = {}, {}
    for at, (number, _) in enumerate(order):
        begun.setdefault(number, at)
        ended[number] = at
    last_beginning, first_ending = max(begun.values()), min(ended.values())
    assert len(order) > 40 * 15
    assert last_beginning < first_ending
    assert left == [False] * 10
    assert in_use == 0


def test_the_scripts_of_the_oracle_can_be_lined_up(upstream, model):
    upstream.scripts.extend([Script(status=503), Script(words=("one",))])
    with pytest.raises(UpstreamNotTaken):
        open_answer(model)
    assert list(open_answer(model)) == ["one"]
    assert "".join(open_answer(model)) == TEXT


KEY_WITH_ESCAPES = "sk/ab+cd\\\\ef=='key"


@pytest.mark.parametrize(
    "spell",
    [
        str,
        lambda key: json.dumps(key)[1:-1],
        lambda key: json.dumps(key)[1:-1].replace("/", "\\/"),
        lambda key: "".join(f"\\u{ord(character):04X}" for character in key),
        lambda key: "".join(f"\\u{ord(character):04x}" if character in "/+=" else character for character in key),
        lambda key: "".join(f"%{ord(character):02X}" for character in key),
        lambda key: repr(repr(key))[2:-2],
    ],
    ids=["plain", "json", "json_slashes", "escapes", "some_escapes", "url", "repr_of_repr"],
)
def test_the_key_is_shown_in_no_spelling(upstream, spell):
    client = OpenAICompatibleModel(upstream.base_url, KEY_WITH_ESCAPES, clock=SystemClock())
    told = f"no such key: {spell(KEY_WITH_ESCAPES)}; that is all"
    details = []
    upstream.behave(status=401, body=told)
    with pytest.raises(UpstreamNotTaken) as refused:
        client.ask(model_request(TURNS)).whole()
    details.append(refused.value.detail)
    upstream.behave(raw=json.dumps({"error": told}))
    with pytest.raises(UpstreamNotTaken) as whole:
        client.ask(model_request(TURNS)).whole()
    details.append(whole.value.detail)
    with pytest.raises(UpstreamNotTaken) as streamed:
        list(open_answer(client))
    details.append(streamed.value.detail)
    client.close()
    assert ["no such key: ***; that is all" in detail for detail in details] == [True] * 3


def test_a_key_after_many_backslashes_is_found_in_no_time(upstream, model):
    upstream.behave(raw=json.dumps({"error": "\\" * 500_000 + "sk-secret"}))
    with pytest.raises(UpstreamNotTaken) as caught:
        model.ask(model_request(TURNS)).whole()
    assert "***" in caught.value.detail
