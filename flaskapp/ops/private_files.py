"""Files that only their owner may read: secrets, and what a service of this clone leaves behind."""

import os
import secrets
from contextlib import suppress
from pathlib import Path

_SECRET_BYTES = 16


def write_private(place: Path, text: str) -> None:
    """Write a file that its owner alone may read; who reads it meanwhile has the old text or the new one."""
    draft = _draft(place, text)
    draft.replace(place)


def new_secret() -> str:
    """A password or token of hex digits: none is taken for an option, and none has to be quoted."""
    return secrets.token_hex(_SECRET_BYTES)


def kept_secret(place: Path) -> str:
    """The secret in that file, which is made by the first who asks."""
    if not place.exists():
        draft = _draft(place, f"{new_secret()}\n")
        try:
            with suppress(FileExistsError):  # of two who make one at the same moment both take the first
                os.link(draft, place)
        finally:
            draft.unlink()
    return place.read_text(encoding="utf-8").strip()


def make_private(folder: Path) -> bool:
    """Make the folder, and take away what others may do with it and with all in it; whether that was possible."""
    folder.mkdir(mode=0o700, exist_ok=True)
    places = [Path(path, name) for path, folders, files in os.walk(folder) for name in (*folders, *files)]
    return all(list(map(_closed, (folder, *places))))


def _closed(place: Path) -> bool:
    """A file may vanish meanwhile: of several services of this clone each looks after its own."""
    try:
        if not place.is_symlink():
            place.chmod(place.stat().st_mode & 0o700)
    except FileNotFoundError:
        pass
    except OSError:
        return False
    return True


def _draft(place: Path, text: str) -> Path:
    draft = place.with_name(f"{place.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    return draft
