"""What the strategies share that decide in Python: the contract's verbs, performed in each strategy's own way."""

# ruff: noqa: D102 (what the verbs do is said once, at `contract.Backend`)

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

from backends.budgets import Budget
from backends.clock import Clock
from backends.contract import Ask, Books, Duplicate, Idempotency, Refusal, Reservation, Settlement, Verdict
from backends.strategies import verbs
from backends.strategies.verbs import Verb

T = TypeVar("T")


class PythonStrategy(ABC):
    """A backend that decides here and not in a script; `perform` says how its commands travel.

    Args:
        clock: decides the periods.
    """

    name: str
    reserve_script: str
    keeps_our_layout = True
    increments_commute = True
    """Declared as `contract.Backend` says: no decision but that of a TTL rests on the reply to an increment."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    @abstractmethod
    def perform(self, begin: Callable[[int], Verb[T]]) -> T:
        """The result of a verb; `begin` starts it at a unix time in microseconds."""

    @abstractmethod
    def close(self) -> None: ...

    def reserve(self, ask: Ask) -> Verdict:
        return self.perform(lambda now_us: verbs.reserve(ask, self.name, now_us))

    def find(self, ask: Ask) -> Reservation | None:
        return self.perform(lambda _: verbs.find(ask, self.name))

    def find_duplicate(self, idempotency: Idempotency) -> Duplicate | None:
        return self.perform(lambda now_us: verbs.find_duplicate(idempotency, now_us))

    def extend(
        self,
        reservation: Reservation,
        to_nanousd: int,
        budgets: tuple[Budget, ...],
        *,
        at_least_nanousd: int | None = None,
    ) -> Reservation | Refusal:
        at_least = to_nanousd if at_least_nanousd is None else at_least_nanousd
        return self.perform(lambda now_us: verbs.extend(reservation, to_nanousd, at_least, budgets, now_us))

    def settle(self, reservation: Reservation, actual_nanousd: int) -> Settlement:
        return self.perform(lambda now_us: verbs.end(reservation, "settled", actual_nanousd, now_us))

    def release(self, reservation: Reservation) -> Settlement:
        return self.perform(lambda now_us: verbs.end(reservation, "released", 0, now_us))

    def books(self, budgets: tuple[Budget, ...]) -> Books:
        return self.perform(lambda now_us: verbs.books(budgets, now_us))
