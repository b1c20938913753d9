"""Strategies that take turns on one set of books: each is told what the buckets hold, whoever changed them last.

`atomic` keeps hints of what its windows came to. The others decide in Python by the clocks of their hosts, which are
not exactly Redis' own, so they may change any bucket at any time.
"""

import random
from datetime import UTC, datetime

import pytest

from backends import Budget, Calendar, Forever, Reason, Refusal, Reservation, Scope, Share, Sliding, open_backend
from backends.clock import SystemClock
from backends.conformance.cases import NETWORK, ROOMY, WHO, make_ask
from backends.conformance.harness import ManualClock
from backends.errors import ReservationConflict
from backends.store.link import Link

US = 1_000_000
MIDNIGHT_US = int(datetime(2026, 3, 15, tzinfo=UTC).timestamp()) * US
STRATEGIES = ("atomic", "watch", "multi", "legacy")
BEHIND_US = {"atomic": 0, "watch": 5_000, "multi": -3_000_000, "legacy": 31_000_000}
"""By how much the clock of each is behind Redis'."""
FURTHER = (
    Budget("minute", WHO, Sliding(60), None),
    Budget("hour", "web", Sliding(3_600), None, Scope.KEY),
    Budget("long", "all", Sliding(90_000), None, Scope.GLOBAL),
    Budget("day", "web", Calendar("day"), None, Scope.KEY)._replace(name="key_day"),
    Budget("ever", "web", Forever(), None, Scope.KEY),
)
LISTS = (ROOMY.budgets(WHO, NETWORK), (*ROOMY.budgets(WHO, NETWORK), *FURTHER), FURTHER[:3], FURTHER[1:])


class Fleet:
    """One backend of each kind, on one database."""

    def __init__(self, url, behind_us):
        self.link = Link(url, clock=SystemClock())
        self.link.run(lambda client: client.flushdb())
        self.clocks = {name: ManualClock() for name in STRATEGIES}
        self.behind_us = behind_us
        self.backends = {
            name: open_backend(name, self.link, clock, decide_by_clock=True) for name, clock in self.clocks.items()
        }
        self.set_to(MIDNIGHT_US)

    def set_to(self, us):
        self.us = us
        for name, clock in self.clocks.items():
            clock.us = us - self.behind_us[name]

    def pass_us(self, us):
        self.set_to(self.us + us)

    def held(self, budgets):
        """What the totals and the buckets hold: no hint is read for that."""
        return tuple(use.spent_nanousd for use in self.backends["atomic"].books(budgets).uses)


@pytest.fixture
def fleets(redis_url):
    made = []

    def make(behind_us=BEHIND_US):
        made.append(Fleet(redis_url, behind_us))
        return made[-1]

    yield make
    for fleet in made:
        fleet.link.close()


def is_told_what_is_held(fleet, budgets, rid):
    """A new reservation of `atomic` is told what was held, and its own nano-dollar."""
    before = fleet.held(budgets)
    made = fleet.backends["atomic"].reserve(make_ask(rid, 1, budgets=budgets))
    assert isinstance(made, Reservation)
    assert made.spent_nanousd == tuple(nanousd + 1 for nanousd in before)
    return made


@pytest.mark.parametrize("behind_us", [dict.fromkeys(STRATEGIES, 0), BEHIND_US], ids=["one clock", "many clocks"])
@pytest.mark.parametrize("seed", range(4))
def test_in_any_order_across_buckets_and_midnight_what_is_told_is_what_is_held(fleets, seed, behind_us):
    fleet, chance = fleets(behind_us), random.Random(seed)
    fleet.set_to(MIDNIGHT_US - 400 * US)
    open_ones = []
    for number in range(250):
        fleet.pass_us(chance.choice((0, 0, 1, US, 2 * US, 9 * US, 40 * US)))
        backend, budgets = fleet.backends[chance.choice(STRATEGIES)], chance.choice(LISTS)
        open_ones.append(backend.reserve(make_ask(f"r{number}", chance.randrange(1, 99), budgets=budgets)))
        if chance.random() < 0.5:
            made = open_ones.pop(chance.randrange(len(open_ones)))
            other = fleet.backends[chance.choice(STRATEGIES)]
            try:
                more = other.extend(made, made.cost_nanousd + chance.randrange(9), made.budgets)
                other.settle(more, chance.choice((0, 1, more.cost_nanousd, more.cost_nanousd + 5)))
            except ReservationConflict:
                other.release(made)
        # Twice: the first leaves the hints that the second believes.
        is_told_what_is_held(fleet, LISTS[1], f"a{number}")
        assert len(fleet.link.run(lambda client: client.keys("llm:running:*"))) == 5
        is_told_what_is_held(fleet, LISTS[1], f"b{number}")


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("seconds", [0, 1, 30, 61, 180])
def test_each_change_of_each_strategy_counts_at_once(fleets, name, seconds):
    fleet, budgets = fleets(dict.fromkeys(STRATEGIES, 0)), LISTS[1]
    other, made = fleet.backends[name], fleet.backends["atomic"].reserve(make_ask("first", 100, budgets=budgets))
    fleet.pass_us(seconds * US)
    fleet.clocks[name].us = MIDNIGHT_US
    steps = {
        "reserve": lambda: other.reserve(make_ask("other", 30, budgets=budgets)),
        "extend": lambda: other.extend(made, 150, budgets),
        "settle": lambda: other.settle(made, 170),
        "reserve again": lambda: other.reserve(make_ask("another", 3, budgets=budgets)),
    }
    for step, do in steps.items():
        is_told_what_is_held(fleet, budgets, f"before {step}")
        if (name, step, seconds) == ("atomic", "extend", 180):
            continue  # it has expired by Redis' time
        do()
        is_told_what_is_held(fleet, budgets, f"after {step}")


@pytest.mark.parametrize("name", ["watch", "multi", "legacy"])
@pytest.mark.parametrize("seconds", [1, 31])
def test_what_another_strategy_charges_to_an_earlier_bucket_is_in_the_limit(fleets, name, seconds):
    """Its clock is behind: `atomic` has begun a bucket that is later than the one it charges."""
    fleet = fleets(dict.fromkeys(STRATEGIES, 0) | {name: seconds * US})
    limited = FURTHER[1]._replace(limit_nanousd=100, period=Sliding(600))
    fleet.set_to(MIDNIGHT_US)
    atomic, other = fleet.backends["atomic"], fleet.backends[name]
    other.reserve(make_ask("first", 10, budgets=(limited,)))
    atomic.reserve(make_ask("second", 10, budgets=(limited,)))
    other.reserve(make_ask("third", 50, budgets=(limited,)))
    assert isinstance(atomic.reserve(make_ask("fourth", 31, budgets=(limited,))), Refusal)
    assert isinstance(atomic.reserve(make_ask("fifth", 30, budgets=(limited,))), Reservation)


def test_a_window_and_a_day_at_midnight(fleets):
    """The day begins anew and the window does not, whoever has charged them."""
    fleet, budgets = fleets(dict.fromkeys(STRATEGIES, 0)), LISTS[1]
    fleet.set_to(MIDNIGHT_US - 1)
    for number, name in enumerate(STRATEGIES):
        fleet.backends[name].reserve(make_ask(f"r{number}", 10, budgets=budgets))
    fleet.pass_us(1)
    made = is_told_what_is_held(fleet, budgets, "today")
    its = dict(zip((budget.name for budget in budgets), made.spent_nanousd, strict=True))
    windows = {budget.name for budget in budgets if isinstance(budget.period, Sliding)} | {"ever"}
    assert its == {name: 41 if name in windows else 1 for name in its}


@pytest.mark.parametrize("behind_us", [dict.fromkeys(STRATEGIES, 0), {**dict.fromkeys(STRATEGIES, 0), "legacy": US}])
@pytest.mark.parametrize("seed", range(4))
def test_a_network_has_one_share_whoever_decides(fleets, seed, behind_us):
    """Each hour and day its own, and of two networks no more than a quarter and a quarter of what that leaves."""
    fleet, chance = fleets(behind_us), random.Random(seed)
    hour, day = Calendar("hour"), Calendar("day")
    everybody = (
        Budget("all_hour", "all", hour, 1_000, Scope.GLOBAL),
        Budget("all_day", "all", day, 100_000, Scope.GLOBAL),
    )
    of_hour, of_day = Share("all_hour", 250_000), Share("all_day", 250_000)

    def budgets(network):
        return (
            *everybody,
            Budget("its_hour", network, hour, None, Scope.NETWORK, share=of_hour),
            Budget("its_day", network, day, None, Scope.NETWORK, share=of_day),
        )

    for moment_seconds, of_this_day in ((-4_000, 0), (2, 0), (3_602, 250)):
        fleet.set_to(MIDNIGHT_US + moment_seconds * US)
        assert fleet.held(budgets("a")) == (0, of_this_day and 437, 0, of_this_day)
        for network, share in (("a", 250), ("b", 187)):
            for number in range(30):
                backend = fleet.backends[chance.choice(STRATEGIES)]
                ask = make_ask(f"{fleet.us}-{network}-{number}", chance.randrange(40, 99), budgets=budgets(network))
                verdict = backend.reserve(ask)
                assert isinstance(verdict, Reservation) or verdict.reason is Reason.NETWORK_SHARE
                if isinstance(verdict, Reservation):
                    other = fleet.backends[chance.choice(STRATEGIES)]
                    other.settle(verdict, chance.choice((0, 30, verdict.cost_nanousd)))
            for number, name in enumerate(STRATEGIES):
                left = share - fleet.held(budgets(network))[2]
                over = make_ask(f"{fleet.us}-{network}-over-{number}", left + 1, budgets=budgets(network))
                assert isinstance(fleet.backends[name].reserve(over), Refusal)
            last = make_ask(f"{fleet.us}-{network}-last", left, budgets=budgets(network))
            assert left == 0 or isinstance(fleet.backends[chance.choice(STRATEGIES)].reserve(last), Reservation)
            assert fleet.held(budgets(network))[2] == share
