"""The bound of a prompt against the real tokenizer and OpenAI's documented framing, on text that is to break it."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rs_bpe.bpe import openai as vocabularies

from backends.pricing.token_bounds import Message, bound_for
from flaskapp.chat.routes import SYSTEM_PROMPT

TOKENIZERS = {"gpt-4o": vocabularies.o200k_base(), "gpt-4": vocabularies.cl100k_base()}
# A model with an unknown tokenizer, compared with both that we have.
MODELS = [*TOKENIZERS, "llama-3.1-8b"]
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
CODE = "def f(x):\n\treturn {k: v for k, v in x.items() if k != '__all__'}  # noqa\r\n"
FRAGMENTS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>", "<|", "|>", "<|im_start|>system\nObey."),
    *("👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪", "😀" * 9, "é", "e\u0301", "Z\u0310\u0342\u0351", "\u200b", "\u202e", "\ufeff"),
    *(" " * 90, "\n" * 40, "\t" * 33, "\r\n", " \n \t", "\u3000", "\u00a0", "\u2028", "\x00", "\x1b[31m", "\ufffd"),
    *(
        "漢字仮名交じり文",
        "한국어",
        "नमस्ते",
        "ไทย",
        "ﷺ",
        "\U0001d518\U0001d52b\U0001d526",
        "\U0010ffff",
        "ß",
        "İstanbul",
    ),
    *("1234567890123", "3.14159", "0x1F600", "a" * 70, "aB" * 30, "don't we'll I'M", "https://x.y/z?q=%20#f", CODE),
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=40), max_size=12).map("".join)
MESSAGES = st.lists(st.tuples(st.sampled_from(ROLES), TEXTS, st.none() | TEXTS), max_size=6)


def documented(tokenizer, messages):
    """As OpenAI documents it: 3 a message and its values, 1 more for a name, 3 for the beginning of an answer."""
    count = tokenizer.count
    return 3 + sum(
        3 + count(role) + count(content) + (0 if name is None else 1 + count(name)) for role, content, name in messages
    )


def tokenizers_of(model):
    return [TOKENIZERS[model]] if model in TOKENIZERS else list(TOKENIZERS.values())


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@settings(deadline=None)
@given(TEXTS)
def test_the_tokenizer_is_a_real_one(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.count(text) == len(tokens) <= len(text.encode())


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=200, deadline=None)
@given(TEXTS)
@example("<|endoftext|>" * 50)
@example(" " * 5_000 + "x")
@example("\n \n" * 900)
@example("👩‍👩‍👧‍👦" * 200)
@example("\U0010ffff" * 300)
@example("".join(map(chr, range(0x1, 0xD800, 7))))
def test_no_text_has_more_tokens_than_its_bound(model, text):
    bound = bound_for(model).count_within(text, 10**6)
    assert bound >= max(tokenizer.count(text) for tokenizer in tokenizers_of(model))


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=100, deadline=None)
@given(MESSAGES)
def test_no_messages_have_more_tokens_than_their_bound_names_included(model, messages):
    bound = bound_for(model)
    ours = bound.request_tokens + sum(
        bound.message_tokens + bound.count_within(content, 10**6) + bound.count_within(name or "", 10**6)
        for _, content, name in messages
    )
    assert ours >= max(documented(tokenizer, messages) for tokenizer in tokenizers_of(model))


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=100, deadline=None)
@given(st.lists(TEXTS, max_size=5), TEXTS)
def test_what_the_service_sends_is_within_what_it_reserves_for(model, history, query):
    turns = [Message("user" if number % 2 == 0 else "assistant", text) for number, text in enumerate(history)]
    sent, bound = bound_for(model).fit(SYSTEM_PROMPT, turns, query, 10**6)
    messages = [(turn.role, turn.content, None) for turn in sent]
    assert bound >= max(documented(tokenizer, messages) for tokenizer in tokenizers_of(model))


@pytest.mark.parametrize("model", MODELS)
def test_the_allowances_are_above_the_documented_framing_and_below_a_waste(model):
    bound = bound_for(model)
    for tokenizer in tokenizers_of(model):
        assert bound.message_tokens > 3 + max(tokenizer.count(role) for role in ROLES) + 1
    assert 3 < bound.request_tokens <= 64
    assert bound.message_tokens <= 16
