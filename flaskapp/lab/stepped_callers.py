"""Callers who take turns at one Redis: each stops before each of its commands until it is given its turn.

A caller is a greenlet, and its turn is one command with its reply. So only the chosen caller runs, none sleeps, and the
same choices give the same run. Where a caller sends many commands at once, each is a turn of its own, since a server
may serve others in between. From MULTI to EXEC is one turn, since there it may not.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import redis
from greenlet import GreenletExit, greenlet

from flaskapp.lab.schedule_search import ADD, PUT, READ, Touches
from flaskapp.lab.wire import Command, commands_in

_AMOUNT_READS = {b"GET", b"ZRANGE", b"ZSCORE", b"ZCARD", b"STRLEN", b"HGET", b"HGETALL"}
_TTL_READS = {b"TTL", b"PTTL"}
_INCREMENTS = {b"INCR", b"INCRBY", b"ZINCRBY"}
_EXPIRIES = {b"EXPIRE", b"PEXPIRE"}
_SCRIPTS = {b"EVAL", b"EVALSHA", b"FCALL"}
_WITHOUT_KEYS = {b"MULTI", b"EXEC", b"UNWATCH", b"PING", b"TIME"}


@dataclass
class Turn:
    """One command, or a transaction, and what became of it."""

    commands: list[Command]
    raw: bytes
    watched: set[bytes] = field(default_factory=set)
    """Keys that its connection watched when it was sent."""
    replies: list[Any] = field(default_factory=list)

    @property
    def is_transaction(self) -> bool:
        """Whether it goes from MULTI to EXEC."""
        return self.commands[0][0].upper() == b"MULTI"

    @property
    def is_overtaken(self) -> bool:
        """A transaction of which nothing was done, since something watched had changed."""
        return self.is_transaction and bool(self.replies) and self.replies[-1] is None

    def touches(self, *, increments_commute: bool) -> Touches:
        """What it touches; before it is done, all that it may touch."""
        touched: dict[str, str] = {}
        for command in [] if self.is_overtaken else self.commands:
            _merge(touched, _touches(command, increments_commute=increments_commute))
        if self.is_transaction:
            _merge(touched, _whole(self.watched, READ))
        return touched


def _merge(touched: dict[str, str], more: Touches) -> None:
    for place, how in more.items():
        touched[place] = how if touched.get(place, how) == how else PUT


def _whole(keys: Sequence[bytes] | set[bytes], how: str) -> dict[str, str]:
    """Both parts of each key: its amount and its TTL.

    They are apart because an EXPIRE or a TTL follows its caller's own increment: the key exists, whatever others add.
    """
    return {f"{part} {key.decode()}": how for key in keys for part in ("amount", "ttl")}


def _touches(command: Command, *, increments_commute: bool) -> Touches:
    name, words = command[0].upper(), command[1:]
    if name in _WITHOUT_KEYS:
        return {}
    if name == b"WATCH":
        return _whole(words, READ)
    if name == b"SET":
        return _whole(words[:1], _text(command))
    if name == b"DEL":
        return _whole(words, _text(command))
    if name in _SCRIPTS:
        return _whole(words[2 : 2 + int(words[1])], PUT)
    on_a_part = _on_a_part(command, increments_commute=increments_commute)
    # Of an unknown command each word may be a key.
    return _whole(words, PUT) if on_a_part is None else on_a_part


def _on_a_part(command: Command, *, increments_commute: bool) -> Touches | None:
    kinds = {
        **dict.fromkeys(_AMOUNT_READS, ("amount", READ)),
        **dict.fromkeys(_TTL_READS, ("ttl", READ)),
        **dict.fromkeys(_INCREMENTS, ("amount", ADD if increments_commute else PUT)),
        **dict.fromkeys(_EXPIRIES, ("ttl", _text(command))),
    }
    kind = kinds.get(command[0].upper())
    return None if kind is None else {f"{kind[0]} {command[1].decode()}": kind[1]}


def _text(command: Command) -> str:
    return b" ".join(command).decode()


def turns_in(data: bytes) -> Iterator[Turn]:
    """What was packed, as turns."""
    commands: list[Command] = []
    raw = b""
    for command, its_bytes in commands_in(data):
        commands.append(command)
        raw += its_bytes
        if commands[0][0].upper() != b"MULTI" or command[0].upper() == b"EXEC":
            yield Turn(commands, raw)
            commands, raw = [], b""
    if commands:
        yield Turn(commands, raw)


class Caller:
    """Does something, turn by turn.

    Args:
        gate: the gate of the connections that it uses.
        do: what it does; may raise.
    """

    def __init__(self, gate: "Gate", do: Callable[[], Any]) -> None:
        self._gate = gate
        self._greenlet = greenlet(self._run)
        self._do = do
        self.pending: Turn | None = None
        """Its next turn; None when it is done."""
        self.answer: Any = None
        """What `do` returned."""
        self._go_on()

    def take_turn(self) -> Turn:
        """Let it do its turn and run up to the next."""
        turn = self.pending
        if turn is None:
            raise RuntimeError("it is done")
        self._go_on()
        return turn

    def stop(self) -> None:
        """End it where it stands."""
        if not self._greenlet.dead:
            self._greenlet.throw(GreenletExit)

    def stand(self, turn: Turn) -> None:
        """Called in its own greenlet: wait for the turn."""
        self.pending = turn
        self._greenlet.parent.switch()

    def _go_on(self) -> None:
        self.pending, self._gate.current = None, self
        try:
            self._greenlet.switch()
        finally:
            self._gate.current = None

    def _run(self) -> None:
        self.answer = self._do()


class Gate:
    """Lets a caller's commands through one by one, and at once what is sent while no caller runs."""

    def __init__(self) -> None:
        self.current: Caller | None = None

    def connection_class(self) -> type[redis.Connection]:
        """A class of connections for `Link`."""
        return type("ConnectionOfThisGate", (_GatedConnection,), {"_gate": self})


class _GatedConnection(redis.Connection):
    _gate: ClassVar[Gate]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call] # redis-py
        self._watched: set[bytes] = set()
        self._due: deque[Any] = deque()

    def disconnect(self, *args: Any, **options: Any) -> None:
        self._watched, self._due = set(), deque()
        super().disconnect(*args, **options)  # type: ignore[no-untyped-call] # redis-py

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:  # noqa: FBT001, FBT002 (theirs)
        caller = self._gate.current
        if caller is None:
            super().send_packed_command(command, check_health)  # type: ignore[no-untyped-call] # redis-py
            return
        self._connect_ungated(caller)
        for turn in turns_in(b"".join(command)):
            turn.watched = self._watched
            caller.stand(turn)
            self._do(turn)

    def read_response(self, *args: Any, **options: Any) -> Any:
        if not self._due:
            return super().read_response(*args, **options)
        reply = self._due.popleft()
        if isinstance(reply, redis.ResponseError):
            raise reply
        return reply

    def _connect_ungated(self, caller: Caller) -> None:
        self._gate.current = None
        try:
            self.connect()  # type: ignore[no-untyped-call] # redis-py
        finally:
            self._gate.current = caller

    def _do(self, turn: Turn) -> None:
        super().send_packed_command([turn.raw], False)  # type: ignore[no-untyped-call] # redis-py
        for command in turn.commands:
            turn.replies.append(self._reply())
            name = command[0].upper()
            if name == b"WATCH":
                self._watched = self._watched | set(command[1:])
            elif name in {b"EXEC", b"UNWATCH"}:
                self._watched = set()
        self._due.extend(turn.replies)

    def _reply(self) -> Any:
        """Read the next reply from the wire, past those that the caller has not read yet."""
        try:
            return super().read_response()
        except redis.ResponseError as error:
            return error
