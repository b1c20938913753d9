"""The figures that the page on abuse prints: they depend on no machine."""

import pytest

from benchmarks.shares import ANSWER_NANOUSD, attacks, course_of

ADDRESSES = attacks()


@pytest.mark.parametrize(
    ("attack", "share", "taken_usd", "closed_after_minutes"),
    [
        ("one /56", "0.25", 0.25, None),
        ("one /48", "1", 1, 12),
        ("one /48", "0.25", 0.25, None),
        ("1,000 addresses", "0.25", 1, 1),
    ],
)
def test_how_long_the_hour_lasts(attack, share, taken_usd, closed_after_minutes):
    course = course_of(attack, ADDRESSES[attack], share)
    limit = round(taken_usd * 1_000_000_000)
    assert limit - 10 * ANSWER_NANOUSD < course.taken_nanousd <= limit
    assert course.closed_after_minutes == closed_after_minutes
    assert len(course.left_nanousd) == 60


def test_the_attacks_are_as_large_as_they_say():
    assert {attack: len(addresses) for attack, addresses in ADDRESSES.items()} == {
        "one /56": 1,
        "one /48": 256,
        "1,000 addresses": 1_000,
    }
