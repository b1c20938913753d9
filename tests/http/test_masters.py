"""Masters and their workers: what a second one takes from the first, and which code runs after a reload."""

import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from tests.processes import children_of
from tests.servers import CHAT, ROOT, START_SECONDS, Service, signed_by_itself, wait_until

BOOTED = "Cost throttling is"


class Clone(Service):
    """A service that runs a copy of the sources, which may be changed."""

    options = ()

    def __init__(self, directory, redis_url, **environment):
        super().__init__(directory, redis_url, PYTHONPATH=str(directory), **environment)
        for name in ("backends", "flaskapp"):
            shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("wsgi.py", "gunicorn.conf.py"):
            shutil.copy(ROOT / name, directory)

    def launch(self):
        with (self.directory / "app.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "gunicorn", *self.options, "wsgi:app"],
                cwd=self.directory,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def say(self, word):
        """Change what `/healthz` answers."""
        health = self.directory / "flaskapp" / "ops" / "health.py"
        health.write_text(re.sub(r'\{"status": "\w+"\}', f'{{"status": "{word}"}}', health.read_text()))

    @property
    def said(self):
        with suppress(requests.RequestException):
            return self.get("/healthz").json()["status"]


class Reloading(Clone):
    options = ("--reload",)


def admitted(service):
    families = text_string_to_metric_families(service.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == "tollgate_checks_total"]
    return sum(sample.value for sample in samples if sample.labels["outcome"] == "admitted")


def number_files(service):
    return sorted(path.name for path in service.directory.glob("numbers/tollgate-*/*.db"))


def reload(service, seen):
    os.kill(service._process.pid, signal.SIGHUP)
    service.lines_with(BOOTED, seen, at_least=service.workers, within_seconds=START_SECONDS)
    wait_until(lambda: len(children_of(service._process.pid)) == service.workers, START_SECONDS, "the old ones ended")


@pytest.fixture
def service(tmp_path, redis_url):
    environment = {"ENABLE_COST_THROTTLING": "true", "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "numbers")}
    with Service(tmp_path, redis_url, DEMO_TOKENS_PER_SECOND="0", **environment) as service:
        yield service


def test_a_start_on_a_taken_port_leaves_the_numbers_of_the_first(service):
    assert service.chat().status_code == 200
    second = service.launch()
    assert second.wait(START_SECONDS) == 1
    assert service.chat().status_code == 200
    assert admitted(service) == 2


def test_another_master_on_the_same_disk_neither_resets_nor_adds_to_the_numbers(service, redis_url):
    """As in two containers with one volume."""
    assert service.chat().status_code == 200
    numbers = service.environment["PROMETHEUS_MULTIPROC_DIR"]
    with Service(
        service.directory, redis_url, ENABLE_COST_THROTTLING="true", PROMETHEUS_MULTIPROC_DIR=numbers
    ) as other:
        assert other.chat("hash2").status_code == 200
        assert admitted(other) == 1
        assert admitted(service) == 1
    assert service.chat().status_code == 200
    assert admitted(service) == 2


def test_sigusr2_leaves_the_numbers_of_the_master_that_goes_on(service):
    assert service.chat().status_code == 200
    seen = len(service.log_lines())
    old = service._process.pid
    os.kill(old, signal.SIGUSR2)
    service.lines_with(BOOTED, seen, at_least=service.workers, within_seconds=START_SECONDS)
    (new,) = [pid for pid in children_of(old) if children_of(pid)]
    os.kill(new, signal.SIGTERM)
    service.lines_with("Shutting down: Master.2", seen, within_seconds=START_SECONDS)
    assert service.chat().status_code == 200
    assert admitted(service) == 2


def test_files_of_numbers_do_not_grow_with_reloads_and_restarts(service):
    assert service.chat().status_code == 200
    for _ in range(2):
        reload(service, len(service.log_lines()))
        assert len(number_files(service)) <= 2 * 2 * service.workers  # two kinds, and the old beside the new
        assert service.chat("hash2").status_code == 200
    assert admitted(service) == 3
    service.kill()  # it cleans up nothing
    assert number_files(service)
    service.start()
    assert len(number_files(service)) == 2 * service.workers
    assert admitted(service) == 0
    service.stop()
    assert number_files(service) == []


def test_sighup_serves_the_code_that_is_on_disk_then(tmp_path, redis_url):
    # As JSON the master writes its own lines with more than gunicorn has.
    with Clone(tmp_path, redis_url, LOG_FORMAT="json") as service:
        assert service.said == "ok"
        service.say("new")
        reload(service, len(service.log_lines()))
        assert service.by_each_worker(lambda: service.said) == ["new", "new"]


def test_old_workers_of_a_reload_listen_until_the_new_ones_do(service):
    seen = len(service.log_lines())
    reload(service, seen)
    lines = service.log_lines()[seen:]
    booted = [number for number, line in enumerate(lines) if BOOTED in line]
    ended = [number for number, line in enumerate(lines) if "Worker exiting" in line]
    assert (len(booted), len(ended)) == (service.workers, service.workers)
    assert max(booted) < min(ended)


def test_a_certificate_of_gunicorns_is_served(tmp_path, redis_url):
    certificate, key = signed_by_itself(tmp_path)
    with Service(tmp_path, redis_url, GUNICORN_CMD_ARGS=f"--certfile {certificate} --keyfile {key}") as service:
        url = f"https://localhost:{service.port}"
        assert requests.get(f"{url}/healthz", verify=certificate, timeout=10).status_code == 200
        body = {"query": "What is Litecoin?", "max_tokens": 5}
        headers = {"X-Fingerprint": "hash456"}
        answer = requests.post(f"{url}{CHAT}", json=body, headers=headers, verify=certificate, timeout=10)
        assert '"status":"complete"' in answer.text
        with pytest.raises(requests.ConnectionError):
            service.get("/healthz")


def test_reload_serves_new_code(tmp_path, redis_url):
    with Reloading(tmp_path, redis_url, WEB_CONCURRENCY="1") as service:
        assert service.said == "ok"
        service.say("new")
        wait_until(lambda: service.said == "new", START_SECONDS, "the new code")


@pytest.mark.parametrize(
    "place",
    [
        ".data",
        ".data/emergency-budget-127.0.0.1-{port}.json",
        ".data/emergency-books-127.0.0.1-{port}.json",
        ".data/prometheus",
    ],
)
def test_what_cannot_be_written_in_the_data_directory_stops_the_start_with_one_line(tmp_path, place):
    """As what belongs to another user; but these tests may be root's, who may write that."""
    service = Service(tmp_path, "redis://127.0.0.1:1/0", PROMETHEUS_MULTIPROC_DIR=str(tmp_path / ".data/prometheus"))
    in_the_way = tmp_path / place.format(port=service.port)
    if in_the_way.suffix == ".json":
        in_the_way.mkdir(parents=True)
    else:
        in_the_way.parent.mkdir(exist_ok=True)
        in_the_way.write_text("no directory")
    assert service.launch().wait(START_SECONDS) == 1
    (line,) = [line for line in service.log_lines() if "[INFO]" not in line]
    assert f"{in_the_way} cannot be written (" in line
    assert "chown" in line


def test_a_start_says_once_what_is_sold_by_whom_and_within_which_limits(tmp_path, redis_url):
    with Service(tmp_path, redis_url, ENVIRONMENT="production", DAILY_COST_LIMIT_USD="0.75") as service:
        (line,) = service.lines_with("INFO Serving ")
        for words in (
            'upstream="built-in model"',
            "models=gpt-4o ",
            "input_usd_per_mtok=2.5 ",
            "daily_cost_limit_usd=0.75",
            "network_share=0.25",
            "outage_costs_usd_an_hour=1.00",
        ):
            assert words in line
        assert len(service.lines_with("WARNING The built-in model answers in production")) == 1
    elsewhere = {"LLM_BASE_URL": "http://me:secret@127.0.0.1:1/v1", "ENVIRONMENT": "production"}
    with Service(tmp_path / "elsewhere", redis_url, **elsewhere) as service:
        (line,) = service.lines_with("INFO Serving ")
        assert "upstream=127.0.0.1:1 " in line
        assert "secret" not in service.log()
        assert "built-in model" not in service.log()
