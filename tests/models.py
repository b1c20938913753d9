"""Model requests of the tests, and answers whose pieces are the texts that they show."""

from flaskapp.llm import ModelRequest


def model_request(turns=(), *, model="gpt-4o", max_tokens=400, input_tokens=9, deadline_seconds=60.0, **more):
    return ModelRequest(model, [turn.as_json() for turn in turns], max_tokens, input_tokens, deadline_seconds, **more)


class Texts:
    """An answer that iterates over the texts that are shown; all else is the answer's own."""

    def __init__(self, answer):
        self.answer = answer

    def __iter__(self):
        return (piece.text for piece in self.answer if piece.text)

    def __getattr__(self, name):
        return getattr(self.answer, name)
