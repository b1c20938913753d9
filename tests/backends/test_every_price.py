"""Every model of the price table that has a price, at every time at which its price may be another one."""

import math
from collections import Counter
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from fractions import Fraction

import pytest
from genai_prices.data_snapshot import get_snapshot
from genai_prices.types import StartDateConstraint, TieredPrices, TimeOfDateConstraint
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.errors import ConfigurationError
from backends.pricing.prices import Price, PriceBook, records_of

HOURS = [datetime(2026, 3, 1, hour, minute, tzinfo=UTC) for hour in range(24) for minute in (0, 29, 30, 59)]
A_HAIR = timedelta(microseconds=1)
MOST_TOKENS = 2_000_000
CHOICES = 8


def priced_models():
    """Of each provider's models that the service would start with: provider, model, what the table says, our book."""
    found, refused = [], Counter()
    for provider in get_snapshot().providers:
        for info in provider.models:
            try:
                book = PriceBook(provider.id, [info.id])
            except ConfigurationError as error:
                reasons = {"is not in the price table": "unknown", "by itself": "searches", "with images": "draws"}
                refused[next((name for words, name in reasons.items() if words in str(error)), "no price")] += 1
                continue
            # An id may match an earlier entry of its provider: what the table finds by it is what counts.
            listed = get_snapshot().find_provider_model(info.id, None, provider.id, None)[1]
            found.append((provider.id, info.id, listed, book))
    return found, refused


MODELS, REFUSED = priced_models()


def microseconds(moment):
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // A_HAIR


def turns(listed):
    """Every moment at which one of the model's prices begins or ends, on some days, and a hair around it."""
    for one in records_of(listed):
        if isinstance(one.constraint, StartDateConstraint):
            begins = datetime.combine(one.constraint.start_date, datetime.min.time(), UTC)
            yield from (begins - A_HAIR, begins, *(begins + timedelta(hours=hour) for hour in range(24)))
        elif isinstance(one.constraint, TimeOfDateConstraint):
            for day in (1, 2, 15, 31):
                for at in (one.constraint.start_time, one.constraint.end_time):
                    turn = datetime.combine(date(2026, 8, day), at, UTC)
                    yield from (turn - A_HAIR, turn, turn + A_HAIR)


def rate(amount, input_tokens):
    """Dollars a million, of the library's own table."""
    if amount is None:
        return Fraction(0)
    if not isinstance(amount, TieredPrices):
        return Fraction(amount)
    return Fraction(next((tier.price for tier in reversed(amount.tiers) if input_tokens > tier.start), amount.base))


def exact_nanousd(record, tokens, output, cached, written, reasoning):
    """What a usage costs by the table, without our arithmetic."""
    cache_read = record.input_mtok if record.cache_read_mtok is None else record.cache_read_mtok
    cache_write = record.input_mtok if record.cache_write_mtok is None else record.cache_write_mtok
    thought = record.output_mtok if record.output_reasoning_mtok is None else record.output_reasoning_mtok
    dollars_a_million = (
        (tokens - cached - written) * rate(record.input_mtok, tokens)
        + cached * rate(cache_read, tokens)
        + written * rate(cache_write, tokens)
        + (output - reasoning) * rate(record.output_mtok, tokens)
        + reasoning * rate(thought, tokens)
    )
    return dollars_a_million * 1_000 + rate(record.requests_kcount, tokens) * 1_000_000


def all_prices():
    seen = {id(price): price for _, model, _, book in MODELS for _, price in book._prices[model]}
    return list(seen.values())


def test_no_model_with_a_price_is_left_out():
    assert len(MODELS) > 1_900
    assert len({provider for provider, *_ in MODELS}) > 20
    # The rest cannot be found by its own id, has no price for text, or is free: it stops the start,
    # as one does whose own searches or images the table does not bound.
    assert len(MODELS) + sum(REFUSED.values()) == sum(len(provider.models) for provider in get_snapshot().providers)
    assert set(REFUSED) == {"unknown", "no price", "searches", "draws"}


def test_at_every_hour_and_around_every_turn_the_record_is_the_one_that_the_table_names():
    changing, theirs = 0, {}
    for provider, model, listed, book in MODELS:
        moments = [*HOURS, *turns(listed)]
        prices = {book.price(model, microseconds(moment)) for moment in moments}
        changing += len(prices) > 1
        for moment in moments:
            record = listed.get_prices(moment)
            if id(record) not in theirs:
                theirs[id(record)] = Price.of_record(listed.id, record)
            assert book.price(model, microseconds(moment)) == theirs[id(record)], (provider, model, moment)
        assert prices <= {price for _, price in book._prices[model]}
    assert changing > 20


def test_every_price_holds_at_its_edges_whatever_kind_of_tokens_it_is():
    for price in all_prices():
        starts = [rates.above_input_tokens + near for rates in price.tiers[1:] for near in (0, 1)]
        inputs = sorted({0, 1, 3_000, *starts})
        for most in inputs:
            for output in (0, 1, 400, 400 * CHOICES):
                hold = price.highest_cost_nanousd(most, output)
                for used in (each for each in inputs if each <= most):
                    for cached, written, reasoning in ((0, 0, 0), (used, 0, 0), (0, used, output), (0, 0, output)):
                        cost = price.cost_nanousd(
                            used, output, cached, cache_write_tokens=written, reasoning_tokens=reasoning
                        )
                        assert type(cost) is int
                        assert 0 <= cost <= hold, (price.model, most, used, output)


@pytest.mark.parametrize("kind", ["input", "output", "cached", "written", "reasoning"])
def test_more_of_anything_never_costs_less_and_is_never_held_less(kind):
    steps = [0, 1, 2, 999, 1_000, 10_000]
    for price in all_prices():
        inputs = sorted({*steps, *(rates.above_input_tokens + near for rates in price.tiers[1:] for near in (0, 1))})
        if kind == "input":
            costs = [price.cost_nanousd(tokens, 7) for tokens in inputs]
            holds = [price.highest_cost_nanousd(tokens, 7) for tokens in inputs]
        elif kind == "output":
            costs = [price.cost_nanousd(7, tokens) for tokens in steps]
            holds = [price.highest_cost_nanousd(7, tokens) for tokens in steps]
        elif kind == "cached":
            costs = [price.cost_nanousd(tokens, 7, tokens) for tokens in inputs]
            holds = costs
        elif kind == "written":
            costs = [price.cost_nanousd(tokens, 7, cache_write_tokens=tokens) for tokens in inputs]
            holds = costs
        else:
            costs = [price.cost_nanousd(7, tokens, reasoning_tokens=tokens) for tokens in steps]
            holds = costs
        assert costs == sorted(costs), price.model
        assert holds == sorted(holds), price.model


MOMENTS = st.integers(1_672_531_200, 1_830_297_600).map(lambda seconds: datetime.fromtimestamp(seconds, UTC))


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(MODELS), MOMENTS, st.integers(0, MOST_TOKENS), st.integers(0, 100_000), st.data())
def test_no_usage_within_what_was_asked_for_costs_more_than_was_reserved(offer, moment, most_in, most_out, data):
    _, model, listed, book = offer
    price = book.price(model, microseconds(moment))
    hold = price.highest_cost_nanousd(most_in, most_out * CHOICES)
    used_in = data.draw(st.integers(0, most_in))
    choices = data.draw(st.lists(st.integers(0, most_out), min_size=1, max_size=CHOICES))
    used_out = sum(choices)
    cached = data.draw(st.integers(0, used_in))
    written = data.draw(st.integers(0, used_in - cached))
    reasoning = data.draw(st.integers(0, used_out))
    kinds = {"cache_write_tokens": written, "reasoning_tokens": reasoning}
    unnamed = price.cost_nanousd(used_in, used_out, cached, long_cache_write_tokens=written, **kinds)
    assert 0 <= unnamed <= hold
    cost = price.cost_nanousd(used_in, used_out, cached, text_tokens=used_out - reasoning, **kinds)
    assert 0 <= cost <= unnamed
    # Rounded up to a whole nano-dollar, and not by one more.
    assert cost == math.ceil(exact_nanousd(listed.get_prices(moment), used_in, used_out, cached, written, reasoning))


def test_this_would_notice_a_tier_that_is_missed_in_the_hold():
    tiered = [price for price in all_prices() if len(price.tiers) > 1]
    assert len(tiered) > 50
    missed = [
        price
        for price in tiered
        if replace(price, tiers=price.tiers[:1]).highest_cost_nanousd(price.tiers[-1].above_input_tokens + 1, 0)
        < price.cost_nanousd(price.tiers[-1].above_input_tokens + 1, 0)
    ]
    assert len(missed) > 50
