"""REDIS_DELAY_MS: counted where it is waited for, with a sleep that does not."""

from dataclasses import dataclass, field

import pytest

from backends import open_backend
from backends.clock import SystemClock
from backends.conformance.cases import COST, NETWORK, ROOMY, WHO, make_ask
from backends.contract import Reservation
from backends.store.link import Link
from flaskapp.config import load_config
from flaskapp.factory import create_app
from tests.servers import CHAT, LITECOIN


@dataclass
class Waited:
    seconds: list = field(default_factory=list)

    def __call__(self, seconds):
        self.seconds.append(seconds)


@pytest.fixture
def waited():
    return Waited()


@pytest.fixture
def app_of(redis_url, tmp_path, waited, monkeypatch):
    apps = []

    def make(**environment):
        given = {"ENVIRONMENT": "development", "ENABLE_COST_THROTTLING": "true", "REDIS_URL": redis_url}
        given |= {"DEMO_TOKENS_PER_SECOND": "0", **environment}
        config = load_config(given).model_copy(update={"data_dir": tmp_path})
        monkeypatch.setattr("flaskapp.factory.sleep", waited)
        apps.append(create_app(config))
        return apps[-1]

    yield make
    for app in apps:
        app.extensions["tollgate"].stop()


def reserved_with(app, name):
    tollgate = app.extensions["tollgate"]
    verdict = open_backend(name, tollgate.link).reserve(make_ask(f"of-{name}", COST, ROOMY))
    assert isinstance(verdict, Reservation)


def test_the_legacy_way_waits_once_for_each_of_its_round_trips(app_of, waited, redis_url):
    trips = []
    link = Link(redis_url, clock=SystemClock(), before_each_send=trips.append)
    open_backend("legacy", link).reserve(make_ask("counted", COST, ROOMY))
    its_trips = len(trips)
    link.run(lambda client: client.flushdb())
    link.close()
    app = app_of(REDIS_DELAY_MS="7", THROTTLE_BACKEND="legacy")
    waited.seconds.clear()
    reserved_with(app, "legacy")
    assert waited.seconds == [0.007] * its_trips
    assert its_trips >= 15


def test_the_atomic_way_waits_once(app_of, waited):
    app = app_of(REDIS_DELAY_MS="7")
    reserved_with(app, "atomic")
    waited.seconds.clear()
    verdict = open_backend("atomic", app.extensions["tollgate"].link).reserve(make_ask("one more", COST, ROOMY))
    assert isinstance(verdict, Reservation)
    assert waited.seconds == [0.007]


def test_a_pipeline_waits_once_and_a_read_of_the_books_too(app_of, waited):
    tollgate = app_of(REDIS_DELAY_MS="100").extensions["tollgate"]
    tollgate.link.time_us()
    waited.seconds.clear()
    tollgate.link.run(lambda client: client.pipeline(transaction=True).get("one").get("two").execute())
    open_backend("atomic", tollgate.link).books(ROOMY.budgets(WHO, NETWORK))
    assert waited.seconds == [0.1, 0.1]


def test_a_whole_chat_waits_more_often_on_the_legacy_way(app_of, waited):
    counts = {}
    for name in ("legacy", "atomic"):
        client = app_of(REDIS_DELAY_MS="3", THROTTLE_BACKEND=name).test_client()
        client.post(CHAT, json=LITECOIN, headers={"X-Fingerprint": name}, buffered=True)
        waited.seconds.clear()
        answer = client.post(CHAT, json=LITECOIN, headers={"X-Fingerprint": name}, buffered=True)
        assert answer.status_code == 200
        counts[name] = len(waited.seconds)
    # The counter of requests a minute, the reservation and its end.
    assert counts["atomic"] <= 4
    assert counts["legacy"] >= counts["atomic"] + 15


def test_without_it_nobody_waits(app_of, waited):
    reserved_with(app_of(), "legacy")
    assert waited.seconds == []


def test_the_service_sleeps_by_the_clock_unless_told_otherwise(redis_url, tmp_path):
    config = load_config({"ENVIRONMENT": "development", "REDIS_DELAY_MS": "20", "REDIS_URL": redis_url})
    app = create_app(config.model_copy(update={"data_dir": tmp_path}))
    clock = SystemClock()
    started = clock.monotonic_seconds()
    app.extensions["tollgate"].link.run(lambda client: client.ping())
    assert clock.monotonic_seconds() - started >= 0.02
    app.extensions["tollgate"].stop()
