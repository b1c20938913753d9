"""What stops the start: one line, status 1, and nothing left running."""

import pytest

from tests.servers import Service

PRICES = {"LLM_PRICE_INPUT_USD_PER_MTOK": "1", "LLM_PRICE_OUTPUT_USD_PER_MTOK": "0"}


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        ({"LLM_MODEL": "no-such-model"}, ["LLM_MODEL", "no-such-model"]),
        ({"LLM_MODELS": "gpt-4o,text-moderation-latest"}, ["text-moderation-latest"]),
        (PRICES, ["LLM_PRICE_OUTPUT_USD_PER_MTOK", "0"]),
        ({"RESERVATION_POLICY": "guess"}, ["RESERVATION_POLICY", "guess"]),
        ({"API_KEYS": "secret key"}, ["API_KEYS"]),
        ({"THROTTLE_BACKEND": "memory"}, ["WEB_CONCURRENCY", "memory"]),
        ({"THROTTLE_BACKEND": "nobody"}, ["THROTTLE_BACKEND", "nobody"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_value_that_cannot_be_used_stops_the_start_with_one_line(tmp_path, environment, names):
    service = Service(tmp_path, "redis://127.0.0.1:1/0", **environment)
    process = service.launch()
    assert process.wait(15) == 1
    (line,) = [line for line in service.log_lines() if "[INFO]" not in line]
    assert all(name in line for name in names), line
    assert "secret" not in line
    assert "Traceback" not in service.log()
