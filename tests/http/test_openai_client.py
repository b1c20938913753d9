"""The official client, with only its base URL and key changed, in front of an upstream that writes down its bill."""

import asyncio
import hashlib
import json
import threading

import openai
import pytest
from pydantic import BaseModel

from tests.servers import nanousd, wait_until
from tests.upstream import WORDS, Script, bill_nanousd

KEY, OTHER_KEY = "key-of-a-client", "key-of-another"
IDENTIFIER = hashlib.sha256(KEY.encode()).hexdigest()
QUESTION = [{"role": "user", "content": "What is Litecoin?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "What it is like outside.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
PICTURE = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}


@pytest.fixture
def client(front, stored):
    with openai.OpenAI(base_url=f"{front.base_url}/v1", api_key=KEY, max_retries=2) as client:
        yield client


def booked(stored, identifier=IDENTIFIER):
    """What the day and the window of this key hold, which has to be the same."""
    (day,) = stored.keys(f"llm:cost:daily:{identifier}:*") or [None]
    ring = stored.zrange(f"llm:cost:recent:{identifier}", 0, -1, withscores=True)
    amounts = {int(stored.get(day) or 0) if day else 0, int(sum(held for _, held in ring))}
    assert len(amounts) == 1
    return amounts.pop()


def billed(upstream):
    return sum(map(bill_nanousd, upstream.ledger))


def test_an_answer(client, upstream, stored):
    answer = client.chat.completions.create(model="gpt-4o", messages=QUESTION, max_tokens=10, temperature=0.3)
    assert answer.choices[0].message.content == "".join(WORDS[:10])
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 10)
    assert upstream.ledger[0].headers["Authorization"] == "Bearer key-of-the-upstream"
    assert booked(stored) == billed(upstream) > 0


def test_a_stream_with_its_usage(client, upstream, stored):
    chunks = list(
        client.chat.completions.create(
            model="gpt-4o", messages=QUESTION, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "".join(WORDS)
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 20)
    assert booked(stored) == billed(upstream)


def test_a_stream_that_asks_for_no_usage_is_counted(client, upstream, stored):
    # Of several choices what was seen counts, where that is more than the usage: so each word is one token here.
    upstream.behave(words=(" the",) * 20)
    chunks = list(client.chat.completions.create(model="gpt-4o", messages=QUESTION, stream=True, n=2))
    assert {chunk.usage for chunk in chunks} == {None}
    assert {chunk.choices[0].index for chunk in chunks} == {0, 1}
    assert upstream.ledger[0].generated_tokens == 40
    assert booked(stored) == billed(upstream)


def test_the_helper_for_streams_puts_tools_together(client, upstream, stored):
    upstream.behave(tool_call=True)
    with client.chat.completions.stream(model="gpt-4o", messages=QUESTION, tools=[TOOL]) as stream:
        final = stream.get_final_completion()
    call = final.choices[0].message.tool_calls[0]
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Oslo"})
    assert booked(stored) == billed(upstream)


def test_a_conversation_with_a_tool_and_a_picture(front, client, upstream, stored):
    lines_before = len(front.log_lines())
    upstream.behave(tool_call=True)
    messages = [{"role": "user", "content": [{"type": "text", "text": "Here?"}, PICTURE]}]
    first = client.chat.completions.create(model="gpt-4o", messages=messages, tools=[TOOL])
    message = first.choices[0].message
    messages += [message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}]
    upstream.behave()
    second = client.chat.completions.create(model="gpt-4o", messages=messages, tools=[TOOL])
    assert second.choices[0].message.content == "".join(WORDS)
    assert upstream.ledger[1].request["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"city":"Oslo"}'
    settled = front.lines_with("Cost settled", lines_before, at_least=2)
    assert all("overrun_usd=0.000000000" in line for line in settled)
    assert booked(stored) == billed(upstream)


class Coin(BaseModel):
    name: str
    age: int


def test_structured_output(client, upstream, stored):
    upstream.behave(words=('{"name": ', '"Litecoin", ', '"age": 15}'))
    answer = client.chat.completions.parse(model="gpt-4o", messages=QUESTION, response_format=Coin)
    assert answer.choices[0].message.parsed == Coin(name="Litecoin", age=15)
    assert upstream.ledger[0].request["response_format"]["json_schema"]["schema"]["title"] == "Coin"
    assert booked(stored) == billed(upstream)


def test_the_asynchronous_client(front, upstream, stored):
    async def talk():
        async with openai.AsyncOpenAI(base_url=f"{front.base_url}/v1", api_key=KEY) as client:
            stream = await client.chat.completions.create(model="gpt-4o", messages=QUESTION, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(talk()) == "".join(WORDS)
    assert booked(stored) == billed(upstream)


def test_the_models(client):
    assert [model.id for model in client.models.list()] == ["gpt-4o", "gpt-4o-mini"]
    assert client.models.retrieve("gpt-4o-mini").owned_by == "openai"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


def test_the_headers(client):
    raw = client.chat.completions.with_raw_response.create(model="gpt-4o", messages=QUESTION)
    assert raw.headers["X-Throttle-Backend"] == "atomic"
    assert nanousd(raw.headers["X-Cost-Reserved-USD"]) > 4_000_000
    assert raw.parse()._request_id == raw.headers["X-Request-ID"]


def test_a_wrong_key(client, upstream):
    with pytest.raises(openai.AuthenticationError) as caught:
        client.with_options(api_key="wrong").chat.completions.create(model="gpt-4o", messages=QUESTION)
    assert caught.value.code == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    assert upstream.ledger == []


def test_what_is_refused_names_the_parameter(client, upstream):
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.chat.completions.create(model="gpt-4o", messages=QUESTION, service_tier="priority")
    assert (caught.value.param, caught.value.type) == ("service_tier", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "word " * 4_000}])
    assert caught.value.code == "context_length_exceeded"
    assert upstream.ledger == []


def test_what_was_charged_is_not_tried_again_by_itself(client, upstream, stored):
    upstream.behave(ending="cut")
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="gpt-4o", messages=QUESTION)
    assert (caught.value.status_code, caught.value.code) == (424, "upstream_error")
    assert nanousd(caught.value.body["cost_usd"]) == booked(stored) >= billed(upstream) > 0
    assert len(upstream.ledger) == 1


def test_what_cost_nothing_is_tried_again_by_itself(client, upstream, stored):
    upstream.scripts.append(Script(status=503))
    answer = client.chat.completions.create(model="gpt-4o", messages=QUESTION)
    assert answer.usage.completion_tokens == 20
    assert len(upstream.ledger) == 2
    assert booked(stored) == bill_nanousd(upstream.ledger[1])


def test_a_key_of_idempotency(client, upstream, stored):
    once = {"Idempotency-Key": "once"}
    client.chat.completions.create(model="gpt-4o", messages=QUESTION, extra_headers=once)
    with pytest.raises(openai.ConflictError) as caught:
        client.chat.completions.create(model="gpt-4o", messages=QUESTION, extra_headers=once)
    assert caught.value.code == "duplicate_request"
    assert nanousd(caught.value.body["cost_usd"]) == booked(stored) == billed(upstream)
    assert len(upstream.ledger) == 1


def test_a_stream_that_breaks_raises(client, upstream, stored):
    upstream.behave(words=("one ", "two "), ending="cut")
    texts = []
    stream = client.chat.completions.create(model="gpt-4o", messages=QUESTION, stream=True)
    with pytest.raises(openai.APIError) as caught:
        texts.extend(chunk.choices[0].delta.content for chunk in stream)
    assert texts == ["", "one ", "two "]
    assert caught.value.code == "upstream_error"
    assert nanousd(caught.value.body["cost_usd"]) == booked(stored) >= billed(upstream)


def test_a_client_that_stops_reading_is_booked_at_what_it_cost(client, upstream, stored):
    go_on = threading.Event()
    upstream.behave(wait_for=go_on)
    with client.chat.completions.create(model="gpt-4o", messages=QUESTION, stream=True) as stream:
        next(iter(stream))
    go_on.set()
    wait_until(lambda: stored.keys("llm:open:*") == [], 5, "the reservation has ended")
    assert booked(stored) >= billed(upstream) > 0


def test_a_client_that_does_not_wait_for_a_whole_answer_is_booked_at_what_it_cost(client, upstream, stored):
    go_on = threading.Event()
    upstream.behave(wait_for=go_on)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(max_retries=0, timeout=0.3).chat.completions.create(model="gpt-4o", messages=QUESTION)
    go_on.set()
    wait_until(lambda: stored.keys("llm:open:*") == [], 5, "the reservation has ended")
    assert booked(stored) == billed(upstream) > 0


def test_a_budget_that_is_used_up(front, client, upstream, stored):
    front.set_by_hand(stored, daily_cost_limit_usd=0.0045)
    upstream.behave(usage="none")
    client.chat.completions.create(model="gpt-4o", messages=QUESTION)
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="gpt-4o", messages=QUESTION)
    assert (caught.value.code, caught.value.body["reason"]) == ("cost_throttled", "daily_limit")
    assert caught.value.body["message"].startswith("Daily usage limit reached")
    assert len(upstream.ledger) == 1
    other = client.with_options(api_key=OTHER_KEY).chat.completions.create(model="gpt-4o", messages=QUESTION)
    assert other.choices
    front.set_by_hand(stored)


def test_twenty_at_once_reach_the_upstream_as_often_as_they_are_paid_for(front, client, upstream, stored):
    go_on = threading.Event()
    upstream.behave(wait_for=go_on)
    front.set_by_hand(stored, daily_cost_limit_usd=0.0300, throttle_when_busy=False)
    start, answers = threading.Barrier(20), []
    impatient = client.with_options(max_retries=0)

    def ask(number):
        start.wait()
        try:
            answer = impatient.chat.completions.create(model="gpt-4o", messages=QUESTION, stream=bool(number % 2))
            answers.append(list(answer))
        except openai.RateLimitError as error:
            answers.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(answers) == 13, 5, "all but seven are refused while seven are under way")
    go_on.set()
    for thread in threads:
        thread.join()
    refused = [each for each in answers if isinstance(each, openai.RateLimitError)]
    assert len(refused) == 13
    assert {(each.body["reason"], each.body["in_flight"]) for each in refused} == {("daily_limit", True)}
    assert len(upstream.ledger) == 7
    assert billed(upstream) == booked(stored) <= 30_000_000
    front.set_by_hand(stored)


def test_no_key_is_in_the_log_or_in_redis(front, client, stored):
    client.chat.completions.create(model="gpt-4o", messages=QUESTION)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong-and-secret").models.list()
    keys = " ".join(stored.keys("*"))
    for secret in (KEY, "wrong-and-secret", "key-of-the-upstream"):
        assert secret not in front.log()
        assert secret not in keys
    assert IDENTIFIER in keys
    assert IDENTIFIER not in front.log()
    assert front.lines_with("Cost settled request_id=")
