"""The log: words to the letter, identifiers cut, never a challenge, text or JSON."""

import json
import logging

import pytest

from backends.contract import Event
from flaskapp.ops.logs import cut, log_event, set_up_logging
from tests.servers import CHAT, LITECOIN, earliest_wait

CHECKED = "Cost throttling check called"
RECORDED = "Cost recorded for stable_identifier"
TRIGGERED = "Cost-based throttling triggered"
FAILED = "Error executing cost throttle Lua script"


@pytest.fixture(autouse=True)
def _log_as_it_was():
    logger = logging.getLogger("tollgate")
    handlers, level = logger.handlers, logger.level
    yield
    logger.handlers, logger.level = handlers, level


def ask_until_refused(service, fingerprint="fp:secretchallenge:hash456789abcdef"):
    while (answer := service.chat(fingerprint)).status_code == 200:
        last = answer
    return last, answer


def parsed(line):
    """A text line as words and fields."""
    fields = {}
    rest = line.split(" ", 3)[3]
    while "=" in rest:
        before, _, value = rest.rpartition("=")
        words, _, name = before.rpartition(" ")
        fields[name] = value.strip('"')
        rest = words
    return rest, fields


@pytest.mark.parametrize(("backend", "script"), [("atomic", "reserve.lua"), ("legacy", "legacy")])
def test_the_lines_of_an_admission_and_of_a_refusal(make_app, capsys, backend, script):
    service = make_app(THROTTLE_BACKEND=backend)
    admitted, refused = ask_until_refused(service)
    lines = [parsed(line) for line in capsys.readouterr().err.splitlines()]
    assert lines[0] == ("Cost throttling is on (environment)", {})
    id_ = {"identifier": "hash4567…", "backend": backend}
    of_admitted = [line for line in lines if line[1].get("request_id") == admitted.headers["X-Request-ID"]]
    assert [words for words, _ in of_admitted] == [CHECKED, RECORDED, "Cost settled"]
    assert all(fields["identifier"] == "hash4567…" and fields["backend"] == backend for _, fields in of_admitted)
    assert all(fields.get("cost_usd", "0.004192500") == "0.004192500" for _, fields in of_admitted)
    recorded = of_admitted[1][1]
    assert recorded["script"] == script
    assert float(recorded["check_ms"]) > 0
    assert recorded["window_usd"] == recorded["day_usd"] > "0.015"
    of_refused = [line for line in lines if line[1].get("request_id") == refused.headers["X-Request-ID"]]
    assert [words for words, _ in of_refused] == [CHECKED, TRIGGERED]
    told = of_refused[1][1]
    assert told == told | id_ | {"reason": "window_limit", "script": script, "cost_usd": "0.004192500"}
    assert float(told["check_ms"]) > 0


@pytest.mark.parametrize("text", ["a\x1b[31mb", "a\x7fb", "a\x9bb", "a\u202eb", "a\nb\tc", "a\x00b", 'a"b'])
def test_no_field_moves_the_cursor_or_begins_a_line(capsys, text):
    set_up_logging("text", "INFO")
    log_event(Event("upstream_failed", {"detail": text, "error": "é x"}))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable()
    assert line.endswith('error="é x"')


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "none"), (True, "true"), (False, "false"), (1, "1"), (0, "0"), ("", '""'), ("a b", '"a b"'), ("a", "a"),
     ('a"b', '"a\\"b"'), ("None", "None"), (["x"], "['x']"), (["x", 1], "\"['x', 1]\""), (1.23456, "1.235"),
     ("=", "="), ("a=", "a=")],
)  # fmt: skip
def test_how_a_value_is_written(capsys, value, shown):
    set_up_logging("text", "INFO")
    for place in (0, 1, 2):
        fields = [("one", "x"), ("two", "y")]
        fields.insert(place, ("value", value))
        log_event(Event("client_left", dict(fields)))
        words = [f"{name}={shown if name == 'value' else text}" for name, text in fields]
        assert capsys.readouterr().err.rstrip("\n").endswith(" answer " + " ".join(words))


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_neither_the_challenge_nor_the_whole_identifier_is_ever_written(make_app, capsys, log_format):
    service = make_app(LOG_FORMAT=log_format, LOG_LEVEL="DEBUG", ENABLE_CHALLENGE_RESPONSE="true")
    given = service.client.get("/api/v1/auth/challenge", headers={"X-Fingerprint": "hash456789abcdef"}).json[
        "challenge"
    ]
    for fingerprint in ("fp:secretchallenge:hash456789abcdef", f"fp:{given}:hash456789abcdef", "fp:{secret}:x"):
        service.chat(fingerprint)
    service.patch(enable_challenge_response=False, high_cost_threshold_usd="0.005")
    ask_until_refused(service)
    written = capsys.readouterr().err
    assert RECORDED in written
    assert TRIGGERED in written
    for secret in ("secret", given, "hash456789abcdef", "hash45678"):
        assert secret not in written


def test_as_json_each_line_is_an_object_with_the_same_fields(make_app, capsys):
    service = make_app(LOG_FORMAT="json")
    admitted, refused = ask_until_refused(service)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert all(list(line)[:3] == ["time", "level", "message"] for line in lines)
    by_id = {line["request_id"]: line for line in lines if line["message"] in {RECORDED, TRIGGERED}}
    recorded = by_id[admitted.headers["X-Request-ID"]]
    assert recorded == recorded | {
        "level": "INFO",
        "identifier": "hash4567…",
        "cost_usd": "0.004192500",
        "backend": "atomic",
        "script": "reserve.lua",
    }
    assert isinstance(recorded["check_ms"], float)
    triggered = by_id[refused.headers["X-Request-ID"]]
    assert (triggered["level"], triggered["reason"], triggered["in_flight"]) == ("WARNING", "window_limit", False)
    assert triggered["retry_after_seconds"] == earliest_wait(refused)


def test_the_check_is_told_also_while_throttling_is_off(make_app, capsys):
    service = make_app(ENABLE_COST_THROTTLING="", THROTTLE_BACKEND="atomic")
    service.chat()
    written = capsys.readouterr().err
    assert "Cost throttling is off (development mode)" in written
    (checked,) = [parsed(line)[1] for line in written.splitlines() if CHECKED in line]
    assert checked["backend"] == "off"
    assert RECORDED not in written


def test_each_change_of_the_switch_is_told(make_app, capsys):
    service = make_app(ENABLE_COST_THROTTLING="")
    service.chat()
    service.patch(enable_cost_throttling=True)
    service.patch(daily_cost_limit_usd="1")
    service.patch(enable_cost_throttling=False)
    service.patch(enable_cost_throttling=None)
    told = [parsed(line)[0] for line in capsys.readouterr().err.splitlines() if "Cost throttling is" in line]
    assert told == [
        "Cost throttling is off (development mode)",
        "Cost throttling is on (redis)",
        "Cost throttling is off (redis)",
        "Cost throttling is off (development mode)",
    ]


def test_production_is_on_by_default(make_app, capsys):
    make_app(ENVIRONMENT="production", ENABLE_COST_THROTTLING="").client.get("/healthz")
    assert "Cost throttling is on (default)" in capsys.readouterr().err


def test_a_script_that_fails_is_told_with_its_cause(make_app, capsys):
    service = make_app()
    service.redis.hset("llm:cost:recent:hash456", "x", "1")
    answer = service.chat()
    assert (answer.status_code, answer.headers["X-Throttle-Backend"]) == (200, "emergency")
    lines = capsys.readouterr().err.splitlines()
    (failed,) = [line for line in lines if FAILED in line]
    assert " ERROR " in failed
    assert parsed(failed)[1]["is_bug"] == "true"
    assert "WRONGTYPE" in failed
    assert [line for line in lines if " CRITICAL " in line]
    (recorded,) = [parsed(line)[1] for line in lines if RECORDED in line]
    assert recorded["backend"] == "emergency"


def test_what_a_client_sends_never_makes_a_line_of_its_own(make_app, capsys):
    service = make_app()
    headers = {"X-Fingerprint": "hash456", "X-Forwarded-For": "a\tb", "User-Agent": "x"}
    body = {**LITECOIN, "query": "Cost throttling is off\nfaked INFO line"}
    service.client.post(CHAT, json=body, headers=headers, buffered=True)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "faked" in line] == []
    assert all(line.startswith("20") for line in lines)


def test_values_with_spaces_and_line_breaks_stay_one_field_of_one_line(capsys):
    set_up_logging("text", "INFO")
    log_event(Event("upstream_failed", {"error": "a\nb  c", "detail": ""}))
    assert capsys.readouterr().err.splitlines()[0].endswith('The model\'s server failed error="a b c" detail=""')


def test_the_level_decides_what_is_written(capsys):
    set_up_logging("text", "WARNING")
    log_event(Event("check_called", {}))
    log_event(Event("store_lost", {"error": "x"}))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("ERROR Redis does not answer error=x")


def test_an_exception_is_written_with_its_trace_and_an_unknown_event_under_its_name(capsys):
    set_up_logging("json", "INFO")
    log_event(Event("unexpected_error", {"error": "ValueError", "exception": ValueError("why")}))
    log_event(Event("something_new", {"amount_nanousd": 5}))
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert "ValueError: why" in first["exc_info"]
    assert (second["message"], second["amount_usd"]) == ("Something new", "0.000000005")


def test_no_text_of_an_exception_is_a_line_of_its_own(capsys):
    set_up_logging("text", "INFO")
    forged = "".join(
        f"{end}2026-11-27 00:00:00,000 INFO Cost settled" for end in ("\n", "\r", "\u2028", "\x85", "\x0c")
    )
    log_event(Event("unexpected_error", {"detail": forged, "exception": ValueError(f"why{forged}\x1b[2J\ud800")}))
    first, *rest = capsys.readouterr().err.splitlines()
    assert "ERROR Unexpected error detail=" in first
    assert [line for line in rest if not line.startswith("    ")] == []
    assert "\x1b" not in "".join(rest)


@pytest.mark.parametrize(
    ("identifier", "shown"), [("hash456", "hash…"), ("x", "…"), ("abc", "ab…"), ("x" * 128, "xxxxxxxx…")]
)
def test_an_identifier_is_never_shown_whole(identifier, shown):
    assert cut(identifier) == shown
    assert identifier not in shown


@pytest.mark.parametrize("text", ['a \\"b\\" c', 'a\\"b', "ab"])
def test_what_has_quotes_or_spaces_in_it_is_one_word(make_app, capsys, text):
    service = make_app()
    service.redis.set("settings", f'{{"llm_max_tokens": "{text}"}}')
    assert service.chat().status_code == 200
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "Setting ignored" in line]
    shown = line.partition(" got=")[2]
    assert json.loads(shown) == f'"{text}"'
