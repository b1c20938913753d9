"""What the wheel holds without its checkout: an application that serves, gunicorn's configuration, and commands."""

import subprocess
import sys
import zipfile
from importlib.metadata import EntryPoint

import pytest

import backends
from tests.servers import ROOT, Service

# As the script that is installed, to which the directory where it is called means nothing.
RUN = [sys.executable, "-P", "-c", "import sys; from flaskapp.ops.command import main; main()"]


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
                [*RUN, "serve", "--name", "from-the-wheel"],
                cwd=self.directory,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


@pytest.fixture(params=["an empty directory", "another checkout"])
def place(request, tmp_path):
    """Where it is called."""
    if request.param == "another checkout":
        for name in ("wsgi.py", "gunicorn.conf.py", "flaskapp/__init__.py", "backends/__init__.py", "redis.py"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("raise SystemExit('of another one')\n")
    return tmp_path


def test_it_serves_wherever_it_is_called(wheel, place, redis_url):
    with Installed(place, redis_url, PYTHONPATH=str(wheel)) as service:
        assert service.get("/healthz").json() == {"status": "ok"}
        assert service.chat().status_code == 200
        assert "gevent" in service.log()


def test_it_has_the_commands_of_flask(wheel, place, redis_url):
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(wheel), "REDIS_URL": redis_url}
    command = [*RUN, "settings", "set", "llm_max_tokens", "77"]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "llm_max_tokens is 77 now (redis)\n", done.stderr


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_asked_for_help_it_names_all_that_it_can_do(wheel, tmp_path, words):
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(wheel), "REDIS_URL": "redis://127.0.0.1:1/0"}
    done = subprocess.run([*RUN, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("llm-tollgate serve ")
    for name in ("settings", "ledger", "doctor", "scripts"):
        assert f"\n  {name} " in done.stdout


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
