"""Seeded lists of operations: everything that may happen, in an order that depends on the seed alone."""

# ruff: noqa: PLR2004 (the numbers are how often something happens)

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from backends.conformance.cases import ROOMY, WINDOW_SECONDS
from backends.conformance.harness import LayoutHarness, Stored
from backends.contract import Ask, Books, Duplicate, Idempotency, Limits, Refusal, Reservation, Settlement
from backends.errors import ReservationConflict

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


WEIGHTS = {
    "reserve": 40,
    "again": 4,
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
            operations.append(Op(name, old.reservation_id, old, actual, at_least, chance.random() < 0.3))
    return operations


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
    who, network = chance.choice("abc"), chance.choice(("n1", "n2"))
    cost = chance.choice((1, 50, 333, 700, 2_500))
    key = Idempotency(chance.choice("abcd") * 32, chance.choice("01") * 16) if chance.random() < 0.3 else None
    return Ask(reservation_id, who, network, cost, limits, chance.choice((120, 30)), key)


def played(harness: LayoutHarness, operations: list[Op]) -> Iterator[tuple[object, object, Stored]]:
    """Do the operations in turn; yields the answer, the books and all that is stored after each."""
    reservations: dict[str, Reservation] = {}
    for op in operations:
        answer = _do(harness, op, reservations)
        yield answer, _whole(harness.backend.books("a", "n1", WINDOW_SECONDS)), harness.stored()


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
        harness.put(f"llm:throttle:{op.id}", "by hand", 20)
    if op.name == "reset":
        _reset(harness, op.id)
    if op.ask is None:
        return None
    if op.name in {"reserve", "again", "another request", "find", "find key"}:
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
    verdict = harness.backend.reserve(ask)
    if isinstance(verdict, Reservation):
        reservations.setdefault(op.id, verdict)
    return verdict


def _continue(harness: LayoutHarness, op: Op, reservation: Reservation, reservations: dict[str, Reservation]) -> Answer:
    if op.name == "extend":
        to_nanousd, limits = reservation.cost_nanousd + op.amount, op.ask.limits if op.ask else ROOMY
        verdict = harness.backend.extend(reservation, to_nanousd, limits, at_least_nanousd=op.at_least)
        if isinstance(verdict, Reservation) and not op.is_lost:
            reservations[op.id] = verdict
        return verdict
    if op.name == "settle":
        return harness.backend.settle(reservation, op.amount)
    if op.name == "release":
        return harness.backend.release(reservation)
    record = f"llm:reservation:{op.id}"
    if record in harness.stored():
        harness.lose(record)
    return None


def _reset(harness: LayoutHarness, identifier: str) -> None:
    """Clear an identifier's books as `flask ledger reset` does: its keys go, and the time is stored."""
    begins = (f"llm:cost:recent:{identifier}", f"llm:cost:daily:{identifier}:", f"llm:open:identifier:{identifier}")
    for key in harness.stored():
        if key.startswith((*begins, f"llm:throttle:{identifier}")):
            harness.lose(key)
    harness.put(f"llm:reset:{identifier}", str(harness.clock.us), 172_800)
