"""Events of the guard as numbers for Prometheus; amounts in nano-dollars."""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from typing import Any

from flask import Blueprint, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest, values
from prometheus_client.multiprocess import MultiProcessCollector

from backends.budgets import BUILT_IN, Reason
from backends.contract import Event, Outcome, Refusal
from backends.guard import EMERGENCY
from flaskapp.budgets import WIDE_BUDGETS
from flaskapp.config import SharedNumbers
from flaskapp.ops.logs import EVENTS

_Fields = dict[str, Any]
"""Of an event; `backends.guard.events` says what each event has."""
_Count = Callable[[_Fields, str], None]
"""Counts an event with these fields, of this backend."""
_CHECK_BUCKETS = (0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2)


class Metrics:
    """An observer that counts.

    Args:
        shared: where the workers of one server share their numbers; None for a single process.
        backend: whose numbers are there from the start.
        models: those that are offered, whose numbers are there from the start too.
    """

    def __init__(self, shared: SharedNumbers | None, backend: str, models: Sequence[str] = ()) -> None:
        self._directory = shared.directory if shared else None
        # A worker goes on in the files of one that has ended: files of each process would add up with every reload.
        values.ValueClass = values.MultiProcessValue(lambda: shared.worker) if shared else values.MutexValue  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self.checks = self._counter("checks", "Requests that the guard decided", "backend", "budget", "outcome")
        check_seconds = Histogram(
            "tollgate_check_seconds",
            "Time of the check alone",
            ["backend"],
            buckets=_CHECK_BUCKETS,
            registry=self._registry,
        )
        # The labels are words of ours, and few; the library looks for them each time.
        self.check_seconds: Callable[[str], Histogram] = cache(check_seconds.labels)
        self.reserved = self._counter("reserved_nanousd", "Nano-dollars reserved", "backend")
        self.booked = self._counter("booked_nanousd", "Nano-dollars booked at settlement", "backend", "outcome")
        self.shadow_refusals = self._counter("shadow_refusals", "Admitted, over a shadow budget", "budget")
        self.overrun = self._counter("overrun_nanousd", "Nano-dollars used above what was reserved", "backend")
        self.expired = self._counter(
            "expired_nanousd", "Nano-dollars of reservations that nobody ended, booked in full"
        )()
        self.extensions = self._counter("extensions", "Extensions of running answers", "backend", "outcome")
        self.emergency = self._counter("emergency_nanousd", "Nano-dollars admitted while failing open")()
        self.failures = self._counter("store_failures", "Checks that the store failed", "is_bug")
        self.usage_missing = self._counter(
            "usage_missing", "Answers that ended well and reported no usage", "model", "booked"
        )
        self.usage_absurd = self._counter(
            "usage_absurd", "Answers whose reported usage cannot be: the reservation was booked", "model"
        )
        self.events = self._counter("events", "Everything else that was told", "name")
        self._counts: dict[str, _Count] = {
            "reserved": lambda fields, backend: self._decided(fields, backend, "admitted"),
            "refused": self._refused,
            "shadow_refused": lambda fields, _: self.shadow_refusals(str(fields["budget"])).inc(),
            "duplicate": lambda fields, backend: self._decided(fields, backend, "duplicate"),
            "settled": self._settled,
            "expired": lambda fields, _: self.expired.inc(fields["expired_nanousd"]),
            "extended": self._extended,
            "extension_refused": lambda _, backend: self.extensions(backend, "refused").inc(),
            "usage_missing": lambda fields, _: self.usage_missing(fields["model"], fields["booked"]).inc(),
            "usage_absurd": lambda fields, _: self.usage_absurd(fields["model"]).inc(),
            "check_failed": lambda fields, _: self.failures(str(fields["is_bug"]).lower()).inc(),
        }
        self._begin_at_zero(backend, models)

    def _begin_at_zero(self, backend: str, models: Sequence[str]) -> None:
        """Make every number that can be known now: `increase()` sees no first one of a number that was not there."""
        for name in EVENTS - self._counts.keys():
            self.events(name)
        for is_bug in ("true", "false"):
            self.failures(is_bug)
        for model, booked in product(models, ("whole", "seen")):
            self.usage_missing(model, booked), self.usage_absurd(model)
        refused = {(name, reason) for name, row in BUILT_IN.items() for reason in (row.reason, Reason.THROTTLED)}
        refused |= {(name, Reason.BUDGET_LIMIT) for name in WIDE_BUDGETS}
        refused |= {(name, Reason.NETWORK_SHARE) for name in ("global_hour", "global_day")}
        for each in (backend, EMERGENCY):
            for budget, outcome in (("", "admitted"), ("", "duplicate"), *refused):
                self.checks(each, budget, outcome)
            for outcome in Outcome:
                self.booked(each, outcome.value)
            for granted in ("granted", "refused"):
                self.extensions(each, granted)
            self.check_seconds(each), self.reserved(each), self.overrun(each)

    def observe(self, event: Event) -> None:
        """Count one event."""
        count = self._counts.get(event.name)
        if count is None:
            self.events(event.name).inc()
        else:
            count(event.fields, str(event.fields.get("backend", "")))

    def exposition(self) -> bytes:
        """All numbers of all workers, in Prometheus' text format."""
        if self._directory is None:
            return generate_latest(self._registry)
        all_workers = CollectorRegistry()
        MultiProcessCollector(all_workers, path=self._directory)  # type: ignore[no-untyped-call] # the library leaves it so
        return generate_latest(all_workers)

    def _extended(self, fields: _Fields, backend: str) -> None:
        self.extensions(backend, "granted").inc()
        if backend == EMERGENCY:
            self.emergency.inc(fields["more_nanousd"])

    def _refused(self, fields: _Fields, backend: str) -> None:
        refusal: Refusal = fields["refusal"]
        self._decided(fields, backend, refusal.reason.value, refusal.budget)

    def _settled(self, fields: _Fields, backend: str) -> None:
        self.booked(backend, str(fields["outcome"])).inc(fields["booked_nanousd"])
        overrun = self.overrun(backend)
        if fields["overrun_nanousd"]:
            overrun.inc(fields["overrun_nanousd"])

    def _decided(self, fields: _Fields, backend: str, outcome: str, budget: str = "") -> None:
        """Count a decision; `budget` is the one that refused, under a marker the one that set it."""
        self.checks(backend, budget, outcome).inc()
        self.check_seconds(backend).observe(fields["check_ms"] / 1_000)
        if outcome == "admitted":
            self.reserved(backend).inc(fields["cost_nanousd"])
            if backend == EMERGENCY:
                self.emergency.inc(fields["cost_nanousd"])

    def _counter(self, name: str, text: str, *labels: str) -> Callable[..., Counter]:
        """The counter of each set of labels."""
        counter = Counter(f"tollgate_{name}", text, labels, registry=self._registry)
        return cache(counter.labels) if labels else lambda: counter


def make_metrics_page(metrics: Metrics) -> Blueprint:
    """``GET /metrics``."""
    blueprint = Blueprint("metrics", __name__)

    @blueprint.get("/metrics")
    def show() -> Response:
        return Response(metrics.exposition(), content_type=CONTENT_TYPE_LATEST)

    return blueprint
