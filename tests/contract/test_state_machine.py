"""Everything that may happen, in any order, beside a model that keeps a plain list and adds it up.

The model knows no rings, no totals and no keys: each question is answered by going through all reservations that there
ever were. After each step the answers, every total that is stored, and the money invariants (I1 to I8) must agree.

`STATE_MACHINE_EXAMPLES=2000 pytest tests/contract/test_state_machine.py` runs it for longer than the suite does.
"""

import math
import os
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from backends.conformance.cases import BUCKET_SECONDS, PENDING_BUCKET_SECONDS, PENDING_SECONDS, US, WINDOW_SECONDS
from backends.conformance.harness import MemoryHarness, RedisHarness
from backends.contract import (
    Ask,
    Duplicate,
    DuplicateState,
    Idempotency,
    Limits,
    Outcome,
    Reason,
    Refusal,
    Reservation,
    Scope,
)
from backends.errors import ReservationConflict
from backends.keys import IDEMPOTENCY_KEEP_SECONDS, PENDING_BUCKETS, RECORD_KEEP_SECONDS, WINDOW_BUCKETS, book_keys

EXAMPLES = int(os.environ.get("STATE_MACHINE_EXAMPLES", "30"))
HOUR_US, DAY_US = 3_600 * US, 86_400 * US
OFTEN = 30
PICKS = st.integers(0, OFTEN + 7)
"""Mostly one of those that are open."""
WHO, NETWORKS, KEYS = ("a", "b"), ("n1", "n2"), ("k1", "k2")
AMOUNTS = st.sampled_from([1, 50, 333, 333, 700, 999, 1_000, 1_001, 2_500])
HALVES = st.integers(1, 60).map(lambda halves: halves / 2)
PAUSES_S = st.one_of(
    *[HALVES] * 6,
    *[st.sampled_from([20, 60, PENDING_SECONDS, PENDING_SECONDS + PENDING_BUCKET_SECONDS])] * 3,
    st.sampled_from([WINDOW_SECONDS - PENDING_SECONDS, WINDOW_SECONDS + BUCKET_SECONDS, 1_800]),
    st.sampled_from([RECORD_KEEP_SECONDS - PENDING_SECONDS, RECORD_KEEP_SECONDS, 86_400, 90_000]),
)
"""Mostly short: what is open is to be gone on with."""
AMOUNTS_OF = (
    "window_nanousd",
    "day_nanousd",
    "network_window_nanousd",
    "network_day_nanousd",
    "global_hour_nanousd",
    "global_day_nanousd",
)
WIDE = Limits(
    window_nanousd=50_000,
    day_nanousd=50_000,
    network_window_nanousd=None,
    network_day_nanousd=None,
    global_hour_nanousd=90_000,
    global_day_nanousd=90_000,
    window_seconds=WINDOW_SECONDS,
    throttle_seconds=1,
    mark_when_busy=False,
)
LIMITS = st.builds(
    lambda narrow, throttle_seconds, mark: replace(
        WIDE, **narrow, throttle_seconds=throttle_seconds, mark_when_busy=mark
    ),
    st.dictionaries(st.sampled_from(AMOUNTS_OF), st.sampled_from([700, 1_000, 2_000, 4_000]), min_size=1, max_size=2),
    st.sampled_from([1, 1, 30]),
    st.booleans(),
)


@dataclass(eq=False)
class Held:
    """One reservation, all its life."""

    ask: Ask
    made_us: int
    booked: int
    """What the books hold for it now."""
    open: int
    """What of it counts as open money."""
    record_gone_us: int
    known: Reservation
    """What its caller knows of it: less than is held where an answer was lost."""
    state: str = "open"
    booked_at_end: int = 0
    is_lost: bool = False
    """Its record is."""
    is_cleared: bool = False
    """The books of its identifier were cleared after it."""
    ends: list[Outcome] = field(default_factory=list)
    ended_late: int = 0
    """What was open of it when it ended past its time: it may have been told as expired before."""
    used: int = 0
    """What the upstream billed for it."""

    def has_record(self, now_us):
        return not self.is_lost and now_us < self.record_gone_us

    def bucket(self, seconds):
        return self.made_us // US // seconds * seconds

    def counts_until_us(self):
        return (self.bucket(BUCKET_SECONDS) + BUCKET_SECONDS + WINDOW_SECONDS) * US

    def is_open_until_us(self):
        return (self.bucket(PENDING_BUCKET_SECONDS) + PENDING_BUCKET_SECONDS + PENDING_SECONDS) * US


@dataclass
class Remembered:
    """What stands for a caller's key."""

    rid: str
    body: str
    booked: int
    is_settled: bool
    until_us: int
    gone_us: int


@dataclass
class Marker:
    cause: Reason
    until_us: int
    ends_us: int
    busy: bool


@dataclass(frozen=True)
class Place:
    """A limit as the model sees it: who is in it, and what leaves it when."""

    reason: Reason
    scope: Scope
    limit: int | None
    members: list[Held]
    ends_us: int | None
    """When all of it is over at once; None for a window."""
    since_us: int

    def spent(self):
        return sum(held.booked for held in self.members)

    def fits_us(self, cost, now_us):
        """When there is room for `cost`, if nothing else happens."""
        if self.ends_us is not None:
            return self.ends_us
        for end_us in sorted({held.counts_until_us() for held in self.members if held.booked}):
            left = sum(held.booked for held in self.members if held.counts_until_us() > end_us)
            if left + cost <= self.limit:
                return end_us
        return (now_us // US + WINDOW_SECONDS + BUCKET_SECONDS) * US


def places(every, who, network, limits, at_us, now_us):
    """All limits in their order, for something that was or is reserved at `at_us`."""
    mine = [held for held in every if held.ask.identifier == who and not held.is_cleared]
    nets = [held for held in every if held.ask.network == network]

    def window(members):
        return [held for held in members if held.counts_until_us() > now_us]

    def period(members, length_us):
        return [held for held in members if held.made_us // length_us == at_us // length_us]

    day_us, hour_us = at_us // DAY_US * DAY_US, at_us // HOUR_US * HOUR_US
    day_end_us, hour_end_us = day_us + DAY_US, hour_us + HOUR_US
    window_us = (now_us // US - WINDOW_SECONDS + PENDING_BUCKET_SECONDS - 1) * US
    r, s = Reason, Scope
    return [
        Place(r.DAILY_LIMIT, s.IDENTIFIER, limits.day_nanousd, period(mine, DAY_US), day_end_us, day_us),
        Place(r.WINDOW_LIMIT, s.IDENTIFIER, limits.window_nanousd, window(mine), None, window_us),
        Place(r.NETWORK_LIMIT, s.NETWORK, limits.network_window_nanousd, window(nets), None, window_us),
        Place(r.NETWORK_DAILY_LIMIT, s.NETWORK, limits.network_day_nanousd, period(nets, DAY_US), day_end_us, day_us),
        Place(
            r.GLOBAL_HOURLY_LIMIT, s.GLOBAL, limits.global_hour_nanousd, period(every, HOUR_US), hour_end_us, hour_us
        ),
        Place(r.GLOBAL_DAILY_LIMIT, s.GLOBAL, limits.global_day_nanousd, period(every, DAY_US), day_end_us, day_us),
    ]


class Books(RuleBasedStateMachine):
    """The machine; `harness` holds the backend that is asked beside the model."""

    harness = None

    def __init__(self):
        super().__init__()
        self.every = []
        self.callers = []
        self.markers = {}
        self.remembered = {}
        self.number = 0
        self.told_expired = 0
        self.swept = False

    # --- what the model makes of it

    @property
    def now_us(self):
        return self.harness.clock.us

    def open_money(self, place):
        """Of a limit's scope: what open reservations hold that are not past their time, since its period began."""
        first = place.members[0].ask if place.members else None
        return sum(
            held.open
            for held in self.every
            if first is not None
            and self._is_in_scope(held, place, first)
            and held.is_open_until_us() > self.now_us
            and (held.bucket(PENDING_BUCKET_SECONDS) + PENDING_BUCKET_SECONDS) * US > place.since_us
        )

    @staticmethod
    def _is_in_scope(held, place, first):
        if place.scope is Scope.IDENTIFIER:
            return held.ask.identifier == first.identifier and not held.is_cleared
        return place.scope is Scope.GLOBAL or held.ask.network == first.network

    def expected_verdict(self, ask):
        """A `Refusal` or `Duplicate`; a number: so much is set aside."""
        key = ask.idempotency and self.known_key(ask.idempotency.digest)
        if key:
            return self.duplicate(key, ask.idempotency)
        marker = self.markers.get(ask.identifier)
        if marker and marker.until_us > self.now_us:
            return self.throttled(ask, marker)
        limited = [
            place
            for place in places(self.every, ask.identifier, ask.network, ask.limits, self.now_us, self.now_us)
            if place.limit is not None
        ]
        cost, least = ask.cost_nanousd, ask.at_least_nanousd
        full = [place for place in limited if place.spent() + cost > place.limit]
        if not full:
            return cost
        if least is None or self.are_busy(full, cost):
            return self.refusal(ask, full, cost)
        room = min(place.limit - place.spent() for place in limited)
        full = [place for place in limited if place.spent() + least > place.limit]
        return self.refusal(ask, full, least) if full else room

    def are_busy(self, full, cost):
        return all(place.spent() - self.open_money(place) + cost <= place.limit for place in full)

    def known_key(self, digest):
        key = self.remembered.get(digest)
        return key if key and key.gone_us > self.now_us else None

    def duplicate(self, key, idempotency):
        late = DuplicateState.EXPIRED if key.until_us <= self.now_us else DuplicateState.IN_FLIGHT
        state = DuplicateState.SETTLED if key.is_settled else late
        return Duplicate(key.rid, state, key.booked, same_body=key.body == idempotency.body_digest)

    def throttled(self, ask, marker):
        left = math.ceil((marker.until_us - self.now_us) / US)
        wait = max(left, math.ceil((marker.ends_us - self.now_us) / US))
        never = self.can_never_fit(ask)
        return Refusal(
            reason=Reason.THROTTLED,
            cause=marker.cause,
            scope=Scope.IDENTIFIER,
            retry_after_seconds=None if never else wait,
            in_flight=marker.busy and not never,
            can_never_fit=never,
            marker_seconds=left,
            limit_nanousd=None,
        )

    @staticmethod
    def can_never_fit(ask):
        amounts = [getattr(ask.limits, name) for name in AMOUNTS_OF]
        least = ask.cost_nanousd if ask.at_least_nanousd is None else ask.at_least_nanousd
        return any(amount is not None and least > amount for amount in amounts)

    def refusal(self, ask, full, cost):
        first, never, busy = full[0], self.can_never_fit(ask), self.are_busy(full, cost)
        end_us = max(place.fits_us(cost, self.now_us) for place in full)
        # Nothing that was spent stands in the way of what can never fit: its marker ends by itself.
        wait = 1 if busy or never else max(1, math.ceil((end_us - self.now_us) / US))
        marks = first.scope is Scope.IDENTIFIER and (ask.limits.mark_when_busy or not busy)
        seconds = ask.limits.throttle_seconds * (2 if first.reason is Reason.DAILY_LIMIT else 1) if marks else 0
        wait = max(wait, seconds)
        if marks:
            self.markers[ask.identifier] = Marker(
                first.reason, self.now_us + seconds * US, self.now_us + wait * US, busy
            )
        return Refusal(
            reason=first.reason,
            cause=first.reason,
            scope=first.scope,
            retry_after_seconds=None if never else wait,
            in_flight=busy and not never,
            can_never_fit=never,
            marker_seconds=seconds,
            limit_nanousd=first.limit,
        )

    def admit(self, ask, made):
        held = Held(ask, self.now_us, made.cost_nanousd, made.cost_nanousd, 0, made)
        held.record_gone_us = self.now_us + (PENDING_SECONDS + RECORD_KEEP_SECONDS) * US
        self.every.append(held)
        self.callers.append(held)
        window = [each for each in self.every if self._counts_for(each, ask.identifier)]
        assert made.window_spent_nanousd == sum(each.booked for each in window)
        assert made.day_spent_nanousd == sum(
            each.booked
            for each in self.every
            if each.ask.identifier == ask.identifier
            and not each.is_cleared
            and each.made_us // DAY_US == self.now_us // DAY_US
        )
        assert made.made_at_us == self.now_us
        assert made.window_frees_at_seconds * US == min(each.counts_until_us() for each in window if each.booked)
        for place in places(self.every, ask.identifier, ask.network, ask.limits, self.now_us, self.now_us):
            assert place.limit is None or place.spent() <= place.limit, "I1"
        if ask.idempotency:
            self.remembered[ask.idempotency.digest] = Remembered(
                ask.reservation_id,
                ask.idempotency.body_digest,
                made.cost_nanousd,
                is_settled=False,
                until_us=self.now_us + PENDING_SECONDS * US,
                gone_us=self.now_us + IDEMPOTENCY_KEEP_SECONDS * US,
            )

    def _counts_for(self, held, who):
        return held.ask.identifier == who and not held.is_cleared and held.counts_until_us() > self.now_us

    def pick(self, number):
        open_ones = [held for held in self.callers if held.state == "open" and held.has_record(self.now_us)]
        among = open_ones[-6:] if open_ones and number < OFTEN else self.callers[-8:]
        return among[number % len(among)]

    def over_open_money(self, but):
        """What is stored as open money and past its time, without what `but` holds of it."""
        ring = self.harness.stored().get("llm:open:global", ({}, 0))[0]
        total = 0
        for start, amount in ring.items():
            if (start + PENDING_BUCKET_SECONDS + PENDING_SECONDS) * US <= self.now_us:
                own = but.open if but.bucket(PENDING_BUCKET_SECONDS) == start and but.has_record(self.now_us) else 0
                total += max(0, amount - own)
        return total

    # --- what happens

    @initialize(hour=st.sampled_from(["10:20:00", "10:59:30", "23:59:30", "23:40:00"]), limits=LIMITS)
    def begin(self, hour, limits):
        self.harness.clear()
        hours, minutes, seconds = map(int, hour.split(":"))
        self.harness.clock.us = (20_526 * 86_400 + hours * 3_600 + minutes * 60 + seconds) * US
        self.limits = limits

    @rule(limits=LIMITS)
    def the_settings_change(self, limits):
        self.limits = limits

    @rule(seconds=PAUSES_S)
    def time_passes(self, seconds):
        self.harness.pass_time(int(seconds * US))
        self.swept = False

    @rule(
        who=st.sampled_from(WHO),
        network=st.sampled_from(NETWORKS),
        cost=AMOUNTS,
        key=st.one_of(st.none(), st.none(), st.sampled_from(KEYS)),
        body=st.sampled_from("01"),
        least=st.one_of(st.none(), AMOUNTS),
    )
    def reserve(self, who, network, cost, key, body, least):
        self.number += 1
        idempotency = key and Idempotency((f"{ord(who):02x}{key[1]}" * 11)[:32], body * 16)
        at_least = least and min(cost, least)
        ask = Ask(f"r{self.number}", who, network, cost, self.limits, PENDING_SECONDS, idempotency, at_least)
        expected = self.expected_verdict(ask)
        if idempotency:
            known = self.harness.backend.find_duplicate(idempotency)
            assert known == (expected if isinstance(expected, Duplicate) else None)
        verdict = self.harness.backend.reserve(ask)
        if not isinstance(expected, int):
            assert verdict == expected
            return
        assert isinstance(verdict, Reservation), (verdict, "expected to be admitted")
        assert verdict.cost_nanousd == expected
        self.told_expired += verdict.expired_nanousd
        self.admit(ask, verdict)

    @precondition(lambda self: self.callers)
    @rule(number=PICKS, is_other=st.booleans())
    def the_same_id_is_sent_again(self, number, is_other):
        held = self.pick(number)
        if not held.has_record(self.now_us):
            return
        ask = replace(held.ask, limits=self.limits, cost_nanousd=held.ask.cost_nanousd + is_other)
        if is_other or held.state != "open":
            with pytest.raises(ReservationConflict):
                self.harness.backend.reserve(ask)
            return
        again = self.harness.backend.reserve(ask)
        assert (again.cost_nanousd, again.made_at_us, again.request_digest) == (
            held.booked,
            held.made_us,
            held.known.request_digest,
        )
        assert again.expired_nanousd == 0
        found = self.harness.backend.find(ask)
        assert (found.cost_nanousd, found.made_at_us) == (held.booked, held.made_us)

    @precondition(lambda self: self.callers)
    @rule(number=PICKS, more=AMOUNTS, least=st.one_of(st.none(), AMOUNTS), is_answer_lost=st.booleans())
    def extend(self, number, more, least, is_answer_lost):
        held = self.pick(number)
        to = held.known.cost_nanousd + more
        at_least = to if least is None else min(to, held.known.cost_nanousd + least)

        def ask():
            return self.harness.backend.extend(held.known, to, self.limits, at_least_nanousd=at_least)

        is_over = self.now_us >= min(held.made_us + PENDING_SECONDS * US, held.counts_until_us())
        if not held.has_record(self.now_us) or held.state != "open" or is_over:
            with pytest.raises(ReservationConflict):
                ask()
            return
        room, reason = self.room(held, at_least)
        verdict = ask()
        if reason is not None and at_least > held.booked:
            assert isinstance(verdict, Refusal)
            assert (verdict.reason, verdict.marker_seconds) == (reason, 0)
            return
        granted = min(max(0, to - held.booked), room)
        held.booked += granted
        held.open += granted
        assert isinstance(verdict, Reservation)
        assert verdict.cost_nanousd == held.booked >= at_least
        day, window, *_ = places(
            self.every, held.ask.identifier, held.ask.network, self.limits, held.made_us, self.now_us
        )
        assert (verdict.day_spent_nanousd, verdict.window_spent_nanousd) == (day.spent(), window.spent())
        if granted and (key := self.own_key(held)) and not key.is_settled:
            key.booked = held.booked
        if not is_answer_lost:
            held.known = verdict

    def room(self, held, at_least):
        """How much an extension may get, and the first limit that has less than it must."""
        room, reason = math.inf, None
        ask = held.ask
        for place in places(self.every, ask.identifier, ask.network, self.limits, held.made_us, self.now_us):
            if place.limit is None or (place.scope is Scope.IDENTIFIER and held.is_cleared):
                continue
            left = place.limit - place.spent()
            if left < at_least - held.booked and reason is None:
                reason = place.reason
            room = min(room, max(0, left))
        return room, reason

    def own_key(self, held):
        key = held.ask.idempotency and self.known_key(held.ask.idempotency.digest)
        return key if key and key.rid == held.ask.reservation_id else None

    @precondition(lambda self: self.callers)
    @rule(number=PICKS, share=st.sampled_from([None, 0, 0.1, 0.5, 1, 1, 1.2]))
    def it_ends(self, number, share):
        held = self.pick(number)
        if share is None:
            self.end(held, "released", 0)
        else:
            self.end(held, "settled", int(held.known.cost_nanousd * share))

    def end(self, held, ending, actual):
        backend, before = self.harness.backend, self.over_open_money(held)
        end = backend.settle(held.known, actual) if ending == "settled" else backend.release(held.known)
        held.ends.append(end.outcome)
        if held.has_record(self.now_us) and held.state != "open":
            assert (end.outcome, end.booked_nanousd) == (Outcome.REPEATED, held.booked_at_end)
        elif held.has_record(self.now_us):
            assert end.outcome is (Outcome.SETTLED if ending == "settled" else Outcome.RELEASED)
            self.book(held, ending, actual, end, before)
            if held.is_open_until_us() <= self.now_us:
                held.ended_late = held.open
            held.booked, held.open = actual, 0
        elif self.now_us >= held.made_us + RECORD_KEEP_SECONDS * US:
            assert (end.outcome, end.booked_nanousd) == (Outcome.EXPIRED, held.known.cost_nanousd)
        else:
            assert end.outcome is Outcome.LATE
            self.book(held, ending, actual, end, before)
            # Only its record was lost: what was booked stays booked, and the late end beside it.
            held.booked += actual
            held.is_lost = False

    def book(self, held, ending, actual, end, over_before):
        assert end.booked_nanousd == actual
        assert end.overrun_nanousd == max(0, actual - held.known.cost_nanousd)
        assert end.expired_nanousd == over_before
        self.told_expired += end.expired_nanousd
        self.swept = True
        held.used = actual
        held.state, held.booked_at_end = ending, actual
        held.record_gone_us = self.now_us + RECORD_KEEP_SECONDS * US
        idempotency = held.ask.idempotency
        if idempotency is None:
            return
        known, own = self.known_key(idempotency.digest), self.own_key(held)
        if ending == "settled" and (own or not known):
            self.remembered[idempotency.digest] = Remembered(
                held.ask.reservation_id,
                idempotency.body_digest,
                actual,
                is_settled=True,
                until_us=self.now_us,
                gone_us=self.now_us + IDEMPOTENCY_KEEP_SECONDS * US,
            )
        elif own:
            del self.remembered[idempotency.digest]

    @precondition(lambda self: self.callers)
    @rule(number=PICKS, is_redis=st.sampled_from([True, True, True, False]))
    def a_crash(self, number, is_redis):
        """Redis has lost a record; or the callers are gone, and what they hold stays booked in full."""
        held = self.pick(number)
        # An end is not lost alone: one script wrote its record and its booking.
        if is_redis and held.has_record(self.now_us) and held.state == "open":
            self.harness.lose(f"llm:reservation:{held.ask.reservation_id}")
            held.is_lost = True
        elif not is_redis:
            self.callers.clear()

    @rule(who=st.sampled_from(WHO))
    def the_books_of_somebody_are_cleared(self, who):
        begins = (
            f"llm:cost:recent:{who}",
            f"llm:cost:daily:{who}:",
            f"llm:open:identifier:{who}",
            f"llm:throttle:{who}",
        )
        for key in self.harness.stored():
            if key.startswith(begins):
                self.harness.lose(key)
        self.harness.put(f"llm:reset:{who}", str(self.now_us), 172_800)
        self.markers.pop(who, None)
        for held in self.every:
            held.is_cleared |= held.ask.identifier == who
        # What is reserved in the same microsecond would count as before it.
        self.time_passes(0.5)

    # --- what must hold after each step

    @invariant()
    def the_books_agree(self):
        if self.every:
            stored = self.harness.stored()
            self.every_total_is_the_sum_of_its_reservations(stored)
            self.money_is_never_negative_nor_without_a_life(stored)

    def every_total_is_the_sum_of_its_reservations(self, stored):
        expected_totals, expected_rings, expected_open = {}, {}, {}
        for held in self.every:
            self.add_up(held, expected_totals, expected_rings, expected_open)
        totals = {key: int(value) for key, (value, _) in stored.items() if is_total(key)}
        assert totals == expected_totals, "I2, I6"
        for key, (ring, _) in stored.items():
            if key.startswith(("llm:cost:recent:", "llm:network:recent:")):
                living = {
                    start: amount
                    for start, amount in ring.items()
                    if (start + BUCKET_SECONDS + WINDOW_SECONDS) * US > self.now_us
                }
                assert living == expected_rings.pop(key, {}), "I2, I6"
                assert len(ring) <= WINDOW_BUCKETS + 1
            if key.startswith("llm:open:"):
                over = {
                    start for start in ring if (start + PENDING_BUCKET_SECONDS + PENDING_SECONDS) * US <= self.now_us
                }
                living = {start: amount for start, amount in ring.items() if start not in over}
                assert living == expected_open.pop(key, {}), "I2, I6"
                assert len(ring) <= PENDING_BUCKETS + 2
                assert not (self.swept and key == "llm:open:global" and over), "I8"
        assert not {key: ring for key, ring in (expected_rings | expected_open).items() if ring}, (
            "I2: a ring is missing"
        )

    def add_up(self, held, totals, rings, opens):
        ask, at_us = held.ask, held.made_us
        keys = book_keys("", ask.identifier, ask.network, at_us // US)
        day_gone_us, hour_gone_us = (at_us // DAY_US + 2) * DAY_US, (at_us // HOUR_US + 3) * HOUR_US
        mine = [] if held.is_cleared else [(keys.daily, day_gone_us)]
        for key, gone_us in (
            *mine,
            (keys.network_daily, day_gone_us),
            (keys.global_hourly, hour_gone_us),
            (keys.global_daily, day_gone_us),
        ):
            if self.now_us < gone_us:
                totals[key] = totals.get(key, 0) + held.booked
        recents = [keys.network_recent] if held.is_cleared else [keys.recent, keys.network_recent]
        if held.counts_until_us() > self.now_us and held.booked:
            for key in recents:
                ring = rings.setdefault(key, {})
                ring[held.bucket(BUCKET_SECONDS)] = ring.get(held.bucket(BUCKET_SECONDS), 0) + held.booked
        if held.is_open_until_us() > self.now_us and held.open:
            for key in (
                *(() if held.is_cleared else (keys.pending_identifier,)),
                keys.pending_network,
                keys.pending_global,
            ):
                ring = opens.setdefault(key, {})
                start = held.bucket(PENDING_BUCKET_SECONDS)
                ring[start] = ring.get(start, 0) + held.open

    @staticmethod
    def money_is_never_negative_nor_without_a_life(stored):
        for key, (value, left) in stored.items():
            assert left > 0, ("I7", key)
            amounts = value.values() if isinstance(value, dict) else [int(value)] if is_total(key) else []
            assert all(0 <= amount < 2**53 for amount in amounts), ("I5", key)

    @invariant()
    def each_ends_once_and_what_was_billed_is_booked(self):
        for held in self.every:
            first_ends = [end for end in held.ends if end in {Outcome.SETTLED, Outcome.RELEASED, Outcome.LATE}]
            assert len(first_ends) <= 1, "I3"
            assert held.used <= held.booked, "I4"
        expired = sum(held.open for held in self.every if held.is_open_until_us() <= self.now_us)
        assert self.told_expired <= expired + sum(held.ended_late for held in self.every), "told more than once"


def is_total(key):
    return key.startswith(("llm:cost:daily:", "llm:network:daily:", "llm:global:"))


@pytest.fixture(params=["atomic", "legacy", "memory", "multi", "watch"])
def harness(request, redis_url):
    harness = MemoryHarness() if request.param == "memory" else RedisHarness(request.param, redis_url)
    yield harness
    harness.close()


@pytest.mark.timeout(120 + 3 * EXAMPLES)
def test_whatever_happens_the_books_are_the_sum_of_all_reservations(harness):
    machine = type("Machine", (Books,), {"harness": harness})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=80,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
