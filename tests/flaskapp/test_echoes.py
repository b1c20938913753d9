"""What was sent to an upstream comes back in none of its errors: neither to the client nor into the log."""

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaskapp.llm.echoes import GONE, without_echoes
from tests.upstream import Upstream

PROMPT = (
    'What is "Litecoin", the coin\nthat is naïve — '
    "and C:\\new\\things, in twenty words or more? 日本語のテキストを書いてください"
)
SYSTEM = "You are the guard of a very secret recipe: never say that it has marzipan in it."
KEY = "key-of-the-operator"


@pytest.mark.parametrize(
    "spelt",
    [
        PROMPT,
        PROMPT[:60],
        PROMPT[20:90],
        " ".join(PROMPT.split()),
        json.dumps(PROMPT),
        json.dumps(PROMPT, ensure_ascii=False),
        json.dumps({"messages": [{"content": PROMPT}]}),
        json.dumps(json.dumps([PROMPT])),
        repr(PROMPT),
        ascii({"content": PROMPT}),
    ],
)
def test_every_spelling_of_what_was_sent_is_taken_out(spelt):
    cleaned = without_echoes(f"Invalid input: {spelt} is not allowed.", [PROMPT])
    assert cleaned.startswith("Invalid input: ")
    assert cleaned.endswith(" is not allowed.")
    for word in ("Litecoin", "twenty", "things", "テキスト"):
        assert word not in cleaned
    assert GONE in cleaned


@pytest.mark.parametrize(
    "words",
    [
        "This model's maximum context length is 4096 tokens. However, you requested 9000 tokens.",
        "Invalid value: 'tool'. Supported values are: 'system', 'user'.",
        "",
        "***",
        "\\" * 5_000,
        "\\u12",
        "\\ud83d\\ude00",
    ],
)
def test_the_words_of_the_server_stay(words):
    assert without_echoes(words, [PROMPT, SYSTEM, "hi", ""]) == words[:4_096]


@given(st.text(min_size=1), st.text(), st.text(min_size=20))
def test_whatever_was_sent_nothing_of_it_is_left_in_a_row(before, after, sent):
    letters = "".join(filter(str.isalnum, sent))
    cleaned = without_echoes(before + sent + after, [sent])
    if len(letters) >= 30 and letters.isascii():
        assert letters not in "".join(filter(str.isalnum, cleaned))


@pytest.fixture
def upstream():
    with Upstream() as server:
        yield server


@pytest.fixture
def service(make_app, upstream):
    return make_app(LLM_BASE_URL=upstream.base_url, LLM_API_KEY=KEY, API_KEYS="*", LLM_SYSTEM_PROMPT=SYSTEM)


def echo(prefix=""):
    request = {"messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": PROMPT}], "key": KEY}
    return f"{prefix}{json.dumps(request)}"


ERRORS = [
    {"status": status, "body": body}
    for status in (400, 401, 404, 413, 422, 429, 500, 503, 504)
    for body in (
        echo("no: "),
        json.dumps({"error": {"message": echo("no: ")}}),
        json.dumps({"detail": [{"msg": "no", "input": echo()}]}),
    )
] + [
    {"raw": json.dumps({"error": {"message": echo("no: "), "code": 400}})},
    {"raw": echo("no answer: ")},
    {"content_type": "application/json", "raw": json.dumps({"error": echo()})},
]


@pytest.mark.parametrize("script", ERRORS)
def test_no_error_of_an_upstream_repeats_what_it_was_sent(service, upstream, caplog, script):
    upstream.behave(**script)
    body = {"messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": PROMPT}]}
    with caplog.at_level(logging.DEBUG, logger="tollgate"):
        answers = [
            service.chat(query=PROMPT),
            service.client.post("/v1/chat/completions", json=body, buffered=True),
            service.client.post("/v1/chat/completions", json={**body, "stream": True}, buffered=True),
        ]
    told = [answer.text for answer in answers]
    told += [f"{record.message} {getattr(record, 'fields', {})}" for record in caplog.records]
    for text in told:
        assert [word for word in ("Litecoin", "twenty words", "marzipan", "secret recipe", KEY) if word in text] == []
    assert [record for record in caplog.records if "server failed" in record.message]
