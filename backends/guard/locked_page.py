"""A small file that all workers of an instance share: read and written whole, under a lock."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple


class Page(NamedTuple):
    """What is in the file, while the lock is held."""

    text: bytes
    written_us: int
    """Unix time of the last write."""
    write: Callable[[bytes], None]


@contextlib.contextmanager
def locked_page(path: Path, length_bytes: int) -> Iterator[Page]:
    """Hold the lock of the file at `path`, which is made where it is not there.

    What is written is padded to `length_bytes` and written in place, so that a crash leaves the old text or the new
    one, and a disk that is full later takes it too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)

        def write(text: bytes) -> None:
            os.pwrite(descriptor, text.ljust(length_bytes), 0)
            os.fsync(descriptor)

        yield Page(file.read(), os.fstat(descriptor).st_mtime_ns // 1_000, write)
