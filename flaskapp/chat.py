"""The chat room: who asks, what it may cost at most, reserve, answer, and settle when the answer is over."""

from collections.abc import Callable
from dataclasses import dataclass

from flask import Blueprint, Request, Response, g, request

from backends.challenges import ChallengeResult, Challenges
from backends.clock import Clock
from backends.contract import Ask, Duplicate, Event, Idempotency, Observer, Refusal
from backends.errors import StoreError, ThrottleUnavailable
from backends.guard import Guard
from backends.money import usd_text
from backends.pricing import Price, PriceBook
from backends.settings import LiveSettings
from flaskapp.admission import UNGUARDED, admitted_headers, read_idempotency, timing
from flaskapp.bill import Bill, Slices, slices_of
from flaskapp.chat_body import read_chat_body
from flaskapp.identity import HEADER, Identity, identify
from flaskapp.llm import Model, ModelRequest, Turn, UpstreamBroken, UpstreamError, Usage
from flaskapp.llm.tokens import SYSTEM_PROMPT, InputTooLong, bound_for
from flaskapp.refusals import (
    INVALID_CHALLENGE,
    THROTTLE_UNAVAILABLE,
    UPSTREAM_ERROR,
    InvalidRequest,
    cost_refused,
    duplicate_refused,
    problem,
)
from flaskapp.sse import ChatVoice
from flaskapp.stream import Stream, Terms, ask_model

ROUTE = "/api/v1/chat/stream"


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
    terms: Terms
    clock: Clock
    observer: Observer

    def stream(self) -> Response:
        """``POST /api/v1/chat/stream``."""
        who = identify(request)
        settings = self.settings()
        question = self._question(request, settings)
        idempotency = read_idempotency(request, who.identifier, ROUTE, question.body_text)
        refused = self._refused_before(idempotency, who, settings)
        if refused is not None:
            return refused
        ask = self._ask(who, question, settings, idempotency)
        started_seconds = self.clock.monotonic_seconds()
        try:
            verdict = None if ask is None else self.guard.reserve(ask)
        except ThrottleUnavailable as error:
            return self._timed(_unavailable(error), started_seconds)
        if isinstance(verdict, Duplicate):
            return self._timed(duplicate_refused(verdict), started_seconds)
        if isinstance(verdict, Refusal):
            return self._timed(cost_refused(verdict), started_seconds)
        check_seconds = self.clock.monotonic_seconds() - started_seconds
        bill = Bill(
            self.guard,
            verdict,
            question.price,
            question.most,
            slices=question.slices,
            limits=lambda: self.settings().limits,
        )
        try:
            response = self._answer(question, bill)
        except UpstreamError as error:
            response = self._upstream_failed(error, bill)
        except BaseException:
            bill.settle(None)
            raise
        response.headers.extend(admitted_headers(verdict, settings.limits, check_seconds))
        return response

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
        most, slices = Usage(input_tokens, body.max_tokens), slices_of(settings, body.model)
        return Question(turns, body.model, price, most, slices, body.text)

    def _refused_before(
        self, idempotency: Idempotency | None, who: Identity, settings: LiveSettings
    ) -> Response | None:
        """A key that was used is told before a challenge is used up for it."""
        if idempotency is not None and settings.enable_cost_throttling:
            started_seconds = self.clock.monotonic_seconds()
            try:
                duplicate = self.guard.find_duplicate(idempotency)
            except ThrottleUnavailable as error:
                return self._timed(_unavailable(error), started_seconds)
            if duplicate is not None:
                return self._timed(duplicate_refused(duplicate), started_seconds)
        return self._refused_by_challenge(who, settings)

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

    def _ask(
        self, who: Identity, question: "Question", settings: LiveSettings, idempotency: Idempotency | None
    ) -> Ask | None:
        """What the guard is asked; None while cost throttling is off."""
        is_on = settings.enable_cost_throttling
        backend = self.guard.backend_name if is_on else UNGUARDED
        self._tell("check_called", who, cost_nanousd=question.first_cost_nanousd, backend=backend)
        if not is_on:
            return None
        return Ask(
            reservation_id=g.request_id,
            identifier=who.identifier,
            network=who.network,
            cost_nanousd=question.first_cost_nanousd,
            limits=settings.limits,
            open_seconds=self.stream_deadline_seconds,
            idempotency=idempotency,
        )

    def _answer(self, question: "Question", bill: Bill) -> Response:
        deadline_at_seconds = self.clock.monotonic_seconds() + self.stream_deadline_seconds
        model_request = ModelRequest(
            model=question.model,
            messages=[turn.message() for turn in question.turns],
            max_tokens=question.most.output_tokens,
            input_tokens=question.most.input_tokens,
            deadline_seconds=self.stream_deadline_seconds,
        )
        answer = ask_model(lambda: self.model.open(model_request), self.terms.stopping, drop=lambda late: late.close())
        voice = ChatVoice(g.request_id)
        return Stream(g.request_id, answer, bill, voice, self.terms, deadline_at_seconds=deadline_at_seconds).response()

    def _upstream_failed(self, error: UpstreamError, bill: Bill) -> Response:
        is_broken = isinstance(error, UpstreamBroken)
        cost_nanousd = bill.settle(None) if is_broken else bill.release()
        self.observer(
            Event("upstream_failed", {"request_id": g.request_id, "error": str(error), "detail": error.detail})
        )
        timed_out = isinstance(error, UpstreamBroken) and error.timed_out
        reason = "timeout" if timed_out else "broken" if is_broken else "not_taken"
        return problem(
            504 if timed_out else 502, UPSTREAM_ERROR, reason, str(error), extra={"cost_usd": usd_text(cost_nanousd)}
        )

    def _timed(self, response: Response, started_seconds: float) -> Response:
        response.headers["Server-Timing"] = timing(self.clock.monotonic_seconds() - started_seconds)
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
    slices: Slices | None
    body_text: str
    """The body as it was sent, in one spelling."""

    @property
    def first_cost_nanousd(self) -> int:
        """What is reserved before the model hears a word: the most that it can bill, or a first slice."""
        first = self.most if self.slices is None else self.slices.first(self.most)
        return self.price.highest_cost_nanousd(first.input_tokens, first.output_tokens)


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
    blueprint.add_url_rule(ROUTE, "stream", room.stream, methods=["POST"])
    return blueprint
