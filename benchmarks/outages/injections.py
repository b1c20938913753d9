"""How each fault is injected, and what mends it. Real ones: signals, settings of Redis, cut wires, full disks."""

import fcntl
import os
import resource
import signal
import socket
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import redis

from benchmarks.outages.fault import CannotInject, Mend
from benchmarks.outages.stage import Stage, Store
from flaskapp.ops.embedded_redis import find_server
from flaskapp.ops.running_redis import HOST
from tests.servers import START_SECONDS

_BLINK_SECONDS = 0.25
_LOADING_KEYS, _LOADING_US_PER_KEY = 400, 8_000
_SPARE_DESCRIPTORS = 6
_BUSY_AFTER_MS = 100
_SMALL_DISK_BYTES = 1_000_000


# --- Redis itself


def kill(stage: Stage) -> Mend:
    stage.store.kill()
    return stage.store.start


def freeze(stage: Stage) -> Mend:
    stage.store.freeze()
    return stage.store.thaw


def flap(stage: Stage) -> Mend:
    """Three times away and back, each for less than the breaker rests."""
    for _ in range(3):
        stage.store.kill()
        time.sleep(0.5)
        stage.store.start()
        time.sleep(0.5)
    return kill(stage)


def blink(stage: Stage) -> Mend:
    """Six short freezes, each shorter than a time-out."""
    for _ in range(6):
        stage.store.freeze()
        time.sleep(_BLINK_SECONDS)
        stage.store.thaw()
        time.sleep(_BLINK_SECONDS)
    return lambda: None


def fill_up(stage: Stage) -> Mend:
    return _configured(stage, maxmemory="1")


def make_lonely_replica(stage: Stage) -> Mend:
    stage.look.replicaof(HOST, "1")
    return lambda: stage.look.replicaof("NO", "ONE")


def miss_replicas(stage: Stage) -> Mend:
    return _configured(stage, min_replicas_to_write="1")


def fail_to_save(stage: Stage) -> Mend:
    """A snapshot cannot be written, so Redis takes no writes: a directory has its name."""
    in_the_way = stage.store.directory / "dump.rdb"
    in_the_way.mkdir()
    mend = _configured(stage, save="3600 1")
    stage.look.bgsave()
    stage.wait(lambda: stage.look.info("persistence")["rdb_last_bgsave_status"] == "err", START_SECONDS)

    def mend_all() -> None:
        mend()
        in_the_way.rmdir()

    return mend_all


def run_endless_script(stage: Stage) -> Mend:
    limit = next(name for name in ("busy-reply-threshold", "lua-time-limit") if stage.look.config_get(name))
    stage.look.config_set(limit, _BUSY_AFTER_MS)
    caller = socket.create_connection((HOST, stage.store.port))
    caller.sendall(b"EVAL 'while true do end' 0\r\n")

    def end_script() -> None:
        stage.look.script_kill()
        caller.close()

    return end_script


def load_slowly(stage: Stage) -> Mend:
    """Killed, and started with so much to read that it says LOADING for some seconds."""
    for number in range(_LOADING_KEYS):
        stage.look.set(f"llm:challenge:{number:064x}", "x", ex=300)
    stage.look.bgrewriteaof()
    stage.wait(lambda: not stage.look.info("persistence")["aof_rewrite_in_progress"], START_SECONDS)
    stage.store.kill()
    stage.store.options = {
        "key-load-delay": str(_LOADING_US_PER_KEY),
        "loading-process-events-interval-bytes": "1024",
    }
    starting = threading.Thread(target=stage.store.start)
    starting.start()
    return starting.join


def take_rights(stage: Stage) -> Mend:
    stage.look.execute_command("ACL", "SETUSER", "default", "-evalsha", "-eval")
    return lambda: stage.look.execute_command("ACL", "SETUSER", "default", "+evalsha", "+eval")


def spoil_a_total(stage: Stage) -> Mend:
    """The days of one client's identifiers are of another type; what they held is kept aside."""
    keys = [f"llm:cost:daily:visitor1-{number}:{datetime.now(UTC):%Y-%m-%d}" for number in range(5)]
    kept = {key: f"llm:challenge:{number:064x}" for number, key in enumerate(keys)}
    for key, aside in kept.items():
        with suppress(redis.ResponseError):
            stage.look.rename(key, aside)
        stage.look.rpush(key, "x")

    def put_back() -> None:
        for key, aside in kept.items():
            stage.look.delete(key)
            with suppress(redis.ResponseError):
                stage.look.rename(aside, key)

    return put_back


def forget_everything(stage: Stage) -> Mend:
    stage.look.flushall()
    return lambda: None


def take_no_more_clients(stage: Stage) -> Mend:
    return _configured(stage, maxclients=str(len(stage.look.client_list())))


def fail_over(stage: Stage) -> Mend:
    """A replica that has everything becomes the primary, and new connections lead there; the old one is its replica."""
    replica = stage.enter(Store(stage.directory / "replica", find_server()))
    client = stage.enter(redis.Redis(port=replica.port, decode_responses=True))
    client.replicaof(HOST, str(stage.store.port))
    stage.wait(lambda: client.info("replication").get("master_link_status") == "up", START_SECONDS)
    stage.look.client_pause(2_000, all=False)
    stage.wait(lambda: _offset(client, "slave_repl_offset") == _offset(stage.look, "master_repl_offset"), 2)
    client.replicaof("NO", "ONE")
    stage.look.replicaof(HOST, str(replica.port))
    stage.look.client_unpause()
    stage.wire.target = replica.port
    stage.lead_to(replica, client)
    return lambda: None


def _offset(client: redis.Redis, name: str) -> object:
    return client.info("replication")[name]


def _configured(stage: Stage, **settings: str) -> Mend:
    """Set these; what mends it sets what was there."""
    names = {name.replace("_", "-"): value for name, value in settings.items()}
    before = {name: stage.look.config_get(name)[name] for name in names}
    for name, value in names.items():
        stage.look.config_set(name, value)

    def put_back() -> None:
        for name, value in before.items():
            stage.look.config_set(name, value)

    return put_back


# --- the way to Redis


def hold_wire(stage: Stage) -> Mend:
    stage.wire.hold()
    return stage.wire.mend


def cut_wire(stage: Stage) -> Mend:
    stage.wire.cut()
    return stage.wire.mend


def lose_replies(stage: Stage, *, share: float) -> Mend:
    stage.wire.lose(share)
    return stage.wire.mend


def delay_replies(stage: Stage, *, seconds: float) -> Mend:
    stage.wire.delay(seconds)
    return stage.wire.mend


def lose_name(stage: Stage, *, mode: str) -> Mend:
    """The connections stay; whoever needs a new one asks for the name in vain."""
    stage.names.mode = mode  # type: ignore[assignment] # one of its modes

    def mend() -> None:
        stage.names.mode = "answers"

    return mend


# --- the machine


def fill_disk(stage: Stage) -> Mend:
    """And a worker is born on it."""
    size = os.statvfs(stage.data)
    if size.f_blocks * size.f_frsize > _SMALL_DISK_BYTES:
        raise CannotInject("the small disk was not mounted")
    filler = stage.data / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 512)
    kill_worker(stage)
    return filler.unlink


def fill_disk_in_an_outage(stage: Stage) -> Mend:
    return _both(fill_disk(stage), kill(stage))


def slow_disk_in_an_outage(stage: Stage) -> Mend:
    stage.shim.set(fsync_us=100_000)
    return _both(stage.shim.set, kill(stage))


def lock_page_in_an_outage(stage: Stage) -> Mend:
    page = stage.emergency_page().open("r+b")
    fcntl.flock(page, fcntl.LOCK_EX)
    return _both(page.close, kill(stage))


def take_descriptors(stage: Stage) -> Mend:
    """Workers may open hardly any more, be it for clients or to Redis."""
    before = {pid: resource.prlimit(pid, resource.RLIMIT_NOFILE) for pid in stage.workers()}
    for pid, (_, most) in before.items():
        highest = max(int(each.name) for each in Path(f"/proc/{pid}/fd").iterdir())
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (highest + _SPARE_DESCRIPTORS, most))

    def give_back() -> None:
        for pid, limits in before.items():
            with suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)

    return give_back


def move_clock(stage: Stage, *, seconds: int) -> Mend:
    stage.shim.set(clock_seconds=seconds)
    return stage.shim.set


def move_redis_clock(stage: Stage, *, seconds: int) -> Mend:
    before, _ = stage.look.time()
    stage.redis_shim.set(clock_seconds=seconds)
    after, _ = stage.look.time()
    if abs(after - before - seconds) > 5:
        stage.redis_shim.set()
        raise CannotInject("this server does not ask libc for the time")
    return stage.redis_shim.set


def _both(one: Mend, other: Mend) -> Mend:
    def mend() -> None:
        one()
        other()

    return mend


# --- workers


def kill_worker(stage: Stage) -> Mend:
    os.kill(stage.workers()[0], signal.SIGKILL)
    return lambda: None


def kill_workers(stage: Stage) -> Mend:
    for pid in stage.workers():
        os.kill(pid, signal.SIGKILL)
    return lambda: None


def kill_workers_that_wait_for_redis(stage: Stage) -> Mend:
    """All of them, while they reserve or settle."""
    stage.store.freeze()
    time.sleep(_BLINK_SECONDS)
    kill_workers(stage)
    return stage.store.thaw


def kill_worker_that_waits_for_the_model(stage: Stage) -> Mend:
    """Its answers have not begun."""
    stage.model_wire.hold()
    time.sleep(2 * _BLINK_SECONDS)
    kill_worker(stage)
    return stage.model_wire.mend


def restart(stage: Stage) -> Mend:
    stage.service.stop()
    return stage.service.start


def reload(stage: Stage) -> Mend:
    _signal_master(stage, signal.SIGHUP)
    return lambda: None


def reload_in_an_outage(stage: Stage) -> Mend:
    mend = kill(stage)
    _signal_master(stage, signal.SIGHUP)
    return mend


def quit_workers(stage: Stage) -> Mend:
    for pid in stage.workers():
        os.kill(pid, signal.SIGQUIT)
    return lambda: None


def start_second_master(stage: Stage) -> Mend:
    before = set(stage.workers())
    _signal_master(stage, signal.SIGUSR2)
    [new] = [pid for pid in set(stage.workers()) - before if _parent_of(pid) == stage.service.pid]
    return partial(os.kill, new, signal.SIGTERM)


def let_workers_reach_max_requests(stage: Stage) -> Mend:
    """It is set in the environment; they come to it by themselves."""
    return lambda: stage.wait(lambda: stage.births() >= 2 * stage.service.workers, START_SECONDS)


def _signal_master(stage: Stage, number: int) -> None:
    """Return when the workers that are born of it serve."""
    seen = len(stage.service.log_lines())
    os.kill(stage.service.pid, number)
    stage.service.lines_with("Cost throttling is", seen, at_least=stage.service.workers, within_seconds=START_SECONDS)


def _parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
