"""Dockerfile and compose file, as far as they can be checked without an engine; .ci/run lints them as well."""

import os
import re
import runpy
import subprocess
from pathlib import Path

import pytest
import redis
import yaml

from flaskapp.config import variables
from flaskapp.ops.embedded_redis import free_port
from flaskapp.ops.running_redis import answers, url_of
from tests.servers import wait_until

ROOT = Path(__file__).resolve().parent.parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def services():
    return yaml.safe_load((ROOT / "docker-compose.dev.yml").read_text())["services"]


def test_the_containers_have_the_names_of_the_seed(services):
    assert {service["container_name"] for service in services.values()} == {"litecoin-redis", "litecoin-backend"}


def test_every_port_is_published_on_loopback_only(services):
    published = [port for service in services.values() for port in service["ports"]]
    assert len(published) == 2
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_every_variable_is_passed_on_and_none_is_made_empty(services):
    passed = services["backend"]["environment"]
    assert {variable.name for variable in variables()} == set(passed)
    set_here = {name for name, value in passed.items() if value is not None}
    assert set_here == {"HOST", "PORT", "REDIS_URL", "ENVIRONMENT"}
    assert passed["HOST"] == "0.0.0.0"
    assert passed["ENVIRONMENT"] == "${ENVIRONMENT-development}"


def test_redis_in_the_container_is_durable_and_never_evicts(services):
    words = " ".join(services["redis"]["command"])
    assert "--appendonly yes" in words
    assert "--maxmemory-policy noeviction" in words
    assert "redis-data:/data" in services["redis"]["volumes"]
    assert services["redis"]["healthcheck"]


def test_redis_in_the_container_asks_for_the_password_which_no_argument_shows(services, tmp_path):
    redis_service = services["redis"]
    assert "requirepass" in redis_service["command"][-1]
    assert redis_service["environment"] == {"REDISCLI_AUTH": "${TOLLGATE_REDIS_PASSWORD:-known-to-all}"}
    assert (
        "redis://:${TOLLGATE_REDIS_PASSWORD:-known-to-all}@redis:6379/0"
        in (services["backend"]["environment"]["REDIS_URL"])
    )
    port = free_port()
    shell, flag, script = redis_service["command"]
    script = script.replace("$$", "$").replace("redis-server -", f"redis-server - --port {port}", 1)
    environment = {"PATH": os.environ["PATH"], "REDISCLI_AUTH": "of-this-container"}
    with subprocess.Popen(
        [shell, flag, script], cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as server:
        try:
            url = url_of(port, "of-this-container")
            wait_until(lambda: answers(url), 10, "the container's command serves, and takes the password")
            with redis.Redis(port=port) as stranger, pytest.raises(redis.AuthenticationError):
                stranger.ping()
            shown = Path(f"/proc/{server.pid}/cmdline")
            assert not shown.exists() or b"of-this-container" not in shown.read_bytes()
        finally:
            server.terminate()


def test_a_container_can_do_no_more_than_it_needs(services):
    for service in services.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert "cap_add" not in service
        assert "privileged" not in service
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["tmpfs"] == ["/tmp"]  # noqa: S108 - of the container
    assert services["redis"]["user"] == "redis"
    # What is written goes to volumes; the sources are mounted so that they cannot be.
    writable = [each for service in services.values() for each in service["volumes"] if not each.endswith(":ro")]
    assert writable == ["redis-data:/data", "backend-data:/app/.data"]


def test_the_sources_are_the_hosts_and_reloaded(services):
    backend = services["backend"]
    assert "--reload" in backend["command"]
    for path in ("backends", "flaskapp", "wsgi.py", "gunicorn.conf.py"):
        assert f"./{path}:/app/{path}:ro" in backend["volumes"]
        assert (ROOT / path).exists()
    assert backend["depends_on"] == {"redis": {"condition": "service_healthy"}}


def test_a_container_is_given_the_time_that_its_streams_need(services, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    grace = re.search(r"graceful_timeout = (\d+) if .+ else (\d+)", (ROOT / "gunicorn.conf.py").read_text())
    development, production = map(int, grace.groups())
    assert development < int(services["backend"]["stop_grace_period"].rstrip("s"))
    settling = int(re.search(r"SETTLING_SECONDS = (\d+)", (ROOT / "gunicorn.conf.py").read_text()).group(1))
    assert settling < development < production


def test_the_image_runs_as_a_user_without_rights_and_listens_on_all_addresses():
    final = DOCKERFILE.split("\nFROM ")[-1]
    assert re.search(r"^USER [1-9]\d*$", final, re.MULTILINE)
    assert "HOST=0.0.0.0" in final
    assert re.search(r'^CMD \["gunicorn", ', final, re.MULTILINE)
    assert "VOLUME /app/.data" in final


def test_the_image_is_built_from_lock_files_with_hashes():
    installs = re.findall(r"pip install (.+?)(?: \\|$)", DOCKERFILE, re.MULTILINE)
    assert len(installs) == 3
    assert all("--require-hashes" in line or "--no-index" in line for line in installs)


@pytest.mark.parametrize("copied", re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE))
def test_what_the_image_copies_is_there_and_sent_to_the_engine(copied):
    sent = (ROOT / ".dockerignore").read_text().splitlines()
    for name in copied.split():
        assert (ROOT / name).exists()
        assert f"!{name}" in sent


def test_the_health_check_fails_where_nothing_serves(monkeypatch):
    command = re.search(r'CMD \["python", "-c", "(.+)"\]', DOCKERFILE).group(1)
    monkeypatch.setenv("PORT", "1")
    with pytest.raises(OSError, match="refused"):
        exec(command, {})  # noqa: S102 - what the container runs


def test_the_lock_files_are_in_step_with_the_project():
    checks = runpy.run_path(str(ROOT / "scripts" / "check_locks.py"))
    assert checks["main"].__name__ == "main"
    wanted = ["flask>=99", "nobodys-package"]
    problems = checks["problems_of"]("requirements.lock", wanted)
    assert [problem.split(": ")[1].split()[0] for problem in problems] == ["flask", "nobodys-package"]
