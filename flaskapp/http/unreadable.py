"""What the server cannot read as a request is refused as bad input is, and nothing of it is repeated."""

import os
from traceback import walk_tb

from flask import Flask, g
from gunicorn.config import Config
from gunicorn.http import errors
from gunicorn.http.message import Request
from gunicorn.http.parser import Parser
from werkzeug.http import http_date

from flaskapp.http.bounded_request import CODINGS
from flaskapp.http.openai_errors import PREFIX, speaks_openai
from flaskapp.http.refusals import InvalidRequest

_NAMED = {
    name.upper(): name
    for name in (
        *("Authorization", "Connection", "Content-Length", "Content-Type", "Cookie", "Host", "Idempotency-Key"),
        *("Origin", "Transfer-Encoding", "X-Fingerprint", "X-Forwarded-For"),
    )
}
"""The headers that are called by their names. Another name may be a secret that was sent in the wrong place."""
_HEADERS, _UNREADABLE = "headers", "cannot be read"
_REFUSED = {
    errors.LimitRequestLine: (414, "request line", "may have at most {limit_request_line.value} bytes"),
    errors.LimitRequestHeaders: (
        431,
        _HEADERS,
        "may be at most {limit_request_fields.value}, of {limit_request_field_size.value} bytes each",
    ),
    errors.ExpectationFailed: (417, "Expect", "may only be 100-continue"),
    errors.UnsupportedTransferCoding: (415, *CODINGS["HTTP_TRANSFER_ENCODING"][::2]),
}
_OF_HEADERS = (errors.InvalidHeader, errors.InvalidHeaderName, errors.ObsoleteFolding)
_OF_THE_SERVER = (errors.InvalidResponseHeader, errors.InvalidResponseHeaderName, errors.ConfigurationProblem)


def is_of_a_body(error: BaseException) -> bool:
    """Whether it happened while the rest of a body was read whose request has been answered."""
    return any(frame.f_code is Parser.finish_body.__code__ for frame, _ in walk_tb(error.__traceback__))


def refusal(app: Flask, config: Config, error: Exception, address: str) -> bytes:
    """The whole answer to a request that the server could not read, with the end of the connection announced."""
    message = _message(error)
    # Where the path is known, the answer has the shape that its callers can read.
    path = PREFIX if message is not None and speaks_openai(message.path or "") else "/"
    with app.test_request_context(path):
        g.request_id = os.urandom(16).hex()
        invalid = _invalid(error, config)
        if invalid is not None:
            app.extensions["tollgate"].emit(
                "unreadable_request", request_id=g.request_id, address=address, reason=str(invalid)
            )
        response = app.make_response(app.handle_user_exception(invalid or error))
        response.headers["X-Request-ID"] = g.request_id
        response.headers["Date"] = http_date()
        response.headers["Connection"] = "close"
        head = "".join(f"{name}: {value}\r\n" for name, value in response.headers)
        body = b"" if message is not None and message.method == "HEAD" else response.get_data()
        return f"HTTP/1.1 {response.status}\r\n{head}\r\n".encode("latin-1") + body


def _message(error: Exception) -> Request | None:
    """The request, as far as the server has read it: it is with none of its own errors."""
    for frame, _ in walk_tb(error.__traceback__):
        if isinstance(message := frame.f_locals.get("self"), Request):
            return message
    return None


def _invalid(error: Exception, config: Config) -> InvalidRequest | None:
    """The refusal; None for an error that is not the client's."""
    if not isinstance(error, errors.ParseException) or isinstance(error, _OF_THE_SERVER):
        return None
    if isinstance(error, _OF_HEADERS):
        return InvalidRequest(400, _NAMED.get(str(error.hdr).upper(), _HEADERS), _UNREADABLE)
    status, field, reason = _REFUSED.get(type(error), (400, "request line", _UNREADABLE))
    return InvalidRequest(status, field, reason.format_map(config.settings))
