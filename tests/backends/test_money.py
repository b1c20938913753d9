from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.money import nanousd_from_usd, usd_text


@pytest.mark.parametrize(
    ("usd", "nanousd"),
    [
        ("0.02", 20_000_000),
        ("0.000000001", 1),
        ("0.0000000001", 1),
        ("0.0000000010000001", 2),
        ("1000000", 10**15),
        ("0", 0),
        ("0.1", 100_000_000),
        ("0.300000000", 300_000_000),
    ],
)
def test_what_is_finer_than_a_nano_dollar_is_rounded_up(usd, nanousd):
    assert nanousd_from_usd(Decimal(usd)) == nanousd


@pytest.mark.parametrize(
    ("nanousd", "text"),
    [
        (0, "0.000000000"),
        (123_000, "0.000123000"),
        (10**15, "1000000.000000000"),
        (-1, "-0.000000001"),
        (1, "0.000000001"),
    ],
)
def test_dollars_have_nine_places(nanousd, text):
    assert usd_text(nanousd) == text


@given(st.integers(-(10**18), 10**18))
def test_there_and_back_not_a_nano_dollar_is_lost(nanousd):
    assert nanousd_from_usd(Decimal(usd_text(nanousd))) == nanousd
