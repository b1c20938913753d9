"""Model requests of the tests, and answers whose pieces are the texts that they show."""

import json
from dataclasses import asdict

from flaskapp.llm import ModelRequest
from flaskapp.llm.event_stream import ServerEvent


def model_request(turns=(), *, model="gpt-4o", max_tokens=400, input_tokens=9, deadline_seconds=60.0, **more):
    return ModelRequest(model, [asdict(turn) for turn in turns], max_tokens, input_tokens, deadline_seconds, **more)


def opened(model, request):
    """The answer to `request`, once it has begun."""
    answer = model.ask(request)
    answer.open()
    return answer


def batches_of(answer, wait_seconds=30):
    """What each read gives, to the end."""
    while (batch := answer.read(wait_seconds)) is not None:
        yield batch


def pieces_of(answer, wait_seconds=30):
    """All pieces, to the end."""
    return (piece for batch in batches_of(answer, wait_seconds) for piece in batch.pieces)


def pieces_in(completion, *datas):
    """The pieces in events of one read; dictionaries are written as JSON."""
    events = [ServerEvent("", json.dumps(data).encode() if isinstance(data, dict) else data) for data in datas]
    pieces = []
    completion.read(events, pieces)
    return pieces


def piece_in(completion, data):
    """The piece in one event."""
    (piece,) = pieces_in(completion, data)
    return piece


class Texts:
    """An answer that iterates over the texts that are shown; all else is the answer's own."""

    def __init__(self, answer):
        self.answer = answer

    def __iter__(self):
        return (text for piece in pieces_of(self.answer) for text in piece.texts or (piece.text,) if text)

    def __getattr__(self, name):
        return getattr(self.answer, name)
