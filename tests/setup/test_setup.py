"""What scripts/setup.py does before there is anything to run."""

import importlib.util
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def setup_script():
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "scripts" / "setup.py")
    module = importlib.util.module_from_spec(spec)
    # It takes Ctrl-C before it does anything else; here that is for pytest.
    handler = signal.getsignal(signal.SIGINT)
    spec.loader.exec_module(module)
    signal.signal(signal.SIGINT, handler)
    return module


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_parts_of_the_lock_file_are_the_lock_file(setup_script, tmp_path, count):
    def pins_with_hashes(text):
        return Counter(re.findall(r"^\S+==\S+.*(?:\n    --hash=sha256:\w+.*)+", text, re.MULTILINE))

    whole = setup_script.LOCK_FILE.read_text()
    parts = [part.read_text() for part in setup_script._parts_of_lock(tmp_path, count)]
    # The last line of a part says that no more follows.
    together = Counter(pin.rstrip("\\ ") for part in parts for pin in pins_with_hashes(part))
    assert len(parts) == count
    assert together == Counter(pin.rstrip("\\ ") for pin in pins_with_hashes(whole))
    assert (
        sum(together.values())
        == whole.count("==") - whole.count(" == ")
        == len(re.findall(r"^\S", whole, re.MULTILINE))
    )


@pytest.mark.parametrize("made", ["folder with a file", "file"])
def test_what_is_no_environment_is_never_cleared(setup_script, tmp_path, monkeypatch, made):
    place = tmp_path / "place"
    kept = place if made == "file" else place / "thesis.txt"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("years of work")
    monkeypatch.setattr(setup_script, "VENV", place)
    with pytest.raises(SystemExit, match="is there already and no Python environment: name another place"):
        setup_script._install()
    assert kept.read_text() == "years of work"


def test_an_empty_folder_and_an_environment_may_be(setup_script, tmp_path, monkeypatch):
    monkeypatch.setattr(setup_script, "VENV", tmp_path)
    setup_script._demand_ours()
    (tmp_path / "pyvenv.cfg").touch()
    (tmp_path / "bin").mkdir()
    setup_script._demand_ours()


def test_a_signal_waits_until_a_process_that_was_started_is_known(setup_script):
    def note(number, _frame):
        heard.append((number, list(known)))

    heard, known = [], []
    handler = signal.signal(signal.SIGHUP, note)
    try:
        with setup_script._held_back():
            signal.raise_signal(signal.SIGHUP)
            known.append("process")
    finally:
        signal.signal(signal.SIGHUP, handler)
    assert heard == [(signal.SIGHUP, ["process"])]


def test_a_step_that_fails_ends_those_beside_it(setup_script):
    fails = [sys.executable, "-c", "import sys; sys.exit(3)"]
    lasts = [sys.executable, "-c", "import signal; signal.pause()"]
    with pytest.raises(subprocess.CalledProcessError) as caught:
        setup_script._run_together([fails, lasts])
    assert (caught.value.returncode, caught.value.cmd) == (3, fails)


def test_an_environment_whose_python_was_replaced_is_set_up_anew(setup_script, tmp_path, monkeypatch):
    python = tmp_path / "python"
    monkeypatch.setattr(setup_script, "PYTHON", python)
    monkeypatch.setattr(setup_script, "STAMP", tmp_path / "stamp")
    python.symlink_to(sys.executable)
    setup_script.STAMP.write_text(setup_script._fingerprint())
    assert setup_script._is_installed()
    python.unlink()
    python.write_text("#!/bin/sh\necho another-python\n")
    python.chmod(0o755)
    assert not setup_script._is_installed()
    python.unlink()
    assert not setup_script._is_installed()
