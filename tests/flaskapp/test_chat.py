"""The chat endpoint, from the identity to the settlement."""

import pytest
from werkzeug.test import EnvironBuilder

from flaskapp.llm import Batch, Piece, UpstreamBroken, UpstreamNotTaken, Usage
from flaskapp.llm.builtin import BuiltinModel
from tests.servers import CHAT, LITECOIN, events, nanousd, parse_events


@pytest.fixture
def service(make_app):
    return make_app()


class ScriptedAnswer:
    """Gives `pieces`, then fails with `failure`, if there is one; `usage` is its usage at the end."""

    finish_reason = "stop"
    has_ended = False

    def __init__(self, pieces, usage, failure=None):
        self.pieces, self.usage, self.failure, self.closed = list(pieces), usage, failure, 0

    def open(self):
        pass

    def read(self, wait_seconds):
        if self.pieces:
            return Batch([Piece(self.pieces.pop(0), deltas=1)], tokens=1)
        if self.failure is not None:
            raise self.failure
        return None

    def hang_up(self):
        self.close()

    def close(self):
        self.closed += 1


class Failing(ScriptedAnswer):
    """Fails before it begins."""

    def __init__(self, failure):
        super().__init__((), None, failure)

    def open(self):
        raise self.failure


@pytest.fixture
def script(monkeypatch):
    """`script(answer or failure)`: what the model does in place of its own answer."""

    def set_script(what):
        def ask(self, request):
            asked.append(request)
            return Failing(what) if isinstance(what, Exception) else what

        asked = []
        monkeypatch.setattr(BuiltinModel, "ask", ask)
        return asked

    return set_script


def test_an_answer_is_chunks_and_then_what_it_cost(service):
    answer = service.chat()
    assert (answer.status_code, answer.mimetype) == (200, "text/event-stream")
    *chunks, last = events(answer)
    assert all(list(each) == ["status", "chunk"] and each["status"] == "streaming" for each in chunks)
    assert "".join(each["chunk"] for each in chunks).startswith("Litecoin (LTC) is a peer-to-peer digital currency.")
    assert list(last) == ["status", "request_id", "usage", "cost_usd", "finish_reason"]
    assert (last["status"], last["finish_reason"]) == ("complete", "stop")
    assert last["request_id"] == answer.headers["X-Request-ID"]
    assert list(last["usage"]) == ["input_tokens", "output_tokens"]
    assert last["usage"]["output_tokens"] == len(chunks) >= 40
    assert nanousd(last["cost_usd"]) == last["usage"]["input_tokens"] * 2_500 + len(chunks) * 10_000
    assert answer.headers["Cache-Control"] == "no-store, no-transform"


def test_the_headers_of_an_admitted_answer(service):
    headers = service.chat().headers
    assert headers["X-Throttle-Backend"] == "atomic"
    assert headers["X-Cost-Reserved-USD"] == "0.004192500"
    assert headers["Server-Timing"].startswith("throttle;dur=")


def test_max_tokens_is_what_the_model_gets_and_what_is_reserved(service, script):
    asked = script(ScriptedAnswer(["a"], Usage(10, 1)))
    answer = service.chat(max_tokens=7, chat_history=[{"role": "user", "content": "Hello"}])
    (request,) = asked
    assert [message["role"] for message in request.messages] == ["system", "user", "user"]
    assert [message["content"] for message in request.messages[1:]] == ["Hello", "What is Litecoin?"]
    assert (request.max_tokens, request.model, request.deadline_seconds) == (7, "gpt-4o", 120)
    assert nanousd(answer.headers["X-Cost-Reserved-USD"]) == request.input_tokens * 2_500 + 7 * 10_000


def test_an_answer_that_is_cut_says_length(service):
    last = events(service.chat(max_tokens=5))[-1]
    assert (last["finish_reason"], last["usage"]["output_tokens"]) == ("length", 5)


@pytest.mark.parametrize("backend", ["atomic", "legacy"])
def test_while_an_answer_runs_the_whole_reservation_is_booked(make_app, backend):
    service = make_app(THROTTLE_BACKEND=backend, DEMO_TOKENS_PER_SECOND="20")
    answer = service.open_chat()
    assert service.daily() == service.window() == nanousd(answer.headers["X-Cost-Reserved-USD"]) == 4_192_500
    assert len(service.redis.keys("llm:open:*")) == 4
    stream = answer.iter_encoded()
    next(stream)
    answer.close()
    settled = service.daily()
    # Whole tokens that were sent, and no longer the most that the answer could have been.
    tokens, rest = divmod(settled - 77 * 2_500, 10_000)
    assert rest == 0
    assert 1 <= tokens < 400
    assert service.window() == settled
    assert service.redis.keys("llm:open:*") == []


def test_a_client_that_leaves_before_the_first_chunk_is_settled_too(make_app):
    service = make_app(DEMO_TOKENS_PER_SECOND="1")
    # As a server does it; the test client would wait for the first chunk.
    environ = EnvironBuilder(CHAT, method="POST", json=LITECOIN, headers={"X-Fingerprint": "hash456"}).get_environ()
    answer = service.app.wsgi_app(environ, lambda *_: None)
    assert service.daily() == 4_192_500
    answer.close()
    assert service.daily() == 77 * 2_500
    answer.close()
    assert service.daily() == 77 * 2_500


def test_an_answer_is_settled_before_its_last_event(service):
    answer = service.open_chat()
    seen = []
    for written in answer.iter_encoded():
        last = parse_events(written)[-1]
        if last["status"] == "complete":
            seen.append((service.daily(), nanousd(last["cost_usd"])))
    assert seen
    assert seen[0][0] == seen[0][1] > 0
    answer.close()
    assert service.daily() == seen[0][0]


def test_what_the_model_used_is_booked_also_where_it_is_more_than_was_reserved(service, script, caplog):
    script(ScriptedAnswer(["a"], Usage(100, 1_000)))
    last = events(service.chat())[-1]
    assert nanousd(last["cost_usd"]) == 10_250_000 == service.daily()
    (settled,) = [record for record in caplog.records if record.message == "Cost settled"]
    assert (settled.levelname, settled.fields["overrun_usd"]) == ("WARNING", "0.006057500")


def test_a_stream_that_breaks_ends_with_an_error_and_the_whole_reservation(service, script):
    answer = ScriptedAnswer(["Lite"], None, UpstreamBroken("The model's server broke off.", detail="secret"))
    script(answer)
    response = service.chat()
    assert response.status_code == 200
    first, last = events(response)
    assert first == {"status": "streaming", "chunk": "Lite"}
    assert list(last) == ["status", "request_id", "error", "message", "usage", "cost_usd"]
    assert (last["status"], last["error"], last["cost_usd"]) == ("error", "upstream_error", "0.004192500")
    assert last["usage"] == {"input_tokens": 77, "output_tokens": 400}
    assert last["request_id"] == response.headers["X-Request-ID"]
    assert b"secret" not in response.data
    assert service.daily() == 4_192_500
    assert service.redis.keys("llm:open:*") == []
    assert answer.closed


def test_a_stream_that_breaks_after_its_usage_costs_what_was_used(service, script):
    script(ScriptedAnswer(["Lite"], Usage(10, 3), UpstreamBroken("It broke off.")))
    last = events(service.chat())[-1]
    assert (last["status"], last["cost_usd"]) == ("error", "0.000055000")
    assert service.daily() == 55_000


def test_an_answer_that_ends_at_its_deadline_has_time_to_be_settled(make_app):
    """Until then it does not count as expired."""
    service = make_app(STREAM_DEADLINE_SECONDS="3")
    answer = service.chat(max_tokens=1)
    record = service.redis.get(f"llm:reservation:{answer.headers['X-Request-ID']}")
    assert record.split()[5] == str(3 + 5)


def test_an_answer_past_its_deadline_is_cut_and_settled(make_app):
    service = make_app(STREAM_DEADLINE_SECONDS="1", DEMO_TOKENS_PER_SECOND="10")
    *chunks, last = events(service.chat())
    assert (last["status"], last["error"]) == ("error", "stream_deadline")
    assert 5 <= len(chunks) <= 10
    assert len(chunks) <= last["usage"]["output_tokens"] <= 11
    assert service.daily() == nanousd(last["cost_usd"]) == 77 * 2_500 + last["usage"]["output_tokens"] * 10_000


def test_a_server_that_was_not_reached_costs_nothing(service, script):
    script(UpstreamNotTaken("The model's server cannot be reached.", detail="secret"))
    answer = service.chat()
    assert (answer.status_code, answer.json["error"], answer.json["cost_usd"]) == (502, "upstream_error", "0.000000000")
    assert list(answer.json)[-1] == "cost_usd"
    assert b"secret" not in answer.data
    assert "throttle;dur=" in answer.headers["Server-Timing"]
    assert service.daily() == service.window() == 0
    assert service.redis.keys("llm:open:*") == []


@pytest.mark.parametrize(("timed_out", "status"), [(True, 504), (False, 502)])
def test_a_server_that_may_have_worked_costs_the_whole_reservation(service, script, timed_out, status):
    script(UpstreamBroken("No answer.", timed_out=timed_out))
    answer = service.chat()
    assert (answer.status_code, answer.json["error"], answer.json["cost_usd"]) == (
        status,
        "upstream_error",
        "0.004192500",
    )
    assert service.daily() == 4_192_500
    assert service.redis.keys("llm:open:*") == []


def test_a_bug_in_the_model_is_a_500_and_the_whole_reservation(service, script):
    script(RuntimeError("bug"))
    answer = service.chat()
    assert (answer.status_code, answer.json["error"]) == (500, "internal_error")
    assert service.daily() == 4_192_500
    assert service.redis.keys("llm:open:*") == []


def test_half_a_character_of_a_model_does_not_break_the_stream(service, script):
    script(ScriptedAnswer(["good ", "\ud83d", "\u2028", "\n\n", "data: x"], Usage(1, 5)))
    *chunks, last = events(service.chat())
    assert [each["chunk"] for each in chunks] == ["good ", "\ufffd\u2028", "\n\n", "data: x"]
    assert last["status"] == "complete"


def test_a_silent_model_does_not_keep_the_client_in_doubt(make_app):
    service = make_app(STREAM_DEADLINE_SECONDS="2", DEMO_TOKENS_PER_SECOND="0.000001")
    body = service.chat().data
    assert body.startswith(b": still here\n\n")
    assert parse_events(body)[-1]["error"] == "stream_deadline"


def test_a_model_that_the_caller_may_not_name_is_refused_and_one_that_it_may_has_its_own_price(make_app):
    service = make_app(LLM_MODELS="gpt-4o-mini,gpt-4o")
    assert service.chat(model="gpt-4o-mini").headers["X-Cost-Reserved-USD"] == "0.000251550"
    assert service.chat().headers["X-Cost-Reserved-USD"] == "0.004192500"
    before = service.stored()
    refused = service.chat(model="gpt-5")
    assert (refused.status_code, refused.json["field"]) == (422, "model")
    assert "gpt-4o-mini" in refused.json["reason"]
    assert service.stored() == before


def test_prices_of_ones_own_beat_the_table(make_app):
    service = make_app(LLM_PRICE_INPUT_USD_PER_MTOK="0.001", LLM_PRICE_OUTPUT_USD_PER_MTOK="2")
    assert service.chat(max_tokens=40).headers["X-Cost-Reserved-USD"] == "0.000080077"
    assert service.daily() == 80_077


def test_head_and_options_reach_no_model(service, script):
    asked = script(ScriptedAnswer(["a"], Usage(1, 1)))
    for method in ("HEAD", "OPTIONS", "PUT"):
        assert service.client.open("/api/v1/chat/stream", method=method).status_code in {200, 405}
    assert asked == []
    assert service.stored() == {}
