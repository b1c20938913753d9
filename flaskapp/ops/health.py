"""``/healthz``: the process runs. ``/readyz``: it may be sent requests."""

from collections.abc import Callable

from flask import Blueprint, Response, json

from backends.guard import Guard, Health


def make_health(guard: Guard, is_redis_up: Callable[[], bool], look: Callable[[], None]) -> Blueprint:
    """The two routes; neither needs a name or a secret. `look` has the guard find out how it is now."""
    blueprint = Blueprint("health", __name__)

    @blueprint.get("/healthz")
    def healthz() -> Response:
        return _answer(200, {"status": "ok"})

    @blueprint.get("/readyz")
    def readyz() -> Response:
        look()
        health = guard.health()
        body: dict[str, object] = {
            "status": "unavailable" if health is Health.UNAVAILABLE else "ok",
            "backend": guard.backend_name,
            "redis": "up" if is_redis_up() else "down",
            "degraded": health is Health.DEGRADED,
        }
        return _answer(503 if health is Health.UNAVAILABLE else 200, body)

    return blueprint


def _answer(status: int, body: dict[str, object]) -> Response:
    response = Response(json.dumps(body, sort_keys=False) + "\n", status, mimetype="application/json")
    response.headers["Cache-Control"] = "no-store"
    return response
