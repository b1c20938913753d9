"""One answer's money: what it covers as it runs, on real books."""

from dataclasses import replace
from decimal import Decimal

import pytest

from backends.clock import SystemClock
from backends.conformance.cases import ROOMY, make_ask
from backends.conformance.harness import MemoryHarness
from backends.contract import Reservation
from backends.guard import EmergencyBudget, FailurePolicy, Guard
from backends.pricing.prices import Price
from flaskapp.answers.meter import Meter, RunAhead, Slices, slices_of
from flaskapp.llm import Piece, Usage
from flaskapp.settings import LiveSettings

PRICE = Price.flat("m", Decimal(1), Decimal(10))  # 1,000 and 10,000 nano-dollars a token
MOST = Usage(100, 400)
SLICES = Slices(50, 10, RunAhead())
INPUT = 100 * 1_000
TOKEN = 10_000


def piece(tokens=1, deltas=1):
    return Piece("x" * tokens, deltas, tokens)


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
def bill_of(guard):
    """`bill_of(limit in tokens)`: a meter under slices, whose identifier's day has room for its input and so much."""

    def make(limit_tokens=10**6, slices=SLICES, most=MOST, price=PRICE):
        limits = replace(ROOMY, day_nanousd=INPUT + limit_tokens * TOKEN)
        first = slices.first(most) if slices else most
        cost = PRICE.highest_cost_nanousd(first.input_tokens, first.output_tokens)
        made = guard.reserve(make_ask("r0", cost, limits))
        assert isinstance(made, Reservation)
        return Meter(guard, made, price, most, slices=slices, limits=lambda: limits)

    return make


def day(books):
    return books.backend.books("hash456", "198.51.100.7", 600).day_nanousd


def test_a_slice_and_the_cushion_are_held_before_a_word_is_said(bill_of, books):
    bill_of()
    assert day(books) == INPUT + 60 * TOKEN


def test_the_hold_is_always_the_cushion_ahead_of_what_was_read(bill_of, books):
    meter = bill_of()
    for read in range(1, 391):
        assert meter.take(piece())
        held_tokens = (day(books) - INPUT) // TOKEN
        assert min(read + 10, 400) <= held_tokens <= min(read + 10 + 50, 400)


def test_it_never_holds_more_than_the_most(bill_of, books):
    meter = bill_of()
    assert all(meter.take(piece()) for _ in range(400))
    assert day(books) == INPUT + 400 * TOKEN


def test_where_there_is_no_room_the_answer_ends_inside_what_is_held(bill_of, books):
    meter = bill_of(limit_tokens=100)
    read = 0
    while meter.take(piece()):
        read += 1
    # The piece that was one too many was read as well; the cushion behind it is what the upstream may be ahead.
    assert read + 1 + 10 == 100 + 1
    assert day(books) == INPUT + 100 * TOKEN
    assert meter.settle(None) == INPUT + 100 * TOKEN == day(books)


def test_where_all_that_came_was_read_only_the_cushion_is_unknown(bill_of, books):
    """The first that is cut gives back what its upstream cannot have generated; it is there for the others."""
    ahead = RunAhead()
    ahead.note(40)
    meter = bill_of(limit_tokens=210, slices=Slices(200, 10, ahead))
    while meter.take(piece()):
        pass
    # It went on until less than 40 were left; 5 more had come, of which nothing is asked for any more.
    assert not meter.take(piece(tokens=5))
    assert day(books) == INPUT + 210 * TOKEN
    meter.nothing_is_unread()
    assert meter.unknown_usage == Usage(100, 171 + 5 + 10)
    assert meter.settle(None) == INPUT + 186 * TOKEN == day(books)


@pytest.mark.parametrize(("late", "booked"), [(34, 210), (39, 210), (45, 216)])
def test_what_had_come_beyond_what_is_held_is_booked_as_it_is(bill_of, books, late, booked):
    ahead = RunAhead()
    ahead.note(40)
    meter = bill_of(limit_tokens=210, slices=Slices(200, 10, ahead))
    while meter.take(piece()):
        pass
    meter.take(piece(tokens=late))
    meter.nothing_is_unread()
    assert meter.settle(None) == INPUT + booked * TOKEN == day(books)


def test_an_answer_that_ends_by_itself_without_a_usage_is_booked_whole(bill_of, books):
    meter = bill_of()
    assert meter.take(piece())
    meter.nothing_is_unread()
    assert meter.settle(None) == INPUT + 60 * TOKEN == day(books)


def test_the_last_room_is_used_to_the_last_token(bill_of, books):
    meter = bill_of(limit_tokens=73)
    while meter.take(piece()):
        pass
    assert day(books) == INPUT + 73 * TOKEN


def test_what_nobody_knows_is_told_as_what_is_booked_for_it(bill_of):
    meter = bill_of(limit_tokens=100)
    assert meter.unknown_usage == Usage(100, 60), "the first slice and the cushion"
    while meter.take(piece()):
        pass
    assert meter.unknown_usage == Usage(100, 100)
    assert meter.settle(None) == meter.unknown_usage.cost_nanousd(PRICE)


def test_what_was_seen_beyond_the_most_is_told_as_well(bill_of):
    meter = bill_of(slices=None, most=Usage(100, 20))
    assert meter.unknown_usage == Usage(100, 20)
    for _ in range(25):
        meter.take(piece())
    assert meter.unknown_usage == Usage(100, 25)
    assert meter.settle(None) == meter.unknown_usage.cost_nanousd(PRICE)


def test_a_usage_settles_to_what_was_used(bill_of, books):
    meter = bill_of()
    for _ in range(80):
        meter.take(piece())
    assert meter.settle(Usage(90, 80)) == 90 * 1_000 + 80 * TOKEN == day(books)
    assert meter.settle(None) == 90 * 1_000 + 80 * TOKEN
    assert not meter.take(piece(tokens=200)), "after the end nothing more is asked for"
    assert day(books) == 90 * 1_000 + 80 * TOKEN


def test_an_upstream_that_gives_more_than_it_was_asked_for_is_cut_and_booked_as_it_is(bill_of, books):
    meter = bill_of(slices=None, most=Usage(100, 20))
    taken = [meter.take(piece()) for _ in range(25)]
    assert taken == [True] * 20 + [False] * 5
    assert meter.settle(None) == INPUT + 25 * TOKEN == day(books)


def test_a_batch_that_jumps_over_the_cushion_is_covered_at_once(bill_of, books):
    meter = bill_of()
    assert meter.take(piece(tokens=200))
    assert (day(books) - INPUT) // TOKEN >= 210


def test_or_it_ends_the_answer(bill_of, books):
    meter = bill_of(limit_tokens=60)
    assert not meter.take(piece(tokens=300))
    # What was seen is booked, also where nothing covered it.
    assert meter.unknown_usage == Usage(100, 300)
    assert meter.settle(None) == INPUT + 300 * TOKEN == day(books)


def test_the_cushion_grows_with_what_upstreams_are_seen_to_be_ahead(bill_of, books):
    ahead = RunAhead()
    meter = bill_of(slices=Slices(50, 10, ahead))
    assert meter.take(Piece("x", 1, 1, ahead=30))
    assert (day(books) - INPUT) // TOKEN >= 1 + 2 * 30


def test_what_was_seen_elsewhere_raises_no_first_hold_and_no_cushion_beyond_its_cap():
    ahead = RunAhead()
    ahead.note(4_000)
    assert Slices(50, 10, ahead).first(MOST).output_tokens == 50 + 10
    assert Slices(50, 10, ahead).cushion_tokens == 80
    assert Slices(256, 16, ahead).cushion_tokens == 256


KNOWN = replace(PRICE, model="gpt-4o")


@pytest.mark.parametrize(("price", "is_cut"), [(KNOWN, True), (PRICE, False)])
def test_many_tokens_in_few_events_are_booked_and_cut_where_they_can_be_counted(bill_of, books, price, is_cut):
    meter = bill_of(slices=None, most=Usage(100, 20), price=price)
    taken = [meter.take(piece(tokens=10)) for _ in range(9)]
    assert taken == [True] * 2 + [not is_cut] * 7
    assert meter.unknown_usage == Usage(100, 90)
    assert meter.settle(None) == INPUT + 90 * TOKEN == day(books)


@pytest.mark.parametrize(("price", "tokens"), [(KNOWN, 450), (PRICE, 800)])
def test_an_honest_answer_that_is_counted_a_little_too_high_is_neither_cut_nor_an_overrun(bill_of, price, tokens):
    meter = bill_of(slices=None, price=price)
    assert meter.take(piece(tokens=tokens, deltas=400))
    assert meter.unknown_usage == MOST
    assert meter.settle(None) == INPUT + 400 * TOKEN


def test_what_was_seen_is_forgotten_after_a_while():
    ahead = RunAhead()
    ahead.note(30)
    for _ in range(RunAhead.MEMORY_PIECES):
        ahead.note(1)
    assert ahead.tokens == 30
    for _ in range(RunAhead.MEMORY_PIECES):
        ahead.note(2)
    assert ahead.tokens == 2


def test_released_books_nothing(bill_of, books):
    meter = bill_of()
    assert meter.release() == 0 == day(books)
    assert meter.settle(None) == 0 == day(books)


def test_without_a_reservation_everything_is_covered(guard):
    meter = Meter(guard, None, PRICE, MOST, slices=SLICES, limits=lambda: ROOMY)
    assert all(meter.take(piece()) for _ in range(400))
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


def test_what_an_answer_only_wishes_for_is_no_reason_to_end_it(bill_of, books):
    """A full budget, and upstreams seen far ahead: it goes on while its hold covers a quarter of a slice more."""
    ahead = RunAhead()
    ahead.note(4_000)
    meter = bill_of(limit_tokens=60, slices=Slices(50, 10, ahead))
    # 60 are held; of the cushion a quarter of a slice is the last that it gives up.
    assert [meter.take(piece()) for _ in range(49)] == [True] * 48 + [False]
    assert day(books) == INPUT + 60 * TOKEN
