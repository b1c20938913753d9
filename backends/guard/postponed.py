"""Work that waits until the store is back: settlements, and the undoing of reserves whose reply was lost."""

import threading
from collections import deque
from collections.abc import Callable

from backends.errors import StoreBroken, StoreError

RETRY_SECONDS = 0.25
BROKEN_RETRY_SECONDS = 2.0


class PostponedJobs:
    """Repeats jobs until the store takes them, in one thread that exists only while there are any.

    The jobs are in memory: those of a process that ends are lost, and their reservations stay booked in full.

    Args:
        on_bug: called with what a job raised that is no `StoreError`; the job is dropped.
    """

    def __init__(self, on_bug: Callable[[Exception], None]) -> None:
        self._on_bug = on_bug
        self._jobs: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, job: Callable[[], None]) -> None:
        """Run `job` soon, and again after each `StoreError`."""
        with self._lock:
            self._jobs.append(job)
            if self._thread is None and not self._stopped.is_set():
                self._thread = threading.Thread(target=self._work, name="tollgate-settle-later", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """Begin no further job."""
        self._stopped.set()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._jobs or self._stopped.is_set():
                    self._thread = None
                    return
                job = self._jobs[0]
            try:
                job()
            except StoreError as error:
                # The others go first next time: one key of the wrong kind must not keep them all waiting.
                with self._lock:
                    self._jobs.rotate(-1)
                # A wrong command stays wrong until the key is mended: one alarm every two seconds is enough.
                self._stopped.wait(BROKEN_RETRY_SECONDS if isinstance(error, StoreBroken) else RETRY_SECONDS)
                continue
            except Exception as error:  # noqa: BLE001 (a backend's bug is reported, and stops no later job)
                self._on_bug(error)
            with self._lock:
                self._jobs.popleft()
