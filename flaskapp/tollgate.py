"""What one application holds, and its start and stop in each worker."""

import contextlib
import threading
from dataclasses import dataclass, field

from backends.contract import Event, Observer
from backends.errors import StoreError
from backends.guard.guard import Guard
from backends.store.link import Link
from backends.store.scripts import load_all
from flaskapp.answers.under_way import AnswersUnderWay
from flaskapp.config import Config
from flaskapp.kept_text import KeptText
from flaskapp.llm import Model
from flaskapp.ops.aside import run_aside
from flaskapp.ops.first_worker import FirstOfWorkers
from flaskapp.ops.logs import set_up_logging
from flaskapp.settings import SettingsStore


@dataclass
class Tollgate:
    """The parts of an application: ``app.extensions["tollgate"]``."""

    config: Config
    link: Link
    settings: SettingsStore
    guard: Guard
    observer: Observer
    model: Model
    answers: AnswersUnderWay = field(default_factory=AnswersUnderWay)
    has_started: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> None:
        """Set up the log and poll the settings, in each worker after the fork. A second call does nothing."""
        with self._lock:
            if self.has_started:
                return
            self.has_started = True
        set_up_logging(self.config.log_format, self.config.log_level)
        self._log_digests()
        # Here, and not while the first visitor waits.
        with contextlib.suppress(StoreError):
            self.link.run(load_all)
            self.link.time_us()
        self.settings.keep_in(KeptText(self.config.data_dir, self.link.place, run_aside))
        self.settings.refresh()
        self.guard.prepare()
        self.settings.start_polling()

    def stop(self) -> None:
        """End what runs in the background, and close connections."""
        self.settings.stop()
        self.guard.close()
        self.link.close()
        self.model.close()

    def emit(self, name: str, **fields: object) -> None:
        """Hand an event to the observers."""
        self.observer(Event(name, fields))

    def _log_digests(self) -> None:
        count = self.config.api_keys.listed_digests if self.config.api_keys else 0
        if count and FirstOfWorkers("keys-taken-as-digests").is_first():
            self.emit("keys_taken_as_digests", keys=count)
