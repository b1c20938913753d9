"""What it takes to refuse a body, in counts that are never noisy. `python -m benchmarks.refusals` measures the time."""

import sys

import pytest

from benchmarks.refusals import corpus, environment
from flaskapp.config import load_config
from flaskapp.factory import create_app

MOST_CALLS = 200_000
"""Of functions of Python and of C, by one refusal: about 50 ns each. Without the scan a list takes a million."""
CORPUS = {sent.name: sent for sent in corpus()}


@pytest.fixture(scope="module")
def client(redis_server):
    return create_app(load_config(environment(redis_server.url))).test_client()


@pytest.mark.parametrize("name", CORPUS)
def test_a_refusal_takes_no_more_calls_than_it_may(client, name):
    sent, calls = CORPUS[name], 0

    def count(_frame, event, _argument):
        nonlocal calls
        calls += event in {"call", "c_call"}

    headers = {"X-Fingerprint": "visitor", "Content-Type": sent.media_type}
    sys.setprofile(count)
    try:
        response = client.post(sent.path, data=sent.body, headers=headers, buffered=True)
    finally:
        sys.setprofile(None)
    assert 400 <= response.status_code < 500
    assert calls <= MOST_CALLS
