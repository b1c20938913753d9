"""Hardcap and the LiteLLM proxy, each in a virtual environment of its own, installed from the package registry once."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.service.contenders import Contender, Stage, completion
from benchmarks.service.processes import NotStarted
from benchmarks.service.programs import DATA, Target
from flaskapp.ops.embedded_redis import HOST, free_port

HARDCAP, LITELLM = "hardcap==0.1.0", "litellm[proxy]==1.108.0"
_KEY = "sk-benchmark"
_BEARER = [f"Authorization: Bearer {_KEY}"]
_INSTALL_SECONDS = 1_200


def peers(stage: Stage, progress: Callable[[str], None], remarks: list[str]) -> Iterator[Contender]:
    """Those that can be had here, each streamed and whole; of the others a remark."""
    for name, start in (("Hardcap", _hardcap), ("LiteLLM", _litellm)):
        try:
            progress(f"starting {name}")
            yield from _both(start(stage, progress), name)
        except (NotStarted, subprocess.SubprocessError, OSError) as error:
            remarks.append(f"{name} is left out: {error}")


def _both(contender: Contender, name: str) -> Iterator[Contender]:
    yield contender.asked(f"{name}, streamed", completion(headers=_BEARER), "[DONE]")
    yield contender.asked(f"{name}, whole", completion(streamed=False, headers=_BEARER), '"usage"')


def _hardcap(stage: Stage, progress: Callable[[str], None]) -> Contender:
    programs = _installed(HARDCAP, progress)
    upstream, upstream_port = stage.upstream("hardcap")
    tenant = {"api_keys": [_KEY], "budget": {"window_s": 86_400, "output": 10**12}}
    config = {
        "redis_url": stage.free_database_url(),
        "budget": {"accounting": "reserve", "estimator": "max_tokens", "on_overrun": "truncate"},
        "upstreams": {"u": {"base_url": f"http://{HOST}:{upstream_port}"}},
        "routes": {"gpt-4o": {"targets": [{"upstream": "u", "model": "gpt-4o"}]}},
        "tenants": {"tenant": tenant},
    }
    port = free_port()
    command = [str(programs / "hardcap"), "serve", "--config", str(_written(stage, "hardcap", config))]
    server = stage.started("hardcap", [*command, "--host", HOST, "--port", str(port)], {}, (port, "/healthz"))
    return Contender("Hardcap", Target(port, b"", ""), server, upstream, upstream_port)


def _litellm(stage: Stage, progress: Callable[[str], None]) -> Contender:
    programs = _installed(LITELLM, progress)
    upstream, upstream_port = stage.upstream("litellm")
    model = {"model": "openai/gpt-4o", "api_base": f"http://{HOST}:{upstream_port}/v1", "api_key": "none"}
    config = {
        "model_list": [{"model_name": "gpt-4o", "litellm_params": model}],
        "general_settings": {"master_key": _KEY},
    }
    port = free_port()
    command = [str(programs / "litellm"), "--config", str(_written(stage, "litellm", config)), "--num_workers", "1"]
    # Beside the defaults only this: it would fetch its prices from the network.
    environment = {"PATH": f"{programs}:{os.defpath}", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    command += ["--host", HOST, "--port", str(port)]
    server = stage.started("litellm", command, environment, (port, "/health/liveliness"))
    return Contender("LiteLLM", Target(port, b"", ""), server, upstream, upstream_port)


def _installed(requirement: str, progress: Callable[[str], None]) -> Path:
    """The programs of an environment that has just this; made if it is not there."""
    place = DATA / requirement.replace("[proxy]", "").replace("==", "-")
    if not (place / "complete").exists():
        progress(f"installing {requirement} (once)")
        shutil.rmtree(place, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", place], check=True, timeout=_INSTALL_SECONDS)
        pip = [place / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet"]
        subprocess.run(
            [*pip, "install", "--retries", "1", requirement], check=True, timeout=_INSTALL_SECONDS, stdout=sys.stderr
        )
        (place / "complete").touch()
    return place / "bin"


def _written(stage: Stage, name: str, config: object) -> Path:
    """Every JSON text is one of YAML."""
    path = stage.directory / f"{name}.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path
