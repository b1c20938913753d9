"""What the Python clients have in common: questions come as lines of JSON on stdin, and answers go out on stdout.

It runs in the client's own environment, so it imports nothing else.
"""

import contextlib
import json
import os
import sys
from types import SimpleNamespace

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "What it is like outside.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def serve(**ways):
    """Each way is a function of the question and of a list for the pieces of text that it has got so far."""
    # What a library prints by itself is no answer.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        question, pieces = json.loads(line), []
        question = SimpleNamespace(**question, asked={"role": "user", "content": question["text"]})
        try:
            answer = {"text": ways[question.way](question, pieces)} if question.way in ways else {"is_absent": True}
        except Exception as error:  # noqa: BLE001 (whatever a client raises is the finding)
            answer = {"text": "".join(pieces), "error": described(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def described(error):
    """An exception as its user sees it; of a wrapped one the first cause that has a status."""
    chain, cause = [error], error
    while cause := (cause.__cause__ or cause.__context__):
        chain.append(cause)
    with_status = next((each for each in chain if status_of(each)), error)
    return {"class": type(error).__name__, "status": status_of(with_status), "message": str(error)[:2_000]}


def status_of(error):
    for place in (error, getattr(error, "response", None)):
        with contextlib.suppress(Exception):
            if isinstance(place.status_code, int):
                return place.status_code
    return None
