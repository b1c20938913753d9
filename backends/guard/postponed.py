"""Work that waits until the store is back: settlements, and the undoing of reserves whose reply was lost."""

import threading
from collections import deque
from collections.abc import Callable

from backends.errors import StoreBroken, StoreError

RETRY_SECONDS = 0.25
BROKEN_RETRY_SECONDS = 2.0
SIDE_BY_SIDE = 8
"""So many jobs are done at once: a Redis that is far away has many to take when it is back."""

Job = Callable[[], None]


class PostponedJobs:
    """Repeats jobs until the store takes them, in threads that exist only while there are any.

    What the store calls wrong stays wrong until its key is mended, so such jobs wait for that in a queue of their own,
    where one is tried at a time: one alarm every `BROKEN_RETRY_SECONDS` is enough.
    The jobs are in memory: those of a process that ends are lost, and their reservations stay booked in full.

    Args:
        on_bug: called with what a job raised that is no `StoreError`; the job is dropped.
    """

    def __init__(self, on_bug: Callable[[Exception], None]) -> None:
        self._on_bug = on_bug
        self._jobs: deque[Job] = deque()
        self._broken: deque[Job] = deque()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._threads = 0
        self._has_broken_thread = False

    def add(self, job: Job) -> None:
        """Run `job` soon, and again after each `StoreError`."""
        with self._lock:
            self._jobs.append(job)
            self._start_threads()

    def stop(self) -> None:
        """Begin no further job."""
        self._stopped.set()

    def _start_threads(self) -> None:
        for _ in range(min(SIDE_BY_SIDE - self._threads, len(self._jobs))):
            self._threads += 1
            threading.Thread(target=self._work, name="tollgate-settle-later", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._jobs or self._stopped.is_set():
                    self._threads -= 1
                    return
                job = self._jobs.popleft()
            try:
                self._run(job)
            except StoreBroken:
                self._wait_for_mending(job)
            except StoreError:
                self._stopped.wait(RETRY_SECONDS)
                with self._lock:
                    self._jobs.append(job)

    def _run(self, job: Job) -> None:
        try:
            job()
        except StoreError:
            raise
        except Exception as error:  # noqa: BLE001 (a backend's bug is reported, and stops no later job)
            self._on_bug(error)

    def _wait_for_mending(self, job: Job) -> None:
        with self._lock:
            self._broken.append(job)
            if not self._has_broken_thread:
                self._has_broken_thread = True
                threading.Thread(target=self._work_on_broken, name="tollgate-settle-broken", daemon=True).start()

    def _work_on_broken(self) -> None:
        while not self._stopped.wait(BROKEN_RETRY_SECONDS):
            with self._lock:
                job = self._broken.popleft()
            try:
                self._run(job)
            except StoreError:
                with self._lock:
                    self._broken.append(job)
                continue
            # What was mended may have been wrong for the others too.
            with self._lock:
                self._jobs.extend(self._broken)
                self._broken.clear()
                self._has_broken_thread = False
                self._start_threads()
            return
