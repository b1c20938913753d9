"""A clock that is off and a slow disk, for one program: a library of a few lines that is loaded before libc."""

import shutil
import struct
import subprocess
from pathlib import Path

from benchmarks.outages.fault import CannotInject

_SOURCE = Path(__file__).with_name("shim.c")


class Shim:
    """What one program is told of its clock and of its disk; it may change while the program runs.

    Raises:
        CannotInject: there is no compiler.
    """

    def __init__(self, directory: Path) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            raise CannotInject("no C compiler")
        directory.mkdir(parents=True, exist_ok=True)
        self._library = directory / "shim.so"
        self._numbers = directory / "numbers"
        self.set()
        subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", self._library, _SOURCE], check=True)

    @property
    def environment(self) -> dict[str, str]:
        """With it a program obeys."""
        return {"LD_PRELOAD": str(self._library), "FAULT_SHIM": str(self._numbers)}

    def around(self, program: Path) -> Path:
        """A script that runs the program in that environment."""
        script = self._library.with_name(program.name)
        words = " ".join(f"{name}='{value}'" for name, value in self.environment.items())
        script.write_text(f'#!/bin/sh\n{words} exec {program} "$@"\n', encoding="utf-8")
        script.chmod(0o755)
        return script

    def set(self, *, clock_seconds: int = 0, fsync_us: int = 0) -> None:
        """In place, since the program has the file mapped."""
        self._numbers.touch()
        with self._numbers.open("r+b") as numbers:
            numbers.write(struct.pack("=qq", clock_seconds, fsync_us))
