"""Further budgets and overrides: how they are written, what is refused, and what a request is charged to."""

import json
from datetime import UTC, datetime

import pytest
from click.testing import CliRunner
from flask import Flask
from hypothesis import given
from hypothesis import strategies as st

from backends.budgets import BUILT_IN, Budget, Calendar, Forever, Scope, Share, Sliding
from backends.clock import SystemClock
from backends.errors import ConfigurationError
from backends.store.link import Link
from flaskapp import strict_json
from flaskapp.admin import Panel, make_admin
from flaskapp.budgets import SCOPES, SHARED_HOURS, BudgetRows, FurtherBudget, Override, OverrideRows, own
from flaskapp.cli.settings import SettingsView, make_settings_cli
from flaskapp.config import load_config
from flaskapp.settings import LIMIT_SETTINGS, Baseline, LiveSettings, SettingsRejected, SettingsStore
from flaskapp.value_types import RowRefused

BUDGETS = BudgetRows("what", shortest_seconds=120, zone="Europe/Berlin")
OVERRIDES = OverrideRows("what")
MONTH = {"name": "month", "scope": "team", "period": "month", "limit_usd": "5.00"}
RAISED = {"budget": "day", "owner": "hash456", "limit_usd": 2}
PERIODS = '{"sliding_seconds": 120 to 2678400}, "hour", "day", "week", "month" or "forever"'
MOMENTS = "a date and time of RFC 3339 with an offset, such as 2026-12-31T18:00:00+01:00"
NOW_US = 1_773_480_030_000_000  # 2026-03-14 09:20:30 UTC
OWNERS = {
    Scope.IDENTIFIER: "hash456",
    Scope.NETWORK: "198.51.100.7",
    Scope.WIDE_NETWORK: "198.51.100.0/24",
    Scope.GLOBAL: "all",
    Scope.MODEL: "gpt-4o",
    Scope.KEY: "web",
    Scope.TEAM: "marketing",
}


def named(*names, **fields):
    return [{**MONTH, "name": name, **fields} for name in names]


def problems_of(value_type, *rows):
    return [(problem.row, problem.field) for problem in value_type.read_leniently(list(rows))[1]]


def plan(*rows, overrides=(), **settings):
    return LiveSettings(budgets=list(rows), budget_overrides=list(overrides), **settings).plan


def names(budgets):
    return [budget.name for budget in budgets]


def further(budgets):
    return [budget.name for budget in budgets if budget.name not in SCOPES]


# --- how a budget is written


def test_what_is_left_out_is_each_owner_enforced_and_without_a_marker():
    (budget,) = BUDGETS.read([MONTH])
    assert budget == FurtherBudget("month", Scope.TEAM, "*", Calendar("month", "Europe/Berlin"), 5_000_000_000)
    assert (budget.is_shadow, budget.throttle_seconds) == (False, 0)


def test_every_field_is_read():
    row = {
        "name": "a_1",
        "scope": "identifier",
        "owner": "hash456",
        "period": {"sliding_seconds": 3600},
        "limit_usd": "0.000000001",
        "mode": "shadow",
        "throttle_seconds": 60,
    }
    (budget,) = BUDGETS.read([row])
    assert budget == FurtherBudget(
        "a_1", Scope.IDENTIFIER, "hash456", Sliding(3600), 1, is_shadow=True, throttle_seconds=60
    )


@pytest.mark.parametrize(
    ("period", "read"),
    [
        ({"sliding_seconds": 120}, Sliding(120)),
        ({"sliding_seconds": 2_678_400}, Sliding(2_678_400)),
        *((unit, Calendar(unit, "Europe/Berlin")) for unit in ("hour", "day", "week", "month")),
        ("forever", Forever()),
    ],
)
def test_a_period_is_a_window_or_of_the_calendar_or_for_ever(period, read):
    (budget,) = BUDGETS.read([{**MONTH, "period": period}])
    assert (type(budget.period), budget.period) == (type(read), read)
    assert budget.as_json()["period"] == period


@pytest.mark.parametrize(
    ("scope", "owner"),
    [
        ("identifier", "ip:198.51.100.7"),
        ("network", "198.51.100.7"),
        ("network", "2001:db8:1:200::/56"),
        ("network", "unknown"),
        ("wide_network", "198.51.100.0/24"),
        ("wide_network", "2001:db8:1::/48"),
        ("global", "all"),
        ("key", "web"),
        ("team", "x" * 256),
        ("model", "org/model:free@1"),
        *((scope.value, "*") for scope in Scope),
    ],
)
def test_an_owner_is_spelt_as_in_keys_or_stands_for_each(scope, owner):
    assert BUDGETS.read([{**MONTH, "scope": scope, "owner": owner}])[0].owner == owner


def test_a_list_is_shown_as_it_is_written_without_what_is_the_default():
    text = (
        '[{"name": "month", "scope": "team", "period": "month", "limit_usd": 5}, '
        '{"name": "hour", "scope": "identifier", "owner": "hash456", "period": {"sliding_seconds": 3600}, '
        '"limit_usd": 0.000000001, "mode": "shadow", "throttle_seconds": 60}]'
    )
    assert BUDGETS.text(BUDGETS.read_text(text)) == text
    typed = text.replace('"limit_usd": 5}', '"limit_usd": "5.00", "owner": "*", "mode": "enforce"}')
    assert BUDGETS.text(BUDGETS.read_text(typed)) == text
    assert BUDGETS.text(()) == "[]"


@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "name": st.from_regex(r"[a-z0-9_]{1,6}", fullmatch=True),
                "scope": st.sampled_from([scope.value for scope in Scope]),
                "period": st.sampled_from(["hour", "forever", {"sliding_seconds": 777}]),
                "limit_usd": st.decimals(min_value="0.000000001", max_value=1_000_000, places=9),
            },
            optional={"owner": st.sampled_from(["*", "web"]), "mode": st.sampled_from(["enforce", "shadow"])},
        ),
        max_size=20,
    )
)
def test_what_was_read_can_be_written_and_read_again(rows):
    budgets, _ = BUDGETS.read_leniently(rows)
    again = strict_json.loads(strict_json.dumps(budgets))
    assert BUDGETS.read(again) == budgets == BUDGETS.read(budgets)


# --- what is refused


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("name", "", "1 to 32 of a-z 0-9 _"),
        ("name", "x" * 33, "1 to 32"),
        ("name", "Month", "1 to 32"),
        ("name", "a-b", "1 to 32"),
        ("name", "month\n", "1 to 32"),
        ("name", 7, "1 to 32"),
        *(("name", name, f"none of day, window, .*{name}") for name in (*BUILT_IN, "wide_window", "wide_day")),
        ("scope", "user", "identifier or network or wide_network or global or key or team or model"),
        ("scope", "Team", "identifier or"),
        ("scope", None, "identifier or"),
        ("period", "year", '"hour", "day", "week", "month" or "forever"'),
        ("period", {}, "sliding_seconds"),
        ("period", {"sliding_seconds": 119}, '{"sliding_seconds": 120 to 2678400}'),
        ("period", {"sliding_seconds": 2_678_401}, "sliding_seconds"),
        ("period", {"sliding_seconds": "3600"}, "sliding_seconds"),
        ("period", {"sliding_seconds": True}, "sliding_seconds"),
        ("period", {"sliding_seconds": 3600, "zone": "UTC"}, "sliding_seconds"),
        ("period", ["hour"], "sliding_seconds"),
        ("limit_usd", 0, "an amount in USD from 0.000000001 to 1000000 with at most nine places"),
        ("limit_usd", "0.0000000001", "an amount"),
        ("limit_usd", 1_000_001, "an amount"),
        ("limit_usd", "1e3", "an amount"),
        ("limit_usd", None, "an amount"),
        ("mode", "off", "enforce or shadow"),
        ("mode", True, "enforce or shadow"),
        ("throttle_seconds", -1, "a whole number of seconds from 0 to 2678400"),
        ("throttle_seconds", 2_678_401, "a whole number"),
        ("throttle_seconds", "60", "a whole number"),
        ("throttle_seconds", 60, "0, since only budgets of the scope identifier set a throttle marker"),
        ("owner", "", r"\* or 1 to 256 visible ASCII characters"),
        ("owner", "x" * 257, "1 to 256"),
        ("owner", "a b", "1 to 256"),
        ("owner", "käse", "1 to 256"),
        ("owner", 7, "1 to 256"),
        ("colour", "red", "no such field; a row has name, scope, owner, period, limit_usd, mode, throttle_seconds"),
    ],
)
def test_a_field_that_cannot_be_used_is_named_with_its_row_and_the_reason(field, value, allowed):
    with pytest.raises(RowRefused, match=rf"^row 2, {field}: .*{allowed}.*; got .+$") as caught:
        BUDGETS.read([*named("first"), {**MONTH, field: value}])
    assert str(caught.value).endswith(f"; got {strict_json.dumps(value)[:80]}" + "…" * (value == "x" * 257))
    assert caught.value.problem.place == f"[2].{field}"


@pytest.mark.parametrize("field", ["name", "scope", "period", "limit_usd"])
def test_a_field_that_has_to_be_there_is_missed(field):
    row = {name: value for name, value in MONTH.items() if name != field}
    with pytest.raises(RowRefused, match=f"^row 1, {field}: .*; got nothing$"):
        BUDGETS.read([row])


@pytest.mark.parametrize(
    ("scope", "owner", "allowed"),
    [
        ("global", "everybody", r"\* or all"),
        ("network", "all", r"\* or a network as keys spell it"),
        ("network", "198.51.100.0/24", "a network"),
        ("network", "198.51.100.07", "a network"),
        ("network", "::ffff:198.51.100.7", "a network"),
        ("network", "2001:db8:1:2::", "a network"),
        ("network", "2001:db8:1:2:0::/64", "a network"),
        ("network", "2001:DB8:1:2::/64", "a network"),
        ("network", "2001:db8:1::/48", "a network"),
        ("wide_network", "198.51.100.7", "a wide network"),
        ("wide_network", "198.51.100.7/24", "a wide network"),
        ("wide_network", "2001:db8:1:2::/64", "a wide network"),
    ],
)
def test_an_owner_that_no_request_has_is_refused(scope, owner, allowed):
    with pytest.raises(RowRefused, match=f"^row 1, owner: .*{allowed}"):
        BUDGETS.read([{**MONTH, "scope": scope, "owner": owner}])


@pytest.mark.parametrize("row", [None, [], "month", 7])
def test_a_row_is_an_object(row):
    with pytest.raises(RowRefused, match=r"^row 2: an object with name, scope, .*; got "):
        BUDGETS.read([MONTH, row])
    with pytest.raises(RowRefused, match=r"^row 1: an object with budget, owner, "):
        OVERRIDES.read([row])


@pytest.mark.parametrize("value", [None, {}, "[]", 7, (1,)])
@pytest.mark.parametrize("value_type", [BUDGETS, OVERRIDES])
def test_the_value_is_a_list(value_type, value):
    with pytest.raises(ValueError, match=r"^a JSON list of "):
        value_type.read_leniently(value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("month", "not valid JSON"),
        ('[{"name": "a", "name": "b"}]', "the key 'name' is there twice"),
        ("[NaN]", "NaN"),
        ("[" * 99 + "]" * 99, "nested too deeply"),
    ],
)
def test_a_typed_list_is_strict_json(text, why):
    with pytest.raises(ValueError, match=rf"^a JSON list of .* \(.*{why}"):
        BUDGETS.read_text(text)


def test_of_two_budgets_of_one_name_the_later_is_refused():
    rows = [*named("a", "b"), {**MONTH, "name": "a", "scope": "key"}]
    with pytest.raises(RowRefused, match=r'^row 3, name: a name that no row before it has; got "a"$'):
        BUDGETS.read(rows)


def test_a_name_counts_only_where_its_row_can_be_used():
    rows, problems = BUDGETS.read_leniently([{**MONTH, "limit_usd": 0}, MONTH])
    assert (names(rows), [problem.place for problem in problems]) == (["month"], ["[1].limit_usd"])


def test_a_shadow_budget_may_name_the_life_of_a_marker_that_it_never_sets():
    rows = [{**MONTH, "scope": "identifier", "mode": "shadow", "throttle_seconds": 60}]
    (budget,) = [budget for budget in plan(*rows).of(OWNERS, NOW_US) if budget.name == "month"]
    assert (budget.is_shadow, budget.throttle_seconds) == (True, 0)


def test_a_window_is_never_shorter_than_a_minute():
    rows = [{**MONTH, "period": {"sliding_seconds": 60}}]
    assert LiveSettings(budgets=rows).budgets[0].period == Sliding(60)
    with pytest.raises(ValueError, match="60 to 2678400"):
        LiveSettings(budgets=[{**MONTH, "period": {"sliding_seconds": 59}}])


# --- at most sixteen


NUMBERS = [str(number) for number in range(40)]


def test_sixteen_budgets_of_each_owner_may_apply_to_a_request_and_the_next_row_is_refused():
    assert len(BUDGETS.read(named(*NUMBERS[:16]))) == 16
    with pytest.raises(RowRefused, match=r"^row 17: at most 16 further budgets that may apply to one request; got"):
        BUDGETS.read(named(*NUMBERS[:17]))


def test_budgets_of_other_scopes_add_up():
    rows = [*named(*NUMBERS[:8]), *named(*NUMBERS[8:18], scope="model")]
    assert problems_of(BUDGETS, *rows) == [(17, ""), (18, "")]


def test_budgets_of_single_owners_count_as_those_of_the_one_that_has_most():
    rows = [*named(*NUMBERS[:14]), *({**MONTH, "name": f"of{n}", "owner": f"team{n}"} for n in range(50))]
    assert problems_of(BUDGETS, *rows) == []
    third = {**MONTH, "name": "third", "owner": "team7"}
    rows += [{**third, "name": "second"}, third, {**third, "name": "other", "owner": "team8"}]
    assert problems_of(BUDGETS, *rows) == [(66, "")]
    budgets = plan(*[row for row in rows if row is not third]).of({Scope.TEAM: "team7"}, NOW_US)
    assert len(further(budgets)) == 16


def test_a_row_that_is_refused_leaves_room_for_the_next():
    rows = [*named(*NUMBERS[:15]), {**MONTH, "name": "bad", "mode": "?"}, *named(*NUMBERS[15:17])]
    assert problems_of(BUDGETS, *rows) == [(16, "mode"), (18, "")]


# --- overrides


@pytest.mark.parametrize(
    ("until", "moment"),
    [
        ("2026-03-14T09:20:30Z", datetime(2026, 3, 14, 9, 20, 30, tzinfo=UTC)),
        ("2026-03-14T10:20:30+01:00", datetime(2026, 3, 14, 9, 20, 30, tzinfo=UTC)),
        ("2026-03-13 23:50:30.5-09:30", datetime(2026, 3, 14, 9, 20, 30, 500_000, tzinfo=UTC)),
        ("2026-03-14t09:20:30.1234567z", datetime(2026, 3, 14, 9, 20, 30, 123_456, tzinfo=UTC)),
        ("1969-12-31T23:59:59Z", datetime(1969, 12, 31, 23, 59, 59, tzinfo=UTC)),
    ],
)
def test_until_is_a_moment_of_rfc_3339(until, moment):
    (override,) = OVERRIDES.read([{**RAISED, "until": until}])
    assert override.until_us == round(moment.timestamp() * 1_000_000)
    assert datetime.fromisoformat(override.as_json()["until"]) == moment
    assert OVERRIDES.read(strict_json.loads(OVERRIDES.text((override,)))) == (override,)


@pytest.mark.parametrize(
    "until",
    [
        "2026-03-14T09:20:30",
        "2026-03-14",
        "2026-03-14T09:20Z",
        "2026-02-29T00:00:00Z",
        "2026-03-14T24:00:00Z",
        "2026-03-14T09:20:30+24:00",
        "2026-03-14T09:20:30+0100",
        "20260314T092030Z",
        "2026-W11-6T09:20:30Z",
        "2026-03-14T09:20:30Z\n",
        "٢٠٢٦-03-14T09:20:30Z",
        "0001-01-01T00:00:00+01:00",
        "9999-12-31T23:59:59-01:00",
        "",
        1_773_480_030,
        None,
    ],
)
def test_another_until_is_refused(until):
    with pytest.raises(RowRefused, match=r"^row 1, until: a date and time of RFC 3339 with an offset, such as "):
        OVERRIDES.read([{**RAISED, "until": until}])


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("budget", "Day", "1 to 32 of a-z 0-9 _"),
        ("budget", None, "1 to 32"),
        ("owner", "*", "one owner: 1 to 256 visible ASCII characters"),
        ("owner", "", "one owner"),
        ("owner", None, "one owner"),
        ("limit_usd", -1, r"an amount in USD from 0 \(blocked\) to 1000000 with at most nine places"),
        ("limit_usd", True, "an amount"),
        ("from", "2026-03-14T09:20:30Z", "no such field; a row has budget, owner, limit_usd, until"),
    ],
)
def test_a_field_of_an_override_that_cannot_be_used_is_named_with_its_row_and_the_reason(field, value, allowed):
    with pytest.raises(RowRefused, match=rf"^row 3, {field}: .*{allowed}.*; got .+$"):
        OVERRIDES.read([RAISED, RAISED, {**RAISED, field: value}])


@pytest.mark.parametrize("field", ["budget", "owner", "limit_usd"])
def test_a_field_of_an_override_that_has_to_be_there_is_missed(field):
    row = {name: value for name, value in RAISED.items() if name != field}
    with pytest.raises(RowRefused, match=f"^row 1, {field}: .*; got nothing$"):
        OVERRIDES.read([row])


@pytest.mark.parametrize(
    ("budget", "owner"),
    [
        ("global_day", "hash456"),
        ("network_window", "hash456"),
        ("network_day", "2001:db8::1"),
        ("wide_day", "198.51.100.7"),
    ],
)
def test_an_owner_of_a_built_in_budget_is_one_of_its_scope(budget, owner):
    with pytest.raises(RowRefused, match=r"^row 1, owner: one owner: "):
        OVERRIDES.read([{**RAISED, "budget": budget, "owner": owner}])


def test_an_override_of_a_budget_that_is_nowhere_has_no_effect_and_is_no_error():
    overrides = [{**RAISED, "budget": "nowhere", "limit_usd": 0}]
    assert plan(overrides=overrides).of(OWNERS, NOW_US) == plan().of(OWNERS, NOW_US)


@pytest.mark.parametrize("name", SHARED_HOURS)
def test_what_has_no_limit_and_is_there_only_with_shares_cannot_be_overridden(name):
    with pytest.raises(RowRefused, match=rf"^row 1, budget: .* none of network_share_hour.*; got \"{name}\"$"):
        OVERRIDES.read([{**RAISED, "budget": name, "owner": "198.51.100.7"}])


def test_a_thousand_overrides_may_stand_there():
    rows = [{**RAISED, "owner": f"user{number}"} for number in range(1_002)]
    assert len(OVERRIDES.read(rows[:1_000])) == 1_000
    assert problems_of(OVERRIDES, *rows) == [(1_001, ""), (1_002, "")]
    with pytest.raises(RowRefused, match=r"^row 1001: at most 1000 overrides; got one more$"):
        OVERRIDES.read(rows)


# --- what a request is charged to


def test_without_further_budgets_it_is_the_six_and_four_of_networks_with_the_limits_of_the_settings():
    settings = LiveSettings(high_cost_window_seconds=300, cost_throttle_duration_seconds=45)
    of_hour, of_day = Share("global_hour", 250_000), Share("global_day", 250_000)
    assert settings.plan.of(OWNERS, NOW_US) == (
        Budget("day", "hash456", Calendar("day"), 250_000_000, Scope.IDENTIFIER, throttle_seconds=90),
        Budget("window", "hash456", Sliding(300), 20_000_000, Scope.IDENTIFIER, throttle_seconds=45),
        Budget("network_window", "198.51.100.7", Sliding(300), 100_000_000, Scope.NETWORK),
        Budget("network_day", "198.51.100.7", Calendar("day"), 1_000_000_000, Scope.NETWORK, share=of_day),
        Budget("global_hour", "all", Calendar("hour"), 1_000_000_000, Scope.GLOBAL),
        Budget("global_day", "all", Calendar("day"), 5_000_000_000, Scope.GLOBAL),
        Budget("wide_window", "198.51.100.0/24", Sliding(300), 500_000_000, Scope.WIDE_NETWORK),
        Budget("wide_day", "198.51.100.0/24", Calendar("day"), 5_000_000_000, Scope.WIDE_NETWORK, share=of_day),
        Budget("network_share_hour", "198.51.100.7", Calendar("hour"), None, Scope.NETWORK, share=of_hour),
        Budget("wide_share_hour", "198.51.100.0/24", Calendar("hour"), None, Scope.WIDE_NETWORK, share=of_hour),
    )
    assert settings.plan is settings.plan


@pytest.mark.parametrize(("share", "millionths"), [("0.01", 10_000), ("0.333333", 333_333), ("0.999999", 999_999)])
def test_a_share_is_read_exactly(share, millionths):
    budgets = plan(network_share=share).of(OWNERS, NOW_US)
    shares = {budget.name: budget.share for budget in budgets if budget.share is not None}
    assert shares == {
        "network_day": Share("global_day", millionths),
        "wide_day": Share("global_day", millionths),
        "network_share_hour": Share("global_hour", millionths),
        "wide_share_hour": Share("global_hour", millionths),
    }


@pytest.mark.parametrize("share", ["1", "1.0", 1])
def test_a_share_of_1_is_no_rule_and_nothing_is_booked_for_it(share):
    budgets = plan(network_share=share).of(OWNERS, NOW_US)
    assert names(budgets) == [*BUILT_IN, "wide_window", "wide_day"]
    assert {budget.share for budget in budgets} == {None}


def test_a_limit_of_0_of_a_network_is_none_for_its_wide_network_too():
    budgets = plan(network_cost_limit_usd="0", network_daily_cost_limit_usd="0.0").of(OWNERS, NOW_US)
    assert {budget.name for budget in budgets if budget.limit_nanousd is None} == {
        "network_window",
        "network_day",
        "wide_window",
        "wide_day",
        "network_share_hour",
        "wide_share_hour",
    }
    assert limits([], rows=(), network_cost_limit_usd="0")["wide_day"] == 5_000_000_000


def test_a_wide_network_has_five_times_the_limits_of_a_network_and_perhaps_one_of_its_own():
    given = {"rows": (), "network_cost_limit_usd": "0.000000001", "network_daily_cost_limit_usd": "1000000"}
    told = limits([], **given)
    assert (told["wide_window"], told["wide_day"]) == (5, 5_000_000_000_000_000)
    assert told["wide_day"] < 2**53
    row = {"budget": "wide_day", "owner": "198.51.100.0/24", "limit_usd": 3}
    assert limits([row], **given)["wide_day"] == 3_000_000_000
    assert limits([{**row, "owner": "198.51.101.0/24"}], **given)["wide_day"] == told["wide_day"]


def test_each_built_in_budget_has_its_limit_from_one_setting():
    assert list(LIMIT_SETTINGS) == list(BUILT_IN)
    limits = {setting.name: f"{number}.5" for number, setting in enumerate(LIMIT_SETTINGS.values(), 1)}
    assert len(limits) == 6
    told = {budget.name: budget.limit_nanousd for budget in LiveSettings(**limits).plan.of(OWNERS, NOW_US)[:6]}
    assert told == {name: number * 10**9 + 500_000_000 for number, name in enumerate(BUILT_IN, 1)}


def test_further_budgets_come_after_the_six_in_the_order_of_the_list():
    rows = [
        {**MONTH, "name": "z"},
        {**MONTH, "name": "of_web", "scope": "key", "owner": "web"},
        {**MONTH, "name": "of_another", "scope": "key", "owner": "mobile"},
        {**MONTH, "name": "a", "scope": "wide_network"},
        {**MONTH, "name": "of_model", "scope": "model", "owner": "gpt-4o"},
        {**MONTH, "name": "of_all", "scope": "global", "owner": "all"},
        {**MONTH, "name": "of_each", "scope": "global"},
    ]
    budgets = plan(*rows).of(OWNERS, NOW_US)
    assert names(budgets) == [*SCOPES, "z", "of_web", "a", "of_model", "of_all", "of_each"]
    assert {budget.name: budget.owner for budget in budgets[10:]} == {
        "z": "marketing",
        "of_web": "web",
        "a": "198.51.100.0/24",
        "of_model": "gpt-4o",
        "of_all": "all",
        "of_each": "all",
    }
    assert names(plan(*rows).of({**OWNERS, Scope.KEY: "other", Scope.MODEL: "other"}, NOW_US))[10:] == [
        "z",
        "a",
        "of_all",
        "of_each",
    ]


def test_where_a_scope_has_no_owner_its_budgets_do_not_apply():
    rows = named("of_team", "of_one", owner="*")
    rows[1] |= {"scope": "key", "owner": "web"}
    assert names(plan(*rows).of({Scope.IDENTIFIER: "hash456"}, NOW_US)) == [
        "day",
        "window",
        "global_hour",
        "global_day",
    ]


def test_a_budget_is_what_its_row_says():
    rows = [{**MONTH, "name": "own", "scope": "identifier", "throttle_seconds": 60}, {**MONTH, "mode": "shadow"}]
    assert plan(*rows).of(OWNERS, NOW_US)[10:] == (
        Budget("own", "hash456", Calendar("month", "UTC"), 5_000_000_000, Scope.IDENTIFIER, throttle_seconds=60),
        Budget("month", "marketing", Calendar("month", "UTC"), 5_000_000_000, Scope.TEAM, is_shadow=True),
    )


def limits(overrides, now_us=NOW_US, owners=OWNERS, rows=(MONTH,), **settings):
    budgets = plan(*rows, overrides=overrides, **settings).of(owners, now_us)
    return {budget.name: budget.limit_nanousd for budget in budgets}


def test_an_override_is_the_limit_of_that_owner_alone():
    overrides = [
        RAISED,
        {"budget": "month", "owner": "marketing", "limit_usd": "0.5"},
        {"budget": "global_hour", "owner": "all", "limit_usd": 9},
    ]
    told = limits(overrides)
    assert (told["day"], told["window"], told["month"]) == (2_000_000_000, 20_000_000, 500_000_000)
    assert told["global_hour"] == 9_000_000_000
    told = limits(overrides, owners={**OWNERS, Scope.IDENTIFIER: "other", Scope.TEAM: "other"})
    assert (told["day"], told["month"]) == (250_000_000, 5_000_000_000)


def test_of_two_overrides_for_one_owner_the_later_row_wins_while_it_holds():
    end = NOW_US // 1_000_000
    later = datetime.fromtimestamp(end, UTC).isoformat()
    overrides = [RAISED, {**RAISED, "limit_usd": 3}, {**RAISED, "limit_usd": 4, "until": later}]
    assert limits(overrides, NOW_US - 1)["day"] == 4_000_000_000
    assert limits(overrides, NOW_US)["day"] == 3_000_000_000


def test_an_override_of_0_blocks_its_owner():
    assert limits([{**RAISED, "limit_usd": 0}])["day"] == 0
    rows = [{**MONTH, "owner": "marketing"}]
    assert limits([{"budget": "month", "owner": "marketing", "limit_usd": 0}], rows=rows)["month"] == 0


def test_an_override_is_a_limit_where_others_have_none():
    settings = LiveSettings(
        network_cost_limit_usd="0",
        budget_overrides=[{"budget": "network_window", "owner": "198.51.100.7", "limit_usd": "0.01"}],
    )
    told = {
        owner: settings.plan.of({Scope.NETWORK: owner}, NOW_US)[0].limit_nanousd
        for owner in ("198.51.100.7", "198.51.100.8")
    }
    assert told == {"198.51.100.7": 10_000_000, "198.51.100.8": None}


def test_a_caller_is_told_of_the_enforced_budgets_of_its_identifier_and_key_alone():
    rows = [
        {**MONTH, "name": scope.value, "scope": scope.value, "mode": mode} for scope in Scope for mode in ["enforce"]
    ] + [{**MONTH, "name": "hidden", "scope": "identifier", "mode": "shadow"}]
    assert names(own(plan(*rows).of(OWNERS, NOW_US))) == ["day", "window", "identifier", "key"]


# --- where they come from


class Told(list):
    def __call__(self, event):
        self.append(event)

    @property
    def ignored(self):
        return [(event.fields["setting"], event.fields["got"]) for event in self if event.name == "setting_ignored"]


@pytest.fixture
def told():
    return Told()


@pytest.fixture
def link(redis_url):
    link = Link(redis_url, clock=SystemClock())
    yield link
    link.close()


@pytest.fixture
def put(link):
    return lambda **settings: link.run(lambda client: client.set("settings", json.dumps(settings)))


@pytest.fixture
def stored(link):
    return lambda: json.loads(link.run(lambda client: client.get("settings")) or b"{}")


@pytest.fixture
def store(link, told):
    return SettingsStore(link, Baseline(stream_deadline_seconds=120, budget_time_zone="Asia/Kolkata"), told)


def test_a_budget_is_added_changed_and_removed_while_the_service_runs(store, stored):
    assert names(store.current.values.plan.of(OWNERS, NOW_US)) == list(SCOPES)
    store.change({"budgets": [MONTH], "budget_overrides": [{**RAISED, "until": "2026-03-14T10:20:30+01:00"}]})
    budgets = store.current.values.plan.of(OWNERS, NOW_US)
    assert budgets[10:] == (Budget("month", "marketing", Calendar("month", "Asia/Kolkata"), 5_000_000_000, Scope.TEAM),)
    assert stored() == {
        "budgets": [{**MONTH, "limit_usd": 5}],
        "budget_overrides": [{**RAISED, "until": "2026-03-14T09:20:30Z"}],
    }
    assert store.current.sources["budgets"] == "redis"
    store.change({"budgets": None})
    assert names(store.current.values.plan.of(OWNERS, NOW_US)) == list(SCOPES)
    assert list(stored()) == ["budget_overrides"]


def test_another_worker_sees_it_after_a_look(store, link):
    other = SettingsStore(link, Baseline(), Told())
    store.change({"budgets": [MONTH]})
    assert further(other.refresh().values.plan.of(OWNERS, NOW_US)) == ["month"]


def test_rows_in_redis_that_cannot_be_used_are_ignored_and_logged_one_by_one(store, put, told):
    put(
        budgets=[MONTH, {**MONTH, "name": "b", "period": "year"}, "c", *named("d"), {**MONTH, "limit_usd": 0}],
        budget_overrides=[{**RAISED, "owner": "*"}, RAISED, {**RAISED, "until": "soon"}],
    )
    now = store.refresh()
    store.refresh()
    assert (now.sources["budgets"], now.sources["budget_overrides"]) == ("redis", "redis")
    assert names(now.values.budgets) == ["month", "d"]
    assert now.values.budget_overrides == (Override("day", "hash456", 2_000_000_000),)
    assert told.ignored == [
        ("budgets[2].period", '"year"'),
        ("budgets[3]", '"c"'),
        ("budgets[5].limit_usd", "0"),
        ("budget_overrides[1].owner", '"*"'),
        ("budget_overrides[3].until", '"soon"'),
    ]


def test_what_is_no_list_in_redis_leaves_the_budgets_of_the_environment(link, put, told):
    baseline = load_config({"BUDGETS": json.dumps([MONTH])}).live_baseline
    store = SettingsStore(link, baseline, told)
    put(budgets={"month": MONTH})
    now = store.refresh()
    assert (names(now.values.budgets), now.sources["budgets"]) == (["month"], "environment")
    assert [setting for setting, _ in told.ignored] == ["budgets"]
    put(budgets=[])
    assert (store.refresh().values.budgets, store.current.sources["budgets"]) == ((), "redis")


def test_very_many_unusable_rows_do_not_fill_the_log(store, put, told):
    put(budget_overrides=[RAISED] * 1_000 + [None] * 500)
    assert len(store.refresh().values.budget_overrides) == 1_000
    assert len(told.ignored) == 21


def test_a_change_with_an_unusable_row_changes_nothing(store, stored):
    store.change({"budgets": [MONTH]})
    with pytest.raises(SettingsRejected) as caught:
        store.change(
            {"budgets": [MONTH, {**MONTH, "name": "b", "limit_usd": 0}], "budget_overrides": [], "nonsense": 1}
        )
    assert dict(caught.value.problems) == {
        "budgets": "row 2, limit_usd: an amount in USD from 0.000000001 to 1000000 with at most nine places; got 0",
        "nonsense": "there is no such setting",
    }
    assert list(stored()) == ["budgets"]


def test_the_window_of_a_further_budget_is_never_shorter_than_the_longest_answer(store):
    with pytest.raises(SettingsRejected, match=r"row 1, period: .*120 to 2678400"):
        store.change({"budgets": [{**MONTH, "period": {"sliding_seconds": 119}}]})
    store.change({"budgets": [{**MONTH, "period": {"sliding_seconds": 120}}]})


def test_the_environment_gives_both_lists_and_the_zone():
    live = load_config(
        {
            "BUDGETS": json.dumps([MONTH]),
            "BUDGET_OVERRIDES": json.dumps([RAISED]),
            "BUDGET_TIME_ZONE": "America/New_York",
        }
    ).live_baseline
    assert live.values.budgets[0].period == Calendar("month", "America/New_York")
    assert live.values.budget_overrides == (Override("day", "hash456", 2_000_000_000),)
    assert (live.sources["budgets"], live.sources["budget_overrides"]) == ("environment", "environment")
    assert live.budget_time_zone == "America/New_York"
    assert {budget.period.zone for budget in live.values.plan.of(OWNERS, NOW_US)[:1]} == {"UTC"}


@pytest.mark.parametrize(
    ("environ", "line"),
    [
        (
            {"BUDGETS": json.dumps([MONTH, {**MONTH, "name": "b", "mode": "off"}])},
            'BUDGETS: row 2, mode: enforce or shadow; got "off"',
        ),
        (
            {"BUDGETS": json.dumps([{**MONTH, "period": {"sliding_seconds": 119}}])},
            f'BUDGETS: row 1, period: {PERIODS}; got {{"sliding_seconds": 119}}',
        ),
        (
            {"BUDGETS": "month"},
            f"BUDGETS: {BUDGETS.allowed} (not valid JSON: Expecting value, line 1 column 1); got month",
        ),
        (
            {"BUDGET_OVERRIDES": json.dumps([{**RAISED, "until": "soon"}])},
            f'BUDGET_OVERRIDES: row 1, until: {MOMENTS}; got "soon"',
        ),
        (
            {"BUDGETS": json.dumps([{**MONTH, "na\nme": 1}])},
            rf"BUDGETS: row 1, 'na\nme': no such field; a row has {', '.join(BUDGETS.field_names)}; got 1",
        ),
        ({"BUDGET_TIME_ZONE": "Berlin"}, "BUDGET_TIME_ZONE: an IANA time zone such as Europe/Berlin; got Berlin"),
        ({"BUDGET_TIME_ZONE": "../UTC"}, "BUDGET_TIME_ZONE: an IANA time zone such as Europe/Berlin; got ../UTC"),
        ({"BUDGET_TIME_ZONE": "Europe"}, "BUDGET_TIME_ZONE: an IANA time zone such as Europe/Berlin; got Europe"),
    ],
)
def test_what_cannot_be_used_in_the_environment_stops_the_start_with_one_line(environ, line):
    with pytest.raises(ConfigurationError) as caught:
        load_config(environ)
    assert str(caught.value) == line


def test_a_longer_answer_makes_the_shortest_window_longer():
    environ = {"BUDGETS": json.dumps([{**MONTH, "period": {"sliding_seconds": 200}}]), "STREAM_DEADLINE_SECONDS": "300"}
    with pytest.raises(ConfigurationError, match="300 to 2678400"):
        load_config(environ)


# --- how the operator sees and changes them


@pytest.fixture
def operator(store, link):
    panel = Panel(store, link=link, mode="production", backend_name="atomic", clock=SystemClock())
    app = Flask(__name__)
    app.register_blueprint(make_admin(panel, "token"))
    client = app.test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = "Bearer token"
    return client


URL = "/api/v1/admin/settings"


def test_the_admin_api_shows_the_lists_as_they_are_written(operator):
    answer = operator.patch(URL, json={"budgets": [MONTH], "budget_overrides": [{**RAISED, "limit_usd": "0.25"}]})
    assert answer.status_code == 200
    settings = operator.get(URL).json["settings"]
    assert settings["budgets"]["value"] == [{**MONTH, "limit_usd": 5}]
    assert settings["budget_overrides"]["value"] == [{**RAISED, "limit_usd": 0.25}]
    assert settings["budgets"]["source"] == "redis"
    assert settings["budget_overrides"]["bounds"]["maximum"] == 1_000
    assert settings["budgets"]["allowed"].startswith("a JSON list of budgets")


def test_a_patch_with_an_unusable_row_is_a_422_that_names_it(operator, stored):
    patch = {"budgets": [MONTH, {**MONTH, "name": "day"}], "budget_overrides": [{**RAISED, "owner": ""}]}
    answer = operator.patch(URL, json={**patch, "llm_max_tokens": 7})
    assert answer.status_code == 422
    assert set(answer.json["fields"]) == {"budgets", "budget_overrides"}
    assert answer.json["fields"]["budgets"].startswith("row 2, name: 1 to 32 of a-z 0-9 _, and none of day, ")
    assert answer.json["fields"]["budget_overrides"].startswith("row 1, owner: ")
    assert stored() == {}


def test_a_field_of_a_row_that_is_there_twice_is_a_400(operator, stored):
    body = '{"budgets": [{"name": "a", "name": "b"}]}'
    assert operator.patch(URL, data=body, content_type="application/json").status_code == 400
    assert stored() == {}


def test_the_command_line_sets_and_shows_them(store, stored):
    def run(*words):
        return CliRunner().invoke(make_settings_cli(lambda: SettingsView(store, "production")), list(words))

    done = run("set", "budgets", json.dumps([MONTH]))
    assert (done.exit_code, done.output) == (
        0,
        'budgets is [{"name": "month", "scope": "team", "period": "month", "limit_usd": 5}] now (redis)\n',
    )
    assert stored() == {"budgets": [{**MONTH, "limit_usd": 5}]}
    assert "month" in run("show").stdout
    done = run("set", "budgets", json.dumps([MONTH, {**MONTH, "scope": "user", "name": "b"}]))
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: budgets: row 2, scope: identifier or network or ")
    assert done.stderr.endswith('; got "user"\n')
    assert run("set", "budgets", "nothing").stderr.endswith("line 1 column 1); got nothing\n")
    assert stored() == {"budgets": [{**MONTH, "limit_usd": 5}]}
    assert run("unset", "budgets").exit_code == 0
    assert stored() == {}
