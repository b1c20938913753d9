"""Real upstreams in front of which the service stands:  python -m tests.interop.upstreams [NAME …]

Each is installed by version into an environment of its own below ``.data/interop``, started, and asked through the
service: streamed and whole, on both routes. What was booked has to be what the usage in the answer costs. It prints a
table, and exits with 1 if a bill differs. The tests of the project do not need it, and CI does not run it.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import click
from flask.testing import FlaskClient

from flaskapp.config import load_config
from flaskapp.factory import create_app
from flaskapp.ops.embedded_redis import free_port

ENVIRONMENTS = Path(".data/interop")
START_SECONDS = 120
INPUT_USD_PER_MTOK, OUTPUT_USD_PER_MTOK = Decimal("2.5"), Decimal(10)
"""As LiteLLM prices what it mocks: it sends its own bill beside the usage, and a higher one would be booked."""
PRICES = {
    "LLM_PRICE_INPUT_USD_PER_MTOK": str(INPUT_USD_PER_MTOK),
    "LLM_PRICE_OUTPUT_USD_PER_MTOK": str(OUTPUT_USD_PER_MTOK),
}
PLENTY = {
    "HIGH_COST_THRESHOLD_USD": "100",
    "DAILY_COST_LIMIT_USD": "100",
    "NETWORK_COST_LIMIT_USD": "0",
    "NETWORK_DAILY_COST_LIMIT_USD": "0",
    "HOURLY_SPEND_LIMIT_USD": "100",
    "DAILY_SPEND_LIMIT_USD": "100",
}
ASKED = {"messages": [{"role": "user", "content": "What is Litecoin?"}], "max_tokens": 50}


@dataclass(frozen=True)
class Server:
    """An upstream that a package ships."""

    requirement: str
    command: Callable[[Path, Path, int], list[str]]
    """Of the environment's ``bin``, a directory of its own, and the port."""
    ready_path: str
    variables: dict[str, str]
    """How the service reaches it; `{port}` is replaced."""
    refused_model: str = ""
    """A model that it does not have; empty where it takes any."""


def litellm(programs: Path, directory: Path, port: int) -> list[str]:
    configuration = directory / "litellm.json"
    model = {"model": "openai/gpt-4o", "api_key": "none", "mock_response": "Litecoin is digital money."}
    content = {
        "model_list": [{"model_name": "mocked", "litellm_params": model}],
        "general_settings": {"master_key": "sk-interop"},
    }
    configuration.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    return [f"{programs}/litellm", "--config", str(configuration), "--host", "127.0.0.1", "--port", str(port)]


SERVERS = {
    "litellm": Server(
        "litellm[proxy]==1.108.7",
        litellm,
        "/health/liveliness",
        {
            "LLM_BASE_URL": "http://127.0.0.1:{port}/v1",
            "LLM_API_KEY": "sk-interop",
            "LLM_MODEL": "mocked",
            "LLM_MODELS": "mocked,absent",
        },
        refused_model="absent",
    ),
}


def installed(name: str, server: Server) -> Path:
    """The programs of its environment, which is made where it is not there."""
    place = (ENVIRONMENTS / f"{name}-{server.requirement.rpartition('==')[2]}").absolute()
    mark = place / "installed"
    if not mark.exists():
        click.echo(f"installing {server.requirement} …", err=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True)
        subprocess.run([place / "bin" / "pip", "install", "--quiet", server.requirement], check=True)
        mark.touch()
    return place / "bin"


@contextlib.contextmanager
def running(name: str, server: Server) -> Iterator[int]:
    """The port of the server, once it answers."""
    programs, port = installed(name, server), free_port()
    directory = programs.parent
    # Its model list is shipped with it; it has to fetch none.
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(directory), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            server.command(programs, directory, port), stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            wait_for(f"http://127.0.0.1:{port}{server.ready_path}", process)
            yield port
        finally:
            process.terminate()
            process.wait(30)


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    ends = time.monotonic() + START_SECONDS
    while time.monotonic() < ends and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):  # noqa: S310 (our own address)
            return
        time.sleep(0.2)
    raise SystemExit(f"no answer from {url}")


def spent(client: FlaskClient, **headers: str) -> Decimal:
    body = client.get("/api/v1/usage", headers=headers).get_json()
    return Decimal(body["limits"]["window"]["spent_usd"])


def cost(usage: dict[str, int]) -> Decimal:
    inputs, outputs = (usage.get(f"{kind}_tokens") for kind in ("prompt", "completion"))
    if inputs is None or outputs is None:
        inputs, outputs = usage["input_tokens"], usage["output_tokens"]
    return (inputs * INPUT_USD_PER_MTOK + outputs * OUTPUT_USD_PER_MTOK) / 1_000_000


def events_of(text: str) -> list[dict[str, object]]:
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ") and line != "data: [DONE]"]
    return [json.loads(line) for line in lines]


def chat(client: FlaskClient) -> tuple[str, dict[str, int]]:
    body = {"query": "What is Litecoin?", "max_tokens": 50}
    answer = client.post("/api/v1/chat/stream", json=body, headers={"X-Fingerprint": "interop"})
    *pieces, last = events_of(answer.get_data(as_text=True))
    return "".join(str(piece["chunk"]) for piece in pieces), last["usage"]  # type: ignore[return-value]


def streamed(client: FlaskClient) -> tuple[str, dict[str, int]]:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    answer = client.post("/v1/chat/completions", json={**ASKED, **options})
    events = events_of(answer.get_data(as_text=True))
    choices = [choice for event in events for choice in event.get("choices", ())]  # type: ignore[attr-defined]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    return text, events[-1]["usage"]  # type: ignore[return-value]


def whole(client: FlaskClient) -> tuple[str, dict[str, int]]:
    body = client.post("/v1/chat/completions", json=ASKED).get_json()
    return body["choices"][0]["message"]["content"], body["usage"]


WAYS = {"chat, streamed": chat, "/v1, streamed": streamed, "/v1, whole": whole}


def rows_of(name: str) -> Iterator[tuple[str, str, str, bool]]:
    """Server, way, what was seen, and whether it is right."""
    server = SERVERS[name]
    with running(name, server) as port:
        environment = {key: text.format(port=port) for key, text in server.variables.items()} | PRICES | PLENTY
        fixed = {"THROTTLE_BACKEND": "memory", "REDIS_URL": "fake://", "API_KEYS": "*", "LOG_LEVEL": "ERROR"}
        app = create_app(load_config({**environment, **fixed, "ENABLE_CHALLENGE_RESPONSE": "false"}))
        client = app.test_client()
        for way, ask in WAYS.items():
            who = {"X-Fingerprint": "interop"} if ask is chat else {}
            before = spent(client, **who)
            text, usage = ask(client)
            booked = spent(client, **who) - before
            seen = f"{text[:40]!r}, usage costs {cost(usage)}, booked {booked}"
            yield server.requirement, way, seen, bool(text) and booked == cost(usage)
        if server.refused_model:
            yield server.requirement, "a model that it has not", *refused(client, server.refused_model)
        app.extensions["tollgate"].stop()


def refused(client: FlaskClient, model: str) -> tuple[str, bool]:
    before = spent(client)
    answer = client.post("/v1/chat/completions", json={**ASKED, "model": model})
    error = answer.get_json()["error"]
    is_right = answer.status_code in {400, 404} and spent(client) == before
    return f"{answer.status_code} {error['code']}: {error['reason'][:60]}, booked {spent(client) - before}", is_right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SERVERS)}; all of them by default")
    names = parser.parse_args().names or list(SERVERS)
    is_right = True
    click.echo("| upstream | way | seen | |\n|---|---|---|---|")
    for name in names:
        for requirement, way, seen, is_fine in rows_of(name):
            click.echo(f"| {requirement} | {way} | {seen} | {'as billed' if is_fine else 'WRONG'} |")
            is_right &= is_fine
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
