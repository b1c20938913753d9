"""Every schedule of 2 or 3 callers' commands on a real Redis: how many there are, and which overspend.

All callers ask for the same cost at the same moment, on one identifier whose window has room for all but one. A
schedule (an "order" in what the command prints) *overspends* if the books hold more than the limit in the end.
Schedules that differ only by commands that commute are run once (`schedule_search.py`). These commute: commands on
different keys, two reads of one key, twice the same SET, DEL or EXPIRE, and two increments of one key where no decision
rests on their replies, which a strategy declares with an attribute ``increments_commute``.

With 2 callers nothing is left out. With 3 the search is bounded: only the identifier's window, its marker and the
records can refuse here. The other limits are out of reach: reads and increments of those totals are taken to commute.

The callers' clock stands still and each run begins with nothing booked, so a number always names the same schedule.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import count, groupby, islice
from typing import Any

from backends import open_backend
from backends.clock import US_PER_SECOND
from backends.contract import Ask, Backend, Reservation
from backends.errors import ConfigurationError
from backends.keys import rows_at
from backends.progress import Progress, no_progress
from backends.store.link import Link
from flaskapp.lab.race import (
    CLOCK,
    COST_NANOUSD,
    PENDING_SECONDS,
    TIMEOUT_SECONDS,
    WINDOW,
    refuse_used_database,
    window_alone,
)
from flaskapp.lab.schedule_search import Schedule, Touches, follow, multinomial, search, switches
from flaskapp.lab.stepped_callers import Caller, Gate, Turn

MOST_CALLERS = 3
MOST_ORDERS = 20_000
_VISITOR = "visitor"
# Late in every bucket: a server that is seconds slow must not make a TTL seem too short.
_NOW_US = int(datetime(2026, 3, 14, 10, 20, 19, tzinfo=UTC).timestamp()) * US_PER_SECOND


@dataclass(frozen=True, slots=True)
class Step:
    """One turn of one caller."""

    caller: str
    """A, B or C."""
    command: str
    """As it was sent; of a transaction, its commands."""
    keys: tuple[str, ...]
    told: str
    """The reply of Redis."""
    is_decisive: bool
    """Whether it touches what can refuse here: the window, its marker, a record."""


@dataclass(frozen=True, slots=True)
class Overspending:
    """An order that overspends."""

    number: int
    schedule: str
    """The one of its class with the fewest switches, as turns in a row: ``A×9 B×30 A×21``."""
    switches: int
    spent_nanousd: int


@dataclass(frozen=True, slots=True)
class Exploration:
    """What the exploration of one strategy found."""

    backend: str
    promises_atomicity: bool
    callers: int
    room: int
    limit_nanousd: int
    bound: str
    """What was explored."""
    is_exhaustive: bool
    raw_orders: int
    """Schedules of single commands, counted and not run. With 2 callers exact; with 3 for the commands of order 1."""
    reduced_orders: int
    """Schedules up to commuting commands; each was run."""
    overspending_orders: int
    """Of the reduced orders."""
    overspending_raw_orders: int | None
    """How many raw orders those stand for; None with 3 callers."""
    overspending: tuple[Overspending, ...]
    shortest: tuple[Step, ...] | None
    """The failing order with the fewest switches between callers (of those, the fewest steps), as it was run."""
    shortest_number: int | None
    seconds: float

    @property
    def is_as_declared(self) -> bool:
        """A strategy that promises atomicity has no schedule that overspends; one that does not has one."""
        return self.promises_atomicity == (self.overspending_orders == 0)


@dataclass(frozen=True, slots=True)
class Replay:
    """One schedule, run again."""

    backend: str
    number: int
    schedule: str
    steps: tuple[Step, ...]
    admitted: tuple[str, ...]
    spent_nanousd: int
    limit_nanousd: int

    @property
    def overspends(self) -> bool:
        """Whether the books hold more than the limit."""
        return self.spent_nanousd > self.limit_nanousd


def explore(
    url: str, name: str, callers: int = 2, *, most_orders: int = MOST_ORDERS, progress: Progress = no_progress
) -> Exploration:
    """Run every schedule of `callers` callers of the strategy registered as `name`, on the server at `url`.

    Raises:
        ConfigurationError: no ``redis://`` URL, a name that is not registered, a strategy that sends nothing to Redis,
            or a database that holds ``llm:`` keys.
        StoreError: Redis failed on the way.
    """
    began_seconds = CLOCK.monotonic_seconds()
    with _opened(url, name, callers) as setup:
        found: list[tuple[Schedule, int]] = []
        for schedule, run in islice(search(setup.begin), most_orders):
            found.append((schedule, run.spent_nanousd))
            progress(f"orders of {name}", len(found), None)
        seconds = CLOCK.monotonic_seconds() - began_seconds
        return _summed_up(setup, found, seconds, is_exhaustive=len(found) < most_orders)


def replay(url: str, name: str, number: int, callers: int = 2) -> Replay:
    """Run the schedule with that number again, with the fewest switches that its class allows.

    Raises:
        ConfigurationError: as `explore`, or there is no such schedule.
        StoreError: Redis failed on the way.
    """
    with _opened(url, name, callers) as setup:
        for at, (schedule, _) in enumerate(search(setup.begin), start=1):
            if at == number:
                return setup.replayed(schedule, number)
    raise ConfigurationError(f"{name} has no order {number} of {callers} callers")


class _StandingClock:
    def now_us(self) -> int:
        return _NOW_US

    def monotonic_seconds(self) -> float:
        return _NOW_US / US_PER_SECOND


@contextmanager
def _opened(url: str, name: str, callers: int) -> Iterator["_Setup"]:
    if not url.startswith("redis://"):
        raise ConfigurationError(
            "orders are explored on a redis:// URL: only there are commands let through one by one"
        )
    if not 2 <= callers <= MOST_CALLERS:  # noqa: PLR2004 (one alone has no race)
        raise ConfigurationError(f"2 to {MOST_CALLERS} callers can be explored")
    gate = Gate()
    gated = gate.connection_class()
    link = Link(url, clock=CLOCK, timeout_seconds=TIMEOUT_SECONDS, pool_size=callers + 1, connection_class=gated)
    with closing(link):
        refuse_used_database(link)
        backend = open_backend(name, link, _StandingClock(), decide_by_clock=True)
        yield _Setup(link, backend, gate, callers)


class _Setup:
    """A strategy on a server, where each run has an identifier of its own."""

    def __init__(self, link: Link, backend: Backend, gate: Gate, callers: int) -> None:
        self.link = link
        self.backend = backend
        self.gate = gate
        self.callers = callers
        self.limit_nanousd = (callers - 1) * COST_NANOUSD
        self.is_bounded = callers > 2  # noqa: PLR2004 (two are explored whole)
        self.increments_commute = bool(getattr(backend, "increments_commute", False))
        self._serial = count()
        self._warm_up()

    def begin(self) -> "_Run":
        return _Run(self, f"explored-{next(self._serial)}")

    def replayed(self, schedule: Schedule, number: int) -> Replay:
        run, callers = self.begin(), schedule.calmest()
        follow(run, callers)
        return Replay(
            self.backend.name,
            number,
            turns_text(callers),
            run.steps(callers),
            run.admitted(),
            run.spent_nanousd,
            self.limit_nanousd,
        )

    def ask(self, who: str, rid: str) -> Ask:
        return Ask(rid, COST_NANOUSD, window_alone(self.limit_nanousd, who, network=who), PENDING_SECONDS)

    def _warm_up(self) -> None:
        """Load the scripts into the server: that belongs to no schedule."""
        run = self.begin()
        if not run.pending():
            raise ConfigurationError(f"{self.backend.name} asks Redis nothing: there is no order to explore")
        while pending := run.pending():
            run.take(min(pending))


class _Run:
    """One run of all callers."""

    def __init__(self, setup: _Setup, who: str) -> None:
        self._setup = setup
        self._who = who
        asks = [setup.ask(who, f"{who}-{_letter(number)}") for number in range(setup.callers)]
        self._budgets = asks[0].budgets
        rows = rows_at(self._budgets, _NOW_US // US_PER_SECOND)
        never_refuse = {row.key for row in rows if row.budget.name != WINDOW} | {row.pending_key for row in rows}
        self._out_of_reach = set(map(self._plain, never_refuse))
        self._callers = [Caller(setup.gate, partial(setup.backend.reserve, ask)) for ask in asks]
        self.spent_nanousd = 0
        """What the identifier's window holds when all are done. Then its keys are deleted."""
        self._turns: list[Turn] = []
        self._pending: dict[int, Touches] = {}
        for number in range(setup.callers):
            self._wait_for(number)

    def pending(self) -> Mapping[int, Touches]:
        return self._pending

    def take(self, caller: int) -> Touches:
        turn = self._callers[caller].take_turn()
        self._turns.append(turn)
        # Of a transaction it is known only now whether it was done.
        touched = self._touches(turn) if turn.is_transaction else self._pending[caller]
        self._wait_for(caller)
        if not self._pending:
            self.spent_nanousd = self._setup.backend.books(self._budgets).spent(WINDOW)
            self._clear()
        return touched

    def abandon(self) -> None:
        for caller in self._callers:
            caller.stop()
        self._clear()

    def admitted(self) -> tuple[str, ...]:
        """The letters of the callers that were admitted."""
        answers = enumerate(caller.answer for caller in self._callers)
        return tuple(_letter(number) for number, answer in answers if isinstance(answer, Reservation))

    def steps(self, callers: Sequence[int]) -> tuple[Step, ...]:
        """What was done, when `callers` is whose turn it was each time."""
        return tuple(self._step(caller, turn) for caller, turn in zip(callers, self._turns, strict=True))

    def _wait_for(self, caller: int) -> None:
        # A new mapping each time: the search keeps the earlier ones.
        self._pending = {number: touches for number, touches in self._pending.items() if number != caller}
        turn = self._callers[caller].pending
        if turn is not None:
            self._pending[caller] = self._touches(turn)

    def _step(self, caller: int, turn: Turn) -> Step:
        keys = tuple(dict.fromkeys(_key_of(place) for place in self._all_touches(turn)))
        return Step(
            _letter(caller),
            self._plain(_command_text(turn)),
            keys,
            self._plain(_outcome_text(turn)),
            any(key not in self._out_of_reach for key in keys),
        )

    def _touches(self, turn: Turn) -> Touches:
        touched = self._all_touches(turn)
        if not self._setup.is_bounded:
            return touched
        return {place: how for place, how in touched.items() if _key_of(place) not in self._out_of_reach}

    def _all_touches(self, turn: Turn) -> Touches:
        touched = turn.touches(increments_commute=self._setup.increments_commute)
        return {self._plain(place): self._plain(how) for place, how in touched.items()}

    def _plain(self, text: str) -> str:
        """Without the identifier, which differs in each run."""
        return text.replace(self._who, _VISITOR)

    def _clear(self) -> None:
        """Delete every key that was touched: a strategy may have keys of its own, and another clock."""
        places = (place for turn in self._turns for place in turn.touches(increments_commute=True))
        keys = sorted({_key_of(place) for place in places if _key_of(place).startswith("llm:")})
        if keys:
            self._setup.link.run(lambda client: client.delete(*keys))


def _key_of(place: str) -> str:
    return place.partition(" ")[2]


def _letter(number: int) -> str:
    return "ABC"[number]


def turns_text(callers: Sequence[int]) -> str:
    """Turns in a row of each caller: ``A×9 B×30 A×21``."""
    return " ".join(f"{_letter(caller)}×{len(list(block))}" for caller, block in groupby(callers))


def _command_text(turn: Turn) -> str:
    return "; ".join(" ".join(_word(word) for word in _shown(command)) for command in turn.commands)


def _shown(command: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """A script by its digest and keys, without its many arguments."""
    if command[0].upper() == b"EVALSHA":
        return (command[0], command[1][:8] + "…".encode(), *command[2 : 3 + int(command[2])], "…".encode())
    return command


def _word(word: bytes) -> str:
    text = word.decode()
    return f'"{text}"' if " " in text else text


def _outcome_text(turn: Turn) -> str:
    if turn.is_overtaken:
        return "nothing was done: somebody has changed what was watched"
    return _reply_text(turn.replies[-1])


def _reply_text(reply: Any) -> str:
    if reply is None:
        return "nothing"
    if isinstance(reply, bytes):
        return _word(reply)
    if isinstance(reply, list | tuple):
        return "[" + ", ".join(map(_reply_text, reply)) + "]"
    return str(reply)


def _summed_up(setup: _Setup, found: list[tuple[Schedule, int]], seconds: float, *, is_exhaustive: bool) -> Exploration:
    over = [(number, each, spent) for number, (each, spent) in enumerate(found, start=1) if spent > setup.limit_nanousd]
    calmest = {number: each.calmest() for number, each, _ in over}
    shortest = min(calmest, key=lambda number: (switches(calmest[number]), len(calmest[number]), number), default=None)
    counts = [each.count() for each, _ in found] if not setup.is_bounded else []
    first = found[0][0].callers
    return Exploration(
        backend=setup.backend.name,
        promises_atomicity=setup.backend.promises_atomicity,
        callers=setup.callers,
        room=setup.callers - 1,
        limit_nanousd=setup.limit_nanousd,
        bound=_bound(setup, len(found), is_exhaustive=is_exhaustive),
        is_exhaustive=is_exhaustive,
        raw_orders=sum(counts) or multinomial([first.count(caller) for caller in range(setup.callers)]),
        reduced_orders=len(found),
        overspending_orders=len(over),
        overspending_raw_orders=sum(counts[number - 1] for number in calmest) if counts else None,
        overspending=tuple(
            Overspending(number, turns_text(calmest[number]), switches(calmest[number]), spent)
            for number, _, spent in over
        ),
        shortest=None if shortest is None else setup.replayed(found[shortest - 1][0], shortest).steps,
        shortest_number=shortest,
        seconds=seconds,
    )


def _bound(setup: _Setup, orders: int, *, is_exhaustive: bool) -> str:
    what = "all orders up to commuting commands"
    if setup.is_bounded:
        what += " on the window, its marker and the records; the other totals are taken to commute"
    return what if is_exhaustive else f"the first {orders} of {what}"
