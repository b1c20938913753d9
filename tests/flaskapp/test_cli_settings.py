import json

import pytest
from click.testing import CliRunner

from backends.clock import SystemClock
from backends.errors import ConfigurationError
from backends.store.link import Link
from flaskapp.cli.settings import SettingsView, make_settings_cli
from flaskapp.settings import Baseline, LiveSettings, SettingsStore


@pytest.fixture
def link(redis_url):
    link = Link(redis_url, clock=SystemClock())
    link.run(lambda client: client.flushall())
    yield link
    link.close()


@pytest.fixture
def raw(link):
    return lambda: json.loads(link.run(lambda client: client.get("settings")) or b"{}")


def run(link, *words):
    store = SettingsStore(link, Baseline(), [].append)
    return CliRunner().invoke(make_settings_cli(lambda: SettingsView(store, "production")), list(words))


def test_show_prints_value_source_and_bounds_of_each_and_the_mode(link):
    run(link, "set", "daily_cost_limit_usd", "0.01")
    shown = run(link, "show")
    lines = {line.split()[0]: line for line in shown.stdout.splitlines() if line}
    assert shown.exit_code == 0
    assert set(LiveSettings.model_fields) < set(lines)
    assert lines["daily_cost_limit_usd"].split()[1:3] == ["0.01", "redis"]
    assert lines["high_cost_threshold_usd"].split()[1:3] == ["0.02", "default"]
    assert "from 0.000000001 to 1000000" in lines["daily_cost_limit_usd"]
    assert lines["mode:"].startswith("mode: production (by this shell's environment; a running service has its own")


@pytest.mark.parametrize(
    ("name", "typed", "value"),
    [
        ("enable_cost_throttling", "false", False),
        ("daily_cost_limit_usd", "0.5", 0.5),
        ("llm_max_tokens", "9", 9),
        ("throttle_on_error", "closed", "closed"),
        ("chat_rate_limit", "5 per minute", "5 per minute"),
    ],
)
def test_set_and_unset(link, raw, name, typed, value):
    done = run(link, "set", name, typed)
    assert (done.exit_code, done.output) == (0, f"{name} is {typed} now (redis)\n")
    assert raw() == {name: value}
    done = run(link, "unset", name)
    assert done.exit_code == 0
    # What a service falls back to is its own environment's affair, and may be another value.
    assert done.output.endswith("now (default, by this shell's environment)\n")
    assert raw() == {}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["set", "nonsense", "1"], "Error: nonsense: there is no such setting; `flask settings show` lists them\n"),
        (["unset", "nonsense"], "Error: nonsense: there is no such setting; `flask settings show` lists them\n"),
        (
            ["set", "llm_max_tokens", "-1"],
            "Error: llm_max_tokens: a whole number of tokens from 1 to 1000000; got -1\n",
        ),
        (["set", "throttle_on_error", "a\nb"], "Error: throttle_on_error: open or closed; got 'a\\nb'\n"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_status_1(link, raw, words, line):
    done = run(link, *words)
    assert (done.exit_code, done.stderr, done.stdout) == (1, line, "")
    assert raw() == {}


def test_missing_words_are_a_usage_error(link):
    assert run(link, "set", "llm_max_tokens").exit_code == 2


def test_without_redis_it_says_so_and_fails():
    link = Link("redis://127.0.0.1:1", clock=SystemClock(), timeout_seconds=0.1)
    shown = run(link, "show")
    assert shown.exit_code == 1
    assert "daily_cost_limit_usd" in shown.stdout
    assert "Redis does not answer" in shown.stderr
    changed = run(link, "set", "llm_max_tokens", "9")
    assert (changed.exit_code, changed.stdout) == (1, "")
    assert changed.stderr.count("\n") == 1
    link.close()


def test_a_store_that_cannot_be_opened_is_one_line():
    def refuse():
        raise ConfigurationError("REDIS_URL: no")

    done = CliRunner().invoke(make_settings_cli(refuse), ["show"])
    assert (done.exit_code, done.stderr) == (1, "Error: REDIS_URL: no\n")
