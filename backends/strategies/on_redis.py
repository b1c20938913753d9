"""What the strategies on Redis share."""

# ruff: noqa: D102 (what the verbs do is said once, at `contract.Backend`)

from collections.abc import Sequence
from typing import Any, Self

from backends.budgets import Budget
from backends.clock import Clock
from backends.contract import Books
from backends.store import Words
from backends.store.connections import conversation, transaction
from backends.store.link import Client, Link
from backends.strategies import verbs
from backends.strategies.in_python import PythonStrategy
from backends.strategies.verbs import Read, Replies, Write


class PythonStrategyOnRedis(PythonStrategy):
    """A strategy that decides in Python over the books in a Redis.

    Args:
        link: the Redis that holds the books.
        clock: the host's clock; hosts whose clocks differ disagree about the day.
    """

    def __init__(self, link: Link, clock: Clock) -> None:
        super().__init__(clock)
        self._link = link

    @classmethod
    def open(cls, link: Link, clock: Clock, *, decide_by_clock: bool = False) -> Self:
        """See `backends.open_backend`; this strategy always decides by the host's clock."""
        _ = decide_by_clock
        return cls(link, clock)

    def books(self, budgets: tuple[Budget, ...]) -> Books:
        return read_books(self._link, self._clock.now_us(), budgets)

    def close(self) -> None:
        self._link.close()


def read_books(link: Link, now_us: int, budgets: tuple[Budget, ...]) -> Books:
    """What is booked at `now_us` (unix time, microseconds): one round trip, all of it of one moment."""

    def answer(step: Read | Write) -> Replies:
        return Read(step.commands).replies(link.run(lambda client: in_one_step(client, step.commands)))

    return verbs.perform(verbs.books(budgets, now_us), answer)


def in_one_step(client: Client, commands: Sequence[Words]) -> list[Any]:
    """The replies to commands that Redis does in one transaction."""
    with conversation(client) as send:
        # Nothing is watched, so it is always done.
        return transaction(send, commands) or []
