"""The emergency lending: what the emergency budget pays while the store fails, and how the unused part comes back."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from backends.contract import Ask, Backend, Reservation, Verdict
from backends.guard.emergency_budget import EmergencyBudget
from backends.guard.leased_budget import LeasedBudget

EMERGENCY = "emergency"
"""`Reservation.backend` of a reservation that the store knows nothing of."""


class EmergencyLending:
    """Lends to whole reservations and to extensions of those that the store holds.

    In memory, and lost with the process: the loans. What they came to stays spent in `budget`, whose file survives.

    Args:
        budget: pays for what is lent.
        fallback: decides about whole reservations, by the limits (the memory strategy).
        note: called with the UTC hour and the nano-dollars of all that is lent, and, below 0, of what comes back.
    """

    def __init__(
        self,
        budget: EmergencyBudget | LeasedBudget,
        fallback: Backend,
        note: Callable[[int, int], None] = lambda _hour, _nanousd: None,
    ) -> None:
        self.budget = budget
        self._note = note
        self.reserve_script = fallback.reserve_script
        self._fallback = fallback
        self.loans: dict[tuple[str, str], dict[int, int]] = {}
        """Reservation id and backend -> UTC hour -> nano-dollars lent in it; empty while nothing is lent."""

    def reserve(self, ask: Ask, budget_nanousd: int) -> Verdict | None:
        """Lend a whole reservation, once an id; None where too little of the budget is left."""
        verdict = self._fallback.reserve(ask)
        if not isinstance(verdict, Reservation):
            return verdict
        reservation = replace(verdict, backend=EMERGENCY)
        if self.has_lent_to(reservation):
            return reservation
        hour = self._take(verdict.cost_nanousd, budget_nanousd)
        if hour is None:
            self._fallback.release(verdict)
            return None
        self.loans[_key(reservation)] = {hour: verdict.cost_nanousd}
        return reservation

    def extend(
        self, reservation: Reservation, to_nanousd: int, at_least_nanousd: int, budget_nanousd: int
    ) -> Reservation | None:
        """Lend what is missing to `to_nanousd` in all, or to `at_least_nanousd`; None where neither is left.

        Nothing in between: each try writes to a file.
        """
        for amount_nanousd in dict.fromkeys((to_nanousd, at_least_nanousd)):
            more_nanousd = amount_nanousd - reservation.cost_nanousd
            hour = self._take(more_nanousd, budget_nanousd) if more_nanousd > 0 else None
            if hour is not None:
                loan = self.loans.setdefault(_key(reservation), {})
                loan[hour] = loan.get(hour, 0) + more_nanousd
                return replace(reservation, cost_nanousd=amount_nanousd)
        return None

    def settle(self, reservation: Reservation, actual_nanousd: int) -> bool:
        """End a reservation that was lent as a whole; False for one of another process."""
        loan = self.remove_loan(reservation)
        if not loan:
            return False
        self._fallback.settle(replace(reservation, backend=self._fallback.name), actual_nanousd)
        self._give_back(loan, reservation.cost_nanousd - actual_nanousd)
        return True

    def has_lent_to(self, reservation: Reservation) -> bool:
        """Whether anything is lent to it now."""
        return _key(reservation) in self.loans

    def remove_loan(self, reservation: Reservation) -> Mapping[int, int]:
        """What was lent to it, in nano-dollars by UTC hour: the caller has to give it back, or leaves it spent."""
        return self.loans.pop(_key(reservation), {})

    def give_back(self, loan: Mapping[int, int]) -> None:
        """Free a whole loan, since the store has booked the reservation with its extensions."""
        self._give_back(loan, sum(loan.values()))

    def _take(self, nanousd: int, budget_nanousd: int) -> int | None:
        hour = self.budget.take(nanousd, budget_nanousd)
        if hour is not None:
            self._note(hour, nanousd)
        return hour

    def _give_back(self, loan: Mapping[int, int], unused_nanousd: int) -> None:
        """What was not used comes back, the latest hour first, so that the rest stays where it was taken.

        An overrun (below 0) counts in the latest hour.
        """
        for hour in sorted(loan, reverse=True):
            back = min(unused_nanousd, loan[hour])
            if back:
                self.budget.correct(hour, -back)
                self._note(hour, -back)
            unused_nanousd -= back


def _key(reservation: Reservation) -> tuple[str, str]:
    return reservation.reservation_id, reservation.backend
