"""What a suite needs of a backend under test: the backend, a clock that it decides by, and a hand in its store."""

# ruff: noqa: D102 (what the methods do is said once, at `Harness` and `LayoutHarness`)

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Protocol

from backends import open_backend
from backends.clock import US_PER_SECOND, SystemClock
from backends.contract import Backend
from backends.records import Member, member_in
from backends.store.link import Client, Link
from backends.strategies.memory import MemoryBackend

START_US = int(datetime(2026, 3, 14, 10, 20, tzinfo=UTC).timestamp()) * US_PER_SECOND
"""Where the clock of a cleared harness stands."""

Value = str | dict[Member, int]
"""A text, or the members of a sorted set: of a bucket its start (unix seconds) -> nano-dollars."""
Stored = dict[str, tuple[Value, int]]
"""Key -> its value, and its TTL in whole seconds (-1: none)."""


class ManualClock:
    """A clock that stands still until it is moved."""

    def __init__(self, now_us: int = START_US) -> None:
        self.us = now_us

    def now_us(self) -> int:
        return self.us

    def monotonic_seconds(self) -> float:
        return self.us / US_PER_SECOND


class Harness(Protocol):
    """What `Behaviour` needs: a backend that decides by `clock`."""

    backend: Backend
    clock: ManualClock

    def pass_time(self, us: int) -> None:
        """Move the clock by so many microseconds; what is stored ages as much."""

    def clear(self) -> None:
        """Delete everything and start the clock anew."""

    def close(self) -> None:
        """Close what the harness opened."""


class LayoutHarness(Harness, Protocol):
    """What `RedisLayout` needs besides: to read and change single keys."""

    def stored(self) -> Stored:
        """Every key that is stored now."""

    def put(self, key: str, text: str, ttl_seconds: int) -> None:
        """Store a string, as an operator would by hand."""

    def lose(self, key: str) -> None:
        """Delete a key, as a crash would."""


class MemoryHarness:
    """The memory strategy."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        memory = MemoryBackend(self.clock)
        self.backend: Backend = memory
        self._dictionary = memory.dictionary

    def pass_time(self, us: int) -> None:
        self.clock.us += us

    def stored(self) -> Stored:
        execute = self._dictionary.execute
        return {key: (self._value(key), _seconds(execute(("PTTL", key)))) for key in self._dictionary.live_keys()}

    def put(self, key: str, text: str, ttl_seconds: int) -> None:
        self._dictionary.execute(("SET", key, text, "EX", ttl_seconds))

    def lose(self, key: str) -> None:
        self._dictionary.execute(("DEL", key))

    def clear(self) -> None:
        self.clock.us = START_US
        self._dictionary.clear()

    def close(self) -> None:
        self.backend.close()

    def _value(self, key: str) -> Value:
        value = self._dictionary.value(key)
        return value.decode() if isinstance(value, bytes) else value or {}


HAIR_MS = 250
"""How exact a TTL is: the server's own clock runs on, and on a busy machine an operation takes its time."""

# Shortens the TTL of every key, and deletes what is within a hair of its end.
_AGE = """
for _, key in ipairs(redis.call('KEYS', '*')) do
  local left = redis.call('PTTL', key)
  if left >= 0 then
    left = left - tonumber(ARGV[1])
    if left <= tonumber(ARGV[2]) then
      redis.call('DEL', key)
    else
      redis.call('PEXPIRE', key, string.format('%.0f', left))
    end
  end
end
"""


class RedisHarness:
    """A backend on a database of a real server. The database is emptied.

    Args:
        backend: a registered name, or a function that makes the backend.
        url: where the database is.
    """

    def __init__(self, backend: str | Callable[[Link, ManualClock], Backend], url: str) -> None:
        self.clock = ManualClock()
        self._host_clock = SystemClock()
        self._link = Link(url, clock=self._host_clock, timeout_seconds=5)
        self.backend = (
            open_backend(backend, self._link, self.clock, decide_by_clock=True)
            if isinstance(backend, str)
            else backend(self._link, self.clock)
        )
        self.clear()

    def pass_time(self, us: int) -> None:
        self.clock.us += us
        self._age(us // 1_000)

    def stored(self) -> Stored:
        self._age(0)
        return self._link.run(_stored)

    def put(self, key: str, text: str, ttl_seconds: int) -> None:
        # A hair less: the server's own clock is no more exact than that, and rounds up.
        self._link.run(lambda r: r.set(key, text, px=ttl_seconds * 1_000 - 50))

    def lose(self, key: str) -> None:
        self._link.run(lambda r: r.delete(key))

    def clear(self) -> None:
        self._link.run(lambda r: r.flushdb())
        self.clock.us = START_US
        self._aged_at_seconds = self._host_clock.monotonic_seconds()

    def close(self) -> None:
        self.backend.close()
        self._link.close()

    def _age(self, milliseconds: int) -> None:
        now = self._host_clock.monotonic_seconds()
        meanwhile_ms = int((now - self._aged_at_seconds) * 1_000)
        self._aged_at_seconds = now
        self._link.run(lambda r: r.eval(_AGE, 0, milliseconds - meanwhile_ms, HAIR_MS))


def _stored(client: Client) -> Stored:
    names: Any = sorted(client.keys("*"))
    pipe = client.pipeline(transaction=False)
    for name in names:
        pipe.type(name)
        pipe.pttl(name)
    seen = pipe.execute()
    kinds, ttls_ms = seen[::2], seen[1::2]
    for name, kind in zip(names, kinds, strict=True):
        pipe.zrange(name, 0, -1, withscores=True) if kind == b"zset" else pipe.get(name)
    values = [_value(reply) for reply in pipe.execute()]
    ttls = [_seconds(left_ms, HAIR_MS) for left_ms in ttls_ms]
    return {name.decode(): (value, left) for name, value, left in zip(names, values, ttls, strict=True)}


def _seconds(left_ms: int, hair_ms: int = 0) -> int:
    """A TTL as `Stored` has it."""
    return -1 if left_ms < 0 else -(-(left_ms - hair_ms) // 1_000)


def _value(reply: Any) -> Value:
    return reply.decode() if isinstance(reply, bytes) else {member_in(text): int(held) for text, held in reply}
