"""The text of the live settings on disk, for a worker that starts while Redis is away."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


class KeptText:
    """The last text that was read from Redis, in a file that its owner alone may read.

    Args:
        directory: where the file is, named after the Redis that the text comes from.
        place: where that Redis is.
        run_aside: begins a write, which may take long, and returns at once.
    """

    def __init__(self, directory: Path, place: str, run_aside: Callable[[Callable[[], None]], None]) -> None:
        self._path = directory / f"settings-{hashlib.sha256(place.encode()).hexdigest()[:8]}.json"
        self._run_aside = run_aside
        self._is_writing = False
        self._text = self._read()
        self.failure = ""
        """Why the last write failed; empty if it did not."""

    @property
    def text(self) -> bytes | None:
        """What is kept; None without a text."""
        return self._text

    def keep(self, text: bytes | None) -> None:
        """Begin to write `text`, unless it is kept already or another write has not ended; then call it again later."""
        if text == self._text or self._is_writing:
            return
        self._is_writing = True
        self._run_aside(lambda: self._write(text))

    def _read(self) -> bytes | None:
        with suppress(OSError):
            return self._path.read_bytes()
        return None

    def _write(self, text: bytes | None) -> None:
        try:
            if text is None:
                self._path.unlink(missing_ok=True)
            else:
                _replace(self._path, text)
            self._text, self.failure = text, ""
        except OSError as error:
            self.failure = str(error)
        finally:
            self._is_writing = False


def _replace(path: Path, text: bytes) -> None:
    """Write beside it and rename: a reader, also after a crash, finds the old text or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        Path(draft).replace(path)
    except BaseException:
        Path(draft).unlink()
        raise
