"""What scripts/test.sh runs: the quick run names what it leaves out, and a run has the store that was chosen."""

import importlib.util
import os
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
import redis

from tests.conftest import store_program

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def runs():
    spec = importlib.util.spec_from_file_location("run_tests", ROOT / "scripts" / "run_tests.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_test_is_in_the_quick_run_or_named_as_left_out(runs, monkeypatch):
    monkeypatch.chdir(ROOT)
    places = [*chain(*map(runs.matching, chain(*runs.QUICK))), *runs.LEFT_OUT]
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
    assert [file for file in sorted(files) if not any(f"{file}/".startswith(f"{place}/") for place in places)] == []
    assert [place for place in places if not is_there(place)] == []
    assert [place for place, times in Counter(places).items() if times > 1 and place not in runs.LEFT_OUT] == []


def test_a_pattern_is_the_files_that_it_means(runs, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert runs.matching("tests/flaskapp/test_logs.py") == ["tests/flaskapp/test_logs.py"]
    both = [runs.matching(f"tests/flaskapp/test_[{letters}]*.py") for letters in ("d-l", "!d-l")]
    assert all(both)
    assert sorted(chain(*both)) == runs.matching("tests/flaskapp/test_*.py")


def is_there(place):
    path, _, name = place.partition("::")
    return (ROOT / path).exists() and (not name or f"def {name}(" in (ROOT / path).read_text())


def test_what_lies_within_a_place_of_the_other_kind_is_not_run_there(runs):
    within = ["tests/a/test_c.py", "tests/d", "tests/b.py::test_x"]
    assert runs.without(["tests/a", "tests/b.py", "tests/d/test_e.py"], within) == [
        "tests/a",
        "tests/b.py",
        "tests/d/test_e.py",
        "--deselect=tests/a/test_c.py",
        "--deselect=tests/b.py::test_x",
    ]


@pytest.mark.parametrize(
    ("statuses", "status"), [((0, 0), 0), ((0, 1), 1), ((5, 0), 0), ((5, 5), 5), ((5, 2), 2), ((0, -15), -15)]
)
def test_a_run_fails_as_its_parts_do(runs, statuses, status):
    assert runs.verdict(*statuses) == status


@pytest.mark.skipif("TEST_REDIS_URL" in os.environ, reason="the caller's own server")
def test_the_store_is_the_chosen_program(redis_url):
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        assert Path(client.info("server")["executable"]).resolve() == store_program().resolve()
