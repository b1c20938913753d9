"""Bodies are read whole and bounded, in bytes, in time and in the chunks they come in; or they are refused.

A request may be refused with its body unread, or half read. Then the rest is read and thrown away once the answer was
sent: a client that is still sending would lose the answer if its connection ended. Where that takes long, it ends.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from io import BytesIO
from typing import IO, Any, Self

from flask import Request

from flaskapp.http.forwarded import NETWORK
from flaskapp.http.open_bodies import OpenBodies, OpenBody, TooManyBodies
from flaskapp.http.refusals import InvalidRequest

BYTES_OF_CHUNK, CHUNKS_ALLOWED = 500, 2_000
"""How long chunks have to be at least, if there are more of them than a few: each takes the server a while."""
_REST_SECONDS, _REST_BYTES = 2, 8_000_000
_LEFT_BYTES = 4_096
"""What the server reads off by itself: it takes 1 KB at a time, and copies the rest each time."""
_PIECE_BYTES = 1_000_000
CODINGS = {
    "HTTP_CONTENT_ENCODING": ("Content-Encoding", "identity", "may only be identity: send the body as it is"),
    "HTTP_TRANSFER_ENCODING": ("Transfer-Encoding", "chunked", "may only be chunked: send the body as it is"),
}
"""A server may hand over what it cannot decode; a few bytes of it could become a body of any length."""


class BoundedRequest(Request):
    """A request whose body is read by `get_data`, once."""

    bodies: OpenBodies
    most_bytes = 0
    """`MAX_REQUEST_BYTES`."""
    max_content_length = 0
    """The same, unless a route has set another. The framework looks for its own in three places."""
    is_read = False
    """Whether the body was read to its end."""

    @classmethod
    def of(cls, bodies: OpenBodies, most_bytes: int) -> type[Self]:
        """The requests of one application: their unfinished bodies count there, and have so many bytes at most."""
        return type(
            cls.__name__, (cls,), {"bodies": bodies, "most_bytes": most_bytes, "max_content_length": most_bytes}
        )

    @cached_property
    def stream(self) -> Any:  # the library's own signature
        """The body, for the library that reads forms."""
        return BytesIO(self.get_data())

    def get_data(self, *_: Any, **__: Any) -> Any:  # the library's own signature
        """The whole body.

        Raises:
            InvalidRequest: 415, 413, 408 or 400: it is encoded, it is longer than `max_content_length`, it took too
                long, it broke off, or its chunks cannot be read.
            TooManyBodies: too many others are being read.
        """
        environ, most, length = self.environ, self.max_content_length, self.content_length
        if "HTTP_CONTENT_ENCODING" in environ or "HTTP_TRANSFER_ENCODING" in environ:
            _refuse_codings(environ)
        if length is None and not environ.get("wsgi.input_terminated"):
            length = 0
        if length is not None and length > most:
            raise self._too_large()
        bodies = self.bodies
        connection = environ.get("gunicorn.socket") or environ.get("werkzeug.socket")
        body = bodies.begin(self.environ[NETWORK], most if length is None else length, connection)
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
            raise self._too_large()
        self.is_read = True
        return data

    def end_unread(self) -> None:
        """To be called when the answer was sent: read the rest of the body, or else end the connection.

        A small body is left to the server, which reads it and goes on.
        """
        length, stream = self.content_length, self.environ["wsgi.input"]
        if self.is_read or (length is not None and length <= _LEFT_BYTES) or not hasattr(stream, "failed"):
            return
        if not stream.failed and not self._rest_is_read(stream, length):
            # So gunicorn knows that no further request can be read.
            stream.failed = True

    def _too_large(self) -> InvalidRequest:
        is_set = self.max_content_length == self.most_bytes
        setting = "(MAX_REQUEST_BYTES)" if is_set else "here, whatever MAX_REQUEST_BYTES is"
        return InvalidRequest(413, "body", f"may have at most {self.max_content_length} bytes {setting}")

    def _rest_is_read(self, stream: IO[bytes], length: int | None) -> bool:
        bodies, connection, left = self.bodies, self.environ.get("gunicorn.socket"), _REST_BYTES
        try:
            body = bodies.begin(self.environ[NETWORK], length or _REST_BYTES, connection, _REST_SECONDS)
        except TooManyBodies:
            return False
        try:
            if length is None:
                _count_chunks(stream, CHUNKS_ALLOWED)
            while left > 0 and (piece := stream.read(_PIECE_BYTES)):
                left -= len(piece)
                # Other requests' turn: bytes that are there already are read without one.
                time.sleep(0)
        except Exception:  # noqa: BLE001 (each server has its own for a body that cannot be read)
            return False
        finally:
            bodies.end(body)
        return left > 0 and not body.is_late


def _refuse_codings(environ: Mapping[str, str]) -> None:
    for name, (field, plain, reason) in CODINGS.items():
        if (environ.get(name, "").strip().lower() or plain) != plain:
            raise InvalidRequest(415, field, reason)


def _unfinished(body: OpenBody, bodies: OpenBodies) -> InvalidRequest:
    if body.is_late:
        reason = f"did not arrive within {bodies.most_seconds} seconds (REQUEST_BODY_SECONDS)"
        return InvalidRequest(408, "body", reason)
    return InvalidRequest(400, "body", "broke off, or is not encoded as announced")


def _unchunked(stream: IO[bytes], size: int) -> bytes:
    """What comes in chunks, up to `size` bytes.

    Raises:
        InvalidRequest: the chunks are too many.
    """
    _count_chunks(stream, max(CHUNKS_ALLOWED, size // BYTES_OF_CHUNK))
    data = b""
    while len(data) < size and (piece := stream.read(size - len(data))):
        data += piece
    return data


def _count_chunks(stream: IO[bytes], most: int) -> None:
    """Gunicorn takes the chunks from an iterator. One of a byte each would keep a worker busy for seconds."""
    reader: Any = getattr(stream, "reader", None)
    if getattr(reader, "parser", None) is not None:
        reader.parser = _counted(reader.parser, most)


def _counted(chunks: Iterable[bytes], most: int) -> Iterator[bytes]:
    for number, chunk in enumerate(chunks):
        if number >= most:
            raise InvalidRequest(400, "body", f"comes in more than {most} chunks: send larger ones")
        yield chunk
