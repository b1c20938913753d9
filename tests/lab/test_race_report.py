import base64
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from click.testing import CliRunner

from flaskapp.lab import measure
from flaskapp.lab.race import RaceResult
from flaskapp.lab.race_command import make_race_cli
from flaskapp.lab.report import claim_texts
from flaskapp.ops.embedded_redis import EmbeddedServer
from tests.racers import register

PICTURES = {"lanes", "overspend", "latency", "round_trips", "throughput", "server_time"}
SMALL = {
    "CONCURRENCIES": (2, 6),
    "RTTS_MS": (0.0, 1.0),
    "IN_WINDOW": (10, 1_000_000),
    "CALLERS": 3,
    "THROUGHPUT_SECONDS": 0.05,
    "BLOCKS": 1,
    "BLOCK": 5,
}


def run(*args, names=("legacy", "atomic")):
    return CliRunner().invoke(make_race_cli(names), args)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Where the report of a small race is."""
    directory = tmp_path_factory.mktemp("lab") / "report"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(measure, name, value)
        patch.setattr(sys, "argv", ["flask", "--app", "wsgi", "race", "--seed", "77", "--report", "a place"])
        result = run("--seed", "77", "--report", str(directory))
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith(f"The report is {directory}/index.html\n")
    return directory


@pytest.fixture(scope="module")
def figures(report):
    return json.loads((report / "figures.json").read_text())


@pytest.fixture
def race_server(tmp_path):
    with EmbeddedServer(tmp_path) as server:
        yield server


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.links, self.images, self.cells, self._in_cell = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        its = dict(attrs)
        self.links += [its[name] for name in ("src", "href", "srcset", "action", "data") if name in its]
        if tag == "img":
            self.images.append(its)
        self._in_cell = tag == "td"

    def handle_data(self, data):
        if self._in_cell:
            self.cells.append(data)
        self._in_cell = False


@pytest.fixture(scope="module")
def page(report):
    return (report / "index.html").read_text()


def test_the_page_needs_nothing_but_itself(page):
    assert all(link.startswith("data:") for link in Page(page).links)
    assert "://" not in page
    assert "@import" not in page
    assert "url(" not in page
    assert "<script" not in page


def test_every_picture_is_in_the_page_and_beside_it(report, page):
    assert {path.stem for path in report.glob("*.png")} == PICTURES
    shown = [base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in Page(page).images]
    beside = [path.read_bytes() for path in report.glob("*.png")]
    assert sorted(shown) == sorted(beside)
    assert all(png.startswith(b"\x89PNG") and len(png) > 5_000 for png in beside)
    assert all(image["alt"] for image in Page(page).images)


def test_what_made_the_figures_is_told(page, figures):
    about = figures["about"]
    assert about["command"] == "flask --app wsgi race --seed 77 --report 'a place'"
    assert about["seed"] == "77"
    assert {"machine", "server", "python", "redis-py", "hiredis", "measured"} <= about.keys()
    assert all(value.replace("'", "&#39;") in page for value in about.values())


def test_the_figures_are_in_the_page(page, figures):
    cells = Page(page).cells
    shown = {f"{each['us']:.1f}" for each in figures["server_time"]}
    shown |= {f"{each['a_second']:,.0f}" for each in figures["throughput"]}
    shown |= {f"{each['spent_to_limit']:.3f}" for each in figures["overspend"]}
    for each in figures["distances"]:
        shown |= {f"{each['check_p50_ms']:.3f} ms", f"{each['check_p95_ms']:.3f} ms"}
    assert shown - set(cells) == set()


def test_the_figures_say_what_the_report_is_for(figures):
    over = {(each["backend"], each["concurrency"]): each for each in figures["overspend"] if each["was_held"]}
    assert over["legacy", 6]["spent_to_limit"] == 1.5
    assert over["legacy", 2]["spent_to_limit"] == 2
    assert all(each["spent_to_limit"] <= 1 for each in figures["overspend"] if each["backend"] == "atomic")
    near = {each["backend"]: each for each in figures["distances"] if each["rtt_ms"] == 0}
    assert near["atomic"]["round_trips_a_request"] == 1
    assert near["legacy"]["round_trips_a_request"] > 10
    assert {each["in_window"] for each in figures["server_time"]} == {10, 1_000_000}
    assert all(each["us"] > 0 for each in figures["server_time"])
    assert all(each["a_second"] > 0 for each in figures["throughput"])


def test_the_failing_order_is_the_explorers_and_a_check_that_was_broken_off_goes_on(figures):
    order = figures["failing_order"]
    assert order["backend"] == "legacy"
    assert 1 <= order["number"] <= order["orders"]
    assert 0 < order["overspending_orders"] < order["orders"]
    cost, blocks = order["cost_nanousd"], order["blocks"]
    assert [(each["does"], each["window_nanousd"]) for each in blocks] == [
        ("check", 0),
        ("check", 0),
        ("record", cost),
        ("check_on", cost),
        ("record", 2 * cost),
    ]
    assert order["limit_nanousd"] == cost
    first, second = blocks[0]["caller"], blocks[1]["caller"]
    assert [each["caller"] for each in blocks] == [first, second, second, first, first]
    assert first != second
    assert all(each["writes"] == 0 and each["reads"] >= 3 for each in blocks if each["does"] != "record")
    assert all(each["writes"] >= 5 for each in blocks if each["does"] == "record")


def test_of_a_transaction_its_commands_are_counted(race_server):
    order = measure.failing_order(race_server.url, "multi")
    assert [each.does for each in order.blocks] == ["check", "check", "record", "record"]
    assert order.blocks[-1].window_nanousd == 2 * order.cost_nanousd
    assert all(each.writes >= 5 for each in order.blocks[2:])


def test_one_that_keeps_its_promise_has_no_failing_order(race_server):
    assert measure.failing_order(race_server.url, "atomic") is None


def test_the_verdict_is_at_the_top(page):
    verdicts = re.findall(r"<li[^>]*>([^<]*)</li>", page)
    assert verdicts == [
        "legacy overspent: $0.0243 over the limit of $0.0162.",
        "atomic stayed within its limit.",
    ]


def test_without_matplotlib_it_is_one_line_before_anything_is_measured(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("--report", str(tmp_path / "there"), "--redis", "redis://127.0.0.1:1/0")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == (
        "Error: the report draws with matplotlib, which is not installed: python -m pip install 'matplotlib>=3.10'\n"
    )
    assert not (tmp_path / "there").exists()


def test_a_place_that_cannot_be_written_to_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    result = run("--report", str(tmp_path / "file" / "there"), "--redis", "redis://127.0.0.1:1/0")
    assert result.exit_code == 2
    assert result.stderr == f"Error: --report: {tmp_path}/file/there cannot be written to (Not a directory)\n"


def test_a_race_without_a_gap_has_no_failing_order(monkeypatch, tmp_path):
    register(monkeypatch)
    for name, value in SMALL.items():
        monkeypatch.setattr(measure, name, value)
    result = run("--report", str(tmp_path), names=["atomic"])
    assert result.exit_code == 0, result.output
    assert {path.stem for path in tmp_path.glob("*.png")} == PICTURES - {"lanes"}
    assert json.loads((tmp_path / "figures.json").read_text())["failing_order"] is None


RESULT = RaceResult("atomic", True, False, 4, 6, 1, 1, 0, 1.0, 2.0, 3.0)


@pytest.mark.parametrize(
    ("alone", "whole", "told"),
    [
        (10.0, 40.0, "95 % less than check and record, 80 % less than the check alone."),
        (1.0, 1.6, "25 % more than check and record, 100 % more than the check alone."),
    ],
)
def test_what_is_true_of_the_seeds_claim_is_told_as_it_is(alone, whole, told):
    legacy = replace(RESULT, backend="legacy", check_p50_ms=whole, check_alone_p50_ms=alone)
    claim, line = claim_texts([legacy, RESULT])
    assert "75–80 % less" in claim
    assert line == f"Redis 0 ms farther away: {told}"


def test_nothing_is_claimed_of_what_was_not_measured():
    assert claim_texts([RESULT]) == []
