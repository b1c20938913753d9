import json
import socket
import threading

import pytest

from backends.clock import SystemClock
from flaskapp.llm import UpstreamBroken, Usage
from flaskapp.llm.completion import Completion, ErrorEvent, read_whole, tokens_of_whole, usage_of_whole
from flaskapp.llm.event_stream import ServerEvent
from flaskapp.llm.openai_compatible import OpenAICompatibleModel
from tests.models import model_request


def said(text="", *, index=0, finish=None, output=None, **others):
    choice = {"index": index, "delta": {"content": text} if text else {}, "finish_reason": finish, **others}
    usage = None if output is None else {"prompt_tokens": 7, "completion_tokens": output}
    return {"choices": [choice], "usage": usage}


def taken(*chunks, choices=1, done=False):
    completion = Completion(choices=choices)
    for chunk in chunks:
        completion.take(ServerEvent("", json.dumps(chunk)))
    if done:
        completion.take(ServerEvent("", "[DONE]"))
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


def test_a_usage_of_fewer_tokens_than_there_were_steps_is_that_of_the_steps():
    words = [said(word) for word in "abcde"]
    assert taken(*words, said(finish="stop", output=1)).usage == Usage(7, 5)
    assert taken(*words, said(finish="stop", output=6)).usage == Usage(7, 6)


def test_the_words_of_the_older_api_are_generated_too():
    completion = Completion(lambda text: len(text.split()))
    old = {"choices": [{"index": 0, "text": "three more words"}]}
    piece = completion.take(ServerEvent("", json.dumps(old)))
    assert (piece.deltas, piece.tokens, piece.text) == (1, 3, "")


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
    """A server whose answer has neither a length nor chunks: it says its events and then waits for the other to go."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        events = []

        def serve():
            connection, _ = server.accept()
            with connection:
                connection.recv(65_536)
                head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
                connection.sendall((head + "".join(f"data: {json.dumps(event)}\n\n" for event in events)).encode())
                if events[-1] != ONE_OF_TWO[-1]:
                    connection.recv(1)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        model = OpenAICompatibleModel(f"http://127.0.0.1:{server.getsockname()[1]}/v1", clock=SystemClock())
        yield model, events
        model.close()
        thread.join(5)


def test_a_stream_that_closes_before_its_second_choice_has_ended_broke_off(without_a_length):
    model, events = without_a_length
    events += ONE_OF_TWO
    answer = model.open(model_request((), choices=2))
    with pytest.raises(UpstreamBroken, match="broke off"):
        list(answer)
    assert answer.usage is None


def test_our_hanging_up_is_not_taken_for_the_end_of_the_answer(without_a_length):
    model, events = without_a_length
    # All choices have ended, but the usage for both of them is still to come.
    events += [*ONE_OF_TWO, said(index=1, finish="stop", output=3)]
    answer = model.open(model_request((), choices=2))
    pieces = iter(answer)
    for _ in events:
        next(pieces)
    answer.hang_up()
    assert list(pieces) == []
    assert answer.usage is None
