"""A disk without a free byte under `.data/`, for real: no worker dies of it, and one that is born then serves."""

import json
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.embedded import FragileServer
from tests.processes import children_of
from tests.servers import Service, client_of, events, nanousd, wait_until

# In a namespace of its own, which ends with the service.
ON_A_SMALL_DISK = """
mount -t tmpfs -o size=16m tmpfs "$1" && cd "$1" && shift || exit 9
if [ "$1" = small ]; then mount -t tmpfs -o size=64k tmpfs /dev/shm || exit 9; fi
shift
exec "$@"
"""
UNSHARE = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]


def can_mount():
    try:
        done = subprocess.run([*UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False)
    except FileNotFoundError:
        return False
    return done.returncode == 0


pytestmark = pytest.mark.skipif(not can_mount(), reason="this system lets nobody mount a small disk")


class OnASmallDisk(Service):
    memory = "large"

    def launch(self):
        with (self.directory / "app.log").open("ab") as log:
            inner = ["sh", "-c", ON_A_SMALL_DISK, "sh", str(self.directory), self.memory]
            return subprocess.Popen(
                [*UNSHARE, *inner, *self.command],
                cwd=self.directory,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def disk(self):
        """The directory as the service sees it."""
        return Path(f"/proc/{self._process.pid}/root{self.directory}")

    def fill_disk(self):
        with (self.disk / "filler").open("wb", buffering=0) as filler, suppress(OSError):
            while filler.write(b"x" * 4_096):
                pass
        assert os.statvfs(self.disk).f_bfree == 0

    def kill_worker(self):
        seen = len(self.log_lines())
        victim, *_ = children_of(self._process.pid)
        os.kill(victim, signal.SIGKILL)
        self.lines_with("Cost throttling is", seen, within_seconds=20)

    def admitted(self):
        families = text_string_to_metric_families(self.get("/metrics").text)
        samples = [each for family in families for each in family.samples if each.name == "tollgate_checks_total"]
        return sum(sample.value for sample in samples if sample.labels["outcome"] == "admitted")


@pytest.fixture
def store(tmp_path):
    with FragileServer(tmp_path / "redis", durable=True) as server:
        yield server


@pytest.fixture
def service(request, store, tmp_path):
    environment = {"ENABLE_COST_THROTTLING": "true", "DEMO_TOKENS_PER_SECOND": "0", "NETWORK_COST_LIMIT_USD": "0"}
    service = OnASmallDisk(tmp_path / "service", store.url, **environment)
    service.memory = getattr(request, "param", "large")
    with service:
        yield service


def answered(service, number):
    statuses = [service.chat(f"visitor-{each}", max_tokens=20).status_code for each in range(number)]
    assert statuses == [200] * number


def no_worker_died_of_it(service):
    assert [line for line in service.log_lines() if "SIGBUS" in line or "Traceback" in line] == []


@pytest.mark.parametrize("service", ["large", "small"], indirect=True)
def test_numbers_are_counted_and_workers_are_born_on_a_full_disk(service):
    answered(service, 3)
    on_disk = [path for path in service.number_files() if path.is_relative_to(service.directory)]
    assert len(on_disk) == (0 if service.memory == "large" else 4)
    service.fill_disk()
    for _ in range(3):
        service.kill_worker()
        answered(service, 4)
    # A refusal is a number that was not there yet.
    assert service.patch(daily_cost_limit_usd="0.000001").status_code == 200
    wait_until(lambda: service.chat("poor").status_code == 429, 5, "the limit holds")
    assert service.admitted() >= 15
    no_worker_died_of_it(service)


@pytest.mark.parametrize("service", ["small"], indirect=True)
def test_a_worker_for_whose_numbers_there_is_no_place_serves_and_says_so(service):
    service.fill_disk()
    os.kill(service._process.pid, signal.SIGTTIN)
    service.lines_with("There is no place for this worker's numbers", within_seconds=20)
    wait_until(lambda: len(children_of(service._process.pid)) == 3, 20, "a third worker")
    answered(service, 12)
    assert service.get("/metrics").status_code == 200
    no_worker_died_of_it(service)


def test_an_outage_on_a_full_disk_is_bridged_and_booked(service, store):
    def kept(kind):
        """What is in that file, made aside from the start."""
        [text] = [path.read_text() for path in (service.disk / ".data").glob(f"emergency-{kind}-*")] or [""]
        return json.loads(text or "{}")

    wait_until(lambda: kept("budget").get("spent_nanousd", 0) > 120_000_000, 5, "each worker has its lease")
    wait_until(lambda: kept("books"), 5, "there is a place for what is spent")
    with client_of(store) as client:
        service.fill_disk()
        store.kill()
        answers = [service.chat(f"visitor-{number}", max_tokens=20) for number in range(6)]
        assert {answer.headers["X-Throttle-Backend"] for answer in answers} == {"emergency"}
        spent = sum(nanousd(events(answer)[-1]["cost_usd"]) for answer in answers)
        store.start()
        wait_until(lambda: sum(map(int, client.mget(client.keys("llm:global:daily:*")))) == spent > 0, 10, "booked")
    no_worker_died_of_it(service)
