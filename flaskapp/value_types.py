"""The types of values that a setting can have: what is allowed, in words and in numbers, and how it is read.

`read` takes what strict JSON gives and coerces nothing; `read_text` takes a typed text (a variable, a form, a command
line). Both raise `ValueError` whose text is `allowed`; of a list it is `RowRefused` where one row cannot be used.
"""
# ruff: noqa: D102 (what a value type overrides is documented at `ValueType`)

import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from decimal import Decimal
from typing import Generic, Literal, NamedTuple, NoReturn, TypeVar

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from backends.errors import shown
from flaskapp import strict_json

T = TypeVar("T")

MAX_DURATION_SECONDS = 31 * 86_400
MAX_AMOUNT_USD = Decimal(1_000_000)
MAX_PLACES = 9
SMALLEST_AMOUNT_USD = Decimal("0.000000001")
SMALLEST_PART = Decimal("0.01")
PLACES_OF_A_PART = 6

_DECIMAL = re.compile(r"[0-9]{1,30}(?:\.[0-9]{1,30})?|\.[0-9]{1,30}")
_WHOLE = re.compile(r"[0-9]{1,18}")
_RATE = re.compile(
    r"[ ]*(?P<amount>[0-9]{1,9})[ ]*(?:/|per)[ ]*(?P<multiple>[0-9]{1,9})?[ ]*"
    r"(?P<period>second|minute|hour|day|month|year)s?[ ]*",
    re.IGNORECASE,
)
_RATE_SEPARATOR = re.compile(r"[,;|]")
_PERIOD_SECONDS = {
    "second": 1,
    "minute": 60,
    "hour": 3_600,
    "day": 86_400,
    "month": 31 * 86_400,
    "year": 366 * 86_400,
}
_MAX_RATES = 5
_MOST_REQUESTS = 999_999_999


class RowProblem(NamedTuple):
    """Why one row of a list cannot be used."""

    row: int
    """From 1 on."""
    field: str
    """Empty where it is the whole row."""
    allowed: str
    got: str

    @property
    def place(self) -> str:
        """Where it stands, to be put behind the name of the setting."""
        return f"[{self.row}].{self.field}" if self.field else f"[{self.row}]"

    @property
    def sentence(self) -> str:
        """All of it in one line."""
        where = f"row {self.row}, {self.field}" if self.field else f"row {self.row}"
        return f"{where}: {self.allowed}; got {self.got}"


class RowRefused(ValueError):
    """A list with a row that cannot be used; the text says which row, why, and what was got."""

    def __init__(self, problem: RowProblem) -> None:
        super().__init__(problem.sentence)
        self.problem = problem


def refusal_text(error: ValueError, got: str | None) -> str:
    """What a value type's error says, and what was got, where that is no secret and the error does not say it."""
    return str(error) if got is None or isinstance(error, RowRefused) else f"{error}; got {got}"


def shown_json(value: object) -> str:
    """A value of strict JSON as `shown` shows a text."""
    try:
        return shown(strict_json.dumps(value))
    except (TypeError, ValueError):
        return shown(value)


@dataclass(frozen=True)
class ValueType(Generic[T]):
    """The base of all types. As `Annotated` metadata of a pydantic field it validates with `read`."""

    description: str
    _: KW_ONLY
    unit: str = ""

    @property
    def allowed(self) -> str:
        """What is allowed, in words."""
        raise NotImplementedError

    @property
    def bounds(self) -> dict[str, object]:
        """What is allowed, for programs: some of `minimum`, `maximum`, `places`, `values`, `format`."""
        raise NotImplementedError

    def read(self, value: object) -> T:
        """The value of what strict JSON gave. Raises ValueError."""
        raise NotImplementedError

    def read_leniently(self, value: object) -> tuple[T, Sequence[RowProblem]]:
        """As `read`, but of a list the rows that can be used, and why the others cannot.

        Raises:
            ValueError: it is no list, or of another type, which can be used as a whole or not at all.
        """
        return self.read(value), ()

    def read_text(self, text: str) -> T:
        """The value of a typed text. Raises ValueError."""
        return self.read(text.strip())

    def text(self, value: T) -> str:
        """The value as it would be typed."""
        return str(value)

    def shown(self, text: str) -> str | None:
        """What an error may repeat of `text`; None where it is a secret."""
        return shown(text)

    def refuse(self) -> NoReturn:
        """Raise the ValueError whose text is `allowed`."""
        raise ValueError(self.allowed)

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.read, handler(source))


@dataclass(frozen=True)
class Switch(ValueType[bool]):
    """On or off."""

    @property
    def allowed(self) -> str:
        return "true or false"

    @property
    def bounds(self) -> dict[str, object]:
        return {"values": [True, False]}

    def read(self, value: object) -> bool:
        return value if isinstance(value, bool) else self.refuse()

    def read_text(self, text: str) -> bool:
        word = text.strip().lower()
        return word == "true" if word in {"true", "false"} else self.refuse()

    def text(self, value: bool) -> str:  # noqa: FBT001 (the value itself)
        return "true" if value else "false"


def decimal_in(value: object) -> Decimal | None:
    """The number that strict JSON gave as a number or as a decimal string; None for anything else."""
    if isinstance(value, Decimal):
        return value
    if isinstance(value, str):
        return Decimal(value) if _DECIMAL.fullmatch(value) else None
    return Decimal(value) if type(value) is int else None


@dataclass(frozen=True)
class Amount(ValueType[Decimal]):
    """Money in dollars: a JSON number or a decimal string."""

    _: KW_ONLY
    unit: str = "USD"
    zero_is_none: bool = False

    @property
    def minimum(self) -> Decimal:
        """The smallest amount."""
        return Decimal(0) if self.zero_is_none else SMALLEST_AMOUNT_USD

    @property
    def allowed(self) -> str:
        least = "0 (none)" if self.zero_is_none else format(SMALLEST_AMOUNT_USD, "f")
        return f"an amount in {self.unit} from {least} to {MAX_AMOUNT_USD} with at most nine places"

    @property
    def bounds(self) -> dict[str, object]:
        return {"minimum": self.minimum, "maximum": MAX_AMOUNT_USD, "places": MAX_PLACES}

    def read(self, value: object) -> Decimal:
        amount = decimal_in(value)
        exponent = None if amount is None else amount.as_tuple().exponent
        if amount is None or not isinstance(exponent, int) or exponent < -MAX_PLACES:
            self.refuse()
        return abs(amount) if self.minimum <= amount <= MAX_AMOUNT_USD else self.refuse()

    def text(self, value: Decimal) -> str:
        return format(value, "f")


@dataclass(frozen=True)
class Part(ValueType[Decimal]):
    """A part of a whole, up to all of it: a JSON number or a decimal string."""

    _: KW_ONLY
    minimum: Decimal = SMALLEST_PART

    @property
    def allowed(self) -> str:
        return f"a number from {self.minimum} to 1 with at most six places"

    @property
    def bounds(self) -> dict[str, object]:
        return {"minimum": self.minimum, "maximum": Decimal(1), "places": PLACES_OF_A_PART}

    def read(self, value: object) -> Decimal:
        part = decimal_in(value)
        exponent = None if part is None else part.as_tuple().exponent
        if part is None or not isinstance(exponent, int) or exponent < -PLACES_OF_A_PART:
            self.refuse()
        return part if self.minimum <= part <= 1 else self.refuse()

    def text(self, value: Decimal) -> str:
        return format(value, "f")


@dataclass(frozen=True)
class Whole(ValueType[int]):
    """A whole number between bounds, both included."""

    _: KW_ONLY
    maximum: int
    minimum: int = 1
    note: str = ""

    @property
    def allowed(self) -> str:
        of_what = f" of {self.unit}" if self.unit else ""
        return f"a whole number{of_what} from {self.minimum} to {self.maximum}{self.note}"

    @property
    def bounds(self) -> dict[str, object]:
        return {"minimum": self.minimum, "maximum": self.maximum}

    def read(self, value: object) -> int:
        # type() and not isinstance(): `true` is an int in Python, and no number.
        return value if type(value) is int and self.minimum <= value <= self.maximum else self.refuse()

    def read_text(self, text: str) -> int:
        digits = text.strip()
        return self.read(int(digits)) if _WHOLE.fullmatch(digits) else self.refuse()


@dataclass(frozen=True)
class Duration(Whole):
    """Whole seconds."""

    _: KW_ONLY
    unit: str = "seconds"
    maximum: int = MAX_DURATION_SECONDS


@dataclass(frozen=True)
class Choice(ValueType[str]):
    """One of a few words."""

    _: KW_ONLY
    values: tuple[str, ...]

    @property
    def allowed(self) -> str:
        return " or ".join(self.values)

    @property
    def bounds(self) -> dict[str, object]:
        return {"values": list(self.values)}

    def read(self, value: object) -> str:
        return value if isinstance(value, str) and value in self.values else self.refuse()


@dataclass(frozen=True)
class Rate(ValueType[str]):
    """Requests per time in flask-limiter's words; a part of its grammar that it is sure to understand."""

    _: KW_ONLY
    unit: Literal["requests"] = "requests"

    @property
    def allowed(self) -> str:
        return "a rate such as '60 per minute' or '5/second; 100/hour' (at most five, none longer than a year)"

    @property
    def bounds(self) -> dict[str, object]:
        return {"format": self.allowed}

    def read(self, value: object) -> str:
        if not isinstance(value, str):
            self.refuse()
        parts = _RATE_SEPARATOR.split(value)
        if len(parts) > _MAX_RATES or not all(map(_is_rate, parts)):
            self.refuse()
        return value.strip()


def _is_rate(part: str) -> bool:
    match = _RATE.fullmatch(part)
    if match is None:
        return False
    multiple = int(match["multiple"] or 1)
    period_seconds = multiple * _PERIOD_SECONDS[match["period"].lower()]
    return int(match["amount"]) > 0 and 0 < period_seconds <= _PERIOD_SECONDS["year"]


def times(rate: str, factor: int) -> str:
    """A rate of so many times the requests, at most as many as a rate may have."""
    return "; ".join(_times(part, factor) for part in _RATE_SEPARATOR.split(rate))


def _times(part: str, factor: int) -> str:
    match = _RATE.fullmatch(part)
    if match is None:
        raise ValueError(part)
    multiple = f"{match['multiple']} " if int(match["multiple"] or 1) > 1 else ""
    return f"{min(factor * int(match['amount']), _MOST_REQUESTS)} per {multiple}{match['period'].lower()}"
