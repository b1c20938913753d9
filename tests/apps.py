"""The application inside the test's own process, on a real Redis, for tests that need no sockets."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import redis
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from backends.budgets import Scope
from backends.contract import Books
from flaskapp.config import load_config
from flaskapp.factory import create_app
from flaskapp.tollgate import Tollgate
from tests.servers import ADMIN_TOKEN, BEARER, CHAT, LITECOIN, SETTINGS

NETWORK = "198.51.100.7"


@dataclass
class Service:
    """An application, its client, and what it left in Redis."""

    app: Flask
    client: FlaskClient
    redis: redis.Redis

    @property
    def tollgate(self) -> Tollgate:
        return self.app.extensions["tollgate"]

    def chat(self, fingerprint: Any = "hash456", body: object = None, **fields: Any) -> TestResponse:
        """Ask, and read the answer to its end."""
        return self.open_chat(fingerprint, body, buffered=True, **fields)

    def open_chat(
        self,
        fingerprint: Any = "hash456",
        body: object = None,
        *,
        buffered: bool = False,
        headers: Mapping[str, str] | None = None,
        **fields: object,
    ) -> TestResponse:
        headers = {**({} if fingerprint is None else {"X-Fingerprint": fingerprint}), **(headers or {})}
        content = {**LITECOIN, **fields} if body is None else body
        return self.client.post(
            CHAT, json=content, headers=headers, buffered=buffered, environ_base={"REMOTE_ADDR": NETWORK}
        )

    def patch(self, **changes: object) -> TestResponse:
        return self.client.patch(SETTINGS, json=changes, headers=BEARER)

    def daily(self, identifier: str = "hash456") -> int:
        """What the identifier's day holds."""
        return int(self.redis.get(f"llm:cost:daily:{identifier}:{today()}") or 0)

    def window(self, identifier: str = "hash456") -> int:
        """What the identifier's window holds."""
        return int(sum(held for _, held in self.redis.zrange(f"llm:cost:recent:{identifier}", 0, -1, withscores=True)))

    def books(self, identifier: str = "hash456") -> Books:
        """What the strategy itself says is booked in the budgets that are always there."""
        plan = self.tollgate.settings.current.values.plan
        return self.tollgate.guard.books(plan.of({Scope.IDENTIFIER: identifier, Scope.NETWORK: NETWORK}, now_us=0))

    def stored(self) -> dict[str, Any]:
        """All keys of the guard and their values; request counters aside."""
        return {key: _value(self.redis, key) for key in sorted(guard_keys(self.redis))}


@contextmanager
def open_app(redis_url: str, directory: Path, environment: Mapping[str, str], **given: Any) -> Iterator[Service]:
    """In development mode, with throttling on, no challenges and no pauses, unless `environment` says otherwise.

    What is `given` goes to `create_app`.
    """
    variables = {
        "ENVIRONMENT": "development",
        "ENABLE_COST_THROTTLING": "true",
        "ADMIN_TOKEN": ADMIN_TOKEN,
        "DEMO_TOKENS_PER_SECOND": "0",
        "REDIS_URL": redis_url,
        **environment,
    }
    logger = logging.getLogger("tollgate")
    handlers, level = logger.handlers, logger.level
    app = create_app(load_config(variables).model_copy(update={"data_dir": directory / ".data"}), **given)
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        try:
            yield Service(app, app.test_client(), client)
        finally:
            app.extensions["tollgate"].stop()
            logger.handlers, logger.level = handlers, level


def guard_keys(client: redis.Redis) -> set[str]:
    return {key for key in client.scan_iter("*") if not key.startswith("llm:rate:")}


def today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d")


def _value(client: redis.Redis, key: str) -> Any:
    return client.get(key) if client.type(key) == "string" else client.zrange(key, 0, -1, withscores=True)
