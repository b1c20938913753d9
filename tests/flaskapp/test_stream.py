"""One answer from its first piece to its settlement, without a server around it."""

import threading

import pytest

from backends.clock import SystemClock
from backends.pricing.prices import PriceBook
from flaskapp.answers.meter import Meter
from flaskapp.answers.stream import HEARTBEAT, Stopping, Stream, StreamContext, call_model
from flaskapp.chat.events import ChatStreamFormat
from flaskapp.llm import Piece, UpstreamBroken, UpstreamNotTaken, Usage
from tests.servers import nanousd, parse_events, wait_until

PRICE = PriceBook("openai", ("gpt-4o",), None).price("gpt-4o", 0)
MOST = Usage(77, 10)


class HandClock:
    seconds = 0.0

    def monotonic_seconds(self):
        return self.seconds


class Answer:
    """Gives its items: a piece, an exception, or an event to wait for. Its usage comes at its end."""

    finish_reason = "stop"

    def __init__(self, *items, usage=None):
        self.items, self.at_the_end, self.usage = items, usage, None
        self.closed = threading.Event()
        self.waits = threading.Event()

    def __iter__(self):
        for item in self.items:
            if isinstance(item, Exception):
                raise item
            if isinstance(item, threading.Event):
                self.waits.set()
                while not item.wait(0.005):
                    if self.closed.is_set():
                        return
            else:
                yield item
        self.usage = self.at_the_end

    def hang_up(self):
        self.close()

    def close(self):
        self.closed.set()


def said(text="word", deltas=1):
    return Piece(text, deltas, deltas)


class Stage:
    """A stream and all that is around it."""

    def __init__(self, answer, clock=None, drain_seconds=60):
        self.emitted = []
        self.answer = answer
        self.stopping = Stopping()
        self.clock = clock or SystemClock()
        self.meter = Meter(None, None, PRICE, MOST, limits=lambda: None)
        context = StreamContext(self.clock, self.emitted.append, self.stopping, lambda: drain_seconds)
        ends = self.clock.monotonic_seconds() + 60
        self.stream = Stream("rid", answer, self.meter, ChatStreamFormat("rid"), context, deadline_at_seconds=ends)
        self.events = self.stream._events()

    def read(self):
        """All events, as they are sent."""
        try:
            return list(self.events)
        finally:
            self.stream.close()

    def names(self):
        return [(event.name, event.fields.get("cause", event.fields.get("is_usage_known"))) for event in self.emitted]


WHOLE = PRICE.highest_cost_nanousd(77, 10)


def test_thinking_that_is_not_shown_is_silence_to_the_client():
    clock = HandClock()
    stage = Stage(Answer(*[said("")] * 7, said("word"), usage=Usage(1, 8)), clock)
    stream_format = stage.stream._format

    class Slow:
        """Each piece takes 0.4 seconds."""

        complete = stream_format.complete

        def piece(self, piece):
            clock.seconds += 0.4
            return stream_format.piece(piece)

    stage.stream._format = Slow()
    sent = stage.read()
    assert sent[:2] == [HEARTBEAT] * 2
    assert [event["status"] for event in parse_events(b"".join(sent[2:]))] == ["streaming", "complete"]


def test_a_bug_gives_a_last_event_and_the_whole_reservation():
    stage = Stage(Answer(said(), ZeroDivisionError("secret")))
    *_, last = parse_events(b"".join(stage.read()))
    assert (last["status"], last["error"], nanousd(last["cost_usd"])) == ("error", "internal_error", WHOLE)
    assert "secret" not in str(last)
    assert stage.names() == [("unexpected_error", None)]


def test_a_stop_gives_a_last_event_and_settles_also_where_the_client_does_not_read():
    stage = Stage(Answer(said(), threading.Event()))
    assert parse_events(next(stage.events)) == [{"status": "streaming", "chunk": "word"}]
    assert not stage.stopping.wait(0)
    stage.stopping.begin()
    wait_until(lambda: stage.meter._cost_nanousd == WHOLE, 5, "the reader settles by itself")
    (last,) = map(parse_events, stage.read())
    assert (last[0]["error"], nanousd(last[0]["cost_usd"])) == ("server_stopping", WHOLE)
    assert stage.stopping.wait(5)
    assert stage.names() == [("answer_cut", "server_stopping")]


def test_a_stop_drops_what_was_read_ahead():
    stage = Stage(Answer(*[said()] * 9, threading.Event()))
    assert stage.answer.waits.wait(5)
    next(stage.events)
    stage.stopping.begin()
    assert [parse_events(event)[0]["status"] for event in stage.read()] == ["error"]


def test_a_stop_ends_a_drain():
    stage = Stage(Answer(said(), threading.Event()))
    next(stage.events)
    leaving = threading.Thread(target=stage.stream.close)
    leaving.start()
    wait_until(lambda: stage.stream._reader._drops_pieces, 5, "it is read on")
    stage.stopping.begin()
    leaving.join(5)
    assert not leaving.is_alive()
    assert stage.answer.closed.is_set()
    assert stage.names() == [("client_left", False)]


def test_what_begins_in_a_stop_ends_at_once():
    stage = Stage(Answer(threading.Event()))
    stage.stopping.begin()
    late = Stage.__new__(Stage)
    late.emitted = []
    context = StreamContext(SystemClock(), late.emitted.append, stage.stopping, lambda: 60)
    meter = Meter(None, None, PRICE, MOST, limits=lambda: None)
    deadline = SystemClock().monotonic_seconds() + 60
    stream = Stream(
        "rid", Answer(threading.Event()), meter, ChatStreamFormat("rid"), context, deadline_at_seconds=deadline
    )
    (last,) = parse_events(b"".join(stream._events()))
    assert last["error"] == "server_stopping"
    stream.close()
    stage.read()


def test_a_reader_that_waits_for_a_place_goes_on_when_the_client_leaves():
    stage = Stage(Answer(*[Piece("x", 0, 0)] * 200, usage=Usage(10, 5)))
    next(stage.events)
    stage.stream.close()
    assert stage.meter.settle(None) == Usage(10, 5).cost_nanousd(PRICE)
    assert stage.names() == [("client_left", True)]


def test_closing_twice_is_closing_once():
    stage = Stage(Answer(said(), usage=Usage(10, 1)))
    stage.read()
    stage.stream.close()
    assert stage.emitted == []
    assert stage.stopping.wait(0)


def test_an_upstream_that_exceeds_its_maximum_is_drained_for_its_usage_and_no_longer_passed_on():
    go_on = threading.Event()
    stage = Stage(Answer(*[said()] * 11, go_on, *[said("more")] * 5, usage=Usage(70, 16)))
    shown = [next(stage.events) for _ in range(11)]
    assert b"more" not in b"".join(shown)
    go_on.set()
    (last,) = parse_events(b"".join(stage.read()))
    assert (last["status"], last["finish_reason"]) == ("complete", "length")
    assert nanousd(last["cost_usd"]) == Usage(70, 16).cost_nanousd(PRICE) > WHOLE
    assert stage.names() == [("answer_cut", "maximum")]


def test_where_nothing_more_can_be_reserved_the_upstream_is_hung_up_on_at_once(monkeypatch):
    monkeypatch.setattr(Meter, "count", lambda _, piece: piece.text != "second")
    stage = Stage(Answer(said(), said("second"), threading.Event(), usage=Usage(70, 2)))
    *shown, last = parse_events(b"".join(stage.read()))
    assert [each["chunk"] for each in shown] == ["word", "second"]
    assert (last["finish_reason"], nanousd(last["cost_usd"])) == ("length", WHOLE)
    assert stage.answer.closed.is_set()
    assert stage.names() == [("answer_cut", "budget")]


# --- waiting for the model


def test_what_the_model_returns_or_raises_comes_back():
    stopping = Stopping()
    assert call_model(lambda: 7, stopping) == 7
    with pytest.raises(UpstreamNotTaken, match="no"):
        call_model(lambda: (_ for _ in ()).throw(UpstreamNotTaken("no")), stopping)
    assert stopping.wait(0)


def test_in_a_stop_the_model_is_not_called():
    stopping = Stopping()
    stopping.begin()
    asked = []
    with pytest.raises(UpstreamNotTaken, match="stopping"):
        call_model(lambda: asked.append(1), stopping)
    assert asked == []


def test_a_stop_ends_the_wait_and_what_comes_late_is_dropped():
    stopping, asked, go_on, dropped = Stopping(), threading.Event(), threading.Event(), threading.Event()
    failures = []

    def call():
        asked.set()
        go_on.wait(5)
        return "late"

    def wait():
        try:
            call_model(call, stopping, drop=lambda late: dropped.set() if late == "late" else None)
        except UpstreamBroken as error:
            failures.append(str(error))

    waiter = threading.Thread(target=wait)
    waiter.start()
    assert asked.wait(5)
    stopping.begin()
    waiter.join(5)
    assert failures == ["The server is stopping, and the model had not answered yet."]
    go_on.set()
    assert dropped.wait(5)
    assert stopping.wait(0)
