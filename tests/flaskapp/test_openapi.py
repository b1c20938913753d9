"""`/openapi.json`: one document, of OpenAPI 3.1, that says what the routes really read and answer."""

import json
import re

import jsonschema_rs
import pytest

from flaskapp.openai.body import _Body as CompletionBody
from flaskapp.settings import settings_table
from tests.apps import NETWORK
from tests.servers import BEARER, CHAT, LITECOIN, SETTINGS
from tests.upstream import Upstream

COMPLETIONS = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "Hi"}]}
METHODS = {"GET", "POST", "PATCH", "PUT", "DELETE"}


@pytest.fixture
def service(make_app):
    return make_app(API_KEYS="*", LLM_MODELS="gpt-4o,gpt-4o-mini")


@pytest.fixture
def document(service):
    answer = service.client.get("/openapi.json")
    assert (answer.status_code, answer.mimetype) == (200, "application/json")
    return answer.json


def operations(document):
    return {(method.upper(), path): each for path, item in document["paths"].items() for method, each in item.items()}


def validator(document, name):
    """Of one schema of the components; a reference is looked up in the whole document."""
    return jsonschema_rs.Draft202012Validator(
        {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    )


def references(value):
    if isinstance(value, dict):
        yield from [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        for each in value.values():
            yield from references(each)
    elif isinstance(value, list):
        for each in value:
            yield from references(each)


def test_it_has_the_form_of_openapi_3_1_and_every_schema_is_one(document):
    assert document["openapi"].startswith("3.1.")
    assert {"title", "version"} <= set(document["info"])
    ids = [each["operationId"] for each in operations(document).values()]
    assert len(ids) == len(set(ids))
    for reference in references(document):
        part = document
        for name in reference.removeprefix("#/").split("/"):
            part = part[name]
    for name, schema in document["components"]["schemas"].items():
        assert re.fullmatch("[A-Za-z0-9.-]+", name)
        jsonschema_rs.meta.validate({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})
    for each in operations(document).values():
        assert all(
            re.fullmatch("[2-5][0-9][0-9]", status) and told["description"]
            for status, told in each["responses"].items()
        )


def test_every_route_is_in_it_but_those_of_the_dashboard(service, document):
    rules = [rule for rule in service.app.url_map.iter_rules() if not re.match(r"/admin(/|$)", rule.rule)]
    routes = {
        (method, re.sub("<(?:[^:]+:)?([^>]+)>", r"{\1}", rule.rule))
        for rule in rules
        for method in rule.methods & METHODS
    }
    assert set(operations(document)) == routes


def test_it_says_what_may_be_named_and_asked_for_here_and_now(service, document):
    chat, completion = (
        document["components"]["schemas"][name]["properties"] for name in ("ChatBody", "CompletionBody")
    )
    assert chat["model"]["enum"] == ["gpt-4o", "gpt-4o-mini"]
    assert completion["model"]["enum"] == ["gpt-4o", "gpt-4o-mini", None]
    assert chat["max_tokens"]["maximum"] == 400
    service.patch(llm_max_tokens=77)
    after = service.client.get("/openapi.json").json["components"]["schemas"]["ChatBody"]
    assert after["properties"]["max_tokens"]["maximum"] == 77


@pytest.mark.parametrize(("is_open", "security"), [("*", [{}, {"apiKey": []}]), ("house-key", [{"apiKey": []}])])
def test_it_says_whether_a_key_is_needed(make_app, is_open, security):
    told = operations(make_app(API_KEYS=is_open).client.get("/openapi.json").json)
    assert told["POST", COMPLETIONS]["security"] == security
    assert told["PATCH", SETTINGS]["security"] == [{"adminToken": []}]


def test_the_schemas_are_of_the_models_that_check_the_bodies(document):
    schemas = document["components"]["schemas"]
    assert set(schemas["CompletionBody"]["properties"]) == set(CompletionBody.model_fields)
    assert set(schemas["Settings"]["properties"]) == set(settings_table())


@pytest.mark.parametrize(
    ("body", "is_usable"),
    [
        (LITECOIN, True),
        ({**LITECOIN, "max_tokens": 400, "model": "gpt-4o-mini"}, True),
        ({**LITECOIN, "max_tokens": 401}, False),
        ({**LITECOIN, "max_tokens": "4"}, False),
        ({**LITECOIN, "model": "gpt-5"}, False),
        ({**LITECOIN, "more": 1}, False),
        ({"query": ""}, False),
        ({"query": "x", "chat_history": [{"role": "system", "content": "x"}]}, False),
        ({"query": "x", "chat_history": [{"role": "user", "content": "x"}] * 64}, True),
        ({"query": "x", "chat_history": [{"role": "user", "content": "x"}] * 65}, False),
    ],
)
def test_of_the_chat_the_document_and_the_route_agree(service, document, body, is_usable):
    assert validator(document, "ChatBody").is_valid(body) == is_usable
    assert (service.chat(body=body).status_code == 200) == is_usable


@pytest.mark.parametrize(
    ("more", "is_usable"),
    [
        ({}, True),
        ({"temperature": 2, "top_p": 0.5, "seed": 3, "stop": ["a", "b"]}, True),
        ({"temperature": 2.5}, False),
        ({"temperature": "1"}, False),
        ({"presence_penalty": -2.01}, False),
        ({"stop": ["a"] * 5}, False),
        ({"n": 2}, False),
        ({"n": None, "tools": None, "max_tokens": None}, True),
        ({"web_search_options": {}}, False),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]}, True),
        ({"tools": [{"type": "web_search"}]}, False),
        ({"tool_choice": "auto"}, True),
        ({"tool_choice": "any"}, False),
        ({"response_format": {"type": "json_object"}}, True),
        ({"response_format": {"type": "xml"}}, False),
        ({"messages": []}, False),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}, True),
        ({"messages": [{"role": "user", "content": [{"type": "file", "file": {}}]}]}, False),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, False),
    ],
)
def test_of_completions_the_document_and_the_route_agree(service, document, more, is_usable):
    body = {**HI, **more}
    assert validator(document, "CompletionBody").is_valid(body) == is_usable
    assert (service.client.post(COMPLETIONS, json=body, buffered=True).status_code == 200) == is_usable


@pytest.mark.parametrize(
    ("changes", "is_usable"),
    [
        (
            {"llm_max_tokens": 7, "drain_seconds": 0, "daily_cost_limit_usd": "0.5", "hourly_spend_limit_usd": 0.25},
            True,
        ),
        ({"llm_max_tokens": None}, True),
        ({"llm_max_tokens": 0}, False),
        ({"network_cost_limit_usd": 0}, True),
        ({"hourly_spend_limit_usd": 0}, False),
        ({"enable_cost_throttling": "true"}, False),
        ({"throttle_on_error": "ajar"}, False),
        ({"unknown": 1}, False),
    ],
)
def test_of_settings_the_document_and_the_route_agree(service, document, changes, is_usable):
    assert validator(document, "Settings").is_valid(changes) == is_usable
    assert (service.patch(**changes).status_code == 200) == is_usable


def checked(document, answer, method, path):
    """The answer is documented: its status, its media type, and its body."""
    told = operations(document)[method, path]["responses"][str(answer.status_code)]
    schema = {**told["content"][answer.mimetype]["schema"], "components": document["components"]}
    if answer.is_json or answer.mimetype.endswith("json"):
        jsonschema_rs.Draft202012Validator(schema).validate(json.loads(answer.data))
    for name in told.get("headers", {}).keys() & answer.headers.keys():
        schema, value = document["components"]["headers"][name]["schema"], answer.headers[name]
        typed = int(value) if schema.get("type") == "integer" else value
        jsonschema_rs.Draft202012Validator(schema).validate(typed)
    return answer.status_code


def test_what_visitors_are_answered_is_documented(make_app, document):
    service = make_app(ENABLE_CHALLENGE_RESPONSE="true", HIGH_COST_THRESHOLD_USD="0.005", API_KEYS="house-key")
    who = {"X-Fingerprint": "hash456"}

    def ask(headers=None, **more):
        return checked(document, service.client.post(CHAT, headers=headers, buffered=True, **more), "POST", CHAT)

    def get(path, headers=None):
        return checked(document, service.client.get(path, headers=headers), "GET", path)

    shown = {"X-Fingerprint": f"fp:{'0' * 64}:hash456"}
    assert [ask(json=LITECOIN, headers=who), ask(json=LITECOIN, headers=shown)] == [403, 403]
    assert [
        ask(json={}, headers=shown),
        ask(data="x", headers=shown),
        ask(json=LITECOIN, headers={"X-Fingerprint": "?"}),
    ] == [*(422, 415, 400)]
    assert ask(data=b"x" * 1_000_001, headers={**shown, "Content-Type": "application/json"}) == 413
    assert [get("/api/v1/auth/challenge", who), get("/api/v1/auth/challenge")] == [200, 400]
    assert [get("/api/v1/usage", who), get("/api/v1/usage", {"Authorization": "Bearer x"})] == [200, 401]
    service.patch(enable_challenge_response=False)
    keyed = {**who, "Idempotency-Key": "one"}
    assert [ask(json=LITECOIN, headers=keyed) for _ in range(2)] == [200, 409]
    assert [ask(json=LITECOIN, headers=who) for _ in range(2)] == [429, 429]
    assert get("/api/v1/usage", who) == 200
    service.patch(chat_rate_limit="1 per hour")
    assert ask(json=LITECOIN, headers=who) == 429


def test_what_openais_clients_are_answered_is_documented(make_app, document):
    service = make_app(API_KEYS="house-key", HIGH_COST_THRESHOLD_USD="0.005")
    key = {"Authorization": "Bearer house-key"}

    def ask(path=COMPLETIONS, headers=key, rule=None, **more):
        method = "POST" if more else "GET"
        answer = service.client.open(path, method=method, headers=headers, buffered=True, **more)
        return checked(document, answer, method, rule or path)

    assert [ask(json=HI, headers=None), ask(json={}), ask(data="x")] == [401, 422, 415]
    assert [ask("/v1/models"), ask("/v1/models", None)] == [200, 401]
    one = "/v1/models/{name}"
    assert [ask("/v1/models/gpt-4o", rule=one), ask("/v1/models/x/y", rule=one)] == [200, 404]
    assert [ask(json={**HI, "stream": stream, "max_tokens": 2}) for stream in (True, False)] == [200, 200]
    assert [ask(json=HI) for _ in range(2)][1] == 429


@pytest.mark.parametrize(
    "script", [{"status": status} for status in (400, 401, 404, 413, 422, 429, 500, 503, 504, 529)]
)
def test_what_is_answered_where_the_upstream_fails_is_documented(make_app, document, script):
    with Upstream() as upstream:
        service = make_app(API_KEYS="*", LLM_BASE_URL=upstream.base_url)
        upstream.behave(**script)
        for path, body in ((CHAT, LITECOIN), (COMPLETIONS, HI), (COMPLETIONS, {**HI, "stream": True})):
            answer = service.client.post(path, json=body, buffered=True)
            assert checked(document, answer, "POST", path) >= 400


def test_what_the_operator_and_machines_are_answered_is_documented(service, document):
    def get(path, **more):
        return checked(document, service.client.get(path, **more), "GET", path)

    def change(data, **more):
        answer = service.client.patch(SETTINGS, data=data, content_type="application/json", **more)
        return checked(document, answer, "PATCH", SETTINGS)

    assert [get(path) for path in ("/healthz", "/readyz", "/metrics", "/openapi.json")] == [200] * 4
    assert [get(SETTINGS), get(SETTINGS, headers=BEARER)] == [401, 200]
    told = [change(data, headers=BEARER) for data in ('{"llm_max_tokens": 5}', '{"llm_max_tokens": 0}', "{")]
    assert told == [200, 422, 400]


def test_the_events_of_the_chat_are_documented(service, document):
    answer = service.chat(max_tokens=2)
    datas = re.findall(rb"^data: (.+)$", answer.data, re.MULTILINE)
    assert len(datas) == 3
    for data in datas:
        validator(document, "ChatEvent").validate(json.loads(data))


def test_who_asks_is_not_in_it(service):
    assert NETWORK not in service.client.get("/openapi.json").text
