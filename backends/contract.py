"""The contract between whoever sells answers and whoever keeps the books.

Four verbs move money (the others only read); each is one step of the store in a backend that keeps the promise:

* ``reserve(ask)``: may this request spend at most `cost_nanousd`? All scopes are charged, or none is.
* ``extend(reservation, to_nanousd, …)``: may it spend more? The same limits, in the periods that it was made in.
* ``settle(reservation, actual_nanousd)``: it ended; book what was used instead of what was reserved.
* ``release(reservation)``: it ended before anything was used; nothing stays booked.

A reservation is open until it is settled or released. A reservation that is not ended has *expired* once
`pending_seconds` are over: it stays booked in full, and only its holder may still end it, while its record exists.

Money is integer nano-dollars, time is integer microseconds of unix time, unless a name says otherwise.
A key that is missing means that nothing was spent. A refusal is a value; failures are `errors.StoreError`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from backends.frozen import frozen_for_the_type_checker


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
    """What may be spent, as it stands for one request. `None` is no limit."""

    window_nanousd: int
    day_nanousd: int
    network_window_nanousd: int | None
    network_day_nanousd: int | None
    global_hour_nanousd: int
    global_day_nanousd: int
    window_seconds: int
    throttle_seconds: int
    """Life of the marker after a window refusal; after a daily refusal it is twice that."""
    mark_when_busy: bool
    """Whether a refusal that only open reservations cause sets the marker too."""


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A caller's own name for a request, so that sending it again never charges again."""

    digest: str
    """32 hex digits of whose key it is, on which route, and its text: the name of its record."""
    body_digest: str
    """16 hex digits of what was asked: the same key with another body is told apart."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request for money. The same `reservation_id` sent again never charges again."""

    reservation_id: str
    identifier: str
    network: str
    cost_nanousd: int
    limits: Limits
    pending_seconds: int
    """The longest that the answer may take and be settled: past it an unended reservation counts as expired."""
    idempotency: Idempotency | None = None
    at_least_nanousd: int | None = None
    """The last of a budget: where `cost_nanousd` has no room, and will have none when what is under way has ended, all
    that is left is set aside, if it is so much. None: all of it or nothing.
    """

    @property
    def least_nanousd(self) -> int:
        """What it takes at least to be admitted."""
        return self.cost_nanousd if self.at_least_nanousd is None else self.at_least_nanousd


@frozen_for_the_type_checker
class Reservation:
    """Money set aside. `made_at_us` names the periods (window bucket, hour, day) that it was booked into."""

    reservation_id: str
    identifier: str
    network: str
    cost_nanousd: int
    """What is set aside now; more than at first once it was extended."""
    request_digest: str
    """16 hex digits of what was asked at first: an id that comes for another request is another request's."""
    made_at_us: int
    window_seconds: int
    pending_seconds: int
    backend: str
    window_spent_nanousd: int
    """The identifier's window with this reservation in it."""
    day_spent_nanousd: int
    """The identifier's day with this reservation in it."""
    window_frees_at_seconds: int
    """Unix time at which the oldest amount in the identifier's window leaves it."""
    idempotency: Idempotency | None = None
    expired_nanousd: int = field(default=0, compare=False)
    """Open money of other reservations whose time was over, found on the way: it stays booked, and is told once."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """No. Nothing was charged; only the throttle marker may be new.

    Of an extension it tells the reason and the scope only: there is nothing to wait for.
    """

    reason: Reason
    cause: Reason
    """What the marker stands for when `reason` is `throttled`; else the reason itself."""
    scope: Scope
    retry_after_seconds: int | None
    """Never earlier than the refusal can end; None where waiting never helps."""
    in_flight: bool
    """Only open reservations stand in the way: busy, not spent."""
    can_never_fit: bool
    """The request is larger than a whole limit."""
    marker_seconds: int
    """Life left of the throttle marker; 0 without one."""
    limit_nanousd: int | None
    """The limit that refused, where it is one of this request's (None under a marker)."""


class DuplicateState(StrEnum):
    """What became of the first request with an idempotency key."""

    IN_FLIGHT = "in_flight"
    SETTLED = "settled"
    EXPIRED = "expired"
    """Nobody ended it in time (its worker was killed): it stays booked in full."""


@dataclass(frozen=True, slots=True)
class Duplicate:
    """No, and for good: a request with this idempotency key was admitted before. Nothing was charged."""

    reservation_id: str
    """The first one's."""
    state: DuplicateState
    cost_nanousd: int
    """What is booked for the first one: its reservation while it is in flight or has expired."""
    same_body: bool
    """Whether it asked the same."""


Verdict = Reservation | Refusal | Duplicate


class Outcome(StrEnum):
    """How a reservation ended."""

    SETTLED = "settled"
    RELEASED = "released"
    """Nothing was used, and nothing is booked; its idempotency key is free again."""
    REPEATED = "repeated"
    """It had ended before: nothing changed, the first answer is told again."""
    LATE = "late"
    """Its record was lost with its booking: the actual amount was booked now, once."""
    EXPIRED = "expired"
    """Its record is gone with age: it stays booked in full."""


@dataclass(frozen=True, slots=True)
class Settlement:
    """The end of a reservation and what the books hold for it now."""

    reservation_id: str
    outcome: Outcome
    booked_nanousd: int
    overrun_nanousd: int
    """By how much the actual amount exceeded the reservation."""
    expired_nanousd: int = field(default=0, compare=False)
    """Open money of other reservations whose time was over, found on the way: it stays booked, and is told once."""


@dataclass(frozen=True, slots=True)
class Marker:
    """A throttle marker that lives: it refuses its identifier without a look at the money."""

    cause: Reason
    """The refusal that set it."""
    left_seconds: int
    retry_after_seconds: int
    """When what set it can end at the earliest; never before the marker does."""
    in_flight: bool
    """Only open reservations had set it."""


@dataclass(frozen=True, slots=True)
class Books:
    """What is booked (settled and open together), as of one moment."""

    window_nanousd: int
    day_nanousd: int
    network_window_nanousd: int
    network_day_nanousd: int
    global_hour_nanousd: int
    global_day_nanousd: int
    pending_nanousd: int
    """Of the identifier's money, what open reservations hold."""
    pending_today_nanousd: int = field(default=0, compare=False)
    """Of that, what was reserved in the present UTC day."""
    window_frees_at_seconds: int | None = field(default=None, compare=False)
    """Unix time at which the oldest amount in the identifier's window leaves it; None if it is empty."""
    marker: Marker | None = field(default=None, compare=False)
    """The identifier's throttle marker, if one lives."""
    as_of_us: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Event:
    """What a backend or the guard wants to tell; an observer turns it into logs and metrics."""

    name: str
    fields: dict[str, object]


Observer = Callable[[Event], None]


class Backend(Protocol):
    """A throttling strategy. Registered by name in the entry-point group ``tollgate.backends``."""

    name: str
    promises_atomicity: bool
    """Declared, and tested: whether concurrent callers can never exceed a limit together."""
    keeps_our_layout: bool
    """Declared, and tested: whether it keeps the keys of `backends.keys`, as the ledger and other strategies read them."""
    reserve_script: str
    """What decides, for the log: a script's file name, or the strategy's own name."""

    def reserve(self, ask: Ask) -> Verdict:
        """Charge `ask.cost_nanousd` to every scope, or to none.

        Raises:
            ReservationConflict: the id is known for another request, or has ended.
            StoreError: the store could not be asked; whether it charged is unknown.
        """

    def find(self, ask: Ask) -> Reservation | None:
        """The open reservation that `ask` became, if it did; changes nothing. For when the answer was lost."""

    def find_duplicate(self, idempotency: Idempotency) -> Duplicate | None:
        """The first request with this idempotency key, if one was admitted; changes nothing."""

    def extend(
        self, reservation: Reservation, to_nanousd: int, limits: Limits, *, at_least_nanousd: int | None = None
    ) -> Reservation | Refusal:
        """Set aside `to_nanousd` in all, in the reservation's own periods; said again it charges nothing more.

        Where there is no room for that, what there is room for, if it comes to `at_least_nanousd` (`to_nanousd` if
        not given) in all. A refusal changes nothing at all: no marker is set.

        Raises:
            ReservationConflict: the id is not known, has ended, is past its time, or stands for another request.
            StoreError: the store could not be asked; whether it charged is unknown, and the end puts it right.
        """

    def settle(self, reservation: Reservation, actual_nanousd: int) -> Settlement:
        """Book `actual_nanousd` in place of the reservation, into its own periods, at most once.

        Raises:
            ReservationConflict: the id stands for another request.
            StoreError: the store could not be asked; say it again later.
        """

    def release(self, reservation: Reservation) -> Settlement:
        """It was never used: book nothing in its place, at most once, and free its idempotency key.

        Raises:
            ReservationConflict: the id stands for another request.
            StoreError: the store could not be asked; say it again later.
        """

    def books(self, identifier: str, network: str, window_seconds: int) -> Books:
        """Read what is booked now; changes nothing."""

    def close(self) -> None:
        """Give back connections."""
