import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from benchmarks.service import entered, figures, report
from benchmarks.service.contenders import completion
from benchmarks.service.figures import Books, Figure, Results
from benchmarks.service.processes import fetch, running
from benchmarks.service.programs import Load, Target, Tools, outcome_of, tools
from benchmarks.service.rounds import Sample, Spread, ratio

ROOT = Path(__file__).resolve().parents[2]
SLOW = Tools(*([sys.executable, "-m", f"benchmarks.service.slow_{name}"] for name in ("upstream", "load")), "slow")
SAMPLE = Sample(100.0, 5.0, 1.0, 2.0, 21.0, 0.5, 0.1, 0.1, 0.1, 0.0, {})
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(params=["compiled", "slow"])
def kit(request):
    if request.param == "compiled" and not shutil.which("cc"):
        pytest.skip("no C compiler")
    return SLOW if request.param == "slow" else tools()


@pytest.fixture
def upstream_port(kit, tmp_path):
    with running(kit.upstream, tmp_path / "upstream", {}) as program:
        yield program.wait_for_port()


def asked(port, request):
    head, _, body = request.partition(b"\r\n\r\n")
    path = head.split()[1].decode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("POST", path, body)
    text = connection.getresponse().read().decode()
    connection.close()
    return text


def loaded(kit, port, request, end, load, directory):
    done = subprocess.run(
        load.command(kit.load, Target(port, request, end), directory),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    return outcome_of(done.stdout)


def stats(port):
    return json.loads(fetch(port, "/stats"))


def test_the_upstream_streams_as_openai_does(upstream_port):
    request = completion(tokens=3)
    events = [line.removeprefix("data: ") for line in asked(upstream_port, request).split("\n\n") if line]
    chunks = [json.loads(event) for event in events[:-1]]
    assert events[-1] == "[DONE]"
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == " coin" * 3
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]


def test_the_upstream_tells_its_usage_where_it_is_asked_for(upstream_port):
    body = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 2}
    body["messages"] = [{"role": "user", "content": "tokens=3 pace_us=1000"}]
    text = asked(upstream_port, b"POST /v1/chat/completions \r\n\r\n" + json.dumps(body).encode())
    assert '"completion_tokens":2' in text.replace(" ", "")
    assert '"finish_reason":"length"' in text.replace(" ", "")
    whole = json.loads(asked(upstream_port, completion(tokens=3, streamed=False)))
    assert whole["choices"][0]["message"]["content"] == " coin" * 3
    assert whole["usage"]["completion_tokens"] == 3
    told = stats(upstream_port)
    assert (told["requests"], told["streamed"], told["output_tokens"]) == (2, 1, 5)


@pytest.mark.parametrize("rate", [0, 40])
def test_clients_and_upstream_count_the_same(kit, upstream_port, tmp_path, rate):
    load = Load(connections=4, seconds=0.5, rate=rate)
    outcome = loaded(kit, upstream_port, completion(), "[DONE]", load, tmp_path)
    whole = outcome.answers + outcome.late
    told = stats(upstream_port)
    assert whole > 0
    assert (told["requests"], told["output_tokens"], told["open"]) == (whole, 20 * whole, 0)
    assert (outcome.refused, outcome.wrong, outcome.broken, outcome.unfinished) == (0, 0, 0, 0)
    assert 0 < outcome.first_ms.p50 <= outcome.whole_ms.p50 <= outcome.whole_ms.p99
    assert whole <= rate or not rate


def test_the_time_of_a_late_answer_counts_from_when_it_was_due(kit, upstream_port, tmp_path):
    # One connection, answers of 100 ms, one due every 50 ms.
    load = Load(connections=1, seconds=0.5, rate=20)
    outcome = loaded(kit, upstream_port, completion(tokens=10, pace_us=10_000), "[DONE]", load, tmp_path)
    assert outcome.whole_ms.p99 > 200


def test_answers_that_are_not_what_they_should_be_are_told(kit, tmp_path):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200 if self.path == "/wrong" else 503)
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(b"oh no" if self.path != "/cut" else b"oh")
            self.close_connection = self.path == "/cut"

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        for name, path in (("refused", "/refused"), ("wrong", "/wrong"), ("broken", "/cut")):
            request = completion().replace(b"/v1/chat/completions", path.encode())
            load = Load(connections=1, seconds=0.2, grace_seconds=1)
            outcome = loaded(kit, server.server_port, request, "[DONE]", load, tmp_path)
            assert getattr(outcome, name) > 0, name
            assert (outcome.answers, outcome.late) == (0, 0), name
    finally:
        server.shutdown()
        server.server_close()


def test_an_upstream_ends_with_whoever_started_it(kit, tmp_path):
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(kit.upstream, stdin=subprocess.PIPE, stdout=log, cwd=ROOT)
    while not (tmp_path / "log").read_text():
        time.sleep(0.05)
    process.stdin.close()
    assert process.wait(10) is not None


def test_speed_is_measured_and_the_books_hold(tmp_path):
    figures_file, pictures = tmp_path / "figures.json", tmp_path / "pictures"
    command = [sys.executable, "-m", "benchmarks.service", "--quick", "--turns", "1", "--only-speed"]
    command += ["--json", str(figures_file), "--pictures", str(pictures)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    told = json.loads(figures_file.read_text())
    assert set(told["samples"]) == {
        "floor",
        "ours, chat",
        "ours, chat of 20 tokens",
        "ours, /v1 streamed",
        "ours, /v1 whole",
    }
    assert {each["key"] for each in told["figures"]} == {"streamed/floor", "chat/floor"}
    for row in told["books"]:
        assert row["booked_nanousd"] >= row["billed_nanousd"] > 0
    assert all(rows[0]["cpu_ms"] > 0 and not rows[0]["bad"] for rows in told["samples"].values())
    # Whether a ratio is met is the machine's word; that the status tells it is ours.
    assert done.returncode == (1 if "missed:" in done.stderr else 0), done.stderr
    assert "What would make it lie" in done.stdout
    assert len(list(pictures.glob("*.png"))) == 2


def test_nothing_is_left_after_an_interrupt(tmp_path):
    command = [sys.executable, "-m", "benchmarks.service", "--quick", "--only-speed"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "warming up" in line:
            break
    left = processes_in(tmp_path)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told.splitlines()[-1]) == (130, "stopped")
    assert left
    assert not processes_in(tmp_path)


def processes_in(directory):
    found = []
    for place in Path("/proc").glob("[0-9]*/cwd"):
        try:
            found += [place] if str(place.readlink()).startswith(str(directory)) else []
        except OSError:
            continue
    return found


def test_books_below_the_bill_are_told(capsys):
    results = Results(books=[Books("x", 10, 10), Books("y", 9, 10)])
    assert results.is_overspent
    assert not Results(books=[Books("x", 10, 10)]).is_overspent
    report.print_report(results, {"machine": "this"}, None)
    assert "OVERSPENT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value", "reached"),
    [
        ("streamed/floor", 0.7, "aim"),
        ("streamed/floor", 0.45, "yes"),
        ("streamed/floor", 0.44, "no"),
        ("memory", 50, "aim"),
        ("memory", 100, "yes"),
        ("memory", 101, "no"),
    ],
)
def test_a_figure_is_held_against_its_goal(capsys, key, value, reached):
    figure = Figure(key, Spread(value, value, value))
    assert report.missed([figure]) == ([figures.GOALS[key].name] if reached == "no" else [])
    earlier = {"figures": [{"key": key, "measured": {"median": 123.0, "least": 122.0, "most": 124.0}}]}
    report.print_report(Results(figures=[figure]), {}, earlier)
    shown = capsys.readouterr().out
    assert reached in shown
    assert "123.00 (122.00–124.00)" in shown


def test_ratios_are_of_the_same_turn():
    ours = [replace(SAMPLE, a_second=rate) for rate in (10.0, 20.0, 90.0)]
    floor = [replace(SAMPLE, a_second=rate) for rate in (100.0, 200.0, 300.0)]
    assert ratio(ours, floor, lambda each: each.a_second) == Spread(0.1, 0.1, 0.3)


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"load_share": 0.9}, "the load generator used 0.90 of a core"),
        ({"upstream_share": 0.9}, "the upstream used 0.90 of a core"),
        ({"others_share": 0.9}, "other programs used 0.9 cores"),
        ({"bad": {"refused": 2}}, "answers refused 2"),
    ],
)
def test_what_speaks_against_a_sample_is_told(changed, word):
    assert not list(figures.doubts({"x": [SAMPLE]}))
    (doubt,) = figures.doubts({"x": [replace(SAMPLE, **changed)]})
    assert word in doubt


def test_functions_of_ours_are_counted():
    command = [sys.executable, "-m", "benchmarks.service.entered"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(set(lines)) > entered.TOKENS
    assert any(line.startswith("flaskapp/chat/routes.py:") for line in lines)
    assert all(line.startswith(("flaskapp/", "backends/")) for line in lines)
