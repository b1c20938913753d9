import math
import random
import re
import time
import warnings
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction

import pytest
from genai_prices import Usage, calc_price
from genai_prices.data_snapshot import get_snapshot
from genai_prices.types import ModelPrice, Tier, TieredPrices, TimeOfDateConstraint
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.errors import ConfigurationError
from backends.pricing.prices import Price, PriceBook, records_of

NOON_US = 1_750_000_000_000_000


def priced_records():
    """Every record of the table that has a price for text, with its model."""
    found = []
    for provider in get_snapshot().providers:
        for info in provider.models:
            for one in records_of(info):
                try:
                    found.append((provider, info, one.prices, Price.of_record(info.id, one.prices)))
                except ValueError:
                    continue
    return found


RECORDS = priced_records()
TOKENS = st.integers(0, 2_000_000)


def at(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) * 1_000_000


def one_price(model: str, provider: str = "openai", at_us: int = NOON_US) -> Price:
    return PriceBook(provider, [model]).price(model, at_us)


def test_the_rates_of_gpt_4o():
    price = one_price("gpt-4o")
    assert price.cost_nanousd(1, 0) == 2_500
    assert price.cost_nanousd(0, 1) == 10_000
    assert price.cost_nanousd(100, 0, 40) == 60 * 2_500 + 40 * 1_250
    assert price.cost_nanousd(0, 0) == 0
    assert price.highest_cost_nanousd(100, 400) == 100 * 2_500 + 400 * 10_000


def test_what_is_finer_than_a_nano_dollar_is_rounded_up():
    price = Price.flat("m", Decimal("0.0005"), Decimal("0.0001"))
    assert [price.cost_nanousd(n, 0) for n in (0, 1, 2, 3)] == [0, 1, 1, 2]
    assert price.cost_nanousd(1, 5) == 1  # half and half a nano-dollar: rounded once, not twice
    assert price.highest_cost_nanousd(1, 6) == 2


def test_a_long_input_is_dearer_as_a_whole():
    tiers = TieredPrices(base=Decimal(1), tiers=[Tier(start=100, price=Decimal(2))])
    price = Price.of_record("m", ModelPrice(input_mtok=tiers, output_mtok=Decimal(10)))
    assert price.cost_nanousd(100, 0) == 100 * 1_000
    assert price.cost_nanousd(101, 0) == 101 * 2_000
    assert price.highest_cost_nanousd(100, 1) == 100 * 1_000 + 10_000
    assert price.highest_cost_nanousd(101, 1) == 101 * 2_000 + 10_000


def test_the_hold_covers_a_shorter_input_that_costs_more():
    tiers = TieredPrices(base=Decimal(3), tiers=[Tier(start=100, price=Decimal(1))])
    price = Price.of_record("m", ModelPrice(input_mtok=tiers, output_mtok=Decimal(10)))
    assert price.highest_cost_nanousd(101, 0) == price.cost_nanousd(100, 0) == 300_000


def test_cache_writes_and_dear_caches_are_in_the_hold():
    price = Price.of_record(
        "m", ModelPrice(input_mtok=Decimal(4), cache_write_mtok=Decimal(5), output_mtok=Decimal(20))
    )
    assert price.cost_nanousd(100, 0, 10, cache_write_tokens=50) == 40 * 4_000 + 10 * 4_000 + 50 * 5_000
    assert price.highest_cost_nanousd(100, 0) == 100 * 5_000
    dear = Price.of_record("m", ModelPrice(input_mtok=Decimal(1), cache_read_mtok=Decimal(2), output_mtok=Decimal(1)))
    assert dear.highest_cost_nanousd(10, 0) == dear.cost_nanousd(10, 0, 10) == 20_000


def test_the_fee_for_a_request_and_the_rate_for_reasoning():
    price = Price.of_record(
        "m",
        ModelPrice(
            input_mtok=Decimal(1),
            output_mtok=Decimal(1),
            output_reasoning_mtok=Decimal(3),
            requests_kcount=Decimal(12),
        ),
    )
    assert price.cost_nanousd(0, 10, reasoning_tokens=4) == 12_000_000 + 6 * 1_000 + 4 * 3_000
    assert price.highest_cost_nanousd(0, 10) == 12_000_000 + 10 * 3_000


def test_what_is_not_known_to_be_text_costs_as_much_as_the_dearest_kind():
    price = one_price("gemini-2.5-flash-image", "google")
    assert price.highest_cost_nanousd(0, 2_000) == 2_000 * 30_000
    assert price.cost_nanousd(0, 1_290) == 1_290 * 30_000
    assert price.cost_nanousd(0, 1_300, text_tokens=10) == 10 * 2_500 + 1_290 * 30_000
    assert price.cost_nanousd(0, 10, text_tokens=11) == 10 * 2_500


@pytest.mark.parametrize("kind", ["output_image_mtok", "output_audio_mtok", "output_video_mtok"])
def test_whatever_a_model_may_give_in_place_of_text_is_in_the_hold(kind):
    price = Price.of_record("m", ModelPrice(input_mtok=Decimal(1), output_mtok=Decimal(2), **{kind: Decimal(9)}))
    assert price.highest_cost_nanousd(0, 10) == price.cost_nanousd(0, 10) == 90_000


def test_a_longer_cache_is_in_the_hold_and_has_its_own_price():
    price = one_price("claude-sonnet-4-6", "anthropic")
    usual = price.cost_nanousd(1_000, 0, cache_write_tokens=1_000)
    long = price.cost_nanousd(1_000, 0, cache_write_tokens=1_000, long_cache_write_tokens=1_000)
    assert usual < long == price.highest_cost_nanousd(1_000, 0)


def test_searches_that_are_billed_are_priced():
    price = one_price("gemini-2.5-flash", "google")
    assert price.cost_nanousd(0, 0, searches=2) == 2 * 35_000_000


@pytest.mark.parametrize(
    ("provider", "model", "why"),
    [
        ("perplexity", "sonar-deep-research", "searches by itself"),
        ("openrouter", "perplexity/sonar", "searches by itself"),
        ("openai", "gpt-4o-search-preview", "searches by itself"),
        ("openai", "gpt-5-search-api", "searches by itself"),
        ("openai", "gpt-5-image", "may answer with images"),
        ("openrouter", "google/gemini-2.5-flash-image", "may answer with images"),
    ],
)
def test_a_model_that_bills_what_the_table_does_not_bound_stops_the_start(provider, model, why):
    with pytest.raises(ConfigurationError, match=why) as caught:
        PriceBook(provider, [model])
    assert "\n" not in str(caught.value)
    assert PriceBook(provider, [model], (Decimal(1), Decimal(2))).offers(model)


def test_a_fee_for_each_request_bounds_its_searches():
    assert one_price("sonar-pro", "perplexity").highest_cost_nanousd(0, 0) == 14_000_000


@pytest.mark.parametrize(
    ("input_tokens", "output_tokens", "kinds"),
    [
        (-1, -1, {}),
        (10, 0, {"cached_input_tokens": 11}),
        (10, 0, {"cached_input_tokens": -5}),
        (10, 0, {"cached_input_tokens": 10, "cache_write_tokens": 10}),
        (0, 10, {"reasoning_tokens": 99}),
    ],
)
def test_nonsense_in_a_usage_never_makes_a_cost_negative_or_larger_than_the_hold(input_tokens, output_tokens, kinds):
    price = one_price("gpt-4o")
    assert 0 <= price.cost_nanousd(input_tokens, output_tokens, **kinds) <= price.highest_cost_nanousd(10, 10)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(RECORDS), TOKENS, TOKENS, TOKENS, TOKENS, TOKENS, st.data())
def test_no_usage_within_the_bounds_costs_more_than_the_hold(record, cap_in, cap_out, cached, written, reasoning, data):
    price = record[3]
    used_in = data.draw(st.integers(0, cap_in))
    used_out = data.draw(st.integers(0, cap_out))
    cost = price.cost_nanousd(used_in, used_out, cached, cache_write_tokens=written, reasoning_tokens=reasoning)
    assert 0 <= cost <= price.highest_cost_nanousd(cap_in, cap_out)


def test_the_hold_covers_every_record_of_the_table_at_its_edges():
    assert len(RECORDS) > 2_000
    for _, info, _, price in RECORDS:
        edges = {0, 1, 3_000, *(rates.above_input_tokens + d for rates in price.tiers[1:] for d in (0, 1))}
        for tokens in sorted(edges):
            hold = price.highest_cost_nanousd(tokens, 400)
            kinds = [{}, {"cached_input_tokens": tokens}, {"cache_write_tokens": tokens}, {"reasoning_tokens": 400}]
            for used in edges:
                if used <= tokens:
                    worst = max(price.cost_nanousd(used, 400, **kind) for kind in kinds)
                    assert 0 <= worst <= hold, info.id
            assert price.highest_cost_nanousd(tokens, 401) >= hold
            assert price.highest_cost_nanousd(tokens + 1, 400) >= hold


def test_the_cost_is_monotone_for_every_record_of_the_table():
    for _, info, _, price in RECORDS:
        edges = sorted({0, 1, 1_000, *(rates.above_input_tokens + d for rates in price.tiers[1:] for d in (0, 1))})
        costs = [price.cost_nanousd(tokens, 7) for tokens in edges]
        assert costs == sorted(costs), info.id
        assert price.cost_nanousd(10, 8) >= price.cost_nanousd(10, 7)


def test_every_record_agrees_with_the_library_to_the_nano_dollar():
    draw = random.Random(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _, info, record, price in RECORDS:
            used_in, used_out = draw.randrange(400_000), draw.randrange(9_000)
            cached = draw.randrange(used_in + 1)
            theirs = record.calc_price(Usage(input_tokens=used_in, output_tokens=used_out, cache_read_tokens=cached))[
                "total_price"
            ]
            ours = price.cost_nanousd(used_in, used_out, cached, text_tokens=used_out)
            # Rounded up, and theirs is a Decimal of 28 digits: a hair of tolerance, far below a nano-dollar.
            assert -Fraction(1, 10**6) <= ours - Fraction(theirs) * 10**9 < 1, info.id


def test_deepseek_chat_doubles_by_the_hour_and_the_record_stays_fixed():
    book = PriceBook("deepseek", ["deepseek-chat"])
    night = book.price("deepseek-chat", at("2026-03-01T23:00:00"))
    day = book.price("deepseek-chat", at("2026-03-01T12:00:00"))
    assert day.cost_nanousd(1_000, 1_000) == 2 * night.cost_nanousd(1_000, 1_000)
    assert book.price("deepseek-chat", at("2026-03-01T16:29:59")) == day
    assert book.price("deepseek-chat", at("2026-03-01T16:30:00")) == night
    assert book.price("deepseek-chat", at("2026-03-02T00:30:00")) == day


def test_every_hour_of_every_model_that_changes_by_the_hour_agrees_with_the_library():
    changing = [
        (provider, info)
        for provider in get_snapshot().providers
        for info in provider.models
        if any(isinstance(one.constraint, TimeOfDateConstraint) for one in records_of(info))
    ]
    assert changing
    for provider, info in changing:
        book = PriceBook(provider.id, [info.id])
        for hour in range(24):
            moment = datetime(2026, 3, 1, hour, 30, tzinfo=UTC)
            theirs = calc_price(
                Usage(input_tokens=1_000, output_tokens=1_000),
                info.id,
                provider_id=provider.id,
                genai_request_timestamp=moment,
            ).total_price
            ours = book.price(info.id, int(moment.timestamp()) * 1_000_000).cost_nanousd(1_000, 1_000)
            assert ours == math.ceil(theirs * 10**9)


def test_a_price_that_starts_on_a_date():
    book = PriceBook("openai", ["gpt-5.6-sol"])
    before = book.price("gpt-5.6-sol", at("2026-08-20T23:59:59"))
    after = book.price("gpt-5.6-sol", at("2026-08-21T00:00:00"))
    assert (before.cost_nanousd(1_000, 0), after.cost_nanousd(1_000, 0)) == (5_000_000, 4_000_000)


@pytest.mark.parametrize(
    ("provider", "model"),
    [("openai", "no-such-model"), ("no-such-provider", "gpt-4o"), ("openai", "text-embedding-3-small")],
)
def test_a_model_without_a_price_stops_the_start(provider, model):
    with pytest.raises(ConfigurationError) as caught:
        PriceBook(provider, ["gpt-4o", model] if provider == "openai" else [model])
    text = str(caught.value)
    assert "\n" not in text
    assert model in text
    assert "LLM_PRICE_INPUT_USD_PER_MTOK and LLM_PRICE_OUTPUT_USD_PER_MTOK" in text


def test_a_free_model_stops_the_start():
    free = next(
        (provider.id, info.id)
        for provider in get_snapshot().providers
        for info in provider.models
        if info.id.endswith(":free") and info.is_match(info.id)
    )
    assert calc_price(Usage(input_tokens=9, output_tokens=9), free[1], provider_id=free[0]).total_price == 0
    with pytest.raises(ConfigurationError, match="a price of 0"):
        PriceBook(free[0], [free[1]])


def test_a_record_that_gives_input_or_output_away_is_no_price():
    for amounts in ({"input_mtok": Decimal(1)}, {"input_mtok": Decimal(0), "output_mtok": Decimal(1)}):
        with pytest.raises(ValueError):
            Price.of_record("m", ModelPrice(**amounts))
    tiers = TieredPrices(base=Decimal(1), tiers=[Tier(start=100, price=Decimal(0))])
    with pytest.raises(ValueError):
        Price.of_record("m", ModelPrice(input_mtok=tiers, output_mtok=Decimal(1)))


@pytest.mark.parametrize("override", [(Decimal(0), Decimal(1)), (Decimal(1), Decimal(0)), (Decimal(-1), Decimal(1))])
def test_an_override_of_nothing_stops_the_start(override):
    with pytest.raises(ConfigurationError, match="costs nothing"):
        PriceBook("openai", ["gpt-4o"], override)


def test_an_override_beats_the_table_and_prices_any_model():
    book = PriceBook("nobody", ["gpt-4o", "local"], (Decimal("0.1"), Decimal("0.2")))
    for model in ("gpt-4o", "local"):
        assert book.price(model, NOON_US).cost_nanousd(10, 10, 10) == 1_000 + 2_000


def test_what_is_offered():
    book = PriceBook("openai", ["gpt-4o", "gpt-4o-mini", "gpt-4o"])
    assert book.models == ("gpt-4o", "gpt-4o-mini")
    assert book.offers("gpt-4o-mini")
    assert not book.offers("gpt-4")
    with pytest.raises(KeyError):
        book.price("gpt-4", NOON_US)


def test_an_odd_name_stays_on_one_line():
    with pytest.raises(ConfigurationError) as caught:
        PriceBook("openai", ["a\nb"])
    assert re.search(r"\n", str(caught.value)) is None


def test_a_price_is_cheap_to_ask_for():
    book = PriceBook("deepseek", ["deepseek-chat"])
    start = time.process_time()
    for _ in range(1_000):
        book.price("deepseek-chat", NOON_US).highest_cost_nanousd(100, 400)
    # Of our own processor time. A look-up in the library takes about 100 µs each, this about 10.
    assert time.process_time() - start < 0.1
