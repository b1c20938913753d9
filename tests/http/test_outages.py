"""Redis dies, freezes and comes back under a service that runs: no 5xx while the emergency budget lasts, none twice."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from backends.guard import EmergencyBooks
from tests.embedded import FragileServer
from tests.processes import children_of
from tests.servers import Service, client_of, earliest_wait, events, nanousd, wait_until

BUDGET = 10_000_000
"""Two requests at their highest cost, and about ten at what they really use."""
SETTINGS = {"enable_cost_throttling": True, "network_cost_limit_usd": 0, "hourly_spend_limit_usd": 1000}
FIRST_BYTE_SECONDS = 2.0
BACK_SECONDS = 3.0


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    directory = tmp_path_factory.mktemp("outage-redis")
    with FragileServer(directory, durable=True) as server:
        yield server


@pytest.fixture(scope="module")
def _service(store, tmp_path_factory):
    """In plain development mode: what is to be on is switched on in Redis."""
    environment = {"DEMO_TOKENS_PER_SECOND": "0", "FAIL_OPEN_BUDGET_USD": "0.01", "CHAT_RATE_LIMIT": "10000 per minute"}
    with Service(tmp_path_factory.mktemp("outages"), store.url, **environment) as service:
        yield service


@pytest.fixture
def service(_service, store):
    """With Redis up, throttling on, nothing spent, no emergency spend, and both workers aware of it."""
    if not store.is_running:
        store.start()
    with client_of(store) as client:
        client.flushall()
    take_in(_service, store)
    wait_until(lambda: ask_each_worker(_service) == {"atomic"}, 10, "both workers in touch with Redis")
    # Only now: a worker that had not noticed yet has spent from it on being asked.
    page(_service).unlink(missing_ok=True)
    page(_service, "books").unlink(missing_ok=True)
    return _service


def take_in(service, store, **changes):
    """Come back when every worker has these settings: each has said that it is off, and then that it is on."""
    with client_of(store) as client:
        client.delete("settings")
        wait_until(lambda: ask_each_worker(service) == {"off"}, 10, "no settings")
        since = len(service.log_lines())
        client.set("settings", json.dumps({**SETTINGS, **changes}))
    service.lines_with("Cost throttling is on (redis)", since, at_least=service.workers, within_seconds=10)


def page(service, kind="budget"):
    return service.directory / ".data" / f"emergency-{kind}-127.0.0.1-{service.port}.json"


def emergency_spent(service):
    return json.loads(page(service).read_text())["spent_nanousd"]


def ask_each_worker(service):
    """Which way a request is decided by each worker, or that it is refused."""

    def ask():
        answer = service.chat("probe", max_tokens=1)
        return answer.headers.get("X-Throttle-Backend", answer.status_code)

    return set(service.by_each_worker(ask))


def visitors(service, number, prefix="visitor"):
    """That many requests of different visitors one after another; each begins in time."""
    answers = []
    for count in range(number):
        started = time.monotonic()
        answers.append(service.chat(f"{prefix}-{count}"))
        assert time.monotonic() - started < FIRST_BYTE_SECONDS
    return answers


def exhaust(service):
    """Ask until the emergency budget is used up; the answers before that, and the refusal."""
    admitted = []
    while (answer := visitors(service, 1, f"spender-{len(admitted)}")[0]).status_code == 200:
        admitted.append(answer)
        assert len(admitted) < 50
    return admitted, answer


@pytest.mark.parametrize("how", ["kill", "freeze"])
def test_open_goes_on_from_the_emergency_budget_until_that_is_used_up(service, store, how):
    before = service.chat("before")
    assert before.headers["X-Throttle-Backend"] == "atomic"
    getattr(store, how)()
    admitted, refused = exhaust(service)
    assert {each.headers["X-Throttle-Backend"] for each in admitted} == {"emergency"}
    assert {events(each)[-1]["status"] for each in admitted} == {"complete"}
    costs = [nanousd(events(each)[-1]["cost_usd"]) for each in admitted]
    assert len(costs) > 2
    assert sum(costs) == emergency_spent(service) <= BUDGET < sum(costs) + 4_192_500
    assert (refused.status_code, refused.json()["error"]) == (503, "throttle_unavailable")
    assert int(refused.headers["Retry-After"]) >= 1
    assert "throttle;dur=" in refused.headers["Server-Timing"]
    assert {each.status_code for each in visitors(service, 5)} == {503}
    # No restart of Redis has to be noticed by hand.
    store.start() if how == "kill" else store.thaw()
    back = time.monotonic()
    wait_until(lambda: ask_each_worker(service) == {"atomic"}, BACK_SECONDS, "the books go on")
    assert time.monotonic() - back < BACK_SECONDS
    again = service.chat("before")
    assert again.headers["X-Throttle-Backend"] == "atomic"
    with client_of(store) as client:
        (day,) = client.keys("llm:cost:daily:before:*")
        assert int(client.get(day)) == sum(nanousd(events(each)[-1]["cost_usd"]) for each in (before, again))
    assert emergency_spent(service) >= sum(costs)


def everybodys_alone(client):
    """What is booked in everybody's hours and days, and in no identifier's: first of the hours, then of the days."""
    of_all = [sum(map(int, client.mget(client.keys(f"llm:global:{kind}:*")) or [0])) for kind in ("hourly", "daily")]
    return [total - sum(map(int, client.mget(client.keys("llm:cost:daily:*")) or [0])) for total in of_all]


def kill_workers(service):
    seen = len(service.log_lines())
    for pid in children_of(service._process.pid):
        os.kill(pid, signal.SIGKILL)
    service.lines_with("Cost throttling is", seen, at_least=service.workers, within_seconds=20)


def restart(service):
    service.kill()
    service.start()


@pytest.mark.parametrize("end_some", [lambda _: None, kill_workers, restart], ids=["nobody", "the workers", "all"])
def test_what_an_outage_cost_is_booked_once_whoever_is_killed(service, store, end_some):
    books = EmergencyBooks(page(service, "books"))
    with client_of(store) as client:
        wait_until(lambda: client.keys("llm:open:*") == [], 5, "no open reservation")
        before = everybodys_alone(client)
        store.kill()
        answers = [answer for answer in visitors(service, 3) if answer.status_code == 200]
        spent = sum(nanousd(events(answer)[-1]["cost_usd"]) for answer in answers)
        wait_until(lambda: sum(each.nanousd for each in books.unbooked()[1]) == spent > 0, 5, "written down")
        end_some(service)
        store.start()
        booked = [amount + spent for amount in before]
        wait_until(lambda: everybodys_alone(client) == booked, BACK_SECONDS, "booked")
        assert len(service.lines_with("Emergency spend booked into everybody's hour and day")) >= 1
        # It is remembered, and what is not remembered is not booked again.
        wait_until(lambda: books.unbooked()[1] == [], 5, "remembered")
        end_some(service)
        wait_until(lambda: ask_each_worker(service) == {"atomic"}, 10, "the books go on")
        wait_until(lambda: client.keys("llm:open:*") == [], 5, "no open reservation")
        assert everybodys_alone(client) == booked


def test_many_at_once_in_an_outage_never_spend_more_than_the_budget(service, store):
    store.kill()

    def ask(number):
        started = time.monotonic()
        answer = service.chat(f"crowd-{number}")
        return answer, time.monotonic() - started

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, range(40)))
    statuses = [answer.status_code for answer, _ in answers]
    assert set(statuses) == {200, 503}
    assert max(seconds for _, seconds in answers) < FIRST_BYTE_SECONDS
    costs = [nanousd(events(answer)[-1]["cost_usd"]) for answer, _ in answers if answer.status_code == 200]
    assert sum(costs) == emergency_spent(service) <= BUDGET


def test_neither_a_restart_of_the_server_nor_a_second_outage_refills_the_budget(service, store):
    store.kill()
    exhaust(service)
    spent = emergency_spent(service)
    store.start()
    wait_until(lambda: ask_each_worker(service) == {"atomic"}, 10, "the books go on")
    store.kill()
    _, refused = exhaust(service)
    assert refused.status_code == 503
    service.stop()
    service.start()
    assert service.get("/healthz").status_code == 200
    ready = service.get("/readyz")
    assert (ready.status_code, ready.json()["redis"]) == (503, "down")
    # The mode is development: that throttling is on is known from the disk alone.
    assert service.chat("after").status_code == 503
    assert spent <= emergency_spent(service) <= BUDGET
    store.start()
    wait_until(lambda: ask_each_worker(service) == {"atomic"}, 10, "the settings in Redis are known again")
    store.kill()
    assert {each.status_code for each in visitors(service, 5, "later")} == {503}
    assert spent <= emergency_spent(service) <= BUDGET


def test_an_answer_under_way_when_redis_dies_is_settled_when_it_is_back(atomic, books, redis_of):
    server = redis_of("books")
    answer = atomic.chat("traveller", stream=True)
    (day,) = books.keys("llm:cost:daily:traveller:*")
    assert books.get(day) == "4192500"
    server.kill()
    try:
        last = events(answer)[-1]
    finally:
        server.start()
    assert last["status"] == "complete"
    wait_until(lambda: int(books.get(day) or 0) == nanousd(last["cost_usd"]), BACK_SECONDS, "settled")
    assert books.keys("llm:open:*") == []


def test_a_frozen_redis_that_wakes_up_charges_no_request_that_gave_up(service, store):
    store.freeze()
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda number: service.chat(f"ghost-{number}"), range(6)))
    assert {each.status_code for each in answers} <= {200, 503}
    store.thaw()
    wait_until(lambda: ask_each_worker(service) == {"atomic"}, BACK_SECONDS, "the books go on")
    with client_of(store) as client:
        wait_until(lambda: client.keys("llm:open:*") == [], BACK_SECONDS, "no open reservation")
        charged = [client.get(key) for key in client.keys("llm:cost:daily:ghost-*")]
        assert [amount for amount in charged if amount != "0"] == []


def test_readyz_reports_whether_we_fail_open(service, store):
    ready = service.get("/readyz")
    assert (ready.status_code, ready.json()["degraded"], ready.json()["backend"]) == (200, False, "atomic")
    store.kill()

    def looks():
        looked = service.by_each_worker(lambda: service.get("/readyz"))
        return [(each.status_code, each.json()["degraded"]) for each in looked]

    wait_until(lambda: set(looks()) == {(200, True)}, 5, "degraded on every worker")
    exhaust(service)
    wait_until(lambda: {status for status, _ in looks()} == {503}, 5, "not ready once the budget is used up")
    store.start()
    wait_until(lambda: set(looks()) == {(200, False)}, 5, "ready again")


def test_closed_refuses_at_once_and_goes_on_when_redis_is_back(service, store):
    take_in(service, store, throttle_on_error="closed")
    store.kill()
    for refused in visitors(service, 6):
        assert (refused.status_code, refused.json()["error"]) == (503, "throttle_unavailable")
        assert earliest_wait(refused) == 1
        assert refused.headers["Content-Type"] == "application/problem+json"
    assert service.get("/readyz").status_code == 503
    assert service.get("/healthz").status_code == 200
    assert not page(service).exists()
    store.start()
    wait_until(lambda: ask_each_worker(service) == {"atomic"}, BACK_SECONDS, "the books go on")


def test_workers_that_are_born_in_an_outage_know_that_it_is_to_be_closed(service, store):
    take_in(service, store, throttle_on_error="closed")
    [kept] = (service.directory / ".data").glob("settings-????????.json")
    wait_until(lambda: b"closed" in kept.read_bytes(), 5, "kept on the disk")
    store.kill()
    service.stop()
    service.start()
    assert ask_each_worker(service) == {503}
    assert not page(service).exists()


def test_the_admin_and_challenges_survive_an_outage(service, store):
    take_in(service, store, enable_challenge_response=True)
    headers = {"X-Fingerprint": "hash456"}
    given = service.get("/api/v1/auth/challenge", headers=headers).json()["challenge"]
    assert service.chat("fp:unknown:hash456").json()["reason"] == "unknown"
    store.kill()
    drawn = service.get("/api/v1/auth/challenge", headers=headers)
    assert drawn.status_code == 200
    # The last known settings hold: challenges are asked for, and cannot be checked.
    assert service.chat("hash456").json()["reason"] == "missing"
    assert service.chat(f"fp:{given}:hash456").headers["X-Throttle-Backend"] == "emergency"
    changed = service.patch(daily_cost_limit_usd="1")
    assert (changed.status_code, changed.json()["error"]) == (503, "throttle_unavailable")
    assert service.get("/admin").status_code == 401
    assert service.get("/metrics").status_code == 200


def takes_no_more(client):
    client.config_set("maxmemory", "1")
    return lambda: client.config_set("maxmemory", "0")


def is_a_lonely_replica(client):
    client.replicaof("127.0.0.1", "1")
    return lambda: client.replicaof("NO", "ONE")


def misses_its_replicas(client):
    client.config_set("min-replicas-to-write", "1")
    return lambda: client.config_set("min-replicas-to-write", "0")


@pytest.mark.parametrize("spoil", [takes_no_more, is_a_lonely_replica, misses_its_replicas])
def test_a_redis_that_takes_no_writes_locks_no_caller_out(service, store, spoil):
    take_in(service, store, enable_challenge_response=True)
    with client_of(store) as client:
        mend = spoil(client)
        try:
            challenge = service.get("/api/v1/auth/challenge", headers={"X-Fingerprint": "hash456"}).json()["challenge"]
            answer = service.chat(f"fp:{challenge}:hash456", max_tokens=1)
            assert (answer.status_code, answer.headers["X-Throttle-Backend"]) == (200, "emergency")
        finally:
            mend()
        assert service.chat(f"fp:{challenge}:hash456").json()["reason"] == "unknown"
        assert client.keys("llm:challenge:*") == []


def test_plain_development_mode_is_off_and_the_dashboard_switches_it_on(service, store):
    with client_of(store) as client:
        client.delete("settings")
        wait_until(lambda: ask_each_worker(service) == {"off"}, 10, "no settings")
        client.flushall()
        answer = service.chat()
        assert (answer.status_code, events(answer)[-1]["status"]) == (200, "complete")
        assert "X-Cost-Reserved-USD" not in answer.headers
        assert [key for key in client.keys("*") if not key.startswith("llm:rate:")] == []
        service.lines_with("Cost throttling is off (development mode)")
        since = len(service.log_lines())
        assert service.patch(enable_cost_throttling=True).status_code == 200
        assert client.get("settings") == '{"enable_cost_throttling": true}'
        service.lines_with("Cost throttling is on (redis)", since, at_least=service.workers)
        assert ask_each_worker(service) == {"atomic"}
        assert service.chat().headers["X-Cost-Reserved-USD"] == "0.004192500"
        assert client.keys("llm:cost:daily:hash456:*")
