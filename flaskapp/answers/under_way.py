"""The answers under way in one process: ended where the server stops, and watched for clients that do not read."""

import threading
import time
from contextlib import suppress
from typing import Protocol

from flaskapp.llm import UpstreamNotTaken

WATCH_SECONDS = 0.1
"""How often answers are looked after. A client that takes longer for one write is treated as one that does not read."""


class UnderWay(Protocol):
    """An answer under way."""

    def stop(self) -> None:
        """End it, from any thread and without waiting."""

    def look_after(self) -> None:
        """Do what its own thread cannot do while it waits for the client."""


class AnswersUnderWay:
    """All of them; an application has one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers: set[UnderWay] = set()
        self._has_some, self._has_none = threading.Event(), threading.Event()
        self._has_none.set()
        self._watcher: threading.Thread | None = None
        self._is_stopping = False

    def add(self, answer: UnderWay) -> None:
        """Note that it begins.

        Raises:
            UpstreamNotTaken: the server is stopping.
        """
        with self._lock:
            if self._is_stopping:
                raise UpstreamNotTaken("The server is stopping.")
            self._answers.add(answer)
            if len(self._answers) > 1:
                return
            self._has_none.clear()
            self._has_some.set()
            if self._watcher is None:
                # Here, and not when this is made: a thread does not survive the fork of a worker.
                watcher = threading.Thread(target=self._watch, name="tollgate-watcher", daemon=True)
                watcher.start()
                self._watcher = watcher

    def remove(self, answer: UnderWay) -> None:
        """Note that it is over; may be called twice."""
        with self._lock:
            self._answers.discard(answer)
            if not self._answers:
                self._has_some.clear()
                self._has_none.set()

    def stop(self) -> None:
        """End them all, and let none begin. It does not wait; it may be called twice."""
        with self._lock:
            self._is_stopping = True
            answers = tuple(self._answers)
        for answer in answers:
            # One that cannot be ended must not keep the others running.
            with suppress(Exception):
                answer.stop()

    def wait(self, timeout_seconds: float) -> bool:
        """Wait until none is under way; whether that came in time."""
        return self._has_none.wait(timeout_seconds)

    def look_after(self) -> None:
        """Look after each of them once."""
        with self._lock:
            answers = tuple(self._answers)
        for answer in answers:
            # Whatever happens to one, the others are looked after, and the watcher goes on.
            with suppress(Exception):
                answer.look_after()

    def _watch(self) -> None:
        while self._has_some.wait():
            time.sleep(WATCH_SECONDS)
            self.look_after()
