"""What the seed expects, over HTTP, on both backends: its commands as they are written, but for the port."""
# ruff: noqa: W293 (the seed's script, to the letter)

import json
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime

import pytest

from backends.keys import bucket_seconds_of
from tests.servers import ROOT, events, nanousd

BUCKET_SECONDS = bucket_seconds_of(600)

TEN_AT_ONCE = r"""
seq 1 10 | xargs -P 10 -I {} bash -c '
  curl -X POST http://localhost:8000/api/v1/chat/stream \
    -H "Content-Type: application/json" \
    -H "X-Fingerprint: fp:concurrent-test:hash789" \
    -d "{\"query\": \"Concurrent test {}\", \"chat_history\": []}" \
    -w "\nRequest {}: Status %{http_code}\n" \
    -s -o /dev/null
'
"""
TEN_RAPIDLY = r"""
for i in {1..10}; do
  curl -X POST http://localhost:8000/api/v1/chat/stream \
    -H "Content-Type: application/json" \
    -H "X-Fingerprint: fp:test123:hash456" \
    -d "{\"query\": \"Test $i\", \"chat_history\": []}" \
    -w "\nStatus: %{http_code}\n" &
done
wait
"""
ONE = r"""
curl -X POST http://localhost:8000/api/v1/chat/stream \
     -H "Content-Type: application/json" \
     -H "X-Fingerprint: fp:test123:hash456" \
     -d '{
       "query": "What is Litecoin?",
       "chat_history": []
     }'
"""
DAILY = r"""
curl -X POST http://localhost:8000/api/v1/chat/stream \
  -H "Content-Type: application/json" \
  -H "X-Fingerprint: fp:daily-test:hash999" \
  -d '{
    "query": "Test daily limit",
    "chat_history": []
  }'
"""
TIMED = r"""
time curl -X POST http://localhost:8000/api/v1/chat/stream \
  -H "Content-Type: application/json" \
  -H "X-Fingerprint: fp:perf-test:hash" \
  -d '{"query": "test", "chat_history": []}' \
  -w "\nTime: %{time_total}s\n"
"""
PYTHON_SCRIPT = '''\
import asyncio
import aiohttp
import time

async def test_concurrent_requests():
    """Test concurrent requests to verify atomic behavior"""
    fingerprint = "fp:atomic-test:hash123"
    url = "http://localhost:8000/api/v1/chat/stream"
    
    headers = {
        "Content-Type": "application/json",
        "X-Fingerprint": fingerprint
    }
    
    async def send_request(i):
        data = {
            "query": f"Test request {i}",
            "chat_history": []
        }
        async with aiohttp.ClientSession() as session:
            try:
                async with session.post(url, json=data, headers=headers) as resp:
                    status = resp.status
                    text = await resp.text()
                    print(f"Request {i}: Status {status}")
                    if status == 429:
                        print(f"  Throttled: {text[:100]}")
                    return status
            except Exception as e:
                print(f"Request {i}: Error - {e}")
                return None
    
    # Send 10 concurrent requests
    print("Sending 10 concurrent requests...")
    tasks = [send_request(i) for i in range(10)]
    results = await asyncio.gather(*tasks)
    
    success_count = sum(1 for r in results if r == 200)
    throttled_count = sum(1 for r in results if r == 429)
    
    print(f"\\nResults: {success_count} succeeded, {throttled_count} throttled")
    print("If atomic optimization works, only requests within limit should succeed")

if __name__ == "__main__":
    asyncio.run(test_concurrent_requests())
'''

needs_curl = pytest.mark.skipif(not shutil.which("curl"), reason="the seed's own commands need curl")


def at(service, text):
    assert "http://localhost:8000" in text
    return text.replace("http://localhost:8000", service.base_url)


def bash(service, command):
    done = subprocess.run(["bash", "-c", at(service, command)], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def redis_cli(books, *words):
    """The project's own redis-cli, as it stands beside Python."""
    port = books.connection_pool.connection_kwargs["port"]
    cli = [sys.executable, str(ROOT / "scripts" / "redis_cli.py"), "-p", str(port)]
    return subprocess.run([*cli, *words], capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()


def parts_of(text):
    """The streams and refusals in what one or several curls printed."""
    streamed = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
    refused = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return streamed, refused


def booked(books, identifier):
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    ring = books.zrange(f"llm:cost:recent:{identifier}", 0, -1, withscores=True)
    return int(books.get(f"llm:cost:daily:{identifier}:{day}") or 0), int(sum(held for _, held in ring))


@needs_curl
def test_a_single_request_streams_an_answer_and_says_what_it_cost(service, books):
    streamed, refused = parts_of(bash(service, ONE))
    assert refused == []
    assert all(each["status"] == "streaming" for each in streamed[:-1])
    assert "".join(each["chunk"] for each in streamed[:-1]).startswith("Litecoin")
    last = streamed[-1]
    assert last["status"] == "complete"
    assert last["usage"]["output_tokens"] >= 40
    assert booked(books, "hash456") == (nanousd(last["cost_usd"]),) * 2


@needs_curl
def test_ten_rapid_requests_the_first_few_succeed_and_the_rest_are_throttled(service, books):
    printed = bash(service, TEN_RAPIDLY)
    statuses = re.findall(r"^Status: (\d+)$", printed, re.MULTILINE)
    admitted, throttled = statuses.count("200"), statuses.count("429")
    assert admitted + throttled == 10
    if service.environment.get("THROTTLE_BACKEND") != "legacy":
        assert (admitted, throttled) == (4, 6)
    assert admitted >= 4
    # The streams of ten curls run into each other; what is refused comes in one piece.
    refused = re.findall(r'{"error": "cost_throttled", "message": "([^"]*)", "reason": "([^"]*)"', printed)
    assert len(refused) == throttled
    assert all(message.startswith("High usage detected") for message, _ in refused)
    if refused:
        assert {"window_limit", "throttled"} >= {reason for _, reason in refused}
        assert 1 <= books.ttl("llm:throttle:hash456") <= 30
    costs = [nanousd(each) for each in re.findall(r'"cost_usd":"([\d.]+)"', printed)]
    assert len(costs) == admitted
    assert booked(books, "hash456") == (sum(costs),) * 2


@needs_curl
def test_of_ten_at_once_atomic_admits_exactly_four(atomic, books):
    printed = bash(atomic, TEN_AT_ONCE)
    statuses = dict(re.findall(r"^Request (\d+): Status (\d+)$", printed, re.MULTILINE))
    assert sorted(statuses.values()) == ["200"] * 4 + ["429"] * 6
    ids = [line for line in atomic.lines_with("identifier=hash…") if "Cost settled" in line]
    assert ids
    day, window = booked(books, "hash789")
    assert day == window
    assert 4 * 600_000 < day < 4 * 4_192_500
    assert books.keys("llm:open:*") == []


@needs_curl
def test_of_ten_at_once_legacy_admits_some_and_its_books_show_what_it_admitted(legacy, books):
    printed = bash(legacy, TEN_AT_ONCE.replace("-s -o /dev/null", "-s"))
    admitted = re.findall(r"Status (\d+)", printed).count("200")
    costs = [nanousd(each) for each in re.findall(r'"cost_usd":"([\d.]+)"', printed)]
    assert len(costs) == admitted >= 4
    assert booked(books, "hash789") == (sum(costs),) * 2


def test_the_seeds_python_script(atomic, books, tmp_path):
    script = tmp_path / "test_cost_throttling.py"
    script.write_text(at(atomic, PYTHON_SCRIPT))
    command = [sys.executable, script.name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    lines = done.stdout.splitlines()
    assert "Results: 4 succeeded, 6 throttled" in lines
    throttled = [line for line in lines if line.startswith("  Throttled: ")]
    assert len(throttled) == 6
    assert all('"High usage detected' in line.replace('"message": ', "") for line in throttled)
    assert all(int(amount) > 0 for amount in booked(books, "hash123"))


def test_a_copy_of_that_script_at_the_root_is_not_collected(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_ours.py").write_text("def test_ours(): pass\n")
    (tmp_path / "test_cost_throttling.py").write_text(PYTHON_SCRIPT)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[:2] == ["tests/test_ours.py::test_ours", ""], done.stdout


@needs_curl
def test_a_very_low_daily_limit(service, books):
    service.set_by_hand(books, daily_cost_limit_usd=0.005)
    streamed, refused = parts_of(bash(service, DAILY))
    assert (streamed[-1]["status"], refused) == ("complete", [])
    streamed, refused = parts_of(bash(service, DAILY))
    assert streamed == []
    assert refused[0]["reason"] == "daily_limit"
    assert refused[0]["message"].startswith("Daily usage limit reached")
    assert 58 <= int(redis_cli(books, "TTL", "llm:throttle:hash999")[0]) <= 60


@needs_curl
def test_the_timed_request(atomic):
    assert re.search(r"^Time: \d+\.\d+s$", bash(atomic, TIMED), re.MULTILINE)


def test_what_redis_shows(service, books):
    costs = [nanousd(events(service.chat(max_tokens=20))[-1]["cost_usd"]) for _ in range(3)]
    service.set_by_hand(books, high_cost_threshold_usd=0.0005)
    assert service.chat(max_tokens=20).json()["reason"] == "window_limit"
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    assert redis_cli(books, "KEYS", "llm:throttle:*") == ["llm:throttle:hash456"]
    assert books.keys("llm:cost:recent:*") == ["llm:cost:recent:hash456"]
    assert books.keys("llm:cost:daily:*") == [f"llm:cost:daily:hash456:{day}"]
    assert 1 <= int(redis_cli(books, "TTL", "llm:throttle:hash456")[0]) <= 30
    flat = redis_cli(books, "ZRANGE", "llm:cost:recent:hash456", "0", "-1", "WITHSCORES")
    starts, scores = flat[::2], flat[1::2]
    assert all(int(start) % BUCKET_SECONDS == 0 for start in starts)
    now = datetime.now(UTC).timestamp()
    assert all(now - 60 < int(start) <= now for start in starts)
    assert sum(map(int, scores)) == sum(costs) > 0
    assert books.get(f"llm:cost:daily:hash456:{day}") == str(sum(costs))
    assert 500 < books.ttl("llm:cost:recent:hash456") <= 600 + BUCKET_SECONDS
    assert 86_400 <= books.ttl(f"llm:cost:daily:hash456:{day}") <= 2 * 86_400


def test_both_on_one_redis_keep_one_set_of_books(atomic, legacy, books):
    answers = [which.chat("fleet", max_tokens=10) for which in (atomic, legacy, atomic, legacy)]
    assert [each.headers["X-Throttle-Backend"] for each in answers] == ["atomic", "legacy", "atomic", "legacy"]
    assert booked(books, "fleet") == (sum(nanousd(events(each)[-1]["cost_usd"]) for each in answers),) * 2
    atomic.set_by_hand(books, daily_cost_limit_usd=0.0045)
    assert {which.chat("fleet").json()["reason"] for which in (legacy, atomic)} == {"daily_limit", "throttled"}


def test_the_log_shows_what_was_done(atomic, books):
    since = len(atomic.log_lines())
    admitted = atomic.chat("fp:secretchallenge:hash456789", max_tokens=5)
    atomic.patch(high_cost_threshold_usd="0.000001")
    atomic.notice()
    refused = atomic.chat("fp:secretchallenge:hash456789", max_tokens=5)
    assert (admitted.status_code, refused.status_code) == (200, 429)
    (triggered,) = atomic.lines_with("Cost-based throttling triggered", since)
    (recorded,) = atomic.lines_with("Cost recorded for stable_identifier", since)
    checked = atomic.lines_with("Cost throttling check called", since, at_least=2)
    for line, answer in ((checked[0], admitted), (recorded, admitted), (checked[1], refused), (triggered, refused)):
        assert f"request_id={answer.headers['X-Request-ID']} identifier=hash45… cost_usd=0." in line
        assert "backend=atomic" in line
    for line in (recorded, triggered):
        assert re.search(r"script=reserve\.lua check_ms=\d+\.\d+$", line)
    assert "secretchallenge" not in atomic.log()
    assert "hash456789" not in atomic.log()


def test_the_log_as_json(legacy, books):
    since = len(legacy.log_lines())
    answer = legacy.chat(max_tokens=5)
    (line,) = legacy.lines_with("Cost recorded for stable_identifier", since)
    told = json.loads(line)
    assert (told["request_id"], told["identifier"]) == (answer.headers["X-Request-ID"], "hash…")
    assert told["cost_usd"] == answer.headers["X-Cost-Reserved-USD"]
    assert told["backend"] == "legacy"
    switched = [json.loads(line)["message"] for line in legacy.lines_with("Cost throttling is", at_least=2)]
    assert switched[: legacy.workers] == ["Cost throttling is on (environment)"] * legacy.workers
