"""What an answer used, in all the words and at all the places in which upstreams say it."""

import pytest

from backends.pricing.token_bounds import counter_for
from flaskapp.llm import Usage
from flaskapp.llm.completion import Completion, usage_of_whole
from flaskapp.llm.usages import ReportedUsages, usage_of, usage_places
from tests.models import pieces_in


@pytest.mark.parametrize(
    ("raw", "usage"),
    [
        ({"prompt_tokens": 20, "completion_tokens": 5}, Usage(20, 5)),
        ({"input_tokens": 20, "output_tokens": 5}, Usage(20, 5)),
        ({"promptTokens": 20, "completionTokens": 5}, Usage(20, 5)),
        ({"promptTokenCount": 20, "candidatesTokenCount": 5, "totalTokenCount": 25}, Usage(20, 5)),
        ({"prompt_tokens": "20", "completion_tokens": "5"}, Usage(20, 5)),
        ({"prompt_tokens": 20, "total_tokens": 25}, Usage(20, 5)),
        ({"completion_tokens": 5, "total_tokens": 25}, Usage(20, 5)),
        # A total that is larger than its parts.
        ({"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 325}, Usage(20, 305)),
        ({"prompt_tokens": 20, "completion_tokens": 0, "total_tokens": 325}, Usage(20, 305)),
        ({"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 24}, Usage(20, 5)),
        # Thoughts, within the output or beside it.
        (
            {"prompt_tokens": 20, "completion_tokens": 5, "reasoning_tokens": 300, "total_tokens": 325},
            Usage(20, 305, reasoning_tokens=300),
        ),
        ({"prompt_tokens": 20, "completion_tokens": 0, "reasoning_tokens": 9}, Usage(20, 9, reasoning_tokens=9)),
        (
            {"promptTokenCount": 20, "candidatesTokenCount": 5, "thoughtsTokenCount": 300, "totalTokenCount": 325},
            Usage(20, 305, reasoning_tokens=300),
        ),
        (
            {"input_tokens": 20, "output_tokens": 50, "output_tokens_details": {"reasoning_tokens": 40}},
            Usage(20, 50, reasoning_tokens=40),
        ),
    ],
)
def test_tokens_are_read_in_whatever_words(raw, usage):
    assert usage_of(raw) == usage


@pytest.mark.parametrize(
    "raw",
    [
        None,
        "many",
        [],
        {},
        {"total_tokens": 25},
        {"prompt_tokens": 20, "completion_tokens": "many", "total_tokens": 25},
        {"prompt_tokens": -1, "completion_tokens": 5},
        {"prompt_tokens": 20, "completion_tokens": 10**30},
        {"prompt_tokens": True, "completion_tokens": 5},
        {"prompt_tokens": 20, "completion_tokens": 5.5},
    ],
)
def test_what_says_nothing_is_no_usage(raw):
    assert usage_of(raw) is None


@pytest.mark.parametrize(
    "said",
    [
        {"prompt_tokens_details": {"cached_tokens": 60}},
        {"input_tokens_details": {"cached_tokens": 60}},
        {"prompt_cache_hit_tokens": 60, "prompt_cache_miss_tokens": 40},
        {"cached_tokens": 60},
        {"cache_read_input_tokens": 60, "total_tokens": 105},
        {"cachedContentTokenCount": 60},
        {"cached_prompt_text_tokens": 60},
        {"prompt_tokens_details": {"cache_read_tokens": 60, "uncached_tokens": 40}},
    ],
)
def test_what_was_read_from_a_cache_is_read_under_every_name(said):
    assert usage_of({"prompt_tokens": 100, "completion_tokens": 5, **said}) == Usage(100, 5, 60)


@pytest.mark.parametrize(
    "said",
    [
        {"cache_creation_input_tokens": 60},
        {"prompt_tokens_details": {"cache_write_tokens": 60}},
        {"prompt_tokens_details": {"cache_creation_tokens": 60}},
        {"cacheWriteInputTokens": 60},
        {"cache_creation": {"ephemeral_5m_input_tokens": 60, "ephemeral_1h_input_tokens": 0}},
        {"claude_cache_creation_5_m_tokens": 60},
    ],
)
def test_what_was_written_to_a_cache_is_read_under_every_name(said):
    raw = {"prompt_tokens": 100, "completion_tokens": 5, "total_tokens": 105, **said}
    assert usage_of(raw) == Usage(100, 5, cache_write_tokens=60)


def test_what_was_written_to_a_longer_cache_is_told_apart():
    split = {"ephemeral_5m_input_tokens": 20, "ephemeral_1h_input_tokens": 40}
    raw = {"prompt_tokens": 100, "completion_tokens": 5, "cache_creation_input_tokens": 60, "cache_creation": split}
    assert usage_of(raw) == Usage(100, 5, cache_write_tokens=60, long_cache_write_tokens=40)


@pytest.mark.parametrize(
    "said",
    [
        # Anthropic's own words, where the input is what no cache had.
        {"input_tokens": 3, "output_tokens": 5, "cache_read_input_tokens": 2, "cache_creation_input_tokens": 1},
        {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 11, "cached_tokens": 2, "cache_write_tokens": 1},
    ],
)
def test_caches_beside_the_input_are_added(said):
    assert usage_of(said) == Usage(6, 5, 2, 1)


def test_a_cache_that_is_larger_than_the_input_was_counted_beside_it():
    assert usage_of({"prompt_tokens": 3, "completion_tokens": 5, "cache_read_input_tokens": 900}) == Usage(903, 5, 900)


@pytest.mark.parametrize(
    ("details", "text"),
    [
        ({}, 0),
        ({"text_tokens": 40}, 40),
        ({"image_tokens": 60}, 40),
        ({"image_tokens": 0}, 100),
        ({"image_tokens": 50, "reasoning_tokens": 10}, 40),
        ({"text_tokens": 400}, 100),
    ],
)
def test_what_is_known_to_be_text_is_told_apart(details, text):
    raw = {"prompt_tokens": 7, "completion_tokens": 100, "completion_tokens_details": details}
    assert usage_of(raw).text_tokens == text


@pytest.mark.parametrize(
    ("said", "billed_nanousd"),
    [
        ({"cost": 0.00012300000000000001}, 123_000),
        ({"cost": "0.000123"}, 123_000),
        ({"cost": {"input_tokens_cost": 0.000023, "total_cost": 0.000123}}, 123_000),
        ({"estimated_cost": 1.23e-4}, 123_000),
        ({"cost_in_usd_ticks": 1_230_000}, 123_000),
        ({"cost": 0.000003, "is_byok": True, "cost_details": {"upstream_inference_cost": 0.00012}}, 123_000),
        ({"cost": 0.000123, "cost_details": {"upstream_inference_cost": 0.000123}}, 123_000),
        ({"cost": 0}, 0),
        ({"cost": -1}, 0),
        ({"cost": "much"}, 0),
        ({"cost": True}, 0),
        ({"cost": "NaN"}, 0),
        ({"cost": 1e30}, 0),
    ],
)
def test_the_bill_of_the_provider_is_read(said, billed_nanousd):
    assert usage_of({"prompt_tokens": 7, "completion_tokens": 1, **said}).billed_nanousd == billed_nanousd


@pytest.mark.parametrize(
    "said", [{"num_search_queries": 3}, {"server_tool_use": {"web_search_requests": 3}}, {"web_search_requests": 3}]
)
def test_searches_are_read(said):
    assert usage_of({"prompt_tokens": 7, "completion_tokens": 1, **said}).searches == 3


def test_the_places_of_a_usage():
    usage = {"prompt_tokens": 7, "completion_tokens": 1}
    for body in ({"usage": usage}, {"usage": None, "x_groq": {"id": "r", "usage": usage}}, {"usageMetadata": usage}):
        assert usage_places(body) == (usage, {})
    assert usage_places({"choices": [{"usage": usage}, {"index": 1, "usage": usage}]}) == (None, {0: usage, 1: usage})
    assert usage_places({"choices": [{"delta": {}}], "x_groq": {"id": "r"}}) == (None, {})


# --- several in one stream


def told(*outputs, seen, summary=None):
    usages = ReportedUsages()
    for output in outputs:
        usages.add(Usage(20, output), is_summary=False, has_text=True)
    if summary is not None:
        usages.add(Usage(20, summary), is_summary=True, has_text=False)
    return usages.usage(seen).output_tokens


@pytest.mark.parametrize(
    ("outputs", "seen", "used"),
    [
        ([5], 20, 5),
        (range(1, 21), 20, 20),
        ([1, 2, 2, 3], 3, 3),
        ([20] * 20, 20, 20),
        # Each chunk its own.
        ([1] * 20, 20, 20),
        ([2, 1, 3, 2], 8, 8),
        ([500, 1, 1, 1], 4, 503),
        ([3, 5], 8, 8),
        ([1, 2], 3, 2),
        ([1, 1, 1], 5, 5),
    ],
)
def test_usages_of_chunks_are_added_where_each_is_its_own(outputs, seen, used):
    assert told(*outputs, seen=seen) == used
    assert told(*outputs, seen=seen, summary=used) == used


def chunk(text, usage=None, index=0, finish=None, **more):
    delta = {"content": text} if text else {}
    return {"choices": [{"index": index, "delta": delta, "finish_reason": finish, **more}], "usage": usage}


def used(output, prompt=20):
    return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


def stream(*chunks, choices=1, model="gpt-4o"):
    completion = Completion(counter_for(model), choices)
    for each in chunks:
        pieces_in(completion, each)
        completion.count_tokens()
    pieces_in(completion, b"[DONE]")
    return completion


def test_each_chunk_of_a_stream_with_its_own_usage():
    chunks = [chunk(f" word{number % 3}", used(2)) for number in range(30)]
    assert stream(*chunks, chunk("", finish="stop")).usage.output_tokens >= 60
    growing = [chunk(" word", used(number + 1)) for number in range(30)]
    assert stream(*growing, chunk("", used(30), finish="stop")).usage == Usage(20, 30)


def test_a_usage_in_each_choice_is_added():
    chunks = [chunk(" a"), chunk(" b", index=1)]
    ends = [chunk("", index=index, finish="stop", usage_=None) for index in (0, 1)]
    for index, end in enumerate(ends):
        end["choices"][0]["usage"] = used(5 + index)
    assert stream(*chunks, *ends, choices=2).usage == Usage(20, 11)


def test_a_usage_of_one_choice_for_all_of_them_is_less_than_was_seen():
    chunks = [chunk(" word", index=index) for _ in range(30) for index in (0, 1)]
    ends = [chunk("", index=index, finish="stop") for index in (0, 1)]
    assert stream(*chunks, *ends, {"choices": [], "usage": used(30)}, choices=2).usage == Usage(20, 60)
    assert stream(*chunks, *ends, {"choices": [], "usage": used(61)}, choices=2).usage == Usage(20, 61)
    body = {"choices": [{"message": {"content": " word" * 30}} for _ in range(2)], "usage": used(30)}
    assert usage_of_whole(body, counter_for("gpt-4o")) == Usage(20, 60)
    body["choices"].pop()
    assert usage_of_whole(body, lambda _: 99) == Usage(20, 30)


def test_a_usage_elsewhere_is_handed_on_where_openai_has_it():
    end = chunk("", finish="stop")
    end["choices"][0]["usage"] = used(5)
    del end["usage"]
    (piece,) = pieces_in(Completion(), {**end, "x_groq": {"id": "r"}})
    assert piece.chunk["usage"] == used(5)
    assert piece.chunk["x_groq"] == {"id": "r"}
    assert "usage" not in piece.chunk["choices"][0]
    assert piece.data == b""


@pytest.mark.parametrize("letters", [1, 2, 3])
@pytest.mark.parametrize("model", ["gpt-4o", "llama-3.3-70b"])
def test_an_answer_that_comes_letter_by_letter_has_no_more_tokens(model, letters):
    text = "The quick brown fox jumps over the lazy dog again. " * 20
    count = counter_for(model)
    completion = Completion(count)
    tokens = 0
    for start in range(0, len(text), letters):
        pieces_in(completion, chunk(text[start : start + letters]))
        tokens += completion.count_tokens()
    assert count(text) <= tokens <= count(text) * 1.25


@pytest.mark.parametrize(
    "text", ["x" * 3_000, "字" * 500, "\n\n  a\n\n  b" * 50, '{"a":[1,2,3],"b":"c d e"}' * 20, "1" * 900]
)
def test_a_text_in_parts_has_hardly_more_tokens_than_as_a_whole(text):
    count = counter_for("gpt-4o")
    completion, tokens = Completion(count), 0
    for letter in text:
        pieces_in(completion, chunk(letter))
        tokens += completion.count_tokens()
    assert 0.9 * count(text) <= tokens <= 1.25 * count(text) + 2
