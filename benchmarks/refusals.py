"""``python -m benchmarks.refusals``: the processor time of a worker that each request of a corpus takes to be refused.

The corpus is what a single visitor may send to keep a worker busy, each body as long as `MAX_REQUEST_BYTES` allows. The
application runs in this process, without a server in front; the exit status is 1 where one takes more than 20 ms.
"""

import gc
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from flask.testing import FlaskClient
from rich.table import Column, Table

from flaskapp.cli.console import print_table
from flaskapp.config import load_config
from flaskapp.factory import create_app
from flaskapp.ops.embedded_redis import EmbeddedServer

BYTES = 1_000_000
MOST_MS = 20
TURNS = 3
CHAT, COMPLETIONS, LOG_IN = "/api/v1/chat/stream", "/v1/chat/completions", "/admin/login"


class Sent(NamedTuple):
    """A request of the corpus."""

    name: str
    path: str
    body: bytes
    media_type: str = "application/json"
    model: str = "gpt-4o"


def corpus() -> Iterator[Sent]:
    """Requests that are refused, each by another part of the way."""
    yield from _shapes()
    yield from _numbers_and_texts()
    yield from _forms()
    yield from _schemas()
    for model in ("gpt-4o", "gpt-4", "unknown-model"):
        yield from _long_texts(model)


def _padded(start: str, unit: str, end: str, size: int = BYTES) -> bytes:
    """`start`, as many units as there is space for, and `end`."""
    units = (size - len((start + end).encode())) // len(unit.encode())
    return (start + unit * units + end).encode()


def _shapes() -> Iterator[Sent]:
    for path, start in ((CHAT, '{"query":"a","x":'), (COMPLETIONS, '{"messages":')):
        place = "chat" if path == CHAT else "v1"
        yield Sent(f"{place}, nested", path, _padded(f"{start}[", "[" * 60 + "]" * 60 + ",", "1]}"))
        yield Sent(f"{place}, one nest", path, b"[" * (BYTES // 2) + b"]" * (BYTES // 2))
        yield Sent(f"{place}, objects in objects", path, b'{"a":' * (BYTES // 5))
        yield Sent(f"{place}, flat", path, _padded(f"{start}[", "1,", "1]}"))
        yield Sent(f"{place}, empty objects", path, _padded(f"{start}[", "{},", "1]}"))
        yield Sent(f"{place}, empty texts", path, _padded(f"{start}[", '"",', "1]}"))
        keys = ",".join(f'"k{number}":1' for number in range(80_000))
        yield Sent(f"{place}, many keys", path, f"{{{keys}}}".encode())
        yield Sent(f"{place}, one key again", path, _padded("{", '"k":1,', '"k":1}'))
        # Just below what is let through to be parsed.
        few = ",".join(f'"k{number}":[]' for number in range(2_400))
        yield Sent(f"{place}, fewer keys", path, f'{{"query":"a",{few}}}'.encode())
        yield Sent(f"{place}, fewer values", path, f"{start}[{'1,' * 9_900}1]}}".encode())
        yield Sent(f"{place}, fewer nests", path, f"{start}[{('[' * 60 + ']' * 60 + ',') * 150}1]}}".encode())


def _numbers_and_texts() -> Iterator[Sent]:
    for path in (CHAT, COMPLETIONS):
        place = "chat" if path == CHAT else "v1"
        field = '{"query":"a","max_tokens":' if path == CHAT else '{"messages":[{"role":"user"}],"max_tokens":'
        yield Sent(f"{place}, a long number", path, _padded(field, "9", "}"))
        yield Sent(f"{place}, a long fraction", path, _padded(f"{field}0.", "9", "}"))
        yield Sent(f"{place}, a huge exponent", path, f"{field}1e{'9' * 17}}}".encode())
        yield Sent(f"{place}, an exponent of digits", path, _padded(f"{field}1e", "9", "}"))
        yield Sent(f"{place}, long numbers", path, _padded(f"{field}[", "9" * 400 + ",", "1]}"))
        start = '{"query":"' if path == CHAT else '{"messages":[{"role":"user","content":"'
        end = '"}' if path == CHAT else '"}]}'
        yield Sent(f"{place}, escapes", path, _padded(start, "\\n", end))
        yield Sent(f"{place}, escaped pairs", path, _padded(start, "\\ud83d\\ude00", end))
        yield Sent(f"{place}, escaped quotes", path, _padded(start, '\\"', end))
        yield Sent(f"{place}, backslashes", path, _padded(start, "\\\\", end))
        yield Sent(f"{place}, half pairs", path, _padded(start, "\\ud800", end))
        yield Sent(f"{place}, commas in a text", path, _padded(start, ",:[]{}", end))
        yield Sent(f"{place}, quotes and commas", path, _padded(start, '\\",', end))
        yield Sent(f"{place}, white space", path, _padded(start + end, " ", ""))
        yield Sent(f"{place}, white space before", path, _padded("", " ", start + end))
        yield Sent(f"{place}, new lines", path, _padded("", "\n", "}"))
        yield Sent(f"{place}, quotes", path, b'"' * BYTES)
        yield Sent(f"{place}, no UTF-8", path, b'{"query":"' + b"a" * (BYTES - 20) + b'\xff"}')
        yield Sent(f"{place}, nulls", path, bytes(BYTES))
        yield Sent(f"{place}, a long key", path, _padded('{"', "k", '":1}'))
    turns = ",".join('{"role":"system","content":"x"}' for _ in range(3_000))
    yield Sent("chat, wrong turns", CHAT, f'{{"query":"a","chat_history":[{turns}]}}'.encode())
    wrong = ",".join('{"role":"x","content":[{"type":"y"}]}' for _ in range(900))
    yield Sent("v1, wrong messages", COMPLETIONS, f'{{"messages":[{wrong}]}}'.encode())
    for name, one, times in (("roles", '{"role":1}', 2_040), ("objects", "{}", 2_047), ("numbers", "1", 2_047)):
        yield Sent(f"v1, wrong {name}", COMPLETIONS, f'{{"messages":[{",".join([one] * times)}]}}'.encode())
    for name, one, times in (
        ("parts", "{}", 4_950),
        ("kinds", '{"type":[]}', 2_400),
        ("texts", '{"type":"text"}', 2_400),
    ):
        content = f'{{"role":"user","content":[{",".join([one] * times)}]}}'
        yield Sent(f"v1, wrong {name}", COMPLETIONS, f'{{"messages":[{content}]}}'.encode())
    calls = ",".join('{"function":{"name":1}}' for _ in range(1_900))
    yield Sent("v1, wrong calls", COMPLETIONS, f'{{"messages":[{{"role":"user","tool_calls":[{calls}]}}]}}'.encode())
    fields = ",".join(f'"f{number}":1' for number in range(4_900))
    yield Sent("v1, unknown fields", COMPLETIONS, f'{{"messages":[{{"role":"user",{fields}}}]}}'.encode())
    yield Sent("v1, unknown options", COMPLETIONS, f'{{"messages":[],{fields}}}'.encode())
    biases = ",".join(f'"{number}":101' for number in range(4_900))
    yield Sent(
        "v1, wrong biases", COMPLETIONS, f'{{"messages":[{{"role":"user"}}],"logit_bias":{{{biases}}}}}'.encode()
    )


def _forms() -> Iterator[Sent]:
    form, parts = "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"
    for size in (4_096, BYTES):
        yield Sent(f"log-in, {size} bytes of fields", LOG_IN, _padded("", "a=1&", "", size), form)
        yield Sent(f"log-in, {size} bytes of escapes", LOG_IN, _padded("token=", "%41", "", size), form)
        yield Sent(f"log-in, {size} bytes of ampersands", LOG_IN, b"&" * size, form)
        part = '--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n'
        yield Sent(f"log-in, {size} bytes of parts", LOG_IN, _padded("", part, "--x--", size), parts)
    yield Sent("chat, a form", CHAT, _padded("", "a=1&", ""), form)


def _schemas() -> Iterator[Sent]:
    """Pointers that a template may expand."""
    for name, pointers in (("to itself", '{"$ref":"#"}'), ("to the next", None)):
        if pointers is None:
            rows = (
                f'"a{number}":{{"x":{{"$ref":"#/$defs/a{number + 1}"}},"y":{{"$ref":"#/$defs/a{number + 1}"}}}}'
                for number in range(700)
            )
            schema = f'{{"$defs":{{{",".join(rows)}}},"$ref":"#/$defs/a0"}}'
        else:
            schema = f'{{"x":[{",".join([pointers] * 2_000)}]}}'
        tool = f'{{"type":"function","function":{{"name":"f","parameters":{schema}}}}}'
        for model in ("gpt-4o", "unknown-model"):
            body = f'{{"model":"{model}","messages":[{{"role":"user","content":"a"}}],"tools":[{tool}]}}'
            yield Sent(f"v1, $ref {name}, {model}", COMPLETIONS, body.encode(), model=model)
            pieces = '"$ref":"#/' + "~1" * 400_000 + '"'
            tool_long = f'{{"type":"function","function":{{"name":"f","parameters":{{{pieces}}}}}}}'
            body = f'{{"model":"{model}","messages":[{{"role":"user","content":"a"}}],"tools":[{tool_long}]}}'
            yield Sent(f"v1, a long $ref, {model}", COMPLETIONS, body.encode(), model=model)


WORST_TEXTS = {
    "letters": "a",
    "spaces": " ",
    "words": "the ",
    "digits": "1",
    "marks": "!?",
    "emoji": "\U0001f600",
    "Thai": "\u0e01",
    "joined": "\u200d\U0001f468",
    "lengthened by NFC": "\u0fb9",
    "lengthened by NFKC": "\ufdfa",
    "combining": "a\u0301\u0327\u0323",
    "lines": "\r\n",
    "consonants": "bcdfghjklmnp",
    "mixed": "aA1 \u00e9\n",
}
"""What tokenizers, patterns and normal forms take longest with."""


def _long_texts(model: str) -> Iterator[Sent]:
    for name, unit in WORST_TEXTS.items():
        text = _padded("", unit, "", 14_900).decode()
        turns = ",".join(f'{{"role":"user","content":{_json_text(text)}}}' for _ in range(64))
        body = f'{{"model":"{model}","chat_history":[{turns}],"query":"a","max_tokens":401}}'
        yield Sent(f"chat, 64 turns of {name}, {model}", CHAT, body.encode(), model=model)
        query = _json_text(_padded("", unit, "", 7_900).decode())
        body = f'{{"model":"{model}","chat_history":[{turns[: turns.rfind(",{")]}],"query":{query}}}'
        yield Sent(f"chat, a long query of {name}, {model}", CHAT, body.encode(), model=model)
        whole = _json_text(_padded("", unit, "", BYTES - 100_000).decode())
        body = f'{{"model":"{model}","messages":[{{"role":"user","content":{whole}}}]}}'
        yield Sent(f"v1, a text of {name}, {model}", COMPLETIONS, body.encode(), model=model)
        body = f'{{"model":"{model}","messages":[{turns}]}}'
        yield Sent(f"v1, 64 turns of {name}, {model}", COMPLETIONS, body.encode(), model=model)


def _json_text(text: str) -> str:
    return f'"{text}"'.replace("\r", "\\r").replace("\n", "\\n")


class Measured(NamedTuple):
    """What became of a request, and what it took."""

    sent: Sent
    status: int
    ms: float


def measure(client: FlaskClient, sent: Sent, turns: int = TURNS) -> Measured:
    """The least processor time of several turns, in milliseconds: the rest of the machine only ever adds to it."""
    best, status = float("inf"), 0
    for number in range(turns):
        headers = {"X-Fingerprint": f"visitor-{number}", "Content-Type": sent.media_type}
        gc.collect()
        started = time.thread_time()
        with client.post(sent.path, data=sent.body, headers=headers, buffered=True) as response:
            status = response.status_code
        best = min(best, time.thread_time() - started)
    return Measured(sent, status, best * 1_000)


def environment(redis_url: str) -> dict[str, str]:
    """Whatever passes is refused for its cost."""
    return {
        "REDIS_URL": redis_url,
        "DEMO_TOKENS_PER_SECOND": "0",
        "ENABLE_CHALLENGE_RESPONSE": "false",
        "ADMIN_TOKEN": "a-token-of-the-benchmark",
        "API_KEYS": "*",
        "CHAT_RATE_LIMIT": "1000000 per minute",
        # What is not refused for its body is refused for its cost.
        "ENABLE_COST_THROTTLING": "true",
        "HIGH_COST_THRESHOLD_USD": "0.000000001",
        "LLM_MODELS": "gpt-4o,gpt-4,unknown-model",
        "LLM_PRICE_INPUT_USD_PER_MTOK": "1",
        "LLM_PRICE_OUTPUT_USD_PER_MTOK": "1",
    }


def main() -> int:
    """Measure all; 1 where one takes longer than it may, or is not refused."""
    with TemporaryDirectory(prefix="tollgate-refusals-") as directory, EmbeddedServer(Path(directory)) as server:
        client = create_app(load_config(environment(server.url))).test_client()
        measured = [measure(client, sent) for sent in corpus() if not sys.argv[1:] or sys.argv[1] in sent.name]
    table = Table("refused", Column("bytes", justify="right"), "status", Column("ms of processor", justify="right"))
    for sent, status, ms in sorted(measured, key=lambda row: -row.ms):
        table.add_row(sent.name, f"{len(sent.body):,}", str(status), f"{ms:.1f}")
    print_table(table)
    missed = [row for row in measured if row.ms > MOST_MS or not 400 <= row.status < 500]
    for row in missed:
        print(f"missed: {row.sent.name}: {row.status} in {row.ms:.1f} ms", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
