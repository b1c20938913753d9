"""A Redis whose every reply is late, and none so late that it is a time-out: an answer or refusal begins in time."""

import json
import socket
import time

import pytest

from flaskapp.factory import REDIS_SECONDS_PER_REQUEST
from flaskapp.lab.delay import delayed
from flaskapp.ops.embedded_redis import EmbeddedServer
from tests.servers import CHAT, Service, events

ROUND_TRIP_US = 450_000
FIRST_BYTE_SECONDS = 2.0


@pytest.fixture(scope="module", params=["atomic", "legacy"])
def service(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(f"slow-{request.param}")
    environment = {
        "THROTTLE_BACKEND": request.param,
        "ENABLE_COST_THROTTLING": "true",
        "ENABLE_CHALLENGE_RESPONSE": "true",
        "DEMO_TOKENS_PER_SECOND": "0",
        "WEB_CONCURRENCY": "1",
    }
    with (
        EmbeddedServer(directory / "redis") as server,
        delayed(server.port, ROUND_TRIP_US) as port,
        Service(directory, f"redis://127.0.0.1:{port}/0", **environment) as service,
    ):
        yield service


def test_it_begins_in_time(service):
    given = service.get("/api/v1/auth/challenge", headers={"X-Fingerprint": "hash456"})
    answers = [
        given,
        service.chat(f"fp:{given.json()['challenge']}:hash456", stream=True),
        service.chat(f"fp:{'0' * 64}:hash456", stream=True),
        service.get("/readyz"),
    ]
    is_atomic = service.environment["THROTTLE_BACKEND"] == "atomic"
    assert [each.status_code for each in answers] == [200, 200 if is_atomic else 503, 403, 200]
    assert max(each.elapsed.total_seconds() for each in answers) < FIRST_BYTE_SECONDS
    if is_atomic:
        # The first one of a worker too: it knows the scripts and the time of its Redis from its start.
        assert answers[1].headers["X-Throttle-Backend"] == "atomic"
        assert events(answers[1])[-1]["status"] == "complete"
    else:
        # Twenty-eight round trips do not fit; that is no outage, and opens nothing.
        assert answers[1].json()["error"] == "throttle_unavailable"


@pytest.mark.parametrize("challenge", ["0" * 64, None])
def test_a_client_that_takes_its_time_over_its_body_gets_past_nothing(service, challenge):
    """What it takes to send a body is no time of Redis: neither challenges nor the books are left out."""
    body = json.dumps({"query": "What is Litecoin?"}).encode()
    fingerprint = "hash456" if challenge is None else f"fp:{challenge}:hash456"
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nX-Fingerprint: {fingerprint}\r\n"
    head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as connection:
        connection.sendall(head.encode() + body[:5])
        # Longer than a request may wait for Redis.
        time.sleep(REDIS_SECONDS_PER_REQUEST + 0.2)
        connection.sendall(body[5:])
        status = connection.makefile("rb").readline().split()[1]
    assert status == b"403"
