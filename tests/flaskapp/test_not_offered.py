"""Routes of models' APIs that are not offered: named, with the way out in one sentence, in the client's own shape."""

import re
import threading

import openai
import pytest
from flask import request
from werkzeug.serving import make_server

from tests.servers import SETTINGS

COMPLETIONS = "/v1/chat/completions"
IN_OPENAIS = [
    ("POST", "/v1/responses", "use_responses_api=False"),
    ("GET", "/v1/responses/resp_1/input_items", "client.chat.completions.create"),
    ("POST", "/v1/conversations", "client.chat.completions.create"),
    ("POST", "/v1/completions", "ChatOpenAI"),
    ("POST", "/v1/embeddings", "OpenAIEmbeddings"),
    ("POST", "/v1/moderations", "leave the moderation out"),
    ("POST", "/v1/threads/t/runs", COMPLETIONS),
    ("POST", "/v1/batches", COMPLETIONS),
    ("GET", "/v1/realtime", "stream: true"),
    ("POST", "/v1/audio/transcriptions", "base URL"),
    ("POST", "/v1/images/generations", "base URL"),
    ("POST", "/v1/rerank", "base URL"),
    ("DELETE", "/v1/whatever", COMPLETIONS),
    ("GET", "/v1", COMPLETIONS),
    ("GET", f"{COMPLETIONS}/chatcmpl-1", COMPLETIONS),
    # A base URL that is too short, too long, doubled, or another service's.
    ("POST", "/chat/completions", "ends in /v1"),
    ("POST", f"{COMPLETIONS}/chat/completions", "ends in /v1"),
    ("POST", f"/v1{COMPLETIONS}", "ends in /v1"),
    ("POST", f"/api{COMPLETIONS}", "ends in /v1"),
    ("POST", "/openai/deployments/mine/chat/completions", "AzureOpenAI"),
    ("POST", "/responses", "use_responses_api=False"),
    ("POST", "/openai/v1/embeddings", "OpenAIEmbeddings"),
]
IN_ANTHROPICS = [
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/messages/batches",
    "/v1/complete",
    "/anthropic/v1/messages",
]
IN_GOOGLES = [
    "/v1beta/models/gemini-3-pro:generateContent",
    "/v1beta/models/gemini-3-pro:streamGenerateContent",
    "/v1/models/gemini-3-pro:generateContent",
    "/v1/models/gemini-embedding:embedContent",
]


@pytest.fixture
def service(make_app):
    # No key is asked for: what is not there is no secret.
    return make_app(API_KEYS="house-key")


def ask(service, method, path, **headers):
    return service.client.open(f"http://localhost{path}", method=method, headers=headers, data=b"{", buffered=True)


def checked(answer, message, method, path):
    """What holds of each: the route is named, and what follows is one sentence."""
    assert (answer.status_code, answer.mimetype) == (404, "application/json")
    assert message.startswith(f"{method} {path} is not offered here: ")
    assert message.endswith(".")
    assert not re.search(r"[.!?] [A-Z]", message)
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["x-should-retry"] == "false"
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["X-Request-ID"])
    return message


@pytest.mark.parametrize(("method", "path", "words"), IN_OPENAIS)
def test_in_openais_shape(service, method, path, words):
    answer = ask(service, method, path)
    error = answer.json["error"]
    assert list(answer.json) == ["error"]
    assert list(error) == ["message", "type", "param", "code", "request_id", "reason"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, "not_found")
    assert error["request_id"] == answer.headers["X-Request-ID"]
    assert words in checked(answer, error["message"], method, path)


@pytest.mark.parametrize("path", IN_ANTHROPICS)
@pytest.mark.parametrize("method", ["POST", "GET"])
def test_in_anthropics_shape(service, method, path):
    answer = ask(service, method, path)
    assert list(answer.json) == ["type", "error", "request_id"]
    assert (answer.json["type"], answer.json["error"]["type"]) == ("error", "not_found_error")
    assert answer.json["request_id"] == answer.headers["request-id"] == answer.headers["X-Request-ID"]
    assert COMPLETIONS in checked(answer, answer.json["error"]["message"], method, path)


@pytest.mark.parametrize("path", ["/v1/files", "/v1/organizations/users", "/v1/messages"])
def test_a_client_is_known_by_the_headers_that_it_always_sends(service, path):
    answer = ask(service, "POST", path, **{"Anthropic-Version": "2023-06-01"})
    assert checked(answer, answer.json["error"]["message"], "POST", path)
    assert answer.json["type"] == "error"


@pytest.mark.parametrize("path", IN_GOOGLES)
def test_in_googles_shape(service, path):
    answer = ask(service, "POST", path)
    error = answer.json["error"]
    assert (error["code"], error["status"]) == (404, "NOT_FOUND")
    assert COMPLETIONS in checked(answer, error["message"], "POST", path)


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate", "/api/tags"])
def test_in_ollamas_shape(service, path):
    answer = ask(service, "POST", path)
    assert COMPLETIONS in checked(answer, answer.json["error"], "POST", path)


@pytest.mark.parametrize("path", ["/v1/chat", "/v2/chat", "/v2/embed"])
def test_in_coheres_shape(service, path):
    answer = ask(service, "POST", path)
    assert COMPLETIONS in checked(answer, answer.json["message"], "POST", path)


@pytest.mark.parametrize(
    "path", ["/nowhere", "/api/v1/chat/streams", "/api/v1/admin/messages", "/admin/responses", "/"]
)
def test_any_other_path_is_a_problem_as_before(service, path):
    answer = ask(service, "GET", path)
    assert (answer.status_code, answer.mimetype, answer.json["error"]) == (404, "application/problem+json", "not_found")


@pytest.mark.parametrize(("method", "path"), [("GET", COMPLETIONS), ("POST", "/v1/models"), ("POST", SETTINGS)])
def test_another_method_of_a_route_that_is_offered_is_still_a_405(service, method, path):
    answer = ask(service, method, path)
    assert answer.status_code == 405
    assert answer.headers["Allow"]


def test_a_very_long_path_is_cut(service):
    message = ask(service, "POST", f"/v1/{'x' * 3_000}").json["error"]["message"]
    assert len(message) < 600


def test_openais_own_client_shows_the_sentence(make_app):
    """Over a socket: its error is `NotFoundError`, tried once, and has the sentence in it."""
    service = make_app(API_KEYS="*")
    asked = []
    service.app.before_request(lambda: asked.append(request.path))
    server = make_server("127.0.0.1", 0, service.app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="any") as client:
            with pytest.raises(openai.NotFoundError, match="use_responses_api=False") as caught:
                client.responses.create(model="gpt-4o", input="Hi")
            assert (caught.value.code, caught.value.status_code) == ("not_found", 404)
            with pytest.raises(openai.NotFoundError, match="OpenAIEmbeddings"):
                client.embeddings.create(model="x", input="Hi")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert asked == ["/v1/responses", "/v1/embeddings"]
