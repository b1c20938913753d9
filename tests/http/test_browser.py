"""A page of another origin in a real Chromium: what it can read of a stream, a refusal and an answer that breaks."""

import http.server
import json
import shutil
import subprocess
import threading

import pytest

from tests.embedded import FragileServer
from tests.servers import Service, client_of, wait_until
from tests.upstream import WORDS, Upstream

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAGE = """<!doctype html><script type="module">
const service = SERVICE;
const post = (path, value) => fetch(path, { method: "POST", body: JSON.stringify(value) });
const json = { "Content-Type": "application/json" };
const names = ["RateLimit", "RateLimit-Policy", "Retry-After", "X-Request-ID", "X-Cost-Reserved-USD", "Server-Timing"];

async function read(path, headers, body) {
  const asked = { method: "POST", headers: { ...json, ...headers }, body: JSON.stringify(body) };
  const answer = await fetch(service + path, asked);
  const readable = names.filter((name) => answer.headers.has(name));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    text += value;
    if (text.includes("word0")) await post("/first");
  }
  return { status: answer.status, readable, text, retryAfter: answer.headers.get("Retry-After") };
}

async function chat() {
  const given = await fetch(`${service}/api/v1/auth/challenge`, { headers: { "X-Fingerprint": "hash456" } });
  const { challenge } = await given.json();
  const headers = { "X-Fingerprint": `fp:${challenge}:hash456` };
  return await read("/api/v1/chat/stream", headers, { query: "What is Litecoin?" });
}

async function completion(path = "/v1/chat/completions") {
  const more = { "X-Stainless-OS": "Unknown", "Idempotency-Key": crypto.randomUUID() };
  const headers = { Authorization: "Bearer key-of-a-page", ...more };
  return await read(path, headers, { messages: [{ role: "user", content: "What is Litecoin?" }], stream: true });
}

const ways = { chat, completion, elsewhere: () => completion("/v1/responses") };
try {
  await post("/seen", await ways[location.hash.slice(1)]());
} catch (error) {
  await post("/seen", { failed: error.name });
}
</script>"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")


class Pages(http.server.ThreadingHTTPServer):
    """Serves the page, and takes what it has seen."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.service_url = ""
        self.has_begun, self.is_over = threading.Event(), threading.Event()
        self.seen = {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def open(self, way, directory, host="localhost"):
        """What the page of that origin has seen."""
        self.is_over.clear()
        url = f"http://{host}:{self.server_address[1]}/#{way}"
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={directory}", "--no-first-run"]
        with (directory / "chromium.log").open("wb") as log:
            browser = subprocess.Popen([CHROMIUM, *options, url], stdout=log, stderr=log)
        try:
            assert self.is_over.wait(60), (directory / "chromium.log").read_text(errors="replace")[-2_000:]
        finally:
            browser.kill()
            browser.wait()
        return self.seen


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = PAGE.replace("SERVICE", json.dumps(self.server.service_url)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.send_response(204)
        self.end_headers()
        if self.path == "/first":
            self.server.has_begun.set()
        else:
            self.server.seen = json.loads(content)
            self.server.is_over.set()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def pages():
    with Pages() as pages:
        yield pages
        pages.shutdown()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def _server(place):
    with FragileServer(place / "redis") as server:
        yield server


@pytest.fixture(scope="module")
def _upstream():
    with Upstream() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def _service(pages, place, _server, _upstream):
    environment = {
        "LLM_BASE_URL": _upstream.base_url,
        "API_KEYS": "key-of-a-page",
        "CORS_ORIGINS": f"http://localhost:{pages.server_address[1]}",
        "ENVIRONMENT": "production",
        "DAILY_COST_LIMIT_USD": "0.006",
    }
    with Service(place / "service", _server.url, **environment) as service:
        pages.service_url = service.base_url
        yield service


@pytest.fixture
def upstream(_service, _upstream, _server):
    with client_of(_server) as books:
        wait_until(lambda: books.keys("llm:open:*") == [], 10, "nothing is pending")
        books.flushall()
    _upstream.ledger.clear()
    _upstream.behave()
    return _upstream


FOR_ANSWERS = ["RateLimit", "RateLimit-Policy", "X-Request-ID", "X-Cost-Reserved-USD", "Server-Timing"]


@pytest.mark.parametrize("way", ["chat", "completion"])
def test_a_page_reads_a_stream_while_it_comes(pages, upstream, tmp_path, way):
    pages.has_begun.clear()
    # The upstream waits in the middle until the page has read its first word.
    upstream.behave(wait_for=pages.has_begun)
    seen = pages.open(way, tmp_path)
    assert (seen["status"], seen["readable"]) == (200, FOR_ANSWERS)
    assert all(word in seen["text"] for word in WORDS)
    assert '"status":"complete"' in seen["text"] if way == "chat" else seen["text"].endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("way", ["chat", "completion"])
def test_a_page_reads_a_refusal_and_how_long_it_lasts(pages, upstream, tmp_path, way):
    upstream.behave(usage="none")
    assert pages.open(way, tmp_path)["status"] == 200
    seen = pages.open(way, tmp_path)
    assert seen["status"] == 429
    assert {"Retry-After", "Server-Timing", "X-Request-ID"} <= set(seen["readable"])
    assert int(seen["retryAfter"]) >= 1
    assert "Daily usage limit reached" in seen["text"]
    assert len(upstream.ledger) == 1


@pytest.mark.parametrize("way", ["chat", "completion"])
def test_a_page_reads_that_an_answer_broke(pages, upstream, tmp_path, way):
    upstream.behave(words=WORDS[:3], ending="cut")
    seen = pages.open(way, tmp_path)
    assert (seen["status"], "word2" in seen["text"]) == (200, True)
    last = json.loads(seen["text"].strip().rpartition("data: ")[2])
    assert (last["error"] if way == "chat" else last["error"]["code"]) == "upstream_error"


def test_a_page_reads_which_way_out_there_is(pages, upstream, tmp_path):
    seen = pages.open("elsewhere", tmp_path)
    assert (seen["status"], "/v1/chat/completions" in seen["text"]) == (404, True)


@pytest.mark.parametrize("way", ["chat", "completion"])
def test_a_page_of_an_origin_that_is_not_named_reads_nothing(pages, upstream, tmp_path, way):
    assert pages.open(way, tmp_path, host="127.0.0.1") == {"failed": "TypeError"}
    assert upstream.ledger == []
