"""Work on a disk beside the answers: in a thread of the operating system, so that a slow disk holds up no greenlet."""

from collections.abc import Callable

from gevent.monkey import get_original

_start_thread: Callable[[Callable[[], None], tuple[()]], int] = get_original("_thread", "start_new_thread")


def run_aside(job: Callable[[], None]) -> None:
    """Begin `job` and return at once.

    It may read and write files, and set what others read; locks, logs and events are not for it, since under gevent
    they belong to the greenlets of another thread.
    """
    _start_thread(job, ())
