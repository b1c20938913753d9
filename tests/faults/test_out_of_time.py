"""A caller whose time ends between two questions to Redis: what others spent stays booked, whatever was half done."""

from contextlib import suppress

import pytest

from backends.conformance.cases import COST, make_ask
from backends.errors import StoreBusy, ThrottleUnavailable
from backends.guard import Health
from backends.keys import SETTINGS_KEY
from backends.store.link import Link
from backends.strategies import script_words
from backends.strategies.atomic import AtomicBackend
from backends.strategies.legacy import LegacyBackend
from tests.faults.wire import wait_for

PATIENCE_SECONDS = 100.0


class Tiring(Link):
    """The time of its caller is over before question `last`, counted from 0."""

    last = 10**9

    def run(self, command):
        if self.last == 0:
            self._time_left.seconds = 0.0
        self.last -= 1
        return super().run(command)


class Late(Link):
    """Redis does what it is asked, and its next answer comes when the time of its caller is over."""

    is_late = False

    def run(self, command):
        answer = super().run(command)
        if self.is_late:
            self.is_late = False
            raise StoreBusy("Redis did not answer in the time that was left", maybe_done=True)
        return answer


@pytest.fixture
def link(own_server, clock, told):
    link = Tiring(own_server.url, clock=clock, observer=told)
    yield link
    link.close()


def totals(look):
    """What the hours and days hold."""
    return {key: int(look.get(key)) for key in look.keys("llm:*:daily:*") + look.keys("llm:*:hourly:*")}


@pytest.mark.parametrize("last", range(28))
def test_half_of_a_charge_is_never_taken_back_as_a_whole(new_guard, link, clock, look, last):
    backend = LegacyBackend(link, clock)
    guard = new_guard(link, primary=backend)
    guard.reserve(make_ask("first", COST))
    spent = totals(look)
    assert set(spent.values()) == {COST}
    link.last = last
    verdict = None
    with link.within(PATIENCE_SECONDS), suppress(ThrottleUnavailable):
        verdict = guard.reserve(make_ask("second", COST))
    wait_for(lambda: guard._postponed._threads == 0)
    left = totals(look)
    assert all(left[key] >= held for key, held in spent.items())
    if verdict is not None:
        assert (verdict.backend, set(left.values())) == ("legacy", {2 * COST})


def test_an_answer_that_ends_after_its_request_has_used_up_its_time_is_booked_at_once(new_guard, link, clock, told):
    guard = new_guard(link)
    with link.within(PATIENCE_SECONDS):
        reservation = guard.reserve(make_ask("first", COST))
        link.run(lambda _: clock.skip(PATIENCE_SECONDS))
        guard.settle(reservation, 1)
    assert told.named("settle_postponed") == []
    assert guard.books(reservation.budgets).spent("window") == 1


def test_nothing_runs_after_its_caller_gave_up(own_server, new_link, clock, monkeypatch):
    """The deadline that goes into the script is what is left of the caller's time."""
    backend, reserve_call, left_us = AtomicBackend(link := new_link()), script_words.reserve_call, []
    backend.settle(backend.reserve(make_ask("first", COST)), 0)
    link.run(lambda client: client.get(SETTINGS_KEY))

    def noted(ask, now):
        left_us.append(now.deadline_us - now.us)
        return reserve_call(ask, now)

    monkeypatch.setattr(script_words, "reserve_call", noted)
    with link.within(1.0):
        link.run(lambda _: clock.skip(0.9))
        backend.reserve(make_ask("second", COST))
    assert 0 < left_us[0] <= 100_000


def test_only_waits_for_redis_count(new_guard, new_link, clock):
    """A client that takes its time over its body has not made Redis slow."""
    guard = new_guard(link := new_link())
    with link.within(1.0):
        clock.skip(1_000)
        assert guard.reserve(make_ask("slow upload", COST)).backend == "atomic"


def test_a_caller_without_time_is_told_busy_and_never_admitted_without_the_books(new_guard, new_link, clock, told):
    guard = new_guard(link := new_link())
    guard.reserve(make_ask("first", COST))
    with link.within(1.0):
        link.run(lambda _: clock.skip(1.0))
        with pytest.raises(StoreBusy):
            link.run(lambda client: client.ping())
        with pytest.raises(ThrottleUnavailable):
            guard.reserve(make_ask("second", COST))
    assert link.is_up
    assert guard.health() is Health.GOOD
    assert told.named("reserved")[-1]["request_id"] == "first"


def test_what_was_charged_to_a_caller_who_was_told_busy_is_given_back(own_server, new_guard, clock, told, look):
    link = Late(own_server.url, clock=clock, observer=told)
    guard = new_guard(link)
    guard.release(guard.reserve(make_ask("early", COST)))
    link.is_late = True
    with pytest.raises(ThrottleUnavailable):
        guard.reserve(make_ask("late", COST))
    wait_for(lambda: guard._postponed._threads == 0)
    link.close()
    assert look.get("llm:reservation:late").startswith(b"released 0 ")
    assert set(totals(look).values()) == {0}
