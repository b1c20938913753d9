"""The atomic strategy: one Lua script decides and books in one step of Redis. It keeps the promise.

Facing page: `legacy.py`. For one reservation it sends one round trip:

    check    EVALSHA reserve.lua                      reads the same record, marker and totals,
    decide                                            compares them with the same limits, refuses in the same order,
    record                                            and books the cost in the same places: in all of them, or in none

THE RACE is not here: Redis runs a script as a whole, so no other caller reads or writes between check and record. The
other weaknesses of `legacy.py` have no place either: a crash leaves nothing half done, an id that is sent again charges
nothing again, periods follow Redis' own clock, and a call that arrives after its caller has given up does nothing (its
deadline travels with it).

What is sent and what the replies mean stands in `script_words.py` and at the head of each script in `lua/`.
"""

# ruff: noqa: D102 (what the verbs do is said once, at `contract.Backend`)

from collections.abc import Callable, Sequence
from typing import Any

from backends.budgets import Budget
from backends.clock import US_PER_SECOND, Clock
from backends.contract import Ask, Books, Duplicate, Idempotency, Refusal, Reservation, Settlement, Verdict
from backends.errors import StoreBusy
from backends.keys import idempotency_key, record_key
from backends.records import duplicate_of, parse_record
from backends.store.link import Link
from backends.store.scripts import Script
from backends.strategies import arithmetic, outcomes, script_words
from backends.strategies.on_redis import read_books
from backends.strategies.script_words import ScriptCall

_RESERVE, _EXTEND, _SETTLE = Script("reserve.lua"), Script("extend.lua"), Script("settle.lua")
_TRIES = 3


class AtomicBackend:
    """Check and charge as one: not a nano-dollar over any limit, under any concurrency.

    Args:
        link: the Redis that holds the books.
        clock: for tests only: decides in place of Redis' own time.
    """

    name = "atomic"
    promises_atomicity = True
    keeps_our_layout = True
    reserve_script = _RESERVE.file_name

    def __init__(self, link: Link, clock: Clock | None = None) -> None:
        self._link = link
        self._clock = clock

    def reserve(self, ask: Ask) -> Verdict:
        reply, call = self._decided(_RESERVE, lambda now: script_words.reserve_call(ask, now))
        return script_words.read_verdict(ask, self.name, call, reply)

    def extend(
        self,
        reservation: Reservation,
        to_nanousd: int,
        budgets: tuple[Budget, ...],
        *,
        at_least_nanousd: int | None = None,
    ) -> Reservation | Refusal:
        now_limited = arithmetic.budgets_of_now(reservation.budgets, budgets)
        at_least = to_nanousd if at_least_nanousd is None else at_least_nanousd
        reply, _ = self._decided(
            _EXTEND, lambda now: script_words.extend_call(reservation, to_nanousd, at_least, now_limited, now)
        )
        return script_words.read_extension(reservation, now_limited, reply)

    def settle(self, reservation: Reservation, actual_nanousd: int) -> Settlement:
        return self._end(reservation, "settled", actual_nanousd)

    def release(self, reservation: Reservation) -> Settlement:
        return self._end(reservation, "released", 0)

    def find(self, ask: Ask) -> Reservation | None:
        key = record_key(ask.reservation_id)
        text: Any = self._link.run(lambda client: client.get(key))
        return outcomes.found(ask, self.name, parse_record(text))

    def find_duplicate(self, idempotency: Idempotency) -> Duplicate | None:
        text: Any = self._link.run(lambda client: client.get(idempotency_key(idempotency.digest)))
        return duplicate_of(text, idempotency, self._now_us())

    def books(self, budgets: tuple[Budget, ...]) -> Books:
        return read_books(self._link, self._now_us(), budgets)

    def close(self) -> None:
        self._link.close()

    def _decided(
        self, script: Script, make_call: Callable[[script_words.Now], ScriptCall]
    ) -> tuple[Sequence[Any], ScriptCall]:
        """The reply of a script that decides, and the call that it is of.

        Where it came too late nothing was charged, and it is asked again.
        """
        link = self._link
        for _ in range(_TRIES):
            now_us = self._now_us()
            deadline_us = now_us + int(link.wait_seconds() * US_PER_SECOND)
            call = make_call(script_words.Now(str(now_us) if self._clock else "", now_us, deadline_us))
            asked_at = link.clock.monotonic_seconds()
            reply: Sequence[Any] = link.run(lambda client: script.run(client, call.keys, call.args))  # noqa: B023 (run at once)
            if not self._clock:
                link.learn_time(reply[2], asked_at)
            if reply[0] not in script_words.TRY_AGAIN:
                return reply, call
        raise StoreBusy("the question reached Redis only after its deadline")

    def _end(self, reservation: Reservation, ending: str, actual_nanousd: int) -> Settlement:
        now_text = str(self._clock.now_us()) if self._clock else ""
        call = script_words.settle_call(reservation, ending, actual_nanousd, now_text)
        reply = self._link.run(lambda client: _SETTLE.run(client, call.keys, call.args))
        return script_words.read_settlement(reservation, ending, reply)

    def _now_us(self) -> int:
        return self._clock.now_us() if self._clock else self._link.time_us()


def open_atomic(link: Link, clock: Clock, *, decide_by_clock: bool = False) -> AtomicBackend:
    """See `backends.open_backend`; decides by Redis' own time unless a test says otherwise."""
    return AtomicBackend(link, clock if decide_by_clock else None)
