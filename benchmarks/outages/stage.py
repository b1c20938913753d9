"""The service as it is deployed, its Redis, and an upstream that keeps its own bill: one of each for one fault."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from decimal import Decimal
from pathlib import Path
from typing import Any, Self, TypeVar

import redis

from backends.clock import SystemClock
from backends.ledger.audit import AuditReport, audit
from backends.money import nanousd_from_usd
from backends.store.link import Link
from benchmarks.outages.fault import CannotInject, Part
from benchmarks.outages.load import API_KEYS, Load
from benchmarks.outages.names import NAME, NameServer
from benchmarks.outages.shim import Shim
from benchmarks.outages.wire import Wire
from benchmarks.service.processes import fetch, running
from benchmarks.usable import NANOUSD_AN_INPUT_TOKEN, NANOUSD_AN_OUTPUT_TOKEN
from flaskapp.ops.embedded_redis import find_server, free_port
from flaskapp.ops.running_redis import HOST
from tests.embedded import FragileServer
from tests.processes import children_of
from tests.servers import ROOT, Service, nanousd

T = TypeVar("T")

CLIENTS = 8
EMERGENCY_USD = "2"
SETTLING_SECONDS = 10.0
_TICK_SECONDS = 0.02
_ENVIRONMENT = {
    "ENVIRONMENT": "production",
    "LLM_API_KEY": "key-of-the-upstream",
    "API_KEYS": ",".join(f"load{number}={key}" for number, key in enumerate(API_KEYS)),
    "ENABLE_CHALLENGE_RESPONSE": "false",
    "HIGH_COST_THRESHOLD_USD": "1000",
    "DAILY_COST_LIMIT_USD": "1000",
    "NETWORK_COST_LIMIT_USD": "0",
    "NETWORK_DAILY_COST_LIMIT_USD": "0",
    "NETWORK_SHARE": "1",
    "NETWORK_RATE_LIMIT": "1000000 per minute",
    "CHAT_RATE_LIMIT": "1000000 per minute",
    "HOURLY_SPEND_LIMIT_USD": "1000",
    "DAILY_SPEND_LIMIT_USD": "1000",
    "LLM_MAX_TOKENS": "60",
    "FAIL_OPEN_BUDGET_USD": EMERGENCY_USD,
    "WEB_CONCURRENCY": "2",
}
_EMERGENCY_LINE = re.compile(
    r"(?:Cost recorded for stable_identifier|Cost settled) request_id=(?P<request_id>\w+) .*?"
    r"(?:cost_usd|booked_usd)=(?P<amount_usd>\S+) .*backend=emergency"
)
_MOUNT_DISK = 'mount -t tmpfs -o size=512k,mode=0700 none "$0" && exec "$@"'
_MOUNT_NAMES = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'
_IN_A_NAMESPACE = ("unshare", "--mount", "--propagation", "private", "sh", "-c")
"""What is mounted in it is seen by what runs in it alone, and is gone with that."""


class Store(FragileServer):
    """The Redis of a stage; `options` hold from its next start on."""

    def __init__(self, directory: Path, binary: Path) -> None:
        super().__init__(directory, durable=True, binary=binary)
        self.directory = directory
        self.options: dict[str, str] = {}

    def _settings(self, port: int) -> list[str]:
        more = [word for name, value in self.options.items() for word in (f"--{name}", value)]
        return [*super()._settings(port), *more]


class StagedService(Service):
    """A service whose program may be started by another one."""

    prefix: tuple[str, ...] = ()

    def launch(self) -> "subprocess.Popen[bytes]":
        with (self.directory / "app.log").open("ab") as log:
            return subprocess.Popen(
                [*self.prefix, sys.executable, "-m", "gunicorn", "--config", str(ROOT / self.config), self.application],
                cwd=self.directory,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Of the master."""
        assert self._process is not None  # noqa: S101 - it runs
        return self._process.pid


class Stage:
    """Everything that one fault takes; a context manager.

    Raises:
        CannotInject: a part cannot be had here.
    """

    def __init__(
        self, directory: Path, parts: frozenset[Part] = frozenset(), environment: Mapping[str, str] | None = None
    ) -> None:
        self.directory = directory
        self._parts = parts
        self._environment = environment or {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        own, enter = self.directory, self._stack.enter_context
        if self._parts & {Part.NAME, Part.SMALL_DISK} and os.geteuid() != 0:
            raise CannotInject("takes root")
        binary = find_server()
        if Part.REDIS_SHIM in self._parts:
            self.redis_shim = Shim(own / "redis-shim")
            binary = self.redis_shim.around(binary)
        store = enter(Store(own / "redis", binary))
        self.lead_to(store, enter(redis.Redis(port=store.port, decode_responses=True, socket_timeout=20)))
        self._upstream_port = free_port()
        command = [sys.executable, "-m", "benchmarks.upstream", "--port", str(self._upstream_port), "--median", "15"]
        upstream = enter(running(command, own / "upstream", {}))
        self.service = self._make_service()
        enter(self.service)
        upstream.wait_for_answer(self._upstream_port, "/stats")
        self.data = self.service.directory / ".data"
        if Part.SMALL_DISK in self._parts:
            # What is mounted for the service lives as long as somebody has it open.
            place = os.open(f"/proc/{self.service.pid}/root{self.data.absolute()}", os.O_DIRECTORY)
            self._stack.callback(os.close, place)
            self.data = Path(f"/proc/self/fd/{place}")
        self.load = Load(self.service.port)
        self._stack.callback(self.load.stop)

    def _make_service(self) -> StagedService:
        own, port, host, model_port = self.directory, self.store.port, HOST, self._upstream_port
        if Part.WIRE in self._parts:
            self.wire = self._stack.enter_context(Wire(port))
            port = self.wire.port
        if Part.MODEL_WIRE in self._parts:
            self.model_wire = self._stack.enter_context(Wire(model_port))
            model_port = self.model_wire.port
        if Part.NAME in self._parts:
            self.names = self._stack.enter_context(NameServer(own))
            host = NAME
        environment = {**_ENVIRONMENT, "LLM_BASE_URL": f"http://{HOST}:{model_port}/v1", **self._environment}
        if Part.SHIM in self._parts:
            self.shim = Shim(own / "shim")
            environment |= self.shim.environment
        service = StagedService(own / "service", f"redis://{host}:{port}/0", **environment)
        if Part.NAME in self._parts:
            service.prefix = (*_IN_A_NAMESPACE, _MOUNT_NAMES, str(self.names.configuration))
        if Part.SMALL_DISK in self._parts:
            data = service.directory / ".data"
            data.mkdir(parents=True)
            service.prefix = (*_IN_A_NAMESPACE, _MOUNT_DISK, str(data.absolute()))
        return service

    def enter(self, part: AbstractContextManager[T]) -> T:
        """A further part, that ends with this stage."""
        return self._stack.enter_context(part)

    def lead_to(self, store: Store, look: redis.Redis) -> None:
        """The books are there from now on."""
        self.store, self.look = store, look
        self._link = Link(store.url, clock=SystemClock(), timeout_seconds=20)
        self._stack.callback(self._link.close)

    def workers(self) -> list[int]:
        """The processes that serve now."""
        return children_of(self.service.pid)

    def births(self) -> int:
        """Workers that were born so far."""
        return sum("Booting worker with pid" in line for line in self.service.log_lines())

    def emergency_page(self) -> Path:
        """The file of the emergency budget."""
        return self.data / f"emergency-budget-127.0.0.1-{self.service.port}.json"

    def emergency_nanousd(self) -> int:
        """What answers on the emergency budget came to, by the log; one that has no end there, all that it may cost."""
        amounts: dict[str, int] = {}
        for line in self.service.log_lines():
            if found := _EMERGENCY_LINE.search(line):
                amounts[found["request_id"]] = nanousd(found["amount_usd"])
        return sum(amounts.values())

    def emergency_charged_nanousd(self) -> int:
        """The same by the emergency budget's file, where the lease of a worker that was killed stays spent."""
        try:
            return int(json.loads(self.emergency_page().read_text(encoding="utf-8"))["spent_nanousd"])
        except FileNotFoundError:
            return 0

    def emergency_limit_nanousd(self) -> int:
        return nanousd_from_usd(Decimal(self.service.environment["FAIL_OPEN_BUDGET_USD"]))

    def booked_nanousd(self) -> int:
        """What Redis holds, of all identifiers and days."""
        return sum(int(self.look.get(key) or 0) for key in self.look.scan_iter("llm:cost:daily:*", 1_000))

    def billed_nanousd(self) -> int:
        """What the upstream says it is owed."""
        bills: list[dict[str, int]] = list(json.loads(fetch(self._upstream_port, "/stats")).values())
        inputs, outputs = (sum(each.get(kind, 0) for each in bills) for kind in ("input_tokens", "output_tokens"))
        return inputs * NANOUSD_AN_INPUT_TOKEN + outputs * NANOUSD_AN_OUTPUT_TOKEN

    def is_settled(self) -> bool:
        """Whether nothing is pending."""
        return not any(self.look.scan_iter("llm:open:*", 1_000))

    def audit(self) -> AuditReport:
        """As `flask ledger audit`."""
        return audit(self._link)

    def readiness(self) -> dict[str, Any]:
        """What `/readyz` says."""
        told: dict[str, Any] = self.service.get("/readyz").json()
        return told

    @staticmethod
    def wait(holds: Callable[[], bool], seconds: float) -> bool:
        """Whether it held within so long."""
        end = time.monotonic() + seconds
        while not (held := holds()) and time.monotonic() < end:
            time.sleep(_TICK_SECONDS)
        return held
