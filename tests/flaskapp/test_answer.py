"""One answer from its admission to its settlement, without a server around it."""

import socket
import threading
from types import SimpleNamespace

import pytest
from flask import Flask

from backends.clock import SystemClock
from backends.pricing.prices import PriceBook
from flaskapp.answers import answer as answer_module
from flaskapp.answers.answer import HEARTBEAT, AdmittedAnswer, AnswerContext
from flaskapp.answers.meter import CostBound, Meter
from flaskapp.answers.under_way import AnswersUnderWay
from flaskapp.chat.events import ChatStreamFormat
from flaskapp.llm import NOTHING, Batch, Completed, Piece, UpstreamBroken, UpstreamNotTaken, Usage
from tests.servers import nanousd, parse_events, wait_until

PRICE = PriceBook("openai", ("gpt-4o",), None).price("gpt-4o", 0)
MOST = Usage(77, 10)
WHOLE = PRICE.highest_cost_nanousd(77, 10)


class HandClock:
    seconds = 0.0

    def monotonic_seconds(self):
        return self.seconds


class Upstream:
    """Gives its items, one a read: batches, exceptions, events to wait for, seconds that pass. Its usage comes last."""

    finish_reason = "stop"

    def __init__(self, *items, usage=None, clock=None, opening=None):
        self.items, self.at_the_end, self.usage = iter(items), usage, None
        self.clock, self.opening = clock, opening
        self.late, self.has_ended = [], False
        self.closed, self.waits, self.is_hung_up = threading.Event(), threading.Event(), threading.Event()
        self.reads, self.hang_ups = 0, 0

    def open(self):
        if isinstance(self.opening, BaseException):
            raise self.opening
        if self.opening is not None:
            self.wait_for(self.opening)
            if self.closed.is_set():
                raise UpstreamBroken("closed")

    def whole(self):
        self.open()
        self.usage, self.has_ended = self.at_the_end, True
        return Completed({}, seen_tokens=25)

    def read(self, _wait_seconds):
        self.reads += 1
        if self.is_hung_up.is_set():
            return self.late.pop(0) if self.late else None
        for item in self.items:
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, Batch):
                return item
            if isinstance(item, float):
                self.clock.seconds += item
                return NOTHING
            self.wait_for(item)
            if self.closed.is_set():
                return None
        self.usage, self.has_ended = self.at_the_end, True
        return None

    def wait_for(self, event):
        self.waits.set()
        while not event.wait(0.005) and not self.closed.is_set():
            pass

    def hang_up(self):
        self.hang_ups += 1
        self.is_hung_up.set()

    def close(self):
        self.closed.set()


def said(*texts, tokens=None, **more):
    return Batch([Piece(text, 1) for text in texts or ("word",)], tokens or len(texts) or 1, **more)


class Stage:
    """An answer and all that is around it."""

    def __init__(self, upstream, clock=None, drain_seconds=60, deadline_seconds=60.0):
        self.emitted = []
        self.upstream = upstream
        self.under_way = AnswersUnderWay()
        self.clock = clock or SystemClock()
        self.meter = Meter(None, None, CostBound(PRICE, MOST), budgets=lambda: ())
        context = AnswerContext(self.clock, self.emitted.append, self.under_way, lambda: drain_seconds)
        ends = self.clock.monotonic_seconds() + deadline_seconds
        self.answer = AdmittedAnswer("rid", upstream, self.meter, context, {"X-Mine": "1"}, deadline_at_seconds=ends)

    def open(self):
        self.response = self.answer.stream(ChatStreamFormat("rid"))
        self.sent = iter(self.answer)
        return self

    def read(self):
        """All events, as they are sent."""
        try:
            return list(self.sent)
        finally:
            self.answer.close()

    def events(self):
        return parse_events(b"".join(self.read()))

    def names(self):
        return [(event.name, event.fields.get("cause", event.fields.get("is_usage_known"))) for event in self.emitted]

    @property
    def booked(self):
        """None while it is not settled."""
        return self.meter._cost_nanousd


@pytest.fixture(autouse=True)
def app():
    with Flask("x").app_context() as context:
        yield context


def stage_of(*items, usage=None, opening=None, **around):
    return Stage(Upstream(*items, usage=usage, clock=around.get("clock"), opening=opening), **around)


def opened(*items, **around):
    return stage_of(*items, **around).open()


def texts(events):
    return [event["chunk"] for event in events if event["status"] == "streaming"]


# --- the way of an answer


def test_everything_in_order_then_what_it_cost_and_it_is_settled_before_that():
    stage = opened(*[said(letter) for letter in "abcdefgh"], usage=Usage(70, 8))
    assert stage.response.headers["X-Mine"] == "1"
    shown = [next(stage.sent) for _ in range(8)]
    assert texts(parse_events(b"".join(shown))) == list("abcdefgh")
    assert stage.booked is None
    last = parse_events(next(stage.sent))[0]
    assert stage.booked == nanousd(last["cost_usd"]) == Usage(70, 8).cost_nanousd(PRICE)
    assert (last["status"], last["finish_reason"]) == ("complete", "stop")
    assert not stage.under_way.wait(0)
    assert stage.read() == []
    assert stage.under_way.wait(0)
    assert (stage.upstream.closed.is_set(), stage.names()) == (True, [])


def test_what_one_read_gave_is_one_write_with_the_last_event_where_nothing_follows():
    upstream = Upstream(said("a", "b"), said("c"), said("d", "e", is_last=True))
    upstream.usage = Usage(70, 5)
    sent = Stage(upstream).open().read()
    assert [texts(parse_events(each)) for each in sent] == [["a", "b"], ["c"], ["d", "e"]]
    assert parse_events(sent[-1])[-1]["status"] == "complete"
    assert upstream.reads == 3


def test_events_that_came_together_stay_events_of_their_own():
    upstream = Upstream(Batch([Piece("abc", 3, data=b"{}", texts=["a", "b", "c"], is_plain=True)], 3))
    assert texts(Stage(upstream).open().events()) == ["a", "b", "c"]


def test_closing_twice_is_closing_once():
    stage = opened(said(), usage=Usage(10, 1))
    stage.read()
    stage.answer.close()
    assert stage.emitted == []
    assert stage.under_way.wait(0)


def test_silence_gives_heartbeats():
    clock = HandClock()
    sent = opened(said(), 1.0, 1.0, said(), usage=Usage(1, 2), clock=clock).read()
    assert sent[1:3] == [HEARTBEAT] * 2
    assert texts(parse_events(b"".join(sent))) == ["word", "word"]


def test_parts_of_an_event_are_no_reason_for_a_heartbeat():
    clock = HandClock()
    upstream = Upstream(*[Batch()] * 9, said(), usage=Usage(1, 1))
    read = upstream.read

    def slow(wait_seconds):
        clock.seconds += 0.3
        return read(wait_seconds)

    upstream.read = slow
    sent = Stage(upstream, clock).open().read()
    assert sent[:-2] == [HEARTBEAT] * 2
    assert upstream.reads == 11


def test_thinking_that_is_not_shown_is_silence_to_the_client():
    clock = HandClock()
    upstream = Upstream(*[said("")] * 7, said("word"), usage=Usage(1, 8))
    read = upstream.read

    def slow(wait_seconds):
        clock.seconds += 0.4
        return read(wait_seconds)

    upstream.read = slow
    sent = Stage(upstream, clock).open().read()
    assert sent[:2] == [HEARTBEAT] * 2
    assert [event["status"] for event in parse_events(b"".join(sent[2:]))] == ["streaming", "complete"]


def test_a_failure_comes_after_what_came_before_it():
    stage = opened(said("a"), said("b"), UpstreamBroken("oh", detail="why"))
    *shown, last = stage.events()
    assert texts(shown) == ["a", "b"]
    assert (last["error"], last["message"], nanousd(last["cost_usd"])) == ("upstream_error", "oh", WHOLE)
    assert stage.names() == [("upstream_failed", None)]


def test_a_bug_gives_a_last_event_and_the_whole_reservation():
    stage = opened(said(), ZeroDivisionError("secret"))
    *_, last = stage.events()
    assert (last["status"], last["error"], nanousd(last["cost_usd"])) == ("error", "internal_error", WHOLE)
    assert "secret" not in str(last)
    assert stage.names() == [("unexpected_error", None)]


@pytest.mark.parametrize("items", [(SystemExit(),), (said(), SystemExit())])
def test_what_is_killed_on_the_way_is_settled_and_does_not_look_whole(items):
    stage = opened(*items)
    sent = []
    with pytest.raises(SystemExit):
        sent.extend(stage.sent)
    assert stage.booked == WHOLE
    stage.answer.close()
    assert stage.under_way.wait(0)


def test_the_deadline_cuts_a_silent_answer():
    stage = opened(said(), *[1.0] * 100, clock=HandClock(), deadline_seconds=10)
    *_, last = stage.events()
    assert (last["error"], nanousd(last["cost_usd"])) == ("stream_deadline", WHOLE)
    assert stage.upstream.closed.is_set()
    assert stage.names() == [("answer_cut", "stream_deadline")]


def test_the_deadline_cuts_an_answer_that_never_pauses():
    clock = HandClock()
    stage = opened(*[Batch([Piece("x")])] * 100, clock=clock, deadline_seconds=10)
    shown = []
    for sent in stage.sent:
        shown += parse_events(sent)
        clock.seconds += 1
    assert len(texts(shown)) == 10
    assert shown[-1]["error"] == "stream_deadline"
    assert stage.upstream.reads == 10
    stage.answer.close()


def test_a_time_out_of_the_upstream_is_the_deadline():
    *_, last = opened(said(), UpstreamBroken("late", timed_out=True)).events()
    assert last["error"] == "stream_deadline"


# --- the end comes early


def test_an_upstream_that_exceeds_its_maximum_is_drained_for_its_usage_and_no_longer_passed_on():
    stage = opened(*[said()] * 10, *[said("more")] * 6, usage=Usage(70, 16))
    *shown, last = stage.events()
    assert texts(shown) == ["word"] * 10
    assert (last["status"], last["finish_reason"]) == ("complete", "length")
    assert nanousd(last["cost_usd"]) == Usage(70, 16).cost_nanousd(PRICE) > WHOLE
    assert stage.names() == [("answer_cut", "maximum")]
    assert stage.upstream.hang_ups == 0


def test_an_upstream_that_gives_more_than_its_maximum_in_one_read_is_shown_up_to_it_and_counted():
    stage = opened(said(*"abcdefghijklm"), said("n"))
    *shown, last = stage.events()
    assert texts(shown) == list("abcdefghij")
    assert last["usage"]["output_tokens"] == 14


def test_several_events_in_one_piece_are_cut_within_it():
    piece = Piece("abcdefghijklm", 13, data=b"\n\ndata: ".join(13 * [b"{}"]), texts=[*"abcdefghijklm"], is_plain=True)
    *shown, last = opened(Batch([piece], 13)).events()
    assert texts(shown) == list("abcdefghij")
    kept = piece.first(2)
    assert (kept.text, kept.deltas, kept.data) == ("ab", 2, b"{}\n\ndata: {}")
    assert last["finish_reason"] == "length"


def test_the_drain_of_an_upstream_without_an_end_is_bounded_and_the_client_hears_of_it():
    stage = opened(said(*"abcdefghijk"), *[1.0] * 50, clock=HandClock(), drain_seconds=5)
    sent = stage.read()
    assert sent[1:-1] == [HEARTBEAT] * 5
    assert parse_events(sent[-1])[0]["finish_reason"] == "length"
    assert stage.names() == [("answer_cut", "maximum")]


@pytest.mark.parametrize("failure", [UpstreamBroken("oh"), UpstreamBroken("late", timed_out=True)])
def test_an_upstream_that_breaks_while_it_is_drained_changes_nothing_for_the_client(failure):
    stage = opened(said(*"abcdefghijk"), failure)
    *_, last = stage.events()
    assert (last["status"], last["finish_reason"]) == ("complete", "length")
    assert stage.names() == [("answer_cut", "maximum")]


class Refusing:
    """A meter of which the extension at `text` is refused, and all after it."""

    def __init__(self, monkeypatch, text):
        self.counted, self.fully_read, self.is_over = [], [], False

        def count(meter, batch):
            self.counted += [piece.text for piece in batch.pieces]
            self.is_over = self.is_over or text in self.counted
            return not self.is_over

        monkeypatch.setattr(Meter, "count", count)
        settle = Meter.settle

        def noted(meter, usage, *, is_fully_read=False, **_):
            if is_fully_read:
                self.fully_read.append(True)
            return settle(meter, usage)

        monkeypatch.setattr(Meter, "settle", noted)


def test_where_nothing_more_can_be_reserved_the_upstream_is_hung_up_on_and_what_had_come_is_counted(monkeypatch):
    meter = Refusing(monkeypatch, "second")
    stage = stage_of(said("first"), said("second"), threading.Event())
    stage.upstream.late = [said("late"), said("later")]
    *shown, last = stage.open().events()
    assert texts(shown) == ["first", "second"]
    assert (meter.counted, meter.fully_read) == (["first", "second", "late", "later"], [True])
    assert (last["finish_reason"], nanousd(last["cost_usd"])) == ("length", WHOLE)
    assert (stage.upstream.hang_ups, stage.upstream.closed.is_set()) == (1, True)
    assert stage.names() == [("answer_cut", "budget")]


def test_that_all_was_read_is_not_said_where_time_ran_out_before(monkeypatch):
    clock = HandClock()
    meter = Refusing(monkeypatch, "first")
    stage = stage_of(said("first"), clock=clock, deadline_seconds=10)
    stage.upstream.late = [said("late")] * 9
    read = stage.upstream.read

    def slow(wait_seconds):
        clock.seconds += 4
        return read(wait_seconds)

    stage.upstream.read = slow
    *_, last = stage.open().events()
    assert (last["finish_reason"], meter.fully_read) == ("length", [])


def test_that_all_was_read_is_not_said_where_the_rest_broke_off(monkeypatch):
    meter = Refusing(monkeypatch, "never")
    opened(said(), UpstreamBroken("oh")).read()
    opened(said(), 1.0, 1.0, clock=HandClock(), deadline_seconds=1).read()
    assert meter.fully_read == []


# --- the client leaves


@pytest.mark.parametrize("read_before", [0, 1])
def test_a_client_that_leaves_is_read_on_for_and_booked_by_its_usage(read_before):
    stage = opened(*[said()] * 5, usage=Usage(70, 5))
    for _ in range(read_before):
        next(stage.sent)
    stage.answer.close()
    assert stage.booked == Usage(70, 5).cost_nanousd(PRICE)
    assert stage.names() == [("client_left", True)]
    assert stage.under_way.wait(0)


def test_the_drain_is_bounded():
    stage = opened(said(), *[1.0] * 50, clock=HandClock(), drain_seconds=5)
    next(stage.sent)
    stage.answer.close()
    assert (stage.clock.seconds, stage.booked) == (5.0, WHOLE)
    assert stage.names() == [("client_left", False)]


def test_without_a_drain_nothing_more_is_read():
    stage = opened(said(), said(), drain_seconds=0)
    next(stage.sent)
    stage.answer.close()
    assert (stage.upstream.reads, stage.booked) == (1, WHOLE)


def test_where_the_usage_is_known_already_nothing_more_is_read():
    stage = opened(said(), said())
    next(stage.sent)
    stage.upstream.usage = Usage(70, 1)
    stage.answer.close()
    assert (stage.upstream.reads, stage.booked) == (1, Usage(70, 1).cost_nanousd(PRICE))


def test_an_upstream_that_breaks_after_its_client_left_is_no_news():
    stage = opened(said(), UpstreamBroken("oh"))
    next(stage.sent)
    stage.answer.close()
    assert stage.names() == [("client_left", False)]


def test_a_client_that_leaves_before_it_has_the_last_event_has_left():
    stage = opened(said(), usage=Usage(70, 1))
    next(stage.sent)
    next(stage.sent)
    stage.answer.close()
    assert stage.names() == [("client_left", True)]


# --- the client does not read


class Stuck:
    """A client that took the first event and reads no more, and its connection."""

    def __init__(self, *items, usage=None, **around):
        self.clock = HandClock()
        self.stage = opened(*items, usage=usage, clock=self.clock, **around)
        self.here, self.there = socket.socketpair()
        self.stage.answer._connection = self.here
        self.first = next(self.stage.sent)

    def after(self, seconds):
        """Look after it, so many seconds later."""
        self.clock.seconds += seconds
        self.stage.under_way.look_after()
        return self.stage

    @property
    def is_hung_up_on(self):
        self.there.setblocking(False)
        try:
            return self.there.recv(1) == b""
        except BlockingIOError:
            return False


@pytest.fixture
def stuck_of():
    made = []

    def make(*items, **around):
        made.append(Stuck(*items, **around))
        return made[-1]

    yield make
    for stuck in made:
        stuck.here.close()
        stuck.there.close()


def test_where_all_is_reserved_the_upstream_waits_for_it_and_it_is_settled_at_the_deadline(stuck_of):
    stuck = stuck_of(*[said()] * 9)
    stage = stuck.after(30)
    assert (stage.upstream.reads, stage.booked, stage.answer._reader) == (1, None, None)
    stuck.after(31)
    wait_until(lambda: stage.booked == WHOLE, 5, "it is settled")
    assert (stage.upstream.reads, stuck.is_hung_up_on) == (1, False)
    stuck.after(1)
    assert stuck.is_hung_up_on
    assert not stuck.after(1).under_way.wait(0)
    # The server notices that, and ends the response.
    stage.answer.close()
    assert stage.names() == [("answer_cut", "stream_deadline"), ("client_stuck", None), ("client_left", False)]


def test_one_that_reads_after_all_gets_the_last_event(stuck_of):
    stuck = stuck_of(*[said()] * 9)
    stage = stuck.after(61)
    (last,) = stage.events()
    assert last["error"] == "stream_deadline"
    assert stage.names() == [("answer_cut", "stream_deadline")]


def test_a_write_of_a_moment_is_not_stuck(stuck_of, monkeypatch):
    monkeypatch.setattr(Meter, "is_growing", True)
    stuck = stuck_of(*[said()] * 9)
    assert stuck.after(0.05).answer._reader is None
    next(stuck.stage.sent)
    assert stuck.after(0.09).answer._reader is None
    stuck.stage.answer.close()


def test_who_comes_back_from_its_client_while_it_is_looked_after_reads_itself(stuck_of, monkeypatch):
    """Two would read the upstream otherwise."""
    stuck = stuck_of(said(), said(), said())
    stage = stuck.stage

    def comes_back(_meter):
        # After the look at how long it has waited, and before another reader has the turn.
        assert stage.answer._take_turn() is None
        return True

    monkeypatch.setattr(Meter, "is_growing", property(comes_back))
    assert stuck.after(30).answer._reader is None
    assert stage.upstream.reads == 1
    stage.answer._turn_to_read.append(True)
    stage.answer.close()


def test_under_slices_it_is_read_on_and_kept_for_the_client(stuck_of, monkeypatch):
    monkeypatch.setattr(Meter, "is_growing", True)
    stuck = stuck_of(said("a"), said("b"), NOTHING, said("c"), usage=Usage(70, 3))
    stage = stuck.after(0.2)
    wait_until(lambda: stage.booked == Usage(70, 3).cost_nanousd(PRICE), 5, "it is settled, and nobody reads")
    sent = stage.read()
    assert HEARTBEAT not in sent
    *shown, last = parse_events(b"".join(sent))
    assert (texts(shown), last["status"]) == (["b", "c"], "complete")
    assert stage.names() == []


def test_what_is_kept_is_bounded_and_the_answer_ends_there(stuck_of, monkeypatch):
    monkeypatch.setattr(Meter, "is_growing", True)
    monkeypatch.setattr(answer_module, "_MAX_UNREAD_BYTES", 500)
    stuck = stuck_of(*[said("x" * 100)] * 9, usage=Usage(70, 9))
    stage = stuck.after(0.2)
    wait_until(lambda: stage.booked == Usage(70, 9).cost_nanousd(PRICE), 5, "it is read on for its usage")
    *shown, last = stage.events()
    # Each has 40 bytes around it; the fourth exceeds what is kept.
    assert (len(shown), last["status"], last["finish_reason"]) == (4, "complete", "length")
    assert stage.names() == [("answer_cut", "unread")]


def test_what_was_taken_makes_place(stuck_of, monkeypatch):
    monkeypatch.setattr(Meter, "is_growing", True)
    monkeypatch.setattr(answer_module, "_MAX_UNREAD_BYTES", 200)
    steps = [threading.Event() for _ in range(8)]
    stuck = stuck_of(*[item for step in steps for item in (said("x" * 100), step)], usage=Usage(70, 8))
    stage = stuck.after(0.2)
    for step in steps:
        step.set()
        if step is not steps[-1]:
            assert texts(parse_events(next(sent for sent in stage.sent if sent is not HEARTBEAT))) == ["x" * 100]
    *_, last = stage.events()
    assert (last["status"], last["finish_reason"]) == ("complete", "stop")


def test_one_that_leaves_while_it_is_read_on_for_is_settled_by_its_usage(stuck_of, monkeypatch):
    monkeypatch.setattr(Meter, "is_growing", True)
    go_on = threading.Event()
    stuck = stuck_of(said(), go_on, said(), usage=Usage(70, 2))
    stage = stuck.after(0.2)
    assert stage.upstream.waits.wait(5)
    leaving = threading.Thread(target=stage.answer.close)
    leaving.start()
    wait_until(lambda: stage.answer._has_left, 5, "it has left")
    go_on.set()
    leaving.join(5)
    assert stage.booked == Usage(70, 2).cost_nanousd(PRICE)
    assert stage.names() == [("client_left", True)]


def test_a_response_that_is_never_sent_is_settled_at_the_deadline():
    stage = opened(said(), clock=HandClock())
    stage.clock.seconds = 61.0
    stage.under_way.look_after()
    wait_until(lambda: stage.booked == WHOLE, 5, "it is settled")


def test_what_is_kept_ends_the_answer_and_a_budget_that_runs_out_then_ends_the_upstream(monkeypatch):
    """Otherwise a client that does not read could let it generate beyond every limit."""
    monkeypatch.setattr(answer_module, "_MAX_UNREAD_BYTES", 200)
    stuck = Stuck(*[said("x" * 100)] * 5, said("last"), *[said("more")] * 50)
    meter = Refusing(monkeypatch, "last")
    monkeypatch.setattr(Meter, "is_growing", True)
    stage = stuck.after(0.2)
    wait_until(lambda: stage.booked == WHOLE, 5, "it is settled")
    assert (stage.upstream.hang_ups, meter.counted[-1]) == (1, "last")
    assert stage.names() == [("answer_cut", "unread")]
    stage.answer.close()
    stuck.here.close()
    stuck.there.close()


def test_a_response_that_nobody_sent_is_forgotten_and_its_connection_left_alone():
    stage = opened(said(), clock=HandClock())
    here, there = socket.socketpair()
    with here, there:
        stage.answer._connection = here
        for seconds in (61.0, 64.0):
            stage.clock.seconds = seconds
            stage.under_way.look_after()
            wait_until(lambda: stage.booked == WHOLE, 5, "it is settled")
        assert stage.under_way.wait(0)
        here.sendall(b"x")
        assert there.recv(1) == b"x"


def test_a_connection_that_makes_no_second_handle_is_hung_up_on_as_well(stuck_of):
    """As an encrypted one."""
    stuck = stuck_of(*[said()] * 9)
    stuck.stage.answer._connection = SimpleNamespace(fileno=stuck.here.fileno)
    stage = stuck.after(63)
    assert stuck.is_hung_up_on
    wait_until(lambda: stage.booked == WHOLE, 5, "it is settled")
    stage.answer.close()


def test_a_bug_at_one_answer_neither_ends_the_watch_nor_keeps_others_running(stuck_of, monkeypatch):
    class Broken:
        def look_after(self):
            raise ZeroDivisionError

        stop = look_after

    stuck = stuck_of(*[said()] * 9)
    under_way = stuck.stage.under_way
    for _ in range(8):
        under_way.add(Broken())
    stage = stuck.after(61)
    wait_until(lambda: stage.booked == WHOLE, 5, "it is settled")
    assert under_way._watcher.is_alive()
    under_way.stop()
    assert stage.answer._is_stopped
    monkeypatch.setattr(stage.answer, "_look_after", Broken().look_after)
    under_way.look_after()
    assert stage.names()[-1] == ("unexpected_error", None)
    stage.answer.close()


# --- the server stops


def test_a_stop_gives_a_last_event_in_place_of_the_rest():
    stage = opened(said(), threading.Event(), said())
    next(stage.sent)
    stopper = threading.Thread(target=lambda: stage.upstream.waits.wait(5) and stage.under_way.stop())
    stopper.start()
    (last,) = stage.events()
    stopper.join()
    assert (last["error"], nanousd(last["cost_usd"])) == ("server_stopping", WHOLE)
    assert stage.under_way.wait(0)
    assert stage.names() == [("answer_cut", "server_stopping")]


def test_what_came_with_a_stop_is_counted_and_an_answer_that_is_over_by_then_is_whole():
    stage = opened(said("a"), said("b"), clock=HandClock())
    next(stage.sent)
    stage.upstream.read = lambda _: stage.under_way.stop() or said("b", tokens=300)
    (last,) = stage.events()
    assert (last["error"], last["usage"]["output_tokens"]) == ("server_stopping", 301)
    over = opened(clock=HandClock())
    over.upstream.read = lambda _: over.under_way.stop() or said("all", is_last=True)
    assert [event["status"] for event in over.events()] == ["streaming", "complete"]


def test_a_stop_settles_also_where_the_client_does_not_read(stuck_of):
    stuck = stuck_of(said(), said())
    stuck.stage.under_way.stop()
    stage = stuck.after(0.2)
    wait_until(lambda: stage.booked == WHOLE, 5, "it is settled")
    assert [event["error"] for event in stage.events()] == ["server_stopping"]


def test_a_stop_ends_a_drain():
    stage = opened(said(), threading.Event())
    next(stage.sent)
    leaving = threading.Thread(target=stage.answer.close)
    leaving.start()
    assert stage.upstream.waits.wait(5)
    stage.under_way.stop()
    leaving.join(5)
    assert not leaving.is_alive()
    assert stage.booked == WHOLE
    assert stage.names() == [("client_left", False)]


def test_in_a_stop_the_model_is_not_asked():
    stage = stage_of(opening=ZeroDivisionError())
    stage.under_way.stop()
    response = stage.answer.stream(ChatStreamFormat("rid"))
    assert (response.status_code, response.json["reason"], response.json["cost_usd"]) == (
        502,
        "not_taken",
        "0.000000000",
    )
    assert stage.booked == 0
    assert stage.under_way.wait(0)


@pytest.mark.parametrize("way", ["stream", "whole"])
def test_a_stop_ends_the_wait_for_the_model(way):
    stage = stage_of(opening=threading.Event())
    stopper = threading.Thread(target=lambda: stage.upstream.waits.wait(5) and stage.under_way.stop())
    stopper.start()
    response = getattr(stage.answer, way)(None)
    stopper.join()
    assert (response.status_code, response.json["reason"]) == (502, "broken")
    assert response.json["message"] == "The server is stopping, and the model had not answered yet."
    assert stage.booked == WHOLE
    assert stage.under_way.wait(0)


# --- the model fails before it answers


@pytest.mark.parametrize("way", ["stream", "whole"])
@pytest.mark.parametrize(
    ("failure", "status", "booked"),
    [
        (UpstreamNotTaken("no", status=429), 502, 0),
        (UpstreamBroken("oh"), 502, WHOLE),
        (UpstreamBroken("late", timed_out=True), 504, WHOLE),
    ],
)
def test_a_failure_is_a_problem_and_it_is_settled(way, failure, status, booked):
    stage = stage_of(opening=failure)
    response = getattr(stage.answer, way)(None)
    assert (response.status_code, nanousd(response.json["cost_usd"]), stage.booked) == (status, booked, booked)
    assert response.headers["X-Mine"] == "1"
    assert stage.under_way.wait(0)
    assert stage.names() == [("upstream_failed", None)]


@pytest.mark.parametrize("way", ["stream", "whole"])
@pytest.mark.parametrize("failure", [ZeroDivisionError(), SystemExit()])
def test_whatever_else_happens_the_whole_reservation_is_booked(way, failure):
    stage = stage_of(opening=failure)
    with pytest.raises(type(failure)):
        getattr(stage.answer, way)(None)
    assert stage.booked == WHOLE
    assert stage.under_way.wait(0)


@pytest.mark.parametrize(("usage", "tokens"), [(Usage(70, 4), 4), (None, 25)])
def test_a_whole_answer_is_settled_by_its_usage_or_by_what_was_seen(app, usage, tokens):
    stage = stage_of(usage=usage)
    response = stage.answer.whole(lambda completed: app.app.make_response(completed.body))
    assert response.headers["X-Mine"] == "1"
    assert stage.booked == (usage or Usage(77, tokens)).cost_nanousd(PRICE)
    assert stage.under_way.wait(0)
