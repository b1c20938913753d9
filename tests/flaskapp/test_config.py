import hashlib
import re
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.budgets import Scope, Sliding
from backends.errors import ConfigurationError
from flaskapp.config import Config, load_config, variables
from flaskapp.http.api_keys import ApiKeys
from flaskapp.settings import LiveSettings


def refusal(**environ):
    with pytest.raises(ConfigurationError) as caught:
        load_config(environ)
    line = str(caught.value)
    assert line.isprintable()
    return line


def test_the_defaults_are_those_of_the_contract():
    config = load_config({})
    given = config.model_dump(exclude={"live_baseline", "data_dir"})
    assert given == {
        "redis_url": None,
        "throttle_backend": "atomic",
        "stream_deadline_seconds": 120,
        "budget_time_zone": "UTC",
        "llm_base_url": None,
        "llm_api_key": None,
        "llm_model": "gpt-4o",
        "llm_models": ("gpt-4o",),
        "llm_provider": "openai",
        "llm_system_prompt": None,
        "llm_auth_header": "Authorization",
        "llm_max_tokens_parameter": "auto",
        "llm_stream_usage": "auto",
        "llm_proxy": None,
        "llm_price_input_usd_per_mtok": None,
        "llm_price_output_usd_per_mtok": None,
        "llm_without_usage": "whole",
        "llm_prompt_overhead_tokens": 0,
        "redis_delay_ms": 0,
        "demo_tokens_per_second": 50.0,
        "api_keys": None,
        "cors_origins": (),
        "allowed_hosts": (),
        "admin_token": None,
        "trusted_proxy_hops": 0,
        "network_ipv6_prefix": 56,
        "max_request_bytes": 1_000_000,
        "request_body_seconds": 10,
        "host": "127.0.0.1",
        "port": 8000,
        "web_concurrency": 2,
        "log_format": "text",
        "log_level": "INFO",
        "mode": "production",
    }
    assert config.web_concurrency == 2
    assert config.data_dir.name == ".data"
    assert config.data_dir.is_absolute()
    assert dict(config.live_baseline.values) == {
        "enable_cost_throttling": True,
        "enable_challenge_response": True,
        "high_cost_threshold_usd": Decimal("0.02"),
        "high_cost_window_seconds": 600,
        "cost_throttle_duration_seconds": 30,
        "throttle_when_busy": True,
        "daily_cost_limit_usd": Decimal("0.25"),
        "network_cost_limit_usd": Decimal("0.10"),
        "network_daily_cost_limit_usd": Decimal(1),
        "network_share": Decimal("0.25"),
        "hourly_spend_limit_usd": Decimal(1),
        "daily_spend_limit_usd": Decimal(5),
        "budgets": (),
        "budget_overrides": (),
        "reservation_policy": "worst_case",
        "reservation_slice_tokens": 256,
        "reservation_cushion_tokens": 16,
        "drain_seconds": 10,
        "throttle_on_error": "open",
        "fail_open_budget_usd": Decimal(1),
        "llm_max_tokens": 400,
        "llm_max_input_tokens": 3000,
        "chat_rate_limit": "60 per minute",
        "network_rate_limit": "600 per minute",
    }
    assert set(config.live_baseline.sources.values()) == {"default"}


def test_an_empty_variable_counts_as_unset():
    environ = {variable.name: "  " for variable in variables()} | {"DRAIN_SECONDS": ""}
    del environ["LLM_SYSTEM_PROMPT"]
    assert load_config(environ) == load_config({})


@pytest.mark.parametrize(("text", "prompt"), [("", ""), ("  ", ""), ("Be brief.\nBe kind.", "Be brief.\nBe kind.")])
def test_an_empty_system_prompt_is_none_at_all_and_not_the_default(text, prompt):
    assert load_config({"LLM_SYSTEM_PROMPT": text}).llm_system_prompt == prompt


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("LLM_SYSTEM_PROMPT", "x" * 32_001, "at most 32000 characters"),
        ("LLM_SYSTEM_PROMPT", "a\x07b", "without control characters"),
        ("LLM_AUTH_HEADER", "Cookie", "Authorization or api-key"),
        ("LLM_MAX_TOKENS_PARAMETER", "max", "max_tokens or max_completion_tokens or auto"),
        ("LLM_STREAM_USAGE", "yes", "true or false or auto"),
        ("LLM_PROXY", "socks5://h:1", "http://"),
        ("LLM_PROXY", "nowhere", "or environment"),
    ],
)
def test_how_an_upstream_is_asked_is_checked_at_the_start(name, text, allowed):
    with pytest.raises(ConfigurationError, match=re.escape(allowed)) as caught:
        load_config({name: text})
    assert str(caught.value).startswith(f"{name}: ")


def test_a_headers_name_may_be_in_any_case():
    assert load_config({"LLM_AUTH_HEADER": "API-KEY"}).llm_auth_header == "api-key"
    assert load_config({"LLM_AUTH_HEADER": "authorization"}).llm_auth_header == "Authorization"


@pytest.mark.parametrize(
    ("base_url", "variables", "proxy"),
    [
        ("https://api.example/v1", {"HTTPS_PROXY": "http://u:p@proxy:3128"}, "http://u:p@proxy:3128"),
        ("https://api.example/v1", {"https_proxy": "proxy:3128"}, "http://proxy:3128"),
        ("https://api.example/v1", {"ALL_PROXY": "http://proxy"}, "http://proxy"),
        ("https://api.example/v1", {"http_proxy": "http://proxy"}, None),
        ("http://api.example/v1", {"http_proxy": "http://proxy"}, "http://proxy"),
        ("http://api.example/v1", {"HTTP_PROXY": "http://a.clients.header"}, None),
        ("https://api.example/v1", {"HTTPS_PROXY": "http://proxy", "NO_PROXY": "localhost,.example"}, None),
        ("https://api.example/v1", {}, None),
    ],
)
def test_the_proxy_of_the_environment_is_taken_as_other_programs_do(base_url, variables, proxy):
    config = load_config({"LLM_BASE_URL": base_url, "LLM_PROXY": "environment", **variables})
    assert config.llm_proxy == proxy
    assert load_config({"LLM_BASE_URL": base_url, **variables}).llm_proxy is None


def test_a_proxy_of_the_environment_that_cannot_be_used_stops_the_start_without_its_password():
    with pytest.raises(ConfigurationError) as caught:
        load_config(
            {"LLM_BASE_URL": "https://h", "LLM_PROXY": "environment", "HTTPS_PROXY": "socks5://user:hunter2@h:1"}
        )
    assert str(caught.value).startswith("HTTPS_PROXY: ")
    assert "hunter2" not in str(caught.value)


def test_the_environment_of_the_process_is_the_default(monkeypatch):
    monkeypatch.setenv("PORT", "8001")
    assert load_config().port == 8001


def test_every_variable_is_read():
    config = load_config(
        {
            "REDIS_URL": "redis://:secret@redis:6379/3",
            "THROTTLE_BACKEND": "my-own_2",
            "STREAM_DEADLINE_SECONDS": "60",
            "LLM_BASE_URL": "http://localhost:11434/v1",
            "LLM_API_KEY": "sk-1",
            "LLM_MODEL": "gpt-4o-mini",
            "LLM_MODELS": "gpt-4o, gpt-4o-mini,gpt-4o",
            "LLM_PROVIDER": "azure",
            "LLM_PRICE_INPUT_USD_PER_MTOK": "2.50",
            "LLM_PRICE_OUTPUT_USD_PER_MTOK": "10",
            "DEMO_TOKENS_PER_SECOND": "0.5",
            "ADMIN_TOKEN": "pässword",
            "ALLOWED_HOSTS": "Box.local, my_box",
            "TRUSTED_PROXY_HOPS": "1",
            "HOST": "::",
            "PORT": "65535",
            "WEB_CONCURRENCY": "4",
            "LOG_FORMAT": "json",
            "LOG_LEVEL": "debug",
            "HIGH_COST_WINDOW_SECONDS": "60",
            "DAILY_COST_LIMIT_USD": "0.01",
            "NETWORK_COST_LIMIT_USD": "0",
            "THROTTLE_ON_ERROR": "closed",
            "CHAT_RATE_LIMIT": "5/second; 100 per hour",
            "THROTTLE_WHEN_BUSY": "False",
        }
    )
    assert config.redis_url == "redis://:secret@redis:6379/3"
    assert config.llm_models == ("gpt-4o-mini", "gpt-4o")
    assert (config.llm_price_input_usd_per_mtok, config.llm_price_output_usd_per_mtok) == (Decimal("2.50"), 10)
    assert config.llm_api_key.get_secret_value() == "sk-1"
    assert config.admin_token.get_secret_value() == "pässword"
    assert config.allowed_hosts == ("Box.local", "my_box")
    assert (config.demo_tokens_per_second, config.log_level, config.web_concurrency) == (0.5, "DEBUG", 4)
    live = config.live_baseline
    (network_window, *_) = live.values.plan.of({Scope.NETWORK: "198.51.100.7"}, now_us=0)
    assert (network_window.limit_nanousd, network_window.period) == (None, Sliding(60))
    assert live.values.throttle_when_busy is False
    assert live.values.chat_rate_limit == "5/second; 100 per hour"
    assert sorted(name for name, source in live.sources.items() if source == "environment") == [
        "chat_rate_limit",
        "daily_cost_limit_usd",
        "high_cost_window_seconds",
        "network_cost_limit_usd",
        "throttle_on_error",
        "throttle_when_busy",
    ]


@pytest.mark.parametrize(
    ("environ", "line"),
    [
        ({"PORT": "0"}, "PORT: a whole number from 1 to 65535; got 0"),
        ({"PORT": "80 00"}, "PORT: a whole number from 1 to 65535; got 80 00"),
        ({"WEB_CONCURRENCY": "-1"}, "WEB_CONCURRENCY: a whole number from 1 to 1024; got -1"),
        ({"ENABLE_COST_THROTTLING": "yes"}, "ENABLE_COST_THROTTLING: true or false; got yes"),
        ({"ENABLE_CHALLENGE_RESPONSE": "1"}, "ENABLE_CHALLENGE_RESPONSE: true or false; got 1"),
        ({"THROTTLE_ON_ERROR": "Open"}, "THROTTLE_ON_ERROR: open or closed; got Open"),
        ({"LOG_LEVEL": "loud\n"}, "LOG_LEVEL: DEBUG or INFO or WARNING or ERROR or CRITICAL; got 'loud\\n'"),
        (
            {"DAILY_COST_LIMIT_USD": "0"},
            "DAILY_COST_LIMIT_USD: an amount in USD from 0.000000001 to 1000000 with at most nine places; got 0",
        ),
        (
            {"FAIL_OPEN_BUDGET_USD": "-1"},
            "FAIL_OPEN_BUDGET_USD: an amount in USD from 0 (none) to 1000000 with at most nine places; got -1",
        ),
        (
            {"COST_THROTTLE_DURATION_SECONDS": "2678401"},
            "COST_THROTTLE_DURATION_SECONDS: a whole number of seconds from 1 to 2678400; got 2678401",
        ),
        (
            {"STREAM_DEADLINE_SECONDS": "3601"},
            "STREAM_DEADLINE_SECONDS: a whole number of seconds from 1 to 3600; got 3601",
        ),
        (
            {"STREAM_DEADLINE_SECONDS": "601"},
            "STREAM_DEADLINE_SECONDS: at most HIGH_COST_WINDOW_SECONDS, which is 600; got 601",
        ),
        (
            {"HIGH_COST_WINDOW_SECONDS": "119"},
            (
                "HIGH_COST_WINDOW_SECONDS: a whole number of seconds from 120 to 2678400"
                " (not shorter than STREAM_DEADLINE_SECONDS); got 119"
            ),
        ),
        (
            {"LLM_PRICE_INPUT_USD_PER_MTOK": "1"},
            "LLM_PRICE_OUTPUT_USD_PER_MTOK: to be set where LLM_PRICE_INPUT_USD_PER_MTOK is, or neither; got nothing",
        ),
        (
            {"LLM_PRICE_INPUT_USD_PER_MTOK": "0", "LLM_PRICE_OUTPUT_USD_PER_MTOK": "1"},
            (
                "LLM_PRICE_INPUT_USD_PER_MTOK: an amount in USD per million tokens from 0.000000001 to 1000000"
                " with at most nine places; got 0"
            ),
        ),
        ({"LLM_MODELS": "a,,b"}, "LLM_MODELS: a model's name, several with commas between them; got a,,b"),
        ({"DEMO_TOKENS_PER_SECOND": "nan"}, None),
        ({"LLM_BASE_URL": "https://"}, "LLM_BASE_URL: a URL that begins with http:// or https://; got https://"),
        ({"LLM_BASE_URL": "ftp://x"}, None),
        ({"HOST": "[::1"}, "HOST: a host name or an address; got [::1"),
        ({"HOST": "a[b]"}, None),
        (
            {"LLM_BASE_URL": "https://h/v1?api_key=x y"},
            "LLM_BASE_URL: a URL that begins with http:// or https://; got https://h/v1?…",
        ),
        ({"HOST": "a b"}, "HOST: a host name or an address; got a b"),
        ({"THROTTLE_BACKEND": "../x"}, "THROTTLE_BACKEND: atomic, legacy, memory or a registered name; got ../x"),
        ({"CHAT_RATE_LIMIT": "many"}, None),
        (
            {"ALLOWED_HOSTS": "box.local,box.local:8000"},
            "ALLOWED_HOSTS: host names without a port, several with commas between them; got box.local,box.local:8000",
        ),
        ({"ALLOWED_HOSTS": "*"}, None),
        ({"NETWORK_SHARE": "0.25%"}, "NETWORK_SHARE: a number from 0.01 to 1 with at most six places; got 0.25%"),
        ({"NETWORK_SHARE": "0"}, None),
        ({"NETWORK_SHARE": "0.009999"}, None),
        ({"NETWORK_SHARE": "1.000001"}, None),
        ({"NETWORK_SHARE": "0.1234567"}, None),
        ({"NETWORK_SHARE": "1e-1"}, None),
        ({"ALLOWED_HOSTS": "https://box.local"}, None),
        ({"ALLOWED_HOSTS": "box.local,"}, None),
        (
            {"RESERVATION_POLICY": "guess"},
            "RESERVATION_POLICY: worst_case or slices; got guess",
        ),
        ({"DRAIN_SECONDS": "-1"}, "DRAIN_SECONDS: a whole number of seconds from 0 to 2678400; got -1"),
        ({"REDIS_DELAY_MS": "1"}, "REDIS_DELAY_MS: 0 outside development mode; got 1"),
        (
            {"REDIS_DELAY_MS": "101", "ENVIRONMENT": "development"},
            "REDIS_DELAY_MS: a whole number of milliseconds from 0 to 100; got 101",
        ),
        ({"REDIS_DELAY_MS": "-1", "ENVIRONMENT": "development"}, None),
        ({"REDIS_DELAY_MS": "0.5", "ENVIRONMENT": "development"}, None),
        ({"REDIS_URL": "localhost:6379"}, None),
        ({"REDIS_URL": "redis://h:port"}, None),
        ({"REDIS_URL": "redis+cluster://h"}, None),
        ({"PORT": "\udc80"}, "PORT: a whole number from 1 to 65535; got '\\udc80'"),
        ({"PORT": "9" * 100_000}, "PORT: a whole number from 1 to 65535; got " + "9" * 80 + "…"),
    ],
)
def test_what_cannot_be_used_stops_the_start_with_one_line(environ, line):
    told = refusal(**environ)
    assert told == line or (line is None and told.startswith(f"{next(iter(environ))}: "))


@pytest.mark.parametrize(
    "harmless", [{"RESERVATION_POLICY": "worst_case"}, {"REDIS_DELAY_MS": "0"}, {"REDIS_URL": "fake://"}]
)
def test_the_defaults_of_later_values_are_harmless(harmless):
    load_config(harmless)


@pytest.mark.parametrize(
    "environ",
    [
        {"ADMIN_TOKEN": "hidden\nhidden"},
        {"ADMIN_TOKEN": "hidden" * 1_000},
        {"LLM_API_KEY": "hidden\x00"},
        {"API_KEYS": "good,hid den"},
        {"REDIS_URL": "http://:hidden@h"},
        {"REDIS_URL": "redis+sentinel://u:hid/den@h"},
        {"REDIS_URL": "tcp://h?password=hidden"},
        {"LLM_BASE_URL": "ftp://u:hidden@h"},
        {"LLM_BASE_URL": "https://h/v1?api_key=hidden hidden"},
        {"REDIS_URL": ":hidden@h:6379"},
        {"REDIS_URL": "redis:/:hidden@h"},
        {"REDIS_URL": "redis://:hidden"},
        {"REDIS_URL": "redis://h:hidden"},
        {"LLM_BASE_URL": "u:hidden@http://h"},
    ],
)
def test_a_secret_is_never_shown(environ):
    line = refusal(**environ)
    assert line.startswith(f"{next(iter(environ))}: ")
    assert "hid" not in line


@pytest.mark.parametrize("token", ["", "x" * 15, "x" * 16])
def test_a_short_token_of_the_operator_is_warned_of_and_not_shown(token):
    remarks = load_config({"ADMIN_TOKEN": token}).remarks
    assert [remark.partition(" ")[0] for remark in remarks] == ["ADMIN_TOKEN"] * (len(token) == 15)
    assert "xxx" not in str(remarks)


@pytest.mark.parametrize("user", ["", "me"])
@pytest.mark.parametrize("mark", ["#", "/", "?", "[", "?a=", "#b/c?", "℀"])
@pytest.mark.parametrize("begin", ["hidden", "4711"])
@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("REDIS_URL", "redis://{}@127.0.0.1:6379/0"),
        ("REDIS_URL", "rediss://{}@redis.example?ssl_cert_reqs=none"),
        ("REDIS_URL", "unix://{}@/run/redis.sock"),
        ("LLM_BASE_URL", "https://{}@models.example/v1"),
        ("LLM_PROXY", "http://{}@proxy.example:3128"),
    ],
)
def test_a_password_that_is_not_percent_encoded_is_not_shown_and_how_to_write_it_is_said(name, url, begin, mark, user):
    line = refusal(**{name: url.format(f"{user}:{begin}{mark}hidden")})
    assert line.startswith(f"{name}: a URL with user and password percent-encoded (# as %23, / as %2F")
    assert "hidden" not in line
    assert "4711" not in line


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("REDIS_URL", "redis://:p%23%2F@h:1/2"),
        ("REDIS_URL", "redis://:p@ss@h:1/2"),
        ("REDIS_URL", "redis://h?password=p@ss"),
        ("REDIS_URL", "unix:///run/redis@1.sock?db=2"),
        ("LLM_BASE_URL", "https://u:p%40@h:8443/v1?api-version=2024-10-21&user=a@b"),
    ],
)
def test_what_ends_no_password_is_allowed(name, url):
    assert getattr(load_config({name: url}), name.lower()) == url


def test_no_secret_is_in_the_repr():
    config = load_config(
        {"ADMIN_TOKEN": "hidden", "LLM_API_KEY": "hidden", "API_KEYS": "hidden", "REDIS_URL": "redis://:hidden@h"}
    )
    assert "hidden" not in repr(config)
    assert "hidden" not in str(config)
    assert hashlib.sha256(b"hidden").hexdigest() not in repr((config, config.api_keys))


@pytest.mark.parametrize(
    ("environ", "mode"),
    [
        ({}, "production"),
        ({"ENVIRONMENT": "development"}, "development"),
        ({"DEBUG": "true"}, "development"),
        ({"DEBUG": "True"}, "development"),
        ({"ENVIRONMENT": "production", "DEBUG": "true"}, "development"),
        ({"ENVIRONMENT": "dev"}, "production"),
        ({"ENVIRONMENT": "staging", "DEBUG": "1"}, "production"),
        ({"DEBUG": "false"}, "production"),
    ],
)
def test_development_turns_both_switches_off(environ, mode):
    config = load_config(environ)
    assert config.mode == mode
    assert config.live_baseline.development == (mode == "development")
    assert config.live_baseline.values.enable_cost_throttling == (mode == "production")
    assert config.live_baseline.values.enable_challenge_response == (mode == "production")


def test_a_switch_beats_the_mode():
    on = load_config({"ENVIRONMENT": "development", "ENABLE_COST_THROTTLING": "true"}).live_baseline
    assert (on.values.enable_cost_throttling, on.sources["enable_cost_throttling"]) == (True, "environment")
    assert (on.values.enable_challenge_response, on.sources["enable_challenge_response"]) == (False, "default")
    off = load_config({"ENABLE_COST_THROTTLING": "false"}).live_baseline
    assert off.values.enable_cost_throttling is False


@pytest.mark.parametrize("environ", [{"REDIS_URL": "fake://"}, {"THROTTLE_BACKEND": "memory"}])
def test_books_in_memory_want_one_worker(environ):
    config = load_config(environ)
    config.check_workers(1)
    with pytest.raises(ConfigurationError, match=r"WEB_CONCURRENCY: 1 with .*; got 2"):
        config.check_workers(2)
    load_config({}).check_workers(1_000)


def test_the_configuration_never_changes():
    config = load_config({})
    with pytest.raises(ValueError, match="frozen"):
        config.port = 1


@pytest.mark.parametrize(
    "text",
    [
        *("one,", ",", "a b", "one,*", "*,one", "schlüssel", "x" * 1_001, "one\ttwo", "web=*", "web=a b"),
        *("web=one,mobile=one", "web@a=one,web@b=one", "web=one,one", f"web=one,{hashlib.sha256(b'one').hexdigest()}"),
    ],
)
def test_what_is_no_list_of_keys_stops_the_start(text):
    assert refusal(API_KEYS=text).startswith("API_KEYS: keys of visible ASCII characters")


def test_a_key_and_its_hash_register_the_same():
    digest = hashlib.sha256(b"one").hexdigest()
    assert load_config({"API_KEYS": "one"}).api_keys == load_config({"API_KEYS": f" {digest.upper()} , one"}).api_keys
    assert load_config({"API_KEYS": "one, two"}).api_keys == ApiKeys.of(["one", "two"])


def test_in_development_v1_is_open_to_anyone_unless_keys_are_set():
    assert load_config({}).api_keys is None
    assert load_config({"API_KEYS": "*"}).api_keys == ApiKeys(is_open=True)
    assert load_config({"ENVIRONMENT": "development"}).api_keys == ApiKeys(is_open=True)
    assert load_config({"DEBUG": "true", "API_KEYS": "one"}).api_keys == ApiKeys.of(["one"])


def test_every_variable_is_listed_once():
    names = [variable.name for variable in variables()]
    assert len(names) == len(set(names))
    assert {variable.name for variable in variables() if variable.live} == {
        name.upper() for name in LiveSettings.model_fields
    }
    assert all(variable.value_type is None or variable.value_type.description for variable in variables())


NAMES = [variable.name for variable in variables()] + [
    "RESERVATION_POLICY",
    "DRAIN_SECONDS",
]


@given(st.dictionaries(st.sampled_from(NAMES), st.text(max_size=12) | st.integers().map(str) | st.decimals().map(str)))
def test_any_environment_is_read_or_refused_in_one_line(environ):
    try:
        config = load_config(environ)
    except ConfigurationError as error:
        assert str(error).isprintable()  # noqa: PT017 (most are refused, some are not)
        assert str(error).partition(":")[0] in NAMES  # noqa: PT017
    else:
        assert isinstance(config, Config)
