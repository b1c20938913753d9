"""In development mode a page of another site cannot ask by pointing its own name to this machine."""

import pytest

from tests.servers import ADMIN_TOKEN, BEARER, CHAT, LITECOIN, SETTINGS

COMPLETIONS = "/v1/chat/completions"
PATHS = [
    "/healthz",
    "/readyz",
    "/metrics",
    "/openapi.json",
    "/admin",
    "/nothing-here",
    SETTINGS,
    "/api/v1/auth/challenge",
    "/api/v1/usage",
]


@pytest.fixture
def service(make_app):
    return make_app(ENVIRONMENT="development", ALLOWED_HOSTS="Box.local,my_box", HOST="dev.example")


def asked(service, host, path="/healthz", **options):
    return service.client.get(path, headers={"Host": host, **BEARER}, **options)


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:8000",
        "LOCALHOST:1",
        "localhost.",
        "127.0.0.1",
        "127.0.0.1:8000",
        "192.168.1.7:8000",
        "[::1]",
        "[::1]:8000",
        "[2001:db8::7]:80",
        "dev.example",
        "dev.example:8000",
        "box.local:8000",
        "BOX.LOCAL",
        "my_box",
    ],
)
def test_the_names_of_this_machine_are_answered(service, host):
    assert asked(service, host).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "evil.localhost",
        "sub.box.local",
        "xbox.local",
        "127.0.0.1.evil.example",
        "127.0.0.1@evil.example",
        "localhost:8000@evil.example",
        "localhost:evil",
        "localhost,evil.example",
        "[localhost]",
        "[127.0.0.1]",
        "::1",
        "[::1",
        "[::1]evil.example",
        "2130706433",
        "0x7f.1",
        "127.1",
        "..",
        ":8000",
        "",
    ],
)
def test_any_other_name_is_refused(service, host):
    refused = asked(service, host)
    assert (refused.status_code, refused.mimetype) == (421, "application/problem+json")
    assert (refused.json["error"], refused.json["field"]) == ("invalid_request", "Host")
    assert refused.json["reason"].startswith("Host: in development mode this service answers to localhost")
    assert "evil" not in refused.text


@pytest.mark.parametrize("path", PATHS)
def test_every_route_refuses_it(service, path):
    assert asked(service, "evil.example", path).status_code == 421


def test_nothing_is_counted_set_or_asked_by_it(service):
    host = {"Host": "evil.example"}
    chat = service.client.post(CHAT, json=LITECOIN, headers={**host, "X-Fingerprint": "hash456"})
    setting = service.client.patch(SETTINGS, json={"enable_cost_throttling": True}, headers={**host, **BEARER})
    login = service.client.post("/admin/login", data={"token": ADMIN_TOKEN}, headers=host)
    assert [each.status_code for each in (chat, setting, login)] == [421] * 3
    assert "Set-Cookie" not in login.headers
    assert service.redis.keys() == []


def test_for_openais_clients_it_has_their_shape(service):
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    refused = service.client.post(COMPLETIONS, json=body, headers={"Host": "evil.example"})
    assert (refused.status_code, refused.mimetype) == (421, "application/json")
    assert (refused.json["error"]["type"], refused.json["error"]["param"]) == ("invalid_request_error", "Host")
    assert refused.headers["x-should-retry"] == "false"


def test_a_preflight_is_refused_too(make_app):
    service = make_app(ENVIRONMENT="development", CORS_ORIGINS="*")
    headers = {"Host": "evil.example", "Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    assert service.client.options(CHAT, headers=headers).status_code == 421


def test_outside_development_mode_any_name_is_answered(make_app):
    assert asked(make_app(ENVIRONMENT="production"), "chat.example").status_code == 200


def test_every_route_of_the_document_says_so(service):
    document = service.client.get("/openapi.json").json
    operations = [each for item in document["paths"].values() for each in item.values()]
    assert operations
    assert all("421" in each["responses"] for each in operations)
