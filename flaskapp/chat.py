"""The chat room: who asks, what it may cost at most, reserve, answer, and settle when the response closes."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from flask import Blueprint, Request, Response, g, request

from backends.challenges import ChallengeResult, Challenges
from backends.clock import Clock
from backends.contract import Ask, Event, Observer, Refusal, Reservation
from backends.errors import StoreError, ThrottleUnavailable
from backends.guard import Guard
from backends.money import usd_text
from backends.pricing import Price, PriceBook
from backends.settings import LiveSettings
from flaskapp import sse
from flaskapp.chat_body import read_chat_body
from flaskapp.identity import HEADER, Identity, identify
from flaskapp.llm import Answer, Model, Turn, UpstreamBroken, UpstreamError, Usage
from flaskapp.llm.pump import DeadlinePassed, Pump, Silence
from flaskapp.llm.tokens import SYSTEM_PROMPT, InputTooLong, bound_for
from flaskapp.refusals import (
    INVALID_CHALLENGE,
    THROTTLE_UNAVAILABLE,
    UPSTREAM_ERROR,
    InvalidRequest,
    cost_refused,
    problem,
)

UNGUARDED = "off"


@dataclass(frozen=True, slots=True)
class ChatRoom:
    """What the chat endpoint works with; made once by the lobby."""

    guard: Guard
    challenges: Challenges
    model: Model
    prices: PriceBook
    default_model: str
    stream_deadline_seconds: int
    settings: Callable[[], LiveSettings]
    clock: Clock
    observer: Observer

    def stream(self) -> Response:
        """``POST /api/v1/chat/stream``."""
        who = identify(request)
        settings = self.settings()
        question = self._question(request, settings)
        refused = self._refused_by_challenge(who, settings)
        if refused is not None:
            return refused
        ask = self._ask(who, question, settings)
        started_seconds = self.clock.monotonic_seconds()
        try:
            verdict = None if ask is None else self.guard.reserve(ask)
        except ThrottleUnavailable as error:
            return self._timed(_unavailable(error), started_seconds)
        if isinstance(verdict, Refusal):
            return self._timed(cost_refused(verdict), started_seconds)
        check_seconds = self.clock.monotonic_seconds() - started_seconds
        bill = Bill(self.guard, verdict, question.price, question.most)
        try:
            response = self._answer(question, bill)
        except UpstreamError as error:
            response = self._upstream_failed(error, bill)
        except BaseException:
            bill.settle(None)
            raise
        return _with_headers(response, verdict, check_seconds)

    def _question(self, received: Request, settings: LiveSettings) -> "Question":
        """What is asked, and what it costs at most."""
        body = read_chat_body(
            received,
            default_model=self.default_model,
            models=self.prices.models,
            max_tokens=settings.llm_max_tokens,
        )
        limit = settings.llm_max_input_tokens
        try:
            turns, input_tokens = bound_for(body.model).fit(SYSTEM_PROMPT, body.history, body.query, limit)
        except InputTooLong as error:
            raise InvalidRequest(422, "query", f"is longer than the {limit} tokens that an input may have") from error
        price = self.prices.price(body.model, self.clock.now_us())
        return Question(turns, body.model, price, Usage(input_tokens, body.max_tokens))

    def _refused_by_challenge(self, who: Identity, settings: LiveSettings) -> Response | None:
        if not settings.enable_challenge_response:
            return None
        if who.challenge is None:
            return _challenge_refused("missing", f"Send {HEADER}: fp:<challenge>:<hash> with a fresh challenge.")
        try:
            result = self.challenges.consume(who.challenge, who.identifier, who.network)
        except StoreError as error:
            if settings.throttle_on_error == "closed":
                return _unavailable(ThrottleUnavailable("challenges cannot be checked now", 1))
            self._tell("challenge_skipped", who, error=str(error))
            return None
        return _CHALLENGE_ANSWERS[result]()

    def _ask(self, who: Identity, question: "Question", settings: LiveSettings) -> Ask | None:
        """What the guard is asked; None while cost throttling is off."""
        is_on = settings.enable_cost_throttling
        backend = self.guard.backend_name if is_on else UNGUARDED
        self._tell("check_called", who, cost_nanousd=question.highest_cost_nanousd, backend=backend)
        if not is_on:
            return None
        return Ask(
            reservation_id=g.request_id,
            identifier=who.identifier,
            network=who.network,
            cost_nanousd=question.highest_cost_nanousd,
            limits=settings.limits,
            open_seconds=self.stream_deadline_seconds,
        )

    def _answer(self, question: "Question", bill: "Bill") -> Response:
        deadline_at_seconds = self.clock.monotonic_seconds() + self.stream_deadline_seconds
        answer = self.model.open(
            question.turns,
            model=question.model,
            max_tokens=question.most.output_tokens,
            input_tokens=question.most.input_tokens,
            deadline_seconds=self.stream_deadline_seconds,
        )
        pump = Pump(answer, clock=self.clock, deadline_at_seconds=deadline_at_seconds)
        stream = Stream(g.request_id, answer, pump, bill, self.observer)
        response = Response(stream.events(), mimetype="text/event-stream")
        # Not in the generator's `finally`: a client that leaves before the first chunk never starts the generator.
        response.call_on_close(stream.close)
        response.headers["Cache-Control"] = "no-store"
        response.headers["X-Accel-Buffering"] = "no"
        return response

    def _upstream_failed(self, error: UpstreamError, bill: "Bill") -> Response:
        is_broken = isinstance(error, UpstreamBroken)
        cost_nanousd = bill.settle(None if is_broken else Usage(0, 0))
        self.observer(
            Event("upstream_failed", {"request_id": g.request_id, "error": str(error), "detail": error.detail})
        )
        timed_out = isinstance(error, UpstreamBroken) and error.timed_out
        reason = "timeout" if timed_out else "broken" if is_broken else "not_taken"
        return problem(
            504 if timed_out else 502, UPSTREAM_ERROR, reason, str(error), extra={"cost_usd": usd_text(cost_nanousd)}
        )

    def _timed(self, response: Response, started_seconds: float) -> Response:
        response.headers["Server-Timing"] = _timing(self.clock.monotonic_seconds() - started_seconds)
        return response

    def _tell(self, name: str, who: Identity, **fields: object) -> None:
        self.observer(Event(name, {"request_id": g.request_id, "identifier": who.identifier, **fields}))


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of a model, at one price, and the most that it can use."""

    turns: tuple[Turn, ...]
    model: str
    price: Price
    most: Usage

    @property
    def highest_cost_nanousd(self) -> int:
        """What the upstream can bill at most."""
        return self.price.highest_cost_nanousd(self.most.input_tokens, self.most.output_tokens)


class Bill:
    """Settles a reservation once, at the price at which it was made; without a reservation it only adds up."""

    def __init__(self, guard: Guard, reservation: Reservation | None, price: Price, most: Usage) -> None:
        self.most = most
        self._guard = guard
        self._reservation = reservation
        self._price = price
        self._lock = threading.Lock()
        self._cost_nanousd: int | None = None

    def settle(self, usage: Usage | None) -> int:
        """Book what was used (None: nobody can know, so all of it); the amount, the first one if said again."""
        with self._lock:
            if self._cost_nanousd is not None:
                return self._cost_nanousd
            self._cost_nanousd = cost_nanousd = self._cost_of(usage)
        if self._reservation is not None:
            self._guard.settle(self._reservation, cost_nanousd)
        return cost_nanousd

    def _cost_of(self, usage: Usage | None) -> int:
        if usage is not None:
            return usage.cost_nanousd(self._price)
        return self._price.highest_cost_nanousd(self.most.input_tokens, self.most.output_tokens)


class Stream:
    """One answer on its way to the client. It is settled before its last event, or when the response closes."""

    def __init__(self, request_id: str, answer: Answer, pump: Pump, bill: Bill, observer: Observer) -> None:
        self._request_id = request_id
        self._answer = answer
        self._pump = pump
        self._bill = bill
        self._observer = observer

    def events(self) -> Iterator[bytes]:
        """The events, as they come."""
        try:
            for piece in self._pump:
                yield sse.HEARTBEAT if isinstance(piece, Silence) else sse.chunk(piece)
        except DeadlinePassed:
            yield self._broken("stream_deadline", "The answer took longer than it may, and was cut.")
        except UpstreamBroken as error:
            self._observer(
                Event(
                    "upstream_failed",
                    {"request_id": self._request_id, "error": str(error), "detail": error.detail},
                )
            )
            yield self._broken(UPSTREAM_ERROR, str(error))
        else:
            usage, cost_nanousd = self._settle()
            yield sse.complete(self._request_id, usage, cost_nanousd, self._answer.finish_reason)

    def close(self) -> None:
        """The response is over, for whatever reason."""
        self._settle()

    def _broken(self, error: str, message: str) -> bytes:
        usage, cost_nanousd = self._settle()
        return sse.broken(self._request_id, error, message, usage, cost_nanousd)

    def _settle(self) -> tuple[Usage, int]:
        self._pump.close()
        usage = self._answer.usage
        # What nobody can know is booked, and told, as the most that it can be.
        return usage or self._bill.most, self._bill.settle(usage)


def _with_headers(response: Response, reservation: Reservation | None, check_seconds: float) -> Response:
    response.headers["X-Throttle-Backend"] = UNGUARDED if reservation is None else reservation.backend
    if reservation is not None:
        response.headers["X-Cost-Reserved-USD"] = usd_text(reservation.cost_nanousd)
        response.headers["Server-Timing"] = _timing(check_seconds)
    return response


def _timing(seconds: float) -> str:
    return f"throttle;dur={seconds * 1_000:.3f}"


def _challenge_refused(reason: str, message: str) -> Response:
    return problem(403, INVALID_CHALLENGE, reason, message)


def _unavailable(error: ThrottleUnavailable) -> Response:
    message = f"This service cannot check its budgets: {error}. Please try again later."
    return problem(503, THROTTLE_UNAVAILABLE, "store", message, retry_after_seconds=error.retry_after_seconds)


_CHALLENGE_ANSWERS: dict[ChallengeResult, Callable[[], Response | None]] = {
    ChallengeResult.GOOD: lambda: None,
    ChallengeResult.UNKNOWN: lambda: _challenge_refused(
        "unknown", "This challenge was never given, was used, or is over: get a new one."
    ),
    ChallengeResult.MISMATCH: lambda: _challenge_refused(
        "mismatch", "This challenge was given to somebody else: get your own."
    ),
}


def make_chat(room: ChatRoom) -> Blueprint:
    """The blueprint ``chat``."""
    blueprint = Blueprint("chat", __name__)
    blueprint.add_url_rule("/api/v1/chat/stream", "stream", room.stream, methods=["POST"])
    return blueprint
