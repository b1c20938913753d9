"""Cost throttling as a visitor meets it, on a real Redis."""

import pytest

from backends.keys import bucket_seconds_of
from tests.apps import NETWORK, today
from tests.servers import LITECOIN, earliest_wait, events, nanousd

COST = 4_192_500
"""What the seed's question reserves: 77 tokens in, 400 out, at 2.50 and 10.00 dollars a million."""


@pytest.fixture(params=["atomic", "legacy"])
def service(request, make_app):
    return make_app(THROTTLE_BACKEND=request.param)


def test_cost_throttling(make_app):
    service = make_app()
    answers = []
    while (answer := service.chat()).status_code == 200:
        answers.append(answer)
        assert len(answers) < 30
    costs = [nanousd(events(each)[-1]["cost_usd"]) for each in answers]
    assert all(nanousd(each.headers["X-Cost-Reserved-USD"]) == COST for each in answers)
    # Nobody could have been refused before, and nobody may be admitted now.
    assert sum(costs) - costs[-1] + COST <= 20_000_000 < sum(costs) + COST
    assert answer.status_code == 429
    assert answer.json["error"] == "cost_throttled"
    assert answer.json["reason"] == "window_limit"
    assert answer.json["message"].startswith("High usage detected")
    assert "in_flight" not in answer.json
    assert service.window() == service.daily() == sum(costs)
    assert 29 <= service.redis.ttl("llm:throttle:hash456") <= 30
    # What it took to get there leaves the window after ten minutes at the earliest.
    assert 590 <= earliest_wait(answer) <= 600 + bucket_seconds_of(600)
    before = service.stored()
    again = service.chat("fp:another-challenge:hash456")
    assert (again.status_code, again.json["reason"]) == (429, "throttled")
    assert again.json["message"].startswith("High usage detected")
    assert service.stored() == before
    assert service.chat("somebody-else").status_code == 200


def test_the_seeds_question_reserves_the_same_each_time_and_is_settled_to_its_cost(service):
    answer = service.chat()
    assert answer.headers["X-Cost-Reserved-USD"] == "0.004192500"
    last = events(answer)[-1]
    usage = last["usage"]
    cost = nanousd(last["cost_usd"])
    assert cost == usage["input_tokens"] * 2_500 + usage["output_tokens"] * 10_000 < COST
    assert service.window() == service.daily() == cost
    assert service.redis.get(f"llm:network:daily:{NETWORK}:{today()}") == str(cost)
    assert service.redis.get(f"llm:global:daily:{today()}") == str(cost)
    assert not service.redis.keys("llm:open:*")


def test_a_request_that_fits_exactly_is_admitted_and_one_nanodollar_less_room_is_refused(make_app):
    exact = make_app(DAILY_COST_LIMIT_USD="0.004192500")
    assert exact.chat().status_code == 200
    less = make_app(DAILY_COST_LIMIT_USD="0.004192499")
    refused = less.chat("another")
    assert refused.status_code == 429
    assert refused.json["can_never_fit"] is True
    assert less.daily("another") == 0


def test_a_very_low_daily_limit(service):
    service.redis.set("settings", '{"daily_cost_limit_usd": 0.005}')
    service.tollgate.settings.refresh()
    assert service.chat().status_code == 200
    booked = service.daily()
    refused = service.chat()
    assert (refused.status_code, refused.json["reason"]) == (429, "daily_limit")
    assert refused.json["message"].startswith("Daily usage limit reached")
    assert 59 <= service.redis.ttl("llm:throttle:hash456") <= 60
    assert service.daily() == booked
    under_marker = service.chat()
    assert under_marker.json["reason"] == "throttled"
    assert under_marker.json["message"].startswith("Daily usage limit reached")
    # It can end at midnight UTC, and not with the marker.
    assert earliest_wait(refused) - earliest_wait(under_marker) in {0, 1, 2}


def test_a_request_larger_than_a_whole_limit_is_told_not_to_wait(service):
    service.redis.set("settings", '{"daily_cost_limit_usd": 0.004}')
    service.tollgate.settings.refresh()
    refused = service.chat()
    assert (refused.status_code, refused.json["reason"], refused.json["can_never_fit"]) == (429, "daily_limit", True)
    assert refused.json["message"].startswith("Daily usage limit reached")
    assert refused.json["retry_after_seconds"] is None
    assert "Retry-After" not in refused.headers
    assert not service.daily()
    # What is small enough may still come, once the marker is over.
    service.redis.delete("llm:throttle:hash456")
    assert service.chat(max_tokens=300).status_code == 200


@pytest.mark.parametrize(
    ("setting", "reason", "scope"),
    [
        ("high_cost_threshold_usd", "window_limit", "identifier"),
        ("network_cost_limit_usd", "network_limit", "network"),
        ("network_daily_cost_limit_usd", "network_daily_limit", "network"),
        ("hourly_spend_limit_usd", "global_hourly_limit", "global"),
        ("daily_spend_limit_usd", "global_daily_limit", "global"),
        ("hourly_spend_limit_usd", "network_share", "network"),
        ("daily_spend_limit_usd", "network_share", "network"),
    ],
)
def test_each_limit_refuses_in_its_own_words_and_charges_nothing(service, setting, reason, scope):
    limit, share = ("0.020", "0.25") if reason == "network_share" else ("0.005", "1")
    service.patch(**{setting: limit, "network_share": share})
    assert service.chat().status_code == 200
    before = service.stored()
    refused = service.chat()
    assert (refused.status_code, refused.json["reason"], refused.json["scope"]) == (429, reason, scope)
    after = service.stored()
    marker = after.pop("llm:throttle:hash456", None)
    assert (marker is not None) == (reason == "window_limit")
    assert after == before


def test_fresh_fingerprints_do_not_get_past_the_network(make_app):
    service = make_app(NETWORK_COST_LIMIT_USD="0.01")
    answers = [service.chat(f"visitor-{number}") for number in range(20)]
    admitted = [each for each in answers if each.status_code == 200]
    assert 0 < len(admitted) < 20
    assert {each.json["reason"] for each in answers if each.status_code != 200} == {"network_limit"}
    spent = sum(nanousd(events(each)[-1]["cost_usd"]) for each in admitted)
    assert int(service.redis.get(f"llm:network:daily:{NETWORK}:{today()}")) == spent <= 10_000_000


def test_open_reservations_are_told_as_busy_and_with_the_setting_off_set_no_marker(make_app):
    service = make_app(HIGH_COST_THRESHOLD_USD="0.005", THROTTLE_WHEN_BUSY="false", DEMO_TOKENS_PER_SECOND="10")
    under_way = service.open_chat()
    assert under_way.status_code == 200
    refused = service.chat()
    assert (refused.status_code, refused.json["in_flight"]) == (429, True)
    assert earliest_wait(refused) == 1
    assert not service.redis.exists("llm:throttle:hash456")
    under_way.close()
    service.redis.set("settings", '{"llm_max_tokens": 100}')
    service.tollgate.settings.refresh()
    freed = service.open_chat()
    assert freed.status_code == 200
    freed.close()


def test_with_throttling_off_nothing_is_counted(make_app):
    service = make_app(ENABLE_COST_THROTTLING="false")
    answer = service.chat()
    assert (answer.status_code, answer.headers["X-Throttle-Backend"]) == (200, "off")
    assert "X-Cost-Reserved-USD" not in answer.headers
    assert events(answer)[-1]["status"] == "complete"
    assert service.stored() == {}


def test_no_key_but_the_settings_lives_for_ever(service):
    service.patch(cost_throttle_duration_seconds=40, high_cost_threshold_usd="0.005")
    service.chat()
    service.chat()
    lives = {key: service.redis.ttl(key) for key in service.redis.scan_iter("*")}
    assert lives.pop("settings") == -1
    assert {"llm:throttle:hash456", "llm:cost:recent:hash456"} <= set(lives)
    assert [key for key, left in lives.items() if not 0 < left < 200_000] == []
    assert 39 <= lives["llm:throttle:hash456"] <= 40


def test_without_a_fingerprint_the_network_is_the_identifier(service):
    assert service.chat(None).status_code == 200
    assert service.daily(f"ip:{NETWORK}") > 0


def test_a_body_that_names_a_user_changes_nobody(service):
    assert service.chat(body={**LITECOIN, "user": "x"}).status_code == 422
    assert service.stored() == {}
