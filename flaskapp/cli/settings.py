"""`flask settings`: the live settings on the command line."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import click
from rich.table import Column, Table
from rich.text import Text

from flaskapp.cli.console import fail, failures, print_table
from flaskapp.config import load_config
from flaskapp.ops.running_services import running_services
from flaskapp.settings import Effective, Setting, SettingsStore
from flaskapp.tollgate import Tollgate
from flaskapp.value_types import refusal_text

OF_THIS_SHELL = "this shell's environment"


@dataclass(frozen=True, slots=True)
class SettingsView:
    """The live settings over the baseline of one environment."""

    store: SettingsStore
    mode: str
    whose: str = OF_THIS_SHELL
    """Whose environment it is, in words: this shell's, or that of a service which runs beside it."""


def settings_cli(tollgate: Tollgate) -> click.Group:
    """The group ``settings`` of an application."""
    return make_settings_cli(lambda: settings_view(tollgate))


def settings_view(tollgate: Tollgate) -> SettingsView:
    """The settings of the service of this clone that was started last; without one, those of this shell."""
    config = tollgate.config
    services = running_services(config.data_dir) if config.redis_url is None else []
    if not services:
        return SettingsView(tollgate.settings, config.mode)
    its_config, here = load_config(services[0].variables), config.live_baseline
    # A variable that is set for this very command counts.
    own = {name: getattr(here.values, name) for name, source in here.sources.items() if source == "environment"}
    baseline = replace(
        its_config.live_baseline,
        values=its_config.live_baseline.values.model_copy(update=own),
        sources={**its_config.live_baseline.sources, **{name: here.sources[name] for name in own}},
    )
    whose = f"{OF_THIS_SHELL} and that" if own else "the environment"
    whose += f" of the service on port {services[0].port}"
    if len(services) > 1:
        whose += f", the last started of {len(services)}"
    return SettingsView(SettingsStore(tollgate.link, baseline, tollgate.observer), its_config.mode, whose)


def make_settings_cli(get_view: Callable[[], SettingsView]) -> click.Group:
    """The group ``settings``; the store is opened only when a command needs it."""

    @click.group("settings")
    def group() -> None:
        """Show and change the live settings."""

    @group.command("show")
    def show() -> None:
        """Value, source and bounds of every setting; and the mode."""
        with failures():
            view = get_view()
        store = view.store
        now = store.refresh()
        _print_settings(store.table, now)
        elsewhere = "; a running service has its own, and tells it in its log and on its dashboard"
        click.echo(f"mode: {view.mode} (by {view.whose}{elsewhere if view.whose == OF_THIS_SHELL else ''})")
        if not store.is_reachable:
            fail("Redis does not answer: these are the environment's values and the defaults")

    # So that a value that begins with a minus is a wrong value, and no unknown option.
    @group.command("set", context_settings={"ignore_unknown_options": True})
    @click.argument("name")
    @click.argument("value")
    def set_(name: str, value: str) -> None:
        """Set NAME to VALUE, for every worker of every instance."""
        with failures():
            view = get_view()
        setting = _setting(view.store, name)
        try:
            wanted = setting.value_type.read_text(value)
        except ValueError as error:
            fail(f"{name}: {refusal_text(error, setting.value_type.shown(value))}")
        _change(view, setting, wanted)

    @group.command("unset")
    @click.argument("name")
    def unset(name: str) -> None:
        """Take NAME back to its environment variable or default."""
        with failures():
            view = get_view()
        _change(view, _setting(view.store, name), None)

    return group


def _setting(store: SettingsStore, name: str) -> Setting:
    setting = store.table.get(name)
    return setting or fail(f"{name}: there is no such setting; `flask settings show` lists them")


def _change(view: SettingsView, setting: Setting, value: object) -> None:
    with failures():
        now = view.store.change({setting.name: value})
    source = now.sources[setting.name]
    words = source if source == "redis" else f"{source}, by {view.whose}"
    click.echo(f"{setting.name} is {_value(setting, now)} now ({words})")


def _print_settings(rows: Mapping[str, Setting], now: Effective) -> None:
    table = Table(Column("name", no_wrap=True), "value", "source", "bounds", box=None, pad_edge=False)
    for setting in rows.values():
        texts = (setting.name, _value(setting, now), now.sources[setting.name], setting.value_type.allowed)
        # As Text: a value is never read as markup.
        table.add_row(*map(Text, texts))
    print_table(table)


def _value(setting: Setting, now: Effective) -> str:
    return setting.value_type.text(getattr(now.values, setting.name))
