import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import redis

from backends import open_backend
from backends.budgets import EVERYBODY, Budget, Calendar, Forever, Scope, Sliding, span_at
from backends.clock import SystemClock
from backends.conformance.cases import NETWORK, ROOMY, WHO, make_ask
from backends.contract import Refusal
from backends.keys import RESET_KEEP_SECONDS, reset_key, rows_at
from backends.ledger.audit import audit
from backends.ledger.identifier_books import Ledger
from backends.records import key_digest
from backends.store.link import Link
from backends.store.scripts import Script

COST = 1_000
DAY = 86_400
US = 1_000_000


@pytest.fixture
def link(redis_url):
    link = Link(redis_url, clock=SystemClock(), timeout_seconds=10)
    yield link
    link.close()


@pytest.fixture
def raw(redis_url):
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def backend(link):
    return open_backend("atomic", link)


@pytest.fixture(params=["atomic", "legacy"])
def either(link, request):
    """Both keep the same books, so both live with a reset."""
    return open_backend(request.param, link)


@pytest.fixture
def ledger(link):
    return Ledger(link)


def mine(limits=ROOMY, who=WHO):
    """The budgets of the identifier alone."""
    return tuple(budget for budget in limits.budgets(who, NETWORK) if budget.scope is Scope.IDENTIFIER)


def day_at(seconds):
    return next(row.key for row in rows_at(mine(), seconds) if row.budget.name == "day")


def spent(backend, *names):
    books = backend.books(ROOMY.budgets(WHO, NETWORK))
    return tuple(books.spent(name) for name in names)


def pending(backend):
    return backend.books(mine()).use("day").pending_nanousd


def limits_of(books):
    return {limit.name: limit for limit in books.limits}


def of(limit):
    return (limit.spent_nanousd, limit.held_nanousd, limit.expired_nanousd, limit.left_nanousd)


def dump(raw):
    return {key: (raw.dump(key), raw.expiretime(key)) for key in raw.keys("*")}


def made_before(raw, rid, seconds):
    """As if it had been made so much earlier."""
    key = f"llm:reservation:{rid}"
    state, nanousd, made, *rest = raw.get(key).decode().split()
    raw.set(key, " ".join([state, nanousd, str(int(made) - seconds * US), *rest]), keepttl=True)


# --- show


def test_each_limit_has_what_is_spent_held_expired_and_left_and_when_it_renews(ledger, backend, raw):
    limits = replace(ROOMY, window_nanousd=10 * COST, day_nanousd=20 * COST)
    made = [backend.reserve(make_ask(f"r{number}", COST, limits)) for number in range(5)]
    backend.settle(made[0], 400)
    backend.release(made[1])
    made_before(raw, "r2", 120)
    books = ledger.show(WHO, mine(limits))
    window, day = limits_of(books)["window"], limits_of(books)["day"]
    assert of(window) == (400, 2 * COST, COST, 10 * COST - 400 - 3 * COST)
    assert (day.limit_nanousd, day.left_nanousd) == (20 * COST, 20 * COST - 400 - 3 * COST)
    assert window.renews_at_seconds == made[0].renews_at_seconds[1]
    assert day.renews_at_seconds == (books.as_of_us // US // DAY + 1) * DAY
    assert {line.reservation_id: line.state for line in books.reservations} == {
        "r0": "settled",
        "r1": "released",
        "r2": "expired",
        "r3": "open",
        "r4": "open",
    }


def test_reservations_come_newest_first_and_as_many_as_were_asked_for(ledger, backend):
    for number in range(5):
        backend.reserve(make_ask(f"r{number}", COST + number, ROOMY))
    backend.reserve(make_ask("somebody else's", COST, ROOMY, identifier="other"))
    books = ledger.show(WHO, mine(), most=2)
    assert [(line.reservation_id, line.nanousd) for line in books.reservations] == [("r4", COST + 4), ("r3", COST + 3)]
    assert books.reservations_in_all == 5


@pytest.mark.parametrize(
    ("window", "day", "cause"), [(COST, 9 * COST, "window_limit"), (9 * COST, COST, "daily_limit")]
)
def test_a_marker_has_its_cause_and_the_time_left(ledger, backend, window, day, cause):
    limits = replace(ROOMY, window_nanousd=window, day_nanousd=day)
    backend.reserve(make_ask("r0", COST, limits))
    refusal = backend.reserve(make_ask("r1", COST, limits))
    marker = ledger.show(WHO, mine(limits)).marker
    assert (marker.cause, marker.busy) == (cause, True)
    assert 0 < marker.left_seconds <= refusal.marker_seconds


def test_a_marker_set_by_hand_is_shown_as_that(ledger, raw):
    raw.set(f"llm:throttle:{WHO}", "stop", ex=60)
    books = ledger.show(WHO, mine())
    assert (books.marker.cause, 58 <= books.marker.left_seconds <= 60, books.is_known) == ("by_hand", True, True)


def test_of_an_unknown_one_nothing_is_booked(ledger):
    books = ledger.show("nobody", mine(who="nobody"))
    assert not books.is_known
    assert [of(limit) for limit in books.limits] == [(0, 0, 0, ROOMY.window_nanousd), (0, 0, 0, ROOMY.day_nanousd)]


@pytest.mark.parametrize("who", [f"ip:{NETWORK}", "ip:2001:db8::/64", "a" * 64])
def test_any_identifier_can_be_shown(ledger, backend, who):
    backend.reserve(make_ask("r0", COST, ROOMY, identifier=who))
    assert limits_of(ledger.show(who, mine(who=who)))["window"].held_nanousd == COST


def test_show_writes_nothing(ledger, backend, raw):
    backend.settle(backend.reserve(make_ask("r0", COST, ROOMY)), 7)
    backend.reserve(make_ask("r1", COST, ROOMY))
    before = dump(raw)
    ledger.show(WHO, mine())
    ledger.show("nobody", mine(who="nobody"))
    assert dump(raw) == before


MONTH = Budget("month", WHO, Calendar("month", "Europe/Berlin"), 30 * COST)
HOURS = Budget("hours", WHO, Sliding(7_200), None)
EVER = Budget("ever", WHO, Forever(), 2 * COST, is_shadow=True)
FURTHER = (MONTH, HOURS, EVER)


def test_further_budgets_are_told_after_window_and_day_in_their_order(ledger, backend, raw):
    made = [backend.reserve(make_ask(f"r{number}", COST, further=FURTHER)) for number in range(4)]
    backend.settle(made[0], 400)
    backend.release(made[1])
    made_before(raw, "r2", 120)
    books = ledger.show(WHO, (*FURTHER, *mine()))
    assert [limit.name for limit in books.limits] == ["window", "day", "month", "hours", "ever"]
    month, hours, ever = books.limits[2:]
    assert of(month) == (400, COST, COST, 30 * COST - 400 - 2 * COST)
    assert of(hours) == (400, COST, COST, None)
    assert of(ever) == (400, COST, COST, 0)
    assert (hours.limit_nanousd, ever.limit_nanousd) == (None, 2 * COST)
    assert [limit.is_shadow for limit in books.limits] == [False, False, False, False, True]
    assert month.renews_at_seconds == span_at(MONTH.period, books.as_of_us // US).end_seconds
    assert hours.renews_at_seconds == made[0].renews_at_seconds[-2]
    assert ever.renews_at_seconds is None


def test_a_further_budget_shows_its_present_period_alone(ledger, backend, raw):
    """A reservation of the month before is open still, and held in none of these; one of an hour ago has left."""
    now = raw.time()[0]
    backend.reserve(make_ask("r0", COST, further=(MONTH,)))
    before = key_digest(rows_at((MONTH,), span_at(MONTH.period, now).start_seconds - 1)[0].key)
    text = raw.get("llm:reservation:r0").decode()
    raw.set("llm:reservation:r0", text.replace(text.split()[-1], before), keepttl=True)
    (month,) = (limit for limit in ledger.show(WHO, (MONTH,)).limits if limit.name == "month")
    assert of(month)[:3] == (COST, 0, 0)


def test_a_marker_names_the_further_budget_that_set_it(ledger, backend):
    budget = MONTH._replace(limit_nanousd=COST, throttle_seconds=45)
    for number in range(2):
        backend.reserve(make_ask(f"r{number}", COST, further=(budget,)))
    marker = ledger.show(WHO, (*mine(), budget)).marker
    assert (marker.cause, marker.budget, marker.busy) == ("budget_limit", "month", True)
    assert 0 < marker.left_seconds <= 45


def test_an_identifier_without_the_six_is_shown_by_its_own_budgets(ledger, backend):
    budgets = (MONTH, EVER)
    backend.reserve(make_ask("mine", COST, budgets=budgets))
    backend.reserve(make_ask("another's", COST, budgets=(MONTH._replace(owner="other"),)))
    books = ledger.show(WHO, budgets)
    assert [line.reservation_id for line in books.reservations] == ["mine"]
    assert [(limit.name, limit.held_nanousd) for limit in books.limits] == [("month", COST), ("ever", COST)]
    assert not ledger.show("nobody", (MONTH._replace(owner="nobody"),)).is_known


# --- reset


def test_a_reset_clears_the_identifiers_books_and_no_others(ledger, either, link):
    backend = either
    limits = replace(ROOMY, window_nanousd=2 * COST)
    for number in range(2):
        backend.reserve(make_ask(f"r{number}", COST, limits))
    assert isinstance(backend.reserve(make_ask("r2", COST, limits)), Refusal)
    cleared = ledger.reset(WHO)
    assert (cleared.marker, cleared.window_nanousd, cleared.open_nanousd, cleared.days_nanousd) == (
        True,
        2 * COST,
        2 * COST,
        2 * COST,
    )
    assert spent(backend, "window", "day") == (0, 0)
    assert spent(backend, "network_window", "network_day", "global_day") == (2 * COST,) * 3
    assert pending(backend) == 0
    assert ledger.show(WHO, mine(limits)).marker is None
    report = audit(link)
    assert (report.disagreements, report.looks) == ((), 1)


def test_it_may_spend_anew_and_what_was_open_is_settled_with_the_others_only(ledger, either, link):
    backend = either
    limits = replace(ROOMY, window_nanousd=COST)
    before = backend.reserve(make_ask("before", COST, limits))
    ledger.reset(WHO)
    after = backend.reserve(make_ask("after", COST, limits))
    backend.settle(before, 400)
    assert spent(backend, "window", "network_window") == (COST, COST + 400)
    backend.settle(after, 300)
    assert spent(backend, "window", "day", "global_day") == (300, 300, 700)
    assert audit(link).disagreements == ()


def test_the_days_of_today_and_yesterday_are_cleared_and_no_other(ledger, raw):
    now = raw.time()[0]
    keys = [day_at(now - days * DAY) for days in range(3)]
    for key in keys:
        raw.set(key, 5, ex=100)
    assert ledger.reset(WHO).days_nanousd == 10
    assert raw.exists(*keys) == 1


def test_at_midnight_the_day_that_has_just_begun_is_among_them(ledger, raw):
    now = raw.time()[0]
    raw.set(day_at(now), 5, ex=100)
    assert ledger.reset(WHO, now_us=(now - DAY) * US).days_nanousd == 5


def test_a_reset_clears_the_identifiers_further_budgets_and_no_others(ledger, either, link, raw):
    backend = either
    others = (
        Budget("of_key", "web", Calendar("month"), None, Scope.KEY),
        Budget("of_all", EVERYBODY, Forever(), None, Scope.GLOBAL),
        Budget("of_network", NETWORK, Sliding(3_600), None, Scope.NETWORK),
    )
    budgets = (*FURTHER, *others)
    before = backend.reserve(make_ask("before", COST, further=budgets))
    backend.settle(backend.reserve(make_ask("settled", COST, further=budgets)), 400)
    backend.reserve(make_ask("neighbour", COST, identifier="other", further=(MONTH._replace(owner="other"),)))
    cleared = ledger.reset(WHO, (*mine(), *FURTHER))
    assert cleared.further_nanousd == {"month": COST + 400, "hours": COST + 400, "ever": COST + 400}
    assert cleared.open_nanousd == COST
    assert [use.spent_nanousd for use in backend.books(FURTHER).uses] == [0, 0, 0]
    assert [use.spent_nanousd for use in backend.books(others).uses] == [COST + 400] * 3
    assert backend.books((MONTH._replace(owner="other"),)).spent("month") == COST
    assert not [key for key in raw.keys("llm:running:*") if WHO.encode() in key]
    assert audit(link).disagreements == ()
    backend.reserve(make_ask("after", COST, further=budgets))
    backend.settle(before, 700)
    assert [use.spent_nanousd for use in backend.books(FURTHER).uses] == [COST] * 3
    assert [use.spent_nanousd for use in backend.books(others).uses] == [COST + 1_100] * 3
    assert audit(link).disagreements == ()


@pytest.mark.parametrize("unit", ["hour", "day", "week", "month"])
def test_the_present_period_and_its_neighbours_are_cleared_and_no_other(ledger, raw, unit):
    """Whatever Redis' clock says, the period that was open is among them."""
    budget = Budget("each", WHO, Calendar(unit, "America/St_Johns"), None)
    now = raw.time()[0]
    moments = [now]
    for _ in range(2):
        moments.insert(0, span_at(budget.period, moments[0]).start_seconds - 1)
        moments.append(span_at(budget.period, moments[-1]).end_seconds)
    keys = [rows_at((budget,), moment)[0].key for moment in moments]
    assert len(set(keys)) == 5
    for key in keys:
        raw.set(key, 5, ex=100)
    assert ledger.reset(WHO, (budget,)).further_nanousd == {"each": 15}
    assert [bool(raw.exists(key)) for key in keys] == [True, False, False, False, True]


@pytest.mark.parametrize("text", ["-3", "rubbish"])
def test_books_that_are_spoilt_can_be_cleared_too(ledger, raw, text):
    key = day_at(raw.time()[0])
    raw.set(key, text, ex=100)
    ledger.reset(WHO)
    assert not raw.exists(key)


def test_a_reset_is_remembered_for_as_long_as_it_matters(ledger, raw):
    cleared = ledger.reset(WHO)
    assert int(raw.get(reset_key(WHO))) == cleared.at_us
    assert raw.ttl(reset_key(WHO)) == RESET_KEEP_SECONDS
    assert ledger.show(WHO, mine()).reset_at_us == cleared.at_us


def test_nothing_that_comes_after_a_reset_is_made_in_its_microsecond(redis_url):
    link = Link(redis_url, clock=SystemClock())
    backend, ledger = open_backend("atomic", link), Ledger(link)
    script, reserve = Script("reset.lua"), make_ask("r", COST, ROOMY)
    with redis.Redis.from_url(redis_url) as raw:
        ledger.reset(WHO)
        for number in range(200):
            # In one step of the server, so that nothing lies between the two but themselves.
            keys = [reset_key(WHO), *"abcdef"]
            pipeline = raw.pipeline(transaction=False)
            pipeline.eval(script.text, len(keys), *keys, "", 60, 1, 3)
            pipeline.time()
            reset, (seconds, us) = pipeline.execute()
            assert reset[0] < seconds * US + us
            made = backend.reserve(replace(reserve, reservation_id=f"r{number}"))
            assert made.made_at_us > int(raw.get(reset_key(WHO)))
    link.close()


CALLERS, CALLS = 6, 60


def spend(backend, name):
    for number in range(CALLS):
        made = backend.reserve(make_ask(f"{name}-{number}", COST, ROOMY, further=FURTHER))
        if number % 3 == 0:
            made = backend.extend(made, 2 * COST, made.budgets)
        if number % 4:
            backend.settle(made, 300 + number)


def test_resets_that_race_with_reservations_lose_nothing_and_double_nothing(ledger, backend, link):
    is_over = threading.Event()
    start = threading.Barrier(CALLERS + 1)

    def clear():
        start.wait(10)
        cleared = 0
        while not is_over.is_set():
            ledger.reset(WHO, FURTHER)
            cleared += 1
        return cleared

    def call(number):
        start.wait(10)
        spend(backend, f"t{number}")

    with ThreadPoolExecutor(CALLERS + 1) as threads:
        clearer = threads.submit(clear)
        for caller in [threads.submit(call, number) for number in range(CALLERS)]:
            caller.result(60)
        is_over.set()
        assert clearer.result(60) > CALLERS
    last = backend.reserve(make_ask("last", COST, ROOMY, further=FURTHER))
    # The network's books hold everything, the identifier's what was made since the last reset: both by the records.
    report = audit(link)
    assert report.disagreements == ()
    assert sum(report.records.values()) == CALLERS * CALLS + 1
    ledger.reset(WHO, FURTHER)
    backend.settle(last, 1)
    assert spent(backend, "window", "day") == (0, 0)
    assert [use.spent_nanousd for use in backend.books(FURTHER).uses] == [0, 0, 0]
    assert pending(backend) == 0


def test_a_reset_in_the_same_microsecond_counts_what_is_made_up_to_then(ledger, raw, redis_url):
    """With a clock of our own, that stands still: what is in the books is cleared, and its end leaves them alone."""

    class Still:
        def now_us(self):
            return 1_773_483_600 * US

        def monotonic_seconds(self):
            return 0.0

    link = Link(redis_url, clock=Still())
    backend = open_backend("atomic", link, Still(), decide_by_clock=True)
    made = backend.reserve(make_ask("r0", COST, ROOMY))
    ledger.reset(WHO, now_us=Still().now_us())
    backend.settle(made, 400)
    assert spent(backend, "window", "day", "network_window") == (0, 0, 400)
    link.close()
