"""How an upstream wants to be asked: as it is set, or as it says when it refuses."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from backends.clock import SystemClock
from backends.errors import ConfigurationError
from flaskapp.llm import UpstreamNotTaken, UpstreamRefused
from flaskapp.llm.openai_compatible import Habits, OpenAICompatibleModel
from tests.models import model_request, opened, pieces_of
from tests.upstream import WORDS, Script, Upstream

TEXT = "".join(WORDS)
NO_OPTIONS = Script(status=422, body='{"detail": [{"type": "extra_forbidden", "loc": ["body", "stream_options"]}]}')
NO_MAX_TOKENS = Script(
    status=400,
    body='{"error": {"message": "Unsupported parameter: \'max_tokens\' is not supported with this model. '
    'Use \'max_completion_tokens\' instead.", "code": "unsupported_parameter", "param": "max_tokens"}}',
)
NO_COMPLETION_TOKENS = Script(
    status=422, body='{"detail": [{"type": "extra_forbidden", "loc": ["body", "max_completion_tokens"]}]}'
)
TOO_LARGE = Script(status=400, body='{"error": {"message": "max_tokens is too large: 400", "param": "max_tokens"}}')


@pytest.fixture
def upstream():
    with Upstream() as server:
        yield server


@pytest.fixture
def make_model(upstream):
    models = []

    def make(key="sk-secret", base_url=None, observer=lambda _: None, **habits):
        models.append(
            OpenAICompatibleModel(
                base_url or upstream.base_url, key, clock=SystemClock(), habits=Habits(**habits), observer=observer
            )
        )
        return models[-1]

    yield make
    for model in models:
        model.close()


def answered(client, **more):
    return "".join(piece.text for piece in pieces_of(opened(client, model_request(**more))))


def asked(upstream):
    """What each request said of the maximum and of the usage."""
    return [
        (*(name for name in exchange.request if name.startswith("max_")), "stream_options" in exchange.request)
        for exchange in upstream.ledger
    ]


def test_a_refused_option_is_left_out_from_then_on_and_that_is_logged_once(upstream, make_model):
    events = []
    model = make_model(observer=events.append)
    upstream.scripts.append(NO_OPTIONS)
    assert answered(model) == answered(model) == TEXT
    assert asked(upstream) == [("max_tokens", True), ("max_tokens", False), ("max_tokens", False)]
    assert [(event.name, dict(event.fields)) for event in events] == [
        ("upstream_learnt", {"model": "gpt-4o", "stream_usage": False})
    ]
    assert model.connections.in_use == 0


def test_the_name_of_the_maximum_is_learnt_for_each_model_whole_or_streamed(upstream, make_model):
    model = make_model()
    upstream.scripts.append(NO_MAX_TOKENS)
    model.ask(model_request(model="prod-reasoner")).whole()
    answered(model, model="prod-reasoner")
    answered(model, model="other")
    assert [names[0] for names in asked(upstream)] == [
        "max_tokens",
        "max_completion_tokens",
        "max_completion_tokens",
        "max_tokens",
    ]


def test_both_may_be_refused_one_after_the_other(upstream, make_model):
    upstream.scripts.extend([NO_OPTIONS, NO_MAX_TOKENS])
    model = make_model()
    assert answered(model) == TEXT
    assert asked(upstream)[-1] == ("max_completion_tokens", False)


def test_the_other_way_round_too(upstream, make_model):
    upstream.scripts.append(NO_COMPLETION_TOKENS)
    answered(make_model(), model="gpt-5-clone")
    assert [names[0] for names in asked(upstream)] == ["max_completion_tokens", "max_tokens"]


def test_of_a_server_that_refuses_either_way_nothing_is_learnt(upstream, make_model):
    events = []
    model = make_model(observer=events.append)
    for _ in range(2):
        upstream.scripts.extend([NO_OPTIONS, NO_OPTIONS])
        with pytest.raises(UpstreamRefused):
            answered(model)
    upstream.scripts.extend([NO_MAX_TOKENS, NO_COMPLETION_TOKENS])
    with pytest.raises(UpstreamRefused):
        answered(model)
    assert [has_options for _, has_options in asked(upstream)] == [True, False, True, False, True, True]
    assert events == []


def test_a_maximum_that_is_too_large_is_no_reason_to_call_it_otherwise(upstream, make_model):
    upstream.scripts.append(TOO_LARGE)
    with pytest.raises(UpstreamRefused):
        answered(make_model())
    assert len(upstream.ledger) == 1


@pytest.mark.parametrize("status", [401, 404, 429, 500])
def test_no_other_status_is_a_reason_to_ask_again(upstream, make_model, status):
    upstream.scripts.append(Script(status=status, body=NO_OPTIONS.body))
    with pytest.raises(UpstreamNotTaken):
        answered(make_model())
    assert len(upstream.ledger) == 1


def test_what_is_set_is_not_learnt(upstream, make_model):
    model = make_model(max_tokens_parameter="max_completion_tokens", stream_usage="true")
    upstream.scripts.append(NO_OPTIONS)
    with pytest.raises(UpstreamRefused):
        answered(model)
    upstream.scripts.append(NO_COMPLETION_TOKENS)
    with pytest.raises(UpstreamRefused):
        answered(model)
    assert asked(upstream) == [("max_completion_tokens", True)] * 2
    model = make_model(max_tokens_parameter="max_tokens", stream_usage="false")
    answered(model, model="o3", options={"stream_options": {"include_obfuscation": False}})
    assert asked(upstream)[-1] == ("max_tokens", False)


@pytest.mark.parametrize(
    ("header", "key", "expected"),
    [
        ("Authorization", "k", {"Authorization": "Bearer k"}),
        ("api-key", "k", {"api-key": "k"}),
        ("api-key", None, {}),
    ],
)
def test_the_key_goes_where_the_server_wants_it(upstream, make_model, header, key, expected):
    answered(make_model(key, auth_header=header))
    sent = upstream.ledger[0].headers
    assert {name: value for name, value in sent.items() if name.lower() in {"authorization", "api-key"}} == expected


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/o/deployments/d?api-version=2024-10-21", "/o/deployments/d/chat/completions?api-version=2024-10-21"),
        ("/o/d/chat/completions?api-version=2024-10-21", "/o/d/chat/completions?api-version=2024-10-21"),
        ("/chat", "/chat/chat/completions"),
    ],
)
def test_a_base_url_may_have_the_whole_path(upstream, make_model, path, target):
    answered(make_model(base_url=f"http://127.0.0.1:{upstream.port}{path}"))
    assert upstream.ledger[0].path == target


# --- proxies


class Proxy(ThreadingHTTPServer):
    """Answers whatever it is asked itself, and writes down what that was."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Proxying)
        self.asked = []


class _Proxying(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        self.server.asked.append((self.path, self.headers["Proxy-Authorization"], self.headers["Host"]))
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps({"choices": [{"message": {"content": "by proxy"}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_CONNECT(self):
        self.server.asked.append((self.path, self.headers["Proxy-Authorization"], self.headers["Host"]))
        self.send_error(403)


@pytest.fixture
def proxy():
    with Proxy() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_plain_upstream_is_asked_through_the_proxy_by_its_whole_address(proxy, make_model):
    address = f"http://user:pa%24s@127.0.0.1:{proxy.server_port}"
    model = make_model(base_url="http://models.invalid:8080/v1", proxy=address)
    assert model.ask(model_request()).whole().body["choices"][0]["message"] == {"content": "by proxy"}
    (asked_of,) = proxy.asked
    assert asked_of == (
        "http://models.invalid:8080/v1/chat/completions",
        "Basic dXNlcjpwYSRz",
        "models.invalid:8080",
    )
    assert "pa$s" not in model.clean("the password pa$s, dXNlcjpwYSRz")


def test_an_encrypted_one_through_a_tunnel_and_a_proxy_that_refuses_it_was_not_the_upstream(proxy, make_model):
    model = make_model(base_url="https://models.invalid/v1", proxy=f"http://127.0.0.1:{proxy.server_port}")
    with pytest.raises(UpstreamNotTaken) as caught:
        answered(model)
    assert "the proxy answered with status 403" in caught.value.detail
    assert proxy.asked == [("models.invalid:443", None, "models.invalid:443")]
    assert model.connections.in_use == 0


@pytest.mark.parametrize("url", ["https://user:hunter2@h", "socks5://user:hunter2@h", "http://", "http://h:99999"])
def test_a_proxy_that_cannot_be_used_stops_the_start(make_model, url):
    with pytest.raises(ConfigurationError, match=r"^LLM_PROXY: ") as caught:
        make_model(proxy=url)
    assert "hunter2" not in str(caught.value)
