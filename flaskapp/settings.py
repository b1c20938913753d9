"""Live settings: what may be changed while the service runs, and the one Redis string that holds the changes.

`LiveSettings` is the table: name, type, default, bounds, unit and description of each are written there, once.
Precedence: Redis ``settings`` > environment > default. Reading costs no I/O: a thread polls Redis.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import cached_property
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from backends.budgets import (
    BUILT_IN,
    SHORTEST_WINDOW_SECONDS,
    WHOLE_MILLIONTHS,
    Budget,
    Calendar,
    Scope,
    Share,
    Sliding,
)
from backends.contract import Event, Observer
from backends.errors import StoreBusy, StoreError, TollgateError, shown
from backends.keys import SETTING_UNSET_PREFIX, SETTINGS_KEY
from backends.money import nanousd_from_usd
from backends.store import Words
from backends.store.link import Link
from backends.store.shared_text import NOT_A_STRING, SharedText
from flaskapp import strict_json
from flaskapp.budgets import (
    EACH_OWNER,
    SHARED_HOURS,
    WIDE_BUDGETS,
    WIDE_TIMES,
    BudgetPlan,
    BudgetRows,
    FurtherBudget,
    Override,
    OverrideRows,
)
from flaskapp.http.networks import IPV6_PREFIX
from flaskapp.kept_text import KeptText
from flaskapp.strict_json import StrictJsonError
from flaskapp.value_types import (
    Amount,
    Choice,
    Duration,
    Part,
    Rate,
    Switch,
    ValueType,
    Whole,
    refusal_text,
    shown_json,
    times,
)

Source = Literal["redis", "environment", "default"]

POLL_INTERVAL_SECONDS = 0.4
_UNSET_KEEP_SECONDS = 31 * 86_400
"""At least as long as an instance is stopped that then misses what was taken out meanwhile."""
_REPORTED_FIELDS = 20
"""How many unusable fields of one text are logged: very many must not fill the log."""
NETWORK_RATE_TIMES = 10
_CHAT_RATE = "60 per minute"
_NOT_OURS = (
    "this Redis key holds {}, so it seems to be another program's and is not written: use another database of this "
    "Redis, or delete the key if it is not needed"
)
_WINDOW = "high_cost_window_seconds"


class LimitSetting(NamedTuple):
    """Where a built-in budget has its limit from."""

    name: str
    """Of the live setting."""
    marker_times: int = 0
    """TTL of the throttle marker that its refusal sets, as so many `cost_throttle_duration_seconds`; 0 sets none."""


LIMIT_SETTINGS: Mapping[str, LimitSetting] = MappingProxyType(
    {
        "day": LimitSetting("daily_cost_limit_usd", marker_times=2),
        "window": LimitSetting("high_cost_threshold_usd", marker_times=1),
        "network_window": LimitSetting("network_cost_limit_usd"),
        "network_day": LimitSetting("network_daily_cost_limit_usd"),
        "global_hour": LimitSetting("hourly_spend_limit_usd"),
        "global_day": LimitSetting("daily_spend_limit_usd"),
    }
)
"""By name of the built-in budget."""


class LiveSettings(BaseModel):
    """One consistent set of live settings. It never changes: a new one replaces it."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    enable_cost_throttling: Annotated[
        bool, Switch("Whether spending is limited at all: on in production, off in development.")
    ] = True
    enable_challenge_response: Annotated[
        bool, Switch("Whether a request needs a fresh challenge: on in production, off in development.")
    ] = True
    high_cost_threshold_usd: Annotated[Decimal, Amount("What one identifier may spend in the sliding window.")] = (
        Decimal("0.02")
    )
    high_cost_window_seconds: Annotated[
        int, Duration("Length of the sliding window, an identifier's and a network's; never shorter than an answer.")
    ] = 600
    cost_throttle_duration_seconds: Annotated[
        int, Duration("How long an identifier is throttled after a window refusal; after a daily one twice that.")
    ] = 30
    throttle_when_busy: Annotated[
        bool, Switch("Whether a refusal that only open reservations cause throttles the identifier too.")
    ] = True
    daily_cost_limit_usd: Annotated[Decimal, Amount("What one identifier may spend in a UTC day.")] = Decimal("0.25")
    network_cost_limit_usd: Annotated[
        Decimal, Amount("What one client network, all its identifiers, may spend in the window.", zero_is_none=True)
    ] = Decimal("0.10")
    network_daily_cost_limit_usd: Annotated[
        Decimal, Amount("What one client network, all its identifiers, may spend in a UTC day.", zero_is_none=True)
    ] = Decimal("1.00")
    hourly_spend_limit_usd: Annotated[Decimal, Amount("What everybody together may spend in a UTC hour.")] = Decimal(
        "1.00"
    )
    daily_spend_limit_usd: Annotated[Decimal, Amount("What everybody together may spend in a UTC day.")] = Decimal(
        "5.00"
    )
    network_share: Annotated[
        Decimal,
        Part("How much one network may have of what others leave of everybody's UTC hour and day; 1 is no rule."),
    ] = Decimal("0.25")
    budgets: Annotated[
        tuple[FurtherBudget, ...],
        BudgetRows("Further budgets beside the six: what else the owners of a scope may spend in a period."),
    ] = ()
    budget_overrides: Annotated[
        tuple[Override, ...], OverrideRows("Other limits for single owners, of any budget; 0 blocks the owner.")
    ] = ()
    reservation_policy: Annotated[
        Literal["worst_case", "slices"],
        Choice(
            "How much is reserved: the most that an answer can cost, or a slice that is extended as the answer runs.",
            values=("worst_case", "slices"),
        ),
    ] = "worst_case"
    reservation_slice_tokens: Annotated[
        int, Whole("Under slices: how much output is asked for at a time.", unit="tokens", maximum=1_000_000)
    ] = 256
    reservation_cushion_tokens: Annotated[
        int,
        Whole(
            "Under slices: the least output held beyond what was read, for what the upstream may be ahead of its "
            "reader; it grows with what was seen ahead, to a slice or eight times this at most.",
            unit="tokens",
            maximum=1_000_000,
        ),
    ] = 16
    drain_seconds: Annotated[
        int,
        Duration(
            "How long the upstream is still read for its usage after the client has left; 0 is not at all.", minimum=0
        ),
    ] = 10
    throttle_on_error: Annotated[
        Literal["open", "closed"],
        Choice(
            "When Redis fails: open admits while the emergency budget lasts, closed refuses.", values=("open", "closed")
        ),
    ] = "open"
    fail_open_budget_usd: Annotated[
        Decimal, Amount("The emergency budget of one instance, all its workers, per UTC hour.", zero_is_none=True)
    ] = Decimal("1.00")
    llm_max_tokens: Annotated[
        int, Whole("Default and ceiling of an answer's output.", unit="tokens", maximum=1_000_000)
    ] = 400
    llm_max_input_tokens: Annotated[
        int,
        Whole("Ceiling of the input: the oldest turns are left out until it fits.", unit="tokens", maximum=10_000_000),
    ] = 3_000
    chat_rate_limit: Annotated[str, Rate("Requests of one identifier, in flask-limiter's words.")] = _CHAT_RATE
    network_rate_limit: Annotated[
        str,
        Rate(
            "Requests of one network on every route that costs work, in flask-limiter's words; by default ten times "
            "`chat_rate_limit`."
        ),
    ] = times(_CHAT_RATE, NETWORK_RATE_TIMES)

    @cached_property
    def plan(self) -> BudgetPlan:
        """What requests are charged to."""
        built_in = {name: self._built_in(name) for name in BUILT_IN}
        millionths = int(self.network_share * WHOLE_MILLIONTHS)
        hours: list[Budget] = []
        if millionths < WHOLE_MILLIONTHS:
            built_in["network_day"] = built_in["network_day"]._replace(share=Share("global_day", millionths))
            of_hour = Share("global_hour", millionths)
            hours = [_hour_of(scope, name, of_hour) for name, scope in SHARED_HOURS.items()]
        wide = [_wide(name, built_in[like]) for name, like in WIDE_BUDGETS.items()]
        return BudgetPlan([*built_in.values(), *wide, *hours], self.budgets, self.budget_overrides)

    @property
    def outage_costs_usd_an_hour(self) -> Decimal:
        """The most that an outage costs an instance, however long it lasts."""
        return Decimal(0) if self.throttle_on_error == "closed" else self.fail_open_budget_usd

    def _built_in(self, name: str) -> Budget:
        scope, unit, limit = BUILT_IN[name].scope, BUILT_IN[name].unit, LIMIT_SETTINGS[name]
        return Budget(
            name,
            EACH_OWNER,
            Sliding(self.high_cost_window_seconds) if unit is None else Calendar(unit),
            # 0 is allowed only where it means that there is no limit.
            nanousd_from_usd(getattr(self, limit.name)) or None,
            scope,
            throttle_seconds=limit.marker_times * self.cost_throttle_duration_seconds,
        )


def _wide(name: str, like: Budget) -> Budget:
    """What a wide network may spend where one of its networks may spend that."""
    limit_nanousd = None if like.limit_nanousd is None else WIDE_TIMES * like.limit_nanousd
    return like._replace(name=name, scope=Scope.WIDE_NETWORK, limit_nanousd=limit_nanousd)


def _hour_of(scope: Scope, name: str, share: Share) -> Budget:
    """What each network of that scope has in a UTC hour: without a limit, but of everybody's hour."""
    return Budget(name, EACH_OWNER, Calendar("hour"), None, scope, share=share)


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table."""

    name: str
    value_type: ValueType[object]
    default: object

    @property
    def variable(self) -> str:
        """The environment variable of the same setting."""
        return self.name.upper()


def derived(values: Mapping[str, object], sources: Mapping[str, Source]) -> dict[str, object]:
    """The values of settings whose default follows from others."""
    if sources["network_rate_limit"] != "default":
        return {}
    return {"network_rate_limit": times(str(values["chat_rate_limit"]), NETWORK_RATE_TIMES)}


def settings_table(
    stream_deadline_seconds: int = 1, budget_time_zone: str = "UTC", network_ipv6_prefix: int = IPV6_PREFIX
) -> dict[str, Setting]:
    """All live settings by name; no sliding window is shorter than the longest answer."""
    rows = {}
    for name, info in LiveSettings.model_fields.items():
        value_type = next(item for item in info.metadata if isinstance(item, ValueType))
        bounded = _bounded(name, value_type, stream_deadline_seconds, budget_time_zone, network_ipv6_prefix)
        rows[name] = Setting(name, bounded, info.default)
    return rows


def _bounded(
    name: str, value_type: ValueType[Any], stream_deadline_seconds: int, zone: str, ipv6_prefix: int
) -> ValueType[Any]:
    """The type with the bounds that the environment gives it."""
    if name == _WINDOW and isinstance(value_type, Whole):
        return replace(value_type, minimum=stream_deadline_seconds, note=" (not shorter than STREAM_DEADLINE_SECONDS)")
    if isinstance(value_type, BudgetRows):
        shortest_seconds = max(SHORTEST_WINDOW_SECONDS, stream_deadline_seconds)
        return replace(value_type, shortest_seconds=shortest_seconds, zone=zone, ipv6_prefix=ipv6_prefix)
    return replace(value_type, ipv6_prefix=ipv6_prefix) if isinstance(value_type, OverrideRows) else value_type


@dataclass(frozen=True, slots=True)
class Effective:
    """The values that hold now, and the source of each."""

    values: LiveSettings
    sources: Mapping[str, Source]


@dataclass(frozen=True, slots=True)
class Baseline:
    """The values where Redis has none: environment and defaults, fixed at the start.

    In development mode the two switches are off by default.
    """

    values: LiveSettings = field(default_factory=LiveSettings)
    sources: Mapping[str, Source] = field(default_factory=lambda: dict.fromkeys(LiveSettings.model_fields, "default"))
    development: bool = False
    stream_deadline_seconds: int = 1
    budget_time_zone: str = "UTC"
    network_ipv6_prefix: int = IPV6_PREFIX


class SettingsRejected(TollgateError):
    """A change with a name or a value that cannot be used; nothing was changed.

    `problems` gives one sentence a field; the text of the exception is one line.
    """

    def __init__(self, problems: Mapping[str, str]) -> None:
        self.problems = MappingProxyType(dict(problems))
        super().__init__("; ".join(f"{name}: {reason}" for name, reason in problems.items()))


class SettingsStore:
    """The live settings of this process, kept up to date from Redis.

    Events: ``throttling_switched`` (`message`, `on`, `source`) at the first read and at each change of it;
    ``setting_ignored`` (`setting`, `allowed`, `got`) for what is unusable in Redis, once a distinct text; of a list it
    may be one row, such as ``budgets[2].period``, and the other rows hold;
    ``settings_lost`` (`lost`, `names`) when settings that held are gone and no `change` took them out: the environment
    holds instead;
    ``settings_unreadable`` (`error`) once an outage; ``settings_not_kept`` (`error`) when the disk begins to refuse
    them;
    ``setting_changed`` (`setting`, `from`, `to`, `source`) for each value that is another one than before.
    """

    def __init__(self, link: Link, baseline: Baseline, observer: Observer) -> None:
        self.table: Mapping[str, Setting] = MappingProxyType(
            settings_table(baseline.stream_deadline_seconds, baseline.budget_time_zone, baseline.network_ipv6_prefix)
        )
        self.baseline = baseline
        self._link = link
        self._shared = SharedText(link, SETTINGS_KEY)
        self._observer = observer
        self.current = Effective(baseline.values, MappingProxyType(dict(baseline.sources)))
        """The settings that hold now."""
        self.is_reachable = True
        """Whether Redis answered the last read; if not, the last known values hold."""
        self._text: bytes | None = None
        self._kept: KeptText | None = None
        self._keep_failure = ""
        self._announced: tuple[bool, str] | None = None
        # Reading and adopting are one step, or a slow reader would put back what a change has just replaced.
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def keep_in(self, kept: KeptText) -> None:
        """Begin with what was kept there, unless Redis was read before, and keep there what is read from now on."""
        with self._lock:
            self._kept = kept
            if self._text is None:
                self.current, _ = _effective(kept.text, self.baseline, self.table)
                self._text = kept.text

    def refresh(self) -> Effective:
        """Read Redis now. While it is away the last known values hold; never raises StoreError."""
        with self._lock:
            try:
                self._adopt(self._shared.read())
            except StoreError as error:
                if self.is_reachable:
                    self._observer(Event("settings_unreadable", {"error": str(error)}))
                self.is_reachable = False
            else:
                self.is_reachable = True
            self._announce()
            return self.current

    def change(self, patch: Mapping[str, object]) -> Effective:
        """Change some settings, all or none; `None` takes a setting back to environment or default.

        Args:
            patch: by name, values as strict JSON gives them (amounts: int, Decimal or decimal string; no floats).

        Raises:
            SettingsRejected: unknown names or unusable values, or the key is another program's; nothing was changed.
            StoreError: Redis could not be asked; whether it was changed is unknown.
        """
        wanted = self._read_patch(patch)
        if not wanted:
            return self.current
        with self._lock:
            changed = self._shared.change(lambda text: _changed(text, wanted, self.table), _unset_on_purpose(wanted))
            if changed is None:
                raise StoreBusy("the settings are being changed by too many at once")
            self.is_reachable = True
            self._adopt(changed[1])
            self._announce()
            return self.current

    def start_polling(
        self, then: Callable[[], None] = lambda: None, interval_seconds: float = POLL_INTERVAL_SECONDS
    ) -> None:
        """Poll Redis in a thread of this process, and call `then` each time: to be called after the fork."""
        if self._thread is not None:
            return
        self._stop.clear()
        self._thread = threading.Thread(target=self._poll, args=(then, interval_seconds), name="settings", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, if there is one."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=2)
            self._thread = None

    def _poll(self, then: Callable[[], None], interval_seconds: float) -> None:
        while not self._stop.wait(interval_seconds):
            try:
                self.refresh()
                then()
                self._keep()
            except Exception as error:  # noqa: BLE001 (a bug in here must not freeze the settings for ever)
                self._observer(Event("settings_unreadable", {"error": shown(str(error))}))

    def _keep(self) -> None:
        """Keep what holds. Here and not where it is read: only the thread that polls does it, and no request."""
        if self._kept is None:
            return
        failure, before = self._kept.failure, self._keep_failure
        self._keep_failure = failure
        if failure and not before:
            self._observer(Event("settings_not_kept", {"error": failure}))
        self._kept.keep(self._text)

    def _read_patch(self, patch: Mapping[str, object]) -> dict[str, object]:
        wanted: dict[str, object] = {}
        problems: dict[str, str] = {}
        for name, value in patch.items():
            setting = self.table.get(name)
            if setting is None:
                problems[shown(name)] = "there is no such setting"
                continue
            try:
                wanted[name] = None if value is None else setting.value_type.read(value)
            except ValueError as error:
                problems[name] = refusal_text(error, shown_json(value))
        if problems:
            raise SettingsRejected(problems)
        return wanted

    def _adopt(self, text: bytes | None) -> None:
        if text == self._text:
            return
        lost = self._lost(text)
        before = self.current
        self.current, ignored = _effective(text, self.baseline, self.table)
        self._text = text
        if lost:
            self._observer(Event("settings_lost", {"lost": ", ".join(lost.values()), "names": tuple(lost)}))
        for event in (*ignored, *(self._changes_since(before) if self._announced else ())):
            self._observer(event)

    def _lost(self, text: bytes | None) -> dict[str, str]:
        """By name: what holds from Redis until now, is not in `text`, and was not taken out by a change."""
        there = {} if _is_broken(text) else _fields(text)
        gone = [name for name, source in self.current.sources.items() if source == "redis" and name not in there]
        if not gone:
            return {}
        unset = self._link.run(lambda client: client.mget([SETTING_UNSET_PREFIX + name for name in gone]))
        lost = [name for name, was_unset in zip(gone, unset, strict=True) if was_unset is None]
        values = self.current.values
        return {name: f"{name}={_logged(self.table[name], getattr(values, name))}" for name in lost}

    def _changes_since(self, before: Effective) -> Iterator[Event]:
        """What the first read finds is no change."""
        for name, setting in self.table.items():
            old, new = getattr(before.values, name), getattr(self.current.values, name)
            if old != new:
                fields = {"from": _logged(setting, old), "to": _logged(setting, new)}
                yield Event("setting_changed", {"setting": name, **fields, "source": self.current.sources[name]})

    def _announce(self) -> None:
        on = self.current.values.enable_cost_throttling
        source: str = self.current.sources["enable_cost_throttling"]
        if source == "default" and self.baseline.development:
            source = "development mode"
        if self._announced != (on, source):
            self._announced = (on, source)
            message = f"Cost throttling is {'on' if on else 'off'} ({source})"
            self._observer(Event("throttling_switched", {"message": message, "on": on, "source": source}))


def _changed(text: bytes | None, wanted: Mapping[str, object], table: Mapping[str, Setting]) -> bytes | None:
    try:
        fields = _fields(text)
    except StrictJsonError:
        raise SettingsRejected({SETTINGS_KEY: _NOT_OURS.format("no JSON object")}) from None
    if _is_foreign(fields, table):
        raise SettingsRejected({SETTINGS_KEY: _NOT_OURS.format("an object with none of our settings")})
    merged = {name: value for name, value in {**fields, **wanted}.items() if value is not None}
    return strict_json.dumps(merged).encode() if merged else None


def _is_foreign(fields: Mapping[str, object], table: Mapping[str, Setting]) -> bool:
    """Whether it looks like another program's: there is something, and nothing that we know."""
    return bool(fields) and fields.keys().isdisjoint(table)


def _unset_on_purpose(wanted: Mapping[str, object]) -> list[Words]:
    """What keeps the other processes from taking these names for lost."""
    return [
        ("SET", SETTING_UNSET_PREFIX + name, 1, "EX", _UNSET_KEEP_SECONDS)
        if value is None
        else ("DEL", SETTING_UNSET_PREFIX + name)
        for name, value in wanted.items()
    ]


def _is_broken(text: bytes | None) -> bool:
    try:
        _fields(text)
    except StrictJsonError:
        return True
    return False


def _fields(text: bytes | None) -> dict[str, object]:
    value = {} if text is None else strict_json.loads(text)
    if not isinstance(value, dict):
        raise StrictJsonError("not a JSON object")
    return value


def _effective(text: bytes | None, baseline: Baseline, table: Mapping[str, Setting]) -> tuple[Effective, list[Event]]:
    """What holds with this text in Redis, and an event for all that is wrong with it."""
    values: dict[str, object] = {name: getattr(baseline.values, name) for name in LiveSettings.model_fields}
    sources: dict[str, Source] = dict(baseline.sources)
    ignored = []
    try:
        fields = _fields(text)
    except StrictJsonError as error:
        fields = {}
        ignored.append(_ignored(SETTINGS_KEY, f"a JSON object ({error})", _said_of(text or b"")))
    is_foreign = _is_foreign(fields, table)
    for name, value in fields.items():
        if value is None:
            continue
        try:
            values[name], problems = table[name].value_type.read_leniently(value)
            sources[name] = "redis"
            ignored += [_ignored(f"{name}{problem.place}", problem.allowed, problem.got) for problem in problems]
        except KeyError:
            # Another program's values may be secrets.
            ignored.append(_ignored(shown(name), "no setting of this name", "…" if is_foreign else shown_json(value)))
        except ValueError as error:
            ignored.append(_ignored(name, str(error), shown_json(value)))
    values |= derived(values, sources)
    more = len(ignored) - _REPORTED_FIELDS
    if more > 0:
        ignored[_REPORTED_FIELDS:] = [_ignored(SETTINGS_KEY, "only what the table of settings allows", f"{more} more")]
    return Effective(LiveSettings.model_validate(values), MappingProxyType(sources)), ignored


def _logged(setting: Setting, value: object) -> str:
    """Of a list only its length: its rows name identifiers."""
    if not isinstance(value, tuple):
        return setting.value_type.text(value)
    return f"{len(value)} row{'' if len(value) == 1 else 's'}"


def _ignored(name: str, allowed: str, got: str) -> Event:
    return Event("setting_ignored", {"setting": name, "allowed": allowed, "got": got})


def _said_of(text: bytes) -> str:
    """Of a text that may be another program's, and then a secret, only how long it is."""
    return text.decode() if text == NOT_A_STRING else f"{len(text)} bytes"
