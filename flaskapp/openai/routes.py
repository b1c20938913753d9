"""The routes for OpenAI's clients: the same guard in front of the same model, in OpenAI's words."""

import json
from collections.abc import Callable
from dataclasses import dataclass

from flask import Blueprint, Response, g, request

from backends.clock import US_PER_SECOND, Clock
from backends.pricing.prices import PriceBook
from flaskapp.answers.admission import Admission, CostBound
from flaskapp.answers.meter import Meter, slices_of
from flaskapp.answers.stream import Stream, StreamContext, call_model
from flaskapp.http.api_keys import ApiKeys
from flaskapp.http.headers import read_idempotency
from flaskapp.http.openai_errors import PREFIX
from flaskapp.http.refusals import problem
from flaskapp.llm import Model, ModelRequest, Piece, Usage
from flaskapp.openai.body import Bounds, CompletionBody, read_completion_body
from flaskapp.openai.events import CompletionStreamFormat
from flaskapp.settings import LiveSettings

ROUTE = f"{PREFIX}/chat/completions"


@dataclass(frozen=True, slots=True)
class OpenAIRoutes:
    """The ``/v1`` endpoints and what they need; the application has one."""

    admission: Admission
    keys: ApiKeys
    model: Model
    prices: PriceBook
    default_model: str
    owner: str
    stream_deadline_seconds: int
    settings: Callable[[], LiveSettings]
    context: StreamContext
    clock: Clock

    def complete(self) -> Response:
        """``POST /v1/chat/completions``."""
        who = self.keys.identify(request)
        settings = self.settings()
        body = read_completion_body(request, self._bounds(settings))
        idempotency = read_idempotency(request, who.identifier, ROUTE, body.text)
        admitted = self.admission.reserve(who, self._cost_bound(body, settings), settings, idempotency)
        if isinstance(admitted, Response):
            return admitted
        return admitted.respond(lambda meter: (self._stream if body.stream else self._whole)(body, meter))

    def models(self) -> Response:
        """``GET /v1/models``."""
        self.keys.identify(request)
        return _json({"object": "list", "data": [self._card(model) for model in self.prices.models]})

    def one_model(self, name: str) -> Response:
        """``GET /v1/models/<name>``."""
        self.keys.identify(request)
        if self.prices.offers(name):
            return _json(self._card(name))
        extra = {"field": "model", "code": "model_not_found"}
        return problem(404, "not_found", "not_found", "This model is not offered here.", extra=extra)

    def _bounds(self, settings: LiveSettings) -> Bounds:
        return Bounds(
            default_model=self.default_model,
            models=self.prices.models,
            max_tokens=settings.llm_max_tokens,
            max_input_tokens=settings.llm_max_input_tokens,
            max_choices=self.model.max_choices,
        )

    def _cost_bound(self, body: CompletionBody, settings: LiveSettings) -> CostBound:
        """The most that it can cost: the input once, and every choice as long as it may be."""
        price = self.prices.price(body.model, self.clock.now_us())
        max_usage = Usage(body.input_tokens, body.choices * body.max_tokens)
        # What is not streamed can be neither counted nor cut while it runs.
        return CostBound(price, max_usage, slices_of(settings, body.model, body.choices) if body.stream else None)

    def _stream(self, body: CompletionBody, meter: Meter) -> Response:
        deadline_at_seconds = self.clock.monotonic_seconds() + self.stream_deadline_seconds
        model_request = self._model_request(body)
        answer = call_model(
            lambda: self.model.open(model_request), self.context.stopping, drop=lambda late: late.close()
        )
        created_seconds = self.clock.now_us() // US_PER_SECOND
        stream_format = CompletionStreamFormat(
            g.request_id, body.model, created_seconds, include_usage=body.include_usage
        )
        return Stream(
            g.request_id, answer, meter, stream_format, self.context, deadline_at_seconds=deadline_at_seconds
        ).response()

    def _whole(self, body: CompletionBody, meter: Meter) -> Response:
        model_request = self._model_request(body)
        completed = call_model(lambda: self.model.complete(model_request), self.context.stopping)
        # What exceeds the maximum can no longer be cut, but it is counted.
        meter.count(Piece("", 0, completed.seen_tokens))
        meter.settle(completed.usage)
        return _json(completed.body)

    def _model_request(self, body: CompletionBody) -> ModelRequest:
        return ModelRequest(
            model=body.model,
            messages=body.messages,
            max_tokens=body.max_tokens,
            input_tokens=body.input_tokens,
            deadline_seconds=self.stream_deadline_seconds,
            choices=body.choices,
            options=body.options,
        )

    def _card(self, model: str) -> dict[str, object]:
        # When a model was made is not known here; the official client needs a number.
        return {"id": model, "object": "model", "created": 0, "owned_by": self.owner}


def _json(body: dict[str, object]) -> Response:
    response = Response(json.dumps(body), mimetype="application/json")
    response.headers["Cache-Control"] = "no-store"
    return response


def make_openai_api(routes: OpenAIRoutes) -> Blueprint:
    """The blueprint ``openai``."""
    blueprint = Blueprint("openai", __name__)
    blueprint.add_url_rule(ROUTE, "complete", routes.complete, methods=["POST"])
    blueprint.add_url_rule(f"{PREFIX}/models", "models", routes.models, methods=["GET"])
    blueprint.add_url_rule(f"{PREFIX}/models/<path:name>", "one_model", routes.one_model, methods=["GET"])
    return blueprint
