import itertools
import re

import pytest

from backends.pricing.token_bounds import Message
from flaskapp.llm import Usage
from flaskapp.llm.builtin import _ON_LITECOIN, _OVERVIEW, _TOKEN, BuiltinModel, reply
from tests.models import Texts, model_request, opened


class HandClock:
    """Time goes on by waiting."""

    def __init__(self):
        self.seconds = 100.0
        self.waits = []

    def now_us(self):
        return int(self.seconds * 1_000_000)

    def monotonic_seconds(self):
        return self.seconds

    def wait(self, _event, seconds):
        self.waits.append(seconds)
        self.seconds += seconds


def open_answer(query="What is Litecoin?", *, rate=0, clock=None, max_tokens=400, history=()):
    clock = clock or HandClock()
    model = BuiltinModel(rate, clock=clock, wait=clock.wait)
    turns = [Message("system", "Be brief."), *history, Message("user", query)]
    return Texts(opened(model, model_request(turns, max_tokens=max_tokens, input_tokens=77)))


QUERIES = [
    "What is Litecoin?", "litecoin mining", "LTC halving?", "How private is Litecoin?", "Litecoin or Bitcoin?",
    "Test 1", "Concurrent test 7", "Test daily limit", "test", "?", "", "x" * 8_000, "Wie geht's? 😀" * 100,
    "{topic} {0}", "<script>alert(1)</script>",
]  # fmt: skip


@pytest.mark.parametrize("query", QUERIES)
def test_the_same_words_again_and_at_least_forty_tokens(query):
    texts = [list(open_answer(query)) for _ in range(2)]
    assert texts[0] == texts[1]
    assert 40 <= len(texts[0]) < 400
    assert "".join(texts[0]) == reply([{"role": "user", "content": query}])
    assert all(texts[0])


@pytest.mark.parametrize("text", [_OVERVIEW, *(text for _, text in _ON_LITECOIN)])
def test_every_text_about_litecoin_is_whole_and_long_enough(text):
    assert len(_TOKEN.findall(text)) >= 40
    assert "".join(_TOKEN.findall(text)) == text
    assert "  " not in text
    assert len(re.findall(r"[.](\s|$)", text)) >= 3


def test_it_knows_what_litecoin_is():
    text = "".join(open_answer("What is Litecoin?"))
    for fact in ("Charlie Lee", "2011", "two and a half minutes", "Scrypt", "84 million"):
        assert fact in text


def test_a_question_that_goes_on_about_litecoin():
    history = (Message("user", "What is Litecoin?"), Message("assistant", "A coin."))
    assert "MWEB" in "".join(open_answer("And privacy?", history=history))
    assert "MWEB" not in "".join(open_answer("And privacy?"))


def test_other_questions_are_named_and_cleaned():
    assert "“Test 3”" in "".join(open_answer("Test 3"))
    assert "<" not in "".join(open_answer("<b>bold</b>"))
    assert "“nothing in particular”" in "".join(open_answer("???"))
    long = "".join(open_answer("word " * 100))
    assert re.search(r"“(word )+…”", long)


def test_max_tokens_cuts():
    answer = open_answer(max_tokens=7)
    assert len(list(answer)) == 7
    assert answer.finish_reason == "length"
    assert answer.usage == Usage(77, 7)


def test_just_enough_is_no_cut():
    whole = len(list(open_answer()))
    answer = open_answer(max_tokens=whole)
    assert len(list(answer)) == whole
    assert answer.finish_reason == "stop"


def test_the_usage_is_exact_at_every_moment_and_after_a_close():
    answer = open_answer(rate=50)
    texts = iter(answer)
    assert answer.usage == Usage(77, 0)
    for number in range(1, 6):
        next(texts)
        assert answer.usage == Usage(77, number)
    answer.close()
    answer.close()
    assert list(texts) == []
    assert answer.usage == Usage(77, 5)


def test_at_rate_zero_one_read_gives_all_and_it_is_all_used():
    answer = open_answer()
    batch = answer.read(0)
    assert sum(piece.deltas for piece in batch.pieces) > 40
    assert batch.is_last
    assert answer.usage == Usage(77, batch.tokens) == Usage(77, sum(piece.deltas for piece in batch.pieces))
    assert answer.read(0) is None


def test_a_close_before_the_first_read_uses_nothing():
    answer = open_answer()
    answer.close()
    assert answer.read(0) is None
    assert answer.usage == Usage(77, 0)


def test_the_pace_does_not_drift_however_slow_its_surroundings_are():
    clock = HandClock()
    moments = []
    for _ in open_answer(rate=50, clock=clock):
        moments.append(clock.seconds)
        clock.seconds += 0.004  # what serving a piece takes
    steps = [after - before for before, after in itertools.pairwise(moments)]
    assert max(steps) < 0.025
    assert moments[-1] - moments[0] == pytest.approx((len(moments) - 1) * 0.02, abs=0.01)


def test_at_rate_zero_it_never_waits():
    clock = HandClock()
    assert len(list(open_answer(rate=0, clock=clock))) >= 40
    assert clock.waits == []


def test_a_close_during_a_wait_is_felt_at_once():
    clock = HandClock()
    answer = open_answer(rate=1, clock=clock)
    clock.wait = None
    texts = iter(answer)
    answer.answer._wait = lambda closing, _seconds: answer.close() or closing.wait(5)
    assert list(texts) == []
    assert answer.usage == Usage(77, 0)
