"""One answer on its way to a client, in whatever format: read, counted, drained, and settled once.

The thread of `UpstreamReader` settles, before the last event is sent, and also when the client has left or has stopped
reading. A client that leaves does not end the upstream at once: the reader drains it for a while for its usage, since
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
from flaskapp.answers.upstream_reader import DeadlinePassed, Next, Stopped, UpstreamReader
from flaskapp.http.refusals import INTERNAL_ERROR, UPSTREAM_ERROR
from flaskapp.llm import Answer, Piece, UpstreamBroken, UpstreamNotTaken, Usage

STREAM_DEADLINE, SERVER_STOPPING = "stream_deadline", "server_stopping"
HEARTBEAT = b": still here\n\n"
"""A comment, so that a client that has left is noticed while the model is silent."""
HEARTBEAT_SECONDS = 1.0
HANG_UP_SECONDS = 2.0
"""How long after the deadline a client may still read what was sent."""

_T = TypeVar("_T")


class Stopping:
    """Ends all running answers when the server stops: streams get a last event, and all are settled."""

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
        """End what runs, and at once what begins later. It does not wait; it may be called twice."""
        with self._lock:
            self._is_now = True
            running = list(self._running.values())
        for end in running:
            end()

    def wait(self, timeout_seconds: float) -> bool:
        """Wait until nothing runs; whether that came in time."""
        return self._none_runs.wait(timeout_seconds)

    def register(self, end: Callable[[], object]) -> Callable[[], None]:
        """Register what runs; `end` has to end it, from any thread and without waiting.

        Returns:
            A function to call when it is over.
        """
        token = object()
        with self._lock:
            self._running[token] = end
            self._none_runs.clear()
        if self._is_now:
            end()
        return lambda: self._unregister(token)

    def _unregister(self, token: object) -> None:
        with self._lock:
            self._running.pop(token, None)
            if not self._running:
                self._none_runs.set()


def call_model(call: Callable[[], _T], stopping: Stopping, drop: Callable[[_T], object] = lambda _: None) -> _T:
    """Call the model, and wait for its result until the server has to stop.

    Args:
        call: calls the model; it runs in a thread of its own.
        stopping: ends the wait.
        drop: called with a result that comes after the wait has ended.

    Raises:
        UpstreamNotTaken: the server is stopping, and the model was not called.
        UpstreamBroken: the server is stopping, and the model had not answered.
        UpstreamError: the model raised it.
    """
    if stopping.is_now:
        raise UpstreamNotTaken("The server is stopping.")
    future: Future[_T] = Future()
    unregister = stopping.register(future.cancel)
    threading.Thread(target=_call, args=(call, future, drop), name="tollgate-ask", daemon=True).start()
    try:
        return future.result()
    except CancelledError:
        raise UpstreamBroken("The server is stopping, and the model had not answered yet.") from None
    except BaseException:
        # Where this very wait is killed, the thread has to find it cancelled.
        if not future.cancel() and future.exception() is None:
            drop(future.result())
        raise
    finally:
        unregister()


def _call(call: Callable[[], _T], future: "Future[_T]", drop: Callable[[_T], object]) -> None:
    try:
        result = call()
    except BaseException as error:  # noqa: BLE001 - whatever it is, the one that waits has to get it
        with suppress(InvalidStateError):
            future.set_exception(error)
        return
    try:
        future.set_result(result)
    except InvalidStateError:
        drop(result)


class StreamFormat(Protocol):
    """How an answer is written for one kind of client: bytes of server-sent events. Empty bytes are not sent."""

    def piece(self, piece: Piece) -> bytes:
        """A piece of the answer."""

    def complete(self, usage: Usage, cost_nanousd: int, finish_reason: str, *, was_cut: bool) -> bytes:
        """The last event of an answer that ended well; `was_cut`: we ended it, so the upstream gave no reason."""

    def broken(self, error: str, message: str, usage: Usage, cost_nanousd: int) -> bytes:
        """The last event of an answer that broke after it had begun."""


@dataclass(frozen=True, slots=True)
class StreamContext:
    """What all streams of a server share."""

    clock: Clock
    observer: Observer
    stopping: Stopping
    drain_seconds: Callable[[], float]


class Stream:
    """One answer. Send `response()`; the stream settles the meter by itself.

    Args:
        deadline_at_seconds: a moment of the clock's monotonic time; then the answer is cut and settled.
    """

    def __init__(
        self,
        request_id: str,
        answer: Answer,
        meter: Meter,
        stream_format: StreamFormat,
        context: StreamContext,
        *,
        deadline_at_seconds: float,
    ) -> None:
        self._request_id = request_id
        self._answer = answer
        self._meter = meter
        self._format = stream_format
        self._context = context
        self._deadline_at_seconds = deadline_at_seconds
        self._lock = threading.Lock()
        self._has_last_event = False
        self._closed = threading.Event()
        # Gunicorn's name for the client's connection.
        self._connection = request.environ.get("gunicorn.socket") if has_request_context() else None
        self._reader = UpstreamReader(
            answer,
            clock=context.clock,
            deadline_at_seconds=deadline_at_seconds,
            on_piece=self._count,
            on_end=self._settle_at_end,
            after_end=self._disconnect_stuck_client,
            heartbeat_seconds=HEARTBEAT_SECONDS,
            max_unread_characters=meter.max_unread_characters,
        )
        self._unregister = context.stopping.register(self._reader.stop)

    def response(self) -> Response:
        """An event stream."""
        response = Response(self._events(), mimetype="text/event-stream")
        # Not in the generator's `finally`: a client that leaves before the first chunk never starts the generator.
        response.call_on_close(self.close)
        response.headers["Cache-Control"] = "no-store"
        response.headers["X-Accel-Buffering"] = "no"
        return response

    def close(self) -> None:
        """End the stream, since the response is over; may be called twice. Returns when the answer is settled."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
        try:
            if not self._has_last_event:
                self._drain()
        finally:
            # Also where this very wait is killed.
            self._reader.close()
            self._meter.settle(self._answer.usage)
            self._unregister()

    def _events(self) -> Iterator[bytes]:
        try:
            yield from self._pieces()
        except DeadlinePassed:
            self._emit("answer_cut", cause=STREAM_DEADLINE)
            last = self._broken(STREAM_DEADLINE, "The answer took longer than it may, and was cut.")
        except Stopped:
            self._emit("answer_cut", cause=SERVER_STOPPING)
            last = self._broken(SERVER_STOPPING, "The server is stopping, and the answer was cut.")
        except UpstreamBroken as error:
            self._emit("upstream_failed", error=str(error), detail=error.detail)
            last = self._broken(UPSTREAM_ERROR, str(error))
        except Exception as error:  # noqa: BLE001 - a bug: it is logged, and the client learns the cost
            self._emit("unexpected_error", exception=error)
            last = self._broken(INTERNAL_ERROR, "Something went wrong on our side.")
        else:
            last = self._complete()
        yield last
        # The server asks for more only when it has sent that.
        self._has_last_event = True

    def _pieces(self) -> Iterator[bytes]:
        clock = self._context.clock
        sent_at_seconds = clock.monotonic_seconds()
        for piece in self._reader:
            sent = b"" if piece is None else self._format.piece(piece)
            # Pieces of a model that thinks are not shown: then too the client gets nothing for a while.
            if not sent and (piece is None or clock.monotonic_seconds() - sent_at_seconds >= HEARTBEAT_SECONDS):
                sent = HEARTBEAT
            if sent:
                sent_at_seconds = clock.monotonic_seconds()
                yield sent
        yield from self._heartbeats_until_usage()

    def _heartbeats_until_usage(self) -> Iterator[bytes]:
        """Wait for the usage at the end, as long as a drain may last; a heartbeat for every second of it."""
        clock = self._context.clock
        ends = min(clock.monotonic_seconds() + self._context.drain_seconds(), self._deadline_at_seconds)
        while not self._reader.is_over and (seconds_left := ends - clock.monotonic_seconds()) > 0:
            if not self._reader.wait(min(HEARTBEAT_SECONDS, seconds_left)):
                yield HEARTBEAT
        self._reader.close()

    def _complete(self) -> bytes:
        usage, cost_nanousd = self._settle()
        was_cut = self._reader.was_cut
        if was_cut:
            self._emit("answer_cut", cause=self._cause_of_cut())
        reason = "length" if was_cut else self._answer.finish_reason
        return self._format.complete(usage, cost_nanousd, reason, was_cut=was_cut)

    def _cause_of_cut(self) -> str:
        if self._reader.has_overflowed:
            return "unread"
        return "maximum" if self._meter.is_exceeded else "budget"

    def _broken(self, error: str, message: str) -> bytes:
        usage, cost_nanousd = self._settle()
        return self._format.broken(error, message, usage, cost_nanousd)

    def _settle(self) -> tuple[Usage, int]:
        # Returns at once where the reader has ended; it settles before that.
        self._reader.close()
        usage = self._answer.usage
        return usage or self._meter.assumed_usage, self._meter.settle(usage)

    def _drain(self) -> None:
        self._reader.drop_pieces()
        # The built-in model's usage is known at any moment: there is nothing to read on for.
        if self._answer.usage is None:
            for _ in self._heartbeats_until_usage():
                pass
        self._reader.close()
        self._emit("client_left", is_usage_known=self._answer.usage is not None)

    def _count(self, piece: Piece) -> Next:
        if self._meter.count(piece):
            return Next.CONTINUE
        # An upstream that exceeds its maximum is read to its end, for the usage that it bills; where the budget is used
        # up each further token would be spent without a reservation.
        return Next.DRAIN if self._meter.is_exceeded else Next.HANG_UP

    def _settle_at_end(self, is_fully_read: bool) -> None:  # noqa: FBT001 - the reader's own signature
        if is_fully_read:
            self._meter.note_fully_read()
        self._meter.settle(self._answer.usage)

    def _disconnect_stuck_client(self) -> None:
        if self._connection is None:
            return
        seconds_left = self._deadline_at_seconds - self._context.clock.monotonic_seconds()
        if self._closed.wait(max(0.0, seconds_left) + HANG_UP_SECONDS):
            return
        self._emit("client_stuck")
        # Not `close`: a shutdown wakes the thread that waits to send. Through a second handle, since gevent would end
        # that wait with an error that gunicorn takes for an accident; so it finds a broken pipe, as ever.
        with suppress(OSError), self._connection.dup() as connection:
            connection.shutdown(socket.SHUT_RDWR)

    def _emit(self, name: str, **fields: object) -> None:
        self._context.observer(Event(name, {"request_id": self._request_id, **fields}))
