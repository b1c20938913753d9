"""The script was done and its reply never came: said again, it charges nothing and gets the first answer."""

import threading
from dataclasses import replace

import pytest

from backends.budgets import Budget, Calendar, Scope
from backends.conformance.cases import COST, EVERY, KEY, NETWORK, ROOMY, WHO, make_ask
from backends.contract import Ask, Duplicate, DuplicateState, Outcome, Refusal, Reservation
from backends.errors import StoreUnavailable, ThrottleUnavailable
from backends.guard import EMERGENCY
from backends.store.breaker import REST_SECONDS
from backends.store.scripts import Script
from backends.strategies.atomic import AtomicBackend
from flaskapp.http.challenges import Challenges
from tests.faults.wire import wait_for

SIX = ROOMY.budgets(WHO, NETWORK)
LOST = 500
EXTEND, SETTLE = (Script(name).digest.encode() for name in ("extend.lua", "settle.lua"))


def is_script(request):
    return b"EVALSHA" in request


def is_extension(request):
    return is_script(request) and EXTEND in request


def is_end(request):
    return is_script(request) and SETTLE in request


def every_other(of=is_script):
    """Loses the reply to each script once; the repeat gets through."""
    turn = threading.Lock(), [0]

    def lose(request):
        if not of(request):
            return False
        lock, count = turn
        with lock:
            count[0] += 1
            return count[0] % 2 == 1

    return lose


@pytest.fixture
def backend(new_link, proxy):
    backend = AtomicBackend(new_link(proxy.url))
    use_once(backend)
    return backend


def use_once(backend):
    """The server knows every script from here on, so that none is sent twice for that."""
    made = backend.reserve(make_ask("first", COST))
    backend.extend(made, COST + 1, SIX)
    backend.settle(made, 0)


@pytest.fixture
def books(new_link):
    return lambda: AtomicBackend(new_link()).books(SIX)


def test_lost_once_each_the_link_says_it_again_and_nobody_pays_twice(proxy, backend, books):
    proxy.lose = every_other()
    made = [backend.reserve(make_ask(f"r{number}", COST)) for number in range(LOST)]
    assert proxy.lost == LOST
    assert all(isinstance(verdict, Reservation) for verdict in made)
    assert books().spent("window") == books().spent("global_day") == LOST * COST
    ends = [backend.settle(reservation, 7) for reservation in made]
    assert proxy.lost == 2 * LOST
    assert {end.outcome for end in ends} == {Outcome.REPEATED}
    assert {end.booked_nanousd for end in ends} == {7}
    assert books().spent("window") == books().spent("global_day") == LOST * 7
    assert books().use("window").pending_nanousd == 0


def test_a_charge_to_every_kind_of_budget_is_made_once_however_many_replies_are_lost(proxy, backend, new_link):
    every, look = EVERY.budgets(WHO, NETWORK), AtomicBackend(new_link())

    def spent():
        return {use.spent_nanousd for use in look.books(every).uses}

    proxy.lose = every_other()
    made = [backend.reserve(make_ask(f"r{number}", COST, EVERY)) for number in range(20)]
    assert spent() == {20 * COST}
    made = [backend.extend(reservation, 2 * COST, every) for reservation in made]
    assert spent() == {40 * COST}
    outcomes = [backend.settle(reservation, 7).outcome for reservation in made[:10]]
    outcomes += [backend.release(reservation).outcome for reservation in made[10:]]
    assert set(outcomes) == {Outcome.REPEATED}
    assert spent() == {10 * 7}
    assert proxy.lost == 60


def test_a_limit_is_not_overspent_by_replies_that_are_lost(proxy, backend, books):
    limits = replace(ROOMY, day_nanousd=20 * COST)
    proxy.lose = every_other()
    verdicts = [backend.reserve(make_ask(f"r{number}", COST, limits)) for number in range(30)]
    assert sum(isinstance(verdict, Reservation) for verdict in verdicts) == 20
    assert books().spent("day") == 20 * COST
    assert all(isinstance(verdict, Refusal) for verdict in verdicts[20:])


def test_lost_twice_it_is_unknown_and_the_caller_may_say_it_again(proxy, backend, books, clock):
    for number in range(50):
        proxy.lose = is_script
        with pytest.raises(StoreUnavailable) as raised:
            backend.reserve(make_ask(f"r{number}", COST))
        assert raised.value.maybe_done
        proxy.lose = lambda _request: False
        clock.skip(REST_SECONDS + 0.01)
        assert isinstance(backend.reserve(make_ask(f"r{number}", COST)), Reservation)
        assert books().spent("window") == (number + 1) * COST
    assert proxy.lost == 100


def test_an_extension_lost_once_is_said_again_and_charged_once(proxy, backend, books):
    limits = replace(ROOMY, window_nanousd=150 * COST)
    made = [backend.reserve(make_ask(f"r{number}", COST, limits)) for number in range(100)]
    proxy.lose = every_other(is_extension)
    answers = [backend.extend(reservation, 2 * COST, limits.budgets(WHO, NETWORK)) for reservation in made]
    assert proxy.lost == 100
    granted = [answer for answer in answers if isinstance(answer, Reservation)]
    assert len(granted) == 50
    assert {reservation.cost_nanousd for reservation in granted} == {2 * COST}
    assert books().spent("window") == books().use("window").pending_nanousd == 150 * COST
    for reservation in made:
        backend.settle(reservation, 7)
    assert books().spent("window") == books().spent("global_hour") == 100 * 7
    assert books().use("window").pending_nanousd == 0


@pytest.mark.parametrize("then", ["said again", "extended further", "settled", "released"])
def test_an_extension_lost_twice_is_unknown_and_whatever_follows_puts_it_right(proxy, backend, books, clock, then):
    made = backend.reserve(make_ask("r0", COST, idempotency=KEY))
    proxy.lose = is_extension
    with pytest.raises(StoreUnavailable) as raised:
        backend.extend(made, 2 * COST, SIX)
    assert raised.value.maybe_done
    assert books().spent("window") == 2 * COST
    proxy.lose = lambda _request: False
    clock.skip(REST_SECONDS + 0.01)
    if then in {"said again", "extended further"}:
        to_nanousd = 2 * COST if then == "said again" else 3 * COST
        assert backend.extend(made, to_nanousd, SIX).cost_nanousd == to_nanousd
        assert books().spent("window") == books().use("window").pending_nanousd == to_nanousd
    booked = 0 if then == "released" else 7
    end = backend.release(made) if then == "released" else backend.settle(made, 7)
    assert end.booked_nanousd == booked
    assert books().spent("window") == books().spent("global_day") == booked
    assert books().use("window").pending_nanousd == 0


def test_an_answer_goes_on_by_the_emergency_budget_where_its_extension_was_lost(proxy, new_link, new_guard, books):
    guard = new_guard(new_link(proxy.url))
    use_once(AtomicBackend(new_link(proxy.url)))
    made = guard.reserve(make_ask("r0", COST))
    proxy.lose = is_extension
    bridged = guard.extend(made, 3 * COST, SIX, at_least_nanousd=2 * COST)
    assert bridged.cost_nanousd == 3 * COST
    assert books().spent("window") == 3 * COST, "it was charged, and nobody was told"
    proxy.lose = lambda _request: False
    guard.settle(bridged, 2 * COST - 1)
    wait_for(lambda: books().use("window").pending_nanousd == 0)
    assert books().spent("window") == books().spent("global_day") == 2 * COST - 1
    # What was lent comes back after that.
    wait_for(lambda: guard._lending.budget.spent_nanousd() == 0)


def test_a_release_whose_answer_was_lost_frees_its_key_once(proxy, backend, books):
    made = backend.reserve(make_ask("r0", COST, idempotency=KEY))
    proxy.lose = every_other(is_end)
    assert backend.release(made).outcome is Outcome.REPEATED
    proxy.lose = lambda _request: False
    assert books().spent("window") == books().use("window").pending_nanousd == 0
    second = backend.reserve(make_ask("r1", COST, idempotency=KEY))
    assert isinstance(second, Reservation)
    assert backend.release(made).outcome is Outcome.REPEATED
    assert backend.find_duplicate(KEY) == Duplicate("r1", DuplicateState.IN_FLIGHT, COST, same_body=True)


def test_a_release_that_was_put_off_is_done_once(proxy, new_link, new_guard, books, told):
    guard = new_guard(new_link(proxy.url))
    use_once(AtomicBackend(new_link(proxy.url)))
    made = guard.reserve(make_ask("r0", COST, idempotency=KEY))
    proxy.lose = is_end
    guard.release(made)
    assert len(told.named("settle_postponed")) == 1
    assert books().spent("window") == 0
    proxy.lose = lambda _request: False
    wait_for(lambda: told.named("settled"))
    assert told.named("settled")[0]["outcome"] == "repeated"
    assert books().spent("window") == books().use("window").pending_nanousd == 0
    assert guard.find_duplicate(KEY) is None


def test_a_callers_key_whose_first_answer_was_lost_stands_for_the_first(proxy, backend, books):
    proxy.lose = every_other()
    made = backend.reserve(make_ask("r0", COST, idempotency=KEY))
    assert isinstance(made, Reservation)
    assert backend.reserve(make_ask("r1", COST, idempotency=KEY)) == Duplicate(
        "r0", DuplicateState.IN_FLIGHT, COST, same_body=True
    )
    backend.settle(made, 7)
    assert backend.find_duplicate(KEY).state is DuplicateState.SETTLED
    assert books().spent("window") == 7


def test_a_callers_key_of_a_request_that_nobody_answered_is_free_again(proxy, new_link, new_guard, books):
    guard = new_guard(new_link(proxy.url))
    use_once(AtomicBackend(new_link(proxy.url)))
    proxy.lose = is_script
    with pytest.raises(ThrottleUnavailable):
        guard.reserve(make_ask("r0", COST, idempotency=KEY))
    proxy.lose = lambda _request: False
    wait_for(lambda: books().spent("window") == 0)
    assert guard.find_duplicate(KEY) is None
    assert isinstance(guard.reserve(make_ask("r1", COST, idempotency=KEY)), Reservation)
    assert books().spent("global_day") == COST


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
    guard.settle(guard.reserve(make_ask("first", COST)), 0)
    # The next one too: an outage, so that what is given back waits.
    proxy.lose = lambda _request: True
    verdict = guard.reserve(make_ask("ghost", COST))
    assert verdict.backend == EMERGENCY
    assert books().spent("window") == COST
    proxy.lose = lambda _request: False
    wait_for(lambda: books().spent("window") == 0)
    guard.settle(verdict, 5)
    assert books().spent("global_day") == 0
    assert books().use("window").pending_nanousd == 0
    assert [fields["booked_nanousd"] for fields in told.named("settled") if fields["request_id"] == "ghost"] == [0, 5]


def test_so_it_is_where_one_budget_without_an_identifier_is_all_that_there_is(proxy, new_link, new_guard):
    guard, monthly = new_guard(new_link(proxy.url)), Budget("monthly", "marketing", Calendar("month"), COST, Scope.TEAM)
    guard.settle(guard.reserve(Ask("first", COST, (monthly,))), 0)
    # The next one too: an outage, so that what is given back waits.
    proxy.lose = lambda _request: True
    assert guard.reserve(Ask("ghost", COST, (monthly,))).backend == EMERGENCY
    look = AtomicBackend(new_link())
    assert look.books((monthly,)).spent("monthly") == COST
    proxy.lose = lambda _request: False
    wait_for(lambda: look.books((monthly,)).spent("monthly") == 0)


def test_a_settlement_whose_answer_was_lost_is_booked_once(proxy, new_link, new_guard, books, told):
    guard = new_guard(new_link(proxy.url))
    guard.settle(guard.reserve(make_ask("first", COST)), 0)
    told.clear()
    made = guard.reserve(make_ask("r0", COST))
    proxy.lose = is_script
    guard.settle(made, 7)
    assert len(told.named("settle_postponed")) == 1
    assert books().spent("window") == 7
    proxy.lose = lambda _request: False
    wait_for(lambda: told.named("settled"))
    assert told.named("settled")[0]["outcome"] == "repeated"
    assert books().spent("window") == books().spent("global_day") == 7


def test_a_challenge_whose_answer_was_lost_is_not_good_twice(proxy, new_link):
    """The safe side: the visitor has to ask for another."""
    challenges = Challenges(new_link(proxy.url))
    used = Challenges(new_link())
    assert used.consume(used.give(WHO, NETWORK), WHO, NETWORK).name == "GOOD"
    challenge = used.give(WHO, NETWORK)
    proxy.lose = every_other()
    assert challenges.consume(challenge, WHO, NETWORK).name == "UNKNOWN"
