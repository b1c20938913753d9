"""What every backend must do, asked through the contract only: the suite knows no keys."""

# ruff: noqa: S101, D102, PLR2004 (asserts are the point, a test's name says what must hold, the numbers are the expectations)

import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import UTC, datetime
from itertools import product
from typing import Any

from backends import contract, keys
from backends.budgets import (
    BUILT_IN,
    EVERYBODY,
    MOST_BUDGETS,
    SECONDS_PER_DAY,
    SECONDS_PER_HOUR,
    Budget,
    Calendar,
    Forever,
    Period,
    Reason,
    Scope,
    Share,
    Sliding,
)
from backends.conformance.cases import (
    AMPLE,
    BUCKET_SECONDS,
    COST,
    EVERY,
    KEY,
    LIMITS_IN_ORDER,
    NETWORK,
    PENDING_BUCKET_SECONDS,
    PENDING_SECONDS,
    PERIODS,
    ROOMY,
    SLIDING,
    THROTTLE_SECONDS,
    US,
    WHO,
    WINDOW_SECONDS,
    ZONE,
    LimitCase,
    Limits,
    conflict,
    further_budget,
    make_ask,
)
from backends.conformance.harness import START_US, Harness
from backends.contract import Duplicate, DuplicateState, Outcome, Refusal, Reservation, Settlement
from backends.errors import ConfigurationError

TURNS = [
    datetime.fromisoformat(f"{moment}+00:00")
    for moment in ("2026-03-14T10:59:59", "2026-03-14T23:59:59", "2026-03-31T23:59:59", "2026-12-31T23:59:59")
]
"""One second before the turn of an hour, a day, a month, a year."""
MORTAL = replace(EVERY, further=tuple(budget for budget in EVERY.further if budget.period != Forever()))
"""Every limit but the one of what is never over."""
OTHER_PERIODS = (*PERIODS[1:], PERIODS[0])
ENDS = (
    # The second two o'clock of the night in which clocks are put back begins when the first one ends.
    (Calendar("hour", ZONE), "2026-10-25T00:30:00", "2026-10-25T01:00:00"),
    (Calendar("hour", "Asia/Kathmandu"), "2026-03-14T10:20:00", "2026-03-14T11:15:00"),
    # A day of 23 hours, one of 25, the first and the last second of one.
    (Calendar("day", ZONE), "2026-03-28T23:00:00", "2026-03-29T22:00:00"),
    (Calendar("day", ZONE), "2026-10-25T22:59:59", "2026-10-25T23:00:00"),
    (Calendar("day"), "2026-03-14T23:59:59", "2026-03-15T00:00:00"),
    (Calendar("week", ZONE), "2026-03-22T23:00:00", "2026-03-29T22:00:00"),
    (Calendar("week", ZONE), "2026-12-31T12:00:00", "2027-01-03T23:00:00"),
    # Months in which clocks are put forward and back.
    (Calendar("month", ZONE), "2026-02-28T23:00:00", "2026-03-31T22:00:00"),
    (Calendar("month", ZONE), "2026-10-31T22:59:59", "2026-10-31T23:00:00"),
    (Calendar("month"), "2028-02-29T01:00:00", "2028-03-01T00:00:00"),
)
"""A period, a moment in it, and its end."""


def at_us(moment: str) -> int:
    """Unix time of a moment of UTC."""
    return int(datetime.fromisoformat(f"{moment}+00:00").timestamp()) * US


def renews_at(reservation: Reservation, name: str) -> int | None:
    """When the oldest amount leaves the window of that name, or its period ends."""
    names = [budget.name for budget in reservation.budgets]
    return reservation.renews_at_seconds[names.index(name)]


class Behaviour:
    """Inherit it as ``Test…`` and set `harness` before each test."""

    harness: Harness

    # --- helpers

    def reserve(self, reservation_id: str, cost_nanousd: int = COST, limits: Limits = ROOMY, **who: Any) -> Reservation:
        verdict = self.harness.backend.reserve(make_ask(reservation_id, cost_nanousd, limits, **who))
        assert isinstance(verdict, Reservation), verdict
        return verdict

    def refuse(self, reservation_id: str, cost_nanousd: int = COST, limits: Limits = ROOMY, **who: Any) -> Refusal:
        verdict = self.harness.backend.reserve(make_ask(reservation_id, cost_nanousd, limits, **who))
        assert isinstance(verdict, Refusal), verdict
        return verdict

    def settle(self, reservation: Reservation, actual_nanousd: int) -> Settlement:
        return self.harness.backend.settle(reservation, actual_nanousd)

    def extend(
        self,
        reservation: Reservation,
        to_nanousd: int,
        limits: Limits = ROOMY,
        at_least_nanousd: int | None = None,
        **who: Any,
    ) -> Reservation:
        verdict = self._extended(reservation, to_nanousd, limits, at_least_nanousd, **who)
        assert isinstance(verdict, Reservation), verdict
        return verdict

    def refuse_extension(
        self,
        reservation: Reservation,
        to_nanousd: int,
        limits: Limits = ROOMY,
        at_least_nanousd: int | None = None,
        **who: Any,
    ) -> Refusal:
        verdict = self._extended(reservation, to_nanousd, limits, at_least_nanousd, **who)
        assert isinstance(verdict, Refusal), verdict
        return verdict

    def _extended(
        self, reservation: Reservation, to_nanousd: int, limits: Limits, at_least: int | None, **who: Any
    ) -> Reservation | Refusal:
        """The budgets of today are those of an ask that is made now."""
        budgets = make_ask("today", COST, limits, **who).budgets
        return self.harness.backend.extend(reservation, to_nanousd, budgets, at_least_nanousd=at_least)

    def spend(self, reservation_id: str, amount_nanousd: int, limits: Limits = ROOMY, **who: Any) -> None:
        self.settle(self.reserve(reservation_id, amount_nanousd, limits, **who), amount_nanousd)

    def at_once(self, call: Callable[[int], contract.Verdict]) -> list[contract.Verdict]:
        """What 20 callers get who begin at once; `call` is given each one's number."""
        barrier = threading.Barrier(20)

        def wait_and_call(number: int) -> contract.Verdict:
            barrier.wait(10)
            return call(number)

        with ThreadPoolExecutor(20) as callers:
            return list(callers.map(wait_and_call, range(20)))

    def books(self) -> contract.Books:
        return self.harness.backend.books(EVERY.budgets(WHO, NETWORK))

    def spent(self, name: str) -> int:
        """What is booked in one budget."""
        return self.books().spent(name)

    def assert_booked(self, nanousd: int, pending_nanousd: int = 0) -> None:
        """So much is in each of the six totals, and so much of the identifier's money is pending."""
        self.assert_spent(nanousd, nanousd, pending_nanousd)

    def assert_spent(self, mine_nanousd: int, others_nanousd: int, pending_nanousd: int) -> None:
        """So much is in the identifier's totals of the six and in the others', and so much of the former is pending."""
        books = self.books()
        assert {name: books.spent(name) for name in BUILT_IN} == {
            name: mine_nanousd if row.scope is Scope.IDENTIFIER else others_nanousd for name, row in BUILT_IN.items()
        }
        assert books.use("window").pending_nanousd == pending_nanousd

    def pass_seconds(self, seconds: float) -> None:
        self.harness.pass_time(int(seconds * US))

    def each_limit(self) -> Iterator[LimitCase]:
        for case in LIMITS_IN_ORDER:
            self.harness.clear()
            yield case

    def assert_says(self, refusal: Refusal, case: LimitCase) -> None:
        """It is the refusal of this limit."""
        said = (refusal.reason, refusal.cause, refusal.scope, refusal.budget)
        assert said == (case.reason, case.reason, case.scope, case.name)

    # --- what is looked at: `RedisLayout` compares the stored keys instead

    def amounts(self) -> Mapping[str, object]:
        """What is booked; equal before and after where no amount has changed."""
        return {f"{who} {network}": books for (who, network), books in self._all_books().items()}

    def seen(self, *, marker: bool = True) -> Mapping[str, object]:
        """All that the contract shows, or all but the marker; equal before and after where nothing has changed."""
        seen: dict[str, object] = {"key": self.harness.backend.find_duplicate(KEY)}
        for (who, network), books in self._all_books().items():
            seen[f"{who} {network}"] = asdict(books if marker else replace(books, marker=None))
        return seen

    def _all_books(self) -> dict[tuple[str, str], contract.Books]:
        owners = ((WHO, NETWORK), ("another", NETWORK), (WHO, "203.0.113.9"))
        return {owner: self.harness.backend.books(EVERY.budgets(*owner)) for owner in owners}

    def marker_seconds(self) -> int:
        """TTL of the identifier's marker; 0 without one."""
        marker = self.books().marker
        return 0 if marker is None else marker.left_seconds

    def assert_leaves_window(self, at_seconds: int | None, spent_at_us: int) -> None:
        """An amount counts for the whole window, and at most for a bucket longer."""
        earliest = -(-spent_at_us // US) + WINDOW_SECONDS
        assert at_seconds is not None
        assert earliest <= at_seconds <= earliest + BUCKET_SECONDS

    def assert_booked_only(self, made: Reservation, amount_nanousd: int) -> None:
        """The books hold so much for `made`, in the periods in which it was made, and nothing else."""
        then, now = made.made_at_us // US, self.harness.clock.us // US
        day = amount_nanousd if then // SECONDS_PER_DAY == now // SECONDS_PER_DAY else 0
        hour = amount_nanousd if then // SECONDS_PER_HOUR == now // SECONDS_PER_HOUR else 0
        books = self.books()
        expected = {"day": day, "network_day": day, "global_day": day, "global_hour": hour}
        assert {name: books.spent(name) for name in BUILT_IN} == {
            name: expected.get(name, amount_nanousd) for name in BUILT_IN
        }
        if amount_nanousd:
            self.assert_leaves_window(self.frees_at(), made.made_at_us)

    def frees_at(self) -> int | None:
        """When the oldest amount leaves the identifier's window."""
        return self.books().use("window").renews_at_seconds

    def assert_windows_are_empty(self) -> None:
        books = self.books()
        for name in ("window", "network_window"):
            assert (books.spent(name), books.use(name).renews_at_seconds) == (0, None)

    def assert_pending(self, nanousd: int) -> None:
        """So much is pending, and was reserved at `START_US`."""
        assert self.books().use("window").pending_nanousd == nanousd

    def assert_key_is_free(self) -> None:
        assert self.harness.backend.find_duplicate(KEY) is None

    # --- what is admitted

    def test_a_backend_has_a_name_and_declares_what_it_promises(self) -> None:
        backend = self.harness.backend
        assert backend.name
        assert backend.reserve_script
        assert isinstance(backend.promises_atomicity, bool)
        assert isinstance(backend.keeps_our_layout, bool)

    def test_a_reservation_holds_all_that_was_asked_and_decided(self) -> None:
        self.spend("r0", 7, EVERY)
        made, budgets = self.reserve("r1", COST, EVERY), EVERY.budgets(WHO, NETWORK)
        assert made == Reservation(
            reservation_id="r1",
            cost_nanousd=COST,
            budgets=budgets,
            request_digest=made.request_digest,
            made_at_us=START_US,
            pending_seconds=PENDING_SECONDS,
            backend=self.harness.backend.name,
            spent_nanousd=(COST + 7,) * len(budgets),
            renews_at_seconds=made.renews_at_seconds,
        )
        self.assert_leaves_window(renews_at(made, "window"), START_US)
        assert made.identifier == WHO
        assert made.over_shadow == ()

    def test_exactly_equal_is_admitted_and_one_nano_dollar_more_is_not(self) -> None:
        for case in self.each_limit():
            limits = case.set_to(3 * COST)
            for number in range(3):
                self.reserve(f"r{number}", COST, limits)
            refusal = self.refuse("r3", 1, limits)
            self.assert_says(refusal, case)
            assert refusal.limit_nanousd == 3 * COST

    def test_one_nano_dollar_less_than_the_rest_is_admitted(self) -> None:
        for case in self.each_limit():
            limits = case.set_to(3 * COST)
            self.spend("r0", COST, limits)
            self.assert_says(self.refuse("r1", 2 * COST + 1, replace(limits, throttle_seconds=1)), case)
            self.pass_seconds(2)
            self.reserve("r2", 2 * COST, limits)

    def test_the_first_limit_that_fails_is_the_reason(self) -> None:
        for number, case in enumerate(self.each_limit()):
            limits = ROOMY
            for failing in LIMITS_IN_ORDER[number:]:
                limits = failing.set_to(COST, limits)
            made = self.reserve("r0", COST, EVERY)
            self.assert_says(self.refuse_extension(made, COST + 1, limits), case)
            self.settle(made, COST)
            self.assert_says(self.refuse("r1", COST, limits), case)

    def test_a_network_may_have_no_limits(self) -> None:
        limits = replace(ROOMY, network_window_nanousd=None, network_day_nanousd=None)
        self.reserve("r0", AMPLE // 2, limits)
        self.extend(self.reserve("r1", 1, limits), AMPLE // 2, limits)
        assert self.refuse("r2", AMPLE // 2, limits).reason == Reason.DAILY_LIMIT

    def test_a_refused_request_changes_nothing_but_the_marker(self) -> None:
        for case, is_pending in product(LIMITS_IN_ORDER, (True, False)):
            self.harness.clear()
            limits = case.set_to(2 * COST)
            self.spend("r0", COST - 5, limits)
            made = self.reserve("r1", COST, limits)
            if not is_pending:
                self.settle(made, COST)
            before = self.seen(marker=False)
            refusal = self.refuse("r2", COST, limits)
            assert self.seen(marker=False) == before, case
            assert refusal.marker_seconds == self.marker_seconds() == case.marker_seconds, case

    def test_scopes_are_kept_apart(self) -> None:
        self.reserve("r0", COST)
        self.reserve("r1", COST, identifier="another")
        self.reserve("r2", COST, identifier="third", network="203.0.113.9")
        books = self.books()
        asked = {Scope.IDENTIFIER: COST, Scope.NETWORK: 2 * COST, Scope.GLOBAL: 3 * COST}
        assert {name: books.spent(name) for name in BUILT_IN} == {
            name: asked[row.scope] for name, row in BUILT_IN.items()
        }

    def test_amounts_are_exact_to_the_last_nano_dollar(self) -> None:
        limits = ROOMY
        for case in LIMITS_IN_ORDER:
            limits = case.set_to(2**53 - 1, limits)
        for number, cost in enumerate((2**52, 10**15, 10**9, 999_999_999, 1)):
            self.reserve(f"r{number}", cost, limits)
        total = 2**52 + 10**15 + 10**9 + 10**9
        self.assert_booked(total, total)
        assert {use.spent_nanousd for use in self.books().uses} == {total}

    # --- the marker

    def test_under_a_marker_everything_is_refused_with_what_set_it(self) -> None:
        limits = replace(ROOMY, window_nanousd=COST)
        self.spend("r0", COST, limits)
        first = self.refuse("r1", COST, limits)
        self.pass_seconds(12)
        again = self.refuse("r2", 1, limits)
        assert (again.reason, again.cause, again.budget) == (Reason.THROTTLED, Reason.WINDOW_LIMIT, "window")
        assert again.scope is Scope.IDENTIFIER
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
            assert self.marker_seconds() == THROTTLE_SECONDS - 1 - number
        self.pass_seconds(1)
        assert self.refuse("r2", COST, limits).reason == Reason.WINDOW_LIMIT

    def test_a_marker_refuses_its_own_identifier_only(self) -> None:
        limits = replace(ROOMY, window_nanousd=COST)
        self.spend("r0", COST, limits)
        self.refuse("r1", COST, limits)
        self.reserve("r2", COST, limits, identifier="neighbour")

    # --- busy or spent

    def test_busy_and_spent_differ(self) -> None:
        for case in self.each_limit():
            limits = replace(case.set_to(2 * COST), mark_when_busy=False)
            self.spend("r0", COST - 1, limits)
            held = self.reserve("r1", COST, limits)
            refusal = self.refuse("r2", COST, limits)
            assert refusal.in_flight, case
            assert refusal.retry_after_seconds == 1, case
            assert refusal.marker_seconds == 0, case
            assert self.marker_seconds() == 0, case
            self.settle(held, 2)
            # What is spent is not called busy because something is pending too.
            self.reserve("r3", COST - 1, limits)
            assert not self.refuse("r4", COST, limits).in_flight, case

    def test_where_one_limit_is_busy_and_another_spent_it_is_not_called_busy(self) -> None:
        self.spend("r0", COST)
        self.reserve("r1", COST)
        for first, second in ((LIMITS_IN_ORDER[0], LIMITS_IN_ORDER[2]), (LIMITS_IN_ORDER[2], LIMITS_IN_ORDER[3])):
            limits = replace(second.set_to(2 * COST, first.set_to(COST)), mark_when_busy=False, throttle_seconds=1)
            assert not self.refuse("r2", COST, limits).in_flight
            self.pass_seconds(2)

    def test_busy_sets_the_marker_where_mark_when_busy_is_set(self) -> None:
        for case in self.each_limit():
            if not case.marker_seconds:
                continue
            limits = case.set_to(COST)
            self.reserve("r0", COST, limits)
            first = self.refuse("r1", COST, limits)
            assert (first.in_flight, first.marker_seconds) == (True, case.marker_seconds)
            assert first.retry_after_seconds == case.marker_seconds
            assert self.refuse("r2", COST, limits).in_flight

    def test_a_pending_reservation_past_its_time_is_spent(self) -> None:
        for case in self.each_limit():
            limits = replace(case.set_to(COST), mark_when_busy=False)
            self.reserve("r0", COST, limits)
            self.pass_seconds(PENDING_SECONDS - 1)
            assert self.refuse("r1", COST, limits).in_flight, case
            self.pass_seconds(PENDING_BUCKET_SECONDS + 1)
            assert not self.refuse("r2", COST, limits).in_flight, case

    def test_a_pending_reservation_that_has_left_a_short_window_makes_nothing_busy(self) -> None:
        """It did not end, so it may count as pending for a moment longer than it is in a window of that length."""
        for case in self.each_limit():
            if case.reason not in SLIDING:
                continue
            limits = replace(case.set_to(2 * COST), window_seconds=PENDING_SECONDS, mark_when_busy=False)
            self.reserve("r0", COST, limits)
            self.pass_seconds(PENDING_SECONDS // 2)
            held = self.reserve("r1", COST, limits)
            assert self.refuse("r2", COST, limits).in_flight, case
            self.settle(held, COST)
            self.pass_seconds(PENDING_SECONDS // 2 + keys.bucket_seconds_of(PENDING_SECONDS) + 1)
            held = self.reserve("r3", COST, limits)
            assert self.refuse("r4", COST, limits).in_flight, case
            self.settle(held, COST)
            refusal = self.refuse("r5", COST, limits)
            assert not refusal.in_flight, case
            assert refusal.retry_after_seconds is not None, case
            assert refusal.retry_after_seconds > 1, case

    def test_a_request_above_a_whole_limit_can_never_fit(self) -> None:
        for case in self.each_limit():
            limits = case.set_to(COST)
            before = self.seen(marker=False)
            refusal = self.refuse("r0", COST + 1, limits)
            self.assert_says(refusal, case)
            assert refusal.can_never_fit
            assert refusal.retry_after_seconds is None
            assert not refusal.in_flight
            assert self.seen(marker=False) == before, case

    def test_the_marker_of_what_can_never_fit_ends_by_itself(self) -> None:
        for case in self.each_limit():
            if not case.marker_seconds:
                continue
            limits = case.set_to(COST)
            assert self.refuse("r0", COST + 1, limits).marker_seconds == case.marker_seconds
            # Nothing was spent: what fits need not wait for the end of a day or a window.
            fits = self.refuse("r1", 1, limits)
            assert (fits.reason, fits.cause, fits.budget) == (Reason.THROTTLED, case.reason, case.name)
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
            assert set(made.spent_nanousd) == {COST + 300}, case
            self.assert_booked(COST + 300, 300)
            assert self.spent(case.name) == COST + 300, case
            known = self.harness.backend.find_duplicate(KEY)
            assert known is not None, case
            assert known.cost_nanousd == 300, case
            assert self.reserve("r1", COST, limits, at_least_nanousd=300, idempotency=KEY).cost_nanousd == 300, case
            assert self.settle(made, 120).booked_nanousd == 120, case
            self.assert_booked(COST + 120)
            assert self.spent(case.name) == COST + 120, case

    def test_less_than_will_do_is_refused_and_nothing_is_set_aside(self) -> None:
        for case in self.each_limit():
            limits = replace(case.set_to(COST + 299), throttle_seconds=1)
            self.spend("r0", COST, limits)
            before = self.seen(marker=False)
            refusal = self.refuse("r1", COST, limits, at_least_nanousd=300)
            self.assert_says(refusal, case)
            assert (refusal.in_flight, refusal.can_never_fit) == (False, False), case
            assert self.seen(marker=False) == before, case

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
            self.assert_says(refusal, case)
            assert refusal.in_flight, case
            self.settle(open_one, 301)
            assert self.reserve("r2", COST, limits, at_least_nanousd=300).cost_nanousd == COST - 1, case

    def test_what_is_under_way_may_also_make_room_for_the_least(self) -> None:
        for case in self.each_limit():
            limits = replace(case.set_to(COST + 300), mark_when_busy=False)
            self.spend("r0", COST, limits)
            open_one = self.reserve("r1", 200, limits)
            refusal = self.refuse("r2", COST, limits, at_least_nanousd=101)
            self.assert_says(refusal, case)
            assert (refusal.in_flight, refusal.retry_after_seconds) == (True, 1), case
            self.settle(open_one, 199)
            assert self.reserve("r3", COST, limits, at_least_nanousd=101).cost_nanousd == 101, case

    def test_what_exceeds_a_whole_limit_may_still_begin_with_all_of_it(self) -> None:
        for case in self.each_limit():
            limits = case.set_to(COST - 1)
            refusal = self.refuse("r0", COST + 1, limits, at_least_nanousd=COST)
            assert (refusal.can_never_fit, refusal.retry_after_seconds) == (True, None), case
            self.pass_seconds(case.marker_seconds)
            assert self.reserve("r1", COST, limits, at_least_nanousd=COST - 1).cost_nanousd == COST - 1, case

    def test_retry_after_is_the_second_in_which_the_refusal_ends(self) -> None:
        for case in self.each_limit():
            if isinstance(case.period, Forever):
                continue
            for limit, spent, pauses, least in (
                (2 * COST, COST // 2, (3.5, 21, 108), None),
                (COST, COST // 4, (60, 60, 60), COST // 2),
            ):
                limits = replace(case.set_to(limit), throttle_seconds=1)
                seconds = self._retry_after(spent, pauses, limits, at_least_nanousd=least)
                self.pass_seconds(seconds - 1)
                self.assert_says(self.refuse("r1", COST, limits, at_least_nanousd=least), case)
                # All of it again, for now a marker may be in the way.
                self.harness.clear()
                assert self._retry_after(spent, pauses, limits, at_least_nanousd=least) == seconds
                self.pass_seconds(seconds)
                assert self.reserve("r2", COST, limits, at_least_nanousd=least).cost_nanousd >= (least or COST), case
                self.harness.clear()

    def _retry_after(self, amount_nanousd: int, pauses: Sequence[float], limits: Limits, **changes: Any) -> int:
        """What a refusal says after so much was spent before each of the pauses."""
        for number, pause in enumerate(pauses):
            self.spend(f"s{number}", amount_nanousd, limits)
            self.pass_seconds(pause)
        # Half a second from the turn of one, since a store may be a hair early.
        self.pass_seconds(0.5)
        seconds = self.refuse("r0", COST, limits, **changes).retry_after_seconds
        assert seconds is not None
        return seconds

    # --- Retry-After

    def test_retry_after_is_never_early_and_at_most_a_bucket_late(self) -> None:
        luck = random.Random(7)  # noqa: S311 (seeded on purpose)
        limits = replace(ROOMY, network_window_nanousd=20 * COST)
        spent: list[tuple[int, int]] = []
        refused = 0
        for number in range(150):
            cost = luck.randrange(1, 9 * COST)
            verdict = self.harness.backend.reserve(make_ask(f"r{number}", cost, limits))
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
        said_us = now_us + refusal.retry_after_seconds * US
        ends = [now_us, *(at_us + window_us for at_us, _ in spent if at_us + window_us > now_us)]
        true_us = next(
            end for end in ends if sum(held for at_us, held in spent if at_us + window_us > end) + cost <= limit
        )
        assert true_us <= said_us <= true_us + (BUCKET_SECONDS + 1) * US

    # --- the same id

    def test_the_same_id_sent_again_charges_once_and_gets_the_first_answer(self) -> None:
        limits = replace(ROOMY, window_nanousd=COST)
        for key in (None, KEY):
            self.harness.clear()
            first = self.reserve("r0", COST, limits, idempotency=key)
            before = self.amounts()
            self.pass_seconds(11)
            assert self.reserve("r0", COST, limits, idempotency=key) == first
            assert self.amounts() == before
            # Under a marker too.
            self.refuse("r1", COST, limits)
            assert self.marker_seconds() > 0
            assert self.reserve("r0", COST, limits, idempotency=key) == first
        assert self.duplicate("r2", KEY).reservation_id == "r0"

    def test_an_id_of_another_request_or_one_that_has_ended_is_a_conflict(self) -> None:
        self.reserve("r0")
        self.settle(self.reserve("r1"), 1)
        before = self.seen()
        asks = [make_ask("r0", COST - 1), make_ask("r0", identifier="another"), make_ask("r0", network="203.0.113.9")]
        for ask in (*asks, make_ask("r1")):
            with conflict():
                self.harness.backend.reserve(ask)
        assert self.seen() == before

    def test_a_refused_id_may_be_used_again(self) -> None:
        held = self.reserve("r0", COST, replace(ROOMY, network_window_nanousd=COST))
        self.refuse("r1", COST, replace(ROOMY, network_window_nanousd=COST))
        self.settle(held, 0)
        self.reserve("r1", COST, replace(ROOMY, network_window_nanousd=COST))

    def test_find_returns_the_pending_reservation_and_changes_nothing(self) -> None:
        assert self.harness.backend.find(make_ask("r0")) is None
        made = self.reserve("r0")
        before = self.seen()
        found = self.harness.backend.find(make_ask("r0"))
        assert found is not None
        # What is spent by then is not read.
        assert replace(found, spent_nanousd=made.spent_nanousd, renews_at_seconds=made.renews_at_seconds) == made
        assert self.harness.backend.find(make_ask("r0", COST + 1)) is None
        assert self.seen() == before
        self.settle(made, 1)
        assert self.harness.backend.find(make_ask("r0")) is None

    # --- settlements

    def test_a_settlement_books_what_was_used(self) -> None:
        self.reserve("other")
        for actual in (0, 1, COST - 1, COST):
            self.harness.clear()
            self.spend("r0", 100)
            settlement = self.settle(self.reserve("r1"), actual)
            assert settlement == Settlement("r1", Outcome.SETTLED, actual, 0)
            self.assert_booked(actual + 100)

    def test_more_than_was_reserved_is_booked_and_returned_as_overrun(self) -> None:
        settlement = self.settle(self.reserve("r0", COST, replace(ROOMY, window_nanousd=COST)), COST + 5)
        assert settlement == Settlement("r0", Outcome.SETTLED, COST + 5, 5)
        self.assert_booked(COST + 5)
        more = self.extend(self.reserve("r1"), 3 * COST)
        assert self.settle(more, 3 * COST + 9) == Settlement("r1", Outcome.SETTLED, 3 * COST + 9, 9)

    def test_a_second_settlement_gets_the_first_answer_and_changes_nothing(self) -> None:
        made = self.reserve("r0", idempotency=KEY)
        self.settle(made, 17)
        before = self.seen()
        for actual in (17, 0, COST, 10 * COST):
            assert self.settle(made, actual) == Settlement("r0", Outcome.REPEATED, 17, 0)
        assert self.harness.backend.release(made) == Settlement("r0", Outcome.REPEATED, 17, 0)
        assert self.seen() == before

    def test_an_end_or_extension_for_another_request_is_a_conflict(self) -> None:
        other, backend = replace(self.reserve("r0"), request_digest="0" * 8), self.harness.backend
        before = self.seen()
        with conflict():
            backend.settle(other, 1)
        with conflict():
            backend.release(other)
        with conflict():
            backend.extend(other, 2 * COST, other.budgets)
        assert self.seen() == before

    def test_settled_to_nothing_leaves_no_money_anywhere(self) -> None:
        self.settle(self.reserve("r0"), 0)
        self.assert_booked(0)
        self.assert_windows_are_empty()
        self.assert_pending(0)

    def test_a_settlement_lands_in_the_periods_of_its_reservation(self) -> None:
        for moment in TURNS:
            for actual in (0, 7, COST + 9):
                made = self.reserve_at(moment)
                self.pass_seconds(61)
                self.settle(made, actual)
                self.assert_booked_only(made, actual)

    def reserve_at(self, moment: datetime) -> Reservation:
        """The only reservation that is stored, made just before the second of `moment` ends."""
        self.harness.clear()
        self.harness.clock.us = int(moment.timestamp()) * US + 900_000
        return self.reserve("r0")

    def test_what_has_left_the_window_is_not_extended_and_its_settlement_makes_nothing_anew(self) -> None:
        for actual in (0, COST + 9):
            self.harness.clear()
            made = self.reserve("r0", pending_seconds=3_000)
            self.pass_seconds(WINDOW_SECONDS - 1)
            made = self.extend(made, COST + 1)
            self.pass_seconds(1 + BUCKET_SECONDS)
            self.assert_not_extended(made)
            assert self.settle(made, actual).outcome == Outcome.SETTLED
            self.assert_windows_are_empty()
            assert self.spent("day") == actual

    def test_past_its_time_an_unended_reservation_stays_booked_in_full(self) -> None:
        made = self.reserve("r0")
        self.pass_seconds(PENDING_SECONDS + keys.RECORD_KEEP_SECONDS)
        before = self.seen()
        assert self.settle(made, 1) == Settlement("r0", Outcome.EXPIRED, COST, 0)
        assert self.seen() == before
        assert self.spent("day") == COST

    def test_an_end_takes_no_more_than_its_own_pending_amount(self) -> None:
        for end in ("settle", "release"):
            self.harness.clear()
            made = self.extend(self.reserve("r0"), 2 * COST)
            self.reserve("r1", 5)
            self.settle(made, 7) if end == "settle" else self.harness.backend.release(made)
            self.assert_pending(5)

    def test_a_settlement_sent_again_books_nothing_even_when_its_record_is_gone(self) -> None:
        made = self.reserve("r0")
        self.settle(made, 7)
        self.pass_seconds(keys.RECORD_KEEP_SECONDS - 1)
        assert self.settle(made, 7) == Settlement("r0", Outcome.REPEATED, 7, 0)
        for seconds in (2, PENDING_SECONDS):
            self.pass_seconds(seconds)
            before = self.seen()
            assert self.settle(made, 7).outcome is Outcome.EXPIRED
            assert self.seen() == before

    # --- extensions

    def test_an_extension_holds_more_in_every_scope(self) -> None:
        made = self.reserve("r0", COST, EVERY, idempotency=KEY)
        self.pass_seconds(11)
        held = 3 * COST
        more = self.extend(made, held, EVERY)
        assert more == replace(made, cost_nanousd=held, spent_nanousd=(held,) * len(made.budgets))
        self.assert_booked(held, held)
        assert {(use.spent_nanousd, use.pending_nanousd) for use in self.books().uses} == {(held, held)}
        self.assert_leaves_window(self.frees_at(), START_US)

    def test_an_extension_exactly_to_a_limit_is_granted_and_one_nano_dollar_more_is_not(self) -> None:
        for case in self.each_limit():
            limits = case.set_to(4 * COST)
            self.spend("s0", COST, limits)
            made = self.reserve("r0", COST, limits)
            before = self.seen()
            refusal = self.refuse_extension(made, 3 * COST + 1, limits)
            self.assert_says(refusal, case)
            assert (refusal.limit_nanousd, refusal.marker_seconds) == (4 * COST, 0)
            assert self.seen() == before, case
            assert self.extend(made, 3 * COST, limits).cost_nanousd == 3 * COST
            self.assert_says(self.refuse("r1", 1, limits), case)

    def test_an_extension_takes_what_there_is_room_for_if_that_is_enough(self) -> None:
        for case in self.each_limit():
            limits = case.set_to(2 * COST)
            made = self.reserve("r0", COST, limits)
            self.spend("s0", COST - 100, limits)
            before = self.seen()
            self.assert_says(self.refuse_extension(made, 2 * COST, limits, COST + 101), case)
            assert self.seen() == before, case
            more = self.extend(made, 2 * COST, limits, COST + 100)
            assert more.cost_nanousd == COST + 100, case
            assert self.extend(made, 2 * COST, limits, COST).cost_nanousd == COST + 100, case
            assert (self.spent("window"), self.spent(case.name)) == (2 * COST, 2 * COST), case

    def test_of_several_limits_the_narrowest_says_how_much_there_is_room_for(self) -> None:
        limits = replace(ROOMY, window_nanousd=COST + 70, network_day_nanousd=COST + 50, global_hour_nanousd=COST + 60)
        made = self.reserve("r0", COST, limits)
        assert self.extend(made, 2 * COST, limits, COST + 1).cost_nanousd == COST + 50

    def test_a_limit_lowered_below_what_is_spent_extends_nothing_and_takes_nothing_back(self) -> None:
        for case in self.each_limit():
            made = self.reserve("r0", COST, EVERY)
            self.spend("s0", COST, EVERY)
            before = self.seen()
            self.assert_says(self.refuse_extension(made, COST + 1, case.set_to(COST)), case)
            assert self.extend(made, COST + 1, case.set_to(COST), COST).cost_nanousd == COST
            assert self.seen() == before, case

    def test_an_extension_sent_again_charges_nothing_more(self) -> None:
        made = self.reserve("r0")
        more = self.extend(made, 2 * COST)
        before = self.seen()
        assert self.extend(made, 2 * COST) == more
        assert self.extend(more, 2 * COST) == more
        assert self.extend(more, 1).cost_nanousd == 2 * COST
        assert self.seen() == before
        # One whose answer was lost counts for the next, and at the end.
        assert self.extend(made, 3 * COST).cost_nanousd == 3 * COST
        assert self.extend(made, 4 * COST).cost_nanousd == 4 * COST
        assert self.spent("window") == 4 * COST
        assert self.settle(made, 5).booked_nanousd == 5
        self.assert_booked(5)

    def test_an_extension_is_booked_in_the_periods_of_its_reservation(self) -> None:
        for moment in TURNS:
            made = self.reserve_at(moment)
            self.pass_seconds(61)
            more = self.extend(made, 3 * COST)
            self.assert_booked_only(made, 3 * COST)
            self.settle(more, 7)
            self.assert_booked_only(made, 7)

    def test_an_extension_is_held_to_the_limits_of_its_own_hour_and_day(self) -> None:
        self.harness.clock.us = int(datetime(2026, 3, 14, 23, 59, 59, tzinfo=UTC).timestamp()) * US
        limits = replace(ROOMY, global_hour_nanousd=3 * COST, global_day_nanousd=3 * COST, day_nanousd=3 * COST)
        made = self.reserve("r0", COST, limits)
        self.pass_seconds(2)
        self.spend("s0", 3 * COST, limits)
        assert self.extend(made, 3 * COST, limits).cost_nanousd == 3 * COST
        assert self.refuse_extension(made, 3 * COST + 1, limits).reason == Reason.DAILY_LIMIT

    def test_what_has_left_the_window_is_not_in_the_way_of_an_extension(self) -> None:
        limits = replace(ROOMY, window_nanousd=2 * COST, network_window_nanousd=2 * COST)
        self.spend("s0", COST, limits)
        self.pass_seconds(WINDOW_SECONDS - 10)
        made = self.reserve("r0", COST, limits)
        self.pass_seconds(9)
        assert self.refuse_extension(made, COST + 1, limits).reason == Reason.WINDOW_LIMIT
        self.pass_seconds(1 + BUCKET_SECONDS)
        more = self.extend(made, 2 * COST, limits)
        assert more.spent("window") == 2 * COST
        assert more.spent("day") == 3 * COST

    def test_what_has_ended_is_past_its_time_or_is_unknown_cannot_be_extended(self) -> None:
        settled, released, late = (self.reserve(f"r{number}") for number in range(3))
        self.settle(settled, 5)
        self.harness.backend.release(released)
        unknown = replace(late, reservation_id="r3")
        self.assert_not_extended(settled, released, unknown)
        self.pass_seconds(PENDING_SECONDS - 1)
        self.extend(late, COST + 1)
        self.pass_seconds(1)
        self.assert_not_extended(settled, released, unknown, late)

    def assert_not_extended(self, *ended: Reservation) -> None:
        before = self.seen()
        for reservation in ended:
            for to_nanousd in (1, 2 * COST):
                with conflict():
                    self.harness.backend.extend(reservation, to_nanousd, reservation.budgets)
        assert self.seen() == before

    def test_what_was_extended_is_found_with_what_it_holds(self) -> None:
        made = self.reserve("r0", idempotency=KEY)
        self.extend(made, 2 * COST)
        found = self.harness.backend.find(make_ask("r0", idempotency=KEY))
        assert found is not None
        assert (found.cost_nanousd, found.request_digest, found.made_at_us) == (
            2 * COST,
            made.request_digest,
            made.made_at_us,
        )
        assert self.reserve("r0", idempotency=KEY).cost_nanousd == 2 * COST
        self.settle(found, 3)
        self.assert_booked(3)

    def test_an_extended_reservation_without_an_end_stays_booked_in_full(self) -> None:
        made = self.extend(self.reserve("r0"), 3 * COST)
        self.pass_seconds(PENDING_SECONDS + keys.RECORD_KEEP_SECONDS)
        assert self.settle(made, 1) == Settlement("r0", Outcome.EXPIRED, 3 * COST, 0)
        assert self.spent("day") == 3 * COST

    # --- releases

    def test_a_release_books_nothing_and_is_an_end(self) -> None:
        self.spend("s0", 9)
        made = self.extend(self.reserve("r0"), 2 * COST)
        assert self.harness.backend.release(made) == Settlement("r0", Outcome.RELEASED, 0, 0)
        self.assert_booked(9)
        before = self.seen()
        for again in (self.harness.backend.release(made), self.settle(made, 7)):
            assert again == Settlement("r0", Outcome.REPEATED, 0, 0)
        with conflict():
            self.harness.backend.reserve(make_ask("r0"))
        assert self.seen() == before

    def test_a_release_goes_back_to_the_periods_of_its_reservation(self) -> None:
        made = self.reserve_at(TURNS[-1])
        self.pass_seconds(3)
        self.reserve("r1")
        self.harness.backend.release(made)
        self.assert_booked(COST, COST)

    # --- idempotency keys

    def duplicate(self, reservation_id: str, key: contract.Idempotency, **changes: Any) -> Duplicate:
        before = self.seen()
        verdict = self.harness.backend.reserve(make_ask(reservation_id, idempotency=key, **changes))
        assert isinstance(verdict, Duplicate), verdict
        assert self.harness.backend.find_duplicate(key) == verdict
        assert self.seen() == before
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
        self.assert_booked(7)

    def test_the_key_of_an_extended_request_shows_what_it_holds(self) -> None:
        made = self.extend(self.reserve("r0", idempotency=KEY), 2 * COST)
        assert self.duplicate("r1", KEY).cost_nanousd == 2 * COST
        self.pass_seconds(PENDING_SECONDS)
        assert self.duplicate("r1", KEY) == Duplicate("r0", DuplicateState.EXPIRED, 2 * COST, same_body=True)
        self.settle(made, 8)
        assert self.duplicate("r1", KEY) == Duplicate("r0", DuplicateState.SETTLED, 8, same_body=True)

    def test_the_key_of_a_request_that_did_not_end_in_time_is_expired(self) -> None:
        self.reserve("r0", idempotency=KEY)
        self.pass_seconds(PENDING_SECONDS - 1)
        assert self.duplicate("r1", KEY).state is DuplicateState.IN_FLIGHT
        self.pass_seconds(1)
        assert self.duplicate("r1", KEY) == Duplicate("r0", DuplicateState.EXPIRED, COST, same_body=True)
        self.pass_seconds(keys.RECORD_KEEP_SECONDS)
        assert self.duplicate("r1", KEY).state is DuplicateState.EXPIRED

    def test_a_key_is_free_again_after_a_release_and_after_a_refusal(self) -> None:
        self.refuse("r0", COST, replace(ROOMY, network_window_nanousd=1), idempotency=KEY)
        self.assert_key_is_free()
        made = self.reserve("r1", idempotency=KEY)
        self.harness.backend.release(made)
        self.assert_key_is_free()
        second = self.reserve("r2", idempotency=KEY)
        assert self.harness.backend.release(made).outcome is Outcome.REPEATED
        assert self.duplicate("r3", KEY).reservation_id == "r2"
        self.settle(second, 1)
        assert self.duplicate("r3", KEY) == Duplicate("r2", DuplicateState.SETTLED, 1, same_body=True)

    def test_a_key_is_kept_for_a_day_from_its_last_change(self) -> None:
        made = self.reserve("r0", idempotency=KEY)
        self.pass_seconds(60)
        self.extend(made, 2 * COST)
        self.settle(made, 7)
        self.pass_seconds(keys.IDEMPOTENCY_KEEP_SECONDS - 1)
        assert self.duplicate("r1", KEY).state is DuplicateState.SETTLED
        self.pass_seconds(1)
        self.reserve("r1", idempotency=KEY)

    def test_another_key_is_another_request(self) -> None:
        self.reserve("r0", idempotency=KEY)
        self.reserve("r1", idempotency=replace(KEY, digest="f" * 32))
        self.reserve("r2", identifier="another", idempotency=replace(KEY, digest="e" * 32))
        self.reserve("r3")
        assert self.spent("global_day") == 4 * COST

    def test_of_callers_at_once_with_one_key_one_is_admitted(self) -> None:
        if not self.harness.backend.promises_atomicity:
            return
        verdicts = self.at_once(lambda number: self.harness.backend.reserve(make_ask(f"r{number}", idempotency=KEY)))
        admitted = [verdict.reservation_id for verdict in verdicts if isinstance(verdict, Reservation)]
        assert admitted == list({verdict.reservation_id for verdict in verdicts if isinstance(verdict, Duplicate)})
        assert self.spent("global_day") == COST

    def test_of_extensions_at_once_no_more_is_granted_than_there_is_room_for(self) -> None:
        if not self.harness.backend.promises_atomicity:
            return
        limits = replace(ROOMY, network_window_nanousd=25 * COST)
        made = [self.reserve(f"r{number}", COST, limits, identifier=f"id{number}") for number in range(20)]
        verdicts = self.at_once(lambda number: self._extended(made[number], 2 * COST, limits, None))
        assert sum(isinstance(verdict, Reservation) for verdict in verdicts) == 5
        assert self.spent("network_window") == 25 * COST

    # --- what answers carry besides

    def test_books_and_reservations_say_when_the_oldest_amount_leaves_the_window(self) -> None:
        assert self.frees_at() is None
        made = self.reserve("r0")
        self.pass_seconds(BUCKET_SECONDS * 2 + 3.5)
        second_us = self.harness.clock.us
        for frees_at in (renews_at(self.reserve("r1"), "window"), self.frees_at()):
            self.assert_leaves_window(frees_at, START_US)
        self.settle(made, 0)
        for frees_at in (self.frees_at(), renews_at(self.reserve("r2"), "window")):
            self.assert_leaves_window(frees_at, second_us)
        assert frees_at is not None
        self.pass_seconds(frees_at - self.harness.clock.us // US)
        assert self.frees_at() is None

    def test_the_oldest_amount_is_the_oldest_that_counts_not_the_smallest_nor_the_last(self) -> None:
        for amounts, over in product(((5, 9), (9, 5)), (0, 7)):
            self.harness.clear()
            if over:
                self.reserve("over", over)
            self.pass_seconds(WINDOW_SECONDS - BUCKET_SECONDS + (0 if over else 7))
            oldest_us = self.harness.clock.us
            self.assert_leaves_window(
                renews_at(self.reserve("r0", amounts[0]), "window"), START_US if over else oldest_us
            )
            self.pass_seconds(BUCKET_SECONDS)
            self.reserve("r1", amounts[1])
            self.pass_seconds(BUCKET_SECONDS)
            made = self.reserve("r2")
            self.assert_leaves_window(renews_at(made, "window"), oldest_us)
            assert made.spent("window") == 14 + COST

    def test_the_books_say_what_is_pending_since_midnight_and_their_own_time(self) -> None:
        self.harness.clock.us = int(datetime(2026, 3, 14, 23, 59, 50, tzinfo=UTC).timestamp()) * US
        self.reserve("r0", 5)
        self.pass_seconds(20)
        self.reserve("r1", 7)
        books = self.books()
        assert (books.use("window").pending_nanousd, books.use("day").pending_nanousd) == (12, 7)
        assert books.as_of_us == self.harness.clock.us

    def test_expired_amounts_are_reported_once(self) -> None:
        self.extend(self.reserve("r0"), 2 * COST)
        self.reserve("r1", 5, identifier="another")
        own = self.reserve("r2", 9)
        self.pass_seconds(PENDING_SECONDS - 1)
        assert self.expired_now() == 0
        self.pass_seconds(1 + PENDING_BUCKET_SECONDS)
        # A settlement does not report its own reservation.
        assert self.settle(own, 1).expired_nanousd == 2 * COST + 5
        assert self.expired_now() == 0

    def expired_now(self) -> int:
        """What a request that is settled at once reports as expired, in both of its answers together."""
        made = self.reserve(f"at {self.harness.clock.us}", 1)
        return made.expired_nanousd + self.settle(made, 1).expired_nanousd

    def test_expired_amounts_are_reported_after_an_hour_without_requests(self) -> None:
        self.reserve("r0")
        self.pass_seconds(3_600)
        assert self.expired_now() == COST
        self.pass_seconds(1)
        assert self.expired_now() == 0

    def test_reservations_report_expired_amounts_where_no_request_settles(self) -> None:
        reported = []
        for number in range(30):
            reported.append(self.reserve(f"r{number}", 2**number).expired_nanousd)
            self.pass_seconds(PENDING_BUCKET_SECONDS)
        assert sum(reported) > 0
        self.pass_seconds(PENDING_SECONDS)
        assert sum(reported) + self.expired_now() == 2**30 - 1

    def test_an_id_sent_again_keeps_the_lengths_that_it_was_admitted_with(self) -> None:
        changed = replace(ROOMY, window_seconds=61)
        for known in (
            self.reserve("r0"),
            self.reserve("r0", COST, changed, pending_seconds=30),
            self.harness.backend.find(make_ask("r0", COST, changed, pending_seconds=30)),
        ):
            assert known is not None
            assert known.pending_seconds == PENDING_SECONDS
            assert known.budgets == ROOMY.budgets(WHO, NETWORK)
        self.pass_seconds(61)
        self.settle(self.reserve("r0", COST, changed), 7)
        self.assert_booked(7)

    # --- windows

    def test_windows_that_are_no_multiple_of_their_buckets(self) -> None:
        for window in (1, 59, 61, 601, 86_400):
            self.harness.clear()
            limits = replace(ROOMY, window_nanousd=COST, window_seconds=window, throttle_seconds=1)
            self.spend("r0", COST, limits)
            self.pass_seconds(window - 1)
            assert self.refuse("r1", COST, limits).reason == Reason.WINDOW_LIMIT, window
            self.pass_seconds(1 + keys.bucket_seconds_of(window))
            self.reserve("r2", COST, limits)

    def test_a_window_that_grows_forgets_nothing_that_was_booked_since(self) -> None:
        short, long = 20, WINDOW_SECONDS
        limits = replace(ROOMY, window_nanousd=3 * COST, throttle_seconds=1)
        self.spend("r0", COST, replace(limits, window_seconds=short))
        self.spend("r1", COST, limits)
        self.pass_seconds(2 * short)
        self.spend("r2", COST, limits)
        self.pass_seconds(long - 2 * short - 1)
        assert self.refuse("r3", 2 * COST, limits).reason == Reason.WINDOW_LIMIT

    def test_when_all_is_over_nothing_is_left(self) -> None:
        self.reserve("r0", COST, MORTAL)
        self.spend("r1", 5, MORTAL)
        self.refuse("r2", COST, replace(MORTAL, window_nanousd=COST))
        self.pass_seconds(33 * SECONDS_PER_DAY)
        self.assert_nothing_is_left()

    def assert_nothing_is_left(self) -> None:
        self.assert_booked(0)
        assert self.books().marker is None

    # --- callers at once

    def test_callers_at_once_are_admitted_exactly_as_many_as_fit(self) -> None:
        if not self.harness.backend.promises_atomicity:
            return
        limits = replace(ROOMY, window_nanousd=5 * COST, mark_when_busy=False)
        verdicts = self.at_once(lambda number: self.harness.backend.reserve(make_ask(f"r{number}", COST, limits)))
        assert sum(isinstance(verdict, Reservation) for verdict in verdicts) == 5
        assert self.spent("window") == 5 * COST

    def test_callers_at_once_are_admitted_exactly_as_many_as_fit_a_further_budget(self) -> None:
        if not self.harness.backend.promises_atomicity:
            return
        for budget in (_key_budget("only", Sliding(3_600), 5 * COST), _key_budget("only", Forever(), 5 * COST)):
            self.harness.clear()
            asks = [contract.Ask(f"r{number}", COST, (budget,)) for number in range(20)]
            verdicts = self.at_once(lambda number: self.harness.backend.reserve(asks[number]))  # noqa: B023 (run at once)
            assert sum(isinstance(verdict, Reservation) for verdict in verdicts) == 5
            assert self.harness.backend.books((budget,)).spent("only") == 5 * COST

    # --- further budgets: each test above that goes through all limits is held by some of them too

    def test_a_further_budget_of_any_scope_and_period_admits_exactly_up_to_its_limit(self) -> None:
        for scope, period in product(Scope, PERIODS):
            self.harness.clear()
            budget = further_budget("extra", scope, period, 3 * COST)
            for number in range(3):
                assert self.reserve(f"r{number}", further=(budget,)).spent("extra") == (number + 1) * COST
            refusal = self.refuse("r3", 1, further=(budget,))
            assert (refusal.reason, refusal.cause) == (Reason.BUDGET_LIMIT, Reason.BUDGET_LIMIT), budget
            assert (refusal.scope, refusal.budget, refusal.limit_nanousd) == (scope, "extra", 3 * COST)
            assert (refusal.marker_seconds, self.marker_seconds()) == (0, 0), budget
            assert self.harness.backend.books((budget,)).spent("extra") == 3 * COST, budget

    def test_each_owner_of_a_scope_has_a_budget_of_its_own(self) -> None:
        for scope, period in product(set(Scope) - {Scope.GLOBAL}, PERIODS):
            self.harness.clear()
            budget = further_budget("extra", scope, period, COST)
            theirs = budget._replace(owner="another")
            who: dict[str, Any] = {scope.value: "another"} if scope in {Scope.IDENTIFIER, Scope.NETWORK} else {}
            self.reserve("r0", further=(budget,))
            self.reserve("r1", further=(theirs,), **who)
            assert self.refuse("r2", 1, further=(budget,)).budget == "extra"
            assert self.refuse("r3", 1, further=(theirs,), **who).budget == "extra"

    def test_budgets_are_checked_in_the_order_in_which_they_were_asked(self) -> None:
        limits = ROOMY
        for case in LIMITS_IN_ORDER:
            limits = case.set_to(COST, limits)
        self.spend("r0", COST, EVERY)
        budgets = list(reversed(limits.budgets(WHO, NETWORK)))
        for number, budget in enumerate(budgets):
            refusal = self.refuse("r1", COST, budgets=tuple(budgets))
            assert refusal.budget == budget.name
            budgets[number] = budget._replace(limit_nanousd=AMPLE)
            self.pass_seconds(refusal.marker_seconds)

    def test_a_limit_of_nothing_blocks_its_owner(self) -> None:
        for case in self.each_limit():
            refusal = self.refuse("r0", 1, case.set_to(0))
            self.assert_says(refusal, case)
            assert (refusal.can_never_fit, refusal.retry_after_seconds, refusal.limit_nanousd) == (True, None, 0), case
            assert refusal.marker_seconds == case.marker_seconds, case
            assert not refusal.in_flight, case

    def test_a_calendar_period_ends_when_the_clocks_of_its_zone_say_so(self) -> None:
        for period, moment, end in ENDS:
            self.harness.clear()
            self.harness.clock.us = at_us(moment) + US // 2
            budget = _key_budget("extra", period, COST)
            seconds = (at_us(end) - at_us(moment)) // US
            made = self.reserve("r0", further=(budget,))
            assert renews_at(made, "extra") == at_us(end) // US, period
            self.settle(made, COST)
            assert self.harness.backend.books((budget,)).use("extra").renews_at_seconds == at_us(end) // US, period
            refusal = self.refuse("r1", 1, further=(budget,))
            assert (refusal.retry_after_seconds, refusal.in_flight) == (seconds, False), period
            self.pass_seconds(seconds - 1)
            assert self.refuse("r2", 1, further=(budget,)).retry_after_seconds == 1, period
            self.pass_seconds(1)
            assert self.reserve("r3", COST, further=(budget,)).spent("extra") == COST, period

    def test_what_is_spent_for_ever_is_never_free_again(self) -> None:
        budget, hour = _key_budget("ever", Forever(), 2 * COST), _key_budget("hour", Calendar("hour", ZONE), 2 * COST)
        made = self.reserve("r0", further=(budget, hour))
        assert (renews_at(made, "ever"), made.spent("ever")) == (None, COST)
        refusal = self.refuse("r1", COST + 1, further=(budget, hour))
        assert (refusal.budget, refusal.in_flight, refusal.retry_after_seconds) == ("ever", True, 1)
        self.settle(made, COST)
        self.pass_seconds(400 * SECONDS_PER_DAY)
        for further in ((budget,), (budget, hour), (hour._replace(limit_nanousd=0), budget)):
            refusal = self.refuse("r2", COST + 1, further=further)
            assert (refusal.in_flight, refusal.retry_after_seconds) == (False, None)
            assert refusal.can_never_fit == (len(further) == 2 and further[0].limit_nanousd == 0)
        self.reserve("r3", COST, further=(budget,))
        assert self.refuse("r4", 1, further=(budget,)).in_flight
        books = self.harness.backend.books((budget,))
        assert (books.spent("ever"), books.use("ever").renews_at_seconds) == (2 * COST, None)

    def test_under_the_marker_of_what_is_spent_for_ever_there_is_nothing_to_wait_for(self) -> None:
        budget = further_budget("ever", Scope.IDENTIFIER, Forever(), COST, throttle_seconds=17)
        made = self.reserve("r0", further=(budget,))
        busy = self.refuse("r1", 1, further=(budget,))
        assert (busy.in_flight, busy.marker_seconds, busy.retry_after_seconds) == (True, 17, 17)
        self.pass_seconds(17)
        self.settle(made, COST)
        spent = self.refuse("r2", 1, further=(budget,))
        assert (spent.in_flight, spent.marker_seconds, spent.retry_after_seconds) == (False, 17, None)
        self.pass_seconds(7)
        again, marker = self.refuse("r3", 1), self.books().marker
        assert (again.reason, again.budget, again.marker_seconds) == (Reason.THROTTLED, "ever", 10)
        assert (again.retry_after_seconds, again.can_never_fit, again.in_flight) == (None, False, False)
        assert marker is not None
        assert (marker.budget, marker.left_seconds, marker.retry_after_seconds) == ("ever", 10, None)

    def test_a_shadow_budget_is_booked_and_named_and_refuses_nothing(self) -> None:
        for case in self.each_limit():
            shadow = _as_shadow(case.set_to(COST, EVERY), case.name)
            first = self.reserve("r0", COST, budgets=shadow)
            second = self.reserve("r1", 1, budgets=shadow, at_least_nanousd=1)
            larger = self.reserve("r2", COST + 1, budgets=shadow, at_least_nanousd=1)
            assert (first.over_shadow, second.over_shadow, larger.over_shadow) == ((), (case.name,), (case.name,))
            assert (second.cost_nanousd, larger.cost_nanousd, larger.spent(case.name)) == (1, COST + 1, 2 * COST + 2)
            assert self.marker_seconds() == 0, case
            more = self.harness.backend.extend(first, 2 * COST, shadow)
            assert isinstance(more, Reservation), case
            self.settle(more, 3)
            assert self.spent(case.name) == COST + 5, case

    def test_of_shadow_budgets_and_others_the_first_that_is_enforced_refuses(self) -> None:
        for number, case in enumerate(self.each_limit()):
            limits = EVERY
            for failing in LIMITS_IN_ORDER[number:]:
                limits = failing.set_to(COST, limits)
            names = [each.name for each in LIMITS_IN_ORDER[number:-1]]
            self.spend("r0", COST, EVERY)
            refusal = self.harness.backend.reserve(make_ask("r1", 1, budgets=_as_shadow(limits, *names)))
            assert isinstance(refusal, Refusal), case
            self.assert_says(refusal, LIMITS_IN_ORDER[-1])
            assert (refusal.can_never_fit, refusal.in_flight, refusal.marker_seconds) == (False, False, 0), case
            names.append(LIMITS_IN_ORDER[-1].name)
            # They are named in the order of the budgets.
            assert self.reserve("r2", 1, budgets=_as_shadow(limits, *names)).over_shadow == tuple(names), case

    def test_a_marker_of_a_further_budget_names_it_and_repeats_itself(self) -> None:
        day = further_budget("extra", Scope.IDENTIFIER, Calendar("day", ZONE), COST, throttle_seconds=17)
        ever = further_budget("ever", Scope.IDENTIFIER, Forever(), AMPLE)
        self.spend("r0", COST, further=(day, ever))
        first = self.refuse("r1", 1, further=(day, ever))
        assert (first.reason, first.budget, first.marker_seconds) == (Reason.BUDGET_LIMIT, "extra", 17)
        assert first.retry_after_seconds == (at_us("2026-03-14T23:00:00") - START_US) // US
        for passed in range(1, 17):
            self.pass_seconds(1)
            again = self.refuse(f"u{passed}", 1)
            assert (again.reason, again.cause) == (Reason.THROTTLED, Reason.BUDGET_LIMIT)
            assert (again.scope, again.budget, again.limit_nanousd) == (Scope.IDENTIFIER, "extra", None)
            assert (again.marker_seconds, self.marker_seconds()) == (17 - passed, 17 - passed)
            assert again.retry_after_seconds == first.retry_after_seconds - passed
        marker = self.books().marker
        assert marker is not None
        assert (marker.cause, marker.budget, marker.left_seconds) == (Reason.BUDGET_LIMIT, "extra", 1)
        self.reserve("r2", identifier="neighbour")
        self.pass_seconds(1)
        assert self.refuse("r3", 1, further=(day, ever)).reason is Reason.BUDGET_LIMIT
        self.harness.clear()
        self.spend("r4", COST, further=(ever._replace(limit_nanousd=COST),))
        assert self.refuse("r5", 1, further=(ever._replace(limit_nanousd=COST),)).marker_seconds == 0
        assert self.books().marker is None

    def test_two_budgets_of_one_owner_are_both_charged_and_each_refuses(self) -> None:
        for scope, (one, other) in product(Scope, ((PERIODS[0], PERIODS[4]), (PERIODS[1], PERIODS[5]))):
            self.harness.clear()
            pair = (further_budget("one", scope, one), further_budget("other", scope, other))
            made = self.reserve("r0", further=pair)
            assert (made.spent("one"), made.spent("other")) == (COST, COST)
            uses = self.harness.backend.books(pair).uses
            assert [(use.spent_nanousd, use.pending_nanousd) for use in uses] == [(COST, COST)] * 2, pair
            for budget in pair:
                narrow = tuple(each._replace(limit_nanousd=COST) if each is budget else each for each in pair)
                refusal = self.refuse("r1", 1, further=narrow)
                assert (refusal.budget, refusal.in_flight) == (budget.name, True), budget
            self.settle(made, 7)
            uses = self.harness.backend.books(pair).uses
            assert [(use.spent_nanousd, use.pending_nanousd) for use in uses] == [(7, 0)] * 2, pair

    def test_one_budget_alone_is_enough(self) -> None:
        """No identifier, no network and no marker; then an identifier and nothing else."""
        for scope, period in product(Scope, PERIODS):
            self.harness.clear()
            budget = further_budget("only", scope, period, 3 * COST, throttle_seconds=0)
            backend, budgets = self.harness.backend, (budget,)
            made = self.reserve("r0", budgets=budgets, idempotency=KEY)
            assert (made.identifier, made.budgets) == (WHO if scope is Scope.IDENTIFIER else "", budgets)
            assert backend.find(make_ask("r0", budgets=budgets, idempotency=KEY)) is not None
            assert self.reserve("r0", budgets=budgets, idempotency=KEY) == made
            more = backend.extend(made, 2 * COST, budgets)
            assert isinstance(more, Reservation), budget
            assert more.spent_nanousd == (2 * COST,)
            over = backend.extend(made, 3 * COST + 1, budgets)
            assert isinstance(over, Refusal), budget
            assert (over.budget, over.limit_nanousd) == ("only", 3 * COST)
            assert self.refuse("r1", COST + 1, budgets=budgets).in_flight, budget
            assert self.settle(more, COST).outcome is Outcome.SETTLED
            assert self.settle(more, COST).outcome is Outcome.REPEATED
            released = self.reserve("r2", 2 * COST, budgets=budgets)
            assert backend.release(released).outcome is Outcome.RELEASED
            books = backend.books(budgets)
            assert (books.spent("only"), books.use("only").pending_nanousd, books.marker) == (COST, 0, None), budget
            with conflict():
                backend.reserve(make_ask("r0", COST - 1, budgets=budgets))

    def test_a_budget_is_one_whatever_is_charged_beside_it(self) -> None:
        hour, month = _key_budget("hour", Calendar("hour", ZONE)), _key_budget("month", Calendar("month", ZONE))
        ever = _key_budget("ever", Forever())
        lists = ((), (hour,), (month,), (ever,), (hour, month), (month, hour), (ever, month), ())
        for period in PERIODS:
            self.harness.clear()
            self.reserve("r", 5 * COST, budgets=(ever,))
            extra, total = _key_budget("extra", period), 0
            for number, beside in enumerate(3 * lists):
                made = self.reserve(f"r{number}", budgets=(*beside, extra))
                total += COST
                assert made.spent("extra") == total, (period, number)
                if number % 3:
                    self.settle(made, 7 * number)
                    total += 7 * number - COST
            for beside in lists:
                refusal = self.refuse("r99", 1, budgets=(*beside, extra._replace(limit_nanousd=total)))
                assert refusal.budget == "extra", (period, beside)
                total += 1
                self.reserve(f"r{total}", 1, budgets=(*beside, extra._replace(limit_nanousd=total)))

    def test_what_was_reserved_before_a_budget_was_added_is_not_in_it(self) -> None:
        for period, other in product(PERIODS, PERIODS):
            self.harness.clear()
            extra, beside = _key_budget("extra", period, 10 * COST), _key_budget("beside", other)
            old, older = (self.reserve(name, 2 * COST, budgets=(beside,)) for name in ("old", "older"))
            for number in range(9):
                self.reserve(f"r{number}", COST, budgets=(beside, extra))
            self.settle(old, 0)
            assert self.refuse("r9", COST + 1, budgets=(beside, extra)).budget == "extra", (period, other)
            self.reserve("r10", COST - 1, budgets=(beside, extra))
            self.settle(older, 1)
            assert self.refuse("r11", 2, budgets=(beside, extra)).budget == "extra", (period, other)
            assert self.reserve("r12", 1, budgets=(beside, extra)).spent("extra") == 10 * COST, (period, other)

    def test_what_is_pending_beside_a_spent_budget_makes_it_no_busy_one(self) -> None:
        """It is the same owner's, and was not charged to that budget: waiting for it would be too short."""
        other = _key_budget("other", Forever())
        for period, beside in product(PERIODS, ((other,), ROOMY.budgets(WHO, NETWORK), None)):
            self.harness.clear()
            scope = Scope.IDENTIFIER if beside is None else Scope.KEY
            full = further_budget("full", scope, period, 3 * COST)
            budgets = (*(beside or ROOMY.budgets(WHO, NETWORK)), full)
            self.settle(self.reserve("spent", 3 * COST, budgets=budgets), 3 * COST)
            self.reserve("pending", 2 * COST, budgets=beside or ROOMY.budgets(WHO, NETWORK))
            refusal = self.refuse("r", budgets=budgets)
            assert (refusal.budget, refusal.in_flight) == ("full", False), (period, beside)
            assert [use.pending_nanousd for use in self.harness.backend.books((full,)).uses] == [0]
            renews_at = self.harness.backend.books((full,)).use("full").renews_at_seconds
            left = None if renews_at is None else renews_at - self.harness.clock.us // US
            assert refusal.retry_after_seconds == left, (period, beside)
            if left is not None:
                self.pass_seconds(left - 1)
                assert self.refuse("early", budgets=budgets).retry_after_seconds == 1
                self.pass_seconds(1)
                self.reserve("in time", budgets=budgets)

    def test_what_is_pending_of_further_budgets_makes_none_of_the_six_busy(self) -> None:
        for case, is_busy in product(LIMITS_IN_ORDER, (True, False)):
            if case.period is None:
                self.harness.clear()
                beside = further_budget("beside", case.scope, Forever())
                self.spend("spent", 3 * COST)
                self.reserve("pending", 2 * COST, budgets=(beside,))
                self.reserve("both", COST, further=(beside,))
                refusal = self.refuse("r", COST if is_busy else COST + 1, limits=case.set_to(4 * COST))
                assert (refusal.budget, refusal.in_flight) == (case.name, is_busy)
                uses = self.harness.backend.books((*ROOMY.budgets(WHO, NETWORK), beside)).uses
                pending = {use.budget.name: use.pending_nanousd for use in uses}
                assert pending == dict.fromkeys(BUILT_IN, COST) | {"beside": 3 * COST}

    def test_a_budget_that_is_added_while_reservations_are_pending_is_busy_by_its_own_alone(self) -> None:
        for period in PERIODS:
            self.harness.clear()
            added = _key_budget("added", period, 5 * COST)
            one, lists = _key_budget("one", Forever()), (added, _key_budget("one", Forever()))
            self.reserve("before", 9 * COST, budgets=(one,))
            self.settle(self.reserve("spent", 3 * COST, budgets=lists), 3 * COST)
            self.reserve("pending", 2 * COST, budgets=lists)
            busy = self.refuse("busy", 2 * COST, budgets=lists)
            assert (busy.budget, busy.in_flight, busy.retry_after_seconds) == ("added", True, 1)
            assert not self.refuse("spent by then", 2 * COST + 1, budgets=lists).in_flight
            pending = [use.pending_nanousd for use in self.harness.backend.books(lists).uses]
            assert pending == [2 * COST, 11 * COST], period

    def test_what_is_pending_of_one_period_makes_the_next_no_busy_one(self) -> None:
        """The clock comes to the next hour within one bucket of pending money."""
        for zone, other_zone in (("Europe/Berlin", "Asia/Kolkata"), ("Asia/Kolkata", "UTC")):
            self.harness.clear()
            hour, other = Calendar("hour", zone), Calendar("hour", other_zone)
            budgets = (_key_budget("hourly", hour, 3 * COST),)
            self.harness.clock.us = at_us(f"2026-03-14 {'11:29:59' if zone == 'Asia/Kolkata' else '10:59:59'}")
            self.reserve("before", 2 * COST, budgets=budgets)
            self.pass_seconds(2)
            self.settle(self.reserve("spent", 3 * COST, budgets=budgets), 3 * COST)
            assert not self.refuse("r", budgets=budgets).in_flight
            # In another zone its hour has begun at another time, and holds other reservations.
            moved = (_key_budget("hourly", other, 3 * COST),)
            self.settle(self.reserve("moved", 3 * COST, budgets=moved), 3 * COST)
            assert not self.refuse("r", budgets=moved).in_flight

    def test_an_id_that_is_sent_again_without_one_of_its_budgets_leaves_nothing_pending_of_the_others(self) -> None:
        six = ROOMY.budgets(WHO, NETWORK)
        for scope, beside in ((Scope.KEY, six), (Scope.IDENTIFIER, six), (Scope.IDENTIFIER, ())):
            self.harness.clear()
            kept, lost = (further_budget(name, scope, Forever()) for name in ("kept", "lost"))
            self.reserve("other", 5, budgets=(*beside, kept))
            self.reserve("r0", COST, budgets=(*beside, kept, lost))
            again = self.reserve("r0", COST, budgets=(*beside, kept))
            assert again.budgets == (*beside, kept)
            more = self.harness.backend.extend(again, 2 * COST, again.budgets)
            assert isinstance(more, Reservation)
            uses = self.harness.backend.books(again.budgets).uses
            assert {use.pending_nanousd for use in uses} == {2 * COST + 5}
            self.settle(more, 1)
            uses = self.harness.backend.books(again.budgets).uses
            assert {(use.spent_nanousd, use.pending_nanousd) for use in uses} == {(6, 5)}

    def test_what_a_request_cannot_be_charged_to_is_refused(self) -> None:
        six, extra = ROOMY.budgets(WHO, NETWORK), _key_budget("extra", Forever())
        day, window, *_ = six
        many = tuple(_key_budget(f"extra{number}", Forever()) for number in range(MOST_BUDGETS))
        before = self.seen()
        for budgets in (
            (),
            (*many, extra),
            (extra, extra._replace(scope=Scope.TEAM)),
            (extra._replace(name="Extra"),),
            (extra._replace(period=Sliding(0)),),
            (extra._replace(period=Calendar("day", "Europe/Nowhere")),),
            (day._replace(period=Calendar("hour")),),
            (day._replace(scope=Scope.KEY),),
            (window._replace(period=Forever()),),
            (window, six[2]._replace(period=Sliding(61))),
        ):
            try:
                self.harness.backend.reserve(contract.Ask("r0", COST, budgets))
            except ConfigurationError:
                continue
            raise AssertionError(budgets)
        assert self.seen() == before
        self.reserve("r0", budgets=many)

    def test_the_end_of_a_reservation_goes_where_it_was_charged_whatever_the_budgets_are_by_then(self) -> None:
        old = tuple(_key_budget(f"old{number}", period) for number, period in enumerate(PERIODS))
        renamed = tuple(budget._replace(name=f"new_{budget.name}") for budget in old)
        moved = tuple(budget._replace(period=period) for budget, period in zip(old, OTHER_PERIODS, strict=True))
        for today, nanousd in product(((), renamed, moved), (7, 0, 2 * COST)):
            self.harness.clear()
            made = self.reserve("r0", further=old)
            self.spend("r1", 1, further=today)
            if nanousd == 2 * COST:
                self.extend(made, nanousd, further=today)
            elif nanousd:
                self.settle(made, nanousd)
            else:
                self.harness.backend.release(made)
            assert {use.spent_nanousd for use in self.harness.backend.books(old).uses} == {nanousd}, (today, nanousd)
            assert {use.spent_nanousd for use in self.harness.backend.books(today).uses} <= {1}, (today, nanousd)

    def test_an_extension_is_held_by_the_limits_of_today_of_what_it_is_charged_to(self) -> None:
        for period, other in zip(PERIODS, OTHER_PERIODS, strict=True):
            self.harness.clear()
            budget, added = _key_budget("extra", period, 2 * COST), _key_budget("added", period, 1)
            made = self.reserve("r0", further=(budget,))
            for narrow in (budget, budget._replace(limit_nanousd=2 * COST, period=other)):
                refusal = self.refuse_extension(made, 2 * COST + 1, further=(added, narrow))
                assert (refusal.budget, refusal.limit_nanousd) == ("extra", 2 * COST), narrow
            assert self.extend(made, 2 * COST, further=(added, budget)).spent("extra") == 2 * COST
            assert self.harness.backend.books((added,)).spent("added") == 0
            wider = budget._replace(limit_nanousd=3 * COST)
            assert self.extend(made, 4 * COST, at_least_nanousd=1, further=(wider,)).cost_nanousd == 3 * COST
            for today in ((), (wider._replace(is_shadow=True),), (wider._replace(limit_nanousd=None),)):
                to_nanousd = made.cost_nanousd + 3 * COST + len(today)
                assert self.extend(made, to_nanousd, further=today).cost_nanousd == to_nanousd

    def test_an_id_sent_again_is_charged_to_what_it_was_charged_to(self) -> None:
        for period, other in zip(PERIODS, OTHER_PERIODS, strict=True):
            self.harness.clear()
            kept, gone = _key_budget("kept", period), _key_budget("gone", period)
            made = self.reserve("r0", further=(gone, kept))
            before = self.amounts()
            today = (_key_budget("added", period), kept._replace(limit_nanousd=1), gone._replace(period=other))
            for known in (
                self.reserve("r0", further=today),
                self.harness.backend.find(make_ask("r0", further=today)),
            ):
                assert known is not None
                assert (known.cost_nanousd, known.made_at_us) == (COST, made.made_at_us)
                assert known.budgets == (*ROOMY.budgets(WHO, NETWORK), kept._replace(limit_nanousd=1))
            assert self.amounts() == before
            assert self.reserve("r0", further=(gone, kept)) == made
            self.settle(self.reserve("r0", further=today), 7)
            assert [use.spent_nanousd for use in self.harness.backend.books((kept, *today)).uses] == [7, 0, 7, 0]
            self.assert_booked(7)

    def test_further_amounts_land_in_the_periods_of_their_reservation(self) -> None:
        for moment in ("2026-03-14T10:59:59", "2026-03-29T21:59:59", "2026-03-31T21:59:59", "2026-10-31T22:59:59"):
            budgets = tuple(_key_budget(f"extra{number}", period) for number, period in enumerate(PERIODS))
            made_us, backend = at_us(moment) + 900_000, self.harness.backend
            self.harness.clear()
            self.harness.clock.us = made_us
            made = self.reserve("r0", further=budgets)
            self.pass_seconds(61)
            over = {
                budget.name
                for budget, end in zip(budgets, made.renews_at_seconds[6:], strict=True)
                if end is not None
                if end <= self.harness.clock.us // US
            }
            assert over, moment
            for amount, end in ((3 * COST, None), (7, self.settle)):
                more = self.extend(made, 3 * COST, further=budgets)
                if end is not None:
                    end(more, amount)
                now = {use.budget.name: use.spent_nanousd for use in backend.books(budgets).uses}
                assert now == {name: 0 if name in over else amount for name in now}, moment
                passed_us, self.harness.clock.us = self.harness.clock.us, made_us
                assert {use.spent_nanousd for use in backend.books(budgets).uses} == {amount}, moment
                self.harness.clock.us = passed_us

    # --- a network's share of what all have together

    def ask_for_share(self, reservation_id: str, cost_nanousd: int, network: str = "a", **changes: Any) -> contract.Ask:
        """An ask of a network that has a quarter of 1,000 nano-dollars of this hour, unless `changes` has budgets."""
        return contract.Ask(reservation_id, cost_nanousd, **{"budgets": _sharing(network), **changes})

    def reserve_share(self, reservation_id: str, cost_nanousd: int, network: str = "a", **changes: Any) -> Reservation:
        verdict = self.harness.backend.reserve(self.ask_for_share(reservation_id, cost_nanousd, network, **changes))
        assert isinstance(verdict, Reservation), verdict
        return verdict

    def refuse_share(self, reservation_id: str, cost_nanousd: int, network: str = "a", **changes: Any) -> Refusal:
        """The refusal; its reason is a share."""
        verdict = self.harness.backend.reserve(self.ask_for_share(reservation_id, cost_nanousd, network, **changes))
        assert isinstance(verdict, Refusal), verdict
        said = (verdict.reason, verdict.cause, verdict.scope, verdict.budget)
        assert said == (Reason.NETWORK_SHARE, Reason.NETWORK_SHARE, Scope.NETWORK, "all_hour")
        assert (verdict.marker_seconds, verdict.limit_nanousd) == (0, None)
        return verdict

    def test_each_network_has_exactly_its_share_of_what_the_others_leave(self) -> None:
        # A quarter of 1,000, of 750, and of 563.
        for network, nanousd in (("a", 250), ("b", 187), ("c", 140)):
            self.refuse_share(f"{network}0", nanousd + 1, network)
            self.settle(self.reserve_share(f"{network}1", nanousd, network), nanousd)
            self.refuse_share(f"{network}2", 1, network)
        books = self.harness.backend.books(_sharing("b"))
        assert (books.spent("its_hour"), books.spent("all_hour")) == (187, 577)

    def test_a_share_of_nothing_that_has_a_limit_or_of_everything_refuses_no_more_than_the_limit(self) -> None:
        for name, change in (("all_hour", {"limit_nanousd": None}), ("its_hour", {"is_shadow": True})):
            self.harness.clear()
            self.reserve_share("r0", 1_000, budgets=_changed(name, **change))
        self.harness.clear()
        self.reserve_share("r0", 1_000, budgets=_changed("its_hour", share=Share("all_hour", 1_000_000)))

    def test_what_a_share_refuses_waits_for_the_end_of_the_period(self) -> None:
        self.settle(self.reserve_share("r0", 250), 250)
        self.pass_seconds(600)
        left_seconds = SECONDS_PER_HOUR - self.harness.clock.us // US % SECONDS_PER_HOUR
        refusal = self.refuse_share("r1", 1)
        assert (refusal.retry_after_seconds, refusal.in_flight) == (left_seconds, False)
        self.pass_seconds(left_seconds)
        self.reserve_share("r1", 250)

    def test_a_share_that_only_pending_money_fills_is_busy(self) -> None:
        made = self.reserve_share("r0", 250)
        assert self.refuse_share("r1", 1).in_flight
        self.harness.backend.release(made)
        other = self.reserve_share("r2", 200, "b")
        # What others have pending makes the share smaller, until it ends.
        assert self.refuse_share("r3", 250).in_flight
        self.settle(other, 200)
        assert not self.refuse_share("r3", 201).in_flight
        self.reserve_share("r3", 200)

    def test_what_is_more_than_a_whole_share_can_never_fit(self) -> None:
        refusal = self.refuse_share("r0", 251)
        assert (refusal.can_never_fit, refusal.retry_after_seconds) == (True, None)

    def test_the_last_of_a_share_is_set_aside_where_that_will_do(self) -> None:
        self.settle(self.reserve_share("r0", 200), 200)
        assert self.reserve_share("r1", 250, at_least_nanousd=1).cost_nanousd == 50
        self.refuse_share("r2", 250, at_least_nanousd=1)

    def test_a_share_is_named_before_what_is_shared_and_after_what_stands_before_that(self) -> None:
        self.settle(self.reserve_share("r0", 250, "b"), 1_000)
        self.refuse_share("r1", 1)
        first = further_budget("first", Scope.KEY, Calendar("hour"), 0)
        verdict = self.harness.backend.reserve(self.ask_for_share("r1", 1, budgets=(first, *_sharing("a"))))
        assert isinstance(verdict, Refusal)
        assert verdict.budget == "first"

    def test_an_extension_has_no_more_than_the_share_of_today(self) -> None:
        backend, made = self.harness.backend, self.reserve_share("r0", 100)
        for budgets, nanousd in ((_sharing("a"), 250), (_changed("its_hour", share=Share("all_hour", 400_000)), 400)):
            more = backend.extend(made, 1_000, budgets, at_least_nanousd=nanousd)
            assert isinstance(more, Reservation), more
            assert more.cost_nanousd == nanousd
            refusal = backend.extend(made, nanousd + 1, budgets)
            assert isinstance(refusal, Refusal)
            assert (refusal.reason, refusal.budget) == (Reason.NETWORK_SHARE, "all_hour")

    def test_a_share_that_a_request_cannot_have_is_refused(self) -> None:
        for share in (Share("its_hour", 1), Share("nowhere", 1), Share("all_hour", 0), Share("all_hour", 1_000_001)):
            try:
                self.harness.backend.reserve(self.ask_for_share("r0", 1, budgets=_changed("its_hour", share=share)))
            except ConfigurationError:
                continue
            raise AssertionError(share)

    def test_books_show_each_budget_that_was_asked_for_in_its_order(self) -> None:
        budgets = tuple(
            further_budget(f"extra{number}", scope, period)
            for number, (scope, period) in enumerate(product(Scope, PERIODS))
        )
        for chosen in (budgets[:16], budgets[16:32], budgets[26:]):
            empty = self.harness.backend.books(chosen)
            assert [use.budget for use in empty.uses] == list(chosen)
            assert {(use.spent_nanousd, use.pending_nanousd, use.renews_at_seconds) for use in empty.uses} == {
                (0, 0, None)
            }
            made = self.reserve(f"r{chosen[0].name}", further=chosen)
            for books in (self.harness.backend.books(chosen), self.harness.backend.books(tuple(reversed(chosen)))):
                for budget, renews in zip(chosen, made.renews_at_seconds[6:], strict=True):
                    use = books.use(budget.name)
                    assert (use.spent_nanousd, use.renews_at_seconds) == (COST, renews), budget
                assert books.as_of_us == self.harness.clock.us
            self.settle(made, 0)


def _sharing(network: str) -> tuple[Budget, ...]:
    """Of a network that has a quarter of what others leave of 1,000 nano-dollars an hour."""
    hour, share = Calendar("hour"), Share("all_hour", 250_000)
    return (
        Budget("its_hour", network, hour, None, Scope.NETWORK, share=share),
        Budget("all_hour", EVERYBODY, hour, 1_000, Scope.GLOBAL),
    )


def _changed(name: str, **changes: Any) -> tuple[Budget, ...]:
    """Those of the network `a`, one of them changed."""
    return tuple(budget._replace(**changes) if budget.name == name else budget for budget in _sharing("a"))


def _key_budget(name: str, period: Period, limit_nanousd: int | None = AMPLE) -> Budget:
    return further_budget(name, Scope.KEY, period, limit_nanousd)


def _as_shadow(limits: Limits, *names: str) -> tuple[Budget, ...]:
    """All budgets of `limits`, of which those of these names are shadows."""
    budgets = limits.budgets(WHO, NETWORK)
    return tuple(budget._replace(is_shadow=True) if budget.name in names else budget for budget in budgets)
