"""In front of an upstream that writes down what it billed: streamed through, settled to the bill, or booked whole."""

import json
import threading
import time

import pytest

from flaskapp.ops.embedded_redis import free_port
from tests.servers import CHAT, LITECOIN, events, nanousd, parse_events, wait_until
from tests.upstream import Script, bill_nanousd


def booked(stored, identifier="hash456"):
    (day,) = stored.keys(f"llm:cost:daily:{identifier}:*") or [None]
    ring = stored.zrange(f"llm:cost:recent:{identifier}", 0, -1, withscores=True)
    amounts = {int(stored.get(day) or 0) if day else 0, int(sum(held for _, held in ring))}
    assert len(amounts) == 1
    return amounts.pop()


def test_an_answer_is_settled_to_what_the_upstream_billed(front, upstream, stored):
    answer = front.chat(chat_history=[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
    assert answer.status_code == 200
    *chunks, last = events(answer)
    assert "".join(each["chunk"] for each in chunks) == "".join(Script().words)
    (exchange,) = upstream.ledger
    assert nanousd(last["cost_usd"]) == bill_nanousd(exchange) == booked(stored) > 0
    assert last["usage"] == {"input_tokens": exchange.input_tokens, "output_tokens": exchange.generated_tokens}
    assert nanousd(answer.headers["X-Cost-Reserved-USD"]) >= bill_nanousd(exchange)
    assert [message["role"] for message in exchange.request["messages"]] == ["system", "user", "assistant", "user"]
    assert exchange.headers["Authorization"] == "Bearer key-of-the-upstream"


@pytest.mark.parametrize(("asked", "told"), [({}, 400), ({"max_tokens": 7}, 7)])
def test_the_upstream_gets_the_same_maximum_that_is_reserved(front, upstream, stored, asked, told):
    last = events(front.chat(**asked))[-1]
    (exchange,) = upstream.ledger
    assert told in {exchange.request.get("max_tokens"), exchange.request.get("max_completion_tokens")}
    assert exchange.request["stream"] is True
    assert exchange.request["stream_options"] == {"include_usage": True}
    assert exchange.generated_tokens == min(told, 20)
    assert last["finish_reason"] == ("length" if told < 20 else "stop")


def test_chunks_come_as_they_arrive(front, upstream, stored):
    go_on = threading.Event()
    upstream.behave(words=("first ", "second "), wait_for=go_on)
    answer = front.chat(stream=True)
    pieces = answer.iter_content(None)
    assert parse_events(next(pieces)) == [{"status": "streaming", "chunk": "first "}]
    # The upstream has not said more yet, and the whole reservation is booked.
    assert booked(stored) == nanousd(answer.headers["X-Cost-Reserved-USD"])
    go_on.set()
    rest = parse_events(b"".join(pieces))
    assert rest[0] == {"status": "streaming", "chunk": "second "}
    assert rest[-1]["status"] == "complete"


@pytest.mark.parametrize("status", [401, 404, 500, 302])
def test_a_refusal_of_the_upstream_is_a_502_that_costs_nothing(front, upstream, stored, status):
    upstream.behave(status=status, body='{"error": {"message": "secret of the upstream"}}')
    answer = front.chat()
    assert (answer.status_code, answer.json()["error"]) == (502, "upstream_error")
    assert answer.json()["cost_usd"] == "0.000000000"
    assert "secret" not in answer.text
    assert booked(stored) == 0
    assert stored.keys("llm:open:*") == []
    assert len(upstream.ledger) == 1


def test_a_broken_off_request_is_a_502_and_the_whole_reservation(front, upstream, stored):
    upstream.behave(before_headers="reset")
    answer = front.chat()
    assert (answer.status_code, answer.json()["error"]) == (502, "upstream_error")
    assert nanousd(answer.json()["cost_usd"]) == booked(stored) > 4_000_000
    # It is never sent a second time.
    assert len(upstream.ledger) == 1


@pytest.mark.parametrize("how", ["stall", "trickle"])
def test_an_upstream_that_never_answers_is_a_504_at_the_deadline(front, upstream, stored, how):
    upstream.behave(before_headers=how)
    started = time.monotonic()
    answer = front.chat()
    # Not before: the upstream may still answer. That it comes at all is the deadline, for this upstream never ends.
    assert time.monotonic() - started > 1.8
    assert (answer.status_code, answer.json()["error"]) == (504, "upstream_error")
    assert nanousd(answer.json()["cost_usd"]) == booked(stored) > 4_000_000


@pytest.mark.parametrize(
    "how", ["reset", "cut", "rubbish", "error_event", "named_error", "not_an_object", "deep", "huge_line"]
)
def test_a_stream_that_breaks_is_an_error_event_and_the_whole_reservation(front, upstream, stored, how):
    upstream.behave(words=("one ", "two "), ending=how)
    answer = front.chat()
    assert answer.status_code == 200
    *chunks, last = events(answer)
    assert [each["chunk"] for each in chunks] == ["one ", "two "]
    assert (last["status"], last["error"]) == ("error", "upstream_error")
    assert last["cost_usd"] == answer.headers["X-Cost-Reserved-USD"]
    assert nanousd(last["cost_usd"]) == booked(stored) >= bill_nanousd(upstream.ledger[0])
    assert stored.keys("llm:open:*") == []


def test_an_answer_past_the_deadline_is_cut_and_booked_whole(front, upstream, stored):
    upstream.behave(ending="stall")
    answer = front.chat()
    last = events(answer)[-1]
    assert (last["status"], last["error"]) == ("error", "stream_deadline")
    assert last["cost_usd"] == answer.headers["X-Cost-Reserved-USD"]
    assert booked(stored) == nanousd(last["cost_usd"]) >= bill_nanousd(upstream.ledger[0])
    assert upstream.ledger[0].over.wait(2)
    assert upstream.ledger[0].client_left


def test_an_answer_without_a_usage_is_booked_whole(front, upstream, stored):
    upstream.behave(usage="none")
    answer = front.chat()
    last = events(answer)[-1]
    assert last["cost_usd"] == answer.headers["X-Cost-Reserved-USD"]
    assert booked(stored) == nanousd(last["cost_usd"]) >= bill_nanousd(upstream.ledger[0])


def test_a_client_that_leaves_is_read_on_for_and_pays_what_was_billed(front, upstream, stored):
    upstream.behave(pause_seconds=0.02)
    with front.chat(stream=True) as answer:
        reserved = nanousd(answer.headers["X-Cost-Reserved-USD"])
        next(answer.iter_content(None))
    wait_until(lambda: stored.keys("llm:open:*") == [], 3, "the reservation has ended")
    (exchange,) = upstream.ledger
    assert booked(stored) == bill_nanousd(exchange) < reserved
    assert exchange.generated_tokens == 20
    assert not exchange.client_left


def test_a_client_that_leaves_the_built_in_model_pays_what_was_generated(atomic, books):
    with atomic.chat("leaver", stream=True) as answer:
        reserved = nanousd(answer.headers["X-Cost-Reserved-USD"])
        next(answer.iter_content(None))
    wait_until(lambda: books.keys("llm:open:*") == [], 3, "the reservation has ended")
    spent = booked(books, "leaver")
    assert 77 * 2_500 + 10_000 <= spent < reserved / 2
    told = atomic.lines_with(f"Cost settled request_id={answer.headers['X-Request-ID']}")
    assert len(told) == 1


def test_a_model_that_may_not_be_named_never_reaches_the_upstream(front, upstream, stored):
    refused = front.chat(model="gpt-5")
    assert (refused.status_code, refused.json()["field"]) == (422, "model")
    assert upstream.ledger == []
    assert events(front.chat(model="gpt-4o-mini"))[-1]["status"] == "complete"
    assert upstream.ledger[0].request["model"] == "gpt-4o-mini"
    assert stored.keys("llm:cost:daily:*")


@pytest.mark.parametrize("body", ["{", "{}", '{"query": "x", "max_tokens": 401}', '{"query": "x", "n": 5}'])
def test_what_is_refused_never_reaches_the_upstream(front, upstream, stored, body):
    import requests

    headers = {"Content-Type": "application/json", "X-Fingerprint": "hash456"}
    assert requests.post(front.base_url + CHAT, data=body, headers=headers, timeout=10).status_code in {400, 422}
    assert upstream.ledger == []
    assert [key for key in stored.keys("*") if not key.startswith("llm:rate:")] == []


def test_what_the_guard_refuses_never_reaches_the_upstream(front, upstream, stored):
    front.set_by_hand(stored, high_cost_threshold_usd=0.00001)
    assert front.chat().status_code == 429
    assert upstream.ledger == []
    front.set_by_hand(stored)


def test_twenty_at_once_reach_the_upstream_as_often_as_they_are_paid_for(front, upstream, stored):
    go_on = threading.Event()
    upstream.behave(wait_for=go_on)
    front.set_by_hand(stored, daily_cost_limit_usd=0.0300, throttle_when_busy=False)
    start, answers = threading.Barrier(20), []

    def ask():
        start.wait()
        answers.append(front.chat())

    threads = [threading.Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(answers) == 13, 2, "all but seven are refused while seven are under way")
    go_on.set()
    for thread in threads:
        thread.join()
    admitted = [each for each in answers if each.status_code == 200]
    assert len(admitted) == len(upstream.ledger) == 7
    assert {each.json()["reason"] for each in answers if each.status_code != 200} == {"daily_limit"}
    assert sum(map(bill_nanousd, upstream.ledger)) == booked(stored) <= 30_000_000
    front.set_by_hand(stored)


def test_an_upstream_that_cannot_be_reached_is_a_502_that_costs_nothing(make_app):
    service = make_app(LLM_BASE_URL=f"http://127.0.0.1:{free_port()}/v1")
    answer = service.chat()
    assert (answer.status_code, answer.json["error"], answer.json["cost_usd"]) == (502, "upstream_error", "0.000000000")
    assert service.daily() == 0
    assert json.loads(answer.data)["retry_after_seconds"] is None
    assert LITECOIN["query"] not in answer.text
