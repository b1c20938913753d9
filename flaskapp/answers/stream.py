"""One answer on its way to a client, whatever the client's language: read, counted, drained, and settled once.

Whoever reads the upstream settles (see `pump`): before the last event is sent, and also when the client has left or has
stopped reading. A client that leaves does not end the upstream at once: it is read on for a while for its usage, since
what was generated and not read cannot be known.
"""

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, TypeVar

from flask import Response, has_request_context, request

from backends.clock import Clock
from backends.contract import Event, Observer
from flaskapp.answers.meter import Meter
from flaskapp.answers.upstream_reader import DeadlinePassed, Silence, Stopped, Take, UpstreamReader
from flaskapp.http.refusals import INTERNAL_ERROR, UPSTREAM_ERROR
from flaskapp.llm import Answer, Piece, UpstreamBroken, UpstreamNotTaken, Usage

STREAM_DEADLINE, SERVER_STOPPING = "stream_deadline", "server_stopping"
HEARTBEAT = b": still here\n\n"
"""A comment, so that a client that has left is noticed while the model is silent."""
HEARTBEAT_SECONDS = 1.0
HANG_UP_SECONDS = 2.0
"""How long after its deadline a client may still take in what was sent."""

_T = TypeVar("_T")


class Stopping:
    """The server's word that answers have to end now; streams are given a last event, and all are settled."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_now = False
        self._running: dict[object, Callable[[], object]] = {}
        self._none_runs = threading.Event()
        self._none_runs.set()

    @property
    def is_now(self) -> bool:
        """Whether answers have to end."""
        return self._is_now

    def begin(self) -> None:
        """End what runs, and what begins later at once. Does not wait for it; may be said twice."""
        with self._lock:
            self._is_now = True
            running = list(self._running.values())
        for end in running:
            end()

    def wait(self, timeout_seconds: float) -> bool:
        """Wait until nothing runs; whether it came to that."""
        return self._none_runs.wait(timeout_seconds)

    def enter(self, end: Callable[[], object]) -> Callable[[], None]:
        """Something begins that `end` ends, from any thread and without waiting.

        Returns:
            What to call when it is over.
        """
        token = object()
        with self._lock:
            self._running[token] = end
            self._none_runs.clear()
        if self._is_now:
            end()
        return lambda: self._leave(token)

    def _leave(self, token: object) -> None:
        with self._lock:
            self._running.pop(token, None)
            if not self._running:
                self._none_runs.set()


def ask_model(call: Callable[[], _T], stopping: Stopping, drop: Callable[[_T], object] = lambda _: None) -> _T:
    """Call the model, and wait for it until the server has to stop.

    Args:
        call: asks the model; it runs in a thread of its own.
        stopping: the server's word.
        drop: given what comes when nobody waits any more.

    Raises:
        UpstreamNotTaken: the server is stopping, and the model was not asked.
        UpstreamBroken: the server is stopping, and the model had not answered.
        UpstreamError: as the model says.
    """
    if stopping.is_now:
        raise UpstreamNotTaken("The server is stopping.")
    answer: Future[_T] = Future()
    leave = stopping.enter(answer.cancel)
    threading.Thread(target=_call, args=(call, answer, drop), name="tollgate-ask", daemon=True).start()
    try:
        return answer.result()
    except CancelledError:
        raise UpstreamBroken("The server is stopping, and the model had not answered yet.") from None
    except BaseException:
        # Where this very wait is killed, the thread has to find that nobody waits.
        if not answer.cancel() and answer.exception() is None:
            drop(answer.result())
        raise
    finally:
        leave()


def _call(call: Callable[[], _T], answer: "Future[_T]", drop: Callable[[_T], object]) -> None:
    try:
        result = call()
    except BaseException as error:  # noqa: BLE001 - whatever it is, whoever waits has to get it
        with suppress(InvalidStateError):
            answer.set_exception(error)
        return
    try:
        answer.set_result(result)
    except InvalidStateError:
        drop(result)


class StreamFormat(Protocol):
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
class StreamContext:
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
        self,
        request_id: str,
        answer: Answer,
        meter: Meter,
        stream_format: StreamFormat,
        terms: StreamContext,
        *,
        deadline_at_seconds: float,
    ) -> None:
        self._request_id = request_id
        self._answer = answer
        self._meter = meter
        self._format = stream_format
        self._context = terms
        self._deadline_at_seconds = deadline_at_seconds
        self._lock = threading.Lock()
        self._left = False
        self._has_last_event = False
        self._closed = threading.Event()
        # Gunicorn's name for the client's connection.
        self._connection = request.environ.get("gunicorn.socket") if has_request_context() else None
        self._reader = UpstreamReader(
            answer,
            clock=terms.clock,
            deadline_at_seconds=deadline_at_seconds,
            take=self._take,
            over=self._over,
            afterwards=self._hang_up_on_who_does_not_read,
            heartbeat_seconds=HEARTBEAT_SECONDS,
            most_unread_characters=meter.most_unread_characters,
        )
        self._leave = terms.stopping.enter(self._reader.stop)

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
        self._closed.set()
        try:
            if not self._has_last_event:
                self._drain()
        finally:
            # Also where this very wait is killed.
            self._reader.close()
            self._meter.settle(self._answer.usage)
            self._leave()

    def _events(self) -> Iterator[bytes]:
        try:
            yield from self._pieces()
        except DeadlinePassed:
            self._tell("answer_cut", cause=STREAM_DEADLINE)
            last = self._broken(STREAM_DEADLINE, "The answer took longer than it may, and was cut.")
        except Stopped:
            self._tell("answer_cut", cause=SERVER_STOPPING)
            last = self._broken(SERVER_STOPPING, "The server is stopping, and the answer was cut.")
        except UpstreamBroken as error:
            self._tell("upstream_failed", error=str(error), detail=error.detail)
            last = self._broken(UPSTREAM_ERROR, str(error))
        except Exception as error:  # noqa: BLE001 - a bug: told, and the client learns what it costs
            self._tell("unexpected_error", exception=error)
            last = self._broken(INTERNAL_ERROR, "Something went wrong on our side.")
        else:
            last = self._complete()
        yield last
        # Who goes on here has sent it.
        self._has_last_event = True

    def _pieces(self) -> Iterator[bytes]:
        clock = self._context.clock
        sent_at_seconds = clock.monotonic_seconds()
        for piece in self._reader:
            is_silent = isinstance(piece, Silence)
            sent = b"" if isinstance(piece, Silence) else self._format.piece(piece)
            # A model that thinks is not silent, but what it says is not shown: the client hears as little.
            if not sent and (is_silent or clock.monotonic_seconds() - sent_at_seconds >= HEARTBEAT_SECONDS):
                sent = self._format.heartbeat()
            if sent:
                sent_at_seconds = clock.monotonic_seconds()
                yield sent
        for _ in self._rest():
            yield self._format.heartbeat()

    def _rest(self) -> Iterator[None]:
        """Wait for the usage at the end, as long as a drain may last; gives a sign of life now and then."""
        clock = self._context.clock
        ends = min(clock.monotonic_seconds() + self._context.drain_seconds(), self._deadline_at_seconds)
        while not self._reader.is_over and (seconds_left := ends - clock.monotonic_seconds()) > 0:
            if not self._reader.wait(min(HEARTBEAT_SECONDS, seconds_left)):
                yield
        self._reader.close()

    def _complete(self) -> bytes:
        usage, cost_nanousd = self._settled()
        was_cut = self._reader.was_cut
        if was_cut:
            self._tell("answer_cut", cause=self._cause_of_cut())
        reason = "length" if was_cut else self._answer.finish_reason
        return self._format.complete(usage, cost_nanousd, reason, was_cut=was_cut)

    def _cause_of_cut(self) -> str:
        if self._reader.is_unread:
            return "unread"
        return "maximum" if self._meter.is_exceeded else "budget"

    def _broken(self, error: str, message: str) -> bytes:
        usage, cost_nanousd = self._settled()
        return self._format.broken(error, message, usage, cost_nanousd)

    def _settled(self) -> tuple[Usage, int]:
        # Comes back at once where the reader has ended; it settles before it says so.
        self._reader.close()
        usage = self._answer.usage
        return usage or self._meter.unknown_usage, self._meter.settle(usage)

    def _drain(self) -> None:
        self._reader.listen_no_more()
        # The built-in model's usage is known at any moment: there is nothing to read on for.
        if self._answer.usage is None:
            for _ in self._rest():
                pass
        self._reader.close()
        self._tell("client_left", is_usage_known=self._answer.usage is not None)

    def _take(self, piece: Piece) -> Take:
        if self._meter.take(piece):
            return Take.MORE
        # An upstream that does not keep to its maximum is heard to its end for its meter; where the budget is used up
        # each word more is money that nobody granted.
        return Take.ENOUGH if self._meter.is_exceeded else Take.STOP

    def _over(self, is_read_out: bool) -> None:  # noqa: FBT001 - the pump's own signature
        if is_read_out:
            self._meter.nothing_is_unread()
        self._meter.settle(self._answer.usage)

    def _hang_up_on_who_does_not_read(self) -> None:
        if self._connection is None:
            return
        seconds_left = self._deadline_at_seconds - self._context.clock.monotonic_seconds()
        if self._closed.wait(max(0.0, seconds_left) + HANG_UP_SECONDS):
            return
        self._tell("client_stuck")
        # Not `close`: this wakes the one that waits until it can send. Through a second handle, since gevent would end
        # that wait with an error that gunicorn takes for an accident; so it finds a broken pipe, as ever.
        with suppress(OSError), self._connection.dup() as connection:
            connection.shutdown(socket.SHUT_RDWR)

    def _tell(self, name: str, **fields: object) -> None:
        self._context.observer(Event(name, {"request_id": self._request_id, **fields}))
