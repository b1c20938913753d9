"""What is in the code is on the pages, and the other way round."""

import json
import re
import time
from pathlib import Path

import pytest
import yaml

import backends
import flaskapp
from backends.budgets import Budget, Calendar, Forever, Sliding
from backends.conformance.cases import ROOMY
from backends.keys import (
    OVERHEAD_PREFIX,
    PENDING_BUCKETS,
    SETTING_UNSET_PREFIX,
    SETTINGS_KEY,
    WINDOW_BUCKETS,
    bucket_seconds_of,
    counter_key,
    emergency_key,
    idempotency_key,
    known_key,
    marker_key,
    record_key,
    reset_key,
    rows_at,
    running_key,
)
from backends.ledger.emergency import book_emergency_spend
from docs.settings_page import PAGE, renewed
from flaskapp.config import variables
from flaskapp.ops.logs import _WORDS, EVENTS
from flaskapp.ops.metrics import Metrics
from flaskapp.settings import LiveSettings
from tests.docs.pages import ROOT, rows
from tests.servers import ADMIN_TOKEN

DOCS = ROOT / "docs"
AT_SECONDS = 1_773_480_030  # 2026-03-14 09:20:30 UTC
SOURCES = [path for package in (backends, flaskapp) for path in Path(package.__file__).parent.rglob("*.py")]


def unquoted(cell: str) -> str:
    return cell.strip("`")


# --- settings


def test_the_tables_of_settings_are_those_of_the_code():
    assert PAGE.read_text(encoding="utf-8") == renewed(PAGE.read_text(encoding="utf-8")), (
        "run: python docs/settings_page.py"
    )


def test_the_page_of_settings_would_notice_a_change():
    page = PAGE.read_text(encoding="utf-8")
    assert renewed(page.replace("`0.02`", "`0.03`")) == renewed(page)
    assert page.replace("`0.02`", "`0.03`") != page


def test_every_variable_has_a_row():
    told = {unquoted(cell) for row in rows(PAGE, "setting") for cell in row[:2]}
    told |= {unquoted(row[0]) for row in rows(PAGE, "variable")}
    assert {row.name for row in variables()} - told == set()
    assert {row.name.lower() for row in variables() if row.live} - told == set()


def test_every_variable_that_is_passed_to_a_container_is_told():
    compose = yaml.safe_load((ROOT / "docker-compose.dev.yml").read_text(encoding="utf-8"))
    page = PAGE.read_text(encoding="utf-8")
    assert [name for name in compose["services"]["backend"]["environment"] if f"`{name}`" not in page] == []


# --- metrics and events


def test_the_page_of_metrics_names_what_there_is_and_nothing_else():
    families = Metrics(None, "atomic")._registry.collect()
    exposed = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    assert {unquoted(row[0]) for row in rows(DOCS / "METRICS.md", "metric")} == exposed


def test_the_page_of_metrics_names_the_labels():
    told = {unquoted(row[0]): set(re.findall(r"`(\w+)`", row[1])) for row in rows(DOCS / "METRICS.md", "metric")}
    metrics = Metrics(None, "atomic")._registry._collector_to_names
    names = {part._name + ("_total" if part._type == "counter" else ""): set(part._labelnames) for part in metrics}
    assert told == names


def test_every_event_is_told_with_the_words_of_the_log():
    told = {unquoted(row[0]): row[1] for row in rows(DOCS / "METRICS.md", "`name`")}
    own_metric = {"reserved", "refused", "duplicate", "check_failed", "settled", "expired", "extended"}
    own_metric |= {"extension_refused", "shadow_refused"}
    assert own_metric.isdisjoint(told)
    assert set(told) | own_metric == _events() | {"extended"} == EVENTS
    assert {name: words for name, words in told.items() if name in _WORDS} == {
        name: words for name, words in _WORDS.items() if name not in own_metric
    }


def _events() -> set[str]:
    text = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    return set(re.findall(r"(?:\bEvent|\b_?tell|\b_?emit|\bfailed)\(\s*\"([a-z_]+)\"", text))


# --- keys


WILD = {
    "<id>": r".+",
    "<net>": r".+",
    "<owner>": r".+",
    "<scope>": r"[a-z_]+",
    "<name>": r"[a-z0-9_]+",
    "<setting>": r"[a-z_]+",
    "<n>": r"\d+",
    "<unit>": r"(?:hour|day|week|month)",
    "<start>": r"\d+",
    "<rid>": r"[^:]+",
    "<instance>": r"[0-9a-f]{16}",
    "<challenge>": r"[0-9a-f]{64}",
    "<digest>": r"[0-9a-f]{32}",
    "<date>": r"\d{4}-\d\d-\d\d",
    "<hour>": r"\d\d",
    "<model>": r".+",
    "…": r".+",
}
FOR_EVER = "for ever"


def key_rows():
    return [[unquoted(row[0]), *row[1:]] for row in rows(DOCS / "KEYS.md", "key")]


def pattern_of(key: str) -> "re.Pattern[str]":
    parts = re.split("(" + "|".join(map(re.escape, WILD)) + ")", key)
    return re.compile("".join(WILD.get(part) or re.escape(part) for part in parts))


def names_of(key: str) -> list[str]:
    """What the key map calls it."""
    return [row[0] for row in key_rows() if pattern_of(row[0]).fullmatch(key)]


def keys_of_the_code() -> set[str]:
    """One of each kind."""
    periods = {"some": Calendar("month", "Europe/Berlin"), "other": Sliding(3_600), "trial": Forever()}
    further = [Budget(name, "2001:db8::/56", period, None) for name, period in periods.items()]
    made = rows_at((*ROOMY.budgets("hash456", "2001:db8::/56"), *further), AT_SECONDS)
    keys = {key for row in made for key in (row.key, row.pending_key)}
    keys |= {running_key(row.key) for row in made if row.layout.window_seconds}
    keys |= {record_key("rid1"), marker_key("hash456"), reset_key("hash456"), idempotency_key("0" * 32)}
    keys |= {emergency_key("0" * 16, AT_SECONDS), OVERHEAD_PREFIX + "gpt-4o", SETTING_UNSET_PREFIX + "budgets"}
    return keys | {SETTINGS_KEY, "llm:challenge:" + "0" * 64, "llm:session:" + "0" * 32, counter_key("x")}


def test_the_key_map_is_that_of_the_code():
    names = {key: names_of(key) for key in keys_of_the_code()}
    assert {key: called for key, called in names.items() if len(called) != 1} == {}
    assert {name for [name] in names.values()} == {row[0] for row in key_rows()}


def test_the_key_map_says_what_the_head_of_the_code_says():
    head = Path(backends.keys.__file__).read_text(encoding="utf-8")
    # A key that is too long for its column goes on in the next line.
    row = r"^``([^`]+)``\s+(string|zset)\s+.+?\s{2,}(.+)(?:\n``([^`]+)``(?!\s+(?:string|zset)))?"
    told = [(key + more, kind, ttl) for key, kind, ttl, more in re.findall(row, head, re.MULTILINE)]
    assert [(row[0], row[1]) for row in key_rows()] == [(key, kind) for key, kind, _ in told]
    assert [ttl for row, (_, _, ttl) in zip(key_rows(), told, strict=True) if not row[3].startswith(ttl)] == []


def test_the_key_map_says_how_fine_the_buckets_are():
    page = (DOCS / "KEYS.md").read_text(encoding="utf-8")
    default = LiveSettings().high_cost_window_seconds
    assert f"at most {WINDOW_BUCKETS + 1} buckets: {WINDOW_BUCKETS}, and" in page
    assert f"1/{WINDOW_BUCKETS} of the window long, {bucket_seconds_of(default)} seconds by default" in page
    assert f"at most {PENDING_BUCKETS + 2} buckets" in page


BUDGETS = [
    {"name": "some", "scope": "identifier", "period": "month", "limit_usd": "5"},
    {"name": "other", "scope": "model", "period": {"sliding_seconds": 3_600}, "limit_usd": "5"},
    {"name": "trial", "scope": "global", "period": "forever", "limit_usd": "5"},
]


@pytest.fixture
def used(make_app):
    """A Redis after a visit of each kind: admitted, refused, with a challenge, setting, key; a reset; a log-out."""
    service = make_app(
        ENABLE_COST_THROTTLING="true",
        ENABLE_CHALLENGE_RESPONSE="false",
        DEMO_TOKENS_PER_SECOND="20",
        BUDGETS=json.dumps(BUDGETS),
    )
    assert service.chat("hash456", max_tokens=1).status_code == 200
    assert service.patch(daily_cost_limit_usd="0.001", llm_max_tokens=None).status_code == 200
    assert service.chat("poor").status_code == 429
    assert service.client.get("/api/v1/auth/challenge", headers={"X-Fingerprint": "hash456"}).status_code == 200
    under_way = service.open_chat("hash457", max_tokens=50, headers={"Idempotency-Key": "one"})
    service.redis.set("llm:reset:hash457", "1", ex=60)
    service.tollgate.overheads.learn("gpt-4o", 5)
    book_emergency_spend(service.tollgate.link, "0" * 16, int(time.time()) // 3_600, 5, 1)
    service.client.post("/admin/login", data={"token": ADMIN_TOKEN})
    csrf = re.search(r'name="csrf_token" value="(\w+)"', service.client.get("/admin").text)[1]
    assert service.client.post("/admin/logout", data={"csrf_token": csrf}).status_code == 303
    yield service.redis
    under_way.close()


def test_a_redis_in_use_holds_what_the_key_map_says(used):
    table, seen = {row[0]: row for row in key_rows()}, set()
    for key in used.scan_iter("*"):
        names = names_of(key)
        assert len(names) == 1, (key, names)
        _, value_type, _, ttl, *_ = table[names[0]]
        assert used.type(key) == value_type, key
        assert (used.ttl(key) < 0) == ttl.startswith(FOR_EVER), key
        seen.update(names)
    assert seen == set(table)


def test_only_settings_and_what_never_ends_are_kept_for_ever():
    kept = {row[0] for row in key_rows() if row[3].startswith(FOR_EVER)}
    assert kept == {SETTINGS_KEY, "llm:budget:<name>:forever:<owner>"}


def test_the_audit_knows_every_key_of_a_redis_in_use(used):
    keys = [key for key in used.scan_iter("*") if key != SETTINGS_KEY]
    assert [key for key in keys if known_key(key) is None] == []
