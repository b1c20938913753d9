"""What an import loads, in a process of its own: `tests/http/test_loaded.py` asks a running worker."""

import json
import subprocess
import sys

import pytest

from tests.servers import ROOT

NOT_SERVED = ("backends.conformance", "flaskapp.lab", "rich", "fakeredis")
SERVED = """
from flaskapp import create_app
from flaskapp.config import load_config
config = load_config({"ENVIRONMENT": "development", "ENABLE_COST_THROTTLING": "true", "REDIS_URL": "redis://127.0.0.1:1/0"})
app = create_app(config)
asked = {"query": "What is Litecoin?"}
app.test_client().post("/api/v1/chat/stream", json=asked, headers={"X-Fingerprint": "hash456"}, buffered=True)
assert app.test_client().get("/admin").status_code == 401
app.extensions["tollgate"].stop()
"""


def loaded_after(code, place):
    code += "\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    command = [sys.executable, "-c", code]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def of(modules, packages):
    return [name for name in modules if any(f"{name}.".startswith(f"{package}.") for package in packages)]


@pytest.mark.parametrize("code", ["import flaskapp.factory", "import wsgi", SERVED])
def test_the_application_loads_no_lab(code, tmp_path):
    loaded = loaded_after(code, tmp_path)
    assert "flaskapp.chat.routes" in loaded
    assert of(loaded, NOT_SERVED) == []


def test_a_module_of_the_lab_would_be_noticed(tmp_path):
    assert "flaskapp.lab.race" in of(loaded_after("import flaskapp.factory, flaskapp.lab.race", tmp_path), NOT_SERVED)


@pytest.mark.parametrize("name", ["flaskapp", "flaskapp.strict_json", "flaskapp.ops.embedded_redis"])
def test_a_small_module_needs_no_flask(name, tmp_path):
    assert of(loaded_after(f"import {name}", tmp_path), ("flask", "pydantic", "flaskapp.factory")) == []


def test_the_lab_runs_without_the_application(tmp_path):
    loaded = loaded_after("import flaskapp.lab.race_command", tmp_path)
    assert of(loaded, ("flask", "flaskapp.factory", "flaskapp.chat", "flaskapp.admin", "flaskapp.answers")) == []
