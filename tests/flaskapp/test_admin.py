import json
import re
from html import unescape
from html.parser import HTMLParser

import pytest
from flask import Flask, g

from backends.clock import SystemClock
from backends.store.link import Link
from flaskapp.admin import Panel, make_admin
from flaskapp.admin.access import SESSION_SECONDS
from flaskapp.admin.panel import _GROUPS
from flaskapp.admin.tables import TABLES
from flaskapp.config import load_config
from flaskapp.http.refusals import register_error_handlers
from flaskapp.settings import LiveSettings, SettingsStore

TOKEN = "geheim-pässword"
BEARER = {"Authorization": f"Bearer {TOKEN}".encode().decode("latin-1")}
URL = "/api/v1/admin/settings"


class HandClock:
    def __init__(self):
        self.now_seconds = 1_800_000_000

    def now_us(self):
        return self.now_seconds * 1_000_000

    def monotonic_seconds(self):
        return float(self.now_seconds)


class Controls(HTMLParser):
    """Inputs, buttons, selects and labels of a page, by name or for."""

    def __init__(self, page):
        super().__init__()
        self.found, self.labels, self.hidden = {}, set(), {}
        self.tags = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag == "label":
            self.labels.add(attrs["for"])
        elif attrs.get("type") == "hidden":
            self.hidden[attrs["name"]] = attrs["value"]
        elif tag in {"input", "button", "select"} and "name" in attrs:
            self.found[attrs["name"]] = attrs


class Form(HTMLParser):
    """What a browser sends of a form: the values of its fields, by name, and what the page marks as wrong there."""

    def __init__(self, page, form_id):
        super().__init__()
        self.page, self.form_id = page, form_id
        self.fields, self.marked, self.focus = {}, [], None
        self._is_here, self._select = False, None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "form":
            self._is_here, self.action = attrs.get("id") == self.form_id, attrs["action"]
        if not self._is_here:
            return
        if tag in {"input", "select"}:
            places = self.fields.setdefault(attrs["name"], [])
            places.append(attrs.get("value", ""))
            self._select = places if tag == "select" else None
            if "aria-invalid" in attrs:
                self.marked.append((attrs["name"], len(places), attrs["aria-describedby"]))
            if "autofocus" in attrs:
                assert self.focus is None
                self.focus = (attrs["name"], len(places))
        elif tag == "option" and "selected" in attrs:
            self._select[-1] = attrs["value"]

    def handle_endtag(self, tag):
        self._is_here = self._is_here and tag != "form"

    def rows(self):
        """Of a list: its rows, the fields that are blank left out."""
        columns = [(name, texts) for name, texts in self.fields.items() if name not in {"csrf_token", "seen"}]
        count = len(columns[0][1])
        return [{name: texts[row] for name, texts in columns if texts[row]} for row in range(count)]

    def type(self, row, **texts):
        """Type into a row, from 0 on; -1 is the last one."""
        for name, text in texts.items():
            self.fields[name][row] = text
        return self


def shown_list(client, name):
    return Form(client.get("/admin").text, name)


def press(client, form, button=None):
    """Save, or press another button of the form: its name, or its name and value."""
    name, value = button if isinstance(button, tuple) else (button, "1")
    return client.post(f"/admin/settings/{form.form_id}", data={**form.fields, **({name: value} if button else {})})


@pytest.fixture
def clock():
    return HandClock()


@pytest.fixture
def link(redis_url):
    link = Link(redis_url, clock=SystemClock())
    link.run(lambda client: client.flushall())
    yield link
    link.close()


@pytest.fixture
def raw(link):
    return lambda: json.loads(link.run(lambda client: client.get("settings")) or b"{}")


@pytest.fixture
def make_client(clock):
    def make(link, token=TOKEN, *, throttling=None, budgets="", **panel):
        environment = {"ENVIRONMENT": "development", "HOURLY_SPEND_LIMIT_USD": "3", "BUDGETS": budgets}
        config = load_config({**environment, "ENABLE_COST_THROTTLING": throttling} if throttling else environment)
        store = SettingsStore(link, config.live_baseline, [].append)
        app = Flask(__name__)
        panel = {
            "mode": config.mode,
            "backend_name": "atomic",
            "clock": clock,
            "link": link,
            **panel,
        }
        app.before_request(lambda: setattr(g, "request_id", "0" * 32))
        register_error_handlers(app)
        app.register_blueprint(make_admin(Panel(store, **panel), token))
        return app.test_client()

    return make


@pytest.fixture
def client(make_client, link):
    return make_client(link)


@pytest.fixture
def operator(client):
    answer = client.post("/admin/login", data={"token": TOKEN})
    assert (answer.status_code, answer.location) == (303, "/admin")
    return client


def csrf(client):
    return Controls(client.get("/admin").text).hidden["csrf_token"]


def change(client, **form):
    return client.post("/admin/settings", data={"csrf_token": csrf(client), **form})


# --- the API


def test_every_setting_is_shown_with_value_source_and_bounds(client):
    answer = client.get(URL, headers=BEARER)
    assert (answer.status_code, answer.mimetype) == (200, "application/json")
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.json["mode"] == "development"
    settings = answer.json["settings"]
    assert list(settings) == list(LiveSettings.model_fields)
    assert settings["enable_cost_throttling"] | {"description": ""} == {
        "value": False,
        "source": "default",
        "bounds": {"values": [True, False]},
        "unit": "",
        "allowed": "true or false",
        "description": "",
    }
    assert (settings["hourly_spend_limit_usd"]["value"], settings["hourly_spend_limit_usd"]["source"]) == (
        3,
        "environment",
    )
    assert settings["daily_cost_limit_usd"]["bounds"] == {"minimum": 0.000000001, "maximum": 1000000, "places": 9}
    assert settings["high_cost_window_seconds"]["bounds"] == {"minimum": 120, "maximum": 2678400}


def test_a_patch_changes_and_null_goes_back(client, raw):
    answer = client.patch(URL, headers=BEARER, json={"enable_cost_throttling": True, "daily_cost_limit_usd": "0.01"})
    assert answer.status_code == 200
    assert raw() == {"enable_cost_throttling": True, "daily_cost_limit_usd": 0.01}
    assert answer.json["settings"]["daily_cost_limit_usd"]["value"] == 0.01
    assert answer.json["settings"]["daily_cost_limit_usd"]["source"] == "redis"
    answer = client.patch(URL, headers=BEARER, json={"enable_cost_throttling": None, "daily_cost_limit_usd": None})
    assert answer.json["settings"]["daily_cost_limit_usd"]["source"] == "default"
    assert raw() == {}


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ('{"nonsense": 1, "llm_max_tokens": 5}', ["nonsense"]),
        ('{"llm_max_tokens": true}', ["llm_max_tokens"]),
        ('{"llm_max_tokens": "5"}', ["llm_max_tokens"]),
        ('{"llm_max_tokens": 5.0}', ["llm_max_tokens"]),
        (
            '{"enable_cost_throttling": 1, "daily_cost_limit_usd": 0, "llm_max_tokens": 5}',
            ["enable_cost_throttling", "daily_cost_limit_usd"],
        ),
        ('{"daily_cost_limit_usd": 1e308}', ["daily_cost_limit_usd"]),
        ('{"daily_cost_limit_usd": "1e9"}', ["daily_cost_limit_usd"]),
        ('{"daily_cost_limit_usd": -1}', ["daily_cost_limit_usd"]),
        (f'{{"llm_max_tokens": {"9" * 4_301}}}', ["llm_max_tokens"]),
        ('{"high_cost_window_seconds": 60}', ["high_cost_window_seconds"]),
        ("[]", ["body"]),
        ("7", ["body"]),
    ],
)
def test_an_unusable_patch_changes_nothing_and_says_why_for_each_field(client, raw, body, fields):
    answer = client.patch(URL, headers=BEARER, data=body, content_type="application/json")
    assert (answer.status_code, answer.mimetype) == (422, "application/problem+json")
    assert answer.json["error"] == "invalid_request"
    assert list(answer.json["fields"]) == fields
    assert all(f"{name}: " in answer.json["reason"] for name in fields)
    assert len(answer.data) < 2_000
    assert raw() == {}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"llm_max_tokens": 5', 400),
        (b'{"llm_max_tokens": 5, "llm_max_tokens": 6}', 400),
        (b'{"daily_cost_limit_usd": NaN}', 400),
        (b"[" * 100_000, 400),
        (b"\xff", 400),
        (b"", 400),
        (b" " * 262_145, 413),
    ],
)
def test_what_is_no_json_is_refused(client, raw, body, status):
    answer = client.patch(URL, headers=BEARER, data=body, content_type="application/json")
    assert (answer.status_code, answer.json["error"]) == (status, "invalid_request")
    assert raw() == {}


def test_another_content_type_is_refused(client):
    assert client.patch(URL, headers=BEARER, data="{}", content_type="text/plain").status_code == 415


STRANGERS = [
    {},
    {"Authorization": ""},
    {"Authorization": "Bearer"},
    {"Authorization": "Bearer "},
    {"Authorization": "Bearer geheim"},
    {"Authorization": "Bearer \xff\xfe"},
    {"Authorization": BEARER["Authorization"].replace("Bearer", "Basic")},
    {"Authorization": "Bearer " + "x" * 10_000},
]


@pytest.mark.parametrize("headers", STRANGERS)
def test_strangers_get_401(client, headers):
    for answer in (client.get(URL, headers=headers), client.patch(URL, headers=headers, json={"llm_max_tokens": 1})):
        assert (answer.status_code, answer.json["error"]) == (401, "unauthorized")
        assert answer.headers["WWW-Authenticate"] == 'Bearer realm="admin"'


@pytest.mark.parametrize("headers", [*STRANGERS, {"Authorization": "Bearer None"}])
def test_without_a_token_everything_is_401(make_client, link, headers):
    client = make_client(link, token=None)
    assert client.get(URL, headers=headers).status_code == 401
    assert client.patch(URL, headers=headers, json={}).status_code == 401
    assert client.get("/admin", headers=headers).status_code == 401
    assert client.post("/admin/login", data={"token": ""}, headers=headers).status_code == 401
    assert client.post("/admin/settings", data={}, headers=headers).status_code == 401
    assert client.post("/admin/logout", headers=headers).status_code == 401
    assert "no <code>ADMIN_TOKEN</code> is set" in client.get("/admin").text


def test_a_bearer_token_of_any_characters_and_case_of_the_scheme_passes(client):
    assert (
        client.get(URL, headers={"Authorization": BEARER["Authorization"].replace("Bearer", "bearer")}).status_code
        == 200
    )


@pytest.mark.parametrize("token", ["voilà", "\u2085", "déjà vu…", "ends in \u0085"[:-1] + "Å"])
def test_a_token_whose_last_byte_looks_like_a_blank_opens_the_door(make_client, link, token):
    header = {"Authorization": f"Bearer  {token} ".encode().decode("latin-1")}
    assert make_client(link, token=token).get(URL, headers=header).status_code == 200


# --- the log-in


def test_a_wrong_token_is_401_and_leaves_no_cookie(client):
    for token in ("", "wrong", "\udcff".encode("utf-8", "surrogatepass"), "x" * 4_000):
        answer = client.post("/admin/login", data={"token": token})
        assert answer.status_code == 401
        assert "Set-Cookie" not in answer.headers
        assert 'type="password"' in answer.text


def test_the_cookie_is_for_this_room_only_and_not_for_scripts(client):
    cookie = client.post("/admin/login", data={"token": TOKEN}).headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert "Path=/admin" in cookie
    assert f"Max-Age={SESSION_SECONDS}" in cookie
    assert "Secure" not in cookie
    secure = client.post("/admin/login", data={"token": TOKEN}, base_url="https://localhost").headers["Set-Cookie"]
    assert "Secure" in secure
    # Behind a proxy that speaks TLS; its own headers say nothing.
    for headers, is_secure in (({"Origin": "https://guard.example"}, True), ({"X-Forwarded-Proto": "https"}, False)):
        cookie = client.post("/admin/login", data={"token": TOKEN}, headers=headers).headers["Set-Cookie"]
        assert ("Secure" in cookie) is is_secure


def test_a_session_ends_in_time(operator, clock):
    clock.now_seconds += SESSION_SECONDS - 1
    assert operator.get("/admin").status_code == 200
    clock.now_seconds += 1
    assert operator.get("/admin").status_code == 401


def test_a_session_ends_by_logging_out(operator):
    assert operator.post("/admin/logout").status_code == 401
    assert operator.get("/admin").status_code == 200
    assert operator.post("/admin/logout", data={"csrf_token": csrf(operator)}).status_code == 303
    assert operator.get("/admin").status_code == 401


def test_a_copy_of_the_cookie_is_worth_nothing_after_a_log_out(operator, client, make_client, link):
    copies = []
    for _ in range(2):
        client.post("/admin/login", data={"token": TOKEN})
        copies.append(make_client(link))
        copies[-1].set_cookie("tollgate_admin", client.get_cookie("tollgate_admin", path="/admin").value, path="/admin")
    assert [copy.get("/admin").status_code for copy in copies] == [200, 200]
    form = {"csrf_token": csrf(copies[1])}
    client.post("/admin/logout", data=form)
    # Only that session has ended, on every worker.
    assert [copy.get("/admin").status_code for copy in copies] == [200, 401]
    assert copies[1].post("/admin/settings", data={**form, "llm_max_tokens": "7"}).status_code == 401
    (key,) = link.run(lambda redis: redis.keys("llm:session:*"))
    assert re.fullmatch(rb"llm:session:[0-9a-f]{32}", key)
    assert 0 < link.run(lambda redis: redis.ttl(key)) <= SESSION_SECONDS


def test_a_log_out_while_redis_is_away_says_what_it_is_worth(make_client):
    client = make_client(Link("redis://127.0.0.1:1/0", clock=SystemClock()))
    client.post("/admin/login", data={"token": TOKEN})
    answer = client.post("/admin/logout", data={"csrf_token": csrf(client)})
    assert "a copy of the cookie stays good" in answer.text
    assert client.get_cookie("tollgate_admin", path="/admin") is None


def test_a_session_holds_on_every_worker_and_ends_with_its_token(operator, make_client, link):
    cookie = operator.get_cookie("tollgate_admin", path="/admin").value
    for token, status in ((TOKEN, 200), ("another", 401), (None, 401)):
        other = make_client(link, token=token)
        other.set_cookie("tollgate_admin", cookie, path="/admin")
        assert other.get("/admin").status_code == status


@pytest.mark.parametrize("cookie", ["", "x", "e30.x", "a.b.c", "=", "x" * 3_000])
def test_a_forged_cookie_is_401(client, cookie):
    client.set_cookie("tollgate_admin", cookie, path="/admin")
    assert client.get("/admin").status_code == 401


# --- the page


def test_the_page_shows_every_setting_under_its_name(operator):
    answer = operator.get("/admin")
    page = Controls(answer.text)
    assert answer.status_code == 200
    assert page.labels == set(LiveSettings.model_fields) - set(TABLES)
    fields = {column.name for columns in TABLES.values() for column in columns}
    assert set(page.found) == (page.labels | fields | {"add"})
    for name in TABLES:
        assert re.search(rf'<table aria-labelledby="{name}-label" aria-describedby="{name}-about">', answer.text)
    assert page.found["enable_cost_throttling"]["role"] == "switch"
    assert page.found["enable_cost_throttling"]["aria-checked"] == "false"
    window = page.found["high_cost_window_seconds"]
    assert (window["type"], window["value"], window["min"], window["max"]) == ("number", "600", "120", "2678400")
    assert (page.found["daily_cost_limit_usd"]["value"], page.found["daily_cost_limit_usd"]["min"]) == (
        "0.25",
        "0.000000001",
    )
    assert "development" in answer.text
    assert "atomic" in answer.text
    assert "Others" not in answer.text
    assert sorted(name for names in _GROUPS.values() for name in names) == sorted(LiveSettings.model_fields)


def test_the_page_is_alone_and_is_kept_nowhere(operator, client):
    for answer in (operator.get("/admin"), client.post("/admin/login", data={"token": "wrong"})):
        policy = answer.headers["Content-Security-Policy"]
        nonce = re.search(r"style-src 'nonce-([\w-]+)'", policy)[1]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert f'<style nonce="{nonce}">' in answer.text
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "http://" not in answer.text
        assert "https://" not in answer.text
        assert "<script" not in answer.text
        assert ' style="' not in answer.text


def test_a_switch_is_one_press_and_back_again(operator, raw):
    button = Controls(operator.get("/admin").text).found["enable_cost_throttling"]
    answer = change(operator, enable_cost_throttling=button["value"])
    assert (answer.status_code, answer.location) == (
        303,
        "/admin?changed=enable_cost_throttling#enable_cost_throttling",
    )
    assert raw() == {"enable_cost_throttling": True}
    page = operator.get(answer.location)
    assert Controls(page.text).found["enable_cost_throttling"]["aria-checked"] == "true"
    assert "Saved: <code>enable_cost_throttling</code> is <strong>true</strong>" in page.text
    assert "Back to default (false)" in page.text
    assert change(operator, unset="enable_cost_throttling").status_code == 303
    assert raw() == {}


def test_a_number_a_choice_and_a_rate_are_changed(operator, raw):
    change(operator, daily_cost_limit_usd=" 0.01 ")
    change(operator, throttle_on_error="closed", chat_rate_limit="5 per minute")
    assert raw() == {"daily_cost_limit_usd": 0.01, "throttle_on_error": "closed", "chat_rate_limit": "5 per minute"}
    page = operator.get("/admin").text
    assert re.search(r"<option selected>closed</option>", page)
    assert "Back to default (0.25)" in page


def test_back_beats_what_stands_in_the_field(operator, raw):
    change(operator, llm_max_tokens="9")
    answer = change(operator, llm_max_tokens="not a number", unset="llm_max_tokens")
    assert answer.status_code == 303
    assert raw() == {}


def test_what_was_typed_wrongly_is_kept_beside_its_reason(operator, raw):
    answer = change(operator, llm_max_tokens='"><script>0</script>', daily_cost_limit_usd="1")
    assert answer.status_code == 422
    assert "<script" not in answer.text
    page = Controls(answer.text)
    assert page.found["llm_max_tokens"]["value"] == '"><script>0</script>'
    assert page.found["llm_max_tokens"]["aria-invalid"] == "true"
    assert page.found["llm_max_tokens"]["aria-describedby"].split() == [
        "llm_max_tokens-about",
        "llm_max_tokens-problem",
    ]
    assert page.found["daily_cost_limit_usd"]["value"] == "1"
    assert "aria-invalid" not in page.found["daily_cost_limit_usd"]
    assert "This has to be a whole number of tokens from 1 to 1000000. Now it is 400." in answer.text
    assert raw() == {}


@pytest.mark.parametrize("form", [{"nonsense": "1"}, {"unset": "nonsense"}, {"enable_cost_throttling": "maybe"}])
def test_a_form_that_is_not_ours_is_refused(operator, raw, form):
    assert change(operator, **form).status_code == 422
    assert raw() == {}


def test_a_form_without_our_mark_changes_nothing(operator, raw):
    for mark in ({}, {"csrf_token": ""}, {"csrf_token": "ä" * 64}):
        answer = operator.post("/admin/settings", data={**mark, "llm_max_tokens": "9"})
        assert answer.status_code == 403
    assert raw() == {}


def test_a_mark_of_one_session_is_none_in_another(operator, make_client, link, raw):
    mark = csrf(operator)
    other = make_client(link)
    other.post("/admin/login", data={"token": TOKEN})
    assert other.post("/admin/settings", data={"csrf_token": mark, "llm_max_tokens": "9"}).status_code == 403


def test_strangers_change_nothing(client, raw):
    assert client.post("/admin/settings", data={"llm_max_tokens": "9"}).status_code == 401
    assert raw() == {}


@pytest.mark.parametrize("changed", ["nonsense", "<script>", ",,", "llm_max_tokens"])
def test_the_notice_shows_only_settings(operator, changed):
    page = operator.get("/admin", query_string={"changed": changed})
    assert page.status_code == 200
    assert ("Saved" in page.text) == (changed == "llm_max_tokens")
    assert "<script" not in page.text


def test_a_list_that_comes_as_one_text_is_refused_in_the_words_of_its_row(operator, raw):
    answer = change(operator, budgets='[{"name": "a", "scope": "team", "period": "year", "limit_usd": 1}]')
    assert answer.status_code == 422
    assert "Nothing was changed. budgets: row 1, period: {" in unescape(answer.text)
    assert "has to be" not in answer.text
    assert "budgets: has to be a JSON list" in change(operator, budgets="{}").text
    assert raw() == {}


# --- the two lists

BLANK = {"mode": "enforce"}
TYPED = {"name": "team_month", "scope": "team", "period": "month", "limit_usd": "50"}
MONTH = {"name": "team_month", "scope": "team", "period": "month", "limit_usd": 50}
EVERY_FIELD = {
    "name": "a_1",
    "scope": "identifier",
    "owner": "hash456",
    "period": "sliding",
    "sliding_seconds": "3600",
    "limit_usd": "0.000000001",
    "mode": "shadow",
    "throttle_seconds": "60",
}


def test_a_list_without_rows_has_a_blank_one_to_type_into(operator):
    for name, blank in (("budgets", BLANK), ("budget_overrides", {})):
        form = shown_list(operator, name)
        assert (form.rows(), form.marked, form.focus) == ([blank], [], None)
    assert 'name="remove"' not in form.page


def test_a_budget_is_typed_saved_and_shown(operator, raw):
    form = shown_list(operator, "budgets").type(0, **{**TYPED, "limit_usd": " 50.00 "})
    answer = press(operator, form)
    assert (answer.status_code, answer.location) == (303, "/admin?changed=budgets#budgets")
    assert raw() == {"budgets": [MONTH]}
    page = operator.get(answer.location).text
    assert "Saved: <code>budgets</code> is <strong>1 row</strong>" in page
    assert Form(page, "budgets").rows() == [{**TYPED, **BLANK}, BLANK]
    press(operator, shown_list(operator, "budgets").type(1, **EVERY_FIELD))
    assert raw()["budgets"][1] == {
        "name": "a_1",
        "scope": "identifier",
        "owner": "hash456",
        "period": {"sliding_seconds": 3600},
        "limit_usd": 0.000000001,
        "mode": "shadow",
        "throttle_seconds": 60,
    }
    assert shown_list(operator, "budgets").rows() == [{**TYPED, **BLANK}, EVERY_FIELD, BLANK]


def test_what_is_shown_can_be_saved_again(operator, raw):
    press(operator, shown_list(operator, "budgets").type(0, **EVERY_FIELD))
    before = raw()
    assert press(operator, shown_list(operator, "budgets")).status_code == 303
    assert raw() == before


def test_an_override_is_typed_saved_and_shown_and_its_budget_suggested(operator, raw):
    press(operator, shown_list(operator, "budgets").type(0, **TYPED))
    form = shown_list(operator, "budget_overrides")
    assert [name in form.page for name in ('<option value="day">', '<option value="team_month">')] == [True, True]
    until = "2030-01-01T00:00:00+01:00"
    assert press(operator, form.type(0, budget="day", owner="hash456", limit_usd="0", until=until)).status_code == 303
    utc = "2029-12-31T23:00:00Z"
    assert raw()["budget_overrides"] == [{"budget": "day", "owner": "hash456", "limit_usd": 0, "until": utc}]
    row = {"budget": "day", "owner": "hash456", "limit_usd": "0", "until": utc}
    assert shown_list(operator, "budget_overrides").rows() == [row, {}]


def test_the_seconds_count_only_for_a_sliding_window(operator, raw):
    press(operator, shown_list(operator, "budgets").type(0, **TYPED, sliding_seconds="much"))
    assert raw() == {"budgets": [MONTH]}


def test_one_more_row_keeps_what_was_typed_and_saves_nothing(operator, raw):
    answer = press(operator, shown_list(operator, "budgets").type(0, name="<b>", limit_usd=" much "), "add")
    assert answer.status_code == 200
    form = Form(answer.text, "budgets")
    assert form.rows() == [{"name": "<b>", "limit_usd": " much ", **BLANK}, BLANK]
    assert (form.marked, form.focus) == ([], ("name", 2))
    assert "Not saved yet." in answer.text
    form = Form(press(operator, form, "add").text, "budgets")
    assert form.rows() == [{"name": "<b>", "limit_usd": " much ", **BLANK}, BLANK, BLANK]
    assert raw() == {}


def test_one_row_less_is_saved_when_save_is_pressed(operator, raw):
    press(operator, shown_list(operator, "budgets").type(0, **TYPED))
    press(operator, shown_list(operator, "budgets").type(1, **{**TYPED, "name": "other"}))
    answer = press(operator, shown_list(operator, "budgets").type(2, name="typed"), ("remove", "1"))
    form = Form(answer.text, "budgets")
    assert [row.get("name") for row in form.rows()] == ["other", "typed", None]
    assert len(raw()["budgets"]) == 2
    assert press(operator, form.type(1, name="")).status_code == 303
    assert [row["name"] for row in raw()["budgets"]] == ["other"]
    assert press(operator, Form(press(operator, form, ("remove", "1")).text, "budgets")).status_code == 409
    form = Form(press(operator, shown_list(operator, "budgets"), ("remove", "1")).text, "budgets")
    assert press(operator, form).status_code == 303
    assert raw() == {"budgets": []}


def test_each_wrong_row_has_its_reason_at_its_field_and_nothing_typed_is_lost(operator, raw):
    press(operator, shown_list(operator, "budgets").type(0, **TYPED))
    form = shown_list(operator, "budgets").type(1, name='"><script>', scope="team")
    for texts in ({**TYPED, "name": "b", "scope": ""}, {**TYPED, "name": "c", "period": "sliding"}):
        form = Form(press(operator, form, "add").text, "budgets").type(-1, **texts)
    typed = [{**TYPED, **BLANK}, {"name": '"><script>', "scope": "team", **BLANK}, *form.rows()[2:]]
    answer = press(operator, form)
    form = Form(answer.text, "budgets")
    assert answer.status_code == 422
    assert form.rows() == [*typed, BLANK]
    assert form.marked == [
        ("name", 2, "budgets-2-problem"),
        ("scope", 3, "budgets-3-problem"),
        ("sliding_seconds", 4, "budgets-4-problem"),
    ]
    assert form.focus == ("name", 2)
    assert "<script" not in answer.text
    page = unescape(answer.text)
    assert "Nothing was changed. budgets: row 2, name: 1 to 32 of a-z 0-9 _" in page
    assert "(and 2 more)." in page
    reasons = [page.partition(f'id="budgets-{row}-problem">')[2].partition("</p>")[0] for row in (2, 3, 4)]
    assert reasons[0].startswith("Row 2, <code>name</code>: 1 to 32 of a-z 0-9 _")
    assert reasons[1].startswith("Row 3, <code>scope</code>: identifier or ")
    assert reasons[1].endswith("; got nothing.")
    assert reasons[2].endswith('; got {"sliding_seconds": ""}.')
    assert raw() == {"budgets": [MONTH]}


def test_a_row_that_is_one_too_many_is_marked_at_its_beginning(operator, raw):
    form = shown_list(operator, "budgets")
    rows = [{**TYPED, "name": f"b{number}"} for number in range(17)]
    for name, texts in form.fields.items():
        form.fields[name] = texts if name in {"csrf_token", "seen"} else [row.get(name, texts[0]) for row in rows]
    answer = press(operator, form)
    assert answer.status_code == 422
    assert Form(answer.text, "budgets").marked == [("name", 17, "budgets-17-problem")]
    assert "Row 17: at most 16 further budgets that may apply to one request; got one more." in answer.text
    assert raw() == {}


def test_wrong_overrides_are_named_too(operator, raw):
    form = shown_list(operator, "budget_overrides").type(0, budget="day", owner="*", limit_usd="1")
    form = Form(press(operator, form, "add").text, "budget_overrides")
    answer = press(operator, form.type(1, budget="day", owner="a", limit_usd="1", until="tomorrow"))
    form = Form(answer.text, "budget_overrides")
    assert answer.status_code == 422
    assert [(name, row) for name, row, _ in form.marked] == [("owner", 1), ("until", 2)]
    assert raw() == {}


@pytest.mark.parametrize("hidden", ["name", "mode"])
def test_rows_whose_fields_do_not_belong_together_are_refused(operator, raw, hidden):
    form = shown_list(operator, "budgets").type(0, **TYPED)
    form.fields[hidden] = []
    assert press(operator, form).status_code == 422
    assert press(operator, form, "add").status_code == 422
    assert raw() == {}


def test_words_that_no_list_offers_are_refused_and_kept(operator, raw):
    answer = press(operator, shown_list(operator, "budgets").type(0, **{**TYPED, "scope": "<planet>"}))
    assert answer.status_code == 422
    assert "<option selected>&lt;planet&gt;</option>" in answer.text
    assert raw() == {}


def test_a_list_goes_back_to_the_environment(make_client, link, raw):
    client = make_client(link, budgets=json.dumps([TYPED]))
    client.post("/admin/login", data={"token": TOKEN})
    form = shown_list(client, "budgets")
    assert form.rows() == [{**TYPED, **BLANK}, BLANK]
    assert '<span class="source environment">environment</span>' in form.page
    press(client, form.type(0, limit_usd="7"))
    form = shown_list(client, "budgets")
    assert form.rows()[0]["limit_usd"] == "7"
    assert "Back to environment (1 row)" in form.page
    back = Form(form.page, "budgets-unset")
    assert client.post("/admin/settings", data=back.fields).status_code == 303
    assert raw() == {}
    assert shown_list(client, "budgets").rows()[0]["limit_usd"] == "50"


def test_a_list_is_shown_as_json_too(operator):
    assert "The same as JSON" not in operator.get("/admin").text
    press(operator, shown_list(operator, "budgets").type(0, **TYPED))
    assert f"<code>{json.dumps([MONTH])}</code>" in unescape(operator.get("/admin").text)


def test_a_list_that_has_changed_meanwhile_is_not_replaced_unseen(operator, client, raw):
    form = shown_list(operator, "budgets").type(0, **TYPED)
    client.patch(URL, headers=BEARER, json={"budgets": [{**MONTH, "name": "other"}]})
    answer = press(operator, form)
    assert answer.status_code == 409
    assert "budgets has changed since this page was made" in answer.text
    assert [row["name"] for row in raw()["budgets"]] == ["other"]
    form = Form(answer.text, "budgets")
    assert form.rows() == [{**TYPED, **BLANK}, BLANK]
    assert press(operator, form).status_code == 303
    assert [row["name"] for row in raw()["budgets"]] == ["team_month"]


def test_a_list_is_changed_in_a_session_by_its_own_form_only(operator, make_client, link, raw):
    form = shown_list(operator, "budgets").type(0, **TYPED)
    assert press(make_client(link), form).status_code == 401
    for mark in ("", "ä" * 64):
        answer = press(operator, form.type(0, csrf_token=mark))
        assert answer.status_code == 403
        assert "team_month" not in answer.text
    assert operator.post("/admin/settings/llm_max_tokens", data=form.fields).status_code == 404
    assert raw() == {}


def test_a_thousand_overrides_fit_into_the_form(operator, raw):
    form = shown_list(operator, "budget_overrides")
    form.fields |= {"budget": ["day"] * 1_000, "limit_usd": ["1"] * 1_000, "until": [""] * 1_000}
    # The longest owners that the service makes by itself are 64 digits: fingerprints may be longer, and then fewer fit.
    form.fields["owner"] = [f"{number:0>128}" for number in range(1_000)]
    assert press(operator, form).status_code == 303
    assert len(raw()["budget_overrides"]) == 1_000


# --- Redis away


@pytest.fixture
def dead_link():
    link = Link("redis://127.0.0.1:1", clock=SystemClock(), timeout_seconds=0.1)
    yield link
    link.close()


def test_without_redis_the_api_shows_what_it_knows_and_changes_nothing(make_client, dead_link):
    client = make_client(dead_link)
    assert client.get(URL, headers=BEARER).json["settings"]["hourly_spend_limit_usd"]["value"] == 3
    answer = client.patch(URL, headers=BEARER, json={"llm_max_tokens": 1})
    assert (answer.status_code, answer.json["error"], answer.json["reason"]) == (503, "throttle_unavailable", "store")
    assert answer.headers["Retry-After"] == "1"


def test_without_redis_the_page_says_so(make_client, dead_link):
    client = make_client(dead_link, throttling="true", is_degraded=lambda: True)
    client.post("/admin/login", data={"token": TOKEN})
    page = client.get("/admin")
    assert page.status_code == 200
    assert "Redis does not answer: these are the last known values." in page.text
    assert "Degraded." in page.text
    # Where nothing is throttled, no emergency budget is touched.
    idle = make_client(dead_link, is_degraded=lambda: True)
    idle.post("/admin/login", data={"token": TOKEN})
    assert "Degraded." not in idle.get("/admin").text
    answer = change(client, llm_max_tokens="9")
    assert answer.status_code == 503
    assert "Redis could not be asked" in answer.text


def test_without_redis_a_list_keeps_what_was_typed(make_client, dead_link):
    client = make_client(dead_link)
    client.post("/admin/login", data={"token": TOKEN})
    answer = press(client, shown_list(client, "budgets").type(0, **TYPED))
    assert answer.status_code == 503
    assert "Redis could not be asked" in answer.text
    assert Form(answer.text, "budgets").rows() == [{**TYPED, **BLANK}, BLANK]
