"""What upstreams say when they refuse, in the shapes that they have, and what becomes of it."""

import json

import pytest

from backends.clock import SystemClock
from flaskapp.llm import UpstreamBroken, UpstreamBusy, UpstreamNotTaken, UpstreamRefused, UpstreamUnknownModel
from flaskapp.llm.openai_compatible import OpenAICompatibleModel
from flaskapp.llm.refusals import refusal, refusal_in_answer
from tests.models import model_request, opened, pieces_of
from tests.upstream import Upstream

CLIENT = OpenAICompatibleModel("http://127.0.0.1:9/v1", "sk-secret", clock=SystemClock())
NOW_US = 1_773_480_030_000_000  # 2026-03-14 09:20:30 UTC


def refused(status, body, retry_after=None):
    text = body if isinstance(body, str) else json.dumps(body)
    return refusal(status, text, retry_after, NOW_US, CLIENT.clean)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"error": {"message": "Bad tool.", "type": "invalid_request_error"}}, "Bad tool."),
        ({"object": "error", "message": "roles must alternate", "code": 400}, "roles must alternate"),
        ({"error": "no such format"}, "no such format"),
        ([{"error": {"code": 400, "message": "Invalid JSON", "status": "INVALID_ARGUMENT"}}], "Invalid JSON"),
        ({"detail": "Not this."}, "Not this."),
        ({"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"]}]}, "body.seed: extra_forbidden"),
        ({"detail": [{"loc": ["body", "n"], "msg": "too many"}, {"msg": "no"}]}, "body.n: too many; no"),
        (
            {"error": {"message": "Provider returned error", "metadata": {"raw": '{"error":{"message":"inner"}}'}}},
            "inner",
        ),
        ({"type": "error", "error": {"type": "invalid_request_error", "message": "max_tokens: no"}}, "max_tokens: no"),
        ({"object": "error", "message": {"detail": [{"loc": ["body", "seed"], "msg": "Extra"}]}}, "body.seed: Extra"),
        ({"message": '{"detail": [{"loc": ["body", "seed"], "msg": "Extra"}]}'}, "body.seed: Extra"),
        ({"message": "{odd} words"}, "{odd} words"),
        ("plain words", "plain words"),
        ("<!DOCTYPE html><title>nginx</title>", "status 400, without a reason"),
        ("", "status 400, without a reason"),
        ({}, "status 400, without a reason"),
        ({"error": {"message": "key sk-proj-abcdefghijkl of org-AbCdEfGhIjKl"}}, "key *** of ***"),
    ],
    ids=str,
)
@pytest.mark.parametrize("status", [400, 413, 422])
def test_the_reason_is_found_in_every_shape(status, body, reason):
    failure = refused(status, body)
    assert isinstance(failure, UpstreamRefused)
    assert failure.reason == reason.replace("400", str(status))
    assert (failure.status, failure.is_too_long) == (status, False)
    assert failure.reason in str(failure)


@pytest.mark.parametrize(
    "words",
    [
        "This model's maximum context length is 8192 tokens. However, your messages resulted in 9000 tokens.",
        "prompt is too long: 208310 tokens > 200000 maximum",
        "input length and `max_tokens` exceed context limit: 190000 + 20000 > 200000",
        "The input token count (1200000) exceeds the maximum number of tokens allowed (1048576).",
        "the request exceeds the available context size, try increasing it",
        "Prompt contains 40000 tokens and 0 draft tokens, too large for model with 32768 maximum context length",
        "This model's maximum prompt length is 131072 but the request contains 200000 tokens.",
        "Please reduce the length of the messages or completion.",
        "Input is too long for requested model.",
        "This endpoint's maximum context length is 4096 tokens.",
        "The decoder prompt (length 5000) is longer than the maximum model length of 4096.",
        "Your input exceeds the context window of this model.",
    ],
)
def test_a_prompt_that_is_too_long_is_known_by_the_words_of_each(words):
    assert refused(400, {"error": {"message": words}}).is_too_long


def test_or_by_its_code():
    assert refused(400, {"error": {"message": "no", "code": "context_length_exceeded"}}).is_too_long
    assert refused(400, {"error": {"message": "no", "type": "exceed_context_size_error"}}).is_too_long


@pytest.mark.parametrize(
    "words",
    [
        "Request too large for model on tokens per minute (TPM): Limit 6000, Requested 7000.",
        "max_tokens is too large: 9000. This model supports at most 4096 completion tokens.",
        "Unsupported parameter: 'max_tokens' is not supported with this model.",
    ],
)
def test_what_is_too_large_for_another_reason_is_not_too_long(words):
    assert not refused(413, {"error": {"message": words}}).is_too_long


@pytest.mark.parametrize(
    ("retry_after", "seconds"),
    [
        ("7", 7),
        ("0.2", 1),
        ("1.5", 2),
        ("0", 1),
        ("Sat, 14 Mar 2026 09:21:00 GMT", 30),
        ("Sat, 14 Mar 2026 09:00:00 GMT", 1),
        (None, None),
        ("soon", None),
        ("nan", None),
        ("inf", None),
        ("1e12", None),
    ],
)
def test_how_long_to_wait_is_passed_on(retry_after, seconds):
    for status, is_rate_limited in ((429, True), (503, False), (529, False)):
        failure = refused(status, "", retry_after)
        assert isinstance(failure, UpstreamBusy)
        assert (failure.is_rate_limited, failure.retry_after_seconds) == (is_rate_limited, seconds)
        assert failure.helps_to_wait


def test_an_account_that_is_used_up_is_not_worth_waiting_for():
    body = {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}
    assert not refused(429, body).helps_to_wait


@pytest.mark.parametrize("status", [408, 504, 524])
def test_after_a_time_out_the_model_may_have_worked(status):
    failure = refused(status, "")
    assert isinstance(failure, UpstreamBroken)
    assert (failure.timed_out, failure.status) == (True, status)


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "The model `x` does not exist", "code": "model_not_found"}},
        {"error": {"message": "model 'llama9' not found, try pulling it first"}},
        {"error": {"code": "DeploymentNotFound", "message": "The API deployment for this resource does not exist."}},
    ],
)
def test_a_model_that_the_server_does_not_have(body):
    assert isinstance(refused(404, body), UpstreamUnknownModel)
    assert type(refused(404, {"error": "no such path"})) is UpstreamNotTaken


@pytest.mark.parametrize(
    "words",
    [
        "/chat/completions: Invalid model name passed in model=absent. Call `/v1/models` to view available models.",
        "nobody/absent is not a valid model ID",
        "The model `absent` does not exist or you do not have access to it.",
        "Invalid model: absent",
        "Model absent not found",
        "unknown model 'absent'",
    ],
)
def test_a_model_that_the_server_does_not_have_and_refuses_with_a_400(words):
    failure = refused(400, {"error": {"message": words}})
    assert (type(failure), failure.is_unknown_model, failure.reason) == (UpstreamRefused, True, words)


@pytest.mark.parametrize("body", [{"error": {"message": "no", "code": "model_not_found"}}, {"code": "ModelNotFound"}])
def test_a_model_that_the_server_does_not_have_and_says_so_in_a_code(body):
    assert refused(400, body).is_unknown_model


@pytest.mark.parametrize(
    "words",
    [
        "This model does not support tools.",
        "temperature is not available for this model",
        "The model called the tool `x`, which was not found",
        "Invalid model output: the schema does not exist",
        "This model's maximum context length is 8 tokens; message 2 of the model was not found to fit",
        "Unknown parameter: model_kwargs",
    ],
)
def test_a_refusal_that_only_speaks_of_the_model_is_none_of_an_unknown_one(words):
    assert not refused(400, {"error": {"message": words, "type": "invalid_request_error"}}).is_unknown_model


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        ({"error": {"code": 429, "message": "Provider returned error"}}, UpstreamBusy, 429),
        ({"error": {"code": "503", "message": "x"}}, UpstreamBusy, 503),
        ({"error": {"type": "overloaded_error", "message": "Overloaded"}}, UpstreamBusy, 503),
        ({"error": {"type": "tokens", "code": "rate_limit_exceeded"}}, UpstreamBusy, 429),
        ({"error": {"code": "context_length_exceeded", "message": "x"}}, UpstreamRefused, 400),
        ({"error": {"code": "invalid_prompt", "type": "invalid_request_error"}}, UpstreamRefused, 400),
        ({"error": {"code": 401, "message": "x"}}, UpstreamNotTaken, 401),
        ({"error": "x"}, UpstreamNotTaken, None),
        ({"error": {"code": 504}}, UpstreamNotTaken, 504),
        ({"error": {"code": True}}, UpstreamNotTaken, None),
    ],
    ids=str,
)
def test_an_error_in_place_of_an_answer_is_told_by_the_status_that_it_names(body, kind, status):
    failure = refusal_in_answer(json.dumps(body), NOW_US, str)
    assert type(failure) is kind
    assert failure.status == status


# --- over HTTP


@pytest.fixture
def upstream():
    with Upstream() as server:
        yield server


@pytest.fixture
def model(upstream):
    client = OpenAICompatibleModel(upstream.base_url, "sk-secret", clock=SystemClock())
    yield client
    client.close()


def test_our_key_is_in_no_reason(upstream, model):
    upstream.behave(status=400, body='{"error": {"message": "not with sk-secret\\u0007\\u202e!"}}')
    with pytest.raises(UpstreamRefused) as caught:
        opened(model, model_request())
    assert caught.value.reason == "not with *** !"
    assert "sk-secret" not in caught.value.detail


def test_a_reason_behind_the_whole_request_is_found_all_the_same(upstream, model):
    upstream.behave(status=422, body=json.dumps({"input": "x" * 9_000, "detail": "the reason"}))
    with pytest.raises(UpstreamRefused, match="the reason"):
        opened(model, model_request())


@pytest.mark.parametrize("content_type", ["text/event-stream", "application/json"])
def test_an_error_in_a_200_before_the_first_piece_was_not_taken(upstream, model, content_type):
    upstream.behave(raw='{"error": {"code": 429, "message": "x"}}', content_type=content_type)
    with pytest.raises(UpstreamBusy):
        model.ask(model_request()).whole()
    if content_type == "text/event-stream":
        with pytest.raises(UpstreamBusy):
            list(pieces_of(opened(model, model_request())))


def test_an_error_after_a_piece_is_a_broken_answer(upstream, model):
    upstream.behave(words=("one",), ending="error_event")
    with pytest.raises(UpstreamBroken):
        list(pieces_of(opened(model, model_request())))


@pytest.mark.parametrize("status", [500, 400, 429, 504])
def test_a_usage_beside_an_error_is_what_it_cost(upstream, model, status):
    usage = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
    upstream.behave(status=status, body=json.dumps({"error": {"message": "x"}, "usage": usage}))
    answer = model.ask(model_request())
    with pytest.raises((UpstreamNotTaken, UpstreamBroken)) as caught:
        answer.open()
    assert caught.value.is_billed
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (9, 2)
