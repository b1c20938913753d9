"""How many tokens a prompt can have at most, counted without a network.

Where the model's tokenizer is known (OpenAI's families), text is counted exactly with it; for any other model a token
is taken to be one byte of UTF-8: byte-level tokenizers, and SentencePiece with byte fallback, never make more tokens
than bytes. On top comes what wraps each message and each request: OpenAI documents 4 tokens a message and 3 a request;
other servers' chat templates put in a few words of their own. The allowances below are above all that we know of.

Text that looks like a special token (``<|endoftext|>``) is counted as ordinary text. A server that honoured it would
count one token instead, so the bound holds either way.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol

from rs_bpe.bpe import openai as vocabularies

_O200K = re.compile(r"(ft:)?(gpt-4o|chatgpt-4o|gpt-4\.1|gpt-4\.5|gpt-5|o[134])(?![0-9a-z])")
_CL100K = re.compile(r"(ft:)?(gpt-4|gpt-3\.5|gpt-35)(-|$)")
_SHOWN = re.compile(r"(ft:)?((chatgpt-4o|gpt-4o|gpt-4\.1|gpt-4\.5)(?![0-9a-z])|(gpt-4|gpt-3\.5|gpt-35)(-|$))")
_NOT_ONLY_TEXT = re.compile(r"audio|realtime|search|transcribe|tts|thinking")


def shows_its_tokens(model: str) -> bool:
    """Whether each token that it bills is in what it sends, and can be counted: OpenAI's families that do not think.

    Of any other name nobody can say it: many models think before they speak, and bill for what nobody is shown.
    """
    name = model.lower().rpartition("/")[2]
    return bool(_SHOWN.match(name)) and not _NOT_ONLY_TEXT.search(name)


Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    role: Role
    content: str

    def as_json(self) -> dict[str, Any]:
        """As OpenAI's API writes it."""
        return {"role": self.role, "content": self.content}


class InputTooLong(ValueError):
    """The question alone, with what the service adds to it, is longer than the input may be."""

    def __init__(self, max_input_tokens: int) -> None:
        super().__init__(f"The question is longer than the {max_input_tokens} tokens that an input may have.")
        self.max_input_tokens = max_input_tokens


class _Tokenizer(Protocol):
    def count_till_limit(self, text: str, limit: int, /) -> int | None: ...


@dataclass(frozen=True, slots=True)
class TokenBound:
    """An upper bound of a prompt's tokens for one model."""

    count_within: Callable[[str, int], int | None]
    """Tokens of a text, or None if there are more than the limit; it stops reading there."""
    message_tokens: int
    """For what wraps a message."""
    request_tokens: int
    """For what wraps a request."""
    definitions_tokens: int = 128
    """For the words that tell a model of its tools or of a schema, once a request."""
    definition_indent: int | None = None
    """With how much indent the JSON of a definition may stand in the prompt; None: it stands there in fewer bytes."""

    def fit(
        self, system: str, history: Sequence[Message], query: str, max_input_tokens: int
    ) -> tuple[tuple[Message, ...], int]:
        """The newest whole turns of `history` that fit, between `system` and `query`, and the bound of it all.

        Each text is counted once, and from the newest on only until one does not fit.

        Raises:
            InputTooLong: `system` and `query` do not fit alone.
        """
        first, last = Message("system", system), Message("user", query)
        left: int | None = max_input_tokens - self.request_tokens
        for turn in (first, last):
            left = self._left_after(turn, left)
        if left is None:
            raise InputTooLong(max_input_tokens)
        kept: list[Message] = []
        for turn in reversed(history):
            rest = self._left_after(turn, left)
            if rest is None:
                break
            left = rest
            kept.append(turn)
        return (first, *reversed(kept), last), max_input_tokens - left

    def _left_after(self, turn: Message, left: int | None) -> int | None:
        room = -1 if left is None else left - self.message_tokens
        tokens = self.count_within(turn.content, room) if room >= 0 else None
        return None if tokens is None else room - tokens


@cache
def bound_for(model: str) -> TokenBound:
    """The bound for a model by its name; a provider's prefix (``openai/gpt-4o``) does not matter."""
    name = model.lower().rpartition("/")[2]
    if _O200K.match(name):
        return TokenBound(_counter(vocabularies.o200k_base()), message_tokens=8, request_tokens=16)
    if _CL100K.match(name):
        return TokenBound(_counter(vocabularies.cl100k_base()), message_tokens=8, request_tokens=16)
    return TokenBound(_bytes_within, message_tokens=16, request_tokens=64, definitions_tokens=512, definition_indent=4)


@cache
def counter_for(model: str) -> Callable[[str], int]:
    """How many tokens a piece of an answer stands for: exact where the tokenizer is known, else a quarter of its bytes.

    An estimate for extending a reservation as its answer runs, and no bound: a model may spell a word in more tokens
    than its tokenizer would.
    """
    name = model.lower().rpartition("/")[2]
    for known, tokenizer in ((_O200K, vocabularies.o200k_base), (_CL100K, vocabularies.cl100k_base)):
        if known.match(name):
            count: Callable[[str], int] = tokenizer().count
            return count
    return lambda text: -(-len(text.encode()) // 4)


def _counter(tokenizer: _Tokenizer) -> Callable[[str, int], int | None]:
    def count_within(text: str, limit: int) -> int | None:
        return tokenizer.count_till_limit(text, limit)

    return count_within


def _bytes_within(text: str, limit: int) -> int | None:
    size = len(text.encode())
    return size if size <= limit else None
