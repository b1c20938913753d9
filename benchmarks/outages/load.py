"""The visitors: threads that ask one question after another, half of them on the chat and half of them on /v1."""

import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from flaskapp.ops.running_redis import HOST

API_KEYS = tuple(f"key-of-the-load-{number}" for number in range(4))
IDENTIFIERS_A_CLIENT = 5
PAUSE_SECONDS = 0.1
_PATIENCE_SECONDS = 30
_SOON_SECONDS = 0.05


class Saw(StrEnum):
    """What a client saw of a request."""

    BOOKED = "200"
    EMERGENCY = "200 emergency"
    OFF = "200 unguarded"
    UNAVAILABLE = "503"
    LIMITED = "429"
    ENDED = "ended with a word"
    """The answer began, and its last event says that it was broken off."""
    CUT = "cut"
    """The answer began, and nothing says how it ended."""
    NO_CONNECTION = "no connection"
    BAD_GATEWAY = "502"
    CHARGED = "424"
    """As 502, on /v1, and it is booked."""
    OTHER = "other"


_BY_STATUS = {503: Saw.UNAVAILABLE, 429: Saw.LIMITED, 502: Saw.BAD_GATEWAY, 424: Saw.CHARGED}
_BY_BACKEND = {"emergency": Saw.EMERGENCY, "off": Saw.OFF}


@dataclass(frozen=True, slots=True)
class Answer:
    """One request, by monotonic time."""

    began_seconds: float
    first_seconds: float
    """How long until the answer or the refusal began."""
    ended_seconds: float
    saw: Saw
    status: int


class Load:
    """Clients that ask until they are stopped."""

    def __init__(self, port: int, who: str = "visitor") -> None:
        self._port = port
        self._who = who
        self._stopped = threading.Event()
        self._goes_on = threading.Event()
        self._goes_on.set()
        self._threads: list[threading.Thread] = []
        self._asking = Counter[int]()
        self.answers: list[Answer] = []

    def add(self, clients: int) -> None:
        """So many more of them."""
        for number in range(len(self._threads), len(self._threads) + clients):
            thread = threading.Thread(target=self._client, args=(number,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def pause(self) -> None:
        """Return when every answer under way has ended; the next ones begin after `resume`."""
        self._goes_on.clear()
        end = time.monotonic() + _PATIENCE_SECONDS
        while any(self._asking.values()) and time.monotonic() < end:
            time.sleep(_SOON_SECONDS)

    def resume(self) -> None:
        self._goes_on.set()

    def stop(self) -> None:
        """Return when every answer under way has ended."""
        self._stopped.set()
        self._goes_on.set()
        for thread in self._threads:
            thread.join(2 * _PATIENCE_SECONDS)

    def _client(self, number: int) -> None:
        count = 0
        while not self._stopped.wait(PAUSE_SECONDS):
            self._goes_on.wait()
            if self._stopped.is_set():
                return
            count += 1
            self._asking[number] = 1
            self._ask(number, count)
            self._asking[number] = 0

    def _ask(self, number: int, count: int) -> None:
        path, body, headers = _chat(self._name(number, count)) if number % 2 else _completion(number)
        began = time.monotonic()
        first, status, saw, tail = began, 0, Saw.NO_CONNECTION, b""
        connection = http.client.HTTPConnection(HOST, self._port, timeout=_PATIENCE_SECONDS)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json", **headers})
            response = connection.getresponse()
            first, status, saw = time.monotonic(), response.status, Saw.CUT
            tail = response.read()[-2_000:]
            saw = _seen(response, tail)
        except (OSError, http.client.HTTPException):
            first = first if status else time.monotonic()
        finally:
            connection.close()
        self.answers.append(Answer(began, first - began, time.monotonic(), saw, status))

    def _name(self, number: int, count: int) -> str:
        return f"{self._who}{number}-{count % IDENTIFIERS_A_CLIENT}"


def _chat(identifier: str) -> tuple[str, object, dict[str, str]]:
    # The first word is what the upstream keeps a bill of.
    return "/api/v1/chat/stream", {"query": f"{identifier} asks."}, {"X-Fingerprint": identifier}


def _completion(number: int) -> tuple[str, object, dict[str, str]]:
    key = API_KEYS[number // 2 % len(API_KEYS)]
    body = {"model": "gpt-4o", "stream": True, "messages": [{"role": "user", "content": f"{key} asks."}]}
    return "/v1/chat/completions", body, {"Authorization": f"Bearer {key}"}


def _seen(response: http.client.HTTPResponse, tail: bytes) -> Saw:
    if response.status != http.client.OK:
        return _BY_STATUS.get(response.status, Saw.OTHER)
    if b'"status":"complete"' in tail or b"data: [DONE]" in tail:
        return _BY_BACKEND.get(response.headers.get("X-Throttle-Backend", ""), Saw.BOOKED)
    return Saw.ENDED if b'"error"' in tail else Saw.CUT


def counted(answers: Iterable[Answer]) -> dict[str, int]:
    """How many of each kind."""
    return dict(Counter(str(each.saw) for each in answers).most_common())
