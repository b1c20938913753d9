import threading

import pytest

from backends.clock import SystemClock
from flaskapp.answers.upstream_reader import DeadlinePassed, Next, UpstreamReader
from flaskapp.llm import UpstreamBroken, Usage
from flaskapp.llm.builtin import BuiltinModel
from flaskapp.llm.openai_compatible import OpenAICompatibleModel
from tests.models import Texts, model_request
from tests.upstream import WORDS, Upstream


class Answer:
    """Gives its items; an event is waited for, an exception raised."""

    finish_reason = "stop"

    def __init__(self, *items):
        self.items = items
        self.handed_out = 0
        self.closed = threading.Event()
        self.sixth = threading.Event()

    @property
    def usage(self):
        return Usage(1, self.handed_out)

    def __iter__(self):
        for item in self.items:
            if isinstance(item, threading.Event):
                while not item.wait(0.005):
                    if self.closed.is_set():
                        return
            elif isinstance(item, BaseException):
                raise item
            else:
                if self.closed.is_set():
                    return
                self.handed_out += 1
                if self.handed_out == 6:
                    self.sixth.set()
                yield item

    def hang_up(self):
        self.close()

    def close(self):
        self.closed.set()


class HandClock:
    def __init__(self):
        self.seconds = 0.0

    def monotonic_seconds(self):
        return self.seconds


@pytest.fixture
def reader_of():
    readers = []

    def make(answer, *, clock=None, deadline_seconds=60.0, heartbeat_seconds=1.0, capacity=64, max_unread=None):
        clock = clock or SystemClock()
        reader = UpstreamReader(
            answer,
            clock=clock,
            deadline_at_seconds=clock.monotonic_seconds() + deadline_seconds,
            heartbeat_seconds=heartbeat_seconds,
            capacity=capacity,
            max_unread_characters=max_unread,
        )
        readers.append(reader)
        return reader

    yield make
    for reader in readers:
        reader.close()
        assert reader.is_over
        reader._thread.join(5)
        assert not reader._thread.is_alive()


def test_everything_in_order_and_then_the_end(reader_of):
    answer = Answer(*"abcdefgh" * 100)
    assert list(reader_of(answer, capacity=3)) == list("abcdefgh" * 100)
    assert answer.closed.wait(5)


def test_silence_gives_heartbeats(reader_of):
    go_on = threading.Event()
    received = []
    for piece in reader_of(Answer("a", go_on, "b"), heartbeat_seconds=0.01):
        received.append(piece)
        if received.count(None) == 3:
            go_on.set()
    assert received[0] == "a"
    assert received[-1] == "b"
    assert set(received[1:-1]) == {None}
    assert received.count(None) >= 3


def test_a_failure_comes_after_what_came_before_it(reader_of):
    received = []
    with pytest.raises(UpstreamBroken, match="oh"):
        received.extend(reader_of(Answer("a", "b", UpstreamBroken("oh"))))
    assert received == ["a", "b"]


def test_a_bug_is_not_swallowed(reader_of):
    with pytest.raises(ZeroDivisionError):
        list(reader_of(Answer("a", ZeroDivisionError())))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_reader_that_is_killed_does_not_look_like_a_whole_answer(reader_of):
    reader = reader_of(Answer("a", SystemExit()))
    with pytest.raises(UpstreamBroken):
        list(reader)
    # Its thread dies with the exception, which pytest must find here and not in the next test.
    reader._thread.join(5)


def test_the_deadline_cuts_a_silent_answer(reader_of):
    answer = Answer("a", threading.Event())
    with pytest.raises(DeadlinePassed):
        list(reader_of(answer, deadline_seconds=0.05))
    assert answer.closed.is_set()


def test_the_deadline_cuts_an_answer_that_never_pauses(reader_of):
    clock = HandClock()
    answer = Answer(*["x"] * 100_000)
    received = []

    def read():
        for piece in reader_of(answer, clock=clock, deadline_seconds=10):
            received.append(piece)
            clock.seconds += 1

    with pytest.raises(DeadlinePassed):
        read()
    assert len(received) == 10
    assert answer.closed.is_set()
    assert answer.handed_out <= 10 + 64 + 2


def test_a_time_out_of_the_upstream_is_the_deadline(reader_of):
    with pytest.raises(DeadlinePassed):
        list(reader_of(Answer("a", UpstreamBroken("late", timed_out=True))))


def test_a_client_that_stops_reading_does_not_keep_the_upstream_beyond_the_deadline(reader_of):
    answer = Answer(*["x"] * 100)
    reader = reader_of(answer, deadline_seconds=0.05, capacity=4)
    assert answer.closed.wait(5)
    reader._thread.join(5)
    assert reader.is_over
    assert answer.handed_out == 5  # four in the queue, one in the hand
    with pytest.raises(DeadlinePassed):
        list(reader)


def test_where_it_may_not_wait_it_reads_on_while_pieces_are_not_taken(reader_of):
    answer = Answer(*["x"] * 100)
    reader = reader_of(answer, capacity=4, max_unread=10_000)
    assert reader.wait(5)
    assert answer.handed_out == 100
    assert list(reader) == ["x"] * 100
    assert not reader.was_cut


def test_what_is_buffered_is_bounded_and_the_answer_ends_there(reader_of):
    answer = Answer(*["x" * 98] * 100)  # 100 characters each, as they are written
    reader = reader_of(answer, max_unread=1_000)
    assert reader.wait(5)
    assert answer.handed_out == 100, "it is read on for its usage"
    assert list(reader) == ["x" * 98] * 10
    assert reader.was_cut
    assert reader.has_overflowed


def test_what_was_taken_frees_the_buffer_and_one_piece_always_fits(reader_of):
    answer = Answer(*[step for _ in range(20) for step in ("x" * 998, threading.Event())])
    reader, received = reader_of(answer, max_unread=1_000), []
    for piece in reader:
        received.append(piece)
        answer.items[2 * len(received) - 1].set()
    assert received == ["x" * 998] * 20
    assert not reader.has_overflowed


def test_close_frees_a_reader_that_waits_for_a_place(reader_of):
    answer = Answer(*["x"] * 100)
    reader = reader_of(answer, capacity=4)
    assert next(iter(reader)) == "x"
    assert answer.sixth.wait(5)  # one taken, four in the queue, and one for which there is no place
    reader.close()
    assert reader.is_over
    assert answer.handed_out == 6


def test_close_frees_a_reader_that_waits_for_the_upstream(reader_of):
    reader = reader_of(Answer("a", threading.Event()))
    assert next(iter(reader)) == "a"
    reader.close()
    assert reader.is_over


def test_a_reader_without_a_consumer_can_be_closed(reader_of):
    answer = Answer(threading.Event())
    reader_of(answer).close()
    assert answer.closed.is_set()


def test_the_builtin_model_counts_what_it_generated_and_not_what_was_read(reader_of):
    clock = SystemClock()
    model = BuiltinModel(0, clock=clock)
    answer = Texts(model.open(model_request(model="m")))
    reader = reader_of(answer, capacity=10)
    pieces = iter(reader)
    assert [next(pieces) for _ in range(3)]
    reader.close()
    usage = answer.usage
    assert 3 <= usage.output_tokens <= 3 + 10 + 2
    assert answer.usage == usage


def test_a_whole_builtin_answer(reader_of):
    answer = BuiltinModel(0, clock=SystemClock()).open(model_request())
    pieces = list(reader_of(answer))
    assert answer.usage == Usage(9, sum(piece.deltas for piece in pieces))


def test_hanging_up_on_a_real_upstream(reader_of):
    with Upstream() as upstream:
        upstream.behave(wait_for=threading.Event())
        model = OpenAICompatibleModel(upstream.base_url, clock=SystemClock())
        answer = Texts(model.open(model_request(model="m")))
        reader = reader_of(answer, heartbeat_seconds=0.01)
        pieces = iter(reader)
        assert [next(pieces), next(pieces)] == [WORDS[0], None]
        reader.close()
        assert reader.is_over
        assert upstream.ledger[0].over.wait(5)
        assert upstream.ledger[0].client_left
        assert answer.usage is None
        assert model._pool._requests == []
        model.close()


class Hung(Answer):
    """After a hang-up it gives two more pieces, which had come."""

    def __init__(self, *items):
        super().__init__(*items)
        self.hang_ups = 0
        self.is_hung_up = threading.Event()

    def __iter__(self):
        for item in super().__iter__():
            yield item
            if self.is_hung_up.is_set():
                yield from ("late", "later")
                return

    def hang_up(self):
        self.hang_ups += 1
        self.is_hung_up.set()


def read_all(answer, following):
    """What was read, what was handed out, and what `on_end` got."""
    pieces, ended = [], []

    def on_piece(piece):
        pieces.append(piece)
        return following.get(piece, Next.CONTINUE)

    clock = SystemClock()
    reader = UpstreamReader(
        answer, clock=clock, deadline_at_seconds=clock.monotonic_seconds() + 60, on_piece=on_piece, on_end=ended.append
    )
    received = [piece for piece in reader if piece is not None]
    assert reader.wait(5)
    return pieces, received, ended


def test_after_a_hang_up_what_had_come_is_counted_and_not_handed_out():
    answer = Hung("a", "b", "c", "d")
    stops = dict.fromkeys(("b", "late", "later"), Next.HANG_UP)
    pieces, received, ended = read_all(answer, stops)
    assert (pieces, received, ended) == (["a", "b", "late", "later"], ["a", "b"], [True])
    assert answer.hang_ups == 1
    assert answer.closed.is_set()


def test_it_reports_that_not_all_was_read_where_the_rest_broke_off():
    answer = Hung("a", UpstreamBroken("oh"))
    ended = []
    clock = SystemClock()
    reader = UpstreamReader(
        answer, clock=clock, deadline_at_seconds=clock.monotonic_seconds() + 60, on_end=ended.append
    )
    with pytest.raises(UpstreamBroken):
        list(reader)
    assert (reader.wait(5), ended) == (True, [False])


def test_it_reports_that_not_all_was_read_where_it_was_closed():
    ended = []
    clock = SystemClock()
    ends = clock.monotonic_seconds() + 60
    reader = UpstreamReader(Answer("a", threading.Event()), clock=clock, deadline_at_seconds=ends, on_end=ended.append)
    assert next(iter(reader)) == "a"
    reader.close()
    assert (reader.wait(5), ended) == (True, [False])
