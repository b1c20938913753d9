"""What can go wrong, on one page. A refusal is a value (`contract.Refusal`); these are failures.

The client library's own exceptions never leave `backends`: `store/link.py` translates them into these.
"""


class TollgateError(Exception):
    """Root of everything that this library raises on purpose."""


class ConfigurationError(TollgateError):
    """A value that cannot be used; the text is one line for the operator and holds no secret."""


class StoreError(TollgateError):
    """Redis did not do what it was asked. With `maybe_done` it may have: no reply came."""

    def __init__(self, message: str, *, maybe_done: bool = False) -> None:
        super().__init__(message)
        self.maybe_done = maybe_done


class StoreUnavailable(StoreError):
    """Redis is away, frozen, loading, read-only or full: an outage, to be bridged or answered with 503."""


class StoreBusy(StoreError):
    """All connections are in use, the caller's time is over, or other callers were faster each time.

    It is no outage: it never opens the guard (503).
    """


class StoreBroken(StoreError):
    """A bug or a wrong set-up (WRONGTYPE, script error, NOPERM): handled as an outage, but with an alarm."""


class ReservationConflict(TollgateError):
    """The reservation id is known already, for another request or as ended; nothing was charged."""


class ThrottleUnavailable(TollgateError):
    """No request is admitted: Redis fails and `closed` is set or the emergency budget is spent, or we are too busy."""

    def __init__(self, message: str, retry_after_seconds: int) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


_SHOWN_CHARACTERS = 80


def shown(value: object) -> str:
    """A value from outside, cut and made harmless for one line of a log or a terminal."""
    text = value if isinstance(value, str) else repr(value)
    cut = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
    return cut if cut.isprintable() else ascii(cut)
