"""Cost budgets in Redis, as a library. `open_backend` is the only place that chooses a concrete strategy."""

from importlib.metadata import entry_points
from typing import Protocol

from backends.clock import Clock, SystemClock
from backends.contract import (
    Ask,
    Backend,
    Books,
    Duplicate,
    DuplicateState,
    Event,
    Idempotency,
    Limits,
    Marker,
    Observer,
    Outcome,
    Reason,
    Refusal,
    Reservation,
    Scope,
    Settlement,
    Verdict,
)
from backends.errors import ConfigurationError
from backends.store.link import Link

ENTRY_POINT_GROUP = "tollgate.backends"


class BackendFactory(Protocol):
    """What an entry point of the group ``tollgate.backends`` names."""

    def __call__(self, link: Link, clock: Clock, *, decide_by_clock: bool = False) -> Backend:
        """A strategy on `link`; with `decide_by_clock` (tests) it takes the time from `clock`."""


def backend_names() -> list[str]:
    """Every registered strategy, ours and those of other packages."""
    return sorted({point.name for point in entry_points(group=ENTRY_POINT_GROUP)})


def open_backend(name: str, link: Link, clock: Clock | None = None, *, decide_by_clock: bool = False) -> Backend:
    """The strategy registered as `name`.

    Raises:
        ConfigurationError: no strategy is registered by that name.
    """
    points = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    if name not in points:
        raise ConfigurationError(f"THROTTLE_BACKEND: one of {', '.join(sorted(points))}; got {name}")
    factory: BackendFactory = points[name].load()
    return factory(link, clock or SystemClock(), decide_by_clock=decide_by_clock)


__all__ = [
    "Ask",
    "Backend",
    "BackendFactory",
    "Books",
    "Clock",
    "Duplicate",
    "DuplicateState",
    "Event",
    "Idempotency",
    "Limits",
    "Link",
    "Marker",
    "Observer",
    "Outcome",
    "Reason",
    "Refusal",
    "Reservation",
    "Scope",
    "Settlement",
    "SystemClock",
    "Verdict",
    "backend_names",
    "open_backend",
]
