"""What is shown and booked of answers that upstreams send in ways of their own, byte for byte."""

import gzip
import json
import logging
import socket
import threading
import zlib
from decimal import Decimal

import pytest

from tests.servers import nanousd, parse_events

PRICES = {"LLM_PRICE_INPUT_USD_PER_MTOK": "1", "LLM_PRICE_OUTPUT_USD_PER_MTOK": "1"}
TOKEN = 1_000
"""The price of one, in nano-dollars."""
ASKED = {"messages": [{"role": "user", "content": "What is Litecoin?"}], "max_tokens": 50}


class RawUpstream:
    """Answers each request with `sent`, and closes, or holds the connection open where it `holds`."""

    def __init__(self):
        self.sent, self.holds = b"", False
        self.closing = threading.Event()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.base_url = f"http://127.0.0.1:{self._server.getsockname()[1]}/v1"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while not self.closing.is_set():
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        with connection, connection.makefile("rb") as file:
            length = 0
            while (line := file.readline()) not in {b"\r\n", b""}:
                name, _, value = line.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            file.read(length)
            connection.sendall(self.sent)
            if self.holds:
                self.closing.wait(20)

    def close(self):
        self.closing.set()
        self._server.close()


@pytest.fixture
def upstream():
    server = RawUpstream()
    yield server
    server.close()


@pytest.fixture
def service(make_app, upstream):
    return make_app(LLM_BASE_URL=upstream.base_url, API_KEYS="*", **PRICES)


def head(kind="text/event-stream", status="200 OK", **more):
    lines = [f"HTTP/1.1 {status}", "Connection: close", *([f"Content-Type: {kind}"] if kind else [])]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in more.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def chunk(text=None, finish=None, **more):
    delta = {} if text is None else {"content": text}
    return {"id": "c", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more}


USAGE = {"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25}
BILL = 25 * TOKEN
END = (chunk(None, "stop"), {"id": "c", "choices": [], "usage": USAGE})


def sse(*events):
    return b"".join(
        event if isinstance(event, bytes) else f"data: {json.dumps(event)}\n\n".encode() for event in events
    )


GOOD = sse(chunk("Hello"), chunk(" there"), *END, b"data: [DONE]\n\n")
WHOLE = {
    "id": "c",
    "object": "chat.completion",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello there"}, "finish_reason": "stop"}],
    "usage": USAGE,
}


def shown(answer):
    return "".join(event.get("chunk", "") for event in parse_events(answer.data))


def booked(service):
    """Of the network, which `/v1` counts for with `API_KEYS=*`."""
    limits = service.client.get("/api/v1/usage").json["limits"]
    return int(Decimal(limits["day"]["spent_usd"]) * 10**9)


def assert_is_told_and_billed(service, answer):
    last = parse_events(answer.data)[-1]
    assert (shown(answer), last["status"], nanousd(last["cost_usd"])) == ("Hello there", "complete", BILL)
    assert service.daily() == BILL


@pytest.mark.parametrize(
    "between",
    [
        b"data:\n\n",
        b"data: \n\n",
        b"data\n\n",
        b": keep-alive\n\n",
        b":\n",
        b"keep-alive\n\n",
        b"data: keep-alive\n\n",
        b"data: [PING]\n\n",
        b"data: : OPENROUTER PROCESSING\n\n",
        b'data: "ping"\n\n',
        b"data: null\n\n",
        b'event: ping\ndata: {"type": "ping"}\n\n',
        b"event: keep-alive\ndata: \n\n",
        b'event: metadata\ndata: {"model": "x", "message": "on its way"}\n\n',
        b'data: {"type": "ping"}\n\n',
        b"id: 7\nretry: 1000\n\n",
        b"\n\n\n",
        b"\r\n\r\n",
    ],
)
def test_a_sign_that_the_server_is_still_there_is_none_of_the_answer(service, upstream, between):
    upstream.sent = head() + between + sse(chunk("Hello"), between, chunk(" there"), between, *END, b"data: [DONE]\n\n")
    assert_is_told_and_billed(service, service.chat())
    handed_on = service.client.post("/v1/chat/completions", json={**ASKED, "stream": True}, buffered=True)
    events = [line for line in handed_on.data.split(b"\n") if line.startswith(b"data: ")]
    assert [b"choices" in event for event in events] == [True, True, True, False]
    assert events[-1] == b"data: [DONE]"


@pytest.mark.parametrize(
    "done",
    [b"data: [DONE] \n\n", b"data:[DONE]\n\n", b'data: "[DONE]"\n\n', b"data:  [DONE]\r\n\r\n", b"data: [DONE]", b""],
)
def test_the_end_in_its_spellings(service, upstream, done):
    upstream.sent = head() + sse(chunk("Hello"), chunk(" there"), *END, done)
    assert_is_told_and_billed(service, service.chat())


@pytest.mark.parametrize("kind", ["application/json", "text/plain; charset=utf-8", "application/octet-stream", ""])
def test_a_stream_under_another_type(service, upstream, kind):
    upstream.sent = head(kind) + GOOD
    assert_is_told_and_billed(service, service.chat())


@pytest.mark.parametrize("kind", ["application/json", "text/event-stream", "text/plain", ""])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_whole_answer_in_place_of_a_stream(service, upstream, kind, indent):
    upstream.sent = head(kind) + json.dumps(WHOLE, indent=indent).encode()
    assert_is_told_and_billed(service, service.chat())


def test_tool_calls_of_a_whole_answer_in_place_of_a_stream_have_their_index(service, upstream):
    calls = [{"id": name, "type": "function", "function": {"name": name, "arguments": "{}"}} for name in "ab"]
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    whole = {**WHOLE, "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]}
    upstream.sent = head("application/json") + json.dumps(whole).encode()
    answer = service.client.post("/v1/chat/completions", json={**ASKED, "stream": True}, buffered=True)
    first = json.loads(answer.data.split(b"\n\n")[0].removeprefix(b"data: "))
    assert first["choices"][0]["delta"]["tool_calls"] == [{"index": index, **call} for index, call in enumerate(calls)]
    assert first["object"] == "chat.completion.chunk"


@pytest.mark.parametrize("kind", ["application/json", "text/event-stream", "text/plain", ""])
@pytest.mark.parametrize("before", [b"", b": on its way\n\n", b"\xef\xbb\xbf", b"event: ping\ndata: {}\n\n", b"\n"])
def test_a_stream_in_place_of_a_whole_answer(service, upstream, kind, before):
    upstream.sent = head(kind) + before + GOOD
    answer = service.client.post("/v1/chat/completions", json=ASKED)
    assert answer.json == WHOLE
    assert booked(service) == BILL


def test_all_of_a_stream_in_place_of_a_whole_answer_is_put_together(service, upstream):
    def piece(index=0, finish=None, **delta):
        return {"id": "c", "model": "m", "choices": [{"index": index, "delta": delta, "finish_reason": finish}]}

    def call(index, arguments, **more):
        return {"index": index, "function": {"arguments": arguments, **more.pop("function", {})}, **more}

    upstream.sent = head() + sse(
        piece(role="assistant", content=None, reasoning="h"),
        piece(1, role="assistant", content="Hi"),
        piece(
            role="assistant", reasoning="m", tool_calls=[call(0, "", id="a", type="function", function={"name": "f"})]
        ),
        piece(tool_calls=[call(0, '{"x"'), call(1, "{}", id="b", type="function", function={"name": "g"})]),
        piece(tool_calls=[call(0, ":1}")]),
        piece(1, "length", content=" there"),
        piece(0, "tool_calls", content=None),
        {"id": "c", "choices": [], "usage": USAGE | {"completion_tokens": 50, "total_tokens": 70}},
        b"data: [DONE]\n\n",
    )
    answer = service.client.post("/v1/chat/completions", json={**ASKED, "n": 2})
    function = [{"arguments": '{"x":1}', "name": "f"}, {"arguments": "{}", "name": "g"}]
    calls = [{"function": each, "id": name, "type": "function"} for each, name in zip(function, "ab", strict=True)]
    first = {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": calls}
    assert answer.json["choices"] == [
        {"index": 0, "message": first, "finish_reason": "tool_calls"},
        {"index": 1, "message": {"role": "assistant", "content": "Hi there"}, "finish_reason": "length"},
    ]
    assert (answer.json["object"], answer.json["usage"]["completion_tokens"]) == ("chat.completion", 50)
    assert booked(service) == 70 * TOKEN


@pytest.mark.parametrize(
    "end", [b"", sse({"error": {"message": "no", "code": 500}}), sse([1]), sse({"choices": 7}), sse({"choices": [7]})]
)
def test_a_stream_in_place_of_a_whole_answer_that_breaks_is_booked_whole(service, upstream, end):
    upstream.sent = head() + sse(chunk("Hello")) + end
    answer = service.client.post("/v1/chat/completions", json=ASKED)
    assert answer.status_code == 424
    assert booked(service) == nanousd(answer.headers["X-Cost-Reserved-USD"])


def test_an_error_as_the_first_event_in_place_of_a_whole_answer_costs_nothing(service, upstream):
    upstream.sent = head() + sse({"error": {"message": "try again", "code": 429}})
    answer = service.client.post("/v1/chat/completions", json=ASKED)
    assert (answer.status_code, answer.json["error"]["code"]) == (429, "upstream_busy")
    assert booked(service) == 0


def test_one_event_a_line(service, upstream):
    lines = [json.dumps(event) for event in (chunk("Hello"), chunk(" there"), *END)]
    upstream.sent = head("application/x-ndjson") + "\n".join(lines).encode()
    assert_is_told_and_billed(service, service.chat())


@pytest.mark.parametrize(
    ("encoding", "pack"), [("gzip", gzip.compress), ("GZIP", gzip.compress), ("deflate", zlib.compress)]
)
def test_a_body_that_is_packed_though_it_was_not_asked_for(service, upstream, encoding, pack):
    upstream.sent = head(Content_Encoding=encoding) + pack(GOOD)
    assert_is_told_and_billed(service, service.chat())
    upstream.sent = head("application/json", Content_Encoding=encoding) + pack(json.dumps(WHOLE).encode())
    assert service.client.post("/v1/chat/completions", json=ASKED).json == WHOLE


def test_events_that_are_packed_one_by_one_are_read_as_they_come(service, upstream):
    packer = zlib.compressobj(wbits=31)
    parts = [packer.compress(GOOD[:90]) + packer.flush(zlib.Z_SYNC_FLUSH), packer.compress(GOOD[90:]), packer.flush()]
    upstream.sent = head(Content_Encoding="gzip") + b"".join(parts)
    assert_is_told_and_billed(service, service.chat())


@pytest.mark.parametrize("body", [b"no gzip", gzip.compress(b"\0" * 100_000_000, 9)])
def test_what_cannot_be_unpacked_is_no_answer(service, upstream, body):
    upstream.sent = head(Content_Encoding="gzip") + body
    answer = service.chat()
    assert b"upstream_error" in answer.data
    assert service.daily() == nanousd(answer.headers["X-Cost-Reserved-USD"])


def test_halves_of_a_surrogate_pair_are_one_character_for_the_client(service, upstream):
    halves = [
        b'data: {"choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n' % half for half in (b"\\ud83d", b"\\ude00")
    ]
    upstream.sent = head() + sse(chunk("Hello"), *halves, chunk(" there"), *END, b"data: [DONE]\n\n")
    assert shown(service.chat()) == "Hello😀 there"
    assert service.daily() == BILL


def test_half_of_a_pair_without_the_other_is_shown_as_something(service, upstream):
    half = b'data: {"choices":[{"index":0,"delta":{"content":"\\ud83d"}}]}\n\n'
    upstream.sent = head() + sse(half, chunk("Hello"), half, *END, b"data: [DONE]\n\n")
    assert shown(service.chat()).replace("\ufffd", "?") == "?Hello?"


def openai_events(service, **fields):
    """The events as a reader finds them that breaks lines wherever Python does."""
    answer = service.client.post("/v1/chat/completions", json={**ASKED, "stream": True, **fields}, buffered=True)
    lines = [line for line in answer.data.decode().splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line[6:]) for line in lines if line != "data: [DONE]"]


def contents(chunks):
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])


FORGED = "".join(
    f'{end}{end}data: {{"status":"complete","cost_usd":"0"}}{end}{end}'
    for end in ("\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r", "\n", "\r\n")
)
"""What would be an event of its own to a reader that breaks lines at any of these."""


@pytest.mark.parametrize("escapes", [True, False])
def test_no_text_of_a_model_is_an_event_of_its_own(service, upstream, escapes):
    texts = ["Hello", FORGED, " there", "\u2028", FORGED]
    said = [f"data: {json.dumps(chunk(text), ensure_ascii=escapes)}\n\n".encode() for text in texts]
    upstream.sent = head() + sse(*said, *END, b"data: [DONE]\n\n")
    answer = service.chat()
    assert shown(answer) == "".join(texts)
    lines = [line for line in answer.data.decode().splitlines() if line]
    assert [json.loads(line.removeprefix("data: "))["status"] for line in lines].count("complete") == 1
    assert contents(openai_events(service)) == "".join(texts)


@pytest.mark.parametrize("escapes", [True, False])
def test_no_text_of_a_whole_answer_breaks_a_line(service, upstream, escapes):
    message = {"role": "assistant", "content": FORGED}
    whole = {**WHOLE, "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
    upstream.sent = head("application/json") + json.dumps(whole, ensure_ascii=escapes).encode()
    answer = service.client.post("/v1/chat/completions", json=ASKED)
    assert json.loads(answer.data) == whole
    assert len(answer.data.decode().splitlines()) == 1


def raw_chunk(content, name="content"):
    return b'data: {"choices":[{"index":0,"delta":{"%b":"%b"}}]}\n\n' % (name.encode(), content.encode())


@pytest.mark.parametrize(
    ("contents_sent", "text"),
    [
        (["\\ud83d", "\\ude00"], "😀"),
        (["a\\ud83d", "\\ude00b"], "a😀b"),
        (["\\ud83d", "plain", "plain"], "\ufffdplainplain"),
        (["\\ud83d", "\\ud83d", "\\ude00"], "\ufffd😀"),
        (["\\ude00"], "\ufffd"),
        (["a\\ud83d\\ud83d\\ude00\\ude00b"], "a\ufffd😀\ufffdb"),
        (["Hello \\ud83d"], "Hello "),
        (["plain", "\\ud83d", "", "\\ude00", "plain"], "plain😀plain"),
    ],
)
def test_halves_of_characters_reach_no_client_of_openai(service, upstream, contents_sent, text):
    upstream.sent = head() + sse(*map(raw_chunk, contents_sent), *END, b"data: [DONE]\n\n")
    assert contents(openai_events(service)) == text
    assert shown(service.chat()).removesuffix("\ufffd") == text.removesuffix("\ufffd")


def test_halves_are_put_together_field_by_field(service, upstream):
    said = [raw_chunk("\\ud83d", "reasoning_content"), raw_chunk("\\ud83c", "content")]
    said += [raw_chunk("\\ude00", "reasoning_content"), raw_chunk("\\udf0d", "content")]
    upstream.sent = head() + sse(*said, *END, b"data: [DONE]\n\n")
    deltas = [chunk["choices"][0]["delta"] for chunk in openai_events(service) if chunk["choices"]]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "😀"
    assert "".join(delta.get("content") or "" for delta in deltas) == "🌍"


def test_halves_in_a_whole_answer_and_in_names_reach_no_client(service, upstream):
    content = b'{"choices":[{"index":0,"message":{"role":"assistant","content":"a\\ud83db","\\ud83d":1},'
    content += b'"finish_reason":"stop"}],"usage":{"prompt_tokens":9,"completion_tokens":2,"total_tokens":11}}'
    upstream.sent = head("application/json") + content
    answer = service.client.post("/v1/chat/completions", json=ASKED)
    message = answer.json["choices"][0]["message"]
    assert message["content"] == "a\ufffdb"
    "".join(message).encode()


LETTERS = "The quick brown fox jumps over the lazy dog. " * 9
"""91 tokens of gpt-4o."""


@pytest.mark.parametrize("model", ["gpt-4o", "llama-3.3-70b"])
@pytest.mark.parametrize("letters", [1, 2])
def test_one_letter_an_event_is_not_a_token(make_app, upstream, model, letters):
    service = make_app(LLM_BASE_URL=upstream.base_url, LLM_MODEL=model, **PRICES)
    said = [chunk(LETTERS[start : start + letters]) for start in range(0, len(LETTERS), letters)]
    upstream.sent = head() + sse(*said, *END, b"data: [DONE]\n\n")
    answer = service.chat(max_tokens=100)
    assert shown(answer) == LETTERS
    assert parse_events(answer.data)[-1]["finish_reason"] == "stop"
    assert service.daily() == BILL


# --- errors

BUSY = {"error": {"code": 429, "message": "Provider returned error"}}
ERRORS = [
    BUSY,
    {"error": "overloaded"},
    {"object": "error", "message": "no", "code": 500},
    {"type": "error", "message": "no"},
    {"detail": "no"},
    {"code": 500, "message": "no"},
    {"error_code": 17, "error_msg": "no"},
]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("before", [(), (chunk(""), b": wait\n\n")], ids=["first", "after a role"])
def test_an_error_before_the_first_piece_costs_nothing(service, upstream, error, before):
    upstream.sent = head() + sse(*before, error)
    last = parse_events(service.chat().data)[-1]
    name = "upstream_busy" if error is BUSY else "upstream_error"
    assert (last["error"], last["cost_usd"]) == (name, "0.000000000")
    assert last["usage"] == {"input_tokens": 0, "output_tokens": 0}
    assert service.daily() == 0


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_in_place_of_a_stream_is_a_status_and_costs_nothing(service, upstream, error):
    upstream.sent = head("application/json") + json.dumps(error).encode()
    answer, status = service.chat(), 429 if error is BUSY else 502
    assert (answer.status_code, answer.json["cost_usd"]) == (status, "0.000000000")
    whole = service.client.post("/v1/chat/completions", json=ASKED)
    assert (whole.status_code, whole.json["error"]["cost_usd"]) == (status, "0.000000000")
    assert service.daily() == 0


def test_an_error_with_a_usage_costs_that(service, upstream):
    upstream.sent = head() + sse({"error": {"message": "no"}, "usage": USAGE})
    assert parse_events(service.chat().data)[-1]["cost_usd"] == "0.000025000"
    assert service.daily() == BILL
    upstream.sent = head("application/json", "403 Forbidden") + json.dumps({"error": "no", "usage": USAGE}).encode()
    assert service.chat().json["cost_usd"] == "0.000025000"
    assert service.daily() == 2 * BILL


def test_an_error_after_the_first_piece_costs_the_whole(service, upstream):
    upstream.sent = head() + sse(chunk("Hello"), ERRORS[0])
    answer = service.chat()
    assert service.daily() == nanousd(answer.headers["X-Cost-Reserved-USD"])


@pytest.mark.parametrize("status", ["408 Request Timeout", "504 Gateway Timeout", "524 A Timeout Occurred"])
@pytest.mark.parametrize("said", [{}, {"usage": USAGE}])
def test_where_somebody_in_between_gave_up_the_model_may_have_worked(service, upstream, status, said):
    upstream.sent = head("application/json", status) + json.dumps({"error": "late", **said}).encode()
    answer = service.chat()
    assert answer.status_code == 504
    booked = BILL if said else nanousd(answer.headers["X-Cost-Reserved-USD"])
    assert service.daily() == booked == nanousd(answer.json["cost_usd"])


# --- without a usage, and with more than one bill

UNTOLD = sse(chunk("Hello"), chunk(" there"), chunk(None, "stop"), b"data: [DONE]\n\n")


@pytest.mark.parametrize("booked", ["whole", "seen"])
def test_an_answer_without_a_usage_is_booked_as_the_setting_says_and_told_once(make_app, upstream, caplog, booked):
    service = make_app(LLM_BASE_URL=upstream.base_url, LLM_WITHOUT_USAGE=booked, API_KEYS="*", **PRICES)
    upstream.sent = head() + UNTOLD
    with caplog.at_level(logging.INFO, logger="tollgate"):
        answers = [service.chat() for _ in range(3)]
    reserved = nanousd(answers[0].headers["X-Cost-Reserved-USD"])
    last = parse_events(answers[0].data)[-1]
    seen = reserved - (400 - 2) * TOKEN
    assert service.daily() == 3 * (reserved if booked == "whole" else seen)
    assert nanousd(last["cost_usd"]) * 3 == service.daily()
    assert sum(last["usage"].values()) * TOKEN == nanousd(last["cost_usd"])
    (line,) = [record for record in caplog.records if "reports no usage" in record.message]
    assert line.levelname == "WARNING"
    assert (line.fields["model"], line.fields["booked"]) == ("gpt-4o", booked)
    assert line.fields["upstream"] in upstream.base_url
    metrics = service.client.get("/metrics").text
    assert f'tollgate_usage_missing_total{{booked="{booked}",model="gpt-4o"}} 3.0' in metrics


@pytest.mark.parametrize("stream", [True, False])
def test_seen_books_no_less_than_was_reserved_where_the_answer_broke_off(make_app, upstream, stream):
    service = make_app(LLM_BASE_URL=upstream.base_url, LLM_WITHOUT_USAGE="seen", API_KEYS="*", **PRICES)
    upstream.sent = (
        head() + sse(chunk("Hello")) if stream else head("application/json") + json.dumps(WHOLE).encode()[:-9]
    )
    answer = service.client.post(
        "/v1/chat/completions",
        json={**ASKED, "stream": stream},
        buffered=True,
        environ_base={"REMOTE_ADDR": "198.51.100.7"},
    )
    assert service.daily("ip:198.51.100.7") == nanousd(answer.headers["X-Cost-Reserved-USD"])


def test_a_whole_answer_without_a_usage_is_booked_as_seen(make_app, upstream):
    service = make_app(LLM_BASE_URL=upstream.base_url, LLM_WITHOUT_USAGE="seen", API_KEYS="*", **PRICES)
    upstream.sent = head("application/json") + json.dumps({**WHOLE, "usage": None}).encode()
    answer = service.client.post(
        "/v1/chat/completions", json=ASKED, buffered=True, environ_base={"REMOTE_ADDR": "198.51.100.7"}
    )
    assert service.daily("ip:198.51.100.7") == nanousd(answer.headers["X-Cost-Reserved-USD"]) - (50 - 2) * TOKEN


@pytest.mark.parametrize(("cost", "is_overrun"), [(0.0001, False), (0.9, True)])
def test_a_bill_that_is_higher_than_ours_is_booked_and_told(service, upstream, caplog, cost, is_overrun):
    upstream.sent = head() + sse(
        chunk("Hello"), chunk(None, "stop"), {"choices": [], "usage": {**USAGE, "cost": cost}}, b"data: [DONE]\n\n"
    )
    with caplog.at_level(logging.INFO, logger="tollgate"):
        answer = service.chat()
    assert service.daily() == nanousd(parse_events(answer.data)[-1]["cost_usd"]) == round(cost * 10**9)
    (line,) = [record for record in caplog.records if "bills more than our price" in record.message]
    assert (line.fields["priced_usd"], line.levelname) == ("0.000025000", "WARNING")
    (settled,) = [record for record in caplog.records if record.message == "Cost settled"]
    assert (settled.levelname == "WARNING") == is_overrun


def test_a_bill_that_is_lower_than_ours_changes_nothing(service, upstream, caplog):
    upstream.sent = head() + sse(
        chunk("Hello"), chunk(None, "stop", usage={**USAGE, "cost": 1e-6}), b"data: [DONE]\n\n"
    )
    service.chat()
    assert service.daily() == BILL
    assert not [record for record in caplog.records if "bills more" in record.message]


def test_an_answer_that_has_its_end_and_then_goes_on_in_silence_is_over(make_app, upstream, monkeypatch):
    monkeypatch.setattr("flaskapp.llm.openai_compatible._SILENT_SECONDS", 0.0)
    service = make_app(LLM_BASE_URL=upstream.base_url, **PRICES)
    upstream.sent, upstream.holds = head() + sse(chunk("Hello"), chunk(" there"), *END), True
    assert_is_told_and_billed(service, service.chat())
