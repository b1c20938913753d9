"""What docs/STREAMS.md says of answers that end before their end is what happens."""

import http.client
import json
import socket
import struct
import threading
from dataclasses import dataclass, field

import pytest

from flaskapp.ops.embedded_redis import free_port
from tests.docs.pages import ROOT, rows
from tests.servers import CHAT, Service, client_of, nanousd, parse_events, wait_until
from tests.upstream import Script, Upstream, bill_nanousd

PAGE = ROOT / "docs" / "STREAMS.md"
LEAVING, FAILING = "the client leaves", "the upstream"
DEADLINE_SECONDS, DRAIN_SECONDS = 4, 1
LONG = tuple("word " for _ in range(60))

# --- what the columns and the rows mean

SAYINGS = {
    "usage at the end": {},
    "no usage": {"usage": "none"},
    "usage twice": {"usage": "twice"},
    "usage in every chunk": {"usage": "every"},
    "a usage of zero": {"usage": "zero"},
    "an error event": {"ending": "error_event"},
    "reasoning only": {"words": (), "reasoning_words": 20},
    "tool calls only": {"words": (), "tool_words": 20},
    "two choices": {"choices": 2, "words": (" word",) * 20},
    "silence": {"ending": "stall"},
}
MOMENTS = {
    "before the headers": "head",
    "before the first chunk": "first",
    "in the middle": "middle",
    "before the last event": "end",
    "after the last event": "after",
    "never": "never",
}
FAILURES = {
    "refuses the connection": None,
    "answers 400": {"status": 400},
    "answers 429": {"status": 429},
    "answers 503": {"status": 503},
    "answers 500": {"status": 500},
    "answers 408": {"status": 408},
    "answers 504": {"status": 504},
    "answers 524": {"status": 524},
    "redirects": {"status": 302, "headers": (("Location", "/v2"),)},
    "resets before its head": {"before_headers": "reset"},
    "stalls before its head": {"before_headers": "stall"},
    "trickles its head": {"before_headers": "trickle"},
    "sends an error in place of a stream": {"status": 200, "content_type": "application/json", "error_first": True},
    "sends an error as its first event": {"error_first": True},
    "sends a page in place of a stream": {"content_type": "text/html"},
    "sends an error in the middle": {"words": ("a",), "ending": "error_event"},
    "resets in the middle": {"words": ("a",), "ending": "reset"},
    "closes in the middle": {"words": ("a",), "ending": "cut"},
    "sends rubbish in the middle": {"words": ("a",), "ending": "rubbish"},
    "sends an event without end": {"words": ("a",), "ending": "huge_line"},
    "stalls in the middle": {"words": ("a",), "ending": "stall"},
    "trickles past the deadline": {"words": LONG, "pause_seconds": 0.1},
    "gives more than its maximum": {"words": LONG, "ignore_max_tokens": True},
    "gives more than its maximum, and no usage": {"words": LONG, "ignore_max_tokens": True, "usage": "none"},
    "gives more than its maximum, and no end": {"words": LONG * 50, "ignore_max_tokens": True, "pause_seconds": 0.02},
    "bills more than its maximum": {"hidden_tokens": 500},
}
ASKED_TOKENS = {"gives more than its maximum": 40, "trickles past the deadline": 400, "bills more than its maximum": 80}


@dataclass
class Case:
    """One answer: its question, what the upstream sends, and where the client leaves."""

    name: str
    script: Script
    moment: str = "never"
    max_tokens: int = 400
    identifier: str = ""
    go_on: threading.Event = field(default_factory=threading.Event)
    status: int | None = None
    received: bytes = b""

    @property
    def question(self):
        return f"I am {self.identifier}."

    @property
    def chunks_before_leaving(self):
        """How many of its events have a text."""
        return {"middle": 1, "end": len(self.script.words)}.get(self.moment, 0) if self.script.words else 0

    @property
    def last(self):
        return parse_events(self.received.strip())[-1] if self.status == 200 else json.loads(self.received)


def leaving_cases():
    for moment, place in MOMENTS.items():
        for saying, changes in SAYINGS.items():
            case = Case(f"{moment} / {saying}", Script(), place)
            waits = {"wait_for": case.go_on, "wait_at": place} if place in {"head", "first", "middle", "end"} else {}
            case.script = Script(**changes, **waits)
            yield case


def failing_cases():
    for name, changes in FAILURES.items():
        asked = next((tokens for start, tokens in ASKED_TOKENS.items() if name.startswith(start)), 30)
        yield Case(name, Script(**(changes or {})), max_tokens=asked)


# --- the clients


def ask(case, port, upstream):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    body = json.dumps({"query": case.question, "max_tokens": case.max_tokens})
    headers = {"Content-Type": "application/json", "X-Fingerprint": case.identifier}
    connection.request("POST", CHAT, body=body, headers=headers)
    if case.moment in {"head", "first", "middle", "end"}:
        wait_until(lambda: upstream.exchange_of(case.question) is not None, 10, "the upstream has the question")
        assert upstream.exchange_of(case.question).waits.wait(10)
    if case.moment != "head":
        answer = connection.getresponse()
        case.status = answer.status
        read(case, answer)
    if case.moment != "never":
        # A reset: the next write to it fails.
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    if "silence" not in case.name:
        case.go_on.set()


def read(case, answer):
    if case.moment == "never":
        case.received = answer.read()
        return
    while case.moment == "after" and not any(word in case.received for word in (b'"complete"', b'"error"')):
        case.received += answer.readline()
    while case.received.count(b'"streaming"') < case.chunks_before_leaving:
        line = answer.readline()
        assert line, f"the answer ended early: {case.received}"
        case.received += line


# --- what became of them


@dataclass
class Outcome:
    case: Case
    booked: int
    reserved: int
    billed: int
    request_id: str
    service: Service

    @property
    def word(self):
        """As the page says it; `seen` is known by its overrun."""
        if not self.booked:
            return "nothing"
        if self.booked == self.reserved:
            return "whole"
        return "bill" if self.booked == self.billed else f"{self.booked} of {self.reserved}, billed {self.billed}"

    def lines_with(self, words):
        return [line for line in self.service.log_lines() if self.request_id in line and words in line]


class Table:
    """A service in front of an upstream, and all cases at once."""

    def __init__(self, service, upstream, redis):
        self.service, self.upstream, self.redis = service, upstream, redis

    def run(self, cases, first=0):
        for number, case in enumerate(cases, start=first):
            # The log shows eight characters of it.
            case.identifier = f"case{number:04}visitor"
            self.upstream.script_of[case.question] = case.script
        clients = [threading.Thread(target=ask, args=(case, self.service.port, self.upstream)) for case in cases]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        wait_until(lambda: self.redis.keys("llm:open:*") == [], 10, "every reservation has ended")
        wait_until(self.all_ends_are_told, 5, "each end is in the log")
        recorded = [line for line in self.service.log_lines() if "Cost recorded" in line]
        return {case.name: self.outcome(case, recorded) for case in cases}

    def all_ends_are_told(self):
        log = self.service.log()
        return log.count("Cost settled") >= log.count("Cost recorded")

    def outcome(self, case, recorded):
        (own,) = [line for line in recorded if f"identifier={case.identifier[:8]}…" in line]
        (day,) = self.redis.keys(f"llm:cost:daily:{case.identifier}:*")
        ring = self.redis.zrange(f"llm:cost:recent:{case.identifier}", 0, -1, withscores=True)
        (booked,) = {int(self.redis.get(day)), int(sum(held for _, held in ring))}
        exchange = self.upstream.exchange_of(case.question)
        billed = bill_nanousd(exchange) if exchange is not None else 0
        reserved = nanousd(value(own, "cost_usd"))
        return Outcome(case, booked, reserved, billed, value(own, "request_id"), self.service)


def value(line, name):
    return line.partition(f" {name}=")[2].split()[0]


@pytest.fixture(scope="module", params=["gunicorn.conf.py", "tests/http/gthread.conf.py"], ids=["gevent", "gthread"])
def config(request):
    """With greenlets, and with native threads."""
    return request.param


@pytest.fixture(scope="module")
def upstream(config):
    with Upstream() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def service_at(redis_of, tmp_path_factory, config):
    """`service_at(upstream's URL)`."""
    services = []
    with client_of(redis_of("table")) as client:
        client.flushall()

    def start(base_url, **environment):
        service = Service(
            tmp_path_factory.mktemp("table"),
            redis_of("table").url,
            LLM_BASE_URL=base_url,
            LLM_MODELS="gpt-4o,gpt-5-nano",
            ENABLE_COST_THROTTLING="true",
            STREAM_DEADLINE_SECONDS=str(DEADLINE_SECONDS),
            DRAIN_SECONDS=str(DRAIN_SECONDS),
            HIGH_COST_THRESHOLD_USD="1",
            NETWORK_COST_LIMIT_USD="0",
            NETWORK_DAILY_COST_LIMIT_USD="0",
            HOURLY_SPEND_LIMIT_USD="100",
            DAILY_SPEND_LIMIT_USD="100",
            CHAT_RATE_LIMIT="1000 per minute",
            **environment,
        )
        service.config = config
        services.append(service)
        service.start()
        return service

    yield start
    for service in services:
        service.kill()


@pytest.fixture(scope="module")
def service(service_at, upstream):
    return service_at(upstream.base_url)


@pytest.fixture(scope="module")
def stored(redis_of):
    with client_of(redis_of("table")) as client:
        yield client


@pytest.fixture(scope="module")
def stuck(service, upstream):
    """A client that asks for much and reads nothing, of a model of which steps are counted and not tokens."""
    upstream.script_of["I do not read."] = Script(words=("x" * 200_000,) * 100)
    body = json.dumps({"query": "I do not read.", "model": "gpt-5-nano"})
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nX-Fingerprint: stuck-client\r\n"
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        client.connect(("127.0.0.1", service.port))
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        yield client


@pytest.fixture(scope="module")
def outcomes(stuck, service, service_at, upstream, stored):
    """Of all cases."""
    cases = [*leaving_cases(), *failing_cases()]
    unreachable = next(case for case in cases if case.name == "refuses the connection")
    cases.remove(unreachable)
    found = Table(service, upstream, stored).run(cases)
    nobody = service_at(f"http://127.0.0.1:{free_port()}/v1", WEB_CONCURRENCY="1")
    return found | Table(nobody, upstream, stored).run([unreachable], first=len(cases))


# --- the tables


def head_of(first):
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    head = next(line for line in lines if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in head.strip("|").split("|")]


def test_the_page_has_every_case_and_no_other():
    assert head_of(LEAVING)[1:] == list(SAYINGS)
    assert [row[0] for row in rows(PAGE, LEAVING)] == list(MOMENTS)
    assert [row[0] for row in rows(PAGE, FAILING)] == list(FAILURES)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("saying", SAYINGS)
def test_a_client_that_leaves_is_booked_as_the_table_says(outcomes, moment, saying):
    (row,) = [row for row in rows(PAGE, LEAVING) if row[0] == moment]
    outcome = outcomes[f"{moment} / {saying}"]
    assert outcome.word == row[head_of(LEAVING).index(saying)]
    assert len(outcome.lines_with("Cost settled")) == 1
    assert outcome.booked >= outcome.billed > 0
    leaves_early = MOMENTS[moment] not in {"after", "never"}
    # Without a head there was no answer yet that it could leave.
    if leaves_early and (moment, saying) != ("before the headers", "silence"):
        # It is logged a moment after the settlement.
        (line,) = outcome.service.lines_with(
            f"The client left before the end of its answer request_id={outcome.request_id}"
        )
        assert value(line, "is_usage_known") == str(outcome.word == "bill").lower()
    if not leaves_early:
        assert not outcome.lines_with("The client left")
        assert nanousd(outcome.case.last["cost_usd"]) == outcome.booked


@pytest.mark.parametrize("moment", ["before the first chunk", "in the middle", "before the last event"])
def test_when_the_drain_is_over_the_upstream_is_hung_up_on(outcomes, upstream, moment):
    exchange = upstream.exchange_of(outcomes[f"{moment} / silence"].case.question)
    assert exchange.over.wait(5)
    assert exchange.client_left


@pytest.mark.parametrize("failure", FAILURES)
def test_an_upstream_that_fails_is_logged_and_booked_as_the_table_says(outcomes, upstream, failure):
    ((_, status, seen, booked, log),) = [row for row in rows(PAGE, FAILING) if row[0] == failure]
    outcome = outcomes[failure]
    last = outcome.case.last
    assert outcome.case.status == int(status)
    assert seen == f"`{last.get('error') or last['finish_reason']}`"
    for words in log.strip("`").split("` `"):
        assert len(outcome.lines_with(words)) == 1
    assert len(outcome.lines_with("Cost settled")) == 1
    assert nanousd(last["cost_usd"]) == outcome.booked
    is_overrun = outcome.booked > outcome.reserved
    assert is_overrun == (booked in {"bill", "seen"})
    assert booked in {"seen", outcome.word}
    assert outcome.booked >= outcome.billed or failure == "gives more than its maximum, and no end"
    assert len(outcome.lines_with("WARNING Cost settled")) == is_overrun
    assert sum(each.question == outcome.case.question for each in upstream.ledger) == (
        0 if failure == "refuses the connection" else 1
    )


def test_a_client_that_does_not_read_is_settled_at_the_deadline_and_hung_up_on(stuck, outcomes, service, upstream):
    (recorded,) = [line for line in service.lines_with("Cost recorded") if "identifier=stuck-cl…" in line]
    request_id = value(recorded, "request_id")
    (settled,) = service.lines_with(f"Cost settled request_id={request_id}", within_seconds=DEADLINE_SECONDS + 5)
    # So much text cannot be what it was asked for: what was seen is booked.
    assert nanousd(value(settled, "booked_usd")) > nanousd(value(settled, "reserved_usd"))
    assert len(service.lines_with(f"Hung up on a client that did not read its answer request_id={request_id}")) == 1
    # That it woke the thread that waited to send.
    assert len(service.lines_with(f"The client left before the end of its answer request_id={request_id}")) == 1
    assert upstream.exchange_of("I do not read.").over.wait(5)
    # Whatever a client or an upstream does, it is no accident of ours.
    assert [line for line in service.log_lines() if "Traceback" in line or "[ERROR]" in line] == []


def test_without_a_drain_the_upstream_is_hung_up_on_at_once(service, upstream, stored):
    service.set_by_hand(stored, drain_seconds=0)
    case = Case("silence", Script(), "middle", identifier="undrained")
    case.script = Script(wait_for=case.go_on)
    upstream.script_of[case.question] = case.script
    ask(case, service.port, upstream)
    exchange = upstream.exchange_of(case.question)
    assert exchange.over.wait(DEADLINE_SECONDS)
    assert exchange.client_left
    wait_until(lambda: stored.keys("llm:open:*") == [], 3, "the reservation has ended")
    (day,) = stored.keys("llm:cost:daily:undrained:*")
    assert int(stored.get(day)) > 4_000_000 > bill_nanousd(exchange)
    service.set_by_hand(stored)
