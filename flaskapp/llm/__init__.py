"""What the chat room knows of a model: turns go in, text comes out piece by piece, and at the end there is a usage.

`open` comes back only when the model's server has said yes, so that a refusal becomes a status and not a broken stream.
After the answer has ended, for whatever reason, `usage` says what was used; None means that nobody can know it, and
that the whole reservation is what it cost.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from backends.pricing import Price

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: Role
    content: str


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


class Answer(Protocol):
    """An answer under way. Iterate it once; only `close` may be called from another thread meanwhile."""

    @property
    def usage(self) -> Usage | None:
        """What was used, known once the answer has ended or was closed; None: cannot be known."""

    @property
    def finish_reason(self) -> FinishReason:
        """Why it ended: `length` if `max_tokens` cut it."""

    def __iter__(self) -> Iterator[str]:
        """Pieces of text, none of them empty, as they arrive.

        Raises:
            UpstreamBroken: the answer broke off.
        """

    def close(self) -> None:
        """End it and drop the connection; may be said twice. A reader that waits is woken and sees the end."""


class Model(Protocol):
    """Somebody who answers."""

    def open(
        self, turns: Sequence[Turn], *, model: str, max_tokens: int, input_tokens: int, deadline_seconds: float
    ) -> Answer:
        """Ask; return when the answer has begun.

        `input_tokens` is the caller's bound for `turns`; `deadline_seconds`, from now, bounds everything that follows.

        Raises:
            UpstreamNotTaken: the request provably was not taken and costs nothing.
            UpstreamBroken: it was sent and went wrong; what it costs cannot be known.
        """

    def close(self) -> None:
        """Give back connections."""


class UpstreamError(Exception):
    """The model's server failed. The text is safe for clients; `detail` is for the log: short, clean, no secret."""

    def __init__(self, message: str, *, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail


class UpstreamNotTaken(UpstreamError):
    """It could not be reached, or answered with an error status or a redirect: it costs nothing (502)."""


class UpstreamBroken(UpstreamError):
    """The request was sent, then something broke: the whole reservation is booked (502, or 504 if `timed_out`)."""

    def __init__(self, message: str, *, detail: str = "", timed_out: bool = False) -> None:
        super().__init__(message, detail=detail)
        self.timed_out = timed_out
