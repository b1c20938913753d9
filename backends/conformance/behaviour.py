r"""The conformance suite: what every backend must do, ours or another package's. Needs pytest to run, not to import.

A test module of the other package holds this, where the name is the one registered in the entry-point group
``tollgate.backends``, and the database is one that may be emptied::

    class TestMyBackend(Conformance):
        @pytest.fixture(autouse=True)
        def _open(self):
            self.harness = RedisHarness("my-backend", "redis://127.0.0.1:6380/0")
            yield self.harness
            self.harness.close()

A backend that keeps its books elsewhere brings a `Harness` of its own.
``pytest.register_assert_rewrite("backends.conformance.behaviour")`` in a conftest makes failures talkative.
Time is a clock that the suite moves, together with the lives of the stored keys; nothing sleeps.
"""

# ruff: noqa: S101, D102, PLR2004 (asserts are the point, a test's name says what must hold, the numbers are the expectations)

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, Protocol

from backends import open_backend
from backends.clock import US_PER_SECOND, SystemClock
from backends.contract import (
    Ask,
    Backend,
    Books,
    Duplicate,
    DuplicateState,
    Idempotency,
    Limits,
    Outcome,
    Reason,
    Refusal,
    Reservation,
    Scope,
    Settlement,
    Verdict,
)
from backends.errors import ReservationConflict
from backends.keys import (
    IDEMPOTENCY_KEEP_SECONDS,
    PENDING_BUCKETS,
    RECORD_KEEP_SECONDS,
    WINDOW_BUCKETS,
    book_keys,
    bucket_seconds_of,
    pending_bucket_seconds_of,
)
from backends.store.link import Client, Link
from backends.strategies.memory import MemoryBackend

US = US_PER_SECOND
START_US = int(datetime(2026, 3, 14, 10, 20, tzinfo=UTC).timestamp()) * US
WINDOW_SECONDS = 600
BUCKET_SECONDS = bucket_seconds_of(WINDOW_SECONDS)
PENDING_SECONDS = 120
PENDING_BUCKET_SECONDS = pending_bucket_seconds_of(PENDING_SECONDS)
THROTTLE_SECONDS = 30
COST = 4_000_000
ROOM = 10**12
WHO, NETWORK = "hash456", "198.51.100.7"
KEY = Idempotency("0123456789abcdef" * 2, "fedcba9876543210")

Value = str | dict[int, int]
Stored = dict[str, tuple[Value, int]]
"""Key -> (text, or ring as {bucket start: nano-dollars}; seconds left, -1 for ever)."""

ROOMY = Limits(
    window_nanousd=ROOM,
    day_nanousd=ROOM,
    network_window_nanousd=ROOM,
    network_day_nanousd=ROOM,
    global_hour_nanousd=ROOM,
    global_day_nanousd=ROOM,
    window_seconds=WINDOW_SECONDS,
    throttle_seconds=THROTTLE_SECONDS,
    mark_when_busy=True,
)


@dataclass(frozen=True, slots=True)
class LimitCase:
    """One limit: its field in `Limits`, how its refusal is told, and the life of the marker that it sets (0: none)."""

    field: str
    reason: Reason
    scope: Scope
    marker_seconds: int = 0

    def set_to(self, nanousd: int | None, limits: Limits = ROOMY) -> Limits:
        changes: dict[str, Any] = {self.field: nanousd}
        return replace(limits, **changes)


LIMITS_IN_ORDER = (
    LimitCase("day_nanousd", Reason.DAILY_LIMIT, Scope.IDENTIFIER, 2 * THROTTLE_SECONDS),
    LimitCase("window_nanousd", Reason.WINDOW_LIMIT, Scope.IDENTIFIER, THROTTLE_SECONDS),
    LimitCase("network_window_nanousd", Reason.NETWORK_LIMIT, Scope.NETWORK),
    LimitCase("network_day_nanousd", Reason.NETWORK_DAILY_LIMIT, Scope.NETWORK),
    LimitCase("global_hour_nanousd", Reason.GLOBAL_HOURLY_LIMIT, Scope.GLOBAL),
    LimitCase("global_day_nanousd", Reason.GLOBAL_DAILY_LIMIT, Scope.GLOBAL),
)
RINGS = (Reason.WINDOW_LIMIT, Reason.NETWORK_LIMIT)


class ManualClock:
    """A clock that stands still until it is moved."""

    def __init__(self, now_us: int = START_US) -> None:
        self.us = now_us

    def now_us(self) -> int:
        return self.us

    def monotonic_seconds(self) -> float:
        return self.us / US


class Harness(Protocol):
    """What the suite needs of whoever runs it: a backend that decides by `clock`, and a hand in its store."""

    backend: Backend
    clock: ManualClock

    def pass_time(self, us: int) -> None:
        """Move the clock; what is stored ages as much."""

    def stored(self) -> Stored:
        """Everything that is stored now."""

    def put(self, key: str, text: str, ttl_seconds: int) -> None:
        """Store a string, as an operator would by hand."""

    def lose(self, key: str) -> None:
        """Delete a key, as a crash would."""

    def clear(self) -> None:
        """Delete everything and start the clock anew."""

    def close(self) -> None:
        """Give back what was opened."""


class MemoryHarness:
    """The memory strategy, and the suite's hand in it."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self._memory = MemoryBackend(self.clock)
        self.backend: Backend = self._memory

    def pass_time(self, us: int) -> None:
        self.clock.us += us

    def stored(self) -> Stored:
        dictionary = self._memory.dictionary
        return {
            key: (self._value(key), -(-dictionary.execute(("PTTL", key)) // 1_000)) for key in dictionary.live_keys()
        }

    def put(self, key: str, text: str, ttl_seconds: int) -> None:
        self._memory.dictionary.execute(("SET", key, text, "EX", ttl_seconds))

    def lose(self, key: str) -> None:
        self._memory.dictionary.execute(("DEL", key))

    def clear(self) -> None:
        self.clock.us = START_US
        self._memory.dictionary.clear()

    def close(self) -> None:
        self._memory.close()

    def _value(self, key: str) -> Value:
        value = self._memory.dictionary.value(key)
        return value.decode() if isinstance(value, bytes) else value or {}


HAIR_MS = 250
"""How exact a stored life is: the server's own clock runs on, and on a busy machine an operation takes its time."""

# Shortens the life of every key. What is within a hair of its end is gone.
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
    """A backend registered by name on a database of a real server, which is emptied.

    Args:
        backend: a registered name, or a function that makes the backend.
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
    looks = client.pipeline(transaction=False)
    for name in names:
        looks.type(name)
        looks.pttl(name)
    seen = looks.execute()
    kinds, lives_ms = seen[::2], seen[1::2]
    for name, kind in zip(names, kinds, strict=True):
        looks.zrange(name, 0, -1, withscores=True) if kind == b"zset" else looks.get(name)
    values = [_value(reply) for reply in looks.execute()]
    lives = [-1 if left_ms < 0 else -(-(left_ms - HAIR_MS) // 1_000) for left_ms in lives_ms]
    return {name.decode(): (value, left) for name, value, left in zip(names, values, lives, strict=True)}


def _value(reply: Any) -> Value:
    return reply.decode() if isinstance(reply, bytes) else {int(start): int(held) for start, held in reply}


def ask(reservation_id: str, cost_nanousd: int = COST, limits: Limits = ROOMY, **changes: Any) -> Ask:
    """A question with everything ordinary that is not said."""
    return replace(Ask(reservation_id, WHO, NETWORK, cost_nanousd, limits, PENDING_SECONDS), **changes)


def unmarked(stored: Stored) -> Stored:
    """Everything but markers."""
    return {key: kept for key, kept in stored.items() if not key.startswith("llm:throttle:")}


def assert_same_stored(one: Stored, other: Stored, where: object) -> None:
    """The same keys and amounts; lives to a second, which a busy machine may take for one operation."""
    assert {key: value for key, (value, _) in one.items()} == {key: value for key, (value, _) in other.items()}, where
    assert all(abs(left - other[key][1]) <= 1 for key, (_, left) in one.items()), where


@contextmanager
def conflict() -> Iterator[None]:
    """The body must end in a `ReservationConflict`."""
    try:
        yield
    except ReservationConflict:
        return
    raise AssertionError("no ReservationConflict")


class Conformance:
    """Inherit it as ``Test…`` and set `harness` before each test."""

    harness: Harness

    # --- helpers

    def reserve(self, reservation_id: str, cost_nanousd: int = COST, limits: Limits = ROOMY, **who: Any) -> Reservation:
        verdict = self.harness.backend.reserve(ask(reservation_id, cost_nanousd, limits, **who))
        assert isinstance(verdict, Reservation), verdict
        return verdict

    def refuse(self, reservation_id: str, cost_nanousd: int = COST, limits: Limits = ROOMY, **who: Any) -> Refusal:
        verdict = self.harness.backend.reserve(ask(reservation_id, cost_nanousd, limits, **who))
        assert isinstance(verdict, Refusal), verdict
        return verdict

    def settle(self, reservation: Reservation, actual_nanousd: int) -> Settlement:
        return self.harness.backend.settle(reservation, actual_nanousd)

    def extend(
        self, reservation: Reservation, to_nanousd: int, limits: Limits = ROOMY, at_least_nanousd: int | None = None
    ) -> Reservation:
        verdict = self.harness.backend.extend(reservation, to_nanousd, limits, at_least_nanousd=at_least_nanousd)
        assert isinstance(verdict, Reservation), verdict
        return verdict

    def refuse_more(
        self, reservation: Reservation, to_nanousd: int, limits: Limits, at_least_nanousd: int | None = None
    ) -> Refusal:
        verdict = self.harness.backend.extend(reservation, to_nanousd, limits, at_least_nanousd=at_least_nanousd)
        assert isinstance(verdict, Refusal), verdict
        return verdict

    def spend(self, reservation_id: str, amount_nanousd: int, limits: Limits = ROOMY, **who: Any) -> None:
        self.settle(self.reserve(reservation_id, amount_nanousd, limits, **who), amount_nanousd)

    def books(self) -> Books:
        return self.harness.backend.books(WHO, NETWORK, WINDOW_SECONDS)

    def every_amount(self) -> set[int]:
        """What the six totals hold."""
        books = self.books()
        mine = {books.window_nanousd, books.day_nanousd, books.network_window_nanousd, books.network_day_nanousd}
        return {*mine, books.global_hour_nanousd, books.global_day_nanousd}

    def pass_seconds(self, seconds: float) -> None:
        self.harness.pass_time(int(seconds * US))

    def keys(self, reservation_id: str = "", at_us: int | None = None) -> Any:
        return book_keys(reservation_id, WHO, NETWORK, (self.harness.clock.us if at_us is None else at_us) // US)

    def each_limit(self) -> Iterator[LimitCase]:
        for case in LIMITS_IN_ORDER:
            self.harness.clear()
            yield case

    # --- what is admitted

    def test_says_who_it_is(self) -> None:
        backend = self.harness.backend
        assert backend.name
        assert backend.reserve_script
        assert isinstance(backend.promises_atomicity, bool)

    def test_a_reservation_says_what_it_stands_for(self) -> None:
        self.spend("r0", 7)
        made = self.reserve("r1")
        assert made == Reservation(
            reservation_id="r1",
            identifier=WHO,
            network=NETWORK,
            cost_nanousd=COST,
            request_digest=made.request_digest,
            made_at_us=START_US,
            window_seconds=WINDOW_SECONDS,
            pending_seconds=PENDING_SECONDS,
            backend=self.harness.backend.name,
            window_spent_nanousd=COST + 7,
            day_spent_nanousd=COST + 7,
            window_frees_at_seconds=START_US // US + BUCKET_SECONDS + WINDOW_SECONDS,
        )

    def test_exactly_equal_is_admitted_and_one_nano_dollar_more_is_not(self) -> None:
        for case in self.each_limit():
            limits = case.set_to(3 * COST)
            for number in range(3):
                self.reserve(f"r{number}", COST, limits)
            refusal = self.refuse("r3", 1, limits)
            assert (refusal.reason, refusal.cause, refusal.scope) == (case.reason, case.reason, case.scope)
            assert refusal.limit_nanousd == 3 * COST

    def test_one_nano_dollar_less_than_the_rest_is_admitted(self) -> None:
        for case in self.each_limit():
            limits = case.set_to(3 * COST)
            self.spend("r0", COST, limits)
            assert self.refuse("r1", 2 * COST + 1, replace(limits, throttle_seconds=1)).reason == case.reason
            self.pass_seconds(2)
            self.reserve("r2", 2 * COST, limits)

    def test_the_first_limit_that_fails_is_told(self) -> None:
        for number, case in enumerate(self.each_limit()):
            limits = ROOMY
            for failing in LIMITS_IN_ORDER[number:]:
                limits = failing.set_to(COST, limits)
            self.spend("r0", COST)
            assert self.refuse("r1", COST, limits).reason == case.reason

    def test_the_networks_limits_may_be_none(self) -> None:
        limits = replace(ROOMY, network_window_nanousd=None, network_day_nanousd=None)
        self.reserve("r0", ROOM // 2, limits)
        self.reserve("r1", ROOM // 2, limits)
        assert self.refuse("r2", ROOM // 2, limits).reason == Reason.DAILY_LIMIT

    def test_a_refused_request_changes_nothing_but_the_marker(self) -> None:
        for case in self.each_limit():
            limits = case.set_to(2 * COST)
            self.spend("r0", COST - 5, limits)
            self.reserve("r1", COST, limits)
            before = self.harness.stored()
            self.refuse("r2", COST, limits)
            after = self.harness.stored()
            assert unmarked(after) == unmarked(before), case
            assert (self.keys().marker in after) == bool(case.marker_seconds), case

    def test_scopes_are_kept_apart(self) -> None:
        self.reserve("r0", COST)
        self.reserve("r1", COST, identifier="another")
        self.reserve("r2", COST, identifier="third", network="203.0.113.9")
        books = self.books()
        assert (books.window_nanousd, books.day_nanousd) == (COST, COST)
        assert (books.network_window_nanousd, books.network_day_nanousd) == (2 * COST, 2 * COST)
        assert (books.global_hour_nanousd, books.global_day_nanousd) == (3 * COST, 3 * COST)

    def test_amounts_are_exact_to_the_last_nano_dollar(self) -> None:
        limits = ROOMY
        for case in LIMITS_IN_ORDER:
            limits = case.set_to(2**53 - 1, limits)
        for number, cost in enumerate((2**52, 10**15, 10**9, 999_999_999, 1)):
            self.reserve(f"r{number}", cost, limits)
        total = 2**52 + 10**15 + 10**9 + 10**9
        assert self.books() == Books(total, total, total, total, total, total, total)
        assert all(left > 0 for _, left in self.harness.stored().values())

    def test_the_known_layout_of_keys(self) -> None:
        self.settle(self.reserve("r0"), COST - 1)
        self.reserve("r1")
        held, start = 2 * COST - 1, START_US // US
        stored = unmarked(self.harness.stored())
        assert stored.pop("llm:reservation:r0")[1] == RECORD_KEEP_SECONDS
        assert stored.pop("llm:reservation:r1")[1] == RECORD_KEEP_SECONDS + PENDING_SECONDS
        ring = ({start: held}, WINDOW_SECONDS + BUCKET_SECONDS)
        opened = ({start: COST}, PENDING_SECONDS + PENDING_BUCKET_SECONDS)
        to_midnight, to_next_hour = 13 * 3600 + 40 * 60, 40 * 60
        assert stored == {
            "llm:cost:recent:hash456": ring,
            "llm:cost:daily:hash456:2026-03-14": (str(held), to_midnight + 86_400),
            "llm:network:recent:198.51.100.7": ring,
            "llm:network:daily:198.51.100.7:2026-03-14": (str(held), to_midnight + 86_400),
            "llm:global:hourly:2026-03-14T10": (str(held), to_next_hour + 7_200),
            "llm:global:daily:2026-03-14": (str(held), to_midnight + 86_400),
            "llm:open:identifier:hash456": opened,
            "llm:open:network:198.51.100.7": opened,
            "llm:open:global": (opened[0], opened[1] + RECORD_KEEP_SECONDS),
        }

    # --- the marker

    def test_only_the_day_and_the_window_set_a_marker_and_the_day_sets_it_twice_as_long(self) -> None:
        for case in self.each_limit():
            limits = case.set_to(COST)
            self.spend("r0", COST, limits)
            refusal = self.refuse("r1", 1, limits)
            assert refusal.marker_seconds == case.marker_seconds, case
            marker = self.harness.stored().get(self.keys().marker, ("", 0))
            assert marker[1] == case.marker_seconds, case

    def test_under_a_marker_everything_is_refused_with_what_set_it(self) -> None:
        limits = replace(ROOMY, window_nanousd=COST)
        self.spend("r0", COST, limits)
        first = self.refuse("r1", COST, limits)
        self.pass_seconds(12)
        again = self.refuse("r2", 1, limits)
        assert (again.reason, again.cause, again.scope) == (Reason.THROTTLED, Reason.WINDOW_LIMIT, Scope.IDENTIFIER)
        assert again.limit_nanousd is None
        assert again.marker_seconds == THROTTLE_SECONDS - 12
        assert first.retry_after_seconds is not None
        assert again.retry_after_seconds == first.retry_after_seconds - 12
        assert self.refuse("r3", 1, ROOMY).reason == Reason.THROTTLED

    def test_no_refusal_renews_the_marker(self) -> None:
        limits = replace(ROOMY, window_nanousd=COST)
        self.spend("r0", COST, limits)
        self.refuse("r1", COST, limits)
        for number in range(THROTTLE_SECONDS - 1):
            self.pass_seconds(1)
            assert self.refuse(f"u{number}", COST, limits).reason == Reason.THROTTLED
            assert self.harness.stored()[self.keys().marker][1] == THROTTLE_SECONDS - 1 - number
        self.pass_seconds(1)
        assert self.refuse("r2", COST, limits).reason == Reason.WINDOW_LIMIT

    def test_a_marker_stops_nobody_else(self) -> None:
        limits = replace(ROOMY, window_nanousd=COST)
        self.spend("r0", COST, limits)
        self.refuse("r1", COST, limits)
        self.reserve("r2", COST, limits, identifier="neighbour")

    def test_a_marker_set_by_hand_throttles_while_it_lives(self) -> None:
        self.harness.put(self.keys().marker, "1", 20)
        refusal = self.refuse("r0")
        assert (refusal.reason, refusal.cause) == (Reason.THROTTLED, Reason.WINDOW_LIMIT)
        assert 0 < refusal.marker_seconds <= THROTTLE_SECONDS
        assert not refusal.in_flight
        self.pass_seconds(20)
        self.reserve("r0")

    # --- busy or spent

    def test_busy_is_told_from_spent(self) -> None:
        for case in self.each_limit():
            limits = replace(case.set_to(2 * COST), mark_when_busy=False)
            self.spend("r0", COST - 1, limits)
            held = self.reserve("r1", COST, limits)
            refusal = self.refuse("r2", COST, limits)
            assert refusal.in_flight, case
            assert refusal.retry_after_seconds == 1, case
            assert refusal.marker_seconds == 0, case
            assert self.keys().marker not in self.harness.stored(), case
            self.settle(held, COST)
            assert not self.refuse("r3", COST, limits).in_flight, case

    def test_what_is_spent_is_not_called_busy_because_something_is_open_too(self) -> None:
        for case in self.each_limit():
            limits = case.set_to(2 * COST)
            self.spend("r0", COST + 1, limits)
            self.reserve("r1", COST - 1, limits)
            assert not self.refuse("r2", COST, limits).in_flight, case

    def test_where_one_limit_is_busy_and_another_spent_it_is_not_called_busy(self) -> None:
        self.spend("r0", COST)
        self.reserve("r1", COST)
        for first, second in ((LIMITS_IN_ORDER[0], LIMITS_IN_ORDER[2]), (LIMITS_IN_ORDER[2], LIMITS_IN_ORDER[3])):
            limits = replace(second.set_to(2 * COST, first.set_to(COST)), mark_when_busy=False, throttle_seconds=1)
            assert not self.refuse("r2", COST, limits).in_flight
            self.pass_seconds(2)

    def test_busy_sets_the_marker_if_it_is_told_to(self) -> None:
        for case in LIMITS_IN_ORDER[:2]:
            self.harness.clear()
            limits = case.set_to(COST)
            self.reserve("r0", COST, limits)
            first = self.refuse("r1", COST, limits)
            assert (first.in_flight, first.marker_seconds) == (True, case.marker_seconds)
            assert first.retry_after_seconds == case.marker_seconds
            assert self.refuse("r2", COST, limits).in_flight

    def test_an_open_reservation_past_its_time_is_spent(self) -> None:
        limits = replace(ROOMY, window_nanousd=COST, mark_when_busy=False)
        self.reserve("r0", COST, limits)
        self.pass_seconds(PENDING_SECONDS - 1)
        assert self.refuse("r1", COST, limits).in_flight
        self.pass_seconds(PENDING_BUCKET_SECONDS + 1)
        assert not self.refuse("r2", COST, limits).in_flight

    def test_an_open_reservation_that_has_left_a_short_window_makes_nothing_busy(self) -> None:
        """Nobody ended it, so it is in the ring of open money for a moment longer than in a window of that length."""
        for case in self.each_limit():
            if case.reason not in RINGS:
                continue
            limits = replace(case.set_to(2 * COST), window_seconds=PENDING_SECONDS, mark_when_busy=False)
            self.reserve("r0", COST, limits)
            self.pass_seconds(PENDING_SECONDS // 2)
            held = self.reserve("r1", COST, limits)
            assert self.refuse("r2", COST, limits).in_flight, case
            self.settle(held, COST)
            self.pass_seconds(PENDING_SECONDS // 2 + bucket_seconds_of(PENDING_SECONDS) + 1)
            held = self.reserve("r3", COST, limits)
            assert self.refuse("r4", COST, limits).in_flight, case
            self.settle(held, COST)
            refusal = self.refuse("r5", COST, limits)
            assert not refusal.in_flight, case
            assert refusal.retry_after_seconds is not None, case
            assert refusal.retry_after_seconds > 1, case

    def test_what_can_never_fit_is_said(self) -> None:
        for case in self.each_limit():
            limits = case.set_to(COST)
            refusal = self.refuse("r0", COST + 1, limits)
            assert refusal.reason == case.reason
            assert refusal.can_never_fit
            assert refusal.retry_after_seconds is None
            assert not refusal.in_flight
            assert unmarked(self.harness.stored()) == {}

    def test_the_marker_of_what_can_never_fit_ends_by_itself(self) -> None:
        for case in self.each_limit():
            if not case.marker_seconds:
                continue
            limits = case.set_to(COST)
            assert self.refuse("r0", COST + 1, limits).marker_seconds == case.marker_seconds
            # Nothing was spent: what fits need not wait for the end of a day or a window.
            fits = self.refuse("r1", 1, limits)
            assert (fits.reason, fits.cause) == (Reason.THROTTLED, case.reason)
            assert fits.retry_after_seconds == case.marker_seconds
            self.pass_seconds(case.marker_seconds)
            self.reserve("r2", 1, limits)

    # --- the last of a budget

    def test_the_last_of_a_budget_is_set_aside_where_that_will_do(self) -> None:
        for case in self.each_limit():
            limits = case.set_to(COST + 300)
            self.spend("r0", COST, limits)
            made = self.reserve("r1", COST, limits, at_least_nanousd=300, idempotency=KEY)
            assert made.cost_nanousd == 300, case
            assert (made.window_spent_nanousd, made.day_spent_nanousd) == (COST + 300, COST + 300), case
            assert self.every_amount() == {COST + 300}, case
            assert self.books().pending_nanousd == 300, case
            known = self.harness.backend.find_duplicate(KEY)
            assert known is not None, case
            assert known.cost_nanousd == 300, case
            assert self.reserve("r1", COST, limits, at_least_nanousd=300, idempotency=KEY).cost_nanousd == 300, case
            assert self.settle(made, 120).booked_nanousd == 120, case
            assert self.every_amount() == {COST + 120}, case

    def test_less_than_will_do_is_refused_and_nothing_is_set_aside(self) -> None:
        for case in self.each_limit():
            limits = replace(case.set_to(COST + 299), throttle_seconds=1)
            self.spend("r0", COST, limits)
            before = unmarked(self.harness.stored())
            refusal = self.refuse("r1", COST, limits, at_least_nanousd=300)
            assert (refusal.reason, refusal.in_flight, refusal.can_never_fit) == (case.reason, False, False), case
            assert unmarked(self.harness.stored()) == before, case

    def test_where_all_of_it_fits_all_of_it_is_set_aside(self) -> None:
        for case in self.each_limit():
            assert self.reserve("r0", COST, case.set_to(COST), at_least_nanousd=1).cost_nanousd == COST, case

    def test_the_last_of_the_fullest_budget_is_what_is_left(self) -> None:
        for case in self.each_limit():
            for other in LIMITS_IN_ORDER:
                if other is case:
                    continue
                self.harness.clear()
                limits = case.set_to(COST + 200, other.set_to(COST + 300))
                self.spend("r0", COST, limits)
                assert self.reserve("r1", COST, limits, at_least_nanousd=1).cost_nanousd == 200, (case, other)

    def test_while_what_is_under_way_may_make_room_for_all_of_it_no_less_is_set_aside(self) -> None:
        for case in self.each_limit():
            limits = replace(case.set_to(COST + 300), mark_when_busy=False)
            open_one = self.reserve("r0", COST, limits)
            refusal = self.refuse("r1", COST, limits, at_least_nanousd=300)
            assert (refusal.reason, refusal.in_flight) == (case.reason, True), case
            self.settle(open_one, 301)
            assert self.reserve("r2", COST, limits, at_least_nanousd=300).cost_nanousd == COST - 1, case

    def test_what_is_under_way_may_also_make_room_for_the_least(self) -> None:
        for case in self.each_limit():
            limits = replace(case.set_to(COST + 300), mark_when_busy=False)
            self.spend("r0", COST, limits)
            open_one = self.reserve("r1", 200, limits)
            refusal = self.refuse("r2", COST, limits, at_least_nanousd=101)
            assert (refusal.reason, refusal.in_flight, refusal.retry_after_seconds) == (case.reason, True, 1), case
            self.settle(open_one, 199)
            assert self.reserve("r3", COST, limits, at_least_nanousd=101).cost_nanousd == 101, case

    def test_what_exceeds_a_whole_limit_may_still_begin_with_all_of_it(self) -> None:
        for case in self.each_limit():
            limits = case.set_to(COST - 1)
            refusal = self.refuse("r0", COST + 1, limits, at_least_nanousd=COST)
            assert (refusal.can_never_fit, refusal.retry_after_seconds) == (True, None), case
            if case.marker_seconds:
                self.harness.lose(self.keys().marker)
            assert self.reserve("r1", COST, limits, at_least_nanousd=COST - 1).cost_nanousd == COST - 1, case

    def test_retry_after_is_when_the_least_fits(self) -> None:
        for case in self.each_limit():
            limits = replace(case.set_to(COST), throttle_seconds=1)
            for number in range(3):
                self.spend(f"s{number}", COST // 4, limits)
                self.pass_seconds(60)
            self.pass_seconds(0.5)
            refusal = self.refuse("r0", COST, limits, at_least_nanousd=COST // 2)
            assert refusal.retry_after_seconds is not None
            self.pass_seconds(refusal.retry_after_seconds - 1)
            assert self.refuse("r1", COST, limits, at_least_nanousd=COST // 2).reason == case.reason
            if case.marker_seconds:
                self.harness.lose(self.keys().marker)
            self.pass_seconds(1)
            assert self.reserve("r2", COST, limits, at_least_nanousd=COST // 2).cost_nanousd >= COST // 2, case

    # --- when to come back

    def test_retry_after_is_the_second_in_which_the_refusal_ends(self) -> None:
        for case in self.each_limit():
            limits = replace(case.set_to(2 * COST), throttle_seconds=1)
            for number, pause in enumerate((3.5, 21, 108)):
                self.spend(f"s{number}", COST // 2, limits)
                self.pass_seconds(pause)
            # Half a second from the turn of one, since a store may be a hair early.
            self.pass_seconds(0.5)
            refusal = self.refuse("r0", COST, limits)
            assert refusal.retry_after_seconds is not None
            self.pass_seconds(refusal.retry_after_seconds - 1)
            assert self.refuse("r1", COST, limits).reason == case.reason
            if case.marker_seconds:
                self.harness.lose(self.keys().marker)
            self.pass_seconds(1)
            self.reserve("r2", COST, limits)

    def test_retry_after_is_never_early_and_at_most_a_bucket_late(self) -> None:
        luck = random.Random(7)  # noqa: S311 (seeded on purpose)
        limits = replace(ROOMY, network_window_nanousd=20 * COST)
        spent: list[tuple[int, int]] = []
        refused = 0
        for number in range(150):
            cost = luck.randrange(1, 9 * COST)
            verdict = self.harness.backend.reserve(ask(f"r{number}", cost, limits))
            now_us = self.harness.clock.us
            if isinstance(verdict, Reservation):
                self.settle(verdict, cost)
                spent.append((now_us, cost))
            else:
                assert isinstance(verdict, Refusal)
                refused += 1
                self._check_retry_after(verdict, spent, cost, 20 * COST)
            self.pass_seconds(luck.choice((0, 0, 0.5, 5, 17, 60)))
        assert refused > 20

    def _check_retry_after(self, refusal: Refusal, spent: list[tuple[int, int]], cost: int, limit: int) -> None:
        window_us = WINDOW_SECONDS * US
        now_us = self.harness.clock.us
        assert refusal.retry_after_seconds is not None
        told_us = now_us + refusal.retry_after_seconds * US
        ends = [now_us, *(at_us + window_us for at_us, _ in spent if at_us + window_us > now_us)]
        true_us = next(
            end for end in ends if sum(held for at_us, held in spent if at_us + window_us > end) + cost <= limit
        )
        assert true_us <= told_us <= true_us + (BUCKET_SECONDS + 1) * US

    # --- the same id

    def test_the_same_id_sent_again_charges_once_and_gets_the_first_answer(self) -> None:
        limits = replace(ROOMY, window_nanousd=COST)
        first = self.reserve("r0", COST, limits)
        before = self.harness.stored()
        self.pass_seconds(11)
        assert self.reserve("r0", COST, limits) == first
        assert {key: value for key, (value, _) in self.harness.stored().items()} == {
            key: value for key, (value, _) in before.items()
        }

    def test_the_same_id_is_answered_under_a_marker_too(self) -> None:
        limits = replace(ROOMY, window_nanousd=COST)
        first = self.reserve("r0", COST, limits)
        self.refuse("r1", COST, limits)
        assert self.reserve("r0", COST, limits) == first

    def test_an_id_for_another_request_is_a_conflict(self) -> None:
        self.reserve("r0")
        before = self.harness.stored()
        for changes in ({"cost_nanousd": COST - 1}, {"identifier": "another"}, {"network": "203.0.113.9"}):
            with conflict():
                self.harness.backend.reserve(replace(ask("r0"), **changes))
        assert self.harness.stored() == before

    def test_an_id_that_has_ended_is_a_conflict(self) -> None:
        self.settle(self.reserve("r0"), 1)
        before = self.harness.stored()
        with conflict():
            self.harness.backend.reserve(ask("r0"))
        assert self.harness.stored() == before

    def test_a_refused_id_may_be_used_again(self) -> None:
        held = self.reserve("r0", COST, replace(ROOMY, network_window_nanousd=COST))
        self.refuse("r1", COST, replace(ROOMY, network_window_nanousd=COST))
        self.settle(held, 0)
        self.reserve("r1", COST, replace(ROOMY, network_window_nanousd=COST))

    def test_find_tells_the_open_reservation_and_changes_nothing(self) -> None:
        assert self.harness.backend.find(ask("r0")) is None
        made = self.reserve("r0")
        before = self.harness.stored()
        found = self.harness.backend.find(ask("r0"))
        assert found is not None
        seen = {
            name: getattr(made, name)
            for name in ("window_spent_nanousd", "day_spent_nanousd", "window_frees_at_seconds")
        }
        assert replace(found, **seen) == made
        assert self.harness.backend.find(ask("r0", COST + 1)) is None
        assert self.harness.stored() == before
        self.settle(made, 1)
        assert self.harness.backend.find(ask("r0")) is None

    # --- the end

    def test_a_settlement_books_what_was_used(self) -> None:
        self.reserve("other")
        for actual in (0, 1, COST - 1, COST):
            self.harness.clear()
            self.spend("r0", 100)
            settlement = self.settle(self.reserve("r1"), actual)
            assert settlement == Settlement("r1", Outcome.SETTLED, actual, 0)
            held = actual + 100
            assert self.books() == Books(held, held, held, held, held, held, 0)

    def test_more_than_was_reserved_is_booked_and_told(self) -> None:
        settlement = self.settle(self.reserve("r0", COST, replace(ROOMY, window_nanousd=COST)), COST + 5)
        assert settlement == Settlement("r0", Outcome.SETTLED, COST + 5, 5)
        held = COST + 5
        assert self.books() == Books(held, held, held, held, held, held, 0)

    def test_a_second_settlement_gets_the_first_answer_and_changes_nothing(self) -> None:
        made = self.reserve("r0")
        self.settle(made, 17)
        before = self.harness.stored()
        for actual in (17, 0, COST, 10 * COST):
            assert self.settle(made, actual) == Settlement("r0", Outcome.REPEATED, 17, 0)
        assert self.harness.stored() == before

    def test_a_settlement_for_another_request_is_a_conflict(self) -> None:
        made = self.reserve("r0")
        before = self.harness.stored()
        with conflict():
            self.settle(replace(made, request_digest="0" * 16), 1)
        assert self.harness.stored() == before

    def test_settled_to_nothing_leaves_no_money_anywhere(self) -> None:
        self.settle(self.reserve("r0"), 0)
        assert self.books() == Books(0, 0, 0, 0, 0, 0, 0)
        rings = [value for value, _ in self.harness.stored().values() if isinstance(value, dict)]
        assert rings == []

    def test_a_settlement_does_not_prolong_a_life(self) -> None:
        made = self.reserve("r0")
        record = self.keys("r0").record
        lives = {key: left for key, (_, left) in self.harness.stored().items()}
        self.pass_seconds(50)
        self.settle(made, 7)
        after = {key: left for key, (_, left) in self.harness.stored().items()}
        assert after.pop(record) == RECORD_KEEP_SECONDS
        assert after
        assert all(left == lives[key] - 50 for key, left in after.items())

    def test_a_settlement_lands_in_the_periods_of_its_reservation(self) -> None:
        for moment in ("2026-03-14T10:59:59", "2026-03-14T23:59:59", "2026-03-31T23:59:59", "2026-12-31T23:59:59"):
            for actual in (0, 7, COST + 9):
                self._settle_over_the_turn(datetime.fromisoformat(moment).replace(tzinfo=UTC), actual)

    def _settle_over_the_turn(self, before_turn: datetime, actual: int) -> None:
        self.harness.clear()
        self.harness.clock.us = int(before_turn.timestamp()) * US + 900_000
        made = self.reserve("r0")
        then = self.keys()
        self.pass_seconds(61)
        self.settle(made, actual)
        stored = self.harness.stored()
        for key in (then.daily, then.network_daily, then.global_hourly, then.global_daily):
            assert stored[key][0] == str(actual), (before_turn, key)
        for key in (then.recent, then.network_recent):
            bucket = int(before_turn.timestamp()) // BUCKET_SECONDS * BUCKET_SECONDS
            assert stored.get(key, ({}, 0))[0] == ({bucket: actual} if actual else {}), (before_turn, key)
        now = self.keys()
        assert now.global_hourly not in stored
        assert (now.daily in stored) == (now.daily == then.daily)
        assert all(left > 0 for _, left in stored.values())

    def test_a_settlement_of_what_has_left_the_window_makes_nothing_anew(self) -> None:
        for actual in (0, COST + 9):
            self.harness.clear()
            made = self.reserve("r0", pending_seconds=3_000)
            self.pass_seconds(WINDOW_SECONDS + BUCKET_SECONDS)
            settlement = self.settle(made, actual)
            assert settlement.outcome == Outcome.SETTLED
            stored = self.harness.stored()
            assert self.keys().recent not in stored
            assert self.keys().network_recent not in stored
            assert stored[self.keys().daily][0] == str(actual)

    def test_no_total_goes_below_nothing(self) -> None:
        made = self.reserve("r0")
        keys = self.keys()
        for key in (keys.daily, keys.network_daily, keys.global_hourly, keys.global_daily):
            self.harness.put(key, "5", 1_000)
        for key in (keys.recent, keys.network_recent):
            self.harness.lose(key)
        self.settle(made, 1)
        stored = self.harness.stored()
        assert [stored[key] for key in (keys.daily, keys.network_daily, keys.global_hourly, keys.global_daily)] == [
            ("0", 1_000)
        ] * 4
        assert keys.recent not in stored
        assert keys.network_recent not in stored

    def test_giving_back_makes_no_total_anew(self) -> None:
        made = self.reserve("r0")
        record = self.keys("r0").record
        for key in self.harness.stored():
            if key != record:
                self.harness.lose(key)
        assert self.settle(made, 1).outcome == Outcome.SETTLED
        assert list(self.harness.stored()) == [record]

    def test_a_lost_record_and_booking_is_booked_late_and_once(self) -> None:
        made = self.reserve("r0")
        stored = self.harness.stored()
        for key in stored:
            self.harness.lose(key)
        self.pass_seconds(15)
        assert self.settle(made, 7) == Settlement("r0", Outcome.LATE, 7, 0)
        assert self.books() == Books(7, 7, 7, 7, 7, 7, 0)
        assert self.settle(made, 7) == Settlement("r0", Outcome.REPEATED, 7, 0)
        assert self.books() == Books(7, 7, 7, 7, 7, 7, 0)
        kept = self.harness.stored()
        assert kept[self.keys().recent] == ({START_US // US: 7}, WINDOW_SECONDS + BUCKET_SECONDS)
        assert all(left > 0 for _, left in kept.values())

    def test_a_late_booking_outlives_an_older_neighbour_in_its_ring(self) -> None:
        self.pass_seconds(500)
        made = self.reserve("r0")
        for key in self.harness.stored():
            self.harness.lose(key)
        self.harness.clock.us = START_US
        self.spend("old", 3)
        self.pass_seconds(501)
        assert self.settle(made, 7).outcome == Outcome.LATE
        ring, left = self.harness.stored()[self.keys().recent]
        made_seconds = made.made_at_us // US
        assert ring == {START_US // US: 3, made_seconds - made_seconds % BUCKET_SECONDS: 7}
        assert left == WINDOW_SECONDS + BUCKET_SECONDS

    def test_past_its_time_an_unended_reservation_stays_booked_in_full(self) -> None:
        made = self.reserve("r0")
        self.pass_seconds(PENDING_SECONDS + RECORD_KEEP_SECONDS)
        before = self.harness.stored()
        assert self.settle(made, 1) == Settlement("r0", Outcome.EXPIRED, COST, 0)
        assert self.harness.stored() == before
        assert self.books().day_nanousd == COST

    def test_a_lost_record_is_late_until_the_record_of_an_end_may_be_over(self) -> None:
        late, expired = self.reserve("r0", pending_seconds=2 * RECORD_KEEP_SECONDS), self.reserve("r1")
        for reservation_id in ("r0", "r1"):
            self.harness.lose(self.keys(reservation_id).record)
        self.pass_seconds(RECORD_KEEP_SECONDS - 1)
        assert self.settle(late, 7) == Settlement("r0", Outcome.LATE, 7, 0)
        self.pass_seconds(1)
        assert self.settle(expired, 7) == Settlement("r1", Outcome.EXPIRED, COST, 0)

    def test_an_end_takes_no_more_than_its_own_open_money(self) -> None:
        for end in ("settle", "release"):
            self.harness.clear()
            made = self.extend(self.reserve("r0"), 2 * COST)
            self.reserve("r1", 5)
            self.settle(made, 7) if end == "settle" else self.harness.backend.release(made)
            stored, keys = self.harness.stored(), self.keys()
            for key in (keys.pending_identifier, keys.pending_network, keys.pending_global):
                assert stored[key][0] == {START_US // US: 5}, (end, key)

    def test_a_settlement_said_again_books_nothing_even_when_its_record_is_over(self) -> None:
        made = self.reserve("r0")
        self.settle(made, 7)
        self.pass_seconds(RECORD_KEEP_SECONDS - 1)
        assert self.settle(made, 7) == Settlement("r0", Outcome.REPEATED, 7, 0)
        for seconds in (2, PENDING_SECONDS):
            self.pass_seconds(seconds)
            before = self.harness.stored()
            assert self.settle(made, 7).outcome is Outcome.EXPIRED
            assert self.harness.stored() == before

    # --- more as it runs

    def test_an_extension_holds_more_in_every_scope_and_prolongs_no_life(self) -> None:
        made = self.reserve("r0", idempotency=KEY)
        before = self.harness.stored()
        self.pass_seconds(11)
        more = self.extend(made, 3 * COST)
        held = 3 * COST
        assert more == replace(made, cost_nanousd=held, window_spent_nanousd=held, day_spent_nanousd=held)
        assert self.books() == Books(held, held, held, held, held, held, held)
        after = self.harness.stored()
        assert {key: left + 11 for key, (_, left) in after.items()} == {key: left for key, (_, left) in before.items()}
        record, first = after[self.keys("r0").record][0], before[self.keys("r0").record][0]
        assert record == str(first).replace(f"open {COST} ", f"open {held} ")

    def test_an_extension_exactly_to_a_limit_is_granted_and_one_nano_dollar_more_is_not(self) -> None:
        for case in self.each_limit():
            limits = case.set_to(4 * COST)
            self.spend("s0", COST, limits)
            made = self.reserve("r0", COST, limits)
            before = self.harness.stored()
            refusal = self.refuse_more(made, 3 * COST + 1, limits)
            assert (refusal.reason, refusal.cause, refusal.scope) == (case.reason, case.reason, case.scope)
            assert (refusal.limit_nanousd, refusal.marker_seconds) == (4 * COST, 0)
            assert self.harness.stored() == before, case
            assert self.extend(made, 3 * COST, limits).cost_nanousd == 3 * COST
            assert self.refuse("r1", 1, limits).reason == case.reason

    def test_the_first_limit_that_an_extension_fails_is_told(self) -> None:
        for number, case in enumerate(self.each_limit()):
            limits = ROOMY
            for failing in LIMITS_IN_ORDER[number:]:
                limits = failing.set_to(COST, limits)
            assert self.refuse_more(self.reserve("r0"), COST + 1, limits).reason == case.reason

    def test_an_extension_takes_what_there_is_room_for_if_that_is_enough(self) -> None:
        for case in self.each_limit():
            limits = case.set_to(2 * COST)
            made = self.reserve("r0", COST, limits)
            self.spend("s0", COST - 100, limits)
            before = self.harness.stored()
            assert self.refuse_more(made, 2 * COST, limits, COST + 101).reason == case.reason
            assert self.harness.stored() == before, case
            more = self.extend(made, 2 * COST, limits, COST + 100)
            assert more.cost_nanousd == COST + 100, case
            assert self.extend(made, 2 * COST, limits, COST).cost_nanousd == COST + 100, case
            assert self.books().window_nanousd == 2 * COST, case

    def test_of_several_limits_the_narrowest_says_how_much_there_is_room_for(self) -> None:
        limits = replace(ROOMY, window_nanousd=COST + 70, network_day_nanousd=COST + 50, global_hour_nanousd=COST + 60)
        made = self.reserve("r0", COST, limits)
        assert self.extend(made, 2 * COST, limits, COST + 1).cost_nanousd == COST + 50

    def test_the_networks_limits_may_be_none_for_an_extension_too(self) -> None:
        limits = replace(ROOMY, network_window_nanousd=None, network_day_nanousd=None)
        assert self.extend(self.reserve("r0", COST, limits), ROOM, limits).cost_nanousd == ROOM

    def test_a_limit_lowered_below_what_is_spent_extends_nothing_and_takes_nothing_back(self) -> None:
        for case in self.each_limit():
            made = self.reserve("r0")
            self.spend("s0", COST)
            before = self.harness.stored()
            assert self.refuse_more(made, COST + 1, case.set_to(COST)).reason == case.reason
            assert self.extend(made, COST + 1, case.set_to(COST), COST).cost_nanousd == COST
            assert self.harness.stored() == before, case

    def test_an_extension_said_again_charges_nothing_more(self) -> None:
        made = self.reserve("r0")
        more = self.extend(made, 2 * COST)
        before = self.harness.stored()
        assert self.extend(made, 2 * COST) == more
        assert self.extend(more, 2 * COST) == more
        assert self.extend(more, 1).cost_nanousd == 2 * COST
        assert self.harness.stored() == before

    def test_an_extension_whose_answer_was_lost_counts_for_the_next_and_at_the_end(self) -> None:
        made = self.reserve("r0")
        self.extend(made, 2 * COST)
        assert self.extend(made, 3 * COST).cost_nanousd == 3 * COST
        assert self.extend(made, 4 * COST).cost_nanousd == 4 * COST
        assert self.books().window_nanousd == 4 * COST
        assert self.settle(made, 5).booked_nanousd == 5
        assert self.books() == Books(5, 5, 5, 5, 5, 5, 0)

    def test_an_extension_is_booked_in_the_periods_of_its_reservation(self) -> None:
        for moment in ("2026-03-14T10:59:59", "2026-03-14T23:59:59", "2026-03-31T23:59:59", "2026-12-31T23:59:59"):
            before_turn = datetime.fromisoformat(moment).replace(tzinfo=UTC)
            self.harness.clear()
            self.harness.clock.us = int(before_turn.timestamp()) * US + 900_000
            made = self.reserve("r0")
            then, keys_then = self.keys(), set(self.harness.stored())
            self.pass_seconds(61)
            more = self.extend(made, 3 * COST)
            assert set(self.harness.stored()) == keys_then
            self._assert_booked(then, 3 * COST, before_turn)
            self.settle(more, 7)
            self._assert_booked(then, 7, before_turn)
            assert all(left > 0 for _, left in self.harness.stored().values())

    def _assert_booked(self, keys: Any, amount: int, at: datetime) -> None:
        stored = self.harness.stored()
        for key in (keys.daily, keys.network_daily, keys.global_hourly, keys.global_daily):
            assert stored[key][0] == str(amount), (at, key)
        bucket = int(at.timestamp()) // BUCKET_SECONDS * BUCKET_SECONDS
        for key in (keys.recent, keys.network_recent):
            assert stored[key][0] == {bucket: amount}, (at, key)

    def test_an_extension_is_held_to_the_limits_of_its_own_hour_and_day(self) -> None:
        self.harness.clock.us = int(datetime(2026, 3, 14, 23, 59, 59, tzinfo=UTC).timestamp()) * US
        limits = replace(ROOMY, global_hour_nanousd=3 * COST, global_day_nanousd=3 * COST, day_nanousd=3 * COST)
        made = self.reserve("r0", COST, limits)
        self.pass_seconds(2)
        self.spend("s0", 3 * COST, limits)
        assert self.extend(made, 3 * COST, limits).cost_nanousd == 3 * COST
        assert self.refuse_more(made, 3 * COST + 1, limits).reason == Reason.DAILY_LIMIT

    def test_what_has_left_the_window_is_not_in_the_way_of_an_extension(self) -> None:
        limits = replace(ROOMY, window_nanousd=2 * COST, network_window_nanousd=2 * COST)
        self.spend("s0", COST, limits)
        self.pass_seconds(WINDOW_SECONDS - 10)
        made = self.reserve("r0", COST, limits)
        self.pass_seconds(BUCKET_SECONDS + 9)
        assert self.refuse_more(made, COST + 1, limits).reason == Reason.WINDOW_LIMIT
        self.pass_seconds(1)
        more = self.extend(made, 2 * COST, limits)
        assert more.window_spent_nanousd == 2 * COST
        assert more.day_spent_nanousd == 3 * COST

    def test_a_total_that_was_lost_is_made_again_with_a_life_by_an_extension(self) -> None:
        made = self.reserve("r0")
        keys = self.keys("r0")
        lives = {key: left for key, (_, left) in self.harness.stored().items()}
        for key in self.harness.stored():
            if key != keys.record:
                self.harness.lose(key)
        self.extend(made, COST + 5)
        assert {key: left for key, (_, left) in self.harness.stored().items()} == lives
        assert self.books() == Books(5, 5, 5, 5, 5, 5, 5)
        assert self.settle(made, 0).outcome == Outcome.SETTLED
        assert self.books() == Books(0, 0, 0, 0, 0, 0, 0)

    def test_what_has_ended_is_past_its_time_or_is_unknown_cannot_be_extended(self) -> None:
        settled, released, lost, late = (self.reserve(f"r{number}") for number in range(4))
        self.settle(settled, 5)
        self.harness.backend.release(released)
        self.harness.lose(self.keys("r2").record)
        self._assert_not_extended(settled, released, lost)
        self.pass_seconds(PENDING_SECONDS - 1)
        self.extend(late, COST + 1)
        self.pass_seconds(1)
        self._assert_not_extended(settled, released, lost, late)

    def _assert_not_extended(self, *ended: Reservation) -> None:
        before = self.harness.stored()
        for reservation in ended:
            for to_nanousd in (1, 2 * COST):
                with conflict():
                    self.harness.backend.extend(reservation, to_nanousd, ROOMY)
        assert self.harness.stored() == before

    def test_what_has_left_the_window_cannot_be_extended(self) -> None:
        made = self.reserve("r0", pending_seconds=3_000)
        self.pass_seconds(WINDOW_SECONDS + BUCKET_SECONDS - 1)
        self.extend(made, COST + 1)
        self.pass_seconds(1)
        before = self.harness.stored()
        with conflict():
            self.harness.backend.extend(made, COST + 2, ROOMY)
        assert self.harness.stored() == before

    def test_an_extension_for_another_request_is_a_conflict(self) -> None:
        made = self.reserve("r0")
        before = self.harness.stored()
        with conflict():
            self.harness.backend.extend(replace(made, request_digest="0" * 16), 2 * COST, ROOMY)
        assert self.harness.stored() == before

    def test_what_was_extended_is_found_and_told_as_it_is_held(self) -> None:
        made = self.reserve("r0", idempotency=KEY)
        self.extend(made, 2 * COST)
        found = self.harness.backend.find(ask("r0", idempotency=KEY))
        assert found is not None
        assert (found.cost_nanousd, found.request_digest, found.made_at_us) == (
            2 * COST,
            made.request_digest,
            made.made_at_us,
        )
        assert self.reserve("r0", idempotency=KEY).cost_nanousd == 2 * COST
        self.settle(found, 3)
        assert self.books() == Books(3, 3, 3, 3, 3, 3, 0)

    def test_an_extended_reservation_that_nobody_ends_stays_booked_whole(self) -> None:
        made = self.extend(self.reserve("r0"), 3 * COST)
        self.pass_seconds(PENDING_SECONDS + RECORD_KEEP_SECONDS)
        assert self.settle(made, 1) == Settlement("r0", Outcome.EXPIRED, 3 * COST, 0)
        assert self.books().day_nanousd == 3 * COST

    def test_more_than_an_extended_reservation_holds_is_an_overrun_by_what_it_holds(self) -> None:
        made = self.extend(self.reserve("r0"), 3 * COST)
        assert self.settle(made, 3 * COST + 9) == Settlement("r0", Outcome.SETTLED, 3 * COST + 9, 9)

    # --- never used

    def test_a_release_books_nothing_and_is_an_end(self) -> None:
        self.spend("s0", 9)
        made = self.extend(self.reserve("r0"), 2 * COST)
        assert self.harness.backend.release(made) == Settlement("r0", Outcome.RELEASED, 0, 0)
        assert self.books() == Books(9, 9, 9, 9, 9, 9, 0)
        stored = self.harness.stored()
        record, left = stored[self.keys("r0").record]
        assert str(record).startswith("released 0 ")
        assert left == RECORD_KEEP_SECONDS
        for again in (self.harness.backend.release(made), self.settle(made, 7)):
            assert again == Settlement("r0", Outcome.REPEATED, 0, 0)
        assert self.harness.stored() == stored
        with conflict():
            self.harness.backend.reserve(ask("r0"))

    def test_a_release_after_a_settlement_gets_the_first_answer(self) -> None:
        made = self.reserve("r0", idempotency=KEY)
        self.settle(made, 7)
        before = self.harness.stored()
        assert self.harness.backend.release(made) == Settlement("r0", Outcome.REPEATED, 7, 0)
        assert self.harness.stored() == before

    def test_a_release_whose_record_was_lost_books_nothing(self) -> None:
        made = self.reserve("r0", idempotency=KEY)
        for key in self.harness.stored():
            if not key.startswith("llm:idempotency:"):
                self.harness.lose(key)
        assert self.harness.backend.release(made) == Settlement("r0", Outcome.LATE, 0, 0)
        assert list(self.harness.stored()) == [self.keys("r0").record]
        assert self.harness.backend.release(made).outcome is Outcome.REPEATED

    def test_a_release_goes_back_to_the_periods_of_its_reservation(self) -> None:
        self.harness.clock.us = int(datetime(2026, 12, 31, 23, 59, 59, tzinfo=UTC).timestamp()) * US
        made = self.reserve("r0")
        then = self.keys()
        self.pass_seconds(3)
        self.reserve("r1")
        self.harness.backend.release(made)
        stored = self.harness.stored()
        assert [stored[key][0] for key in (then.daily, then.global_hourly, then.global_daily)] == ["0"] * 3
        assert self.books() == Books(COST, COST, COST, COST, COST, COST, COST)

    # --- a caller's own key

    def duplicate(self, reservation_id: str, key: Idempotency, **changes: Any) -> Duplicate:
        before = self.harness.stored()
        verdict = self.harness.backend.reserve(ask(reservation_id, idempotency=key, **changes))
        assert isinstance(verdict, Duplicate), verdict
        assert self.harness.backend.find_duplicate(key) == verdict
        assert self.harness.stored() == before
        return verdict

    def test_a_key_in_flight_settled_and_on_another_body(self) -> None:
        other = replace(KEY, body_digest="0" * 16)
        made = self.reserve("r0", idempotency=KEY)
        assert self.duplicate("r1", KEY) == Duplicate("r0", DuplicateState.IN_FLIGHT, COST, same_body=True)
        assert self.duplicate("r1", other) == Duplicate("r0", DuplicateState.IN_FLIGHT, COST, same_body=False)
        self.pass_seconds(3)
        self.settle(made, 7)
        assert self.duplicate("r1", KEY) == Duplicate("r0", DuplicateState.SETTLED, 7, same_body=True)
        assert self.duplicate("r1", other, cost_nanousd=1) == Duplicate(
            "r0", DuplicateState.SETTLED, 7, same_body=False
        )
        assert self.books() == Books(7, 7, 7, 7, 7, 7, 0)

    def test_a_key_whose_request_was_extended_tells_what_is_held(self) -> None:
        made = self.extend(self.reserve("r0", idempotency=KEY), 2 * COST)
        assert self.duplicate("r1", KEY).cost_nanousd == 2 * COST
        self.pass_seconds(PENDING_SECONDS)
        assert self.duplicate("r1", KEY) == Duplicate("r0", DuplicateState.EXPIRED, 2 * COST, same_body=True)
        self.settle(made, 8)
        assert self.duplicate("r1", KEY) == Duplicate("r0", DuplicateState.SETTLED, 8, same_body=True)

    def test_an_extension_leaves_the_key_of_another_request_alone(self) -> None:
        made = self.reserve("r0", idempotency=KEY)
        self.harness.lose(f"llm:idempotency:{KEY.digest}")
        self.reserve("r1", COST + 1, idempotency=KEY)
        self.extend(made, 2 * COST)
        assert self.duplicate("r2", KEY) == Duplicate("r1", DuplicateState.IN_FLIGHT, COST + 1, same_body=True)

    def test_a_key_whose_request_nobody_ended_in_time(self) -> None:
        self.reserve("r0", idempotency=KEY)
        self.pass_seconds(PENDING_SECONDS - 1)
        assert self.duplicate("r1", KEY).state is DuplicateState.IN_FLIGHT
        self.pass_seconds(1)
        assert self.duplicate("r1", KEY) == Duplicate("r0", DuplicateState.EXPIRED, COST, same_body=True)
        self.pass_seconds(RECORD_KEEP_SECONDS)
        assert self.duplicate("r1", KEY).state is DuplicateState.EXPIRED

    def test_a_key_is_free_again_after_a_release_and_after_a_refusal(self) -> None:
        self.refuse("r0", COST, replace(ROOMY, network_window_nanousd=1), idempotency=KEY)
        assert self.harness.backend.find_duplicate(KEY) is None
        made = self.reserve("r1", idempotency=KEY)
        self.harness.backend.release(made)
        assert self.harness.backend.find_duplicate(KEY) is None
        assert f"llm:idempotency:{KEY.digest}" not in self.harness.stored()
        second = self.reserve("r2", idempotency=KEY)
        assert self.harness.backend.release(made).outcome is Outcome.REPEATED
        assert self.duplicate("r3", KEY).reservation_id == "r2"
        self.settle(second, 1)
        assert self.duplicate("r3", KEY) == Duplicate("r2", DuplicateState.SETTLED, 1, same_body=True)

    def test_an_end_leaves_the_key_of_another_request_alone(self) -> None:
        for end in ("settle", "release"):
            self.harness.clear()
            first = self.reserve("r0", idempotency=KEY)
            self.harness.lose(f"llm:idempotency:{KEY.digest}")
            self.reserve("r1", idempotency=KEY)
            if end == "settle":
                self.settle(first, 1)
            else:
                self.harness.backend.release(first)
            assert self.duplicate("r2", KEY) == Duplicate("r1", DuplicateState.IN_FLIGHT, COST, same_body=True)

    def test_a_key_is_kept_for_a_day_from_its_last_change(self) -> None:
        key = f"llm:idempotency:{KEY.digest}"
        made = self.reserve("r0", idempotency=KEY)
        assert self.harness.stored()[key][1] == IDEMPOTENCY_KEEP_SECONDS
        self.pass_seconds(60)
        self.extend(made, 2 * COST)
        assert self.harness.stored()[key][1] == IDEMPOTENCY_KEEP_SECONDS - 60
        self.settle(made, 7)
        assert self.harness.stored()[key][1] == IDEMPOTENCY_KEEP_SECONDS
        self.pass_seconds(IDEMPOTENCY_KEEP_SECONDS - 1)
        assert self.duplicate("r1", KEY).state is DuplicateState.SETTLED
        self.pass_seconds(1)
        self.reserve("r1", idempotency=KEY)

    def test_a_lost_key_is_remembered_again_by_the_settlement(self) -> None:
        made = self.reserve("r0", idempotency=KEY)
        for key in self.harness.stored():
            self.harness.lose(key)
        assert self.settle(made, 7).outcome is Outcome.LATE
        assert self.duplicate("r1", KEY) == Duplicate("r0", DuplicateState.SETTLED, 7, same_body=True)

    def test_another_key_is_another_request(self) -> None:
        self.reserve("r0", idempotency=KEY)
        self.reserve("r1", idempotency=replace(KEY, digest="f" * 32))
        self.reserve("r2", identifier="another", idempotency=replace(KEY, digest="e" * 32))
        self.reserve("r3")
        assert self.books().global_day_nanousd == 4 * COST

    def test_the_same_id_with_its_key_gets_the_first_answer(self) -> None:
        first = self.reserve("r0", idempotency=KEY)
        assert self.reserve("r0", idempotency=KEY) == first

    def test_a_key_is_answered_under_a_marker_too(self) -> None:
        self.reserve("r0", idempotency=KEY)
        self.harness.put(self.keys().marker, "by hand", 20)
        assert self.duplicate("r1", KEY).reservation_id == "r0"

    def test_a_key_set_by_hand_stands_for_a_request_that_nobody_knows(self) -> None:
        for text in ("garbage", "", "open x y 1 2"):
            self.harness.put(f"llm:idempotency:{KEY.digest}", text, 20)
            assert self.duplicate("r1", KEY) == Duplicate("", DuplicateState.IN_FLIGHT, 0, same_body=False)

    def test_of_callers_at_once_with_one_key_one_is_admitted(self) -> None:
        if not self.harness.backend.promises_atomicity:
            return
        barrier = threading.Barrier(20)

        def call(number: int) -> Verdict:
            barrier.wait(10)
            return self.harness.backend.reserve(ask(f"r{number}", idempotency=KEY))

        with ThreadPoolExecutor(20) as callers:
            verdicts = list(callers.map(call, range(20)))
        admitted = [verdict for verdict in verdicts if isinstance(verdict, Reservation)]
        told = {verdict.reservation_id for verdict in verdicts if isinstance(verdict, Duplicate)}
        assert [verdict.reservation_id for verdict in admitted] == list(told)
        assert self.books().global_day_nanousd == COST

    def test_of_extensions_at_once_no_more_is_granted_than_there_is_room_for(self) -> None:
        if not self.harness.backend.promises_atomicity:
            return
        limits = replace(ROOMY, network_window_nanousd=25 * COST)
        made = [self.reserve(f"r{number}", COST, limits, identifier=f"id{number}") for number in range(20)]
        barrier = threading.Barrier(20)

        def call(reservation: Reservation) -> bool:
            barrier.wait(10)
            return isinstance(self.harness.backend.extend(reservation, 2 * COST, limits), Reservation)

        with ThreadPoolExecutor(20) as callers:
            granted = sum(callers.map(call, made))
        assert granted == 5
        assert self.books().network_window_nanousd == 25 * COST

    # --- books that were cleared

    def clear_books(self) -> None:
        """What `flask ledger reset` does: the identifier's books go, and the moment is remembered."""
        keys = self.keys()
        for key in (keys.marker, keys.recent, keys.daily, keys.pending_identifier):
            if key in self.harness.stored():
                self.harness.lose(key)
        self.harness.put(f"llm:reset:{WHO}", str(self.harness.clock.us), 172_800)

    def test_what_was_reserved_before_its_books_were_cleared_is_not_taken_from_them(self) -> None:
        for actual in (0, 7, COST + 9):
            self.harness.clear()
            old = self.reserve("r0")
            self.clear_books()
            self.harness.pass_time(1)
            self.reserve("r1", 100)
            self.settle(old, actual)
            others = actual + 100
            assert self.books() == Books(100, 100, others, others, others, others, 100), actual

    def test_what_was_reserved_after_its_books_were_cleared_is_booked_as_ever(self) -> None:
        self.clear_books()
        self.harness.pass_time(1)
        made = self.extend(self.reserve("r0"), 2 * COST)
        self.settle(made, 7)
        assert self.books() == Books(7, 7, 7, 7, 7, 7, 0)

    def test_an_extension_of_what_was_cleared_is_charged_to_the_others_only(self) -> None:
        limits = replace(ROOMY, window_nanousd=COST, day_nanousd=COST, network_window_nanousd=3 * COST)
        made = self.reserve("r0", COST, limits)
        self.clear_books()
        more = self.extend(made, 3 * COST, limits)
        assert (more.cost_nanousd, more.window_spent_nanousd, more.day_spent_nanousd) == (3 * COST, 0, 0)
        held = 3 * COST
        assert self.books() == Books(0, 0, held, held, held, held, 0)
        assert self.refuse_more(made, 3 * COST + 1, limits).reason == Reason.NETWORK_LIMIT
        self.settle(more, 7)
        assert self.books() == Books(0, 0, 7, 7, 7, 7, 0)

    def test_a_late_settlement_of_what_was_cleared_is_booked_to_the_others_only(self) -> None:
        made = self.reserve("r0")
        for key in self.harness.stored():
            self.harness.lose(key)
        self.clear_books()
        assert self.settle(made, 7).outcome is Outcome.LATE
        assert self.books() == Books(0, 0, 7, 7, 7, 7, 0)

    def test_a_reset_that_is_no_time_clears_nothing(self) -> None:
        made = self.reserve("r0")
        self.harness.put(f"llm:reset:{WHO}", "yesterday", 1_000)
        self.settle(self.extend(made, 2 * COST), 7)
        assert self.books() == Books(7, 7, 7, 7, 7, 7, 0)

    # --- what is told besides

    def test_when_the_oldest_amount_leaves_the_window_is_told(self) -> None:
        assert self.books().window_frees_at_seconds is None
        frees_at = START_US // US + BUCKET_SECONDS + WINDOW_SECONDS
        made = self.reserve("r0")
        self.pass_seconds(BUCKET_SECONDS * 2 + 3.5)
        assert self.reserve("r1").window_frees_at_seconds == frees_at
        assert self.books().window_frees_at_seconds == frees_at
        self.settle(made, 0)
        later = frees_at + 2 * BUCKET_SECONDS
        assert self.books().window_frees_at_seconds == later
        assert self.reserve("r2").window_frees_at_seconds == later
        assert self.reserve("r2").window_frees_at_seconds == later
        self.pass_seconds(later - self.harness.clock.us // US)
        assert self.books().window_frees_at_seconds is None

    def test_the_oldest_amount_is_the_oldest_not_the_smallest_nor_the_last(self) -> None:
        for amounts in ((5, 9), (9, 5)):
            self.harness.clear()
            self.pass_seconds(7)
            frees_at = START_US // US + BUCKET_SECONDS + WINDOW_SECONDS
            assert self.reserve("r0", amounts[0]).window_frees_at_seconds == frees_at
            self.pass_seconds(BUCKET_SECONDS)
            self.reserve("r1", amounts[1])
            self.pass_seconds(BUCKET_SECONDS)
            assert self.reserve("r2").window_frees_at_seconds == frees_at

    def test_the_oldest_amount_is_one_that_still_counts(self) -> None:
        for amounts in ((5, 9), (9, 5)):
            self.harness.clear()
            self.reserve("over", 7)
            self.pass_seconds(WINDOW_SECONDS - BUCKET_SECONDS)
            self.reserve("r0", amounts[0])
            frees_at = START_US // US + 2 * WINDOW_SECONDS
            self.pass_seconds(BUCKET_SECONDS)
            self.reserve("r1", amounts[1])
            self.pass_seconds(BUCKET_SECONDS)
            made = self.reserve("r2")
            assert made.window_frees_at_seconds == frees_at
            assert made.window_spent_nanousd == 14 + COST

    def test_the_books_tell_what_is_open_since_midnight_and_their_moment(self) -> None:
        self.harness.clock.us = int(datetime(2026, 3, 14, 23, 59, 50, tzinfo=UTC).timestamp()) * US
        self.reserve("r0", 5)
        self.pass_seconds(20)
        self.reserve("r1", 7)
        books = self.books()
        assert (books.pending_nanousd, books.pending_today_nanousd) == (12, 7)
        assert books.as_of_us == self.harness.clock.us

    def test_open_money_past_its_time_is_told_once(self) -> None:
        self.extend(self.reserve("r0"), 2 * COST)
        self.reserve("r1", 5, identifier="another")
        living = self.reserve("r2", 9, pending_seconds=PENDING_SECONDS)
        self.pass_seconds(PENDING_SECONDS + PENDING_BUCKET_SECONDS - 1)
        other = self.reserve("r3", 3)
        assert other.expired_nanousd == 0
        assert self.settle(other, 3).expired_nanousd == 0
        self.reserve("keeps the ring alive", 1)
        self.pass_seconds(1)
        # Its own is no news to who ends it.
        assert self.settle(living, 1).expired_nanousd == 2 * COST + 5
        assert self.settle(self.reserve("r4"), 1).expired_nanousd == 0
        assert self.harness.stored()[self.keys().pending_global][0] == {
            (self.harness.clock.us // US - 1) // PENDING_BUCKET_SECONDS * PENDING_BUCKET_SECONDS: 1
        }

    def test_open_money_past_its_time_is_told_after_a_lull_too(self) -> None:
        self.reserve("r0")
        self.pass_seconds(RECORD_KEEP_SECONDS)
        assert self.settle(self.reserve("r1"), 1).expired_nanousd == COST
        assert self.settle(self.reserve("r2"), 1).expired_nanousd == 0

    def test_open_money_past_its_time_is_told_by_a_reservation_where_nobody_settles(self) -> None:
        told = []
        for number in range(30):
            told.append(self.reserve(f"r{number}", 2**number).expired_nanousd)
            self.pass_seconds(PENDING_BUCKET_SECONDS)
        assert sum(told) > 0
        opened = self.harness.stored()[self.keys().pending_global][0]
        assert isinstance(opened, dict)
        assert sum(told) + sum(opened.values()) == 2**30 - 1

    # --- what is odd

    def test_taking_from_a_total_of_nothing_is_a_whole_settlement(self) -> None:
        made = self.reserve("r0")
        keys = self.keys()
        for key in (keys.daily, keys.network_daily, keys.global_hourly, keys.global_daily):
            self.harness.put(key, "0", 1_000)
        assert self.settle(made, 1) == Settlement("r0", Outcome.SETTLED, 1, 0)
        assert self.books() == Books(1, 0, 1, 0, 0, 0, 0)

    def test_an_id_sent_again_keeps_the_lengths_that_it_was_admitted_with(self) -> None:
        first = self.reserve("r0")
        changed = replace(ROOMY, window_seconds=61)
        for known in (
            self.reserve("r0", COST, changed, pending_seconds=30),
            self.harness.backend.find(ask("r0", COST, changed, pending_seconds=30)),
        ):
            assert known is not None
            assert (known.window_seconds, known.pending_seconds) == (WINDOW_SECONDS, PENDING_SECONDS)
        self.pass_seconds(61)
        self.settle(self.reserve("r0", COST, changed), 7)
        assert self.books() == Books(7, 7, 7, 7, 7, 7, 0)
        assert first.window_seconds == WINDOW_SECONDS

    def test_a_ring_lives_as_long_as_its_youngest_bucket_whatever_the_window_was(self) -> None:
        self.pass_seconds(1)
        self.spend("r0", COST, replace(ROOMY, window_seconds=WINDOW_BUCKETS))
        self.pass_seconds(0.5)
        start = (START_US // US + 1) // BUCKET_SECONDS * BUCKET_SECONDS
        self.spend("r1", COST, replace(ROOMY, window_seconds=WINDOW_BUCKETS))
        assert self.harness.stored()[self.keys().recent][1] == WINDOW_BUCKETS + 1
        self.pass_seconds(0.5)
        self.reserve("r2")
        assert self.harness.stored()[self.keys().recent][1] == WINDOW_SECONDS + BUCKET_SECONDS
        self.reserve("r3")
        ring, left = self.harness.stored()[self.keys().recent]
        assert left == WINDOW_SECONDS + BUCKET_SECONDS
        assert start in ring

    def test_a_reservation_prolongs_no_life_but_with_a_new_bucket(self) -> None:
        self.reserve("r0")
        before = {key: left for key, (_, left) in unmarked(self.harness.stored()).items() if "reservation" not in key}
        for gone in range(1, PENDING_BUCKET_SECONDS):
            self.pass_seconds(0.6)
            self.reserve(f"r{gone}")
            self.pass_seconds(0.4)
            stored = self.harness.stored()
            assert {key: stored[key][1] for key in before} == {key: left - gone for key, left in before.items()}

    def test_a_ring_of_open_money_gets_its_life_with_a_new_bucket_only(self) -> None:
        self.reserve("r0", pending_seconds=30)
        self.reserve("r1")
        life = 30 + pending_bucket_seconds_of(30)
        self._assert_open_rings_live(life)
        self.pass_seconds(PENDING_BUCKET_SECONDS - 1)
        self.reserve("r2")
        self._assert_open_rings_live(life - PENDING_BUCKET_SECONDS + 1)
        self.pass_seconds(1)
        self.reserve("r3")
        self._assert_open_rings_live(PENDING_SECONDS + PENDING_BUCKET_SECONDS)

    def _assert_open_rings_live(self, seconds: int) -> None:
        stored, keys = self.harness.stored(), self.keys()
        rings = (keys.pending_identifier, keys.pending_network, keys.pending_global)
        assert [stored[key][1] for key in rings] == [seconds, seconds, seconds + RECORD_KEEP_SECONDS]

    # --- sizes and lives

    def test_a_ring_has_never_more_members_than_buckets_and_one(self) -> None:
        most = 0
        for number in range(3 * WINDOW_BUCKETS):
            self.reserve(f"r{number}", 1)
            self.harness.lose(self.keys(f"r{number}").record)
            for key in (self.keys().recent, self.keys().network_recent):
                ring, left = self.harness.stored()[key]
                most = max(most, len(ring))
                assert left > 0
            self.pass_seconds(BUCKET_SECONDS)
        assert most == WINDOW_BUCKETS + 1

    def test_a_window_that_is_no_multiple_of_its_buckets_is_as_long_as_it_says(self) -> None:
        for window in (7, 610, 619):
            self.harness.clear()
            limits = replace(ROOMY, window_seconds=window, window_nanousd=COST, throttle_seconds=1)
            self.spend("r0", COST, limits)
            self.pass_seconds(window)
            assert self.refuse("r1", 1, limits).reason == Reason.WINDOW_LIMIT, window
            bucket = -(-window // WINDOW_BUCKETS)
            self.harness.lose(self.keys().marker)
            self.pass_seconds(bucket)
            self.reserve("r2", 1, limits)
            ring, left = self.harness.stored()[self.keys().recent]
            assert (len(ring), left) == (1, window + bucket), window

    def test_what_killed_workers_leave_open_makes_no_ring_grow(self) -> None:
        most = 0
        for number in range(60):
            self.reserve(f"r{number}", 1)
            most = max(most, len(self.harness.stored()["llm:open:global"][0]))
            self.pass_seconds(PENDING_BUCKET_SECONDS)
        assert most == PENDING_BUCKETS + 2

    def test_windows_that_are_no_multiple_of_their_buckets(self) -> None:
        for window in (1, 59, 61, 601, 86_400):
            self.harness.clear()
            bucket = bucket_seconds_of(window)
            limits = replace(ROOMY, window_nanousd=COST, window_seconds=window, throttle_seconds=1)
            self.spend("r0", COST, limits)
            self.pass_seconds(window)
            assert self.refuse("r1", COST, limits).reason == Reason.WINDOW_LIMIT, window
            self.pass_seconds(bucket + 1)
            self.reserve("r2", COST, limits)

    def test_a_window_that_grows_forgets_nothing_that_was_booked_since(self) -> None:
        short, long = 10 * WINDOW_BUCKETS // 10, WINDOW_SECONDS
        limits = replace(ROOMY, window_nanousd=3 * COST, throttle_seconds=1)
        self.spend("r0", COST, replace(limits, window_seconds=short))
        self.spend("r1", COST, limits)
        self.pass_seconds(2 * short)
        self.spend("r2", COST, limits)
        self.pass_seconds(long - 2 * short - 1)
        assert self.refuse("r3", 2 * COST, limits).reason == Reason.WINDOW_LIMIT
        ring, left = self.harness.stored()[self.keys().recent]
        assert isinstance(ring, dict)
        assert sum(ring.values()) >= 2 * COST
        assert left > 0

    def test_when_all_is_over_nothing_is_left(self) -> None:
        self.reserve("r0")
        self.spend("r1", 5)
        self.refuse("r2", COST, replace(ROOMY, window_nanousd=COST))
        self.pass_seconds(3 * 86_400)
        assert self.harness.stored() == {}

    # --- together

    def test_callers_at_once_are_admitted_exactly_as_many_as_fit(self) -> None:
        if not self.harness.backend.promises_atomicity:
            return
        limits = replace(ROOMY, window_nanousd=5 * COST, mark_when_busy=False)
        barrier = threading.Barrier(20)
        admitted: list[Reservation] = []

        def call(number: int) -> None:
            barrier.wait(10)
            verdict = self.harness.backend.reserve(ask(f"r{number}", COST, limits))
            if isinstance(verdict, Reservation):
                admitted.append(verdict)

        callers = [threading.Thread(target=call, args=(number,)) for number in range(20)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert len(admitted) == 5
        assert self.books().window_nanousd == 5 * COST

    def test_any_list_of_operations_leaves_what_the_memory_strategy_leaves(self) -> None:
        model = MemoryHarness()
        for seed in range(3):
            self.harness.clear()
            model.clear()
            operations = some_operations(seed)
            for number, (mine, models) in enumerate(
                zip(played(self.harness, operations), played(model, operations), strict=True)
            ):
                assert mine[:2] == models[:2], (seed, number, operations[number])
                assert_same_stored(mine[2], models[2], (seed, number, operations[number]))


Operation = Callable[[Harness, dict[str, Reservation]], object]


@dataclass(frozen=True, slots=True)
class Op:
    """One step of a seeded list: what is done, and with what."""

    name: str
    id: str = ""
    ask: Ask | None = None
    amount: int = 0
    at_least: int | None = None
    is_lost: bool = False
    """Of an extension: whoever asked goes on with what it knew before."""


WEIGHTS = {
    "reserve": 40,
    "again": 4,
    "another request": 2,
    "extend": 20,
    "settle": 20,
    "release": 6,
    "find": 2,
    "find key": 2,
    "lose": 1,
    "mark": 1,
    "reset": 1,
    "wait": 25,
}
"""How often each may happen."""


def some_operations(seed: int, length: int = 300) -> list[Op]:
    """A list of everything that may happen, the same for the same seed."""
    luck = random.Random(seed)  # noqa: S311 (seeded on purpose)
    made: list[Ask] = []
    operations = []
    for number in range(length):
        name = luck.choices(tuple(WEIGHTS), tuple(WEIGHTS.values()))[0]
        if name == "wait":
            us = luck.choice((1, 500_000, 1_000_000, 7_000_000, 33_500_000, 61_000_000, 300_000_000, 4_000_000_000))
            operations.append(Op(name, amount=luck.choice((us, us, 50_000_000_000)) if luck.random() < 0.1 else us))
        elif name in {"mark", "reset"}:
            operations.append(Op(name, luck.choice("abc")))
        elif name == "reserve" or not made:
            made.append(_some_ask(luck, f"r{seed}-{number}"))
            operations.append(Op("reserve", made[-1].reservation_id, made[-1]))
        else:
            old = luck.choice(made[-12:])
            actual = luck.choice((0, 1, old.cost_nanousd // 2, old.cost_nanousd, old.cost_nanousd + 3))
            at_least = luck.choice((None, None, old.cost_nanousd, old.cost_nanousd + 1))
            operations.append(Op(name, old.reservation_id, old, actual, at_least, luck.random() < 0.3))
    return operations


def _some_ask(luck: random.Random, reservation_id: str) -> Ask:
    limits = Limits(
        window_nanousd=luck.choice((900, 2_000)),
        day_nanousd=luck.choice((3_000, 5_000)),
        network_window_nanousd=luck.choice((None, 1_200, 2_500)),
        network_day_nanousd=luck.choice((None, 6_000)),
        global_hour_nanousd=luck.choice((2_600, 4_000)),
        global_day_nanousd=luck.choice((7_000, 12_000)),
        window_seconds=luck.choice((600, 600, 600, 60, 61)),
        throttle_seconds=luck.choice((5, 30)),
        mark_when_busy=luck.random() < 0.5,
    )
    who, network = luck.choice("abc"), luck.choice(("n1", "n2"))
    cost = luck.choice((1, 50, 333, 700, 2_500))
    key = Idempotency(luck.choice("abcd") * 32, luck.choice("01") * 16) if luck.random() < 0.3 else None
    return Ask(reservation_id, who, network, cost, limits, luck.choice((120, 30)), key)


def played(harness: Harness, operations: list[Op]) -> Iterator[tuple[object, object, Stored]]:
    """Do the operations one after the other; for each the answer, the books and all that is stored."""
    reservations: dict[str, Reservation] = {}
    for op in operations:
        answer = _do(harness, op, reservations)
        yield answer, _whole(harness.backend.books("a", "n1", WINDOW_SECONDS)), harness.stored()


def _whole(answer: Reservation | Refusal | Duplicate | Settlement | Books | None) -> dict[str, object] | None:
    """Every field, those too that are told besides and do not make two answers differ."""
    return None if answer is None else {**asdict(answer), "backend": ""}


def _do(harness: Harness, op: Op, reservations: dict[str, Reservation]) -> object:
    try:
        return _whole(_answer(harness, op, reservations))
    except ReservationConflict as error:
        return str(error)


def _answer(
    harness: Harness, op: Op, reservations: dict[str, Reservation]
) -> Reservation | Refusal | Duplicate | Settlement | None:
    if op.name == "wait":
        harness.pass_time(op.amount)
    if op.name == "mark":
        harness.put(f"llm:throttle:{op.id}", "by hand", 20)
    if op.name == "reset":
        _reset(harness, op.id)
    if op.ask is None:
        return None
    if op.name in {"reserve", "again", "another request", "find", "find key"}:
        return _ask(harness, op, op.ask, reservations)
    reservation = reservations.get(op.id)
    return None if reservation is None else _go_on(harness, op, reservation, reservations)


def _ask(
    harness: Harness, op: Op, ask: Ask, reservations: dict[str, Reservation]
) -> Reservation | Refusal | Duplicate | None:
    if op.name == "find":
        return harness.backend.find(ask)
    if op.name == "find key":
        return None if ask.idempotency is None else harness.backend.find_duplicate(ask.idempotency)
    if op.name == "another request":
        return harness.backend.reserve(replace(ask, cost_nanousd=ask.cost_nanousd + 1))
    verdict = harness.backend.reserve(ask)
    if isinstance(verdict, Reservation):
        reservations.setdefault(op.id, verdict)
    return verdict


def _go_on(
    harness: Harness, op: Op, reservation: Reservation, reservations: dict[str, Reservation]
) -> Reservation | Refusal | Settlement | None:
    if op.name == "extend":
        to_nanousd, limits = reservation.cost_nanousd + op.amount, op.ask.limits if op.ask else ROOMY
        verdict = harness.backend.extend(reservation, to_nanousd, limits, at_least_nanousd=op.at_least)
        if isinstance(verdict, Reservation) and not op.is_lost:
            reservations[op.id] = verdict
        return verdict
    if op.name == "settle":
        return harness.backend.settle(reservation, op.amount)
    if op.name == "release":
        return harness.backend.release(reservation)
    record = f"llm:reservation:{op.id}"
    if record in harness.stored():
        harness.lose(record)
    return None


def _reset(harness: Harness, identifier: str) -> None:
    """As `flask ledger reset` does: the identifier's books go, and the moment is remembered."""
    begins = (f"llm:cost:recent:{identifier}", f"llm:cost:daily:{identifier}:", f"llm:open:identifier:{identifier}")
    for key in harness.stored():
        if key.startswith((*begins, f"llm:throttle:{identifier}")):
            harness.lose(key)
    harness.put(f"llm:reset:{identifier}", str(harness.clock.us), 172_800)
