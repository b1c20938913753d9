"""Work on a disk beside the answers: in a thread of the operating system, so that a slow disk holds up no greenlet."""

import concurrent.futures
from collections.abc import Callable
from typing import Any

import gevent
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
    return _GreenletsAside() if is_module_patched("threading") else concurrent.futures.ThreadPoolExecutor(1)


class _GreenletsAside(concurrent.futures.Executor):
    """As `concurrent.futures.ThreadPoolExecutor`: while the thread is busy jobs wait, and those who submit them do not.

    gevent's own executor has the caller of `submit` wait for a free thread, for as long as a disk takes.
    """

    def __init__(self) -> None:
        self._pool = gevent.threadpool.ThreadPool(1)

    def submit(self, job: Callable[..., Any], /, *args: Any, **options: Any) -> concurrent.futures.Future[Any]:
        """Begin `job` as soon as the thread is free."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        gevent.spawn(self._run, future, lambda: job(*args, **options))
        return future

    def _run(self, future: concurrent.futures.Future[Any], job: Callable[[], Any]) -> None:
        # The pool would print what a job raises.
        result, error = self._pool.apply(_outcome, (job,))
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)


def _outcome(job: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    try:
        return job(), None
    except BaseException as error:  # noqa: BLE001 (it is raised where the result is asked for)
        return None, error
