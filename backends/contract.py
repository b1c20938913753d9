"""The contract between a service that spends money and a backend that keeps its books.

Four verbs move money, the others only read. In a backend that keeps the promise each is one step of the store:

* ``reserve(ask)``: may this request spend at most `cost_nanousd`? Every budget is charged, or none is.
* ``extend(reservation, to_nanousd, …)``: may it spend more? The same limits, in the periods of the reservation.
* ``settle(reservation, actual_nanousd)``: the request has ended; what was used is booked instead.
* ``release(reservation)``: the request has ended before it used anything; nothing stays booked.

A reservation is pending until it is settled or released. A reservation that is not ended has *expired* once
`pending_seconds` are over: it stays booked in full, and only its holder may still end it, while its record exists.

Money is integer nano-dollars, time is integer microseconds of unix time, unless a name says otherwise.
A key that is missing means that nothing was spent. A refusal is a value; failures are `errors.StoreError`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, TypeVar, dataclass_transform

from backends.budgets import Budget, Reason, Scope, owner_in

_T = TypeVar("_T")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def frozen_for_the_type_checker(cls: type[_T]) -> type[_T]:
    """``@dataclass(frozen=True, slots=True)`` to a type checker, and made in a fifth of the time.

    At run time it is not frozen: that costs a call for each field, with fourteen of them as much as all else that our
    side does with a reply of Redis.
    """
    return dataclass(slots=True, unsafe_hash=True)(cls)


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A caller's own name for a request, so that sending it again never charges again."""

    digest: str
    """32 hex digits over its owner, its route and its text: the name of its record."""
    body_digest: str
    """16 hex digits over the body: the same key with another body is recognised."""


@frozen_for_the_type_checker
class Ask:
    """One request for money. The same `reservation_id` sent again never charges again."""

    reservation_id: str
    cost_nanousd: int
    budgets: tuple[Budget, ...]
    """All that it is charged to, in the order in which they are checked; at most `MOST_BUDGETS`.

    No two have one name, and those of one scope have one owner.
    """
    pending_seconds: int = 300
    """The longest that the reservation may be pending; then it has expired. No window of the budgets is shorter."""
    idempotency: Idempotency | None = None
    at_least_nanousd: int | None = None
    """Where `cost_nanousd` does not fit, and will not fit when pending reservations end, what is left is reserved, if
    it is at least this much. None: all of it or nothing.
    """
    mark_when_busy: bool = True
    """Whether a refusal that only pending reservations cause sets the throttle marker too."""

    @property
    def identifier(self) -> str:
        """Whose throttle marker counts: the owner of its budgets of the scope `IDENTIFIER`; empty without one."""
        return owner_in(self.budgets, Scope.IDENTIFIER)

    @property
    def least_nanousd(self) -> int:
        """The smallest amount that admits it."""
        return self.cost_nanousd if self.at_least_nanousd is None else self.at_least_nanousd


@frozen_for_the_type_checker
class Reservation:
    """Money set aside. It is booked in the periods that held `made_at_us`, whatever the budgets are later."""

    reservation_id: str
    cost_nanousd: int
    """What is reserved now, extensions included."""
    budgets: tuple[Budget, ...]
    """What it is charged to."""
    request_digest: str
    """8 hex digits of what was asked: an id that comes back with another digest is another request's."""
    made_at_us: int
    pending_seconds: int
    backend: str
    spent_nanousd: tuple[int, ...] = ()
    """Of each budget, this reservation included."""
    renews_at_seconds: tuple[int | None, ...] = ()
    """Of each budget, the unix time at which its oldest amount leaves a window, or its period ends; None: never."""
    idempotency: Idempotency | None = None
    expired_nanousd: int = field(default=0, compare=False)
    """What other reservations held that have expired, found on the way: it stays booked, and is reported once."""
    over_shadow: tuple[str, ...] = field(default=(), compare=False)
    """Names of the shadow budgets that would have refused it."""

    @property
    def identifier(self) -> str:
        """The owner of its budgets of the scope `IDENTIFIER`; empty without one."""
        return owner_in(self.budgets, Scope.IDENTIFIER)

    def spent(self, name: str) -> int:
        """What is spent of the budget of that name, this reservation included."""
        return next(
            spent for budget, spent in zip(self.budgets, self.spent_nanousd, strict=True) if budget.name == name
        )


@dataclass(frozen=True, slots=True)
class Refusal:
    """The answer "no". Nothing was charged; only the throttle marker may be new.

    The refusal of an extension says which budget refused, and no more: there is nothing to wait for.
    """

    reason: Reason
    cause: Reason
    """What the marker stands for when `reason` is `throttled`; else the reason itself."""
    scope: Scope
    budget: str
    """The name of the budget that refused; under a marker of the one that set it."""
    retry_after_seconds: int | None
    """Never earlier than the refusal can end; None where waiting never helps."""
    in_flight: bool
    """Only pending reservations stand in the way: busy, not spent."""
    can_never_fit: bool
    """The request is larger than a whole limit."""
    marker_seconds: int
    """TTL of the throttle marker; 0 without one."""
    limit_nanousd: int | None
    """The limit that refused; None under a marker."""


class DuplicateState(StrEnum):
    """What became of the first request with an idempotency key."""

    IN_FLIGHT = "in_flight"
    SETTLED = "settled"
    EXPIRED = "expired"
    """It was not ended in time (its worker was killed): it stays booked in full."""


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A final "no": a request with this idempotency key was admitted before. Nothing was charged."""

    reservation_id: str
    """Of the first request."""
    state: DuplicateState
    cost_nanousd: int
    """What is booked for the first request: its reservation while it is in flight or has expired."""
    same_body: bool
    """Whether both have the same body."""


Verdict = Reservation | Refusal | Duplicate


class Outcome(StrEnum):
    """How a reservation ended."""

    SETTLED = "settled"
    RELEASED = "released"
    """Nothing was used, and nothing is booked; its idempotency key is free again."""
    REPEATED = "repeated"
    """It had ended before: nothing changed, and the first amount is returned again."""
    LATE = "late"
    """Its record was lost with its booking: the actual amount is booked now, once."""
    EXPIRED = "expired"
    """Its record has reached its TTL: it stays booked in full."""


@dataclass(frozen=True, slots=True)
class Settlement:
    """The end of a reservation and what the books hold for it now."""

    reservation_id: str
    outcome: Outcome
    booked_nanousd: int
    overrun_nanousd: int
    """By how much the actual amount exceeded the reservation."""
    expired_nanousd: int = field(default=0, compare=False)
    """What other reservations held that have expired, found on the way: it stays booked, and is reported once."""


@dataclass(frozen=True, slots=True)
class Marker:
    """A throttle marker: it refuses its identifier before any amount is read."""

    cause: Reason
    """The refusal that set it."""
    budget: str
    """The name of the budget whose refusal it was."""
    left_seconds: int
    retry_after_seconds: int | None
    """Seconds until its cause can end, never before the marker does; None where it never ends."""
    in_flight: bool
    """Only pending reservations had caused it."""


@dataclass(frozen=True, slots=True)
class BudgetUse:
    """What is booked in one budget."""

    budget: Budget
    spent_nanousd: int
    """Settled and pending together."""
    pending_nanousd: int = field(default=0, compare=False)
    """What pending reservations hold that are charged to it."""
    renews_at_seconds: int | None = field(default=None, compare=False)
    """Unix time at which its oldest amount leaves the window, or its period ends; None: never, or nothing is booked."""


@dataclass(frozen=True, slots=True)
class Books:
    """What is booked, as of one moment."""

    uses: tuple[BudgetUse, ...]
    """In the order in which the budgets were asked for."""
    marker: Marker | None = field(default=None, compare=False)
    """The identifier's throttle marker, if there is one."""
    as_of_us: int = field(default=0, compare=False)

    def use(self, name: str) -> BudgetUse:
        """What is booked in the budget of that name."""
        return next(use for use in self.uses if use.budget.name == name)

    def spent(self, name: str) -> int:
        """Nano-dollars that are booked in the budget of that name."""
        return self.use(name).spent_nanousd


@dataclass(frozen=True, slots=True)
class Event:
    """What a backend or the guard reports; an observer turns it into logs and metrics."""

    name: str
    fields: dict[str, object]


Observer = Callable[[Event], None]


class Backend(Protocol):
    """A throttling strategy. Registered by name in the entry-point group ``llm_tollgate.backends``.

    It may also declare ``increments_commute = True``: no decision but that of a TTL rests on the reply to an increment.
    A search through all orders of commands then takes two increments for swappable.
    """

    name: str
    promises_atomicity: bool
    """Declared, and tested: whether concurrent callers can never exceed a limit together."""
    keeps_our_layout: bool
    """Declared, and tested: whether it keeps the keys of `backends.keys`, which the ledger reads in Redis."""
    reserve_script: str
    """What decides, for the log: a script's file name, or the strategy's own name."""

    def reserve(self, ask: Ask) -> Verdict:
        """Charge `ask.cost_nanousd` to every budget, or to none.

        Raises:
            ConfigurationError: a request cannot be charged to these budgets (`budgets.check`).
            ReservationConflict: the id stands for another request, or has ended.
            StoreError: the store could not be asked; whether it charged is unknown.
        """

    def find(self, ask: Ask) -> Reservation | None:
        """The pending reservation that `ask` became, or None; changes nothing. For an ask whose reply was lost."""

    def find_duplicate(self, idempotency: Idempotency) -> Duplicate | None:
        """The first request with this idempotency key, if one was admitted; changes nothing."""

    def extend(
        self,
        reservation: Reservation,
        to_nanousd: int,
        budgets: tuple[Budget, ...],
        *,
        at_least_nanousd: int | None = None,
    ) -> Reservation | Refusal:
        """Reserve `to_nanousd` in all, in the reservation's own periods; a repeat charges nothing more.

        It is charged to what the reservation is charged to. `budgets` are those of today, for their limits: one of the
        reservation's that is not among them by name has no limit any more.

        Where that does not fit, reserve what fits, if it comes to `at_least_nanousd` (`to_nanousd` if not given) in
        all. A refusal changes nothing at all: no marker is set.

        Raises:
            ReservationConflict: the id is not known, has ended, has expired, or stands for another request.
            StoreError: the store could not be asked; whether it charged is unknown, and the settlement corrects it.
        """

    def settle(self, reservation: Reservation, actual_nanousd: int) -> Settlement:
        """Book `actual_nanousd` in place of the reservation, into its own periods, at most once.

        Raises:
            ReservationConflict: the id stands for another request.
            StoreError: the store could not be asked; repeat it later.
        """

    def release(self, reservation: Reservation) -> Settlement:
        """Book nothing in place of a reservation that was never used, at most once, and free its idempotency key.

        Raises what `settle` raises.
        """

    def books(self, budgets: tuple[Budget, ...]) -> Books:
        """Read what is booked now in these budgets; changes nothing."""

    def close(self) -> None:
        """Give back connections."""
