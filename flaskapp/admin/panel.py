"""What the operator sees and changes: with `tables` all of the dashboard that uses the library."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from backends.clock import US_PER_SECOND, Clock
from backends.errors import StoreError
from backends.keys import ENDED_SESSION_PREFIX
from backends.store.link import Link
from flaskapp import strict_json
from flaskapp.admin import tables
from flaskapp.admin.tables import TABLES, Draft, Table
from flaskapp.budgets import SCOPES, SHARED_HOURS, BudgetRows, OverrideRows
from flaskapp.settings import Effective, Setting, SettingsRejected, SettingsStore
from flaskapp.strict_json import StrictJsonError
from flaskapp.value_types import MAX_AMOUNT_USD, Amount, Choice, RowProblem, RowRefused, Switch, ValueType, Whole

__all__ = ["Panel", "Row", "RowsRejected", "SettingsRejected", "StaleDraft", "StoreError", "StrictJsonError"]

_GROUPS = {
    "Switches": ("enable_cost_throttling", "enable_challenge_response"),
    "One identifier": (
        "high_cost_threshold_usd",
        "high_cost_window_seconds",
        "daily_cost_limit_usd",
        "cost_throttle_duration_seconds",
        "throttle_when_busy",
        "chat_rate_limit",
    ),
    "One network": ("network_cost_limit_usd", "network_daily_cost_limit_usd", "network_share", "network_rate_limit"),
    "Everybody together": ("hourly_spend_limit_usd", "daily_spend_limit_usd"),
    "Further budgets": tuple(TABLES),
    "The model": ("llm_max_tokens", "llm_max_input_tokens"),
    "Reservations": (
        "reservation_policy",
        "reservation_slice_tokens",
        "reservation_cushion_tokens",
        "drain_seconds",
    ),
    "When Redis fails": ("throttle_on_error", "fail_open_budget_usd"),
}
_THE_REST = "Others"


@dataclass(frozen=True, slots=True)
class Row:
    """One setting, ready to be shown; all texts as they would be typed."""

    name: str
    description: str
    unit: str
    allowed: str
    control: str
    """`switch`, `number`, `select`, `text` or `table`."""
    value: str
    shown: str
    """The value in a few words."""
    source: str
    fallback: str
    """What is shown without a change in Redis."""
    fallback_source: str
    minimum: str = ""
    maximum: str = ""
    step: str = ""
    options: tuple[str, ...] = ()
    table: Table | None = None
    typed: str | None = None
    problem: str | None = None


class RowsRejected(SettingsRejected):
    """A list with rows that cannot be used; nothing was changed. Each of `rows` is the first problem of its row."""

    def __init__(self, name: str, rows: Sequence[RowProblem]) -> None:
        others = f" (and {len(rows) - 1} more)" if len(rows) > 1 else ""
        super().__init__({name: f"{rows[0].sentence}{others}"})
        self.rows = tuple(rows)


class StaleDraft(Exception):
    """The list has changed since the form was made; nothing was changed. `seen` is its digest now."""

    def __init__(self, seen: str) -> None:
        super().__init__("the list has changed")
        self.seen = seen


class Panel:
    """The settings as rows and as JSON, the ways to change them, and the sessions that a log-out ended.

    Args:
        mode: `development` or `production`.
        link: where the ended sessions are.
        is_degraded: whether the guard is failing open now; where cost throttling is off, there is nothing to guard.
    """

    def __init__(
        self,
        store: SettingsStore,
        *,
        link: Link,
        mode: str,
        backend_name: str,
        clock: Clock,
        is_degraded: Callable[[], bool] = lambda: False,
    ) -> None:
        self.mode = mode
        self.backend_name = backend_name
        self._is_degraded = is_degraded
        self._store = store
        self._clock = clock
        self._link = link

    def end_session(self, session_id: str, keep_seconds: int) -> None:
        """End a session, so that copies of its cookie are refused; `keep_seconds` is at least what is left of it.

        Raises:
            StoreError: copies of the cookie stay valid until the session is over.
        """
        self._link.run(lambda client: client.set(ENDED_SESSION_PREFIX + session_id, 1, ex=keep_seconds))

    def has_ended(self, session_id: str) -> bool:
        """Whether it was ended by a log-out; False while Redis is away, when nothing can be changed here either."""
        try:
            return bool(self._link.run(lambda client: client.exists(ENDED_SESSION_PREFIX + session_id)))
        except StoreError:
            return False

    def is_degraded(self) -> bool:
        """Whether requests are admitted from the emergency budget now."""
        return self._store.current.values.enable_cost_throttling and self._is_degraded()

    @property
    def is_redis_reachable(self) -> bool:
        """Whether the values shown are Redis' own or the last known ones."""
        return self._store.is_reachable

    def now_seconds(self) -> int:
        """Unix time."""
        return self._clock.now_us() // US_PER_SECOND

    def as_json(self) -> str:
        """Mode and all settings, as Redis has them now (or as it last had them, while it is away)."""
        now = self._store.refresh()
        settings = {name: _json_row(row, now) for name, row in self._store.table.items()}
        return strict_json.dumps({"mode": self.mode, "backend": self.backend_name, "settings": settings})

    @property
    def budget_names(self) -> list[str]:
        """The names of all budgets that an override may name."""
        always_there = [name for name in SCOPES if name not in SHARED_HOURS]
        return [*always_there, *(budget.name for budget in self._store.current.values.budgets)]

    def groups(
        self, typed: Mapping[str, str], problems: Mapping[str, str], draft: Draft | None = None
    ) -> dict[str, list[Row]]:
        """All settings by group; where something was typed and not saved, with that and perhaps the reason."""
        now = self._store.refresh()
        rows = {
            name: self._row(setting, now, typed.get(name), problems.get(name))
            for name, setting in self._store.table.items()
        }
        for name in TABLES:
            typed_here = draft if draft is not None and draft.name == name else None
            value, zone, seen = getattr(now.values, name), self._store.baseline.budget_time_zone, self._seen(name, now)
            rows[name] = replace(rows[name], table=tables.table(name, value, zone, seen, typed_here))
        groups = {title: [rows.pop(name) for name in names if name in rows] for title, names in _GROUPS.items()}
        return {**groups, _THE_REST: list(rows.values())}

    def row(self, name: str) -> Row | None:
        """One setting as it is now, if there is one of that name."""
        setting = self._store.table.get(name)
        return None if setting is None else self._row(setting, self._store.current)

    def change_json(self, body: bytes) -> None:
        """Change settings by a strict JSON object.

        Raises:
            StrictJsonError: it is none.
            SettingsRejected: it is one, but not of usable settings; nothing was changed.
            StoreError: Redis could not be asked.
        """
        patch = strict_json.loads(body)
        if not isinstance(patch, dict):
            raise SettingsRejected({"body": "has to be a JSON object of settings"})
        self._store.change(patch)

    def change_texts(self, texts: Mapping[str, str | None]) -> None:
        """Change settings by typed texts; `None` goes back to environment or default. All or none.

        Raises:
            SettingsRejected: with one reason a field; nothing was changed.
            StoreError: Redis could not be asked.
        """
        patch: dict[str, object] = {}
        problems: dict[str, str] = {}
        for name, text in texts.items():
            setting = self._store.table.get(name)
            try:
                patch[name] = text if setting is None or text is None else setting.value_type.read_text(text)
            except RowRefused as error:
                problems[name] = str(error)
            except ValueError as error:
                problems[name] = f"has to be {error}"
        if problems:
            raise SettingsRejected(problems)
        self._store.change(patch)

    def change_rows(self, draft: Draft) -> None:
        """Change a list to what was typed; a row that cannot be used leaves all as it is.

        Raises:
            StaleDraft: the form was made from another list.
            RowsRejected: with one reason a row; nothing was changed.
            StoreError: Redis could not be asked.
        """
        seen = self._seen(draft.name, self._store.refresh())
        if draft.seen != seen:
            raise StaleDraft(seen)
        typed = [tables.json_row(texts) for texts in draft.rows]
        value, problems = self._store.table[draft.name].value_type.read_leniently(typed)
        if problems:
            raise RowsRejected(draft.name, problems)
        self._store.change({draft.name: value})

    def _seen(self, name: str, now: Effective) -> str:
        return tables.digest(self._store.table[name].value_type.text(getattr(now.values, name)))

    def _row(self, setting: Setting, now: Effective, typed: str | None = None, problem: str | None = None) -> Row:
        value_type, baseline = setting.value_type, self._store.baseline
        value, fallback = getattr(now.values, setting.name), getattr(baseline.values, setting.name)
        return Row(
            name=setting.name,
            description=value_type.description,
            unit=value_type.unit,
            allowed=value_type.allowed,
            value=value_type.text(value),
            shown=_shown(value, value_type),
            source=now.sources[setting.name],
            fallback=_shown(fallback, value_type),
            fallback_source=baseline.sources[setting.name],
            typed=typed,
            problem=problem,
            **_control(value_type),
        )


def _shown(value: object, value_type: ValueType[object]) -> str:
    if not isinstance(value, tuple):
        return value_type.text(value)
    return f"{len(value) or 'no'} row{'' if len(value) == 1 else 's'}"


def _control(value_type: object) -> dict[str, Any]:
    match value_type:
        case BudgetRows() | OverrideRows():
            return {"control": "table"}
        case Switch():
            return {"control": "switch"}
        case Choice(values=values):
            return {"control": "select", "options": values}
        case Whole(minimum=least, maximum=most):
            return {"control": "number", "minimum": str(least), "maximum": str(most), "step": "1"}
        case Amount(minimum=least):
            # Any step: browsers refuse what does not sit on one, and a billionth is none for a spinner.
            return {"control": "number", "minimum": f"{least:f}", "maximum": str(MAX_AMOUNT_USD), "step": "any"}
        case _:
            return {"control": "text"}


def _json_row(setting: Setting, now: Effective) -> dict[str, object]:
    return {
        "value": getattr(now.values, setting.name),
        "source": now.sources[setting.name],
        "bounds": setting.value_type.bounds,
        "unit": setting.value_type.unit,
        "allowed": setting.value_type.allowed,
        "description": setting.value_type.description,
    }
