"""The contract between a service that spends money and a backend that keeps its books.

Four verbs move money, the others only read. In a backend that keeps the promise each is one step of the store:

* ``reserve(ask)``: may this request spend at most `cost_nanousd`? Every scope is charged, or none is.
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

_T = TypeVar("_T")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def _frozen_for_the_type_checker(cls: type[_T]) -> type[_T]:
    """``@dataclass(frozen=True, slots=True)`` to a type checker, and made in a fifth of the time.

    At run time it is not frozen: that costs a call for each field, with fourteen of them as much as all else that our
    side does with a reply of Redis.
    """
    return dataclass(slots=True, unsafe_hash=True)(cls)


class Scope(StrEnum):
    """Whose budget it is."""

    IDENTIFIER = "identifier"
    NETWORK = "network"
    GLOBAL = "global"


class Reason(StrEnum):
    """Why a request is refused, in the order in which the limits are checked."""

    THROTTLED = "throttled"
    DAILY_LIMIT = "daily_limit"
    WINDOW_LIMIT = "window_limit"
    NETWORK_LIMIT = "network_limit"
    NETWORK_DAILY_LIMIT = "network_daily_limit"
    GLOBAL_HOURLY_LIMIT = "global_hourly_limit"
    GLOBAL_DAILY_LIMIT = "global_daily_limit"


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one request. `None` is no limit."""

    window_nanousd: int
    day_nanousd: int
    network_window_nanousd: int | None
    network_day_nanousd: int | None
    global_hour_nanousd: int
    global_day_nanousd: int
    window_seconds: int
    throttle_seconds: int
    """TTL of the throttle marker after a window refusal; after a daily refusal it is twice that."""
    mark_when_busy: bool
    """Whether a refusal that only pending reservations cause sets the marker too."""


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A caller's own name for a request, so that sending it again never charges again."""

    digest: str
    """32 hex digits over its owner, its route and its text: the name of its record."""
    body_digest: str
    """16 hex digits over the body: the same key with another body is recognised."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request for money. The same `reservation_id` sent again never charges again."""

    reservation_id: str
    identifier: str
    network: str
    cost_nanousd: int
    limits: Limits
    pending_seconds: int
    """The longest that the reservation may be pending; then it has expired."""
    idempotency: Idempotency | None = None
    at_least_nanousd: int | None = None
    """Where `cost_nanousd` does not fit, and will not fit when pending reservations end, what is left is reserved, if
    it is at least this much. None: all of it or nothing.
    """

    @property
    def least_nanousd(self) -> int:
        """The smallest amount that admits it."""
        return self.cost_nanousd if self.at_least_nanousd is None else self.at_least_nanousd


@_frozen_for_the_type_checker
class Reservation:
    """Money set aside. It is booked in the periods (window bucket, hour, day) of `made_at_us`."""

    reservation_id: str
    identifier: str
    network: str
    cost_nanousd: int
    """What is reserved now, extensions included."""
    request_digest: str
    """16 hex digits of what was asked: an id that comes back with another digest is another request's."""
    made_at_us: int
    window_seconds: int
    pending_seconds: int
    backend: str
    window_spent_nanousd: int
    """The identifier's window, this reservation included."""
    day_spent_nanousd: int
    """The identifier's day, this reservation included."""
    window_frees_at_seconds: int
    """Unix time at which the oldest amount in the identifier's window leaves it."""
    idempotency: Idempotency | None = None
    expired_nanousd: int = field(default=0, compare=False)
    """What other reservations held that have expired, found on the way: it stays booked, and is reported once."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The answer "no". Nothing was charged; only the throttle marker may be new.

    The refusal of an extension has a reason and a scope only: there is nothing to wait for.
    """

    reason: Reason
    cause: Reason
    """What the marker stands for when `reason` is `throttled`; else the reason itself."""
    scope: Scope
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
    left_seconds: int
    retry_after_seconds: int
    """Seconds until its cause can end; never before the marker does."""
    in_flight: bool
    """Only pending reservations had caused it."""


@dataclass(frozen=True, slots=True)
class Books:
    """What is booked (settled and pending together), as of one moment."""

    window_nanousd: int
    day_nanousd: int
    network_window_nanousd: int
    network_day_nanousd: int
    global_hour_nanousd: int
    global_day_nanousd: int
    pending_nanousd: int
    """Of the identifier's money, what pending reservations hold."""
    pending_today_nanousd: int = field(default=0, compare=False)
    """Of that, what was reserved in the present UTC day."""
    window_frees_at_seconds: int | None = field(default=None, compare=False)
    """Unix time at which the oldest amount in the identifier's window leaves it; None if it is empty."""
    marker: Marker | None = field(default=None, compare=False)
    """The identifier's throttle marker, if there is one."""
    as_of_us: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Event:
    """What a backend or the guard reports; an observer turns it into logs and metrics."""

    name: str
    fields: dict[str, object]


Observer = Callable[[Event], None]


class Backend(Protocol):
    """A throttling strategy. Registered by name in the entry-point group ``tollgate.backends``.

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
        """Charge `ask.cost_nanousd` to every scope, or to none.

        Raises:
            ReservationConflict: the id stands for another request, or has ended.
            StoreError: the store could not be asked; whether it charged is unknown.
        """

    def find(self, ask: Ask) -> Reservation | None:
        """The pending reservation that `ask` became, or None; changes nothing. For an ask whose reply was lost."""

    def find_duplicate(self, idempotency: Idempotency) -> Duplicate | None:
        """The first request with this idempotency key, if one was admitted; changes nothing."""

    def extend(
        self, reservation: Reservation, to_nanousd: int, limits: Limits, *, at_least_nanousd: int | None = None
    ) -> Reservation | Refusal:
        """Reserve `to_nanousd` in all, in the reservation's own periods; a repeat charges nothing more.

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

    def books(self, identifier: str, network: str, window_seconds: int) -> Books:
        """Read what is booked now; changes nothing."""

    def close(self) -> None:
        """Give back connections."""
