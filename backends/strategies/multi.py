"""The multi strategy: the legacy way inside MULTI/EXEC. It loses the race too, on purpose.

It reads all amounts as of one moment and writes all of them in one step: a crash leaves no half of a charge. But a
transaction decides nothing. The decision is made here, between the two, and meanwhile other callers read the same
totals: N callers at once all get in, with room for k. The other weaknesses are those of `legacy.py`.

A verb takes three round trips at most instead of more than twenty.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from backends.strategies import verbs
from backends.strategies.on_redis import PythonStrategyOnRedis, in_one_step
from backends.strategies.verbs import Read, Verb, Write

T = TypeVar("T")


class MultiBackend(PythonStrategyOnRedis):
    """Check in one transaction, charge in another: correct when alone, racy when not."""

    name = reserve_script = "multi"
    promises_atomicity = False

    def perform(self, begin: Callable[[int], Verb[T]]) -> T:
        """Each step in a transaction of its own."""
        return verbs.perform(begin(self._clock.now_us()), self._answer)

    def _answer(self, step: Read | Write) -> Any:
        # THE RACE lies between the transaction of a `Read` and that of the `Write` after it.
        replies = self._link.run(lambda client: in_one_step(client, step.commands))
        return step.replies(replies) if isinstance(step, Read) else replies


open_multi = MultiBackend.open
