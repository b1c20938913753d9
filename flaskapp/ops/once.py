"""What an instance says once, though each of its workers sees it."""

import threading
from contextlib import suppress
from pathlib import Path


class Once:
    """True the first time that it is asked, and never again.

    Args:
        shared: a file that all workers see, and that is not there when they start; None in a single process.
    """

    def __init__(self, shared: Path | None) -> None:
        self._shared = shared
        self._was_asked = threading.Event()

    def is_first(self) -> bool:
        """Whether nobody asked before."""
        if self._was_asked.is_set():
            return False
        self._was_asked.set()
        # Where no file can be made each worker speaks for itself.
        with suppress(OSError):
            return self._shared is None or self._make(self._shared)
        return True

    @staticmethod
    def _make(path: Path) -> bool:
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            return False
        return True
