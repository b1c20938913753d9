"""The embedded Redis of this clone, as run-dev.sh uses it: one for all instances, ended with the last of them."""

import fcntl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from supervision import (
    DATA,
    POLL_SECONDS,
    ROOT,
    Interrupted,
    Journal,
    StartFailed,
    Stop,
    Store,
    locked,
    locks,
)

from backends.store.addresses import without_password
from flaskapp.ops.running_redis import recorded_port, running_url

USUAL_PORT = 6379
REDIS_START_SECONDS = 20.0
KEEPER_STOP_SECONDS = 12.0
WATCH_SECONDS = 0.5
REDIS_HAS_ENDED = (
    "\nThe embedded Redis has ended; its log is .data/redis/server.log. Until it is back the service does what "
    "THROTTLE_ON_ERROR says.\nTo bring it back, with all that it held, start another service of this clone: "
    "PORT={port} ./scripts/run-dev.sh\n"
)
REDIS_IS_BACK = "\nThe embedded Redis is back.\n"


@contextmanager
def embedded_redis(stop: Stop) -> Iterator[Store]:
    """The server of this clone: started where it does not run, joined where it does; the last user ends it."""
    try:
        port = wanted_port()
        with locked(stop, DATA / "redis.users", fcntl.LOCK_SH):
            with locked(stop, DATA / "redis.starting", fcntl.LOCK_EX):
                joined = running_url(DATA) is not None
                if not joined:
                    start_keeper(stop, port)
            url = running_url(DATA)
            if url is None:
                raise StartFailed("The embedded Redis ended again; its log is .data/redis/server.log")
            origin = "another run-dev.sh of this clone started it" if joined else "started here"
            words = f"{without_password(url)} (embedded, kept in .data/redis; {origin})"
            yield Store(url, words, is_embedded=True)
    finally:
        wait_for_keeper()


def wanted_port() -> int:
    """The usual one, or, while other services of this clone run, the one on which they expect their Redis."""
    with (DATA / "redis.users").open("a") as users:
        if locks(users, fcntl.LOCK_EX):
            return USUAL_PORT
    return recorded_port(DATA) or USUAL_PORT


def start_keeper(stop: Stop, port: int) -> None:
    """Start the process that keeps the embedded Redis; it outlives us if another process uses it then."""
    said = DATA / "redis.said"
    with said.open("wb") as output:
        keeper = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / "keep_redis.py"), str(DATA), str(port)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        stop.wait_for(lambda: keeper.poll() is not None or running_url(DATA) is not None, REDIS_START_SECONDS)
    except Interrupted:
        keeper.terminate()
        keeper.wait()
        raise
    if keeper.poll() is not None:
        words = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise StartFailed(f"The embedded Redis did not start: {words[-1] if words else 'it said nothing'}")


class Watch:
    """Prints when the embedded Redis has ended under the services that use it, and when it is back."""

    def __init__(self, journal: Journal, url: str, free_port: int) -> None:
        self._journal = journal
        self._url = url
        self._has_ended = REDIS_HAS_ENDED.format(port=free_port)
        self._is_kept = True
        self._next_check_at = 0.0

    def check(self) -> bool:
        """Check every half second; always False, so that a caller who waits goes on waiting."""
        if time.monotonic() >= self._next_check_at:
            self._next_check_at = time.monotonic() + WATCH_SECONDS
            # Shared, so that two who check do not take each other for the keeper.
            with (DATA / "redis.keeper").open("a") as keeper:
                is_kept = not locks(keeper, fcntl.LOCK_SH)
            if is_kept and not self._is_kept:
                # A keeper that could not have the port again has another, which this service does not use.
                is_kept = running_url(DATA) == self._url
            if is_kept != self._is_kept:
                self._is_kept = is_kept
                self._journal.say(REDIS_IS_BACK if is_kept else self._has_ended)
        return False


def wait_for_keeper() -> None:
    """If we were the last user, the embedded Redis ends now: be there until it has."""
    end = time.monotonic() + KEEPER_STOP_SECONDS
    while time.monotonic() < end:
        with (DATA / "redis.keeper").open("a") as keeper:
            if locks(keeper, fcntl.LOCK_EX):
                return
        with (DATA / "redis.users").open("a") as users:
            if locks(users, fcntl.LOCK_SH) and not locks(users, fcntl.LOCK_EX):
                return
        time.sleep(POLL_SECONDS)
