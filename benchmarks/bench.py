"""What every benchmark runs on: a server of its own, links to it, and asks within every limit."""

import random
from collections.abc import Sequence
from itertools import count
from typing import Any

import redis

from backends import Ask, Budget, Calendar, Link, Scope, Sliding, SystemClock
from flaskapp.lab.prefilled_books import leave_as_after
from flaskapp.lab.race import AMPLE_NANOUSD, COST_NANOUSD, PENDING_SECONDS, window_alone
from flaskapp.lab.wire import Wire
from flaskapp.ops.running_redis import HOST

IN_WINDOW = (1, 10, 1_000_000)


class Bench:
    """A server, links to it, and as many asks as a case needs."""

    def __init__(self, port: int, pid: int, seed: int, turns: int) -> None:
        self.port = port
        self.pid = pid
        self.turns = turns
        self.random = random.Random(seed)
        self.raw: Any = redis.Redis(HOST, port)
        self.no_op = self.raw.script_load("return 0")
        self.own_link = self.link()
        self._numbers = count()

    def close(self) -> None:
        """Give back the connections."""
        self.own_link.close()
        self.raw.close()

    def link(self, port: int | None = None, wire: Wire | None = None) -> Link:
        """As the service has it; to another port of this machine where one is named."""
        return Link(f"redis://{HOST}:{port or self.port}/0", clock=SystemClock(), before_each_send=wire)

    def ask(self, who: str, further: Sequence[Budget] = ()) -> Ask:
        """One more request, within every limit; its id is as long as the service's are."""
        return Ask(f"{next(self._numbers):032x}", COST_NANOUSD, (*the_six(who), *further), PENDING_SECONDS)

    def leave_as_after(self, requests: int, who: str, further: Sequence[Budget] = ()) -> None:
        """Write what `requests` reservations, spread over the window, would have left in the store."""
        leave_as_after(self.own_link, (*the_six(who), *further), requests, self.random)


def the_six(who: str) -> tuple[Budget, ...]:
    """The built-in budgets of an identifier, in a network of its own."""
    return window_alone(AMPLE_NANOUSD, who, network=f"net-{who}")


def six_further(who: str) -> tuple[Budget, ...]:
    """Budgets as an operator may add them to the six."""
    return (
        Budget("model_month", "gpt-5", Calendar("month"), AMPLE_NANOUSD, Scope.MODEL),
        Budget("key_day", f"key-{who}", Calendar("day"), AMPLE_NANOUSD, Scope.KEY),
        Budget("team_week", f"team-{who}", Calendar("week"), AMPLE_NANOUSD, Scope.TEAM),
        Budget("key_hour", f"key-{who}", Sliding(3_600), AMPLE_NANOUSD, Scope.KEY),
        Budget("wide_day", "198.51.100.0/24", Calendar("day"), AMPLE_NANOUSD, Scope.WIDE_NETWORK),
        Budget("monthly", who, Calendar("month"), AMPLE_NANOUSD, Scope.IDENTIFIER),
    )
