"""Each error is planted by hand, found and named; what only changes with traffic is not reported."""

import multiprocessing
import threading
from dataclasses import replace

import pytest
import redis

from backends import open_backend
from backends.clock import SystemClock
from backends.conformance.cases import NETWORK, ROOMY, WHO, make_ask
from backends.keys import RECORD_KEEP_SECONDS, book_keys, bucket_seconds_of
from backends.ledger.audit import audit
from backends.ledger.comparison import MARGIN_SECONDS
from backends.ledger.identifier_books import Ledger
from backends.store.link import Link

COST = 1_000
US = 1_000_000


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
def backend(link):
    return open_backend("atomic", link)


@pytest.fixture
def books(backend, raw):
    """Two identifiers of two networks, with an open, a settled and a released reservation each; and their keys."""
    for who, network in ((WHO, NETWORK), ("other", "203.0.113.9")):
        for number, end in enumerate((None, 400, 0)):
            request = make_ask(f"{who}-{number}", COST, ROOMY, identifier=who)
            made = backend.reserve(replace(request, network=network))
            if end is not None:
                backend.settle(made, end) if end else backend.release(made)
    return book_keys("", WHO, NETWORK, raw.time()[0])


def found(link):
    return [(each.kind, each.key) for each in audit(link).disagreements]


def test_books_that_agree(link, books, raw):
    report = audit(link)
    # At the end of an hour the records may not reach back to its beginning.
    is_hour_whole = raw.time()[0] % 3_600 < RECORD_KEEP_SECONDS - 2 * MARGIN_SECONDS
    assert report.disagreements == report.undecided == ()
    assert report.records == {"open": 2, "expired": 0, "settled": 2, "released": 2}
    assert (report.open_nanousd, report.looks) == (2 * COST, 1)
    assert report.checked_exactly >= (10 if is_hour_whole else 9)
    assert report.checked_exactly + report.checked_at_least >= 15
    assert report.sums_checked == 3


def test_an_empty_database(link):
    report = audit(link)
    assert (report.keys, report.disagreements, report.checked_exactly) == (0, (), 0)


@pytest.mark.parametrize("by", [1, -1])
@pytest.mark.parametrize(
    "kind", ["recent", "network_recent", "pending_identifier", "pending_network", "pending_global"]
)
def test_a_wrong_bucket(link, books, raw, kind, by):
    key = getattr(books, kind)
    start, held = raw.zrange(key, 0, -1, withscores=True)[0]
    raw.zincrby(key, by, start)
    (found_one,) = audit(link).disagreements
    assert (found_one.kind, found_one.key, found_one.bucket) == ("total", key, int(start))
    assert (found_one.stored_nanousd, found_one.expected_nanousd) == (held + by, held)


@pytest.mark.parametrize(
    "kind", ["recent", "network_recent", "pending_identifier", "pending_network", "pending_global"]
)
def test_a_missing_bucket(link, books, raw, kind):
    key = getattr(books, kind)
    start, held = raw.zrange(key, 0, -1, withscores=True)[0]
    raw.zrem(key, start)
    (found_one,) = audit(link).disagreements
    assert (found_one.kind, found_one.key, found_one.bucket) == ("total", key, int(start))
    assert (found_one.stored_nanousd, found_one.expected_nanousd) == (0, held)


def test_a_bucket_without_a_reservation(link, books, raw):
    start = raw.zrange(books.recent, 0, -1)[0]
    raw.zadd(books.recent, {str(int(start) - 2 * bucket_seconds_of(ROOMY.window_seconds)): 7})
    assert found(link) == [("total", books.recent)]


@pytest.mark.parametrize("kind", ["daily", "network_daily", "global_hourly", "global_daily"])
def test_a_total_that_is_too_small(link, books, raw, kind):
    key = getattr(books, kind)
    raw.decrby(key, 1)
    disagreements = audit(link).disagreements
    assert ("total", key) in [(each.kind, each.key) for each in disagreements]
    its = next(each for each in disagreements if each.kind == "total")
    assert its.stored_nanousd == its.expected_nanousd - 1


@pytest.mark.parametrize("kind", ["daily", "network_daily", "global_daily"])
def test_the_sum_of_a_day_that_is_too_large(link, books, raw, kind):
    """Also on a day whose first records are gone: the days are compared with one another."""
    raw.incrby(getattr(books, kind), 1)
    sums = [each for each in audit(link).disagreements if each.kind == "sum"]
    assert {each.key for each in sums} == {books.global_daily}
    assert {each.stored_nanousd - each.expected_nanousd for each in sums} == {1 if kind == "global_daily" else -1}


def test_an_hour_that_is_more_than_its_day(link, books, raw):
    raw.incrby(books.global_hourly, 10**9)
    sums = [each for each in audit(link).disagreements if each.kind == "sum"]
    assert [(each.key, "its hours" in each.told) for each in sums] == [(books.global_daily, True)]


def test_a_missing_total(link, books, raw):
    raw.delete(books.daily)
    assert ("total", books.daily) in found(link)
    assert ("sum", books.global_daily) in found(link)


def test_books_of_one_of_whom_no_key_is_left(link, books, raw):
    raw.delete(books.recent, books.daily, books.pending_identifier)
    keys = {key for kind, key in found(link) if kind == "total"}
    assert len(keys) == 3
    assert all("#" in key for key in keys)


def test_a_record_that_was_changed_by_hand(link, books, raw):
    key = f"llm:reservation:{WHO}-1"
    raw.set(key, raw.get(key).replace(" 400 ", " 401 "), keepttl=True)
    assert {("total", books.recent), ("total", books.network_recent)} <= set(found(link))


@pytest.mark.parametrize("kind", ["recent", "daily", "global_hourly", "pending_global"])
def test_a_key_without_a_ttl(link, books, raw, kind):
    raw.persist(getattr(books, kind))
    assert found(link) == [("no_ttl", getattr(books, kind))]


def test_a_negative_total(link, books, raw):
    raw.set(books.global_hourly, -5, keepttl=True)
    assert ("no_amount", books.global_hourly) in found(link)


@pytest.mark.parametrize("text", [str(2**53), "rubbish", "1.5"])
def test_what_is_no_amount(link, books, raw, text):
    raw.set(books.global_hourly, text, keepttl=True)
    assert ("no_amount", books.global_hourly) in found(link)


def test_a_negative_bucket(link, books, raw):
    raw.zadd(books.pending_global, {"1773483600": -1})
    assert ("no_amount", books.pending_global) in found(link)


def test_an_unknown_key_is_reported_and_those_of_others_are_not(link, books, raw):
    raw.set("llm:cost:weekly:x", 1, ex=60)
    raw.set("llm:global:daily:2026-02-31", 1, ex=60)
    raw.set("somebody's", 1)
    raw.set("settings", "{}")
    assert found(link) == [("unknown_key", "llm:cost:weekly:x"), ("unknown_key", "llm:global:daily:2026-02-31")]


def test_a_key_of_another_type(link, books, raw):
    raw.set("llm:cost:recent:third", "a string", ex=60)
    assert found(link) == [("wrong_type", "llm:cost:recent:third")]


def test_a_record_that_is_none(link, books, raw):
    raw.set("llm:reservation:x", "rubbish", ex=60)
    assert found(link) == [("no_record", "llm:reservation:x")]


def test_a_reset_that_is_no_time_clears_nothing_and_stops_no_audit(link, books, raw):
    raw.set(f"llm:reset:{WHO}", "rubbish", ex=100)
    raw.decrby(books.daily, 1)
    assert ("total", books.daily) in found(link)


def test_what_was_not_ended_in_time_counts_as_expired_with_its_amount(link, backend, raw):
    backend.reserve(make_ask("r0", COST, ROOMY))
    made_before(raw, "r0", 121)
    report = audit(link)
    assert (report.records["expired"], report.records["open"], report.expired_nanousd) == (1, 0, COST)


def test_what_expired_and_was_swept_is_no_disagreement(link, backend, raw):
    """The next settlement takes the amount out of the three sorted sets; the record stays `open` for an hour more."""
    now = raw.time()[0]
    backend.reserve(make_ask("r0", COST, ROOMY))
    made_before(raw, "r0", 131)
    keys = book_keys("r0", WHO, NETWORK, now)
    for key in (keys.pending_identifier, keys.pending_network, keys.pending_global):
        raw.delete(key)
        raw.zadd(key, {str((now - 131) // 10 * 10): COST})
        raw.expire(key, 60)
    settled = backend.settle(backend.reserve(make_ask("r1", COST, ROOMY)), COST)
    assert settled.expired_nanousd == COST
    assert [each for each in found(link) if "open" in each[1]] == []


def made_before(raw, rid, seconds):
    key = f"llm:reservation:{rid}"
    state, nanousd, made, *rest = raw.get(key).split()
    raw.set(key, " ".join([state, nanousd, str(int(made) - seconds * US), *rest]), keepttl=True)


def test_of_a_long_window_old_records_may_be_gone_and_no_less_is_booked(link, backend, raw):
    """A bucket of two hours ago: records are there or not, what is there has to be booked."""
    now = raw.time()[0]
    bucket = bucket_seconds_of(14_400)
    start = (now - 7_200) // bucket * bucket
    keys = book_keys("old", WHO, NETWORK, start)
    backend.reserve(make_ask("new", COST, replace(ROOMY, window_seconds=14_400)))
    who, network = raw.get("llm:reservation:new").split()[-2:]
    raw.set("llm:reservation:old", f"settled 50 {start * US} aa 14400 120 {who} {network}", ex=60)
    for key in (keys.recent, keys.network_recent):
        raw.zadd(key, {str(start): 80})
    assert [each for each in found(link) if "recent" in each[1]] == []
    raw.zadd(keys.recent, {str(start): 49})
    assert [each for each in found(link) if "recent" in each[1]] == [("total", keys.recent)]


def test_a_shorter_window_may_have_swept_what_a_longer_one_booked(link, backend, raw):
    """No false alarm: the bucket of a long window is gone since a reservation with a short one came by."""
    now = raw.time()[0]
    backend.reserve(make_ask("long", COST, replace(ROOMY, window_seconds=7_200)))
    backend.reserve(make_ask("short", COST, replace(ROOMY, window_seconds=60)))
    record = raw.get("llm:reservation:long").split()
    made = now - 1_000
    record[2] = str(made * US)
    raw.set("llm:reservation:long", " ".join(record), ex=60)
    for key in (f"llm:cost:recent:{WHO}", f"llm:network:recent:{NETWORK}"):
        raw.delete(key)
        start = int(raw.get("llm:reservation:short").split()[2]) // US
        raw.zadd(key, {str(start - start % bucket_seconds_of(60)): COST})
        raw.expire(key, 62)
    assert [each for each in found(link) if "recent" in each[1]] == []


def test_after_a_reset_identifiers_may_be_less_than_everybody_and_never_more(link, backend, books, raw):
    Ledger(link).reset(WHO)
    assert found(link) == []
    other = book_keys("", "other", "", raw.time()[0]).daily
    raw.incrby(other, 10**6)
    assert ("sum", books.global_daily) in found(link)


def test_since_a_reset_a_day_has_to_be_equal_to_its_records(link, backend, books, raw):
    """Also late in the day: what was made before the reset is not in it."""
    Ledger(link).reset(WHO)
    backend.reserve(make_ask("after", COST, ROOMY))
    assert found(link) == []
    raw.incrby(books.daily, 1)
    assert ("total", books.daily) in found(link)


def test_it_writes_nothing(link, books, raw):
    raw.incrby(books.daily, 3)
    before = {key: raw.expiretime(key) for key in raw.keys("*")}
    changes = raw.info("persistence")["rdb_changes_since_last_save"]
    assert audit(link).disagreements
    assert raw.info("persistence")["rdb_changes_since_last_save"] == changes
    assert {key: raw.expiretime(key) for key in raw.keys("*")} == before


# --- beside traffic


def _spend(url, stop, name):
    link = Link(url, clock=SystemClock(), timeout_seconds=10)
    backend, number = open_backend(name, link), 0
    # Not too fast: where more than `MOST_AT_ONCE` records belong to a total that changes, it can only be undecided.
    while not stop.wait(0.001):
        number += 1
        made = backend.reserve(make_ask(f"r{number}", COST, ROOMY, identifier=f"who{number % 7}"))
        if number % 2:
            made = backend.extend(made, 2 * COST, ROOMY)
        if number % 5:
            backend.settle(made, 300)
        # Leaves processor time to the audit.
        stop.wait(0.005)
    link.close()


@pytest.fixture(params=["atomic", "legacy"])
def traffic(redis_url, request):
    """One caller: alone, the legacy strategy books right too, but not in one step."""
    spawn = multiprocessing.get_context("spawn")
    stop = spawn.Event()
    process = spawn.Process(target=_spend, args=(redis_url, stop, request.param))
    process.start()
    yield process
    stop.set()
    process.join(30)


def test_beside_traffic_only_what_is_wrong_is_reported(traffic, link, raw):
    from tests.servers import wait_until

    wait_until(lambda: raw.dbsize() > 200, 30, "there is traffic")
    assert audit(link).disagreements == ()
    bucket = bucket_seconds_of(ROOMY.window_seconds)
    start = (raw.time()[0] // bucket - 2) * bucket
    raw.zadd("llm:cost:recent:who1", {str(start): 9})
    found = [(each.kind, each.key, each.bucket) for each in audit(link).disagreements]
    assert found == [("total", "llm:cost:recent:who1", start)]
    assert traffic.is_alive()


@pytest.mark.parametrize("traffic", ["atomic"], indirect=True)
def test_a_total_that_is_too_small_is_reported_while_it_changes(traffic, link, raw):
    from tests.servers import wait_until

    wait_until(lambda: raw.dbsize() > 20, 30, "there is traffic")
    # More than the traffic could make up for during the audit.
    open_backend("atomic", link).reserve(make_ask("whale", ROOMY.global_hour_nanousd // 2, ROOMY, identifier="whale"))
    seen = raw.time()[0]
    wait_until(lambda: raw.time()[0] > seen + 2, 30, "what is there has settled down")
    hour = book_keys("", "", "", raw.time()[0]).global_hourly
    raw.set(hour, 0, keepttl=True)
    report = audit(link)
    assert ("total", hour) in [(each.kind, each.key) for each in report.disagreements]
    assert traffic.is_alive()


def test_progress_is_reported(link, books):
    calls = []
    lock = threading.Lock()

    def progress(what, done, of):
        with lock:
            calls.append((what, done <= of))

    audit(link, progress)
    assert set(calls) == {("reading the books", True)}
