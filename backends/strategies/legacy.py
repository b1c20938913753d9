"""The legacy strategy: check in many calls, decide here, record in many calls. It loses the race, on purpose.

Facing page: `atomic.py`. For one reservation it sends, one round trip each:

    check    GET     llm:reservation:<rid>               is the id known?
             GET     llm:throttle:<id>                   is there a throttle marker?
             GET     llm:cost:daily:<id>:<date>          the identifier's day,
             ZRANGE  llm:cost:recent:<id>                its window,
             ZRANGE  llm:network:recent:<net>            the network's window,
             GET     llm:network:daily:<net>:<date>      its day,
             GET     llm:global:hourly:<date>T<hour>     the hour and
             GET     llm:global:daily:<date>             the day of all together
    decide   in Python: total + cost <= limit, six times (`verbs.reserve` is the rest of this page)
             ZRANGE  llm:open:identifier:<id>            what is pending, to be kept short
             ZRANGE  llm:open:network:<net>
             ZRANGE  llm:open:global
                                                         <- THE RACE: other callers have read the same totals
    record   ZINCRBY, INCRBY                             the cost in nine places, each with the TTL of its key
             SET     llm:reservation:<rid>

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
