"""The built-in model: offline and deterministic, at the pace of a human reader.

With it the service can be tried without a cost: its answers have a length and a pace like real ones, and its usage is
exact at any moment. A token of it is a word or a sign. What it says of Litecoin is true.
"""

import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson

from backends.clock import US_PER_SECOND, Clock
from flaskapp.llm import BETWEEN, NOTHING, Batch, Completed, ModelRequest, Piece, UpstreamBroken, Usage

_TOKEN = re.compile(r"\s*(?:\w+|[^\w\s])")
_TOPIC_CHARACTERS = 60
_BEFORE_TEXT, _AFTER_TEXT = b',"choices":[{"index":0,"delta":{', b'},"logprobs":null,"finish_reason":null}]}'

_OVERVIEW = (
    "Litecoin (LTC) is a peer-to-peer digital currency. Charlie Lee, then an engineer at Google, released it in "
    "October 2011 as a fork of the Bitcoin software. A block is found about every two and a half minutes, four times "
    "as often as Bitcoin's, so payments confirm sooner. Its miners use the Scrypt proof of work, and there will never "
    "be more than 84 million coins."
)
_MINING = (
    "Litecoin is mined with Scrypt, a proof of work that needs more memory than Bitcoin's SHA-256 and has its own "
    "specialised machines. Since 2014 it can be mined together with Dogecoin, which rewards the same work twice. "
    "The difficulty is set anew every 2,016 blocks, about every three and a half days, so that a block takes two "
    "and a half minutes on average."
)
_SUPPLY = (
    "There will never be more than 84 million litecoins, four times as many as bitcoins. The reward for a block "
    "began at 50 LTC in 2011 and is halved every 840,000 blocks, which is about every four years: in 2015 to 25, "
    "in 2019 to 12.5 and in August 2023 to 6.25 LTC. Fees go to the miners as well."
)
_PRIVACY = (
    "Litecoin activated MimbleWimble Extension Blocks, MWEB for short, in May 2022. Whoever wants to can move "
    "coins into them, where amounts are hidden and transactions are joined together, and move them back again. It "
    "is a choice: ordinary Litecoin transactions stay as public as those of Bitcoin."
)
_BITCOIN = (
    "Litecoin began as a fork of Bitcoin's software and has stayed close to it. Its blocks come every two and a "
    "half minutes instead of every ten, it has up to 84 million coins instead of 21 million, and it is mined with "
    "Scrypt instead of SHA-256. It activated SegWit in May 2017, a few months before Bitcoin did."
)
_ON_LITECOIN = (
    (("mine", "mining", "miner", "scrypt", "proof of work"), _MINING),
    (("halving", "supply", "reward", "how many"), _SUPPLY),
    (("mweb", "mimblewimble", "privacy", "private"), _PRIVACY),
    (("bitcoin", "btc", "difference", "compare"), _BITCOIN),
)
_GENERIC = (
    "You asked about “{topic}”. I am the built-in model of this service: I answer offline and always in the same way, "
    "so that everything around me can be tried without a key and without a bill. On this topic I have nothing wise to "
    "say, but ask me what Litecoin is, or set LLM_BASE_URL, and a larger model will answer here."
)

Wait = Callable[[threading.Event, float], object]
"""Waits until the event is set, for so many seconds at most."""


class BuiltinModel:
    """Answers at `tokens_per_second`; 0 is as fast as it can."""

    max_choices = 1
    """A second one would be the same."""

    def __init__(self, tokens_per_second: float, *, clock: Clock, wait: Wait = threading.Event.wait) -> None:
        self._seconds_per_token = 1 / tokens_per_second if tokens_per_second else 0.0
        self._clock = clock
        self._wait = wait

    def ask(self, request: ModelRequest) -> "BuiltinAnswer":
        """See `Model.ask`."""
        return BuiltinAnswer(request, seconds_per_token=self._seconds_per_token, clock=self._clock, wait=self._wait)

    def close(self) -> None:
        """Nothing to give back."""


class BuiltinAnswer:
    """An answer whose usage is what it has handed out, exactly, also when it is closed on the way."""

    def __init__(self, request: ModelRequest, *, seconds_per_token: float, clock: Clock, wait: Wait) -> None:
        self._request = request
        self._tokens: Sequence[str] = ()
        self.finish_reason = "stop"
        """`length` if the answer is longer than `max_tokens`."""
        self.usage = Usage(request.input_tokens, 0)
        """Known at any moment; it changes no more once the answer is closed."""
        self._next = 0
        """How many tokens were handed out; one more than there are once the end was."""
        self._started_seconds = 0.0
        self._seconds_per_token = seconds_per_token
        self._clock = clock
        self._wait = wait
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._envelope: dict[str, Any] = {}
        self._before = b""
        """What the event of a token begins with."""

    @property
    def has_ended(self) -> bool:
        """Its usage is always known."""
        return True

    def open(self) -> None:
        """Never fails."""
        tokens = _TOKEN.findall(reply(self._request.messages))
        self._tokens = tokens[: self._request.max_tokens]
        if len(tokens) > len(self._tokens):
            self.finish_reason = "length"
        self._started_seconds = self._clock.monotonic_seconds()
        self._envelope = {
            "id": f"chatcmpl-{os.urandom(16).hex()}",
            "object": "chat.completion.chunk",
            "created": self._clock.now_us() // US_PER_SECOND,
            "model": self._request.model,
        }
        self._before = orjson.dumps(self._envelope)[:-1] + _BEFORE_TEXT

    def whole(self) -> Completed:
        """The same answer in one piece, as OpenAI's API writes it, after the time that it takes to stream.

        Raises:
            UpstreamBroken: it takes longer than it may, or was closed.
        """
        self.open()
        ends_seconds = self._started_seconds + self._request.deadline_seconds
        text = ""
        while (batch := self.read(self._request.deadline_seconds)) is not None:
            text += "".join(piece.text for piece in batch.pieces)
            if self._clock.monotonic_seconds() > ends_seconds:
                raise UpstreamBroken("The model did not answer in time.", timed_out=True)
        if self._closing.is_set():
            raise UpstreamBroken("The answer was broken off.")
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self.finish_reason}
        usage = {
            "prompt_tokens": self._request.input_tokens,
            "completion_tokens": self.usage.output_tokens,
            "total_tokens": self._request.input_tokens + self.usage.output_tokens,
        }
        return Completed({**self._envelope, "object": "chat.completion", "choices": [choice], "usage": usage})

    def read(self, wait_seconds: float) -> Batch | None:
        """The tokens that are due; each is due at its own moment since the start, so that the pace never drifts."""
        first, last = self._next, len(self._tokens)
        if first > last:
            return None
        if self._seconds_per_token and first < last:
            last = self._due_within(wait_seconds)
        with self._lock:
            if self._closing.is_set():
                return None
            if first == last < len(self._tokens):
                return NOTHING
            self._next, self.usage = last, Usage(self._request.input_tokens, last)
        # As other servers send them: an event each, and the first of all says whose answer it is.
        tokens = self._tokens[first:last]
        events = [b'%b"content":%b%b' % (self._before, orjson.dumps(token), _AFTER_TEXT) for token in tokens]
        if events and not first:
            events[0] = self._before + b'"role":"assistant",' + events[0].removeprefix(self._before)
        pieces = []
        if events:
            pieces.append(Piece("".join(tokens), len(tokens), data=BETWEEN.join(events), texts=tokens, is_plain=True))
        if last == len(self._tokens):
            self._next = last + 1
            choice = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": self.finish_reason}
            pieces.append(Piece("", chunk={**self._envelope, "choices": [choice]}))
        return Batch(pieces, last - first, is_last=self._next > last)

    def _due_within(self, wait_seconds: float) -> int:
        """How many tokens are due in all, once the next one is; where that takes longer, how many were by now."""
        due_seconds = self._started_seconds + (self._next + 1) * self._seconds_per_token
        early_seconds = due_seconds - self._clock.monotonic_seconds()
        if early_seconds > 0:
            self._wait(self._closing, min(early_seconds, wait_seconds))
            if early_seconds > wait_seconds:
                return self._next
        passed_seconds = self._clock.monotonic_seconds() - self._started_seconds
        return min(len(self._tokens), max(self._next + 1, int(passed_seconds / self._seconds_per_token)))

    def hang_up(self) -> None:
        """See `Answer.hang_up`: a token is generated only when it is read, so this is `close`."""
        self.close()

    def close(self) -> None:
        """No token is handed out, or counted, after this."""
        with self._lock:
            self._closing.set()


def reply(messages: Sequence[Mapping[str, Any]]) -> str:
    """The model's answer: the same to the same messages, and always more than 40 tokens."""
    contents = [message.get("content") for message in messages if message.get("role") == "user"]
    questions = [content if isinstance(content, str) else _text_of_parts(content) for content in contents]
    query = questions[-1] if questions else ""
    if not any(re.search(r"litecoin|\bltc\b", question, re.IGNORECASE) for question in questions):
        return _GENERIC.format(topic=_topic(query))
    lowered = query.lower()
    return next((text for words, text in _ON_LITECOIN if any(word in lowered for word in words)), _OVERVIEW)


def _text_of_parts(content: object) -> str:
    parts = content if isinstance(content, list) else []
    return " ".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))


def _topic(query: str) -> str:
    words = " ".join(re.sub(r"[^\w\s.,:;!?'&%$€£+/-]", " ", query).split())
    if len(words) <= _TOPIC_CHARACTERS:
        return words.rstrip(" .?!") or "nothing in particular"
    return words[:_TOPIC_CHARACTERS].rsplit(" ", 1)[0] + " …"
