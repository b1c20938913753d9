"""What one answer costs: reserved before it begins, extended as it runs where the policy says so, and ended once."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from backends.contract import Limits, Reservation
from backends.guard import Guard
from backends.pricing.prices import Price
from backends.pricing.token_bounds import shows_its_tokens
from flaskapp.llm import Piece, Usage
from flaskapp.settings import LiveSettings

_UNREAD_CHARACTERS = 1_048_576
"""Of a growing reservation's answer, what may wait for its client; who is further behind gets the end of it."""


class RunAhead:
    """How far upstreams were seen to be ahead of their readers in this process, lately.

    A busy machine reads late, and what came meanwhile was generated and is billed. What was seen counts for at least
    `MEMORY_PIECES` pieces, of all answers together, and at most for twice as many.
    """

    MEMORY_PIECES = 20_000

    def __init__(self) -> None:
        self._now = 0
        self._before = 0
        self._pieces = 0

    @property
    def tokens(self) -> int:
        """The most that was seen."""
        return max(self._now, self._before)

    def note(self, tokens: int) -> None:
        """So many tokens had come before their reader looked."""
        self._now = max(self._now, tokens)
        self._pieces += 1
        if self._pieces >= self.MEMORY_PIECES:
            self._before, self._now, self._pieces = self._now, 0, 0


RUN_AHEAD = RunAhead()


@dataclass(frozen=True, slots=True)
class Slices:
    """How a reservation grows with its answer, in output tokens."""

    slice_tokens: int
    """What is asked for at a time."""
    least_cushion_tokens: int
    """What is held beyond what was read, for what the upstream may be ahead of its reader."""
    run_ahead: RunAhead = RUN_AHEAD
    """Where upstreams are seen to be further ahead than half the cushion, it grows to twice that."""

    @property
    def cushion_tokens(self) -> int:
        """The cushion that is held now: a slice, or eight times the least one, is the most that it grows to."""
        grown = min(2 * self.run_ahead.tokens, max(self.slice_tokens, 8 * self.least_cushion_tokens))
        return max(self.least_cushion_tokens, grown)

    @property
    def last_cushion_tokens(self) -> int:
        """Where no more is to be had, an answer goes on until less than this is left: what was seen ahead, and at most
        a quarter of a slice. What it wished for beyond that is no reason to end it.
        """
        return max(self.least_cushion_tokens, min(self.run_ahead.tokens, self.slice_tokens // 4))

    @property
    def patience_tokens(self) -> int:
        """After so many more it asks again; others may have ended meanwhile."""
        return max(1, self.slice_tokens // 16)

    @property
    def least_first_tokens(self) -> int:
        """With so much an answer may begin on the last of a budget: an eighth of a slice, and what it ends before."""
        return self.slice_tokens // 8 + max(self.least_cushion_tokens, self.slice_tokens // 4)

    def first(self, most: Usage) -> Usage:
        """What is reserved before an answer begins.

        With the least cushion, whatever was seen elsewhere: nobody's answer may make another's never fit.
        """
        return Usage(most.input_tokens, min(most.output_tokens, self.slice_tokens + self.least_cushion_tokens))


def slices_of(settings: LiveSettings, model: str) -> Slices | None:
    """How reservations grow, as the settings say; None: all of it is reserved before.

    A model that thinks unseen may be far ahead of what is read: there no cushion is large enough. So it has to be known
    that it does not.
    """
    if settings.reservation_policy != "slices" or not shows_its_tokens(model):
        return None
    return Slices(settings.reservation_slice_tokens, settings.reservation_cushion_tokens)


class Meter:
    """One answer's money: covers what is generated, and ends once, at the price at which it was reserved.

    Args:
        reservation: None while cost throttling is off; then it only adds up.
        most: the input's bound, and the most output tokens that the upstream was told, of all choices together.
        slices: how the reservation grows; None if all of it was reserved before.
        limits: asked at each extension.
    """

    def __init__(
        self,
        guard: Guard,
        reservation: Reservation | None,
        price: Price,
        most: Usage,
        *,
        slices: Slices | None = None,
        limits: Callable[[], Limits],
    ) -> None:
        self.most = most
        self._guard = guard
        self._reservation = reservation
        self._price = price
        self._slices = slices if reservation is not None else None
        self._limits = limits
        self._covered_tokens = most.output_tokens if slices is None else self._tokens_within_first(most)
        self._deltas = 0
        self._tokens = 0
        self._asks_again_at_tokens = 0
        self._is_used_up = False
        self._unseen_tokens: int | None = None
        self._lock = threading.Lock()
        self._cost_nanousd: int | None = None

    @property
    def is_exceeded(self) -> bool:
        """Whether the upstream gave more than it was asked for.

        Steps are counted, and tokens where they can be. Text that comes in parts may be counted as a few tokens more
        than the model made of it whole: an eighth of the maximum, eight at least, is let pass.
        """
        most = self.most.output_tokens
        if self._deltas > most:
            return True
        return shows_its_tokens(self._price.model) and self._tokens > most + max(8, most // 8)

    @property
    def most_unread_characters(self) -> int | None:
        """How much may wait for a client that reads slowly; None: as all is reserved, the upstream waits for it."""
        return None if self._slices is None else _UNREAD_CHARACTERS

    @property
    def unknown_usage(self) -> Usage:
        """What is told where nobody can know what was used: as much as is booked for it."""
        return Usage(self.most.input_tokens, max(self._highest_unknown_tokens, self._seen_tokens))

    def take(self, piece: Piece) -> bool:
        """Count what was generated; False if the answer has to end here, since nothing covers more.

        That is so where the upstream gives more than it was asked for, and where an extension is refused.
        """
        self._deltas += piece.deltas
        self._tokens += piece.tokens
        if self._slices is not None:
            self._slices.run_ahead.note(piece.ahead)
        if self.is_exceeded or self._is_used_up:
            return False
        self._is_used_up = self._slices is not None and not self._cover(self._slices)
        return not self._is_used_up

    def nothing_is_unread(self) -> None:
        """All that had come of the answer, when it ended or was hung up on, has been taken.

        Where it ended because no more could be reserved, what the upstream may be ahead of that is all that is unknown.
        """
        if self._slices is not None and self._is_used_up:
            self._unseen_tokens = self._slices.least_cushion_tokens

    def settle(self, usage: Usage | None) -> int:
        """Book what was used (None: nobody can know, so all of it); the amount, the first one if said again."""
        with self._lock:
            if self._cost_nanousd is not None:
                return self._cost_nanousd
            self._cost_nanousd = cost_nanousd = self._cost_of(usage)
            reservation = self._reservation
        if reservation is not None:
            self._guard.settle(reservation, cost_nanousd)
        return cost_nanousd

    def release(self) -> int:
        """The upstream provably did no work: book nothing. The amount, the first one if said again."""
        with self._lock:
            if self._cost_nanousd is not None:
                return self._cost_nanousd
            self._cost_nanousd = 0
            reservation = self._reservation
        if reservation is not None:
            self._guard.release(reservation)
        return 0

    def _cover(self, slices: Slices) -> bool:
        most = self.most.output_tokens
        wished = min(self._tokens + slices.cushion_tokens, most)
        needed = min(self._tokens + slices.last_cushion_tokens, most)
        may_go_on = needed <= self._covered_tokens
        if wished <= self._covered_tokens or (may_go_on and self._tokens < self._asks_again_at_tokens):
            return True
        at_least = wished if may_go_on else needed
        with self._lock:
            # Once it is settled nothing more is asked for.
            reservation = self._reservation if self._cost_nanousd is None else None
            if reservation is None:
                return False
            wanted = min(wished + slices.slice_tokens, most)
            extended = self._guard.extend(
                reservation, self._highest(wanted), self._limits(), at_least_nanousd=self._highest(at_least)
            )
            if extended is None:
                self._asks_again_at_tokens = self._tokens + slices.patience_tokens
                return may_go_on
            self._reservation = extended
            self._covered_tokens = self._tokens_within(extended.cost_nanousd, at_least, wanted)
        return True

    def _tokens_within_first(self, most: Usage) -> int:
        held = self._reservation.cost_nanousd if self._reservation else self._highest(most.output_tokens)
        return self._tokens_within(held, 0, most.output_tokens)

    def _tokens_within(self, held_nanousd: int, at_least: int, at_most: int) -> int:
        """The most output tokens that `held_nanousd` covers; a search, since a price need not be a straight line."""
        while at_least < at_most:
            middle = (at_least + at_most + 1) // 2
            if self._highest(middle) <= held_nanousd:
                at_least = middle
            else:
                at_most = middle - 1
        return at_least

    def _cost_of(self, usage: Usage | None) -> int:
        if usage is not None:
            return usage.cost_nanousd(self._price)
        # The whole reservation; more only where more was seen than it covers.
        held = self._highest(self.most.output_tokens) if self._reservation is None else self._reservation.cost_nanousd
        if self._unseen_tokens is not None:
            held = min(held, self._highest(self._highest_unknown_tokens))
        return max(held, self._highest(self._seen_tokens))

    @property
    def _highest_unknown_tokens(self) -> int:
        """The most output that is covered, and may have been generated."""
        if self._unseen_tokens is None:
            return self._covered_tokens
        return min(self._covered_tokens, self._tokens + self._unseen_tokens)

    @property
    def _seen_tokens(self) -> int:
        """Output that was surely seen.

        Above the maximum the count says so only where the answer is cut for it, or where it is more than twice that: an
        estimate by bytes may be too high for an honest answer, but not by so much.
        """
        most = self.most.output_tokens
        is_more = self.is_exceeded or self._tokens > 2 * most
        return self._tokens if is_more else min(self._tokens, most)

    def _highest(self, output_tokens: int) -> int:
        return self._price.highest_cost_nanousd(self.most.input_tokens, output_tokens)
