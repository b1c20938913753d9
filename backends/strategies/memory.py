"""The memory strategy: the books of one process, under one lock. Failing open uses it, and so may a single worker.

It performs the same verbs as `legacy`, on a dictionary that answers the commands which they use as Redis would.
"""

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from backends.clock import US_PER_SECOND, Clock
from backends.errors import StoreBroken
from backends.records import Member
from backends.store import Words
from backends.strategies import verbs
from backends.strategies.in_python import PythonStrategy
from backends.strategies.verbs import Read, Verb, Write

if TYPE_CHECKING:
    from backends.store.link import Link

T = TypeVar("T")
_SWEEP_EVERY = 1_000
_NO_KEY, _NO_TTL = -2, -1
_FOR_EVER_US = 2**63

Value = bytes | dict[Member, int]
"""A string, or a sorted set: member -> nano-dollars."""


class MemoryBackend(PythonStrategy):
    """Keeps the promise within one process, and forgets everything with it. `clock` decides the TTLs too."""

    name = reserve_script = "memory"
    promises_atomicity = True

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.dictionary = CommandDictionary(clock)
        self._lock = threading.Lock()
        self._verbs_since_sweep = 0

    def perform(self, begin: Callable[[int], Verb[T]]) -> T:
        """The whole verb under the lock."""
        with self._lock:
            self._sweep_sometimes()
            return verbs.perform(begin(self._clock.now_us()), self._answer)

    def close(self) -> None:
        """There is nothing to give back."""

    def _answer(self, step: Read | Write) -> Any:
        if isinstance(step, Read):
            return self.dictionary.execute
        return [self.dictionary.execute(words) for words in step.commands]

    def _sweep_sometimes(self) -> None:
        self._verbs_since_sweep += 1
        if self._verbs_since_sweep >= _SWEEP_EVERY:
            self._verbs_since_sweep = 0
            self.dictionary.sweep()


class CommandDictionary:
    """A dictionary that answers the commands of `verbs` as Redis would. Not thread-safe.

    Args:
        clock: decides what has reached the end of its TTL.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._values: dict[str, Value] = {}
        self._ends_at_us: dict[str, int] = {}
        self._commands: Mapping[str, Callable[..., Any]] = {
            "GET": self._text,
            "SET": self._set,
            "DEL": self._delete,
            "TTL": lambda key: self._ttl(key, US_PER_SECOND),
            "PTTL": lambda key: self._ttl(key, 1_000),
            "EXPIRE": lambda key, ttl: self._expire(key, ttl * US_PER_SECOND),
            "PEXPIRE": lambda key, ttl: self._expire(key, ttl * 1_000),
            "INCRBY": self._increment,
            "ZINCRBY": self._increment_bucket,
            "ZRANGE": self._all_buckets,
            "ZREM": self._remove_buckets,
            "ZREMRANGEBYSCORE": self._remove_empty_buckets,
        }

    def execute(self, words: Words) -> Any:
        """The reply to a command.

        Raises:
            StoreBroken: the key holds a value of the wrong kind.
        """
        return self._commands[str(words[0])](*words[1:])

    def sweep(self) -> None:
        """Forget what has reached the end of its TTL."""
        now_us = self._clock.now_us()
        for key in [key for key, ends_at_us in self._ends_at_us.items() if ends_at_us <= now_us]:
            self._delete(key)

    def live_keys(self) -> list[str]:
        """Every key that is there."""
        self.sweep()
        return list(self._values)

    def value(self, key: str) -> Value | None:
        """What a key holds."""
        if self._ends_at_us.get(key, _FOR_EVER_US) <= self._clock.now_us():
            self._delete(key)
        return self._values.get(key)

    def clear(self) -> None:
        """Forget everything."""
        self._values.clear()
        self._ends_at_us.clear()

    def _text(self, key: str) -> bytes | None:
        value = self.value(key)
        if isinstance(value, dict):
            raise StoreBroken(_wrong_kind(key))
        return value

    def _buckets(self, key: str) -> dict[Member, int]:
        value = self.value(key)
        if isinstance(value, bytes):
            raise StoreBroken(_wrong_kind(key))
        return value or {}

    def _set(self, key: str, text: str | int, option: str, ttl_seconds: int | None = None) -> None:
        self._values[key] = str(text).encode()
        if option == "EX" and ttl_seconds is not None:
            self._expire(key, ttl_seconds * US_PER_SECOND)

    def _delete(self, *keys: str) -> int:
        for key in keys:
            self._ends_at_us.pop(key, None)
        return sum(self._values.pop(key, None) is not None for key in keys)

    def _ttl(self, key: str, unit_us: int) -> int:
        if self.value(key) is None:
            return _NO_KEY
        ends_at_us = self._ends_at_us.get(key)
        return _NO_TTL if ends_at_us is None else (ends_at_us - self._clock.now_us()) // unit_us

    def _expire(self, key: str, ttl_us: int) -> int:
        if self.value(key) is None:
            return 0
        self._ends_at_us[key] = self._clock.now_us() + ttl_us
        return 1

    def _increment(self, key: str, by: int) -> int:
        total = int(self._text(key) or 0) + by
        self._values[key] = b"%d" % total
        return total

    def _increment_bucket(self, key: str, by: int, member: Member) -> int:
        buckets = self._buckets(key)
        self._values[key] = buckets | {member: buckets.get(member, 0) + by}
        return buckets.get(member, 0) + by

    def _all_buckets(self, key: str, *_whole_with_scores: object) -> list[int | bytes]:
        return [
            part.encode() if isinstance(part, str) else part for bucket in self._buckets(key).items() for part in bucket
        ]

    def _remove_buckets(self, key: str, *members: Member) -> int:
        buckets = self._buckets(key)
        left = {member: nanousd for member, nanousd in buckets.items() if member not in members}
        if left:
            self._values[key] = left
        else:
            self._delete(key)
        return len(buckets) - len(left)

    def _remove_empty_buckets(self, key: str, *_up_to_zero: object) -> int:
        return self._remove_buckets(key, *(member for member, nanousd in self._buckets(key).items() if nanousd <= 0))


def _wrong_kind(key: str) -> str:
    return f"WRONGTYPE: {':'.join(key.split(':')[:3])}:… holds a value of another kind"


def open_memory(link: "Link", clock: Clock, *, decide_by_clock: bool = False) -> MemoryBackend:
    """See `backends.open_backend`; needs no Redis."""
    _ = link, decide_by_clock
    return MemoryBackend(clock)
