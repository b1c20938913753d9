"""What the routes know of a model: a request goes in, pieces of an answer come out, and at the end there is a usage.

`open` returns only when the model's server has accepted, so that a refusal becomes a status and not a broken stream.
After the answer has ended, for whatever reason, `usage` is what was used; None means that it cannot be known, and that
the whole reservation is booked.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from backends.pricing.prices import Price

MAX_CHOICES = 8
"""The most choices of one answer; each may cost `max_tokens`."""


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """A request to a model, in the words of OpenAI's chat completions."""

    model: str
    messages: Sequence[Mapping[str, Any]]
    max_tokens: int
    """Of each choice."""
    input_tokens: int
    """The caller's bound of the input."""
    deadline_seconds: float
    """From now on; it bounds everything that follows."""
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
    """Of the input, what was written to a cache (some providers charge more for that)."""
    reasoning_tokens: int = 0
    """Of the output, what was thought and not shown."""

    def cost_nanousd(self, price: Price) -> int:
        """What it costs at `price`, rounded up."""
        return price.cost_nanousd(
            self.input_tokens,
            self.output_tokens,
            self.cached_input_tokens,
            cache_write_tokens=self.cache_write_tokens,
            reasoning_tokens=self.reasoning_tokens,
        )


@dataclass(frozen=True, slots=True)
class Piece:
    """One step of an answer."""

    text: str
    """To show; empty where the step has none (reasoning, tool calls, another choice, the usage)."""
    deltas: int
    """Steps of generation that it certainly stands for, at least one token each; 0 where nothing was generated."""
    tokens: int
    """Tokens that it stands for, counted with the model's tokenizer where that is known; never below `deltas`."""
    chunk: Mapping[str, Any] | None = None
    """The server's own event, to be passed on."""
    lead_tokens: int = 0
    """The upstream's lead: tokens that came, with this piece's, since the reader last had read all there was."""


class Answer(Protocol):
    """An answer under way. Iterate it once; only `close` may be called from another thread meanwhile."""

    @property
    def usage(self) -> Usage | None:
        """What was used, once the answer has ended or was closed; None where it cannot be known."""

    @property
    def finish_reason(self) -> str:
        """Why it ended: `length` if `max_tokens` cut it."""

    def __iter__(self) -> Iterator[Piece]:
        """The pieces, as they arrive.

        Raises:
            UpstreamBroken: the answer broke off.
        """

    def hang_up(self) -> None:
        """Let the upstream generate no more. The iteration gives what has come by now, and then ends."""

    def close(self) -> None:
        """End it and drop the connection; may be called twice. An iteration that waits ends at once."""


@dataclass(frozen=True, slots=True)
class Completed:
    """A whole answer, not streamed."""

    body: dict[str, Any]
    """The server's own, in OpenAI's words."""
    usage: Usage | None
    """None where it cannot be known."""
    seen_tokens: int = 0
    """Tokens counted in the answer, where its usage is not known."""


class Model(Protocol):
    """A source of answers."""

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
        """Close its connections."""


class UpstreamError(Exception):
    """The model's server failed. The message is safe for clients; `detail` is for the log, short, without secrets."""

    def __init__(self, message: str, *, detail: str = "", status: int | None = None) -> None:
        super().__init__(message)
        self.detail = detail
        self.status = status
        """The server's status, where it answered."""


class UpstreamNotTaken(UpstreamError):
    """The server could not be reached, or answered with an error status or a redirect: it costs nothing (502)."""


class UpstreamBroken(UpstreamError):
    """The request was sent, then it failed: the whole reservation is booked (502, or 504 if `timed_out`)."""

    def __init__(self, message: str, *, detail: str = "", timed_out: bool = False) -> None:
        super().__init__(message, detail=detail)
        self.timed_out = timed_out
