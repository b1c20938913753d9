"""Money is integer nano-dollars; decimals appear only at the edges, floats never."""

from decimal import ROUND_CEILING, Decimal

NANOUSD_PER_USD = 1_000_000_000


def nanousd_from_usd(amount_usd: Decimal) -> int:
    """Exact nano-dollars of a decimal amount; what is finer than a nano-dollar is rounded up."""
    return int((amount_usd * NANOUSD_PER_USD).to_integral_value(rounding=ROUND_CEILING))


def usd_text(amount_nanousd: int) -> str:
    """Dollars with nine places, ``"0.000123000"``, without going through a float."""
    sign = "-" if amount_nanousd < 0 else ""
    whole, rest = divmod(abs(amount_nanousd), NANOUSD_PER_USD)
    return f"{sign}{whole}.{rest:09d}"
