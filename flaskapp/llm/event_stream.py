"""Server-sent events, read from bytes as they come, after the WHATWG specification. Their size is bounded."""

import codecs
from collections.abc import Callable
from typing import NamedTuple

MAX_EVENT_BYTES = 1_048_576
MAX_DOCUMENT_BYTES = 16_777_216


class ServerEvent(NamedTuple):
    """One event."""

    name: str
    data: bytes
    """Its lines, joined by line feeds."""


class EventStream:
    """Parses bytes, cut anywhere, into the events that they complete.

    Args:
        events_of_document: the events in a document of JSON that came in place of a stream.
    """

    def __init__(self, events_of_document: Callable[[bytes], list[ServerEvent]] | None = None) -> None:
        self._events_of_document = events_of_document
        self._document: bytearray | None = None
        self._line = bytearray()
        """The beginning of a line whose end is still to come."""
        self._has_begun = False
        self._after_carriage_return = False
        self._name = b""
        self._data: list[bytes] = []
        self._event_bytes = 0

    @property
    def is_in_document(self) -> bool:
        """Whether what has come is a document, whose end is still to come."""
        return self._document is not None

    @property
    def is_between_events(self) -> bool:
        """Whether what comes next begins an event."""
        return not self._event_bytes and not self._after_carriage_return and self._document is None

    def feed(self, received: bytes) -> list[ServerEvent]:
        """The events that `received` completes.

        Raises:
            ValueError: an event is larger than `MAX_EVENT_BYTES`.
        """
        if not (self._has_begun or self._line) and self._events_of_document and _is_document(received):
            self._document = self._document or bytearray()
        if self._document is not None:
            self._document += received
            if len(self._document) > MAX_DOCUMENT_BYTES:
                raise ValueError("a document is too large")
            return []
        if self.is_between_events and (events := _whole_events(received)):
            self._has_begun = True
            return events
        return self._read_lines(received)

    def end(self) -> list[ServerEvent]:
        """The last event, at the end of the stream: some servers leave out the empty line after it."""
        if self._document is not None and self._events_of_document is not None:
            document, self._document = bytes(self._document), None
            return self._events_of_document(document)
        return [event for event in (self._read_line(b""), self._dispatch()) if event is not None]

    def _read_lines(self, received: bytes) -> list[ServerEvent]:
        if self._after_carriage_return:
            received = received.removeprefix(b"\n")
        self._after_carriage_return = received.endswith(b"\r")
        events = []
        for part in received.splitlines(keepends=True):
            self._event_bytes += len(part)
            if self._event_bytes > MAX_EVENT_BYTES:
                raise ValueError("an event is too large")
            if not part.endswith((b"\n", b"\r")):
                self._line += part
            elif (event := self._read_line(part)) is not None:
                events.append(event)
        return events

    def _read_line(self, rest: bytes) -> ServerEvent | None:
        """The event that a line completes; `rest` is the line's, after what has come of it before."""
        if self._line:
            rest = bytes(self._line) + rest
            self._line.clear()
        line = rest.rstrip(b"\r\n")
        if not self._has_begun:
            self._has_begun = True
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line:
            return self._dispatch()
        field, _, value = line.partition(b":")
        if field == b"data":
            self._data.append(value.removeprefix(b" "))
        elif field == b"event":
            self._name = value.removeprefix(b" ")
        return None

    def _dispatch(self) -> ServerEvent | None:
        event = ServerEvent(self._name.decode(errors="replace"), b"\n".join(self._data)) if self._data else None
        self._name = b""
        self._data.clear()
        self._event_bytes = 0
        return event


def _is_document(received: bytes) -> bool:
    return received.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"{"


def _whole_events(received: bytes) -> list[ServerEvent]:
    """The events of bytes that are whole events of one line each; none where they are anything else."""
    if not received.startswith(b"data: ") or not received.endswith(b"\n\n") or b"\r" in received:
        return []
    # Each event has two line feeds, its own and that of the empty line; else it has more than one line.
    if received.count(b"\n") != 2 * received.count(b"\n\ndata: ") + 2 or len(received) > MAX_EVENT_BYTES:
        return []
    return [ServerEvent("", data) for data in received[6:-2].split(b"\n\ndata: ")]
