"""Bodies are read whole and bounded, in bytes, in time and in the chunks they come in; or they are refused.

What is refused with its body unread, or half read, ends its connection: where the next request would begin is not
known. The client may still be sending then, so what it sends is thrown away for a moment before the connection ends,
or the client would lose the answer with it.
"""

import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cached_property
from io import BytesIO
from typing import IO, Any

from flask import Request, current_app

from backends.clock import Clock
from flaskapp.http.networks import network_of
from flaskapp.http.open_bodies import SMALL_BYTES, OpenBodies, OpenBody
from flaskapp.http.refusals import InvalidRequest

BYTES_OF_CHUNK, CHUNKS_ALLOWED = 500, 2_000
"""How long chunks have to be at least, if there are more of them than a few: each takes the server a while."""
_LAST_SECONDS = 2.0
_LAST_BYTES = 8_000_000
_PIECE_BYTES = 65_536


class BoundedRequest(Request):
    """A request whose body is read by `get_data`, once."""

    is_read = False
    """Whether the body was read to its end."""

    @cached_property
    def stream(self) -> Any:  # the library's own signature
        """The body, for the library that reads forms."""
        return BytesIO(self.get_data())

    def get_data(self, *_: Any, **__: Any) -> Any:  # the library's own signature
        """The whole body.

        Raises:
            InvalidRequest: 413, 408 or 400: it is longer than `max_content_length`, it took too long, it broke off,
                or its chunks cannot be read.
            TooManyBodies: too many others are being read.
        """
        environ, most, length = self.environ, self.max_content_length or 0, self.content_length
        if length is None and not environ.get("wsgi.input_terminated"):
            length = 0
        if length is not None and length > most:
            raise _too_large(most)
        bodies: OpenBodies = current_app.extensions["tollgate"].bodies
        connection = environ.get("gunicorn.socket") or environ.get("werkzeug.socket")
        body = bodies.begin(network_of(self.remote_addr), most if length is None else length, connection)
        try:
            # Straight from the server, without the library's four layers around it.
            stream = environ["wsgi.input"]
            data: bytes = _unchunked(stream, most + 1) if length is None else stream.read(length)
        except InvalidRequest:
            raise
        except Exception as error:
            raise _unfinished(body, bodies) from error
        finally:
            bodies.end(body)
        if length is not None and len(data) < length:
            raise _unfinished(body, bodies)
        if len(data) > most:
            raise _too_large(most)
        self.is_read = True
        return data

    def end_unread(self, clock: Clock) -> None:
        """To be called when the answer was sent: end the connection if the body was not read.

        A small one is left to the server, which reads it and goes on.
        """
        if self.is_read or (self.content_length or SMALL_BYTES + 1) <= SMALL_BYTES:
            return
        body = self.environ["wsgi.input"]
        if hasattr(body, "failed"):
            # So gunicorn knows that no further request can be read.
            body.failed = True
        connection = self.environ.get("gunicorn.socket")
        if connection is not None:
            _throw_away(connection, clock)


def _too_large(most: int) -> InvalidRequest:
    setting = " (MAX_REQUEST_BYTES)" if most == current_app.config["MAX_CONTENT_LENGTH"] else ""
    return InvalidRequest(413, "body", f"may have at most {most} bytes{setting}")


def _unfinished(body: OpenBody, bodies: OpenBodies) -> InvalidRequest:
    if body.is_late:
        reason = f"did not arrive within {bodies.most_seconds:g} seconds (REQUEST_BODY_SECONDS)"
        return InvalidRequest(408, "body", reason)
    return InvalidRequest(400, "body", "broke off, or is not encoded as announced")


def _unchunked(stream: IO[bytes], size: int) -> bytes:
    """What comes in chunks, up to `size` bytes.

    Raises:
        InvalidRequest: the chunks are too many.
    """
    reader: Any = getattr(stream, "reader", None)
    if hasattr(reader, "parser"):
        # Gunicorn takes the chunks from an iterator. One of a byte each would keep a worker busy for seconds.
        reader.parser = _counted(reader.parser, max(CHUNKS_ALLOWED, size // BYTES_OF_CHUNK))
    data = b""
    while len(data) < size and (piece := stream.read(size - len(data))):
        data += piece
    return data


def _counted(chunks: Iterable[bytes], most: int) -> Iterator[bytes]:
    for number, chunk in enumerate(chunks):
        if number >= most:
            raise InvalidRequest(400, "body", f"comes in more than {most} chunks: send larger ones")
        yield chunk


def _throw_away(connection: socket.socket, clock: Clock) -> None:
    """Read what a client still sends, for a moment: ended with bytes unread, a connection loses the answer."""
    ends_seconds, left = clock.monotonic_seconds() + _LAST_SECONDS, _LAST_BYTES
    with suppress(OSError):
        while left > 0 and (seconds := ends_seconds - clock.monotonic_seconds()) > 0:
            connection.settimeout(seconds)
            piece = len(connection.recv(_PIECE_BYTES))
            if not piece:
                return
            left -= piece
            # Another request's turn: bytes that are there already are read without one.
            time.sleep(0)
