"""The application whose racy strategy thinks: gunicorn loads it as ``flaskapp.lab.thinking_app:thinking(20)``."""

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from flask import Flask
from flask.typing import ResponseReturnValue

from backends import open_backend
from flaskapp.factory import REDIS_SECONDS_PER_REQUEST, create_app
from flaskapp.lab.wire import Wire

if TYPE_CHECKING:
    from flaskapp.tollgate import Tollgate


def thinking(think_ms: float) -> Flask:
    """The application of the environment. A strategy that promises no atomicity pauses between check and record."""
    wire = Wire()
    app = create_app(before_each_send=wire)
    hold_reservations(app, wire, partial(time.sleep, think_ms / 1_000), think_ms / 1_000)
    return app


def hold_reservations(app: Flask, wire: Wire, do: Callable[[], object], seconds: float) -> None:
    """Call `do` in each request, right before it records its reservation; not where the strategy has no gap there.

    Args:
        app: the application.
        wire: what was handed to `create_app` as `before_each_send`.
        do: the first write of a view is its reservation: requests are counted before it, and settled after it.
        seconds: the longest that `do` takes. It is not taken from what the request may wait for Redis.
    """
    tollgate: Tollgate = app.extensions["tollgate"]
    if open_backend(tollgate.config.throttle_backend, tollgate.link).promises_atomicity:
        return
    dispatch = app.dispatch_request

    def dispatch_held() -> ResponseReturnValue:
        with tollgate.link.within(REDIS_SECONDS_PER_REQUEST + seconds), wire.before_first_write(do):
            return dispatch()

    app.dispatch_request = dispatch_held  # type: ignore[method-assign] # every view is called here
