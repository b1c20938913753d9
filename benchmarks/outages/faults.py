"""The list of faults, as data: what is injected, and what may come of it."""

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.outages import injections as do
from benchmarks.outages.fault import Fault, Part
from benchmarks.outages.load import Saw

_EMERGENCY = frozenset({Saw.EMERGENCY})
_UNAVAILABLE = frozenset({Saw.UNAVAILABLE})
_BROKEN_OFF = frozenset({Saw.ENDED, Saw.CUT, Saw.NO_CONNECTION})
"""What clients of a worker that is killed may see; others not."""
_WIRE = frozenset({Part.WIRE})
_NAME = frozenset({Part.NAME})
_HOUR = 3_600
_BRIDGED: dict[str, Any] = {"may": _EMERGENCY, "must": _EMERGENCY}
_KILLED: dict[str, Any] = {"may": _BROKEN_OFF, "left_booked": True}


def _redis_outage(name: str, title: str, inject: Callable[..., Any], **fields: Any) -> Fault:
    return Fault(name, "E", title, inject, **{**_BRIDGED, **fields})


def _around(name: str, title: str, inject: Callable[..., Any], **fields: Any) -> Fault:
    return Fault(name, "I", title, inject, **fields)


FAULTS = (
    _redis_outage("killed", "Redis is killed and started again", do.kill, soak=True),
    _redis_outage(
        "killed-closed",
        "the same under `closed`",
        do.kill,
        may=_UNAVAILABLE,
        must=_UNAVAILABLE,
        environment={"THROTTLE_ON_ERROR": "closed"},
    ),
    _redis_outage(
        "killed-long",
        "the same, longer than the emergency budget lasts",
        do.kill,
        may=_EMERGENCY | _UNAVAILABLE,
        must=_EMERGENCY | _UNAVAILABLE,
        environment={"FAIL_OPEN_BUDGET_USD": "0.01"},
    ),
    _redis_outage("flapping", "Redis is killed and back four times", do.flap, soak=True),
    _redis_outage("hung", "Redis hangs", do.freeze, soak=True),
    _redis_outage(
        "blinking", "Redis hangs for 0.25 s, six times", do.blink, may=frozenset(), must=frozenset(), soak=True
    ),
    _redis_outage("silent", "no packet comes through to Redis or back", do.hold_wire, parts=_WIRE, soak=True),
    _redis_outage("cut", "each connection to Redis is cut, new ones too", do.cut_wire, parts=_WIRE, soak=True),
    _redis_outage(
        "slow",
        "each reply comes 100 ms late",
        partial(do.delay_replies, seconds=0.1),
        may=frozenset(),
        must=frozenset(),
        parts=_WIRE,
        soak=True,
    ),
    _redis_outage(
        "too-slow", "each reply comes 700 ms late", partial(do.delay_replies, seconds=0.7), parts=_WIRE, soak=True
    ),
    _redis_outage(
        "lossy",
        "one reply in twenty is lost with its connection",
        partial(do.lose_replies, share=0.05),
        must=frozenset(),
        most_emergency=0.1,
        seconds=6.0,
        felt=lambda stage: stage.wire.lost,
        parts=_WIRE,
        soak=True,
    ),
    _redis_outage("full", "Redis' memory is full", do.fill_up, soak=True),
    _redis_outage("read-only", "Redis is a replica that has lost its primary", do.make_lonely_replica, soak=True),
    _redis_outage("no-replicas", "too few replicas (NOREPLICAS)", do.miss_replicas, soak=True),
    _redis_outage("cannot-save", "Redis cannot save (MISCONF)", do.fail_to_save),
    _redis_outage("busy", "a script runs without an end (BUSY)", do.run_endless_script, soak=True),
    _redis_outage("loading", "Redis reads its data for some seconds (LOADING)", do.load_slowly),
    _redis_outage(
        "rights",
        "the right to run scripts is taken away",
        do.take_rights,
        logged="Redis says that a command of ours is wrong",
    ),
    _redis_outage(
        "wrong-type",
        "totals of one client have the wrong type",
        do.spoil_a_total,
        most_emergency=0.5,
        logged="Redis says that a command of ours is wrong",
    ),
    _redis_outage(
        "forgotten",
        "Redis forgets everything (FLUSHALL)",
        do.forget_everything,
        may=frozenset(),
        must=frozenset(),
        forgets=True,
        settings={"daily_cost_limit_usd": "900"},
        logged="Settings that were changed live are gone from Redis",
    ),
    _redis_outage("failover", "a replica takes over, by name", do.fail_over, must=frozenset(), parts=_WIRE),
    _redis_outage(
        "maxclients",
        "Redis takes no more clients, and many come",
        do.take_no_more_clients,
        may=_UNAVAILABLE,
        must=frozenset(),
        felt=lambda stage: stage.look.info("stats")["rejected_connections"],
        burst=16,
    ),
    _around(
        "names-refused",
        "the name of Redis is not known any more, and many come",
        partial(do.lose_name, mode="refuses"),
        may=_UNAVAILABLE,
        burst=16,
        felt=lambda stage: stage.names.asked_in_vain,
        parts=_NAME,
    ),
    _around(
        "names-silent",
        "the name server is silent, and many come",
        partial(do.lose_name, mode="silent"),
        may=_UNAVAILABLE,
        burst=16,
        felt=lambda stage: stage.names.asked_in_vain,
        parts=_NAME,
    ),
    _around(
        "descriptors",
        "workers have no more descriptors, and many come",
        do.take_descriptors,
        may=_UNAVAILABLE | {Saw.BAD_GATEWAY},
        burst=16,
        in_time=False,
    ),
    _around(
        "disk-full",
        "`.data/` is full, and a worker is killed and born",
        do.fill_disk,
        births=1,
        parts=frozenset({Part.SMALL_DISK}),
        **_KILLED,
    ),
    _around(
        "disk-full-outage",
        "the same while Redis is away",
        do.fill_disk_in_an_outage,
        may=_EMERGENCY | _BROKEN_OFF | _UNAVAILABLE,
        must=_EMERGENCY,
        left_booked=True,
        births=1,
        parts=frozenset({Part.SMALL_DISK}),
    ),
    _around(
        "disk-slow",
        "an fsync takes 100 ms, and Redis is away",
        do.slow_disk_in_an_outage,
        parts=frozenset({Part.SHIM}),
        **_BRIDGED,
    ),
    _around(
        "page-locked", "the emergency budget's file is locked, and Redis is away", do.lock_page_in_an_outage, **_BRIDGED
    ),
    _around(
        "clock-back",
        "the host's clock goes back an hour",
        partial(do.move_clock, seconds=-_HOUR),
        parts=frozenset({Part.SHIM}),
    ),
    _around(
        "clock-forward",
        "the host's clock goes forward an hour",
        partial(do.move_clock, seconds=_HOUR),
        parts=frozenset({Part.SHIM}),
    ),
    _around(
        "redis-clock-back",
        "Redis' clock goes back an hour",
        partial(do.move_redis_clock, seconds=-_HOUR),
        keeps_time=False,
        parts=frozenset({Part.REDIS_SHIM}),
    ),
    _around(
        "redis-clock-forward",
        "Redis' clock goes forward an hour",
        partial(do.move_redis_clock, seconds=_HOUR),
        keeps_time=False,
        parts=frozenset({Part.REDIS_SHIM}),
    ),
    _around(
        "worker-killed", "a worker is killed in the middle of answers", do.kill_worker, births=1, soak=True, **_KILLED
    ),
    _around("workers-killed", "all workers are killed", do.kill_workers, births=2, in_time=False, **_KILLED),
    _around(
        "killed-reserving",
        "all workers are killed while they wait for Redis",
        do.kill_workers_that_wait_for_redis,
        may=_BROKEN_OFF | _EMERGENCY,
        left_booked=True,
        births=2,
        in_time=False,
    ),
    _around(
        "killed-asking",
        "a worker is killed before its answers begin",
        do.kill_worker_that_waits_for_the_model,
        births=1,
        in_time=False,
        parts=frozenset({Part.MODEL_WIRE}),
        **_KILLED,
    ),
    _around(
        "restarted",
        "the service is stopped and started",
        do.restart,
        may=_BROKEN_OFF,
        must=frozenset({Saw.NO_CONNECTION}),
        births=2,
        in_time=False,
    ),
    _around("reloaded", "SIGHUP", do.reload, births=2, soak=True),
    _around(
        "quit",
        "SIGQUIT to each worker",
        do.quit_workers,
        may=_BROKEN_OFF | {Saw.BAD_GATEWAY, Saw.CHARGED},
        births=2,
        in_time=False,
    ),
    _around("second-master", "SIGUSR2, and the new master is stopped", do.start_second_master, births=2),
    _around(
        "max-requests",
        "workers reach max_requests together",
        do.let_workers_reach_max_requests,
        births=2,
        more_births=True,
        environment={"GUNICORN_CMD_ARGS": "--max-requests 80"},
    ),
    _around(
        "born-in-an-outage",
        "SIGHUP while Redis is away, under a live `closed`",
        do.reload_in_an_outage,
        may=_UNAVAILABLE,
        must=_UNAVAILABLE,
        left_booked=True,
        births=2,
        settings={"throttle_on_error": "closed"},
    ),
)
