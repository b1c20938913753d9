import threading

import pytest

from backends.clock import SystemClock
from flaskapp.answers.upstream_reader import DeadlinePassed, Silence, Take, UpstreamReader
from flaskapp.llm import UpstreamBroken, Usage
from flaskapp.llm.builtin import BuiltinModel
from flaskapp.llm.openai_compatible import OpenAICompatibleModel
from tests.models import Texts, model_request
from tests.upstream import WORDS, Upstream

HEARTBEAT = Silence.HEARTBEAT


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
def pump_of():
    pumps = []

    def make(answer, *, clock=None, deadline_seconds=60.0, heartbeat_seconds=1.0, capacity=64, most_unread=None):
        clock = clock or SystemClock()
        pump = UpstreamReader(
            answer,
            clock=clock,
            deadline_at_seconds=clock.monotonic_seconds() + deadline_seconds,
            heartbeat_seconds=heartbeat_seconds,
            capacity=capacity,
            most_unread_characters=most_unread,
        )
        pumps.append(pump)
        return pump

    yield make
    for pump in pumps:
        pump.close()
        assert pump.is_over
        pump._thread.join(5)
        assert not pump._thread.is_alive()


def test_everything_in_order_and_then_the_end(pump_of):
    answer = Answer(*"abcdefgh" * 100)
    assert list(pump_of(answer, capacity=3)) == list("abcdefgh" * 100)
    assert answer.closed.wait(5)


def test_silence_is_told(pump_of):
    go_on = threading.Event()
    heard = []
    for piece in pump_of(Answer("a", go_on, "b"), heartbeat_seconds=0.01):
        heard.append(piece)
        if heard.count(HEARTBEAT) == 3:
            go_on.set()
    assert heard[0] == "a"
    assert heard[-1] == "b"
    assert set(heard[1:-1]) == {HEARTBEAT}
    assert heard.count(HEARTBEAT) >= 3


def test_a_failure_comes_after_what_came_before_it(pump_of):
    heard = []
    with pytest.raises(UpstreamBroken, match="oh"):
        heard.extend(pump_of(Answer("a", "b", UpstreamBroken("oh"))))
    assert heard == ["a", "b"]


def test_a_bug_is_not_swallowed(pump_of):
    with pytest.raises(ZeroDivisionError):
        list(pump_of(Answer("a", ZeroDivisionError())))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_reader_that_is_killed_does_not_look_like_a_whole_answer(pump_of):
    pump = pump_of(Answer("a", SystemExit()))
    with pytest.raises(UpstreamBroken):
        list(pump)
    # Its thread dies with the exception, which pytest must find here and not in the next test.
    pump._thread.join(5)


def test_the_deadline_cuts_a_silent_answer(pump_of):
    answer = Answer("a", threading.Event())
    with pytest.raises(DeadlinePassed):
        list(pump_of(answer, deadline_seconds=0.05))
    assert answer.closed.is_set()


def test_the_deadline_cuts_an_answer_that_never_stops_talking(pump_of):
    clock = HandClock()
    answer = Answer(*["x"] * 100_000)
    heard = []

    def read():
        for piece in pump_of(answer, clock=clock, deadline_seconds=10):
            heard.append(piece)
            clock.seconds += 1

    with pytest.raises(DeadlinePassed):
        read()
    assert len(heard) == 10
    assert answer.closed.is_set()
    assert answer.handed_out <= 10 + 64 + 2


def test_a_time_out_of_the_upstream_is_the_deadline(pump_of):
    with pytest.raises(DeadlinePassed):
        list(pump_of(Answer("a", UpstreamBroken("late", timed_out=True))))


def test_a_client_that_stops_reading_does_not_keep_the_upstream_beyond_the_deadline(pump_of):
    answer = Answer(*["x"] * 100)
    pump = pump_of(answer, deadline_seconds=0.05, capacity=4)
    assert answer.closed.wait(5)
    pump._thread.join(5)
    assert pump.is_over
    assert answer.handed_out == 5  # four in the queue, one in the hand
    with pytest.raises(DeadlinePassed):
        list(pump)


def test_where_it_may_not_wait_it_reads_on_while_nobody_takes_what_comes(pump_of):
    answer = Answer(*["x"] * 100)
    pump = pump_of(answer, capacity=4, most_unread=10_000)
    assert pump.wait(5)
    assert answer.handed_out == 100
    assert list(pump) == ["x"] * 100
    assert not pump.was_cut


def test_what_waits_is_bounded_and_the_answer_ends_there(pump_of):
    answer = Answer(*["x" * 98] * 100)  # 100 characters each, as they are written
    pump = pump_of(answer, most_unread=1_000)
    assert pump.wait(5)
    assert answer.handed_out == 100, "it is read on for its usage"
    assert list(pump) == ["x" * 98] * 10
    assert pump.was_cut
    assert pump.is_unread


def test_what_was_taken_makes_room_and_one_piece_always_has_it(pump_of):
    answer = Answer(*[step for _ in range(20) for step in ("x" * 998, threading.Event())])
    pump, heard = pump_of(answer, most_unread=1_000), []
    for piece in pump:
        heard.append(piece)
        answer.items[2 * len(heard) - 1].set()
    assert heard == ["x" * 998] * 20
    assert not pump.is_unread


def test_close_frees_a_reader_that_waits_for_room(pump_of):
    answer = Answer(*["x"] * 100)
    pump = pump_of(answer, capacity=4)
    assert next(iter(pump)) == "x"
    assert answer.sixth.wait(5)  # one taken, four in the queue, and one for which there is no service
    pump.close()
    assert pump.is_over
    assert answer.handed_out == 6


def test_close_frees_a_reader_that_waits_for_the_upstream(pump_of):
    pump = pump_of(Answer("a", threading.Event()))
    assert next(iter(pump)) == "a"
    pump.close()
    assert pump.is_over


def test_a_pump_that_nobody_reads_can_be_closed(pump_of):
    answer = Answer(threading.Event())
    pump_of(answer).close()
    assert answer.closed.is_set()


def test_the_builtin_model_counts_what_it_generated_and_not_what_was_read(pump_of):
    clock = SystemClock()
    model = BuiltinModel(0, clock=clock)
    answer = Texts(model.open(model_request(model="m")))
    pump = pump_of(answer, capacity=10)
    pieces = iter(pump)
    assert [next(pieces) for _ in range(3)]
    pump.close()
    usage = answer.usage
    assert 3 <= usage.output_tokens <= 3 + 10 + 2
    assert answer.usage == usage


def test_a_whole_builtin_answer(pump_of):
    answer = BuiltinModel(0, clock=SystemClock()).open(model_request())
    pieces = list(pump_of(answer))
    assert answer.usage == Usage(9, sum(piece.deltas for piece in pieces))


def test_hanging_up_on_a_real_upstream(pump_of):
    with Upstream() as upstream:
        upstream.behave(wait_for=threading.Event())
        model = OpenAICompatibleModel(upstream.base_url, clock=SystemClock())
        answer = Texts(model.open(model_request(model="m")))
        pump = pump_of(answer, heartbeat_seconds=0.01)
        pieces = iter(pump)
        assert [next(pieces), next(pieces)] == [WORDS[0], HEARTBEAT]
        pump.close()
        assert pump.is_over
        assert upstream.ledger[0].over.wait(5)
        assert upstream.ledger[0].client_left
        assert answer.usage is None
        assert model._pool._requests == []
        model.close()


class Hung(Answer):
    """Where it is hung up on, two more had come."""

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


def pumped(answer, verdicts):
    """What was taken, what was handed out, and what was said at its end."""
    taken, told = [], []

    def take(piece):
        taken.append(piece)
        return verdicts.get(piece, Take.MORE)

    clock = SystemClock()
    pump = UpstreamReader(
        answer, clock=clock, deadline_at_seconds=clock.monotonic_seconds() + 60, take=take, over=told.append
    )
    heard = [piece for piece in pump if piece is not HEARTBEAT]
    assert pump.wait(5)
    return taken, heard, told


def test_who_is_stopped_is_hung_up_on_and_what_had_come_is_counted_and_not_handed_out():
    answer = Hung("a", "b", "c", "d")
    stops = dict.fromkeys(("b", "late", "later"), Take.STOP)
    taken, heard, told = pumped(answer, stops)
    assert (taken, heard, told) == (["a", "b", "late", "later"], ["a", "b"], [True])
    assert answer.hang_ups == 1
    assert answer.closed.is_set()


def test_it_tells_that_not_all_was_read_where_the_rest_broke_off():
    answer = Hung("a", UpstreamBroken("oh"))
    told = []
    clock = SystemClock()
    pump = UpstreamReader(answer, clock=clock, deadline_at_seconds=clock.monotonic_seconds() + 60, over=told.append)
    with pytest.raises(UpstreamBroken):
        list(pump)
    assert (pump.wait(5), told) == (True, [False])


def test_it_tells_that_not_all_was_read_where_it_was_closed():
    told = []
    clock = SystemClock()
    ends = clock.monotonic_seconds() + 60
    pump = UpstreamReader(Answer("a", threading.Event()), clock=clock, deadline_at_seconds=ends, over=told.append)
    assert next(iter(pump)) == "a"
    pump.close()
    assert (pump.wait(5), told) == (True, [False])
