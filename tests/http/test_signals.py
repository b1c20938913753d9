"""Every way in which a worker ends, under fifty answers: none is settled twice, and none is forgotten."""

import http.client
import io
import json
import os
import signal
import socket
import threading
from contextlib import suppress
from functools import cached_property
from itertools import count
from pathlib import Path

import pytest
import requests

from tests.servers import CHAT, Service, client_of, nanousd, parse_events, wait_until
from tests.upstream import Upstream, bill_nanousd

GRACE = "--graceful-timeout 6"
"""Answers have a second of it; then they end, and the last four seconds are for what hangs."""
NEVER = threading.Event()


class Visitor(threading.Thread):
    """Asks one question and reads the answer as far as it comes."""

    def __init__(self, service, name):
        super().__init__(daemon=True)
        self.service, self.identifier = service, name
        self.answer = None
        self.received = b""
        self.has_begun = threading.Event()
        self.leaves = False

    def run(self):
        with suppress(requests.RequestException):
            self.answer = self.service.chat(self.identifier, stream=True, query=f"I am {self.identifier}.")
            for part in self.answer.iter_content(None):
                self.received += part
                self.has_begun.set()
                if self.leaves:
                    self.answer.close()
                    return

    @property
    def request_id(self):
        return self.answer.headers["X-Request-ID"]

    @property
    def reserved_nanousd(self):
        return nanousd(self.answer.headers["X-Cost-Reserved-USD"])

    @property
    def last(self):
        """The last event, or the problem that came in its place; None if the connection broke."""
        if self.answer is None:
            return None
        if self.answer.status_code != 200:
            return {"status": self.answer.status_code, **json.loads(self.received)}
        whole = self.received[: self.received.rfind(b"\n\n") + 2]
        last = parse_events(whole)[-1]
        return None if last["status"] == "streaming" else last


class Stuck:
    """Asks, and takes in nothing of a long answer until all is over.

    It asks a model of which steps are counted and not tokens: its answer is not cut, but waits until it is read.
    """

    leaves = True

    def __init__(self, service, name):
        self.identifier = name
        body = json.dumps({"query": f"I am {name}.", "model": "gpt-5-nano"})
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        self.socket.connect(("127.0.0.1", service.port))
        self.socket.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nX-Fingerprint: {name}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
        )

    @cached_property
    def headers(self):
        self.socket.settimeout(5)
        return http.client.parse_headers(io.BytesIO(self.socket.recv(4_096).partition(b"\r\n")[2]))

    @property
    def request_id(self):
        return self.headers["X-Request-ID"]

    @property
    def reserved_nanousd(self):
        return nanousd(self.headers["X-Cost-Reserved-USD"])


class House:
    """A service in front of an upstream, and its visitors."""

    def __init__(self, service, upstream, redis):
        self.service, self.upstream, self.redis = service, upstream, redis
        self.visitors = []
        self.seen = len(service.log_lines())

    def open(self, size, name, *, leaves=False, **script):
        """Begin `size` answers, and wait until each is under way."""
        before = len(self.upstream.ledger)
        self.upstream.behave(**script)
        group = [Visitor(self.service, f"{name}-{number}") for number in range(size)]
        for visitor in group:
            visitor.leaves = leaves
            visitor.start()
        wait_until(lambda: len(self.upstream.ledger) == before + size, 10, "the upstream has them all")
        if "before_headers" not in script:
            assert all(visitor.has_begun.wait(10) for visitor in group)
        self.visitors += group
        return group

    def open_stuck(self, size):
        before = len(self.upstream.ledger)
        self.upstream.behave(words=("x" * 200_000,) * 100, wait_for=None)
        group = [Stuck(self.service, f"stuck-{number}") for number in range(size)]
        wait_until(lambda: len(self.upstream.ledger) == before + size, 10, "the upstream has them all")
        self.visitors += group
        return group

    def wait(self):
        for visitor in (each for each in self.visitors if isinstance(each, Visitor)):
            visitor.join(20)
            assert not visitor.is_alive(), visitor.received

    def booked(self, visitor):
        (day,) = self.redis.keys(f"llm:cost:daily:{visitor.identifier}:*")
        ring = self.redis.zrange(f"llm:cost:recent:{visitor.identifier}", 0, -1, withscores=True)
        (amount,) = {int(self.redis.get(day)), int(sum(held for _, held in ring))}
        return amount

    def entry(self, visitor):
        said = f"I am {visitor.identifier}."
        (entry,) = [each for each in self.upstream.ledger if each.request["messages"][-1]["content"] == said]
        return entry

    def billed(self, visitor):
        return bill_nanousd(self.entry(visitor))

    def ends(self, visitor):
        words = f"Cost settled request_id={visitor.request_id} "
        return sum(words in line for line in self.service.log_lines()[self.seen :])

    def all_are_settled(self):
        """Each is settled once, to what its client got, never below the bill; nothing is pending."""
        wait_until(lambda: self.redis.keys("llm:open:*") == [], 10, "nothing is open")
        wait_until(lambda: all(self.ends(each) for each in self.visitors), 5, "all ends are in the log")
        assert {self.ends(each) for each in self.visitors} == {1}
        for visitor in self.visitors:
            assert self.booked(visitor) >= self.billed(visitor) > 0
            if not visitor.leaves:
                assert self.booked(visitor) == nanousd(visitor.last["cost_usd"])


@pytest.fixture(scope="module")
def upstream():
    with Upstream() as upstream:
        yield upstream


@pytest.fixture
def house(redis_of, upstream, tmp_path):
    """`house(gunicorn's options)`."""
    houses = []
    upstream.ledger.clear()

    def open_house(options=GRACE, config=None, **environment):
        with client_of(redis_of("signals")) as client:
            client.flushall()
        service = Service(
            tmp_path / "house",
            redis_of("signals").url,
            LLM_BASE_URL=upstream.base_url,
            LLM_MODELS="gpt-4o,gpt-5-nano",
            GUNICORN_CMD_ARGS=options,
            ENABLE_COST_THROTTLING="true",
            NETWORK_COST_LIMIT_USD="0",
            HOURLY_SPEND_LIMIT_USD="100",
            DAILY_SPEND_LIMIT_USD="100",
            CHAT_RATE_LIMIT="1000 per minute",
            **{"STREAM_DEADLINE_SECONDS": "30", "DRAIN_SECONDS": "30", **environment},
        )
        service.config = config or service.config
        service.start()
        houses.append(House(service, upstream, client_of(redis_of("signals"))))
        return houses[-1]

    yield open_house
    for house in houses:
        house.service.kill()
        house.redis.close()
        for stuck in (each for each in house.visitors if isinstance(each, Stuck)):
            stuck.socket.close()


def errors(visitors):
    return {each.last and each.last.get("error", each.last["status"]) for each in visitors}


def workers_of(service):
    pid = service._process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    return [int(child) for child in children.split()]


@pytest.mark.parametrize("config", ["gunicorn.conf.py", "tests/http/gthread.conf.py"], ids=["gevent", "gthread"])
def test_sigterm_gives_each_client_a_last_event_and_settles_all(house, config):
    """With greenlets, and with native threads."""
    house = house(config=config)
    leavers = house.open(10, "leaver", leaves=True, words=("word ",) * 400, pause_seconds=0.05)
    stuck = house.open_stuck(2)
    waiting = house.open(10, "waiting", before_headers="stall")
    running = house.open(23, "running", wait_for=NEVER)
    house.open(5, "soon-over", words=("a", "b", "c"), pause_seconds=0.1)
    soon_over = house.visitors[-5:]
    read_on = [house.entry(each).generated_tokens + 20 for each in leavers]
    wait_until(
        lambda: all(house.entry(each).generated_tokens > read for each, read in zip(leavers, read_on, strict=True)),
        10,
        "nobody reads what the leavers asked for, and it was noticed",
    )
    assert house.service.stop() == 0
    house.wait()
    assert errors(soon_over) == {"complete"}
    assert errors(running) == {"server_stopping"}
    assert errors(waiting) == {"upstream_error"}
    assert {each.last["status"] for each in waiting} == {502}
    house.all_are_settled()
    # What was generated and not read cannot be known.
    assert all(house.booked(each) == each.reserved_nanousd for each in leavers + running)
    # Of so much text more was seen than that.
    assert all(house.booked(each) > each.reserved_nanousd for each in stuck)
    log = house.service.log()
    assert "SIGKILL" not in log, log[-2_000:]
    assert "Traceback" not in log, log[log.find("Traceback") - 500 :][:3_000]


def test_sighup_ends_the_old_workers_in_the_same_way_while_new_ones_serve(house):
    house = house()
    running = house.open(50, "running", wait_for=NEVER)
    old = workers_of(house.service)
    os.kill(house.service._process.pid, signal.SIGHUP)
    house.wait()
    assert errors(running) == {"server_stopping"}
    house.all_are_settled()
    wait_until(lambda: not set(workers_of(house.service)) & set(old), 10, "the old workers are gone")
    house.upstream.behave()
    assert house.service.chat("later").status_code == 200


def test_max_requests_ends_a_worker_in_the_same_way(house):
    house = house(f"{GRACE} --max-requests 20")
    running = house.open(50, "running", words=("a", "b"), wait_for=(go_on := threading.Event()))
    # The other worker may not have reached its number.
    wait_until(lambda: sum(each.last is not None for each in running) >= 20, 10, "a worker's answers have ended")
    go_on.set()
    house.wait()
    assert errors(running) - {"complete"} == {"server_stopping"}
    house.all_are_settled()


def test_workers_that_reach_max_requests_together_end_in_turn(house):
    house = house("--graceful-timeout 9 --max-requests 20")
    running = house.open(50, "running", wait_for=NEVER)
    old = set(workers_of(house.service))

    def served_by_others():
        # None waits until the answers of a worker that ends are over. Each counts, so that both workers reach it.
        assert house.service.get("/healthz", timeout=2).status_code == 200
        return not set(workers_of(house.service)) & old

    wait_until(served_by_others, 40, "both have ended")
    house.wait()
    assert errors(running) == {"server_stopping"}


@pytest.mark.parametrize("number", [signal.SIGQUIT, signal.SIGINT])
def test_a_quick_stop_settles_or_leaves_booked_and_never_both(house, number):
    house = house()
    running = house.open(50, "running", wait_for=NEVER)
    process = house.service._process
    process.send_signal(number)
    assert process.wait(8) == 0
    house.wait()
    assert {house.ends(each) for each in running} <= {0, 1}
    # What was used is not known, so that what is booked is the same either way.
    assert all(house.booked(each) == each.reserved_nanousd >= house.billed(each) for each in running)
    told = [each for each in running if each.last is not None]
    assert errors(told) == {"server_stopping"}
    assert all(house.ends(each) == 1 for each in told)


def test_a_killed_worker_leaves_all_booked_and_what_it_left_is_told_as_expired(house):
    house = house(STREAM_DEADLINE_SECONDS="3", DRAIN_SECONDS="0")
    running = house.open(50, "running", wait_for=NEVER)
    victim, *_ = workers_of(house.service)
    os.kill(victim, signal.SIGKILL)
    house.wait()
    killed = [each for each in running if each.last is None]
    living = [each for each in running if each.last is not None]
    assert killed
    assert living
    assert errors(living) == {"stream_deadline"}
    assert [house.ends(each) for each in killed] == [0] * len(killed)
    assert [house.ends(each) for each in living] == [1] * len(living)
    assert all(house.booked(each) == each.reserved_nanousd >= house.billed(each) for each in running)
    left_nanousd = sum(each.reserved_nanousd for each in killed)
    house.upstream.behave()

    later = (f"later-{number}" for number in count())

    def expired_nanousd():
        # Never one who is out of budget: a refusal sweeps nothing.
        house.service.chat(next(later), max_tokens=1)
        lines = [line for line in house.service.log_lines() if "Reservations expired" in line]
        return sum(nanousd(line.partition("expired_usd=")[2].split()[0]) for line in lines)

    wait_until(lambda: expired_nanousd() == left_nanousd, 15, "what the killed worker left is told as expired")
    assert all(house.booked(each) == each.reserved_nanousd for each in killed)
    assert house.redis.zrange("llm:open:global", 0, -1) == []
