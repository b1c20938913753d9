"""The texts that are stored for a reservation, an idempotency key and a throttle marker, and how they are read."""

import hashlib
import re
from base64 import urlsafe_b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from backends.budgets import Budget, Scope, Sliding
from backends.clock import US_PER_SECOND
from backends.contract import Duplicate, DuplicateState, Idempotency, Reservation
from backends.keys import Row, rows_at

NO_OWNER = "-"
"""In place of the digest of an owner."""
REQUEST_DIGITS = 8
"""Of a request digest; versions before wrote eight more."""
_STORED_STATE, _STATE = {"settled": "paid"}, {"paid": "settled"}
"""A record is kept for an hour for each request, so it is short. Versions before wrote the state as it is."""


@lru_cache(maxsize=4_096)
def digest_of(text: str) -> str:
    """8 characters in place of a text that is too long for a record, or must not be read in one."""
    return urlsafe_b64encode(hashlib.blake2b(text.encode(), digest_size=6).digest()).decode()


KEY_DIGEST_CHARACTERS = 6


@lru_cache(maxsize=4_096)
def key_digest(key: str) -> str:
    """What a record has in place of a budget's key: sixteen of them together have to be short."""
    return digest_of(key)[:KEY_DIGEST_CHARACTERS]


START_DIGITS = 10
"""Of a bucket's start, in unix seconds."""
THE_SIX = "...six"
"""As long as a digest of a key, and never one."""
Member = int | str
"""One amount of an owner's pending money: a bucket's start, and what its reservations are charged to of that owner.

A start alone, which is an integer here, stands for the six and nothing else; versions before wrote it for all lists.
Else a colon follows it, and the digests of keys that the record has, after `THE_SIX` where the six are charged too.
"""


@dataclass(frozen=True, slots=True)
class Record:
    """What is stored for a reservation id."""

    state: str
    nanousd: int
    made_at_us: int
    request_digest: str
    window_seconds: int
    """Of the two built-in windows; 0 where it is not charged to the six."""
    pending_seconds: int
    who: str
    """Digest of the identifier; `NO_OWNER` where it is not charged to the six."""
    network: str
    """Digest of the network; `NO_OWNER` where it is not charged to the six."""
    further: tuple[str, ...] = ()
    """Digests of the keys of all other budgets that it is charged to."""

    @property
    def has_the_six(self) -> bool:
        """Whether it is charged to the six built-in budgets."""
        return self.who != NO_OWNER

    @property
    def charged_to(self) -> str:
        """What is stored of what it is charged to."""
        return _charged_to(self.window_seconds, self.pending_seconds, self.who, self.network, self.further)

    def text(self) -> str:
        """As it is stored."""
        return record_text(self.state, self.nanousd, self.made_at_us, self.request_digest, self.charged_to)


def record_text(state: str, nanousd: int, made_at_us: int, request_digest: str, charged_to: str) -> str:
    """What is stored for a reservation id."""
    return f"{stored_state(state)} {nanousd} {made_at_us} {request_digest} {charged_to}"


def stored_state(state: str) -> str:
    """The word that a record has for a state."""
    return _STORED_STATE.get(state, state)


def charged_to(rows: Sequence[Row], pending_seconds: int) -> str:
    """What a record says of what its reservation is charged to.

    It names the six together by their owners, and each other budget by the digest of its key.
    """
    window, owners = 0, {Scope.IDENTIFIER: NO_OWNER, Scope.NETWORK: NO_OWNER}
    for row in rows:
        if row.layout.is_built_in:
            owners[row.budget.scope] = digest_of(row.budget.owner)
            window = row.layout.window_seconds or window
    further = [key_digest(row.key) for row in rows if not row.layout.is_built_in]
    return _charged_to(window, pending_seconds, owners[Scope.IDENTIFIER], owners[Scope.NETWORK], further)


def _charged_to(window_seconds: int, pending_seconds: int, who: str, network: str, further: Iterable[str]) -> str:
    return f"{window_seconds} {pending_seconds} {who} {network} {''.join(further)}".rstrip()


def pending_member(start_seconds: int, rows: Sequence[Row]) -> Member:
    """The member of what an owner's reservations have in a bucket that are charged to these budgets of the owner."""
    digests = "".join(key_digest(row.key) for row in rows if not row.layout.is_built_in)
    has_the_six = any(row.layout.is_built_in for row in rows)
    suffix = pending_suffix(digests, has_the_six=has_the_six)
    return f"{start_seconds}{suffix}" if suffix else start_seconds


def pending_suffix(digests: str, *, has_the_six: bool) -> str:
    """What follows the start in such a member; `digests` are those of keys of further budgets."""
    if has_the_six:
        return f":{THE_SIX}{digests}" if digests else ""
    return f":{digests}"


def member_in(text: bytes | int) -> Member:
    """The member that is stored."""
    return int(text) if isinstance(text, int) or text.isdigit() else text.decode(errors="replace")


def start_of(member: Member) -> int:
    """The start of its bucket."""
    return member if isinstance(member, int) else int(member[:START_DIGITS])


def is_charged_to(member: Member, row: Row) -> bool:
    """Whether the reservations of a member of an owner's pending money are charged to one of its budgets."""
    return (THE_SIX if row.layout.is_built_in else key_digest(row.key)) in _digests_of(member)


def own_member(members: Iterable[Member], record: Record, start_seconds: int) -> Member:
    """Which of an owner's members is that of a record: the one that names most of what the record is charged to.

    So it is found though some of its budgets may not be known any more.
    """
    named = {*record.further, *((THE_SIX,) if record.has_the_six else ())}
    own = [each for each in members if start_of(each) == start_seconds and isinstance(each, str)]
    return max((each for each in own if _digests_of(each) <= named), key=len, default=start_seconds)


def _digests_of(member: Member) -> set[str]:
    if isinstance(member, int):
        return {THE_SIX}
    return {
        member[at : at + KEY_DIGEST_CHARACTERS] for at in range(START_DIGITS + 1, len(member), KEY_DIGEST_CHARACTERS)
    }


def budgets_charged(record: Record, budgets: tuple[Budget, ...]) -> tuple[Budget, ...]:
    """Those of `budgets` that a record is charged to, with the length that the windows of the six had then."""
    rows = rows_at(budgets, record.made_at_us // US_PER_SECOND)
    charged = []
    for row in rows:
        budget = row.budget
        if row.layout.is_built_in and record.has_the_six:
            is_window = row.layout.window_seconds > 0
            charged.append(budget._replace(period=Sliding(record.window_seconds)) if is_window else budget)
        elif key_digest(row.key) in record.further:
            charged.append(budget)
    return tuple(charged)


_RECORD = re.compile(rb"([a-z]+) (\d+) (\d+) ([0-9a-f]+) (\d+) (\d+) ([\w-]+) ([\w-]+)(?: ((?:[\w-]{6})+))?")
_IDEMPOTENCY = re.compile(rb"([a-z]+) ([0-9a-f]+) (\S+) (\d+) (\d+)")
MARKER = re.compile(rb"([a-z0-9_:]+) (\d+) (\d+) (busy|spent)")


def parse_record(text: bytes | None) -> Record | None:
    """The record, or None; a text that is none counts as the record of another request."""
    return None if text is None else record_in(text)


def record_in(text: bytes) -> Record:
    """The record that a text holds."""
    match = _RECORD.fullmatch(text)
    if match is None:
        return Record("unknown", 0, 0, "", 0, 0, "", "")
    state, nanousd, made_at_us, request_digest, window, open_, who, network, digests = (
        part.decode() for part in match.groups(b"")
    )
    starts = range(0, len(digests), KEY_DIGEST_CHARACTERS)
    owners = (who, network, tuple(digests[at : at + KEY_DIGEST_CHARACTERS] for at in starts))
    request_digest, state = request_digest[:REQUEST_DIGITS], _STATE.get(state, state)
    return Record(state, int(nanousd), int(made_at_us), request_digest, int(window), int(open_), *owners)


def state_of(record: Record, now_us: int) -> str:
    """``open``, ``settled``, ``released``, or ``expired`` for an open one past its time."""
    is_over = record.state == "open" and record.made_at_us + record.pending_seconds * US_PER_SECOND <= now_us
    return "expired" if is_over else record.state


def in_flight_text(reservation: Reservation, idempotency: Idempotency, now_us: int) -> str:
    """What is stored for an idempotency key when its request is admitted."""
    until_us = now_us + reservation.pending_seconds * US_PER_SECOND
    return f"open {idempotency.body_digest} {reservation.reservation_id} {reservation.cost_nanousd} {until_us}"


def settled_text(reservation: Reservation, idempotency: Idempotency, actual_nanousd: int, now_us: int) -> str:
    """What is stored for an idempotency key when its request is settled."""
    return f"settled {idempotency.body_digest} {reservation.reservation_id} {actual_nanousd} {now_us}"


def extended_text(text: bytes | None, reservation_id: str, held_nanousd: int) -> str | None:
    """What is stored for an idempotency key when its request is extended; None where the key is another request's."""
    match = None if text is None else _IDEMPOTENCY.fullmatch(text)
    if match is None or match[1] != b"open" or match[3] != reservation_id.encode():
        return None
    return f"open {match[2].decode()} {reservation_id} {held_nanousd} {match[5].decode()}"


def owner_of(text: bytes | None) -> str | None:
    """The reservation id that is stored for an idempotency key; None where there is none."""
    match = None if text is None else _IDEMPOTENCY.fullmatch(text)
    return None if match is None else match[3].decode(errors="replace")


def duplicate_of(text: bytes | None, idempotency: Idempotency, now_us: int) -> Duplicate | None:
    """The first request with an idempotency key; a text that was set by hand stands for an unknown one."""
    if text is None:
        return None
    match = _IDEMPOTENCY.fullmatch(text)
    if match is None:
        return Duplicate("", DuplicateState.IN_FLIGHT, 0, same_body=False)
    state, body, rid, nanousd, until_us = (part.decode(errors="replace") for part in match.groups())
    if state == "settled":
        what = DuplicateState.SETTLED
    else:
        what = DuplicateState.EXPIRED if int(until_us) <= now_us else DuplicateState.IN_FLIGHT
    return Duplicate(rid, what, int(nanousd), same_body=body == idempotency.body_digest)


def buckets_of(members: list[tuple[bytes, float]]) -> dict[int, int]:
    """Buckets as ``ZRANGE … WITHSCORES`` returns them: bucket start (unix seconds) -> nano-dollars."""
    return {int(start): int(nanousd) for start, nanousd in members}


def number_in(text: bytes | None) -> int | None:
    """The number that a stored total holds, 0 for a missing one; None if it is no number."""
    try:
        return int(text or b"0")
    except ValueError:
        return None
