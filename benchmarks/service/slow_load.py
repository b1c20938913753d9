"""What `load.c` is, where there is no compiler: the same words, the same line of JSON, and much more processor."""
# ruff: noqa: E402 (gevent patches before anything else is imported)

from gevent import monkey

monkey.patch_all()

import http.client
import json
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import gevent
from gevent.lock import BoundedSemaphore

_TAIL = 512
_SOON_SECONDS = 0.05


class Clients:
    """All connections of one round."""

    def __init__(self, port: int, request: bytes, end: str, seconds: float, rate: float) -> None:
        head, _, self._body = request.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        self._method, self._path, _ = first.split()
        self._headers = dict(line.split(": ", 1) for line in lines)
        self._port, self._end, self._rate = port, end.encode(), rate
        self._starts = time.monotonic()
        self._ends = self._starts + seconds
        self._asked = 0
        self._asking = BoundedSemaphore()
        self.counts: Counter[str] = Counter()
        self.times: dict[str, list[float]] = {"first": [], "whole": []}

    def run(self, connections: int, grace: float) -> float:
        """Until all have ended; how long that was."""
        clients = [gevent.spawn(self._client) for _ in range(connections)]
        gevent.joinall(clients, timeout=self._ends + grace - time.monotonic())
        self.counts["unfinished"] = sum(not client.dead for client in clients)
        return time.monotonic() - self._starts

    def _client(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port)
        for due in self._moments():
            try:
                self._ask(connection, due)
            except (OSError, http.client.HTTPException):
                self.counts["broken"] += 1
                connection.close()
                gevent.sleep(_SOON_SECONDS)

    def _moments(self) -> Iterator[float]:
        """When this client asks next."""
        while True:
            with self._asking:
                due = self._starts + self._asked / self._rate if self._rate else time.monotonic()
                self._asked += 1
            if due >= self._ends:
                return
            gevent.sleep(max(0.0, due - time.monotonic()))
            yield due

    def _ask(self, connection: http.client.HTTPConnection, due: float) -> None:
        if connection.sock is None or self._rate:
            connection.close()
        connection.request(self._method, self._path, self._body, self._headers)
        response = connection.getresponse()
        first, tail = 0.0, b""
        while part := response.read1(65_536):
            first = first or time.monotonic()
            tail = (tail + part)[-_TAIL:]
            self.counts.update(bytes=len(part), chunks=1)
        now = time.monotonic()
        if response.status != http.client.OK or self._end not in tail:
            self.counts["wrong" if response.status == http.client.OK else "refused"] += 1
            return
        self.counts["answers" if now <= self._ends else "late"] += 1
        self.times["first"].append(first - due)
        self.times["whole"].append(now - due)


def _summary(times: Sequence[float]) -> dict[str, float]:
    ranked = sorted(times) or [0.0]
    return {"p50": ranked[len(ranked) // 2] * 1e3, "p99": ranked[len(ranked) * 99 // 100] * 1e3}


def main() -> None:
    port, request, end, connections, *numbers = sys.argv[1:]
    seconds, rate, grace = map(float, numbers)
    clients = Clients(int(port), Path(request).read_bytes(), end, seconds, rate)
    took = clients.run(int(connections), grace)
    names = ("answers", "late", "refused", "wrong", "broken", "unfinished", "chunks", "bytes")
    used = resource.getrusage(resource.RUSAGE_SELF)
    told = {"seconds": took, **{name: clients.counts[name] for name in names}}
    told |= {f"{name}_ms": _summary(times) for name, times in clients.times.items()}
    print(json.dumps(told | {"cpu_seconds": used.ru_utime + used.ru_stime}))


if __name__ == "__main__":
    main()
