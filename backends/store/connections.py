"""The connections to Redis: a bounded pool, bounded waits, and the short way of a command over one of them.

The client library's own way costs metrics that nothing collects, a poll before each use and a check of every word's
type. One decision takes 112 µs with `client.execute_command`, 92 with `get_connection` and our packing, and 76 as it is
here (under gevent 191, 155 and 101). A connection that is found broken in use is replaced by `Link.run`.
"""

import ipaddress
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotInTime
from contextlib import contextmanager, suppress
from queue import Full
from typing import Any, cast

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from backends.errors import ConfigurationError
from backends.store import Words
from backends.store.addresses import check_url
from backends.store.failures import OpeningFailed, OutOfTime, PoolExhausted, is_too_many_clients

TIMEOUT_SECONDS = 0.5
POOL_SIZE = 50
OPENING_REST_SECONDS = 0.5
"""After a connection could not be opened: how long callers wait for open ones rather than try it again."""

Send = Callable[[Sequence[Words]], list[Any]]
"""Sends commands in one round trip and returns their replies. The first reply that is an error is raised."""


def pack_in_python(words: Words) -> bytes:
    """One command as Redis reads it: what hiredis makes in C, for where it is not installed."""
    parts = [str(word).encode() for word in words]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)


pack_command: Callable[[Words], bytes] = pack_in_python
with suppress(ImportError):
    from hiredis import pack_command as _pack_in_c

    # Its published type allows a single word.
    pack_command = cast("Any", _pack_in_c)


def execute(client: redis.Redis, words: Words) -> Any:
    """The reply to one command, as `client.execute_command` gives it, by a shorter way.

    A connection on which a reply may still be due is closed, so that no caller reads the reply of another.
    """
    pool: Any = client.connection_pool
    if not isinstance(pool, Pool):
        execute_command: Callable[..., Any] = client.execute_command
        return execute_command(*words)
    connection = pool.borrow()
    try:
        connection.send_packed_command([pack_command(words)])
        return connection.read_response()
    except redis.ResponseError:
        raise
    except BaseException:
        connection.disconnect()
        raise
    finally:
        pool.give_back(connection)


@contextmanager
def conversation(client: redis.Redis) -> Iterator[Send]:
    """Several round trips on one connection, as WATCH needs them. After an exception the connection is closed."""
    pool: Any = client.connection_pool
    is_ours = isinstance(pool, Pool)
    connection = pool.borrow() if is_ours else pool.get_connection()
    try:
        yield lambda commands: _replies(connection, commands)
    except BaseException:
        connection.disconnect()
        raise
    finally:
        (pool.give_back if is_ours else pool.release)(connection)


def transaction(send: Send, commands: Sequence[Words]) -> list[Any] | None:
    """The replies to commands that are done in one step; None where a watched key has changed, and nothing is done."""
    replies: list[Any] | None = send([("MULTI",), *commands, ("EXEC",)])[-1]
    for reply in replies or ():
        if isinstance(reply, redis.ResponseError):
            raise reply
    return replies


def _replies(connection: redis.Connection, commands: Sequence[Words]) -> list[Any]:
    connection.send_packed_command([b"".join(map(pack_command, commands))])  # type: ignore[no-untyped-call] # redis-py
    replies = []
    for _ in commands:
        try:
            replies.append(connection.read_response())
        except redis.ResponseError as error:
            # The replies to the other commands are still due.
            replies.append(error)
    for reply in replies:
        if isinstance(reply, redis.ResponseError):
            raise reply
    return replies


class _BoundedWaits:
    """Base beside a connection class of the client library: no wait is longer than the caller's time."""

    wait_seconds: Callable[[], float]
    socket_timeout: float
    socket_connect_timeout: float
    _sock: Any

    def _connect(self) -> Any:
        wait_seconds = self._next_wait_seconds()
        self.socket_timeout = self.socket_connect_timeout = wait_seconds
        connect: Callable[[], Any] = super()._connect  # type: ignore[misc] # the connection class stands beside
        try:
            # Only a name is looked up, which takes as long as it takes.
            return _in_time(connect, wait_seconds) if _is_name(getattr(self, "host", "")) else connect()
        except OSError as error:
            raise OpeningFailed(f"no connection could be opened: {error}") from error

    def read_response(self, *args: Any, **options: Any) -> Any:  # the client library's own signature
        wait_seconds = self._next_wait_seconds()
        if wait_seconds != self.socket_timeout and self._sock is not None:
            self.socket_timeout = wait_seconds
            self._sock.settimeout(wait_seconds)
        try:
            return super().read_response(*args, **options)  # type: ignore[misc] # as above
        except (redis.ConnectionError, redis.ResponseError) as error:
            if not is_too_many_clients(error):
                raise
            self.disconnect()  # type: ignore[attr-defined] # as above
            raise OpeningFailed(str(error)) from error

    def _next_wait_seconds(self) -> float:
        wait_seconds = type(self).wait_seconds()
        if wait_seconds <= 0:
            self.disconnect()  # type: ignore[attr-defined] # as above
            raise OutOfTime("no time left to wait for Redis")
        return wait_seconds


def _is_name(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return bool(host)
    return False


def _in_time(connect: Callable[[], Any], seconds: float) -> Any:
    """What `connect` returns, if it does within `seconds`; what it opens later is closed.

    Raises:
        TimeoutError: it did not.
    """
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            opened = connect()
        except BaseException as error:  # noqa: BLE001 - raised below, where it is still waited for
            if outcome.set_running_or_notify_cancel():
                outcome.set_exception(error)
        else:
            if outcome.set_running_or_notify_cancel():
                outcome.set_result(opened)
            else:
                opened.close()

    threading.Thread(target=run, name="tollgate-connect", daemon=True).start()
    try:
        return outcome.result(seconds)
    except NotInTime:
        if outcome.cancel():
            raise TimeoutError("the host's name was not found in time") from None
        return outcome.result()


class FreeConnections:
    """What the pool uses of a `queue.LifoQueue`, without a lock unless a caller has to wait.

    With threads the locks of a `LifoQueue` take 4 of the 76 µs of a decision; gevent's own takes none.
    """

    def __init__(self, size: int) -> None:
        self.queue: list[Any] = []
        self._size = size
        self._returned = threading.Condition()
        self._waiting = 0
        self.holds_back_closed: Callable[[], bool] | None = None
        """Whether only connections that are open may be taken now; None: all may."""

    def take(self) -> list[Any]:
        """The connection returned last, or nothing. One step of a list, so that it needs no lock."""
        try:
            taken = self.queue.pop()
        except IndexError:
            return []
        if self.holds_back_closed is not None and not _is_open(taken) and self.holds_back_closed():
            self.queue.insert(0, taken)
            return []
        return [taken]

    def get(self, *, timeout: float, block: bool = True) -> Any:
        """As in `queue`, but what is raised is `PoolExhausted`, which the client library hands on."""
        with self._returned:
            # Register as waiting before checking, so that no wake-up is lost.
            self._waiting += 1
            try:
                taken = self._returned.wait_for(self.take, timeout if block else 0)
            finally:
                self._waiting -= 1
        if not taken:
            raise PoolExhausted("No connection available.")
        return taken[0]

    def put_nowait(self, connection: Any) -> None:
        """As in `queue`, but what is closed is taken last."""
        if len(self.queue) >= self._size:
            raise Full
        self.queue.insert(len(self.queue) if _is_open(connection) else 0, connection)
        if self._waiting:
            with self._returned:
                self._returned.notify()


def _is_open(connection: Any) -> bool:
    return getattr(connection, "_sock", connection) is not None


class Pool(redis.BlockingConnectionPool):
    """The client library's pool, with a quick way to borrow a connection and with waits that the caller bounds."""

    wait_seconds: Callable[[], float] = staticmethod(lambda: TIMEOUT_SECONDS)

    @property
    def timeout(self) -> float:
        """How long one wait for a connection may take; the client library's own name."""
        return max(0.0, self.wait_seconds())

    @timeout.setter
    def timeout(self, _: float) -> None:
        """The client library sets it once; here each caller has its own."""

    def bound_waits(self, wait_seconds: Callable[[], float], now_seconds: Callable[[], float]) -> None:
        """Call `wait_seconds` before each wait, for a connection and on one; `now_seconds` is monotonic."""
        self.wait_seconds = wait_seconds
        self._now_seconds = now_seconds
        bounds = {"wait_seconds": staticmethod(wait_seconds)}
        self.connection_class = type(self.connection_class.__name__, (_BoundedWaits, self.connection_class), bounds)

    def borrow(self) -> Any:
        """A connection as it was left, or a new one. One that Redis has closed meanwhile fails when it is used."""
        self._checkpid()
        taken = self.pool.take()
        connection = taken[0] if taken else self.pool.get(timeout=self.timeout)
        return connection or self.make_connection()  # type: ignore[no-untyped-call] # redis-py leaves it untyped

    def get_connection(self, *_: Any, **__: Any) -> Any:  # the client library's own signature
        """As `borrow`: each way to a connection is the same, and `Link.run` replaces one that is found broken."""
        return self.borrow()

    def close_dead(self) -> None:
        """Close what is free and was closed by the server; what works stays open."""
        for connection in [each for each in self.pool.queue if each is not None and _is_open(each)]:
            try:
                # Nobody may use it meanwhile: to look may take a moment.
                self.pool.queue.remove(connection)
            except ValueError:
                continue
            try:
                is_dead = connection.can_read()
            except (redis.RedisError, OSError):
                is_dead = True
            if is_dead:
                connection.disconnect()
            self.give_back(connection)

    def rest_from_opening(self) -> bool:
        """Give out open connections only, for `OPENING_REST_SECONDS` or until there are none; whether there are any."""
        ends_at_seconds = self._now_seconds() + OPENING_REST_SECONDS

        def rests() -> bool:
            if self._now_seconds() < ends_at_seconds and any(map(_is_open, self._connections)):
                return True
            self.pool.holds_back_closed = None
            return False

        self.pool.holds_back_closed = rests
        return rests()

    def give_back(self, connection: redis.Connection) -> None:
        """To be called once for each `borrow`, when no reply is left to read."""
        self.pool.put_nowait(connection)


def open_client(
    url: str, timeout_seconds: float, pool_size: int, connection_class: type[redis.Connection] | None
) -> redis.Redis:
    """A client that has connected to nothing yet.

    Raises:
        ConfigurationError: the address cannot be used; one line without a secret.
    """
    if url.startswith("fake:"):
        return _fake_client()
    check_url(url)
    options: dict[str, Any] = {"connection_class": connection_class} if connection_class else {}
    try:
        pool = Pool.from_url(
            url,
            max_connections=pool_size,
            queue_class=FreeConnections,
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
        # What is wrong with the options is found now, and not by the first command.
        pool.connection_class(**pool.connection_kwargs)
    except (ValueError, TypeError, redis.RedisError) as error:
        # The library's own text may repeat a part of the address.
        raise ConfigurationError(f"REDIS_URL: an address that can be used ({type(error).__name__})") from None
    return redis.Redis(connection_pool=pool)


def _fake_client() -> redis.Redis:
    try:
        import fakeredis  # noqa: PLC0415 (a development dependency; only fake:// needs it)
    except ImportError as error:
        raise ConfigurationError("REDIS_URL: fake:// needs the package fakeredis[lua], which is missing") from error
    return fakeredis.FakeRedis(version=(7, 2), protocol=2)


def call_before_each_send(pool: redis.ConnectionPool, before_each_send: Callable[[bytes], None]) -> None:
    """Every way to Redis sends here, once for each round trip: single commands, pipelines and `execute`."""

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
