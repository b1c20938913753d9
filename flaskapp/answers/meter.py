"""What one answer costs: reserved before it begins, extended as it runs where the policy says so, and ended once."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from backends.budgets import Budget
from backends.contract import Reservation, frozen_for_the_type_checker
from backends.guard import Guard
from backends.pricing.prices import Price
from backends.pricing.token_bounds import shows_its_tokens
from flaskapp.llm import Batch, Piece, Usage
from flaskapp.settings import LiveSettings


class ObservedLead:
    """The largest lead, in tokens, that upstreams had lately in this process.

    A busy machine reads late, and what came meanwhile was generated and is billed. An observation counts for the next
    `MEMORY_PIECES` pieces, of all answers together, and for twice as many at most.
    """

    MEMORY_PIECES = 20_000

    def __init__(self) -> None:
        self._now = 0
        self._before = 0
        self._pieces = 0

    @property
    def tokens(self) -> int:
        """The largest lead."""
        return max(self._now, self._before)

    def note(self, tokens: int, pieces: int) -> None:
        """Record the lead at so many pieces that came together."""
        self._now = max(self._now, tokens)
        self._pieces += pieces
        if self._pieces >= self.MEMORY_PIECES:
            self._before, self._now, self._pieces = self._now, 0, 0


OBSERVED_LEAD = ObservedLead()
ABSURD_TIMES = 10
"""A usage of more than so many times the tokens that were reserved for is no overrun, but an error of the upstream."""


@dataclass(frozen=True, slots=True)
class Slices:
    """How a reservation grows with its answer, in output tokens."""

    slice_tokens: int
    """What one extension adds."""
    least_cushion_tokens: int
    """What is reserved at least beyond what was read, for the upstream's lead."""
    observed_lead: ObservedLead = OBSERVED_LEAD
    """Where leads are larger than half the cushion, the cushion grows to twice the lead."""

    @property
    def cushion_tokens(self) -> int:
        """The cushion now; a slice, or eight times the least cushion, is the most that it grows to."""
        grown = min(2 * self.observed_lead.tokens, max(self.slice_tokens, 8 * self.least_cushion_tokens))
        return max(self.least_cushion_tokens, grown)

    @property
    def last_cushion_tokens(self) -> int:
        """Where an extension is refused, the answer goes on until less than this is left.

        It is the observed lead, at most a quarter of a slice: a larger cushion is a wish, and no reason to end.
        """
        return max(self.least_cushion_tokens, min(self.observed_lead.tokens, self.slice_tokens // 4))

    @property
    def retry_tokens(self) -> int:
        """After a refusal the meter asks again so many tokens later: other answers may have ended."""
        return max(1, self.slice_tokens // 16)

    @property
    def least_first_tokens(self) -> int:
        """On the last of a budget an answer begins with this: an eighth of a slice, and its last cushion."""
        return self.slice_tokens // 8 + max(self.least_cushion_tokens, self.slice_tokens // 4)

    def first_tokens(self, max_tokens: int) -> int:
        """What is reserved before an answer begins: with the least cushion, whatever leads other answers have had."""
        return min(max_tokens, self.slice_tokens + self.least_cushion_tokens)


def slices_of(settings: LiveSettings, model: str, choices: int = 1) -> Slices | None:
    """How reservations for `model` grow, for all `choices` together; None: all of it is reserved before.

    The lead of a model that thinks unseen has no bound, so only models that show their tokens are sliced.
    """
    if settings.reservation_policy != "slices" or not shows_its_tokens(model):
        return None
    return Slices(settings.reservation_slice_tokens * choices, settings.reservation_cushion_tokens * choices)


@frozen_for_the_type_checker
class CostBound:
    """What an answer can use at most, at one price."""

    price: Price
    max_usage: Usage
    """The input's bound, and the maximum of output tokens that the upstream gets, of all choices together."""
    slices: Slices | None = None
    """How the reservation grows; None: all of it is reserved before."""
    overhead_tokens: int = 0
    """Of the input's bound, what the model's template puts in by itself."""

    def first_costs_nanousd(self) -> tuple[int, int | None]:
        """What is reserved before the model is called: the cost of `max_usage`, or of a first slice.

        The second is the part of it with which an answer begins on the last of a budget; None: it needs all of it.
        """
        if self.slices is None:
            max_usage = self.max_usage
            return self.price.highest_cost_nanousd(max_usage.input_tokens, max_usage.output_tokens), None
        tokens = self.slices.first_tokens(self.max_usage.output_tokens)
        at_least = min(self.slices.least_first_tokens, tokens)
        return self.highest_cost_nanousd(tokens), self.highest_cost_nanousd(at_least)

    def highest_cost_nanousd(self, output_tokens: int) -> int:
        """The most that the input and so many output tokens cost."""
        return self.price.highest_cost_nanousd(self.max_usage.input_tokens, output_tokens)


class Meter:
    """Counts one answer, keeps its reservation ahead of it, and settles once, at the price of the reservation.

    Args:
        reservation: None while cost throttling is off; then the meter only counts.
        budgets: those of today, asked for at each extension.
        books_seen: an answer that ended well and reported no usage is booked at what was counted, and not whole.
    """

    def __init__(
        self,
        guard: Guard,
        reservation: Reservation | None,
        cost_bound: CostBound,
        budgets: Callable[[], tuple[Budget, ...]],
        *,
        books_seen: bool = False,
    ) -> None:
        self.max_usage = cost_bound.max_usage
        self.prompt_tokens = self.max_usage.input_tokens - cost_bound.overhead_tokens
        """The bound of the input without the overhead."""
        self.most_credible_tokens = ABSURD_TIMES * (self.max_usage.input_tokens + self.max_usage.output_tokens)
        """A usage of more is absurd: it is not believed, and the reservation is booked."""
        self.books_seen = books_seen
        self._is_seen_all = False
        self._guard = guard
        self._reservation = reservation
        self._cost_bound = cost_bound
        self._price = cost_bound.price
        self._slices = cost_bound.slices if reservation is not None else None
        self._budgets = budgets
        self._covered_tokens = self.max_usage.output_tokens
        if cost_bound.slices is not None:
            self._covered_tokens = self._tokens_within(self._reserved_nanousd, 0, self._covered_tokens)
        self.is_exceeded = False
        """The upstream gave more than its maximum."""
        self._deltas = 0
        self._tokens = 0
        self._retry_at_tokens = 0
        self._is_used_up = False
        self._max_lead_tokens: int | None = None
        self._lock = threading.Lock()
        self._cost_nanousd: int | None = None

    @property
    def is_growing(self) -> bool:
        """Whether the reservation grows with the answer: then what is not read is neither counted nor reserved."""
        return self._slices is not None

    @property
    def model(self) -> str:
        """The model's name."""
        return self._price.model

    @property
    def assumed_usage(self) -> Usage:
        """The usage that is reported where the real one is unknown: as much as is booked for it."""
        if self._is_seen_all:
            return Usage(self.max_usage.input_tokens, self._tokens)
        return Usage(self.max_usage.input_tokens, max(self._unknown_tokens, self._seen_tokens))

    def count(self, batch: Batch) -> bool:
        """Count what one read gave, and extend the reservation where it needs that.

        Returns:
            False if the answer has to end: the upstream exceeds its maximum, or an extension was refused.
        """
        deltas = sum([piece.deltas for piece in batch.pieces])
        self._deltas += deltas
        self._tokens += batch.tokens
        steps, tokens, maximum = self._deltas, self._tokens, self.max_usage.output_tokens
        # Some servers send single letters: events that are more than the tokens in them are no steps of generation.
        self.is_exceeded = maximum < steps <= tokens
        if tokens > maximum and shows_its_tokens(self._price.model):
            # A text that is counted in parts may have a few tokens more than the whole: an eighth, at least eight.
            self.is_exceeded = self.is_exceeded or tokens > maximum + max(8, maximum // 8)
        elif tokens > 3 * maximum:
            # The estimate is too high for some scripts, but hardly for an honest answer by so much.
            self.is_exceeded = self.is_exceeded or steps > maximum
        if self._slices is not None:
            self._slices.observed_lead.note(batch.lead_tokens, deltas)
        if self.is_exceeded or self._is_used_up:
            return False
        self._is_used_up = self._slices is not None and not self._cover(self._slices)
        return not self._is_used_up

    def within_maximum(self, pieces: Sequence[Piece]) -> Sequence[Piece]:
        """Of the pieces that were counted last, those within the maximum of steps."""
        steps = self._deltas - self.max_usage.output_tokens
        kept = list(pieces)
        while kept and steps > 0:
            last = kept.pop()
            if last.is_plain and last.deltas > steps:
                kept.append(last.first(last.deltas - steps))
            steps -= last.deltas
        return kept

    def priced_nanousd(self, usage: Usage) -> int:
        """What `usage` costs at the price of the reservation."""
        return usage.cost_nanousd(self._price)

    def settle(self, usage: Usage | None, *, is_fully_read: bool = False, is_unreported: bool = False) -> int:
        """Book `usage`, or all that is reserved where it is unknown (None).

        What the upstream itself says that it bills is booked where it is more. Where the answer ended well and its
        usage `is_unreported`, what was counted is booked if the meter `books_seen`.

        Where a refused extension ended the answer, only the upstream's lead is unknown if it `is_fully_read`: every
        piece that came before the end, or before the hang-up, was counted.

        Returns:
            The amount booked, in nano-dollars; a second call books nothing and returns the first one's amount.
        """
        with self._lock:
            if self._cost_nanousd is not None:
                return self._cost_nanousd
            if is_fully_read and self._is_used_up and self._slices is not None:
                self._max_lead_tokens = self._slices.least_cushion_tokens
            self._is_seen_all = is_unreported and self.books_seen
            if usage is not None:
                cost_nanousd = max(usage.cost_nanousd(self._price), usage.billed_nanousd)
            elif self._is_seen_all:
                cost_nanousd = self._cost_bound.highest_cost_nanousd(self._tokens)
            else:
                cost_nanousd = self._unknown_cost_nanousd
            self._cost_nanousd = cost_nanousd
            reservation = self._reservation
        if reservation is not None:
            self._guard.settle(reservation, cost_nanousd)
        return cost_nanousd

    def release(self) -> int:
        """Book nothing, since the upstream provably did no work. Returns as `settle` does."""
        with self._lock:
            if self._cost_nanousd is not None:
                return self._cost_nanousd
            self._cost_nanousd = 0
            reservation = self._reservation
        if reservation is not None:
            self._guard.release(reservation)
        return 0

    def _cover(self, slices: Slices) -> bool:
        """Extend the reservation if the cushion has shrunk; whether the answer may go on."""
        maximum = self.max_usage.output_tokens
        wished = min(self._tokens + slices.cushion_tokens, maximum)
        needed = min(self._tokens + slices.last_cushion_tokens, maximum)
        may_go_on = needed <= self._covered_tokens
        if wished <= self._covered_tokens or (may_go_on and self._tokens < self._retry_at_tokens):
            return True
        at_least = wished if may_go_on else needed
        with self._lock:
            # After the settlement nothing is extended.
            reservation = self._reservation if self._cost_nanousd is None else None
            if reservation is None:
                return False
            wanted = min(wished + slices.slice_tokens, maximum)
            extended = self._guard.extend(
                reservation,
                self._cost_bound.highest_cost_nanousd(wanted),
                self._budgets(),
                at_least_nanousd=self._cost_bound.highest_cost_nanousd(at_least),
            )
            if extended is None:
                self._retry_at_tokens = self._tokens + slices.retry_tokens
                return may_go_on
            self._reservation = extended
            self._covered_tokens = self._tokens_within(extended.cost_nanousd, at_least, wanted)
        return True

    def _tokens_within(self, reserved_nanousd: int, at_least: int, at_most: int) -> int:
        """The most output tokens that `reserved_nanousd` covers; a search, since prices may have steps."""
        while at_least < at_most:
            middle = (at_least + at_most + 1) // 2
            if self._cost_bound.highest_cost_nanousd(middle) <= reserved_nanousd:
                at_least = middle
            else:
                at_most = middle - 1
        return at_least

    @property
    def _unknown_cost_nanousd(self) -> int:
        cost_nanousd = self._reserved_nanousd
        if self._max_lead_tokens is not None:
            cost_nanousd = min(cost_nanousd, self._cost_bound.highest_cost_nanousd(self._unknown_tokens))
        return max(cost_nanousd, self._cost_bound.highest_cost_nanousd(self._seen_tokens))

    @property
    def _reserved_nanousd(self) -> int:
        """What is reserved; while cost throttling is off, what would be."""
        if self._reservation is None:
            return self._cost_bound.highest_cost_nanousd(self.max_usage.output_tokens)
        return self._reservation.cost_nanousd

    @property
    def _unknown_tokens(self) -> int:
        """The most output that may have been generated within the reservation."""
        if self._max_lead_tokens is None:
            return self._covered_tokens
        return min(self._covered_tokens, self._tokens + self._max_lead_tokens)

    @property
    def _seen_tokens(self) -> int:
        """Output tokens that were read for certain.

        A count above the maximum is believed where the answer is cut for it, or where it is more than twice the
        maximum: an estimate by bytes may be too high for an honest answer, but not by so much.
        """
        maximum = self.max_usage.output_tokens
        is_more = self.is_exceeded or self._tokens > 2 * maximum
        return self._tokens if is_more else min(self._tokens, maximum)
