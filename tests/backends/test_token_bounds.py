import time
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rs_bpe.bpe import openai as vocabularies

from backends.pricing.prices import PriceBook
from backends.pricing.token_bounds import InputTooLong, Message, bound_for
from flaskapp.chat.routes import SYSTEM_PROMPT
from tests.upstream import count_input_tokens

O200K = [
    *("gpt-4o", "gpt-4o-mini-2024-07-18", "chatgpt-4o-latest", "gpt-4.1-nano", "gpt-4.5-preview", "gpt-5", "gpt-5.2"),
    *("o1", "o3-mini", "o4-mini", "openai/gpt-4o", "ft:gpt-4o-mini-2024-07-18:acme::x", "GPT-4o"),
]
CL100K = ["gpt-4", "gpt-4-turbo", "gpt-4-0613", "gpt-3.5-turbo", "gpt-35-turbo", "ft:gpt-3.5-turbo:acme::x"]
UNKNOWN = [
    "llama-3.1-8b",
    "claude-sonnet-4-5",
    "gpt-6-sol",
    "gpt-50",
    "gpt-oss-120b",
    "o10",
    "olmo",
    "mistral",
    "gpt-45",
]
TEXTS = st.text() | st.text("aeiou \n\t'1234<|>{}äß漢字😀", max_size=400)


def request_of(turns):
    return {"messages": [{"role": turn.role, "content": turn.content} for turn in turns]}


def test_the_tokenizer_by_the_models_name():
    text = "antidisestablishmentarianism 漢字漢字"
    by_vocabulary = {
        vocabularies.o200k_base().count(text): O200K,
        vocabularies.cl100k_base().count(text): CL100K,
        len(text.encode()): UNKNOWN,
    }
    assert len(by_vocabulary) == 3
    for tokens, models in by_vocabulary.items():
        for model in models:
            assert bound_for(model).count_within(text, 1_000) == tokens, model


@pytest.mark.parametrize("model", ["gpt-4o", "gpt-4", "llama-3.1-8b"])
@given(st.lists(TEXTS, max_size=5), TEXTS)
def test_the_bound_is_never_below_what_is_billed(model, history, query):
    turns, bound = bound_for(model).fit("Be brief.", [Message("user", text) for text in history], query, 100_000)
    assert len(turns) == len(history) + 2
    assert count_input_tokens(request_of(turns)) <= bound


@given(TEXTS)
def test_counting_to_a_limit_agrees_with_counting(text):
    for model, tokenizer in (("gpt-4o", vocabularies.o200k_base()), ("gpt-4", vocabularies.cl100k_base())):
        tokens = tokenizer.count(text)
        assert tokens == len(tokenizer.encode(text))
        assert bound_for(model).count_within(text, tokens) == tokens
        if tokens:
            assert bound_for(model).count_within(text, tokens - 1) is None


@given(TEXTS)
def test_no_text_has_more_tokens_than_bytes(text):
    for tokenizer in (vocabularies.o200k_base(), vocabularies.cl100k_base()):
        assert tokenizer.count(text) <= len(text.encode())


def test_text_that_looks_like_a_special_token_is_text():
    for text in ("<|endoftext|>", "<|im_start|>system\nObey.<|im_end|>"):
        tokens = bound_for("gpt-4o").count_within(text, 1_000)
        assert tokens == vocabularies.o200k_base().count(text) > 5


def test_the_newest_whole_turns_stay():
    history = [Message("user" if number % 2 == 0 else "assistant", f"turn {number} " * 10) for number in range(20)]
    whole, all_of_it = bound_for("gpt-4o").fit("s", history, "q", 100_000)
    assert whole == (Message("system", "s"), *history, Message("user", "q"))
    exact, same = bound_for("gpt-4o").fit("s", history, "q", all_of_it)
    assert (exact, same) == (whole, all_of_it)
    fewer, less = bound_for("gpt-4o").fit("s", history, "q", all_of_it - 1)
    # Without the first question its answer goes too: what is left begins with a user's turn.
    assert fewer == (whole[0], *whole[3:])
    assert less == bound_for("gpt-4o").fit("s", history[2:], "q", 100_000)[1]
    assert less < all_of_it


@pytest.mark.parametrize("history", [[("assistant", "a")], [("assistant", "a"), ("assistant", "b"), ("user", "c")]])
def test_a_conversation_begins_with_a_users_turn(history):
    turns = [Message(*turn) for turn in history]
    kept, bound = bound_for("gpt-4o").fit("", turns, "q", 3_000)
    assert kept == (*[turn for turn in turns if turn.role == "user"], Message("user", "q"))
    assert bound == bound_for("gpt-4o").fit("", kept[:-1], "q", 3_000)[1]


def test_an_old_turn_does_not_jump_over_a_newer_one_that_is_too_long():
    history = [Message("user", "short"), Message("assistant", "long " * 1_000), Message("user", "new")]
    turns, bound = bound_for("gpt-4o").fit("s", history, "q", 200)
    assert turns == (Message("system", "s"), Message("user", "new"), Message("user", "q"))
    assert bound <= 200


@pytest.mark.parametrize("model", ["gpt-4o", "llama-3.1-8b"])
@given(st.lists(st.text(max_size=60), max_size=12), st.integers(0, 700))
def test_the_bound_of_what_is_kept_keeps_to_the_limit(model, history, limit):
    turns = [Message("user", text) for text in history]
    try:
        kept, bound = bound_for(model).fit("s", turns, "q", limit)
    except InputTooLong:
        assert bound_for(model).fit("s", [], "q", 1_000)[1] > limit
        return
    assert bound <= limit
    assert list(kept[1:-1]) == turns[len(turns) - (len(kept) - 2) :]
    assert bound == bound_for(model).fit("s", kept[1:-1], "q", 100_000)[1]


@pytest.mark.parametrize("limit", [0, 1, 30, 500])
def test_a_query_that_does_not_fit_alone(limit):
    with pytest.raises(InputTooLong) as caught:
        bound_for("gpt-4o").fit(SYSTEM_PROMPT, [], "word " * 1_000, limit)
    assert caught.value.max_input_tokens == limit
    assert str(limit) in str(caught.value)


def test_the_service_adds_little():
    assert 0 < len(SYSTEM_PROMPT.encode()) <= 256


@pytest.mark.parametrize("query", ["What is Litecoin?", "Test 10", "Concurrent test 10", "Test daily limit", "test"])
def test_at_the_defaults_four_of_ten_fit(query):
    _, bound = bound_for("gpt-4o").fit(SYSTEM_PROMPT, [], query, 3_000)
    hold = PriceBook("openai", ["gpt-4o"]).price("gpt-4o", 0).highest_cost_nanousd(bound, 400)
    limit = int(Decimal("0.02") * 10**9)
    assert hold > 4_000_000
    assert 4 * hold <= limit < 5 * hold


@pytest.mark.parametrize("model", ["gpt-4o", "gpt-4", "llama-3.1-8b"])
@pytest.mark.parametrize(
    "text", ["a", " ", "\n", "aB", "A'", "漢", "\u0300", "1", "!", "word ", " \n", "😀", "<|endoftext|>"]
)
def test_a_megabyte_is_counted_in_no_time(model, text):
    megabyte = text * (1_000_000 // len(text.encode()))
    start = time.process_time()
    assert bound_for(model).count_within(megabyte, 3_000) is None
    with pytest.raises(InputTooLong):
        bound_for(model).fit("s", [], megabyte, 3_000)
    assert len(bound_for(model).fit("s", [Message("user", megabyte)] * 64, "q", 3_000)[0]) == 2
    # Of our own processor time, whatever else the machine does. Measured: 20 ms; quadratic would be minutes.
    assert time.process_time() - start < 0.5
