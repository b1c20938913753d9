"""The script was done and its reply never came: said again, it charges nothing and gets the first answer."""

import threading
from dataclasses import replace

import pytest

from backends.atomic import AtomicBackend
from backends.challenges import Challenges
from backends.conformance import COST, NETWORK, ROOMY, WHO, WINDOW_SECONDS, ask
from backends.contract import Outcome, Refusal, Reservation
from backends.errors import StoreUnavailable
from backends.guard import EMERGENCY
from backends.link import REST_SECONDS
from tests.faults.wire import wait_for

LOST = 500


def is_script(request):
    return b"EVALSHA" in request


def every_other():
    """Loses the reply to each script once; the repeat gets through."""
    turn = threading.Lock(), [0]

    def lose(request):
        if not is_script(request):
            return False
        lock, count = turn
        with lock:
            count[0] += 1
            return count[0] % 2 == 1

    return lose


@pytest.fixture
def backend(new_link, proxy):
    backend = AtomicBackend(new_link(proxy.url))
    backend.settle(backend.reserve(ask("first", COST)), 0)
    return backend


@pytest.fixture
def books(new_link):
    return lambda: AtomicBackend(new_link()).books(WHO, NETWORK, WINDOW_SECONDS)


def test_lost_once_each_the_link_says_it_again_and_nobody_pays_twice(proxy, backend, books):
    proxy.lose = every_other()
    made = [backend.reserve(ask(f"r{number}", COST)) for number in range(LOST)]
    assert proxy.lost == LOST
    assert all(isinstance(verdict, Reservation) for verdict in made)
    assert books().window_nanousd == books().global_day_nanousd == LOST * COST
    ends = [backend.settle(reservation, 7) for reservation in made]
    assert proxy.lost == 2 * LOST
    assert {end.outcome for end in ends} == {Outcome.REPEATED}
    assert {end.booked_nanousd for end in ends} == {7}
    assert books().window_nanousd == books().global_day_nanousd == LOST * 7
    assert books().open_nanousd == 0


def test_a_limit_is_not_overspent_by_replies_that_are_lost(proxy, backend, books):
    limits = replace(ROOMY, day_nanousd=20 * COST)
    proxy.lose = every_other()
    verdicts = [backend.reserve(ask(f"r{number}", COST, limits)) for number in range(30)]
    assert sum(isinstance(verdict, Reservation) for verdict in verdicts) == 20
    assert books().day_nanousd == 20 * COST
    assert all(isinstance(verdict, Refusal) for verdict in verdicts[20:])


def test_lost_twice_it_is_unknown_and_the_caller_may_say_it_again(proxy, backend, books, clock):
    for number in range(50):
        proxy.lose = is_script
        with pytest.raises(StoreUnavailable) as raised:
            backend.reserve(ask(f"r{number}", COST))
        assert raised.value.maybe_done
        proxy.lose = lambda _request: False
        clock.skip(REST_SECONDS + 0.01)
        assert isinstance(backend.reserve(ask(f"r{number}", COST)), Reservation)
        assert books().window_nanousd == (number + 1) * COST
    assert proxy.lost == 100


def test_a_time_out_is_never_repeated_by_the_link(own_server, look, new_link):
    link = new_link(timeout_seconds=0.1)
    link.run(lambda client: client.ping())
    said = []

    def command(client):
        said.append(1)
        return client.incrby("spent", 100)

    own_server.freeze()
    with pytest.raises(StoreUnavailable):
        link.run(command)
    own_server.thaw()
    wait_for(lambda: look.get("spent"))
    assert said == [1]
    assert look.get("spent") == b"100", "ten of ten runs of the library's defaults make more of it"


def test_what_was_charged_without_an_answer_is_given_back(proxy, new_link, new_guard, books, told):
    guard = new_guard(new_link(proxy.url))
    guard.settle(guard.reserve(ask("first", COST)), 0)
    proxy.lose = is_script
    verdict = guard.reserve(ask("ghost", COST))
    assert verdict.backend == EMERGENCY
    assert books().window_nanousd == COST
    proxy.lose = lambda _request: False
    wait_for(lambda: books().window_nanousd == 0)
    guard.settle(verdict, 5)
    assert books().global_day_nanousd == 0
    assert books().open_nanousd == 0
    assert [fields["booked_nanousd"] for fields in told.named("settled") if fields["request_id"] == "ghost"] == [0, 5]


def test_a_settlement_whose_answer_was_lost_is_booked_once(proxy, new_link, new_guard, books, told):
    guard = new_guard(new_link(proxy.url))
    guard.settle(guard.reserve(ask("first", COST)), 0)
    told.clear()
    made = guard.reserve(ask("r0", COST))
    proxy.lose = is_script
    guard.settle(made, 7)
    assert len(told.named("settle_postponed")) == 1
    assert books().window_nanousd == 7
    proxy.lose = lambda _request: False
    wait_for(lambda: told.named("settled"))
    assert told.named("settled")[0]["outcome"] == "repeated"
    assert books().window_nanousd == books().global_day_nanousd == 7


def test_a_challenge_whose_answer_was_lost_is_not_good_twice(proxy, new_link):
    """The safe side: the visitor has to ask for another."""
    challenges = Challenges(new_link(proxy.url))
    used = Challenges(new_link())
    assert used.consume(used.give(WHO, NETWORK), WHO, NETWORK).name == "GOOD"
    challenge = used.give(WHO, NETWORK)
    proxy.lose = every_other()
    assert challenges.consume(challenge, WHO, NETWORK).name == "UNKNOWN"
