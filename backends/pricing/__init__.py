"""Prices, and bounds of tokens: an optional part that nothing else of `backends` imports.

A name loads its own module only: prices need `genai-prices`, token and prompt bounds need `rs-bpe`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from backends.pricing.prices import Price, PriceBook
    from backends.pricing.prompt_bounds import ImagesNotBounded, image_tokens, prompt_tokens
    from backends.pricing.token_bounds import (
        InputTooLong,
        Message,
        TokenBound,
        bound_for,
        counter_for,
        shows_its_tokens,
    )

__all__ = [
    "ImagesNotBounded",
    "InputTooLong",
    "Message",
    "Price",
    "PriceBook",
    "TokenBound",
    "bound_for",
    "counter_for",
    "image_tokens",
    "prompt_tokens",
    "shows_its_tokens",
]
_OF_PRICES = {"Price", "PriceBook"}
_OF_PROMPT_BOUNDS = {"ImagesNotBounded", "image_tokens", "prompt_tokens"}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "prices" if name in _OF_PRICES else "prompt_bounds" if name in _OF_PROMPT_BOUNDS else "token_bounds"
    return getattr(import_module(f"{__name__}.{module}"), name)
