import http.client
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from flaskapp.ops.embedded_redis import free_port

ROOT = Path(__file__).resolve().parent.parent.parent
PARTS = ("scripts", "backends", "flaskapp", "wsgi.py", "gunicorn.conf.py", "pyproject.toml", "requirements-dev.lock")


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A copy of the project, set up already, so that nothing of the real one is touched."""
    # The gate sets up elsewhere: the copy's set-up must look into the copy.
    monkeypatch.delenv("TOLLGATE_VENV", raising=False)
    place = tmp_path / "a clone"
    place.mkdir()
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, place / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, place / part)
    venv = place / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    packages = next(venv.glob("lib/python3*/site-packages"))
    (packages / "tests.pth").write_text(f"{place}\n{sysconfig.get_path('purelib')}\n")
    setup = importlib.util.spec_from_file_location("setup_of_clone", place / "scripts" / "setup.py")
    module = importlib.util.module_from_spec(setup)
    handler = signal.getsignal(signal.SIGINT)
    setup.loader.exec_module(module)
    signal.signal(signal.SIGINT, handler)
    no_engine = place / "no-engine" / "docker"  # whatever this machine has
    no_engine.parent.mkdir()
    no_engine.write_text("#!/bin/sh\nexit 1\n")
    no_engine.chmod(0o755)
    module.STAMP.write_text(module._fingerprint())
    return place


class Instance:
    """One ./scripts/run-dev.sh."""

    def __init__(self, clone, **environment):
        self.clone = clone
        self.port = int(environment.get("PORT", 0)) or free_port()
        path = f"{clone / 'no-engine'}:{os.environ['PATH']}"
        self.output = clone / f"said-{self.port}.txt"
        with self.output.open("wb") as said:
            self.process = subprocess.Popen(
                ["./scripts/run-dev.sh"],
                cwd=clone,
                env={"PATH": path, "PORT": str(self.port), **environment},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def said(self):
        return self.output.read_text()

    def until(self, text, seconds=30):
        deadline = time.monotonic() + seconds
        while text not in self.said:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.02)
        return self

    def get(self, path):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        finally:
            connection.close()

    def end(self, number=signal.SIGINT):
        self.process.send_signal(number)
        return self.process.wait(20)


@pytest.fixture
def start(clone):
    instances = []

    def make(**environment):
        instances.append(Instance(clone, **environment))
        return instances[-1]

    yield make
    for instance in instances:
        if instance.process.poll() is None:
            instance.end(signal.SIGTERM)
    assert processes_of(clone) == []


def processes_of(clone):
    """What still runs of it, under whatever parent."""
    rows = subprocess.run(["ps", "-eo", "stat=,pid=,args="], capture_output=True, text=True, check=True).stdout
    return [row for row in rows.splitlines() if str(clone) in row and not row.strip().startswith("Z")]
