"""Events as lines of a log: text or JSON, identifiers cut, amounts in dollars."""

import json
import logging
import sys
from collections.abc import Mapping

from pythonjsonlogger.json import JsonFormatter

from backends.contract import Event, Refusal
from backends.money import usd_text

LOGGER = logging.getLogger("tollgate")
# There is no log until a server sets it up: a command reports its errors itself.
LOGGER.addHandler(logging.NullHandler())
_SHOWN_CHARACTERS = 8

# The texts of the contract; an event that is not here is logged by its name.
_WORDS = {
    "check_called": "Cost throttling check called",
    "reserved": "Cost recorded for stable_identifier",
    "refused": "Cost-based throttling triggered",
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
    "store_lost": "Redis does not answer",
    "store_back": "Redis is back",
    "store_broken": "Redis says that a command of ours is wrong",
    "challenge_skipped": "Challenge not checked, since Redis does not answer",
    "upstream_failed": "The model's server failed",
    "client_left": "The client left before the end of its answer",
    "client_stuck": "Hung up on a client that did not read its answer",
    "answer_cut": "Answer cut before its end",
    "keys_taken_as_digests": "Keys in API_KEYS that are 64 hex digits are taken as the SHA-256 of a key, not as a key",
    "forwarded_ignored": "X-Forwarded-For is ignored, since TRUSTED_PROXY_HOPS is 0",
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
    "store_lost": logging.ERROR,
    "store_broken": logging.CRITICAL,
    "challenge_skipped": logging.WARNING,
    "upstream_failed": logging.WARNING,
    "keys_taken_as_digests": logging.WARNING,
    "forwarded_ignored": logging.WARNING,
    "unexpected_error": logging.ERROR,
    "setting_ignored": logging.WARNING,
    "settings_unreadable": logging.WARNING,
    "settings_replaced": logging.WARNING,
}


def log_event(event: Event) -> None:
    """One line for one event; nothing is formatted for a level that is not logged."""
    level = logging.WARNING if event.fields.get("overrun_nanousd") else _LEVELS.get(event.name, logging.INFO)
    if not LOGGER.isEnabledFor(level):
        return
    fields = dict(event.fields)
    exception = fields.pop("exception", None)
    if "message" in fields:
        # Its text has all of its fields.
        fields = {"message": fields["message"]}
    words = str(fields.pop("message", _WORDS.get(event.name, event.name.replace("_", " ").capitalize())))
    shown = {name: text for part in fields.items() for name, text in _shown(*part).items()}
    trace = exception if isinstance(exception, BaseException) else None
    LOGGER.log(level, words, extra={"fields": shown}, exc_info=trace)


def cut(identifier: str) -> str:
    """So much of an identifier as helps to find it again, and never all of it."""
    return identifier[: min(_SHOWN_CHARACTERS, len(identifier) * 2 // 3)] + "…"


def set_up_logging(log_format: str, log_level: str) -> None:
    """Send the lines to standard error, where gunicorn's own go."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Json() if log_format == "json" else _Text())
    LOGGER.handlers = [handler]
    LOGGER.setLevel(log_level)


def _shown(name: str, value: object) -> Mapping[str, object]:
    if isinstance(value, Refusal):
        return {
            "reason": value.reason.value,
            "cause": value.cause.value,
            "retry_after_seconds": value.retry_after_seconds,
            "in_flight": value.in_flight,
        }
    if name == "identifier":
        return {name: cut(str(value))}
    if name.endswith("_nanousd") and isinstance(value, int):
        return {name.removesuffix("_nanousd") + "_usd": usd_text(value)}
    if isinstance(value, float):
        return {name: round(value, 3)}
    return {name: value}


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (the base class's name)
        fields: Mapping[str, object] = getattr(record, "fields", {})
        return " ".join([super().formatMessage(record), *(f"{name}={_word(value)}" for name, value in fields.items())])


def _word(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    text = " ".join(str(value).split())
    return json.dumps(text, ensure_ascii=False) if " " in text or '"' in text or not text else text


class Json(JsonFormatter):
    """One object a line: time, level, message and fields; gunicorn's own lines too."""

    def __init__(self) -> None:
        names = {"asctime": "time", "levelname": "level"}
        super().__init__("%(asctime)s %(levelname)s %(message)s", rename_fields=names)

    def process_log_record(self, log_data: dict[str, object]) -> dict[str, object]:
        """Put the fields of an event beside the others."""
        fields = log_data.pop("fields", {})
        return {**log_data, **(fields if isinstance(fields, dict) else {})}
