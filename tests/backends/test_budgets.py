"""The periods of budgets in every zone, what cannot be kept, and the keys that budgets are kept under."""

from calendar import monthrange
from datetime import date, datetime, timedelta
from itertools import product
from zoneinfo import ZoneInfo, available_timezones

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.budgets import (
    BUILT_IN,
    EVERYBODY,
    LONGEST_WINDOW_SECONDS,
    Budget,
    Calendar,
    Forever,
    Reason,
    Scope,
    Share,
    Sliding,
    check,
    owner_in,
    share_limit,
    span_at,
    whole_limits,
)
from backends.conformance.cases import ROOMY
from backends.errors import ConfigurationError
from backends.keys import BOUNDARY_SECONDS, KnownKey, cause_of, known_key, rows_at, running_key, window_seconds_of

HOUR, DAY = 3_600, 86_400
UNITS = ("hour", "day", "week", "month")
ZONES = (
    "UTC",
    "Europe/Berlin",
    "America/New_York",
    "Asia/Kolkata",
    "Asia/Kathmandu",
    "Australia/Lord_Howe",
    "America/Santiago",
    "Africa/Cairo",
    "Asia/Beirut",
    "America/Havana",
    "Pacific/Apia",
    "Pacific/Chatham",
)


def check_one(name, scope, period):
    check([Budget(name, "who", period, None, scope)])


def at(text, zone="UTC"):
    """Unix seconds of what clocks of the zone show."""
    return int(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp())


# Periods.


def shown(zone, unit, seconds):
    """What clocks and calendars of the zone show of a moment, as far as it tells one period from the next."""
    local = datetime.fromtimestamp(seconds, ZoneInfo(zone))
    return {
        "hour": (local.date(), local.hour, local.utcoffset()),
        "day": local.date(),
        "week": local.isocalendar()[:2],
        "month": (local.year, local.month),
    }[unit]


def changes(zone, first, last):
    """Each first second with another offset, by looking at one hour after the other."""
    found = []
    for before in range(first, last, HOUR):
        offset = datetime.fromtimestamp(before, ZoneInfo(zone)).utcoffset()
        if offset != datetime.fromtimestamp(before + HOUR, ZoneInfo(zone)).utcoffset():
            seconds = range(before, before + HOUR + 1, 60)
            found.append(next(s for s in seconds if datetime.fromtimestamp(s, ZoneInfo(zone)).utcoffset() != offset))
    return found


def is_what_the_clocks_show(period, seconds):
    """Whether the period holds the moment, and all that shows the same hour, day, week or month, and nothing else."""
    start, end = span_at(period, seconds)
    this = shown(period.zone, period.unit, seconds)
    inside = [start, (start + seconds) // 2, (seconds + end) // 2, end - 1]
    return (
        start <= seconds < end
        and {shown(period.zone, period.unit, each) for each in inside} == {this}
        and this not in {shown(period.zone, period.unit, start - 1), shown(period.zone, period.unit, end)}
        and start % BOUNDARY_SECONDS == end % BOUNDARY_SECONDS == 0
        and span_at(period, start) == span_at(period, end - 1) == (start, end)
        and span_at(period, start - 1).end_seconds == start
        and span_at(period, end).start_seconds == end
    )


NEAR = (0, 1, 899, 900, 1_799, 1_800, 3_599, 3_600, 5_400, 7_200, 43_200, 86_399, 86_400, 90_000)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("zone", ZONES)
def test_periods_are_what_clocks_and_calendars_show(zone, unit):
    turns = changes(zone, at("2026-01-01"), at("2027-01-01"))
    turns += [at(text, zone) for text in ("2026-12-28", "2027-01-01", "2027-01-04", "2028-01-01", "2029-01-01")]
    turns += [at(text, zone) for text in ("2026-02-28", "2026-03-01", "2028-02-28", "2028-02-29", "2028-03-01")]
    moments = [turn + sign * seconds for turn in turns for seconds in NEAR for sign in (-1, 1)]
    assert [moment for moment in moments if not is_what_the_clocks_show(Calendar(unit, zone), moment)] == []


MOMENTS = st.integers(at("2026-01-01"), at("2040-01-01"))
ANY_ZONE = st.sampled_from(sorted(available_timezones()))


@given(ANY_ZONE, st.sampled_from(UNITS), MOMENTS)
def test_periods_of_any_zone_are_what_its_clocks_show(zone, unit, moment):
    assert is_what_the_clocks_show(Calendar(unit, zone), moment)


@given(ANY_ZONE, st.sampled_from(UNITS), st.integers(2026, 2039), st.integers(-DAY, DAY))
def test_so_they_are_around_the_changes_of_its_clocks(zone, unit, year, seconds):
    first = at(f"{year}-01-01")
    for half in (first, first + 183 * DAY):
        days = [half + day * DAY for day in range(184)]
        offsets = [datetime.fromtimestamp(day, ZoneInfo(zone)).utcoffset() for day in days]
        turns = [day for day, now, then in zip(days, offsets, offsets[1:], strict=False) if now != then]
        for day in turns[:1]:
            [change, *_] = changes(zone, day, day + DAY)
            assert is_what_the_clocks_show(Calendar(unit, zone), change + seconds)


def spans(period, first, last):
    """The periods from the one that holds `first` to the one that holds `last`, which is not among them."""
    found = [span_at(period, first)]
    while found[-1].end_seconds <= last:
        found.append(span_at(period, found[-1].end_seconds))
    return found[:-1]


@pytest.mark.parametrize("year", [2026, 2028])
@pytest.mark.parametrize("zone", ZONES)
def test_every_day_is_in_one_week_and_one_month(zone, year):
    first, last = at(f"{year}-01-01", zone), at(f"{year + 1}-01-01", zone)
    days = spans(Calendar("day", zone), first, last)
    dates = [shown(zone, "day", start) for start, _ in days]
    assert dates == [date(year, 1, 1) + timedelta(days=number) for number in range(365 + (year == 2028))]
    months = spans(Calendar("month", zone), first, last)
    in_month = [sum(start <= day.start_seconds < end for day in days) for start, end in months]
    assert in_month == [monthrange(year, month)[1] for month in range(1, 13)]
    weeks = spans(Calendar("week", zone), first + 7 * DAY, last - 7 * DAY)
    in_week = {sum(start <= day.start_seconds < end for day in days) for start, end in weeks}
    assert in_week == {7}
    assert {shown(zone, "day", start).weekday() for start, _ in weeks} == {0}
    for each in (days, months, weeks):
        assert [end for _, end in each[:-1]] == [start for start, _ in each[1:]]
    assert (months[0].start_seconds, months[-1].end_seconds) == (days[0].start_seconds, days[-1].end_seconds)


@pytest.mark.parametrize(
    ("zone", "day", "hours"),
    [
        ("UTC", "2026-03-29", 24),
        ("Europe/Berlin", "2026-03-29", 23),
        ("Europe/Berlin", "2026-10-25", 25),
        ("America/New_York", "2026-03-08", 23),
        ("America/New_York", "2026-11-01", 25),
        ("Asia/Kolkata", "2026-03-29", 24),
        ("Asia/Kathmandu", "2026-10-25", 24),
        ("Australia/Lord_Howe", "2026-04-05", 24.5),
        ("Australia/Lord_Howe", "2026-10-04", 23.5),
        # Here clocks go back from midnight to the day before, and forward from midnight.
        ("America/Santiago", "2026-04-04", 25),
        ("America/Santiago", "2026-09-06", 23),
        ("Africa/Cairo", "2026-04-24", 23),
        ("Africa/Cairo", "2026-10-29", 25),
        ("Asia/Beirut", "2026-03-29", 23),
        ("Asia/Beirut", "2026-10-24", 25),
        # Here midnight comes twice.
        ("America/Havana", "2026-03-08", 23),
        ("America/Havana", "2026-11-01", 25),
        # Here the 30th was left out: the calendar went on with the 31st.
        ("Pacific/Apia", "2011-12-29", 24),
        ("Pacific/Apia", "2011-12-31", 24),
    ],
)
def test_a_day_is_as_long_as_its_clocks_make_it(zone, day, hours):
    start, end = span_at(Calendar("day", zone), at(f"{day}T12:00", zone))
    assert end - start == hours * HOUR


@pytest.mark.parametrize(
    ("zone", "day", "week_hours", "month_hours"),
    [
        ("Europe/Berlin", "2026-03-29", 167, 31 * 24 - 1),
        ("Europe/Berlin", "2026-10-25", 169, 31 * 24 + 1),
        ("America/Havana", "2026-11-01", 169, 30 * 24 + 1),
        ("Australia/Lord_Howe", "2026-04-05", 168.5, 30 * 24 + 0.5),
        ("Pacific/Apia", "2011-12-29", 6 * 24, 30 * 24),
    ],
)
def test_weeks_and_months_are_as_long_as_their_days(zone, day, week_hours, month_hours):
    found = [span_at(Calendar(unit, zone), at(f"{day}T12:00", zone)) for unit in ("week", "month")]
    assert [end - start for start, end in found] == [week_hours * HOUR, month_hours * HOUR]


@pytest.mark.parametrize(
    ("zone", "first", "minutes"),
    [
        ("Australia/Lord_Howe", "2026-04-05T00:00", [60, 60, 30, 60]),
        ("Australia/Lord_Howe", "2026-10-04T00:00", [60, 60, 30, 60]),
        # Here they change at a quarter to an hour.
        ("Pacific/Chatham", "2026-04-05T02:00", [60, 45, 15, 60]),
        ("Pacific/Chatham", "2026-09-27T01:00", [60, 45, 15, 60]),
        ("Europe/Berlin", "2026-10-25T01:00", [60, 60, 60, 60]),
        ("Asia/Kathmandu", "2026-10-25T01:00", [60, 60, 60, 60]),
    ],
)
def test_an_hour_ends_where_the_clocks_change(zone, first, minutes):
    moment = at(first, zone)
    assert span_at(Calendar("hour", zone), moment).start_seconds == moment
    found = spans(Calendar("hour", zone), moment, moment + 10 * HOUR)
    assert [(end - start) // 60 for start, end in found[:4]] == minutes


@pytest.mark.parametrize(
    ("month", "days"), [("2026-01", 31), ("2026-02", 28), ("2026-04", 30), ("2028-02", 29), ("2026-12", 31)]
)
def test_a_month_is_as_long_as_the_calendar_says(month, days):
    first = at(f"{month}-01")
    for moment in (first, first + days * DAY - 1):
        assert span_at(Calendar("month"), moment) == (first, first + days * DAY)


def test_a_week_runs_from_monday_over_the_turn_of_the_year():
    monday = at("2026-12-28")
    for moment in (monday, at("2026-12-31T23:59:59"), at("2027-01-01"), at("2027-01-03T23:59:59")):
        assert span_at(Calendar("week"), moment) == (monday, at("2027-01-04"))


def test_the_short_way_of_utc_comes_to_what_the_calendar_says():
    for unit, moment in product(UNITS, (at("2026-03-14T10:20:30"), at("2028-02-29T23:59:59"))):
        assert span_at(Calendar(unit), moment) == span_at(Calendar(unit, "Etc/UTC"), moment)


@given(ANY_ZONE, st.sampled_from(UNITS), MOMENTS)
def test_rows_are_those_of_the_period_that_holds_the_moment(zone, unit, moment):
    [row] = rows_at([Budget("some", "who", Calendar(unit, zone), None)], moment)
    span = span_at(Calendar(unit, zone), moment)
    assert (row.layout.start_seconds, row.layout.end_seconds) == span
    assert row.key == f"llm:budget:some:{unit}:who:{span.start_seconds}"
    assert row.layout.keep_until_seconds >= span.end_seconds + DAY


def test_a_total_outlives_its_period_and_what_never_ends_stays():
    moment = at("2026-03-14T10:20:30")
    kept = {row.budget.name: row.layout.keep_until_seconds for row in rows_at(ROOMY.budgets("id", "net"), moment)}
    tomorrow = at("2026-03-15")
    days = dict.fromkeys(("day", "network_day", "global_day"), tomorrow + DAY)
    assert kept == days | {"global_hour": at("2026-03-14T13:00"), "window": 0, "network_window": 0}
    [row] = rows_at([Budget("some", "who", Forever(), None)], moment)
    assert (row.layout.start_seconds, row.layout.end_seconds, row.layout.keep_until_seconds) == (0, 0, 0)


# What cannot be kept.


@pytest.mark.parametrize("name", ["", "A", "a b", "a:b", "a-b", "a\n", "é", "\u0661", "a" * 33])
def test_a_name_is_refused_that_no_key_could_hold(name):
    with pytest.raises(ConfigurationError, match=r"^name: 1 to 32 of a-z 0-9 _$"):
        check_one(name, Scope.IDENTIFIER, Forever())


@pytest.mark.parametrize("seconds", [-1, 0, LONGEST_WINDOW_SECONDS + 1])
def test_a_window_has_a_length_of_at_most_31_days(seconds):
    with pytest.raises(ConfigurationError, match=r"^period: a window of 1 to 2678400 seconds$"):
        check_one("some", Scope.IDENTIFIER, Sliding(seconds))


@pytest.mark.parametrize("seconds", [1, LONGEST_WINDOW_SECONDS])
def test_a_window_of_any_other_length_is_kept(seconds):
    check_one("some", Scope.TEAM, Sliding(seconds))


NO_ZONES = ["", "Europe", "Europe/Nowhere", "../../etc/passwd", "/etc/localtime", "a\0b", "\ud800", "\n", "z" * 5_000]


@pytest.mark.parametrize("zone", NO_ZONES, ids=lambda zone: repr(zone[:20]))
def test_a_zone_that_there_is_not_is_refused_in_one_line(zone):
    with pytest.raises(ConfigurationError, match=r"^an IANA time zone such as Europe/Berlin; got '") as raised:
        check_one("some", Scope.IDENTIFIER, Calendar("day", zone))
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 200


BUILT_IN_OTHERWISE = [
    ("day", Scope.NETWORK, Calendar("day")),
    ("day", Scope.IDENTIFIER, Calendar("month")),
    ("day", Scope.IDENTIFIER, Calendar("day", "Europe/Berlin")),
    ("day", Scope.IDENTIFIER, Sliding(DAY)),
    ("window", Scope.KEY, Sliding(600)),
    ("window", Scope.IDENTIFIER, Calendar("hour")),
    ("network_window", Scope.IDENTIFIER, Sliding(600)),
    ("global_hour", Scope.GLOBAL, Calendar("hour", "Asia/Kathmandu")),
    ("global_day", Scope.GLOBAL, Forever()),
]


@pytest.mark.parametrize(("name", "scope", "period"), BUILT_IN_OTHERWISE)
def test_a_built_in_name_stands_for_that_budget_only(name, scope, period):
    with pytest.raises(ConfigurationError, match=rf"^name: {name} is built in, with another scope or period$"):
        check_one(name, scope, period)
    check_one(f"{name}_2", scope, period)


def test_the_built_in_budgets_are_kept_as_their_table_says():
    check(ROOMY.budgets("id", "net"))


def test_the_built_in_budgets_come_together():
    six = ROOMY.budgets("id", "net")
    for missing in six:
        with pytest.raises(ConfigurationError, match=r"^name: the built-in budgets come together, "):
            check([budget for budget in six if budget != missing])


def test_the_built_in_windows_have_one_length():
    shorter = [
        budget._replace(period=Sliding(60)) if budget.name == "window" else budget
        for budget in ROOMY.budgets("id", "net")
    ]
    with pytest.raises(ConfigurationError, match=r"^name: the built-in budgets .+, and their windows have one length$"):
        check(shorter)


def test_a_request_is_charged_to_1_to_26_budgets_of_different_names():
    many = [Budget(f"b{number}", "who", Forever(), None) for number in range(27)]
    check(many[:26])
    for wrong in ([], many):
        with pytest.raises(ConfigurationError, match=r"^budgets: 1 to 26 of them$"):
            check(wrong)
    with pytest.raises(ConfigurationError, match=r"^name: no two budgets of a request have one name$"):
        check([*many[:3], many[1]._replace(owner="other")])


@pytest.mark.parametrize("scope", [scope for scope in Scope if scope is not Scope.IDENTIFIER])
def test_only_a_budget_of_an_identifier_may_set_a_marker(scope):
    budget = Budget("some", "who", Forever(), None, scope, throttle_seconds=1)
    check([budget._replace(scope=Scope.IDENTIFIER)])
    with pytest.raises(ConfigurationError, match=r"^throttle_seconds: only a refusal of an identifier's budget "):
        check([budget])


def test_a_period_is_one_of_four():
    with pytest.raises(ConfigurationError, match=r"^period: one of hour, day, week, month$"):
        check_one("some", Scope.IDENTIFIER, Calendar("year"))


def test_an_owner_is_found_by_scope():
    budgets = ROOMY.budgets("id", "net")
    owners = [owner_in(budgets, scope) for scope in (Scope.IDENTIFIER, Scope.NETWORK, Scope.GLOBAL, Scope.TEAM)]
    assert owners == ["id", "net", EVERYBODY, ""]


# Keys.

OWNERS = [
    "who",
    "7",
    "2001:db8::/56",
    "ip:2001:db8::/64",
    "::",
    ":",
    "ft:gpt-4o:org",
    "ft:gpt-4o:org::1773480000",
    "who:1773480000",
    "who:2026-03-14",
    "2026-03-14T10",
    "hour:who:1773480000",
    "forever:who",
    "sliding60:who",
    "llm:budget:some:forever:who",
    "global",
    "all",
    "{who}",
    "{owner}{date}{hour}",
    "who\n",
    "\n\n:1",
    "a b\t\0",
    "*?[a-z]\\",
    "\u0663:\u0661",
    "🙂é",
]
NAMES = ["some", "1", "_", "hour", "forever", "sliding60", "budget", "daily", "window_", "x" * 32]
PERIODS = [
    Sliding(1),
    Sliding(60),
    Sliding(LONGEST_WINDOW_SECONDS),
    *(Calendar(unit, zone) for unit in UNITS for zone in ("UTC", "Asia/Kathmandu")),
    Forever(),
]
NOON = at("2026-03-14T12:00")
ANY_OWNER = st.sampled_from(OWNERS) | st.text(min_size=1, max_size=80)
ANY_PERIOD = (
    st.builds(Sliding, st.integers(1, LONGEST_WINDOW_SECONDS))
    | st.builds(Calendar, st.sampled_from(UNITS), ANY_ZONE)
    | st.just(Forever())
)
ANY_FURTHER = st.builds(
    Budget,
    name=st.text("abcxyz019_", min_size=1, max_size=32).filter(lambda name: name not in BUILT_IN),
    owner=ANY_OWNER,
    period=ANY_PERIOD,
    limit_nanousd=st.none(),
    scope=st.sampled_from(Scope),
)


@given(ANY_FURTHER, MOMENTS)
def test_a_key_of_any_further_budget_gives_back_what_it_was_made_of(budget, moment):
    [row] = rows_at([budget], moment)
    is_window = isinstance(budget.period, Sliding)
    start = span_at(budget.period, moment).start_seconds if isinstance(budget.period, Calendar) else 0
    kind = "window" if is_window else "total"
    owner = EVERYBODY if budget.scope is Scope.GLOBAL else budget.owner
    assert known_key(row.key) == KnownKey(kind, owner, budget.name, None, start, budget.period.word)
    owner = "" if budget.scope is Scope.GLOBAL else budget.owner
    assert known_key(row.pending_key) == KnownKey("pending", owner, scope=budget.scope)
    if is_window:
        assert window_seconds_of(budget.period.word) == row.layout.window_seconds == budget.period.seconds
        assert known_key(running_key(row.key)) == KnownKey("running", row.key.removeprefix("llm:"))


@given(ANY_OWNER, ANY_OWNER, MOMENTS)
def test_a_key_of_any_built_in_budget_gives_back_what_it_was_made_of(identifier, network, moment):
    for row in rows_at(ROOMY.budgets(identifier, network), moment):
        name, scope = row.budget.name, row.budget.scope
        owner = "" if scope is Scope.GLOBAL else row.budget.owner
        kind = "window" if row.layout.window_seconds else "total"
        assert known_key(row.key) == KnownKey(kind, owner, name, scope, row.layout.start_seconds)
        assert known_key(row.pending_key) == KnownKey("pending", owner, scope=scope)


def test_no_two_budgets_owners_or_periods_share_a_key():
    made = {}
    for name, owner, period, moment in product(NAMES, OWNERS, PERIODS, (NOON, NOON + 40 * DAY)):
        [row] = rows_at([Budget(name, owner, period, None)], moment)
        made.setdefault(row.key, set()).add((name, owner, period.word, row.layout.start_seconds))
    for identifier, moment in product(OWNERS, (NOON, NOON + 40 * DAY)):
        for row in rows_at(ROOMY.budgets(identifier, identifier), moment):
            owner = "" if row.budget.scope is Scope.GLOBAL else identifier
            made.setdefault(row.key, set()).add((row.budget.name, owner, "", row.layout.start_seconds))
    assert {key: whose for key, whose in made.items() if len(whose) > 1} == {}


@pytest.mark.parametrize(
    "key",
    [
        "llm:budget:",
        "llm:budget:some",
        "llm:budget:some:forever",
        "llm:budget:some:forever:",
        "llm:budget:Some:forever:who",
        "llm:budget::forever:who",
        "llm:budget:some-one:forever:who",
        "llm:budget:" + "x" * 33 + ":forever:who",
        "llm:budget:some:always:who",
        "llm:budget:some:sliding:who",
        "llm:budget:some:sliding0:who",
        "llm:budget:some:sliding060:who",
        "llm:budget:some:sliding-60:who",
        "llm:budget:some:sliding60",
        "llm:budget:some:year:who:1773480000",
        "llm:budget:some:hour:who",
        "llm:budget:some:hour:who:",
        "llm:budget:some:hour::1773480000",
        "llm:budget:some:hour:who:-1",
        "llm:budget:some:hour:who:1.5",
        "llm:budget:some:hour:who:1773480000\n",
        "llm:budget:some:hour:2026-03-14",
        "\nllm:budget:some:forever:who",
        "xllm:budget:some:forever:who",
        "LLM:budget:some:forever:who",
        "llm:open",
        "llm:open:",
        "llm:open:identifier",
        "llm:open:identifier:",
        "llm:open:global:",
        "llm:open:global:who",
        "llm:open:group:who",
        "llm:running:",
        "llm:throttle:",
        "llm:reset:",
        "llm:reservation:",
        "llm:idempotency:" + "0" * 31,
        "llm:idempotency:" + "0" * 32 + "\n",
        "llm:global:daily:2026-02-29",
        "llm:global:daily:2026-03-14:who",
        "llm:cost:daily::2026-03-14",
        "llm:cost:daily:who:2026-03-14\n",
        "llm:cost:recent:",
    ],
)
def test_what_only_looks_like_a_key_is_none(key):
    assert known_key(key) is None


def test_a_marker_names_the_budget_that_set_it():
    rows = rows_at((*ROOMY.budgets("id", "net"), Budget("some", "id", Forever(), None)), NOON)
    for row in rows:
        assert cause_of(row.layout.cause) == (row.layout.reason, row.budget.name)
    assert (rows[-1].layout.reason, rows[-1].layout.cause) == (Reason.BUDGET_LIMIT, "budget:some")
    for by_hand in ("stop", "", "budget:", "budget", "budget_limit"):
        assert cause_of(by_hand) == (Reason.WINDOW_LIMIT, "window")


SHARED = (
    Budget("hour", "198.51.100.7", Calendar("hour"), None, Scope.NETWORK, share=Share("all_hour", 250_000)),
    Budget("all_hour", "all", Calendar("hour"), 1_000, Scope.GLOBAL),
)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scope": Scope.IDENTIFIER}, "only a network has one"),
        ({"period": Sliding(600)}, "none of a window"),
        ({"period": Calendar("day")}, "with the same period"),
        ({"period": Calendar("hour", "Europe/Berlin")}, "with the same period"),
        ({"share": Share("nothing", 250_000)}, "of another budget of the request"),
        ({"share": Share("hour", 250_000)}, "of another budget of the request"),
        ({"share": Share("all_hour", 0)}, "1 to 1000000 millionths"),
        ({"share": Share("all_hour", 1_000_001)}, "1 to 1000000 millionths"),
    ],
)
def test_a_share_that_cannot_be_decided_is_refused(changes, words):
    check(SHARED)
    with pytest.raises(ConfigurationError, match=f"^share: .*{words}"):
        check((SHARED[0]._replace(**changes), SHARED[1]))


@pytest.mark.parametrize(
    ("limit", "whole", "own", "millionths", "room"),
    [
        (1_000, 0, 0, 250_000, 250),
        (1_000, 250, 250, 250_000, 250),
        (999, 0, 0, 250_000, 249),
        (1_000, 600, 100, 250_000, 125),
        (1_000, 1_200, 0, 250_000, -50),
        (1_000, 1_201, 0, 250_000, -51),
        (1_000, 100, 700, 250_000, 250),
        (2**53 - 1, 0, 0, 1_000_000, 2**53 - 1),
    ],
)
def test_a_share_is_of_what_others_leave_rounded_down(limit, whole, own, millionths, room):
    assert share_limit(Share("all", millionths), limit, whole, own) == room


def test_a_share_has_a_whole_limit_too():
    assert whole_limits(SHARED) == [1_000, 250]
    assert whole_limits((SHARED[0]._replace(is_shadow=True), SHARED[1])) == [1_000]
    assert whole_limits((SHARED[0], SHARED[1]._replace(is_shadow=True))) == []
    assert whole_limits((SHARED[0], SHARED[1]._replace(limit_nanousd=None))) == []
