"""A backend on SQLite, written from `backends.contract` and `backends.budgets`: a row a reservation, sums when asked.

It shows that the suite `Behaviour` is blind to keys: here are no buckets, TTLs or scripts, and windows are exact.
"""

# ruff: noqa: S608 (what is put into the SQL stands in this file)

import hashlib
import sqlite3
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import datetime, time, timedelta
from math import inf
from typing import NamedTuple
from zoneinfo import ZoneInfo

from backends import (
    Books,
    Budget,
    BudgetUse,
    Calendar,
    Duplicate,
    DuplicateState,
    Forever,
    Marker,
    Outcome,
    Reason,
    Refusal,
    Reservation,
    Scope,
    Settlement,
    Sliding,
)
from backends.budgets import check, share_limit, shares_in, whole_limits
from backends.conformance.harness import START_US, ManualClock
from backends.errors import ReservationConflict

US, HOUR_US, DAY_US = 1_000_000, 3_600_000_000, 86_400_000_000
SCHEMA = """
CREATE TABLE reservations (
    n INTEGER PRIMARY KEY, id, nanousd, digest, made_us, pending_until_us, state, known_until_us,
    is_reported DEFAULT 0);
CREATE TABLE charges (n, book, window_s);
CREATE TABLE keys (digest PRIMARY KEY, body, id, nanousd, state, pending_until_us, kept_until_us);
CREATE TABLE markers (identifier PRIMARY KEY, reason, budget, until_us, ends_us, busy);
"""
REASONS = {
    "day": Reason.DAILY_LIMIT,
    "window": Reason.WINDOW_LIMIT,
    "network_window": Reason.NETWORK_LIMIT,
    "network_day": Reason.NETWORK_DAILY_LIMIT,
    "global_hour": Reason.GLOBAL_HOURLY_LIMIT,
    "global_day": Reason.GLOBAL_DAILY_LIMIT,
}


def reason_of(budget):
    return REASONS.get(budget.name, Reason.BUDGET_LIMIT)


def span_us(period, at_us):
    """From when to when a period lasts that holds a moment."""
    if not isinstance(period, Calendar):
        return 0, inf
    zone = ZoneInfo(period.zone)
    now = datetime.fromtimestamp(at_us // US, zone)
    if period.unit == "hour":
        start_us = int(now.replace(minute=0, second=0).timestamp()) * US
        return start_us, start_us + HOUR_US
    day = now.date()
    first = {"day": day, "week": day - timedelta(days=day.weekday()), "month": day.replace(day=1)}[period.unit]
    after = {
        "day": first + timedelta(days=1),
        "week": first + timedelta(days=7),
        "month": (first + timedelta(days=31)).replace(day=1),
    }[period.unit]
    return tuple(int(datetime.combine(midnight, time(), zone).timestamp()) * US for midnight in (first, after))


def book_of(budget, at_us):
    """What names the sum that a budget is: a built-in window is the same one whatever its length."""
    word = "" if budget.name in REASONS else budget.period.word
    return f"{budget.name} {word} {budget.owner} {span_us(budget.period, at_us)[0]}"


class Use(NamedTuple):
    """What is booked in a budget."""

    budget: Budget
    rows: list
    """Its reservations, the oldest first."""
    ends_us: float
    """When all of it is over at once; infinite for what never is, and for a window."""

    def spent(self):
        return sum(row["nanousd"] for row in self.rows)

    def room(self):
        limit = self.budget.limit_nanousd
        return inf if limit is None or self.budget.is_shadow else limit - self.spent()

    def is_over(self, nanousd):
        """Whether a shadow budget has no room for so much more."""
        return self.budget.is_shadow and self._replace(budget=self.budget._replace(is_shadow=False)).room() < nanousd

    def settled(self, now_us):
        """The same without what is pending."""
        return self._replace(rows=[row for row in self.rows if not is_pending(row, now_us)])

    def said(self):
        """What a refusal by it says: reason, cause, scope, budget."""
        return reason_of(self.budget), reason_of(self.budget), self.budget.scope, self.budget.name

    def fits_at_us(self, cost):
        room = self.room()
        for row in self.rows:
            room += row["nanousd"]
            if isinstance(self.budget.period, Sliding) and room >= cost:
                return row["made_us"] + self.budget.period.seconds * US
        return self.ends_us

    def renews_at_seconds(self, empty_us=None):
        """Of an empty window it is that of an amount which is booked then."""
        if isinstance(self.budget.period, Sliding):
            oldest_us = self.rows[0]["made_us"] if self.rows else empty_us
            return None if oldest_us is None else seconds_until(oldest_us, 0) + self.budget.period.seconds
        is_never = isinstance(self.budget.period, Forever) or (empty_us is None and not self.rows)
        return None if is_never else self.ends_us // US


class Part(NamedTuple):
    """What one network has of a budget that all share."""

    own: Use
    whole: Use

    @property
    def budget(self):
        return self.own.budget._replace(limit_nanousd=None, throttle_seconds=0)

    def room(self):
        return share_limit(self.own.budget.share, *self._amounts()) - self.own.spent()

    def _amounts(self):
        return self.whole.budget.limit_nanousd, self.whole.spent(), self.own.spent()

    def settled(self, now_us):
        return Part(self.own.settled(now_us), self.whole.settled(now_us))

    def said(self):
        return Reason.NETWORK_SHARE, Reason.NETWORK_SHARE, Scope.NETWORK, self.own.budget.share.of

    def fits_at_us(self, cost):
        return self.own.ends_us


def bounds_of(uses):
    """All that may refuse, in order: the shares come before the first budget that is shared."""
    shares = shares_in([use.budget for use in uses])
    first_at = min((shared.whole_at for shared in shares), default=0)
    parts = [Part(uses[shared.part_at], uses[shared.whole_at]) for shared in shares]
    return [*uses[:first_at], *parts, *uses[first_at:]]


def seconds_until(end_us, now_us):
    return -(-(end_us - now_us) // US)


def digest_of(ask):
    owners = {
        (budget.scope, budget.owner) for budget in ask.budgets if budget.scope in {Scope.IDENTIFIER, Scope.NETWORK}
    }
    return hashlib.sha256(repr((sorted(owners), ask.cost_nanousd)).encode()).hexdigest()[:16]


def identifier_of(budgets):
    return next((budget.owner for budget in budgets if budget.scope is Scope.IDENTIFIER), None)


def held_by(budget, today):
    """A budget of a reservation, with the limit and the share that it has today."""
    if today is None:
        return budget._replace(limit_nanousd=None, share=None)
    return budget._replace(limit_nanousd=today.limit_nanousd, share=today.share, is_shadow=today.is_shadow)


def is_pending(row, now_us):
    return row["state"] == "pending" and row["pending_until_us"] > now_us


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
        return db.execute(f"REPLACE INTO {table} ({names}) VALUES (:{names.replace(', ', ', :')})", row).lastrowid

    def _uses(self, db, budgets, at_us):
        """What is booked now for what is or was reserved at `at_us`."""
        return [self._use(db, budget, at_us) for budget in budgets]

    def _use(self, db, budget, at_us):
        begin = self._clock.now_us() - budget.period.seconds * US + 1 if isinstance(budget.period, Sliding) else 0
        where = "n IN (SELECT n FROM charges WHERE book = :book) AND made_us >= :begin AND nanousd > 0"
        rows = self._rows(db, where, book=book_of(budget, at_us), begin=begin)
        return Use(budget, rows, span_us(budget.period, at_us)[1])

    def books(self, budgets):
        with self._transaction() as db:
            now = self._clock.now_us()
            uses = [
                BudgetUse(
                    use.budget,
                    use.spent(),
                    use.spent() - use.settled(now).spent(),
                    use.renews_at_seconds(),
                )
                for use in self._uses(db, budgets, now)
            ]
            return Books(tuple(uses), self._marker(db, identifier_of(budgets)), now)

    def reserve(self, ask):
        check(ask.budgets)
        with self._transaction() as db:
            row = self._record(db, ask.reservation_id)
            if row is not None:
                if (row["digest"], row["state"]) != (digest_of(ask), "pending"):
                    raise ReservationConflict("the reservation id is known")
                return self._reservation(db, ask, row)
            duplicate = ask.idempotency and self._duplicate(db, ask.idempotency)
            return duplicate or self._under_marker(db, ask) or self._decide(db, ask)

    def _decide(self, db, ask):
        now = self._clock.now_us()
        uses = self._uses(db, ask.budgets, now)
        bounds = bounds_of(uses)
        room = min(bound.room() for bound in bounds)
        if room >= ask.cost_nanousd:
            return self._admit(db, ask, ask.cost_nanousd, uses)
        refusal = self._refusal(ask, bounds, ask.cost_nanousd)
        if ask.at_least_nanousd is not None and not refusal.in_flight:
            if room >= ask.at_least_nanousd:
                return self._admit(db, ask, room, uses)
            refusal = self._refusal(ask, bounds, ask.at_least_nanousd)
        if refusal.marker_seconds:
            until, wait = now + refusal.marker_seconds * US, refusal.retry_after_seconds
            ends = None if wait is None else now + wait * US
            values = {"reason": refusal.reason, "budget": refusal.budget, "until_us": until, "ends_us": ends}
            self._insert(db, "markers", identifier=ask.identifier, **values, busy=refusal.in_flight)
        never = any(limit < ask.least_nanousd for limit in whole_limits(ask.budgets))
        return replace(refusal, retry_after_seconds=None, in_flight=False, can_never_fit=True) if never else refusal

    def _refusal(self, ask, bounds, cost):
        full = [bound for bound in bounds if bound.room() < cost]
        first, now = full[0].budget, self._clock.now_us()
        busy = all(each.settled(now).room() >= cost for each in full)
        # What exceeds a whole limit waits for no amount to leave: its marker ends by itself.
        waits = not busy and all(cost <= limit for limit in whole_limits(ask.budgets))
        ends_us = max(each.fits_at_us(cost) for each in full) if waits else now
        marker_seconds = first.throttle_seconds if ask.mark_when_busy or not busy else 0
        wait = max(1, seconds_until(ends_us, now), marker_seconds) if ends_us < inf else None
        return Refusal(*full[0].said(), wait, busy, False, marker_seconds, first.limit_nanousd)

    def _marker(self, db, identifier):
        now = self._clock.now_us()
        row = db.execute("SELECT * FROM markers WHERE identifier = ? AND until_us > ?", (identifier, now)).fetchone()
        if row is None:
            return None
        left = seconds_until(row["until_us"], now)
        wait = None if row["ends_us"] is None else max(left, seconds_until(row["ends_us"], now))
        return Marker(Reason(row["reason"]), row["budget"], left, wait, bool(row["busy"]))

    def _under_marker(self, db, ask):
        marker = self._marker(db, ask.identifier)
        if marker is None:
            return None
        said = (Reason.THROTTLED, marker.cause, Scope.IDENTIFIER, marker.budget)
        return Refusal(*said, marker.retry_after_seconds, marker.in_flight, False, marker.left_seconds, None)

    def _admit(self, db, ask, nanousd, uses):
        now = self._clock.now_us()
        until = now + ask.pending_seconds * US
        self._book(db, ask, nanousd, digest_of(ask), now, until, "pending", until + HOUR_US)
        if ask.idempotency is not None:
            self._remember(db, ask, nanousd, "pending", until)
        made = self._reservation(db, ask, self._record(db, ask.reservation_id))
        over = tuple(use.budget.name for use in uses if use.is_over(nanousd))
        return replace(made, expired_nanousd=self._report_expired(db, ask.reservation_id), over_shadow=over)

    def _book(self, db, request, nanousd, digest, made_us, *values):
        """A row, and what it is charged to."""
        names = ("pending_until_us", "state", "known_until_us")
        row = {"id": request.reservation_id, "nanousd": nanousd, "digest": digest, "made_us": made_us}
        number = self._insert(db, "reservations", **row, **dict(zip(names, values, strict=True)))
        for budget in request.budgets:
            window_s = budget.period.seconds if isinstance(budget.period, Sliding) else None
            self._insert(db, "charges", n=number, book=book_of(budget, made_us), window_s=window_s)

    def _report_expired(self, db, own_id):
        where = "state = 'pending' AND NOT is_reported AND id != :own AND pending_until_us <= :now"
        expired = self._rows(db, where, own=own_id, now=self._clock.now_us())
        db.executemany("UPDATE reservations SET is_reported = 1 WHERE n = ?", [(row["n"],) for row in expired])
        return sum(row["nanousd"] for row in expired)

    def _record(self, db, reservation_id):
        rows = self._rows(db, "id = :id AND known_until_us > :now", id=reservation_id, now=self._clock.now_us())
        return rows[-1] if rows else None

    def _reservation(self, db, ask, row):
        made_us = row["made_us"]
        uses = self._uses(db, self._charged(db, ask, row), made_us)
        budgets, spent = tuple(use.budget for use in uses), tuple(use.spent() for use in uses)
        what = (ask.reservation_id, row["nanousd"], budgets, row["digest"], made_us)
        renews_at = tuple(use.renews_at_seconds(made_us) for use in uses)
        pending_seconds = (row["pending_until_us"] - made_us) // US
        return Reservation(*what, pending_seconds, self.name, spent, renews_at, ask.idempotency)

    def _charged(self, db, ask, row):
        """Those of the budgets of an ask that its reservation is charged to, with the lengths that they had then."""
        found = db.execute("SELECT book, window_s FROM charges WHERE n = ?", (row["n"],))
        lengths = {charge["book"]: charge["window_s"] for charge in found}
        for budget in ask.budgets:
            book = book_of(budget, row["made_us"])
            if book in lengths:
                yield budget if lengths[book] is None else budget._replace(period=Sliding(lengths[book]))

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

    def extend(self, reservation, to_nanousd, budgets, *, at_least_nanousd=None):
        r, today = reservation, {budget.name: budget for budget in budgets}
        with self._transaction() as db:
            row, now = self._record(db, r.reservation_id), self._clock.now_us()
            is_known = row is not None and (row["digest"], row["state"]) == (r.request_digest, "pending")
            windows = [budget.period.seconds for budget in r.budgets if isinstance(budget.period, Sliding)]
            if not is_known or min(row["pending_until_us"], r.made_at_us + min(windows, default=inf) * US) <= now:
                raise ReservationConflict("there is no such pending reservation")
            held, at_least = row["nanousd"], to_nanousd if at_least_nanousd is None else at_least_nanousd
            uses = self._uses(db, [held_by(budget, today.get(budget.name)) for budget in r.budgets], r.made_at_us)
            bounds = bounds_of(uses)
            for each in bounds:
                if each.room() < at_least - held and at_least > held:
                    return Refusal(*each.said(), None, False, False, 0, each.budget.limit_nanousd)
            room = max(0, min(bound.room() for bound in bounds))
            more = min(max(0, to_nanousd - held), room)
            for table in ("reservations", "keys"):
                change = f"UPDATE {table} SET nanousd = ? WHERE id = ? AND state = 'pending'"
                db.execute(change, (held + more, r.reservation_id))
            return replace(r, cost_nanousd=held + more, spent_nanousd=tuple(use.spent() + more for use in uses))

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
                self._book(db, r, actual, r.request_digest, r.made_at_us, now, *end[1:])
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
            for table in ("reservations", "charges", "keys", "markers"):
                db.execute(f"DELETE FROM {table}")

    def close(self):
        self.backend.close()
