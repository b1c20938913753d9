"""Numbers for Prometheus: they move, and by how much."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.apps import open_app
from tests.servers import events, nanousd


def numbers(service):
    """By name and the values of the labels, in the order of the alphabet; empty ones are left out."""
    answer = service.client.get("/metrics")
    assert answer.status_code == 200
    assert answer.mimetype == "text/plain"
    return {
        (sample.name.removeprefix("tollgate_"), tuple(filter(None, sample.labels.values()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


@pytest.mark.parametrize("backend", ["atomic", "legacy"])
def test_admissions_and_refusals_are_counted_with_their_amounts(make_app, backend):
    service = make_app(THROTTLE_BACKEND=backend)
    spent = admitted = 0
    while (answer := service.chat()).status_code == 200:
        admitted += 1
        spent += nanousd(events(answer)[-1]["cost_usd"])
    service.chat()
    counted = numbers(service)
    assert counted["checks_total", (backend, "admitted")] == admitted
    assert counted["checks_total", (backend, "window", "window_limit")] == 1
    assert counted["checks_total", (backend, "window", "throttled")] == 1
    assert counted["reserved_nanousd_total", (backend,)] == admitted * 4_192_500
    assert counted["booked_nanousd_total", (backend, "settled")] == spent == service.daily()
    assert counted["overrun_nanousd_total", (backend,)] == 0
    assert counted["check_seconds_count", (backend,)] == admitted + 2
    assert 0 < counted["check_seconds_sum", (backend,)] < 5
    assert counted["events_total", ("check_called",)] == admitted + 2


def test_emergency_spend_and_failures_are_counted(own_server, tmp_path):
    with open_app(own_server.url, tmp_path, {}) as service:
        service.chat()
        own_server.kill()
        answers = [service.chat() for _ in range(3)]
        assert {each.headers["X-Throttle-Backend"] for each in answers} == {"emergency"}
        counted = numbers(service)
        assert counted["checks_total", ("emergency", "admitted")] == 3
        assert counted["emergency_nanousd_total", ()] == 3 * 4_192_500
        assert counted["store_failures_total", ("false",)] == 3
        spent = sum(nanousd(events(each)[-1]["cost_usd"]) for each in answers)
        assert counted["booked_nanousd_total", ("emergency", "settled")] == spent
        assert counted["events_total", ("store_lost",)] == 1


def test_a_wrong_kind_of_key_is_counted_as_a_bug(make_app):
    service = make_app()
    service.redis.hset("llm:cost:recent:hash456", "x", "1")
    service.chat()
    counted = numbers(service)
    assert counted["store_failures_total", ("true",)] == 1
    assert counted["events_total", ("store_broken",)] >= 1


def test_numbers_need_no_word_and_hold_no_identifier(make_app):
    service = make_app()
    service.chat("visitor_x")
    text = service.client.get("/metrics").text
    assert "tollgate_checks_total" in text
    assert "visitor" not in text


def test_the_alarms_of_each_model_are_there_before_the_first(make_app):
    counted = numbers(make_app(LLM_MODELS="gpt-4o-mini"))
    for model in ("gpt-4o", "gpt-4o-mini"):
        assert counted["usage_absurd_total", (model,)] == 0
        assert counted["usage_missing_total", ("whole", model)] == 0
