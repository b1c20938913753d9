import json
import socket
import threading

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from backends.clock import SystemClock
from backends.pricing.token_bounds import counter_for
from flaskapp.llm import UpstreamBroken, Usage
from flaskapp.llm.completion import Completion, ErrorEvent, read_whole, tokens_of_whole, usage_of_whole
from flaskapp.llm.event_stream import MAX_EVENT_BYTES, ServerEvent
from flaskapp.llm.openai_compatible import OpenAICompatibleModel
from tests.models import model_request, opened, piece_in, pieces_in, pieces_of


def said(text="", *, index=0, finish=None, output=None, **others):
    choice = {"index": index, "delta": {"content": text} if text else {}, "finish_reason": finish, **others}
    usage = None if output is None else {"prompt_tokens": 7, "completion_tokens": output}
    return {"choices": [choice], "usage": usage}


def taken(*chunks, choices=1, done=False):
    completion = Completion(choices=choices)
    for chunk in chunks:
        pieces_in(completion, chunk)
    if done:
        pieces_in(completion, b"[DONE]")
    return completion


ONE_OF_TWO = (
    said("a", index=0, output=1),
    said("b", index=1, output=2),
    said(index=0, finish="stop", output=2),
    said("c", index=1, output=3),
)


def test_the_end_of_one_choice_is_not_the_end_of_the_answer():
    half = taken(*ONE_OF_TWO, choices=2)
    assert not half.ended
    assert half.usage is None
    whole = taken(*ONE_OF_TWO, said(index=1, finish="stop", output=3), choices=2)
    assert whole.ended
    assert whole.usage == Usage(7, 3)
    assert taken(*ONE_OF_TWO, choices=2, done=True).usage == Usage(7, 3)


def test_what_is_said_after_its_end_takes_the_end_back():
    more = [said("a", finish="stop", output=1), said("b", output=2)]
    assert taken(*more).usage is None
    assert taken(*more, said(finish="stop", output=2)).usage == Usage(7, 2)


def test_a_usage_is_believed_unless_it_says_nothing():
    words = [said(word) for word in "abcde"]
    assert taken(*words, said(finish="stop", output=1)).usage == Usage(7, 1)
    assert taken(*words, said(finish="stop", output=0)).usage is None


@pytest.mark.parametrize(
    ("said_usage", "usage"),
    [
        ({"completion_tokens": 5, "total_tokens": 15}, Usage(10, 5)),
        ({"completion_tokens": 5}, Usage(10, 5)),
        ({"completion_tokens": 205, "completion_tokens_details": {"reasoning_tokens": 200}}, Usage(10, 205, 0, 0, 200)),
        # Beside the output, as some count it.
        ({"completion_tokens": 5, "completion_tokens_details": {"reasoning_tokens": 200}}, Usage(10, 205, 0, 0, 200)),
        (
            {"completion_tokens": 300, "total_tokens": 510, "completion_tokens_details": {"reasoning_tokens": 200}},
            Usage(10, 500, 0, 0, 200),
        ),
        # In the total alone, as Gemini tells it.
        ({"completion_tokens": 5, "total_tokens": 215}, Usage(10, 205)),
        ({"completion_tokens": 5.0, "total_tokens": 15.0}, Usage(10, 5)),
    ],
)
def test_what_was_thought_is_booked_wherever_it_is_counted(said_usage, usage):
    body = {"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": 10, **said_usage}}
    assert usage_of_whole(body) == usage


@pytest.mark.parametrize("none", ["", "null"])
def test_an_empty_finish_reason_is_none(none):
    assert not taken(said("a", finish=none, output=1)).ended
    assert taken(said("a", finish=none, output=1), said(finish="stop", output=1)).usage == Usage(7, 1)


def test_the_end_may_come_with_the_last_words():
    assert taken(said("a"), said("b", finish="stop", output=2)).usage == Usage(7, 2)


def test_more_choices_than_were_asked_for_have_to_end_too():
    chunks = [said("a", index=index) for index in range(3)] + [said(index=index, finish="stop") for index in range(2)]
    assert not taken(*chunks, choices=2).ended
    assert taken(*chunks, said(index=2, finish="stop"), choices=2).ended


SUMMARY = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}


def test_fewer_choices_than_were_asked_for_have_ended_where_they_are_summed_up():
    assert taken(said("a"), said(finish="stop"), SUMMARY, choices=2).usage == Usage(7, 3)
    assert not taken(said("a"), said(finish="stop"), choices=2).ended
    assert not taken(SUMMARY, said("a"), said(finish="stop"), choices=2).ended
    assert not taken(said("a"), SUMMARY, choices=2).ended


def test_of_two_usages_the_later_counts_unless_it_says_less():
    def last(output, cached=None):
        details = {} if cached is None else {"prompt_tokens_details": {"cached_tokens": cached}}
        return {"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": output, **details}}

    end = said(finish="stop")
    assert taken(said("a"), end, last(1), last(2, cached=90)).usage == Usage(100, 2, 90)
    assert taken(said("a"), end, last(2, cached=90), last(2)).usage == Usage(100, 2)
    assert taken(said("a"), end, last(2), last(1, cached=90)).usage == Usage(100, 2)


def test_a_usage_that_says_nothing_takes_nothing_back():
    assert taken(said("a"), said(finish="stop", output=1), {"choices": [], "usage": {}}).usage == Usage(7, 1)


@pytest.mark.parametrize(
    "delta",
    [
        {"role": "assistant", "content": ""},
        {"content": "", "provider_specific_fields": {"citations": ["u"]}},
        {"tool_calls": [{"index": 0, "id": "call-1", "type": "function", "function": {"arguments": ""}}]},
        {"annotations": [{"type": "url_citation", "url": "u"}]},
    ],
)
def test_what_is_no_text_was_not_generated(delta):
    completion = taken(said("a"), said(finish="stop", output=1))
    assert completion.count_tokens() == 1
    piece = piece_in(completion, {"choices": [{"index": 0, "delta": delta}]})
    assert (piece.deltas, completion.count_tokens()) == (0, 0)
    assert completion.usage == Usage(7, 1)


def test_what_was_generated_is_counted_together_and_choice_by_choice():
    words = Completion(lambda text: len(text.split()), choices=2)
    for text, index in (("to", 0), ("one ", 1), ("get", 0), ("two", 1), ("her", 0)):
        piece_in(words, said(text, index=index))
    assert words.count_tokens() == 1 + 2, "one word in three steps, and two words"
    assert words.count_tokens() == 0
    piece_in(words, said(" more", index=0))
    assert words.count_tokens() == 1


@pytest.mark.parametrize(
    ("choice", "is_plain"),
    [
        ({"index": 0, "delta": {"content": "x"}}, True),
        ({"delta": {"role": "assistant", "content": "x"}, "logprobs": None, "finish_reason": None}, True),
        ({"index": 1, "delta": {"content": "x"}}, False),
        ({"index": 0, "delta": {"content": "x"}, "finish_reason": "stop"}, False),
        ({"index": 0, "delta": {"content": "x"}, "text": "y"}, False),
        ({"index": 0, "delta": {"content": "x", "reasoning": "y"}}, False),
        ({"index": 0, "delta": {"content": ["x"]}}, False),
        ({"index": 0, "delta": {"content": ""}}, False),
    ],
)
def test_the_short_way_of_an_event_reads_the_same_as_the_long_one(choice, is_plain, monkeypatch):
    short, long = Completion(), Completion()
    piece = piece_in(short, {"choices": [choice]})
    monkeypatch.setattr("flaskapp.llm.completion._plain_text", lambda _: "")
    other = piece_in(long, {"choices": [choice]})
    assert (piece.is_plain, other.is_plain) == (is_plain, False)
    assert (piece.text, piece.deltas, piece.data) == (other.text, other.deltas, other.data)
    assert short.count_tokens() == long.count_tokens()
    assert (short._open, short._finished, short.ended) == (long._open, long._finished, long.ended)


PLAIN = b'{"id":"x","choices":[{"index":0,"delta":{"content":%b},"logprobs":null,"finish_reason":null}]}'


@pytest.mark.parametrize(
    "middle",
    [
        b'"a"', b' "a"', b'\n"a"', b' "a" ', b'""', b' ""', b'"" ', b'"a" "b"', b'"\\""', b'"\\\\"', b'"\xc3\xa9"',
        b'"a","content":"b"', b'"a"},"usage":{"x":"y"', b"7", b"null", b'"a', b'"\\ud800"', b'"\xff"', b"",
    ],
)  # fmt: skip
def test_an_event_like_the_one_before_is_read_as_if_there_had_been_none(middle):
    """Whatever stands where the text was."""
    data = PLAIN % middle
    after_others, alone = Completion(), Completion()
    for _ in range(3):
        piece_in(after_others, PLAIN % b'"before"')
    after_others.count_tokens()
    assert after_others._pattern._before
    outcomes = []
    for completion in (after_others, alone):
        try:
            piece = piece_in(completion, data)
        except ValueError as error:
            outcomes.append(type(error))
        else:
            outcomes.append((piece, completion.count_tokens()))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize(
    ("events", "is_learnt"),
    [
        ([{"content": "a"}], True),
        ([{"role": "assistant", "content": "a"}, {"content": "b"}], True),
        ([{"role": "a", "content": "a"}, {"role": "b", "content": "b"}, {"content": "c"}], False),
    ],
)
def test_the_pattern_is_looked_for_at_most_twice(events, is_learnt):
    completion = Completion()
    for delta in events:
        piece_in(completion, {"choices": [{"index": 0, "delta": delta}]})
    following = ServerEvent("", json.dumps({"choices": [{"index": 0, "delta": {"content": "x"}}]}).encode())
    assert (completion._pattern.texts_in([following], 0) == ["x"]) == is_learnt


def test_events_that_are_alike_are_one_piece_and_what_is_between_stays_in_its_place():
    completion = Completion(lambda text: len(text.split()))
    events = [PLAIN % b'"%b "' % word for word in (b"one", b"two", b"three", b"four", b"five")]
    finish = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    pieces = pieces_in(completion, *events[:3], PLAIN % b'""', events[3], finish, events[4], b"[DONE]", events[0])
    assert [(piece.text, piece.deltas) for piece in pieces] == [
        ("one ", 1), ("two three ", 2), ("", 0), ("four ", 1), ("", 0), ("five ", 1),
    ]  # fmt: skip
    assert pieces[1].data == events[1] + b"\n\ndata: " + events[2]
    assert [piece.is_plain for piece in pieces] == [True, True, False, True, False, True]
    assert completion.count_tokens() == 5
    assert completion.done


def test_one_text_does_not_reach_into_the_next():
    """Joined with a comma alone, these two would be two other strings."""
    with pytest.raises(ValueError, match="Expecting"):
        pieces_in(taken(), PLAIN % b'"first"', PLAIN % b'"a\\"', PLAIN % b'","x"')


@given(st.lists(st.sampled_from([b'"a"', b'"', b'","', b'"a\\"', b'","x"', b'"a","b"', b"", b'"\\""', b"1", b'"a'])))
def test_whatever_stands_where_texts_were_is_read_as_if_each_had_come_alone(middles):
    together, alone = Completion(), Completion()
    for completion in (together, alone):
        pieces_in(completion, PLAIN % b'"first"')
    whole, parts, failed = [], [], []
    for completion, batches, into in (
        (together, [middles], whole),
        (alone, [[middle] for middle in middles], parts),
    ):
        try:
            for batch in batches:
                completion.read([ServerEvent("", PLAIN % middle) for middle in batch], into)
        except ValueError as error:
            failed.append(type(error))
    assert len(failed) in {0, 2}
    assert "".join(piece.text for piece in whole) == "".join(piece.text for piece in parts)
    assert sum(piece.deltas for piece in whole) == sum(piece.deltas for piece in parts)
    assert together.count_tokens() == alone.count_tokens()


WHOLE = b"data: %b\n\n"
MIDDLES = [
    b'"a"', b'"b c"', b'"\\""', b' "a"', b'\n"a"', b'"a"\n', b'\r"a"', b'"a"\r\n', b'"a\nb"', b'""', b' ""', b'"a","b"',
    b'"', b'","', b'"a\\"', b'","x"', b"", b"1", b"null", b'"\\ud800"', b'"\xff"',
    b'"a"}}]}\n\ndata: {"x":[{"y":{"z":"b"',
]  # fmt: skip


@given(st.lists(st.sampled_from(MIDDLES), min_size=1, max_size=4))
@example([b'"a"', b'"b"'])
def test_a_read_of_events_that_are_alike_gives_what_reading_each_of_them_gives(middles):
    model = OpenAICompatibleModel("http://127.0.0.1:1", clock=SystemClock())
    outcomes, received = [], b"".join(WHOLE % (PLAIN % middle) for middle in middles)
    for is_quick in (True, False):
        answer = model.ask(model_request())
        answer._parsed(WHOLE % (PLAIN % b'"first"'))
        if not is_quick:
            answer._completion.read_alike = lambda _: None
        batch = answer._parsed(received)
        text = "".join(piece.text for piece in batch.pieces)
        deltas = sum(piece.deltas for piece in batch.pieces)
        outcomes.append((text, deltas, batch.tokens, type(answer._failure), answer._events.is_between_events))
    assert outcomes[0] == outcomes[1]


def test_events_that_are_alike_are_passed_on_as_they_came():
    completion = Completion(lambda text: len(text.split()))
    piece_in(completion, PLAIN % b'"first"')
    two = (PLAIN % b'" one"', PLAIN % b'" two"')
    piece = completion.read_alike(b"".join(WHOLE % data for data in two))
    assert (piece.texts, piece.data, piece.is_plain) == ([" one", " two"], b"\n\ndata: ".join(two), True)
    assert completion.read_alike(WHOLE % (PLAIN % b'""')) is None
    assert completion.read_alike(WHOLE % two[0] + b"data: [DONE]\n\n") is None
    assert completion.read_alike(WHOLE % (PLAIN % (b'"%b"' % (b"x" * MAX_EVENT_BYTES)))) is None


@pytest.mark.parametrize("model", ["gpt-4o", "llama-3.3-70b"])
def test_halves_of_a_surrogate_pair_are_counted(model):
    completion = Completion(counter_for(model))
    pieces_in(completion, PLAIN % b'"\\ud83d"', PLAIN % b'"\\ude00"')
    assert 1 <= completion.count_tokens() <= 3
    assert piece_in(completion, PLAIN % b'"\\ud83d"').text == "\ud83d"
    assert 0 <= completion.count_tokens() <= 3


def test_a_content_elsewhere_is_not_taken_for_the_text():
    completion = Completion()
    chunk = b'{"note":{"content":"%b"},"choices":[{"index":0,"delta":{"content":"%b"}}]}'
    for note, text in ((b"a", b"b"), (b"c", b"b"), (b"d", b"e")):
        assert piece_in(completion, chunk % (note, text)).text == text.decode()
    assert completion._pattern._before == b""


@pytest.mark.parametrize(
    ("data", "is_passed_on"),
    [(b'{"a":1}', True), (b'{"a":\n1}', False), (b'{"a":"\\ud800"}', False), (b'{"a":"\xff"}', False)],
)
def test_only_clean_json_of_one_line_is_passed_on_as_it_came(data, is_passed_on):
    piece = piece_in(Completion(), data)
    assert piece.data == (data if is_passed_on else b"")
    assert list(piece.chunk) == ["a"]


def test_a_content_in_parts_shows_its_texts():
    content = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "Yes"}]
    completion = Completion()
    piece = piece_in(completion, {"choices": [{"index": 0, "delta": {"content": content}}]})
    assert (piece.text, completion.count_tokens()) == ("Yes", len("hmYes"))


def test_the_words_of_the_older_api_are_generated_too():
    completion = Completion(lambda text: len(text.split()))
    old = {"choices": [{"index": 0, "text": "three more words"}]}
    piece = piece_in(completion, old)
    assert (piece.deltas, completion.count_tokens(), piece.text) == (1, 3, "")


@pytest.mark.parametrize("error", [{"error": {"message": "no"}}, {"object": "error", "message": "no", "code": 500}])
def test_an_error_is_none_of_the_answer_in_whatever_words(error):
    with pytest.raises(ErrorEvent):
        taken(error)
    with pytest.raises(ErrorEvent, match="no"):
        read_whole(json.dumps(error).encode())


def test_what_was_generated_of_a_whole_answer_is_counted_in_all_its_choices():
    call = {"id": "call-1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = [{"role": "assistant", "content": "one two"}, {"role": "assistant", "tool_calls": [call]}]
    body = {"choices": [{"index": number, "message": message} for number, message in enumerate(messages)]}
    assert usage_of_whole(body) is None
    assert tokens_of_whole(body, len) == len("one two") + len("weather{}")


@pytest.fixture
def without_a_length():
    """A server whose answer has neither a length nor chunks. It sends its events, and closes after them or waits."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        events, may_close = [], threading.Event()

        def serve():
            connection, _ = server.accept()
            with connection:
                # All of it: to close with something unread is a reset, and no clean end.
                request = b""
                while not request.endswith(b"}"):
                    request += connection.recv(65_536)
                head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
                connection.sendall((head + "".join(f"data: {json.dumps(event)}\n\n" for event in events)).encode())
                may_close.wait(10)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        model = OpenAICompatibleModel(f"http://127.0.0.1:{server.getsockname()[1]}/v1", clock=SystemClock())
        yield model, events, may_close
        may_close.set()
        model.close()
        thread.join(5)


def test_a_stream_that_closes_before_its_second_choice_has_ended_broke_off(without_a_length):
    model, events, may_close = without_a_length
    events += ONE_OF_TWO
    may_close.set()
    answer = opened(model, model_request((), choices=2))
    with pytest.raises(UpstreamBroken, match="broke off"):
        list(pieces_of(answer))
    assert answer.usage is None


HARDLY_ENDED = (*ONE_OF_TWO, said(index=1, finish="stop", output=3))
"""All choices have ended, but the usage for both of them is still to come."""


def test_our_closing_is_not_taken_for_the_end_of_the_answer_either(without_a_length):
    model, events, _ = without_a_length
    events += HARDLY_ENDED
    answer = opened(model, model_request((), choices=2))
    pieces, has_all = [], threading.Event()

    def read():
        for piece in pieces_of(answer):
            pieces.append(piece)
            if len(pieces) == len(events):
                has_all.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    assert has_all.wait(5)
    answer.close()
    reader.join(5)
    assert not reader.is_alive()
    assert answer.usage is None


def test_our_hanging_up_is_not_taken_for_the_end_of_the_answer(without_a_length):
    model, events, _ = without_a_length
    events += HARDLY_ENDED
    answer = opened(model, model_request((), choices=2))
    pieces = pieces_of(answer)
    for _ in events:
        next(pieces)
    answer.hang_up()
    assert list(pieces) == []
    assert answer.usage is None
