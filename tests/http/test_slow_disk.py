"""A disk that does not come back under `.data/`, in an outage of Redis: no answer waits for it."""

import fcntl
import json
from contextlib import contextmanager

import pytest

from tests.embedded import FragileServer
from tests.servers import ROOT, Service, events, nanousd, wait_until


@pytest.fixture
def store(tmp_path):
    with FragileServer(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def service(store, tmp_path):
    environment = {
        "ENABLE_COST_THROTTLING": "true",
        "DEMO_TOKENS_PER_SECOND": "0",
        "CHAT_RATE_LIMIT": "1000 per minute",
        "NETWORK_COST_LIMIT_USD": "0",
    }
    with Service(tmp_path / "service", store.url, **environment) as service:
        yield service


def page(service):
    return service.directory / ".data" / f"emergency-budget-127.0.0.1-{service.port}.json"


def spent(service):
    return json.loads(page(service).read_text())["spent_nanousd"]


def test_answers_go_on_while_the_budgets_file_is_locked(service, store):
    # A sixteenth of a dollar, and of what the other worker left.
    wait_until(lambda: page(service).exists() and spent(service) > 120_000_000, 5, "each worker has its lease")
    store.kill()
    with page(service).open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        answers = [service.chat(f"visitor-{number}", max_tokens=50) for number in range(20)]
        assert service.get("/healthz").status_code == 200
    assert {(each.status_code, each.headers["X-Throttle-Backend"]) for each in answers} == {(200, "emergency")}
    service.stop()
    # What was leased and not spent is given back.
    assert spent(service) == sum(nanousd(events(each)[-1]["cost_usd"]) for each in answers)


STUCK_FSYNC = """
import os, time
from pathlib import Path

_fsync, _sleep, _place = os.fsync, time.sleep, Path(__file__).parent


def fsync(descriptor):
    while (_place / "stuck").exists():
        (_place / "waits").touch()
        _sleep(0.01)
    _fsync(descriptor)


os.fsync = fsync
"""


@pytest.fixture
def stuck_service(store, tmp_path):
    """`stuck_service(VARIABLE="value", …)`: a service, and the file that keeps each of its `fsync` from coming back."""
    place = tmp_path / "python"
    place.mkdir()
    (place / "sitecustomize.py").write_text(STUCK_FSYNC)

    @contextmanager
    def run(**environment):
        environment = {
            "ENABLE_COST_THROTTLING": "true",
            "DEMO_TOKENS_PER_SECOND": "0",
            "NETWORK_COST_LIMIT_USD": "0",
            "PYTHONPATH": f"{place}:{ROOT}",
            **environment,
        }
        with Service(tmp_path / "service", store.url, **environment) as service:
            try:
                yield service, place / "stuck"
                wait_until((place / "waits").exists, 5, "an fsync is under way")
            finally:
                (place / "stuck").unlink(missing_ok=True)

    return run


def test_answers_go_on_while_no_fsync_comes_back(store, stuck_service):
    """In the thread that calls it nothing else runs meanwhile: were that the event loop, no answer would come."""
    with stuck_service() as (service, stuck):
        wait_until(lambda: page(service).exists() and spent(service) > 120_000_000, 5, "each worker has its lease")
        stuck.touch()
        store.kill()
        answers = [service.chat(f"visitor-{number}", max_tokens=50) for number in range(20)]
        assert {(each.status_code, each.headers["X-Throttle-Backend"]) for each in answers} == {(200, "emergency")}
        assert service.by_each_worker(lambda: service.get("/healthz", timeout=5).status_code) == [200, 200]


def test_where_nothing_is_leased_and_no_fsync_comes_back_all_are_answered(store, stuck_service):
    """Not by an admission, since that waits for the disk, but by a refusal, however many jobs the disk has before."""
    with stuck_service(FAIL_OPEN_BUDGET_USD="0.05") as (service, stuck):
        stuck.touch()
        store.kill()
        answers = [service.chat(f"visitor-{number}", max_tokens=50) for number in range(20)]
        assert {each.status_code for each in answers} == {503}
