"""Every request that reaches a model has reserved first: each route is tried, and each time Redis is checked."""

import itertools

import pytest

from flaskapp.llm import ModelRequest
from tests.servers import CHAT, LITECOIN
from tests.upstream import Upstream

COMPLETIONS = "/v1/chat/completions"
ASKED = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
BODIES = [LITECOIN, ASKED, {**ASKED, "stream": True}, {}]


@pytest.fixture
def upstream():
    with Upstream() as server:
        yield server


@pytest.fixture
def service(make_app, upstream):
    """With large budgets, so that nothing is refused."""
    plenty = dict.fromkeys(("HIGH_COST_THRESHOLD_USD", "DAILY_COST_LIMIT_USD", "NETWORK_DAILY_COST_LIMIT_USD"), "100")
    plenty |= {"NETWORK_COST_LIMIT_USD": "0", "HOURLY_SPEND_LIMIT_USD": "100", "DAILY_SPEND_LIMIT_USD": "100"}
    return make_app(
        LLM_BASE_URL=upstream.base_url,
        API_KEYS="house-key",
        ADMIN_TOKEN="house-key",
        CHAT_RATE_LIMIT="10000 per minute",
        **plenty,
    )


def reaching(service, upstream):
    """The routes that reach the upstream, and those of them that had reserved nothing by then."""
    reached, unguarded = set(), set()

    def check():
        reached.add(rule.rule)
        if not service.redis.keys("llm:open:*"):
            unguarded.add(rule.rule)

    upstream.on_request = check
    for rule in list(service.app.url_map.iter_rules()):
        value = "budgets" if rule.rule.startswith("/admin") else "gpt-4o"
        path = rule.build(dict.fromkeys(rule.arguments, value))[1]
        for method, body in itertools.product(sorted(rule.methods), BODIES):
            headers = {"Authorization": "Bearer house-key", "X-Fingerprint": "hash456"}
            service.client.open(path, method=method, json=body, headers=headers, buffered=True).close()
    return reached, unguarded


def test_no_route_goes_round_the_guard(service, upstream):
    reached, unguarded = reaching(service, upstream)
    assert reached == {CHAT, COMPLETIONS}
    assert unguarded == set()


def test_a_route_that_goes_round_the_guard_is_found(service, upstream):
    def planted():
        asked = ModelRequest("gpt-4o", ASKED["messages"], 5, 9, deadline_seconds=5)
        return service.tollgate.model.ask(asked).whole().body

    service.app.add_url_rule("/planted", view_func=planted)
    assert reaching(service, upstream)[1] == {"/planted"}
