"""How many tokens a prompt can have at most, counted without a network.

Where the model's tokenizer is known (OpenAI's families), text is counted exactly with it; for any other model each byte
of UTF-8 counts as a token: byte-level tokenizers, and SentencePiece with byte fallback, never make more tokens than
bytes. Many normalise the text first, to NFC or NFKC, which may lengthen it, so the longest of the three forms counts.
What wraps each message and each request is added: OpenAI documents 4 tokens a message and 3 a request; other
servers' chat templates add a few words. The allowances below are above all of those that we know.

Text that looks like a special token (``<|endoftext|>``) is counted as ordinary text. A server that honoured it would
count one token instead, so the bound holds either way.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal, Protocol, TypeAlias, get_args
from unicodedata import combining, normalize

from rs_bpe.bpe import openai as vocabularies

_O200K = re.compile(r"(ft:)?(gpt-4o|chatgpt-4o|gpt-4\.1|gpt-4\.5|gpt-5|o[134])(?![0-9a-z])")
_CL100K = re.compile(r"(ft:)?(gpt-4|gpt-3\.5|gpt-35)(-|$)")
_SHOWN = re.compile(r"(ft:)?((chatgpt-4o|gpt-4o|gpt-4\.1|gpt-4\.5)(?![0-9a-z])|(gpt-4|gpt-3\.5|gpt-35)(-|$))")
_NOT_ONLY_TEXT = re.compile(r"audio|realtime|search|transcribe|tts|thinking")


def shows_its_tokens(model: str) -> bool:
    """Whether all tokens that `model` bills are in its answer and can be counted: OpenAI's families that do not think.

    Of other names it is not known: many models think first, and bill for thoughts that they do not send.
    """
    name = model.lower().rpartition("/")[2]
    return bool(_SHOWN.match(name)) and not _NOT_ONLY_TEXT.search(name)


Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    role: Role
    content: str


class InputTooLong(ValueError):
    """The question alone, with what the service adds to it, is longer than an input may be."""

    def __init__(self, max_input_tokens: int) -> None:
        super().__init__(f"The question is longer than the {max_input_tokens} tokens that an input may have.")
        self.max_input_tokens = max_input_tokens


class _Tokenizer(Protocol):
    def count(self, text: str, /) -> int: ...
    def count_till_limit(self, text: str, limit: int, /) -> int | None: ...


@dataclass(frozen=True, slots=True)
class TokenBound:
    """An upper bound of a prompt's tokens for one model."""

    count_within: Callable[[str, int], int | None]
    """Counts the tokens of a text up to a limit, and stops there; None above it."""
    message_tokens: int
    """For what wraps a message."""
    request_tokens: int
    """For what wraps a request."""
    definitions_tokens: int = 128
    """For the words around tools or a schema, once a request."""
    definition_indent: int | None = None
    """The indent of a definition's JSON in the prompt at most; None: the prompt has it in fewer bytes."""

    def fit(
        self, system: str, history: Sequence[Message], query: str, max_input_tokens: int
    ) -> tuple[tuple[Message, ...], int]:
        """The newest messages of `history` that fit between `system` and `query`, with both, and their bound in tokens.

        Each text is counted once, from the newest on, until one does not fit. What is kept begins with a user's turn:
        many models refuse a conversation that does not. An empty `system` is left out.

        Raises:
            InputTooLong: `system` and `query` do not fit alone.
        """
        first, last = [Message("system", system)] if system else [], Message("user", query)
        left: int | None = max_input_tokens - self.request_tokens
        for message in (*first, last):
            left = self._left_after(message, left)
        if left is None:
            raise InputTooLong(max_input_tokens)
        kept: list[Message] = []
        for message in reversed(history):
            rest = self._left_after(message, left)
            if rest is None:
                break
            left = rest
            kept.append(message)
        while kept and kept[-1].role != "user":
            left += max_input_tokens - (self._left_after(kept.pop(), max_input_tokens) or 0)
        return (*first, *reversed(kept), last), max_input_tokens - left

    def _left_after(self, message: Message, left: int | None) -> int | None:
        limit = -1 if left is None else left - self.message_tokens
        tokens = self.count_within(message.content, limit) if limit >= 0 else None
        return None if tokens is None else limit - tokens


@cache
def bound_for(model: str) -> TokenBound:
    """The bound for a model by its name; a provider's prefix (``openai/gpt-4o``) does not matter."""
    tokenizer = _tokenizer_of(model)
    if tokenizer is not None:
        return TokenBound(tokenizer.count_till_limit, message_tokens=8, request_tokens=16)
    # It takes a twentieth of a second to make: now, and not while a visitor waits.
    _pile_of_marks()
    return TokenBound(_bytes_within, message_tokens=16, request_tokens=64, definitions_tokens=512, definition_indent=4)


@cache
def counter_for(model: str) -> Callable[[str], int]:
    """Counts the tokens of a piece of an answer, with the tokenizer where it is known, else as a quarter of its bytes.

    That is an estimate, for extending a reservation as its answer runs, and no bound: a model may write a word in more
    tokens than its tokenizer would.
    """
    tokenizer = _tokenizer_of(model)
    if tokenizer is None:
        return lambda text: -(-len(text.encode(errors="surrogatepass")) // 4)
    count = tokenizer.count

    def count_any(text: str) -> int:
        try:
            return count(text)
        except UnicodeEncodeError:
            # A model may write the halves of a surrogate pair one by one.
            return count(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))

    return count_any


def _tokenizer_of(model: str) -> _Tokenizer | None:
    name = model.lower().rpartition("/")[2]
    known: tuple[tuple[re.Pattern[str], Callable[[], _Tokenizer]], ...] = (
        (_O200K, vocabularies.o200k_base),
        (_CL100K, vocabularies.cl100k_base),
    )
    return next((load() for pattern, load in known if pattern.match(name)), None)


def _bytes_within(text: str, limit: int) -> int | None:
    size = len(text.encode())
    if size <= limit and not text.isascii():
        size = max(size, _normalised_bytes(text))
    return size if size <= limit else None


def most_bytes(text: str) -> int:
    """The bytes of the longest form of `text`: as it is, in NFC or in NFKC."""
    return len(text) if text.isascii() else max(len(text.encode()), _normalised_bytes(text))


_Form: TypeAlias = Literal["NFC", "NFKC"]
_FORMS: tuple[_Form, ...] = get_args(_Form)
_MOST_MARKS = 30
"""Of a run of marks on one letter, after the Stream-Safe Text Format of Unicode. No language has more."""
_LAST_MARK = 0x1F000
"""No mark has a code point above it."""


def _normalised_bytes(text: str) -> int:
    """The most bytes of `text` in NFC or in NFKC, at least.

    Tokenizers differ in how they normalise. One that knows an older Unicode leaves some characters as they are, so what
    a form shortens counts as it is; SentencePiece's puts fewer characters together, so each counts alone too.
    """
    characters = Counter(text)
    if _pile_of_marks().search(text):
        # Normalising sorts such a run, in a time that grows with its square. No form has more bytes than its letters
        # and marks one by one.
        return sum(times * _most_bytes_alone(character) for character, times in characters.items())
    return max(_bytes_in(form, text, characters) for form in _FORMS)


def _bytes_in(form: _Form, text: str, characters: Mapping[str, int]) -> int:
    added = saved = 0
    for character, times in characters.items():
        more_bytes = _more_bytes(form, character)
        if more_bytes > 0:
            added += times * more_bytes
        else:
            saved -= times * more_bytes
    return max(len(text.encode()) + added, len(normalize(form, text).encode()) + saved)


@cache
def _pile_of_marks() -> re.Pattern[str]:
    """More characters in a row than `_MOST_MARKS` that begin with a mark once they are taken apart."""
    marks = [chr(code) for code in range(_LAST_MARK) if combining(normalize("NFKD", chr(code))[0])]
    return re.compile(f"[{''.join(marks)}]{{{_MOST_MARKS + 1},}}")


@lru_cache(maxsize=4_096)
def _more_bytes(form: _Form, character: str) -> int:
    """How many bytes more a character has in a form than as it is; less than 0 where it has fewer."""
    return len(normalize(form, character).encode()) - len(character.encode())


def _most_bytes_alone(character: str) -> int:
    return max(len(form.encode()) for form in (character, normalize("NFD", character), normalize("NFKD", character)))
