"""Pages of other origins: preflights, what they may read of answers and refusals, and where they may not ask at all."""

import itertools

import pytest

from backends.errors import ConfigurationError
from flaskapp.config import load_config
from flaskapp.http.cors import EXPOSED_HEADERS
from tests.servers import ADMIN_TOKEN, CHAT, LITECOIN, SETTINGS
from tests.upstream import Upstream

PAGE = "https://chat.example"
OTHER = "http://localhost:3000"
COMPLETIONS = "/v1/chat/completions"
FOR_PAGES = [CHAT, "/api/v1/auth/challenge", "/api/v1/usage", COMPLETIONS, "/v1/models", "/v1/responses", "/v1"]
NOT_FOR_PAGES = [SETTINGS, "/admin", "/metrics", "/healthz", "/readyz", "/openapi.json", "/nowhere", "/v10"]
NEEDED = {"RateLimit", "RateLimit-Policy", "Retry-After", "X-Request-ID", "X-Cost-Reserved-USD", "Server-Timing"}


def preflight(service, path, origin=PAGE, method="POST", headers="content-type,x-fingerprint"):
    asked = {"Origin": origin, "Access-Control-Request-Method": method, "Access-Control-Request-Headers": headers}
    return service.client.options(path, headers=asked)


def of_cors(answer):
    return {name.lower() for name, _ in answer.headers if name.lower().startswith("access-control-")}


@pytest.fixture
def service(make_app):
    return make_app(CORS_ORIGINS=f"{PAGE}, {OTHER}", API_KEYS="*")


@pytest.mark.parametrize("path", FOR_PAGES)
@pytest.mark.parametrize("origin", [PAGE, OTHER])
def test_a_preflight_is_answered_with_what_the_page_may_send(service, path, origin):
    answer = preflight(service, path, origin, headers="Content-Type, x-stainless-os,idempotency-key")
    assert (answer.status_code, answer.data) == (204, b"")
    assert answer.headers["Access-Control-Allow-Origin"] == origin
    assert "POST" in answer.headers["Access-Control-Allow-Methods"]
    assert answer.headers["Access-Control-Allow-Headers"] == "Content-Type, x-stainless-os,idempotency-key"
    assert 0 < int(answer.headers["Access-Control-Max-Age"]) <= 86_400
    assert {"Origin", "Access-Control-Request-Headers"} <= set(answer.vary)
    assert "Access-Control-Allow-Credentials" not in answer.headers


@pytest.mark.parametrize(
    ("path", "origin"),
    [*itertools.product(NOT_FOR_PAGES, [PAGE]), *itertools.product(FOR_PAGES, ["https://evil.example", "null", ""])],
)
def test_any_other_page_and_any_other_route_gets_no_word_of_it(service, path, origin):
    assert of_cors(preflight(service, path, origin)) == set()
    assert of_cors(service.client.get(path, headers={"Origin": origin})) == set()


@pytest.mark.parametrize(
    "origin", ["https://chat.example.evil", "https://chat.exampl", "http://chat.example", f"{PAGE}:8443"]
)
def test_an_origin_that_is_like_one_is_none(service, origin):
    assert of_cors(preflight(service, CHAT, origin)) == set()


def test_a_preflight_is_not_counted_and_an_answer_is(make_app):
    service = make_app(CORS_ORIGINS=PAGE, CHAT_RATE_LIMIT="1 per minute")
    assert {preflight(service, CHAT).status_code for _ in range(5)} == {204}
    assert service.redis.keys("llm:rate:*") == []
    headers = {"Origin": PAGE}
    assert [service.open_chat(headers=headers, buffered=True).status_code for _ in range(2)] == [200, 429]


@pytest.mark.parametrize("words", ["a b", "x\ty", "Ä", "a" * 5_000])
def test_what_is_no_list_of_headers_is_not_repeated(service, words):
    answer = preflight(service, CHAT, headers=words)
    assert answer.status_code == 204
    assert "Access-Control-Allow-Headers" not in answer.headers


def assert_readable(answer, origin=PAGE):
    """A page of `origin` can read the answer and all headers that it needs."""
    assert answer.headers["Access-Control-Allow-Origin"] == origin
    exposed = set(answer.headers["Access-Control-Expose-Headers"].split(", "))
    assert exposed == set(EXPOSED_HEADERS) >= NEEDED
    assert ("Origin" in answer.vary) == (origin != "*")


def test_a_page_can_read_whatever_a_route_answers(service):
    headers = {"Origin": PAGE, "X-Fingerprint": "hash456"}
    for path in FOR_PAGES:
        for ask in (service.client.get, service.client.post):
            assert_readable(ask(path, headers=headers))


def test_a_page_can_read_a_stream_a_refusal_and_a_bug(make_app, monkeypatch):
    service = make_app(CORS_ORIGINS=PAGE, HIGH_COST_THRESHOLD_USD="0.005")
    headers = {"Origin": PAGE}
    streamed, refused = (service.chat(headers=headers) for _ in range(2))
    assert (streamed.status_code, refused.status_code) == (200, 429)
    assert "no-transform" in streamed.headers["Cache-Control"]
    monkeypatch.setattr(service.tollgate.guard, "reserve", None)
    broken = service.chat("other", headers=headers)
    assert broken.status_code == 500
    for answer in (streamed, refused, broken):
        assert_readable(answer)


def test_a_page_can_read_that_the_upstream_failed(make_app):
    with Upstream() as upstream:
        service = make_app(CORS_ORIGINS="*", API_KEYS="*", LLM_BASE_URL=upstream.base_url)
        upstream.behave(status=500)
        asked = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
        for path, body in ((CHAT, LITECOIN), (COMPLETIONS, asked), (COMPLETIONS, {**asked, "stream": True})):
            answer = service.client.post(path, json=body, headers={"Origin": PAGE})
            assert answer.status_code == 502
            assert_readable(answer, "*")


def test_a_star_is_every_origin_and_admits_no_page_to_the_admin(make_app):
    service = make_app(CORS_ORIGINS="*")
    for origin in (PAGE, "null", "capacitor://localhost"):
        assert preflight(service, CHAT, origin).headers["Access-Control-Allow-Origin"] == "*"
        assert_readable(service.client.get("/api/v1/usage", headers={"Origin": origin}), "*")
    headers = {"Origin": PAGE, "Authorization": f"Bearer {ADMIN_TOKEN}"}
    assert of_cors(service.client.get(SETTINGS, headers=headers)) == set()


def test_without_the_setting_nothing_of_it_is_there(make_app):
    service = make_app()
    hooks = [function.__module__ for group in service.app.after_request_funcs.values() for function in group]
    assert not [name for name in hooks if name.endswith("cors")]
    assert of_cors(preflight(service, CHAT)) == of_cors(service.chat(headers={"Origin": PAGE})) == set()


@pytest.mark.parametrize(
    ("text", "origins"),
    [
        ("*", ("*",)),
        (" https://Chat.Example:443 ,http://localhost:80,https://chat.example", (PAGE, "http://localhost")),
        ("http://127.0.0.1:5173,http://[::1]:8080", ("http://127.0.0.1:5173", "http://[::1]:8080")),
        ("capacitor://localhost,chrome-extension://abcdef", ("capacitor://localhost", "chrome-extension://abcdef")),
    ],
)
def test_origins_are_read_as_browsers_spell_them(text, origins):
    assert load_config({"CORS_ORIGINS": text}).cors_origins == origins


@pytest.mark.parametrize(
    "text",
    [
        *(
            "https://chat.example/",
            "https://chat.example/page",
            "chat.example",
            "https://",
            "null",
            "*,https://a.example",
        ),
        *(
            "https://*.chat.example",
            "https://a.example,,https://b.example",
            "https://a.example:0",
            "https://a.example:70000",
        ),
        *("https://me:secret@a.example", "https://ä.example", "https://a.example ?", "//a.example"),
    ],
)
def test_what_is_no_origin_stops_the_start_with_one_line(text):
    with pytest.raises(ConfigurationError, match=r"^CORS_ORIGINS: origins such as https://chat\.example .*; got "):
        load_config({"CORS_ORIGINS": text})
