"""Emergency spend is booked once: through many workers, deaths at each step, lost replies and files that fail."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis

from backends import open_backend
from backends.clock import SystemClock
from backends.conformance.cases import NETWORK, ROOMY, WHO, Limits, make_ask
from backends.contract import Refusal
from backends.errors import StoreBroken, StoreUnavailable
from backends.guard import EmergencyBooking, EmergencyBooks, EmergencyBudget, FailurePolicy, Guard
from backends.keys import rows_at
from backends.ledger.audit import audit
from backends.ledger.emergency import book_emergency_spend
from backends.store.link import Link
from tests.faults.wire import wait_for


class Death(BaseException):
    """A worker is killed here."""


@pytest.fixture
def link(redis_url):
    link = Link(redis_url, clock=SystemClock(), timeout_seconds=10)
    yield link
    link.close()


@pytest.fixture
def raw(redis_url):
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        yield client


@pytest.fixture
def hour(raw):
    return raw.time()[0] // 3_600


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data" / "books.json"


@pytest.fixture
def new_worker(link, path):
    """Makes workers of one instance; each has `booked`, what it was told of, and may have another file or store."""
    workers = []

    def make(file=None, book=None):
        booked = []
        book = book or (lambda *words: book_emergency_spend(link, *words))
        worker = EmergencyBooking(
            file or EmergencyBooks(path), book, lambda: ThreadPoolExecutor(1), lambda *told: booked.append(told)
        )
        worker.booked = booked
        workers.append(worker)
        return worker

    yield make
    for worker in workers:
        worker.close()


def totals(raw, hour):
    keys = {row.budget.name: row.key for row in rows_at(ROOMY.budgets(WHO, NETWORK), hour * 3_600)}
    return [int(raw.get(keys[name]) or 0) for name in ("global_hour", "global_day")]


def test_what_was_spent_is_booked_into_its_hour_and_day_once(new_worker, raw, hour):
    worker = new_worker()
    worker.note(hour, 100)
    worker.note(hour, 20)
    for _ in range(3):
        worker.book_all()
    assert totals(raw, hour) == [120, 120]
    worker.note(hour, -50)
    worker.book_all()
    assert totals(raw, hour) == [70, 70]
    assert worker.booked == [(hour, 120), (hour, -50)]


def test_an_hour_that_is_over_is_booked_into_what_is_left_of_it(new_worker, raw, hour):
    worker, day_begins = new_worker(), hour - hour % 24
    worker.note(hour - 72, 1_000)
    worker.note(day_begins - 24, 5)
    worker.note(hour, 7)
    worker.book_all()
    assert totals(raw, hour) == [7, 7]
    # Its hours are gone from Redis, and its day is kept for one day more.
    assert totals(raw, day_begins - 24) == [0, 5]
    assert totals(raw, hour - 72) == [0, 0]
    assert {told_hour for told_hour, _ in worker.booked} == {hour, day_begins - 24}


def test_what_one_worker_has_noted_another_books(new_worker, raw, hour, path):
    killed = new_worker()
    killed.note(hour, 100)
    wait_for(lambda: EmergencyBooks(path).unbooked()[1])
    new_worker().book_all()
    assert totals(raw, hour) == [100, 100]


def test_the_file_is_there_before_the_disk_is_full(new_worker, path):
    new_worker().book_all()
    made = path.read_bytes()
    assert len(made) == 4_096
    new_worker().book_all()
    assert path.read_bytes() == made


def test_instances_have_books_of_their_own(new_worker, raw, hour, tmp_path):
    for number in range(3):
        worker = new_worker(EmergencyBooks(tmp_path / f"{number}.json"))
        worker.note(hour, 100)
        worker.book_all()
    assert totals(raw, hour) == [300, 300]
    assert len(raw.keys("llm:emergency:*")) == 3


class MortalBooks(EmergencyBooks):
    """A worker's file: the worker dies before or after it has written what it did."""

    def __init__(self, path, dies):
        super().__init__(path)
        self._dies = dies

    def remember(self, booked):
        if self._dies == "before it remembers":
            raise Death
        super().remember(booked)
        if self._dies == "after it has remembered":
            raise Death


@pytest.mark.parametrize(
    "dies", ["before it books", "after it has booked", "before it remembers", "after it has remembered"]
)
def test_a_worker_that_dies_at_any_step_books_nothing_twice(new_worker, link, raw, hour, path, dies):
    def book(*words):
        if dies == "before it books":
            raise Death
        book_emergency_spend(link, *words)
        if dies == "after it has booked":
            raise Death
        return 0

    for spent in (100, 20, -50):
        mortal = new_worker(MortalBooks(path, dies), book)
        mortal.note(hour, spent)
        with pytest.raises(Death):
            mortal.book_all()
        if spent == 20:
            # More is spent between the death and the next who books.
            new_worker().note(hour, 7)
        new_worker().book_all()
    new_worker().book_all()
    assert totals(raw, hour) == [77, 77]


def test_workers_that_book_at_the_same_time_book_it_once(new_worker, raw, hour):
    workers = [new_worker() for _ in range(6)]

    def work(worker):
        for _ in range(20):
            worker.note(hour, 10)
            worker.note(hour, -3)
            worker.book_all()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, workers))
    workers[0].book_all()
    assert totals(raw, hour) == [840, 840]
    assert sum(change for worker in workers for _, change in worker.booked) == 840


def test_what_cannot_be_booked_now_is_booked_later(new_worker, link, raw, hour):
    is_away = True

    def book(*words):
        if is_away:
            raise StoreUnavailable("away")
        return book_emergency_spend(link, *words)

    worker = new_worker(book=book)
    worker.note(hour, 100)
    for _ in range(3):
        with pytest.raises(StoreUnavailable):
            worker.book_all()
    is_away = False
    worker.book_all()
    assert totals(raw, hour) == [100, 100]


def test_a_total_of_the_wrong_type_holds_up_its_own_day_alone(new_worker, raw, hour):
    worker, broken = new_worker(), hour - 24
    key = next(
        row.key for row in rows_at(ROOMY.budgets(WHO, NETWORK), broken * 3_600) if row.budget.name == "global_day"
    )
    raw.rpush(key, "in the way")
    worker.note(broken, 5)
    worker.note(hour, 7)
    with pytest.raises(StoreBroken):
        worker.book_all()
    assert totals(raw, hour) == [7, 7]
    raw.delete(key)
    worker.book_all()
    assert raw.get(key) == "5"
    assert totals(raw, hour) == [7, 7]


def test_a_worker_that_ends_waits_for_what_it_has_begun_to_write(new_worker, hour, path):
    begun, goes_on = threading.Event(), threading.Event()

    class SlowFile(EmergencyBooks):
        def add(self, changes_nanousd):
            begun.set()
            goes_on.wait(20)
            super().add(changes_nanousd)

    worker = new_worker(file=SlowFile(path))
    worker.note(hour, 100)
    assert begun.wait(20)
    threading.Timer(0.05, goes_on.set).start()
    worker.close()
    (spent,) = EmergencyBooks(path).unbooked()[1]
    assert spent.nanousd == 100


def test_a_file_that_cannot_be_written_loses_nothing_that_the_worker_knows(new_worker, raw, hour, path):
    path.parent.mkdir(parents=True)
    path.mkdir()
    worker = new_worker()
    worker.note(hour, 100)
    with pytest.raises(StoreUnavailable):
        worker.book_all()
    path.rmdir()
    worker.note(hour, 20)
    worker.book_all()
    assert totals(raw, hour) == [120, 120]


@pytest.mark.parametrize("text", ["garbage", "[]", "{}", '{"instance": "x", "hours": [[1]]}', '{"hours": 1}', ""])
def test_a_file_that_says_nothing_begins_anew_and_nothing_is_booked_twice(new_worker, raw, hour, path, text):
    worker = new_worker()
    worker.note(hour, 100)
    worker.book_all()
    path.write_text(text)
    worker.note(hour, 20)
    worker.book_all()
    assert totals(raw, hour) == [120, 120]


def test_the_file_never_grows_and_keeps_what_is_not_booked(new_worker, hour, path):
    worker = new_worker(book=lambda *_: 0)
    for number in range(60):
        worker.note(hour - number, 10**15)
    worker.book_all()
    for number in range(60, 80):
        worker.note(hour - number, 10**15)
    worker.close()
    stored = json.loads(path.read_text())
    assert len(stored["hours"]) == 50
    assert path.stat().st_size == 4_096
    assert len([1 for each in stored["hours"] if each[3] < each[2]]) == 20


# With the guard.


class Store:
    """A backend whose store is away while a test says so."""

    keeps_our_layout = True

    def __init__(self, inner):
        self.inner = inner
        self.is_away = False

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def reserve(self, ask):
        if self.is_away:
            raise StoreUnavailable("away")
        return self.inner.reserve(ask)


@pytest.fixture
def store(link):
    return Store(open_backend("atomic", link))


@pytest.fixture
def guard(store, link, path, new_worker):
    def book(*words):
        if store.is_away:
            raise StoreUnavailable("away")
        return book_emergency_spend(link, *words)

    guard = Guard(
        store,
        open_backend("memory", link),
        link=link,
        emergency=EmergencyBudget(path.parent / "emergency", SystemClock()),
        clock=SystemClock(),
        observer=lambda _: None,
        policy=lambda: FailurePolicy(is_open=True, emergency_nanousd=10**9),
    )
    guard.book_spend_with(new_worker(book=book))
    yield guard
    guard.close()


def test_a_day_with_an_outage_has_one_limit(guard, store, link, raw, hour):
    limits = Limits(global_hour_nanousd=1_000, global_day_nanousd=1_000)
    guard.settle(guard.reserve(make_ask("before", 400, limits)), 400)
    store.is_away = True
    for number in range(2):
        guard.settle(guard.reserve(make_ask(f"in-{number}", 300, limits)), 250)
    unused = guard.reserve(make_ask("unused", 300, limits))
    store.is_away = False
    wait_for(lambda: totals(raw, hour) == [1_200, 1_200])
    assert isinstance(guard.reserve(make_ask("after", 100, limits)), Refusal)
    guard.release(unused)
    wait_for(lambda: totals(raw, hour) == [900, 900])
    assert audit(link).disagreements == ()
    assert isinstance(guard.reserve(make_ask("too much", 101, limits)), Refusal)
    guard.settle(guard.reserve(make_ask("fits", 100, limits)), 100)
    assert totals(raw, hour) == [1_000, 1_000]
    assert audit(link).disagreements == ()


def test_what_redis_lost_of_it_is_found_by_the_audit(new_worker, link, raw, hour):
    worker = new_worker()
    worker.note(hour, 100)
    worker.book_all()
    report = audit(link)
    assert (report.disagreements, report.undecided) == ((), ())
    assert report.records["settled"] == 1
    [record] = raw.keys("llm:emergency:*")
    raw.delete(record)
    assert {each.kind for each in audit(link).disagreements} == {"sum"} | (
        {"total"} if raw.time()[0] % 3_600 < 3_500 else set()
    )


def test_in_an_outage_one_job_waits_however_much_is_spent(guard, store, raw, hour):
    store.is_away = True
    for number in range(30):
        guard.settle(guard.reserve(make_ask(f"r-{number}", 10)), 10)
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("tollgate-settle-later") == 1
    store.is_away = False
    wait_for(lambda: totals(raw, hour) == [300, 300])
    wait_for(lambda: "tollgate-settle-later" not in [thread.name for thread in threading.enumerate()])
