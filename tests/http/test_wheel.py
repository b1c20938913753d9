"""What the wheel holds without its checkout: an application that serves, gunicorn's configuration, and commands."""

import subprocess
import sys
import zipfile
from importlib.metadata import EntryPoint

import pytest

import backends
from tests.servers import ROOT, Service

COMMAND = "import sys; from flaskapp.ops.command import main; sys.argv[0] = 'llm-tollgate'; main()"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A folder with all that the wheel installs."""
    place = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(place)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (packed,) = place.glob("llm_tollgate-*.whl")
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(place / "installed")
    return place / "installed"


class Installed(Service):
    def launch(self):
        with (self.directory / "app.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", COMMAND, "serve", "--name", "from-the-wheel"],
                cwd=self.directory,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


def test_it_serves_from_an_empty_directory(wheel, tmp_path, redis_url):
    with Installed(tmp_path, redis_url, PYTHONPATH=str(wheel)) as service:
        assert service.get("/healthz").json() == {"status": "ok"}
        assert service.chat().status_code == 200
        assert "Using worker: TurnsWorker" in service.log()


def test_it_has_the_commands_of_flask(wheel, tmp_path, redis_url):
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(wheel), "REDIS_URL": redis_url}
    command = [sys.executable, "-c", COMMAND, "settings", "set", "llm_max_tokens", "77"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "llm_max_tokens is 77 now (redis)\n", done.stderr


def test_it_names_its_command_and_its_strategies(wheel):
    (names,) = wheel.glob("llm_tollgate-*.dist-info/entry_points.txt")
    text = names.read_text()
    assert "llm-tollgate = flaskapp.ops.command:main" in text
    assert "[llm_tollgate.backends]\natomic = backends.strategies.atomic:open_atomic" in text


@pytest.mark.parametrize("group", ["llm_tollgate.backends", "tollgate.backends"])
def test_a_strategy_of_another_package_is_found_under_both_names_of_the_group(monkeypatch, group):
    mine = EntryPoint("mine", "somebody.elses:open_mine", group)
    monkeypatch.setattr(backends, "entry_points", lambda *, group: [mine] if group == mine.group else [])
    assert backends.backend_names() == ["mine"]
