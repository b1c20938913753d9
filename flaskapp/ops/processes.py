"""Processes of ours: how they end, and how they end with us."""

import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

from backends.clock import SystemClock


def guardian_of(pid: int) -> "subprocess.Popen[bytes]":
    """A shell that waits for this process to end, for whatever reason, and then kills `pid`."""
    return subprocess.Popen(  # noqa: S603 - nothing of it comes from outside
        ["/bin/sh", "-c", 'read -r _; kill -9 "$0"', str(pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def end_guardian(guardian: "subprocess.Popen[bytes]") -> None:
    """End the shell, so that it kills no process any more."""
    guardian.kill()
    guardian.communicate()


def end_process(process: "subprocess.Popen[Any]", seconds: float, number: int = signal.SIGTERM) -> None:
    """Send it a signal, and kill it if it has not ended `seconds` later. Does nothing where it has ended."""
    process.send_signal(number)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_until(holds: Callable[[], bool], timeout_seconds: float) -> None:
    """Return when `holds()`, or after the time-out."""
    clock = SystemClock()
    end_seconds = clock.monotonic_seconds() + timeout_seconds
    while not holds() and clock.monotonic_seconds() < end_seconds:
        time.sleep(0.005)
