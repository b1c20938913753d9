"""`flask doctor` beside a service that runs: what that has seen of proxies."""

import json
import subprocess
import sys

import pytest

from tests.servers import Service


def proxies_of(service):
    command = [sys.executable, "-m", "flask", "--app", "wsgi", "doctor", "--json"]
    done = subprocess.run(
        command, cwd=service.directory, env=service.environment, capture_output=True, text=True, check=False
    )
    [found] = [each for each in json.loads(done.stdout) if each["check"] == "proxies"]
    return found


@pytest.mark.parametrize(
    ("hops", "header", "text"),
    [
        ("0", "203.0.113.9", "none is believed; since the start a request came with X-Forwarded-For"),
        ("1", "6.6.6.6, 203.0.113.9", "1 are believed; since the start a request came with more entries"),
        ("2", "203.0.113.9", "2 are believed; since the start a request came with too few entries"),
    ],
)
def test_what_was_seen_of_proxies_is_a_finding(tmp_path, redis_url, hops, header, text):
    with Service(tmp_path, redis_url, TRUSTED_PROXY_HOPS=hops) as service:
        as_it_should_be = ", ".join(["203.0.113.9"] * int(hops))
        assert service.get("/healthz", headers={"X-Forwarded-For": as_it_should_be} if hops != "0" else {}).ok
        assert proxies_of(service)["state"] == "ok"
        assert service.get("/healthz", headers={"X-Forwarded-For": header}).ok
        found = proxies_of(service)
        assert found["state"] == "warning"
        assert found["text"].startswith(text)
        assert "TRUSTED_PROXY_HOPS" in found["hint"]
    # Without a service there is nothing to ask.
    assert proxies_of(service)["state"] == "ok"
