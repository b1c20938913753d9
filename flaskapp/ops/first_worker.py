"""What an instance logs once a start, though each of its workers sees it."""

import threading
from contextlib import suppress
from pathlib import Path
from typing import Self

from flaskapp.config import metrics_directory


class FirstOfWorkers:
    """True the first time that it is asked, in whichever worker, and never again.

    Args:
        shared: a file that all workers see, and that is not there when they start; None in a single process.
    """

    def __init__(self, shared: Path | None) -> None:
        self._shared = shared
        self._was_asked = threading.Event()

    @classmethod
    def of_this_start(cls, name: str) -> Self:
        """The one that all workers of this start share under `name`."""
        directory = metrics_directory()
        return cls(Path(directory) / f"{name}.told" if directory else None)

    def is_first(self) -> bool:
        """Whether neither this worker nor another asked before."""
        if self._was_asked.is_set():
            return False
        self._was_asked.set()
        # Where no file can be made each worker logs it.
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
