"""The multi strategy: the legacy way inside MULTI/EXEC. It loses the race too, on purpose.

What it looks at it sees as of one moment, and what it writes is written in one step: a crash leaves no half of a
charge, and nobody sees one. But a transaction decides nothing. The decision is made here, between the two, and there
others look at the same totals: N callers at once all get in, with room for k. Transactions make each half whole; what
is missing is between the halves. The other weaknesses are those of `legacy.py`: the host's clock, no deadline, and two
requests with one idempotency key at once are both admitted.

What is asked, decided and written is `calls.py`, as for legacy: three round trips at most instead of more than twenty.
"""

# ruff: noqa: D102 (what the verbs do is said once, at `contract.Backend`)

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from backends.clock import Clock
from backends.contract import (
    Ask,
    Books,
    Duplicate,
    Idempotency,
    Limits,
    Refusal,
    Reservation,
    Settlement,
    Verdict,
)
from backends.ledger.books import read_books
from backends.store import Words
from backends.store.connections import conversation, transaction
from backends.store.link import Client, Link
from backends.strategies import verbs

T = TypeVar("T")


class MultiBackend:
    """Check in one transaction, charge in another: correct when alone, racy when not.

    Args:
        link: the Redis that holds the books.
        clock: the host's clock.
        between_check_and_record: called where the race lives, so that a test or `flask race` can hold callers there;
            an attribute too (`flaskapp/lab/race.py` sets it, since `open_backend` knows no strategy's own arguments).
    """

    name = "multi"
    promises_atomicity = False
    reserve_script = "multi"
    increments_commute = True
    """No decision rests on the reply to an increment (told to `flaskapp/lab/explorer.py`)."""

    def __init__(self, link: Link, clock: Clock, between_check_and_record: Callable[[], None] = lambda: None) -> None:
        self._link = link
        self._clock = clock
        self.between_check_and_record = between_check_and_record

    def reserve(self, ask: Ask) -> Verdict:
        return self._hold(verbs.reserve(ask, self.name, self._clock.now_us()))

    def find(self, ask: Ask) -> Reservation | None:
        return self._hold(verbs.find(ask, self.name))

    def find_duplicate(self, idempotency: Idempotency) -> Duplicate | None:
        return self._hold(verbs.find_duplicate(idempotency, self._clock.now_us()))

    def extend(
        self, reservation: Reservation, to_nanousd: int, limits: Limits, *, at_least_nanousd: int | None = None
    ) -> Reservation | Refusal:
        at_least = to_nanousd if at_least_nanousd is None else at_least_nanousd
        return self._hold(verbs.extend(reservation, to_nanousd, at_least, limits, self._clock.now_us()))

    def settle(self, reservation: Reservation, actual_nanousd: int) -> Settlement:
        return self._hold(verbs.end(reservation, "settled", actual_nanousd, self._clock.now_us()))

    def release(self, reservation: Reservation) -> Settlement:
        return self._hold(verbs.end(reservation, "released", 0, self._clock.now_us()))

    def books(self, identifier: str, network: str, window_seconds: int) -> Books:
        return read_books(self._link, self._clock, identifier, network, window_seconds)

    def close(self) -> None:
        self._link.close()

    def _hold(self, talk: verbs.Talk[T]) -> T:
        return verbs.held(talk, self._answer)

    def _answer(self, step: verbs.Look | verbs.Write) -> Any:
        """Each step in a transaction of its own."""
        if isinstance(step, verbs.Look):
            return step.seen(self._transaction(step.commands))
        if step.is_charge:
            self.between_check_and_record()
        return self._transaction(step.commands)

    def _transaction(self, commands: Sequence[Words]) -> Sequence[Any]:
        return self._link.run(lambda client: _in_one(client, commands))


def _in_one(client: Client, commands: Sequence[Words]) -> Sequence[Any]:
    with conversation(client) as say:
        # Nothing is watched, so it is always done.
        return transaction(say, commands) or ()


def open_multi(link: Link, clock: Clock, *, decide_by_clock: bool = False) -> MultiBackend:
    """Made by `backends.open_backend`; always decides by the host's clock (see the head of this file)."""
    _ = decide_by_clock
    return MultiBackend(link, clock)
