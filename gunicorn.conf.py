"""How gunicorn serves the application: gevent workers, each with connections of its own.

`HOST`, `PORT` and `WEB_CONCURRENCY` are read from the environment with everything else. A value that cannot be used
stops the start here, in the master, with one line and status 1.
"""

from gevent import monkey

# Before anything imports sockets, locks or redis: what was imported before stays blocking.
monkey.patch_all()

import gc  # noqa: E402
import os  # noqa: E402
import resource  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

_METRICS = Path(
    os.environ.get("PROMETHEUS_MULTIPROC_DIR") or f".data/prometheus/{Path(os.environ.get('PORT') or '8000').name}"
).absolute()
_METRICS.mkdir(parents=True, exist_ok=True)
# The Prometheus client reads it while it is imported, which the next lines do.
os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(_METRICS)

from typing import TYPE_CHECKING, NoReturn  # noqa: E402

from backends.clock import SystemClock  # noqa: E402
from backends.errors import ConfigurationError, StoreError  # noqa: E402
from backends.pricing.prices import read_price_table  # noqa: E402
from backends.store.link import Link  # noqa: E402
from flaskapp.config import load_config  # noqa: E402
from flaskapp.factory import create_app  # noqa: E402
from flaskapp.ops.checks import remarks  # noqa: E402
from flaskapp.ops.taking_turns import TakingTurns  # noqa: E402

if TYPE_CHECKING:
    from gunicorn.arbiter import Arbiter
    from gunicorn.workers.base import Worker

    from flaskapp.answers.under_way import AnswersUnderWay


def _give_up(error: ConfigurationError) -> NoReturn:
    print(error, file=sys.stderr, flush=True)  # noqa: T201 - the operator's one line, before there is a log
    sys.exit(1)


def _remarks_on_server(url: str) -> list[str]:
    """Check Redis on a connection that ends before the fork. That it is away is no reason not to start."""
    link = Link(url, clock=SystemClock(), pool_size=1)
    try:
        link.check_version()
        policy = link.run(lambda client: client.info("memory")).get("maxmemory_policy", "noeviction")
        found = remarks(_config, link)
    except StoreError:
        return []
    finally:
        link.close()
    if policy == "noeviction":
        return found
    return [f"Redis has maxmemory-policy {policy} and may forget what was spent: set it to noeviction", *found]


def _rehearse() -> None:
    """Make the application once in a child that ends at once: what stops it is printed once, not by every worker."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            create_app(_config)
            status = 0
        except ConfigurationError as error:
            print(error, file=sys.stderr, flush=True)  # noqa: T201 - as above
        except BaseException:  # noqa: BLE001 - printed below, and the child ends
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
        finally:
            os._exit(status)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
        sys.exit(1)


# Here and not in on_starting: gunicorn would have begun to log.
try:
    _config = load_config()
    _config.check_workers(_config.web_concurrency)
    _has_server = _config.redis_url is not None and not _config.redis_url.startswith("fake:")
    _remarks = _remarks_on_server(_config.redis_url) if _has_server else []
except ConfigurationError as _error:
    _give_up(_error)
read_price_table()
_rehearse()

_HOST = f"[{_config.host}]" if ":" in _config.host and "[" not in _config.host else _config.host

bind = [f"{_HOST}:{_config.port}"]
workers = _config.web_concurrency
worker_class = "gevent"
worker_connections = 1000
# Each answer under way takes two: the client's connection and the upstream's.
_files, _most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
_needed_files = 4 * worker_connections
if 0 <= _files < _needed_files:
    _files = _needed_files if _most_files == resource.RLIM_INFINITY else min(_needed_files, _most_files)
    resource.setrlimit(resource.RLIMIT_NOFILE, (_files, _most_files))
# Long enough for most answers to end by themselves; what still runs then is given a last event, and settled.
graceful_timeout = 8 if _config.mode == "development" else 30
LEAST_SETTLING_SECONDS = 5
"""How long before the graceful time-out answers are ended; at most a third of it, for a busy machine."""
WORKER_KILL_SECONDS = 4
"""How long before the graceful time-out the worker ends what still hangs; it checks once a second, for up to two."""
LAST_EVENT_SECONDS = 1
"""How long a quick stop waits for last events."""
# An idle connection would hold up a stop for so long.
keepalive = 2
timeout = 60
# Each worker makes its own pools, threads and clocks after the fork.
preload_app = False
# The workers' heartbeat is a file: on a slow disk it would stall them.
worker_tmp_dir = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - gunicorn makes it and unlinks it
# An oversized X-Fingerprint reaches the application, whose answer says what is wrong with it.
limit_request_field_size = 16_380
# Who calls, and by which scheme, is read from headers in the application, if TRUSTED_PROXY_HOPS says so. Never here:
# whatever comes from 127.0.0.1 would be believed.
forwarded_allow_ips = ""
forwarder_headers = ""
secure_scheme_headers = {}
accesslog = None
errorlog = "-"
loglevel = _config.log_level.lower()
if _config.log_format == "json":
    logconfig_dict = {
        "root": {"level": "WARNING", "handlers": []},
        "loggers": {"gunicorn.error": {"level": _config.log_level, "handlers": ["error_console"], "propagate": False}},
        "handlers": {
            "error_console": {"class": "logging.StreamHandler", "formatter": "json", "stream": "ext://sys.stderr"}
        },
        "formatters": {"json": {"()": "flaskapp.ops.logs.Json"}},
    }
_turns = TakingTurns()
# There is no use for a second way in.
control_socket_disable = True


def on_starting(server: "Arbiter") -> None:
    """Before the sockets are made."""
    for remark in _remarks:
        server.log.warning(remark)
    if server.master_pid:
        # By SIGUSR2: the workers of the server that runs go on counting in these files.
        return
    # Counters of an earlier start would be added to ours, and what was logged then would not be logged again.
    for leftover in (*_METRICS.glob("*.db"), *_METRICS.glob("*.told")):
        leftover.unlink(missing_ok=True)


def pre_fork(_server: "Arbiter", worker: "Worker") -> None:
    """Of this worker's own configuration, also where another one has been read when it ends."""
    worker.turns = _turns


def post_fork(_server: "Arbiter", worker: "Worker") -> None:
    """The worker ends before the master ends it."""
    worker.cfg.set("graceful_timeout", max(0, worker.cfg.graceful_timeout - WORKER_KILL_SECONDS))


def post_worker_init(worker: "Worker") -> None:
    """Read the settings, and log what holds, before the first request."""
    tollgate = worker.wsgi.extensions["tollgate"]
    tollgate.start()
    # Vocabularies, prices and routes stay to the end: no collection looks at them again. A request leaves few cycles
    # behind, so they are looked for less often. Together that is a twentieth of a request.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)
    worker.turns.begin(worker.age)
    threading.Thread(target=_end_in_turn, args=(worker, worker.max_requests), daemon=True).start()
    # gunicorn's own way: all workers that share the load stop listening together, for as long as their answers run.
    worker.max_requests = sys.maxsize
    threading.Thread(target=_end_answers_in_time, args=(worker, tollgate.answers), daemon=True).start()


def _end_in_turn(worker: "Worker", max_requests: int) -> None:
    """End the worker that has had `max_requests`, unless no other one would listen then."""
    while worker.alive and (
        worker.nr < max_requests or not (worker.cfg.workers == 1 or worker.turns.may_end(worker.age))
    ):
        time.sleep(0.2)
    if worker.alive:
        worker.log.info("Autorestarting worker after %d requests.", worker.nr)
        worker.alive = False


def _end_answers_in_time(worker: "Worker", answers: "AnswersUnderWay") -> None:
    """`alive` turns false by SIGTERM, by SIGHUP to the master, and in `_end_in_turn`."""
    while worker.alive:
        time.sleep(0.2)
    # A client that keeps its connection after its answer must not hold up the stop.
    worker.cfg.set("keepalive", 0)
    timeout_seconds = worker.cfg.graceful_timeout + WORKER_KILL_SECONDS
    time.sleep(max(0, timeout_seconds - max(LEAST_SETTLING_SECONDS, timeout_seconds // 3)))
    answers.stop()


def worker_int(worker: "Worker") -> None:
    """SIGINT or SIGQUIT: the worker ends when this comes back."""
    answers = worker.wsgi.extensions["tollgate"].answers
    answers.stop()
    answers.wait(LAST_EVENT_SECONDS)


def worker_exit(_server: "Arbiter", worker: "Worker") -> None:
    """What the worker has leased of the emergency budget is the next one's."""
    if worker.booted:
        worker.wsgi.extensions["tollgate"].guard.close()


def child_exit(_server: "Arbiter", worker: "Worker") -> None:
    """Take a dead worker's gauges out of the sums."""
    from prometheus_client import multiprocess  # noqa: PLC0415 - reads its directory when imported

    multiprocess.mark_process_dead(worker.pid)
    worker.turns.end(worker.age)
