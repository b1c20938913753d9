"""Pages of other origins: which of them may ask the routes for visitors, and what they may read of the answers.

No cookie takes part, so credentials are never allowed: a page sends its key or fingerprint as a header. The headers
that a page may send are those that its browser asks for. Without `CORS_ORIGINS` nothing of this is registered.
"""

import re
from collections.abc import Collection

from flask import Flask, Response, request

from flaskapp.http.openai_errors import speaks_openai

ANY_ORIGIN = "*"
EXPOSED_HEADERS = (
    "RateLimit",
    "RateLimit-Policy",
    "Retry-After",
    "Server-Timing",
    "X-Cost-Reserved-USD",
    "X-Request-ID",
    "X-Throttle-Backend",
    # OpenAI's client obeys these two, also in a page.
    "retry-after-ms",
    "x-should-retry",
)
_METHODS = "GET, HEAD, POST"
_PREFLIGHT_SECONDS = 600
"""How long a browser need not ask again; an origin that is taken off the list is refused at the latest then."""
_HEADER_NAMES = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+(?:[ \t]*,[ \t]*[!#$%&'*+.^_`|~0-9A-Za-z-]+)*")
_MAX_HEADER_CHARACTERS = 4_096


class Cors:
    """Which pages may ask which paths; `*` among `origins` stands for every origin."""

    def __init__(self, origins: Collection[str], paths: Collection[str]) -> None:
        self._origins = frozenset(origins)
        self._paths = frozenset(paths)
        self._is_open = ANY_ORIGIN in origins
        self._exposed = ", ".join(EXPOSED_HEADERS)

    def answer_preflight(self) -> Response | None:
        """The answer to a browser that asks whether its page may send the request; None for any other request."""
        if request.method != "OPTIONS" or "HTTP_ACCESS_CONTROL_REQUEST_METHOD" not in request.environ:
            return None
        if not self._covers(request.path) or self._allowed_origin() is None:
            return None
        headers = {"Access-Control-Allow-Methods": _METHODS, "Access-Control-Max-Age": str(_PREFLIGHT_SECONDS)}
        asked = request.environ.get("HTTP_ACCESS_CONTROL_REQUEST_HEADERS", "")
        if len(asked) <= _MAX_HEADER_CHARACTERS and _HEADER_NAMES.fullmatch(asked):
            headers["Access-Control-Allow-Headers"] = asked
        headers["Vary"] = "Access-Control-Request-Method, Access-Control-Request-Headers"
        return Response(status=204, headers=headers)

    def show_to_page(self, response: Response) -> Response:
        """`response`, which the page may read if it may ask that path."""
        if not self._covers(request.path):
            return response
        origin = self._allowed_origin()
        if not self._is_open:
            # Also where the origin is not allowed: a cache in between may not give this answer to another page.
            response.vary.add("Origin")
        if origin is not None:
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = self._exposed
        return response

    def _covers(self, path: str) -> bool:
        return path in self._paths or speaks_openai(path)

    def _allowed_origin(self) -> str | None:
        """What `Access-Control-Allow-Origin` says; None where the page's origin is not allowed."""
        if self._is_open:
            return ANY_ORIGIN
        origin = request.environ.get("HTTP_ORIGIN")
        return origin if origin in self._origins else None


def allow_origins(app: Flask, origins: Collection[str], paths: Collection[str]) -> None:
    """Let pages of `origins` ask `paths` and all under ``/v1``.

    To be called before whatever else looks at requests: a preflight asks for nothing, and is not counted.
    """
    cors = Cors(origins, paths)
    app.before_request(cors.answer_preflight)
    app.after_request(cors.show_to_page)
