"""Admission: reserves the most that an answer can cost, then refuses the answer, or admits it.

Every route that reaches a model goes through here: only `Admission` makes an `AdmittedAnswer`, which settles whatever
happens on the way.
"""

from collections.abc import Callable
from dataclasses import dataclass

from flask import Response, g

from backends.contract import Ask, Duplicate, Event, Idempotency, Refusal
from backends.errors import ThrottleUnavailable
from backends.guard import Guard
from flaskapp.answers.answer import AdmittedAnswer, AnswerContext
from flaskapp.answers.meter import CostBound, Meter
from flaskapp.http.headers import UNGUARDED, admitted_headers, timing
from flaskapp.http.identity import Identity
from flaskapp.http.refusals import cost_refused, duplicate_refused, store_unavailable
from flaskapp.llm import Answer
from flaskapp.settings import LiveSettings

SETTLE_SECONDS = 5
"""How long after its deadline an answer may be settled, on a busy machine; then its reservation expires."""


@dataclass(frozen=True, slots=True)
class Admission:
    """Reserves for answers; the application has one."""

    guard: Guard
    settings: Callable[[], LiveSettings]
    stream_deadline_seconds: int
    """The longest that an answer may take."""
    context: AnswerContext
    books_seen: bool = False
    """Whether an answer that ended well and reported no usage is booked at what was counted."""

    def admit(
        self,
        who: Identity,
        upstream: Answer,
        cost_bound: CostBound,
        settings: LiveSettings,
        idempotency: Idempotency | None,
    ) -> AdmittedAnswer | Response:
        """Reserve the most that an answer can cost: the admitted answer, or the refusal to send instead."""
        clock, is_on, request_id = self.context.clock, settings.enable_cost_throttling, g.request_id
        started_seconds = clock.monotonic_seconds()
        owners = who.owners(cost_bound.price.model)
        cost_nanousd, at_least_nanousd = cost_bound.first_costs_nanousd()
        ask = Ask(
            reservation_id=request_id,
            cost_nanousd=cost_nanousd,
            budgets=settings.plan.of(owners, clock.now_us()),
            pending_seconds=self.stream_deadline_seconds + SETTLE_SECONDS,
            idempotency=idempotency,
            at_least_nanousd=at_least_nanousd,
            mark_when_busy=settings.throttle_when_busy,
        )
        asked = {"request_id": request_id, "identifier": who.identifier, "cost_nanousd": cost_nanousd}
        self.context.observer(
            Event("check_called", {**asked, "backend": self.guard.backend_name if is_on else UNGUARDED})
        )
        try:
            verdict = self.guard.reserve(ask) if is_on else None
        except ThrottleUnavailable as error:
            return self.timed(store_unavailable(error), started_seconds)
        if isinstance(verdict, Duplicate | Refusal):
            refused = cost_refused(verdict, ask.budgets) if isinstance(verdict, Refusal) else duplicate_refused(verdict)
            return self.timed(refused, started_seconds)
        now_seconds = clock.monotonic_seconds()
        return AdmittedAnswer(
            request_id,
            upstream,
            Meter(
                self.guard,
                verdict,
                cost_bound,
                lambda: self.settings().plan.of(owners, clock.now_us()),
                books_seen=self.books_seen,
            ),
            self.context,
            admitted_headers(verdict, now_seconds - started_seconds),
            deadline_at_seconds=now_seconds + self.stream_deadline_seconds,
        )

    def find_duplicate(self, idempotency: Idempotency | None, settings: LiveSettings) -> Response | None:
        """The refusal of a used idempotency key, made before a challenge is used up for the request."""
        if idempotency is None or not settings.enable_cost_throttling:
            return None
        started_seconds = self.context.clock.monotonic_seconds()
        try:
            duplicate = self.guard.find_duplicate(idempotency)
        except ThrottleUnavailable as error:
            return self.timed(store_unavailable(error), started_seconds)
        return None if duplicate is None else self.timed(duplicate_refused(duplicate), started_seconds)

    def timed(self, response: Response, started_seconds: float) -> Response:
        """`response` with ``Server-Timing``: the time since `started_seconds`."""
        check_seconds = self.context.clock.monotonic_seconds() - started_seconds
        response.headers["Server-Timing"] = timing(check_seconds * 1_000)
        return response
