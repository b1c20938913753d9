"""How a long job reports its progress."""

from collections.abc import Callable

Progress = Callable[[str, int, int | None], None]
"""Called with what is done now, how much of it is done, and how much there is; None: not known yet."""


def no_progress(_what: str, _done: int, _of: int | None) -> None:
    """For those who do not watch."""
