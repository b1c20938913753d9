"""How gunicorn serves the application: gevent workers, each with connections of its own.

`HOST`, `PORT` and `WEB_CONCURRENCY` are read from the environment with everything else. A value that cannot be used
stops the start here, in the master, with one line and status 1.
"""

from gevent import monkey

# Before anything imports sockets, locks or redis: what was imported before stays blocking.
monkey.patch_all()

import fcntl  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import mmap  # noqa: E402
import os  # noqa: E402
import resource  # noqa: E402
import shutil  # noqa: E402
import stat  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from contextlib import suppress  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from socket import socket  # noqa: E402
from typing import IO, TYPE_CHECKING, Any  # noqa: E402

from gunicorn.workers.ggevent import GeventWorker  # noqa: E402

if TYPE_CHECKING:
    from gevent.pool import Pool
    from gevent.server import StreamServer
    from gunicorn.arbiter import Arbiter
    from gunicorn.workers.base import Worker

    from flaskapp.answers.under_way import AnswersUnderWay

if Path(__file__).with_name("__init__.py").exists():
    # In a wheel. gunicorn looks into the directory of the start first, which may be a checkout: last is early enough.
    sys.path.sort(key=lambda place: Path(place).resolve() == Path.cwd())

METRICS_PREFIX = "tollgate-"
"""Of the names of directories that masters make, each for itself."""
METRICS_BYTES = 4 * 2**20
"""More than the numbers of a worker take; while workers are exchanged there are two of each."""
_PLACES = 4_096
"""More than there are workers at a time."""


def _ask_a_child() -> dict[str, Any]:
    """What `flaskapp.ops.start.check_start` says; the master itself imports nothing that its workers would inherit.

    What stops the start is printed once, in one line, and not by every worker.
    """
    with tempfile.TemporaryFile("w+") as answer:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)
                from backends.errors import ConfigurationError  # noqa: PLC0415 - in the child alone
                from flaskapp.ops.start import check_start  # noqa: PLC0415 - as above

                try:
                    json.dump(check_start(), answer)
                    answer.flush()
                    status = 0
                except ConfigurationError as error:
                    print(error, file=sys.stderr, flush=True)  # noqa: T201 - there is no log yet
            except BaseException:  # noqa: BLE001 - printed below, and the child ends
                sys.excepthook(*sys.exc_info())
                sys.stderr.flush()
            finally:
                os._exit(status)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
            sys.exit(1)
        answer.seek(0)
        return json.load(answer)


class TakingTurns:
    """Which workers of a server listen: made in the master, shared with all that it forks.

    Those that have had their number of requests end one after another, so that one is always listening.
    """

    def __init__(self) -> None:
        self._listens = mmap.mmap(-1, _PLACES)
        # Locked a process; what a process holds is free once it has ended, however it ended.
        self._lock = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the server lives

    def begin(self, worker: int) -> None:
        """This worker, the master's number of it, listens."""
        self._listens[worker % _PLACES] = 1

    def end(self, worker: int) -> None:
        """It listens no more, and perhaps has ended."""
        self._listens[worker % _PLACES] = 0

    def listens(self, worker: int) -> bool:
        """Whether it does."""
        return self._listens[worker % _PLACES] == 1

    def may_end(self, worker: int) -> bool:
        """Whether another one listens; then this one counts as not listening from now on, and has to end."""
        with suppress(BlockingIOError):
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                if sum(self._listens[:]) > 1:
                    self.end(worker)
                    return True
            finally:
                fcntl.lockf(self._lock, fcntl.LOCK_UN)
        return False


class TurnsWorker(GeventWorker):
    """gunicorn's own, but for new connections, for the order of requests, and for what it cannot read as one.

    What it does there is in `flaskapp.ops.connections`, imported in the worker, so that it is the code of the disk.
    """

    def load_wsgi(self) -> None:
        """Import the application."""
        super().load_wsgi()
        from flaskapp.ops.connections import Connections  # noqa: PLC0415 - in the worker alone

        self.connections = Connections(self.wsgi, self.cfg)

    def server_class(self, listener: socket, *, spawn: "Pool", **others: Any) -> "StreamServer":
        """Make the server of a listener; the name is one of gunicorn's."""
        tls = {name: others[name] for name in ("ssl_context",) if name in others}
        return self.connections.listen(listener, partial(self.handle, listener), spawn, **tls)

    def handle(self, listener: socket, client: socket, addr: Any) -> None:  # as in gunicorn
        """Serve a new connection."""
        if self.connections.wait_for_turn(listener, client):
            super().handle(listener, client, addr)

    def handle_request(self, listener_name: Any, req: Any, sock: socket, addr: Any) -> None:  # as in gunicorn
        """Serve one request of a connection; the first has had its turn."""
        if req.req_number > 1:
            self.connections.wait_for_next_turn(req.path)
        super().handle_request(listener_name, req, sock, addr)

    def handle_error(self, _req: object, client: socket, addr: Any, exc: BaseException) -> None:  # as in gunicorn
        """Refuse what cannot be read."""
        if isinstance(exc, Exception):
            self.connections.refuse(client, exc, addr[0] if addr else "")


# Here and not in on_starting: gunicorn would have begun to log.
_start = _ask_a_child()

bind = [f"{_start['host']}:{_start['port']}"]
workers = _start["workers"]
worker_class = TurnsWorker
# Far more than there can be unfinished bodies, so that a connection with a question of health always finds a place.
worker_connections = 4_000
# Each answer under way takes two: the client's connection and the upstream's.
_files, _most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
_needed_files = 2 * worker_connections + 1_000
if 0 <= _files < _needed_files:
    _files = _needed_files if _most_files == resource.RLIM_INFINITY else min(_needed_files, _most_files)
    resource.setrlimit(resource.RLIMIT_NOFILE, (_files, _most_files))
# Long enough for most answers to end by themselves; what still runs then is given a last event, and settled.
graceful_timeout = 8 if _start["is_development"] else 30
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
_MEMORY = "/dev/shm"  # noqa: S108 - gunicorn makes its files and unlinks them
_has_memory = Path(_MEMORY).is_dir() and os.access(_MEMORY, os.W_OK | os.X_OK)
worker_tmp_dir = _MEMORY if _has_memory else None
# An oversized X-Fingerprint reaches the application, whose answer says what is wrong with it.
limit_request_field_size = 16_380
# Who calls, and by which scheme, is read from headers in the application, if TRUSTED_PROXY_HOPS says so. Never here:
# whatever comes from 127.0.0.1 would be believed.
forwarded_allow_ips = ""
forwarder_headers = ""
secure_scheme_headers = {}
accesslog = None
errorlog = "-"
loglevel = _start["log_level"].lower()
if _start["log_format"] == "json":
    logconfig_dict = {
        "root": {"level": "WARNING", "handlers": []},
        "loggers": {
            "gunicorn.error": {"level": _start["log_level"], "handlers": ["error_console"], "propagate": False}
        },
        "handlers": {
            "error_console": {"class": "logging.StreamHandler", "formatter": "json", "stream": "ext://sys.stderr"}
        },
        "formatters": {
            "json": {
                "()": "pythonjsonlogger.json.JsonFormatter",
                "fmt": "%(asctime)s %(levelname)s %(message)s",
                "rename_fields": {"asctime": "time", "levelname": "level"},
            }
        },
    }
_turns = TakingTurns()
# There is no use for a second way in.
control_socket_disable = True


def on_starting(server: "Arbiter") -> None:
    """Before the sockets are made."""
    # What SIGUSR2 starts: gunicorn's own guess does not know `python -m`, and finds its `http` in place of Python's.
    server.START_CTX["args"] = [sys.executable, *sys.orig_argv[1:]]
    for remark in _start["remarks"]:
        server.log.warning(remark)
    if not _has_memory:
        server.log.warning(
            "%s cannot be written, so the workers' heartbeat is in %s, where a slow disk may end them: mount a tmpfs "
            "there (docker run --tmpfs %s)",
            _MEMORY,
            tempfile.gettempdir(),
            _MEMORY,
        )


def when_ready(server: "Arbiter") -> None:
    """The sockets are ours: a start that is refused its port does not come here."""
    base = _metrics_base()
    try:
        server.tollgate_metrics, server.tollgate_lock = _own_metrics_directory(base)
    except OSError as error:
        server.log.critical(
            "%s cannot be written (%s), and the metrics are kept in %s: give that and all in it to user %d (chown -R), "
            "or remove it",
            error.filename,
            error.strerror,
            base,
            os.geteuid(),
        )
        sys.exit(1)
    server.manage_workers = partial(_manage_workers, server, server.manage_workers)


def _metrics_base() -> Path:
    """Where masters make their directories: in memory, since a worker that writes a number must not wait for a disk."""
    if named := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        return Path(named).absolute()
    own = Path(_MEMORY) / f"tollgate-{os.geteuid()}"
    with suppress(OSError):
        own.mkdir(mode=0o700, exist_ok=True)
        # Everybody may write there: another user may have made it first.
        its = own.lstat()
        is_own = stat.S_ISDIR(its.st_mode) and its.st_uid == os.geteuid() and not its.st_mode & 0o077
        if is_own and shutil.disk_usage(own).free >= 2 * workers * METRICS_BYTES:
            return own
    return Path(".data/prometheus").absolute()


def _manage_workers(server: "Arbiter", manage: Callable[[], None]) -> None:
    """`manage`, which is gunicorn's own, ends the workers that are too many: here not before the new ones listen.

    After a SIGHUP nobody would listen for as long as an application takes to start.
    """
    end = time.monotonic() + server.cfg.graceful_timeout
    while len(server.WORKERS) > server.num_workers and time.monotonic() < end:
        by_age = sorted(server.WORKERS.values(), key=lambda worker: worker.age)
        if all(worker.turns.listens(worker.age) for worker in by_age[-server.num_workers :]):
            break
        server.reap_workers()
        time.sleep(0.1)
    manage()


def _own_metrics_directory(base: Path) -> tuple[Path, IO[str]]:
    """A new directory for the numbers of this master's workers, and the lock that says that it is in use.

    Each master has one of its own: another on the same port (SIGUSR2), or in another container on the same disk, must
    neither reset nor add to its counters. Those of masters that have ended are removed.
    """
    base.mkdir(parents=True, exist_ok=True)
    with (base / "starting").open("w") as starting:
        with suppress(OSError):
            fcntl.flock(starting, fcntl.LOCK_EX)
        for other in base.glob(f"{METRICS_PREFIX}*"):
            # Where a lock cannot be had, or the file system has none, it stays.
            with suppress(OSError), (other / "lock").open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(other)
        own = Path(tempfile.mkdtemp(prefix=METRICS_PREFIX, dir=base))
        held = (own / "lock").open("w")
        with suppress(OSError):
            fcntl.flock(held, fcntl.LOCK_SH)
    return own, held


def on_exit(server: "Arbiter") -> None:
    """Every worker has ended."""
    if hasattr(server, "tollgate_metrics"):
        shutil.rmtree(server.tollgate_metrics, ignore_errors=True)


def pre_fork(server: "Arbiter", worker: "Worker") -> None:
    """Give the worker a number that no other has now: it goes on with the counters of the last one that had it.

    Its `turns` are those of its own configuration, also where another one has been read when it ends.
    """
    worker.turns = _turns
    taken = {other.tollgate_number for other in server.WORKERS.values()}
    worker.tollgate_number = next(number for number in range(len(taken) + 1) if number not in taken)


def post_fork(server: "Arbiter", worker: "Worker") -> None:
    """Name the worker's counters, and let it end before the master ends it."""
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(server.tollgate_metrics)
    os.environ["TOLLGATE_WORKER"] = str(worker.tollgate_number)
    worker.cfg.set("graceful_timeout", max(0, worker.cfg.graceful_timeout - WORKER_KILL_SECONDS))


def pre_request(_worker: "Worker", _request: object) -> None:
    """In place of gunicorn's own, which would log each path: a caller may have put a secret there."""


def post_worker_init(worker: "Worker") -> None:
    """Read the settings, and log what holds, before the first request."""
    from flaskapp.ops import one_write  # noqa: PLC0415 - the master imports nothing that its workers would inherit

    one_write.install()
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
    """The worker listens no more, however it ended. The next one goes on with its counters (`pre_fork`)."""
    worker.turns.end(worker.age)
