"""Is what the service stands on as it has to be? For `flask doctor`, and for the log of a start."""

import contextlib
import ipaddress
import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from backends.clock import US_PER_SECOND, SystemClock
from backends.errors import ConfigurationError, StoreError
from backends.store.connections import POOL_SIZE
from backends.store.link import Link
from backends.store.scripts import all_scripts
from flaskapp.config import Config
from flaskapp.settings import LiveSettings

OK, WARNING, FAILED = "ok", "warning", "failed"
NEEDED_FILES = 9_000
SLOW_DISK_SECONDS = 0.1
LEAST_FREE_BYTES = 100 * 2**20
MOST_SKEW_SECONDS = 2.0
_AT_THE_START = ("role", "eviction", "clients", "descriptors", "disk", "free space", "backend")


class Finding(NamedTuple):
    """What one check found."""

    state: str
    text: str
    hint: str = ""


def findings(
    config: Config, link: Link, settings: LiveSettings, events_seen: Collection[str] = ()
) -> dict[str, Finding]:
    """What every check found, by its name; `events_seen` are what a service that runs has counted since its start."""
    return {
        **_of_redis(link, config.web_concurrency),
        "descriptors": _descriptors(),
        "disk": _disk(config.data_dir),
        "free space": _free_space(config.data_dir),
        "backend": _backend(config),
        "network limits": _network_limits(settings),
        "window": _window(settings, config.stream_deadline_seconds),
        "proxies": _proxies(config, events_seen),
        "metrics": _metrics(config),
        "outage": _outage(settings),
    }


def _of_redis(link: Link, workers: int) -> dict[str, Finding]:
    if link.place.startswith("fake:"):
        return {"redis": Finding(WARNING, "in the memory of this process", "its books end with it: for tests alone")}
    checks: dict[str, Callable[[], Finding]] = {
        "redis": lambda: Finding(OK, f"version {link.check_version()} at {link.place}"),
        "writes": lambda: _writes(link),
        "scripts": lambda: _scripts(link),
    }
    found = {name: _found(check) for name, check in checks.items()}
    if found["redis"].state == FAILED:
        return {"redis": found["redis"]}
    try:
        info: dict[str, Any] = link.run(lambda client: client.info("everything"))
    except StoreError as error:
        return {**found, "info": Finding(WARNING, str(error), "let this user run INFO: more is checked then")}
    return {
        **found,
        "role": _role(info),
        "eviction": _eviction(info),
        "persistence": _persistence(info),
        "clients": _clients(info, workers),
        "clock": _found(lambda: _clock(link)),
    }


def _found(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except (ConfigurationError, StoreError) as error:
        return Finding(FAILED, str(error), "see REDIS_URL, and what the log of Redis says")


def _writes(link: Link) -> Finding:
    link.check_writes()
    return Finding(OK, "it takes writes")


def _scripts(link: Link) -> Finding:
    wrong = [script.file_name for script in all_scripts() if link.run(script.compile_error) is not None]
    link.run(lambda client: client.evalsha(client.script_load("return 1"), 0))
    if wrong:
        return Finding(FAILED, f"{', '.join(wrong)} cannot be loaded", "run `flask scripts check`")
    return Finding(OK, "all are loaded, and may be run")


def _role(info: Mapping[str, Any]) -> Finding:
    if info.get("role") == "master":
        return Finding(OK, "primary")
    return Finding(FAILED, str(info.get("role")), "REDIS_URL has to lead to the primary")


def _eviction(info: Mapping[str, Any]) -> Finding:
    policy = str(info.get("maxmemory_policy", "noeviction"))
    text = f"maxmemory-policy {policy}"
    if policy == "noeviction":
        return Finding(OK, text)
    return Finding(FAILED, text, "CONFIG SET maxmemory-policy noeviction: what is evicted can be spent again")


def _persistence(info: Mapping[str, Any]) -> Finding:
    for name in ("aof_last_write_status", "rdb_last_bgsave_status"):
        if info.get(name, "ok") != "ok":
            return Finding(FAILED, f"{name} is {info[name]}", "look at the disk of Redis")
    if info.get("aof_enabled"):
        return Finding(OK, "append-only file")
    return Finding(WARNING, "no append-only file", "CONFIG SET appendonly yes: a restart takes back what was booked")


def _clients(info: Mapping[str, Any], workers: int) -> Finding:
    most, needed = info.get("maxclients"), workers * POOL_SIZE
    if most is None:
        return Finding(OK, "its limit is not told")
    text = f"{most} allowed, {info.get('connected_clients')} now; {workers} workers take up to {needed}"
    if int(most) < needed:
        return Finding(WARNING, text, "CONFIG SET maxclients: callers wait for one another's connections")
    return Finding(OK, text)


def _clock(link: Link) -> Finding:
    here_us = SystemClock().now_us()
    seconds, us = link.run(lambda client: client.time())
    skew_seconds = (seconds * US_PER_SECOND + us - here_us) / US_PER_SECOND
    text = f"Redis' is {abs(skew_seconds):.1f} s {'ahead' if skew_seconds > 0 else 'behind'}"
    if abs(skew_seconds) <= MOST_SKEW_SECONDS:
        return Finding(OK, text)
    return Finding(WARNING, text, "run NTP on both: in an outage this machine's hours and days are used")


def _descriptors() -> Finding:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY or most >= NEEDED_FILES:
        return Finding(OK, f"{'unlimited' if most == resource.RLIM_INFINITY else most} a worker")
    return Finding(WARNING, f"{most} a worker", f"ulimit -Hn {NEEDED_FILES}: 4,000 connections take two each")


def _disk(directory: Path) -> Finding:
    clock = SystemClock()
    started_seconds = clock.monotonic_seconds()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"x" * 4_096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        hint = "make it writable: without it there is no emergency budget"
        return Finding(FAILED, f"{directory}: {error.strerror}", hint)
    seconds = clock.monotonic_seconds() - started_seconds
    text = f"{directory}: a write and an fsync take {1_000 * seconds:.1f} ms"
    if seconds < SLOW_DISK_SECONDS:
        return Finding(OK, text)
    return Finding(WARNING, text, "in an outage the emergency budget is leased slowly")


def _free_space(directory: Path) -> Finding:
    with contextlib.suppress(OSError):
        free_bytes = shutil.disk_usage(directory).free
        text = f"{directory}: {free_bytes // 2**20} MiB"
        if free_bytes >= LEAST_FREE_BYTES:
            return Finding(OK, text)
        return Finding(WARNING if free_bytes else FAILED, text, "the log, the metrics and Redis may be on it too")
    return Finding(FAILED, f"{directory} is not there", "make it")


def _backend(config: Config) -> Finding:
    if config.throttle_backend == "legacy":
        return Finding(WARNING, "legacy", "one such worker brings its race with it: THROTTLE_BACKEND=atomic")
    return Finding(OK, config.throttle_backend)


def _network_limits(settings: LiveSettings) -> Finding:
    names = ("network_cost_limit_usd", "network_daily_cost_limit_usd")
    none = [name for name in names if not getattr(settings, name)]
    if none:
        return Finding(WARNING, f"{', '.join(none)}: none", "fresh fingerprints get fresh budgets from one address")
    return Finding(OK, "both are set")


def _window(settings: LiveSettings, deadline_seconds: int) -> Finding:
    text = f"{settings.high_cost_window_seconds} s, and an answer takes {deadline_seconds} s at most"
    if settings.high_cost_window_seconds >= deadline_seconds:
        return Finding(OK, text)
    return Finding(FAILED, text, "set high_cost_window_seconds to that at least")


_PROXIES_SEEN = {
    "forwarded_ignored": "a request came with X-Forwarded-For",
    "forwarded_unreadable": "a request came with too few entries in X-Forwarded-For, or one that is no address",
    "forwarded_longer": "a request came with more entries in X-Forwarded-For than that",
}


def _proxies(config: Config, events_seen: Collection[str]) -> Finding:
    hops = config.trusted_proxy_hops
    believed = f"{hops} are believed" if hops else "none is believed"
    seen = [text for event, text in _PROXIES_SEEN.items() if event in events_seen]
    if seen:
        hint = "set TRUSTED_PROXY_HOPS to the number of proxies, unless the caller wrote that itself"
        return Finding(WARNING, f"{believed}; since the start {', and '.join(seen)}", hint)
    if hops or config.mode == "development":
        return Finding(OK, believed)
    hint = "behind a proxy set TRUSTED_PROXY_HOPS; the log says once if an X-Forwarded-For came"
    return Finding(OK if _is_local(config.host) else WARNING, believed, hint)


def _metrics(config: Config) -> Finding:
    if _is_local(config.host):
        return Finding(OK, f"/metrics listens on {config.host} alone")
    return Finding(WARNING, f"/metrics is open to all who reach {config.host}", "keep it from the outside at the proxy")


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _outage(settings: LiveSettings) -> Finding:
    if not settings.outage_costs_usd_an_hour:
        return Finding(OK, "costs nothing: all is refused")
    return Finding(OK, f"costs at most {settings.outage_costs_usd_an_hour} USD an hour and instance")


def remarks(config: Config, link: Link) -> list[str]:
    """What a start has to say of it, one line each; the settings are checked by `flask doctor` alone.

    That Redis is away is none of it.
    """
    found = findings(config, link, config.live_baseline.values)
    wrong = [name for name in _AT_THE_START if name in found and found[name].state != OK]
    return [f"{name}: {found[name].text}. {found[name].hint}" for name in wrong]
