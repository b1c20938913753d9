"""Work on a disk beside the answers: in a thread of the operating system, so that a slow disk holds up no greenlet."""

import concurrent.futures
from collections.abc import Callable

import gevent.threadpool
from gevent.monkey import get_original, is_module_patched

_start_thread: Callable[[Callable[[], None], tuple[()]], int] = get_original("_thread", "start_new_thread")


def run_aside(job: Callable[[], None]) -> None:
    """Begin `job` and return at once.

    It may read and write files, and set what others read; locks, logs and events are not for it, since under gevent
    they belong to the greenlets of another thread.
    """
    _start_thread(job, ())


def one_thread_aside() -> concurrent.futures.Executor:
    """One thread of the operating system, whose results are waited for without holding up a greenlet."""
    if is_module_patched("threading"):
        executor: concurrent.futures.Executor = gevent.threadpool.ThreadPoolExecutor(1)
        return executor
    return concurrent.futures.ThreadPoolExecutor(1)
