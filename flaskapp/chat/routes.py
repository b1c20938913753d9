"""The chat endpoint: identify, validate, price, reserve, then refuse or stream; the answer settles when it is over."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flask import Blueprint, Response, g
from flask.globals import request_ctx

from backends.clock import Clock
from backends.contract import Event, Idempotency, Observer
from backends.errors import StoreBusy, StoreError, ThrottleUnavailable
from backends.pricing.prices import PriceBook
from backends.pricing.token_bounds import InputTooLong, Message, bound_for
from flaskapp.answers.admission import Admission
from flaskapp.answers.meter import CostBound, slices_of
from flaskapp.chat.body import read_chat_body
from flaskapp.chat.challenge_route import ROUTE as CHALLENGE_ROUTE
from flaskapp.chat.events import ChatStreamFormat
from flaskapp.http.challenges import ChallengeResult, Challenges, has_form
from flaskapp.http.headers import IDEMPOTENCY_VARIABLE, read_idempotency
from flaskapp.http.identity import HEADER, Identity, identify
from flaskapp.http.refusals import INVALID_CHALLENGE, InvalidRequest, problem, store_unavailable
from flaskapp.llm import Model, ModelRequest, Usage
from flaskapp.settings import LiveSettings

ROUTE = "/api/v1/chat/stream"
SYSTEM_PROMPT = (
    "You are a helpful assistant on a public web page, at home in Litecoin and other digital money. "
    "Answer briefly, truthfully and in the language of the question; say so when you do not know."
)
"""All that the service adds to a prompt, unless `LLM_SYSTEM_PROMPT` is another; at most 256 bytes."""
_GET_CHALLENGE = f"GET {CHALLENGE_ROUTE}"
_CHALLENGE_MESSAGES = {
    ChallengeResult.UNKNOWN: (
        f"This challenge was never given, was used, or is over: get a new one of {_GET_CHALLENGE}."
    ),
    ChallengeResult.MISMATCH: f"This challenge was given to somebody else: get your own of {_GET_CHALLENGE}.",
}


@dataclass(frozen=True, slots=True)
class ChatRoutes:
    """The chat endpoint and what it needs; the application has one."""

    admission: Admission
    challenges: Challenges
    model: Model
    prices: PriceBook
    overheads: Mapping[str, int]
    """By model, the tokens that its template adds to a prompt."""
    default_model: str
    system_prompt: str
    """Empty for none."""
    stream_deadline_seconds: int
    settings: Callable[[], LiveSettings]
    clock: Clock
    observer: Observer

    def stream(self) -> Response:
        """``POST /api/v1/chat/stream``."""
        # Itself: each look through the proxy takes as long as what is looked up.
        asked = request_ctx.request
        # The request limiter has found out, unless what was sent is malformed.
        who: Identity = g.who or identify(asked)
        settings = self.settings()
        if settings.enable_challenge_response and not (who.challenge and has_form(who.challenge)):
            # Whatever the body is, and before it is read.
            return self.admission.timed(_without_challenge(who), self.clock.monotonic_seconds())
        body = read_chat_body(
            asked,
            default_model=self.default_model,
            models=self.prices.models,
            max_tokens=settings.llm_max_tokens,
        )
        history = [Message(turn.role, turn.content) for turn in body.chat_history]
        try:
            messages, input_tokens = bound_for(body.model).fit(
                self.system_prompt, history, body.query, settings.llm_max_input_tokens
            )
        except InputTooLong as error:
            most = f"{settings.llm_max_input_tokens} tokens that an input may have (LLM_MAX_INPUT_TOKENS)"
            reason = f"is longer than the {most}"
            raise InvalidRequest(422, "query", reason) from error
        price = self.prices.price(body.model, self.clock.now_us())
        overhead_tokens = self.overheads[body.model]
        max_usage = Usage(input_tokens + overhead_tokens, body.max_tokens)
        cost_bound = CostBound(price, max_usage, slices_of(settings, body.model), overhead_tokens)
        idempotency = None
        if IDEMPOTENCY_VARIABLE in asked.environ:
            idempotency = read_idempotency(asked, who.identifier, ROUTE, body.text)
        if idempotency is not None or settings.enable_challenge_response:
            refused = self._refused_early(idempotency, who, settings)
            if refused is not None:
                return refused
        upstream = self.model.ask(
            ModelRequest(
                model=body.model,
                messages=[{"role": message.role, "content": message.content} for message in messages],
                max_tokens=body.max_tokens,
                input_tokens=input_tokens,
                deadline_seconds=self.stream_deadline_seconds,
            )
        )
        answer = self.admission.admit(who, upstream, cost_bound, settings, idempotency)
        return answer if isinstance(answer, Response) else answer.stream(ChatStreamFormat(g.request_id))

    def _refused_early(self, idempotency: Idempotency | None, who: Identity, settings: LiveSettings) -> Response | None:
        """The refusal for a used idempotency key, or else for the challenge; a used key uses up no challenge."""
        duplicate = self.admission.find_duplicate(idempotency, settings)
        if duplicate is not None:
            return duplicate
        started_seconds = self.clock.monotonic_seconds()
        refused = self._refused_by_challenge(who, settings)
        return None if refused is None else self.admission.timed(refused, started_seconds)

    def _refused_by_challenge(self, who: Identity, settings: LiveSettings) -> Response | None:
        if not settings.enable_challenge_response:
            return None
        try:
            result = self.challenges.consume(who.challenge or "", who.identifier, who.network)
        except StoreError as error:
            # Busy comes from our own load: if challenges were skipped then, a flood could switch them off.
            if isinstance(error, StoreBusy) or settings.throttle_on_error == "closed":
                return store_unavailable(ThrottleUnavailable("challenges cannot be checked now", 1))
            fields = {"request_id": g.request_id, "identifier": who.identifier, "error": str(error)}
            self.observer(Event("challenge_skipped", fields))
            return None
        if result is ChallengeResult.GOOD:
            return None
        return _not_accepted(result)


def _without_challenge(who: Identity) -> Response:
    if who.challenge is not None:
        return _not_accepted(ChallengeResult.UNKNOWN)
    message = f"Send {HEADER}: fp:<challenge>:<hash> with a challenge of {_GET_CHALLENGE}."
    return problem(403, INVALID_CHALLENGE, "missing", message)


def _not_accepted(result: ChallengeResult) -> Response:
    return problem(403, INVALID_CHALLENGE, result.name.lower(), _CHALLENGE_MESSAGES[result])


def make_chat(routes: ChatRoutes) -> Blueprint:
    """The blueprint ``chat``."""
    blueprint = Blueprint("chat", __name__)
    blueprint.add_url_rule(ROUTE, "stream", routes.stream, methods=["POST"])
    return blueprint
