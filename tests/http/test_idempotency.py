"""`Idempotency-Key` by the upstream's own bill: in parallel, on every end of the first try, and after a crash."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from tests.http.test_upstream import booked
from tests.servers import CHAT, LITECOIN, events, nanousd, wait_until
from tests.upstream import bill_nanousd


def ask(front, key="one", *, stream=False, fingerprint="hash456", **fields):
    headers = {"X-Fingerprint": fingerprint, "Idempotency-Key": key}
    content = {**LITECOIN, **fields}
    return requests.post(front.base_url + CHAT, json=content, headers=headers, timeout=30, stream=stream)


def duplicate(refused):
    body = refused.json()
    assert (refused.status_code, body["error"]) == (409, "duplicate_request"), body
    return body["reason"], body["first_request_id"], nanousd(body["cost_usd"])


def test_in_flight_and_settled_the_upstream_is_called_once(front, upstream, stored):
    go_on = threading.Event()
    upstream.behave(wait_for=go_on)
    with ask(front, stream=True) as first:
        first_id, reserved = first.headers["X-Request-ID"], nanousd(first.headers["X-Cost-Reserved-USD"])
        assert duplicate(ask(front)) == ("in_flight", first_id, reserved)
        assert duplicate(ask(front, query="Another?")) == ("other_body", first_id, reserved)
        go_on.set()
        cost_nanousd = nanousd(events(first)[-1]["cost_usd"])
    assert duplicate(ask(front)) == ("settled", first_id, cost_nanousd)
    (exchange,) = upstream.ledger
    assert cost_nanousd == bill_nanousd(exchange) == booked(stored)


def test_of_twenty_at_once_with_one_key_one_reaches_the_upstream(front, upstream, stored):
    go_on, start = threading.Event(), threading.Barrier(20)
    upstream.behave(wait_for=go_on)

    def together(_):
        start.wait(10)
        answer = ask(front, stream=True)
        if answer.status_code == 409:
            refused.append(answer)
        return answer

    refused = []
    with ThreadPoolExecutor(20) as pool:
        waiting = [pool.submit(together, number) for number in range(20)]
        wait_until(lambda: len(refused) == 19, 5, "all but one are refused as duplicates")
        go_on.set()
        answers = [each.result() for each in waiting]
    (admitted,) = [each for each in answers if each.status_code == 200]
    cost_nanousd = nanousd(events(admitted)[-1]["cost_usd"])
    reserved = nanousd(admitted.headers["X-Cost-Reserved-USD"])
    assert {duplicate(each) for each in refused} == {("in_flight", admitted.headers["X-Request-ID"], reserved)}
    (exchange,) = upstream.ledger
    assert cost_nanousd == bill_nanousd(exchange) == booked(stored)


@pytest.mark.parametrize("status", [400, 429, 503])
def test_what_the_upstream_refused_may_be_sent_again(front, upstream, stored, status):
    upstream.behave(status=status)
    assert ask(front).status_code == status
    assert stored.keys("llm:idempotency:*") == []
    upstream.behave()
    again = ask(front)
    assert again.status_code == 200
    cost_nanousd = nanousd(events(again)[-1]["cost_usd"])
    assert duplicate(ask(front)) == ("settled", again.headers["X-Request-ID"], cost_nanousd)
    assert cost_nanousd == booked(stored)


def test_what_the_upstream_may_have_done_is_not_sent_again(front, upstream, stored):
    upstream.behave(before_headers="reset")
    broken = ask(front)
    assert broken.status_code == 502
    cost_nanousd = nanousd(broken.json()["cost_usd"])
    assert duplicate(ask(front)) == ("settled", broken.headers["X-Request-ID"], cost_nanousd)
    assert len(upstream.ledger) == 1
    assert cost_nanousd == booked(stored) > 4_000_000


def test_a_client_that_left_and_asks_again_learns_what_it_paid(front, upstream, stored):
    upstream.behave(pause_seconds=0.05)
    with ask(front, stream=True) as first:
        next(first.iter_content(None))
        first_id = first.headers["X-Request-ID"]
    wait_until(lambda: duplicate(ask(front))[0] == "settled", 5, "the reservation has ended")
    assert duplicate(ask(front))[1:] == (first_id, booked(stored))
    (exchange,) = upstream.ledger
    assert bill_nanousd(exchange) <= booked(stored)


def test_after_a_crash_it_is_in_flight_and_then_expired_and_stays_paid_for(front, upstream, stored):
    upstream.behave(wait_for=threading.Event())
    first = ask(front, stream=True)
    next(first.iter_content(None))
    first_id, reserved = first.headers["X-Request-ID"], nanousd(first.headers["X-Cost-Reserved-USD"])
    kill_workers(front)
    first.close()
    wait_until(lambda: is_answering(front), 10, "gunicorn has new workers")
    seen = []

    def has_expired():
        seen.append(duplicate(ask(front)))
        return seen[-1][0] == "expired"

    wait_until(has_expired, 12, "its deadline is over, and the time to be settled")
    # How much of the seven seconds the new workers took is not known here; what was sent before is.
    assert {reason for reason, _, _ in seen} <= {"in_flight", "expired"}
    assert {(first, cost) for _, first, cost in seen} == {(first_id, reserved)}
    assert duplicate(ask(front, query="Another?")) == ("other_body", first_id, reserved)
    assert len(upstream.ledger) == 1
    assert booked(stored) == reserved >= bill_nanousd(upstream.ledger[0])


def kill_workers(front):
    master = front._process.pid
    workers = Path(f"/proc/{master}/task/{master}/children").read_text().split()
    assert len(workers) == front.workers
    for worker in workers:
        os.kill(int(worker), signal.SIGKILL)


def is_answering(front):
    try:
        return front.get("/healthz").ok
    except requests.ConnectionError:
        return False
