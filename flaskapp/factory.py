"""Makes the application: everything is wired together here, and nowhere else."""

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, cast

from flask import Blueprint, Flask, Response, g
from flask.globals import request_ctx
from werkzeug.exceptions import NotFound

from backends import open_backend
from backends.budgets import SECONDS_PER_HOUR
from backends.clock import Clock, SystemClock
from backends.contract import Event, Observer
from backends.errors import ConfigurationError, StoreError
from backends.guard import (
    EmergencyBooking,
    EmergencyBooks,
    EmergencyBudget,
    FailurePolicy,
    Guard,
    Health,
    LeasedBudget,
)
from backends.ledger.emergency import book_emergency_spend
from backends.money import nanousd_from_usd
from backends.pricing.prices import PriceBook
from backends.pricing.token_bounds import InputTooLong, TokenBound, bound_for
from backends.store.link import Link
from flaskapp.admin import Panel, make_admin
from flaskapp.answers.admission import Admission
from flaskapp.answers.answer import AnswerContext
from flaskapp.answers.overheads import PromptOverheads
from flaskapp.chat.challenge_route import ROUTE as CHALLENGE_ROUTE
from flaskapp.chat.challenge_route import make_challenge_route
from flaskapp.chat.routes import ROUTE as CHAT_ROUTE
from flaskapp.chat.routes import SYSTEM_PROMPT, ChatRoutes, make_chat
from flaskapp.cli.commands import register_commands
from flaskapp.config import Config, load_config, shared_numbers
from flaskapp.http.api_keys import ApiKeys
from flaskapp.http.bounded_request import BoundedRequest
from flaskapp.http.challenges import Challenges
from flaskapp.http.cors import allow_origins
from flaskapp.http.forwarded import NETWORK, Forwarded
from flaskapp.http.hosts import demand_known_host
from flaskapp.http.identity import identify
from flaskapp.http.limiter import ADMIN_RATE_LIMIT, RequestLimiter
from flaskapp.http.networks import network_of
from flaskapp.http.open_bodies import OpenBodies
from flaskapp.http.openai_errors import PREFIX
from flaskapp.http.refusals import register_error_handlers
from flaskapp.llm import Model
from flaskapp.llm.builtin import BuiltinModel
from flaskapp.llm.openai_compatible import Habits, OpenAICompatibleModel
from flaskapp.openai.routes import OpenAIRoutes, make_openai_api
from flaskapp.openapi.document import Offer, make_openapi
from flaskapp.ops.aside import one_thread_aside
from flaskapp.ops.first_worker import FirstOfWorkers
from flaskapp.ops.health import make_health
from flaskapp.ops.logs import log_event
from flaskapp.ops.metrics import Metrics, make_metrics_page
from flaskapp.ops.running_redis import running_url
from flaskapp.settings import SettingsStore
from flaskapp.tollgate import Tollgate
from flaskapp.usage import ROUTE as USAGE_ROUTE
from flaskapp.usage import find_asker, make_usage

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

_WITH_NAMES = f"{PREFIX}/models/"
"""Where the rest of a path is the name of a model."""
VISITORS_ROUTES = (CHAT_ROUTE, CHALLENGE_ROUTE, USAGE_ROUTE)
"""What pages of other origins may ask, beside all of `/v1`."""
DEFAULT_REDIS_URL = "redis://127.0.0.1:6379/0"
# What a request may wait for Redis before its answer begins: three of the longest replies that are no time-out. With
# the time-out that an ended reservation has to itself it stays below the two seconds that are promised.
REDIS_SECONDS_PER_REQUEST = 1.4


def create_app(
    config: Config | None = None,
    *,
    clock: Clock | None = None,
    before_each_send: Callable[[bytes], None] | None = None,
) -> Flask:
    """Make the application; nothing runs in the background until its first request, or `Tollgate.start`.

    Args:
        config: the environment's, unless another is handed in.
        clock: the time.
        before_each_send: called right before each round trip to Redis, with what is sent.

    Raises:
        ConfigurationError: a value cannot be used, or the server is too old; one line.
    """
    config = config or load_config()
    clock = clock or SystemClock()
    metrics = Metrics(shared_numbers(), config.throttle_backend, config.llm_models)
    tollgate = _make_tollgate(config, clock, metrics, before_each_send)
    tollgate.metrics_failure = metrics.failure
    _refuse_old_server(tollgate.link)
    app = Flask(__name__, static_folder=None)
    app.request_class = BoundedRequest.of(tollgate.bodies, config.max_request_bytes)
    # A path with two slashes is none of ours: 404 as any other, and no redirect in HTML.
    app.url_map.merge_slashes = False
    app.extensions["tollgate"] = tollgate
    _register_requests(app, tollgate)
    _register_routes(app, tollgate, metrics, clock)
    register_commands(app, tollgate)
    app.wsgi_app = _entrance(app.wsgi_app, tollgate)  # type: ignore[method-assign, assignment]
    return app


def _make_tollgate(
    config: Config, clock: Clock, metrics: Metrics, before_each_send: Callable[[bytes], None] | None
) -> Tollgate:
    def observer(event: Event) -> None:
        log_event(event)
        metrics.observe(event)

    link = Link(
        config.redis_url or running_url(config.data_dir) or DEFAULT_REDIS_URL,
        clock=clock,
        observer=observer,
        before_each_send=_delayed(config.redis_delay_ms / 1_000, before_each_send),
    )
    settings = SettingsStore(link, config.live_baseline, observer)
    guard = _make_guard(config, link, settings, clock, observer)
    bodies = OpenBodies(clock, config.request_body_seconds)
    overheads = PromptOverheads(
        link,
        config.llm_models,
        config.llm_prompt_overhead_tokens,
        lambda: settings.current.values.llm_max_input_tokens,
        observer,
    )
    model, prices = _make_model(config, clock, observer), _make_prices(config)
    return Tollgate(config, link, settings, guard, observer, model, prices, bodies, overheads)


def _delayed(seconds: float, then: Callable[[bytes], None] | None) -> Callable[[bytes], None] | None:
    """What `REDIS_DELAY_MS` adds to each round trip of the thread that sends, and of no other."""
    if not seconds:
        return then

    def wait(packed: bytes) -> None:
        sleep(seconds)
        if then is not None:
            then(packed)

    return wait


def _entrance(wsgi_app: "WSGIApplication", tollgate: Tollgate) -> "WSGIApplication":
    """Note who calls, and bound what a request waits for Redis until its answer begins; while that runs, no longer."""
    link, hops, prefix = tollgate.link, tollgate.config.trusted_proxy_hops, tollgate.config.network_ipv6_prefix
    ignored, unreadable, longer = (FirstOfWorkers(f"forwarded-{word}") for word in ("ignored", "unreadable", "longer"))

    def report_unreadable() -> None:
        if unreadable.is_first():
            tollgate.emit("forwarded_unreadable")

    def report_longer() -> None:
        if longer.is_first():
            tollgate.emit("forwarded_longer")

    forwarded = Forwarded(hops, prefix, report_unreadable, report_longer) if hops else None

    def run(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        if forwarded is not None:
            environ[NETWORK] = forwarded.network(environ)
        else:
            environ[NETWORK] = network_of(environ.get("REMOTE_ADDR"), prefix)
            if "HTTP_X_FORWARDED_FOR" in environ and ignored.is_first():
                tollgate.emit("forwarded_ignored")
        with link.within(REDIS_SECONDS_PER_REQUEST):
            return wsgi_app(environ, start_response)

    return run


def _make_guard(config: Config, link: Link, settings: SettingsStore, clock: Clock, observer: Observer) -> Guard:
    primary = open_backend(config.throttle_backend, link, clock)
    fallback = open_backend("memory", link, clock)

    def policy() -> FailurePolicy:
        values = settings.current.values
        return FailurePolicy(values.throttle_on_error == "open", nanousd_from_usd(values.fail_open_budget_usd))

    guard = Guard(
        primary,
        fallback,
        link=None if config.throttle_backend == "memory" else link,
        emergency=LeasedBudget(EmergencyBudget(emergency_file(config), clock), one_thread_aside),
        clock=clock,
        observer=observer,
        policy=policy,
    )
    if primary.keeps_our_layout and config.throttle_backend != "memory":
        books = EmergencyBooks(emergency_file(config, "books"))
        guard.book_spend_with(_make_booking(books, link, observer))
    return guard


def _make_booking(books: EmergencyBooks, link: Link, observer: Observer) -> EmergencyBooking:
    def report(hour: int, change_nanousd: int) -> None:
        began = datetime.fromtimestamp(hour * SECONDS_PER_HOUR, UTC)
        observer(Event("emergency_booked", {"hour": f"{began:%Y-%m-%dT%H}", "change_nanousd": change_nanousd}))

    return EmergencyBooking(books, partial(book_emergency_spend, link), one_thread_aside, report)


def emergency_file(config: Config, kind: str = "budget") -> Path:
    """Of an instance, which is what listens at one address: its workers share it, and a restart finds it again."""
    name = f"emergency-{kind}-{config.host}-{config.port}.json".replace(":", "_").replace("/", "_")
    return config.data_dir / name


def _make_model(config: Config, clock: Clock, observer: Observer) -> Model:
    if config.llm_base_url is None:
        return BuiltinModel(config.demo_tokens_per_second, clock=clock)
    key = config.llm_api_key.get_secret_value() if config.llm_api_key else None
    habits = Habits(config.llm_auth_header, config.llm_max_tokens_parameter, config.llm_stream_usage, config.llm_proxy)
    return OpenAICompatibleModel(config.llm_base_url, key, clock=clock, habits=habits, observer=observer)


def _make_prices(config: Config) -> PriceBook:
    prices = (config.llm_price_input_usd_per_mtok, config.llm_price_output_usd_per_mtok)
    override = (prices[0], prices[1]) if prices[0] is not None and prices[1] is not None else None
    return PriceBook(config.llm_provider, config.llm_models, override)


def _refuse_old_server(link: Link) -> None:
    # That Redis is away is no reason not to start: the guard knows what to do then. One in this process has no version.
    if not link.place.startswith("fake:"):
        with suppress(StoreError):
            link.check_version()


def _register_requests(app: Flask, tollgate: Tollgate) -> None:
    register_error_handlers(app)

    @app.before_request
    def begin() -> None:
        if not tollgate.has_started:
            tollgate.start()
        g.request_id = os.urandom(16).hex()
        # Set by the request limiter, unless it cannot count.
        g.who = None
        environ = request_ctx.request.environ
        raw_path = environ.get("RAW_URI", "").partition("?")[0]
        is_escaped = ("%" in raw_path or "#" in raw_path) and not raw_path.startswith(_WITH_NAMES)
        if is_escaped or environ["PATH_INFO"].startswith("//"):
            # The framework would take it for another one, which a rule of a proxy in front may be about.
            raise NotFound

    if tollgate.config.mode == "development":
        demand_known_host(app, (tollgate.config.host, *tollgate.config.allowed_hosts))
    if tollgate.config.cors_origins:
        allow_origins(app, tollgate.config.cors_origins, VISITORS_ROUTES)

    @app.after_request
    def end(response: Response) -> Response:
        response.headers["X-Request-ID"] = g.request_id
        sent = cast("BoundedRequest", request_ctx.request)
        if not sent.is_read and ("CONTENT_LENGTH" in sent.environ or "HTTP_TRANSFER_ENCODING" in sent.environ):
            response.call_on_close(sent.end_unread)
        return response


def _register_routes(app: Flask, tollgate: Tollgate, metrics: Metrics, clock: Clock) -> None:
    config, settings, guard = tollgate.config, tollgate.settings, tollgate.guard
    challenges = Challenges(tollgate.link)
    keys = config.api_keys or ApiKeys()
    chat = _make_chat_routes(tollgate, challenges, clock)
    openai = _make_openai_routes(chat, keys, config.llm_provider)
    limited = {
        "chat": make_chat(chat),
        "challenges": make_challenge_route(challenges, lambda: settings.current.values.throttle_on_error == "closed"),
        "openai": make_openai_api(openai),
        "usage": make_usage(guard, lambda: settings.current.values, keys, clock),
        "admin": _make_admin(tollgate, clock),
    }
    limiter = RequestLimiter(app, tollgate.link, clock, lambda: settings.current.values.network_rate_limit)
    _limit_rates(limiter, limited, settings, keys)
    pages = [make_metrics_page(metrics), _make_openapi(openai, settings)]
    for page in pages:
        limiter.limit_network(page)

    def look() -> None:
        guard.look(settings.current.values.plan.of({}, clock.now_us()))

    for blueprint in (*limited.values(), *pages, make_health(guard, lambda: tollgate.link.is_up, look)):
        app.register_blueprint(blueprint)


def _make_chat_routes(tollgate: Tollgate, challenges: Challenges, clock: Clock) -> ChatRoutes:
    config, settings = tollgate.config, tollgate.settings
    prices = tollgate.prices
    prompt = SYSTEM_PROMPT if config.llm_system_prompt is None else config.llm_system_prompt.strip()
    for model in prices.models:
        # A vocabulary takes a tenth of a second to load: here, and not while a visitor waits.
        _refuse_long_prompt(bound_for(model), prompt, config.live_baseline.values.llm_max_input_tokens)
    deadline_seconds = config.stream_deadline_seconds
    without_usage = {model: FirstOfWorkers(f"usage-missing-{number}") for number, model in enumerate(prices.models)}
    context = AnswerContext(
        clock,
        tollgate.observer,
        tollgate.answers,
        lambda: settings.current.values.drain_seconds,
        upstream=config.upstream,
        is_first_without_usage=lambda model: model not in without_usage or without_usage[model].is_first(),
        learn_overhead=tollgate.overheads.learn,
    )
    return ChatRoutes(
        admission=Admission(
            tollgate.guard,
            lambda: settings.current.values,
            deadline_seconds,
            context,
            books_seen=config.llm_without_usage == "seen",
        ),
        challenges=challenges,
        model=tollgate.model,
        prices=prices,
        overheads=tollgate.overheads.tokens,
        default_model=config.llm_model,
        system_prompt=prompt,
        stream_deadline_seconds=deadline_seconds,
        settings=lambda: settings.current.values,
        clock=clock,
        observer=tollgate.observer,
    )


def _refuse_long_prompt(bound: TokenBound, prompt: str, max_input_tokens: int) -> None:
    try:
        bound.fit(prompt, [], "", max_input_tokens)
    except InputTooLong as error:
        allowed = f"a text that fits into LLM_MAX_INPUT_TOKENS, which is {max_input_tokens}"
        raise ConfigurationError(f"LLM_SYSTEM_PROMPT: {allowed}; got {len(prompt)} characters") from error


def _make_openai_routes(chat: ChatRoutes, keys: ApiKeys, owner: str) -> OpenAIRoutes:
    """In front of the same model as the chat, with the same admission."""
    return OpenAIRoutes(
        admission=chat.admission,
        keys=keys,
        model=chat.model,
        prices=chat.prices,
        overheads=chat.overheads,
        default_model=chat.default_model,
        owner=owner,
        stream_deadline_seconds=chat.stream_deadline_seconds,
        settings=chat.settings,
        clock=chat.clock,
    )


def _make_openapi(openai: OpenAIRoutes, settings: SettingsStore) -> Blueprint:
    offer = Offer(openai.prices.models, openai.default_model, openai.model.max_choices, openai.keys.is_open)
    return make_openapi(offer, lambda: settings.current.values.llm_max_tokens, settings.table)


def _make_admin(tollgate: Tollgate, clock: Clock) -> Blueprint:
    config, guard = tollgate.config, tollgate.guard
    panel = Panel(
        tollgate.settings,
        mode=config.mode,
        backend_name=guard.backend_name,
        clock=clock,
        link=tollgate.link,
        is_degraded=lambda: guard.health() is Health.DEGRADED,
    )
    token = config.admin_token.get_secret_value() if config.admin_token else None
    return make_admin(panel, token, config.data_dir if config.mode == "development" else None)


def _limit_rates(
    limiter: RequestLimiter, blueprints: Mapping[str, Blueprint], settings: SettingsStore, keys: ApiKeys
) -> None:
    rate: Callable[[], str] = lambda: settings.current.values.chat_rate_limit  # noqa: E731 - as the others here
    limiter.limit_blueprint(blueprints["chat"], rate, identify, is_made_up=True)
    limiter.limit_blueprint(blueprints["challenges"], rate, identify, is_made_up=True)
    limiter.limit_blueprint(blueprints["openai"], rate, keys.find)
    limiter.limit_blueprint(blueprints["usage"], rate, partial(find_asker, keys=keys), is_made_up=True)
    limiter.limit_blueprint(blueprints["admin"], lambda: ADMIN_RATE_LIMIT, lambda _: None)
