"""Books that the last version wrote that knew six fixed budgets: they are read, audited and settled like today's.

`tests/data/books_before_budgets.json` is a dump of that version's keys, made within one bucket. It is loaded as if that
had been in the present bucket, or in the one before.
"""

import json
import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import redis

from backends import open_backend
from backends.budgets import BUILT_IN, Reason
from backends.clock import SystemClock
from backends.conformance.cases import EVERY, ROOMY, make_ask
from backends.contract import Duplicate, DuplicateState, Idempotency, Outcome, Refusal
from backends.ledger.audit import audit
from backends.ledger.identifier_books import Ledger
from backends.store.link import Link

DUMP = Path(__file__).resolve().parents[1] / "data" / "books_before_budgets.json"
BUCKET_SECONDS, PENDING_SECONDS = 30, 360
US = 1_000_000
WHO, NETWORK = "hash456", "198.51.100.7"
SIX = tuple(BUILT_IN)
LIMITS = replace(ROOMY, window_nanousd=10_000, throttle_seconds=300)
MADE = {
    "settled": (1_000, WHO, NETWORK, 1),
    "open": (1_000, WHO, NETWORK, 2),
    "extended": (1_000, WHO, NETWORK, 3),
    "released": (1_000, WHO, NETWORK, 4),
    "neighbour": (2_000, "ip:2001:db8::/64", "2001:db8::/64", None),
    "cleared": (3_000, "cleared", NETWORK, None),
    "since": (500, "cleared", NETWORK, None),
    "most": (9_000, "throttled", "203.0.113.9", None),
}
"""What was reserved: for how much, for whom, in which network, with which idempotency key."""


def idempotency(number):
    return Idempotency(f"{number:032x}", f"{number:016x}")


def ask_for(rid, limits=LIMITS, **changes):
    cost, who, network, number = MADE[rid]
    known = None if number is None else idempotency(number)
    changes = {"pending_seconds": PENDING_SECONDS, "idempotency": known, **changes}
    return make_ask(rid, cost, limits, identifier=who, network=network, **changes)


@pytest.fixture
def raw(redis_url):
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        yield client


@pytest.fixture
def link(redis_url):
    link = Link(redis_url, clock=SystemClock(), timeout_seconds=10)
    yield link
    link.close()


@pytest.fixture(params=["atomic", "legacy"])
def backend(link, raw, request):
    load(raw)
    return open_backend(request.param, link)


def load(raw):
    dump = json.loads(DUMP.read_text(encoding="utf-8"))
    began, (now, us) = dump["began_seconds"], raw.time()
    # All of it has to be past.
    latest = now * US + us - (dump["ended_us"] - began * US)
    begins = latest // US // BUCKET_SECONDS * BUCKET_SECONDS

    def moved(match):
        moment = int(match[0])
        is_moment = abs(moment - began * US) < 3_600 * US
        return str(moment + (begins - began) * US) if is_moment else match[0]

    hour = datetime.fromtimestamp(begins, UTC).strftime("%Y-%m-%dT%H")
    for each in dump["keys"]:
        key = re.sub(r"\d{4}-\d\d-\d\d(T\d\d)?$", lambda match: hour if match[1] else hour[:10], each["key"])
        if each["type"] == "zset":
            raw.zadd(key, {int(start) - began + begins: nanousd for start, nanousd in each["value"].items()})
        else:
            raw.set(key, re.sub(r"\b\d{16}\b", moved, each["value"]))
        raw.pexpire(key, each["ttl_ms"])


def spent(backend, who=WHO, network=NETWORK):
    books = backend.books(ROOMY.budgets(who, network))
    return {name: books.spent(name) for name in SIX}


def changes_by(backend, rid, change):
    """By how much the books of its owners change, of each of the six."""
    _, who, network, _ = MADE[rid]
    before = spent(backend, who, network)
    change()
    return {name: nanousd - before[name] for name, nanousd in spent(backend, who, network).items()}


def assert_clean(link):
    report = audit(link)
    assert (report.disagreements, report.undecided) == ((), ())
    return report


def test_they_are_audited(backend, link):
    report = assert_clean(link)
    assert report.records == {"open": 6, "expired": 0, "settled": 1, "released": 1}
    assert (report.open_nanousd, report.sums_checked, report.keys) == (17_000, 3, 37)
    assert report.checked_exactly + report.checked_at_least == 24


def test_what_is_wrong_in_them_is_found(backend, link, raw):
    raw.decr(next(iter(raw.scan_iter("llm:network:daily:203.0.113.9:*"))))
    assert {each.kind for each in audit(link).disagreements} == {"total", "sum"}


def test_they_are_read(backend, link):
    assert spent(backend) == {
        "day": 2_900,
        "window": 2_900,
        "network_window": 6_400,
        "network_day": 6_400,
        "global_hour": 17_400,
        "global_day": 17_400,
    }
    books = Ledger(link).show("cleared", LIMITS.budgets("cleared", NETWORK)[:2])
    assert [(each.name, each.held_nanousd, each.spent_nanousd) for each in books.limits] == [
        ("window", 500, 0),
        ("day", 500, 0),
    ]
    assert {each.reservation_id for each in books.reservations} == {"cleared", "since"}


@pytest.mark.parametrize(("rid", "held"), [("open", 1_000), ("extended", 1_500), ("neighbour", 2_000)])
def test_an_open_reservation_is_settled_where_it_was_booked(backend, link, rid, held):
    made = backend.find(ask_for(rid))
    assert made.cost_nanousd == held
    changed = changes_by(backend, rid, lambda: backend.settle(made, 300))
    assert changed == dict.fromkeys(SIX, 300 - held)
    assert backend.settle(made, 300).outcome is Outcome.REPEATED
    assert assert_clean(link).records["settled"] == 2


def test_it_is_released(backend, link):
    made = backend.find(ask_for("open"))
    assert changes_by(backend, "open", lambda: backend.release(made)) == dict.fromkeys(SIX, -1_000)
    assert backend.find_duplicate(idempotency(2)) is None
    assert_clean(link)


def test_it_is_extended(backend, link):
    made = backend.find(ask_for("extended"))
    changed = changes_by(backend, "extended", lambda: backend.extend(made, 2_500, LIMITS.budgets(WHO, NETWORK)))
    assert changed == dict.fromkeys(SIX, 1_000)
    assert backend.find_duplicate(idempotency(3)).cost_nanousd == 2_500
    assert assert_clean(link).open_nanousd == 18_000


def test_it_is_found_by_its_idempotency_key(backend):
    def known(number):
        found = backend.find_duplicate(idempotency(number))
        return found and (found.reservation_id, found.state, found.cost_nanousd, found.same_body)

    assert known(1) == ("settled", DuplicateState.SETTLED, 400, True)
    assert known(2) == ("open", DuplicateState.IN_FLIGHT, 1_000, True)
    assert known(4) is None
    again = backend.reserve(replace(ask_for("open"), reservation_id="again"))
    assert isinstance(again, Duplicate)


def test_asked_again_with_todays_budgets_it_is_charged_to_what_it_was_charged_to(backend, link):
    """The budgets of the settings are more by now, and the window is longer."""
    made = backend.reserve(ask_for("open", replace(EVERY, window_seconds=3_600)))
    assert [budget.name for budget in made.budgets] == list(SIX)
    assert changes_by(backend, "open", lambda: backend.settle(made, 1)) == dict.fromkeys(SIX, -999)
    assert_clean(link)


def test_what_was_made_before_a_reset_stays_out_of_the_books(backend, link):
    before, since = backend.find(ask_for("cleared")), backend.find(ask_for("since"))
    changed = changes_by(backend, "cleared", lambda: backend.settle(before, 0))
    assert changed == dict.fromkeys(SIX, -3_000) | {"day": 0, "window": 0}
    assert changes_by(backend, "since", lambda: backend.settle(since, 0)) == dict.fromkeys(SIX, -500)
    assert_clean(link)


def test_a_throttle_marker_still_refuses(backend):
    refusal = backend.reserve(replace(ask_for("most"), reservation_id="more"))
    assert isinstance(refusal, Refusal)
    assert (refusal.reason, refusal.cause, refusal.budget) == (Reason.THROTTLED, Reason.WINDOW_LIMIT, "window")


def test_further_budgets_begin_beside_them(backend, link):
    for number in range(3):
        made = backend.reserve(make_ask(f"new-{number}", 1_000, EVERY, pending_seconds=PENDING_SECONDS))
        if number:
            backend.settle(made, 100)
    backend.settle(backend.find(ask_for("open")), 100)
    assert spent(backend)["window"] == 2_900 + 1_200 - 900
    assert backend.books(EVERY.budgets(WHO, NETWORK)).spent("key_month") == 1_200
    assert_clean(link)


def test_they_are_cleared(backend, link):
    cleared = Ledger(link).reset(WHO)
    assert (cleared.window_nanousd, cleared.open_nanousd, cleared.days_nanousd) == (2_900, 2_500, 2_900)
    assert spent(backend)["window"] == 0
    assert_clean(link)
