"""Seeded lists of operations: everything that may happen, in an order that depends on the seed alone."""

# ruff: noqa: S101, PLR2004 (asserts are the point, the numbers are how often something happens)

import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace

from backends.budgets import EVERYBODY, Budget, Calendar, Forever, Period, Scope, Share, Sliding
from backends.conformance.cases import ROOMY, ZONE, Limits
from backends.conformance.harness import LayoutHarness, Stored
from backends.contract import Ask, Books, Duplicate, Idempotency, Refusal, Reservation, Settlement
from backends.errors import ReservationConflict
from backends.keys import (
    RESET_KEEP_SECONDS,
    RUNNING_PREFIX,
    known_key,
    marker_key,
    record_key,
    reset_key,
)

Answer = Reservation | Refusal | Duplicate | Settlement | Books | None


@dataclass(frozen=True, slots=True)
class Op:
    """One step of a list: the name of the operation, and its arguments."""

    name: str
    id: str = ""
    ask: Ask | None = None
    amount: int = 0
    at_least: int | None = None
    is_lost: bool = False
    """The reply of an extension is lost: its caller continues with what it knew before."""
    today: tuple[Budget, ...] = ()
    """The budgets that count by then."""


WEIGHTS = {
    "reserve": 40,
    "again": 4,
    "again with other budgets": 4,
    "another request": 2,
    "extend": 20,
    "settle": 20,
    "release": 6,
    "find": 2,
    "find key": 2,
    "lose": 1,
    "mark": 1,
    "reset": 1,
    "wait": 25,
}
"""How often each operation is chosen."""
WHO, NETWORKS = "abc", ("n1", "n2")
FURTHER: Mapping[str, tuple[Scope, tuple[Period, ...]]] = {
    "who_hour": (Scope.IDENTIFIER, (Calendar("hour", ZONE), Forever())),
    "who_long": (Scope.IDENTIFIER, (Sliding(90_000), Sliding(600))),
    "network_long": (Scope.NETWORK, (Sliding(3_600), Calendar("day", ZONE))),
    "around_day": (Scope.WIDE_NETWORK, (Calendar("day", ZONE), Calendar("day"))),
    "all_week": (Scope.GLOBAL, (Calendar("week", ZONE), Sliding(3_600))),
    "key_month": (Scope.KEY, (Calendar("month", ZONE), Calendar("hour"))),
    "key_long": (Scope.KEY, (Sliding(90_000), Calendar("week"))),
    "team_ever": (Scope.TEAM, (Forever(), Sliding(60))),
    "model_long": (Scope.MODEL, (Sliding(90_000), Calendar("month"))),
}
"""By name the scope and the periods: from ask to ask one has another period, limit and mode, or is not there at all."""
NETWORK_HOUR = Budget("network_hour", "n1", Calendar("hour"), None, Scope.NETWORK)
"""What a network has in an hour, where it has a share of everybody's."""


def some_operations(seed: int, length: int = 300) -> list[Op]:
    """A list of `length` operations, the same for the same seed."""
    chance = random.Random(seed)  # noqa: S311 (seeded on purpose)
    made: list[Ask] = []
    operations = []
    for number in range(length):
        name = chance.choices(tuple(WEIGHTS), tuple(WEIGHTS.values()))[0]
        if name == "wait":
            us = chance.choice((1, 500_000, 1_000_000, 7_000_000, 33_500_000, 61_000_000, 300_000_000, 4_000_000_000))
            operations.append(Op(name, amount=chance.choice((us, us, 50_000_000_000)) if chance.random() < 0.1 else us))
        elif name in {"mark", "reset"}:
            operations.append(Op(name, chance.choice("abc")))
        elif name == "reserve" or not made:
            made.append(_some_ask(chance, f"r{seed}-{number}"))
            operations.append(Op("reserve", made[-1].reservation_id, made[-1]))
        else:
            old = chance.choice(made[-12:])
            actual = chance.choice((0, 1, old.cost_nanousd // 2, old.cost_nanousd, old.cost_nanousd + 3))
            at_least = chance.choice((None, None, old.cost_nanousd, old.cost_nanousd + 1))
            today = old.budgets if chance.random() < 0.5 else _changed(chance, old.budgets)
            operations.append(Op(name, old.reservation_id, old, actual, at_least, chance.random() < 0.3, today))
    return operations


def _changed(chance: random.Random, budgets: tuple[Budget, ...]) -> tuple[Budget, ...]:
    """Of the same owners other further budgets, or the same with other periods, limits and modes."""
    owners = {budget.scope: budget.owner for budget in budgets}
    return tuple(budget for budget in budgets if budget.name not in FURTHER) + _some_further(chance, owners)


def _some_further(chance: random.Random, owners: dict[Scope, str]) -> tuple[Budget, ...]:
    all_owners = {scope: chance.choice(("o1", "o2")) for scope in Scope} | {Scope.GLOBAL: EVERYBODY} | owners
    budgets = []
    for name in chance.sample(tuple(FURTHER), chance.choice((0, 0, 1, 2, 3, 4))):
        scope, periods = FURTHER[name]
        budgets.append(
            Budget(
                name=name,
                owner=all_owners[scope],
                period=chance.choice(periods),
                limit_nanousd=chance.choice((None, 1_500, 3_500, 9_000)),
                scope=scope,
                is_shadow=chance.random() < 0.3,
                throttle_seconds=chance.choice((0, 7)) if scope is Scope.IDENTIFIER else 0,
            )
        )
    return tuple(budgets)


def _some_ask(chance: random.Random, reservation_id: str) -> Ask:
    limits = Limits(
        window_nanousd=chance.choice((900, 2_000)),
        day_nanousd=chance.choice((3_000, 5_000)),
        network_window_nanousd=chance.choice((None, 1_200, 2_500)),
        network_day_nanousd=chance.choice((None, 6_000)),
        global_hour_nanousd=chance.choice((2_600, 4_000)),
        global_day_nanousd=chance.choice((7_000, 12_000)),
        window_seconds=chance.choice((600, 600, 600, 60, 61)),
        throttle_seconds=chance.choice((5, 30)),
        mark_when_busy=chance.random() < 0.5,
    )
    who, network = chance.choice(WHO), chance.choice(NETWORKS)
    owners = {Scope.IDENTIFIER: who, Scope.NETWORK: network, Scope.GLOBAL: EVERYBODY}
    six, further = _shared(chance, limits.budgets(who, network)), _some_further(chance, owners)
    if further and chance.random() < 0.2:
        six = ()
    cost = chance.choice((1, 50, 333, 700, 2_500))
    at_least = chance.choice((None, None, None, 1, 50)) if cost > 50 else None
    key = Idempotency(chance.choice("abcd") * 32, chance.choice("01") * 16) if chance.random() < 0.3 else None
    pending_seconds = chance.choice((120, 30))
    return Ask(
        reservation_id, cost, (*six, *further), pending_seconds, key, at_least, mark_when_busy=limits.mark_when_busy
    )


def _shared(chance: random.Random, six: tuple[Budget, ...]) -> tuple[Budget, ...]:
    """Perhaps with a share of everybody's hour and day for the network."""
    millionths = chance.choice((None, None, 333_333, 700_000))
    if millionths is None:
        return six
    owner = next(budget.owner for budget in six if budget.scope is Scope.NETWORK)
    of_day, of_hour = Share("global_day", millionths), Share("global_hour", millionths)
    hour = NETWORK_HOUR._replace(owner=owner, share=of_hour, is_shadow=chance.random() < 0.2)
    return (*(each._replace(share=of_day) if each.name == "network_day" else each for each in six), hour)


_READ_OF = {Scope.IDENTIFIER: "a", Scope.NETWORK: "n1", Scope.GLOBAL: EVERYBODY}
READ = (
    *ROOMY.budgets("a", "n1"),
    NETWORK_HOUR,
    *(
        Budget(name, _READ_OF.get(scope, "o1"), period, None, scope)
        for name, (scope, periods) in FURTHER.items()
        for period in periods
    ),
)
"""The books that are looked at."""


def played(harness: LayoutHarness, operations: list[Op]) -> Iterator[tuple[object, object, Stored]]:
    """Do the operations in turn; yields the answer, the books and all that is stored after each.

    What windows came to is left out, since not every strategy keeps it; where it is kept, it agrees with the books.
    """
    reservations: dict[str, Reservation] = {}
    for op in operations:
        answer = _do(harness, op, reservations)
        if op.ask is not None:
            _assert_spent_is_what_is_booked(harness, op.ask)
        yield answer, _whole(harness.backend.books(READ)), without_running(harness.stored())


def without_running(stored: Stored) -> Stored:
    """All but what windows came to."""
    return {key: kept for key, kept in stored.items() if not key.startswith(RUNNING_PREFIX)}


def _assert_spent_is_what_is_booked(harness: LayoutHarness, ask: Ask) -> None:
    """What a reservation that is asked for again says of budgets is what the books hold, however it was found."""
    if harness.backend.find(ask) is None:
        return
    again = harness.backend.reserve(ask)
    assert isinstance(again, Reservation)
    booked = harness.backend.books(again.budgets)
    assert again.spent_nanousd == tuple(use.spent_nanousd for use in booked.uses), ask


def _whole(answer: Answer) -> dict[str, object] | None:
    """Every field but the backend's name, those too that `==` leaves out."""
    return None if answer is None else {**asdict(answer), "backend": ""}


def _do(harness: LayoutHarness, op: Op, reservations: dict[str, Reservation]) -> object:
    try:
        return _whole(_answer(harness, op, reservations))
    except ReservationConflict as error:
        return str(error)


def _answer(harness: LayoutHarness, op: Op, reservations: dict[str, Reservation]) -> Answer:
    if op.name == "wait":
        harness.pass_time(op.amount)
    if op.name == "mark":
        harness.put(marker_key(op.id), "by hand", 20)
    if op.name == "reset":
        clear_books(harness, op.id)
    if op.ask is None:
        return None
    if op.name in {"reserve", "again", "again with other budgets", "another request", "find", "find key"}:
        return _ask(harness, op, op.ask, reservations)
    reservation = reservations.get(op.id)
    return None if reservation is None else _continue(harness, op, reservation, reservations)


def _ask(harness: LayoutHarness, op: Op, ask: Ask, reservations: dict[str, Reservation]) -> Answer:
    if op.name == "find":
        return harness.backend.find(ask)
    if op.name == "find key":
        return None if ask.idempotency is None else harness.backend.find_duplicate(ask.idempotency)
    if op.name == "another request":
        return harness.backend.reserve(replace(ask, cost_nanousd=ask.cost_nanousd + 1))
    verdict = harness.backend.reserve(
        replace(ask, budgets=op.today or ask.budgets) if op.name == "again with other budgets" else ask
    )
    if isinstance(verdict, Reservation):
        reservations.setdefault(op.id, verdict)
    return verdict


def _continue(harness: LayoutHarness, op: Op, reservation: Reservation, reservations: dict[str, Reservation]) -> Answer:
    if op.name == "extend":
        to_nanousd = reservation.cost_nanousd + op.amount
        verdict = harness.backend.extend(reservation, to_nanousd, op.today, at_least_nanousd=op.at_least)
        if isinstance(verdict, Reservation) and not op.is_lost:
            reservations[op.id] = verdict
        return verdict
    if op.name == "settle":
        return harness.backend.settle(reservation, op.amount)
    if op.name == "release":
        return harness.backend.release(reservation)
    if record_key(op.id) in harness.stored():
        harness.lose(record_key(op.id))
    return None


def clear_books(harness: LayoutHarness, identifier: str) -> None:
    """As `flask ledger reset` does: the keys of an identifier's budgets go, and the time is stored."""
    for key in harness.stored():
        known = known_key(key)
        assert known is not None
        is_mine = known.scope is Scope.IDENTIFIER or known.budget.startswith("who_")
        if known.owner == identifier and (is_mine or known.kind == "marker"):
            harness.lose(key)
    harness.put(reset_key(identifier), str(harness.clock.us), RESET_KEEP_SECONDS)
