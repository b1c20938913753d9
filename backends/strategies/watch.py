"""The watch strategy: the legacy way, tied together by WATCH. It keeps the promise, and pays for it by trying again.

WATCH names every key that the decision rests on, before the key is read. EXEC is then done only if none of them has
changed since; else nothing is done, and all begins anew. So what is written rests on what still holds, and what is
answered was true at one moment: a refusal, which may have nothing to write, is confirmed by an EXEC of nothing.

It is safe and slow: of N callers who read at the same moment one gets through, and the others have worked for nothing.
Each try fetches every bucket of every window, only to decide what a script decides where they lie. After `TRIES` it
gives up with `StoreBusy`.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from backends.clock import Clock
from backends.errors import StoreBusy
from backends.store import Words
from backends.store.connections import Send, conversation, transaction
from backends.store.link import Client, Link
from backends.strategies import verbs
from backends.strategies.on_redis import PythonStrategyOnRedis
from backends.strategies.verbs import Read, Verb, Write

T = TypeVar("T")
TRIES = 256


class WatchBackend(PythonStrategyOnRedis):
    """Check and charge as one, or try again: not a nano-dollar over any limit, under any concurrency.

    Args:
        tries: how often a verb is tried before the strategy is too busy.
    """

    name = reserve_script = "watch"
    promises_atomicity = True

    def __init__(self, link: Link, clock: Clock, tries: int = TRIES) -> None:
        super().__init__(link, clock)
        self._tries = tries

    def perform(self, begin: Callable[[int], Verb[T]]) -> T:
        """The verb as often as it takes.

        Raises:
            StoreBusy: another caller was faster each time.
        """
        for _ in range(self._tries):
            result = self._link.run(lambda client: _tried(client, begin(self._clock.now_us())))
            if not isinstance(result, _Overtaken):
                return result
        raise StoreBusy(f"somebody else was faster {self._tries} times")


class _Overtaken(Exception):
    """What was read has changed since; nothing was done."""


def _tried(client: Client, verb: Verb[T]) -> T | _Overtaken:
    with conversation(client) as send:
        attempt = _Try(send)
        try:
            result = verbs.perform(verb, attempt.answer)
            if not attempt.is_confirmed:
                attempt.confirm(())
        except _Overtaken as overtaken:
            return overtaken
        return result


class _Try:
    def __init__(self, send: Send) -> None:
        self._send = send
        self.is_confirmed = False

    def answer(self, step: Read | Write) -> Any:
        if isinstance(step, Write):
            return self.confirm(step.commands)
        _, *replies = self._send([("WATCH", *step.keys), *step.commands])
        return step.replies(replies)

    def confirm(self, commands: Sequence[Words]) -> Sequence[Any]:
        """Do the commands, if nothing that was read has changed."""
        replies = transaction(self._send, commands)
        if replies is None:
            raise _Overtaken
        self.is_confirmed = True
        return replies


open_watch = WatchBackend.open
