"""`Behaviour` can fail: a fault planted in the SQLite backend is noticed by the test named beside it."""

import time

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
        self._admit(db, ask, ask.cost_nanousd)
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
