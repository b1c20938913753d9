"""The search on small programs, against every single order of them."""

import random

import pytest

from flaskapp.lab.schedule_search import (
    ADD,
    PUT,
    READ,
    Schedule,
    _History,
    commute,
    follow,
    multinomial,
    search,
    switches,
)


class Program:
    """Callers whose turns touch what is written down, whatever the others did."""

    def __init__(self, turns):
        self.turns = turns
        self.done = [0] * len(turns)
        self.abandoned = False

    def pending(self):
        left = enumerate(its[done:] for its, done in zip(self.turns, self.done, strict=True))
        return {caller: its[0] for caller, its in left if its}

    def take(self, caller):
        self.done[caller] += 1
        return self.turns[caller][self.done[caller] - 1]

    def abandon(self):
        self.abandoned = True


class Racy(Program):
    """Two who look at a number and add one if it is still nought: what they do depends on what they see."""

    def __init__(self):
        super().__init__([[{"n": READ}], [{"n": READ}]])
        self.number = 0

    def take(self, caller):
        touched = super().take(caller)
        if touched == {"n": READ}:
            if self.number == 0:
                self.turns[caller] = [*self.turns[caller], {"n": ADD}]
        else:
            self.number += 1
        return touched


def every_order(turns):
    """The names of all kinds of orders, and how many orders there are."""
    names, count = set(), 0
    todo = [()]
    while todo:
        callers = todo.pop()
        program, history = Program(turns), _History()
        for caller in callers:
            history.add(caller, program.take(caller))
        left = program.pending()
        todo += [(*callers, caller) for caller in left]
        if not left:
            count += 1
            names.add(history.schedule().lexical())
    return names, count


def some_turns(luck):
    callers, most = luck.choice([(2, 4), (3, 3)])
    hows = [READ, ADD, PUT, "the same"]

    def turn():
        return {luck.choice("xyz"): luck.choice(hows) for _ in range(luck.randint(0, 2))}

    return [[turn() for _ in range(luck.randint(1, most))] for _ in range(callers)]


@pytest.mark.parametrize("seed", range(60))
def test_each_kind_of_order_is_run_once_and_stands_for_its_number_of_orders(seed):
    turns = some_turns(random.Random(seed))
    names, count = every_order(turns)
    found = [order for order, _ in search(lambda: Program(turns))]
    assert sorted(order.lexical() for order in found) == sorted(names)
    assert sum(order.count() for order in found) == count == multinomial(list(map(len, turns)))


@pytest.mark.parametrize("seed", range(60))
def test_the_calmest_is_of_its_kind_and_changes_least(seed):
    turns = some_turns(random.Random(seed))
    for order, _ in search(lambda: Program(turns)):
        calmest = order.calmest()
        program, history = Program(turns), _History()
        for caller in calmest:
            history.add(caller, program.take(caller))
        assert history.schedule().lexical() == order.lexical()
        assert switches(calmest) <= switches(order.callers)


def test_what_callers_do_may_depend_on_what_they_see():
    ends = sorted(run.number for _, run in search(Racy))
    assert ends == [1, 1, 2]


def test_an_order_can_be_followed_and_a_wrong_one_is_noticed():
    orders = {run.number: order for order, run in search(Racy)}
    run = Racy()
    follow(run, orders[2].callers)
    assert run.number == 2
    with pytest.raises(RuntimeError, match="not done"):
        follow(Racy(), (0, 1))
    with pytest.raises(RuntimeError, match="no turn left"):
        follow(Racy(), (0, 0, 1, 1))


def test_callers_that_do_something_else_each_time_are_noticed():
    programs = [Program([[{"x": PUT}], [{"x": PUT}]]), Program([[{"x": PUT}], []])]
    with pytest.raises(RuntimeError, match="no turn left"):
        list(search(lambda: programs.pop(0)))


def test_what_commutes():
    assert commute({"x": READ}, {"x": READ})
    assert commute({"x": ADD}, {"x": ADD})
    assert commute({"x": "SET x 1"}, {"x": "SET x 1"})
    assert commute({"x": PUT}, {"y": PUT})
    for one, other in ((READ, ADD), (ADD, PUT), (PUT, PUT), ("SET x 1", "SET x 2"), (READ, "SET x 1")):
        assert not commute({"x": one}, {"x": other})


def test_a_name_is_of_the_kind_and_not_of_the_run():
    free = ((0, 0), (0, 0))
    assert Schedule((0, 1), free).lexical() == Schedule((1, 0), free).lexical() == (0, 1)
    assert Schedule((0, 1), ((0, 0), (1, 0))).lexical() != Schedule((1, 0), ((0, 0), (0, 1))).lexical()
