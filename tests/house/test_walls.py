"""The walls are kept by import-linter and ruff; here it is shown that they would notice a breach."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def ruff(code, path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "ruff",
            "check",
            "--no-cache",
            "--stdin-filename",
            str(ROOT / path),
            "--select",
            "TID251",
            "-",
        ],
        input=code,
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    return done.returncode


@pytest.mark.parametrize(
    ("code", "allowed", "forbidden"),
    [
        ("import time\ntime.time()\n", "backends/clock.py", "backends/strategies/atomic.py"),
        ("import time\ntime.monotonic()\n", "backends/clock.py", "flaskapp/chat/routes.py"),
        ("import datetime\ndatetime.datetime.now()\n", "backends/clock.py", "backends/strategies/legacy.py"),
        ("import os\nos.environ['X']\n", "flaskapp/config.py", "flaskapp/chat/routes.py"),
        ("import os\nos.getenv('X')\n", "flaskapp/config.py", "backends/pricing/prices.py"),
    ],
)
def test_time_and_environment_are_read_in_one_place(code, allowed, forbidden):
    assert ruff(code, allowed) == 0
    assert ruff(code, forbidden) == 1


BREACHES = {
    "backends/money.py": ("import flask\n", "The library stands alone"),
    "backends/keys.py": ("import flaskapp.chat.routes\n", "The library stands alone"),
    "backends/records.py": ("import pydantic\n", "The library stands alone"),
    "backends/contract.py": ("import backends.pricing.prices\n", "Prices are optional"),
    "backends/guard/__init__.py": ("import backends.conformance\n", "The product loads no conformance suite"),
    "flaskapp/usage.py": ("import backends.conformance.behaviour\n", "The product loads no conformance suite"),
    "flaskapp/factory.py": ("import flaskapp.lab.page\n", "The service loads no lab"),
    "flaskapp/admin/views.py": (
        "def later():\n    from flaskapp.lab.race_runner import start_race\n",
        "The service loads no lab",
    ),
    "flaskapp/cli/commands.py": ("import flaskapp.lab.race_command\n", "The service loads no lab"),
    "backends/strategies/legacy.py": ("import backends.strategies.atomic\n", "The strategies lie side by side"),
    "flaskapp/chat/events.py": ("import redis\n", "Redis stays behind the backends"),
    "flaskapp/http/identity.py": ("import backends.strategies.memory\n", "Only open_backend names a strategy"),
    "flaskapp/chat/routes.py": ("import flaskapp.admin\n", "The chat, OpenAI's routes and the admin"),
    "flaskapp/llm/builtin.py": ("import flask\n", "The models know nothing of HTTP"),
    "flaskapp/ops/logs.py": ("import pytest\n", "The product does not import its test tools"),
}


@pytest.fixture
def copy(tmp_path):
    for package in ("backends", "flaskapp"):
        for source in (ROOT / package).rglob("*.py"):
            place = tmp_path / source.relative_to(ROOT)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(source.read_bytes())
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    return tmp_path


def lint_imports(place):
    code = (
        "import sys; sys.path.insert(0, ''); from importlinter.cli import lint_imports_command as c; c(['--no-cache'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(place), "COLUMNS": "200"},
    )
    return done.returncode, done.stdout + done.stderr


def test_every_wall_stands(copy):
    status, output = lint_imports(copy)
    assert status == 0, output
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert f"{len(contracts)} kept, 0 broken" in output
    for contract in contracts:
        assert any(contract["name"].startswith(wall) for _, wall in BREACHES.values()), contract["name"]


@pytest.mark.parametrize("path", BREACHES)
def test_a_breach_is_noticed(copy, path):
    place = copy / path
    code, wall = BREACHES[path]
    place.write_text(place.read_text() + code)
    status, output = lint_imports(copy)
    assert status == 1, output
    assert [line for line in output.splitlines() if line.startswith(wall) and "BROKEN" in line], output


def test_every_rule_that_is_switched_off_says_why():
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    exceptions = [line for line in lines if line.strip().startswith('"') and line.split('"')[1][:1].isupper()]
    codes = [line for line in exceptions if line.split('"')[1][-1].isdigit() or line.split('"')[1].isupper()]
    assert len(codes) > 20
    assert [line for line in codes if "#" not in line and '"ALL"' not in line] == []


def test_nothing_reaches_beyond_this_machine_or_names_it():
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    if not tracked:
        pytest.skip("no checkout of git")
    words = [
        "/".join(parts)
        for parts in (("", "root", ""), ("", "opt", "pypi"), ("pypi.org", ""), ("files.pythonhosted.org", ""))
    ]
    for name in filter(None, tracked.split("\0")):
        text = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
        assert [word for word in words if word.encode() in text] == [], name
