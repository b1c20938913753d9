"""The one door to Redis: a bounded pool, short time-outs, no hidden repeats, a breaker, and Redis' own time.

What the client library raises is translated here (`errors.py`), and nothing else of the guard knows it.

* A command that ran into a time-out is never repeated: nobody knows whether it was done.
* A connection that broke is replaced and the command said once more: all of ours may be repeated (scripts carry an id).
* After a failure the breaker answers `StoreUnavailable` at once for `REST_SECONDS`; then one caller tries again.
* Who answers a visitor asks inside `Link.within`: all waits of that time together are bounded, however many they are.
"""

import math
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, Full
from typing import Any, TypeVar, cast
from urllib.parse import parse_qs, urlsplit

import redis
from hiredis import pack_command as _pack_command
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ClusterError,
    NoPermissionError,
    RedisClusterException,
    SlotNotCoveredError,
    TryAgainError,
)
from redis.retry import Retry

from backends.clock import US_PER_SECOND, Clock
from backends.contract import Event, Observer
from backends.errors import ConfigurationError, StoreBroken, StoreBusy, StoreError, StoreUnavailable, shown

Client = redis.Redis
T = TypeVar("T")
# Any number of words; its published type says one.
pack_command: Callable[[tuple[str | int, ...]], bytes] = cast("Any", _pack_command)

TIMEOUT_SECONDS = 0.5
POOL_SIZE = 50
REST_SECONDS = 0.5
UNWILLING_SECONDS = 2.0
OLDEST_VERSION = (6, 2)
_URL_OPTIONS = ("db", "username", "password")
_TLS_OPTIONS = (
    "ssl_cert_reqs",
    "ssl_check_hostname",
    "ssl_ca_certs",
    "ssl_ca_path",
    "ssl_certfile",
    "ssl_keyfile",
    "ssl_password",
)
# An option in the address would beat our own of the same name, and what is promised about time and repeats with it.
_OURS = {
    "socket_timeout",
    "socket_connect_timeout",
    "socket_read_size",
    "socket_keepalive",
    "timeout",
    "max_connections",
    "retry",
    "retry_on_timeout",
    "retry_on_error",
    "health_check_interval",
    "protocol",
    "decode_responses",
    "encoding",
    "client_name",
    "driver_info",
}

# Errors that say "not now": the server is up, but cannot do its work. The library cuts the code off those that it has a
# class for, and leaves it on the others.
_OUTAGE_TYPES = (
    redis.ConnectionError,
    redis.TimeoutError,
    redis.OutOfMemoryError,
    redis.ReadOnlyError,
    ClusterError,
    SlotNotCoveredError,
    TryAgainError,
)
_OUTAGE_PREFIXES = (
    "OOM ",
    "READONLY",
    "BUSY ",
    "LOADING",
    "NOREPLICAS",
    "MISCONF",
    "UNKILLABLE",
    "max number of clients",
    "command not allowed when used memory",
    "You can't write against a read only",
    "Redis is busy",
)


class _OutOfTime(redis.TimeoutError):
    """The caller's own time is over: no word about Redis."""


class _PoolExhausted(redis.ConnectionError):
    """No connection became free in time: our own doing, and no word about Redis."""


class _Patience(threading.local):
    """How long the running thread (greenlet) may still wait for Redis, all its waits together.

    Only waits count: what a client takes to send its body, or a busy worker to get to it, is no word about Redis.
    Not a context variable: gevent hands those on to what a request starts, and a settlement in the background must
    not be cut off by the end of somebody's patience.
    """

    left_seconds = math.inf
    asked_at_seconds: float | None = None
    """Since when it waits; None while it does not."""


class _Hurried:
    """Beside a connection class of the client library: no wait is longer than the caller's patience."""

    wait_seconds: Callable[[], float]
    socket_timeout: float
    socket_connect_timeout: float
    _sock: Any

    def _connect(self) -> Any:
        self.socket_timeout = self.socket_connect_timeout = self._next_wait_seconds()
        return super()._connect()  # type: ignore[misc] # the connection class stands beside

    def read_response(self, *args: Any, **options: Any) -> Any:  # the client library's own signature
        wait_seconds = self._next_wait_seconds()
        if wait_seconds != self.socket_timeout and self._sock is not None:
            self.socket_timeout = wait_seconds
            self._sock.settimeout(wait_seconds)
        return super().read_response(*args, **options)  # type: ignore[misc] # as above

    def _next_wait_seconds(self) -> float:
        wait_seconds = type(self).wait_seconds()
        if wait_seconds <= 0:
            self.disconnect()  # type: ignore[attr-defined] # as above
            raise _OutOfTime("no time left to wait for Redis")
        return wait_seconds


class _FreeConnections:
    """The last one given back is the first to be taken: what the pool uses of a `queue.LifoQueue`.

    With threads that one takes its locks each time, which was a twentieth of a decision (gevent's is as quick as this).
    Here taking and giving back are one step of a list each, and only who finds nothing waits under a lock.
    """

    def __init__(self, size: int) -> None:
        self.queue: list[Any] = []
        self._size = size
        self._given_back = threading.Condition()
        self._waiting = 0

    def get_nowait(self) -> Any:
        try:
            return self.queue.pop()
        except IndexError:
            raise Empty from None

    def get(self, block: bool = True, timeout: float | None = None) -> Any:  # noqa: FBT001, FBT002 (as in `queue`)
        taken: list[Any] = []

        def take() -> bool:
            with suppress(Empty):
                taken.append(self.get_nowait())
            return bool(taken)

        with self._given_back:
            # Told before it looks: whoever gives back after that look sees that somebody waits.
            self._waiting += 1
            try:
                if not self._given_back.wait_for(take, timeout if block else 0):
                    raise Empty
            finally:
                self._waiting -= 1
        return taken[0]

    def put_nowait(self, connection: Any) -> None:
        if len(self.queue) >= self._size:
            raise Full
        self.queue.append(connection)
        if self._waiting:
            with self._given_back:
                self._given_back.notify()


class _Pool(redis.BlockingConnectionPool):
    wait_seconds: Callable[[], float] = staticmethod(lambda: TIMEOUT_SECONDS)

    @property
    def timeout(self) -> float:
        """Of one wait for a connection; the client library's own name."""
        return max(0.0, self.wait_seconds())

    @timeout.setter
    def timeout(self, _: float) -> None:
        """The client library sets it once; who waits says how long."""

    def hurry(self, wait_seconds: Callable[[], float]) -> None:
        """Ask `wait_seconds` before each wait, for a connection and on one."""
        self.wait_seconds = wait_seconds
        hurried = {"wait_seconds": staticmethod(wait_seconds)}
        self.connection_class = type(self.connection_class.__name__, (_Hurried, self.connection_class), hurried)

    def borrow(self) -> Any:
        """A connection as it was left, or a new one. One that Redis has closed meanwhile fails when it is used."""
        self._checkpid()
        try:
            connection = self.pool.get_nowait()
        except Empty:
            connection = self._wait_for_one()
        return connection or self.make_connection()  # type: ignore[no-untyped-call] # redis-py leaves it untyped

    def _wait_for_one(self) -> Any:
        try:
            return self.pool.get(timeout=self.timeout)
        except Empty as error:
            raise _PoolExhausted("No connection available.") from error

    def give_back(self, connection: redis.Connection) -> None:
        """To be called once for each `borrow`, with nothing left to read."""
        self.pool.put_nowait(connection)

    def get_connection(self, *args: Any, **kwargs: Any) -> Any:  # the client library's own signature
        try:
            return super().get_connection(*args, **kwargs)  # type: ignore[no-untyped-call] # redis-py leaves it untyped
        except redis.ConnectionError as error:
            if "No connection available" in str(error):
                raise _PoolExhausted(str(error)) from error
            raise


@dataclass(frozen=True, slots=True)
class _Offset:
    """Redis' clock minus our monotonic one, as one reply told it; never more than the truth."""

    us: int
    uncertainty_us: int


class Link:
    """A thread-safe (greenlet-safe) client of one Redis.

    Args:
        url: ``redis://``, ``rediss://``, ``unix://`` or ``fake://`` (one process, for unit tests).
        clock: durations, and the first guess at Redis' time.
        observer: is told ``store_lost``, ``store_back`` and ``store_broken``.
        timeout_seconds: of one wait for a connection, one connect, one reply.
        before_each_send: called once for each round trip with the packed command or pipeline, right before it is sent;
            what the call takes is in no time-out. The set-up of a connection is no round trip.
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
        self._clock = clock
        self._observer = observer
        self._patience = _Patience()
        is_fake = url.startswith("fake:")
        self._client = _fake_client() if is_fake else _client(url, timeout_seconds, pool_size, connection_class)
        if isinstance(self._client.connection_pool, _Pool):
            self._client.connection_pool.hurry(self.wait_seconds)
        if before_each_send is not None:
            _call_before_each_send(self._client.connection_pool, before_each_send)
        self._lock = threading.Lock()
        self._resting_until_seconds: float | None = None
        self._ever_reached = False
        self._last_failure = ""
        self._unwilling_until_seconds = float("-inf")
        self._offset: _Offset | None = None

    @property
    def place(self) -> str:
        """Where Redis is, for people: the URL without user and password."""
        return without_password(self.url)

    @property
    def is_up(self) -> bool:
        """Whether Redis answers and does its work: a "not now" (full, read-only, …) is remembered for a moment."""
        if not self._ever_reached or self._resting_until_seconds is not None:
            return False
        return self._clock.monotonic_seconds() >= self._unwilling_until_seconds

    @property
    def was_ever_up(self) -> bool:
        """Whether Redis has answered at all since the start."""
        return self._ever_reached

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """What this thread asks in here waits so long in all; then each question is `StoreBusy` at once."""
        before = self._patience.left_seconds
        self._patience.left_seconds = seconds
        try:
            yield
        finally:
            self._patience.left_seconds = before

    @contextmanager
    def at_least(self, seconds: float) -> Iterator[None]:
        """What this thread asks in here has so long, also where the time of `within` is nearly over."""
        before = self._patience.left_seconds
        self._patience.left_seconds = max(before, seconds)
        try:
            yield
        finally:
            self._patience.left_seconds = before

    def wait_seconds(self) -> float:
        """The longest that the next wait may take; 0 or less: there is no time left."""
        left, asked_at = self._patience.left_seconds, self._patience.asked_at_seconds
        if left == math.inf:
            return self.timeout_seconds
        waited = 0.0 if asked_at is None else self._clock.monotonic_seconds() - asked_at
        return min(self.timeout_seconds, left - waited)

    def run(self, command: Callable[[Client], T]) -> T:
        """Do `command` with a client whose replies are bytes.

        Raises:
            StoreUnavailable: Redis is away, or does not answer in time, or may not work now.
            StoreBusy: every connection of ours was in use for the whole time-out, or the time of `within` is over: no
                word about Redis, which may have answered everything.
            StoreBroken: Redis answered that the command is wrong.
        """
        if self.wait_seconds() <= 0:
            # What was asked before in this time may be half of a change.
            raise StoreBusy("there was no time left to ask Redis", maybe_done=True)
        if self._resting_until_seconds is not None:
            self._pass_breaker()
        try:
            answer = self._waited_for(command)
        except OSError as error:
            raise self._failed(redis.ConnectionError(str(error))) from error
        except (redis.RedisError, RedisClusterException, ValueError) as error:
            raise self._failed(error) from error
        self._succeeded()
        return answer

    def monotonic_seconds(self) -> float:
        """The clock against which `learn_time` measures."""
        return self._clock.monotonic_seconds()

    def time_us(self) -> int:
        """Redis' time now as far as we know it: never ahead of it, and at most a round trip behind."""
        offset = self._offset
        if offset is None:
            asked_at = self._clock.monotonic_seconds()
            seconds, us = self.run(lambda client: client.time())
            self.learn_time(seconds * US_PER_SECOND + us, asked_at)
            offset = self._offset
        if offset is None:  # pragma: no cover (learn_time has just set it)
            raise StoreUnavailable("Redis' time is not known")
        return int(self._clock.monotonic_seconds() * US_PER_SECOND) + offset.us

    def learn_time(self, redis_now_us: int, asked_at_seconds: float) -> None:
        """Take in the time that a reply carried, for a question put at `asked_at_seconds` (monotonic)."""
        answered_us = int(self._clock.monotonic_seconds() * US_PER_SECOND)
        uncertainty_us = answered_us - int(asked_at_seconds * US_PER_SECOND)
        known = self._offset
        offset_us = redis_now_us - answered_us
        if known is None or uncertainty_us <= known.uncertainty_us or abs(offset_us - known.us) > uncertainty_us:
            self._offset = _Offset(offset_us, uncertainty_us)

    def check_version(self) -> str:
        """Version of the server, for the log.

        Raises:
            ConfigurationError: it is older than Redis 6.2.
        """
        info: dict[str, Any] = self.run(lambda client: client.info("server"))
        version = str(info.get("valkey_version") or info.get("redis_version") or "0")
        if "valkey_version" not in info and _version_tuple(version) < OLDEST_VERSION:
            raise ConfigurationError(f"REDIS_URL: Redis 6.2 or newer, or Valkey, is needed; that server is {version}")
        return version

    def close(self) -> None:
        """Give back every connection."""
        self._client.close()
        self._client.connection_pool.disconnect()

    def _waited_for(self, command: Callable[[Client], T]) -> T:
        # Not a context manager of its own, which takes as long as all else here: each decision passes.
        patience = self._patience
        patience.asked_at_seconds = asked_at = self._clock.monotonic_seconds()
        try:
            return self._with_one_repeat(command)
        finally:
            patience.asked_at_seconds = None
            patience.left_seconds -= self._clock.monotonic_seconds() - asked_at

    def _with_one_repeat(self, command: Callable[[Client], T]) -> T:
        try:
            return command(self._client)
        except (redis.TimeoutError, _PoolExhausted, AuthenticationError, AuthorizationError, redis.BusyLoadingError):
            raise
        except redis.ConnectionError:
            self._client.connection_pool.disconnect(inuse_connections=False)
            return command(self._client)

    def _pass_breaker(self) -> None:
        with self._lock:
            if self._resting_until_seconds is None:
                return
            now = self._clock.monotonic_seconds()
            if now < self._resting_until_seconds:
                raise StoreUnavailable(f"Redis does not answer ({self._last_failure})")
            # This caller tries; the others go on resting until it knows.
            self._resting_until_seconds = now + self.timeout_seconds + REST_SECONDS

    def _succeeded(self) -> None:
        if self._resting_until_seconds is None and self._ever_reached:
            return
        self._ever_reached = True
        self._end_rest()

    def _end_rest(self) -> None:
        with self._lock:
            was_down = self._resting_until_seconds is not None
            self._resting_until_seconds = None
        if was_down:
            self._observer(Event("store_back", {}))

    def _failed(self, error: Exception) -> StoreError:
        if isinstance(error, _PoolExhausted):
            if self._resting_until_seconds is not None:
                return StoreUnavailable(f"Redis does not answer ({self._last_failure})")
            return StoreBusy("all connections to Redis are in use")
        if isinstance(error, AuthenticationError | AuthorizationError) or not _is_outage(error):
            self._observer(Event("store_broken", {"error": _cut(error)}))
            if isinstance(error, AuthenticationError | AuthorizationError | NoPermissionError):
                # It holds for whatever we ask, and whoever asks how we are is told.
                self._remember_unwilling()
            if isinstance(error, redis.ResponseError):
                # It answered. Else one wrong command, tried again and again, would hold the breaker open for all.
                self._end_rest()
            return StoreBroken(_cut(error))
        was_cut_off = isinstance(error, redis.ConnectionError | redis.TimeoutError)
        if isinstance(error, redis.TimeoutError) and self.wait_seconds() <= 0:
            # No rest: it was not given the time that everybody grants it.
            return StoreBusy("Redis did not answer in the time that was left", maybe_done=True)
        if was_cut_off:
            self._rest(error)
        else:
            # No rest: the next command may be one that it does. But whoever asks how we are is told.
            self._remember_unwilling()
        return StoreUnavailable(_cut(error), maybe_done=was_cut_off)

    def _remember_unwilling(self) -> None:
        self._unwilling_until_seconds = self._clock.monotonic_seconds() + UNWILLING_SECONDS

    def _rest(self, error: Exception) -> None:
        with self._lock:
            was_up = self._resting_until_seconds is None
            self._last_failure = _cut(error)
            self._resting_until_seconds = self._clock.monotonic_seconds() + REST_SECONDS
        if was_up:
            self._observer(Event("store_lost", {"error": _cut(error)}))


def ask(client: Client, words: Sequence[str | int]) -> Any:
    """The reply to one command: what `client.execute_command` does, without what it does besides.

    Each decision passes here, and the client library's own way (metrics that nobody collects, a poll before each use,
    a look at every word's type) took as long as the script. A connection that broke is found out by its use, and
    `Link.run` replaces it; one on which a reply may still be due is closed, so that nobody reads another's answer.
    """
    pool: Any = client.connection_pool
    if not isinstance(pool, _Pool):
        execute: Callable[..., Any] = client.execute_command
        return execute(*words)
    connection = pool.borrow()
    try:
        connection.send_packed_command([pack_command(tuple(words))])
        return connection.read_response()
    except redis.ResponseError:
        raise
    except BaseException:
        connection.disconnect()
        raise
    finally:
        pool.give_back(connection)


def without_password(url: str) -> str:
    """The same address, fit for a log."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}"


def check_url(url: str) -> None:
    """Say what of an address the client library would overlook, or find out only when it connects.

    Raises:
        ConfigurationError: one line, without a value (it may be a secret).
    """
    try:
        parts = urlsplit(url)
        options = parse_qs(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError as error:
        raise ConfigurationError("REDIS_URL: a URL; what stands behind the ? is not name=value") from error
    allowed = (*_URL_OPTIONS, *(_TLS_OPTIONS if parts.scheme == "rediss" else ()))
    for name in options:
        if name not in allowed:
            why = "; time-outs, retries, the pool and the protocol are set by Tollgate" if name in _OURS else ""
            raise ConfigurationError(
                f"REDIS_URL: the options {', '.join(allowed)} are allowed behind the ?{why}; got {shown(name)}"
            )
    if parts.scheme in {"redis", "rediss"} and not re.fullmatch(r"/?|/[0-9]{1,9}", parts.path):
        raise ConfigurationError("REDIS_URL: behind the host only / and the number of a database are allowed")
    if parts.scheme == "unix" and not parts.path:
        raise ConfigurationError("REDIS_URL: behind unix:// stands the path of a socket")
    if options.get("ssl_cert_reqs", ["none"])[-1] not in {"none", "optional", "required"}:
        raise ConfigurationError("REDIS_URL: ssl_cert_reqs has to be none, optional or required")


Words = tuple[str | int, ...]
Say = Callable[[Sequence[Words]], list[Any]]
"""Sends commands at once, in one round trip, and gives their replies. The first that is an error is raised."""


@contextmanager
def conversation(client: Client) -> Iterator[Say]:
    """One connection for a while: what one batch watches, the next is tied to. Left with an error, it is closed."""
    pool: Any = client.connection_pool
    is_ours = isinstance(pool, _Pool)
    connection = pool.borrow() if is_ours else pool.get_connection()
    try:
        yield lambda commands: _said(connection, commands)
    except BaseException:
        connection.disconnect()
        raise
    finally:
        (pool.give_back if is_ours else pool.release)(connection)


def transaction(say: Say, commands: Sequence[Words]) -> list[Any] | None:
    """The replies to commands that are done in one step; None where something watched has changed: nothing is done."""
    replies: list[Any] | None = say([("MULTI",), *commands, ("EXEC",)])[-1]
    for reply in replies or ():
        if isinstance(reply, redis.ResponseError):
            raise reply
    return replies


def _said(connection: redis.Connection, commands: Sequence[Words]) -> list[Any]:
    connection.send_packed_command([b"".join(map(pack_command, commands))])  # type: ignore[no-untyped-call] # redis-py
    replies = [_reply(connection) for _ in commands]
    for reply in replies:
        if isinstance(reply, redis.ResponseError):
            raise reply
    return replies


def _reply(connection: redis.Connection) -> Any:
    try:
        return connection.read_response()
    except redis.ResponseError as error:
        # The replies to the other commands are still due.
        return error


def _client(
    url: str, timeout_seconds: float, pool_size: int, connection_class: type[redis.Connection] | None
) -> redis.Redis:
    options: dict[str, Any] = {"connection_class": connection_class} if connection_class else {}
    check_url(url)
    try:
        pool = _Pool.from_url(
            url,
            max_connections=pool_size,
            queue_class=_FreeConnections,
            timeout=timeout_seconds,
            socket_timeout=timeout_seconds,
            socket_connect_timeout=timeout_seconds,
            # The library's own defaults repeat a timed-out command up to ten times: that is how money is charged twice.
            retry=Retry(NoBackoff(), 0),
            # RESP2 and no client name: a new connection costs no round trip of its own.
            protocol=2,
            driver_info=None,
            **options,
        )
        # It connects to nothing yet; what is wrong with it is told now and not at the first question.
        pool.connection_class(**pool.connection_kwargs)
    except (ValueError, TypeError, redis.RedisError) as error:
        raise ConfigurationError(f"REDIS_URL: {error}") from error
    return redis.Redis(connection_pool=pool)


def _call_before_each_send(pool: redis.ConnectionPool, before_each_send: Callable[[bytes], None]) -> None:
    """Every way to Redis sends here, once for each round trip: single commands, pipelines and `ask`."""

    class Announcing(pool.connection_class):  # type: ignore[misc,name-defined] # whichever the URL's scheme chose
        is_setting_up = False

        def on_connect_check_health(self, check_health: bool = True) -> None:  # noqa: FBT001, FBT002 (theirs)
            self.is_setting_up = True
            try:
                super().on_connect_check_health(check_health)
            finally:
                self.is_setting_up = False

        def send_packed_command(self, command: Any, check_health: bool = True) -> None:  # noqa: FBT001, FBT002 (theirs)
            # The first one connects, and is announced before that.
            if not self.is_setting_up:
                before_each_send(command if isinstance(command, bytes) else b"".join(command))
            super().send_packed_command(command, check_health)

    pool.connection_class = Announcing


def _fake_client() -> redis.Redis:
    try:
        import fakeredis  # noqa: PLC0415 (a development dependency; only fake:// needs it)
    except ImportError as error:
        raise ConfigurationError("REDIS_URL: fake:// needs the package fakeredis[lua], which is missing") from error
    return fakeredis.FakeRedis(version=(7, 2))


def _is_outage(error: Exception) -> bool:
    if isinstance(error, _OUTAGE_TYPES) or type(error) is RedisClusterException:
        return True
    return isinstance(error, redis.ResponseError) and str(error).startswith(_OUTAGE_PREFIXES)


def _cut(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _version_tuple(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
