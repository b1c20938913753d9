"""Further budgets and overrides as the operator writes them, and the budgets that one request is charged to.

`BudgetRows` and `OverrideRows` read the two lists; `BudgetPlan` makes `backends.budgets.Budget` of them and of those
that are always there: the library's six, the two of `WIDE_BUDGETS`, and with shares the two of `SHARED_HOURS`.
"""
# ruff: noqa: D102 (what a value type overrides is documented at `ValueType`)

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from operator import itemgetter
from types import MappingProxyType
from typing import ClassVar, NamedTuple, NoReturn, TypeVar

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from backends.budgets import (
    BUILT_IN,
    EVERYBODY,
    LONGEST_WINDOW_SECONDS,
    MOST_BUDGETS,
    SHORTEST_WINDOW_SECONDS,
    Budget,
    Calendar,
    Forever,
    Period,
    Scope,
    Sliding,
)
from backends.errors import shown
from backends.money import NANOUSD_PER_USD, nanousd_from_usd
from flaskapp import strict_json
from flaskapp.http.networks import IPV6_PREFIX, network_of, wide_network_of
from flaskapp.strict_json import StrictJsonError
from flaskapp.value_types import (
    MAX_AMOUNT_USD,
    Amount,
    Choice,
    Duration,
    RowProblem,
    RowRefused,
    ValueType,
    shown_json,
)

EACH_OWNER = "*"
"""In place of an owner: each owner of the scope has a budget of its own."""
MOST_OVERRIDES = 1_000
WIDE_BUDGETS: Mapping[str, str] = MappingProxyType({"wide_window": "network_window", "wide_day": "network_day"})
"""What one wide network may spend, by name: so many times as much as a network may in the period of another budget."""
WIDE_TIMES = 5
SHARED_HOURS: Mapping[str, Scope] = MappingProxyType(
    {"network_share_hour": Scope.NETWORK, "wide_share_hour": Scope.WIDE_NETWORK}
)
"""What a network has in a UTC hour, by name: booked while networks have shares, and without a limit of its own."""
SCOPES: Mapping[str, Scope] = MappingProxyType(
    {
        **{name: row.scope for name, row in BUILT_IN.items()},
        **dict.fromkeys(WIDE_BUDGETS, Scope.WIDE_NETWORK),
        **SHARED_HOURS,
    }
)
"""Of the budgets that are always there, by name, in the order in which refusals name them."""
MOST_FURTHER_BUDGETS = MOST_BUDGETS - len(SCOPES)
"""That may apply to one request."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_NAME = re.compile(r"[a-z0-9_]{1,32}")
_OWNER = re.compile(r"[!-~]{1,256}")
_MOMENT = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:\.(\d{1,6})\d*)?(?:[Zz]|([+-](?:[01]\d|2[0-3]):[0-5]\d))", re.ASCII
)
_GLOBAL = Scope.GLOBAL
OWN_SCOPES = (Scope.IDENTIFIER, Scope.KEY)
_ENFORCE, _SHADOW = "enforce", "shadow"


# The rows.


@dataclass(frozen=True, slots=True)
class FurtherBudget:
    """One row of the setting `budgets`."""

    name: str
    scope: Scope
    owner: str
    """`EACH_OWNER`, or the one owner that is limited, as keys spell it."""
    period: Period
    limit_nanousd: int
    is_shadow: bool = False
    throttle_seconds: int = 0
    """TTL of the throttle marker that a refusal sets; a shadow budget sets none all the same."""

    @property
    def budget(self) -> Budget:
        """The same as the library has it, with its owner as it stands here."""
        throttle_seconds = 0 if self.is_shadow else self.throttle_seconds
        return Budget(
            self.name, self.owner, self.period, self.limit_nanousd, self.scope, self.is_shadow, throttle_seconds
        )

    def as_json(self) -> dict[str, object]:
        """The row as it would be written; what is the default is left out."""
        row: dict[str, object] = {"name": self.name, "scope": self.scope.value}
        if self.owner != EACH_OWNER:
            row["owner"] = self.owner
        row |= {"period": _period_json(self.period), "limit_usd": _usd(self.limit_nanousd)}
        if self.is_shadow:
            row["mode"] = _SHADOW
        if self.throttle_seconds:
            row["throttle_seconds"] = self.throttle_seconds
        return row


@dataclass(frozen=True, slots=True)
class Override:
    """One row of the setting `budget_overrides`: another limit for one owner.

    Where no budget has its name it has no effect: the two settings change one after the other.
    """

    budget: str
    owner: str
    limit_nanousd: int
    """0 blocks the owner."""
    until_us: int | None = None
    """Unix time at which it ends; None: never."""

    def as_json(self) -> dict[str, object]:
        """The row as it would be written, with its end in UTC."""
        row: dict[str, object] = {"budget": self.budget, "owner": self.owner, "limit_usd": _usd(self.limit_nanousd)}
        if self.until_us is not None:
            end = _EPOCH + self.until_us * _MICROSECOND
            row["until"] = end.isoformat().replace("+00:00", "Z")
        return row


def _period_json(period: Period) -> object:
    return {"sliding_seconds": period.seconds} if isinstance(period, Sliding) else period.word


def _usd(amount_nanousd: int) -> Decimal:
    return (Decimal(amount_nanousd) / NANOUSD_PER_USD).normalize()


# Their fields.


@dataclass(frozen=True)
class _Name(ValueType[str]):
    _: KW_ONLY
    reserved: tuple[str, ...] = ()

    @property
    def allowed(self) -> str:
        return "1 to 32 of a-z 0-9 _" + (f", and none of {', '.join(self.reserved)}" if self.reserved else "")

    def read(self, value: object) -> str:
        is_name = isinstance(value, str) and _NAME.fullmatch(value) and value not in self.reserved
        return str(value) if is_name else self.refuse()


@dataclass(frozen=True)
class _Owner(ValueType[str]):
    """An owner of a scope; of any where the scope is not known."""

    _: KW_ONLY
    scope: Scope | None
    ipv6_prefix: int
    each: bool = False
    """Whether `EACH_OWNER` may stand in its place."""

    @property
    def allowed(self) -> str:
        match self.scope:
            case Scope.GLOBAL:
                owner = EVERYBODY
            case Scope.NETWORK:
                example = network_of("2001:db8:1:202::", self.ipv6_prefix)
                owner = f"a network as keys spell it, such as 198.51.100.7 or {example}"
            case Scope.WIDE_NETWORK:
                owner = "a wide network as keys spell it, such as 198.51.100.0/24 or 2001:db8:1::/48"
            case _:
                owner = "1 to 256 visible ASCII characters"
        return f"{EACH_OWNER} or {owner}" if self.each else f"one owner: {owner}"

    def read(self, value: object) -> str:
        if not isinstance(value, str) or not _OWNER.fullmatch(value):
            self.refuse()
        if value == EACH_OWNER:
            return value if self.each else self.refuse()
        return value if self._spelt_as_in_keys(value) == value else self.refuse()

    def _spelt_as_in_keys(self, owner: str) -> str:
        match self.scope:
            case Scope.GLOBAL:
                return EVERYBODY
            case Scope.NETWORK:
                return network_of(owner.partition("/")[0], self.ipv6_prefix)
            case Scope.WIDE_NETWORK:
                return wide_network_of(owner)
            case _:
                return owner


@dataclass(frozen=True)
class _Period(ValueType[Period]):
    _: KW_ONLY
    shortest_seconds: int
    zone: str

    @property
    def allowed(self) -> str:
        window = f'{{"sliding_seconds": {self.shortest_seconds} to {LONGEST_WINDOW_SECONDS}}}'
        return f'{window}, "hour", "day", "week", "month" or "forever"'

    def read(self, value: object) -> Period:
        period: Period | None = None
        match value:
            case "hour" | "day" | "week" | "month":
                period = Calendar(value, self.zone)
            case "forever":
                period = Forever()
            case {"sliding_seconds": length, **others} if not others and self._is_length(length):
                period = Sliding(length)
        # Not `or`: a tuple without elements, as `Forever` is, counts as false.
        return self.refuse() if period is None else period

    def _is_length(self, length: object) -> bool:
        # type() and not isinstance(): `true` is an int in Python, and no number.
        return type(length) is int and self.shortest_seconds <= length <= LONGEST_WINDOW_SECONDS


@dataclass(frozen=True)
class _LimitOrBlock(Amount):
    """A limit; 0 blocks."""

    _: KW_ONLY
    zero_is_none: bool = True

    @property
    def allowed(self) -> str:
        return f"an amount in {self.unit} from 0 (blocked) to {MAX_AMOUNT_USD} with at most nine places"


@dataclass(frozen=True)
class _Moment(ValueType[int]):
    """A moment of RFC 3339 with its offset, as microseconds of unix time."""

    @property
    def allowed(self) -> str:
        return "a date and time of RFC 3339 with an offset, such as 2026-12-31T18:00:00+01:00"

    def read(self, value: object) -> int:
        match = _MOMENT.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            self.refuse()
        date, time, fraction, offset = match.groups()
        try:
            moment = datetime.fromisoformat(f"{date}T{time}.{fraction or '0':0<6}{offset or '+00:00'}").astimezone(UTC)
        except (ValueError, OverflowError):
            self.refuse()
        return (moment - _EPOCH) // _MICROSECOND


_LIMIT = Amount("")
_LIMIT_OR_BLOCK = _LimitOrBlock("")
_SCOPE = Choice("", values=tuple(scope.value for scope in Scope))
_MODE = Choice("", values=(_ENFORCE, _SHADOW))
_MARKER_TTL = Duration("", minimum=0)
_WITH_LIMIT = _Name("", reserved=tuple(SHARED_HOURS))
"""Of what an override may name: those hours are booked only while networks have shares, and have no limit."""
_NEW_NAME = _Name("", reserved=tuple(SCOPES))
_UNTIL = _Moment("")

T = TypeVar("T")
D = TypeVar("D")
R = TypeVar("R", FurtherBudget, Override)


class _Fields:
    """The fields of one row; what cannot be used is a `RowRefused` that names row and field."""

    def __init__(self, number: int, row: object, known: Sequence[str]) -> None:
        self.number = number
        if not isinstance(row, dict):
            self.refuse("", f"an object with {', '.join(known)}", shown_json(row))
        self._row = row
        for name in row:
            if name not in known:
                self.refuse(shown(name), f"no such field; a row has {', '.join(known)}", shown_json(row[name]))

    def read(self, name: str, value_type: ValueType[T]) -> T:
        """A field that has to be there."""
        if name not in self._row:
            self.refuse(name, value_type.allowed, "nothing")
        try:
            return value_type.read(self._row[name])
        except ValueError as error:
            self.refuse(name, str(error), shown_json(self._row[name]))

    def read_or(self, name: str, value_type: ValueType[T], default: D) -> T | D:
        """A field that may be left out."""
        return self.read(name, value_type) if name in self._row else default

    def refuse(self, name: str, allowed: str, got: str) -> NoReturn:
        """Refuse the row."""
        raise RowRefused(RowProblem(self.number, name, allowed, got))


# The lists.


@dataclass(frozen=True)
class _Rows(ValueType[tuple[R, ...]]):
    """A JSON list of rows."""

    row_type: ClassVar[type]
    field_names: ClassVar[tuple[str, ...]]

    @property
    def bounds(self) -> dict[str, object]:
        return {"format": self.allowed}

    def read(self, value: object) -> tuple[R, ...]:
        rows, problems = self.read_leniently(value)
        if problems:
            raise RowRefused(problems[0])
        return rows

    def read_leniently(self, value: object) -> tuple[tuple[R, ...], Sequence[RowProblem]]:
        if isinstance(value, tuple) and all(isinstance(row, self.row_type) for row in value):
            return value, ()
        if not isinstance(value, list):
            self.refuse()
        read = self._make_reader()
        rows, problems = [], []
        for number, row in enumerate(value, 1):
            try:
                rows.append(read(_Fields(number, row, self.field_names)))
            except RowRefused as error:
                problems.append(error.problem)
        return tuple(rows), problems

    def read_text(self, text: str) -> tuple[R, ...]:
        try:
            value = strict_json.loads(text)
        except StrictJsonError as error:
            raise ValueError(f"{self.allowed} ({error})") from None
        return self.read(value)

    def text(self, value: tuple[R, ...]) -> str:
        return strict_json.dumps(value)

    def _make_reader(self) -> Callable[[_Fields], R]:
        """What reads the rows of one list, one after the other."""
        raise NotImplementedError

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.read)


@dataclass(frozen=True)
class BudgetRows(_Rows[FurtherBudget]):
    """Further budgets: the rows of the setting `budgets`."""

    _: KW_ONLY
    shortest_seconds: int = SHORTEST_WINDOW_SECONDS
    """Of a sliding window."""
    zone: str = "UTC"
    """Of calendar periods: an IANA name."""
    ipv6_prefix: int = IPV6_PREFIX
    """Of networks."""
    row_type: ClassVar[type] = FurtherBudget
    field_names: ClassVar[tuple[str, ...]] = (
        "name",
        "scope",
        "owner",
        "period",
        "limit_usd",
        "mode",
        "throttle_seconds",
    )

    @property
    def allowed(self) -> str:
        return "a JSON list of budgets: name, scope, period, limit_usd, and perhaps owner, mode, throttle_seconds"

    def _make_reader(self) -> Callable[[_Fields], FurtherBudget]:
        period = _Period("", shortest_seconds=self.shortest_seconds, zone=self.zone)
        return _BudgetReader(period, self.ipv6_prefix).read


class _BudgetReader:
    """Reads further budgets; of two with one name, and of too many that may apply to one request, the later is refused.

    What may apply to one request is taken as large as it can be: of each scope all budgets that each owner has, and
    those of the one owner that has most of its own.
    """

    def __init__(self, period: _Period, ipv6_prefix: int) -> None:
        self._period = period
        self._ipv6_prefix = ipv6_prefix
        self._names: set[str] = set()
        self._of_owner: Counter[tuple[Scope, str]] = Counter()
        self._most_of_an_owner: Counter[Scope] = Counter()
        self._apply_to_one_request = 0

    def read(self, fields: _Fields) -> FurtherBudget:
        """One row; raises `RowRefused`."""
        scope = Scope(fields.read("scope", _SCOPE))
        budget = FurtherBudget(
            name=fields.read("name", _NEW_NAME),
            scope=scope,
            owner=fields.read_or(
                "owner", _Owner("", scope=scope, ipv6_prefix=self._ipv6_prefix, each=True), EACH_OWNER
            ),
            period=fields.read("period", self._period),
            limit_nanousd=nanousd_from_usd(fields.read("limit_usd", _LIMIT)),
            is_shadow=fields.read_or("mode", _MODE, _ENFORCE) == _SHADOW,
            throttle_seconds=fields.read_or("throttle_seconds", _MARKER_TTL, 0),
        )
        if budget.throttle_seconds and scope is not Scope.IDENTIFIER:
            allowed = "0, since only budgets of the scope identifier set a throttle marker"
            fields.refuse("throttle_seconds", allowed, str(budget.throttle_seconds))
        if budget.name in self._names:
            fields.refuse("name", "a name that no row before it has", shown_json(budget.name))
        self._count(budget, fields)
        self._names.add(budget.name)
        return budget

    def _count(self, budget: FurtherBudget, fields: _Fields) -> None:
        scope, owner = budget.scope, (budget.scope, budget.owner)
        adds = budget.owner == EACH_OWNER or self._of_owner[owner] == self._most_of_an_owner[scope]
        if self._apply_to_one_request + adds > MOST_FURTHER_BUDGETS:
            allowed = f"at most {MOST_FURTHER_BUDGETS} further budgets that may apply to one request"
            fields.refuse("", allowed, "one more")
        self._apply_to_one_request += adds
        if budget.owner != EACH_OWNER:
            self._of_owner[owner] += 1
            self._most_of_an_owner[scope] = max(self._most_of_an_owner[scope], self._of_owner[owner])


@dataclass(frozen=True)
class OverrideRows(_Rows[Override]):
    """Other limits for single owners: the rows of the setting `budget_overrides`."""

    _: KW_ONLY
    ipv6_prefix: int = IPV6_PREFIX
    """Of networks."""
    row_type: ClassVar[type] = Override
    field_names: ClassVar[tuple[str, ...]] = ("budget", "owner", "limit_usd", "until")

    @property
    def allowed(self) -> str:
        return f"a JSON list of at most {MOST_OVERRIDES} overrides: budget, owner, limit_usd, and perhaps until"

    @property
    def bounds(self) -> dict[str, object]:
        return {"maximum": MOST_OVERRIDES, "format": self.allowed}

    def _make_reader(self) -> Callable[[_Fields], Override]:
        return partial(_read_override, self.ipv6_prefix)


def _read_override(ipv6_prefix: int, fields: _Fields) -> Override:
    if fields.number > MOST_OVERRIDES:
        fields.refuse("", f"at most {MOST_OVERRIDES} overrides", "one more")
    name = fields.read("budget", _WITH_LIMIT)
    return Override(
        budget=name,
        owner=fields.read("owner", _Owner("", scope=SCOPES.get(name), ipv6_prefix=ipv6_prefix)),
        limit_nanousd=nanousd_from_usd(fields.read("limit_usd", _LIMIT_OR_BLOCK)),
        until_us=fields.read_or("until", _UNTIL, None),
    )


# What a request is charged to.


class _OtherLimit(NamedTuple):
    limit_nanousd: int
    until_us: int | None


class _Row(NamedTuple):
    place: int
    """In the order of the budgets."""
    budget: Budget
    """Its owner is `EACH_OWNER` or the only one."""
    other_limits: Mapping[str, Sequence[_OtherLimit]]
    """By owner; the first that has not ended counts."""


class BudgetPlan:
    """The budgets of one set of live settings, and which of them a request is charged to.

    Args:
        built_in: the budgets that are always there, with the owner `EACH_OWNER`.
        further: they come after those.
        overrides: of two for one budget and owner the later one counts.
    """

    def __init__(
        self, built_in: Iterable[Budget], further: Iterable[FurtherBudget] = (), overrides: Sequence[Override] = ()
    ) -> None:
        other_limits: dict[str, dict[str, list[_OtherLimit]]] = {}
        for override in reversed(overrides):
            limits = other_limits.setdefault(override.budget, {}).setdefault(override.owner, [])
            limits.append(_OtherLimit(override.limit_nanousd, override.until_us))
        budgets = [*built_in, *(row.budget for row in further)]
        rows = [_Row(place, budget, other_limits.get(budget.name, {})) for place, budget in enumerate(budgets)]
        self._of_each = tuple(row for row in rows if row.budget.owner == EACH_OWNER or row.budget.scope is _GLOBAL)
        self._of_one: dict[tuple[Scope, str], list[_Row]] = {}
        for row in rows:
            if row.budget.owner != EACH_OWNER and row.budget.scope is not _GLOBAL:
                self._of_one.setdefault((row.budget.scope, row.budget.owner), []).append(row)

    def of(self, owners: Mapping[Scope, str], now_us: int) -> tuple[Budget, ...]:
        """What a request is charged to, in the order in which refusals name it.

        Args:
            owners: of the request, by scope; where a scope has none, its budgets do not apply. That of `Scope.GLOBAL`
                need not be among them.
            now_us: overrides hold or have ended then.
        """
        rows: Iterable[_Row] = self._of_each
        if self._of_one:
            rows = self._with_those_of_one(owners)
        budgets = []
        # Each answer passes here: a budget is a tuple, and made as one.
        for _, (name, _, period, limit_nanousd, scope, is_shadow, throttle_seconds, share), other_limits in rows:
            owner = EVERYBODY if scope is _GLOBAL else owners.get(scope)
            if owner is None:
                continue
            if other_limits and owner in other_limits:
                limit_nanousd = _limit_now(other_limits[owner], limit_nanousd, now_us)  # noqa: PLW2901
            budgets.append(Budget(name, owner, period, limit_nanousd, scope, is_shadow, throttle_seconds, share))
        return tuple(budgets)

    def _with_those_of_one(self, owners: Mapping[Scope, str]) -> Iterable[_Row]:
        found = [row for owner in owners.items() for row in self._of_one.get(owner, ())]
        return sorted([*self._of_each, *found], key=itemgetter(0)) if found else self._of_each


def own(budgets: Iterable[Budget]) -> tuple[Budget, ...]:
    """Those that a caller may see: the enforced ones of its identifier and of its key."""
    return tuple([budget for budget in budgets if budget.scope in OWN_SCOPES and not budget.is_shadow])


def _limit_now(limits: Sequence[_OtherLimit], otherwise_nanousd: int | None, now_us: int) -> int | None:
    for limit_nanousd, until_us in limits:
        if until_us is None or now_us < until_us:
            return limit_nanousd
    return otherwise_nanousd
