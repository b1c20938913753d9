"""Workers that have had their number of requests end one after another, so that one is always listening."""

import fcntl
import mmap
import tempfile
from contextlib import suppress

_PLACES = 4_096


class TakingTurns:
    """Which workers of a server listen: made in the master, shared with all that it forks."""

    def __init__(self) -> None:
        self._listens = mmap.mmap(-1, _PLACES)
        # Locked a process; what a process holds is free once it has ended, however it ended.
        self._lock = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the server lives

    def begin(self, worker: int) -> None:
        """This worker, the master's number of it, listens."""
        self._listens[worker % _PLACES] = 1

    def end(self, worker: int) -> None:
        """It listens no more, and perhaps has ended."""
        self._listens[worker % _PLACES] = 0

    def may_end(self, worker: int) -> bool:
        """Whether another one listens; then this one counts as not listening from now on, and has to end."""
        with suppress(BlockingIOError):
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                if sum(self._listens[:]) > 1:
                    self.end(worker)
                    return True
            finally:
                fcntl.lockf(self._lock, fcntl.LOCK_UN)
        return False
