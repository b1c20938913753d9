from concurrent.futures import ThreadPoolExecutor

import pytest

from backends.clock import SystemClock
from backends.errors import StoreUnavailable
from backends.store.link import Link
from flaskapp.http.challenges import CHALLENGE_SECONDS, ChallengeResult, Challenges

WHO, NETWORK = "hash456", "198.51.100.7"
GOOD, UNKNOWN, MISMATCH = ChallengeResult


@pytest.fixture
def link(redis_url):
    link = Link(redis_url, clock=SystemClock(), timeout_seconds=5)
    yield link
    link.close()


@pytest.fixture
def challenges(link):
    return Challenges(link)


def test_it_is_good_once(challenges):
    challenge = challenges.give(WHO, NETWORK)
    assert challenges.consume(challenge, WHO, NETWORK) is GOOD
    assert challenges.consume(challenge, WHO, NETWORK) is UNKNOWN


def test_of_a_thousand_at_once_one_finds_it_good(challenges):
    challenge = challenges.give(WHO, NETWORK)
    with ThreadPoolExecutor(40) as callers:
        results = list(callers.map(lambda _: challenges.consume(challenge, WHO, NETWORK), range(1_000)))
    assert (results.count(GOOD), results.count(UNKNOWN)) == (1, 999)


@pytest.mark.parametrize(
    ("who", "network"), [("another", NETWORK), (WHO, "203.0.113.9"), (f"{WHO} {NETWORK}", ""), ("", f"{WHO} {NETWORK}")]
)
def test_shown_by_another_caller_it_stays_valid_for_its_owner(challenges, who, network):
    challenge = challenges.give(WHO, NETWORK)
    assert challenges.consume(challenge, who, network) is MISMATCH
    assert challenges.consume(challenge, WHO, NETWORK) is GOOD


def test_what_is_stored(challenges, link):
    challenge = challenges.give(WHO, NETWORK)
    [key] = link.run(lambda client: client.keys("*"))
    assert key.decode() == f"llm:challenge:{challenge}"
    assert link.run(lambda client: client.get(key)).decode() == f"{WHO} {NETWORK}"
    assert CHALLENGE_SECONDS - 5 < link.run(lambda client: client.ttl(key)) <= CHALLENGE_SECONDS == 300
    challenges.consume(challenge, WHO, NETWORK)
    assert link.run(lambda client: client.dbsize()) == 0


def test_no_two_are_alike_and_all_are_64_hex_digits():
    drawn = {Challenges.draw() for _ in range(100)}
    assert len(drawn) == 100
    assert all(len(challenge) == 64 and int(challenge, 16) >= 0 for challenge in drawn)


@pytest.mark.parametrize(
    "text", ["", "test123", "A" * 64, "a" * 63, "a" * 65, "a" * 63 + "\n", "a" * 64 + "\n", "٣" * 64]
)
def test_what_was_never_one_does_not_even_reach_redis(text):
    nowhere = Link("redis://127.0.0.1:1/0", clock=SystemClock())
    assert Challenges(nowhere).consume(text, WHO, NETWORK) is UNKNOWN
    nowhere.close()


def test_without_redis_both_are_store_errors():
    nowhere = Link("redis://127.0.0.1:1/0", clock=SystemClock())
    with pytest.raises(StoreUnavailable):
        Challenges(nowhere).give(WHO, NETWORK)
    with pytest.raises(StoreUnavailable):
        Challenges(nowhere).consume("a" * 64, WHO, NETWORK)
    nowhere.close()
