"""Events as lines of a log: text or JSON, identifiers cut, amounts in dollars."""

import json
import logging
import re
import sys
import time
from collections.abc import Mapping
from functools import lru_cache

from gevent.monkey import get_original
from pythonjsonlogger.json import JsonFormatter

from backends.clock import US_PER_SECOND, SystemClock
from backends.contract import Event, Refusal, Reservation
from backends.money import usd_text

LOGGER = logging.getLogger("tollgate")
# There is no log until a server sets it up: a command reports its errors itself.
LOGGER.addHandler(logging.NullHandler())
_SHOWN_CHARACTERS = 8
_SHOWN_SPENT = ("window", "day")
"""The budgets whose amounts stand in the line of an admission."""
_CLOCK = SystemClock()

# The texts of the contract; an event that is not here is logged by its name.
_WORDS = {
    "check_called": "Cost throttling check called",
    "reserved": "Cost recorded for stable_identifier",
    "refused": "Cost-based throttling triggered",
    "shadow_refused": "Shadow budget would have refused",
    "check_failed": "Error executing cost throttle Lua script",
    "settled": "Cost settled",
    "duplicate": "Request sent before, not charged again",
    "extended": "Reservation extended",
    "extension_refused": "Reservation not extended, the answer ends here",
    "extension_failed": "Error executing cost extension Lua script",
    "expired": "Reservations expired: nobody ended them, and they stay booked in full",
    "settle_postponed": "Settlement postponed until Redis is back",
    "settle_refused": "Settlement refused",
    "emergency_exhausted": "Emergency budget used up",
    "emergency_booked": "Emergency spend booked into everybody's hour and day",
    "store_lost": "Redis does not answer",
    "store_back": "Redis is back",
    "redis_evicts": "Redis throws keys away when its memory is full, and what is evicted can be spent again",
    "settings_lost": "Settings that were changed live are gone from Redis, and the environment holds instead",
    "store_broken": "Redis says that a command of ours is wrong",
    "challenge_skipped": "Challenge not checked, since Redis does not answer",
    "upstream_failed": "The model's server failed",
    "upstream_learnt": "The model's server refused how it was asked, and is asked otherwise from now on",
    "client_left": "The client left before the end of its answer",
    "client_stuck": "Hung up on a client that did not read its answer",
    "answer_cut": "Answer cut before its end",
    "usage_missing": "The model's server reports no usage, so LLM_WITHOUT_USAGE says what is booked",
    "usage_absurd": "The model's server reports a usage that cannot be, and the reservation is booked in its place",
    "overhead_learnt": "The model's template adds more to a prompt than was reserved for, and that counts from now on",
    "bill_higher": "The model's server bills more than our price, and that is booked",
    "keys_taken_as_digests": "Keys in API_KEYS that are 64 hex digits are taken as the SHA-256 of a key, not as a key",
    "forwarded_ignored": "X-Forwarded-For is ignored, since TRUSTED_PROXY_HOPS is 0",
    "forwarded_unreadable": "A request has no address that can be read where TRUSTED_PROXY_HOPS says that it stands in "
    "X-Forwarded-For: its network is unknown",
    "metrics_alone": "There is no place for this worker's numbers, so the others do not show them",
    "forwarded_longer": "A request has more entries in X-Forwarded-For than TRUSTED_PROXY_HOPS says: one more proxy "
    "stands in front, or its caller wrote some",
    "serving": "Serving",
    "builtin_model": "The built-in model answers in production, since LLM_BASE_URL is not set",
    "setting_changed": "Setting changed",
    "unreadable_request": "A request that the server cannot read",
    "unexpected_error": "Unexpected error",
}
_LEVELS = {
    "refused": logging.WARNING,
    "check_failed": logging.ERROR,
    "settle_postponed": logging.WARNING,
    "extended": logging.DEBUG,
    "extension_failed": logging.ERROR,
    "expired": logging.WARNING,
    "settle_refused": logging.ERROR,
    "emergency_exhausted": logging.ERROR,
    "emergency_booked": logging.WARNING,
    "store_lost": logging.ERROR,
    "store_broken": logging.CRITICAL,
    "redis_evicts": logging.CRITICAL,
    "challenge_skipped": logging.WARNING,
    "upstream_failed": logging.WARNING,
    "upstream_learnt": logging.WARNING,
    "usage_missing": logging.WARNING,
    "usage_absurd": logging.ERROR,
    "overhead_learnt": logging.WARNING,
    "bill_higher": logging.WARNING,
    "keys_taken_as_digests": logging.WARNING,
    "forwarded_ignored": logging.WARNING,
    "forwarded_unreadable": logging.WARNING,
    "forwarded_longer": logging.WARNING,
    "metrics_alone": logging.WARNING,
    "builtin_model": logging.WARNING,
    "unreadable_request": logging.WARNING,
    "unexpected_error": logging.ERROR,
    "setting_ignored": logging.WARNING,
    "settings_unreadable": logging.WARNING,
    "settings_lost": logging.CRITICAL,
    "settings_not_kept": logging.WARNING,
}

EVENTS = frozenset({*_WORDS, *_LEVELS, "throttling_switched"})
"""The names of all events."""


def log_event(event: Event) -> None:
    """One line for one event; nothing is formatted for a level that is not logged."""
    level = logging.WARNING if event.fields.get("overrun_nanousd") else _LEVELS.get(event.name, logging.INFO)
    if event.fields.get("is_first") is False:
        # It was logged before, and is counted.
        level = logging.DEBUG
    if not LOGGER.isEnabledFor(level):
        return
    fields = event.fields
    if "message" in fields:
        # Its text has all of its fields.
        words, fields = str(fields["message"]), {}
    else:
        words = _WORDS.get(event.name) or event.name.replace("_", " ").capitalize()
    error = event.fields.get("exception")
    now_us = _CLOCK.now_us()
    # The library's own way to make a record takes three times as long: it looks for the caller in the stack, and names
    # the thread and the process.
    record = logging.LogRecord.__new__(logging.LogRecord)
    vars(record).update(
        _SAME_IN_ALL,
        levelno=level,
        levelname=logging.getLevelName(level),
        msg=words,
        fields=_shown(fields),
        exc_info=(type(error), error, error.__traceback__) if isinstance(error, BaseException) else None,
        created=now_us / US_PER_SECOND,
        msecs=now_us // 1_000 % 1_000,
    )
    LOGGER.handle(record)


_SAME_IN_ALL = vars(logging.LogRecord(LOGGER.name, logging.INFO, __file__, 0, "", (), None, "log_event")) | {
    "thread": None,
    "threadName": None,
    "process": None,
    "processName": None,
    "relativeCreated": 0.0,
}


@lru_cache(maxsize=256)
def cut(identifier: str) -> str:
    """So much of an identifier as helps to find it again, and never all of it."""
    return identifier[: min(_SHOWN_CHARACTERS, len(identifier) * 2 // 3)] + "…"


def set_up_logging(log_format: str, log_level: str) -> None:
    """Send the lines to standard error, where gunicorn's own go."""
    handler = logging.StreamHandler(sys.stderr)
    # The system's own: a line takes it twice, and gevent's takes as long as all else that the library does with a line.
    # Nothing switches to another greenlet while it is held.
    handler.lock = get_original("_thread", "RLock")()
    handler.setFormatter(Json() if log_format == "json" else _Text())
    LOGGER.handlers = [handler]
    LOGGER.setLevel(log_level)


def _shown(fields: Mapping[str, object]) -> dict[str, object]:
    """The fields as they are shown: identifiers cut, amounts in dollars."""
    shown: dict[str, object] = {}
    for name, value in fields.items():
        if isinstance(value, str):
            shown[name] = cut(value) if name == "identifier" else value
        elif isinstance(value, int) and name.endswith("_nanousd"):
            shown[name.removesuffix("_nanousd") + "_usd"] = usd_text(value)
        elif isinstance(value, float):
            shown[name] = round(value, 3)
        elif isinstance(value, Refusal):
            shown["reason"], shown["cause"], shown["budget"] = value.reason.value, value.cause.value, value.budget
            shown["retry_after_seconds"], shown["in_flight"] = value.retry_after_seconds, value.in_flight
        elif isinstance(value, Reservation):
            spent = {budget.name: nanousd for budget, nanousd in zip(value.budgets, value.spent_nanousd, strict=True)}
            shown |= {f"{name}_usd": usd_text(spent[name]) for name in _SHOWN_SPENT if name in spent}
        elif name != "exception":
            shown[name] = value
    return shown


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__()
        self._second, self._second_text = 0, ""

    def format(self, record: logging.LogRecord) -> str:
        """Only records of this file come here."""
        second = int(record.created)
        if second != self._second:
            # Once a second: it is the dearest part of a line.
            self._second_text = time.strftime(self.default_time_format, self.converter(second))
            self._second = second
        fields: Mapping[str, object] = getattr(record, "fields", {})
        shown = "".join([f" {name}={value}" for name, value in fields.items()])
        # A look at all values takes less than one at each.
        if shown.count(" ") != len(fields) or not shown.isprintable() or _SPELT_OTHERWISE.search(shown):
            shown = "".join([f" {name}={_word(value)}" for name, value in fields.items()])
        line = f"{self._second_text},{int(record.msecs):03d} {record.levelname} {record.msg}{shown}"
        if record.exc_info:
            # Indented: whatever is in an exception's text begins no line as an event does.
            traced = self.formatException(record.exc_info).splitlines()
            line = "\n    ".join([line, *map(_printable, traced)])
        return line


_SPELT_OTHERWISE = re.compile(r'= |=$|=None|=True|=False|"')
"""What stands in a line where `_word` would write a value otherwise."""


def _word(value: object) -> str:
    if value is None or isinstance(value, bool):
        return "none" if value is None else str(value).lower()
    text = _printable(" ".join(str(value).split()))
    return json.dumps(text, ensure_ascii=False) if " " in text or '"' in text or not text else text


def _printable(text: str) -> str:
    # A terminal would obey some of the rest.
    return text if text.isprintable() else text.encode("unicode_escape").decode()


class Json(JsonFormatter):
    """One object a line: time, level, message and fields. gunicorn.conf.py writes gunicorn's own lines alike."""

    def __init__(self) -> None:
        names = {"asctime": "time", "levelname": "level"}
        super().__init__("%(asctime)s %(levelname)s %(message)s", rename_fields=names)

    def process_log_record(self, log_data: dict[str, object]) -> dict[str, object]:
        """Put the fields of an event beside the others."""
        fields = log_data.pop("fields", {})
        return {**log_data, **(fields if isinstance(fields, dict) else {})}
