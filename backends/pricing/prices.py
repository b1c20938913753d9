"""What an answer costs, and what it can cost at most.

The table is `genai-prices`, read offline from the installed package, pinned to one provider. A look-up there takes
about 100 µs, so every record of an offered model is turned into integers once, at the start. A `Price` is one such
record: fixed at the reservation and used again at the settlement. Amounts are nano-dollars, rounded up; rates are
integers over one common denominator, so the arithmetic is exact.

Priced are tokens (input, read from a cache, written to a usual or a longer cache, output, reasoning), and the fees for
a request and for a search, where a model has them. Some models answer with images, sounds or films that nothing asked
for: what is not known to be text costs as much as the dearest kind of output. A model whose own searches or images the
table cannot bound stops the start. Not priced, because the service never asks for them: hosted tools, service tiers
and batches.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Self, TypeAlias

from genai_prices import types
from genai_prices.data_snapshot import get_snapshot

from backends.errors import ConfigurationError
from backends.money import NANOUSD_PER_USD

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NANOUSD_PER_TOKEN = Fraction(NANOUSD_PER_USD, 1_000_000)
"""At one dollar per million tokens."""
_NANOUSD_PER_THOUSANDTH = Fraction(NANOUSD_PER_USD, 1_000)
"""At one dollar per thousand requests or searches."""
_OUTPUT_KINDS = ("output_image_mtok", "output_audio_mtok", "output_video_mtok")
"""What a model may give in place of text."""
_LONG_CACHE = "cache_write_1h_mtok"
_SEARCHES = re.compile(r"sonar|web-?search|search-(preview|api)|deep-research|[-:]online|compound")
"""Names of models that search by themselves; each search, and what it finds, is billed."""
_DRAWS = re.compile(r"image|banana|gemini-omni")
"""Names of models that answer with images or films by themselves."""
_OVERRIDE_VARIABLES = "LLM_PRICE_INPUT_USD_PER_MTOK and LLM_PRICE_OUTPUT_USD_PER_MTOK"

_Amount: TypeAlias = Decimal | types.TieredPrices | None
_Constraint: TypeAlias = types.StartDateConstraint | types.TimeOfDateConstraint | None


@dataclass(frozen=True, slots=True)
class Rates:
    """Prices that hold from one input length on, in `1 / Price.denominator` nano-dollars a token or request."""

    above_input_tokens: int
    """They hold for the whole request when its input is longer than this; -1 for the first."""
    input: int
    cache_read: int
    cache_write: int
    output: int
    reasoning: int
    request: int
    long_cache_write: int
    """Written to a cache that lasts longer than the usual one."""
    other_output: int
    """Output that is not known to be text: the dearest kind of it."""
    search: int


@dataclass(frozen=True, slots=True)
class Price:
    """One price record of one model."""

    model: str
    denominator: int
    tiers: tuple[Rates, ...]
    """By rising input length; the first holds for any length."""
    has_long_cache: bool = False
    """Whether the record says what is written to a cache that lasts an hour costs."""

    @classmethod
    def flat(cls, model: str, input_usd_per_mtok: Decimal, output_usd_per_mtok: Decimal) -> Self:
        """The same price for every input token, cached or not, and for every output token."""
        return cls.of_record(model, types.ModelPrice(input_mtok=input_usd_per_mtok, output_mtok=output_usd_per_mtok))

    @classmethod
    def of_record(cls, model: str, record: types.ModelPrice) -> Self:
        """Turn a record of the table into integers.

        Raises:
            ValueError: input or output have no price, or a price of 0.
        """
        starts = [-1, *sorted({tier.start for amount in _amounts(record) for tier in _tiers_of(amount)})]
        exact = [_exact_rates(record, start) for start in starts]
        if any(rates[0] <= 0 or rates[3] <= 0 for rates in exact):
            raise ValueError(model)
        denominator = math.lcm(*(rate.denominator for rates in exact for rate in rates))
        tiers = tuple(
            Rates(start, *(int(rate * denominator) for rate in rates))
            for start, rates in zip(starts, exact, strict=True)
        )
        return cls(model, denominator, tiers, _amount(record, _LONG_CACHE) is not None)

    def cost_nanousd(  # noqa: PLR0913 (each is a kind that has its own price)
        self,
        input_tokens: int,
        output_tokens: int,
        cached_input_tokens: int = 0,
        *,
        cache_write_tokens: int = 0,
        long_cache_write_tokens: int = 0,
        reasoning_tokens: int = 0,
        text_tokens: int = 0,
        searches: int = 0,
    ) -> int:
        """What this usage costs, rounded up.

        Cached and written tokens are part of the input, and those written to a longer cache part of the written ones;
        reasoning and text are parts of the output, and the rest of it may be of any kind. Larger parts than the whole
        are cut to it, and negative counts to 0: an upstream's nonsense never makes a cost negative.
        """
        input_tokens, output_tokens = max(0, input_tokens), max(0, output_tokens)
        cached = min(max(0, cached_input_tokens), input_tokens)
        written = min(max(0, cache_write_tokens), input_tokens - cached)
        written_long = min(max(0, long_cache_write_tokens), written)
        reasoning = min(max(0, reasoning_tokens), output_tokens)
        text = min(max(0, text_tokens), output_tokens - reasoning)
        rates = self.tiers[0]
        for tier in self.tiers[1:]:
            if tier.above_input_tokens < input_tokens:
                rates = tier
        amount = (
            (input_tokens - cached - written) * rates.input
            + cached * rates.cache_read
            + (written - written_long) * rates.cache_write
            + written_long * rates.long_cache_write
            + (output_tokens - reasoning - text) * rates.other_output
            + text * rates.output
            + reasoning * rates.reasoning
            + max(0, searches) * rates.search
            + rates.request
        )
        return -(-amount // self.denominator)

    def highest_cost_nanousd(self, input_tokens: int, max_output_tokens: int) -> int:
        """The most that any usage of at most `input_tokens` and `max_output_tokens` can cost under this record."""
        input_tokens, output_tokens = max(0, input_tokens), max(0, max_output_tokens)
        # Also the longest input of each shorter tier, in case a longer input is ever the cheaper one.
        ends = [following.above_input_tokens for following in self.tiers[1:]] + [input_tokens]
        amount = max(
            min(end, input_tokens) * max(rates.input, rates.cache_read, rates.cache_write, rates.long_cache_write)
            + output_tokens * max(rates.output, rates.reasoning, rates.other_output)
            + rates.request
            for rates, end in zip(self.tiers, ends, strict=True)
            if rates.above_input_tokens < input_tokens
        )
        return -(-amount // self.denominator)


class PriceBook:
    """The models on offer and their prices."""

    def __init__(
        self,
        provider: str,
        models: Sequence[str],
        override_usd_per_mtok: tuple[Decimal, Decimal] | None = None,
    ) -> None:
        """Look up all prices of all `models` once.

        `override_usd_per_mtok` (input, output) holds for every model, instead of the table.

        Raises:
            ConfigurationError: a model has no price, or a price of 0, now or at any other time.
        """
        self.models = tuple(dict.fromkeys(models))
        self._prices = {model: _prices_of(provider, model, override_usd_per_mtok) for model in self.models}
        self.long_cache_models = tuple(
            model for model, prices in self._prices.items() if all(price.has_long_cache for _, price in prices)
        )
        """Those whose price record bounds, at any time, what is written to a cache that lasts an hour."""

    def offers(self, model: str) -> bool:
        """Whether a caller may name this model."""
        return model in self._prices

    def price(self, model: str, at_us: int) -> Price:
        """The record that holds at `at_us` (unix time): dates and hours of the day are UTC.

        Raises:
            KeyError: the model is not offered.
        """
        prices = self._prices[model]
        if len(prices) == 1:
            return prices[0][1]
        moment = _EPOCH + timedelta(microseconds=at_us)
        for constraint, price in reversed(prices):
            if constraint is None or constraint.active(moment):
                return price
        return prices[0][1]


def _prices_of(
    provider: str, model: str, override: tuple[Decimal, Decimal] | None
) -> tuple[tuple[_Constraint, Price], ...]:
    """Every record of a model with the time at which it holds; of several that hold, the last one counts."""
    try:
        if override is not None:
            return ((None, Price.flat(model, *override)),)
        info = get_snapshot().find_provider_model(model, None, provider, None)[1]
        problem = next((words for one in records_of(info) if (words := _unbounded(model, one.prices))), "")
        if not problem:
            return tuple((one.constraint, Price.of_record(model, one.prices)) for one in records_of(info))
    except ValueError:
        problem = "costs nothing" if override is not None else "has no price for text, or a price of 0"
    except LookupError:
        problem = "is not in the price table"
    raise ConfigurationError(
        f"LLM_MODEL, LLM_MODELS: {model!r} of LLM_PROVIDER {provider!r} {problem}; "
        f"name another one or set {_OVERRIDE_VARIABLES}, both above 0"
    )


def _unbounded(model: str, record: types.ModelPrice) -> str:
    """Why `record` does not bound what `model` costs; empty where it does."""
    name = model.lower()
    # A fee for each request is the price of its searches too.
    if _SEARCHES.search(name) and _amount(record, "requests_kcount") is None:
        return "searches by itself, and the price table does not bound what its searches cost"
    if _DRAWS.search(name) and all(_amount(record, kind) is None for kind in _OUTPUT_KINDS):
        return "may answer with images, and the price table does not say what they cost"
    return ""


def records_of(info: types.ModelInfo) -> Sequence[types.ConditionalPrice]:
    """All price records of a model of the table."""
    return [types.ConditionalPrice(prices=info.prices)] if isinstance(info.prices, types.ModelPrice) else info.prices


def _amount(record: types.ModelPrice, name: str) -> _Amount:
    """An amount that most records do not have."""
    amount: _Amount = getattr(record, name, None)
    return amount


def _amounts(record: types.ModelPrice) -> tuple[_Amount, ...]:
    """The amounts of tokens: input, cache read, cache write, output, reasoning, long cache write, kinds of output."""
    cache_write = record.input_mtok if record.cache_write_mtok is None else record.cache_write_mtok
    long_cache_write = _amount(record, _LONG_CACHE)
    return (
        record.input_mtok,
        record.input_mtok if record.cache_read_mtok is None else record.cache_read_mtok,
        cache_write,
        record.output_mtok,
        record.output_mtok if record.output_reasoning_mtok is None else record.output_reasoning_mtok,
        cache_write if long_cache_write is None else long_cache_write,
        *(_amount(record, kind) for kind in _OUTPUT_KINDS),
    )


def _exact_rates(record: types.ModelPrice, start: int) -> list[Fraction]:
    """Nano-dollars, in the order of `Rates`, for input longer than `start`."""
    amounts = [Fraction(_amount_above(amount, start)) * _NANOUSD_PER_TOKEN for amount in _amounts(record)]
    tokens, long_cache_write, others = amounts[:5], amounts[5], amounts[6:]
    request, search = (
        Fraction(_amount_above(_amount(record, name), start)) * _NANOUSD_PER_THOUSANDTH
        for name in ("requests_kcount", "web_searches_kcount")
    )
    return [*tokens, request, long_cache_write, max(tokens[3], *others), search]


def _amount_above(amount: _Amount, start: int) -> Decimal:
    if amount is None:
        return Decimal(0)
    if isinstance(amount, Decimal):
        return amount
    return next((tier.price for tier in reversed(amount.tiers) if tier.start <= start), amount.base)


def _tiers_of(amount: _Amount) -> Sequence[types.Tier]:
    return amount.tiers if isinstance(amount, types.TieredPrices) else ()
