"""A body that is too long is refused, also where its length was not announced; so is a broken one."""

from typing import IO, Any

from flask import Request
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.utils import cached_property

from flaskapp.http.refusals import InvalidRequest

_BROKEN = "broke off, or is not encoded as announced"


class BoundedRequest(Request):
    """`get_data` raises where the library's would silently cut the body off at the maximum."""

    @cached_property
    def stream(self) -> Any:  # the library's own signature
        """The body as it comes in."""
        return _Body(super().stream)

    def get_data(self, *args: Any, **options: Any) -> Any:  # the library's own signature
        """The whole body.

        Raises:
            RequestEntityTooLarge: it has more than `max_content_length` bytes.
            InvalidRequest: it broke off, or its chunks cannot be read.
        """
        length, most = self.content_length, self.max_content_length
        if length is None or most is None:
            body = super().get_data(*args, **options)
            if len(body) == most and _Body(self.environ["wsgi.input"]).read(1):
                raise RequestEntityTooLarge
            return body
        # Straight from the server, without the library's four layers around it.
        if length > most:
            raise RequestEntityTooLarge
        try:
            body = self.environ["wsgi.input"].read(length)
        except Exception as error:
            raise InvalidRequest(400, "body", _BROKEN) from error
        if len(body) < length:
            raise InvalidRequest(400, "body", _BROKEN)
        return body


class _Body:
    """Makes any server's error for an unreadable body into one of the caller: each server has its own."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        try:
            return self._stream.read(size)
        except RequestEntityTooLarge:
            raise
        except Exception as error:
            raise InvalidRequest(400, "body", _BROKEN) from error
