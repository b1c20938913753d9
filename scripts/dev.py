"""Runs the service for development, and Redis where none is given. Ctrl-C or SIGTERM stops what it started.

Called by run-dev.sh once the project is installed. It polls one flag that the signals set, so that a
Ctrl-C at any moment finds nothing half started.
"""

import os
import signal

# Until main() takes over nothing is started, and the imports take a while.
signal.signal(signal.SIGINT, lambda number, _frame: os._exit(128 + number))
# setup.py held them back until here.
signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))

import http.client
import socket
import sys
from contextlib import ExitStack

from compose import compose_redis, containers, docker_answers
from dev_redis import Watch, embedded_redis
from supervision import DATA, ROOT, Interrupted, Journal, StartFailed, Stop, Store, program, stop_or_end

from backends.clock import SystemClock
from backends.errors import ConfigurationError
from backends.store.addresses import without_password
from backends.store.link import Link
from flaskapp.config import Config, load_config
from flaskapp.ops.private_files import kept_secret, make_private
from flaskapp.ops.running_services import note_service
from flaskapp.settings import Effective, SettingsStore

GUNICORN = (sys.executable, "-m", "gunicorn", "--config", "gunicorn.conf.py", "wsgi:app")
# gunicorn.conf.py lets the streams of a development server end for less than this.
GUNICORN_STOP_SECONDS = 12.0
ADMIN_TOKEN_FILE = DATA / "admin-token"
"""The token of every server of this clone."""
NOT_PRIVATE = (
    ".data has files of another user, who may read and change them: take them over with chown, or remove them."
)
INTRODUCTION = """\

  Chat            {base}/api/v1/chat/stream
  Dashboard       {base}/admin  ({token_hint})
  Redis           {redis}
  Cost throttling {throttling}, backend {backend}
                  {switches}
  Challenges      {challenges}
  Log             tail -f .data/app.log
  In a shell      source {venv}/bin/activate      then pytest, flask and redis-cli work

  Try             {example}

Ctrl-C stops it.
"""
SWITCHES = """\
switch it on the dashboard, with `flask --app wsgi settings set enable_cost_throttling true|false`,
                  or at the start with ENABLE_COST_THROTTLING=true|false ./scripts/run-dev.sh"""
SWITCHES_WHERE_REDIS_DECIDES = """\
switch it on the dashboard; what is set there beats ENABLE_COST_THROTTLING, until it is given
                  back with `flask --app wsgi settings unset enable_cost_throttling`"""
EXAMPLE = """\
curl -N {base}/api/v1/chat/stream -H 'Content-Type: application/json' \\
                    -H 'X-Fingerprint: fp:test123:hash456' -d '{{"query": "What is Litecoin?", "chat_history": []}}'"""
EXAMPLE_WITH_A_CHALLENGE = """\
challenge=$(curl -s {base}/api/v1/auth/challenge -H 'X-Fingerprint: hash456' | cut -d '"' -f 4)
                  curl -N {base}/api/v1/chat/stream -H 'Content-Type: application/json' \\
                    -H "X-Fingerprint: fp:$challenge:hash456" -d '{{"query": "What is Litecoin?"}}'"""


def main() -> int:
    stop = Stop()
    os.chdir(ROOT)
    try:
        # What is started here leaves files that no other user of this machine may read.
        os.umask(0o077)
        is_private = make_private(DATA)
        with Journal(DATA / "app.log") as journal:
            if not is_private:
                journal.say(NOT_PRIVATE)
            return run_or_say_why_not(stop, journal)
    except OSError as error:
        if not str(error.filename).startswith(str(DATA)):
            raise
        print(
            f"{error.filename} cannot be written ({error.strerror}): the data directory and all in it have to be "
            f"yours (chown -R), on a disk that is writable",
            file=sys.stderr,
        )
        return 1


def run_or_say_why_not(stop: Stop, journal: Journal) -> int:
    try:
        return run(stop, journal)
    except Interrupted:
        return stop.status
    except (StartFailed, ConfigurationError) as error:
        journal.say(str(error))
        return 1


def run(stop: Stop, journal: Journal) -> int:
    environment = development_environment()
    config = load_config(environment)
    demand_free(config.host, config.port)
    with ExitStack() as stack:
        if config.redis_url:
            store = Store(config.redis_url, f"{without_password(config.redis_url)} (REDIS_URL)")
        elif docker_answers():
            store = stack.enter_context(compose_redis(stop, journal, environment))
        else:
            store = stack.enter_context(embedded_redis(stop))
        if store.in_container:
            server = stack.enter_context(containers(stop, journal, environment))
        else:
            environment["REDIS_URL"] = store.url
            server = stack.enter_context(program(stop, journal, GUNICORN, environment, GUNICORN_STOP_SECONDS))
        if stop_or_end(stop, server, lambda: is_serving(config)):
            if store.is_embedded:
                stack.enter_context(note_service(DATA, config.port, environment))
            introduce(journal, config, store)
            watch = Watch(journal, store.url, config.port + 1) if store.is_embedded else None
            stop_or_end(stop, server, lambda: watch is not None and watch.check())
        return stop.status or server.wait()


def development_environment() -> dict[str, str]:
    """The caller's environment, with development mode and an admin token unless it has its own."""
    environment = {name: value for name, value in os.environ.items() if value}
    if "ENVIRONMENT" not in environment and "DEBUG" not in environment:
        environment["ENVIRONMENT"] = "development"
    if "ADMIN_TOKEN" not in environment:
        environment["ADMIN_TOKEN"] = kept_secret(ADMIN_TOKEN_FILE)
    # The log is read while it grows.
    environment["PYTHONUNBUFFERED"] = "1"
    return environment


def demand_free(host: str, port: int) -> None:
    """Raises StartFailed where something listens already."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise StartFailed(
            f"Port {port} of {host} cannot be had ({error.strerror}): end what listens there, or choose another: "
            f"PORT={port + 1} ./scripts/run-dev.sh"
        ) from error


def is_serving(config: Config) -> bool:
    connection = http.client.HTTPConnection(reachable(config.host), config.port, timeout=1)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def reachable(host: str) -> str:
    """Where a server that listens on `host` can be reached from here."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host.strip("[]"), host.strip("[]"))  # noqa: S104 - nothing is bound here


def introduce(journal: Journal, config: Config, store: Store) -> None:
    """Where everything is, and one thing to try."""
    host = reachable(config.host)
    kept_token = None if os.environ.get("ADMIN_TOKEN") else kept_secret(ADMIN_TOKEN_FILE)
    hint = f"log in with {kept_token}" if kept_token else "log in with your ADMIN_TOKEN"
    base = f"http://{f'[{host}]' if ':' in host else host}:{config.port}"
    now = settings_now(config, store.url)
    is_set_live = now.sources["enable_cost_throttling"] == "redis"
    example = EXAMPLE_WITH_A_CHALLENGE if now.values.enable_challenge_response else EXAMPLE
    text = INTRODUCTION.format(
        base=base,
        token_hint=hint,
        redis=store.words,
        throttling=is_on(now, "enable_cost_throttling", config.mode),
        switches=SWITCHES_WHERE_REDIS_DECIDES if is_set_live else SWITCHES,
        challenges=is_on(now, "enable_challenge_response", config.mode).replace("is ", "are ", 1),
        example=example.format(base=base),
        backend=config.throttle_backend,
        venv=os.path.relpath(sys.prefix),
    )
    journal.say(text, secret=kept_token)


def settings_now(config: Config, url: str) -> Effective:
    """Redis' settings, or, while it does not answer, the environment's."""
    if url.startswith("fake:"):
        return Effective(config.live_baseline.values, config.live_baseline.sources)
    link = Link(url, clock=SystemClock(), pool_size=1)
    try:
        return SettingsStore(link, config.live_baseline, lambda _event: None).refresh()
    finally:
        link.close()


def is_on(now: Effective, name: str, mode: str) -> str:
    """Whether a switch is on, and by what: Redis, the environment, or the mode."""
    source = now.sources[name]
    by = {"redis": "set live, in Redis", "environment": "by the environment", "default": f"{mode} mode"}
    return f"is {'on' if getattr(now.values, name) else 'off'} ({by.get(source, source)})"


if __name__ == "__main__":
    sys.exit(main())
