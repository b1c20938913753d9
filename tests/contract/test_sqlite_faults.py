"""`Behaviour` can fail: a fault planted in the SQLite backend is noticed by the test named beside it."""

import time
from dataclasses import replace

import pytest

from backends.conformance.behaviour import Behaviour
from tests.contract.sqlite_backend import SqliteBackend, SqliteHarness


class WithoutTransaction(SqliteBackend):
    def _begin(self, db):
        """Each statement commits by itself."""

    def _admit(self, db, *what):
        time.sleep(0.05)
        return super()._admit(db, *what)


class ChargesRefusals(SqliteBackend):
    def _decide(self, db, ask):
        self._admit(db, ask, ask.cost_nanousd, [])
        return super()._decide(db, ask)


class RenewsMarkers(SqliteBackend):
    def _under_marker(self, db, ask):
        db.execute("UPDATE markers SET until_us = until_us + 1000000")
        return super()._under_marker(db, ask)


class BooksIntoThePresent(SqliteBackend):
    def _end_key(self, db, reservation, *end):
        db.execute("UPDATE reservations SET made_us = ? WHERE state = 'settled'", (self._clock.now_us(),))
        super()._end_key(db, reservation, *end)


class ForgetsEnds(SqliteBackend):
    def _record(self, db, reservation_id):
        row = super()._record(db, reservation_id)
        return row if row and row["state"] == "pending" else None


class ReportsExpiredTwice(SqliteBackend):
    def _report_expired(self, db, own_id):
        db.execute("UPDATE reservations SET is_reported = 0")
        return super()._report_expired(db, own_id)


class EnforcesShadows(SqliteBackend):
    def _use(self, db, budget, at_us):
        return super()._use(db, budget._replace(is_shadow=False), at_us)


class TellsTheLast(SqliteBackend):
    def _refusal(self, ask, uses, cost):
        return super()._refusal(ask, uses[::-1], cost)


class TakesTheBudgetsOfToday(SqliteBackend):
    def _charged(self, db, ask, row):
        return ask.budgets


class KeepsTheLimitsOfThen(SqliteBackend):
    def extend(self, reservation, to_nanousd, budgets, **least):
        return super().extend(reservation, to_nanousd, reservation.budgets, **least)


class IgnoresShares(SqliteBackend):
    def _use(self, db, budget, at_us):
        return super()._use(db, budget._replace(share=None), at_us)


class SharesTheWhole(SqliteBackend):
    """A share of the limit, whatever others have had."""

    def _use(self, db, budget, at_us):
        use = super()._use(db, budget, at_us)
        return use._replace(rows=[]) if budget.name == "all_hour" else use


class MarksWithoutBeingAsked(SqliteBackend):
    def _refusal(self, ask, uses, cost):
        return replace(super()._refusal(ask, uses, cost), marker_seconds=1)


SHARES = (
    "each_network_has_exactly_its_share_of_what_the_others_leave",
    "what_a_share_refuses_waits_for_the_end_of_the_period",
    "a_share_that_only_pending_money_fills_is_busy",
    "what_is_more_than_a_whole_share_can_never_fit",
    "the_last_of_a_share_is_set_aside_where_that_will_do",
    "a_share_is_named_before_what_is_shared_and_after_what_stands_before_that",
    "an_extension_has_no_more_than_the_share_of_today",
)


@pytest.mark.parametrize(
    ("backend", "case"),
    [
        (WithoutTransaction, "callers_at_once_are_admitted_exactly_as_many_as_fit"),
        (WithoutTransaction, "of_callers_at_once_with_one_key_one_is_admitted"),
        (ChargesRefusals, "a_refused_request_changes_nothing_but_the_marker"),
        (RenewsMarkers, "no_refusal_renews_the_marker"),
        (BooksIntoThePresent, "a_settlement_lands_in_the_periods_of_its_reservation"),
        (ForgetsEnds, "a_second_settlement_gets_the_first_answer_and_changes_nothing"),
        (ReportsExpiredTwice, "expired_amounts_are_reported_once"),
        (EnforcesShadows, "a_shadow_budget_is_booked_and_named_and_refuses_nothing"),
        (TellsTheLast, "budgets_are_checked_in_the_order_in_which_they_were_asked"),
        (TakesTheBudgetsOfToday, "an_id_sent_again_is_charged_to_what_it_was_charged_to"),
        (KeepsTheLimitsOfThen, "an_extension_is_held_by_the_limits_of_today_of_what_it_is_charged_to"),
        *((IgnoresShares, case) for case in SHARES),
        (SharesTheWhole, "each_network_has_exactly_its_share_of_what_the_others_leave"),
        (MarksWithoutBeingAsked, "a_further_budget_of_any_scope_and_period_admits_exactly_up_to_its_limit"),
    ],
)
def test_a_planted_fault_is_noticed(tmp_path, backend, case):
    for number, (its_class, notices) in enumerate([(SqliteBackend, False), (backend, True)]):
        suite = Behaviour()
        suite.harness = SqliteHarness(tmp_path / f"{number}.db", its_class)
        noticed = False
        try:
            getattr(suite, f"test_{case}")()
        except AssertionError:
            noticed = True
        assert noticed is notices, its_class
