"""``python -m benchmarks.usable``: how much of a budget answers can use, and whether they ever exceed it.

Tenants each have a budget; many clients of each stream answers at once through several instances of the service, and
try again while the budget is only held by answers under way. What counts is what the upstream billed, not our books.

The nearest relative, the gateway Hardcap, can be measured beside it on the same upstream: install it somewhere and add
``--policies worst_case,slices,peer:max_tokens,peer:p95 --peer PATH_OF_hardcap``. Its budgets are tokens of output.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import redis
from rich.table import Column, Table

from flaskapp.cli.console import print_table
from flaskapp.ops.embedded_redis import EmbeddedServer, free_port
from flaskapp.ops.processes import end_process
from flaskapp.ops.running_redis import HOST

ROOT = Path(__file__).resolve().parent.parent
INPUT_USD_PER_MTOK, OUTPUT_USD_PER_MTOK = Decimal("2.5"), Decimal(10)
NANOUSD_AN_INPUT_TOKEN, NANOUSD_AN_OUTPUT_TOKEN = 2_500, 10_000
START_SECONDS = 30.0
RETRY_SECONDS = 0.05
PEER = "peer:"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one policy used the budgets; shares are of one tenant's budget."""

    policy: str
    tenants: int
    budget_nanousd: int
    worst_overshoot_percent: float
    """Of the tenant that was billed most; negative: no tenant exceeded its budget."""
    usable_percent: float
    """What the upstream billed, of all budgets."""
    booked_percent: float
    """What our books hold in the end, of all budgets."""
    least_booked_beyond_billed_percent: float | None
    """Of the tenant whose books are closest to its bill; negative: they hold less than was billed. None for a peer."""
    answers: int
    cut: int
    """Answers cut by the budget."""
    busy: int
    """Refusals that only pending reservations caused; each was tried again."""
    seconds: float


def main() -> int:
    arguments = _arguments()
    outcomes = [_run(policy, arguments) for policy in arguments.policies.split(",")]
    _print(outcomes, arguments)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps([asdict(each) for each in outcomes], indent=2) + "\n")
    ours = [each for each in outcomes if not each.policy.startswith(PEER)]
    return 1 if any(each.worst_overshoot_percent > 0 or _books_too_little(each) for each in ours) else 0


def _books_too_little(outcome: Outcome) -> bool:
    least = outcome.least_booked_beyond_billed_percent
    return least is not None and least < 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.usable", description=__doc__)
    parser.add_argument("--policies", default="worst_case,slices", help="(%(default)s)")
    parser.add_argument("--tenants", type=int, default=8)
    parser.add_argument("--streams", type=int, default=128, help="clients of a tenant at once (%(default)s)")
    parser.add_argument("--at-once", type=int, default=1, help="tenants that run at the same time (%(default)s)")
    parser.add_argument("--replicas", type=int, default=3, help="instances of the service (%(default)s)")
    parser.add_argument("--budget-tokens", type=int, default=20_000, help="of output, in money (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=1_024)
    parser.add_argument("--ms-per-token", type=float, default=5.0, help="pace of the upstream (%(default)s)")
    parser.add_argument("--slice-tokens", type=int, default=384, help="RESERVATION_SLICE_TOKENS (%(default)s)")
    parser.add_argument("--cushion-tokens", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--peer", metavar="FILE", help="the program hardcap, for the policies peer:max_tokens, peer:p95"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    return parser.parse_args()


def _run(policy: str, arguments: argparse.Namespace) -> Outcome:
    budget_nanousd = arguments.budget_tokens * NANOUSD_AN_OUTPUT_TOKEN
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tollgate-usable-")))
        server = stack.enter_context(EmbeddedServer(directory / "redis"))
        upstream = stack.enter_context(_upstream(arguments))
        ports = [free_port() for _ in range(arguments.replicas)]
        if policy.startswith(PEER):
            config = _peer_config(policy.removeprefix(PEER), arguments, server.url, upstream)
            for port in ports:
                stack.enter_context(_peer(port, config, arguments.peer, directory))
        else:
            environment = _environment(policy, arguments, server.url, upstream, budget_nanousd)
            for port in ports:
                stack.enter_context(_service(port, environment, directory))
        ask = _ask_peer if policy.startswith(PEER) else _ask
        started = time.monotonic()
        counts, bills = asyncio.run(_all_tenants(ask, ports, upstream, arguments))
        seconds = time.monotonic() - started
        booked = _booked(server)
    is_peer = policy.startswith(PEER)
    billed = {tenant: _cost(bill, input_counts=not is_peer) for tenant, bill in bills.items()}
    beyond = [booked.get(tenant, 0) - its_bill for tenant, its_bill in billed.items()]
    return Outcome(
        policy=policy,
        tenants=arguments.tenants,
        budget_nanousd=budget_nanousd,
        worst_overshoot_percent=100 * (max(billed.values()) - budget_nanousd) / budget_nanousd,
        usable_percent=100 * sum(billed.values()) / (budget_nanousd * arguments.tenants),
        booked_percent=100 * sum(booked.values()) / (budget_nanousd * arguments.tenants),
        least_booked_beyond_billed_percent=None if is_peer else 100 * min(beyond) / budget_nanousd,
        answers=counts.answers,
        cut=counts.cut,
        busy=counts.busy,
        seconds=seconds,
    )


def _environment(
    policy: str, arguments: argparse.Namespace, redis_url: str, upstream_port: int, budget_nanousd: int
) -> dict[str, str]:
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "PYTHONPATH": str(ROOT),
        "REDIS_URL": redis_url,
        "LLM_BASE_URL": f"http://{HOST}:{upstream_port}/v1",
        "LLM_PRICE_INPUT_USD_PER_MTOK": str(INPUT_USD_PER_MTOK),
        "LLM_PRICE_OUTPUT_USD_PER_MTOK": str(OUTPUT_USD_PER_MTOK),
        "LLM_MAX_TOKENS": str(arguments.max_tokens),
        "ENABLE_CHALLENGE_RESPONSE": "false",
        "HIGH_COST_THRESHOLD_USD": "1000",
        "NETWORK_COST_LIMIT_USD": "0",
        "NETWORK_DAILY_COST_LIMIT_USD": "0",
        "HOURLY_SPEND_LIMIT_USD": "1000",
        "DAILY_SPEND_LIMIT_USD": "1000",
        "DAILY_COST_LIMIT_USD": str(Decimal(budget_nanousd) / 10**9),
        "THROTTLE_WHEN_BUSY": "false",
        "CHAT_RATE_LIMIT": "1000000 per minute",
        "RESERVATION_POLICY": policy,
        "RESERVATION_SLICE_TOKENS": str(arguments.slice_tokens),
        "RESERVATION_CUSHION_TOKENS": str(arguments.cushion_tokens),
        "WEB_CONCURRENCY": "1",
        "LOG_LEVEL": "ERROR",
    }


@contextmanager
def _upstream(arguments: argparse.Namespace) -> Iterator[int]:
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.upstream", "--port", str(port), "--seed", str(arguments.seed)]
    command += ["--ms-per-token", str(arguments.ms_per_token)]
    with _process(command, {**os.environ, "PYTHONPATH": str(ROOT)}, ROOT) as process:
        asyncio.run(_until_answers(f"http://{HOST}:{port}/stats", process))
        yield port


@contextmanager
def _service(port: int, environment: Mapping[str, str], directory: Path) -> Iterator[None]:
    place = directory / str(port)
    place.mkdir()
    command = [sys.executable, "-m", "gunicorn", "--config", str(ROOT / "gunicorn.conf.py"), "wsgi:app"]
    with _process(command, {**environment, "PORT": str(port)}, place) as process:
        asyncio.run(_until_answers(f"http://{HOST}:{port}/healthz", process))
        yield


@contextmanager
def _process(command: list[str], environment: Mapping[str, str], place: Path) -> "Iterator[subprocess.Popen[bytes]]":
    process = subprocess.Popen(command, env=dict(environment), cwd=place, start_new_session=True)
    try:
        yield process
    finally:
        end_process(process, 60)


async def _until_answers(url: str, process: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + START_SECONDS
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < end and process.poll() is None:
            try:
                async with session.get(url) as response:
                    if response.ok:
                        return
            except aiohttp.ClientError:
                await asyncio.sleep(0.05)
    raise SystemExit(f"{url} does not answer")


@dataclass
class _Counts:
    answers: int = 0
    cut: int = 0
    busy: int = 0


async def _all_tenants(
    ask: "Ask", ports: list[int], upstream_port: int, arguments: argparse.Namespace
) -> tuple[_Counts, dict[str, dict[str, int]]]:
    counts = _Counts()
    names = [f"tenant{number}" for number in range(arguments.tenants)]
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600)) as session:
        for start in range(0, len(names), arguments.at_once):
            group = names[start : start + arguments.at_once]
            print(f"{', '.join(group)} of {len(names)} …", file=sys.stderr)
            await asyncio.gather(
                *(
                    _client(ask, session, ports[number % len(ports)], name, counts)
                    for name in group
                    for number in range(arguments.streams)
                )
            )
        async with session.get(f"http://{HOST}:{upstream_port}/stats") as response:
            return counts, await response.json()


Answer = tuple[int, bool, bool]
"""Status, whether its budget cut it, whether only pending reservations refused it."""
Ask = Callable[[aiohttp.ClientSession, int, str], Awaitable[Answer]]


async def _client(ask: Ask, session: aiohttp.ClientSession, port: int, tenant: str, counts: _Counts) -> None:
    """Ask until the budget is spent; while it is only busy, try again."""
    while True:
        status, was_cut, is_busy = await ask(session, port, tenant)
        if status == 200:
            counts.answers += 1
            counts.cut += was_cut
        elif status == 429 and is_busy:
            counts.busy += 1
            await asyncio.sleep(RETRY_SECONDS)
        else:
            return


async def _ask(session: aiohttp.ClientSession, port: int, tenant: str) -> Answer:
    url = f"http://{HOST}:{port}/api/v1/chat/stream"
    content = {"query": f"{tenant} go on", "chat_history": []}
    async with session.post(url, json=content, headers={"X-Fingerprint": tenant}) as response:
        text = await response.text()
    # Few answers reach their maximum; any other end at a length is the budget's.
    return response.status, '"finish_reason":"length"' in text, '"in_flight":true' in text.replace(" ", "")


async def _ask_peer(session: aiohttp.ClientSession, port: int, tenant: str) -> Answer:
    url = f"http://{HOST}:{port}/v1/chat/completions"
    content = {"model": "m", "stream": True, "max_tokens": 1_024, "messages": [{"role": "user", "content": tenant}]}
    async with session.post(url, json=content, headers={"Authorization": f"Bearer {tenant}"}) as response:
        text = await response.text()
    return response.status, '"truncated"' in text, "budget_busy" in text


def _cost(bill: Mapping[str, int], *, input_counts: bool) -> int:
    """Nano-dollars for what the upstream generated."""
    inputs = bill["input_tokens"] * NANOUSD_AN_INPUT_TOKEN if input_counts else 0
    return inputs + bill["output_tokens"] * NANOUSD_AN_OUTPUT_TOKEN


def _peer_config(estimator: str, arguments: argparse.Namespace, redis_url: str, upstream_port: int) -> dict[str, Any]:
    budget = {"window_s": 86_400, "output": arguments.budget_tokens}
    return {
        "redis_url": redis_url,
        "budget": {"accounting": "reserve", "estimator": estimator, "on_overrun": "truncate"},
        "upstreams": {"u": {"base_url": f"http://{HOST}:{upstream_port}"}},
        "routes": {"m": {"targets": [{"upstream": "u", "model": "m"}]}},
        "tenants": {
            f"tenant{number}": {"api_keys": [f"tenant{number}"], "budget": budget}
            for number in range(arguments.tenants)
        },
    }


@contextmanager
def _peer(port: int, config: Mapping[str, Any], program: str, directory: Path) -> Iterator[None]:
    place = directory / f"{port}.yaml"
    # JSON is a subset of YAML.
    place.write_text(json.dumps(config), encoding="utf-8")
    command = [program, "serve", "--config", str(place), "--host", HOST, "--port", str(port)]
    with _process(command, os.environ, directory) as process:
        asyncio.run(_until_answers(f"http://{HOST}:{port}/healthz", process))
        yield


def _booked(server: EmbeddedServer) -> dict[str, int]:
    """Nano-dollars booked in each tenant's days."""
    booked: dict[str, int] = {}
    with redis.Redis(HOST, server.port, decode_responses=True) as client:
        for key in client.scan_iter("llm:cost:daily:*"):
            tenant = key.split(":")[3]
            booked[tenant] = booked.get(tenant, 0) + int(client.get(key) or 0)
    return booked


def _print(outcomes: list[Outcome], arguments: argparse.Namespace) -> None:
    columns = ("worst overshoot", "usable", "booked", "least booked - billed", "answers", "cut", "busy", "seconds")
    table = Table("policy", *(Column(title, justify="right") for title in columns))
    for each in outcomes:
        table.add_row(
            each.policy,
            f"{each.worst_overshoot_percent:+.2f} %",
            f"{each.usable_percent:.2f} %",
            f"{each.booked_percent:.2f} %",
            "" if (least := each.least_booked_beyond_billed_percent) is None else f"{least:+.2f} %",
            str(each.answers),
            str(each.cut),
            str(each.busy),
            f"{each.seconds:.1f}",
        )
    print_table(table)
    print(", ".join(f"{name} {value}" for name, value in vars(arguments).items() if name != "json"))


if __name__ == "__main__":
    sys.exit(main())
