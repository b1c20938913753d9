"""Redis is killed and comes back: bridged within a budget, or told as 503; the books go on where they were."""

import multiprocessing
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from backends.clock import SystemClock
from backends.conformance.cases import COST, EVERY, LIMITS_IN_ORDER, NETWORK, ROOMY, US, WHO, make_ask
from backends.conformance.harness import ManualClock, MemoryHarness
from backends.contract import Refusal, Reservation
from backends.errors import StoreBusy, StoreUnavailable, ThrottleUnavailable
from backends.guard import EMERGENCY, EmergencyBudget, FailurePolicy, Guard, Health
from backends.store.breaker import REST_SECONDS
from backends.strategies.atomic import AtomicBackend
from backends.strategies.memory import MemoryBackend
from tests.faults.wire import wait_for

SIX = ROOMY.budgets(WHO, NETWORK)


@pytest.fixture
def books(new_link):
    return lambda: AtomicBackend(new_link()).books(SIX)


def test_open_bridges_with_the_emergency_budget_until_it_is_used_up(own_server, new_guard, told):
    guard = new_guard(emergency_nanousd=3 * COST)
    assert guard.reserve(make_ask("before", COST)).backend == "atomic"
    own_server.kill()
    bridged = [guard.reserve(make_ask(f"r{number}", COST)) for number in range(3)]
    assert {verdict.backend for verdict in bridged} == {EMERGENCY}
    assert guard.health() is Health.UNAVAILABLE
    with pytest.raises(ThrottleUnavailable) as raised:
        guard.reserve(make_ask("r3", 1))
    assert raised.value.retry_after_seconds >= 1
    assert told.named("emergency_exhausted")
    guard.settle(bridged[0], COST - 100)
    assert guard.health() is Health.DEGRADED
    guard.settle(bridged[0], 0)
    assert guard.reserve(make_ask("r4", 100)).backend == EMERGENCY
    with pytest.raises(ThrottleUnavailable):
        guard.reserve(make_ask("r5", 1))


def test_an_id_sent_again_in_an_emergency_is_paid_once(own_server, new_guard):
    guard = new_guard(emergency_nanousd=COST)
    own_server.kill()
    first = guard.reserve(make_ask("r0", COST))
    assert guard.reserve(make_ask("r0", COST)) == first


@pytest.mark.parametrize("case", [case for case in LIMITS_IN_ORDER if case.name in {"window", "team_ever"}])
def test_the_limits_hold_in_an_emergency_too(own_server, new_guard, case):
    guard = new_guard()
    own_server.kill()
    limits = case.set_to(COST)
    assert isinstance(guard.reserve(make_ask("r0", COST, limits)), Reservation)
    assert isinstance(guard.reserve(make_ask("r1", COST, limits)), Refusal)


def test_a_restart_refills_nothing_nor_does_a_second_outage(own_server, new_guard):
    own_server.kill()
    assert new_guard(emergency_nanousd=COST).reserve(make_ask("r0", COST)).backend == EMERGENCY
    own_server.start()
    restarted = new_guard(emergency_nanousd=COST)
    assert restarted.reserve(make_ask("r1", COST)).backend == "atomic"
    own_server.kill()
    with pytest.raises(ThrottleUnavailable):
        restarted.reserve(make_ask("r2", 1))


def test_closed_is_503_at_once_and_spends_nothing(own_server, new_guard, tmp_path):
    guard = new_guard(is_open=False)
    guard.reserve(make_ask("before", COST))
    own_server.kill()
    with pytest.raises(ThrottleUnavailable):
        guard.reserve(make_ask("r0", COST))
    assert guard.health() is Health.UNAVAILABLE
    assert not (tmp_path / "emergency").exists()


def test_before_the_first_contact_nobody_is_ready(own_server, new_guard):
    own_server.kill()
    guard = new_guard()
    assert guard.health() is Health.UNAVAILABLE
    guard.reserve(make_ask("r0", COST))
    assert guard.health() is Health.UNAVAILABLE


def test_settlements_wait_for_redis_and_are_booked_when_it_is_back(own_server, new_guard, books, told):
    guard = new_guard()
    made = [guard.reserve(make_ask(f"r{number}", COST)) for number in range(10)]
    own_server.kill()
    for reservation in made:
        guard.settle(reservation, 7)
    assert len(told.named("settle_postponed")) == 10
    assert not told.named("settled")
    own_server.start()
    back_at = SystemClock().monotonic_seconds()
    wait_for(lambda: len(told.named("settled")) == 10)
    assert SystemClock().monotonic_seconds() - back_at < 3, "the contract's time for the books to go on"
    assert {fields["outcome"] for fields in told.named("settled")} == {"settled"}
    assert books().spent("window") == books().spent("global_day") == 70
    assert books().use("window").pending_nanousd == 0


def test_what_an_emergency_cost_is_not_in_the_books(own_server, new_guard, books):
    guard = new_guard()
    own_server.kill()
    bridged = guard.reserve(make_ask("r0", COST))
    own_server.start()
    guard.settle(bridged, 7)
    assert books().spent("global_day") == 0


def test_a_crash_that_lost_the_reservation_books_it_late(own_server, look, new_guard, books, told, clock):
    guard = new_guard()
    made = guard.reserve(make_ask("r0", COST))
    own_server.kill()
    guard.settle(made, 7)
    for name in Path(own_server._directory).glob("appendonlydir/*"):
        name.unlink()
    own_server.start()
    wait_for(lambda: told.named("settled"))
    assert told.named("settled")[0]["outcome"] == "late"
    assert books().spent("window") == books().spent("day") == 7


def test_flapping_costs_no_more_than_one_budget(own_server, new_guard, clock):
    guard = new_guard(emergency_nanousd=5 * COST)
    emergencies = 0
    for number in range(4):
        own_server.kill()
        for attempt in range(3):
            try:
                emergencies += guard.reserve(make_ask(f"r{number}-{attempt}", COST)).backend == EMERGENCY
            except ThrottleUnavailable:
                continue
        own_server.start()
        clock.skip(REST_SECONDS + 0.01)
        assert guard.reserve(make_ask(f"back{number}", COST)).backend == "atomic"
    assert emergencies == 5


# --- our own doing is no outage


def test_an_exhausted_pool_is_busy_and_never_opens_the_guard(new_link, new_guard, tmp_path, told):
    link = new_link(pool_size=1, timeout_seconds=0.1)
    guard = new_guard(link)
    guard.reserve(make_ask("before", COST))
    held = link._client.connection_pool.get_connection()
    try:
        with pytest.raises(StoreBusy):
            link.run(lambda client: client.ping())
        with pytest.raises(ThrottleUnavailable):
            guard.reserve(make_ask("r0", COST))
    finally:
        link._client.connection_pool.release(held)
    assert not (tmp_path / "emergency").exists()
    assert guard.health() is Health.GOOD
    assert not told.named("store_lost")
    assert guard.reserve(make_ask("r0", COST)).backend == "atomic"


# --- a bug is bridged, and raises the alarm


@pytest.mark.parametrize("key", ["llm:open:global", "llm:budget:team_ever:forever:marketing"])
def test_a_key_of_the_wrong_kind_is_bridged_with_an_alarm(look, new_guard, told, key):
    look.rpush(key, "neither a number nor a sorted set")
    verdict = new_guard().reserve(make_ask("r0", COST, EVERY))
    assert verdict.backend == EMERGENCY
    assert [fields["is_bug"] for fields in told.named("check_failed")] == [True]
    assert "WRONGTYPE" in told.named("store_broken")[0]["error"]


def test_a_role_that_may_not_write_is_bridged_with_an_alarm(own_server, look, new_link, new_guard, told):
    look.acl_setuser("weak", enabled=True, passwords=["+geheim"], keys=["*"], commands=["+@all", "-evalsha", "-eval"])
    guard = new_guard(new_link(own_server.url.replace("redis://", "redis://weak:geheim@")))
    assert guard.reserve(make_ask("r0", COST)).backend == EMERGENCY
    assert told.named("store_broken")
    assert look.keys("llm:*") == []


def test_an_outage_is_no_bug(own_server, new_guard, told):
    own_server.kill()
    new_guard().reserve(make_ask("r0", COST))
    [failed] = told.named("check_failed")
    assert (failed["is_bug"], failed["backend"], failed["script"]) == (False, "atomic", "reserve.lua")
    assert failed["check_ms"] >= 0
    assert not told.named("store_broken")


def test_one_broken_key_does_not_hold_up_the_settlements_of_others(own_server, look, new_guard, told, clock):
    guard = new_guard()
    broken = guard.reserve(make_ask("broken", COST, identifier="unlucky"))
    sound = guard.reserve(make_ask("sound", COST, identifier="lucky"))
    [daily] = look.keys("llm:cost:daily:unlucky:*")
    look.set(daily, "garbage", ex=1_000)
    guard.settle(broken, 7)
    own_server.kill()
    guard.settle(sound, 7)
    own_server.start()
    wait_for(lambda: [fields["request_id"] for fields in told.named("settled")] == ["sound"])
    look.set(daily, COST, ex=1_000)
    wait_for(lambda: len(told.named("settled")) == 2)


def test_many_broken_keys_hold_nobody_up_and_are_all_booked_when_they_are_mended(own_server, look, new_guard, told):
    guard = new_guard()
    broken = [guard.reserve(make_ask(f"broken{number}", COST, identifier="unlucky")) for number in range(30)]
    sound = [guard.reserve(make_ask(f"sound{number}", COST, identifier="lucky")) for number in range(10)]
    [daily] = look.keys("llm:cost:daily:unlucky:*")
    booked = int(look.get(daily))
    look.set(daily, "garbage", ex=1_000)
    for reservation in broken:
        guard.settle(reservation, 7)
    own_server.kill()
    for reservation in sound:
        guard.settle(reservation, 7)
    own_server.start()
    back_at = SystemClock().monotonic_seconds()
    wait_for(lambda: len(told.named("settled")) == 10)
    assert SystemClock().monotonic_seconds() - back_at < 3, "the contract's time for the books to go on"
    alarms = len(told.named("store_broken"))
    look.set(daily, booked, ex=1_000)
    wait_for(lambda: len(told.named("settled")) == 40)
    assert len(told.named("store_broken")) - alarms <= 3, "one is tried at a time"


def test_postponed_settlements_are_done_side_by_side(own_server, new_link, new_guard, told):
    """Each round trip takes 20 ms, and 300 of them one after another would take six seconds."""
    far = new_link(before_each_send=lambda _packed: pause_seconds and threading.Event().wait(pause_seconds))
    pause_seconds = 0
    guard = new_guard(far)
    made = [guard.reserve(make_ask(f"r{number}", 10, identifier=f"who{number}")) for number in range(300)]
    own_server.kill()
    for reservation in made:
        guard.settle(reservation, 7)
    pause_seconds = 0.02
    own_server.start()
    back_at = SystemClock().monotonic_seconds()
    wait_for(lambda: len(told.named("settled")) == 300, 10)
    assert SystemClock().monotonic_seconds() - back_at < 3, "the contract's time for the books to go on"


class Stumbling(AtomicBackend):
    """A backend whose next settlements raise what stands in `errors`."""

    errors = ()

    def settle(self, reservation, actual_nanousd):
        if self.errors:
            error, *self.errors = self.errors
            raise error
        return super().settle(reservation, actual_nanousd)


def test_a_bug_in_a_waiting_settlement_stops_no_later_one(new_link, new_guard, told):
    link = new_link()
    backend = Stumbling(link)
    guard = new_guard(link, primary=backend)
    made = [guard.reserve(make_ask(f"r{number}", COST)) for number in range(2)]
    backend.errors = [StoreUnavailable("away"), KeyError("a bug")]
    guard.settle(made[0], 7)
    wait_for(lambda: told.named("settle_refused"))
    backend.errors = [StoreUnavailable("away")]
    guard.settle(made[1], 7)
    wait_for(lambda: [fields["request_id"] for fields in told.named("settled")] == ["r1"])


# --- the budget's file


def take_all(path, budget_nanousd, amount_nanousd, start, taken):
    budget = EmergencyBudget(Path(path), SystemClock())
    start.wait(30)
    while budget.take(amount_nanousd, budget_nanousd) is not None:
        taken.put(amount_nanousd)


def test_two_processes_share_one_budget(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    start, taken = spawn.Barrier(2), spawn.Queue()
    path = str(tmp_path / "emergency")
    takers = [spawn.Process(target=take_all, args=(path, 100, 7, start, taken)) for _ in range(2)]
    for taker in takers:
        taker.start()
    for taker in takers:
        taker.join(30)
    assert [taker.exitcode for taker in takers] == [0, 0]
    assert sum(taken.get(timeout=5) for _ in range(14)) == 98
    assert taken.empty()
    taken.close()
    taken.join_thread()
    assert EmergencyBudget(tmp_path / "emergency", SystemClock()).spent_nanousd() == 98


def spent_on_emergency(tmp_path):
    return EmergencyBudget(tmp_path / "emergency", SystemClock()).spent_nanousd()


def test_an_answer_that_runs_when_redis_goes_is_extended_on_the_emergency_budget(own_server, new_guard, told, tmp_path):
    guard = new_guard(emergency_nanousd=COST)
    made = guard.reserve(make_ask("r0", COST))
    own_server.kill()
    # There is no money for the slice, but for what it needs at least.
    longer = guard.extend(made, 3 * COST, SIX, at_least_nanousd=2 * COST)
    assert (longer.cost_nanousd, longer.backend) == (2 * COST, "atomic")
    assert spent_on_emergency(tmp_path) == COST
    assert guard.extend(longer, 3 * COST, SIX, at_least_nanousd=2 * COST + 1) is None
    [lent] = told.named("extended")
    assert (lent["backend"], lent["more_nanousd"]) == (EMERGENCY, COST)
    assert [fields["backend"] for fields in told.named("extension_refused")] == [EMERGENCY]


def test_what_was_lent_comes_back_when_the_books_have_it(own_server, new_guard, books, told, tmp_path):
    guard = new_guard(emergency_nanousd=COST)
    made = guard.reserve(make_ask("r0", COST))
    own_server.kill()
    longer = guard.extend(made, 2 * COST, SIX, at_least_nanousd=2 * COST)
    guard.settle(longer, 2 * COST - 5)
    assert spent_on_emergency(tmp_path) == COST
    own_server.start()
    wait_for(lambda: told.named("settled"))
    wait_for(lambda: spent_on_emergency(tmp_path) == 0)
    assert books().spent("window") == books().spent("global_day") == 2 * COST - 5
    assert [fields["overrun_nanousd"] for fields in told.named("settled")] == [0]


def test_what_was_lent_stays_spent_where_the_store_knows_no_more_of_it(own_server, look, new_guard, told, tmp_path):
    """After an outage of more than an hour its record is gone: what it stays booked with is without the loan."""
    guard = new_guard(emergency_nanousd=COST)
    made = guard.reserve(make_ask("r0", COST))
    own_server.kill()
    longer = guard.extend(made, 2 * COST, SIX, at_least_nanousd=2 * COST)
    own_server.start()
    look.delete("llm:reservation:r0")
    guard.settle(replace(longer, made_at_us=made.made_at_us - 2 * 3_600_000_000), 2 * COST)
    wait_for(lambda: told.named("settled"))
    assert [fields["outcome"] for fields in told.named("settled")] == ["expired"]
    guard.close()
    assert spent_on_emergency(tmp_path) == COST


def test_closed_lends_nothing_to_an_answer_that_runs(own_server, new_guard, tmp_path):
    guard = new_guard(is_open=False)
    made = guard.reserve(make_ask("r0", COST))
    own_server.kill()
    assert guard.extend(made, 2 * COST, SIX, at_least_nanousd=2 * COST) is None
    assert not (tmp_path / "emergency").exists()


def test_an_answer_of_the_outage_itself_is_extended_and_released(own_server, new_guard, told, tmp_path):
    guard = new_guard(emergency_nanousd=3 * COST)
    own_server.kill()
    bridged = guard.reserve(make_ask("r0", COST))
    longer = guard.extend(bridged, 3 * COST, SIX, at_least_nanousd=2 * COST)
    assert (longer.cost_nanousd, longer.backend) == (3 * COST, EMERGENCY)
    assert spent_on_emergency(tmp_path) == 3 * COST
    guard.release(longer)
    assert spent_on_emergency(tmp_path) == 0
    assert [fields["outcome"] for fields in told.named("settled")] == ["released"]


def test_an_answer_in_an_outage_is_lent_slices_and_told_once(own_server, new_guard, told, tmp_path):
    guard = new_guard()
    made = guard.reserve(make_ask("r0", COST))
    own_server.kill()
    for number in range(2, 12):
        made = guard.extend(made, number * COST, SIX, at_least_nanousd=made.cost_nanousd + 1)
        assert made.cost_nanousd == number * COST
    assert len(told.named("extension_failed")) == 1
    assert spent_on_emergency(tmp_path) == 10 * COST
    assert list(guard._lending.remove_loan(made).values()) == [10 * COST]


@pytest.mark.parametrize(
    ("actual", "left_in_the_second_hour"), [(0, 0), (700, 0), (1_000, 0), (1_400, 400), (1_900, 900), (2_500, 1_500)]
)
def test_an_emergency_answer_over_the_turn_of_an_hour_gives_back_only_what_it_did_not_use(
    tmp_path, actual, left_in_the_second_hour
):
    clock = ManualClock()
    budget = EmergencyBudget(tmp_path / "emergency", clock)
    away = MemoryHarness().backend
    away.reserve = lambda _: (_ for _ in ()).throw(StoreUnavailable("away"))
    guard = Guard(
        away,
        MemoryBackend(clock),
        link=None,
        emergency=budget,
        clock=clock,
        observer=lambda _: None,
        policy=lambda: FailurePolicy(is_open=True, emergency_nanousd=1_000),
    )
    bridged = guard.reserve(make_ask("r0", 1_000))
    clock.us += 3_600 * US
    longer = guard.extend(bridged, 1_900, SIX, at_least_nanousd=1_900)
    guard.settle(longer, actual)
    assert budget.spent_nanousd() == left_in_the_second_hour
    guard.close()
