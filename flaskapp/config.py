"""What is fixed at the start: the environment, read once, here and nowhere else.

`Config` is the table of the boot variables, as `flaskapp.settings.LiveSettings` is that of the live ones.
A value that cannot be used is a `ConfigurationError` of one line: the variable, what is allowed, and the value unless
it is a secret. An empty variable counts as unset.
"""
# ruff: noqa: D102 (what a value type overrides is documented at `ValueType`)

import os
import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal, NamedTuple
from urllib.parse import urlsplit
from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined] # it is there; its stubs are not

from pydantic import BaseModel, ConfigDict, Field, SecretStr, SkipValidation

from backends.budgets import zone_of
from backends.errors import ConfigurationError, shown
from backends.store.addresses import ENCODING, is_cut_short
from flaskapp.http.api_keys import ANYONE, ApiKeys
from flaskapp.http.cors import ANY_ORIGIN
from flaskapp.http.networks import IPV6_PREFIX
from flaskapp.settings import Baseline, LiveSettings, Source, derived, settings_table
from flaskapp.value_types import Amount, Choice, ValueType, Whole, refusal_text

Mode = Literal["development", "production"]

MAX_STREAM_DEADLINE_SECONDS = 3_600
MAX_OVERHEAD_TOKENS = 1_000_000
MAX_REDIS_DELAY_MS = 100
MOST_REQUEST_BYTES = 100_000_000
MOST_REQUEST_BODY_SECONDS = 600
MAX_PROMPT_CHARACTERS = 32_000
PROXY_OF_THE_ENVIRONMENT = "environment"
_MAY_BE_EMPTY = {"LLM_SYSTEM_PROMPT"}
"""Everywhere else an empty variable counts as unset."""
_SHORTEST_SAFE_TOKEN = 16
_SWITCHES_OFF_IN_DEVELOPMENT = ("enable_cost_throttling", "enable_challenge_response")
_MAX_SECRET_CHARACTERS = 1_000
_MAX_PORT = 65_535
_USUAL_PORTS = {"http": "80", "https": "443"}
_HOST_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9_])?"
_ORIGIN = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]{0,31})://(?:[a-z0-9_](?:[a-z0-9._-]{0,251}[a-z0-9_])?|\[[0-9a-f:.]{2,45}\])"
    r"(?::(?P<port>[0-9]{1,5}))?"
)

_WITHOUT_PASSWORD = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*://)?[A-Za-z0-9_.-]*(?::[0-9]*)?(?:/[A-Za-z0-9_./-]*)?")
"""An address of a host, perhaps a port that is a number, and a path."""


@dataclass(frozen=True)
class Word(ValueType[str]):
    """A text that matches a pattern."""

    _: KW_ONLY
    pattern: str
    words: str

    @property
    def allowed(self) -> str:
        return self.words

    def read(self, value: object) -> str:
        return value if isinstance(value, str) and re.fullmatch(self.pattern, value) else self.refuse()


@dataclass(frozen=True)
class Words(ValueType[tuple[str, ...]]):
    """Texts that match a pattern, with commas between them."""

    _: KW_ONLY
    word: Word

    @property
    def allowed(self) -> str:
        return f"{self.word.words}, several with commas between them"

    def read(self, value: object) -> tuple[str, ...]:
        return tuple(map(self.word.read, value)) if isinstance(value, tuple) else self.refuse()

    def read_text(self, text: str) -> tuple[str, ...]:
        try:
            return tuple(dict.fromkeys(self.word.read_text(part) for part in text.split(",")))
        except ValueError:
            self.refuse()

    def text(self, value: tuple[str, ...]) -> str:
        return ",".join(value)


@dataclass(frozen=True)
class Origins(ValueType[tuple[str, ...]]):
    """Origins of pages as their browsers spell them, or `*` alone."""

    @property
    def allowed(self) -> str:
        return (
            "origins such as https://chat.example or http://localhost:3000 (a scheme, a host in ASCII, perhaps a port; "
            "no path), with commas between them, or * alone"
        )

    def read(self, value: object) -> tuple[str, ...]:
        if not isinstance(value, tuple):
            self.refuse()
        return value if value == (ANY_ORIGIN,) else tuple(dict.fromkeys(map(self._origin, value)))

    def read_text(self, text: str) -> tuple[str, ...]:
        return self.read(tuple(part.strip() for part in text.split(",")))

    def text(self, value: tuple[str, ...]) -> str:
        return ",".join(value)

    def _origin(self, text: object) -> str:
        """In a browser's spelling: lower case, and without the port that its scheme has anyway."""
        match = _ORIGIN.fullmatch(text.lower()) if isinstance(text, str) else None
        if match is None or not 0 < int(match["port"] or 1) <= _MAX_PORT:
            self.refuse()
        usual = _USUAL_PORTS.get(match["scheme"], "")
        return match[0].removesuffix(f":{usual}") if match["port"] == usual else match[0]


@dataclass(frozen=True)
class Level(Choice):
    """A level of the log, in either case."""

    def read_text(self, text: str) -> str:
        return self.read(text.strip().upper())


@dataclass(frozen=True)
class Pace(ValueType[float]):
    """A number a second; it is no money, so a float will do."""

    _: KW_ONLY
    maximum: int

    @property
    def allowed(self) -> str:
        return f"a number of {self.unit} from 0 to {self.maximum}"

    def read(self, value: object) -> float:
        return value if isinstance(value, float) and 0 <= value <= self.maximum else self.refuse()

    def read_text(self, text: str) -> float:
        word = text.strip()
        return self.read(float(word)) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", word) else self.refuse()


@dataclass(frozen=True)
class Secret(ValueType[SecretStr]):
    """Never shown, not even where it is wrong."""

    @property
    def allowed(self) -> str:
        return f"at most {_MAX_SECRET_CHARACTERS} characters without control characters (the value is not shown)"

    def read(self, value: object) -> SecretStr:
        return value if isinstance(value, SecretStr) else self.refuse()

    def read_text(self, text: str) -> SecretStr:
        secret = text.strip()
        return SecretStr(secret) if secret.isprintable() and len(secret) <= _MAX_SECRET_CHARACTERS else self.refuse()

    def shown(self, text: str) -> str | None:  # noqa: ARG002 (that it is not used is the point)
        return None


@dataclass(frozen=True)
class Prose(ValueType[str]):
    """A text of any length up to a maximum, also of none."""

    _: KW_ONLY
    maximum: int

    @property
    def allowed(self) -> str:
        return f"at most {self.maximum} characters without control characters but line breaks and tabs"

    def read(self, value: object) -> str:
        if not isinstance(value, str) or len(value) > self.maximum:
            self.refuse()
        return value if re.sub(r"[\r\n\t]", "", value).isprintable() else self.refuse()


@dataclass(frozen=True)
class HeaderName(Choice):
    """One of a few headers, in any case."""

    def read_text(self, text: str) -> str:
        word = text.strip()
        return self.read(next((value for value in self.values if value.lower() == word.lower()), word))


@dataclass(frozen=True)
class Keys(ValueType[ApiKeys]):
    """Keys with commas between them, or `*`; never shown."""

    @property
    def allowed(self) -> str:
        return (
            "keys of visible ASCII characters, or the 64 hex digits of their SHA-256, with commas between them, or * "
            "alone; a key may follow its one name (name=… or name@team=…); the value is not shown"
        )

    def read(self, value: object) -> ApiKeys:
        return value if isinstance(value, ApiKeys) else self.refuse()

    def read_text(self, text: str) -> ApiKeys:
        if text.strip() == ANYONE:
            return ApiKeys(is_open=True)
        try:
            return ApiKeys.of(part.strip() for part in text.split(","))
        except ValueError:
            self.refuse()

    def shown(self, text: str) -> str | None:  # noqa: ARG002 (that it is not used is the point)
        return None


@dataclass(frozen=True)
class Zone(ValueType[str]):
    """A time zone by its IANA name."""

    @property
    def allowed(self) -> str:
        return "an IANA time zone such as Europe/Berlin"

    def read(self, value: object) -> str:
        if not isinstance(value, str):
            self.refuse()
        try:
            zone_of(value)
        except ConfigurationError:
            self.refuse()
        return value


@dataclass(frozen=True)
class Url(ValueType[str]):
    """An address of one of some schemes, which may hold a password and then is not shown."""

    _: KW_ONLY
    schemes: tuple[str, ...]
    schemes_without_host: tuple[str, ...] = ()
    note: str = ""

    @property
    def allowed(self) -> str:
        return f"a URL that begins with {' or '.join(f'{scheme}://' for scheme in self.schemes)}{self.note}"

    def read(self, value: object) -> str:
        return value if isinstance(value, str) and self._is_url(value) else self.refuse()

    def read_text(self, text: str) -> str:
        if is_cut_short(text.strip()):
            raise ValueError(f"a URL with {ENCODING}")
        return super().read_text(text)

    def shown(self, text: str) -> str | None:
        address, mark, _ = text.strip().partition("?")
        if "@" not in text and _WITHOUT_PASSWORD.fullmatch(address):
            return f"{shown(address)}?…" if mark else shown(address)
        scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]{0,31}://", text.strip())
        return f"{scheme[0] if scheme else ''}…"

    def _is_url(self, text: str) -> bool:
        if not text.isprintable() or " " in text or "://" not in text:
            return False
        try:
            parts = urlsplit(text)
            has_host, has_port = bool(parts.hostname), parts.port != 0
        except ValueError:
            return False
        return has_port and parts.scheme in self.schemes and (has_host or parts.scheme in self.schemes_without_host)


@dataclass(frozen=True)
class ProxyUrl(Url):
    """The address of a proxy, or `environment`."""

    @property
    def allowed(self) -> str:
        return f"{super().allowed}, or {PROXY_OF_THE_ENVIRONMENT}"

    def _is_url(self, text: str) -> bool:
        return text == PROXY_OF_THE_ENVIRONMENT or super()._is_url(text)


_MODEL = Word("", pattern=r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,199}", words="a model's name")


class Config(BaseModel):
    """The boot configuration; it never changes while the process runs."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", hide_input_in_errors=True)

    redis_url: Annotated[
        str | None,
        Url(
            "Where Redis is; without it the embedded server that runs here.",
            schemes=("redis", "rediss", "unix", "fake"),
            schemes_without_host=("redis", "rediss", "unix", "fake"),
            note=" (redis+sentinel:// and redis+cluster:// belong to a later version)",
        ),
    ] = Field(default=None, repr=False)
    throttle_backend: Annotated[
        str,
        Word(
            "The strategy.",
            pattern=r"[A-Za-z][A-Za-z0-9_.-]{0,63}",
            words="atomic, legacy, memory or a registered name",
        ),
    ] = "atomic"
    stream_deadline_seconds: Annotated[
        int,
        Whole(
            "The longest that an answer may take; then it is cut and settled.",
            unit="seconds",
            maximum=MAX_STREAM_DEADLINE_SECONDS,
        ),
    ] = 120
    budget_time_zone: Annotated[
        str, Zone("Whose calendar the periods of further budgets have; the six budgets keep UTC.")
    ] = "UTC"
    llm_base_url: Annotated[
        str | None,
        Url("An OpenAI-compatible upstream; without it the built-in model answers.", schemes=("http", "https")),
    ] = Field(default=None, repr=False)
    llm_api_key: Annotated[SecretStr | None, Secret("The key that the upstream asks for.")] = None
    llm_model: Annotated[str, Word("The default model.", pattern=_MODEL.pattern, words=_MODEL.words)] = "gpt-4o"
    llm_models: Annotated[tuple[str, ...], Words("The models that a caller may name.", word=_MODEL)] = ("gpt-4o",)
    llm_provider: Annotated[
        str, Word("Whose prices hold.", pattern=r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", words="a provider's name")
    ] = "openai"
    llm_system_prompt: Annotated[
        str | None,
        Prose("What the chat puts before a conversation; an empty one leaves it out.", maximum=MAX_PROMPT_CHARACTERS),
    ] = None
    llm_auth_header: Annotated[
        str,
        HeaderName(
            "The header in which this upstream wants its key; in `Authorization` it is a bearer token.",
            values=("Authorization", "api-key"),
        ),
    ] = "Authorization"
    llm_max_tokens_parameter: Annotated[
        str,
        Choice(
            "What this upstream calls the maximum of output tokens; `auto` goes by the model's name, and learns once "
            "from a refusal.",
            values=("max_tokens", "max_completion_tokens", "auto"),
        ),
    ] = "auto"
    llm_stream_usage: Annotated[
        str,
        Choice(
            "Whether this upstream is asked for its usage in a stream (`stream_options`); `auto`: until it refuses "
            "that.",
            values=("true", "false", "auto"),
        ),
    ] = "auto"
    llm_proxy: Annotated[
        str | None,
        ProxyUrl(
            "An HTTP proxy on the way to the upstream; `environment` is that of `HTTPS_PROXY`, `HTTP_PROXY`, "
            "`ALL_PROXY` and `NO_PROXY`.",
            schemes=("http",),
        ),
    ] = Field(default=None, repr=False)
    llm_price_input_usd_per_mtok: Annotated[
        Decimal | None, Amount("Price of input instead of the table's.", unit="USD per million tokens")
    ] = None
    llm_price_output_usd_per_mtok: Annotated[
        Decimal | None, Amount("Price of output instead of the table's.", unit="USD per million tokens")
    ] = None
    llm_without_usage: Annotated[
        Literal["whole", "seen"],
        Choice(
            "What is booked where an answer ended well and reported no usage: the whole reservation, or what was seen.",
            values=("whole", "seen"),
        ),
    ] = "whole"
    llm_prompt_overhead_tokens: Annotated[
        int,
        Whole(
            "What the template of this upstream puts into a prompt by itself: added to every bound, and learnt upward "
            "from what it bills.",
            unit="tokens",
            minimum=0,
            maximum=MAX_OVERHEAD_TOKENS,
        ),
    ] = 0
    redis_delay_ms: Annotated[
        int,
        Whole(
            "Development mode only: added to every round trip to Redis, to see on one machine what a network does.",
            unit="milliseconds",
            minimum=0,
            maximum=MAX_REDIS_DELAY_MS,
        ),
    ] = 0
    demo_tokens_per_second: Annotated[
        float,
        Pace("Pace of the built-in model; 0 is as fast as it can.", unit="tokens per second", maximum=1_000_000),
    ] = 50.0
    api_keys: Annotated[ApiKeys | None, Keys("The keys that open `/v1`; `*` opens it to anyone, none closes it.")] = (
        Field(default=None, repr=False)
    )
    cors_origins: Annotated[
        tuple[str, ...],
        Origins("Origins whose pages may call the chat, challenge, usage and `/v1` routes; `*` is every origin."),
    ] = ()
    allowed_hosts: Annotated[
        tuple[str, ...],
        Words(
            "Development mode only: the names by which the service may be asked, beside `localhost`, addresses and "
            "`HOST`; any other Host is 421.",
            word=Word("", pattern=_HOST_NAME, words="host names without a port"),
        ),
    ] = ()
    admin_token: Annotated[SecretStr | None, Secret("Password of the dashboard and token of the admin API.")] = None
    max_request_bytes: Annotated[
        int,
        Whole("The longest body of the chat and of `/v1`.", unit="bytes", minimum=1_000, maximum=MOST_REQUEST_BYTES),
    ] = 1_000_000
    request_body_seconds: Annotated[
        int, Whole("How long a body may take to arrive.", unit="seconds", maximum=MOST_REQUEST_BODY_SECONDS)
    ] = 10
    trusted_proxy_hops: Annotated[
        int, Whole("Proxies in front that are believed about the address.", minimum=0, maximum=100)
    ] = 0
    network_ipv6_prefix: Annotated[
        int,
        Whole(
            "What counts as one IPv6 network: the bits that its addresses have in common.",
            unit="bits",
            minimum=49,
            maximum=64,
        ),
    ] = IPV6_PREFIX
    host: Annotated[
        str,
        Word(
            "Where gunicorn listens.",
            pattern=r"\[[A-Za-z0-9._:%-]{1,253}\]|[A-Za-z0-9._:%-]{1,255}",
            words="a host name or an address",
        ),
    ] = "127.0.0.1"
    port: Annotated[int, Whole("Where gunicorn listens.", maximum=_MAX_PORT)] = 8_000
    web_concurrency: Annotated[int, Whole("Workers of gunicorn.", maximum=1_024)] = 2
    log_format: Annotated[Literal["text", "json"], Choice("How the log is written.", values=("text", "json"))] = "text"
    log_level: Annotated[
        str, Level("From which level on.", values=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"))
    ] = "INFO"

    mode: Mode = "production"
    data_dir: Path = Path(".data")
    live_baseline: SkipValidation[Baseline] = Field(default_factory=Baseline, repr=False)

    @property
    def upstream(self) -> str:
        """Host and port of `llm_base_url`, fit for a log; empty where the built-in model answers."""
        return urlsplit(self.llm_base_url or "").netloc.rpartition("@")[2]

    @property
    def needs_one_worker(self) -> bool:
        """Whether the books are in the memory of one process."""
        return self.throttle_backend == "memory" or (self.redis_url or "").startswith("fake:")

    @property
    def remarks(self) -> tuple[str, ...]:
        """What can be used and is not safe, for a warning at the start."""
        token = self.admin_token.get_secret_value() if self.admin_token else None
        if token is None or len(token) >= _SHORTEST_SAFE_TOKEN:
            return ()
        return (f"ADMIN_TOKEN has fewer than {_SHORTEST_SAFE_TOKEN} characters and may be guessed: take a longer one",)

    def check_workers(self, workers: int) -> None:
        """Check the number of workers, before they are started.

        Raises:
            ConfigurationError: more than one, where each would keep books of its own.
        """
        if self.needs_one_worker and workers > 1:
            cause = "THROTTLE_BACKEND=memory" if self.throttle_backend == "memory" else "REDIS_URL=fake://"
            raise ConfigurationError(
                f"WEB_CONCURRENCY: 1 with {cause}, where each worker would keep books of its own; got {workers}"
            )


@dataclass(frozen=True, slots=True)
class Variable:
    """One row for the documentation."""

    name: str
    value_type: ValueType[object] | None
    default: object
    live: bool


def variables() -> tuple[Variable, ...]:
    """Every variable that is read, in the table's order."""
    boot = [
        Variable(name.upper(), value_type, Config.model_fields[name].default, live=False)
        for name, value_type in _boot_kinds()
    ]
    live = [Variable(row.variable, row.value_type, row.default, live=True) for row in settings_table().values()]
    mode = [Variable(name, None, None, live=False) for name in ("ENVIRONMENT", "DEBUG")]
    return (*boot, *mode, *live)


def load_config(environ: Mapping[str, str] | None = None) -> Config:
    """Read the environment (`os.environ` unless another is handed in).

    Raises:
        ConfigurationError: one line; nothing was started yet.
    """
    source = os.environ if environ is None else environ
    given = {name: text for name, text in source.items() if text.strip() or name in _MAY_BE_EMPTY}
    boot = {name: _read(name.upper(), value_type, given) for name, value_type in _boot_kinds() if name.upper() in given}
    _check_prices(given)
    mode = _mode(given)
    if boot.get("redis_delay_ms") and mode != "development":
        raise _unusable("REDIS_DELAY_MS", "0 outside development mode", shown(given["REDIS_DELAY_MS"]))
    if boot.get("llm_proxy") == PROXY_OF_THE_ENVIRONMENT:
        del boot["llm_proxy"]
        boot |= _proxy_of_environment(str(boot.get("llm_base_url", "")), given)
    if mode == "development":
        boot.setdefault("api_keys", ApiKeys(is_open=True))
    config = Config.model_validate({**_with_models(boot), "mode": mode, "data_dir": Path.cwd() / ".data"})
    baseline = _baseline(given, config)
    return config.model_copy(update={"live_baseline": baseline})


class SharedNumbers(NamedTuple):
    """Where gunicorn's workers share their numbers, and the number of this one among those that run."""

    directory: str
    worker: str


def shared_numbers() -> SharedNumbers | None:
    """What our gunicorn configuration says in each worker; None in a single process."""
    worker = os.environ.get("TOLLGATE_WORKER")
    # The Prometheus client's own variable, which an operator may have set.
    return SharedNumbers(os.environ["PROMETHEUS_MULTIPROC_DIR"], worker) if worker else None


def child_environment() -> dict[str, str]:
    """Our environment for a program that we start: where programs are, and no setting of this service."""
    return {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}


def _boot_kinds() -> list[tuple[str, ValueType[object]]]:
    return [
        (name, item)
        for name, info in Config.model_fields.items()
        for item in info.metadata
        if isinstance(item, ValueType)
    ]


def _read(name: str, value_type: ValueType[object], given: Mapping[str, str]) -> object:
    try:
        return value_type.read_text(given[name])
    except ValueError as error:
        raise ConfigurationError(f"{name}: {refusal_text(error, value_type.shown(given[name]))}") from None


def _unusable(name: str, allowed: str, got: str) -> ConfigurationError:
    return ConfigurationError(f"{name}: {allowed}; got {got}")


def _check_prices(given: Mapping[str, str]) -> None:
    names = ("LLM_PRICE_INPUT_USD_PER_MTOK", "LLM_PRICE_OUTPUT_USD_PER_MTOK")
    missing = [name for name in names if name not in given]
    if len(missing) == 1:
        other = next(name for name in names if name in given)
        raise _unusable(missing[0], f"to be set where {other} is, or neither", "nothing")


def _proxy_of_environment(base_url: str, given: Mapping[str, str]) -> dict[str, str]:
    """As `llm_proxy`, the proxy that other programs would take for this address; empty where there is none."""
    parts = urlsplit(base_url)
    # Of HTTP_PROXY only the small letters count: a web server sets the other one from a client's header.
    names = ["HTTPS_PROXY", "https_proxy"] if parts.scheme == "https" else ["http_proxy"]
    name = next((name for name in [*names, "ALL_PROXY", "all_proxy"] if name in given), None)
    without = given.get("no_proxy") or given.get("NO_PROXY") or ""
    if name is None or proxy_bypass_environment(parts.netloc.rpartition("@")[2], {"no": without}):
        return {}
    address = given[name].strip()
    url = address if "://" in address else f"http://{address}"
    value_type = Url("", schemes=("http",))
    try:
        return {"llm_proxy": value_type.read_text(url)}
    except ValueError as error:
        raise ConfigurationError(f"{name}: {refusal_text(error, value_type.shown(url))}") from None


def _with_models(boot: Mapping[str, object]) -> dict[str, object]:
    """The default model is always one of those that may be named."""
    model = boot.get("llm_model", Config.model_fields["llm_model"].default)
    named = boot.get("llm_models", ())
    others = [name for name in named if name != model] if isinstance(named, tuple) else []
    return {**boot, "llm_models": (model, *others)}


def _mode(given: Mapping[str, str]) -> Mode:
    develops = given.get("ENVIRONMENT", "").strip() == "development" or given.get("DEBUG", "").strip().lower() == "true"
    return "development" if develops else "production"


def _baseline(given: Mapping[str, str], config: Config) -> Baseline:
    deadline_seconds, zone = config.stream_deadline_seconds, config.budget_time_zone
    table = settings_table(deadline_seconds, zone, config.network_ipv6_prefix)
    values = {name: row.default for name, row in table.items()}
    sources: dict[str, Source] = dict.fromkeys(table, "default")
    if config.mode == "development":
        values |= dict.fromkeys(_SWITCHES_OFF_IN_DEVELOPMENT, False)
    for name, row in table.items():
        if row.variable in given:
            values[name] = _read(row.variable, row.value_type, given)
            sources[name] = "environment"
    settings = LiveSettings.model_validate(values | derived(values, sources))
    if settings.high_cost_window_seconds < deadline_seconds:
        allowed = f"at most HIGH_COST_WINDOW_SECONDS, which is {settings.high_cost_window_seconds}"
        raise _unusable("STREAM_DEADLINE_SECONDS", allowed, str(deadline_seconds))
    return Baseline(settings, sources, config.mode == "development", deadline_seconds, zone, config.network_ipv6_prefix)
