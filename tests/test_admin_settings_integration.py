"""Settings that are changed while the service runs decide the next request."""

import json

import pytest

from tests.servers import BEARER, SETTINGS


def test_cost_throttling_uses_updated_settings(make_app):
    service = make_app()
    assert service.chat().status_code == 200
    booked = service.daily()

    changed = service.patch(high_cost_threshold_usd="0.005", cost_throttle_duration_seconds=7)
    assert changed.status_code == 200
    assert changed.json["settings"]["high_cost_threshold_usd"]["source"] == "redis"
    assert json.loads(service.redis.get("settings"))["cost_throttle_duration_seconds"] == 7

    refused = service.chat()
    assert (refused.status_code, refused.json["reason"]) == (429, "window_limit")
    assert 6 <= service.redis.ttl("llm:throttle:hash456") <= 7
    assert service.daily() == service.window() == booked

    # A marker stands until it is over, also when there would be service again.
    service.patch(high_cost_threshold_usd="0.02")
    assert service.chat().json["reason"] == "throttled"
    service.redis.delete("llm:throttle:hash456")
    assert service.chat().status_code == 200
    assert service.daily() > booked

    service.patch(enable_cost_throttling=False)
    booked = service.daily()
    assert service.chat().headers["X-Throttle-Backend"] == "off"
    assert service.daily() == booked

    service.patch(enable_cost_throttling=None, high_cost_threshold_usd=None, cost_throttle_duration_seconds=None)
    assert service.redis.get("settings") is None
    assert service.chat().headers["X-Throttle-Backend"] == "atomic"


def test_a_limit_that_is_lowered_below_what_is_spent_refuses_at_once(make_app):
    service = make_app()
    assert service.chat().status_code == 200
    booked = service.daily()
    service.patch(daily_cost_limit_usd="0.0005")
    refused = service.chat(max_tokens=1)
    assert (refused.status_code, refused.json["reason"]) == (429, "daily_limit")
    assert service.daily() == booked


def test_a_setting_made_by_hand_is_obeyed_and_what_is_unusable_in_it_is_ignored(make_app, caplog):
    service = make_app()
    service.redis.set("settings", '{"daily_cost_limit_usd": 0.01, "high_cost_threshold_usd": "lots", "hello": 1}')
    service.tollgate.settings.refresh()
    shown = service.client.get(SETTINGS, headers=BEARER).json["settings"]
    assert shown["daily_cost_limit_usd"] == shown["daily_cost_limit_usd"] | {"value": 0.01, "source": "redis"}
    assert shown["high_cost_threshold_usd"]["source"] == "default"
    ignored = [record.fields["setting"] for record in caplog.records if "gnored" in record.message]
    assert sorted(ignored) == ["hello", "high_cost_threshold_usd"]
    admitted = 0
    while (answer := service.chat()).status_code == 200:
        admitted += 1
        assert admitted < 20
    assert answer.json["reason"] == "daily_limit"
    assert service.daily() <= 10_000_000 < service.daily() + 4_192_500


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"daily_cost_limit_usd": -1}, "daily_cost_limit_usd"),
        ({"daily_cost_limit_usd": 0.0000000001}, "daily_cost_limit_usd"),
        ({"high_cost_window_seconds": 10}, "high_cost_window_seconds"),
        ({"enable_cost_throttling": "true"}, "enable_cost_throttling"),
        ({"no_such_thing": 1}, "no_such_thing"),
    ],
)
def test_a_change_that_cannot_be_used_changes_nothing_of_it(make_app, changes, field):
    service = make_app()
    refused = service.patch(high_cost_threshold_usd="0.001", **changes)
    assert refused.status_code == 422
    assert list(refused.json["fields"]) == [field]
    assert service.redis.get("settings") is None
    assert service.chat().status_code == 200


def test_the_ceiling_of_an_answer_is_live_and_lowers_what_is_reserved(make_app):
    service = make_app()
    dear = service.chat().headers["X-Cost-Reserved-USD"]
    service.patch(llm_max_tokens=10)
    assert (dear, service.chat().headers["X-Cost-Reserved-USD"]) == ("0.004192500", "0.000292500")
    refused = service.chat(max_tokens=11)
    assert (refused.status_code, refused.json["field"]) == (422, "max_tokens")


def test_the_oldest_turns_are_left_out_until_the_input_fits(make_app):
    service = make_app(LLM_MAX_INPUT_TOKENS="200")
    turns = [{"role": "user", "content": "word " * 60}] * 10
    with_history = service.chat(chat_history=turns)
    alone = service.chat("another")
    assert with_history.status_code == 200
    assert with_history.headers["X-Cost-Reserved-USD"] > alone.headers["X-Cost-Reserved-USD"]
    assert with_history.headers["X-Cost-Reserved-USD"] <= "0.004500000"
    refused = service.chat(query="word " * 200)
    assert (refused.status_code, refused.json["field"]) == (422, "query")
