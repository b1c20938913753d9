"""Real upstreams in front of which the service stands:  python -m tests.interop.upstreams [NAME …]

Each is installed by version into an environment of its own below ``.data/interop``, started, and asked through the
service: streamed and whole, on both routes. What was booked has to be what the usage in the answer costs. It prints a
table, and exits with 1 if a bill differs or a server could not be run. The tests of the project do not need it.
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
from tests.interop.environments import NotInstalled, python_environment
from tests.servers import ROOT

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

    requirements: tuple[str, ...]
    command: Callable[[Path, Path, int], list[str]]
    """Of the environment's ``bin``, a directory of its own, and the port."""
    ready_path: str
    variables: dict[str, str]
    """How the service reaches it; `{port}` is replaced."""
    refused_model: str = ""
    """A model that it does not have; empty where it takes any."""
    context_tokens: int = 0
    """How much it takes; 0 where it takes anything."""


def litellm(programs: Path, directory: Path, port: int) -> list[str]:
    configuration = directory / "litellm.json"
    model = {"model": "openai/gpt-4o", "api_key": "none", "mock_response": "Litecoin is digital money."}
    content = {
        "model_list": [{"model_name": "mocked", "litellm_params": model}],
        "general_settings": {"master_key": "sk-interop"},
    }
    configuration.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    return [f"{programs}/litellm", "--config", str(configuration), "--host", "127.0.0.1", "--port", str(port)]


def llama_cpp(programs: Path, directory: Path, port: int) -> list[str]:
    return [f"{programs}/python", str(ROOT / "tests/interop/servers/llama_cpp.py"), str(directory), str(port)]


def katan(programs: Path, directory: Path, port: int) -> list[str]:
    where = ["--host", "127.0.0.1", "--port", str(port), "--stats-file", str(directory / "stats.json")]
    return [f"{programs}/llm-katan", "--model", "echo", "--backend", "echo", *where]


def hardcap(programs: Path, _: Path, port: int) -> list[str]:
    pace = ["--ttft-ms", "0", "--tpot-ms", "0"]
    return [f"{programs}/hardcap", "mock", "--host", "127.0.0.1", "--port", str(port), *pace]


HERE = {"LLM_BASE_URL": "http://127.0.0.1:{port}/v1", "LLM_API_KEY": "sk-interop"}
SERVERS = {
    "litellm": Server(
        ("litellm[proxy]==1.108.7",),
        litellm,
        "/health/liveliness",
        {**HERE, "LLM_MODEL": "mocked", "LLM_MODELS": "mocked,absent"},
        refused_model="absent",
    ),
    "llama.cpp": Server(
        ("xllamacpp==2026.10.11549", "gguf==0.19.0"),
        llama_cpp,
        "/health",
        {**HERE, "LLM_MODEL": "noise", "LLM_MAX_INPUT_TOKENS": "100000"},
        context_tokens=2_048,
    ),
    "llm-katan": Server(("llm-katan==0.22.0",), katan, "/health", {**HERE, "LLM_MODEL": "echo"}),
    "hardcap": Server(("hardcap==0.1.0",), hardcap, "/healthz", {**HERE, "LLM_MODEL": "mock"}),
}


@contextlib.contextmanager
def running(name: str, server: Server) -> Iterator[int]:
    """The port of the server, once it answers."""
    programs, port = python_environment(name, server.requirements), free_port()
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
    raise NotInstalled(f"no answer from {url}")


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
    what = f"`{server.requirements[0]}`"
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
            seen = f"{text[:40]!r}, usage costs {cost(usage)}, booked {booked:f}"
            yield what, way, seen, bool(text) and booked == cost(usage)
        if server.refused_model:
            yield what, "a model that it has not", *refused(client, model=server.refused_model)
        if server.context_tokens:
            messages = [{"role": "user", "content": "word " * server.context_tokens}]
            yield what, "too long a prompt", *refused(client, messages=messages)
        app.extensions["tollgate"].stop()


def refused(client: FlaskClient, **changes: object) -> tuple[str, bool]:
    """What the service makes of the server's no."""
    before = spent(client)
    answer = client.post("/v1/chat/completions", json={**ASKED, **changes})
    error = answer.get_json()["error"]
    code = "model_not_found" if "model" in changes else "context_length_exceeded"
    booked = spent(client) - before
    is_right = answer.status_code in {400, 404} and error["code"] == code and booked == 0
    return f"{answer.status_code} {error['code']}: {error['message'][:120]}, booked {booked:f}", is_right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SERVERS)}; all of them by default")
    names = parser.parse_args().names or list(SERVERS)
    is_right = True
    click.echo("| upstream | way | seen | |\n|---|---|---|---|")
    for name in names:
        try:
            for server, way, seen, is_fine in rows_of(name):
                click.echo(f"| {server} | {way} | {seen} | {'right' if is_fine else 'WRONG'} |")
                is_right &= is_fine
        except NotInstalled as error:
            click.echo(f"{name} could not be run: {error}", err=True)
            is_right = False
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
