"""Requests per time, in fixed windows: of a network on all routes together, and of a caller on each route by itself.

One script counts both in Redis, in one round trip and before the body is read. While Redis is away a worker counts in
its own memory. While the link is busy, requests that cannot be counted are refused: otherwise a flood would give every
caller a second, empty counter.
"""

import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

from flask import Blueprint, Response, request
from limits import parse_many

from backends.clock import Clock
from backends.errors import StoreBusy, StoreError
from backends.keys import counter_key
from backends.store.link import Link
from backends.store.scripts import Script
from flaskapp.http.forwarded import NETWORK
from flaskapp.http.refusals import RATE_LIMITED, THROTTLE_UNAVAILABLE, problem

ADMIN_RATE_LIMIT = "60 per minute"
MOST_MADE = 1_000
"""Counters of callers that one network may make in the time that one is kept; twice as many may be kept at once."""
_MOST_LOCAL = 10_000
_MS_PER_SECOND = 1_000
_COUNT = Script("count.lua")


class Window(NamedTuple):
    """A number of requests, and the time in which there may be no more."""

    most: int
    seconds: int
    words: str


class _Limit(NamedTuple):
    """What holds for the routes of a blueprint, beside the network's limit; nothing where the rate is empty."""

    rate: Callable[[], str] = str
    key: Callable[[], str] = str
    is_made_up: bool = False
    """Whether a caller may choose its key."""


class _Plan(NamedTuple):
    """The windows of a request, the network's first, and what the script is given."""

    of_network: tuple[Window, ...]
    of_caller: tuple[Window, ...]
    args: tuple[int, ...]


class RequestLimiter:
    """Counts requests before they are handled; `network_rate` and the others are asked anew for each."""

    def __init__(self, link: Link, clock: Clock, network_rate: Callable[[], str]) -> None:
        self._link = link
        self._network_rate = network_rate
        self._limits: dict[str | None, _Limit] = {}
        self.local = LocalCounters(clock)

    def limit_blueprint(
        self, blueprint: Blueprint, rate: Callable[[], str], key: Callable[[], str], *, is_made_up: bool = False
    ) -> None:
        """Let `rate` hold for each of the blueprint's routes by itself, and for each `key` of a request.

        The network's rate holds for all of them together. Where `is_made_up`, a caller may choose its key.
        """
        self._limits[blueprint.name] = _Limit(rate, key, is_made_up)

    def limit_network(self, blueprint: Blueprint) -> None:
        """Let the network's rate alone hold for the blueprint's routes. They are there when the link is busy, too."""
        self._limits[blueprint.name] = _Limit()

    def check_request(self) -> Response | None:
        """To be called before each request: count it. None for one that passes."""
        limit = self._limits.get(request.blueprint)
        if limit is None:
            return None
        plan = _plan(self._network_rate(), limit.rate(), is_made_up=limit.is_made_up)
        network = request.environ[NETWORK]
        caller = f"{request.endpoint} {limit.key()}"
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
            number, left_ms = self.local.count(keys, plan.args)
        return None if number == 0 else _refused(plan, number, left_ms)


class LocalCounters:
    """The counters of one process, while Redis is away; bounded in number."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._counters: dict[str, tuple[int, float]] = {}
        """How many, and until when."""
        self._lock = threading.Lock()

    def count(self, keys: Sequence[str], args: Sequence[int]) -> tuple[int, int]:
        """As ``count.lua`` does, with its reply."""
        now_seconds = self._clock.monotonic_seconds()
        limits, lengths = args[3::2], args[4::2]
        with self._lock:
            counted = [self._counted(key, now_seconds) for key in keys[:-1]]
            for number, ((count, ends_seconds), most) in enumerate(zip(counted, limits, strict=True), 1):
                if count >= most:
                    return number, int((ends_seconds - now_seconds) * _MS_PER_SECOND)
            if len(self._counters) >= _MOST_LOCAL:
                self._counters = {key: each for key, each in self._counters.items() if each[1] > now_seconds}
            for key, (count, ends_seconds), seconds in zip(keys, counted, lengths, strict=False):
                if count or len(self._counters) < _MOST_LOCAL:
                    self._counters[key] = count + 1, ends_seconds if count else now_seconds + seconds
        return 0, 0

    def _counted(self, key: str, now_seconds: float) -> tuple[int, float]:
        count, ends_seconds = self._counters.get(key, (0, 0.0))
        return (count, ends_seconds) if ends_seconds > now_seconds else (0, 0.0)


@lru_cache(maxsize=64)
def _plan(network_rate: str, rate: str, *, is_made_up: bool) -> _Plan:
    of_network, of_caller = _windows(network_rate), _windows(rate) if rate else ()
    windows = (*of_network, *of_caller)
    free = len(of_network) if is_made_up else len(windows)
    longest_seconds = max((window.seconds for window in of_caller), default=1)
    bounds = [bound for window in windows for bound in (window.most, window.seconds)]
    return _Plan(of_network, of_caller, (free, MOST_MADE, longest_seconds, *bounds))


def _windows(rate: str) -> tuple[Window, ...]:
    return tuple(
        Window(
            item.amount,
            item.get_expiry(),
            f"{item.amount} per {'' if item.multiples == 1 else f'{item.multiples} '}{item.GRANULARITY.name}",
        )
        for item in parse_many(rate)
    )


def _refused(plan: _Plan, number: int, left_ms: int) -> Response:
    is_network = number <= len(plan.of_network)
    words = (*plan.of_network, *plan.of_caller)[number - 1].words
    who = " from your network" if is_network else ""
    return problem(
        429,
        RATE_LIMITED,
        "rate_limit",
        lambda seconds: f"Too many requests{who}: {words} are allowed. Please try again in {seconds} seconds.",
        retry_after_seconds=max(1, -(-left_ms // _MS_PER_SECOND)),
        scope="network" if is_network else "identifier",
    )


def network_key() -> str:
    """The key of the request counter on routes without a visitor: the network."""
    return f"ip:{request.environ[NETWORK]}"
