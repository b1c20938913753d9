"""What a fault is: how it is injected and mended, and what may come of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from benchmarks.outages.load import Saw

if TYPE_CHECKING:
    from benchmarks.outages.stage import Stage

Mend = Callable[[], object]


class CannotInject(Exception):
    """This machine, or this user, has not what the fault takes; the text says what."""


class Part(Enum):
    """What a fault needs around the service."""

    WIRE = auto()
    """The way to Redis leads over a `Wire`."""
    MODEL_WIRE = auto()
    """So does the way to the upstream."""
    NAME = auto()
    """Redis has a name, which is looked up with a `NameServer`; takes root."""
    SMALL_DISK = auto()
    """`.data/` is a file system of its own; takes root."""
    SHIM = auto()
    """The service's clock and disk can be made to lie and to wait; takes a C compiler."""
    REDIS_SHIM = auto()
    """So can Redis'."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One row: a fault, and all that is allowed to come of it."""

    name: str
    section: str
    """Of docs/FAULTS.md."""
    title: str
    inject: "Callable[[Stage], Mend]"
    """Returns what mends it.

    Raises:
        CannotInject: not here.
    """
    may: frozenset[Saw] = frozenset()
    """What clients may see while it lasts, besides answers that are booked."""
    must: frozenset[Saw] = frozenset()
    """What at least one of them has to see: otherwise the fault was not felt."""
    felt: "Callable[[Stage], object] | None" = None
    """Whether it was felt, where clients need not notice it; asked before it is mended."""
    most_emergency: float = 1.0
    """The share of the answers meanwhile that may be on the emergency budget."""
    births: int = 0
    """Workers that are born in place of others."""
    more_births: bool = False
    """Whether more of them are as good."""
    left_booked: bool = False
    """Whether reservations may stay pending: of answers whose worker was killed."""
    forgets: bool = False
    """Whether Redis loses what it held, so that the books may hold less than the bill."""
    keeps_time: bool = True
    """Whether Redis' clock goes on as it did, so that nothing is over too early, and the audit finds all equal."""
    in_time: bool = True
    """Whether each answer and refusal has to begin in two seconds."""
    logged: str = ""
    """Words that have to be in the log."""
    seconds: float = 3.0
    burst: int = 0
    """More clients while it lasts."""
    parts: frozenset[Part] = frozenset()
    environment: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    """Live settings that hold before it begins."""
    soak: bool = False
    """Whether it can come again and again in one service."""
