"""Each error is planted by hand, found and named; what only changes with traffic is not reported."""

import multiprocessing
import threading
from dataclasses import replace

import pytest
import redis

from backends import open_backend
from backends.budgets import EVERYBODY, Budget, Calendar, Forever, Scope, Share, Sliding
from backends.clock import SystemClock
from backends.conformance.cases import EVERY, NETWORK, ROOMY, WHO, further_budget, make_ask
from backends.keys import RECORD_KEEP_SECONDS, bucket_seconds_of, rows_at
from backends.ledger.audit import audit
from backends.ledger.comparison import MARGIN_SECONDS
from backends.ledger.identifier_books import Ledger
from backends.records import key_digest
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


def keys_at(seconds, who=WHO, network=NETWORK, limits=ROOMY):
    """Of the budgets by name, and of pending money by scope."""
    rows = rows_at(limits.budgets(who, network), seconds)
    return {row.budget.name: row.key for row in rows} | {row.budget.scope: row.pending_key for row in rows}


@pytest.fixture
def books(backend, raw):
    """An open, a settled and a released reservation of two identifiers each, of two networks; keys of the first."""
    for who, network in ((WHO, NETWORK), ("other", "203.0.113.9")):
        for number, end in enumerate((None, 400, 0)):
            made = backend.reserve(make_ask(f"{who}-{number}", COST, ROOMY, identifier=who, network=network))
            if end is not None:
                backend.settle(made, end) if end else backend.release(made)
    return keys_at(raw.time()[0])


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
@pytest.mark.parametrize("kind", ["window", "network_window", "identifier", "network", "global"])
def test_a_wrong_bucket(link, books, raw, kind, by):
    key = books[kind]
    start, held = raw.zrange(key, 0, -1, withscores=True)[0]
    raw.zincrby(key, by, start)
    (found_one,) = audit(link).disagreements
    assert (found_one.kind, found_one.key, found_one.bucket) == ("total", key, int(start))
    assert (found_one.stored_nanousd, found_one.expected_nanousd) == (held + by, held)


@pytest.mark.parametrize("kind", ["window", "network_window", "identifier", "network", "global"])
def test_a_missing_bucket(link, books, raw, kind):
    key = books[kind]
    start, held = raw.zrange(key, 0, -1, withscores=True)[0]
    raw.zrem(key, start)
    (found_one,) = audit(link).disagreements
    assert (found_one.kind, found_one.key, found_one.bucket) == ("total", key, int(start))
    assert (found_one.stored_nanousd, found_one.expected_nanousd) == (0, held)


def test_a_bucket_without_a_reservation(link, books, raw):
    start = raw.zrange(books["window"], 0, -1)[0]
    raw.zadd(books["window"], {str(int(start) - 2 * bucket_seconds_of(ROOMY.window_seconds)): 7})
    assert found(link) == [("total", books["window"])]


@pytest.mark.parametrize("kind", ["day", "network_day", "global_hour", "global_day"])
def test_a_total_that_is_too_small(link, books, raw, kind):
    key = books[kind]
    raw.decrby(key, 1)
    disagreements = audit(link).disagreements
    assert ("total", key) in [(each.kind, each.key) for each in disagreements]
    its = next(each for each in disagreements if each.kind == "total")
    assert its.stored_nanousd == its.expected_nanousd - 1


@pytest.mark.parametrize("kind", ["day", "network_day", "global_day"])
def test_the_sum_of_a_day_that_is_too_large(link, books, raw, kind):
    """Also on a day whose first records are gone: the days are compared with one another."""
    raw.incrby(books[kind], 1)
    sums = [each for each in audit(link).disagreements if each.kind == "sum"]
    assert {each.key for each in sums} == {books["global_day"]}
    assert {each.stored_nanousd - each.expected_nanousd for each in sums} == {1 if kind == "global_day" else -1}


def test_an_hour_that_is_more_than_its_day(link, books, raw):
    raw.incrby(books["global_hour"], 10**9)
    sums = [each for each in audit(link).disagreements if each.kind == "sum"]
    assert [(each.key, "its hours" in each.told) for each in sums] == [(books["global_day"], True)]


def test_a_missing_total(link, books, raw):
    raw.delete(books["day"])
    assert ("total", books["day"]) in found(link)
    assert ("sum", books["global_day"]) in found(link)


def test_books_of_one_of_whom_no_key_is_left(link, books, raw):
    raw.delete(books["window"], books["day"], books["identifier"])
    keys = {key for kind, key in found(link) if kind == "total"}
    assert len(keys) == 3
    assert all("#" in key for key in keys)


def test_a_record_that_was_changed_by_hand(link, books, raw):
    key = f"llm:reservation:{WHO}-1"
    raw.set(key, raw.get(key).replace(" 400 ", " 401 "), keepttl=True)
    assert {("total", books["window"]), ("total", books["network_window"])} <= set(found(link))


@pytest.mark.parametrize("kind", ["window", "day", "global_hour", "global"])
def test_a_key_without_a_ttl(link, books, raw, kind):
    raw.persist(books[kind])
    assert found(link) == [("no_ttl", books[kind])]


def test_a_negative_total(link, books, raw):
    raw.set(books["global_hour"], -5, keepttl=True)
    assert ("no_amount", books["global_hour"]) in found(link)


@pytest.mark.parametrize("text", [str(2**53), "rubbish", "1.5"])
def test_what_is_no_amount(link, books, raw, text):
    raw.set(books["global_hour"], text, keepttl=True)
    assert ("no_amount", books["global_hour"]) in found(link)


def test_a_negative_bucket(link, books, raw):
    raw.zadd(books["global"], {"1773483600": -1})
    assert ("no_amount", books["global"]) in found(link)


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
    raw.decrby(books["day"], 1)
    assert ("total", books["day"]) in found(link)


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
    keys = keys_at(now)
    for key in (keys["identifier"], keys["network"], keys["global"]):
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
    keys = keys_at(start)
    backend.reserve(make_ask("new", COST, replace(ROOMY, window_seconds=14_400)))
    who, network = raw.get("llm:reservation:new").split()[-2:]
    raw.set("llm:reservation:old", f"settled 50 {start * US} aa 14400 120 {who} {network}", ex=60)
    for key in (keys["window"], keys["network_window"]):
        raw.zadd(key, {str(start): 80})
    assert [each for each in found(link) if "recent" in each[1]] == []
    raw.zadd(keys["window"], {str(start): 49})
    assert [each for each in found(link) if "recent" in each[1]] == [("total", keys["window"])]


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
    other = keys_at(raw.time()[0], "other")["day"]
    raw.incrby(other, 10**6)
    assert ("sum", books["global_day"]) in found(link)


def test_since_a_reset_a_day_has_to_be_equal_to_its_records(link, backend, books, raw):
    """Also late in the day: what was made before the reset is not in it."""
    Ledger(link).reset(WHO)
    backend.reserve(make_ask("after", COST, ROOMY))
    assert found(link) == []
    raw.incrby(books["day"], 1)
    assert ("total", books["day"]) in found(link)


# --- further budgets

NAMES = [budget.name for budget in EVERY.further]
OF_OTHER_SCOPES = [Scope.WIDE_NETWORK, Scope.KEY, Scope.TEAM, Scope.MODEL]


def make(backend, rid, end=None, who=WHO, network=NETWORK, limits=EVERY, cost=COST, **changes):
    made = backend.reserve(make_ask(rid, cost, limits, identifier=who, network=network, **changes))
    if end is not None:
        backend.settle(made, end) if end else backend.release(made)
    return made


@pytest.fixture
def further(backend, raw):
    """As `books`, with a further budget of each scope; and the keys that a request of the first is charged to."""
    for who, network in ((WHO, NETWORK), ("other", "203.0.113.9")):
        for number, end in enumerate((None, 400, 0)):
            made = make(backend, f"{who}-{number}", end, who, network)
        open_one = make(backend, f"{who}-extended", None, who, network)
        backend.extend(open_one, 3 * COST, made.budgets)
    return keys_at(raw.time()[0], limits=EVERY)


def change(raw, key, by):
    """By so much, in a bucket if it has buckets: which."""
    if raw.type(key) == "zset":
        member = raw.zrange(key, 0, -1)[-1]
        raw.zincrby(key, by, member)
        return int(member.partition(":")[0])
    raw.incrby(key, by)
    return None


def test_further_budgets_that_agree(link, backend, further, raw):
    """A total that lasts for ever has no TTL, and what a window came to is kept beside it: both are in order."""
    assert raw.ttl(further["team_ever"]) == -1
    assert all(raw.ttl(key) > 0 for key in raw.keys("llm:running:*"))
    report = audit(link)
    assert (report.disagreements, report.undecided, report.looks) == ((), (), 1)
    assert report.sums_checked == 3


@pytest.mark.parametrize("name", NAMES)
def test_a_further_budget_that_is_too_small(link, further, raw, name):
    start = change(raw, further[name], -1)
    (found_one,) = audit(link).disagreements
    assert (found_one.kind, found_one.key, found_one.bucket) == ("total", further[name], start)
    assert found_one.stored_nanousd == found_one.expected_nanousd - 1


@pytest.mark.parametrize("name", ["network_long", "just_begun"])
def test_a_further_budget_that_is_too_large(link, backend, further, raw, name):
    """Of a period that began within the last hour."""
    now = raw.time()[0]
    further["just_begun"] = f"llm:budget:just_begun:month:web:{now - 900}"
    raw.set(further["just_begun"], 0, ex=100)
    start = change(raw, further[name], 1)
    (found_one,) = audit(link).disagreements
    assert (found_one.kind, found_one.key, found_one.bucket) == ("total", further[name], start)
    assert found_one.stored_nanousd == found_one.expected_nanousd + 1


def test_of_a_period_that_began_before_the_records_there_may_be_more(link, backend, further, raw):
    long_ago = make(backend, "ever", further=(further_budget("so_far", Scope.KEY, Forever()),), limits=ROOMY)
    key = rows_at(long_ago.budgets, 0)[-1].key
    raw.incrby(key, 10**6)
    assert found(link) == []
    raw.set(key, COST - 1)
    assert found(link) == [("total", key)]


@pytest.mark.parametrize("name", NAMES)
def test_a_further_budget_that_is_missing(link, backend, further, raw, name):
    """Where a key of the same budget is left, that and the owner's other keys tell its name; else there is a digest."""
    key = further[name]
    has_namesake = name in {"who_hour", "network_long"}
    raw.delete(key)
    assert found(link) == [("total", key if has_namesake else f"llm:budget:#{key_digest(key)}")]
    for rid in raw.keys("llm:reservation:*"):
        made_before(raw, rid.removeprefix("llm:reservation:"), 60)
    # Then the nameless one may have been a window of a minute.
    assert (("total", key) in found(link)) == has_namesake
    assert not any("#" in each[1] for each in found(link))


def test_a_window_that_has_ended_is_not_missing(link, backend, raw):
    minute = further_budget("minute", Scope.IDENTIFIER, Sliding(60))
    made = make(backend, "r0", 400, limits=replace(ROOMY, further=(minute,)))
    make(backend, "r1", 400, who="other", limits=replace(ROOMY, further=(minute,)))
    key = rows_at(made.budgets, 0)[-1].key
    raw.delete(key)
    assert found(link) == [("total", key)]
    made_before(raw, "r0", 63)
    assert ("total", key) not in found(link)


@pytest.mark.parametrize("scope", OF_OTHER_SCOPES)
@pytest.mark.parametrize("by", [1, -1])
def test_pending_money_of_scopes_that_no_record_names(link, further, raw, scope, by):
    key = further[scope]
    start = change(raw, key, by)
    held = sum(int(nanousd) for _, nanousd in raw.zrange(key, 0, -1, withscores=True))
    (found_one,) = audit(link).disagreements
    owner = key.removeprefix(f"llm:open:{scope}:")
    assert (found_one.key, found_one.bucket) == (key if by > 0 else f"llm:open:*:{owner}", start)
    assert found_one.stored_nanousd == held == found_one.expected_nanousd + by
    assert f"come to at {'most' if by > 0 else 'least'} " in found_one.told


def test_where_an_owner_has_two_scopes_its_money_may_be_in_either(link, backend, raw):
    """The key of a further budget does not tell its scope."""
    budgets = tuple(Budget(f"of_{scope}", "web", Forever(), None, scope) for scope in (Scope.KEY, Scope.TEAM))
    make(backend, "both", limits=ROOMY, further=budgets)
    make(backend, "one", limits=ROOMY, further=budgets[:1])
    assert found(link) == []
    change(raw, "llm:open:key:web", 1)
    assert found(link) == [("total", "llm:open:key:web")]
    change(raw, "llm:open:key:web", -COST)
    assert found(link) == []
    raw.delete("llm:open:key:web")
    assert found(link) == [("total", "llm:open:*:web")]


@pytest.mark.parametrize("scope", ["identifier", "network", "global"])
def test_pending_money_of_the_six_is_exact_beside_further_budgets(link, further, raw, scope):
    start = change(raw, further[scope], 1)
    (found_one,) = audit(link).disagreements
    assert (found_one.key, found_one.bucket, " at " in found_one.told) == (further[scope], start, False)


# --- reservations without the six

ALONE = (
    Budget("monthly", "customer", Calendar("month"), None),
    Budget("minute", "plan", Sliding(60), None, Scope.KEY),
    Budget("all_ever", EVERYBODY, Forever(), None, Scope.GLOBAL),
)


@pytest.fixture
def alone(backend):
    """An open, a settled and a released reservation that are charged to further budgets alone; their keys by name."""
    for number, end in enumerate((None, 400, 0)):
        made = make(backend, f"alone-{number}", end, budgets=ALONE)
    rows = rows_at(ALONE, made.made_at_us // US)
    return {row.budget.name: row.key for row in rows} | {row.budget.scope: row.pending_key for row in rows}


def test_further_budgets_alone_change_no_sum_of_days(link, books, alone, raw):
    """They are in none of the six, so networks and identifiers still add up to everybody."""
    assert " - - " in raw.get("llm:reservation:alone-0")
    report = audit(link)
    assert (report.disagreements, report.undecided, report.sums_checked) == ((), (), 3)
    raw.incrby(books["day"], 1)
    assert [each.key for each in audit(link).disagreements if each.kind == "sum"] == [books["global_day"]]


@pytest.mark.parametrize("name", ["monthly", "minute", "all_ever"])
def test_further_budgets_alone_are_checked_too(link, books, alone, raw, name):
    change(raw, alone[name], -1)
    assert found(link) == [("total", alone[name])]


@pytest.mark.parametrize("scope", ["identifier", "key"])
@pytest.mark.parametrize("by", [1, -1])
def test_so_is_their_pending_money(link, books, alone, raw, scope, by):
    change(raw, alone[scope], by)
    owner = alone[scope].rpartition(":")[2]
    assert found(link) == [("total", alone[scope] if by > 0 else f"llm:open:*:{owner}")]


def test_everybodys_pending_money_may_be_more_by_theirs_and_no_less_than_the_six(link, books, alone, raw):
    """Whether an owner that is called `all` is everybody is not told."""
    change(raw, books["global"], -COST)
    assert found(link) == []
    change(raw, books["global"], -1)
    assert found(link) == [("total", books["global"])]


def test_a_record_without_the_six_may_have_windows_of_any_length(link, alone, raw):
    raw.delete(*alone.values())
    assert found(link) == []


def test_a_day_whose_records_are_gone_still_adds_up(link, raw):
    yesterday = keys_at(raw.time()[0] - 86_400)
    for name in ("day", "network_day", "global_day"):
        raw.set(yesterday[name], 5, ex=100)
    assert (found(link), audit(link).sums_checked) == ([], 3)
    raw.incrby(yesterday["network_day"], 1)
    assert found(link) == [("sum", yesterday["global_day"])]


# --- after a reset


def test_after_a_reset_a_further_budget_is_no_less_than_what_was_made_since(link, further, backend, raw):
    mine = tuple(budget for budget in EVERY.budgets(WHO, NETWORK) if budget.scope is Scope.IDENTIFIER)
    Ledger(link).reset(WHO, mine)
    assert not raw.exists(further["who_hour"])
    assert found(link) == []
    make(backend, "after", 300)
    assert found(link) == []
    raw.decrby(further["who_hour"], 1)
    assert found(link) == [("total", further["who_hour"])]
    raw.incrby(further["who_hour"], 10**6)
    assert found(link) == []


def test_a_budget_that_a_reset_did_not_know_keeps_what_it_had(link, further, backend, raw):
    """It was taken out of the settings: what is open then is settled with the others only."""
    held = raw.get(further["who_hour"])
    Ledger(link).reset(WHO)
    assert raw.get(further["who_hour"]) == held
    backend.settle(backend.find(make_ask(f"{WHO}-0", COST, EVERY)), 5)
    assert raw.get(further["who_hour"]) == held
    assert found(link) == []


def test_it_writes_nothing(link, books, raw):
    raw.incrby(books["day"], 3)
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
        made = backend.reserve(make_ask(f"r{number}", COST, EVERY, identifier=f"who{number % 7}"))
        if number % 2:
            made = backend.extend(made, 2 * COST, made.budgets)
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
    hour = keys_at(raw.time()[0])["global_hour"]
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


@pytest.mark.parametrize("scope", [Scope.NETWORK, Scope.WIDE_NETWORK])
def test_what_a_network_has_of_everybodys_hour_is_recomputed(link, backend, raw, scope):
    shares = tuple(
        further_budget(name, of, Calendar("hour"), None, share=Share("global_hour", 250_000))
        for name, of in (("network_share_hour", Scope.NETWORK), ("wide_share_hour", Scope.WIDE_NETWORK))
    )
    for number, end in enumerate((None, 400, 0)):
        make(backend, f"r{number}", end, limits=ROOMY, further=shares)
    assert found(link) == []
    keys = {row.budget.scope: row.key for row in rows_at(shares, raw.time()[0])}
    assert raw.get(keys[scope]) == str(COST + 400)
    raw.decr(keys[scope])
    assert found(link) == [("total", keys[scope])]
