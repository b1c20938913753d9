"""The link to Redis: bounded waits, at most one repeat, a breaker, and Redis' own time.

* A command that ran into a time-out is never repeated: Redis may have done it.
* When a connection breaks, what `Link.run` was given runs once more, from its start, on a new connection. Redis may
  have done all or part of it already, where only the reply was lost. Then the scripts charge nothing twice (they know
  the reservation's id; only a challenge is found used up), and neither does an attempt of ``watch``, which reads the
  books anew. But each increment of ``legacy``, of ``multi`` and of the rate limit may be counted twice.
* When a replica answers, the connections are dropped: where the address is a name, new ones lead to the new primary.
* A connection that cannot be opened is no outage while others are open: one of those is waited for.
* One reply that did not come is no outage: a quick probe on another connection decides.
* In an outage the breaker raises `StoreUnavailable` at once for `REST_SECONDS`; then one caller tries again.
* The waits of a caller inside `Link.within` are bounded together, however many they are.
"""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import redis

from backends.clock import US_PER_SECOND, Clock
from backends.contract import Event, Observer
from backends.errors import ConfigurationError, StoreBroken, StoreBusy, StoreError, StoreUnavailable, shown
from backends.keys import RATE_PREFIX
from backends.store import failures
from backends.store.addresses import without_password
from backends.store.breaker import Breaker
from backends.store.connections import POOL_SIZE, TIMEOUT_SECONDS, Pool, call_before_each_send, execute, open_client

Client = redis.Redis
T = TypeVar("T")

OLDEST_VERSION = (6, 2)
SILENT_SECONDS = 60.0
"""How long a missing right is not logged again: the settings alone are asked for twice a second."""
PROBES = 2
PROBE_SECONDS = 0.2


class _TimeLeft(threading.local):
    """How long the running thread (greenlet) may still wait for Redis, all its waits together.

    Only waits count: what a client takes to send its body, or a busy worker to get to it, says nothing about Redis.
    Not a context variable: gevent hands those on to what a request starts, and a settlement in the background must
    not be cut off when the time of its request is over.
    """

    seconds = math.inf
    waiting_since_seconds: float | None = None
    """None while it does not wait."""


@dataclass(frozen=True, slots=True)
class _Offset:
    """Redis' clock minus our monotonic one, by one reply; never more than the truth."""

    us: int
    uncertainty_us: int


class Link:
    """A thread-safe (greenlet-safe) client of one Redis.

    Args:
        url: ``redis://``, ``rediss://``, ``unix://`` or ``fake://`` (one process, for unit tests).
        clock: durations, and the first guess at Redis' time.
        observer: gets ``store_lost``, ``store_back`` and ``store_broken``, with ``is_first=False`` for a right that was
            found missing in the last `SILENT_SECONDS`.
        timeout_seconds: of one wait for a connection, one connect, one reply.
        connection_class: redis-py's class of connections, in place of the one that the URL's scheme chooses.
        before_each_send: called once for each round trip with the packed command or pipeline, right before it is sent;
            what the call takes is in no time-out. The set-up of a connection is no round trip.

    Raises:
        ConfigurationError: the address cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        clock: Clock,
        observer: Observer = lambda _: None,
        timeout_seconds: float = TIMEOUT_SECONDS,
        pool_size: int = POOL_SIZE,
        connection_class: type[redis.Connection] | None = None,
        before_each_send: Callable[[bytes], None] | None = None,
    ) -> None:
        self.url = url
        self.timeout_seconds = timeout_seconds
        self.clock = clock
        """Its monotonic time is that of `learn_time`."""
        self._observer = observer
        self._time_left = _TimeLeft()
        self._client = open_client(url, timeout_seconds, pool_size, connection_class)
        if isinstance(self._client.connection_pool, Pool):
            self._client.connection_pool.bound_waits(self.wait_seconds, clock.monotonic_seconds)
        if before_each_send is not None:
            call_before_each_send(self._client.connection_pool, before_each_send)
        self._breaker = Breaker(clock, observer, timeout_seconds)
        self._probing = threading.Lock()
        self._offset: _Offset | None = None
        self._logged_at_seconds: dict[str, float] = {}
        """When each missing right was logged last."""

    @property
    def place(self) -> str:
        """Where Redis is, for people: the URL without user and password."""
        return without_password(self.url)

    @property
    def is_up(self) -> bool:
        """Whether Redis answers and does its work: a "not now" (full, read-only, …) is remembered for a moment."""
        return self._breaker.is_up

    @property
    def was_ever_up(self) -> bool:
        """Whether Redis has answered at all since the start."""
        return self._breaker.was_ever_up

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Inside, this thread waits for `seconds` in all at most; after that each command is `StoreBusy` at once."""
        before = self._time_left.seconds
        self._time_left.seconds = seconds
        try:
            yield
        finally:
            self._time_left.seconds = before

    def with_whole_timeout(self, do: Callable[[], T]) -> T:
        """What `do` returns, which may wait for a whole time-out, also where the time of `within` is nearly over."""
        time_left = self._time_left
        before = time_left.seconds
        time_left.seconds = max(before, self.timeout_seconds)
        try:
            return do()
        finally:
            time_left.seconds = before

    def wait_seconds(self) -> float:
        """The longest that the next wait may take; 0 or less: there is no time left."""
        left, since = self._time_left.seconds, self._time_left.waiting_since_seconds
        if left == math.inf:
            return self.timeout_seconds
        waited = 0.0 if since is None else self.clock.monotonic_seconds() - since
        return min(self.timeout_seconds, left - waited)

    def run(self, command: Callable[[Client], T]) -> T:
        """Do `command` with a client whose replies are bytes.

        Raises:
            StoreUnavailable: Redis is away, or does not answer in time, or may not work now.
            StoreBusy: all our connections were in use for the whole time-out, or the time of `within` is over. This
                says nothing about Redis, which may have answered everything.
            StoreBroken: Redis answered that the command is wrong.
        """
        time_left, breaker = self._time_left, self._breaker
        if time_left.seconds <= 0:
            # What was done before in this time may be half of a change.
            raise StoreBusy("there was no time left to ask Redis", maybe_done=True)
        if breaker.is_resting:
            breaker.let_one_through()
        # Not a context manager of its own, which takes as long as all else here: each decision passes.
        time_left.waiting_since_seconds = since = self.clock.monotonic_seconds()
        try:
            try:
                answer = command(self._client)
            except redis.ConnectionError as error:
                answer = self._repeated(command, error)
        except OSError as error:
            raise self._failure(redis.ConnectionError(str(error))) from error
        except failures.CLIENT_ERRORS as error:
            raise self._failure(error) from error
        finally:
            time_left.waiting_since_seconds = None
            time_left.seconds -= self.clock.monotonic_seconds() - since
        if breaker.is_resting or not breaker.was_ever_up:
            breaker.succeeded()
        return answer

    def time_us(self) -> int:
        """Redis' time now as far as we know it: never ahead of it, and at most a round trip behind."""
        offset = self._offset
        if offset is None:
            asked_at = self.clock.monotonic_seconds()
            seconds, us = self.run(lambda client: client.time())
            offset = self.learn_time(seconds * US_PER_SECOND + us, asked_at)
        return int(self.clock.monotonic_seconds() * US_PER_SECOND) + offset.us

    def learn_time(self, redis_now_us: int, asked_at_seconds: float) -> _Offset:
        """Take in the time that a reply carried, to a command that was sent at `asked_at_seconds` (monotonic)."""
        answered_us = int(self.clock.monotonic_seconds() * US_PER_SECOND)
        uncertainty_us = answered_us - int(asked_at_seconds * US_PER_SECOND)
        known = self._offset
        offset_us = redis_now_us - answered_us
        if known is None or uncertainty_us <= known.uncertainty_us or abs(offset_us - known.us) > uncertainty_us:
            self._offset = known = _Offset(offset_us, uncertainty_us)
        return known

    def check_writes(self) -> None:
        """Have a write refused or done that changes nothing: a full server or a replica answers everything else."""
        self.run(lambda client: execute(client, ("SETRANGE", f"{RATE_PREFIX}none", 0, "")))

    def check_version(self) -> str:
        """Version of the server, for the log.

        Raises:
            ConfigurationError: it is older than Redis 6.2, or it is part of a cluster, or a sentinel.
        """
        info: dict[str, Any] = self.run(lambda client: client.info("server"))
        mode = str(info.get("redis_mode") or info.get("server_mode") or "standalone")
        if mode != "standalone":
            raise ConfigurationError(
                f"REDIS_URL: a server that stands alone is needed; that one's mode is {shown(mode)}"
            )
        version = str(info.get("valkey_version") or info.get("redis_version") or "0")
        if "valkey_version" not in info and _version_tuple(version) < OLDEST_VERSION:
            raise ConfigurationError(f"REDIS_URL: Redis 6.2 or newer, or Valkey, is needed; that server is {version}")
        return version

    def eviction_policy(self) -> str:
        """What the server does when its memory is full; empty where it does not say so."""

        def ask(client: Client) -> str:
            try:
                info: dict[str, Any] = client.info("memory")
            except redis.ResponseError:
                # The right to ask this may be missing, and that is no bug.
                return ""
            return str(info.get("maxmemory_policy", ""))

        return self.run(ask)

    def close(self) -> None:
        """Give back every connection."""
        self._client.close()
        self._client.connection_pool.disconnect()

    def _repeated(self, command: Callable[[Client], T], error: redis.ConnectionError) -> T:
        """What `command` returns once its first try has failed with `error`."""
        pool: Any = self._client.connection_pool
        may_repeat = isinstance(pool, Pool)
        while True:
            could_not_open = isinstance(error, failures.OpeningFailed)
            if isinstance(error, (*failures.NOT_LOGGED_IN, failures.PoolExhausted, redis.BusyLoadingError)):
                raise error
            if not could_not_open:
                if not may_repeat:
                    raise error
                may_repeat = False
            pool.close_dead()
            # Nothing was sent then, and the next connection is an open one, or the last of those is gone.
            if could_not_open and not pool.rest_from_opening():
                raise error
            try:
                return command(self._client)
            except redis.ConnectionError as another:
                error = another

    def _failure(self, error: Exception) -> StoreError:
        """Take in what an error says about Redis; the failure to raise."""
        if isinstance(error, failures.PoolExhausted) and self._breaker.is_resting:
            return self._breaker.unavailable()
        if failures.is_our_own(error):
            return StoreBusy(failures.one_line(error))
        if not failures.is_outage(error):
            return self._broken(error)
        if isinstance(error, failures.CUT_OFF):
            return self._cut_off(error)
        if failures.is_no_primary(error):
            self._client.connection_pool.disconnect(inuse_connections=False)
        self._breaker.not_now()
        return StoreUnavailable(failures.one_line(error))

    def _cut_off(self, error: Exception) -> StoreError:
        if isinstance(error, redis.TimeoutError) and self.wait_seconds() <= 0:
            # No rest: Redis did not have the whole time-out.
            return StoreBusy("Redis did not answer in the time that was left", maybe_done=True)
        if isinstance(error, failures.OpeningFailed) or not self._answers_another():
            self._breaker.cut_off(error)
        return StoreUnavailable(failures.one_line(error), maybe_done=True)

    def _answers_another(self) -> bool:
        """Whether Redis answers on another connection, so that but one reply was lost; or another caller asks just now.

        Never while it rests already: the caller that tries says by itself whether Redis is back.
        """
        if self._breaker.is_resting:
            return False
        if not self._probing.acquire(blocking=False):
            return True
        try:
            return any(self._answers_ping() for _ in range(PROBES))
        finally:
            self._probing.release()

    def _answers_ping(self) -> bool:
        time_left = self._time_left
        before = time_left.seconds, time_left.waiting_since_seconds
        time_left.seconds, time_left.waiting_since_seconds = PROBE_SECONDS, self.clock.monotonic_seconds()
        try:
            execute(self._client, ("PING",))
        except (redis.RedisError, OSError):
            return False
        finally:
            time_left.seconds, time_left.waiting_since_seconds = before
        return True

    def _broken(self, error: Exception) -> StoreBroken:
        text = failures.one_line(error)
        is_repeated = failures.has_no_access(error) and self._was_logged(text)
        self._observer(Event("store_broken", {"error": text, **({"is_first": False} if is_repeated else {})}))
        if failures.is_not_logged_in(error):
            # That holds for every command, so the health check says it.
            self._breaker.not_now()
        if isinstance(error, redis.ResponseError):
            # It answered. Else one wrong command, tried again and again, would hold the breaker open for all.
            self._breaker.answered()
        return StoreBroken(text)

    def log_anew(self) -> None:
        """Errors that were logged before count as new ones: there was no log before."""
        self._logged_at_seconds.clear()

    def _was_logged(self, text: str) -> bool:
        now_seconds = self.clock.monotonic_seconds()
        if now_seconds - self._logged_at_seconds.get(text, -math.inf) < SILENT_SECONDS:
            return True
        self._logged_at_seconds[text] = now_seconds
        return False


def _version_tuple(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
