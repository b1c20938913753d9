"""Admission: reserves the most that an answer can cost, then refuses the answer, or makes and settles it.

Every route that reaches a model goes through here: only `Admission` makes a `Meter`, and `AdmittedAnswer` settles it
whatever happens on the way.
"""

from collections.abc import Callable
from dataclasses import dataclass

from flask import Response, g

from backends.clock import Clock
from backends.contract import Ask, Duplicate, Event, Idempotency, Observer, Refusal
from backends.errors import ThrottleUnavailable
from backends.guard import Guard
from backends.money import usd_text
from backends.pricing.prices import Price
from flaskapp.answers.meter import Meter, Slices
from flaskapp.http.headers import UNGUARDED, admitted_headers, timing
from flaskapp.http.identity import Identity
from flaskapp.http.refusals import (
    UPSTREAM_ERROR,
    cost_refused,
    duplicate_refused,
    problem,
    store_unavailable,
)
from flaskapp.llm import UpstreamBroken, UpstreamError, Usage
from flaskapp.settings import LiveSettings


@dataclass(frozen=True, slots=True)
class CostBound:
    """What an answer can use at most, at one price."""

    price: Price
    max_usage: Usage
    """The input's bound, and the maximum of output tokens that the upstream gets, of all choices together."""
    slices: Slices | None
    """How the reservation grows; None: all of it is reserved before."""

    @property
    def first_cost_nanousd(self) -> int:
        """What is reserved before the model is called: the cost of `max_usage`, or of a first slice."""
        first = self.max_usage if self.slices is None else self.slices.first_usage(self.max_usage)
        return self.price.highest_cost_nanousd(first.input_tokens, first.output_tokens)

    @property
    def least_first_cost_nanousd(self) -> int | None:
        """The part of it with which an answer begins on the last of a budget; None: it needs all of it."""
        if self.slices is None:
            return None
        tokens = min(self.slices.least_first_tokens, self.slices.first_usage(self.max_usage).output_tokens)
        return self.price.highest_cost_nanousd(self.max_usage.input_tokens, tokens)


SETTLE_SECONDS = 5
"""How long after its deadline an answer may be settled, on a busy machine; then its reservation expires."""


@dataclass(frozen=True, slots=True)
class Admission:
    """Reserves for answers; the application has one."""

    guard: Guard
    settings: Callable[[], LiveSettings]
    stream_deadline_seconds: int
    """The longest that an answer may take."""
    clock: Clock
    observer: Observer

    def reserve(
        self, who: Identity, cost_bound: CostBound, settings: LiveSettings, idempotency: Idempotency | None
    ) -> "AdmittedAnswer | Response":
        """Reserve the most that an answer can cost: the admitted answer, or the refusal to send instead."""
        ask = self._ask(who, cost_bound, settings, idempotency)
        started_seconds = self.clock.monotonic_seconds()
        try:
            verdict = None if ask is None else self.guard.reserve(ask)
        except ThrottleUnavailable as error:
            return self.timed(store_unavailable(error), started_seconds)
        if isinstance(verdict, Duplicate):
            return self.timed(duplicate_refused(verdict), started_seconds)
        if isinstance(verdict, Refusal):
            return self.timed(cost_refused(verdict), started_seconds)
        check_seconds = self.clock.monotonic_seconds() - started_seconds
        meter = Meter(
            self.guard,
            verdict,
            cost_bound.price,
            cost_bound.max_usage,
            slices=cost_bound.slices,
            limits=lambda: self.settings().limits,
        )
        return AdmittedAnswer(meter, admitted_headers(verdict, settings.limits, check_seconds), self.observer)

    def find_duplicate(self, idempotency: Idempotency | None, settings: LiveSettings) -> Response | None:
        """The refusal of a used idempotency key, made before a challenge is used up for the request."""
        if idempotency is None or not settings.enable_cost_throttling:
            return None
        started_seconds = self.clock.monotonic_seconds()
        try:
            duplicate = self.guard.find_duplicate(idempotency)
        except ThrottleUnavailable as error:
            return self.timed(store_unavailable(error), started_seconds)
        return None if duplicate is None else self.timed(duplicate_refused(duplicate), started_seconds)

    def _ask(
        self, who: Identity, cost_bound: CostBound, settings: LiveSettings, idempotency: Idempotency | None
    ) -> Ask | None:
        """The ask for the guard; None while cost throttling is off."""
        is_on = settings.enable_cost_throttling
        cost_nanousd = cost_bound.first_cost_nanousd
        fields = {
            "request_id": g.request_id,
            "identifier": who.identifier,
            "cost_nanousd": cost_nanousd,
            "backend": self.guard.backend_name if is_on else UNGUARDED,
        }
        self.observer(Event("check_called", fields))
        if not is_on:
            return None
        return Ask(
            reservation_id=g.request_id,
            identifier=who.identifier,
            network=who.network,
            cost_nanousd=cost_nanousd,
            limits=settings.limits,
            pending_seconds=self.stream_deadline_seconds + SETTLE_SECONDS,
            idempotency=idempotency,
            at_least_nanousd=cost_bound.least_first_cost_nanousd,
        )

    def timed(self, response: Response, started_seconds: float) -> Response:
        """`response` with ``Server-Timing``: the time since `started_seconds`."""
        response.headers["Server-Timing"] = timing(self.clock.monotonic_seconds() - started_seconds)
        return response


@dataclass(frozen=True, slots=True)
class AdmittedAnswer:
    """An answer that was admitted; `respond` makes its response, which settles the meter, or settles it here."""

    meter: Meter
    headers: dict[str, str]
    observer: Observer

    def respond(self, make_response: Callable[[Meter], Response]) -> Response:
        """The answer, or the problem where the model failed; any other failure books the whole reservation."""
        try:
            response = make_response(self.meter)
        except UpstreamError as error:
            response = self._upstream_failed(error)
        except BaseException:
            self.meter.settle(None)
            raise
        response.headers.extend(self.headers)
        return response

    def _upstream_failed(self, error: UpstreamError) -> Response:
        is_broken = isinstance(error, UpstreamBroken)
        cost_nanousd = self.meter.settle(None) if is_broken else self.meter.release()
        fields = {"request_id": g.request_id, "error": str(error), "detail": error.detail}
        self.observer(Event("upstream_failed", fields))
        timed_out = isinstance(error, UpstreamBroken) and error.timed_out
        reason = "timeout" if timed_out else "broken" if is_broken else "not_taken"
        extra: dict[str, object] = {"cost_usd": usd_text(cost_nanousd)}
        if error.status is not None:
            extra["upstream_status"] = error.status
        return problem(504 if timed_out else 502, UPSTREAM_ERROR, reason, str(error), extra=extra)
