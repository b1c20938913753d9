"""Each recipe of docs/UPSTREAMS.md is a configuration that starts, and the server that it names is asked as it says."""

import re
from urllib.parse import urlsplit, urlunsplit

import pytest

from tests.docs.pages import ROOT, blocks
from tests.upstream import Upstream

RECIPES = {str(block): block.text for block in blocks(ROOT / "docs" / "UPSTREAMS.md") if block.language == "ini"}
MOST_TOKENS = ("max_tokens", "max_completion_tokens")


@pytest.fixture
def upstream():
    with Upstream() as server:
        yield server


def variables_of(text):
    """What is in angle brackets becomes a word."""
    pairs = dict(line.split("=", 1) for line in text.splitlines())
    return {name: re.sub(r"<[^>]*>", "mine", value) for name, value in pairs.items()}


def test_there_is_one_for_each_upstream_of_the_table():
    page = (ROOT / "docs" / "UPSTREAMS.md").read_text(encoding="utf-8")
    named = page[page.index("| upstream | tried |") : page.index("## Recipes")]
    titles = re.findall(r"^### (.+)$", page, re.MULTILINE)
    assert len(titles) == len(RECIPES) == 13
    assert [title for title in titles if title not in named] == []


@pytest.mark.parametrize("text", RECIPES.values(), ids=RECIPES.keys())
def test_a_recipe_starts_and_is_asked_as_it_says(make_app, upstream, text):
    variables = variables_of(text)
    meant = urlsplit(variables["LLM_BASE_URL"])
    here = urlsplit(upstream.base_url)
    local = urlunsplit((here.scheme, here.netloc, meant.path, meant.query, ""))
    service = make_app(**(variables | {"LLM_BASE_URL": local}), API_KEYS="*")
    body = {"messages": [{"role": "user", "content": "What is Litecoin?"}], "max_tokens": 5}
    answer = service.client.post("/v1/chat/completions", json=body)
    assert (answer.status_code, service.chat(max_tokens=5).status_code) == (200, 200)
    assert {each.path for each in upstream.ledger} == {
        f"{meant.path}/chat/completions" + (f"?{meant.query}" if meant.query else "")
    }
    key = variables.get("LLM_API_KEY")
    header, value = ("api-key", key) if "LLM_AUTH_HEADER" in variables else ("authorization", key and f"Bearer {key}")
    for exchange in upstream.ledger:
        headers = {name.lower(): text for name, text in exchange.headers.items()}
        assert headers.get(header) == value
        assert exchange.request["model"] == variables["LLM_MODEL"]
        assert [exchange.request[name] for name in MOST_TOKENS if name in exchange.request] == [5]
    whole, streamed = (exchange.request for exchange in upstream.ledger)
    assert "stream_options" not in whole
    assert ("stream_options" in streamed) == (variables.get("LLM_STREAM_USAGE") != "false")
    billed = [each.input_tokens + each.generated_tokens for each in upstream.ledger]
    assert answer.json["usage"]["total_tokens"] == billed[0]
