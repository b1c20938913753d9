"""What gunicorn's master asks before it listens: how to serve, and whether the application can be made at all.

It runs in a child of the master that ends at once. So the master imports nothing of the application, and workers that
are forked after SIGHUP or by `--reload` run the code that is on disk then.
"""

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from backends.errors import ConfigurationError
from flaskapp.config import load_config
from flaskapp.factory import create_app, emergency_file
from flaskapp.ops.checks import remarks


def check_start() -> dict[str, object]:
    """What gunicorn is to be given, by the environment; `remarks` are warnings for its log.

    Raises:
        ConfigurationError: the service cannot start; one line.
    """
    config = load_config()
    config.check_workers(config.web_concurrency)
    _demand_writable(config.data_dir, emergency_file(config))
    found = remarks(config, create_app(config).extensions["tollgate"].link)
    return {
        "host": f"[{config.host}]" if ":" in config.host and "[" not in config.host else config.host,
        "port": config.port,
        "workers": config.web_concurrency,
        "log_level": config.log_level,
        "log_format": config.log_format,
        "is_development": config.mode == "development",
        "remarks": [*config.remarks, *found],
    }


def _demand_writable(directory: Path, emergency: Path) -> None:
    """Check that the emergency budget and the metrics can be kept."""
    place = directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
        place = emergency
        with suppress(FileNotFoundError), emergency.open("r+b"):
            pass
    except OSError as error:
        raise ConfigurationError(
            f"{place} cannot be written ({error.strerror}), and the emergency budget and the metrics are kept in "
            f"{directory}: give that and all in it to user {os.geteuid()} (chown -R), make its disk writable, or start "
            "in another directory"
        ) from error
