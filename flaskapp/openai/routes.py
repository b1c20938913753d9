"""The routes for OpenAI's clients: the same guard in front of the same model, in OpenAI's words.

A completion goes the same way as a chat: identify, validate, price, reserve, then refuse or answer.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flask import Blueprint, Response, g, request
from flask.globals import request_ctx

from backends.clock import US_PER_SECOND, Clock
from backends.pricing.prices import PriceBook
from flaskapp.answers.admission import Admission
from flaskapp.answers.characters import one_line, with_whole_characters
from flaskapp.answers.meter import CostBound, slices_of
from flaskapp.http.answered import Answered
from flaskapp.http.api_keys import ApiKeys
from flaskapp.http.headers import IDEMPOTENCY_VARIABLE, read_idempotency
from flaskapp.http.openai_errors import PREFIX
from flaskapp.http.refusals import problem
from flaskapp.llm import Completed, Model, ModelRequest, Usage
from flaskapp.openai.body import Bounds, read_completion_body
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
    overheads: Mapping[str, int]
    """By model, the tokens that its template adds to a prompt."""
    default_model: str
    owner: str
    stream_deadline_seconds: int
    settings: Callable[[], LiveSettings]
    clock: Clock

    def complete(self) -> Response:
        """``POST /v1/chat/completions``."""
        # Itself: each look through the proxy takes as long as what is looked up.
        asked = request_ctx.request
        # The request limiter has found out, unless no registered key came.
        who = g.who or self.keys.identify(asked)
        settings = self.settings()
        body = read_completion_body(asked, self._bounds(settings))
        price = self.prices.price(body.model, self.clock.now_us())
        # What is not streamed can be neither counted nor cut while it runs.
        slices = slices_of(settings, body.model, body.choices) if body.stream else None
        overhead_tokens = self.overheads[body.model]
        max_usage = Usage(body.input_tokens + overhead_tokens, body.choices * body.max_tokens)
        cost_bound = CostBound(price, max_usage, slices, overhead_tokens)
        idempotency = None
        if IDEMPOTENCY_VARIABLE in asked.environ:
            idempotency = read_idempotency(asked, who.identifier, ROUTE, body.text)
        upstream = self.model.ask(
            ModelRequest(
                model=body.model,
                messages=body.messages,
                max_tokens=body.max_tokens,
                input_tokens=body.input_tokens,
                deadline_seconds=self.stream_deadline_seconds,
                choices=body.choices,
                options=body.options,
            )
        )
        answer = self.admission.admit(who, upstream, cost_bound, settings, idempotency)
        if isinstance(answer, Response):
            return answer
        if not body.stream:
            return answer.whole(_completed)
        created_seconds = self.clock.now_us() // US_PER_SECOND
        return answer.stream(
            CompletionStreamFormat(g.request_id, body.model, created_seconds, include_usage=body.include_usage)
        )

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
            long_cache_models=self.prices.long_cache_models,
        )

    def _card(self, model: str) -> dict[str, object]:
        # When a model was made is not known here; the official client needs a number.
        return {"id": model, "object": "model", "created": 0, "owned_by": self.owner}


def _completed(completed: Completed) -> Response:
    """What the upstream wrote, to the letter where it is clean JSON."""
    return _response(one_line(completed.data)) if completed.data else _json(with_whole_characters(completed.body, {}))


def _json(body: dict[str, object]) -> Response:
    return _response(json.dumps(body).encode())


def _response(content: bytes) -> Response:
    return Answered(content, 200, [("Cache-Control", "no-store")], content_type="application/json")


def make_openai_api(routes: OpenAIRoutes) -> Blueprint:
    """The blueprint ``openai``."""
    blueprint = Blueprint("openai", __name__)
    blueprint.add_url_rule(ROUTE, "complete", routes.complete, methods=["POST"])
    blueprint.add_url_rule(f"{PREFIX}/models", "models", routes.models, methods=["GET"])
    blueprint.add_url_rule(f"{PREFIX}/models/<path:name>", "one_model", routes.one_model, methods=["GET"])
    return blueprint
