"""What one application holds, and its start and stop in each worker."""

import contextlib
import threading
from dataclasses import dataclass, field
from decimal import Decimal

from backends.clock import SystemClock
from backends.contract import Event, Observer
from backends.errors import StoreError
from backends.guard.guard import Guard
from backends.pricing.prices import PriceBook
from backends.store.link import Link
from backends.store.scripts import load_all
from flaskapp.answers.overheads import PromptOverheads
from flaskapp.answers.under_way import AnswersUnderWay
from flaskapp.config import Config
from flaskapp.http.open_bodies import OpenBodies
from flaskapp.kept_text import KeptText
from flaskapp.llm import Model
from flaskapp.ops.aside import run_aside
from flaskapp.ops.eviction_watch import EvictionWatch
from flaskapp.ops.first_worker import FirstOfWorkers
from flaskapp.ops.logs import set_up_logging
from flaskapp.settings import LIMIT_SETTINGS, SettingsStore

_FEW_TOKENS = 1_000
"""No price is higher for a short input."""


@dataclass
class Tollgate:
    """The parts of an application: ``app.extensions["tollgate"]``."""

    config: Config
    link: Link
    settings: SettingsStore
    guard: Guard
    observer: Observer
    model: Model
    prices: PriceBook
    bodies: OpenBodies
    overheads: PromptOverheads
    answers: AnswersUnderWay = field(default_factory=AnswersUnderWay)
    metrics_failure: str = ""
    """Why this worker's numbers are its own alone; empty if they are not."""
    has_started: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> None:
        """Set up the log and poll the settings, in each worker after the fork. A second call does nothing."""
        with self._lock:
            if self.has_started:
                return
            self.has_started = True
        set_up_logging(self.config.log_format, self.config.log_level)
        self.link.log_anew()
        self._log_digests()
        if self.metrics_failure:
            self.emit("metrics_alone", error=self.metrics_failure)
        # Here, and not while the first visitor waits.
        with contextlib.suppress(StoreError):
            # First: without a password that it needs, Redis has no clear word for a request as large as a script.
            self.link.time_us()
            self.link.run(load_all)
        self.settings.keep_in(KeptText(self.config.data_dir, self.link.place, run_aside))
        self.settings.refresh()
        self._refresh_overheads()
        self.guard.prepare()
        self.guard.book_emergency_spend()
        self._log_offer()
        watch = EvictionWatch(self.link, self.link.clock, self._report_eviction)

        def then() -> None:
            self._refresh_overheads()
            watch.look()

        self.settings.start_polling(then)
        self.bodies.start()

    def stop(self) -> None:
        """End what runs in the background, and close connections."""
        self.settings.stop()
        self.bodies.stop()
        self.guard.close()
        self.link.close()
        self.model.close()

    def emit(self, name: str, **fields: object) -> None:
        """Hand an event to the observers."""
        self.observer(Event(name, fields))

    def _refresh_overheads(self) -> None:
        # The built-in model adds nothing to a prompt.
        if self.config.llm_base_url is not None:
            self.overheads.refresh()

    def _report_eviction(self, policy: str, *, is_first: bool) -> None:
        self.emit("redis_evicts", policy=policy, is_first=is_first)

    def _log_offer(self) -> None:
        """Say once a start what is sold, by whom it is made, and within which limits."""
        if not FirstOfWorkers("serving").is_first():
            return
        config, values = self.config, self.settings.current.values
        price = self.prices.price(config.llm_model, SystemClock().now_us())
        self.emit(
            "serving",
            upstream=config.upstream or "built-in model",
            models=",".join(config.llm_models),
            input_usd_per_mtok=usd_per_mtok(price.cost_nanousd(_FEW_TOKENS, 0)),
            output_usd_per_mtok=usd_per_mtok(price.cost_nanousd(0, _FEW_TOKENS)),
            **{limit.name: format(getattr(values, limit.name), "f") for limit in LIMIT_SETTINGS.values()},
            network_share=format(values.network_share, "f"),
            further_budgets=len(values.budgets),
            outage_costs_usd_an_hour=format(values.outage_costs_usd_an_hour, "f"),
        )
        if config.llm_base_url is None and config.mode == "production":
            self.emit("builtin_model")

    def _log_digests(self) -> None:
        count = self.config.api_keys.listed_digests if self.config.api_keys else 0
        if count and FirstOfWorkers("keys-taken-as-digests").is_first():
            self.emit("keys_taken_as_digests", keys=count)


def usd_per_mtok(nanousd: int) -> str:
    """The price of a million tokens, by that of `_FEW_TOKENS`."""
    return format((Decimal(nanousd) * 1_000_000 / _FEW_TOKENS).scaleb(-9).normalize(), "f")
