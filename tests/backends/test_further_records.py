"""The records of reservations that are charged to further budgets, and what they say when the budgets have changed."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.budgets import BUILT_IN, MOST_BUDGETS, Budget, Calendar, Forever, Scope, Sliding, span_at
from backends.conformance.cases import COST, NETWORK, PENDING_SECONDS, ROOMY, US, WHO, WINDOW_SECONDS, make_ask
from backends.conformance.harness import START_US, MemoryHarness
from backends.contract import Ask, Outcome
from backends.errors import ReservationConflict
from backends.keys import rows_at
from backends.records import (
    NO_OWNER,
    THE_SIX,
    Record,
    budgets_charged,
    charged_to,
    digest_of,
    key_digest,
    member_in,
    own_member,
    parse_record,
    start_of,
)

SIX = ROOMY.budgets(WHO, NETWORK)
MONTHLY = Budget("monthly", WHO, Calendar("month", "Europe/Berlin"), None)
TEAM = Budget("team_ever", "marketing", Forever(), None, Scope.TEAM)
MODEL = Budget("model_long", "ft:gpt-4o:org", Sliding(90_000), None, Scope.MODEL)
FURTHER = (MONTHLY, TEAM, MODEL)
MADE_S = START_US // US
LARGEST = 2**53


def rows_of(budgets):
    return rows_at(budgets, MADE_S)


def record_of(budgets, state="open", nanousd=COST, pending_seconds=PENDING_SECONDS):
    """What is stored of a reservation that is charged to `budgets`, read again."""
    words = charged_to(rows_of(budgets), pending_seconds)
    return parse_record(f"{state} {nanousd} {START_US} 01234567 {words}".encode())


# What is stored.


def test_the_six_alone_are_told_by_their_owners_as_ever():
    assert charged_to(rows_of(SIX), 120) == f"600 120 {digest_of(WHO)} {digest_of(NETWORK)}"


def test_further_budgets_beside_the_six_are_told_by_their_keys():
    keys = [row.key for row in rows_of(FURTHER)]
    assert charged_to(rows_of((*SIX, *FURTHER)), 120).split() == [
        *("600", "120", digest_of(WHO), digest_of(NETWORK)),
        "".join(map(key_digest, keys)),
    ]


@pytest.mark.parametrize("budgets", [(MONTHLY,), FURTHER])
def test_what_is_not_charged_to_all_six_is_told_by_keys_alone(budgets):
    keys = [row.key for row in rows_of(budgets)]
    assert charged_to(rows_of(budgets), 120).split() == ["0", "120", NO_OWNER, NO_OWNER, "".join(map(key_digest, keys))]
    assert not record_of(budgets).has_the_six


def test_the_order_of_the_budgets_does_not_matter_to_the_six():
    assert charged_to(rows_of(SIX[::-1]), 120) == charged_to(rows_of(SIX), 120)


@given(
    st.sampled_from(["open", "settled", "released"]),
    st.integers(0, LARGEST),
    st.integers(0, LARGEST),
    st.integers(0, 31 * 86_400),
    st.lists(st.text().map(key_digest), max_size=MOST_BUDGETS),
)
def test_a_record_is_read_as_it_was_written(state, nanousd, made_at_us, seconds, further):
    for who, network in ((digest_of(WHO), digest_of(NETWORK)), (NO_OWNER, NO_OWNER)):
        record = Record(state, nanousd, made_at_us, "01234567", seconds, 3_600, who, network, tuple(further))
        assert parse_record(record.text().encode()) == record


def test_a_record_of_the_old_form_is_charged_to_the_six_alone():
    record = parse_record(b"open 4000000 1773483600250000 0123456789abcdef 600 120 AAAAAAAA BBBBBBBB")
    owners = ("AAAAAAAA", "BBBBBBBB")
    assert record == Record("open", 4_000_000, 1_773_483_600_250_000, "01234567", 600, 120, *owners)
    assert record.has_the_six
    assert record.further == ()
    assert budgets_charged(record, (*SIX, *FURTHER)) == SIX


@pytest.mark.parametrize(
    "text",
    [
        b"open 5 5 0f 600 120 AAAAAAAA BBBBBBBB ",
        b"open 5 5 0f 600 120 AAAAAAAA BBBBBBBB  CCCCCC",
        b"open 5 5 0f 600 120 AAAAAAAA BBBBBBBB CCCC:C",
        b"open 5 5 0f 600 120 AAAAAAAA BBBBBBBB CCCCCCDDDDD",
        b"open 5 5 0f 600 120 AAAAAAAA BBBBBBBB CCCCCC\n",
        b"open 5 5 0f 600 120 AAAAAAAA",
    ],
)
def test_a_text_of_another_form_is_the_record_of_another_request(text):
    assert parse_record(text).state == "unknown"


def test_a_record_is_no_longer_than_is_promised():
    """As long as all its numbers can be."""
    most = (*SIX, *(MONTHLY._replace(name=f"budget_{number}") for number in range(MOST_BUDGETS - len(SIX))))
    assert len(most) == MOST_BUDGETS
    for budgets, most_bytes in ((SIX, 200), (most, 300), (most[6:], 300)):
        rows = rows_of(tuple(replace_window(budget, 31 * 86_400) for budget in budgets))
        words = charged_to(rows, 31 * 86_400)
        record = parse_record(f"released {LARGEST} {LARGEST} {'f' * 8} {words}".encode())
        assert record.state == "released"
        assert len(record.text().encode()) <= most_bytes


def replace_window(budget, seconds):
    return budget._replace(period=Sliding(seconds)) if budget.name in {"window", "network_window"} else budget


# What a record says when the budgets have changed.


def test_limits_modes_and_markers_are_those_of_today():
    today = tuple(budget._replace(limit_nanousd=1, is_shadow=True, throttle_seconds=5) for budget in (*SIX, *FURTHER))
    assert budgets_charged(record_of((*SIX, *FURTHER)), today) == today


def test_a_window_has_the_length_that_it_had_then():
    record = record_of(SIX)
    longer = tuple(replace_window(budget, 3_600) for budget in SIX)
    assert budgets_charged(record, longer) == SIX
    assert {budget.period for budget in SIX if BUILT_IN[budget.name].unit is None} == {Sliding(WINDOW_SECONDS)}


def test_a_budget_that_was_added_since_is_not_charged():
    assert budgets_charged(record_of(SIX), (*SIX, MONTHLY)) == SIX
    assert budgets_charged(record_of((*SIX, TEAM)), (*SIX, MONTHLY, TEAM)) == (*SIX, TEAM)
    assert budgets_charged(record_of((MONTHLY,)), (MONTHLY, TEAM)) == (MONTHLY,)
    assert budgets_charged(record_of((MONTHLY,)), (*SIX, MONTHLY)) == (MONTHLY,)


def test_a_budget_that_was_removed_since_is_left_out():
    assert budgets_charged(record_of((*SIX, *FURTHER)), (*SIX, TEAM)) == (*SIX, TEAM)
    assert budgets_charged(record_of((*SIX, *FURTHER)), SIX) == SIX
    assert budgets_charged(record_of(FURTHER), ()) == ()


@pytest.mark.parametrize(
    "changed",
    [
        MONTHLY._replace(name="every_month"),
        MONTHLY._replace(owner="hash457"),
        MONTHLY._replace(period=Calendar("week", "Europe/Berlin")),
        MONTHLY._replace(period=Calendar("month", "America/New_York")),
        MONTHLY._replace(period=Sliding(600)),
        MONTHLY._replace(period=Forever()),
    ],
)
def test_a_budget_of_another_name_owner_or_period_is_another(changed):
    assert budgets_charged(record_of((*SIX, MONTHLY)), (*SIX, changed)) == SIX


def test_the_period_is_the_one_in_which_it_was_made():
    """A digest that stands for March is not that of April."""
    record = record_of((MONTHLY,))
    for hours, charged in ((0, (MONTHLY,)), (1, (MONTHLY,)), (30 * 24, ())):
        moved = replace(record, made_at_us=START_US + hours * 3_600 * US)
        assert budgets_charged(moved, (MONTHLY,)) == charged


# The same through a backend.


@pytest.fixture
def harness():
    return MemoryHarness()


def ask_for(*further):
    return make_ask("r0", COST, further=further)


def spent(harness, *budgets):
    return [use.spent_nanousd for use in harness.backend.books(budgets).uses]


def test_a_reservation_settles_into_what_it_was_charged_to_when_a_budget_was_added(harness):
    harness.backend.reserve(ask_for(MONTHLY))
    again = harness.backend.reserve(ask_for(MONTHLY, TEAM))
    assert again.budgets == (*SIX, MONTHLY)
    assert again.spent("monthly") == COST
    assert harness.backend.settle(again, 7).outcome is Outcome.SETTLED
    assert spent(harness, *SIX, MONTHLY, TEAM) == [7] * 7 + [0]


def test_a_reservation_settles_into_a_budget_that_was_removed_since(harness):
    made = harness.backend.reserve(ask_for(MONTHLY, TEAM))
    found = harness.backend.find(ask_for(TEAM))
    assert found.budgets == (*SIX, TEAM)
    harness.backend.settle(made, 7)
    assert spent(harness, *SIX, MONTHLY, TEAM) == [7] * 8


def test_a_reservation_settles_into_the_month_in_which_it_was_made(harness):
    seconds_left = span_at(MONTHLY.period, MADE_S).end_seconds - MADE_S
    harness.pass_time((seconds_left - 10) * US)
    harness.backend.reserve(ask_for(MONTHLY))
    harness.pass_time(20 * US)
    again = harness.backend.reserve(ask_for(MONTHLY))
    assert spent(harness, MONTHLY) == [0]
    harness.backend.settle(again, 7)
    assert spent(harness, MONTHLY) == [0]
    march = {key: value for key, (value, _) in harness.stored().items() if key.startswith("llm:budget:")}
    assert march == {f"llm:budget:monthly:month:{WHO}:{span_at(MONTHLY.period, MADE_S).start_seconds}": "7"}


def test_an_id_is_the_same_request_whatever_further_budgets_there_are_then(harness):
    harness.backend.reserve(ask_for(MONTHLY))
    assert harness.backend.find(ask_for()).budgets == SIX
    with pytest.raises(ReservationConflict):
        harness.backend.reserve(replace(ask_for(MONTHLY), cost_nanousd=COST + 1))
    with pytest.raises(ReservationConflict):
        harness.backend.reserve(Ask("r0", COST, (TEAM,)))


def test_a_reservation_without_the_six_is_found_with_all_that_it_is_charged_to(harness):
    made = harness.backend.reserve(Ask("r0", COST, FURTHER))
    found = harness.backend.find(Ask("r0", COST, FURTHER))
    assert (found.budgets, found.cost_nanousd, found.made_at_us) == (FURTHER, COST, made.made_at_us)
    harness.backend.release(found)
    assert spent(harness, *FURTHER) == [0, 0, 0]


# Which member of an owner's pending money is whose.

D = ("aaaaaa", "bbbbbb", "cccccc")
START = 1_773_483_600


def naming(*further, has_the_six=False):
    who = "w" * 8 if has_the_six else "-"
    return Record("open", 1, START * US, "ab", 600, 120, who, who, further)


@pytest.mark.parametrize(
    ("record", "suffix"),
    [
        (naming(D[0]), f":{D[0]}"),
        (naming(D[0], D[1]), f":{D[0]}{D[1]}"),
        (naming(D[1], D[0]), f":{D[0]}{D[1]}"),
        (naming(D[1], has_the_six=True), f":{D[1]}"),
        (naming(D[0], has_the_six=True), f":{THE_SIX}{D[0]}"),
        (naming(has_the_six=True), ""),
        (naming(D[2]), ""),
    ],
)
def test_the_own_member_of_a_record_is_the_one_that_names_most_of_it(record, suffix):
    suffixes = ("", f":{D[0]}", f":{D[1]}", f":{D[0]}{D[1]}", f":{THE_SIX}{D[0]}", f":{D[0]}xxxxxx{D[1]}")
    members = [member_in(f"{START + after}{each}".encode()) for each in suffixes for after in (-10, 0, 10)]
    for order in (members, members[::-1]):
        assert own_member(order, record, START) == member_in(f"{START}{suffix}".encode())
    assert own_member([], record, START) == START


def test_a_member_is_a_start_or_begins_with_it():
    assert (member_in(b"1773483600"), member_in(1_773_483_600)) == (START, START)
    assert [start_of(member_in(text)) for text in (b"1773483600", b"1773483600:abcdef")] == [START, START]


@pytest.mark.parametrize("word", ["settled", "paid"])
def test_what_is_settled_is_known_by_the_word_of_today_and_by_that_of_before(word):
    text = f"{word} 7 1773483600250000 01234567 600 120 AAAAAAAA BBBBBBBB"
    record = parse_record(text.encode())
    assert record.state == "settled"
    assert record.text() == text.replace("settled", "paid")
