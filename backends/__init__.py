"""Cost budgets in Redis, as a library.

It needs redis-py. Without redis-py there are the contract, the guard and the strategy ``memory``, and no `Link`, ledger
or conformance suite. A strategy is opened by its name (`open_backend`).
"""

from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Protocol

from backends.budgets import Budget, Calendar, Forever, Reason, Scope, Share, Sliding
from backends.clock import Clock, SystemClock
from backends.contract import (
    Ask,
    Backend,
    Books,
    BudgetUse,
    Duplicate,
    DuplicateState,
    Event,
    Idempotency,
    Marker,
    Observer,
    Outcome,
    Refusal,
    Reservation,
    Settlement,
    Verdict,
)
from backends.errors import ConfigurationError

if TYPE_CHECKING:
    from backends.store.link import Link

ENTRY_POINT_GROUPS = ("tollgate.backends", "llm_tollgate.backends")
"""The first is the name of before, which is still accepted; where both have a strategy, the second one's is taken."""


class BackendFactory(Protocol):
    """What an entry point of the group ``llm_tollgate.backends`` names."""

    def __call__(self, link: "Link", clock: Clock, *, decide_by_clock: bool = False) -> Backend:
        """A strategy on `link`; with `decide_by_clock` (tests) it takes the time from `clock`."""


def backend_names() -> list[str]:
    """Every registered strategy, ours and those of other packages."""
    return sorted(_entry_points())


def open_backend(
    name: str, link: "Link | None", clock: Clock | None = None, *, decide_by_clock: bool = False
) -> Backend:
    """The strategy registered as `name`.

    Args:
        name: as in `backend_names`.
        link: its Redis; None only for a strategy that uses none (``memory``).
        clock: for a strategy that does not decide by Redis' own time.
        decide_by_clock: take the time from `clock` in any case (tests).

    Raises:
        ConfigurationError: no strategy is registered by that name.
    """
    points = _entry_points()
    if name not in points:
        raise ConfigurationError(f"THROTTLE_BACKEND: one of {', '.join(sorted(points))}; got {name}")
    factory: Any = points[name].load()
    backend: Backend = factory(link, clock or SystemClock(), decide_by_clock=decide_by_clock)
    return backend


def _entry_points() -> dict[str, EntryPoint]:
    return {point.name: point for group in ENTRY_POINT_GROUPS for point in entry_points(group=group)}


def __getattr__(name: str) -> Any:
    # Imported when it is asked for, since it needs redis-py.
    if name == "Link":
        from backends.store.link import Link  # noqa: PLC0415

        return Link
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Ask",
    "Backend",
    "BackendFactory",
    "Books",
    "Budget",
    "BudgetUse",
    "Calendar",
    "Clock",
    "Duplicate",
    "DuplicateState",
    "Event",
    "Forever",
    "Idempotency",
    "Link",
    "Marker",
    "Observer",
    "Outcome",
    "Reason",
    "Refusal",
    "Reservation",
    "Scope",
    "Settlement",
    "Share",
    "Sliding",
    "SystemClock",
    "Verdict",
    "backend_names",
    "open_backend",
]
