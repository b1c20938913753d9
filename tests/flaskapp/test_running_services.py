import json
import subprocess
import sys

from flaskapp.ops.running_services import note_service, running_services


def test_what_settings_fall_back_to_is_noted_and_no_secret(tmp_path):
    environment = {
        "DAILY_COST_LIMIT_USD": "1",
        "BUDGETS": "[]",
        "BUDGET_TIME_ZONE": "Europe/Berlin",
        "ENVIRONMENT": "staging",
        "ADMIN_TOKEN": "secret",
        "REDIS_URL": "redis://:secret@x",
    }
    with note_service(tmp_path, 8000, environment):
        (one,) = running_services(tmp_path)
        names = ("DAILY_COST_LIMIT_USD", "BUDGETS", "BUDGET_TIME_ZONE", "ENVIRONMENT")
        assert (one.port, one.variables) == (8000, {name: environment[name] for name in names})
        assert "secret" not in "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    assert running_services(tmp_path) == []


def test_notes_that_cannot_be_read_are_none(tmp_path):
    """As those of another user: here the folder leads to itself, which root cannot read either."""
    (tmp_path / "served").symlink_to(tmp_path / "served")
    assert running_services(tmp_path) == []


def test_a_note_that_was_left_behind_or_is_none_is_passed_over(tmp_path):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    with note_service(tmp_path, 8000, {}):
        for name, text in {
            "8001": json.dumps({"pid": int(gone.stdout), "variables": {}}),
            "8002": "{",
            "8003": "{}",
            "8004": "[]",
            "x": json.dumps({"pid": 1, "variables": {}}),
        }.items():
            (tmp_path / "served" / f"{name}.json").write_text(text)
        assert [each.port for each in running_services(tmp_path)] == [8000]
