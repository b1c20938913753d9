"""An upstream that bills: an OpenAI-compatible model whose answers have a length and a pace like real ones.

Lengths are log-normal; each token is one event. A token counts once it was written, also when no client reads it, as a
provider would bill it. ``GET /stats`` returns the counts of each tenant, which is the first word of the last message.
"""

import argparse
import asyncio
import json
import math
import random
from collections import Counter, defaultdict
from typing import Any

from aiohttp import ClientConnectionResetError, web
from rs_bpe.bpe import openai as vocabularies

WORD = " tok"
"""One token of the usual vocabularies."""
_MESSAGE_TOKENS, _REQUEST_TOKENS = 4, 3


class BillingModel:
    """Counts what it generated for each tenant: requests, input_tokens, output_tokens, hung_up."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._random = random.Random(arguments.seed)
        self._count = vocabularies.o200k_base().count
        self.bills: dict[str, Counter[str]] = defaultdict(Counter)

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self.answer)
        app.router.add_get("/stats", self.stats)
        return app

    async def stats(self, _request: web.Request) -> web.Response:
        return web.json_response(self.bills)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        words = str(body["messages"][-1]["content"]).split()
        bill = self.bills[words[0] if words else ""]
        limit = int(body.get("max_completion_tokens") or body["max_tokens"])
        length = min(limit, max(1, round(self._random.lognormvariate(math.log(self._arguments.median), 0.8))))
        inputs = _REQUEST_TOKENS + sum(_MESSAGE_TOKENS + self._count(each["content"]) for each in body["messages"])
        bill.update(requests=1, input_tokens=inputs)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            await self._stream(response, bill, length, limit, inputs)
        except (ConnectionResetError, ClientConnectionResetError):
            bill.update(hung_up=1)
        return response

    async def _stream(
        self, response: web.StreamResponse, bill: Counter[str], length: int, limit: int, inputs: int
    ) -> None:
        for _ in range(length):
            await asyncio.sleep(self._arguments.ms_per_token / 1_000)
            await response.write(_event({"choices": [{"index": 0, "delta": {"content": WORD}}]}))
            bill.update(output_tokens=1)
        reason = "length" if length == limit else "stop"
        usage = {"prompt_tokens": inputs, "completion_tokens": length, "total_tokens": inputs + length}
        await response.write(_event({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}))
        await response.write(_event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n")
        await response.write_eof()


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.upstream", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--median", type=float, default=150.0, help="tokens of an answer (%(default)s)")
    parser.add_argument("--ms-per-token", type=float, default=5.0, help="its pace (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    web.run_app(BillingModel(arguments).app(), host="127.0.0.1", port=arguments.port, print=None, access_log=None)


if __name__ == "__main__":
    main()
