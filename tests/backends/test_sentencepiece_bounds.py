"""The bound of a prompt against SentencePiece itself, which normalises a text first and takes bytes for what is new."""

from io import BytesIO

import pytest
from hypothesis import example, given, settings
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from backends.pricing.token_bounds import bound_for
from tests.backends.test_normalised_bounds import TEXTS

BOUND = bound_for("mistral-7b")
PREFIX = 1
"""The blank that it puts before a text: one of the tokens that are added for what wraps a message."""
SENTENCES = ["what is litecoin and how does it work", "the answer is brief and true", "digital money at home"]


def trained(rule, kind):
    """A model that knows a few English words; so nearly all else is bytes, which is the most that there can be."""
    model = BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=model,
        model_type=kind,
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name=rule,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return SentencePieceProcessor(model_proto=model.getvalue())


TOKENIZERS = {f"{rule} {kind}": trained(rule, kind) for rule in ("nfkc", "nmt_nfkc") for kind in ("bpe", "unigram")}


def test_it_normalises_and_falls_back_to_bytes():
    for tokenizer in TOKENIZERS.values():
        assert len(tokenizer.encode("ﷺ")) == PREFIX + 33 == PREFIX + 11 * len("ﷺ".encode())
        assert len(tokenizer.encode(SENTENCES[0])) < len(SENTENCES[0])


def test_the_blank_before_a_text_is_within_what_is_added_for_a_message():
    assert BOUND.message_tokens >= PREFIX + 3


@pytest.mark.parametrize("name", ["nfkc bpe", "nmt_nfkc bpe"])
def test_no_character_has_more_tokens_than_its_bound(name):
    codes = [*range(0xD800), *range(0xE000, 0x110000)]
    for start in range(0, len(codes), 10_000):
        texts = [2 * chr(code) for code in codes[start : start + 10_000]]
        for text, tokens in zip(texts, TOKENIZERS[name].encode(texts), strict=True):
            assert BOUND.count_within(text, 100) + PREFIX >= len(tokens), ascii(text)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=500, deadline=None)
@given(TEXTS)
@example("\u0fb9" * 700)
@example("\ufdfa" * 100)
@example("\u3271\uffae\ufd29" * 9)
@example("a" + "\u0301\u0316" * 40)
@example("\u0f73\u0301" * 40)
@example("  " * 50 + "\u2003\u3000" * 50)
def test_no_text_has_more_tokens_than_its_bound(name, text):
    assert BOUND.count_within(text, 10**6) + PREFIX >= len(TOKENIZERS[name].encode(text))
