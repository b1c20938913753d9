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
from backends.conformance.cases import (
    AMPLE,
    BUCKET_SECONDS,
    COST,
    KEY,
    LIMITS_IN_ORDER,
    NETWORK,
    PENDING_BUCKET_SECONDS,
    PENDING_SECONDS,
    ROOMY,
    SLIDING,
    THROTTLE_SECONDS,
    US,
    WHO,
    WINDOW_SECONDS,
    LimitCase,
    conflict,
    make_ask,
)
from backends.conformance.harness import START_US, Harness
from backends.contract import Duplicate, DuplicateState, Limits, Outcome, Reason, Refusal, Reservation, Settlement

TURNS = [
    datetime.fromisoformat(f"{moment}+00:00")
    for moment in ("2026-03-14T10:59:59", "2026-03-14T23:59:59", "2026-03-31T23:59:59", "2026-12-31T23:59:59")
]
"""One second before the turn of an hour, a day, a month, a year."""


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
        self, reservation: Reservation, to_nanousd: int, limits: Limits = ROOMY, at_least_nanousd: int | None = None
    ) -> Reservation:
        verdict = self.harness.backend.extend(reservation, to_nanousd, limits, at_least_nanousd=at_least_nanousd)
        assert isinstance(verdict, Reservation), verdict
        return verdict

    def refuse_extension(
        self, reservation: Reservation, to_nanousd: int, limits: Limits, at_least_nanousd: int | None = None
    ) -> Refusal:
        verdict = self.harness.backend.extend(reservation, to_nanousd, limits, at_least_nanousd=at_least_nanousd)
        assert isinstance(verdict, Refusal), verdict
        return verdict

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
        return self.harness.backend.books(WHO, NETWORK, WINDOW_SECONDS)

    def assert_booked(self, nanousd: int, pending_nanousd: int = 0) -> None:
        """So much is in each of the six totals, and so much of the identifier's money is pending."""
        assert self.books() == contract.Books(nanousd, nanousd, nanousd, nanousd, nanousd, nanousd, pending_nanousd)

    def pass_seconds(self, seconds: float) -> None:
        self.harness.pass_time(int(seconds * US))

    def each_limit(self) -> Iterator[LimitCase]:
        for case in LIMITS_IN_ORDER:
            self.harness.clear()
            yield case

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
        return {owner: self.harness.backend.books(*owner, WINDOW_SECONDS) for owner in owners}

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
        day = amount_nanousd if then // keys.SECONDS_PER_DAY == now // keys.SECONDS_PER_DAY else 0
        hour = amount_nanousd if then // keys.SECONDS_PER_HOUR == now // keys.SECONDS_PER_HOUR else 0
        books = self.books()
        assert (books.window_nanousd, books.network_window_nanousd) == (amount_nanousd, amount_nanousd)
        assert (books.day_nanousd, books.network_day_nanousd, books.global_day_nanousd) == (day, day, day)
        assert books.global_hour_nanousd == hour
        if amount_nanousd:
            self.assert_leaves_window(books.window_frees_at_seconds, made.made_at_us)

    def assert_windows_are_empty(self) -> None:
        books = self.books()
        assert (books.window_nanousd, books.network_window_nanousd) == (0, 0)
        assert books.window_frees_at_seconds is None

    def assert_pending(self, nanousd: int) -> None:
        """So much is pending, and was reserved at `START_US`."""
        assert self.books().pending_nanousd == nanousd

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
            window_frees_at_seconds=made.window_frees_at_seconds,
        )
        self.assert_leaves_window(made.window_frees_at_seconds, START_US)

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

    def test_the_first_limit_that_fails_is_the_reason(self) -> None:
        for number, case in enumerate(self.each_limit()):
            limits = ROOMY
            for failing in LIMITS_IN_ORDER[number:]:
                limits = failing.set_to(COST, limits)
            made = self.reserve("r0")
            assert self.refuse_extension(made, COST + 1, limits).reason == case.reason
            self.settle(made, COST)
            assert self.refuse("r1", COST, limits).reason == case.reason

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
        self.assert_booked(total, total)

    # --- the marker

    def test_under_a_marker_everything_is_refused_with_what_set_it(self) -> None:
        limits = replace(ROOMY, window_nanousd=COST)
        self.spend("r0", COST, limits)
        first = self.refuse("r1", COST, limits)
        self.pass_seconds(12)
        again = self.refuse("r2", 1, limits)
        assert (again.reason, again.cause) == (Reason.THROTTLED, Reason.WINDOW_LIMIT)
        assert again.scope is contract.Scope.IDENTIFIER
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
        for case in LIMITS_IN_ORDER[:2]:
            self.harness.clear()
            limits = case.set_to(COST)
            self.reserve("r0", COST, limits)
            first = self.refuse("r1", COST, limits)
            assert (first.in_flight, first.marker_seconds) == (True, case.marker_seconds)
            assert first.retry_after_seconds == case.marker_seconds
            assert self.refuse("r2", COST, limits).in_flight

    def test_a_pending_reservation_past_its_time_is_spent(self) -> None:
        limits = replace(ROOMY, window_nanousd=COST, mark_when_busy=False)
        self.reserve("r0", COST, limits)
        self.pass_seconds(PENDING_SECONDS - 1)
        assert self.refuse("r1", COST, limits).in_flight
        self.pass_seconds(PENDING_BUCKET_SECONDS + 1)
        assert not self.refuse("r2", COST, limits).in_flight

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
            assert refusal.reason == case.reason
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
            self.assert_booked(COST + 300, 300)
            known = self.harness.backend.find_duplicate(KEY)
            assert known is not None, case
            assert known.cost_nanousd == 300, case
            assert self.reserve("r1", COST, limits, at_least_nanousd=300, idempotency=KEY).cost_nanousd == 300, case
            assert self.settle(made, 120).booked_nanousd == 120, case
            self.assert_booked(COST + 120)

    def test_less_than_will_do_is_refused_and_nothing_is_set_aside(self) -> None:
        for case in self.each_limit():
            limits = replace(case.set_to(COST + 299), throttle_seconds=1)
            self.spend("r0", COST, limits)
            before = self.seen(marker=False)
            refusal = self.refuse("r1", COST, limits, at_least_nanousd=300)
            assert (refusal.reason, refusal.in_flight, refusal.can_never_fit) == (case.reason, False, False), case
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
            self.pass_seconds(case.marker_seconds)
            assert self.reserve("r1", COST, limits, at_least_nanousd=COST - 1).cost_nanousd == COST - 1, case

    def test_retry_after_is_the_second_in_which_the_refusal_ends(self) -> None:
        for case in self.each_limit():
            for limit, spent, pauses, least in (
                (2 * COST, COST // 2, (3.5, 21, 108), None),
                (COST, COST // 4, (60, 60, 60), COST // 2),
            ):
                limits = replace(case.set_to(limit), throttle_seconds=1)
                seconds = self._retry_after(spent, pauses, limits, at_least_nanousd=least)
                self.pass_seconds(seconds - 1)
                assert self.refuse("r1", COST, limits, at_least_nanousd=least).reason == case.reason
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
        seen = {
            name: getattr(made, name)
            for name in ("window_spent_nanousd", "day_spent_nanousd", "window_frees_at_seconds")
        }
        assert replace(found, **seen) == made
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
        other, backend = replace(self.reserve("r0"), request_digest="0" * 16), self.harness.backend
        before = self.seen()
        with conflict():
            backend.settle(other, 1)
        with conflict():
            backend.release(other)
        with conflict():
            backend.extend(other, 2 * COST, ROOMY)
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
            assert self.books().day_nanousd == actual

    def test_past_its_time_an_unended_reservation_stays_booked_in_full(self) -> None:
        made = self.reserve("r0")
        self.pass_seconds(PENDING_SECONDS + keys.RECORD_KEEP_SECONDS)
        before = self.seen()
        assert self.settle(made, 1) == Settlement("r0", Outcome.EXPIRED, COST, 0)
        assert self.seen() == before
        assert self.books().day_nanousd == COST

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
        made = self.reserve("r0", idempotency=KEY)
        self.pass_seconds(11)
        more = self.extend(made, 3 * COST)
        held = 3 * COST
        assert more == replace(made, cost_nanousd=held, window_spent_nanousd=held, day_spent_nanousd=held)
        self.assert_booked(held, held)
        self.assert_leaves_window(self.books().window_frees_at_seconds, START_US)

    def test_an_extension_exactly_to_a_limit_is_granted_and_one_nano_dollar_more_is_not(self) -> None:
        for case in self.each_limit():
            limits = case.set_to(4 * COST)
            self.spend("s0", COST, limits)
            made = self.reserve("r0", COST, limits)
            before = self.seen()
            refusal = self.refuse_extension(made, 3 * COST + 1, limits)
            assert (refusal.reason, refusal.cause, refusal.scope) == (case.reason, case.reason, case.scope)
            assert (refusal.limit_nanousd, refusal.marker_seconds) == (4 * COST, 0)
            assert self.seen() == before, case
            assert self.extend(made, 3 * COST, limits).cost_nanousd == 3 * COST
            assert self.refuse("r1", 1, limits).reason == case.reason

    def test_an_extension_takes_what_there_is_room_for_if_that_is_enough(self) -> None:
        for case in self.each_limit():
            limits = case.set_to(2 * COST)
            made = self.reserve("r0", COST, limits)
            self.spend("s0", COST - 100, limits)
            before = self.seen()
            assert self.refuse_extension(made, 2 * COST, limits, COST + 101).reason == case.reason
            assert self.seen() == before, case
            more = self.extend(made, 2 * COST, limits, COST + 100)
            assert more.cost_nanousd == COST + 100, case
            assert self.extend(made, 2 * COST, limits, COST).cost_nanousd == COST + 100, case
            assert self.books().window_nanousd == 2 * COST, case

    def test_of_several_limits_the_narrowest_says_how_much_there_is_room_for(self) -> None:
        limits = replace(ROOMY, window_nanousd=COST + 70, network_day_nanousd=COST + 50, global_hour_nanousd=COST + 60)
        made = self.reserve("r0", COST, limits)
        assert self.extend(made, 2 * COST, limits, COST + 1).cost_nanousd == COST + 50

    def test_a_limit_lowered_below_what_is_spent_extends_nothing_and_takes_nothing_back(self) -> None:
        for case in self.each_limit():
            made = self.reserve("r0")
            self.spend("s0", COST)
            before = self.seen()
            assert self.refuse_extension(made, COST + 1, case.set_to(COST)).reason == case.reason
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
        assert self.books().window_nanousd == 4 * COST
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
        assert more.window_spent_nanousd == 2 * COST
        assert more.day_spent_nanousd == 3 * COST

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
                    self.harness.backend.extend(reservation, to_nanousd, ROOMY)
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
        assert self.books().day_nanousd == 3 * COST

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
        assert self.books().global_day_nanousd == 4 * COST

    def test_of_callers_at_once_with_one_key_one_is_admitted(self) -> None:
        if not self.harness.backend.promises_atomicity:
            return
        verdicts = self.at_once(lambda number: self.harness.backend.reserve(make_ask(f"r{number}", idempotency=KEY)))
        admitted = [verdict.reservation_id for verdict in verdicts if isinstance(verdict, Reservation)]
        assert admitted == list({verdict.reservation_id for verdict in verdicts if isinstance(verdict, Duplicate)})
        assert self.books().global_day_nanousd == COST

    def test_of_extensions_at_once_no_more_is_granted_than_there_is_room_for(self) -> None:
        if not self.harness.backend.promises_atomicity:
            return
        limits = replace(ROOMY, network_window_nanousd=25 * COST)
        made = [self.reserve(f"r{number}", COST, limits, identifier=f"id{number}") for number in range(20)]
        verdicts = self.at_once(lambda number: self.harness.backend.extend(made[number], 2 * COST, limits))
        assert sum(isinstance(verdict, Reservation) for verdict in verdicts) == 5
        assert self.books().network_window_nanousd == 25 * COST

    # --- what answers carry besides

    def test_books_and_reservations_say_when_the_oldest_amount_leaves_the_window(self) -> None:
        assert self.books().window_frees_at_seconds is None
        made = self.reserve("r0")
        self.pass_seconds(BUCKET_SECONDS * 2 + 3.5)
        second_us = self.harness.clock.us
        for frees_at in (self.reserve("r1").window_frees_at_seconds, self.books().window_frees_at_seconds):
            self.assert_leaves_window(frees_at, START_US)
        self.settle(made, 0)
        for frees_at in (self.books().window_frees_at_seconds, self.reserve("r2").window_frees_at_seconds):
            self.assert_leaves_window(frees_at, second_us)
        assert frees_at is not None
        self.pass_seconds(frees_at - self.harness.clock.us // US)
        assert self.books().window_frees_at_seconds is None

    def test_the_oldest_amount_is_the_oldest_that_counts_not_the_smallest_nor_the_last(self) -> None:
        for amounts, over in product(((5, 9), (9, 5)), (0, 7)):
            self.harness.clear()
            if over:
                self.reserve("over", over)
            self.pass_seconds(WINDOW_SECONDS - BUCKET_SECONDS + (0 if over else 7))
            oldest_us = self.harness.clock.us
            self.assert_leaves_window(
                self.reserve("r0", amounts[0]).window_frees_at_seconds, START_US if over else oldest_us
            )
            self.pass_seconds(BUCKET_SECONDS)
            self.reserve("r1", amounts[1])
            self.pass_seconds(BUCKET_SECONDS)
            made = self.reserve("r2")
            self.assert_leaves_window(made.window_frees_at_seconds, oldest_us)
            assert made.window_spent_nanousd == 14 + COST

    def test_the_books_say_what_is_pending_since_midnight_and_their_own_time(self) -> None:
        self.harness.clock.us = int(datetime(2026, 3, 14, 23, 59, 50, tzinfo=UTC).timestamp()) * US
        self.reserve("r0", 5)
        self.pass_seconds(20)
        self.reserve("r1", 7)
        books = self.books()
        assert (books.pending_nanousd, books.pending_today_nanousd) == (12, 7)
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
            assert (known.window_seconds, known.pending_seconds) == (WINDOW_SECONDS, PENDING_SECONDS)
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
        self.reserve("r0")
        self.spend("r1", 5)
        self.refuse("r2", COST, replace(ROOMY, window_nanousd=COST))
        self.pass_seconds(3 * 86_400)
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
        assert self.books().window_nanousd == 5 * COST
