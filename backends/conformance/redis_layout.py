"""What a backend must do besides that keeps our keys: their names, contents and TTLs, and what is lost or set by hand.

The suite is `Behaviour` and more: where that asks through the contract whether something has changed, here every stored
key is compared.
"""

# ruff: noqa: S101, D102 (asserts are the point, a test's name says what must hold, the numbers are the expectations)

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import product

from backends.budgets import BUILT_IN, MOST_BUDGETS, Forever, Reason, Scope, Sliding
from backends.conformance.behaviour import TURNS, Behaviour, at_us
from backends.conformance.cases import (
    BUCKET_SECONDS,
    COST,
    EVERY,
    KEY,
    LIMITS_IN_ORDER,
    NETWORK,
    OWNERS,
    PENDING_BUCKET_SECONDS,
    PENDING_SECONDS,
    PERIODS,
    ROOMY,
    THROTTLE_SECONDS,
    US,
    WHO,
    WINDOW_SECONDS,
    Limits,
    further_budget,
)
from backends.conformance.harness import START_US, LayoutHarness, MemoryHarness, Stored
from backends.conformance.operations import clear_books, played, some_operations, without_running
from backends.contract import Duplicate, DuplicateState, Outcome, Reservation, Settlement
from backends.keys import (
    IDEMPOTENCY_KEEP_SECONDS,
    PENDING_BUCKETS,
    RECORD_KEEP_SECONDS,
    RESET_KEEP_SECONDS,
    WINDOW_BUCKETS,
    bucket_seconds_of,
    idempotency_key,
    known_key,
    marker_key,
    pending_bucket_seconds_of,
    record_key,
    reset_key,
    rows_at,
)
from backends.records import Member, digest_of, key_digest, start_of

RECORD_CHARACTERS = 300
IDEMPOTENCY_KEY = idempotency_key(KEY.digest)
MARKER_KEY = marker_key(WHO)
WINDOW_KEY, NETWORK_WINDOW_KEY = f"llm:cost:recent:{WHO}", f"llm:network:recent:{NETWORK}"
PENDING_OF_ALL_KEY = "llm:open:global"
PENDING_KEYS = (f"llm:open:identifier:{WHO}", f"llm:open:network:{NETWORK}", PENDING_OF_ALL_KEY)


def assert_same_stored(one: Stored, other: Stored, where: object) -> None:
    """The same keys and amounts; TTLs to a second, which a busy machine may take for one operation."""
    assert {key: value for key, (value, _) in one.items()} == {key: value for key, (value, _) in other.items()}, where
    for key, (_, left) in one.items():
        assert (left < 0) == (other[key][1] < 0), (key, where)
        assert abs(left - other[key][1]) <= 1, (key, where)


class RedisLayout(Behaviour):
    """Inherit it as ``Test…`` and set `harness` before each test."""

    harness: LayoutHarness

    # --- the closer look

    def stored(self) -> Stored:
        """Every key that is stored, but for what windows came to: that is a hint, and only `atomic` keeps it."""
        return without_running(self.harness.stored())

    def amounts(self) -> Mapping[str, object]:
        return {key: value for key, (value, _) in self.stored().items()}

    def seen(self, *, marker: bool = True) -> Mapping[str, object]:
        stored = self.harness.stored()
        return {key: kept for key, kept in stored.items() if marker or key != MARKER_KEY}

    def marker_seconds(self) -> int:
        return self.stored().get(MARKER_KEY, ("", 0))[1]

    def assert_leaves_window(self, at_seconds: int | None, spent_at_us: int) -> None:
        start = spent_at_us // US // BUCKET_SECONDS * BUCKET_SECONDS
        assert at_seconds == start + BUCKET_SECONDS + WINDOW_SECONDS

    def assert_booked_only(self, made: Reservation, amount_nanousd: int) -> None:
        super().assert_booked_only(made, amount_nanousd)
        then, now, stored = self.total_keys(made.made_at_us), self.total_keys(), self.stored()
        for key in then:
            assert stored[key][0] == str(amount_nanousd), key
        for key in set(now) - set(then):
            assert key not in stored
        made_seconds = made.made_at_us // US
        bucket = made_seconds // BUCKET_SECONDS * BUCKET_SECONDS
        for key in (WINDOW_KEY, NETWORK_WINDOW_KEY):
            assert stored.get(key, ({}, 0))[0] == ({bucket: amount_nanousd} if amount_nanousd else {}), key
        self.assert_every_key_has_a_ttl()

    def assert_windows_are_empty(self) -> None:
        super().assert_windows_are_empty()
        assert not {WINDOW_KEY, NETWORK_WINDOW_KEY} & set(self.stored())

    def assert_pending(self, nanousd: int) -> None:
        super().assert_pending(nanousd)
        for key in PENDING_KEYS:
            assert self.buckets_of(key) == ({START_US // US: nanousd} if nanousd else {}), key

    def assert_key_is_free(self) -> None:
        super().assert_key_is_free()
        assert IDEMPOTENCY_KEY not in self.harness.stored()

    def assert_nothing_is_left(self) -> None:
        super().assert_nothing_is_left()
        assert self.harness.stored() == {}

    # --- helpers

    def total_keys(self, at_us: int | None = None, limits: Limits = ROOMY) -> list[str]:
        """Those that hold one hour, day, … each, or what never ends."""
        at_us = self.harness.clock.us if at_us is None else at_us
        rows = rows_at(limits.budgets(WHO, NETWORK), at_us // US)
        return [row.key for row in rows if not row.layout.window_seconds]

    def window_keys(self, limits: Limits) -> set[str]:
        rows = rows_at(limits.budgets(WHO, NETWORK), self.harness.clock.us // US)
        return {row.key for row in rows if row.layout.window_seconds}

    def ttls(self) -> dict[str, int]:
        """Of the keys that have one."""
        return {key: left for key, (_, left) in self.stored().items() if left >= 0}

    def assert_every_key_has_a_ttl(self) -> None:
        """But for totals of what never ends."""
        for key, (_, left) in self.harness.stored().items():
            assert left == -1 if ":forever:" in key else left > 0, key

    def members_of(self, key: str) -> dict[Member, int]:
        """The members of a sorted set; none for a missing key."""
        members = self.harness.stored().get(key, ({}, 0))[0]
        assert isinstance(members, dict)
        return members

    def buckets_of(self, key: str) -> dict[int, int]:
        """Its buckets; of pending money all members of each."""
        buckets = Counter[int]()
        for member, nanousd in self.members_of(key).items():
            buckets[start_of(member)] += nanousd
        return dict(buckets)

    def lose_all(self, but: str | None = None) -> None:
        """Every key is lost, but for one."""
        for key in set(self.harness.stored()) - {but}:
            self.harness.lose(key)

    # --- keys and their TTLs

    def test_the_known_layout_of_keys(self) -> None:
        self.settle(self.reserve("r0"), COST - 1)
        self.reserve("r1")
        held, start = 2 * COST - 1, START_US // US
        stored = self.stored()
        assert stored.pop("llm:reservation:r0")[1] == RECORD_KEEP_SECONDS
        assert stored.pop("llm:reservation:r1")[1] == RECORD_KEEP_SECONDS + PENDING_SECONDS
        window = ({start: held}, WINDOW_SECONDS + BUCKET_SECONDS)
        pending = ({start: COST}, PENDING_SECONDS + PENDING_BUCKET_SECONDS)
        to_midnight, to_next_hour = 13 * 3600 + 40 * 60, 40 * 60
        assert stored == {
            "llm:cost:recent:hash456": window,
            "llm:cost:daily:hash456:2026-03-14": (str(held), to_midnight + 86_400),
            "llm:network:recent:198.51.100.7": window,
            "llm:network:daily:198.51.100.7:2026-03-14": (str(held), to_midnight + 86_400),
            "llm:global:hourly:2026-03-14T10": (str(held), to_next_hour + 7_200),
            "llm:global:daily:2026-03-14": (str(held), to_midnight + 86_400),
            "llm:open:identifier:hash456": pending,
            "llm:open:network:198.51.100.7": pending,
            "llm:open:global": (pending[0], pending[1] + RECORD_KEEP_SECONDS),
        }

    def test_amounts_are_exact_to_the_last_nano_dollar(self) -> None:
        super().test_amounts_are_exact_to_the_last_nano_dollar()
        self.assert_every_key_has_a_ttl()

    def test_a_settlement_prolongs_no_ttl(self) -> None:
        made = self.reserve("r0", COST, EVERY)
        before = self.ttls()
        self.pass_seconds(50)
        self.settle(made, 7)
        after = self.ttls()
        assert after.pop(record_key("r0")) == RECORD_KEEP_SECONDS
        assert len(after) >= len(EVERY.budgets(WHO, NETWORK)) - 1
        assert all(left == before[key] - 50 for key, left in after.items())

    def test_an_extension_prolongs_no_ttl(self) -> None:
        made = self.reserve("r0", COST, EVERY, idempotency=KEY)
        before, ttls = self.stored(), self.ttls()
        self.pass_seconds(11)
        self.extend(made, 3 * COST, EVERY)
        after = self.stored()
        assert set(after) == set(before)
        assert self.ttls() == {key: left - 11 for key, left in ttls.items()}
        record, first = after[record_key("r0")][0], before[record_key("r0")][0]
        assert record == str(first).replace(f"open {COST} ", f"open {3 * COST} ")
        self.assert_pending(3 * COST)

    def test_an_extension_after_the_turn_of_a_period_makes_no_key(self) -> None:
        for moment in TURNS:
            made = self.reserve_at(moment)
            before = set(self.stored())
            self.pass_seconds(61)
            self.extend(made, 3 * COST)
            assert set(self.stored()) == before, moment

    def test_a_release_leaves_its_record_for_an_hour(self) -> None:
        self.harness.backend.release(self.extend(self.reserve("r0"), 2 * COST))
        record, left = self.stored()[record_key("r0")]
        assert str(record).startswith("released 0 ")
        assert left == RECORD_KEEP_SECONDS

    def test_a_release_goes_back_to_the_periods_of_its_reservation(self) -> None:
        super().test_a_release_goes_back_to_the_periods_of_its_reservation()
        stored = self.stored()
        assert [stored[key][0] for key in self.total_keys(int(TURNS[-1].timestamp()) * US)] == ["0"] * 4

    def test_the_ttl_of_an_idempotency_key_is_a_day_from_its_last_change(self) -> None:
        made = self.reserve("r0", idempotency=KEY)
        assert self.ttls()[IDEMPOTENCY_KEY] == IDEMPOTENCY_KEEP_SECONDS
        self.pass_seconds(60)
        self.extend(made, 2 * COST)
        assert self.ttls()[IDEMPOTENCY_KEY] == IDEMPOTENCY_KEEP_SECONDS - 60
        self.settle(made, 7)
        assert self.ttls()[IDEMPOTENCY_KEY] == IDEMPOTENCY_KEEP_SECONDS

    def test_a_window_is_kept_as_long_as_its_youngest_bucket_whatever_its_length_was(self) -> None:
        self.pass_seconds(1)
        self.spend("r0", COST, replace(ROOMY, window_seconds=WINDOW_BUCKETS))
        self.pass_seconds(0.5)
        start = (START_US // US + 1) // BUCKET_SECONDS * BUCKET_SECONDS
        self.spend("r1", COST, replace(ROOMY, window_seconds=WINDOW_BUCKETS))
        assert self.ttls()[WINDOW_KEY] == WINDOW_BUCKETS + 1
        self.pass_seconds(0.5)
        self.reserve("r2")
        assert self.ttls()[WINDOW_KEY] == WINDOW_SECONDS + BUCKET_SECONDS
        self.reserve("r3")
        assert self.ttls()[WINDOW_KEY] == WINDOW_SECONDS + BUCKET_SECONDS
        assert start in self.buckets_of(WINDOW_KEY)

    def test_a_reservation_prolongs_a_ttl_with_a_new_bucket_only(self) -> None:
        self.reserve("r0")
        before = {key: left for key, left in self.ttls().items() if "reservation" not in key}
        for gone in range(1, PENDING_BUCKET_SECONDS):
            self.pass_seconds(0.6)
            self.reserve(f"r{gone}")
            self.pass_seconds(0.4)
            after = self.ttls()
            assert {key: after[key] for key in before} == {key: left - gone for key, left in before.items()}

    def test_pending_amounts_get_their_ttl_with_a_new_bucket_only(self) -> None:
        self.reserve("r0", pending_seconds=30)
        self.reserve("r1")
        ttl = 30 + pending_bucket_seconds_of(30)
        self.assert_ttls_of_pending(ttl)
        self.pass_seconds(PENDING_BUCKET_SECONDS - 1)
        self.reserve("r2")
        self.assert_ttls_of_pending(ttl - PENDING_BUCKET_SECONDS + 1)
        self.pass_seconds(1)
        self.reserve("r3")
        self.assert_ttls_of_pending(PENDING_SECONDS + PENDING_BUCKET_SECONDS)

    def assert_ttls_of_pending(self, seconds: int) -> None:
        ttls = self.ttls()
        assert [ttls[key] for key in PENDING_KEYS] == [seconds, seconds, seconds + RECORD_KEEP_SECONDS]

    # --- further budgets

    def test_the_layout_of_further_budgets(self) -> None:
        now = START_US // US
        starts = {"hour": "2026-03-14T10:00", "day": "2026-03-13T23:00", "week": "2026-03-08T23:00"}
        starts |= {"month": "2026-02-28T23:00"}
        ends = {"hour": "2026-03-14T11:00", "day": "2026-03-14T23:00", "week": "2026-03-15T23:00"}
        ends |= {"month": "2026-03-31T22:00"}
        for scope, owner in OWNERS.items():
            self.harness.clear()
            budgets = tuple(further_budget(f"b{number}", scope, period) for number, period in enumerate(PERIODS))
            made = self.reserve("r0", budgets=budgets)
            expected: Stored = {
                f"llm:budget:b0:sliding3600:{owner}": ({now - now % 180: COST}, 3_600 + 180),
                f"llm:budget:b5:forever:{owner}": (str(COST), -1),
            }
            for number, unit in enumerate(starts, 1):
                start, end = (at_us(f"{moments[unit]}:00") // US for moments in (starts, ends))
                expected[f"llm:budget:b{number}:{unit}:{owner}:{start}"] = (str(COST), end - now + 86_400)
            pending = "llm:open:global" if scope is Scope.GLOBAL else f"llm:open:{scope}:{owner}"
            pending_ttl = PENDING_SECONDS + PENDING_BUCKET_SECONDS
            pending_ttl += RECORD_KEEP_SECONDS if scope is Scope.GLOBAL else 0
            charged_to = "".join(key_digest(row.key) for row in rows_at(budgets, now))
            record = f"{COST} {START_US} {made.request_digest} 0 {PENDING_SECONDS} - - {charged_to}"
            stored = self.stored()
            assert stored == expected | {
                pending: ({f"{now}:{charged_to}": COST}, pending_ttl),
                "llm:reservation:r0": (f"open {record}", PENDING_SECONDS + RECORD_KEEP_SECONDS),
            }
            assert all(known_key(key) for key in self.harness.stored())
            self.settle(made, COST)
            assert self.stored() == expected | {
                "llm:reservation:r0": (f"paid {record}", RECORD_KEEP_SECONDS),
            }

    def test_a_record_names_the_six_by_their_owners_and_others_by_their_keys(self) -> None:
        budgets = (further_budget("ever", Scope.KEY, Forever()), further_budget("long", Scope.TEAM, Sliding(3_600)))
        of_others = [key_digest(f"llm:budget:{key}") for key in ("ever:forever:web", "long:sliding3600:marketing")]
        six = f"{WINDOW_SECONDS} {PENDING_SECONDS} {digest_of(WHO)} {digest_of(NETWORK)}"
        alone = f"0 {PENDING_SECONDS} - -"
        for asked, charged_to in (
            (ROOMY.budgets(WHO, NETWORK), six),
            ((*ROOMY.budgets(WHO, NETWORK), *budgets), f"{six} {''.join(of_others)}"),
            ((budgets[1], *ROOMY.budgets(WHO, NETWORK), budgets[0]), f"{six} {''.join(reversed(of_others))}"),
            (budgets, f"{alone} {''.join(of_others)}"),
        ):
            self.harness.clear()
            made = self.reserve("r0", budgets=asked)
            rest = f"{START_US} {made.request_digest} {charged_to}"
            assert self.stored()[record_key("r0")][0] == f"open {COST} {rest}"
            more = self.harness.backend.extend(made, 2 * COST, asked)
            assert self.stored()[record_key("r0")][0] == f"open {2 * COST} {rest}"
            assert isinstance(more, Reservation)
            self.harness.lose(record_key("r0"))
            self.settle(more, 7)
            assert self.stored()[record_key("r0")][0] == f"paid 7 {rest}"

    def test_as_many_further_budgets_as_may_be_are_charged_and_given_back(self) -> None:
        most, digits = MOST_BUDGETS - len(BUILT_IN), 2**53 - 1
        places = list(product((Scope.WIDE_NETWORK, Scope.KEY, Scope.TEAM, Scope.MODEL), PERIODS))[:most]
        budgets = tuple(
            further_budget(f"{number:032}", scope, period, digits, owner="w" * 64)
            for number, (scope, period) in enumerate(places)
        )
        limits = replace(EVERY, further=())
        for case in LIMITS_IN_ORDER[: len(BUILT_IN)]:
            limits = case.set_to(digits, limits)
        made = self.reserve("r0", digits, limits, further=budgets, pending_seconds=86_400, idempotency=KEY)
        assert made.spent_nanousd == (digits,) * MOST_BUDGETS
        record = str(self.stored()[record_key("r0")][0])
        assert record.endswith(" " + "".join(key_digest(row.key) for row in rows_at(budgets, START_US // US)))
        assert len(record) <= RECORD_CHARACTERS
        before = self.seen()
        for budget in budgets:
            assert self.refuse("r1", 1, budgets=(budget,)).budget == budget.name
        assert self.seen() == before
        self.settle(made, 0)
        stored = self.stored()
        assert len(str(stored[record_key("r0")][0])) <= RECORD_CHARACTERS
        totals = {row.key for row in rows_at(made.budgets, START_US // US) if not row.layout.window_seconds}
        assert set(stored) == totals | {record_key("r0"), IDEMPOTENCY_KEY}
        assert {stored[key][0] for key in totals} == {"0"}
        self.assert_every_key_has_a_ttl()

    def test_pending_money_is_remembered_once_for_each_owner_with_what_it_is_charged_to(self) -> None:
        made = self.reserve("r0", COST, EVERY)
        expected = {}
        for scope, owner in OWNERS.items():
            rows = [row for row in rows_at(made.budgets, START_US // US) if row.budget.scope is scope]
            digests = [key_digest(row.key) for row in rows if row.budget.name not in BUILT_IN]
            six = "...six" if len(digests) < len(rows) else ""
            key = "llm:open:global" if scope is Scope.GLOBAL else f"llm:open:{scope}:{owner}"
            expected[key] = {f"{START_US // US}:{six}{''.join(digests)}": COST}
        pending = {key: kept for key, (kept, _) in self.stored().items() if key.startswith("llm:open:")}
        assert pending == expected
        self.settle(made, COST)
        assert not expected.keys() & self.stored().keys()

    def test_the_pending_money_of_the_six_alone_has_the_starts_of_its_buckets_for_members(self) -> None:
        team = further_budget("team", Scope.TEAM, Forever())
        self.reserve("r0", 3, further=(team,))
        self.reserve("r1", 5)
        assert [self.members_of(key) for key in PENDING_KEYS] == [{START_US // US: 8}] * 3

    def test_a_refused_request_leaves_no_key_of_a_further_budget(self) -> None:
        for case in self.each_limit():
            refusal = self.refuse("r0", 1, case.set_to(0, EVERY), idempotency=KEY)
            assert set(self.harness.stored()) == ({MARKER_KEY} if refusal.marker_seconds else set()), case

    def test_what_never_ends_is_kept_for_ever(self) -> None:
        budget = further_budget("ever", Scope.TEAM, Forever())
        self.spend("r0", COST, further=(budget,))
        self.pass_seconds(400 * 86_400)
        assert self.harness.stored() == {"llm:budget:ever:forever:marketing": (str(COST), -1)}

    def test_a_lost_booking_of_further_budgets_is_booked_late_with_its_ttls(self) -> None:
        made = self.reserve("r0", COST, EVERY)
        before = self.ttls()
        self.lose_all()
        assert self.settle(made, 7).outcome is Outcome.LATE
        assert [use.spent_nanousd for use in self.books().uses] == [7] * len(made.budgets)
        pending = {key for key in before if key.startswith("llm:open:")}
        assert self.ttls() == {key: before[key] for key in set(before) - pending} | {
            record_key("r0"): RECORD_KEEP_SECONDS
        }
        self.assert_every_key_has_a_ttl()

    # --- buckets

    def test_a_window_has_never_more_members_than_buckets_and_one(self) -> None:
        most = 0
        for number in range(3 * WINDOW_BUCKETS):
            self.reserve(f"r{number}", 1)
            self.harness.lose(record_key(f"r{number}"))
            for key in (WINDOW_KEY, NETWORK_WINDOW_KEY):
                most = max(most, len(self.buckets_of(key)))
                assert self.ttls()[key] > 0
            self.pass_seconds(BUCKET_SECONDS)
        assert most == WINDOW_BUCKETS + 1

    def test_a_window_that_is_no_multiple_of_its_buckets_is_as_long_as_it_says(self) -> None:
        for window in (1, 7, 59, 61, 601, 610, 619, 86_400):
            self.harness.clear()
            limits = replace(ROOMY, window_seconds=window, window_nanousd=COST, throttle_seconds=1)
            self.spend("r0", COST, limits)
            self.pass_seconds(window)
            assert self.refuse("r1", 1, limits).reason == Reason.WINDOW_LIMIT, window
            bucket = bucket_seconds_of(window)
            self.harness.lose(MARKER_KEY)
            self.pass_seconds(bucket)
            self.reserve("r2", 1, limits)
            assert len(self.buckets_of(WINDOW_KEY)) == 1, window
            assert self.ttls()[WINDOW_KEY] == window + bucket, window

    def test_a_window_that_grows_forgets_nothing_that_was_booked_since(self) -> None:
        super().test_a_window_that_grows_forgets_nothing_that_was_booked_since()
        assert sum(self.buckets_of(WINDOW_KEY).values()) >= 2 * COST
        assert self.ttls()[WINDOW_KEY] > 0

    def test_what_is_left_of_a_window_ends_with_its_bucket(self) -> None:
        limits = replace(ROOMY, window_nanousd=2 * COST, network_window_nanousd=2 * COST)
        self.spend("s0", COST, limits)
        self.pass_seconds(WINDOW_SECONDS - 10)
        made = self.reserve("r0", COST, limits)
        self.pass_seconds(BUCKET_SECONDS + 9)
        assert self.refuse_extension(made, COST + 1, limits).reason == Reason.WINDOW_LIMIT
        self.pass_seconds(1)
        assert self.extend(made, 2 * COST, limits).spent("window") == 2 * COST

    def test_a_reservation_may_be_extended_until_its_bucket_leaves_the_window(self) -> None:
        made = self.reserve("r0", pending_seconds=3_000)
        self.pass_seconds(WINDOW_SECONDS + BUCKET_SECONDS - 1)
        self.extend(made, COST + 1)
        self.pass_seconds(1)
        self.assert_not_extended(made)

    def test_what_killed_workers_leave_pending_makes_no_set_grow_and_is_reported_when_it_is_removed(self) -> None:
        most = reported = reserved = 0
        for number in range(60):
            reserved += 2 ** (number % 30)
            reported += self.reserve(f"r{number}", 2 ** (number % 30)).expired_nanousd
            buckets = self.buckets_of(PENDING_OF_ALL_KEY)
            assert reported + sum(buckets.values()) == reserved
            most = max(most, len(buckets))
            self.pass_seconds(PENDING_BUCKET_SECONDS)
        assert reported > 0
        assert most == PENDING_BUCKETS + 2

    def test_expired_amounts_leave_the_pending_set_when_they_are_reported(self) -> None:
        self.extend(self.reserve("r0"), 2 * COST)
        self.reserve("r1", 5, identifier="another")
        own = self.reserve("r2", 9)
        self.pass_seconds(PENDING_SECONDS + PENDING_BUCKET_SECONDS - 1)
        other = self.reserve("r3", 3)
        assert other.expired_nanousd == 0
        assert self.settle(other, 3).expired_nanousd == 0
        self.reserve("keeps the key", 1)
        self.pass_seconds(1)
        assert self.settle(own, 1).expired_nanousd == 2 * COST + 5
        assert self.settle(self.reserve("r4"), 1).expired_nanousd == 0
        start = (self.harness.clock.us // US - 1) // PENDING_BUCKET_SECONDS * PENDING_BUCKET_SECONDS
        assert self.buckets_of(PENDING_OF_ALL_KEY) == {start: 1}

    def test_a_settlement_reports_expired_amounts_of_an_hour_ago(self) -> None:
        self.reserve("r0")
        self.pass_seconds(RECORD_KEEP_SECONDS)
        assert self.settle(self.reserve("r1"), 1).expired_nanousd == COST

    # --- keys that are lost

    def test_no_total_goes_below_nothing(self) -> None:
        made = self.reserve("r0", COST, EVERY)
        totals, windows = self.total_keys(limits=EVERY), self.window_keys(EVERY)
        for key in totals:
            self.harness.put(key, "5", 1_000)
        for key in windows:
            self.harness.lose(key)
        self.settle(made, 1)
        stored = self.harness.stored()
        assert [stored[key] for key in totals] == [("0", 1_000)] * len(totals)
        assert not windows & set(stored)

    def test_a_settlement_below_its_reservation_makes_no_missing_total(self) -> None:
        made = self.reserve("r0")
        record = record_key("r0")
        self.lose_all(but=record)
        assert self.settle(made, 1).outcome == Outcome.SETTLED
        assert list(self.harness.stored()) == [record]

    def test_a_lost_record_and_booking_is_booked_late_and_once(self) -> None:
        made = self.reserve("r0", idempotency=KEY)
        self.lose_all()
        self.pass_seconds(15)
        assert self.settle(made, 7) == Settlement("r0", Outcome.LATE, 7, 0)
        self.assert_booked(7)
        assert self.settle(made, 7) == Settlement("r0", Outcome.REPEATED, 7, 0)
        self.assert_booked(7)
        assert self.stored()[WINDOW_KEY] == ({START_US // US: 7}, WINDOW_SECONDS + BUCKET_SECONDS)
        self.assert_every_key_has_a_ttl()
        # Its key is remembered again.
        assert self.duplicate("r1", KEY) == Duplicate("r0", DuplicateState.SETTLED, 7, same_body=True)

    def test_a_late_booking_outlives_an_older_bucket_beside_it(self) -> None:
        self.pass_seconds(500)
        made = self.reserve("r0")
        self.lose_all()
        self.harness.clock.us = START_US
        self.spend("old", 3)
        self.pass_seconds(501)
        assert self.settle(made, 7).outcome == Outcome.LATE
        buckets, left = self.stored()[WINDOW_KEY]
        made_seconds = made.made_at_us // US
        assert buckets == {START_US // US: 3, made_seconds - made_seconds % BUCKET_SECONDS: 7}
        assert left == WINDOW_SECONDS + BUCKET_SECONDS

    def test_a_lost_record_is_late_until_the_record_of_an_end_may_be_over(self) -> None:
        late, expired = self.reserve("r0", pending_seconds=2 * RECORD_KEEP_SECONDS), self.reserve("r1")
        for reservation_id in ("r0", "r1"):
            self.harness.lose(record_key(reservation_id))
        self.pass_seconds(RECORD_KEEP_SECONDS - 1)
        assert self.settle(late, 7) == Settlement("r0", Outcome.LATE, 7, 0)
        self.pass_seconds(1)
        assert self.settle(expired, 7) == Settlement("r1", Outcome.EXPIRED, COST, 0)

    def test_an_extension_makes_a_lost_total_again_with_its_ttl(self) -> None:
        made = self.reserve("r0")
        before = self.ttls()
        self.lose_all(but=record_key("r0"))
        self.extend(made, COST + 5)
        assert self.ttls() == before
        self.assert_booked(5, 5)
        assert self.settle(made, 0).outcome == Outcome.SETTLED
        self.assert_booked(0)

    def test_without_its_record_a_reservation_is_not_extended_and_a_release_books_nothing(self) -> None:
        made = self.reserve("r0", idempotency=KEY)
        self.harness.lose(record_key("r0"))
        self.assert_not_extended(made)
        self.lose_all(but=IDEMPOTENCY_KEY)
        assert self.harness.backend.release(made) == Settlement("r0", Outcome.LATE, 0, 0)
        assert list(self.harness.stored()) == [record_key("r0")]
        assert self.harness.backend.release(made).outcome is Outcome.REPEATED

    def test_an_extension_leaves_the_key_of_another_request_alone(self) -> None:
        made = self.reserve("r0", idempotency=KEY)
        self.harness.lose(IDEMPOTENCY_KEY)
        self.reserve("r1", COST + 1, idempotency=KEY)
        self.extend(made, 2 * COST)
        assert self.duplicate("r2", KEY) == Duplicate("r1", DuplicateState.IN_FLIGHT, COST + 1, same_body=True)

    def test_an_end_leaves_the_key_of_another_request_alone(self) -> None:
        for end in ("settle", "release"):
            self.harness.clear()
            first = self.reserve("r0", idempotency=KEY)
            self.harness.lose(IDEMPOTENCY_KEY)
            self.reserve("r1", idempotency=KEY)
            self.settle(first, 1) if end == "settle" else self.harness.backend.release(first)
            assert self.duplicate("r2", KEY) == Duplicate("r1", DuplicateState.IN_FLIGHT, COST, same_body=True)

    # --- keys that are set by hand

    def test_a_marker_set_by_hand_throttles_until_its_ttl_ends(self) -> None:
        self.harness.put(MARKER_KEY, "1", 20)
        refusal = self.refuse("r0")
        assert (refusal.reason, refusal.cause) == (Reason.THROTTLED, Reason.WINDOW_LIMIT)
        assert 0 < refusal.marker_seconds <= THROTTLE_SECONDS
        assert not refusal.in_flight
        self.pass_seconds(20)
        self.reserve("r0")

    def test_a_key_set_by_hand_stands_for_an_unknown_request(self) -> None:
        for text in ("garbage", "", "open x y 1 2"):
            self.harness.put(IDEMPOTENCY_KEY, text, 20)
            assert self.duplicate("r1", KEY) == Duplicate("", DuplicateState.IN_FLIGHT, 0, same_body=False)

    def test_taking_from_a_total_of_nothing_is_a_whole_settlement(self) -> None:
        made = self.reserve("r0", COST, EVERY)
        for key in self.total_keys(limits=EVERY):
            self.harness.put(key, "0", 1_000)
        assert self.settle(made, 1) == Settlement("r0", Outcome.SETTLED, 1, 0)
        assert [use.spent_nanousd for use in self.books().uses] == [
            int(isinstance(budget.period, Sliding)) for budget in made.budgets
        ]

    # --- books that were cleared

    def clear_books(self) -> None:
        """As `flask ledger reset` does: the identifier's keys go, and the time is stored."""
        clear_books(self.harness, WHO)

    def assert_further_spent(self, mine_nanousd: int, others_nanousd: int) -> None:
        """So much is in the identifier's further totals, and in the others'."""
        for use in self.books().uses[len(BUILT_IN) :]:
            expected = mine_nanousd if use.budget.scope is Scope.IDENTIFIER else others_nanousd
            assert use.spent_nanousd == expected, use

    def test_what_was_reserved_before_its_books_were_cleared_is_not_taken_from_them(self) -> None:
        for actual, is_late in product((0, 7, COST + 9), (False, True)):
            self.harness.clear()
            old = self.reserve("r0", COST, EVERY)
            if is_late:
                self.lose_all()
            self.clear_books()
            self.harness.pass_time(1)
            self.reserve("r1", 100, EVERY)
            assert self.settle(old, actual).outcome is (Outcome.LATE if is_late else Outcome.SETTLED)
            self.assert_spent(100, actual + 100, 100)
            self.assert_further_spent(100, actual + 100)

    def test_an_extension_of_what_was_cleared_is_charged_to_the_others_only(self) -> None:
        limits = replace(EVERY, window_nanousd=COST, day_nanousd=COST, network_window_nanousd=3 * COST)
        made = self.reserve("r0", COST, limits)
        self.clear_books()
        more = self.extend(made, 3 * COST, limits)
        assert (more.cost_nanousd, more.spent("window"), more.spent("day")) == (3 * COST, 0, 0)
        self.assert_spent(0, 3 * COST, 0)
        self.assert_further_spent(0, 3 * COST)
        assert self.refuse_extension(made, 3 * COST + 1, limits).reason == Reason.NETWORK_LIMIT
        self.settle(more, 7)
        self.assert_spent(0, 7, 0)
        self.assert_further_spent(0, 7)

    def test_a_reset_before_a_reservation_or_one_that_is_no_time_clears_nothing(self) -> None:
        for text in (str(START_US), "yesterday"):
            self.harness.clear()
            self.harness.put(reset_key(WHO), text, RESET_KEEP_SECONDS)
            self.harness.pass_time(1)
            self.settle(self.extend(self.reserve("r0"), 2 * COST), 7)
            self.assert_booked(7)

    # --- beside the memory strategy

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
