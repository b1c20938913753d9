"""The guard's events: their names and fields, which an observer turns into logs and metrics."""

# ruff: noqa: D102 (each method sends the event that it is named after)

from collections.abc import Mapping

from backends.contract import Ask, Duplicate, Event, Observer, Refusal, Reservation, Settlement, Verdict
from backends.errors import StoreBroken, StoreError


class GuardEvents:
    """Sends each event of the guard to `observer`."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def decided(self, ask: Ask, verdict: Verdict, checked: Mapping[str, object]) -> None:
        """Sends ``reserved``, ``refused`` or ``duplicate``; ``shadow_refused`` for each shadow budget that was over.

        `checked` says who decided, and how long that took: `backend`, `script` and `check_ms`.
        """
        asked = {"request_id": ask.reservation_id, "identifier": ask.identifier, "cost_nanousd": ask.cost_nanousd}
        if isinstance(verdict, Refusal):
            self._observer(Event("refused", {**asked, "refusal": verdict, **checked}))
            return
        if isinstance(verdict, Duplicate):
            first = {"first_request_id": verdict.reservation_id, "state": verdict.state.value}
            self._observer(Event("duplicate", {**asked, **first, **checked}))
            return
        if verdict.expired_nanousd:
            self._observer(Event("expired", {"expired_nanousd": verdict.expired_nanousd}))
        reserved = {"cost_nanousd": verdict.cost_nanousd, "reservation": verdict}
        self._observer(Event("reserved", {**asked, **reserved, **checked}))
        for name in verdict.over_shadow:
            self._observer(Event("shadow_refused", {**asked, "budget": name}))

    def check_failed(self, ask: Ask, error: StoreError, checked: Mapping[str, object]) -> None:
        is_bug = isinstance(error, StoreBroken)
        self._emit("check_failed", **_of(ask), error=str(error), is_bug=is_bug, **checked)

    def emergency_exhausted(self, ask: Ask) -> None:
        self._emit("emergency_exhausted", **_of(ask))

    def extended(self, reservation: Reservation, extended: Reservation | None) -> None:
        """Sends ``extended``, or ``extension_refused`` where `extended` is None."""
        reserved_nanousd = reservation.cost_nanousd if extended is None else extended.cost_nanousd
        self._emit(
            "extension_refused" if extended is None else "extended",
            request_id=reservation.reservation_id,
            identifier=reservation.identifier,
            reserved_nanousd=reserved_nanousd,
            more_nanousd=reserved_nanousd - reservation.cost_nanousd,
            backend=reservation.backend,
        )

    def settled(self, reservation: Reservation, settlement: Settlement) -> None:
        fields = {
            "request_id": reservation.reservation_id,
            "identifier": reservation.identifier,
            "reserved_nanousd": reservation.cost_nanousd,
            "booked_nanousd": settlement.booked_nanousd,
            "overrun_nanousd": settlement.overrun_nanousd,
            "outcome": settlement.outcome.value,
            "backend": reservation.backend,
        }
        self._observer(Event("settled", fields))
        if settlement.expired_nanousd:
            self._observer(Event("expired", {"expired_nanousd": settlement.expired_nanousd}))

    def failed(self, name: str, reservation: Reservation, error: Exception, **fields: object) -> None:
        """Sends ``extension_failed``, ``settle_postponed`` or ``settle_refused``."""
        self._emit(name, request_id=reservation.reservation_id, error=str(error), **fields)

    def postponed_job_failed(self, error: Exception) -> None:
        """Sends ``settle_refused``: only a bug raises `error`, and the reservation stays booked in full."""
        self._emit("settle_refused", error=repr(error)[:200])

    def _emit(self, name: str, **fields: object) -> None:
        self._observer(Event(name, fields))


def _of(ask: Ask) -> dict[str, object]:
    return {"request_id": ask.reservation_id, "identifier": ask.identifier, "cost_nanousd": ask.cost_nanousd}
