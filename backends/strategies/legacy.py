"""The legacy strategy: check in many calls, decide here, record in many calls. It loses the race, on purpose.

Facing page: `atomic.py`. For one reservation it sends, one round trip each:

    check    GET             the id's record         is the id known?
             GET             the throttle marker     is there one?
             GET or ZRANGE   the key of each budget  its total, or the buckets of its window: with the six, six times
    decide   in Python: total + cost <= limit, for each budget (`verbs.reserve` is the rest of this page)
             ZRANGE          what is pending         of each owner, to be kept short: with the six, three times
                                                     <- THE RACE: other callers have read the same totals
    record   ZINCRBY, INCRBY                         the cost of each budget and owner, each with the TTL of its key
             DEL             what `atomic` has noted of the windows, which may not be so any more
             SET             the id's record

N callers at once all get in, with room for k. The other weaknesses stay too:

* A crash between two writes, or the end of the caller's time, leaves a part of the charge, which stays booked.
* After a time-out nothing is repeated. Where the connection breaks, its one command is; an increment that Redis had
  done already then counts twice.
* Periods follow the host's clock, so hosts whose clocks differ disagree about the day.
* There is no deadline: a call that a frozen Redis answers late still charges.
* Two requests with one idempotency key at once are both admitted; an extension is checked and charged as racily.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

from backends.store import Words
from backends.store.connections import execute
from backends.strategies import verbs
from backends.strategies.on_redis import PythonStrategyOnRedis
from backends.strategies.verbs import Read, Verb, Write

T = TypeVar("T")


class LegacyBackend(PythonStrategyOnRedis):
    """Check, then charge: correct when alone, racy when not."""

    name = reserve_script = "legacy"
    promises_atomicity = False

    def perform(self, begin: Callable[[int], Verb[T]]) -> T:
        """Each command by itself."""
        return verbs.perform(begin(self._clock.now_us()), self._answer)

    def _answer(self, step: Read | Write) -> Any:
        if isinstance(step, Read):
            # Each amount is read when the decision comes to it, and once.
            return cache(self._round_trip)
        # THE RACE lies here: between the last read above and the first write below other callers read the same totals.
        return [self._round_trip(words) for words in step.commands]

    def _round_trip(self, words: Words) -> Any:
        return self._link.run(lambda client: execute(client, words))


open_legacy = LegacyBackend.open
