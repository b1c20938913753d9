"""Requests per minute: flask-limiter on the same Redis, through the same `Link` as everything else.

While Redis is away it counts in the worker's own memory, and never answers 500. While the link is busy, requests that
cannot be counted are refused: otherwise a flood would give every caller a second, empty counter.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

from flask import Blueprint, Flask, Response, g, request
from flask_limiter import Limiter, RateLimitExceeded, RequestLimit
from limits import RateLimitItem, parse_many
from limits.storage.base import Storage

from backends.clock import US_PER_SECOND, Clock
from backends.errors import StoreBusy, StoreError
from backends.keys import RATE_PREFIX
from backends.store.connections import conversation, transaction
from backends.store.link import Client, Link
from flaskapp.http.identity import network_of, rate_key
from flaskapp.http.refusals import RATE_LIMITED, THROTTLE_UNAVAILABLE, problem

ADMIN_RATE_LIMIT = "60 per minute"
IDENTIFIERS_PER_NETWORK = 10
"""A network may get as many challenges as so many identifiers may."""


class LinkStorage(Storage):
    """Counters of `limits` in Redis, with the time-outs and the breaker of `Link`."""

    STORAGE_SCHEME = ["tollgate"]  # noqa: RUF012 (the library's own way to register)

    def __init__(self, uri: str, *, wrap_exceptions: bool = False, link: Link, clock: Clock) -> None:
        super().__init__(uri, wrap_exceptions=wrap_exceptions)
        self._link = link
        self._clock = clock

    @property
    def base_exceptions(self) -> type[Exception]:
        """The exception of a failed store."""
        return StoreError

    def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        """The library's word for `count`; what was counted already for this request is not counted again."""
        counted_key, counted = g.pop("counted", ("", 0))
        return counted if counted_key == key else self.count(key, expiry, amount)

    def count(self, key: str, expiry: int, amount: int = 1) -> int:
        """Count, and give a new counter its TTL, in one transaction."""
        commands = (("SET", f"{RATE_PREFIX}:{key}", 0, "EX", expiry, "NX"), ("INCRBY", f"{RATE_PREFIX}:{key}", amount))

        def count(client: Client) -> int:
            # Not the client library's pipeline, which takes twice as long: every request passes here.
            with conversation(client) as send:
                _, counted = transaction(send, commands) or (None, 0)
                return int(counted)

        try:
            return self._link.run(count)
        except StoreBusy:
            g.was_not_counted = True
            return 0

    def get(self, key: str) -> int:
        """The counter; 0 without one."""
        return int(self._link.run(lambda client: client.get(f"{RATE_PREFIX}:{key}")) or 0)

    def get_expiry(self, key: str) -> float:
        """The Unix time, in seconds, at which the counter begins anew."""
        left_ms = max(0, int(self._link.run(lambda client: client.pttl(f"{RATE_PREFIX}:{key}"))))
        return self._clock.now_us() / US_PER_SECOND + left_ms / 1_000

    def check(self) -> bool:
        """Whether Redis is back."""
        try:
            return bool(self._link.run(lambda client: client.ping()))
        except StoreError:
            return False

    def reset(self) -> int | None:
        """Does nothing: it would have to search the whole database."""
        return None

    def clear(self, key: str) -> None:
        """Forget one counter."""
        self._link.run(lambda client: client.delete(f"{RATE_PREFIX}:{key}"))


class LinkLimiter(Limiter):
    """flask-limiter, with a short way for a request that passes.

    The library resolves the limits of a route anew for each request, which takes longer than the count itself. What is
    refused, what has several limits, and all while Redis is away goes the library's own way.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._limits_of: dict[str, list[tuple[Callable[[], str], Callable[[], str]]]] = {}

    def limit_blueprint(self, blueprint: Blueprint, rate: Callable[[], str], key: Callable[[], str]) -> None:
        """Let `rate` hold for each of the blueprint's routes by itself, and for each `key` of a request."""
        self.limit(rate, key_func=key)(blueprint)
        self._limits_of.setdefault(blueprint.name, []).append((rate, key))

    def check_request(self) -> Response | None:
        """To be called before each request: count it.

        Returns:
            None for one that passes; 503 for one that could not be counted.

        Raises:
            RateLimitExceeded: there were too many.
        """
        limits = self._limits_of.get(request.blueprint or "", [])
        # The library asks ever more rarely, by a clock that may have been set back; the link's breaker is enough.
        if limits and self._storage_dead and self.storage.check():
            self._storage_dead = False
        if len(limits) != 1 or not self.enabled or self._storage_dead or not self._passes(*limits[0]):
            self._check_request_limit()
        if g.get("was_not_counted"):
            message = "This service is too busy to count requests. Please try again."
            return problem(503, THROTTLE_UNAVAILABLE, "busy", message, retry_after_seconds=1)
        return None

    def _passes(self, rate: Callable[[], str], key: Callable[[], str]) -> bool:
        """Count the request; False where the library has to decide."""
        items = _items_of(rate())
        if len(items) != 1:
            return False
        counter = items[0].key_for(key(), request.endpoint or "")
        try:
            counted = cast("LinkStorage", self.storage).count(counter, items[0].get_expiry())
        except StoreError:
            return False
        g.counted = counter, counted
        return counted <= items[0].amount


@lru_cache(maxsize=16)
def _items_of(rate: str) -> list[RateLimitItem]:
    return parse_many(rate)


def make_limiter(app: Flask, link: Link, clock: Clock) -> LinkLimiter:
    """The limiter of `app`; registers its refusals."""
    limiter = LinkLimiter(
        lambda: rate_key(request),
        storage_uri="tollgate://",
        storage_options={"link": link, "clock": clock},
        strategy="fixed-window",
        swallow_errors=True,
        in_memory_fallback_enabled=True,
        headers_enabled=False,
        key_prefix="",
    )
    # Before `init_app`, which so adds none of its own hooks: what they do after a request serves headers and limits
    # that are not used here.
    app.extensions["limiter"] = {limiter}
    limiter.init_app(app)
    app.before_request(limiter.check_request)

    @app.errorhandler(RateLimitExceeded)
    def refused(error: RateLimitExceeded) -> Response:
        current = limiter.current_limit
        wait_seconds = _wait_seconds(current, clock)
        allowed = f"{_words(current.limit)} are allowed" if current is not None else "no more are allowed now"
        scope = "network" if error.limit.key_func is network_key else "identifier"
        return problem(
            429,
            RATE_LIMITED,
            "rate_limit",
            lambda seconds: f"Too many requests: {allowed}. Please try again in {seconds} seconds.",
            retry_after_seconds=wait_seconds,
            scope=scope,
        )

    return limiter


def _words(limit: RateLimitItem) -> str:
    times = "" if limit.multiples == 1 else f"{limit.multiples} "
    return f"{limit.amount} per {times}{limit.GRANULARITY.name}"


def _wait_seconds(limit: RequestLimit | None, clock: Clock) -> int:
    """Seconds until the counter begins anew; its whole TTL where Redis was lost since the count."""
    if limit is None:
        return 1
    try:
        ends_at_seconds = limit.window.reset_time
    except StoreError:
        return int(limit.limit.get_expiry())
    return max(1, math.ceil(ends_at_seconds - clock.now_us() / US_PER_SECOND))


def network_key() -> str:
    """The key of the request counter on routes without a visitor: the network."""
    return f"ip:{network_of(request.remote_addr)}"


def network_rate(rate: str) -> str:
    """The rate of a network where `rate` is that of one identifier."""
    return "; ".join(
        f"{item.amount * IDENTIFIERS_PER_NETWORK} per {item.multiples} {item.GRANULARITY.name}"
        for item in parse_many(rate)
    )
