"""Clients that others wrote, in front of a real service with only their base URL and key changed.

Each client is a process in an environment of its own, which is asked one case after the other. The upstream is that of
the tests: it does what the case says and writes down what it was asked and what that costs.
"""

import contextlib
import hashlib
import json
import selectors
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import requests

from flaskapp.ops.embedded_redis import EmbeddedServer
from tests.interop.environments import NotInstalled, node_environment, python_environment
from tests.servers import ROOT, Service, client_of, wait_until
from tests.upstream import WORDS, Script, Upstream, bill_nanousd

if TYPE_CHECKING:
    import redis

SCRIPTS = ROOT / "tests" / "interop" / "clients"
CASE_SECONDS = 400
"""Some clients wait for two minutes, twice, where the budget of the day is used up."""
MODEL = "gpt-4o"
KEY, NEARLY_SPENT = "key-of-a-client", "key-with-one-answer-left"
QUESTION = "What is the weather in Oslo?"
TOO_LONG = {
    "error": {
        "message": "This model's maximum context length is 128000 tokens. However, your messages resulted in 130000.",
        "type": "invalid_request_error",
        "param": "messages",
        "code": "context_length_exceeded",
    }
}
THOUGHT = {"id": "chatcmpl-upstream", "object": "chat.completion.chunk", "created": 1_700_000_000, "model": MODEL}
THOUGHT |= {"choices": [{"index": 0, "delta": {"role": "assistant", "reasoning_content": "hm"}}]}


def identifier_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@dataclass(frozen=True)
class Client:
    """A client: what to install, by version, and the script that asks with it."""

    requirements: tuple[str, ...]
    script: str
    way_out: str = ""
    """Words of the 404 for the other route that this client can ask: what turns it to chat completions."""
    setting: str = ""
    """What it needs beside base URL and key, as the script sets it."""

    def command(self, name: str) -> list[str]:
        """What starts it, in its environment.

        Raises:
            NotInstalled: it cannot be run here.
        """
        if self.script == "curl.py":
            return [sys.executable, str(SCRIPTS / self.script)]
        if self.script.endswith(".py"):
            return [str(python_environment(name, self.requirements) / "python"), str(SCRIPTS / self.script)]
        place = node_environment(name, self.requirements)
        for script in (self.script, "conversation.mjs"):
            # Node looks for packages beside the script.
            shutil.copy(SCRIPTS / script, place)
        return ["node", str(place / self.script)]


CLIENTS = {
    "openai-python": Client(("openai==3.57.0",), "openai_python.py", "client.chat.completions.create"),
    "openai-node": Client(("openai@7.59.0",), "openai_node.mjs", "client.chat.completions.create"),
    "ai-sdk": Client(
        ("ai@7.0.173", "@ai-sdk/openai-compatible@3.0.92", "@ai-sdk/openai@4.0.118"), "ai_sdk.mjs", "openai.chat(model)"
    ),
    "langchain": Client(
        ("langchain-openai==1.7.4", "langchain==1.5.2"), "langchain_python.py", "use_responses_api=False"
    ),
    "langchain-js": Client(
        ("@langchain/openai@1.6.0", "@langchain/core@1.4.0"), "langchain_node.mjs", "LangChain", "maxRetries: 0"
    ),
    "litellm": Client(("litellm==1.110.2",), "litellm_python.py", "openai/<model> in LiteLLM"),
    "pydantic-ai": Client(("pydantic-ai-slim[openai]==2.68.0",), "pydantic_ai_python.py", "OpenAIChatModel"),
    "openai-agents": Client(
        ("openai-agents==0.24.0",), "agents_python.py", 'set_default_openai_api("chat_completions")'
    ),
    "llama-index": Client(
        ("llama-index-llms-openai-like==0.8.1",), "llama_index_python.py", "is_chat_model=True of OpenAILike"
    ),
    "llm": Client(("llm==0.36",), "llm_python.py"),
    "curl": Client(("curl --retry 3 --retry-max-time 30",), "curl.py"),
}


class Front:
    """The service, its Redis and its upstream: as a context manager."""

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tollgate-interop-")))
            server = stack.enter_context(EmbeddedServer(place / "redis"))
            self.books: redis.Redis = stack.enter_context(client_of(server))
            self.upstream = stack.enter_context(Upstream())
            one_answer = {"budget": "day", "owner": identifier_of(NEARLY_SPENT), "limit_usd": 0.0045}
            environment = {
                "LLM_BASE_URL": self.upstream.base_url,
                "LLM_API_KEY": "key-of-the-upstream",
                "LLM_MODEL": MODEL,
                "API_KEYS": f"{KEY},{NEARLY_SPENT}",
                "ENABLE_COST_THROTTLING": "true",
                "HIGH_COST_THRESHOLD_USD": "1",
                "NETWORK_COST_LIMIT_USD": "0",
                "DAILY_COST_LIMIT_USD": "5",
                "BUDGET_OVERRIDES": json.dumps([one_answer]),
                "CHAT_RATE_LIMIT": "1000 per minute",
            }
            self.service = stack.enter_context(Service(place / "service", server.url, **environment))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def forget(self) -> None:
        """As if no request had come."""
        wait_until(lambda: self.books.keys("llm:open:*") == [], 10, "nothing is pending")
        self.books.flushall()
        self.upstream.ledger.clear()
        self.upstream.scripts.clear()
        self.upstream.behave()

    def booked_nanousd(self, key: str) -> int:
        wait_until(lambda: self.books.keys("llm:open:*") == [], 10, "nothing is pending")
        return sum(int(self.books.get(day) or 0) for day in self.books.keys(f"llm:cost:daily:{identifier_of(key)}:*"))

    def asked(self) -> int:
        """How often a budget was asked for, since the start."""
        return sum("Cost throttling check called" in line for line in self.service.log_lines())


class Process:
    """A client that runs; a context manager."""

    def __init__(self, command: list[str], log: Path, base_url: str) -> None:
        self._command, self._log, self._base_url = command, log, base_url

    def __enter__(self) -> Self:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, cwd=self._log.parent
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, way: str, key: str) -> dict[str, Any]:
        """What it got: a text, and an error where there was one."""
        question = {"way": way, "base_url": f"{self._base_url}/v1", "key": key, "model": MODEL, "text": QUESTION}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            try:
                self._process.stdin.write(json.dumps(question).encode() + b"\n")
                self._process.stdin.flush()
                line = self._process.stdout.readline() if selector.select(CASE_SECONDS) else b""
            except BrokenPipeError:
                line = b""
        if not line:
            said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing"]
            raise NotInstalled(f"the client ended, or did not answer; it said: {said[-1][:200]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass
class Seen:
    """What a client got, and what happened meanwhile behind it."""

    text: str
    error: dict[str, Any]
    """Empty where there was none; else `class`, `status` and `message`."""
    asked: int
    """How often the service decided."""
    upstream_requests: list[dict[str, Any]]
    bought: int
    """How often a model worked."""
    booked_nanousd: int
    billed_nanousd: int

    @property
    def is_as_billed(self) -> bool:
        return self.booked_nanousd == self.billed_nanousd > 0

    @property
    def failure(self) -> str:
        return f"{self.error.get('status') or ''} `{self.error.get('class', 'no error')}`".strip()


Verdict = tuple[str, bool]
"""The cell of the table, and whether it is right."""


@dataclass(frozen=True)
class Case:
    """A column of the table."""

    title: str
    way: str
    judge: Callable[[Seen, Client], Verdict]
    scripts: tuple[Script, ...] = ()
    """What the upstream does with the first requests; then it answers as usual."""
    always: dict[str, Any] = field(default_factory=dict)
    """What it does with all others."""
    is_spent: bool = False
    """Whether the day's budget was used up before."""


ANSWER = "".join(WORDS)


def answered(seen: Seen, _: Client) -> Verdict:
    return "yes", seen.text == ANSWER and seen.is_as_billed and seen.bought == 1


def used_a_tool(seen: Seen, _: Client) -> Verdict:
    last = seen.upstream_requests[-1]["messages"] if seen.upstream_requests else []
    handed_back = [message for message in last if message["role"] == "tool"]
    return "yes", seen.text == ANSWER and seen.is_as_billed and seen.bought == 2 and len(handed_back) == 1


def refused(seen: Seen, _: Client) -> Verdict:
    return f"{seen.failure}, asks {seen.asked}×", seen.error.get("status") == 429 and seen.bought == 0


def waited(seen: Seen, _: Client) -> Verdict:
    if seen.error:
        return f"{seen.failure}, asks {seen.asked}×", seen.error["status"] == 429 and seen.booked_nanousd == 0
    return f"asks {seen.asked}×, answered", seen.bought == 1 and seen.text == ANSWER and seen.is_as_billed


def charged_once(seen: Seen, _: Client) -> Verdict:
    is_right = seen.error.get("status") == 424 and seen.bought == 1 and seen.booked_nanousd >= seen.billed_nanousd > 0
    return f"{seen.failure}, bought {seen.bought}×", is_right


def too_long(seen: Seen, _: Client) -> Verdict:
    is_right = seen.error.get("status") == 400 and "maximum context length" in seen.error["message"]
    return seen.failure, is_right and len(seen.upstream_requests) == 1 and seen.booked_nanousd == 0


def broke_off(seen: Seen, _: Client) -> Verdict:
    is_right = bool(seen.error) and seen.bought == 1 and seen.booked_nanousd >= seen.billed_nanousd > 0
    so_far = "keeps what came" if seen.text == ANSWER[: len(seen.text)] != "" else "nothing of it"
    return f"{seen.failure}, {so_far}, bought {seen.bought}×", is_right


def shown_the_way(seen: Seen, client: Client) -> Verdict:
    message = seen.error.get("message", "")
    return seen.failure, seen.error.get("status") == 404 and client.way_out in message and not seen.upstream_requests


CALLS_A_TOOL = Script(tool_call=True, raw=json.dumps(THOUGHT), hidden_tokens=1)
CASES = (
    Case("whole", "whole", answered),
    Case("streamed", "streamed", answered),
    Case("tool loop, streamed", "tools", used_a_tool, (CALLS_A_TOOL,)),
    Case("budget used up, `Retry-After` of hours", "whole", refused, is_spent=True),
    Case(
        "upstream busy, `Retry-After: 1`",
        "whole",
        waited,
        (Script(status=429, headers=(("Retry-After", "1"),)),),
    ),
    Case("failed and charged", "whole", charged_once, always={"ending": "cut"}),
    Case("prompt too long", "whole", too_long, always={"status": 400, "body": json.dumps(TOO_LONG)}),
    Case("stream cut", "streamed", broke_off, always={"words": WORDS[:3], "ending": "cut"}),
    Case("a route that is not offered", "other_route", shown_the_way),
)


def run(case: Case, client: Client, process: Process, front: Front) -> Verdict:
    """One case with one client; what it saw is told where it is wrong."""
    front.forget()
    key = NEARLY_SPENT if case.is_spent else KEY
    if case.is_spent:
        spend(front)
    front.upstream.scripts.extend(case.scripts)
    front.upstream.behave(**case.always)
    asked, booked = front.asked(), front.booked_nanousd(key)
    answer = process.ask(case.way, key)
    if answer.get("is_absent"):
        return "–", True
    ledger = front.upstream.ledger
    seen = Seen(
        answer["text"] or "",
        answer.get("error", {}),
        front.asked() - asked,
        [exchange.request for exchange in ledger],
        sum(exchange.taken for exchange in ledger),
        front.booked_nanousd(key) - booked,
        sum(map(bill_nanousd, ledger)),
    )
    cell, is_right = case.judge(seen, client)
    return (cell, True) if is_right else (f"WRONG: {cell}; {short(seen)}", False)


def short(seen: Seen) -> str:
    booked = f"booked {seen.booked_nanousd}, billed {seen.billed_nanousd}, bought {seen.bought}×, asked {seen.asked}×"
    return f"text {seen.text[:60]!r}, error {seen.error or None}, {booked}"


def spend(front: Front) -> None:
    """One answer whose usage is not known: so it is booked whole."""
    front.upstream.behave(usage="none")
    body = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}]}
    headers = {"Authorization": f"Bearer {NEARLY_SPENT}"}
    url = f"{front.service.base_url}/v1/chat/completions"
    requests.post(url, json=body, headers=headers, timeout=30).raise_for_status()
    wait_until(lambda: front.books.keys("llm:open:*") == [], 10, "nothing is pending")
    front.upstream.ledger.clear()


def row_of(name: str, client: Client, front: Front) -> Iterator[tuple[Case, str, bool]]:
    """Each case as it ran.

    Raises:
        NotInstalled: the client cannot be run here.
    """
    command = client.command(name)
    with Process(command, front.service.directory / f"{name}.log", front.service.base_url) as process:
        for case in CASES:
            yield case, *run(case, client, process, front)
