"""One answer on its way to a client, whatever the client's language: read, counted, drained, and settled once.

Whoever reads the upstream settles (see `pump`): before the last event is sent, and also when the client has left or has
stopped reading. A client that leaves does not end the upstream at once: it is read on for a while for its usage, since
what was generated and not read cannot be known.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from flask import Response

from backends.clock import Clock
from backends.contract import Event, Observer
from flaskapp.bill import Bill
from flaskapp.llm import Answer, Piece, UpstreamBroken, Usage
from flaskapp.llm.pump import DeadlinePassed, Pump, Silence

UPSTREAM_ERROR, STREAM_DEADLINE, SERVER_STOPPING = "upstream_error", "stream_deadline", "server_stopping"
_LOOK_SECONDS = 0.25
"""How often a wait looks whether the server has to stop."""


class Stopping:
    """The server's word that streams have to end now; they are given a last event and settled."""

    def __init__(self) -> None:
        self._now = threading.Event()
        self._lock = threading.Lock()
        self._running = 0
        self._none_runs = threading.Event()
        self._none_runs.set()

    @property
    def is_now(self) -> bool:
        """Whether streams have to end."""
        return self._now.is_set()

    def begin(self) -> None:
        """From now on streams end. They notice within a second."""
        self._now.set()

    def wait(self, timeout_seconds: float) -> bool:
        """Wait until no stream runs; whether it came to that."""
        return self._none_runs.wait(timeout_seconds)

    def enter(self) -> None:
        """A stream begins."""
        with self._lock:
            self._running += 1
            self._none_runs.clear()

    def leave(self) -> None:
        """A stream has ended and was settled."""
        with self._lock:
            self._running -= 1
            if not self._running:
                self._none_runs.set()


class Voice(Protocol):
    """How an answer is told to one kind of client: bytes of server-sent events. Empty bytes are not sent."""

    def piece(self, piece: Piece) -> bytes:
        """A piece of the answer."""

    def heartbeat(self) -> bytes:
        """A sign of life while the model is silent."""

    def complete(self, usage: Usage, cost_nanousd: int, finish_reason: str, *, was_cut: bool) -> bytes:
        """The last event of an answer that ended well; `was_cut`: we ended it, so the upstream said no reason."""

    def broken(self, error: str, message: str, usage: Usage, cost_nanousd: int) -> bytes:
        """The last event of an answer that broke after it had begun."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What holds for every stream of a server."""

    clock: Clock
    observer: Observer
    stopping: Stopping
    drain_seconds: Callable[[], float]


class Stream:
    """One answer. Make the response with `response()`; it settles itself.

    Args:
        deadline_at_seconds: a moment of the clock's monotonic time; then the answer is cut and settled.
    """

    def __init__(
        self, request_id: str, answer: Answer, bill: Bill, voice: Voice, terms: Terms, *, deadline_at_seconds: float
    ) -> None:
        self._request_id = request_id
        self._answer = answer
        self._bill = bill
        self._voice = voice
        self._terms = terms
        self._deadline_at_seconds = deadline_at_seconds
        self._lock = threading.Lock()
        self._left = False
        terms.stopping.enter()
        self._pump = Pump(
            answer, clock=terms.clock, deadline_at_seconds=deadline_at_seconds, take=bill.take, over=self._over
        )

    def response(self) -> Response:
        """An event stream."""
        response = Response(self._events(), mimetype="text/event-stream")
        # Not in the generator's `finally`: a client that leaves before the first chunk never starts the generator.
        response.call_on_close(self.close)
        response.headers["Cache-Control"] = "no-store"
        response.headers["X-Accel-Buffering"] = "no"
        return response

    def close(self) -> None:
        """The response is over, for whatever reason; may be said twice. Comes back when the answer is settled."""
        with self._lock:
            if self._left:
                return
            self._left = True
        try:
            self._drain()
        finally:
            # Also where this very wait is killed.
            self._pump.close()
            self._bill.settle(self._answer.usage)

    def _events(self) -> Iterator[bytes]:
        try:
            for piece in self._pump:
                if self._terms.stopping.is_now:
                    self._pump.close()
                    yield self._broken(SERVER_STOPPING, "The server is stopping, and the answer was cut.")
                    return
                sent = self._voice.heartbeat() if isinstance(piece, Silence) else self._voice.piece(piece)
                if sent:
                    yield sent
        except DeadlinePassed:
            yield self._broken(STREAM_DEADLINE, "The answer took longer than it may, and was cut.")
        except UpstreamBroken as error:
            self._tell("upstream_failed", error=str(error), detail=error.detail)
            yield self._broken(UPSTREAM_ERROR, str(error))
        else:
            usage, cost_nanousd = self._settled()
            was_cut = self._pump.was_cut
            reason = "length" if was_cut else self._answer.finish_reason
            yield self._voice.complete(usage, cost_nanousd, reason, was_cut=was_cut)

    def _broken(self, error: str, message: str) -> bytes:
        usage, cost_nanousd = self._settled()
        return self._voice.broken(error, message, usage, cost_nanousd)

    def _drain(self) -> None:
        if self._pump.is_over or self._answer.usage is not None:
            # It is settled already, or what was used is known without reading on.
            return
        self._pump.listen_no_more()
        clock = self._terms.clock
        ends = min(clock.monotonic_seconds() + self._terms.drain_seconds(), self._deadline_at_seconds)
        while not self._terms.stopping.is_now and clock.monotonic_seconds() < ends:
            if self._pump.wait(_LOOK_SECONDS):
                return

    def _over(self) -> None:
        try:
            self._bill.settle(self._answer.usage)
        finally:
            self._terms.stopping.leave()

    def _settled(self) -> tuple[Usage, int]:
        usage = self._answer.usage
        # What nobody can know is booked, and told, as the most that it can be.
        return usage or self._bill.most, self._bill.settle(usage)

    def _tell(self, name: str, **fields: object) -> None:
        self._terms.observer(Event(name, {"request_id": self._request_id, **fields}))
