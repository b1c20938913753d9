"""A backend on SQLite, written from `backends.contract` alone: one row a reservation, every sum computed when it is asked.

It shows that the suite `Behaviour` is blind to keys: no bucket, no TTL, no script; windows are exact.
"""

import hashlib
import sqlite3
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import NamedTuple

from backends import Books, Duplicate, DuplicateState, Marker, Outcome, Reason, Refusal, Reservation, Scope, Settlement
from backends.conformance.harness import ManualClock
from backends.errors import ReservationConflict

US, HOUR_US, DAY_US = 1_000_000, 3_600_000_000, 86_400_000_000
RECORD_US, KEY_US = HOUR_US, DAY_US
SCHEMA = """
CREATE TABLE IF NOT EXISTS reservations (
    n INTEGER PRIMARY KEY, id, identifier, network, nanousd, digest, made_us, window_s, pending_s, state, known_until_us,
    is_reported DEFAULT 0);
CREATE TABLE IF NOT EXISTS keys (digest PRIMARY KEY, body, id, nanousd, state, pending_until_us, kept_until_us);
CREATE TABLE IF NOT EXISTS markers (identifier PRIMARY KEY, cause, until_us, ends_us, busy);
"""
IS_PENDING = "state = 'pending' AND made_us + pending_s * 1000000 > :now"
REASONS = (
    (Reason.DAILY_LIMIT, Scope.IDENTIFIER, "day_nanousd"),
    (Reason.WINDOW_LIMIT, Scope.IDENTIFIER, "window_nanousd"),
    (Reason.NETWORK_LIMIT, Scope.NETWORK, "network_window_nanousd"),
    (Reason.NETWORK_DAILY_LIMIT, Scope.NETWORK, "network_day_nanousd"),
    (Reason.GLOBAL_HOURLY_LIMIT, Scope.GLOBAL, "global_hour_nanousd"),
    (Reason.GLOBAL_DAILY_LIMIT, Scope.GLOBAL, "global_day_nanousd"),
)


class Budget(NamedTuple):
    """One limit, what is spent of it, and what of that is pending."""

    reason: Reason
    scope: Scope
    limit: int
    spent: int
    pending: int
    ends_us: int | None
    """When all of it is over at once; None for a window."""
    amounts: list
    """(made_us, nanousd) of each reservation in it, the oldest first."""

    def refuses(self, cost):
        return self.limit is not None and self.spent + cost > self.limit

    def fits_at_us(self, cost, window_us):
        left = self.spent
        for made_us, nanousd in self.amounts:
            left -= nanousd
            if left + cost <= self.limit:
                return made_us + window_us
        return 0


def seconds_until(end_us, now_us):
    return -(-(end_us - now_us) // US)


def digest_of(ask):
    return hashlib.sha256(repr((ask.identifier, ask.network, ask.cost_nanousd)).encode()).hexdigest()[:16]


class SqliteBackend:
    name = "sqlite"
    promises_atomicity = True
    keeps_our_layout = False
    reserve_script = "sqlite"

    def __init__(self, path, clock):
        self._path, self._clock = path, clock
        with self._transaction() as db:
            db.executescript(SCHEMA)

    def close(self):
        pass

    @contextmanager
    def _transaction(self):
        with closing(sqlite3.connect(self._path, timeout=30, isolation_level=None)) as db:
            db.row_factory = sqlite3.Row
            db.execute("PRAGMA synchronous = OFF")
            self._begin(db)
            yield db
            if db.in_transaction:
                db.commit()

    def _begin(self, db):
        db.execute("BEGIN IMMEDIATE")

    # --- what the books hold

    def _rows(self, db, where, **values):
        return db.execute(f"SELECT * FROM reservations WHERE {where} ORDER BY made_us", values).fetchall()

    def _budgets(self, db, owner, limits, window_s, at_us):
        """The six in their order, for what is or was reserved at `at_us`."""
        now, day, hour = self._clock.now_us(), at_us // DAY_US * DAY_US, at_us // HOUR_US * HOUR_US
        times = ((day, DAY_US), None, None, (day, DAY_US), (hour, HOUR_US), (day, DAY_US))
        owned = {Scope.IDENTIFIER: "identifier = :who", Scope.NETWORK: "network = :net", Scope.GLOBAL: "1"}
        values = {"who": owner.identifier, "net": owner.network, "now": now}
        budgets = []
        for (reason, scope, field), period in zip(REASONS, times, strict=True):
            begin, end = (now - window_s * US + 1, now + 1) if period is None else (period[0], sum(period))
            where = f"{owned[scope]} AND made_us >= {begin} AND made_us < {end}"
            rows = self._rows(db, where, **values)
            pending = self._rows(db, f"{where} AND {IS_PENDING}", **values)
            spent, held = (sum(row["nanousd"] for row in some) for some in (rows, pending))
            amounts = [(row["made_us"], row["nanousd"]) for row in rows if row["nanousd"]]
            limit = getattr(limits, field) if limits else None
            budgets.append(Budget(reason, scope, limit, spent, held, None if period is None else end, amounts))
        return budgets

    def books(self, identifier, network, window_seconds):
        with self._transaction() as db:
            now = self._clock.now_us()
            owner = Reservation("", identifier, network, 0, "", now, window_seconds, 0, self.name, 0, 0, 0)
            day, window, net_window, net_day, hour, all_day = self._budgets(db, owner, None, window_seconds, now)
            pending = self._rows(db, f"identifier = :who AND {IS_PENDING}", who=identifier, now=now)
            marker = self._marker(db, identifier)
            return Books(
                *(budget.spent for budget in (window, day, net_window, net_day, hour, all_day)),
                sum(row["nanousd"] for row in pending),
                sum(row["nanousd"] for row in pending if row["made_us"] >= now // DAY_US * DAY_US),
                self._frees_at(window, window_seconds) if window.amounts else None,
                marker,
                now,
            )

    def _frees_at(self, window, window_s):
        return seconds_until(window.amounts[0][0] if window.amounts else self._clock.now_us(), 0) + window_s

    # --- reserving

    def reserve(self, ask):
        with self._transaction() as db:
            row = self._record(db, ask.reservation_id)
            if row is not None:
                if row["digest"] != digest_of(ask) or row["state"] != "pending":
                    raise ReservationConflict("the reservation id is known")
                return self._reservation(db, ask, row)
            duplicate = ask.idempotency and self._duplicate(db, ask.idempotency)
            return duplicate or self._under_marker(db, ask) or self._decide(db, ask)

    def _decide(self, db, ask):
        budgets = self._budgets(db, ask, ask.limits, ask.limits.window_seconds, self._clock.now_us())
        limited = [budget for budget in budgets if budget.limit is not None]
        refusal = self._refusal(ask, limited, ask.cost_nanousd)
        if refusal is None:
            return self._admit(db, ask, ask.cost_nanousd)
        if ask.at_least_nanousd is not None and not refusal.in_flight:
            room = min(budget.limit - budget.spent for budget in limited)
            if room >= ask.at_least_nanousd:
                return self._admit(db, ask, room)
            refusal = self._refusal(ask, limited, ask.at_least_nanousd)
        self._set_marker(db, ask, refusal)
        never = any(ask.least_nanousd > budget.limit for budget in limited)
        return replace(refusal, retry_after_seconds=None, in_flight=False, can_never_fit=True) if never else refusal

    def _refusal(self, ask, budgets, cost):
        full = [budget for budget in budgets if budget.refuses(cost)]
        if not full:
            return None
        first, now, window_us = full[0], self._clock.now_us(), ask.limits.window_seconds * US
        busy = all(budget.spent - budget.pending + cost <= budget.limit for budget in full)
        ends_us = max(budget.ends_us or budget.fits_at_us(cost, window_us) for budget in full)
        # What exceeds a whole limit waits for no amount to leave: its marker ends by itself.
        waits = not busy and all(cost <= budget.limit for budget in budgets)
        seconds = max(1, seconds_until(ends_us, now)) if waits else 1
        marks = first.scope is Scope.IDENTIFIER and (ask.limits.mark_when_busy or not busy)
        marker_seconds = ask.limits.throttle_seconds * (1 + (first.reason is Reason.DAILY_LIMIT)) if marks else 0
        wait = max(seconds, marker_seconds)
        return Refusal(first.reason, first.reason, first.scope, wait, busy, False, marker_seconds, first.limit)

    def _set_marker(self, db, ask, refusal):
        if refusal.marker_seconds:
            now = self._clock.now_us()
            until, ends = now + refusal.marker_seconds * US, now + refusal.retry_after_seconds * US
            row = (ask.identifier, refusal.reason, until, ends, refusal.in_flight)
            db.execute("REPLACE INTO markers VALUES (?, ?, ?, ?, ?)", row)

    def _marker(self, db, identifier):
        now = self._clock.now_us()
        row = db.execute("SELECT * FROM markers WHERE identifier = ? AND until_us > ?", (identifier, now)).fetchone()
        if row is None:
            return None
        left = seconds_until(row["until_us"], now)
        return Marker(Reason(row["cause"]), left, max(left, seconds_until(row["ends_us"], now)), bool(row["busy"]))

    def _under_marker(self, db, ask):
        marker = self._marker(db, ask.identifier)
        if marker is None:
            return None
        wait, busy = marker.retry_after_seconds, marker.in_flight
        return Refusal(Reason.THROTTLED, marker.cause, Scope.IDENTIFIER, wait, busy, False, marker.left_seconds, None)

    def _admit(self, db, ask, nanousd):
        now = self._clock.now_us()
        window_s, pending_s = ask.limits.window_seconds, ask.pending_seconds
        until = now + pending_s * US
        self._insert(db, ask, nanousd, digest_of(ask), now, window_s, pending_s, "pending", until + RECORD_US)
        if ask.idempotency is not None:
            self._remember(db, ask, nanousd, "pending", until)
        made = self._reservation(db, ask, self._record(db, ask.reservation_id))
        return replace(made, expired_nanousd=self._report_expired(db, ask.reservation_id))

    def _insert(self, db, who, *values):
        columns = "id, identifier, network, nanousd, digest, made_us, window_s, pending_s, state, known_until_us"
        row = (who.reservation_id, who.identifier, who.network, *values)
        db.execute(f"INSERT INTO reservations ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    def _report_expired(self, db, own_id):
        where = f"state = 'pending' AND NOT is_reported AND id != :own AND NOT ({IS_PENDING})"
        expired = self._rows(db, where, own=own_id, now=self._clock.now_us())
        db.executemany("UPDATE reservations SET is_reported = 1 WHERE n = ?", [(row["n"],) for row in expired])
        return sum(row["nanousd"] for row in expired)

    # --- what is known already

    def _record(self, db, reservation_id):
        rows = self._rows(db, "id = :id AND known_until_us > :now", id=reservation_id, now=self._clock.now_us())
        return rows[-1] if rows else None

    def _reservation(self, db, ask, row):
        window_s, made = row["window_s"], row["made_us"]
        day, window, *_ = self._budgets(db, ask, None, window_s, made)
        names = (ask.reservation_id, ask.identifier, ask.network, row["nanousd"], row["digest"], made)
        spent = (window.spent, day.spent, self._frees_at(window, window_s))
        return Reservation(*names, window_s, row["pending_s"], self.name, *spent, ask.idempotency)

    def find(self, ask):
        with self._transaction() as db:
            row = self._record(db, ask.reservation_id)
            is_it = row is not None and (row["digest"], row["state"]) == (digest_of(ask), "pending")
            return self._reservation(db, ask, row) if is_it else None

    def find_duplicate(self, idempotency):
        with self._transaction() as db:
            return self._duplicate(db, idempotency)

    def _key(self, db, idempotency):
        values = (idempotency.digest, self._clock.now_us())
        return db.execute("SELECT * FROM keys WHERE digest = ? AND kept_until_us > ?", values).fetchone()

    def _duplicate(self, db, idempotency):
        row = self._key(db, idempotency)
        if row is None:
            return None
        is_late = row["pending_until_us"] <= self._clock.now_us()
        late = DuplicateState.EXPIRED if is_late else DuplicateState.IN_FLIGHT
        state = DuplicateState.SETTLED if row["state"] == "settled" else late
        return Duplicate(row["id"], state, row["nanousd"], row["body"] == idempotency.body_digest)

    def _remember(self, db, who, nanousd, state, until_us):
        key, now = who.idempotency, self._clock.now_us()
        row = (key.digest, key.body_digest, who.reservation_id, nanousd, state, until_us, now + KEY_US)
        db.execute("REPLACE INTO keys VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    # --- extending and ending

    def extend(self, reservation, to_nanousd, limits, *, at_least_nanousd=None):
        with self._transaction() as db:
            row, made = self._record(db, reservation.reservation_id), reservation.made_at_us
            over_us = made + min(reservation.pending_seconds, reservation.window_seconds) * US
            is_known = row is not None and row["digest"] == reservation.request_digest and row["state"] == "pending"
            if not is_known or over_us <= self._clock.now_us():
                raise ReservationConflict("there is no such pending reservation")
            held, at_least = row["nanousd"], to_nanousd if at_least_nanousd is None else at_least_nanousd
            more = max(0, to_nanousd - held)
            for budget in self._budgets(db, reservation, limits, reservation.window_seconds, made):
                if budget.refuses(at_least - held) and at_least > held:
                    return Refusal(budget.reason, budget.reason, budget.scope, None, False, False, 0, budget.limit)
                more = more if budget.limit is None else min(more, max(0, budget.limit - budget.spent))
            db.execute("UPDATE reservations SET nanousd = ? WHERE n = ?", (held + more, row["n"]))
            db.execute("UPDATE keys SET nanousd = ? WHERE id = ?", (held + more, reservation.reservation_id))
            day, window, *_ = self._budgets(db, reservation, None, reservation.window_seconds, made)
            held += more
            return replace(
                reservation, cost_nanousd=held, window_spent_nanousd=window.spent, day_spent_nanousd=day.spent
            )

    def settle(self, reservation, actual_nanousd):
        return self._end(reservation, "settled", actual_nanousd)

    def release(self, reservation):
        return self._end(reservation, "released", 0)

    def _end(self, reservation, state, actual):
        rid, now = reservation.reservation_id, self._clock.now_us()
        overrun = max(0, actual - reservation.cost_nanousd)
        with self._transaction() as db:
            row = self._record(db, rid)
            if row is None and now >= reservation.made_at_us + RECORD_US:
                return Settlement(rid, Outcome.EXPIRED, reservation.cost_nanousd, 0)
            if row is not None and row["digest"] != reservation.request_digest:
                raise ReservationConflict("the reservation id stands for another request")
            if row is not None and row["state"] != "pending":
                return Settlement(rid, Outcome.REPEATED, row["nanousd"], 0)
            outcome = Outcome.LATE if row is None else Outcome(state)
            self._book(db, reservation, row, actual, state)
            return Settlement(rid, outcome, actual, overrun, self._report_expired(db, rid))

    def _book(self, db, reservation, row, actual, state):
        until, r = self._clock.now_us() + RECORD_US, reservation
        if row is None:
            periods = (r.made_at_us, r.window_seconds, r.pending_seconds)
            self._insert(db, r, actual, r.request_digest, *periods, state, until)
        else:
            change = "UPDATE reservations SET nanousd = ?, state = ?, known_until_us = ? WHERE n = ?"
            db.execute(change, (actual, state, until, row["n"]))
        key = r.idempotency and self._key(db, r.idempotency)
        is_own = key is not None and key["id"] == r.reservation_id
        if r.idempotency and state == "settled" and (key is None or is_own):
            self._remember(db, r, actual, state, 0)
        elif is_own:
            db.execute("DELETE FROM keys WHERE id = ?", (r.reservation_id,))


class SqliteHarness:
    """A `backends.conformance.harness.Harness`: with exact times in the rows, to pass time is to move the clock."""

    def __init__(self, path, backend=SqliteBackend):
        self.clock = ManualClock()
        self.backend = backend(path, self.clock)

    def pass_time(self, us):
        self.clock.us += us

    def clear(self):
        self.clock.us = ManualClock().us
        with self.backend._transaction() as db:
            for table in ("reservations", "keys", "markers"):
                db.execute(f"DELETE FROM {table}")

    def close(self):
        self.backend.close()
