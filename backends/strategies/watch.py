"""The watch strategy: the legacy way, tied together by WATCH. It keeps the promise, and pays for it by trying again.

WATCH names every key that the decision rests on, before it is looked at. EXEC is then done only if none of them has
been changed since; else nothing is done, and all begins anew. So what is written rests on what still holds, and what is
answered was true at one moment: a refusal, which may have nothing to write, is confirmed by an EXEC of nothing.

It is safe, and it is lonely: of N callers who looked at the same moment one gets through, and the others have worked
for nothing (`retries` counts how often). Each try fetches every bucket of every ring, only to decide what a script
decides where they lie. After `TRIES` it gives up with `StoreBusy`.

It trusts the host's clock for periods and buckets, as legacy does. What is asked, decided and written is `calls.py`.
"""

# ruff: noqa: D102 (what the verbs do is said once, at `contract.Backend`)

import threading
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
from backends.errors import StoreBusy
from backends.ledger.books import read_books
from backends.store import Words
from backends.store.connections import Send, conversation, transaction
from backends.store.link import Client, Link
from backends.strategies import verbs

T = TypeVar("T")
TRIES = 256


class WatchBackend:
    """Check and charge as one, or try again: not a nano-dollar over any limit, under any concurrency.

    Args:
        link: the Redis that holds the books.
        clock: the host's clock.
        tries: so often at most, before it is too busy.
    """

    name = "watch"
    promises_atomicity = True
    reserve_script = "watch"
    increments_commute = True
    """No decision rests on the reply to an increment (told to `flaskapp/lab/explorer.py`)."""

    def __init__(self, link: Link, clock: Clock, tries: int = TRIES) -> None:
        self._link = link
        self._clock = clock
        self._tries = tries
        self._lock = threading.Lock()
        self.retries = 0

    def reserve(self, ask: Ask) -> Verdict:
        return self._hold(lambda now_us: verbs.reserve(ask, self.name, now_us))

    def find(self, ask: Ask) -> Reservation | None:
        return self._hold(lambda _: verbs.find(ask, self.name))

    def find_duplicate(self, idempotency: Idempotency) -> Duplicate | None:
        return self._hold(lambda now_us: verbs.find_duplicate(idempotency, now_us))

    def extend(
        self, reservation: Reservation, to_nanousd: int, limits: Limits, *, at_least_nanousd: int | None = None
    ) -> Reservation | Refusal:
        at_least = to_nanousd if at_least_nanousd is None else at_least_nanousd
        return self._hold(lambda now_us: verbs.extend(reservation, to_nanousd, at_least, limits, now_us))

    def settle(self, reservation: Reservation, actual_nanousd: int) -> Settlement:
        return self._hold(lambda now_us: verbs.end(reservation, "settled", actual_nanousd, now_us))

    def release(self, reservation: Reservation) -> Settlement:
        return self._hold(lambda now_us: verbs.end(reservation, "released", 0, now_us))

    def books(self, identifier: str, network: str, window_seconds: int) -> Books:
        return read_books(self._link, self._clock, identifier, network, window_seconds)

    def close(self) -> None:
        self._link.close()

    def _hold(self, begin: Callable[[int], verbs.Talk[T]]) -> T:
        for _ in range(self._tries):
            told = self._link.run(lambda client: _tried(client, begin(self._clock.now_us())))
            if not isinstance(told, _Overtaken):
                return told
            with self._lock:
                self.retries += 1
        raise StoreBusy(f"somebody else was faster {self._tries} times")


class _Overtaken(Exception):
    """What was seen has changed since; nothing was done."""


def _tried(client: Client, talk: verbs.Talk[T]) -> T | _Overtaken:
    with conversation(client) as say:
        attempt = _Try(say)
        try:
            told = verbs.held(talk, attempt.answer)
            if not attempt.is_confirmed:
                attempt.confirm(())
        except _Overtaken as overtaken:
            return overtaken
        return told


class _Try:
    def __init__(self, say: Send) -> None:
        self._say = say
        self.is_confirmed = False

    def answer(self, step: verbs.Look | verbs.Write) -> Any:
        if isinstance(step, verbs.Write):
            return self.confirm(step.commands)
        _, *replies = self._say([("WATCH", *step.keys), *step.commands])
        return step.seen(replies)

    def confirm(self, commands: Sequence[Words]) -> Sequence[Any]:
        """Done, if nothing that was seen has changed."""
        replies = transaction(self._say, commands)
        if replies is None:
            raise _Overtaken
        self.is_confirmed = True
        return replies


def open_watch(link: Link, clock: Clock, *, decide_by_clock: bool = False) -> WatchBackend:
    """Made by `backends.open_backend`; always decides by the host's clock (see the head of this file)."""
    _ = decide_by_clock
    return WatchBackend(link, clock)
