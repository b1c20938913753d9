"""What gunicorn's master asks before it listens: how to serve, and whether the application can be made at all.

It runs in a child of the master that ends at once. So the master imports nothing of the application, and workers that
are forked after SIGHUP or by `--reload` run the code that is on disk then.
"""

import os
import tempfile
from pathlib import Path

from backends.clock import SystemClock
from backends.errors import ConfigurationError
from backends.store.link import Link
from flaskapp.config import Config, load_config
from flaskapp.factory import create_app
from flaskapp.ops.checks import remarks


def check_start() -> dict[str, object]:
    """What gunicorn is to be given, by the environment; `remarks` are warnings for its log.

    Raises:
        ConfigurationError: the service cannot start; one line.
    """
    config = load_config()
    config.check_workers(config.web_concurrency)
    _demand_writable(config.data_dir)
    create_app(config)
    return {
        "host": f"[{config.host}]" if ":" in config.host and "[" not in config.host else config.host,
        "port": config.port,
        "workers": config.web_concurrency,
        "log_level": config.log_level,
        "log_format": config.log_format,
        "is_development": config.mode == "development",
        "remarks": [*config.remarks, *_remarks(config)],
    }


def _demand_writable(directory: Path) -> None:
    """Check that the emergency budget can be kept, and the metrics where there is no shared memory."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ConfigurationError(
            f"{directory} cannot be written ({error.strerror}), and the emergency budget is kept there: "
            f"give it to user {os.geteuid()} (chown), make its disk writable, or start in another directory"
        ) from error


def _remarks(config: Config) -> list[str]:
    """Warnings about the server and this machine. That Redis is away is no reason not to start."""
    if config.redis_url is None or config.redis_url.startswith("fake:"):
        return []
    link = Link(config.redis_url, clock=SystemClock(), pool_size=1)
    try:
        return remarks(config, link)
    finally:
        link.close()
