"""A backend on SQLite, written from `backends.contract` alone: one row a reservation; sums are computed when asked for.

It shows that the suite `Behaviour` is blind to keys: here are no buckets, TTLs or scripts, and windows are exact.
"""

# ruff: noqa: S608 (what is put into the SQL stands in this file)

import hashlib
import sqlite3
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import NamedTuple

from backends import Books, Duplicate, DuplicateState, Marker, Outcome, Reason, Refusal, Reservation, Scope, Settlement
from backends.conformance.harness import START_US, ManualClock
from backends.errors import ReservationConflict

US, HOUR_US, DAY_US = 1_000_000, 3_600_000_000, 86_400_000_000
SCHEMA = """
CREATE TABLE reservations (
    n INTEGER PRIMARY KEY, id, identifier, network, nanousd, digest, made_us, window_s, pending_until_us, state,
    known_until_us, is_reported DEFAULT 0);
CREATE TABLE keys (digest PRIMARY KEY, body, id, nanousd, state, pending_until_us, kept_until_us);
CREATE TABLE markers (identifier PRIMARY KEY, cause, until_us, ends_us, busy);
"""
BUDGETS = (
    (Reason.DAILY_LIMIT, Scope.IDENTIFIER, "day_nanousd", DAY_US),
    (Reason.WINDOW_LIMIT, Scope.IDENTIFIER, "window_nanousd", None),
    (Reason.NETWORK_LIMIT, Scope.NETWORK, "network_window_nanousd", None),
    (Reason.NETWORK_DAILY_LIMIT, Scope.NETWORK, "network_day_nanousd", DAY_US),
    (Reason.GLOBAL_HOURLY_LIMIT, Scope.GLOBAL, "global_hour_nanousd", HOUR_US),
    (Reason.GLOBAL_DAILY_LIMIT, Scope.GLOBAL, "global_day_nanousd", DAY_US),
)
OWNED = {Scope.IDENTIFIER: "identifier = :identifier", Scope.NETWORK: "network = :network", Scope.GLOBAL: "1"}


class Budget(NamedTuple):
    reason: Reason
    scope: Scope
    limit: int | None
    rows: list
    """Its reservations, the oldest first."""
    ends_us: int | None
    """When all of it is over at once; None for a window."""

    def spent(self):
        return sum(row["nanousd"] for row in self.rows)

    def room(self):
        return float("inf") if self.limit is None else self.limit - self.spent()

    def fits_at_us(self, cost, window_us):
        room = self.room()
        for row in self.rows:
            room += row["nanousd"]
            if self.ends_us is None and room >= cost:
                return row["made_us"] + window_us
        return self.ends_us or 0


def seconds_until(end_us, now_us):
    return -(-(end_us - now_us) // US)


def digest_of(ask):
    return hashlib.sha256(repr((ask.identifier, ask.network, ask.cost_nanousd)).encode()).hexdigest()[:16]


def pending(rows, now_us):
    return [row for row in rows if row["state"] == "pending" and row["pending_until_us"] > now_us]


class SqliteBackend:
    name = reserve_script = "sqlite"
    promises_atomicity = True
    keeps_our_layout = False

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

    def _rows(self, db, where, **values):
        return db.execute(f"SELECT * FROM reservations WHERE {where} ORDER BY made_us", values).fetchall()

    def _insert(self, db, table, **row):
        names = ", ".join(row)
        db.execute(f"REPLACE INTO {table} ({names}) VALUES (:{names.replace(', ', ', :')})", row)

    def _budgets(self, db, identifier, network, limits, window_s, at_us):
        """The six in their order, for what is or was reserved at `at_us`."""
        budgets, now = [], self._clock.now_us()
        for reason, scope, field, period_us in BUDGETS:
            begin, end = now - window_s * US + 1, now + 1
            if period_us is not None:
                begin = at_us // period_us * period_us
                end = begin + period_us
            where = f"{OWNED[scope]} AND made_us >= {begin} AND made_us < {end} AND nanousd > 0"
            rows = self._rows(db, where, identifier=identifier, network=network)
            limit = getattr(limits, field) if limits else None
            budgets.append(Budget(reason, scope, limit, rows, end if period_us else None))
        return budgets

    def books(self, identifier, network, window_seconds):
        with self._transaction() as db:
            now = self._clock.now_us()
            day, window, net_window, net_day, hour, all_day = self._budgets(
                db, identifier, network, None, window_seconds, now
            )
            held = pending(self._rows(db, OWNED[Scope.IDENTIFIER], identifier=identifier), now)
            return Books(
                *(budget.spent() for budget in (window, day, net_window, net_day, hour, all_day)),
                sum(row["nanousd"] for row in held),
                sum(row["nanousd"] for row in held if row["made_us"] >= now // DAY_US * DAY_US),
                seconds_until(window.rows[0]["made_us"], 0) + window_seconds if window.rows else None,
                self._marker(db, identifier),
                now,
            )

    def reserve(self, ask):
        with self._transaction() as db:
            row = self._record(db, ask.reservation_id)
            if row is not None:
                if (row["digest"], row["state"]) != (digest_of(ask), "pending"):
                    raise ReservationConflict("the reservation id is known")
                return self._reservation(db, ask, row)
            duplicate = ask.idempotency and self._duplicate(db, ask.idempotency)
            return duplicate or self._under_marker(db, ask) or self._decide(db, ask)

    def _decide(self, db, ask):
        window_s, now = ask.limits.window_seconds, self._clock.now_us()
        budgets = self._budgets(db, ask.identifier, ask.network, ask.limits, window_s, now)
        room = min(budget.room() for budget in budgets)
        if room >= ask.cost_nanousd:
            return self._admit(db, ask, ask.cost_nanousd)
        refusal = self._refusal(ask, budgets, ask.cost_nanousd)
        if ask.at_least_nanousd is not None and not refusal.in_flight:
            if room >= ask.at_least_nanousd:
                return self._admit(db, ask, room)
            refusal = self._refusal(ask, budgets, ask.at_least_nanousd)
        if refusal.marker_seconds:
            until, ends = now + refusal.marker_seconds * US, now + refusal.retry_after_seconds * US
            values = {"cause": refusal.reason, "until_us": until, "ends_us": ends, "busy": refusal.in_flight}
            self._insert(db, "markers", identifier=ask.identifier, **values)
        never = any(budget.limit is not None and ask.least_nanousd > budget.limit for budget in budgets)
        return replace(refusal, retry_after_seconds=None, in_flight=False, can_never_fit=True) if never else refusal

    def _refusal(self, ask, budgets, cost):
        full = [budget for budget in budgets if budget.room() < cost]
        first, limits, now = full[0], ask.limits, self._clock.now_us()
        busy = all(each.room() + sum(row["nanousd"] for row in pending(each.rows, now)) >= cost for each in full)
        # What exceeds a whole limit waits for no amount to leave: its marker ends by itself.
        waits = not busy and all(each.limit is None or cost <= each.limit for each in budgets)
        ends_us = max(each.fits_at_us(cost, limits.window_seconds * US) for each in full) if waits else now
        marks = first.scope is Scope.IDENTIFIER and (limits.mark_when_busy or not busy)
        marker_seconds = limits.throttle_seconds * (2 if first.reason is Reason.DAILY_LIMIT else 1) if marks else 0
        wait = max(1, seconds_until(ends_us, now), marker_seconds)
        return Refusal(first.reason, first.reason, first.scope, wait, busy, False, marker_seconds, first.limit)

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
        wait, busy, left = marker.retry_after_seconds, marker.in_flight, marker.left_seconds
        return Refusal(Reason.THROTTLED, marker.cause, Scope.IDENTIFIER, wait, busy, False, left, None)

    def _admit(self, db, ask, nanousd):
        now = self._clock.now_us()
        until = now + ask.pending_seconds * US
        self._book(db, ask, nanousd, digest_of(ask), now, ask.limits.window_seconds, until, "pending", until + HOUR_US)
        if ask.idempotency is not None:
            self._remember(db, ask, nanousd, "pending", until)
        made = self._reservation(db, ask, self._record(db, ask.reservation_id))
        return replace(made, expired_nanousd=self._report_expired(db, ask.reservation_id))

    def _book(self, db, request, *values):
        names = ("nanousd", "digest", "made_us", "window_s", "pending_until_us", "state", "known_until_us")
        owner = {"id": request.reservation_id, "identifier": request.identifier, "network": request.network}
        self._insert(db, "reservations", **owner, **dict(zip(names, values, strict=True)))

    def _report_expired(self, db, own_id):
        where = "state = 'pending' AND NOT is_reported AND id != :own AND pending_until_us <= :now"
        expired = self._rows(db, where, own=own_id, now=self._clock.now_us())
        db.executemany("UPDATE reservations SET is_reported = 1 WHERE n = ?", [(row["n"],) for row in expired])
        return sum(row["nanousd"] for row in expired)

    def _record(self, db, reservation_id):
        rows = self._rows(db, "id = :id AND known_until_us > :now", id=reservation_id, now=self._clock.now_us())
        return rows[-1] if rows else None

    def _reservation(self, db, ask, row):
        window_s, made_us = row["window_s"], row["made_us"]
        day, window, *_ = self._budgets(db, ask.identifier, ask.network, None, window_s, made_us)
        frees_at = seconds_until(window.rows[0]["made_us"] if window.rows else made_us, 0) + window_s
        what = (ask.reservation_id, ask.identifier, ask.network, row["nanousd"], row["digest"], made_us)
        lengths = (window_s, (row["pending_until_us"] - made_us) // US)
        return Reservation(*what, *lengths, self.name, window.spent(), day.spent(), frees_at, ask.idempotency)

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

    def _remember(self, db, request, nanousd, state, until_us):
        key, kept = request.idempotency, self._clock.now_us() + DAY_US
        values = {"body": key.body_digest, "id": request.reservation_id, "nanousd": nanousd, "state": state}
        self._insert(db, "keys", digest=key.digest, **values, pending_until_us=until_us, kept_until_us=kept)

    def extend(self, reservation, to_nanousd, limits, *, at_least_nanousd=None):
        r = reservation
        with self._transaction() as db:
            row, now = self._record(db, r.reservation_id), self._clock.now_us()
            is_known = row is not None and (row["digest"], row["state"]) == (r.request_digest, "pending")
            if not is_known or min(row["pending_until_us"], r.made_at_us + r.window_seconds * US) <= now:
                raise ReservationConflict("there is no such pending reservation")
            held, at_least = row["nanousd"], to_nanousd if at_least_nanousd is None else at_least_nanousd
            budgets = self._budgets(db, r.identifier, r.network, limits, r.window_seconds, r.made_at_us)
            for each in budgets:
                if each.room() < at_least - held and at_least > held:
                    return Refusal(each.reason, each.reason, each.scope, None, False, False, 0, each.limit)
            room = max(0, min(budget.room() for budget in budgets))
            more = min(max(0, to_nanousd - held), room)
            for table in ("reservations", "keys"):
                change = f"UPDATE {table} SET nanousd = ? WHERE id = ? AND state = 'pending'"
                db.execute(change, (held + more, r.reservation_id))
            day, window, *_ = (budget.spent() + more for budget in budgets)
            return replace(r, cost_nanousd=held + more, window_spent_nanousd=window, day_spent_nanousd=day)

    def settle(self, reservation, actual_nanousd):
        return self._end(reservation, "settled", actual_nanousd)

    def release(self, reservation):
        return self._end(reservation, "released", 0)

    def _end(self, reservation, state, actual):
        r, rid, now = reservation, reservation.reservation_id, self._clock.now_us()
        with self._transaction() as db:
            row = self._record(db, rid)
            if row is None and now >= r.made_at_us + HOUR_US:
                return Settlement(rid, Outcome.EXPIRED, r.cost_nanousd, 0)
            if row is not None and row["digest"] != r.request_digest:
                raise ReservationConflict("the reservation id stands for another request")
            if row is not None and row["state"] != "pending":
                return Settlement(rid, Outcome.REPEATED, row["nanousd"], 0)
            end = (actual, state, now + HOUR_US)
            if row is None:
                self._book(db, r, actual, r.request_digest, r.made_at_us, r.window_seconds, now, *end[1:])
            else:
                change = "UPDATE reservations SET nanousd = ?, state = ?, known_until_us = ? WHERE n = ?"
                db.execute(change, (*end, row["n"]))
            self._end_key(db, r, state, actual)
            outcome = Outcome.LATE if row is None else Outcome(state)
            return Settlement(rid, outcome, actual, max(0, actual - r.cost_nanousd), self._report_expired(db, rid))

    def _end_key(self, db, reservation, state, actual):
        key = reservation.idempotency and self._key(db, reservation.idempotency)
        is_own = key is not None and key["id"] == reservation.reservation_id
        if reservation.idempotency and state == "settled" and (key is None or is_own):
            self._remember(db, reservation, actual, state, 0)
        elif is_own:
            db.execute("DELETE FROM keys WHERE id = ?", (reservation.reservation_id,))


class SqliteHarness:
    """A `Harness`: the rows hold exact times, so that passing time is moving the clock."""

    def __init__(self, path, backend=SqliteBackend):
        self.clock = ManualClock()
        self.backend = backend(path, self.clock)

    def pass_time(self, us):
        self.clock.us += us

    def clear(self):
        self.clock.us = START_US
        with self.backend._transaction() as db:
            for table in ("reservations", "keys", "markers"):
                db.execute(f"DELETE FROM {table}")

    def close(self):
        self.backend.close()
