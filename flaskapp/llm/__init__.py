"""What the routes know of a model: a request goes in, pieces of an answer come out, and at the end there is a usage.

`Model.ask` makes an answer and sends nothing. `Answer.open` returns only when the model's server has accepted, so that
a refusal becomes a status and not a broken stream. After the answer has ended, for whatever reason, `usage` is what was
used; None means that it cannot be known, and that the whole reservation is booked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from backends.contract import frozen_for_the_type_checker
from backends.pricing.prices import Price

MAX_CHOICES = 8
"""The most choices of one answer; each may cost `max_tokens`."""


@frozen_for_the_type_checker
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


@frozen_for_the_type_checker
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
    long_cache_write_tokens: int = 0
    """Of what was written to a cache, what was written to one that lasts longer and costs more."""
    text_tokens: int = 0
    """Of the output, what is known to be text. The rest may be of any kind that the model bills."""
    searches: int = 0
    """Searches that are billed beside the tokens."""
    billed_nanousd: int = 0
    """What the provider itself says that it bills; 0 where it does not say."""

    def cost_nanousd(self, price: Price) -> int:
        """What it costs at `price`, rounded up."""
        return price.cost_nanousd(
            self.input_tokens,
            self.output_tokens,
            self.cached_input_tokens,
            cache_write_tokens=self.cache_write_tokens,
            long_cache_write_tokens=self.long_cache_write_tokens,
            reasoning_tokens=self.reasoning_tokens,
            text_tokens=self.text_tokens,
            searches=self.searches,
        )


BETWEEN = b"\n\ndata: "
"""What stands between the data of two server-sent events."""


@dataclass(slots=True)
class Piece:
    """One event of an answer; or several that came together and are plain."""

    text: str
    """To show; empty where it has none (reasoning, tool calls, another choice, the usage)."""
    deltas: int = 0
    """Events of it in which something was generated. Mostly each is a token; some servers send single letters."""
    chunk: Mapping[str, Any] | None = None
    """The server's own event; None where `is_plain`."""
    data: bytes = b""
    """The same as the server wrote it, on one line; empty where it has to be written anew.

    Of several events there is `BETWEEN` between two.
    """
    texts: Sequence[str] = ()
    """Of plain events, the text of each."""
    is_plain: bool = False
    """Each of its events is one step, with text of the one choice and nothing else: `data` need not be read."""
    has_usage: bool = False
    """Each of its plain events says that it has no usage: ``"usage": null``."""

    def first(self, events: int) -> "Piece":
        """The first of its plain events."""
        texts, data = self.texts[:events], BETWEEN.join(self.data.split(BETWEEN)[:events])
        return replace(self, text="".join(texts), deltas=events, data=data, texts=texts)


@dataclass(slots=True)
class Batch:
    """What one read gave."""

    pieces: Sequence[Piece] = ()
    tokens: int = 0
    """Tokens that they add to the answer, counted with the model's tokenizer where that is known."""
    lead_tokens: int = 0
    """The upstream's lead: tokens that came, with these, since the reader last had read all there was."""
    is_last: bool = False
    """Nothing follows, and the usage is final: the next read returns None at once."""


NOTHING = Batch()
"""Nothing came in the time."""


class Answer(Protocol):
    """An answer, from its request to its end. One thread at a time uses it; only `close` may be called by another."""

    @property
    def usage(self) -> Usage | None:
        """What was used, once the answer has ended or was closed; None where it cannot be known."""

    @property
    def has_ended(self) -> bool:
        """Whether the answer came to its own end, so that a usage that has not come by then never comes."""

    @property
    def finish_reason(self) -> str:
        """Why it ended: `length` if `max_tokens` cut it."""

    def open(self) -> None:
        """Ask for a stream; return when the answer has begun.

        Raises:
            UpstreamNotTaken: the request provably was not taken and costs nothing.
            UpstreamBroken: it was sent and went wrong; what it costs cannot be known.
        """

    def whole(self) -> "Completed":
        """Ask for a whole answer, in place of `open` and `read`. Raises as `open` does."""

    def read(self, wait_seconds: float) -> Batch | None:
        """What came with one read; `NOTHING` where nothing came in the time; None at the end.

        Raises:
            UpstreamNotTaken: the server reported an error before it gave anything of an answer.
            UpstreamBroken: the answer broke off, or its deadline has passed.
        """

    def hang_up(self) -> None:
        """Let the upstream generate no more. What has come by now can still be read."""

    def close(self) -> None:
        """End it and drop the connection; may be called twice. Whatever waits for the server ends at once."""


@dataclass(frozen=True, slots=True)
class Completed:
    """A whole answer, not streamed."""

    body: dict[str, Any]
    """The server's own, in OpenAI's words."""
    data: bytes = b""
    """The same as the server wrote it; empty where it has to be written anew."""
    seen_tokens: int = 0
    """Tokens counted in the answer, where its usage is not known."""


class Model(Protocol):
    """A source of answers."""

    max_choices: int
    """How many choices a request may ask for."""

    def ask(self, request: ModelRequest) -> Answer:
        """The answer to a request. Nothing is sent yet."""

    def close(self) -> None:
        """Close its connections."""


class UpstreamError(Exception):
    """The model's server failed. The message is safe for clients; `detail` is for the log, short, without secrets."""

    is_billed = False
    """The server sent a usage with its error: then that is the answer's, and what it cost."""

    def __init__(self, message: str, *, detail: str = "", status: int | None = None) -> None:
        super().__init__(message)
        self.detail = detail
        self.status = status
        """The server's status, where it answered."""


class UpstreamNotTaken(UpstreamError):
    """The server could not be reached, or answered with an error in place of an answer: it costs nothing (502)."""


class UpstreamRefused(UpstreamNotTaken):
    """The server finds the request at fault (400)."""

    def __init__(
        self,
        reason: str,
        *,
        is_too_long: bool = False,
        is_unknown_model: bool = False,
        detail: str = "",
        status: int | None = None,
    ) -> None:
        super().__init__(f"The model's server refused the request: {reason}", detail=detail, status=status)
        self.reason = reason
        """The server's own words, cut and cleaned."""
        self.is_too_long = is_too_long
        """The request is longer than the model's context."""
        self.is_unknown_model = is_unknown_model
        """The request names a model that the server does not have."""


class UpstreamUnknownModel(UpstreamNotTaken):
    """The server has no such model."""


class UpstreamBusy(UpstreamNotTaken):
    """The server takes no requests now (429 or 503)."""

    def __init__(
        self,
        *,
        is_rate_limited: bool,
        helps_to_wait: bool = True,
        retry_after_seconds: int | None = None,
        detail: str = "",
        status: int | None = None,
    ) -> None:
        words = "accepts no more requests of this service for now" if is_rate_limited else "is overloaded"
        super().__init__(f"The model's server {words}.", detail=detail, status=status)
        self.is_rate_limited = is_rate_limited
        self.helps_to_wait = helps_to_wait
        """False where an account is used up."""
        self.retry_after_seconds = retry_after_seconds
        """How long the server says to wait; None where it does not say."""


class UpstreamBroken(UpstreamError):
    """The request was sent, then it failed: the whole reservation is booked (502, or 504 if `timed_out`)."""

    def __init__(self, message: str, *, detail: str = "", timed_out: bool = False, status: int | None = None) -> None:
        super().__init__(message, detail=detail, status=status)
        self.timed_out = timed_out
