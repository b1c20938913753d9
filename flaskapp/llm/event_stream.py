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
        self._lines_seen = 0
        self._after_carriage_return = False
        self._name = ""
        self._data: list[str] = []
        self._event_bytes = 0

    def feed(self, received: bytes) -> Iterator[ServerEvent]:
        """The events that `received` completes.

        Raises:
            ValueError: an event is larger than `MAX_EVENT_BYTES`.
        """
        if self._after_carriage_return and received[:1] == b"\n":
            received = received[1:]
            self._after_carriage_return = False
        for part in received.splitlines(keepends=True):
            self._after_carriage_return = part.endswith(b"\r")
            self._event_bytes += len(part)
            if self._event_bytes > MAX_EVENT_BYTES:
                raise ValueError("an event is too large")
            self._line += part
            if part.endswith((b"\r", b"\n")):
                yield from self._parse_line()

    def end(self) -> Iterator[ServerEvent]:
        """The last event, at the end of the stream: some servers leave out the empty line after it."""
        yield from self._parse_line()
        yield from self._dispatch()

    def _parse_line(self) -> Iterator[ServerEvent]:
        line = self._line.rstrip(b"\r\n").decode(errors="replace")
        self._line.clear()
        self._lines_seen += 1
        if self._lines_seen == 1:
            line = line.removeprefix("\ufeff")
        if not line:
            yield from self._dispatch()
            return
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            self._data.append(value)
        elif field == "event":
            self._name = value

    def _dispatch(self) -> Iterator[ServerEvent]:
        if self._data:
            yield ServerEvent(self._name, "\n".join(self._data))
        self._name = ""
        self._data.clear()
        self._event_bytes = 0
