"""The legacy strategy: ask Redis in many calls, decide here, write in many verbs. It loses the race, on purpose.

Its weaknesses, all of which stay:

* Between the last read and the first write others read the same totals: N callers at once all get in, with room for k.
* A crash between two writes, or the end of its caller's time, leaves a part of the charge, which stays booked; a lost
  reply, repeated, may charge twice.
* It trusts the host's clock for periods and buckets, so hosts whose clocks differ disagree about the day.
* It has no deadline: a call that a frozen Redis answers late still charges.
* An idempotency key is looked up, and remembered later: two requests with one key at once are both admitted.
* An extension is checked and charged in many calls, like the first reservation.

What is asked, decided and written is `calls.py`: keys, units, limits and answers are those of the atomic strategy;
alone, the two cannot be told apart but by the number of round trips.
"""

# ruff: noqa: D102 (what the verbs do is said once, at `contract.Backend`)

from collections.abc import Callable
from functools import cache
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
from backends.store.connections import execute
from backends.store.link import Link
from backends.strategies import verbs

T = TypeVar("T")


class LegacyBackend:
    """Check, then charge: correct when alone, racy when not.

    Args:
        link: the Redis that holds the books.
        clock: the host's clock.
        between_check_and_record: called where the race lives, so that a test or `flask race` can hold callers there;
            an attribute too (`flaskapp/lab/race.py` sets it, since `open_backend` knows no strategy's own arguments).
    """

    name = "legacy"
    promises_atomicity = False
    reserve_script = "legacy"
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
        """Each call by itself: a look when it is needed, and the writes one after the other."""
        if isinstance(step, verbs.Look):
            return cache(self._call)
        if step.is_charge:
            self.between_check_and_record()
        return [self._call(words) for words in step.commands]

    def _call(self, words: Words) -> Any:
        return self._link.run(lambda client: execute(client, words))


def open_legacy(link: Link, clock: Clock, *, decide_by_clock: bool = False) -> LegacyBackend:
    """Made by `backends.open_backend`; always decides by the host's clock (see the head of this file)."""
    _ = decide_by_clock
    return LegacyBackend(link, clock)
