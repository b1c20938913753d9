"""What a long job tells of itself while it runs."""

from collections.abc import Callable

Progress = Callable[[str, int, int | None], None]
"""Told what is done now, how much of it is done, and how much there is; None: nobody knows yet."""


def no_progress(_what: str, _done: int, _of: int | None) -> None:
    """For those who do not watch."""
