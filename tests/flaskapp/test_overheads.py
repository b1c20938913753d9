"""What a template adds to prompts is learnt from bills; an absurd usage teaches nothing, and books the reservation."""

import pytest

from flaskapp.answers.overheads import KEEP_SECONDS
from tests.apps import open_app
from tests.servers import nanousd
from tests.upstream import Upstream, bill_nanousd

KEY = "llm:overhead:gpt-4o"
ASKED = {"messages": [{"role": "user", "content": "What is Litecoin?"}], "max_tokens": 50}
INPUT_NANOUSD = 2_500
"""Of a token of gpt-4o."""
PLENTY = {"HIGH_COST_THRESHOLD_USD": "9", "DAILY_COST_LIMIT_USD": "9", "NETWORK_COST_LIMIT_USD": "0"}


@pytest.fixture
def upstream():
    with Upstream() as server:
        yield server


@pytest.fixture
def variables(upstream):
    return {"LLM_BASE_URL": upstream.base_url, "API_KEYS": "*", **PLENTY}


@pytest.fixture
def service(make_app, variables):
    return make_app(**variables)


def reserved(answer):
    assert answer.status_code == 200
    return nanousd(answer.headers["X-Cost-Reserved-USD"])


def openai(service, **fields):
    return service.client.post("/v1/chat/completions", json={**ASKED, **fields}, buffered=True)


def learnt(service):
    found = service.redis.get(KEY)
    return None if found is None else int(found)


def lines(caplog, words):
    return [record.levelname for record in caplog.records if words in record.message]


@pytest.mark.parametrize("stream", [True, False])
def test_what_is_billed_beyond_the_bound_is_added_to_the_bounds_that_follow(service, upstream, caplog, stream):
    upstream.behave(template_tokens=170)
    first, second = reserved(openai(service, stream=stream)), reserved(openai(service, stream=stream))
    added = learnt(service)
    assert second - first == added * INPUT_NANOUSD
    # The bound has an allowance of its own.
    assert 170 - 40 < added <= 170
    assert second >= bill_nanousd(upstream.ledger[0])
    assert 0 < service.redis.ttl(KEY) <= KEEP_SECONDS == 30 * 86_400
    assert lines(caplog, "template adds more to a prompt") == ["WARNING"]
    # It is now enough, so nothing more is learnt.
    assert reserved(openai(service, stream=stream)) == second
    assert learnt(service) == added


def test_the_chat_learns_and_adds_too(service, upstream):
    upstream.behave(template_tokens=170)
    first, second = reserved(service.chat()), reserved(service.chat())
    assert second - first == learnt(service) * INPUT_NANOUSD > 0
    assert reserved(openai(service)) > 170 * INPUT_NANOUSD


def test_the_bill_that_teaches_is_booked_in_full(service, upstream):
    upstream.behave(template_tokens=300)
    answer = service.chat()
    assert service.daily() == bill_nanousd(upstream.ledger[0])
    assert learnt(service)
    assert reserved(answer) > 0


def test_a_larger_overhead_replaces_a_smaller_one_and_no_smaller_one_a_larger(service, upstream):
    seen = []
    for tokens in (200, 400, 100, 400):
        upstream.behave(template_tokens=tokens)
        openai(service)
        seen.append(learnt(service))
    assert seen[0] < seen[1] == seen[2] == seen[3]
    assert seen[1] - seen[0] == 200


def test_a_restart_knows_it_and_another_process_takes_it_over(service, upstream, variables, redis_url, tmp_path):
    upstream.behave(template_tokens=170)
    with open_app(redis_url, tmp_path / "running", variables) as running:
        before = reserved(openai(running))
        reserved(openai(service))
        running.tollgate.overheads.refresh()
        after = reserved(openai(running))
    with open_app(redis_url, tmp_path / "next", variables) as following:
        assert reserved(openai(following)) == after > before
    service.redis.delete(KEY)
    service.tollgate.overheads.refresh()
    assert reserved(openai(service)) == before


def test_of_two_processes_the_one_that_learnt_more_is_right(service):
    service.redis.set(KEY, 5_000)
    service.tollgate.overheads.learn("gpt-4o", 150)
    assert learnt(service) == 5_000
    assert 0 < service.redis.ttl(KEY) <= KEEP_SECONDS


def test_what_is_set_holds_at_least_and_counts_without_an_upstream_too(make_app, variables, upstream):
    bare, more = make_app(**PLENTY), make_app(**PLENTY, LLM_PROMPT_OVERHEAD_TOKENS="200")
    assert reserved(more.chat()) - reserved(bare.chat()) == 200 * INPUT_NANOUSD
    service = make_app(**variables, LLM_PROMPT_OVERHEAD_TOKENS="200")
    upstream.behave(template_tokens=170)
    openai(service)
    assert learnt(service) is None
    upstream.behave(template_tokens=400)
    openai(service)
    assert 200 < learnt(service) <= 400


def test_it_is_no_part_of_what_an_input_may_have(make_app, variables):
    service = make_app(**variables, LLM_PROMPT_OVERHEAD_TOKENS="5000", LLM_MAX_INPUT_TOKENS="400")
    assert reserved(openai(service)) > 5_000 * INPUT_NANOUSD


def test_no_more_is_learnt_than_an_input_may_have(make_app, variables, upstream):
    """Else one wrong bill would make each request larger than its limits for a month."""
    service = make_app(**variables, LLM_MAX_INPUT_TOKENS="400")
    upstream.behave(template_tokens=600)
    openai(service, max_tokens=400)
    assert learnt(service) == 400


@pytest.mark.parametrize("text", ["", "many", "-5", "1e9", "9" * 40, "\u0663"])
def test_what_is_no_number_in_redis_is_none(service, text):
    before = reserved(openai(service))
    service.redis.set(KEY, text)
    service.tollgate.overheads.refresh()
    assert reserved(openai(service)) == before


@pytest.mark.parametrize("usage", [{"template_tokens": 10**6}, {"hidden_tokens": 10**6}, {"hidden_tokens": 9 * 10**8}])
@pytest.mark.parametrize("stream", [True, False])
def test_a_usage_that_cannot_be_books_the_reservation_and_teaches_nothing(service, upstream, caplog, usage, stream):
    upstream.behave(**usage)
    answer = openai(service, stream=stream)
    assert service.daily("ip:127.0.0.1") == reserved(answer)
    assert learnt(service) is None
    assert lines(caplog, "reports a usage that cannot be") == ["ERROR"]
    metrics = service.client.get("/metrics").text
    assert 'tollgate_usage_absurd_total{model="gpt-4o"} 1.0' in metrics
    upstream.behave()
    # Nobody is shut out.
    assert reserved(openai(service)) == reserved(answer)


def test_the_chat_says_what_was_booked_for_a_usage_that_cannot_be(service, upstream):
    upstream.behave(hidden_tokens=10**6)
    answer = service.chat(max_tokens=50)
    assert '"output_tokens":50' in answer.text
    assert f'"cost_usd":"{answer.headers["X-Cost-Reserved-USD"]}"' in answer.text
    assert service.daily() == reserved(answer)


def test_ten_times_the_reserved_tokens_are_an_overrun_and_one_more_is_not(service, upstream):
    upstream.behave(words=("a ",))
    answer = openai(service, max_tokens=40)
    bare = upstream.ledger[0].input_tokens
    most = 10 * (reserved_input(answer, 40) + 40)
    for tokens, is_believed in ((most, True), (most + 1, False)):
        service.redis.flushdb()
        service.tollgate.overheads.refresh()
        upstream.ledger.clear()
        upstream.behave(words=("a ",), hidden_tokens=tokens - bare - 1)
        answer = openai(service, max_tokens=40)
        booked = service.daily("ip:127.0.0.1")
        assert booked == (bill_nanousd(upstream.ledger[0]) if is_believed else reserved(answer))


def reserved_input(answer, output_tokens):
    return (reserved(answer) - output_tokens * 10_000) // INPUT_NANOUSD


def test_what_answers_ended_without_usage_book_is_not_what_an_absurd_one_does(make_app, variables, upstream):
    service = make_app(**variables, LLM_WITHOUT_USAGE="seen")
    upstream.behave(hidden_tokens=10**6)
    answer = openai(service)
    assert service.daily("ip:127.0.0.1") == reserved(answer)


def test_nothing_more_is_asked_of_redis_on_the_way_of_an_answer(make_app, variables, upstream):
    sent = []
    service = make_app(before_each_send=sent.append, **variables)
    openai(service)
    sent.clear()
    openai(service)
    assert [each for each in sent if b"overhead" in each and b"MGET" not in each] == []
