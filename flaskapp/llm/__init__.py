"""What the rooms know of a model: a request goes in, pieces of an answer come out, and at the end there is a usage.

`open` comes back only when the model's server has said yes, so that a refusal becomes a status and not a broken stream.
After the answer has ended, for whatever reason, `usage` says what was used; None means that nobody can know it, and
that the whole reservation is what it cost.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from backends.pricing.prices import Price

MAX_CHOICES = 8
"""Of one answer: each may cost `max_tokens`."""


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """What a model is asked, in the words of OpenAI's chat completions."""

    model: str
    messages: Sequence[Mapping[str, Any]]
    max_tokens: int
    """Of each choice."""
    input_tokens: int
    """The caller's bound of the input."""
    deadline_seconds: float
    """From now on: bounds everything that follows."""
    choices: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    """Other parameters of the request's body, passed on as they are."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as the model's server counts them."""

    input_tokens: int
    output_tokens: int
    cached_input_tokens: int = 0
    """Of the input, what was read from a cache."""
    cache_write_tokens: int = 0
    """Of the input, what was written to a cache (some providers bill that dearer)."""
    reasoning_tokens: int = 0
    """Of the output, what was thought and not shown."""

    def cost_nanousd(self, price: Price) -> int:
        """What it costs under this price record, rounded up."""
        return price.cost_nanousd(
            self.input_tokens,
            self.output_tokens,
            self.cached_input_tokens,
            cache_write_tokens=self.cache_write_tokens,
            reasoning_tokens=self.reasoning_tokens,
        )


@dataclass(frozen=True, slots=True)
class Piece:
    """What came of an answer in one step."""

    text: str
    """To show; empty where the step has none (reasoning, tool calls, another choice, the usage)."""
    deltas: int
    """Steps of generation that it surely stands for, at least one token each; 0 where nothing was generated."""
    tokens: int
    """Tokens that it stands for, counted with the model's tokenizer where that is known; never below `deltas`."""
    chunk: Mapping[str, Any] | None = None
    """The server's own event, for whoever hands it on."""
    ahead: int = 0
    """Tokens that had come, this piece's included, since its reader last had read all that was there."""


class Answer(Protocol):
    """An answer under way. Iterate it once; only `close` may be called from another thread meanwhile."""

    @property
    def usage(self) -> Usage | None:
        """What was used, known once the answer has ended or was closed; None: cannot be known."""

    @property
    def finish_reason(self) -> str:
        """Why it ended: `length` if `max_tokens` cut it."""

    def __iter__(self) -> Iterator[Piece]:
        """The pieces, as they arrive.

        Raises:
            UpstreamBroken: the answer broke off.
        """

    def hang_up(self) -> None:
        """Let the upstream generate no more. Whoever iterates gets what has come by now, and then the end."""

    def close(self) -> None:
        """End it and drop the connection; may be said twice. A reader that waits is woken and sees the end."""


@dataclass(frozen=True, slots=True)
class Completed:
    """A whole answer, that nobody streamed."""

    body: dict[str, Any]
    """The server's own, in OpenAI's words."""
    usage: Usage | None
    """None: cannot be known."""
    seen_tokens: int = 0
    """Counted in what was said, where the usage is not known."""


class Model(Protocol):
    """Somebody who answers."""

    max_choices: int
    """How many choices a request may ask for."""

    def open(self, request: ModelRequest) -> Answer:
        """Ask for a stream; return when the answer has begun.

        Raises:
            UpstreamNotTaken: the request provably was not taken and costs nothing.
            UpstreamBroken: it was sent and went wrong; what it costs cannot be known.
        """

    def complete(self, request: ModelRequest) -> Completed:
        """Ask for a whole answer.

        Raises:
            UpstreamNotTaken: the request provably was not taken and costs nothing.
            UpstreamBroken: it was sent and went wrong; what it costs cannot be known.
        """

    def close(self) -> None:
        """Give back connections."""


class UpstreamError(Exception):
    """The model's server failed. The text is safe for clients; `detail` is for the log: short, clean, no secret."""

    def __init__(self, message: str, *, detail: str = "", status: int | None = None) -> None:
        super().__init__(message)
        self.detail = detail
        self.status = status
        """What the server answered with, where it did."""


class UpstreamNotTaken(UpstreamError):
    """It could not be reached, or answered with an error status or a redirect: it costs nothing (502)."""


class UpstreamBroken(UpstreamError):
    """The request was sent, then something broke: the whole reservation is booked (502, or 504 if `timed_out`)."""

    def __init__(self, message: str, *, detail: str = "", timed_out: bool = False) -> None:
        super().__init__(message, detail=detail)
        self.timed_out = timed_out
