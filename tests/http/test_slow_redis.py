"""A Redis whose every reply is late, and none so late that it is a time-out: an answer or refusal begins in time."""

import pytest

from backends import embedded
from backends.delay import delayed
from backends.embedded import EmbeddedServer
from tests.servers import Service, events

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
        EmbeddedServer(directory / "redis", binary=embedded.bundled_server()) as server,
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
    assert [each.status_code for each in answers] == [200, 200, 403, 200]
    assert max(each.elapsed.total_seconds() for each in answers) < FIRST_BYTE_SECONDS
    # The first one of a worker too: it knows the scripts and the time of its Redis from its start.
    decided_by = answers[1].headers["X-Throttle-Backend"]
    assert decided_by == ("atomic" if service.environment["THROTTLE_BACKEND"] == "atomic" else "emergency")
    assert events(answers[1])[-1]["status"] == "complete"
