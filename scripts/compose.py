"""run-dev.sh where a Docker engine answers: Redis, and the first server, run in containers by docker-compose.dev.yml.

A second server of the same clone finds the first one's container running and runs on the host, on the same Redis.
"""

import fcntl
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import quote

from supervision import (
    DATA,
    REDIS_PASSWORD_FILE,
    ROOT,
    Journal,
    StartFailed,
    Stop,
    Store,
    locked,
    locks,
    program,
)

from backends.errors import StoreUnavailable
from backends.store.addresses import without_password
from flaskapp.ops import embedded_redis as embedded
from flaskapp.ops.private_files import kept_secret
from flaskapp.ops.running_redis import record_redis

COMPOSE = ("docker", "compose", "--file", str(ROOT / "docker-compose.dev.yml"))
USUAL_PORT = 6379
# Longer than the stop_grace_period in docker-compose.dev.yml.
CONTAINER_STOP_SECONDS = 30.0
PULL_SECONDS = 900.0


def docker_answers() -> bool:
    """Whether there is a Docker engine, and Compose. Without an engine the client says so at once."""
    return _output("docker", "info") is not None and _output(*COMPOSE, "version") is not None


@contextmanager
def compose_redis(stop: Stop, journal: Journal, environment: dict[str, str]) -> Iterator[Store]:
    """The container litecoin-redis, published on loopback; the last user of this clone takes everything down."""
    place = DATA / "compose.users"
    try:
        with locked(stop, place, fcntl.LOCK_SH):
            with locked(stop, DATA / "compose.starting", fcntl.LOCK_EX):
                _raise_redis(stop, journal, environment)
                is_first = not _output("docker", "ps", "--quiet", "--filter", "name=^litecoin-backend$")
            published = _output(*COMPOSE, "port", "redis", "6379")
            if not published:
                raise StartFailed("The container litecoin-redis does not tell its port: docker logs litecoin-redis")
            url = f"redis://{_login()}{published.strip()}/0"
            with suppress(StoreUnavailable):  # it is there, and will answer the services
                record_redis(DATA, url)
            yield Store(url, f"{without_password(url)} (container litecoin-redis)", in_container=is_first)
    finally:
        with place.open("a") as users:
            if locks(users, fcntl.LOCK_EX):
                _output(*COMPOSE, "down", seconds=CONTAINER_STOP_SECONDS, environment=environment)


@contextmanager
def containers(stop: Stop, journal: Journal, environment: dict[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    """The container litecoin-backend, as a program that runs while it does."""
    environment.setdefault("ENVIRONMENT", "")
    command = (*COMPOSE, "up", "--build", "--no-deps", "--no-color", "--no-log-prefix", "--abort-on-container-exit")
    try:
        with program(
            stop, journal, (*command, "--exit-code-from", "backend", "backend"), environment, CONTAINER_STOP_SECONDS
        ) as client:
            yield client
    finally:
        _output(*COMPOSE, "rm", "--stop", "--force", "backend", seconds=CONTAINER_STOP_SECONDS, environment=environment)


def _login() -> str:
    """As the container has it: one that was started by other means has another password, or none."""
    password = (_output("docker", "exec", "litecoin-redis", "printenv", "REDISCLI_AUTH") or "").strip()
    return f":{quote(password, safe='')}@" if password else ""


def _raise_redis(stop: Stop, journal: Journal, environment: dict[str, str]) -> None:
    if _output("docker", "ps", "--quiet", "--filter", "name=^litecoin-redis$"):
        return
    environment["TOLLGATE_REDIS_PASSWORD"] = kept_secret(REDIS_PASSWORD_FILE)
    environment["TOLLGATE_REDIS_PORT"] = str(USUAL_PORT if embedded.is_free(USUAL_PORT) else embedded.free_port())
    command = (*COMPOSE, "up", "--detach", "--wait", "redis")
    with program(stop, journal, command, environment, CONTAINER_STOP_SECONDS) as client:
        stop.wait_for(lambda: client.poll() is not None, PULL_SECONDS)
    if client.returncode != 0:
        raise StartFailed("Docker could not start litecoin-redis (see above); REDIS_URL=… names another Redis")


def _output(*command: str, seconds: float = 5.0, environment: dict[str, str] | None = None) -> str | None:
    """What a command printed; None where it failed, or took too long."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=seconds, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
