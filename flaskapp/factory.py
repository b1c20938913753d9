"""The lobby: everything is made and wired here, and nowhere else."""

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from flask import Flask, Response, g, request
from werkzeug.middleware.proxy_fix import ProxyFix

from backends import open_backend
from backends.clock import Clock, SystemClock
from backends.contract import Event, Observer
from backends.errors import StoreError
from backends.guard import EmergencyBudget, FailurePolicy, Guard, Health
from backends.money import nanousd_from_usd
from backends.pricing.prices import PriceBook
from backends.pricing.token_bounds import bound_for
from backends.store.link import Link
from backends.store.scripts import load_all
from flaskapp.admin import Panel, RaceRunner, make_admin
from flaskapp.admin.sessions import EndedSessions
from flaskapp.answers.admission import Admission
from flaskapp.answers.stream import Stopping, StreamContext
from flaskapp.chat.challenge_route import make_challenge_route
from flaskapp.chat.routes import ChatRoutes, make_chat
from flaskapp.cli.ledger import make_ledger_cli
from flaskapp.cli.scripts import make_scripts_cli
from flaskapp.cli.settings import OF_THIS_SHELL, SettingsView, make_settings_cli
from flaskapp.config import Config, load_config, metrics_directory
from flaskapp.http.api_keys import ApiKeys
from flaskapp.http.bounded_request import BoundedRequest
from flaskapp.http.challenges import Challenges
from flaskapp.http.limiter import ADMIN_RATE_LIMIT, make_limiter, network_key, network_rate
from flaskapp.http.refusals import register_error_handlers
from flaskapp.lab.explore_command import make_explore_cli
from flaskapp.lab.race_command import make_race_cli
from flaskapp.llm import Model
from flaskapp.llm.builtin import BuiltinModel
from flaskapp.llm.openai_compatible import OpenAICompatibleModel
from flaskapp.openai.routes import OpenAIRoutes, make_openai_api
from flaskapp.ops.embedded_redis import running_url
from flaskapp.ops.health import make_health
from flaskapp.ops.logs import log_event, set_up_logging
from flaskapp.ops.metrics import Metrics, make_metrics_page
from flaskapp.ops.once import Once
from flaskapp.ops.running_services import served
from flaskapp.settings import SettingsStore
from flaskapp.usage import make_usage, usage_rate_key

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

DEFAULT_REDIS_URL = "redis://127.0.0.1:6379/0"
MAX_BODY_BYTES = 1_000_000
# All that a request asks Redis before its answer begins: three of the longest replies that are no time-out. With the
# time-out that an ended reservation has to itself it stays below the two seconds that are promised.
REDIS_SECONDS_PER_REQUEST = 1.4


@dataclass
class Tollgate:
    """What an application holds: ``app.extensions["tollgate"]``."""

    config: Config
    link: Link
    settings: SettingsStore
    guard: Guard
    observer: Observer
    model: Model
    stopping: Stopping = field(default_factory=Stopping)
    _started: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> None:
        """Begin to watch the settings and to write the log; in each worker, after the fork. May be said twice."""
        with self._lock:
            if self._started:
                return
            self._started = True
        set_up_logging(self.config.log_format, self.config.log_level)
        self._tell_of_digests()
        # Here, and not while the first visitor waits.
        with contextlib.suppress(StoreError):
            self.link.run(load_all)
            self.link.time_us()
        self.settings.refresh()
        self.settings.start_polling()

    def stop(self) -> None:
        """End what runs in the background."""
        self.settings.stop()
        self.guard.close()
        self.link.close()
        self.model.close()

    def _tell_of_digests(self) -> None:
        count = self.config.api_keys.listed_digests if self.config.api_keys else 0
        if count and _once("keys-taken-as-digests").is_first():
            self.tell("keys_taken_as_digests", keys=count)

    def tell(self, name: str, **fields: object) -> None:
        """Tell the observers."""
        self.observer(Event(name, fields))


def create_app(
    config: Config | None = None, *, clock: Clock | None = None, sleep: Callable[[float], None] = time.sleep
) -> Flask:
    """The application.

    Args:
        config: the environment's, unless another is handed in.
        clock: the time.
        sleep: how to wait before each round trip to Redis where `REDIS_DELAY_MS` asks for it.

    Raises:
        ConfigurationError: a value cannot be used, or the server is too old; one line.
    """
    config = config or load_config()
    clock = clock or SystemClock()
    app = Flask(__name__, static_folder=None)
    app.request_class = BoundedRequest
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY_BYTES
    # A path with two slashes is none of ours: 404 as any other, and no redirect in HTML.
    app.url_map.merge_slashes = False
    metrics = Metrics(metrics_directory())

    def observer(event: Event) -> None:
        log_event(event)
        metrics.observe(event)

    link = Link(
        config.redis_url or running_url(config.data_dir) or DEFAULT_REDIS_URL,
        clock=clock,
        observer=observer,
        before_each_send=_delay(config, sleep),
    )
    settings = SettingsStore(link, config.live_baseline, observer)
    guard = _make_guard(config, link, settings, clock, observer)
    tollgate = Tollgate(config, link, settings, guard, observer, _make_model(config, clock))
    app.extensions["tollgate"] = tollgate
    _refuse_old_server(link)
    _register_requests(app, tollgate)
    _register_rooms(app, tollgate, metrics, clock)
    _register_commands(app, tollgate)
    app.wsgi_app = _hurried(app.wsgi_app, link)  # type: ignore[method-assign, assignment]
    if config.trusted_proxy_hops:
        hops = config.trusted_proxy_hops
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=hops, x_proto=hops, x_host=0)  # type: ignore[method-assign]
    return app


def _delay(config: Config, sleep: Callable[[float], None]) -> Callable[[bytes], None] | None:
    """A network in front of Redis, of `REDIS_DELAY_MS`; it holds up who asks and nobody else."""
    delay_seconds = config.redis_delay_ms / 1_000
    return (lambda _: sleep(delay_seconds)) if delay_seconds else None


def _hurried(wsgi_app: "WSGIApplication", link: Link) -> "WSGIApplication":
    """Until an answer begins its request may wait so long for Redis; not while the answer runs."""

    def run(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        with link.within(REDIS_SECONDS_PER_REQUEST):
            return wsgi_app(environ, start_response)

    return run


def _make_guard(config: Config, link: Link, settings: SettingsStore, clock: Clock, observer: Observer) -> Guard:
    primary = open_backend(config.throttle_backend, link, clock)
    fallback = open_backend("memory", link, clock)
    # An instance is who listens at one address: its workers share the file, and a restart finds it again.
    file_name = f"emergency-budget-{config.host}-{config.port}.json".replace(":", "_").replace("/", "_")

    def policy() -> FailurePolicy:
        values = settings.current.values
        return FailurePolicy(values.throttle_on_error == "open", nanousd_from_usd(values.fail_open_budget_usd))

    return Guard(
        primary,
        fallback,
        link=None if config.throttle_backend == "memory" else link,
        emergency=EmergencyBudget(config.data_dir / file_name, clock),
        clock=clock,
        observer=observer,
        policy=policy,
    )


def _make_model(config: Config, clock: Clock) -> Model:
    if config.llm_base_url is None:
        return BuiltinModel(config.demo_tokens_per_second, clock=clock)
    key = config.llm_api_key.get_secret_value() if config.llm_api_key else None
    return OpenAICompatibleModel(config.llm_base_url, key, clock=clock)


def _make_prices(config: Config) -> PriceBook:
    prices = (config.llm_price_input_usd_per_mtok, config.llm_price_output_usd_per_mtok)
    override = (prices[0], prices[1]) if prices[0] is not None and prices[1] is not None else None
    return PriceBook(config.llm_provider, config.llm_models, override)


def _refuse_old_server(link: Link) -> None:
    try:
        link.check_version()
    except StoreError:
        # That Redis is away is no reason not to start: the guard knows what to do then.
        return


def _once(name: str) -> Once:
    """Once a start, whatever the number of workers."""
    shared = metrics_directory()
    return Once(Path(shared) / f"{name}.told" if shared else None)


def _register_requests(app: Flask, tollgate: Tollgate) -> None:
    register_error_handlers(app)
    warning = _once("forwarded-ignored")

    @app.before_request
    def begin() -> None:
        tollgate.start()
        g.request_id = uuid.uuid4().hex
        if not tollgate.config.trusted_proxy_hops and "X-Forwarded-For" in request.headers and warning.is_first():
            tollgate.tell("forwarded_ignored")

    @app.after_request
    def end(response: Response) -> Response:
        response.headers["X-Request-ID"] = g.request_id
        return response


def _register_rooms(app: Flask, tollgate: Tollgate, metrics: Metrics, clock: Clock) -> None:
    config, link, settings, guard = tollgate.config, tollgate.link, tollgate.settings, tollgate.guard
    challenges = Challenges(link)
    limiter = make_limiter(app, link, clock)
    prices = _make_prices(config)
    for model in prices.models:
        # A vocabulary takes a tenth of a second to load: here, and not while a visitor waits.
        bound_for(model)
    admission = Admission(
        guard, lambda: settings.current.values, config.stream_deadline_seconds, clock, tollgate.observer
    )
    room = ChatRoutes(
        admission=admission,
        challenges=challenges,
        model=tollgate.model,
        prices=prices,
        default_model=config.llm_model,
        stream_deadline_seconds=config.stream_deadline_seconds,
        settings=lambda: settings.current.values,
        context=StreamContext(
            clock, tollgate.observer, tollgate.stopping, lambda: settings.current.values.drain_seconds
        ),
        clock=clock,
        observer=tollgate.observer,
    )
    keys = config.api_keys or ApiKeys()
    panel = Panel(
        settings,
        mode=config.mode,
        backend_name=guard.backend_name,
        clock=clock,
        sessions=EndedSessions(link),
        is_degraded=lambda: guard.health() is Health.DEGRADED,
    )
    token = config.admin_token.get_secret_value() if config.admin_token else None
    chat = make_chat(room)
    visitors = make_challenge_route(challenges, lambda: settings.current.values.throttle_on_error == "closed")
    usage = make_usage(guard, lambda: settings.current.values, keys)
    openai_api = make_openai_api(_openai_room(room, keys, config.llm_provider))
    admin = make_admin(panel, token, RaceRunner(config.data_dir) if config.mode == "development" else None)
    for blueprint in (chat, visitors):
        limiter.limit(lambda: settings.current.values.chat_rate_limit)(blueprint)
    limiter.limit(lambda: settings.current.values.chat_rate_limit, key_func=lambda: keys.rate_key(request))(openai_api)
    limiter.limit(lambda: settings.current.values.chat_rate_limit, key_func=lambda: usage_rate_key(request, keys))(
        usage
    )
    # Each challenge is a key that lives for minutes, and a fresh hash costs nothing.
    limiter.limit(lambda: network_rate(settings.current.values.chat_rate_limit), key_func=network_key)(visitors)
    limiter.limit(ADMIN_RATE_LIMIT, key_func=network_key)(admin)
    for blueprint in (
        chat,
        visitors,
        usage,
        openai_api,
        admin,
        make_health(guard, lambda: link.is_up),
        make_metrics_page(metrics),
    ):
        app.register_blueprint(blueprint)


def _openai_room(chat: ChatRoutes, keys: ApiKeys, owner: str) -> OpenAIRoutes:
    """In front of the same model as the chat, at the same admission."""
    return OpenAIRoutes(
        admission=chat.admission,
        keys=keys,
        model=chat.model,
        prices=chat.prices,
        default_model=chat.default_model,
        owner=owner,
        stream_deadline_seconds=chat.stream_deadline_seconds,
        settings=chat.settings,
        context=chat.context,
        clock=chat.clock,
    )


def _settings_view(tollgate: Tollgate) -> SettingsView:
    """As the service of this clone has them that runs beside this command; where none does, as this shell has them."""
    config = tollgate.config
    beside = served(config.data_dir) if config.redis_url is None else []
    if not beside:
        return SettingsView(tollgate.settings, config.mode)
    its_config, here = load_config(beside[0].variables), config.live_baseline
    # What somebody sets for this very command is what they ask about.
    own = {name: getattr(here.values, name) for name, source in here.sources.items() if source == "environment"}
    baseline = replace(
        its_config.live_baseline,
        values=its_config.live_baseline.values.model_copy(update=own),
        sources={**its_config.live_baseline.sources, **{name: here.sources[name] for name in own}},
    )
    whose = f"{OF_THIS_SHELL} and that" if own else "the environment"
    whose += f" of the service on port {beside[0].port}"
    if len(beside) > 1:
        whose += f", the last started of {len(beside)}"
    return SettingsView(SettingsStore(tollgate.link, baseline, tollgate.observer), its_config.mode, whose)


def _register_commands(app: Flask, tollgate: Tollgate) -> None:
    app.cli.add_command(make_settings_cli(lambda: _settings_view(tollgate)))
    app.cli.add_command(make_scripts_cli(lambda: tollgate.link))
    app.cli.add_command(
        make_ledger_cli(
            lambda: tollgate.link,
            lambda: tollgate.settings.refresh().values.limits,
            tollgate.config.throttle_backend,
        )
    )
    app.cli.add_command(make_race_cli())
    app.cli.add_command(make_explore_cli())
