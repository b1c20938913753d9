"""Requests per time, in fixed windows: of a network on all routes together, and of a caller on each route by itself.

One script counts both in Redis, in one round trip and before the body is read. While Redis is away flask-limiter counts
in the worker's own memory. While the link is busy, requests that cannot be counted are refused: otherwise a flood would
give every caller a second, empty counter.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple, TypeAlias

from flask import Blueprint, Flask, Request, Response, g, request
from flask.globals import request_ctx
from flask_limiter import Limiter, RateLimitExceeded
from limits import RateLimitItem, parse_many
from limits.storage import MemoryStorage

from backends.clock import US_PER_SECOND, Clock
from backends.errors import StoreBusy, StoreError
from backends.keys import counter_key
from backends.store.link import Link
from backends.store.scripts import Script
from flaskapp.http.forwarded import NETWORK
from flaskapp.http.identity import Identity, unnamed
from flaskapp.http.refusals import RATE_LIMITED, THROTTLE_UNAVAILABLE, InvalidRequest, problem

ADMIN_RATE_LIMIT = "60 per minute"
MOST_MADE = 1_000
"""Counters of callers that one network may make in the time that one is kept; twice as many may be kept at once."""
MOST_LOCAL = 10_000
"""Counters that a worker keeps while Redis is away."""
_MS_PER_SECOND = 1_000
_NETWORK = "network"
_COUNT = Script("count.lua")


class Window(NamedTuple):
    """A number of requests, and the time in which there may be no more."""

    most: int
    seconds: int
    words: str


Find: TypeAlias = Callable[[Request], Identity | None]
"""Who sent a request; None where that is not known. It may raise `InvalidRequest`."""


class _Limit(NamedTuple):
    """What holds for the routes of a blueprint, beside the network's limit; nothing where the rate is empty."""

    rate: Callable[[], str] = str
    find: Find = lambda _: None
    is_made_up: bool = False
    """Whether a caller may choose its identifier."""


class _Plan(NamedTuple):
    """The windows of a request, the network's first, and what the script is given."""

    of_network: tuple[Window, ...]
    of_caller: tuple[Window, ...]
    args: tuple[int, ...]


class RequestLimiter:
    """Counts requests before they are handled; `network_rate` and the others are asked anew for each."""

    def __init__(self, app: Flask, link: Link, clock: Clock, network_rate: Callable[[], str]) -> None:
        self._link = link
        self._clock = clock
        self._network_rate = network_rate
        self._limits: dict[str | None, _Limit] = {}
        self._local = Limiter(
            _key_of_network, storage_uri="tollgate://", strategy="fixed-window", headers_enabled=False
        )
        # Before `init_app`, which so adds none of its own hooks: they would take longer than our count itself.
        app.extensions["limiter"] = {self._local}
        self._local.init_app(app)
        app.before_request(self.check_request)

    def limit_blueprint(
        self, blueprint: Blueprint, rate: Callable[[], str], find: Find, *, is_made_up: bool = False
    ) -> None:
        """Let `rate` hold for each of the blueprint's routes by itself, and for each caller that `find` finds.

        The network's rate holds for all of them together. Where `is_made_up`, a caller may choose its identifier.
        """
        self._limits[blueprint.name] = _Limit(rate, find, is_made_up)
        self._local.limit(rate, key_func=_key_of_caller)(blueprint)
        self._limit_locally(blueprint)

    def limit_network(self, blueprint: Blueprint) -> None:
        """Let the network's rate alone hold for the blueprint's routes. They are there when the link is busy, too."""
        self._limits[blueprint.name] = _Limit()
        self._limit_locally(blueprint)

    def check_request(self) -> Response | None:
        """To be called before each request: count it. None for one that passes; who sent it is in `g.who` then."""
        asked = request_ctx.request
        limit = self._limits.get(asked.blueprint)
        if limit is None:
            return None
        plan = _plan(self._network_rate(), limit.rate(), is_made_up=limit.is_made_up)
        network = asked.environ[NETWORK]
        try:
            g.who = who = limit.find(asked)
        except InvalidRequest:
            # It counts too.
            g.who = who = None
        caller = f"{asked.endpoint} {who.identifier if who else unnamed(network)}"
        keys = [counter_key(f"network {network} {window.words}") for window in plan.of_network]
        keys += [counter_key(f"{caller} {window.words}") for window in plan.of_caller]
        keys.append(counter_key(f"made {network}"))
        try:
            number, left_ms = self._link.run(lambda client: _COUNT.run(client, keys, plan.args))
        except StoreBusy:
            if not plan.of_caller:
                return None
            message = "This service is too busy to count requests. Please try again."
            return problem(503, THROTTLE_UNAVAILABLE, "busy", message, retry_after_seconds=1)
        except StoreError:
            return self._check_locally()
        if number == 0:
            return None
        window = (*plan.of_network, *plan.of_caller)[number - 1]
        return _refused(window.words, left_ms / _MS_PER_SECOND, is_network=number <= len(plan.of_network))

    def _limit_locally(self, blueprint: Blueprint) -> None:
        self._local.shared_limit(self._network_rate, scope=_NETWORK, key_func=_key_of_network)(blueprint)

    def _check_locally(self) -> Response | None:
        try:
            self._local._check_request_limit(in_middleware=False)  # noqa: SLF001 (there is no other word for it)
        except RateLimitExceeded as error:
            limit = self._local.current_limit
            left_seconds = limit.reset_at - self._clock.now_us() / US_PER_SECOND if limit else 0
            is_network = error.limit.key_func is _key_of_network and bool(error.limit.shared)
            return _refused(_words(error.limit.limit), left_seconds, is_network=is_network)
        return None


class BoundedMemory(MemoryStorage):
    """Counters in the memory of a process, at most `MOST_LOCAL`: what is beyond does not count."""

    STORAGE_SCHEME = ["tollgate"]  # noqa: RUF012 (the library's own way to register)

    def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        """The library's word for one more request."""
        if key not in self.storage and len(self.storage) >= MOST_LOCAL:
            return 0
        return super().incr(key, expiry, amount)


@lru_cache(maxsize=64)
def _plan(network_rate: str, rate: str, *, is_made_up: bool) -> _Plan:
    of_network, of_caller = _windows(network_rate), _windows(rate) if rate else ()
    windows = (*of_network, *of_caller)
    free = len(of_network) if is_made_up else len(windows)
    longest_seconds = max((window.seconds for window in of_caller), default=1)
    bounds = [bound for window in windows for bound in (window.most, window.seconds)]
    return _Plan(of_network, of_caller, (free, MOST_MADE, longest_seconds, *bounds))


def _windows(rate: str) -> tuple[Window, ...]:
    return tuple(Window(item.amount, item.get_expiry(), _words(item)) for item in parse_many(rate))


def _words(item: RateLimitItem) -> str:
    times = "" if item.multiples == 1 else f"{item.multiples} "
    return f"{item.amount} per {times}{item.GRANULARITY.name}"


def _refused(words: str, left_seconds: float, *, is_network: bool) -> Response:
    who = " from your network" if is_network else ""
    return problem(
        429,
        RATE_LIMITED,
        "rate_limit",
        lambda seconds: f"Too many requests{who}: {words} are allowed. Please try again in {seconds} seconds.",
        retry_after_seconds=max(1, math.ceil(left_seconds)),
        scope=_NETWORK if is_network else "identifier",
    )


def _key_of_network() -> str:
    return unnamed(request.environ[NETWORK])


def _key_of_caller() -> str:
    return g.who.identifier if g.who else _key_of_network()
