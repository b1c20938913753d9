"""The response of an answer, handed to the server as it is."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from flask import Response

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment


class Answered(Response):
    """What answers a POST, with the headers that it was given: it is no redirect, and has its length or is a stream.

    The framework copies the headers of any other response, and looks through them for what it may have to mend.
    """

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        """As the server calls it."""
        if self._on_close or environ["REQUEST_METHOD"] == "HEAD":
            return super().__call__(environ, start_response)
        start_response(self.status, self.headers.to_wsgi_list())
        return self.response  # type: ignore[return-value] # bytes, or an iterable of them
