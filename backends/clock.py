"""Time as an input. `flaskapp` makes one `SystemClock`; tests hand in a clock of their own."""

import time
from typing import Protocol

US_PER_SECOND = 1_000_000


class Clock(Protocol):
    """Where the time comes from."""

    def now_us(self) -> int:
        """Unix time in microseconds."""

    def monotonic_seconds(self) -> float:
        """Seconds of a clock that never goes back, for durations only."""


class SystemClock:
    """The host's clocks: the only place that asks the operating system for the time of day."""

    def now_us(self) -> int:
        """Unix time in microseconds."""
        return time.time_ns() // 1_000

    # The system's own function: an answer asks it a dozen times.
    monotonic_seconds = staticmethod(time.monotonic)
    """Seconds that never go back."""
