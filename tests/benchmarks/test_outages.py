"""A few of the faults that `python -m benchmarks.outages` injects, briefly: counts and books, and no times."""

import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.outages import names
from benchmarks.outages.fault import CannotInject, Fault
from benchmarks.outages.faults import FAULTS
from benchmarks.outages.load import Answer, Saw
from benchmarks.outages.names import NAME, NameServer
from benchmarks.outages.play import Pace, Result, judge, judge_times, play
from benchmarks.outages.report import markdown
from benchmarks.outages.shim import Shim
from benchmarks.outages.soak import Sample, growths, run_soak
from benchmarks.outages.wire import Wire
from tests.faults.wire import listening, wait_for

ROOT = Path(__file__).resolve().parents[2]
BY_NAME = {fault.name: fault for fault in FAULTS}
BRIEF = Pace(before_seconds=0.5, after_seconds=1.0, by_the_clock=False)


@pytest.mark.parametrize("name", ["killed", "killed-closed", "cut", "worker-killed"])
def test_what_comes_of_a_fault_is_as_expected(name):
    result = play(replace(BY_NAME[name], seconds=1.0), BRIEF)
    assert (result.skipped, result.missed) == ("", [])
    assert result.requests > 0
    assert result.billed_nanousd > 0
    assert result.beyond_nanousd >= 0


def test_what_is_not_expected_is_told():
    result = play(replace(BY_NAME["killed"], seconds=1.0, may=frozenset(), must=frozenset({Saw.UNAVAILABLE})), BRIEF)
    assert result.missed == ["clients saw 200 emergency", "no client saw 503: was it injected?"]


def test_a_fault_that_was_not_felt_is_told():
    result = play(fault(seconds=0.2, felt=lambda stage: stage.look.info("stats")["rejected_connections"]), BRIEF)
    assert result.missed == ["it was not felt: was it injected?"]


def test_what_this_user_or_machine_cannot_do_is_left_out_with_its_reason(monkeypatch, tmp_path):
    monkeypatch.setattr("os.geteuid", lambda: 1)
    result = play(BY_NAME["disk-full"], BRIEF)
    assert (result.skipped, result.missed, result.requests) == ("takes root", [], 0)
    assert "not injected: takes root" in markdown([result])
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(CannotInject, match="no C compiler"):
        Shim(tmp_path)


def fault(**changes):
    return replace(Fault("some", "E", "some fault", lambda _stage: lambda: None), **changes)


def answer(saw):
    return Answer(began_seconds=0.0, first_seconds=0.0, ended_seconds=1.0, saw=saw, status=200)


@pytest.mark.parametrize(
    ("changes", "figures", "told"),
    [
        ({}, {"billed_nanousd": 3, "booked_nanousd": 1, "emergency_nanousd": 1}, "1 nano-dollars less than the bill"),
        ({}, {"births": 1}, "1 workers were born"),
        ({"births": 1}, {}, "0 workers were born"),
        ({"may": {Saw.EMERGENCY}, "most_emergency": 0.4}, {"saw": {"200 emergency": 1}}, "50% of the answers"),
        ({}, {"saw": {"cut": 1}}, "clients saw cut"),
    ],
)
def test_each_thing_that_can_be_missed_is_told(changes, figures, told):
    result = Result("some", "E", "some fault", **figures)
    judge(fault(**changes), result, [answer(Saw.BOOKED), answer(Saw.EMERGENCY)])
    [missed] = result.missed
    assert told in missed


@pytest.mark.parametrize(
    ("figures", "told"),
    [
        ({"slowest_seconds": 2.2, "usual_seconds": 0.1}, ["an answer began after 2.2 s"]),
        ({"slowest_seconds": 2.2, "usual_seconds": 0.3}, []),
        ({"back_seconds": 3.1}, ["3.1 s until every request was booked again"]),
    ],
)
def test_times_count_for_the_command(figures, told):
    result = Result("some", "E", "some fault", **figures)
    judge_times(fault(), result)
    assert result.missed == told


def test_books_that_were_lost_may_hold_less():
    result = Result("some", "E", "some fault", billed_nanousd=3)
    judge(fault(forgets=True), result, [])
    assert result.missed == []


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.outages", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_the_list_names_each_fault():
    listed = [line.split()[1] for line in command("--list").stdout.splitlines()]
    assert listed == [each.name for each in FAULTS]
    assert len(set(listed)) == len(listed)


def test_an_unknown_fault_is_refused_by_its_name():
    done = command("--only", "killed", "--only", "none")
    assert (done.returncode, done.stderr) == (1, "--only: no fault is called none; --list names them\n")


def test_the_page_has_a_row_for_each_fault():
    page = (ROOT / "docs" / "FAULTS.md").read_text(encoding="utf-8")
    head = markdown([]).splitlines()[0]
    assert head in page
    assert [each.name for each in FAULTS if f"| {each.title} |" not in page] == []


def sample(**figures):
    usual = {"memory_mb": 100.0, "descriptors": 50, "threads": 10, "keys": 200}
    rest = {"minute": 1.0, "keys_by_kind": {}, "requests": 0, "faults": 0, "births": 0, "beyond_nanousd": 0}
    return Sample(**{**usual, **rest, "by_worker": {}, "missed": [], **figures})


@pytest.mark.parametrize("name", ["memory_mb", "descriptors", "threads", "keys"])
def test_what_grows_is_no_flat_line(name):
    flat = [sample() for _ in range(6)]
    assert list(growths(flat)) == []
    grown = [*flat[:4], *(replace(each, **{name: getattr(each, name) * 1.5}) for each in flat[4:])]
    [told] = growths(grown)
    assert told.startswith(f"{name} grew from ")
    assert list(growths(flat[:2])) == []


def test_a_soak_keeps_the_books_and_counts(tmp_path):
    lines = []
    soak = run_soak(0.01, 3, tmp_path, lines.append, sample_seconds=0.1)
    assert soak.missed == []
    assert len(lines) == len(soak.samples) == 1
    [only] = soak.samples
    assert sum(soak.faults.values()) == only.faults == 1
    assert only.descriptors > 0
    assert only.threads > 0
    assert only.memory_mb > 0
    assert only.keys_by_kind["record"] > 0
    assert only.beyond_nanousd >= 0


# --- the parts


@pytest.fixture
def echo():
    def serve(connection):
        while text := connection.recv(100):
            connection.sendall(text)

    with listening(serve) as port, Wire(port) as wire:
        yield wire


def connected(wire):
    return socket.create_connection(("127.0.0.1", wire.port), timeout=5)


def said(connection, text=b"x"):
    connection.sendall(text)
    return connection.recv(100)


def test_a_wire_that_is_cut_ends_all_connections_until_it_is_mended(echo):
    with connected(echo) as before:
        assert said(before) == b"x"
        echo.cut()
        assert before.recv(1) == b""
    with connected(echo) as meanwhile:
        assert meanwhile.recv(1) == b""
    echo.mend()
    with connected(echo) as after:
        assert said(after) == b"x"


def test_a_wire_that_is_held_brings_all_later(echo):
    with connected(echo) as one:
        assert said(one) == b"x"
        echo.hold()
        one.sendall(b"late")
        one.settimeout(0.1)
        with pytest.raises(TimeoutError):
            one.recv(100)
        echo.mend()
        one.settimeout(5)
        assert one.recv(100) == b"late"


def test_a_wire_that_loses_a_reply_loses_its_connection(echo):
    echo.lose(1.0)
    with connected(echo) as one:
        assert said(one) == b""


@pytest.fixture
def name_server(tmp_path, monkeypatch):
    # A port that takes no rights.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(names, "_PORT", free.getsockname()[1])
    with NameServer(tmp_path) as server:
        yield server


def asked(server, kind):
    labels = b"".join(bytes([len(each)]) + each.encode() for each in NAME.split(".")) + b"\0"
    query = b"id\1\0\0\1\0\0\0\0\0\0" + labels + kind.to_bytes(2, "big") + b"\0\1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(0.2)
        client.sendto(query, (server.configuration.read_text().split()[1], names._PORT))
        try:
            return client.recv(512)
        except TimeoutError:
            return None


def test_a_name_server_answers_refuses_or_is_silent(name_server):
    wait_for(lambda: asked(name_server, 1) is not None)
    assert asked(name_server, 1).endswith(socket.inet_aton("127.0.0.1"))
    no_answers = asked(name_server, 28)[6:8]
    assert no_answers == b"\0\0"
    name_server.mode = "refuses"
    assert asked(name_server, 1)[3] & 15 == 5
    name_server.mode = "silent"
    assert asked(name_server, 1) is None
    assert name_server.asked_in_vain == 2
