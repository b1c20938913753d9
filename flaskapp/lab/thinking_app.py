"""The application whose racy strategy thinks: gunicorn loads it as ``flaskapp.lab.thinking_app:thinking(20)``."""

import time
from typing import TYPE_CHECKING

from flask import Flask

from flaskapp.factory import create_app

if TYPE_CHECKING:
    from backends.contract import Backend


def thinking(think_ms: float) -> Flask:
    """The application of the environment; between check and record its strategy pauses, if there is a between."""
    app = create_app()
    strategy: Backend = app.extensions["tollgate"].guard.primary
    if hasattr(strategy, "between_check_and_record"):
        strategy.between_check_and_record = lambda: time.sleep(think_ms / 1_000)
    return app
