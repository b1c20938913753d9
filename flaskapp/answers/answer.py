"""One admitted answer: asked for, read, counted, written to its client, and settled in one place.

The thread of the request does all of it: it reads the upstream, and writes what one read gave. Where the client does
not read, that thread waits in a write; then `AnswersUnderWay` looks after the answer. Where the client leaves, it reads
on for a while, since what was generated and not read cannot be known.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from flask import Response, g, has_request_context
from flask.globals import request_ctx

from backends.clock import Clock
from backends.contract import Event, Observer
from flaskapp.answers.failures import Failure, failure_of
from flaskapp.answers.meter import Meter
from flaskapp.answers.under_way import WATCH_SECONDS, AnswersUnderWay
from flaskapp.http.answered import Answered
from flaskapp.http.refusals import INTERNAL_ERROR
from flaskapp.llm import (
    NOTHING,
    Answer,
    Batch,
    Completed,
    Piece,
    UpstreamBroken,
    UpstreamError,
    UpstreamNotTaken,
    Usage,
)
from flaskapp.llm.exchange import shut_down

STREAM_DEADLINE, SERVER_STOPPING = "stream_deadline", "server_stopping"
HEARTBEAT = b": still here\n\n"
"""A comment, so that a client that has left is noticed while the model is silent."""
HEARTBEAT_SECONDS = 1.0
HANG_UP_SECONDS = 2.0
"""How long after the deadline a client may still read what was sent."""
NO_USAGE = Usage(0, 0)
_EVENT_STREAM = "text/event-stream; charset=utf-8"
_MAX_UNREAD_BYTES = 1_048_576
"""Under `slices`: what is kept for a client that does not read. Beyond that the answer is cut."""
_NOT_ANSWERED = "The server is stopping, and the model had not answered yet."
_OWN_FAILURES = {
    STREAM_DEADLINE: Failure(504, STREAM_DEADLINE, STREAM_DEADLINE, "The answer took longer than it may, and was cut."),
    SERVER_STOPPING: Failure(503, SERVER_STOPPING, SERVER_STOPPING, "The server is stopping, and the answer was cut."),
    INTERNAL_ERROR: Failure(500, INTERNAL_ERROR, INTERNAL_ERROR, "Something went wrong on our side."),
}


_T = TypeVar("_T")


class StreamFormat(Protocol):
    """How an answer is written for one kind of client: bytes of server-sent events. Empty bytes are not sent."""

    def pieces(self, pieces: Sequence[Piece]) -> bytes:
        """Pieces of the answer."""

    def complete(self, usage: Usage, cost_nanousd: int, finish_reason: str, *, was_cut: bool) -> bytes:
        """The last event of an answer that ended well; `was_cut`: we ended it, so the upstream gave no reason."""

    def broken(self, failure: Failure, usage: Usage, cost_nanousd: int) -> bytes:
        """The last event of an answer that broke after it had begun."""


@dataclass(frozen=True, slots=True)
class AnswerContext:
    """What all answers of a server share."""

    clock: Clock
    observer: Observer
    under_way: AnswersUnderWay
    drain_seconds: Callable[[], float]
    upstream: str = ""
    """The address of the model's server, as the log shows it."""
    is_first_without_usage: Callable[[str], bool] = lambda _: True
    """Whether no answer of a model, by its name, came without a usage before."""
    learn_overhead: Callable[[str, int], None] = lambda _model, _tokens: None
    """Called where an answer's input was more than its bound, with the model and what to add to its bounds."""


class AdmittedAnswer:
    """`stream` or `whole` makes its response. It is the body of a stream: the server iterates it, and closes it.

    Args:
        headers: of its response.
        deadline_at_seconds: a moment of the clock's monotonic time; then the answer is cut and settled.
    """

    def __init__(
        self,
        request_id: str,
        upstream: Answer,
        meter: Meter,
        context: AnswerContext,
        headers: dict[str, str],
        *,
        deadline_at_seconds: float,
    ) -> None:
        self._request_id = request_id
        self._upstream = upstream
        self._meter = meter
        self._context = context
        self._clock = context.clock
        self._headers = headers
        self._deadline_at_seconds = self._read_until_seconds = deadline_at_seconds
        self._format: StreamFormat
        self._is_begun = self._is_stopped = self._is_over = self._is_delivered = self._has_left = False
        self._has_hung_up = False
        self._cause_of_cut = ""
        """`maximum`, `budget` or `unread`, where we ended the answer; empty where we did not."""
        self._written_at_seconds = 0.0
        self._waits_since_seconds: float | None = None
        """Since when the client, or the server, has not asked for more; None while the upstream is read for it."""
        # Who pops it reads the upstream: this answer's own thread, which puts it back while it waits for the client, or
        # another one, which keeps it. One step of a list needs no lock: under gevent that takes ten times as long.
        self._turn_to_read = [True]
        self._reader: _ReadAhead | None = None
        """Set before it may have the turn, and for good once it has."""
        # Gunicorn's name for the client's connection.
        self._connection = request_ctx.request.environ.get("gunicorn.socket") if has_request_context() else None

    def stream(self, stream_format: StreamFormat) -> Response:
        """The stream, once the model has begun to answer; or the problem where it failed."""
        self._format = stream_format
        failed = self._ask(self._upstream.open)
        if isinstance(failed, Response):
            return failed
        self._written_at_seconds = self._waits_since_seconds = self._clock.monotonic_seconds()
        # A proxy that packs a stream gathers it first: no-transform.
        headers = [("Cache-Control", "no-store, no-transform"), ("X-Accel-Buffering", "no"), *self._headers.items()]
        # Passed through: the server iterates and closes this object itself.
        return Answered(self, 200, headers, content_type=_EVENT_STREAM, direct_passthrough=True)

    def whole(self, write: Callable[[Completed], Response]) -> Response:
        """The whole answer, as `write` makes it; or the problem where the model failed."""
        completed = self._ask(self._completed)
        if isinstance(completed, Response):
            return completed
        self._end()
        response = write(completed)
        response.headers.extend(self._headers)
        return response

    def __iter__(self) -> Iterator[bytes]:
        """The events, as the client gets them; what one read of the upstream gave in one go."""
        self._is_begun = True
        while True:
            reader = self._take_turn()
            self._waits_since_seconds = None
            if reader is None and self._is_over:
                break
            sent = self._step() if reader is None else reader.take(HEARTBEAT_SECONDS)
            if sent is None:
                break
            if sent:
                self._waits_since_seconds = self._clock.monotonic_seconds()
                if reader is None:
                    self._turn_to_read.append(True)
                yield sent
        # The server asks for more only when it has sent the last one.
        self._is_delivered = True

    def close(self) -> None:
        """The response is over; may be called twice. Where the client has left, the answer is read on and settled."""
        try:
            if not self._is_delivered:
                self._is_delivered = True
                self._read_on()
        finally:
            if self._is_over:
                self._context.under_way.remove(self)
            else:
                # This very wait was killed.
                self._end()

    def stop(self) -> None:
        """The server is stopping: the client gets a last event in place of the rest."""
        self._is_stopped = True
        self._upstream.close()

    def look_after(self) -> None:
        """Where the client does not read: read on for it where that may not wait, and hang up on it in the end."""
        try:
            self._look_after()
        except Exception as error:  # noqa: BLE001 - a bug: it is logged, and the others are looked after
            self._emit("unexpected_error", exception=error)

    def _look_after(self) -> None:
        now = self._clock.monotonic_seconds()
        since = self._waits_since_seconds
        if since is None or now - since < WATCH_SECONDS:
            return
        is_due = self._is_stopped or now >= self._deadline_at_seconds
        if self._reader is None and not self._is_over and (is_due or self._meter.is_growing):
            self._read_ahead()
        if now >= self._deadline_at_seconds + HANG_UP_SECONDS:
            if self._is_begun:
                self._hang_up_on_client()
            elif self._is_over:
                # A response that nobody sent: its connection may serve another request by now.
                self._context.under_way.remove(self)

    def _read_ahead(self) -> None:
        """Read the upstream in a thread of its own, unless the answer's thread has come back from its client."""
        reader = self._reader = _ReadAhead(self._step, lambda: self._is_over, self._cut_unread)
        if self._take_turn() is None:
            reader.start()
        else:
            self._reader = None

    def _take_turn(self) -> "_ReadAhead | None":
        """Take the turn to read the upstream: None; or, where it is taken already, who has it."""
        try:
            self._turn_to_read.pop()
        except IndexError:
            return self._reader
        return None

    def _ask(self, ask: Callable[[], _T]) -> _T | Response:
        """What the model gives; or the problem where it failed."""
        try:
            self._context.under_way.add(self)
            return ask()
        except UpstreamError as error:
            return self._failed(error)
        except BaseException:
            cost_nanousd = self._end()
            if has_request_context():
                # For the error's response: what was charged must not be bought again.
                g.charged_nanousd = cost_nanousd
            raise

    def _completed(self) -> Completed:
        completed = self._upstream.whole()
        # What exceeds the maximum can no longer be cut, but it is counted.
        self._meter.count(Batch(tokens=completed.seen_tokens))
        return completed

    def _failed(self, error: UpstreamError) -> Response:
        failure = failure_of(error)
        if self._is_stopped:
            failure = replace(failure, message=_NOT_ANSWERED)
        cost_nanousd = self._end(is_free=_is_free(error))
        self._emit("upstream_failed", error=failure.message, detail=error.detail)
        return failure.response(cost_nanousd, self._headers)

    def _end(self, *, is_free: bool = False) -> int:
        """Settle, and leave those that are under way; the amount booked."""
        try:
            return self._settle(is_free=is_free)[1]
        finally:
            self._context.under_way.remove(self)

    def _settle(self, *, is_free: bool = False, is_fully_read: bool = False) -> tuple[Usage, int]:
        """The one place where an answer is settled: what was used as far as we know, and the amount booked.

        A second call changes nothing.
        """
        meter = self._meter
        try:
            self._upstream.close()
        finally:
            usage, is_first = self._upstream.usage, not self._is_over
            is_unreported = usage is None and self._upstream.has_ended
            if usage is not None and usage.input_tokens + usage.output_tokens + usage.searches > (
                meter.most_credible_tokens
            ):
                if is_first:
                    self._report_absurd(usage)
                usage = None
            if is_free:
                cost_nanousd = meter.release()
            else:
                cost_nanousd = meter.settle(usage, is_fully_read=is_fully_read, is_unreported=is_unreported)
                if is_first and (is_unreported or (usage is not None and usage.billed_nanousd)):
                    self._report_bill(usage)
            if is_first and usage is not None and usage.input_tokens > meter.max_usage.input_tokens:
                self._context.learn_overhead(meter.model, usage.input_tokens - meter.prompt_tokens)
            self._is_over = True
        return (NO_USAGE if is_free else usage or meter.assumed_usage), cost_nanousd

    def _report_absurd(self, usage: Usage) -> None:
        """Report a usage that cannot be: the reservation is booked, as where there is none."""
        reserved = self._meter.max_usage
        self._emit(
            "usage_absurd",
            model=self._meter.model,
            upstream=self._context.upstream,
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            reserved_input_tokens=reserved.input_tokens,
            reserved_output_tokens=reserved.output_tokens,
        )

    def _report_bill(self, usage: Usage | None) -> None:
        """Report that the upstream says no usage, or that it bills more than our price."""
        fields = {"model": self._meter.model, "upstream": self._context.upstream}
        if usage is None:
            booked = "seen" if self._meter.books_seen else "whole"
            self._emit(
                "usage_missing", **fields, booked=booked, is_first=self._context.is_first_without_usage(fields["model"])
            )
        elif (priced_nanousd := self._meter.priced_nanousd(usage)) < usage.billed_nanousd:
            self._emit("bill_higher", **fields, priced_nanousd=priced_nanousd, billed_nanousd=usage.billed_nanousd)

    def _step(self) -> bytes:
        """Read the upstream once: what the client gets of it, with the last event where the answer has ended."""
        try:
            now = self._clock.monotonic_seconds()
            heartbeat_due_seconds, until_seconds = (
                self._written_at_seconds + HEARTBEAT_SECONDS,
                self._read_until_seconds,
            )
            has_time = now < until_seconds
            batch = self._upstream.read(max(0.0, min(heartbeat_due_seconds, until_seconds) - now)) if has_time else None
            if batch is None:
                return self._cut_off_or_complete(has_time=has_time)
            # What cuts the answer is shown still, as far as it may be.
            is_shown = not (self._cause_of_cut or self._has_left)
            pieces = batch.pieces if self._meter.count(batch) else self._cut(batch)
            sent = self._format.pieces(pieces) if is_shown else b""
            if batch.is_last:
                return sent + self._complete(is_fully_read=True)
            if self._is_stopped:
                # What came with a stop is counted by now.
                return self._cut_off(SERVER_STOPPING)
            # Thoughts are not shown, and parts of an event neither: then too the client gets nothing for a while.
            if not sent and (batch is NOTHING or self._clock.monotonic_seconds() >= heartbeat_due_seconds):
                sent = HEARTBEAT
            if sent:
                self._written_at_seconds = self._clock.monotonic_seconds()
        except Exception as error:  # noqa: BLE001 - a bug is logged, and the client learns the cost
            return self._failed_midway(error)
        except BaseException:
            self._settle()
            raise
        return sent

    def _cut(self, batch: Batch) -> Sequence[Piece]:
        """End the answer for its client; what it gets of the last batch."""
        is_exceeded = self._meter.is_exceeded
        self._cause_of_cut = self._cause_of_cut or ("maximum" if is_exceeded else "budget")
        if is_exceeded:
            # The upstream is read on, for the usage that it bills.
            self._limit_reading(self._context.drain_seconds())
            return self._meter.within_maximum(batch.pieces)
        if not self._has_hung_up:
            # Each further token would be spent without a reservation. What has come by now can still be read.
            self._has_hung_up = True
            self._upstream.hang_up()
        return batch.pieces

    def _cut_off_or_complete(self, *, has_time: bool) -> bytes:
        """The last event where nothing more comes, or where there is no time to read on."""
        if self._is_stopped:
            return self._cut_off(SERVER_STOPPING)
        if not has_time and not self._cause_of_cut:
            return self._cut_off(STREAM_DEADLINE)
        return self._complete(is_fully_read=has_time)

    def _failed_midway(self, error: Exception) -> bytes:
        """The last event of an answer that failed while it was read."""
        if not isinstance(error, UpstreamError):
            self._emit("unexpected_error", exception=error)
            return self._broken(_OWN_FAILURES[INTERNAL_ERROR])
        if self._is_stopped:
            return self._cut_off(SERVER_STOPPING)
        if self._cause_of_cut:
            return self._complete()
        if isinstance(error, UpstreamBroken) and error.timed_out:
            return self._cut_off(STREAM_DEADLINE)
        if not self._has_left:
            self._emit("upstream_failed", error=str(error), detail=error.detail)
        return self._broken(failure_of(error), is_free=_is_free(error))

    def _limit_reading(self, seconds: float) -> None:
        self._read_until_seconds = min(self._read_until_seconds, self._clock.monotonic_seconds() + seconds)

    def _cut_unread(self) -> None:
        self._cause_of_cut = self._cause_of_cut or "unread"

    def _complete(self, *, is_fully_read: bool = False) -> bytes:
        usage, cost_nanousd = self._settle(is_fully_read=is_fully_read)
        if self._has_left:
            return b""
        if self._cause_of_cut:
            self._emit("answer_cut", cause=self._cause_of_cut)
        reason = "length" if self._cause_of_cut else self._upstream.finish_reason
        return self._format.complete(usage, cost_nanousd, reason, was_cut=bool(self._cause_of_cut))

    def _cut_off(self, cause: str) -> bytes:
        if not self._has_left:
            self._emit("answer_cut", cause=cause)
        return self._broken(_OWN_FAILURES[cause])

    def _broken(self, failure: Failure, *, is_free: bool = False) -> bytes:
        usage, cost_nanousd = self._settle(is_free=is_free)
        return b"" if self._has_left else self._format.broken(failure, usage, cost_nanousd)

    def _read_on(self) -> None:
        """The client has left: read on for the usage at the end."""
        self._has_left, reader = True, self._take_turn()
        self._waits_since_seconds = None
        # The built-in model's usage is known at any moment: there is nothing to read on for.
        self._limit_reading(0 if self._upstream.usage is not None else self._context.drain_seconds())
        if reader is not None:
            reader.join()
        while not self._is_over:
            self._step()
        self._emit("client_left", is_usage_known=self._upstream.usage is not None)

    def _hang_up_on_client(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        self._emit("client_stuck")
        # Not `close`: a shutdown wakes the thread that waits to send.
        shut_down(connection)

    def _emit(self, name: str, **fields: object) -> None:
        self._context.observer(Event(name, {"request_id": self._request_id, **fields}))


def _is_free(error: UpstreamError) -> bool:
    """Whether the server did no work and billed none."""
    return isinstance(error, UpstreamNotTaken) and not error.is_billed


class _ReadAhead:
    """Reads an answer to its end in a thread of its own, and keeps what its client gets of it.

    Args:
        step: reads once, and gives what the client gets.
        on_overflow: called where more is kept than may be.
    """

    def __init__(self, step: Callable[[], bytes], is_over: Callable[[], bool], on_overflow: Callable[[], None]) -> None:
        self._step, self._is_over, self._on_overflow = step, is_over, on_overflow
        self._unread: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._unread_bytes = 0
        self._lock = threading.Lock()
        self._has_ended = threading.Event()

    def start(self) -> None:
        """Begin to read."""
        threading.Thread(target=self._read, name="tollgate-answer", daemon=True).start()

    def take(self, wait_seconds: float) -> bytes | None:
        """What comes next for the client; a heartbeat where nothing comes in the time; None at the end."""
        try:
            sent = self._unread.get(timeout=wait_seconds)
        except queue.Empty:
            return HEARTBEAT
        with self._lock:
            self._unread_bytes -= len(sent or b"")
        return sent

    def join(self) -> None:
        """Wait for the answer's end, also where the thread has not begun yet."""
        self._has_ended.wait()

    def _read(self) -> None:
        try:
            while not self._is_over():
                sent = self._step()
                if sent and sent is not HEARTBEAT:
                    self._keep(sent)
        finally:
            self._unread.put(None)
            self._has_ended.set()

    def _keep(self, sent: bytes) -> None:
        self._unread.put(sent)
        with self._lock:
            self._unread_bytes += len(sent)
            has_too_much = self._unread_bytes > _MAX_UNREAD_BYTES
        if has_too_much:
            self._on_overflow()
