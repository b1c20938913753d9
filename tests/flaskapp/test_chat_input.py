"""Bad input: 4xx with the field and the reason, no key of the guard made, nothing charged, never a 5xx."""

import json
from io import BytesIO
from unicodedata import category

import pytest
from werkzeug.test import EnvironBuilder, run_wsgi_app

from tests.servers import CHAT, LITECOIN, events

DEEP = 100_000


@pytest.fixture
def service(make_app):
    # Challenges on: none may be used up, or asked for, by what is refused before.
    return make_app(HIGH_COST_THRESHOLD_USD="1", NETWORK_COST_LIMIT_USD="0", DAILY_COST_LIMIT_USD="1")


def post(service, body, **headers):
    given = {"Content-Type": "application/json", "X-Fingerprint": "hash456", **headers}
    return service.client.post(CHAT, data=body, headers=given, buffered=True)


def is_refused(service, answer, status, field, reason=""):
    assert answer.status_code == status, answer.data
    assert answer.json["error"] == "invalid_request"
    assert answer.json["field"] == field
    assert answer.json["reason"].startswith(f"{field}: ")
    assert reason in answer.json["reason"]
    assert len(answer.data) < 2_000
    assert service.stored() == {}


NOT_JSON = {
    "empty": (b"", "empty"),
    "blank": (b" \r\n", "empty"),
    "mark": (b"\xef\xbb\xbf{}", "byte order mark"),
    "cut": (b'{"query": "x"', "not valid JSON"),
    "two values": (b'{"query": "x"} {}', "not valid JSON"),
    "a trailing comma": (b'{"query": "x",}', "not valid JSON"),
    "single quotes": (b"{'query': 'x'}", "not valid JSON"),
    "a control character": (b'{"query": "a\x00b"}', "not valid JSON"),
    "a key twice": (b'{"query": "x", "query": "y"}', "twice"),
    "a key twice, deep": (
        b'{"query": "x", "chat_history": [{"role": "user", "role": "user", "content": ""}]}',
        "twice",
    ),
    "a key twice, escaped": (b'{"query": "x", "que\\u0072y": "y"}', "twice"),
    "NaN": (b'{"query": "x", "max_tokens": NaN}', "NaN"),
    "Infinity": (b'{"query": "x", "max_tokens": -Infinity}', "Infinity"),
    "depth 100,000": (b'{"query": ' + b"[" * DEEP + b"]" * DEEP + b"}", "nested too deeply"),
    "depth 100,000 of objects": (b'{"query": ' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}", "nested too deeply"),
    "depth 100,000, never closed": (b"[" * DEEP, "nested too deeply"),
    "half a surrogate pair": (b'{"query": "\\ud83d"}', "surrogate"),
    "half a surrogate pair as a key": (b'{"query": "x", "\\udc00": 1}', "surrogate"),
    "half a surrogate pair in the history": (
        b'{"query": "x", "chat_history": [{"role": "user", "content": "\\ude00"}]}',
        "surrogate",
    ),
    "invalid UTF-8": (b'{"query": "\xff"}', "UTF-8"),
    "a surrogate in UTF-8": (b'{"query": "\xed\xa0\xbd"}', "UTF-8"),
    "overlong UTF-8": (b'{"query": "\xc0\xaf"}', "UTF-8"),
    "UTF-16": ('{"query": "x"}'.encode("utf-16"), "UTF-8"),
    "an enormous exponent": (b'{"query": "x", "max_tokens": 1e999999999999999999999}', ""),
}


@pytest.mark.parametrize("name", NOT_JSON)
def test_what_is_no_strict_json_is_a_400(service, name):
    body, reason = NOT_JSON[name]
    is_refused(service, post(service, body), 400, "body", reason)


@pytest.mark.parametrize("body", [b"[]", b"null", b'"query"', b"1", b"true"])
def test_json_that_is_no_object_is_refused_in_words_of_the_caller(service, body):
    is_refused(service, post(service, body), 422, "body", "has to be a JSON object")


NOT_A_QUESTION = {
    "a list": ([], "body"),
    "a word": ("x", "body"),
    "null": (None, "body"),
    "nothing in it": ({}, "query"),
    "query null": ({"query": None}, "query"),
    "query a number": ({"query": 5}, "query"),
    "query a list": ({"query": ["x"]}, "query"),
    "query empty": ({"query": ""}, "query"),
    **{
        f"query blank: {blank!r}": ({"query": blank}, "query")
        for blank in (
            *(
                " ",
                "\t\r\n",
                "\u00a0\u2003\u3000",
                "\x1f",
                "\x00",
                "\ufeff",
                "\u200b\u200d\u2060",
                "\u202e \u200f",
                "\u00ad",
            ),
            *("\u3164", "\u2800", "\ufe0f", "\u115f\u1160\uffa0", "\u034f", "\U000e0041\U000e007f", "\u061c\u180e"),
        )
    },
    "query of 8,001 characters": ({"query": "x" * 8_001}, "query"),
    "query of 100 kB": ({"query": "x" * 100_000}, "query"),
    "query of too many tokens": ({"query": "\u0bb3\u0bbf" * 4_000}, "query"),
    "an unknown field": ({"query": "x", "stream": True}, "stream"),
    "an unknown field <b>": ({"query": "x", "<b>": 1}, "<b>"),
    "an unknown field <": ({"query": "x", "<": 1}, "<"),
    "an unknown field with a dot": ({"query": "x", ".x": 1}, ".x"),
    "an unknown field without a name": ({"query": "x", "": 1}, '""'),
    "an unknown field with a long name": ({"query": "x", "y" * 10_000: 1}, "y" * 200),
    "history null": ({"query": "x", "chat_history": None}, "chat_history"),
    "history a text": ({"query": "x", "chat_history": "hello"}, "chat_history"),
    "history of 65 turns": ({"query": "x", "chat_history": [{"role": "user", "content": ""}] * 65}, "chat_history"),
    "a turn that is none": ({"query": "x", "chat_history": ["hello"]}, "chat_history[0]"),
    "a system turn": ({"query": "x", "chat_history": [{"role": "system", "content": ""}]}, "chat_history[0].role"),
    "a turn without content": ({"query": "x", "chat_history": [{"role": "user"}]}, "chat_history[0].content"),
    "content null": ({"query": "x", "chat_history": [{"role": "user", "content": None}]}, "chat_history[0].content"),
    "an unknown field <text> of a turn": (
        {"query": "x", "chat_history": [{"role": "user", "content": "", "<text>": "x"}]},
        "chat_history[0].<text>",
    ),
    "an unknown field of a turn": (
        {"query": "x", "chat_history": [{"role": "user", "content": "", "name": "x"}]},
        "chat_history[0].name",
    ),
    "model null": ({"query": "x", "model": None}, "model"),
    "model unknown": ({"query": "x", "model": "gpt-5"}, "model"),
    "model empty": ({"query": "x", "model": ""}, "model"),
    "model a number": ({"query": "x", "model": 4}, "model"),
    "model of 100 kB": ({"query": "x", "model": "gpt" * 33_333}, "model"),
    **{
        f"max_tokens {json.dumps(value)}": ({"query": "x", "max_tokens": value}, "max_tokens")
        for value in (0, -1, -(2**63), 401, 2**53 + 1, 10**18, 1.5, 1e308, True, False, None, "5", "1e9", [5], {"a": 1})
    },
}


@pytest.mark.parametrize("name", NOT_A_QUESTION)
def test_what_is_no_question_is_a_422_that_names_the_field(service, name):
    body, field = NOT_A_QUESTION[name]
    is_refused(service, post(service, json.dumps(body)), 422, field)


def test_a_blank_query_is_called_blank(service):
    is_refused(service, post(service, '{"query": " \\n "}'), 422, "query", "may not be blank")


def test_every_character_that_is_not_seen_is_blank(service):
    unseen = [
        chr(code)
        for code in (*range(0xD800), *range(0xE000, 0x110000))
        if category(chr(code)) in {"Cc", "Cf", "Zs", "Zl", "Zp"} or chr(code).isspace()
    ]
    assert len(unseen) > 200
    is_refused(service, post(service, json.dumps({"query": "".join(unseen)})), 422, "query", "may not be blank")


@pytest.mark.parametrize(
    "query", ["\ufeffx", "\u200b?\u200b", "\u00e9", "\U0001f469\u200d\U0001f467", "\u0301", "\x00."]
)
def test_one_character_that_is_seen_is_a_question(service, query):
    assert service.chat(query=query).status_code == 200


@pytest.mark.parametrize("number", ["9" * 4_301, "-" + "9" * 4_301, "9" * 900_000, "1e400", "5.0", "5e0", "0.5e1"])
def test_a_number_of_any_length_is_a_422_at_once(service, number):
    is_refused(service, post(service, f'{{"query": "x", "max_tokens": {number}}}'), 422, "max_tokens")


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "",
        "application/x-www-form-urlencoded",
        "application/jsonp",
        "multipart/form-data; boundary=x",
        "x",
    ],
)
def test_another_content_type_is_a_415(service, content_type):
    is_refused(service, post(service, '{"query": "x"}', **{"Content-Type": content_type}), 415, "Content-Type")


CODINGS = {
    "Content-Encoding": ("gzip", "GZIP", "br", "deflate", "zstd", "identity, gzip", "gzip, identity", "x"),
    "Transfer-Encoding": ("gzip, chunked", "deflate,chunked", "gzip", "identity", "x"),
}


@pytest.mark.parametrize(("name", "coding"), [(name, each) for name, given in CODINGS.items() for each in given])
def test_a_body_in_another_coding_is_a_415_and_is_not_read(service, name, coding):
    # Shorter than announced: whoever read it would know.
    environ = {"CONTENT_LENGTH": "900000", f"HTTP_{name.upper().replace('-', '_')}": coding}
    answer = service.client.post(CHAT, data=b"{}", content_type="application/json", environ_overrides=environ)
    is_refused(service, answer, 415, name, "send the body as it is")


@pytest.mark.parametrize("coding", ["identity", " Identity ", ""])
def test_a_body_that_is_not_encoded_may_say_so(service, coding):
    is_refused(service, post(service, b"{}", **{"Content-Encoding": coding}), 422, "query")


@pytest.mark.parametrize("size", [1_000_001, 5_000_000])
def test_more_than_a_megabyte_is_a_413(service, size):
    is_refused(service, post(service, b'{"query": "' + b"x" * (size - 13) + b'"}'), 413, "body")


def test_a_body_that_is_shorter_than_announced_is_a_400(service):
    body = json.dumps(LITECOIN)
    answer = service.client.post(
        CHAT, data=body, content_type="application/json", environ_overrides={"CONTENT_LENGTH": str(len(body) + 1)}
    )
    assert (answer.status_code, answer.json["field"]) == (400, "body")
    assert "broke off" in answer.json["message"]


def test_a_megabyte_is_read(service):
    body = b'{"query": "' + b"x" * (1_000_000 - 13) + b'"}'
    assert len(body) == 1_000_000
    is_refused(service, post(service, body), 422, "query", "8000")


@pytest.mark.parametrize(("behind", "status"), [(0, 200), (1, 413)])
def test_a_body_of_unknown_length_is_read_to_its_end(service, behind, status):
    whole = b'{"query": "x", "max_tokens": 1}'
    body = whole + b" " * (1_000_000 - len(whole) + behind)
    environ = EnvironBuilder(CHAT, method="POST", headers={"X-Fingerprint": "hash456"}).get_environ()
    environ |= {"wsgi.input": BytesIO(body), "wsgi.input_terminated": True, "CONTENT_TYPE": "application/json"}
    environ.pop("CONTENT_LENGTH", None)
    # The test client would find out the length and announce it.
    _, answered, _ = run_wsgi_app(service.app, environ, buffered=True)
    assert answered.startswith(str(status))
    assert (service.daily() > 0) == (status == 200)


FINGERPRINTS = {
    "empty": "",
    "a space": " ",
    "of 129 characters": "x" * 129,
    "of 10 kB": "x" * 10_000,
    "challenge of 129 characters": f"fp:{'x' * 129}:hash",
    "of 10 kB with a challenge": f"fp:a:{'x' * 10_000}",
    "without a challenge": "fp::hash456",
    "without a hash": "fp:challenge:",
    "without both": "fp::",
    "one colon": "challenge:hash",
    "fp with one colon": "fp:hash",
    "four parts": "fp:a:b:c",
    "another prefix": "FP:a:b",
    "braces": "{hash456}",
    "a hash tag": "x{y}z",
    "a glob": "*",
    "a key": "llm:cost:daily:x",
    "a control character": "hash\x01",
    "a tab": "ha\tsh",
    "DEL": "hash\x7f",
    "non-Latin": "хэш".encode().decode("latin-1"),
    "an umlaut": "häsh",
    "a full-width digit": "hash\uff14".encode().decode("latin-1"),
    "a space within": "ha sh",
    "quotes": 'ha"sh',
    "a slash": "../x",
    "a per cent": "a%0ab",
    "a comma": "a,b",
    "ip:": "ip:198.51.100.7",
}


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_a_strange_fingerprint_is_a_400(service, name):
    answer = post(service, '{"query": "x"}', **{"X-Fingerprint": FINGERPRINTS[name]})
    is_refused(service, answer, 400, "X-Fingerprint")
    # What was sent is not sent back.
    assert len(answer.data) < 700


GOOD = {
    "one character": ({"query": "x"}, "a"),
    "all that may be in a hash": ({"query": "x"}, "abcXYZ019_-"),
    "128 characters": ({"query": "x"}, "x" * 128),
    "a challenge and a hash of 128": ({"query": "x"}, f"fp:{'c' * 128}:{'x' * 128}"),
    "8,000 characters": ({"query": "x" * 8_000}, "a"),
    "64 turns": ({"query": "x", "chat_history": [{"role": "user", "content": ""}] * 64}, "a"),
    "signs": ({"query": "\u0000 \U0001f600 \u202e <|endoftext|> \ufdfa"}, "a"),
    "the ceiling": ({"query": "x", "max_tokens": 400}, "a"),
    "one token": ({"query": "x", "max_tokens": 1}, "a"),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_is_allowed_is_allowed(service, name):
    body, fingerprint = GOOD[name]
    answer = post(service, json.dumps(body), **{"X-Fingerprint": fingerprint})
    assert answer.status_code == 200, answer.data
    assert events(answer)[-1]["status"] == "complete"
    assert service.daily(fingerprint.rpartition(":")[2]) > 0


def test_a_charset_and_upper_case_of_the_content_type_do_not_matter(service):
    assert post(service, '{"query": "x"}', **{"Content-Type": "Application/JSON; charset=utf-8"}).status_code == 200


def test_bad_input_uses_up_no_challenge(make_app):
    service = make_app(ENABLE_CHALLENGE_RESPONSE="true")
    given = service.client.get("/api/v1/auth/challenge", headers={"X-Fingerprint": "hash456"}).json["challenge"]
    mine = f"fp:{given}:hash456"
    assert post(service, "{}", **{"X-Fingerprint": mine}).status_code == 422
    assert post(service, '{"query": "x"}', **{"X-Fingerprint": mine}).status_code == 200


def test_bad_input_counts_as_a_request_and_as_nothing_else(make_app):
    service = make_app(CHAT_RATE_LIMIT="3 per minute")
    statuses = [post(service, "{}").status_code for _ in range(5)]
    assert statuses == [422, 422, 422, 429, 429]
    assert service.stored() == {}
    # The network's, the caller's, and how many callers there were.
    assert len(service.redis.keys("llm:rate:*")) == 3


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"query": "x", "foo": 1}, "foo: is not known here"),
        ({}, "query: is missing"),
        ({"query": 1}, "query: has to be text"),
        ({"query": "x" * 8_001}, "query: may have at most 8000 characters"),
        ({"query": "x", "chat_history": {}}, "chat_history: has to be a list"),
        (
            {"query": "x", "chat_history": [{"role": "user", "content": "x"}] * 65},
            "chat_history: may have at most 64 items",
        ),
        ({"query": "x", "max_tokens": 0}, "max_tokens: has to be at least 1"),
        (
            {"query": "x", "max_tokens": 10**22},
            "max_tokens: has to be a whole number, in digits and at most 18 of them",
        ),
    ],
)
def test_the_reason_is_in_words_for_the_sender(service, body, reason):
    assert post(service, json.dumps(body)).json["reason"] == reason
