"""The meter of one answer: what its reservation covers as it runs, on real books."""

from dataclasses import replace
from decimal import Decimal

import pytest

from backends.budgets import Budget, Forever, Scope
from backends.clock import SystemClock
from backends.conformance.cases import NETWORK, ROOMY, WHO, make_ask
from backends.conformance.harness import MemoryHarness
from backends.contract import Reservation
from backends.guard import EmergencyBudget, FailurePolicy, Guard
from backends.pricing.prices import Price
from flaskapp.answers.meter import CostBound, Meter, ObservedLead, Slices, slices_of
from flaskapp.llm import Batch, Piece, Usage
from flaskapp.settings import LiveSettings

PRICE = Price.flat("m", Decimal(1), Decimal(10))  # 1,000 and 10,000 nano-dollars a token
MOST = Usage(100, 400)
SLICES = Slices(50, 10, ObservedLead())
INPUT = 100 * 1_000
TOKEN = 10_000


def piece(tokens=1, deltas=1):
    return Batch([Piece("x" * tokens, deltas)], tokens)


@pytest.fixture
def books():
    return MemoryHarness()


@pytest.fixture
def guard(books, tmp_path):
    emergency = EmergencyBudget(tmp_path / "emergency.json", books.clock)
    return Guard(
        books.backend,
        MemoryHarness().backend,
        link=None,
        emergency=emergency,
        clock=SystemClock(),
        observer=lambda _: None,
        policy=lambda: FailurePolicy(is_open=True, emergency_nanousd=0),
    )


@pytest.fixture
def meter_of(guard):
    """`meter_of(limit_tokens)`: a meter under slices, whose day's budget is its input and so many tokens of output."""

    def make(limit_tokens=10**6, slices=SLICES, most=MOST, price=PRICE):
        limits = replace(ROOMY, day_nanousd=INPUT + limit_tokens * TOKEN)
        first_tokens = slices.first_tokens(most.output_tokens) if slices else most.output_tokens
        cost = PRICE.highest_cost_nanousd(most.input_tokens, first_tokens)
        made = guard.reserve(make_ask("r0", cost, limits))
        assert isinstance(made, Reservation)
        return Meter(guard, made, CostBound(price, most, slices), lambda: limits.budgets(WHO, NETWORK))

    return make


def day(books):
    return books.backend.books(ROOMY.budgets(WHO, NETWORK)).spent("day")


def test_a_slice_and_the_cushion_are_reserved_before_the_answer(meter_of, books):
    meter_of()
    assert day(books) == INPUT + 60 * TOKEN


def test_the_reservation_is_always_a_cushion_ahead_of_what_was_read(meter_of, books):
    meter = meter_of()
    for read in range(1, 391):
        assert meter.count(piece())
        reserved_tokens = (day(books) - INPUT) // TOKEN
        assert min(read + 10, 400) <= reserved_tokens <= min(read + 10 + 50, 400)


def test_it_never_reserves_more_than_the_maximum(meter_of, books):
    meter = meter_of()
    assert all(meter.count(piece()) for _ in range(400))
    assert day(books) == INPUT + 400 * TOKEN


def test_where_no_more_can_be_reserved_the_answer_ends_within_its_reservation(meter_of, books):
    meter = meter_of(limit_tokens=100)
    read = 0
    while meter.count(piece()):
        read += 1
    # The piece that was one too many was read as well; the cushion after it is for the upstream's lead.
    assert read + 1 + 10 == 100 + 1
    assert day(books) == INPUT + 100 * TOKEN
    assert meter.settle(None) == INPUT + 100 * TOKEN == day(books)


def test_where_all_that_came_was_read_only_the_cushion_is_unknown(meter_of, books):
    """The first answer that is cut gives back what its upstream cannot have generated, for the others."""
    lead = ObservedLead()
    lead.note(40, 1)
    meter = meter_of(limit_tokens=210, slices=Slices(200, 10, lead))
    while meter.count(piece()):
        pass
    # It went on until less than 40 were left; 5 more had come, and nothing is extended for those.
    assert not meter.count(piece(tokens=5))
    assert day(books) == INPUT + 210 * TOKEN
    assert meter.settle(None, is_fully_read=True) == INPUT + 186 * TOKEN == day(books)
    assert meter.assumed_usage == Usage(100, 171 + 5 + 10)


@pytest.mark.parametrize(("late", "booked"), [(34, 210), (39, 210), (45, 216)])
def test_what_had_come_beyond_the_reservation_is_booked_as_it_is(meter_of, books, late, booked):
    lead = ObservedLead()
    lead.note(40, 1)
    meter = meter_of(limit_tokens=210, slices=Slices(200, 10, lead))
    while meter.count(piece()):
        pass
    meter.count(piece(tokens=late))
    assert meter.settle(None, is_fully_read=True) == INPUT + booked * TOKEN == day(books)


def test_an_answer_that_ends_by_itself_without_a_usage_is_booked_whole(meter_of, books):
    meter = meter_of()
    assert meter.count(piece())
    assert meter.settle(None, is_fully_read=True) == INPUT + 60 * TOKEN == day(books)


def test_the_last_of_a_budget_is_used_to_the_last_token(meter_of, books):
    meter = meter_of(limit_tokens=73)
    while meter.count(piece()):
        pass
    assert day(books) == INPUT + 73 * TOKEN


def test_an_unknown_usage_is_reported_as_what_is_booked_for_it(meter_of):
    meter = meter_of(limit_tokens=100)
    assert meter.assumed_usage == Usage(100, 60), "the first slice and the cushion"
    while meter.count(piece()):
        pass
    assert meter.assumed_usage == Usage(100, 100)
    assert meter.settle(None) == meter.assumed_usage.cost_nanousd(PRICE)


def test_what_was_read_beyond_the_maximum_is_reported_as_well(meter_of):
    meter = meter_of(slices=None, most=Usage(100, 20))
    assert meter.assumed_usage == Usage(100, 20)
    for _ in range(25):
        meter.count(piece())
    assert meter.assumed_usage == Usage(100, 25)
    assert meter.settle(None) == meter.assumed_usage.cost_nanousd(PRICE)


def test_a_usage_settles_to_what_was_used(meter_of, books):
    meter = meter_of()
    for _ in range(80):
        meter.count(piece())
    assert meter.settle(Usage(90, 80)) == 90 * 1_000 + 80 * TOKEN == day(books)
    assert meter.settle(None) == 90 * 1_000 + 80 * TOKEN
    assert not meter.count(piece(tokens=200)), "after the end nothing is extended"
    assert day(books) == 90 * 1_000 + 80 * TOKEN


def test_an_upstream_that_exceeds_its_maximum_is_cut_and_booked_as_it_is(meter_of, books):
    meter = meter_of(slices=None, most=Usage(100, 20))
    taken = [meter.count(piece()) for _ in range(25)]
    assert taken == [True] * 20 + [False] * 5
    assert meter.settle(None) == INPUT + 25 * TOKEN == day(books)


def test_of_a_batch_that_exceeds_the_maximum_only_what_is_within_it_is_shown(meter_of):
    meter = meter_of(slices=None, most=Usage(100, 4))
    assert meter.count(piece())
    batch = Batch([Piece(text, 1) for text in "abcde"], 5)
    assert not meter.count(batch)
    assert [each.text for each in meter.within_maximum(batch.pieces)] == list("abc")


def test_a_batch_that_jumps_over_the_cushion_is_covered_at_once(meter_of, books):
    meter = meter_of()
    assert meter.count(piece(tokens=200))
    assert (day(books) - INPUT) // TOKEN >= 210


def test_a_batch_that_cannot_be_covered_ends_the_answer(meter_of, books):
    meter = meter_of(limit_tokens=60)
    assert not meter.count(piece(tokens=300))
    # What was read is booked, also beyond the reservation.
    assert meter.assumed_usage == Usage(100, 300)
    assert meter.settle(None) == INPUT + 300 * TOKEN == day(books)


def test_the_cushion_grows_with_the_observed_lead(meter_of, books):
    lead = ObservedLead()
    meter = meter_of(slices=Slices(50, 10, lead))
    assert meter.count(Batch([Piece("x", 1)], 1, lead_tokens=30))
    assert (day(books) - INPUT) // TOKEN >= 1 + 2 * 30


def test_the_lead_of_other_answers_raises_no_first_slice_and_no_cushion_beyond_its_cap():
    lead = ObservedLead()
    lead.note(4_000, 1)
    assert Slices(50, 10, lead).first_tokens(400) == 50 + 10
    assert Slices(50, 10, lead).cushion_tokens == 80
    assert Slices(256, 16, lead).cushion_tokens == 256


KNOWN = replace(PRICE, model="gpt-4o")


@pytest.mark.parametrize(("price", "is_cut"), [(KNOWN, True), (PRICE, False)])
def test_many_tokens_in_few_events_are_booked_and_cut_where_they_can_be_counted(meter_of, books, price, is_cut):
    meter = meter_of(slices=None, most=Usage(100, 20), price=price)
    taken = [meter.count(piece(tokens=10)) for _ in range(9)]
    assert taken == [True] * 2 + [not is_cut] * 7
    assert meter.assumed_usage == Usage(100, 90)
    assert meter.settle(None) == INPUT + 90 * TOKEN == day(books)


@pytest.mark.parametrize(("price", "tokens"), [(KNOWN, 450), (PRICE, 800)])
def test_an_honest_answer_that_is_counted_a_little_too_high_is_neither_cut_nor_an_overrun(meter_of, price, tokens):
    meter = meter_of(slices=None, price=price)
    assert meter.count(piece(tokens=tokens, deltas=400))
    assert meter.assumed_usage == MOST
    assert meter.settle(None) == INPUT + 400 * TOKEN


def test_a_lead_is_forgotten_after_a_while():
    lead = ObservedLead()
    lead.note(30, 1)
    for _ in range(ObservedLead.MEMORY_PIECES):
        lead.note(1, 1)
    assert lead.tokens == 30
    for _ in range(ObservedLead.MEMORY_PIECES):
        lead.note(2, 1)
    assert lead.tokens == 2


@pytest.mark.parametrize(("today_tokens", "reserved_tokens"), [(60, 60), (61, 61), (None, 111)])
def test_an_extension_keeps_to_the_budgets_of_today(guard, today_tokens, reserved_tokens):
    """What is charged was fixed at the admission; a budget that is gone has no limit any more."""

    def further(tokens):
        return Budget("dear", "m", Forever(), INPUT + tokens * TOKEN, Scope.MODEL)

    made = guard.reserve(make_ask("r0", INPUT + 60 * TOKEN, further=(further(10**6),)))
    today = (*ROOMY.budgets(WHO, NETWORK), *([] if today_tokens is None else [further(today_tokens)]))
    meter = Meter(guard, made, CostBound(PRICE, MOST, SLICES), lambda: today)
    assert [meter.count(piece()) for _ in range(51)] == [True] * 50 + [reserved_tokens > 60]
    assert guard.books((further(1),)).spent("dear") == INPUT + reserved_tokens * TOKEN


def test_released_books_nothing(meter_of, books):
    meter = meter_of()
    assert meter.release() == 0 == day(books)
    assert meter.settle(None) == 0 == day(books)


def test_without_a_reservation_everything_is_covered(guard):
    meter = Meter(guard, None, CostBound(PRICE, MOST, SLICES), lambda: ())
    assert all(meter.count(piece()) for _ in range(400))
    assert meter.settle(None) == INPUT + 400 * TOKEN


@pytest.mark.parametrize(
    ("policy", "model", "expected"),
    [
        ("worst_case", "gpt-4o", None),
        ("slices", "gpt-4o", Slices(256, 16)),
        ("slices", "o3-mini", None),
        ("slices", "openai/gpt-5", None),
        ("slices", "openai/gpt-4.1-mini", Slices(256, 16)),
        ("slices", "gpt-3.5-turbo", Slices(256, 16)),
        ("slices", "gpt-4o-audio-preview", None),
        ("slices", "gpt-4o-search-preview", None),
        ("slices", "gemini-2.5-pro", None),
        ("slices", "deepseek-reasoner", None),
        ("slices", "llama-3.3-70b", None),
    ],
)
def test_models_that_think_unseen_are_never_sliced(policy, model, expected):
    assert slices_of(LiveSettings(reservation_policy=policy), model) == expected


def test_a_cushion_that_is_only_wished_for_is_no_reason_to_end_an_answer(meter_of, books):
    """A full budget, and a large observed lead: it goes on while its reservation covers a quarter of a slice more."""
    lead = ObservedLead()
    lead.note(4_000, 1)
    meter = meter_of(limit_tokens=60, slices=Slices(50, 10, lead))
    # 60 are reserved; a quarter of a slice is the last cushion.
    assert [meter.count(piece()) for _ in range(49)] == [True] * 48 + [False]
    assert day(books) == INPUT + 60 * TOKEN
