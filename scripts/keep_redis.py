"""Keeps the embedded Redis of this clone for as long as a process uses it. Started by dev.py, detached,
with the folder and the port that it takes if that is free.

Users hold a shared lock on `.data/redis.users`; this process holds `.data/redis.keeper` while it runs. When the last
user is gone, for whatever reason, the server is stopped and this process ends.
"""

import fcntl
import signal
import sys
import time
from pathlib import Path

from supervision import REDIS_PASSWORD_FILE, locks

from backends.errors import StoreUnavailable, TollgateError
from flaskapp.ops import embedded_redis as embedded
from flaskapp.ops.private_files import kept_secret
from flaskapp.ops.running_redis import record_redis

POLL_SECONDS = 0.1


def main(data_dir: Path, port: int) -> int:
    signal.signal(signal.SIGTERM, lambda _signal, _frame: sys.exit(0))
    with (data_dir / "redis.users").open("a") as users, (data_dir / "redis.keeper").open("a") as keeper:
        fcntl.flock(keeper, fcntl.LOCK_EX)
        server = _start(data_dir, port)
        try:
            record_redis(data_dir, server.url)
            while server.is_running and not locks(users, fcntl.LOCK_EX):
                time.sleep(POLL_SECONDS)
        finally:
            server.stop()
    return 0


def _start(data_dir: Path, port: int) -> embedded.EmbeddedServer:
    password = kept_secret(REDIS_PASSWORD_FILE)
    if embedded.is_free(port):
        server = embedded.EmbeddedServer(data_dir / "redis", port=port, durable=True, password=password)
        try:
            server.start()
        except StoreUnavailable:
            if embedded.is_free(port):
                raise
        else:
            return server
    server = embedded.EmbeddedServer(data_dir / "redis", durable=True, password=password)
    server.start()
    return server


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
    except TollgateError as error:
        sys.exit(str(error))
