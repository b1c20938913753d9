"""Server-sent events, read from bytes as they come, after the WHATWG specification. Their size is bounded."""

from collections.abc import Iterator
from dataclasses import dataclass

MAX_EVENT_BYTES = 1_048_576


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One event."""

    name: str
    data: str


class EventStream:
    """Parses bytes, cut anywhere, into the events that they complete."""

    def __init__(self) -> None:
        self._line = bytearray()
        """The beginning of a line whose end is still to come."""
        self._has_begun = False
        self._after_carriage_return = False
        self._name = ""
        self._data: list[str] = []
        self._event_bytes = 0

    def feed(self, received: bytes) -> Iterator[ServerEvent]:
        """The events that `received` completes.

        Raises:
            ValueError: an event is larger than `MAX_EVENT_BYTES`.
        """
        if self._after_carriage_return:
            received = received.removeprefix(b"\n")
        self._after_carriage_return = received.endswith(b"\r")
        for part in received.splitlines(keepends=True):
            self._event_bytes += len(part)
            if self._event_bytes > MAX_EVENT_BYTES:
                raise ValueError("an event is too large")
            if not part.endswith((b"\n", b"\r")):
                self._line += part
            elif (event := self._read_line(part)) is not None:
                yield event

    def end(self) -> Iterator[ServerEvent]:
        """The last event, at the end of the stream: some servers leave out the empty line after it."""
        yield from filter(None, (self._read_line(b""), self._dispatch()))

    def _read_line(self, rest: bytes) -> ServerEvent | None:
        """The event that a line completes; `rest` is the line's, after what has come of it before."""
        if self._line:
            rest = bytes(self._line) + rest
            self._line.clear()
        line = rest.rstrip(b"\r\n").decode(errors="replace")
        if not self._has_begun:
            self._has_begun = True
            line = line.removeprefix("\ufeff")
        if not line:
            return self._dispatch()
        field, _, value = line.partition(":")
        if field == "data":
            self._data.append(value.removeprefix(" "))
        elif field == "event":
            self._name = value.removeprefix(" ")
        return None

    def _dispatch(self) -> ServerEvent | None:
        event = ServerEvent(self._name, "\n".join(self._data)) if self._data else None
        self._name = ""
        self._data.clear()
        self._event_bytes = 0
        return event
