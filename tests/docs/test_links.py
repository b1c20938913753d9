import re

import pytest

from tests.docs.pages import PAGES, ROOT

LINK = re.compile(r"\[[^\]\n]+\]\(([^)\s]+)\)")
EXTERNAL = ("http://", "https://")


def _without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def _anchors(text: str) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", _without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    text = _without_code(page.read_text(encoding="utf-8"))
    dead = [link for link in LINK.findall(text) if not link.startswith(EXTERNAL) and not _leads_somewhere(page, link)]
    assert dead == []


def _leads_somewhere(page, link) -> bool:
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if not target.exists():
        return False
    return not anchor or anchor in _anchors(target.read_text(encoding="utf-8"))


def test_every_page_is_linked_from_the_index():
    index = ROOT / "docs" / "README.md"
    linked = {
        (index.parent / link.partition("#")[0]).resolve() for link in LINK.findall(index.read_text(encoding="utf-8"))
    }
    assert [str(page.relative_to(ROOT)) for page in PAGES if page != index and page not in linked] == []


def test_every_file_that_a_page_names_is_there():
    named = re.compile(r"\b(?:backends|benchmarks|docs|flaskapp|scripts|tests)/[\w/]+\.(?:lua|md|py|sh|svg)\b")
    missing = {
        name: str(page.relative_to(ROOT))
        for page in PAGES
        for name in named.findall(page.read_text(encoding="utf-8"))
        if not (ROOT / name).exists()
    }
    assert missing == {}


def test_the_pages_that_the_seed_names_are_there():
    names = (
        "testing/TESTING_COST_THROTTLING_ATOMIC.md",
        "fixes/COST_THROTTLING_ATOMIC_OPTIMIZATION.md",
        "fixes/COST_THROTTLING_ENHANCEMENTS.md",
        "features/FEATURE_ADVANCED_ABUSE_PREVENTION.md",
    )
    assert [name for name in names if ROOT / "docs" / name not in PAGES] == []


def test_the_readme_begins_with_the_two_commands():
    words = (ROOT / "README.md").read_text(encoding="utf-8")[:500]
    assert "ENABLE_COST_THROTTLING=true ENABLE_CHALLENGE_RESPONSE=false ./scripts/run-dev.sh" in words
    assert "\n./scripts/test.sh" in words


def test_no_page_tells_of_the_machine_on_which_it_was_written():
    places = re.compile(r"(?<![\w.])/(work|root|home|tmp|Users)/")
    assert [str(page.relative_to(ROOT)) for page in PAGES if places.search(page.read_text(encoding="utf-8"))] == []
