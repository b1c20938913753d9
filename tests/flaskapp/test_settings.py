import json
import threading
from decimal import Decimal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from limits import parse_many

from backends.budgets import Scope
from backends.clock import SystemClock
from backends.errors import StoreError, shown
from backends.keys import SETTINGS_KEY
from backends.store.link import Link
from backends.store.shared_text import SharedText
from flaskapp.kept_text import KeptText
from flaskapp.settings import Baseline, LiveSettings, SettingsRejected, SettingsStore, settings_table
from flaskapp.strict_json import dumps
from flaskapp.value_types import MAX_DURATION_SECONDS, Amount, Duration, Rate, Switch, Whole
from tests.embedded import FragileServer

ROW_FIELDS = ["name", "scope", "owner", "period", "limit_usd", "mode", "throttle_seconds", "budget", "until"]
ROW_VALUES = [
    "day",
    "month",
    "key",
    "global",
    "all",
    "*",
    "shadow",
    "2026-03-14T09:20:30Z",
    0,
    1,
    {"sliding_seconds": 1},
]
USD = Amount("what")
USD_OR_NONE = Amount("what", zero_is_none=True)


class Told(list):
    """An observer that remembers."""

    def __call__(self, event):
        self.append(event)

    def named(self, name):
        return [event.fields for event in self if event.name == name]


@pytest.fixture
def told():
    return Told()


@pytest.fixture
def link(redis_url):
    link = Link(redis_url, clock=SystemClock())
    link.run(lambda client: client.flushall())
    yield link
    link.close()


@pytest.fixture
def put(link):
    """What an operator does with `redis-cli SET settings …`."""
    return lambda text: link.run(lambda client: client.set("settings", text))


@pytest.fixture
def raw(link):
    return lambda: link.run(lambda client: client.get("settings"))


@pytest.fixture
def store(link, told):
    return SettingsStore(link, Baseline(stream_deadline_seconds=120), told)


def in_environment(**values):
    settings = LiveSettings.model_validate({**dict(LiveSettings()), **values})
    sources = {name: "environment" if name in values else "default" for name in LiveSettings.model_fields}
    return Baseline(settings, sources)


# --- what is allowed


@pytest.mark.parametrize(
    "value", ["0.02", "0", "1000000", Decimal("1e6"), Decimal("0.000000001"), 7, 0, "1000000.000000000"]
)
def test_amounts_are_numbers_or_decimal_strings(value):
    assert USD_OR_NONE.read(value) == Decimal(value)


@pytest.mark.parametrize(
    "value",
    [
        0,
        "0.000",
        Decimal("-0.01"),
        -1,
        "-1",
        "1000000.000000001",
        1_000_001,
        "0.0000000001",
        Decimal("0.0000000001"),
        "1e2",
        "0x1",
        "\u0661",
        " 1",
        "1\n",
        "",
        ".",
        "1,5",
        "NaN",
        "Infinity",
        Decimal("NaN"),
        Decimal("sNaN"),
        Decimal("Infinity"),
        Decimal("1E+999999"),
        Decimal("9" * 5_000),
        0.5,
        True,
        None,
        [],
        {},
    ],
)
def test_other_amounts_are_refused(value):
    with pytest.raises(ValueError, match=r"an amount in USD from 0\.000000001 to 1000000 with at most nine places"):
        USD.read(value)


@given(
    st.decimals(min_value=0, max_value=2_000_000, places=10) | st.decimals() | st.integers() | st.text() | st.floats()
)
def test_an_amount_is_within_its_bounds_or_refused(value):
    try:
        amount = USD_OR_NONE.read(value)
    except ValueError:
        return
    assert 0 <= amount <= 1_000_000
    assert amount * 10**9 == int(amount * 10**9)
    assert amount == Decimal(value)


@pytest.mark.parametrize("value", [0, -1, MAX_DURATION_SECONDS + 1, 2**53, 1.0, Decimal(30), "30", True, None])
def test_durations_are_whole_seconds_of_at_most_31_days(value):
    duration = Duration("what")
    assert duration.read(1) == 1
    assert duration.read(31 * 86_400) == 31 * 86_400
    with pytest.raises(ValueError, match="a whole number of seconds from 1 to 2678400"):
        duration.read(value)


@pytest.mark.parametrize("text", ["1.0", "1e3", "+1", "-1", "", "९", "1_000", "9" * 5_000, "0x10"])
def test_typed_whole_numbers_are_digits(text):
    value_type = Whole("what", maximum=10**9)
    assert value_type.read_text(" 42 ") == 42
    with pytest.raises(ValueError):
        value_type.read_text(text)


@pytest.mark.parametrize("value", ["true", 1, 0, None, "on"])
def test_switches_are_booleans(value):
    assert Switch("what").read(value=False) is False
    with pytest.raises(ValueError, match="true or false"):
        Switch("what").read(value)


@pytest.mark.parametrize("text", ["1", "yes", "on", "", "tru\u0435"])
def test_typed_switches_are_true_or_false(text):
    assert Switch("what").read_text("TRUE ") is True
    assert Switch("what").read_text("False") is False
    with pytest.raises(ValueError):
        Switch("what").read_text(text)


RATES = ["60 per minute", "5/second; 100/hour", "1 per 2 days", "10/5minutes", "1/year", " 3 PER Hour ", "1/s"]


@given(
    st.sampled_from(RATES)
    | st.from_regex(r"[0-9]{1,3} ?(/|per) ?[0-9]{0,3} ?(second|minute|hour|day|month|year)s?", fullmatch=True)
    | st.text()
)
@example("60 per minute")
def test_every_rate_that_we_take_is_one_to_flask_limiter(text):
    try:
        rate = Rate("what").read(text)
    except ValueError:
        return
    assert all(item.amount > 0 and item.get_expiry() > 0 for item in parse_many(rate))


@pytest.mark.parametrize("rate", RATES[:-1])
def test_the_usual_rates_are_taken(rate):
    assert Rate("what").read(rate) == rate.strip()


@pytest.mark.parametrize(
    "rate",
    ["", "60", "0 per minute", "5 per 0 hours", "1/s", "5/2years", "; ", "1/day\n", "a" * 9_999, "1/day;" * 9, 60],
)
def test_other_rates_are_refused(rate):
    with pytest.raises(ValueError, match="a rate such as"):
        Rate("what").read(rate)


def test_what_is_shown_of_a_value_is_one_short_harmless_line():
    assert shown("a\nb\x1b[31m") == r"'a\nb\x1b[31m'"
    assert shown("\ud800") == r"'\ud800'"
    assert len(shown("x" * 10_000)) == 81


def test_each_setting_is_described_and_has_a_usable_default():
    table = settings_table(120)
    assert len(table) == 24
    for name, row in table.items():
        assert row.value_type.description.endswith(".")
        assert row.value_type.read(row.default) == row.default
        assert row.value_type.read_text(row.value_type.text(row.default)) == row.default
        assert row.variable == name.upper()


# --- what holds


def test_redis_beats_environment_beats_default(link, put, told):
    store = SettingsStore(link, in_environment(daily_cost_limit_usd=Decimal(3), llm_max_tokens=50), told)
    put('{"daily_cost_limit_usd": 0.01}')
    now = store.refresh()
    assert now is store.current
    assert (now.values.daily_cost_limit_usd, now.sources["daily_cost_limit_usd"]) == (Decimal("0.01"), "redis")
    assert (now.values.llm_max_tokens, now.sources["llm_max_tokens"]) == (50, "environment")
    assert (now.values.hourly_spend_limit_usd, now.sources["hourly_spend_limit_usd"]) == (1, "default")
    (day, *_) = now.values.plan.of({Scope.IDENTIFIER: "hash456"}, now_us=0)
    assert (day.name, day.limit_nanousd) == ("day", 10_000_000)
    link.run(lambda client: client.delete("settings"))
    assert store.refresh().values.daily_cost_limit_usd == 3


def test_unusable_fields_are_ignored_and_told_once(store, put, told):
    put(
        '{"daily_cost_limit_usd": "0.01", "hourly_spend_limit_usd": 0, "enable_cost_throttling": "no",'
        ' "high_cost_window_seconds": 119, "reservation_policy": "guess", "llm_max_tokens": null}'
    )
    now = store.refresh()
    assert store.refresh() == now
    assert [name for name, source in now.sources.items() if source == "redis"] == ["daily_cost_limit_usd"]
    assert [(fields["setting"], fields["got"]) for fields in told.named("setting_ignored")] == [
        ("hourly_spend_limit_usd", "0"),
        ("enable_cost_throttling", '"no"'),
        ("high_cost_window_seconds", "119"),
        ("reservation_policy", '"guess"'),
    ]
    assert "STREAM_DEADLINE_SECONDS" in told.named("setting_ignored")[2]["allowed"]


def test_a_text_with_very_many_unknown_fields_does_not_fill_the_log(store, put, told):
    put(json.dumps({f"unknown_{number}": 1 for number in range(1_000)} | {"llm_max_tokens": 7}))
    assert store.refresh().values.llm_max_tokens == 7
    ignored = told.named("setting_ignored")
    assert len(ignored) == 21
    assert ignored[-1]["got"] == "980 more"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "7",
        "secret",
        '["secret"]',
        '{"secret": "secret"',
        '{"llm_max_tokens": NaN}',
        '{"a":1,"a":2}',
        "[" * 100_000,
        b"\xff\xfe",
        "9" * 5_000,
    ],
)
def test_a_text_that_is_no_object_is_ignored_and_never_written(store, put, raw, told, text):
    put(text)
    before = raw()
    assert set(store.refresh().sources.values()) == {"default"}
    (ignored,) = told.named("setting_ignored")
    assert (ignored["setting"], ignored["got"]) == ("settings", f"{len(before)} bytes")
    with pytest.raises(SettingsRejected, match="settings: this Redis key holds no JSON object, so it seems to be"):
        store.change({"llm_max_tokens": 9})
    assert raw() == before


@pytest.mark.parametrize("change", [{"llm_max_tokens": 9}, {"llm_max_tokens": None}])
def test_settings_of_another_program_are_never_written_and_their_values_not_logged(store, put, raw, told, change):
    put('{"theme": "secret", "smtp": {"password": "secret"}}')
    before = raw()
    assert set(store.refresh().sources.values()) == {"default"}
    with pytest.raises(SettingsRejected, match="another program's and is not written: use another database"):
        store.change(change)
    assert raw() == before
    assert [fields["setting"] for fields in told.named("setting_ignored")] == ["theme", "smtp"]
    assert "secret" not in str(told.named("setting_ignored"))


@pytest.mark.parametrize("ours", ["{}", '{"llm_max_tokens": 7, "unknown": 1}', '{"llm_max_tokens": "rubbish"}'])
def test_an_empty_object_and_one_with_a_setting_of_ours_are_written(store, put, raw, ours):
    put(ours)
    assert store.change({"llm_max_tokens": 9}).values.llm_max_tokens == 9
    assert json.loads(raw())["llm_max_tokens"] == 9


def test_a_key_of_another_type_is_ignored_and_never_written(store, link, told):
    link.run(lambda client: client.hset("settings", "llm_max_tokens", "9"))
    assert set(store.refresh().sources.values()) == {"default"}
    with pytest.raises(SettingsRejected, match="no JSON object"):
        store.change({"llm_max_tokens": 9})
    assert link.run(lambda client: client.hgetall("settings")) == {b"llm_max_tokens": b"9"}
    assert not told.named("store_broken")


@given(
    st.binary(max_size=40)
    | st.dictionaries(
        st.sampled_from(list(LiveSettings.model_fields)),
        st.none()
        | st.booleans()
        | st.integers()
        | st.decimals(allow_nan=False, allow_infinity=False)
        | st.text(max_size=5)
        | st.lists(st.none() | st.dictionaries(st.sampled_from(ROW_FIELDS), st.sampled_from(ROW_VALUES))),
    ).map(dumps)
)
def test_no_text_in_redis_breaks_the_settings(text):
    from flaskapp.settings import _effective  # the rule alone: a server adds nothing here

    raw_text = text if isinstance(text, bytes) else text.encode()
    now, _ = _effective(raw_text, Baseline(stream_deadline_seconds=120), settings_table(120))
    for name, row in settings_table(120).items():
        assert row.value_type.read(getattr(now.values, name)) == getattr(now.values, name)


# --- changes


def test_a_change_is_seen_at_once_and_elsewhere_after_a_look(store, link, raw):
    other = SettingsStore(link, Baseline(), Told())
    now = store.change(
        {"daily_cost_limit_usd": "0.010", "throttle_on_error": "closed", "enable_challenge_response": False}
    )
    assert (
        raw() == b'{"daily_cost_limit_usd": 0.010, "throttle_on_error": "closed", "enable_challenge_response": false}'
    )
    assert now.values.throttle_on_error == "closed"
    assert now.sources["throttle_on_error"] == "redis"
    assert other.refresh().values == now.values


def test_a_change_is_all_or_nothing(store, put, raw):
    put('{"llm_max_tokens": 7}')
    with pytest.raises(SettingsRejected) as caught:
        store.change({"llm_max_tokens": 8, "llm_max_input_tokens": 0, "nonsense\n": 1, "chat_rate_limit": None})
    assert dict(caught.value.problems) == {
        "llm_max_input_tokens": "a whole number of tokens from 1 to 10000000; got 0",
        r"'nonsense\n'": "there is no such setting",
    }
    assert "\n" not in str(caught.value)
    assert raw() == b'{"llm_max_tokens": 7}'


def test_the_window_is_never_shorter_than_the_longest_answer(store):
    with pytest.raises(SettingsRejected, match="from 120 to 2678400"):
        store.change({"high_cost_window_seconds": 119})
    assert store.change({"high_cost_window_seconds": 120}).values.high_cost_window_seconds == 120


def test_floats_are_refused_as_they_are_not_exact(store):
    with pytest.raises(SettingsRejected):
        store.change({"daily_cost_limit_usd": 0.1})


def test_none_goes_back_and_an_empty_object_leaves_no_key(store, raw):
    store.change({"llm_max_tokens": 9, "llm_max_input_tokens": 9})
    now = store.change({"llm_max_tokens": None})
    assert (now.values.llm_max_tokens, now.sources["llm_max_tokens"]) == (400, "default")
    assert raw() == b'{"llm_max_input_tokens": 9}'
    store.change({"llm_max_input_tokens": None, "chat_rate_limit": None})
    assert raw() is None


def test_an_empty_change_writes_nothing(store, raw):
    assert store.change({}) is store.current
    assert raw() is None


def test_a_change_keeps_what_it_does_not_name(store, put, raw):
    put(
        '{"later_setting": {"a": [1, 2.50]}, "hourly_spend_limit_usd": 0,'
        ' "llm_max_tokens": null, "x": 123456789012345678901234567890}'
    )
    store.change({"daily_cost_limit_usd": Decimal("0.5")})
    assert raw() == (
        b'{"later_setting": {"a": [1, 2.50]}, "hourly_spend_limit_usd": 0,'
        b' "x": 123456789012345678901234567890, "daily_cost_limit_usd": 0.5}'
    )


def test_the_key_has_no_life_span_even_if_someone_gave_it_one(store, link, put):
    put("{}")
    link.run(lambda client: client.expire("settings", 100))
    store.change({"llm_max_tokens": 9})
    assert link.run(lambda client: client.ttl("settings")) == -1


def test_changes_at_the_same_time_are_all_kept(redis_url, link, raw):
    names = ["llm_max_tokens", "llm_max_input_tokens", "cost_throttle_duration_seconds", "high_cost_window_seconds"]
    stores = [SettingsStore(link, Baseline(), Told()) for _ in names]
    barrier = threading.Barrier(len(names))
    errors = []

    def change(store, name):
        barrier.wait()
        try:
            for value in range(1, 21):
                store.change({name: value})
        except Exception as error:  # noqa: BLE001 (a thread's error would be lost)
            errors.append(error)

    threads = [threading.Thread(target=change, args=pair) for pair in zip(stores, names, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert json.loads(raw()) == dict.fromkeys(names, 20)


# --- the switch is announced


def test_the_switch_is_told_at_the_first_look_and_at_each_change(link, put, told):
    baseline = Baseline(LiveSettings(enable_cost_throttling=False), development=True)
    store = SettingsStore(link, baseline, told)
    assert told == []
    store.refresh()
    store.refresh()
    store.change({"enable_cost_throttling": True})
    store.refresh()
    store.change({"llm_max_tokens": 9})
    put('{"enable_cost_throttling": false}')
    store.refresh()
    store.change({"enable_cost_throttling": None})
    assert [fields["message"] for fields in told.named("throttling_switched")] == [
        "Cost throttling is off (development mode)",
        "Cost throttling is on (redis)",
        "Cost throttling is off (redis)",
        "Cost throttling is off (development mode)",
    ]


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        (Baseline(), "Cost throttling is on (default)"),
        (in_environment(enable_cost_throttling=True), "Cost throttling is on (environment)"),
        (in_environment(enable_cost_throttling=False), "Cost throttling is off (environment)"),
    ],
)
def test_the_source_of_the_switch_is_named(link, told, baseline, message):
    SettingsStore(link, baseline, told).refresh()
    assert [fields["message"] for fields in told.named("throttling_switched")] == [message]


# --- Redis away


@pytest.fixture
def dead_store(told):
    link = Link("redis://127.0.0.1:1", clock=SystemClock(), timeout_seconds=0.1)
    yield SettingsStore(link, in_environment(llm_max_tokens=50), told)
    link.close()


def test_without_redis_the_environment_holds_and_the_switch_is_told_all_the_same(dead_store, told):
    now = dead_store.refresh()
    dead_store.refresh()
    assert now.values.llm_max_tokens == 50
    assert not dead_store.is_reachable
    assert [event.name for event in told] == ["settings_unreadable", "throttling_switched"]


def test_without_redis_a_change_is_a_store_error(dead_store):
    with pytest.raises(StoreError):
        dead_store.change({"llm_max_tokens": 9})
    assert dead_store.current.values.llm_max_tokens == 50


def test_the_last_known_values_hold_while_redis_is_away(store, link, put):
    put('{"llm_max_tokens": 9}')
    store.refresh()
    away = Link("redis://127.0.0.1:1", clock=SystemClock(), timeout_seconds=0.1)
    store._shared = SharedText(away, SETTINGS_KEY)
    assert store.refresh().values.llm_max_tokens == 9
    assert not store.is_reachable
    away.close()
    store._shared = SharedText(link, SETTINGS_KEY)
    store.refresh()
    assert store.is_reachable


# --- what was there and is gone


def flushes(link):
    link.run(lambda client: client.flushall())


def deletes_the_key(link):
    link.run(lambda client: client.delete("settings"))


def puts_something_else(link):
    link.run(lambda client: client.set("settings", '{"drain_seconds": 3}'))


def puts_what_is_no_object(link):
    link.run(lambda client: client.set("settings", "broken"))


ROWS = [{"name": "monthly", "scope": "identifier", "owner": "somebody", "period": "month", "limit_usd": "5"}]


@pytest.mark.parametrize("lose", [flushes, deletes_the_key, puts_something_else, puts_what_is_no_object])
def test_settings_that_are_gone_are_told_with_what_held(store, link, told, lose):
    store.change({"daily_cost_limit_usd": "0.5", "throttle_on_error": "closed", "budgets": ROWS})
    lose(link)
    assert store.refresh().values == LiveSettings(drain_seconds=store.current.values.drain_seconds)
    store.refresh()
    assert told.named("settings_lost") == [
        {
            "lost": "daily_cost_limit_usd=0.5, budgets=1 row, throttle_on_error=closed",
            "names": ("daily_cost_limit_usd", "budgets", "throttle_on_error"),
        }
    ]


def test_a_loss_that_cannot_be_looked_into_leaves_what_held_until_it_can(own_server, told):
    link = Link(own_server.url, clock=SystemClock())
    store = SettingsStore(link, Baseline(), told)
    store.change({"drain_seconds": 7})
    flushes(link)
    link.run(lambda client: client.acl_setuser("default", commands=["-mget"], enabled=True))
    assert store.refresh().values.drain_seconds == 7
    assert (store.is_reachable, len(told.named("settings_unreadable"))) == (False, 1)
    link.run(lambda client: client.acl_setuser("default", commands=["+mget"], enabled=True))
    assert store.refresh().values.drain_seconds == 10
    assert told.named("settings_lost") == [{"lost": "drain_seconds=7", "names": ("drain_seconds",)}]
    link.close()


def test_an_old_snapshot_is_told(tmp_path, told):
    with FragileServer(tmp_path) as server:
        link = Link(server.url, clock=SystemClock())
        store = SettingsStore(link, Baseline(), told)
        store.change({"llm_max_tokens": 9})
        link.run(lambda client: client.save())
        store.change({"llm_max_tokens": 8, "drain_seconds": 7})
        server.kill()
        server.start()
        assert store.refresh().values.llm_max_tokens == 9
        link.close()
    assert told.named("settings_lost") == [{"lost": "drain_seconds=7", "names": ("drain_seconds",)}]


def test_a_change_that_takes_settings_out_is_no_loss(store, link, told):
    store.change({"llm_max_tokens": 9, "drain_seconds": 7, "chat_rate_limit": "5 per minute"})
    elsewhere = SettingsStore(link, Baseline(), told)
    elsewhere.change({"llm_max_tokens": None})
    elsewhere.change({"drain_seconds": None})
    assert set(store.refresh().sources.values()) == {"default", "redis"}
    elsewhere.change({"chat_rate_limit": None})
    assert set(store.refresh().sources.values()) == {"default"}
    link.run(lambda client: client.set("settings", '{"llm_max_tokens": 9}'))
    store.refresh()
    link.run(lambda client: client.set("settings", '{"llm_max_tokens": null}'))
    assert store.refresh().values.llm_max_tokens == 400
    assert told.named("settings_lost") == []


def test_a_loss_that_a_change_finds_is_told_too(store, link, told):
    store.change({"llm_max_tokens": 9, "drain_seconds": 7})
    flushes(link)
    store.change({"drain_seconds": None})
    assert told.named("settings_lost") == [{"lost": "llm_max_tokens=9", "names": ("llm_max_tokens",)}]


# --- what is known to a process that starts while Redis is away


@pytest.fixture
def keep(tmp_path, link):
    """`keep(store)`: as the service does, with writes that have ended when `keep` of it comes back."""
    return lambda store, run_aside=lambda job: job(): store.keep_in(KeptText(tmp_path, link.place, run_aside))


def test_who_starts_in_an_outage_knows_the_last_settings(store, dead_store, keep, told, tmp_path):
    keep(store)
    store.change({"throttle_on_error": "closed", "daily_cost_limit_usd": "0.5"})
    store._keep()
    keep(dead_store)
    now = dead_store.refresh()
    assert (now.values.throttle_on_error, now.values.daily_cost_limit_usd) == ("closed", Decimal("0.5"))
    assert (now.sources["throttle_on_error"], now.values.llm_max_tokens) == ("redis", 50)
    assert not dead_store.is_reachable
    assert [(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()] == [0o600]
    assert told.named("settings_lost") == []


def test_what_was_taken_out_is_kept_no_more(store, dead_store, keep, tmp_path):
    keep(store)
    store.change({"drain_seconds": 7})
    store._keep()
    store.change({"drain_seconds": None})
    store._keep()
    assert list(tmp_path.iterdir()) == []


def test_what_was_lost_while_it_did_not_run_is_told_at_its_start(store, link, keep, told):
    keep(store)
    store.change({"drain_seconds": 7})
    store._keep()
    flushes(link)
    later = SettingsStore(link, Baseline(), told)
    keep(later)
    assert later.refresh().values.drain_seconds == 10
    assert told.named("settings_lost") == [{"lost": "drain_seconds=7", "names": ("drain_seconds",)}]


def test_the_settings_of_another_redis_are_not_taken(store, link, keep, tmp_path):
    keep(store)
    store.change({"drain_seconds": 7})
    store._keep()
    assert KeptText(tmp_path, link.place + "1", lambda job: job()).text is None
    assert KeptText(tmp_path, link.place, lambda job: job()).text == b'{"drain_seconds": 7}'


@pytest.mark.parametrize("text", [b"", b"\xff\x00", b"[]", b'{"drain_seconds": "much", "llm_max_tokens": 9}'])
def test_what_is_unusable_on_the_disk_is_left_out(store, dead_store, keep, tmp_path, text):
    keep(store)
    store.change({"drain_seconds": 7})
    store._keep()
    [path] = tmp_path.iterdir()
    path.write_bytes(text)
    keep(dead_store)
    now = dead_store.refresh().values
    assert (now.drain_seconds, now.llm_max_tokens) == (10, 9 if b"llm" in text else 50)


def test_a_disk_that_takes_nothing_is_told_once_and_nothing_else_changes(store, told, link, tmp_path):
    (tmp_path / "file").write_text("in the way")
    kept = KeptText(tmp_path / "file", link.place, lambda job: job())
    store.keep_in(kept)
    store.change({"drain_seconds": 7})
    for _ in range(3):
        store.refresh()
        store._keep()
    assert len(told.named("settings_not_kept")) == 1
    assert store.current.values.drain_seconds == 7


def test_one_write_at_a_time_and_the_last_text_stays(store, keep, tmp_path):
    begun = []
    keep(store, begun.append)
    for seconds in (7, 8, 9):
        store.change({"drain_seconds": seconds})
        store._keep()
    assert len(begun) == 1
    begun.pop()()
    store._keep()
    begun.pop()()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b'{"drain_seconds": 9}']


# --- the thread


def wait_for(event):
    assert event.wait(timeout=5), "it did not come in time"


def test_a_change_by_hand_arrives_without_a_request(link, put):
    switched = threading.Event()

    def observer(event):
        if event.fields.get("source") == "redis":
            switched.set()

    store = SettingsStore(link, Baseline(), observer)
    store.refresh()
    store.start_polling(interval_seconds=0.01)
    store.start_polling(interval_seconds=0.01)
    put('{"enable_cost_throttling": false}')
    wait_for(switched)
    store.stop()
    store.stop()
    assert store.current.values.enable_cost_throttling is False
    assert not any(thread.name == "settings" for thread in threading.enumerate())


def test_a_bug_does_not_end_the_thread(link):
    looked_twice = threading.Event()
    told = Told()
    store = SettingsStore(link, Baseline(), told)

    def broken_look():
        if told.named("settings_unreadable"):
            looked_twice.set()
        raise RuntimeError("a bug")

    store.refresh = broken_look
    store.start_polling(interval_seconds=0.01)
    wait_for(looked_twice)
    store.stop()
    assert told.named("settings_unreadable")[0] == {"error": "a bug"}


def test_each_value_that_changes_is_logged_with_from_to_and_source(store, put, told):
    put('{"llm_max_tokens": 7}')
    store.refresh()
    assert told.named("setting_changed") == []  # what holds from the start is no change
    row = {"budget": "day", "owner": "hash456", "limit_usd": "0.5"}
    store.change({"daily_cost_limit_usd": "0.50", "budget_overrides": [row]})
    put('{"enable_cost_throttling": false}')
    store.refresh()
    changes = [tuple(fields.values()) for fields in told.named("setting_changed")]
    assert changes == [
        ("daily_cost_limit_usd", "0.25", "0.50", "redis"),
        ("budget_overrides", "0 rows", "1 row", "redis"),
        ("enable_cost_throttling", "true", "false", "redis"),
        ("daily_cost_limit_usd", "0.50", "0.25", "default"),
        ("budget_overrides", "1 row", "0 rows", "default"),
        ("llm_max_tokens", "7", "400", "default"),
    ]
