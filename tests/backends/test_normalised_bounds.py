"""The bound of a prompt for tokenizers that normalise the text first, as those of many models do."""

from unicodedata import normalize

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rs_bpe.bpe import openai as vocabularies

from backends.pricing.token_bounds import bound_for

BOUND = bound_for("qwen3-8b").count_within
FORMS = ("NFC", "NFKC")
MARKS = st.sampled_from([*"\u0301\u0316\u0323\u0345\u05b0\u0f71\u0f73\u0344\u3099\u20dd\U0001d165"])
CHARACTERS = st.sampled_from([*"ae\u00e9\u0fb9\ufdfa\uac01\u1100\u1161\u11a8\u304c\u212b\u1e9b\uff0c\u2026 x"])
TEXTS = st.lists(CHARACTERS | MARKS | st.characters(exclude_categories=["Cs"]) | st.text(MARKS, max_size=40)).map(
    "".join
)


def forms(text):
    return [normalize(form, text) for form in FORMS]


def test_no_character_has_more_bytes_than_its_bound():
    """Every code point, twice in a row: what stands in no vocabulary is as many tokens as it has bytes."""
    for code in (*range(0xD800), *range(0xE000, 0x110000)):
        text = 2 * chr(code)
        assert BOUND(text, 100) >= max(len(form.encode()) for form in (text, *forms(text))), hex(code)


@settings(max_examples=500, deadline=None)
@given(TEXTS)
@example("\u0fb9" * 700)
@example("\ufdfa" * 100)
@example("e\u0301\u0323" * 90)
@example("\u00e9\u0323" * 90)
@example("a" + "\u0301\u0316" * 40)
@example("\u0f73\u0301" * 40)
def test_no_text_has_more_bytes_than_its_bound_in_any_form(text):
    bound = BOUND(text, 10**6)
    assert bound >= max(len(form.encode()) for form in (text, *forms(text)))
    assert BOUND(text, bound) == bound
    assert BOUND(text, bound - 1) is None


@pytest.mark.parametrize("tokenizer", [vocabularies.o200k_base(), vocabularies.cl100k_base()], ids=["o200k", "cl100k"])
@settings(max_examples=200, deadline=None)
@given(TEXTS)
@example("\u0fb9" * 700)
def test_no_text_has_more_tokens_than_its_bound_where_it_is_normalised_first(tokenizer, text):
    assert BOUND(text, 10**6) >= max(tokenizer.count(form) for form in forms(text))


def test_usual_text_counts_its_bytes():
    for text in ("What is Litecoin?", "한국어", "日本語のテキスト、ガギグ", "你好，世界……", "déjà vu 👍🏽", "ﬁne ①"):  # noqa: RUF001
        assert BOUND(text, 1_000) == len(text.encode())


@pytest.mark.parametrize(("longer", "more_bytes"), [("\ufdfa", 30), ("\u00e9\u0323", 1)])
def test_a_tokenizer_with_older_tables_leaves_new_characters_as_they_are(longer, more_bytes):
    """U+1FBF8 is a digit of Unicode 13: NFKC makes one byte of its four, and a tokenizer of before does not."""
    text = longer + 10 * "\U0001fbf8"
    assert BOUND(5 * text, 1_000) >= 5 * (len(text.encode()) + more_bytes)


def test_a_tokenizer_that_puts_fewer_characters_together_is_bounded_too():
    """SentencePiece normalises some of them one by one: 10 bytes where NFKC of the whole has 7."""
    text = "\u3271\uffae\ufd29"
    alone = "".join(normalize("NFKC", character) for character in text)
    assert BOUND(text * 9, 1_000) >= 9 * len(alone.encode()) > 9 * len(normalize("NFKC", text).encode())


@pytest.mark.parametrize("run", ["\u0301\u0316", "\u0f73\u0301", "\u0344"])
def test_piles_of_marks_are_not_sorted(run):
    """A normalisation sorts them in a time that grows with the square of their number: hours for these."""
    text = "a" + run * 1_000_000
    assert BOUND(text, 10**9) >= len(text.encode())
