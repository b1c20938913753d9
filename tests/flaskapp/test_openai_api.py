"""OpenAI's API in this process, in front of an upstream that writes down what it was asked and what it billed."""

import hashlib
import json
import logging
import threading
from decimal import Decimal

import pytest

from backends.errors import ConfigurationError
from backends.pricing.prompt_bounds import prompt_tokens
from flaskapp.answers.meter import OBSERVED_LEAD
from flaskapp.chat.routes import SYSTEM_PROMPT
from flaskapp.llm import Piece, Usage
from flaskapp.llm.completion import Completion
from flaskapp.openai.events import CompletionStreamFormat
from tests.apps import NETWORK
from tests.models import piece_in, pieces_in
from tests.servers import nanousd, wait_until
from tests.upstream import WORDS, Script, Upstream, bill_nanousd

ROUTE = "/v1/chat/completions"
KEY = "sk-of-a-caller"
IDENTIFIER = hashlib.sha256(KEY.encode()).hexdigest()
ASKED = {"model": "gpt-4o", "messages": [{"role": "user", "content": "What is Litecoin?"}]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
PLENTY = {
    "HIGH_COST_THRESHOLD_USD": "1",
    "NETWORK_COST_LIMIT_USD": "0",
    "DAILY_COST_LIMIT_USD": "5",
    "CHAT_RATE_LIMIT": "1000 per minute",
}


@pytest.fixture(scope="module")
def _upstream():
    with Upstream() as server:
        yield server


@pytest.fixture
def upstream(_upstream):
    _upstream.ledger.clear()
    _upstream.behave()
    return _upstream


@pytest.fixture
def make_room(make_app, upstream):
    """In front of the upstream, with one key and large budgets, unless the test says otherwise."""

    def make(**environment):
        given = {"LLM_BASE_URL": upstream.base_url, "LLM_API_KEY": "key-of-the-operator", "API_KEYS": KEY, **PLENTY}
        return make_app(**{name: text for name, text in {**given, **environment}.items() if text is not None})

    return make


@pytest.fixture
def service(make_room):
    return make_room()


def ask(service, *, key=KEY, headers=None, body=None, **fields):
    given = {} if key is None else {"Authorization": f"Bearer {key}"}
    content = {**ASKED, **fields} if body is None else body
    return service.client.post(
        ROUTE, json=content, headers={**given, **(headers or {})}, environ_base={"REMOTE_ADDR": NETWORK}, buffered=True
    )


def chunks_of(answer):
    """The events of a stream; the mark at its end as it is."""
    parts = [part for part in answer.get_data().decode().split("\n\n") if part and not part.startswith(":")]
    assert all(part.startswith("data: ") and "\n" not in part for part in parts)
    return [part[6:] if part[6:] == "[DONE]" else json.loads(part[6:]) for part in parts]


def error_of(answer, status):
    """The error in an answer, checked for what every error has."""
    assert (answer.status_code, answer.mimetype) == (status, "application/json")
    assert list(answer.json) == ["error"]
    error = answer.json["error"]
    assert list(error)[:4] == ["message", "type", "param", "code"]
    assert error["request_id"] == answer.headers["X-Request-ID"]
    assert answer.headers["x-should-retry"] in {"true", "false"}
    return error


def reserved(answer):
    return nanousd(answer.headers["X-Cost-Reserved-USD"])


# --- keys


@pytest.mark.parametrize("path", [ROUTE, "/v1/models", "/v1/models/gpt-4o"])
@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {IDENTIFIER}", "Bearer schl\xfcssel"],
)
def test_without_a_registered_key_everything_is_a_401(service, upstream, path, authorization):
    headers = {} if authorization is None else {"Authorization": authorization}
    method = service.client.post if path == ROUTE else service.client.get
    answer = method(path, headers=headers, **({"json": ASKED} if path == ROUTE else {}))
    error = error_of(answer, 401)
    assert (error["code"], error["reason"]) == ("invalid_api_key", "unauthorized")
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.headers["x-should-retry"] == "false"
    assert service.stored() == {}
    assert upstream.ledger == []


@pytest.mark.parametrize("key", [KEY, None, "*", ""])
def test_without_api_keys_every_caller_is_refused_in_production(make_room, key):
    service = make_room(API_KEYS=None, ENVIRONMENT="production", ENABLE_CHALLENGE_RESPONSE="false")
    error_of(ask(service, key=key), 401)
    assert service.stored() == {}


@pytest.mark.parametrize("registered", [KEY, IDENTIFIER, f"other-key, {IDENTIFIER.upper()}", f"{'0' * 64},{KEY}"])
def test_a_key_is_known_by_itself_or_by_its_hash_and_the_hash_is_the_identifier(make_room, upstream, registered):
    service = make_room(API_KEYS=registered)
    assert ask(service).status_code == 200
    assert service.daily(IDENTIFIER) == service.window(IDENTIFIER) == bill_nanousd(upstream.ledger[0]) > 0
    error_of(ask(service, key="0" * 64), 401)


@pytest.mark.parametrize("place", [0, 1, 31, 63])
def test_all_of_a_hash_has_to_agree(make_room, place):
    other = "0" if IDENTIFIER[place] != "0" else "1"
    service = make_room(API_KEYS=IDENTIFIER[:place] + other + IDENTIFIER[place + 1 :])
    error_of(ask(service), 401)


@pytest.mark.parametrize("key", [None, KEY, "schl\xfcssel"])
def test_open_to_anyone_the_network_is_the_identifier(make_room, upstream, key):
    service = make_room(API_KEYS="*")
    assert ask(service, key=key, headers={"X-Fingerprint": "not looked at!"}).status_code == 200
    assert service.daily(f"ip:{NETWORK}") == bill_nanousd(upstream.ledger[0])
    assert [stored for stored in service.redis.keys("*") if IDENTIFIER in stored] == []


def test_a_callers_key_goes_nowhere(make_room, upstream, caplog):
    service = make_room()
    with caplog.at_level(logging.DEBUG, "tollgate"):
        assert ask(service).status_code == ask(service, stream=True, user="somebody").status_code == 200
        error_of(ask(service, n=99), 422)
        error_of(ask(service, key="sk-wrong-but-secret"), 401)
    assert [exchange.headers["Authorization"] for exchange in upstream.ledger] == ["Bearer key-of-the-operator"] * 2
    dump = " ".join(service.redis.keys("*")) + str(service.stored())
    lines = "\n".join(f"{record.getMessage()} {vars(record)}" for record in caplog.records)
    assert "identifier" in lines
    for secret in (KEY, "sk-wrong-but-secret", "key-of-the-operator"):
        assert secret not in dump
        assert secret not in lines
    assert IDENTIFIER not in lines


def test_the_counter_of_requests_is_the_keys_own(make_room):
    service = make_room(API_KEYS=f"{KEY},other", CHAT_RATE_LIMIT="2 per minute")
    assert [ask(service).status_code for _ in range(2)] == [200, 200]
    error = error_of(refused := ask(service), 429)
    assert (error["code"], error["reason"], error["scope"]) == ("rate_limited", "rate_limit", "identifier")
    assert refused.headers["x-should-retry"] == "true"
    assert int(refused.headers["retry-after-ms"]) == 1_000 * int(refused.headers["Retry-After"]) <= 60_000
    assert ask(service, key="other").status_code == 200
    assert [ask(service, key="wrong").status_code for _ in range(3)] == [401, 401, 429]


# --- what passes


PASSES = {
    "temperature": 0.10,
    "top_p": 1,
    "frequency_penalty": -2,
    "presence_penalty": 0.5,
    "stop": ["\n", "end"],
    "seed": 7,
    "logit_bias": {"50256": -100},
    "logprobs": True,
    "top_logprobs": 3,
    "user": "somebody",
    "safety_identifier": "somebody",
    "prompt_cache_key": "a",
    "metadata": {"a": "b"},
    "store": False,
    "reasoning_effort": "low",
    "verbosity": "high",
    "parallel_tool_calls": False,
    "tools": [
        TOOL,
        {"type": "custom", "custom": {"name": "sql", "format": {"type": "text"}}},
    ],
    "tool_choice": {"type": "function", "function": {"name": "weather"}},
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
}
MESSAGES = [
    {"role": "developer", "content": "Be brief."},
    {"role": "system", "content": [{"type": "text", "text": "And kind."}]},
    {
        "role": "user",
        "name": "ann",
        "content": [
            {"type": "text", "text": "What is this?"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}},
        ],
    },
    {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": [],
        "audio": None,
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}],
    },
    {"role": "tool", "tool_call_id": "1", "content": "rain 😀"},
    {"role": "user", "content": "So?"},
]


@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_multiply_the_cost_passes_as_it_was_sent(service, upstream, stream):
    assert ask(service, messages=MESSAGES, **PASSES, stream=stream).status_code == 200
    sent = dict(upstream.ledger[0].request)
    assert sent.pop("max_tokens") == 400
    if stream:
        assert (sent.pop("stream"), sent.pop("stream_options")) == (True, {"include_usage": True})
    assert sent == {"model": "gpt-4o", "messages": MESSAGES, **PASSES}
    assert service.daily(IDENTIFIER) == bill_nanousd(upstream.ledger[0])


def test_null_is_as_good_as_nothing(service, upstream):
    nothing = dict.fromkeys([*PASSES, "n", "max_tokens", "max_completion_tokens", "stream", "stream_options"])
    assert ask(service, **nothing).status_code == 200
    assert set(upstream.ledger[0].request) == {"model", "messages", "max_tokens"}


def test_every_digit_of_a_number_passes(service, upstream):
    body = json.dumps(ASKED)[:-1] + ', "temperature": 0.1000000000000000055511151231257827}'
    answer = service.client.post(
        ROUTE, data=body, content_type="application/json", headers={"Authorization": f"Bearer {KEY}"}
    )
    assert answer.status_code == 200
    assert upstream.ledger[0].request["temperature"] == 0.1


@pytest.mark.parametrize(
    ("asked", "sent_maximum"),
    [
        ({}, 400),
        ({"max_tokens": 7}, 7),
        ({"max_completion_tokens": 9}, 9),
        ({"max_tokens": 100_000}, 400),
        ({"max_tokens": 8, "max_completion_tokens": 9}, 8),
        ({"max_tokens": 10**9, "max_completion_tokens": None}, 400),
    ],
)
def test_the_maximum_is_cut_to_the_ceiling_and_reserved_as_sent(service, upstream, asked, sent_maximum):
    answer = ask(service, **asked)
    (exchange,) = upstream.ledger
    assert {name: exchange.request[name] for name in exchange.request if "tokens" in name} == {
        "max_tokens": sent_maximum
    }
    assert (reserved(answer) - sent_maximum * 10_000) % 2_500 == 0
    assert reserved(answer) >= sent_maximum * 10_000 + exchange.input_tokens * 2_500


def test_a_ceiling_that_is_changed_holds_at_once(service, upstream):
    assert service.patch(llm_max_tokens=3).status_code == 200
    assert ask(service, max_tokens=5).json["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("stream", [False, True])
def test_choices_are_priced(service, upstream, stream):
    upstream.behave(words=(" word",) * 20)
    one, three = ask(service, max_tokens=30), ask(service, n=3, max_tokens=30, stream=stream)
    assert reserved(three) - reserved(one) == 2 * 30 * 10_000
    assert upstream.ledger[1].request["n"] == 3
    assert upstream.ledger[1].generated_tokens == 60
    assert service.daily(IDENTIFIER) == sum(map(bill_nanousd, upstream.ledger))


@pytest.mark.parametrize(("asked", "sent"), [("auto", "default"), ("default", "default"), (None, None)])
def test_the_tier_is_the_one_whose_prices_hold(service, upstream, asked, sent):
    assert ask(service, service_tier=asked).status_code == 200
    assert upstream.ledger[0].request.get("service_tier") == sent


# --- what is refused

USER = {"role": "user", "content": "x"}


def image(url, **more):
    return {"messages": [{**USER, "content": [{"type": "image_url", "image_url": {"url": url, **more}}]}]}


REFUSED = [
    ({"service_tier": "flex"}, "service_tier"),
    ({"service_tier": "priority"}, "service_tier"),
    ({"modalities": ["text", "audio"]}, "modalities[1]"),
    ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
    ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"prompt_cache_retention": "24h"}, "prompt_cache_retention"),
    ({"moderation": {"model": "x"}}, "moderation"),
    ({"best_of": 2}, "best_of"),
    ({"nonsense": 1}, "nonsense"),
    ({"<b>": 1}, "<b>"),
    ({"": 1}, '""'),
    ({"logit_bias": {"<1>": "x"}}, "logit_bias.<1>"),
    ({"metadata": {"<": 5}}, "metadata.<"),
    ({"stream": True, "stream_options": {"<text>": 1}}, "stream_options.<text>"),
    ({"tool_choice": {"type": "function", "function": {"name": "x"}, "<function>": 1}}, "tool_choice.<function>"),
    ({"tool_choice": {"type": "function", "function": {"name": "x", "": 1}}}, 'tool_choice.function.""'),
    (
        {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "x"}]}}},
        "tool_choice.allowed_tools.tools[0]",
    ),
    ({"n": 9}, "n"),
    ({"n": 0}, "n"),
    ({"n": -1}, "n"),
    ({"n": True}, "n"),
    ({"n": "2"}, "n"),
    ({"n": 1.0}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 10**9 + 1}, "max_tokens"),
    ({"max_tokens": 2**53 + 1}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"seed": 10**30}, "seed"),
    ({"stop": ["x"] * 5}, "stop"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other"),
    ({"tools": [{"type": "web_search"}]}, "tools[0]"),
    ({"tools": [TOOL] * 129}, "tools"),
    ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
    ({"response_format": {"type": "grammar"}}, "response_format"),
    ({"reasoning_effort": "very"}, "reasoning_effort"),
    ({"messages": []}, "messages"),
    ({"messages": "x"}, "messages"),
    ({"messages": [{"role": "user"}] * 2_049}, "messages"),
    ({"messages": [{"role": "nobody", "content": "x"}]}, "messages[0].role"),
    ({"messages": [USER, {**USER, "content": 5}]}, "messages[1].content"),
    ({"messages": [{**USER, "content": [{"type": "input_audio", "input_audio": {}}]}]}, "messages[0].content[0]"),
    ({"messages": [{**USER, "content": [{"type": "file", "file": {}}]}]}, "messages[0].content[0]"),
    ({"messages": [{**USER, "content": [{"type": ["text"], "text": "x"}]}]}, "messages[0].content[0]"),
    (image("https://a", detail="original"), "messages[0].content[0].image_url.detail"),
    (image("file:///etc/passwd"), "messages[0].content[0].image_url.url"),
    ({"messages": [{"role": "assistant", "audio": {"id": "x"}}]}, "messages[0].audio"),
    ({"messages": [{**USER, "cache_control": {"ttl": "1h"}}]}, "messages[0].cache_control"),
    ({"tools": [{**TOOL, "cache_control": {"type": "ephemeral", "ttl": ["5m"]}}]}, "tools[0].cache_control"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "place"), REFUSED)
def test_what_is_unknown_or_not_bounded_is_a_422_that_names_the_field(service, upstream, fields, place):
    error = error_of(ask(service, **fields), 422)
    assert (error["param"], error["type"]) == (place, "invalid_request_error")
    assert error["reason"].startswith(f"{place}: ")
    assert upstream.ledger == []
    assert service.stored() == {}


def test_a_model_that_is_not_offered_is_a_404(service, upstream):
    error = error_of(ask(service, model="gpt-5"), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert upstream.ledger == []


def test_without_a_model_the_default_one_answers(service, upstream):
    assert ask(service, body={"messages": ASKED["messages"]}).status_code == 200
    assert upstream.ledger[0].request["model"] == "gpt-4o"


@pytest.mark.parametrize(
    ("data", "content_type", "status"),
    [
        ("{", "application/json", 400),
        ('{"n":1,"n":2}', "application/json", 400),
        ('{"n":NaN}', "application/json", 400),
        ("[" * 100_000, "application/json", 400),
        (b'{"messages":"\xff"}', "application/json", 400),
        (r'{"messages":"\ud800"}', "application/json", 400),
        ("[]", "application/json", 422),
        ("{}", "text/plain", 415),
        ("x" * 1_000_001, "application/json", 413),
    ],
)
def test_what_is_no_body_has_the_same_shape(service, upstream, data, content_type, status):
    headers = {"Authorization": f"Bearer {KEY}"}
    error = error_of(service.client.post(ROUTE, data=data, content_type=content_type, headers=headers), status)
    assert error["type"] == "invalid_request_error"
    assert error["param"] in {"body", "Content-Type"}
    assert upstream.ledger == []


def test_flasks_own_errors_have_the_shape_too(service):
    headers = {"Authorization": f"Bearer {KEY}"}
    assert error_of(service.client.get("/v1/embeddings", headers=headers), 404)["code"] == "not_found"
    assert error_of(service.client.get("/v1"), 404)["code"] == "not_found"
    answer = service.client.get(ROUTE, headers=headers)
    assert error_of(answer, 405)["code"] == "method_not_allowed"
    assert "POST" in answer.headers["Allow"]
    # Elsewhere nothing changes.
    assert service.client.get("/v10").mimetype == service.client.get("/x").mimetype == "application/problem+json"


def test_a_bug_is_a_500_without_a_traceback_and_the_whole_reservation(service, monkeypatch):
    from flaskapp.llm.openai_compatible import UpstreamAnswer

    def fail(*_):
        raise RuntimeError("inner words")

    monkeypatch.setattr(UpstreamAnswer, "whole", fail)
    answer = ask(service)
    # Some clients repeat every 5xx, and would pay for it again.
    error = error_of(answer, 424)
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    assert nanousd(error["cost_usd"]) == service.daily(IDENTIFIER)
    assert answer.headers["x-should-retry"] == "false"
    assert "inner" not in answer.text
    assert service.daily(IDENTIFIER) > 4_000_000


# --- what a client got, it can hand back


CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}
THOUGHTS = {"type": "thinking", "thinking": [{"type": "text", "text": "t"}]}
TO_CACHE = {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral", "ttl": "5m"}}
HANDED_BACK = {
    "reasoning that is null": {"content": "Hi", "reasoning": None, "tool_calls": []},
    "reasoning": {"content": "Hi", "reasoning": "r", "reasoning_details": [{"type": "reasoning.text", "text": "r"}]},
    "reasoning_content": {"content": "Hi", "reasoning_content": "r"},
    "a parsed answer": {"content": '{"a": 1}', "parsed": {"a": 1.5}},
    "an index": {"tool_calls": [CALL | {"index": 0}]},
    "a signature": {"tool_calls": [CALL | {"extra_content": {"google": {"thought_signature": "s"}}}]},
    "parsed arguments": {"tool_calls": [CALL | {"function": CALL["function"] | {"parsed_arguments": {}}}]},
    "a call without a type": {"tool_calls": [{"id": "call_1", "function": CALL["function"]}]},
    "a call without arguments": {"tool_calls": [CALL | {"function": {"name": "weather", "arguments": None}}]},
    "a long id": {"tool_calls": [CALL | {"id": "call_1__thought__" + "x" * 900}]},
    "thoughts among the parts": {"content": [THOUGHTS, {"type": "text", "text": "Hi"}]},
    "thinking blocks": {"content": "Hi", "thinking_blocks": [THOUGHTS | {"signature": "s"}]},
    "fields of a proxy": {"content": "Hi", "provider_specific_fields": {"a": None}, "id": "msg_1", "weight": 1},
    "no audio": {"content": "Hi", "audio": None, "function_call": None, "annotations": [], "refusal": None},
    "a part to cache": {"content": [TO_CACHE]},
}


@pytest.mark.parametrize("name", HANDED_BACK)
def test_an_answer_with_fields_of_a_servers_own_can_be_handed_back(service, upstream, name):
    message = {"role": "assistant", **HANDED_BACK[name]}
    follow = RESULT if message.get("tool_calls") else USER
    upstream.behave(words=("ok",))
    answer = ask(service, messages=[USER, message, follow], tools=[{**TOOL, "cache_control": {"type": "ephemeral"}}])
    assert answer.status_code == 200, answer.text
    assert upstream.ledger[0].request["messages"][1] == message


CLAUDE = {"LLM_PROVIDER": "anthropic", "LLM_MODEL": "claude-sonnet-4-5", "LLM_MAX_INPUT_TOKENS": "9000"}


def test_a_cache_of_an_hour_passes_where_it_has_a_price_and_is_reserved_at_that(make_room, upstream):
    service = make_room(**CLAUDE)
    cached = USER | {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    answer = ask(service, model="claude-sonnet-4-5", messages=[cached], max_tokens=10)
    assert answer.status_code == 200, answer.text
    assert upstream.ledger[0].request["messages"] == [cached]
    tokens = prompt_tokens("claude-sonnet-4-5", [cached], {}, 9_000)
    # Six dollars for a million tokens that are written for an hour; three for others.
    assert nanousd(answer.headers["X-Cost-Reserved-USD"]) == tokens * 6_000 + 10 * 15_000


@pytest.mark.parametrize("ttl", ["24h", "60m", 3600, False, ["1h"]])
def test_any_other_cache_is_refused_also_where_one_of_an_hour_has_a_price(make_room, upstream, ttl):
    cached = USER | {"cache_control": {"ttl": ttl}}
    error = error_of(ask(make_room(**CLAUDE), model="claude-sonnet-4-5", messages=[cached]), 422)
    assert (error["param"], "5m or 1h" in error["message"]) == ("messages[0].cache_control", True)
    assert upstream.ledger == []


def test_a_cache_of_an_hour_without_a_price_of_its_own_is_refused(make_room, upstream):
    prices = {"LLM_PRICE_INPUT_USD_PER_MTOK": "3", "LLM_PRICE_OUTPUT_USD_PER_MTOK": "15"}
    cached = USER | {"cache_control": {"ttl": "1h"}}
    error_of(ask(make_room(**CLAUDE, **prices), model="claude-sonnet-4-5", messages=[cached]), 422)
    assert upstream.ledger == []


def test_a_role_that_was_put_together_from_the_pieces_of_a_stream_is_one_word_again(service, upstream):
    """Servers like Ollama send it with each piece, and OpenAI's helper for Python joins whatever is a text."""
    message = {"role": "assistant" * 3, "content": "Hi", "tool_calls": [CALL]}
    assert ask(service, messages=[USER, message, RESULT], tools=[TOOL]).status_code == 200
    assert upstream.ledger[0].request["messages"][1] == message | {"role": "assistant"}


@pytest.mark.parametrize("role", ["", "useruser", "assistants", "assistant assistant", 1, None])
def test_any_other_role_is_refused(service, upstream, role):
    error = error_of(ask(service, messages=[USER, {"role": role, "content": "Hi"}]), 422)
    assert error["param"] == "messages[1].role"
    assert upstream.ledger == []


@pytest.mark.parametrize("name", ["audio", "prediction", "web_search_options", "top_k", "no_such", "tools", "n"])
def test_null_stands_for_a_parameter_that_is_not_there(service, upstream, name):
    assert ask(service, **{name: None}).status_code == 200
    assert name not in upstream.ledger[0].request
    options = {"include_usage": None, "no_such": None}
    assert ask(service, stream=True, stream_options=options).status_code == 200


# --- the input


def test_an_input_that_is_too_long_is_refused_and_nothing_is_left_out(service, upstream):
    history = [{"role": "user", "content": "word " * 1_600}, {"role": "assistant", "content": "word " * 1_600}]
    error = error_of(ask(service, messages=[*history, USER]), 400)
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")
    assert "maximum context length is 3000 tokens" in error["message"]
    assert upstream.ledger == []
    assert ask(service, messages=[history[0], USER]).status_code == 200
    assert len(upstream.ledger[0].request["messages"]) == 2


def test_an_image_of_a_model_without_a_bound_is_refused(make_room, upstream):
    prices = {"LLM_PRICE_INPUT_USD_PER_MTOK": "1", "LLM_PRICE_OUTPUT_USD_PER_MTOK": "2"}
    service = make_room(LLM_MODEL="some-vision-model", **prices)
    assert ask(service, model="some-vision-model").status_code == 200
    error = error_of(ask(service, model="some-vision-model", messages=MESSAGES), 422)
    assert error["param"] == "messages"
    assert "image" in error["reason"]
    assert len(upstream.ledger) == 1


# --- streams


def test_chunks_pass_through_as_they_are_and_the_usage_only_if_it_was_asked_for(service, upstream):
    upstream.behave(words=("one ", "two "), usage="every", comments=True)
    plain, with_usage = ask(service, stream=True), ask(service, stream=True, stream_options={"include_usage": True})
    assert (plain.status_code, plain.mimetype) == (200, "text/event-stream")
    *chunks, done = chunks_of(plain)
    assert done == "[DONE]"
    envelope = {"id": "chatcmpl-upstream", "object": "chat.completion.chunk"}
    envelope |= {"created": 1_700_000_000, "model": "gpt-4o-2026"}
    expected = [
        {**envelope, "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
        *(
            {**envelope, "choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]}
            for word in ("one ", "two ")
        ),
        {**envelope, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    ]
    assert chunks == expected
    *told_chunks, last, done = chunks_of(with_usage)
    assert told_chunks == [{**chunk, "usage": None} for chunk in expected]
    exchange = upstream.ledger[1]
    assert last.pop("usage") == {
        "prompt_tokens": exchange.input_tokens,
        "completion_tokens": 2,
        "total_tokens": exchange.input_tokens + 2,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    assert (last, done) == ({**envelope, "choices": []}, "[DONE]")
    assert service.daily(IDENTIFIER) == sum(map(bill_nanousd, upstream.ledger))


@pytest.mark.parametrize("asked", [None, False])
@pytest.mark.parametrize("usage", ["end", "twice", "with_finish", "every"])
def test_it_is_counted_also_where_the_client_does_not_ask(service, upstream, usage, asked):
    upstream.behave(usage=usage)
    answer = ask(service, stream=True, stream_options={"include_usage": asked, "include_obfuscation": False})
    chunks = chunks_of(answer)
    assert chunks[-1] == "[DONE]"
    assert [chunk for chunk in chunks[:-1] if "usage" in chunk or not chunk["choices"]] == []
    assert upstream.ledger[0].request["stream_options"] == {"include_usage": True, "include_obfuscation": False}
    assert service.daily(IDENTIFIER) == bill_nanousd(upstream.ledger[0])


@pytest.mark.parametrize("usage", ["none", "zero", "zero_output", "rubbish", "absurd"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_usage_is_the_whole_reservation(service, upstream, usage, stream):
    upstream.behave(usage=usage)
    options = {"stream_options": {"include_usage": True}} if stream else {}
    answer = ask(service, stream=stream, **options)
    assert answer.status_code == 200
    assert service.daily(IDENTIFIER) == reserved(answer) > bill_nanousd(upstream.ledger[0])
    if stream:
        *_, last, done = chunks_of(answer)
        assert done == "[DONE]"
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == 400


def test_reasoning_tools_and_choices_stream_through(service, upstream):
    upstream.behave(tool_call=True)
    chunks = chunks_of(ask(service, stream=True, tools=[TOOL], n=2))
    calls = [part for chunk in chunks[:-1] for part in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert [call["function"]["arguments"] for call in calls] == ["", "", '{"city"', '{"city"', ':"Oslo"}', ':"Oslo"}']
    assert [chunk["choices"][0]["index"] for chunk in chunks[:-1]] == [0, 1] * 5
    # Of several choices what was seen is booked where it is more, and this upstream counts parts, not tokens.
    before = service.daily(IDENTIFIER)
    assert before >= bill_nanousd(upstream.ledger[0])
    upstream.behave(reasoning_words=3, words=("x",))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks_of(ask(service, stream=True))[:-1]]
    assert sum("reasoning_content" in delta for delta in deltas) == 3
    assert service.daily(IDENTIFIER) - before == bill_nanousd(upstream.ledger[1])


@pytest.mark.parametrize("how", ["cut", "rubbish", "error_event", "named_error", "not_an_object", "late_reset"])
def test_a_stream_that_breaks_ends_with_an_error_and_no_mark(service, upstream, how):
    upstream.behave(words=("one ", "two "), ending=how)
    answer = ask(service, stream=True)
    *chunks, last = chunks_of(answer)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "one two "
    error = last["error"]
    assert list(error)[:4] == ["message", "type", "param", "code"]
    assert (error["type"], error["code"]) == ("server_error", "upstream_error")
    assert error["request_id"] == answer.headers["X-Request-ID"]
    assert (
        nanousd(error["cost_usd"]) == reserved(answer) == service.daily(IDENTIFIER) >= bill_nanousd(upstream.ledger[0])
    )
    assert "overloaded" not in answer.text


def test_more_than_was_asked_for_is_cut_with_an_end_that_says_so(service, upstream):
    upstream.behave(words=(" word",) * 20, ignore_max_tokens=True, pause_seconds=0.005)
    answer = ask(service, stream=True, max_tokens=3, n=2, stream_options={"include_usage": True})
    *_, first_end, second_end, usage, done = chunks_of(answer)
    ends = [end["choices"][0] for end in (first_end, second_end)]
    assert [(end["index"], end["finish_reason"], end["delta"]) for end in ends] == [
        (0, "length", {}),
        (1, "length", {}),
    ]
    assert {end["id"] for end in (first_end, second_end, usage)} == {"chatcmpl-upstream"}
    assert (usage["choices"], done) == ([], "[DONE]")
    # It is read to its end for its usage, and that is booked, and reported.
    assert usage["usage"]["completion_tokens"] == upstream.ledger[0].generated_tokens == 40
    assert service.daily(IDENTIFIER) == bill_nanousd(upstream.ledger[0]) > reserved(answer)


@pytest.fixture
def forget(monkeypatch):
    """Forgets the observed lead, now and each time it is called."""

    def forget_it():
        for name in ("_now", "_before"):
            monkeypatch.setattr(OBSERVED_LEAD, name, 0)

    forget_it()
    return forget_it


def test_slices_reserve_little_and_end_the_stream_cleanly_where_the_budget_ends(make_room, upstream, forget):
    service = make_room(RESERVATION_POLICY="slices", DAILY_COST_LIMIT_USD="0.0010")
    changed = service.patch(reservation_slice_tokens=10, reservation_cushion_tokens=20)
    assert changed.status_code == 200
    upstream.behave(words=tuple(f"word{number} " for number in range(300)), pause_seconds=0.002)
    answer = ask(service, stream=True, stream_options={"include_usage": True})
    input_nanousd = reserved(answer) - 30 * 10_000
    assert 0 < input_nanousd < 40 * 2_500
    *_, end, last, done = chunks_of(answer)
    assert (end["choices"][0]["finish_reason"], done) == ("length", "[DONE]")
    # What was generated is not known: reported is what is booked for it, and not the maximum that was never reserved.
    cost_nanousd = input_nanousd + last["usage"]["completion_tokens"] * 10_000
    assert cost_nanousd <= service.daily(IDENTIFIER) < cost_nanousd + 10_000
    assert service.daily(IDENTIFIER) <= 1_000_000
    wait_until(upstream.ledger[0].over.is_set, 5, "the upstream has noticed")
    assert bill_nanousd(upstream.ledger[0]) <= service.daily(IDENTIFIER)
    # What is not streamed cannot be extended on its way: all of it, or nothing.
    assert error_of(ask(service), 429)["can_never_fit"] is True


def test_under_slices_an_answer_may_begin_on_the_last_of_a_budget(make_room, upstream, forget):
    service = make_room(RESERVATION_POLICY="slices")
    service.patch(reservation_slice_tokens=40, reservation_cushion_tokens=8)
    upstream.behave(words=tuple(f"word{number} " for number in range(300)), pause_seconds=0.005)
    # An eighth of a slice, and a quarter, which is more than the cushion: so many tokens will do.
    least = 5 + 10

    def ask_with_room_for(tokens):
        spent_nanousd = service.daily(IDENTIFIER)
        left_nanousd = input_nanousd + tokens * 10_000
        changed = service.patch(daily_cost_limit_usd=(spent_nanousd + left_nanousd) / 10**9, throttle_when_busy=False)
        assert changed.status_code == 200
        forget()
        return ask(service, stream=True), spent_nanousd + left_nanousd

    input_nanousd = reserved(ask(service, stream=True, max_tokens=60)) - 48 * 10_000
    answer, limit_nanousd = ask_with_room_for(least)
    assert reserved(answer) == input_nanousd + least * 10_000
    *_, end, done = chunks_of(answer)
    assert (end["choices"][0]["finish_reason"], done) == ("length", "[DONE]")
    assert service.daily(IDENTIFIER) <= limit_nanousd
    refused, _ = ask_with_room_for(least - 1)
    assert error_of(refused, 429)["reason"] == "daily_limit"


def test_each_choice_has_a_slice_and_a_cushion_of_its_own(make_room, forget):
    service = make_room(RESERVATION_POLICY="slices")
    assert service.patch(reservation_slice_tokens=10, reservation_cushion_tokens=20).status_code == 200
    one = ask(service, stream=True)
    forget()
    two = ask(service, stream=True, n=2)
    assert reserved(two) - reserved(one) == 30 * 10_000


def test_a_choice_that_has_ended_is_not_ended_again():
    stream_format = CompletionStreamFormat("r", "gpt-4o", 1, include_usage=False)
    for index, reason in ((0, "stop"), (1, None), (2, None)):
        choice = {"index": index, "delta": {"content": "x"}, "finish_reason": reason}
        stream_format.pieces([Piece("x", 1, chunk={"id": "theirs", "choices": [choice]})])
    *ends, done, rest = stream_format.complete(Usage(1, 3), 0, "length", was_cut=True).decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    choices = [json.loads(end.removeprefix("data: "))["choices"] for end in ends]
    assert [(choice["index"], choice["finish_reason"]) for (choice,) in choices] == [(1, "length"), (2, "length")]


def test_a_choice_that_began_after_another_is_ended_as_well():
    stream_format, completion = CompletionStreamFormat("r", "gpt-4o", 1, include_usage=False), Completion()
    for index in (1, 0, 0):
        chunk = {"choices": [{"index": index, "delta": {"content": "x"}}]}
        stream_format.pieces(pieces_in(completion, chunk))
    ends = stream_format.complete(Usage(1, 3), 0, "length", was_cut=True).decode()
    assert ends.count('"finish_reason":"length"') == 2


@pytest.mark.parametrize("include_usage", [False, True])
@pytest.mark.parametrize(
    "data",
    [
        '{"id": 1, "choices": [], "x": 0.10}',
        '{"choices":[],"usage":null}',
        '{"choices":[],"usage":null,"obfuscation":"x"}',
        '{"usage":null,"choices":[]}',
        '{"choices":[], "usage": null}',
        '{"choices":[{"text":",\\"usage\\":null"}],"usage":null}',
        '{"choices":[{"x":1,"usage":null}],"usage":null}',
        '{"choices":[{"x":1,"usage":null}]}',
        '{"choices":[{"x":1}],"usage":{"prompt_tokens":1}}',
        '{"choices":[],"us\\u0061ge":null,"x":{"y":1,"usage":null}}',
        '{"choices":[{"index":0,"delta":{"content":"x"}}]}',
        '{"choices":[{"index":0,"delta":{"content":"x"}}],"usage":null}',
        '{"choices":[{"index":0,"delta":{"content":"x"}}], "usage":null}',
    ],
)
def test_an_event_says_the_same_whether_it_is_passed_on_or_written_anew(data, include_usage):
    chunk = json.loads(data)
    stream_format = CompletionStreamFormat("r", "gpt-4o", 1, include_usage=include_usage)
    first = Piece("", chunk={"choices": [{"index": 0, "delta": {}}]})
    stream_format.pieces([first])
    passed_on = stream_format.pieces([piece_in(Completion(), data.encode())])
    anew = stream_format.pieces([Piece("", chunk=chunk)])
    usage = {"usage": None} if include_usage else {}
    expected = {**{name: value for name, value in chunk.items() if name != "usage"}, **usage}
    assert json.loads(anew.removeprefix(b"data: ")) == expected
    assert passed_on.endswith(b"}\n\n")
    assert passed_on.count(b"\n") == 2
    if "us\\u" not in data:
        assert json.loads(passed_on.removeprefix(b"data: ")) == expected


@pytest.mark.parametrize("data", ["{}", '{"usage":null}', '{"choices":[],"usage":{"prompt_tokens":1}}'])
def test_an_event_that_says_nothing_or_only_the_usage_is_not_passed_on(data):
    for include_usage in (False, True):
        stream_format = CompletionStreamFormat("r", "gpt-4o", 1, include_usage=include_usage)
        assert stream_format.pieces([Piece("", chunk=json.loads(data), data=data.encode())]) == b""


def test_what_need_not_be_changed_is_passed_on_to_the_letter():
    data = '{"choices": [{"index": 0, "delta": {"content": "\u00fc"}}], "x": 1.00, "big": 12345678901234567890}'
    piece = piece_in(Completion(), data.encode())
    sent = CompletionStreamFormat("r", "gpt-4o", 1, include_usage=False).pieces([piece, piece])
    assert sent == f"data: {data}\n\n".encode() * 2
    openai = data[:-1] + ',"usage":null,"obfuscation":"x"}'
    piece = piece_in(Completion(), openai.encode())
    sent = CompletionStreamFormat("r", "gpt-4o", 1, include_usage=True).pieces([piece, piece])
    assert sent == f"data: {openai}\n\n".encode() * 2
    sent = CompletionStreamFormat("r", "gpt-4o", 1, include_usage=False).pieces([piece, piece])
    assert sent == f"data: {openai}\n\n".replace(',"usage":null', "").encode() * 2


@pytest.mark.parametrize("include_usage", [False, True])
@pytest.mark.parametrize(
    "usage",
    [
        "",
        ',"usage":null',
        ', "usage": null',
        ',"x":{"usage":null},"usage":null',
        ',"x":{"a":1,"usage":null},"usage":null',
    ],
)
def test_events_that_come_together_are_sent_as_each_would_be_alone(usage, include_usage):
    datas = [f'{{"choices":[{{"index":0,"delta":{{"content":"{text}"}}}}]{usage}}}'.encode() for text in "abcd"]
    together, alone = (CompletionStreamFormat("r", "gpt-4o", 1, include_usage=include_usage) for _ in range(2))
    completion = Completion()
    first, rest = pieces_in(completion, *datas)
    assert rest.deltas == 3
    sent = together.pieces([first]) + together.pieces([rest])
    assert sent == b"".join(alone.pieces([piece_in(Completion(), data)]) for data in datas)
    # What is said of something else stays.
    assert sent.count(b'{"a":1,"usage":null}') == (4 if '"a"' in usage else 0)


def test_a_client_that_leaves_is_settled(service, upstream):
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = service.client.post(ROUTE, json={**ASKED, "stream": True}, headers=headers)
    answer.close()
    assert service.daily(IDENTIFIER) == bill_nanousd(upstream.ledger[0])
    assert service.redis.keys("llm:open:*") == []


# --- whole answers


def test_a_whole_answer_is_passed_on_as_it_is(service, upstream):
    answer = ask(service)
    (exchange,) = upstream.ledger
    assert (answer.status_code, answer.mimetype) == (200, "application/json")
    assert "stream" not in exchange.request
    assert exchange.headers["Accept"] == "application/json"
    body = answer.json
    assert (body["id"], body["x_extra"]) == ("chatcmpl-upstream", 0.1)
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "".join(WORDS)}
    assert body["usage"]["completion_tokens"] == exchange.generated_tokens == 20
    assert service.daily(IDENTIFIER) == bill_nanousd(exchange)
    assert service.redis.keys("llm:open:*") == []


@pytest.mark.parametrize(("words", "booked_tokens"), [(20, 20), (29, 29), (90, 90)])
def test_a_whole_answer_above_its_maximum_is_booked_as_it_is_seen_to_be(service, upstream, words, booked_tokens):
    upstream.behave(words=(" tok",) * words, usage="none", ignore_max_tokens=True)
    answer = ask(service, max_tokens=20)
    (exchange,) = upstream.ledger
    assert exchange.generated_tokens == words
    booked = service.daily(IDENTIFIER)
    assert booked == reserved(answer) + (booked_tokens - 20) * 10_000 >= bill_nanousd(exchange)


def test_a_whole_answer_calls_tools(service, upstream):
    upstream.behave(tool_call=True)
    (choice,) = ask(service, tools=[TOOL]).json["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city":"Oslo"}'}
    assert service.daily(IDENTIFIER) == bill_nanousd(upstream.ledger[0])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("status", "retry"),
    [(401, "false"), (402, "false"), (403, "false"), (404, "false"), (302, "false"), (500, "true"), (520, "true")],
)
def test_a_refusal_of_the_upstream_is_a_502_that_costs_nothing(service, upstream, status, retry, stream):
    upstream.behave(status=status, body='{"error": {"message": "words of the upstream"}}')
    answer = ask(service, stream=stream)
    error = error_of(answer, 502)
    assert (error["code"], error["cost_usd"]) == ("upstream_error", "0.000000000")
    assert (error["reason"], error["upstream_status"]) == ("not_taken", status)
    assert answer.headers["x-should-retry"] == retry
    assert "words of" not in answer.text
    assert service.daily(IDENTIFIER) == 0
    assert len(upstream.ledger) == 1


def retried(answer):
    return answer.headers["x-should-retry"] == "true"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [400, 413, 422])
def test_what_the_upstream_finds_at_fault_is_a_400_with_its_reason(service, upstream, status, stream):
    upstream.behave(status=status, body='{"error": {"message": "No tools with key-of-the-operator."}}')
    answer = ask(service, stream=stream)
    error = error_of(answer, 400)
    assert (error["type"], error["code"]) == ("invalid_request_error", "upstream_refused")
    assert (error["reason"], error["upstream_status"]) == ("No tools with ***.", status)
    assert "No tools with ***." in error["message"]
    assert (error["cost_usd"], retried(answer), service.daily(IDENTIFIER)) == ("0.000000000", False, 0)
    chat = service.chat()
    assert (chat.status_code, chat.json["error"], chat.json["reason"]) == (
        400,
        "upstream_refused",
        "No tools with ***.",
    )
    assert chat.json["cost_usd"] == "0.000000000"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_for_the_upstream_is_told_in_the_words_that_clients_look_for(
    service, upstream, stream
):
    upstream.behave(status=400, body='{"error": {"message": "prompt is too long: 9 tokens > 8 maximum"}}')
    error = error_of(ask(service, stream=stream), 400)
    assert error["code"] == "context_length_exceeded"
    assert "maximum context length" in error["message"]
    assert "9 tokens > 8 maximum" in error["message"]
    chat = service.chat().json
    assert (chat["status"], chat["error"], chat["reason"]) == (400, "upstream_refused", "context_length_exceeded")


@pytest.mark.parametrize(
    ("status", "passed_on", "wait", "retry"),
    [
        (429, 429, "7", True),
        (429, 429, "7200", False),
        (429, 429, None, True),
        (503, 503, "2", True),
        (529, 503, None, True),
    ],
)
def test_a_busy_upstream_is_told_with_how_long_to_wait(service, upstream, status, passed_on, wait, retry):
    headers = () if wait is None else (("Retry-After", wait),)
    upstream.behave(status=status, headers=headers)
    answer = ask(service)
    error = error_of(answer, passed_on)
    assert (error["code"], error["cost_usd"], error["upstream_status"]) == ("upstream_busy", "0.000000000", status)
    assert (answer.headers.get("Retry-After"), retried(answer)) == (wait, retry)
    chat = service.chat()
    assert (chat.status_code, chat.json["error"], chat.headers.get("Retry-After")) == (passed_on, "upstream_busy", wait)
    assert service.daily(IDENTIFIER) == service.daily() == 0


def test_an_account_of_the_operators_that_is_used_up_is_no_reason_to_try_again(service, upstream):
    upstream.behave(status=429, body='{"error": {"code": "insufficient_quota", "message": "You are out."}}')
    answer = ask(service)
    assert error_of(answer, 429)["reason"] == "quota"
    assert not retried(answer)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [408, 504, 524])
def test_after_a_time_out_of_the_upstream_the_whole_is_booked(service, upstream, status, stream):
    upstream.behave(status=status)
    answer = ask(service, stream=stream)
    error = error_of(answer, 424)
    assert (error["code"], error["reason"], error["upstream_status"]) == ("upstream_error", "timeout", status)
    assert nanousd(error["cost_usd"]) == reserved(answer) == service.daily(IDENTIFIER) > 0
    assert not retried(answer)
    assert service.chat().status_code == 504
    assert service.daily() > 0


def test_a_model_that_the_upstream_does_not_have_is_a_404(service, upstream):
    upstream.behave(status=404, body='{"error": {"code": "model_not_found", "message": "no"}}')
    answer = ask(service)
    assert error_of(answer, 404)["code"] == "model_not_found"
    assert not retried(answer)
    assert service.chat().status_code == 502


def test_a_model_that_the_upstream_refuses_with_a_400_is_a_404_too(service, upstream):
    """As LiteLLM's proxy and OpenRouter do; on the chat it stays the refusal that it was."""
    upstream.behave(status=400, body='{"error": {"message": "gpt-4o is not a valid model ID", "code": 400}}')
    answer = ask(service)
    error = error_of(answer, 404)
    assert (error["code"], error["reason"], error["cost_usd"]) == (
        "model_not_found",
        "gpt-4o is not a valid model ID",
        "0.000000000",
    )
    assert not retried(answer)
    chat = service.chat().json
    assert (chat["status"], chat["error"], chat["reason"]) == (
        400,
        "upstream_refused",
        "gpt-4o is not a valid model ID",
    )
    assert service.daily(IDENTIFIER) == service.daily() == 0
    assert service.daily(IDENTIFIER) == service.daily() == 0


@pytest.mark.parametrize("status", [400, 429, 500, 504])
def test_a_usage_beside_an_error_is_charged_and_not_bought_again(service, upstream, status):
    usage = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
    upstream.behave(status=status, body=json.dumps({"error": {"message": "x"}, "usage": usage}))
    answer = ask(service)
    assert nanousd(error_of(answer, 424)["cost_usd"]) == 9 * 2_500 + 2 * 10_000 == service.daily(IDENTIFIER)
    assert not retried(answer)


REFUSED_IN_A_200 = '{"error": {"code": 429, "message": "Provider returned error"}}'


def test_an_error_in_place_of_an_answer_costs_nothing(service, upstream):
    upstream.behave(raw=REFUSED_IN_A_200)
    assert error_of(ask(service), 429)["code"] == "upstream_busy"
    (event,) = chunks_of(ask(service, stream=True))
    assert (event["error"]["code"], event["error"]["cost_usd"]) == ("upstream_busy", "0.000000000")
    assert event["error"]["usage"]["total_tokens"] == 0
    last = service.chat().get_data().decode().strip().splitlines()[-1]
    assert json.loads(last.removeprefix("data: ")) | {"request_id": ""} == {
        "status": "error",
        "request_id": "",
        "error": "upstream_busy",
        "message": "The model's server accepts no more requests of this service for now.",
        "usage": {"input_tokens": 0, "output_tokens": 0},
        "cost_usd": "0.000000000",
    }
    assert service.daily(IDENTIFIER) == service.daily() == 0


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("content_filter", "content_filter"),
        ("SAFETY", "content_filter"),
        ("error", "error"),
        ("abort", "error"),
        ("insufficient_system_resource", "error"),
        ("max_tokens", "length"),
        ("model_length", "length"),
        ("tool_calls", "stop"),
        ("end_turn", "stop"),
    ],
)
def test_why_an_answer_ended_is_told_on_both_routes(service, upstream, word, reason):
    usage = {"prompt_tokens": 9, "completion_tokens": 0, "total_tokens": 9}
    chunk = {"choices": [{"index": 0, "delta": {}, "finish_reason": word}], "usage": usage}
    upstream.behave(raw=json.dumps(chunk), words=(), ending="no_finish")
    last = service.chat().get_data().decode().strip().splitlines()[-1]
    assert json.loads(last.removeprefix("data: "))["finish_reason"] == reason
    reasons = [
        choice.get("finish_reason")
        for each in chunks_of(ask(service, stream=True))
        if each != "[DONE]"
        for choice in each.get("choices", ())
    ]
    assert word in reasons


@pytest.mark.parametrize(
    "script",
    [
        {"before_headers": "reset"},
        {"ending": "reset"},
        {"ending": "cut"},
        {"ending": "rubbish"},
        {"ending": "not_an_object"},
        {"content_type": "text/html"},
    ],
    ids=str,
)
def test_a_whole_answer_that_breaks_is_a_424_and_the_whole_reservation(service, upstream, script):
    upstream.behave(**script)
    answer = ask(service)
    error = error_of(answer, 424)
    assert (error["type"], error["code"]) == ("server_error", "upstream_error")
    assert nanousd(error["cost_usd"]) == reserved(answer) == service.daily(IDENTIFIER) > 4_000_000
    assert (error["reason"], answer.headers["x-should-retry"]) == ("broken", "false")
    assert len(upstream.ledger) == 1


@pytest.mark.parametrize("script", [{"before_headers": "stall"}, {"before_headers": "trickle"}, {"ending": "stall"}])
def test_an_answer_past_the_deadline_is_a_424_and_the_whole_reservation(make_room, upstream, script):
    service = make_room(STREAM_DEADLINE_SECONDS="1")
    upstream.behave(**script)
    answer = ask(service)
    error = error_of(answer, 424)
    assert nanousd(error["cost_usd"]) == reserved(answer) == service.daily(IDENTIFIER)
    assert (error["reason"], answer.headers["x-should-retry"]) == ("timeout", "false")
    assert upstream.ledger[0].over.wait(2)


def test_a_whole_answer_is_passed_on_to_the_letter(service, upstream):
    raw = (
        '{"id": "x", "choices": [{"index": 0, "message": {"content": "é"}}], "x": 1.00, '
        '"usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}}'
    )
    upstream.behave(raw=raw)
    answer = ask(service)
    assert answer.data.decode() == raw
    assert answer.headers["Content-Type"] == "application/json"


def test_a_server_that_stops_ends_whole_answers_too(service, upstream):
    upstream.behave(before_headers="stall")
    answers = []
    thread = threading.Thread(target=lambda: answers.append(ask(service)))
    thread.start()
    wait_until(lambda: len(upstream.ledger) == 1, 5, "the upstream was asked")
    service.tollgate.answers.stop()
    thread.join()
    (answer,) = answers
    error = error_of(answer, 424)
    assert nanousd(error["cost_usd"]) == reserved(answer) == service.daily(IDENTIFIER)
    assert (error["reason"], answer.headers["x-should-retry"]) == ("broken", "false")
    # From then on nothing is asked any more, and another server may be tried.
    later = ask(service)
    assert error_of(later, 502)["cost_usd"] == "0.000000000"
    assert later.headers["x-should-retry"] == "true"
    assert len(upstream.ledger) == 1


def test_an_overrun_is_booked_as_it_is(service, upstream):
    upstream.behave(ignore_max_tokens=True)
    answer = ask(service, max_tokens=2)
    assert service.daily(IDENTIFIER) == bill_nanousd(upstream.ledger[0]) > reserved(answer)


# --- the guard


def test_an_admitted_answer_has_the_headers_of_the_contract(service):
    for stream in (False, True):
        headers = ask(service, stream=stream, headers={"X-Request-ID": "mine"}).headers
        assert headers["X-Throttle-Backend"] == "atomic"
        assert headers["X-Request-ID"] != "mine"
        assert headers["Server-Timing"].startswith("throttle;dur=")
        assert headers["RateLimit-Policy"].startswith(
            '"window";q=1000000;w=600;qu="tollgate-microusd", "day";q=5000000'
        )
        assert headers["RateLimit"].startswith('"window";r=')


@pytest.mark.parametrize("backend", ["legacy", "memory", "off"])
@pytest.mark.parametrize("stream", [False, True])
def test_every_backend_stands_in_front_of_it(make_room, upstream, backend, stream):
    if backend == "off":
        service = make_room(ENABLE_COST_THROTTLING="false")
    else:
        service = make_room(THROTTLE_BACKEND=backend, WEB_CONCURRENCY="1")
    answer = ask(service, stream=stream)
    assert (answer.status_code, answer.headers["X-Throttle-Backend"]) == (200, backend)
    assert ("X-Cost-Reserved-USD" in answer.headers) == (backend != "off")
    if backend == "legacy":
        assert service.daily(IDENTIFIER) == bill_nanousd(upstream.ledger[0])


def test_while_redis_is_away_the_emergency_budget_pays_or_it_is_closed(make_room, upstream):
    service = make_room(REDIS_URL="redis://127.0.0.1:1/0", FAIL_OPEN_BUDGET_USD="0.004")
    assert ask(service, max_tokens=100).headers["X-Throttle-Backend"] == "emergency"
    refused = ask(service)
    error = error_of(refused, 503)
    assert (error["code"], error["type"]) == ("throttle_unavailable", "server_error")
    assert refused.headers["x-should-retry"] == "true"
    assert int(refused.headers["Retry-After"]) >= 1
    assert "Server-Timing" in refused.headers
    assert len(upstream.ledger) == 1


def test_a_window_that_is_spent_says_whether_to_wait(make_room, upstream):
    service = make_room(HIGH_COST_THRESHOLD_USD="0.0045", THROTTLE_WHEN_BUSY="false")
    upstream.behave(usage="none")
    assert ask(service).status_code == 200
    refused = ask(service)
    error = error_of(refused, 429)
    assert (error["type"], error["code"]) == ("rate_limit_error", "cost_throttled")
    assert (error["reason"], error["scope"]) == ("window_limit", "identifier")
    assert error["message"].startswith("High usage detected")
    # It is ten minutes until the window has moved on: no client should wait for that inside a call.
    assert int(refused.headers["Retry-After"]) > 60
    assert refused.headers["x-should-retry"] == "false"
    assert "retry-after-ms" not in refused.headers
    assert "Server-Timing" in refused.headers
    assert len(upstream.ledger) == 1


def test_what_never_fits_and_a_spent_day_are_not_tried_again(make_room, upstream):
    service = make_room(DAILY_COST_LIMIT_USD="0.0045")
    never = ask(service, n=2)
    error = error_of(never, 429)
    assert (error["reason"], error["can_never_fit"]) == ("daily_limit", True)
    assert (never.headers["x-should-retry"], "Retry-After" in never.headers) == ("false", False)
    service.redis.delete(f"llm:throttle:{IDENTIFIER}")
    upstream.behave(usage="none")
    assert ask(service).status_code == 200
    spent = ask(service)
    assert error_of(spent, 429)["message"].startswith("Daily usage limit reached")
    assert spent.headers["x-should-retry"] == "false"


def test_a_key_of_idempotency_is_answered_once_and_belongs_to_its_caller_and_route(make_room, upstream):
    service = make_room(API_KEYS=f"{KEY},other")
    once = {"Idempotency-Key": "once"}
    first = ask(service, headers=once)
    assert first.status_code == 200
    for stream in (False, True):
        again = ask(service, headers=once, **({"stream": True} if stream else {}))
        error = error_of(again, 409)
        assert (error["code"], error["reason"]) == ("duplicate_request", "other_body" if stream else "settled")
        assert error["first_request_id"] == first.headers["X-Request-ID"]
        assert nanousd(error["cost_usd"]) == bill_nanousd(upstream.ledger[0])
        assert again.headers["x-should-retry"] == "false"
        assert "Server-Timing" in again.headers
    assert len(upstream.ledger) == 1
    assert ask(service, headers=once, key="other").status_code == 200
    assert service.chat(IDENTIFIER, headers=once).status_code == 200
    # One that was released is free again.
    upstream.behave(status=500)
    assert [ask(service, headers={"Idempotency-Key": "two"}).status_code for _ in range(2)] == [502, 502]
    assert error_of(ask(service, headers={"Idempotency-Key": "ü"}), 400)["param"] == "Idempotency-Key"


def test_the_words_of_the_log_are_those_of_the_chat(make_room, caplog):
    service = make_room(HIGH_COST_THRESHOLD_USD="0.0045")
    with caplog.at_level(logging.INFO, "tollgate"):
        ask(service, stream=True)
        error_of(ask(service, n=2), 429)
    messages = [record.getMessage() for record in caplog.records]
    called, recorded = "Cost throttling check called", "Cost recorded for stable_identifier"
    assert [line for line in messages if line in {called, recorded}] == [called, recorded, called]
    assert "Cost settled" in messages
    assert "Cost-based throttling triggered" in messages


# --- the built-in model


@pytest.fixture
def builtin(make_app):
    return make_app(API_KEYS=KEY, **PLENTY)


def test_the_builtin_model_answers_whole(builtin):
    answer = ask(builtin)
    body = answer.json
    assert list(body) == ["id", "object", "created", "model", "choices", "usage"]
    assert body["id"].startswith("chatcmpl-")
    assert (body["object"], body["model"]) == ("chat.completion", "gpt-4o")
    assert abs(body["created"] - builtin.tollgate.guard._clock.now_us() // 10**6) < 60
    (choice,) = body["choices"]
    assert choice["message"]["content"].startswith("Litecoin (LTC) is")
    assert choice["finish_reason"] == "stop"
    usage = body["usage"]
    cost = usage["prompt_tokens"] * 2_500 + usage["completion_tokens"] * 10_000
    assert builtin.daily(IDENTIFIER) == cost > 0
    assert ask(builtin, max_tokens=2).json["choices"][0]["finish_reason"] == "length"
    assert error_of(ask(builtin, n=2), 422)["param"] == "n"


def test_the_builtin_model_streams(builtin):
    *chunks, usage, done = chunks_of(ask(builtin, stream=True, stream_options={"include_usage": True}))
    assert done == "[DONE]"
    assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-1]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert usage["usage"]["completion_tokens"] == len(chunks) - 1
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == ask(builtin).json["choices"][0]["message"]["content"]


def test_the_builtin_model_has_a_deadline_too(make_app):
    service = make_app(API_KEYS=KEY, **PLENTY, STREAM_DEADLINE_SECONDS="1", DEMO_TOKENS_PER_SECOND="20")
    answer = ask(service)
    error = error_of(answer, 424)
    assert error["reason"] == "timeout"
    # What it generated by then is known, so no more than that is booked.
    assert nanousd(error["cost_usd"]) == service.daily(IDENTIFIER)
    assert 15 * 10_000 < service.daily(IDENTIFIER) < 25 * 10_000 + 100 * 2_500 < reserved(answer)


# --- models


def test_the_offered_models_are_listed(make_room):
    service = make_room(LLM_MODELS="gpt-4o,gpt-4o-mini")
    headers = {"Authorization": f"Bearer {KEY}"}
    listed = service.client.get("/v1/models", headers=headers).json
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["gpt-4o", "gpt-4o-mini"]
    assert service.client.get("/v1/models/gpt-4o", headers=headers).json == listed["data"][0]
    assert error_of(service.client.get("/v1/models/gpt-5", headers=headers), 404)["code"] == "model_not_found"


def test_a_price_of_the_reservation_covers_cached_input(service, upstream):
    upstream.behave(cached_tokens=4)
    ask(service)
    exchange = upstream.ledger[0]
    assert service.daily(IDENTIFIER) == bill_nanousd(exchange) - 4 * Decimal(1_250)


# --- what an upstream should not say


CHOICE = '{"index":0,"%s":{"content":"x"},"finish_reason":%s}'
NO_ANSWERS = {
    "not_a_number": '{"choices":[%s],"x":NaN}',
    "infinity": '{"choices":[%s],"x":[-Infinity]}',
    "beyond_every_number": '{"choices":[%s],"x":1e999}',
    "deep": '{"choices":[%s],"x":' + "[" * 940 + "]" * 940 + "}",
    "deeper_than_any": '{"choices":[%s],"x":' + "[" * 64 + "]" * 64 + "}",
}


def no_answer(name, part):
    if name == "odd_finish_reason":
        return '{"choices":[' + CHOICE % (part, '["length"]') + "]}"
    return NO_ANSWERS[name] % (CHOICE % (part, '"stop"'))


@pytest.mark.parametrize("name", [*NO_ANSWERS, "odd_finish_reason"])
def test_what_is_no_json_or_no_answer_is_the_upstreams_error_and_booked_whole(service, upstream, name):
    upstream.behave(raw=no_answer(name, "message"))
    whole = error_of(ask(service, max_tokens=100), 424)
    assert whole["code"] == "upstream_error"
    upstream.behave(raw=no_answer(name, "delta"))
    last = chunks_of(ask(service, max_tokens=100, stream=True))[-1]
    assert last["error"]["code"] == "upstream_error"
    assert last["error"]["cost_usd"] == whole["cost_usd"]
    assert Decimal(whole["cost_usd"]) >= Decimal("0.001")


@pytest.mark.parametrize("raw", ['{"choices":[[1]]}', '{"choices":[{"message":[1]}]}'])
def test_choices_that_are_none_are_no_answer(service, upstream, raw):
    upstream.behave(raw=raw)
    assert error_of(ask(service), 424)["code"] == "upstream_error"


# --- small things that have to be true


@pytest.mark.parametrize("path", ["/v1//chat/completions", "/v1/chat//completions", "/v1//models"])
def test_a_path_with_two_slashes_is_none_of_ours(service, path):
    error = error_of(service.client.open(path, method="GET" if "models" in path else "POST", json=ASKED), 404)
    assert error["code"] == "not_found"


def test_elsewhere_too(service):
    answer = service.client.post("http://localhost/api//v1/chat/stream", json={"query": "hi"})
    assert (answer.status_code, answer.mimetype) == (404, "application/problem+json")


def test_how_many_keys_look_like_a_digest_is_logged_once_at_the_start_and_not_which(make_room, caplog):
    raw = "0123456789abcdef" * 4
    service = make_room(API_KEYS=f"{KEY},{raw},{IDENTIFIER}")
    for _ in range(3):
        ask(service)
    (record,) = [record for record in caplog.records if "taken as the SHA-256" in record.message]
    assert (record.levelname, record.fields) == ("WARNING", {"keys": 2})
    # And no digest opens anything, which is why such a key is not both.
    error_of(ask(service, key=IDENTIFIER), 401)
    error_of(ask(service, key=raw), 401)


def test_of_keys_that_look_like_keys_nothing_is_logged(service, caplog):
    ask(service)
    assert [record for record in caplog.records if "taken as the SHA-256" in record.message] == []


def test_a_key_whose_first_try_broke_off_is_not_refused_as_answered(service, upstream):
    upstream.behave(ending="cut")
    error_of(ask(service, headers={"Idempotency-Key": "broken"}), 424)
    error = error_of(ask(service, headers={"Idempotency-Key": "broken"}), 409)
    assert "was charged; it is not sent again" in error["message"]
    assert "answered" not in error["message"]
    assert Decimal(error["cost_usd"]) > 0


# --- how the chat is asked, in front of the same upstream


@pytest.mark.parametrize(
    ("prompt", "first"),
    [
        (None, ("system", SYSTEM_PROMPT)),
        ("Be brief.", ("system", "Be brief.")),
        ("", ("user", "Hi")),
        (" ", ("user", "Hi")),
    ],
)
def test_the_chats_system_prompt_is_as_it_is_set_or_none(make_room, upstream, prompt, first):
    service = make_room(LLM_SYSTEM_PROMPT=prompt)
    history = [{"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "Hi"}]
    history.append({"role": "assistant", "content": "What do you want to know?"})
    assert service.chat(chat_history=history).status_code == 200
    messages = [(message["role"], message["content"]) for message in upstream.ledger[0].request["messages"]]
    assert messages[0] == first
    # Many models refuse a conversation that begins with an answer.
    assert [role for role, _ in messages if role != "system"] == ["user", "assistant", "user"]


def test_a_system_prompt_that_does_not_fit_stops_the_start(make_room):
    with pytest.raises(ConfigurationError, match=r"^LLM_SYSTEM_PROMPT: .*LLM_MAX_INPUT_TOKENS, which is 100; got"):
        make_room(LLM_SYSTEM_PROMPT="word " * 200, LLM_MAX_INPUT_TOKENS="100")


def test_azure_is_asked_as_azure_wants_it(make_room, upstream):
    service = make_room(
        LLM_BASE_URL=f"http://127.0.0.1:{upstream.port}/openai/deployments/prod?api-version=2024-10-21",
        LLM_AUTH_HEADER="api-key",
        LLM_MAX_TOKENS_PARAMETER="max_completion_tokens",
        LLM_STREAM_USAGE="false",
    )
    assert service.chat(max_tokens=7).status_code == ask(service).status_code == 200
    for exchange in upstream.ledger:
        assert exchange.path == "/openai/deployments/prod/chat/completions?api-version=2024-10-21"
        assert exchange.headers["api-key"] == "key-of-the-operator"
        assert "Authorization" not in exchange.headers
        assert not {"max_tokens", "stream_options"} & exchange.request.keys()
    assert upstream.ledger[0].request["max_completion_tokens"] == 7


def test_what_an_upstream_does_not_take_is_learnt_once_and_logged(make_room, upstream, caplog):
    service = make_room()
    upstream.scripts.append(Script(status=400, body='{"error": {"message": "Unknown argument: stream_options"}}'))
    assert [service.chat().status_code for _ in range(2)] == [200, 200]
    assert ["stream_options" in exchange.request for exchange in upstream.ledger] == [True, False, False]
    (record,) = [record for record in caplog.records if "asked otherwise from now on" in record.message]
    assert record.fields == {"model": "gpt-4o", "stream_usage": False}
