"""Authentication: one token, as a bearer token or behind a log-in that leaves a signed cookie.

The cookie's key is derived from the token: all workers of all instances agree on it, and a new token ends all sessions.
"""

import hashlib
import hmac
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from itsdangerous import BadData, URLSafeSerializer

SESSION_SECONDS = 8 * 3_600
_NONCE_BYTES = 16


@dataclass(frozen=True, slots=True)
class Session:
    """A log-in with the token."""

    csrf_token: str
    session_id: str
    """Identifies the session; it is no secret."""


class Access:
    """Checks tokens and cookies. Without a token, none passes.

    Args:
        token: `ADMIN_TOKEN`.
        now_seconds: unix time, for the end of a session.
    """

    def __init__(self, token: str | None, now_seconds: Callable[[], int]) -> None:
        self.is_configured = token is not None
        # Without a token a random secret stands in: the same work, and nothing matches.
        self._token = token.encode() if token is not None else secrets.token_bytes(32)
        self._key = hmac.digest(self._token, b"tollgate admin session", hashlib.sha256)
        self._signer = URLSafeSerializer(self._key, salt="session", signer_kwargs={"digest_method": hashlib.sha256})
        self._now_seconds = now_seconds

    def knows(self, token: bytes) -> bool:
        """Whether that is the token; takes as long for every other one."""
        return hmac.compare_digest(hashlib.sha256(token).digest(), hashlib.sha256(self._token).digest())

    def knows_bearer(self, authorization: str) -> bool:
        """Whether the value of an Authorization header (as WSGI gives it) carries the token."""
        scheme, _, token = authorization.partition(" ")
        # Spaces and tabs only: in latin-1 the last byte of a token's UTF-8 may look like another kind of blank.
        return self.knows(token.strip(" \t").encode("latin-1", "replace")) and scheme.lower() == "bearer"

    def new_cookie(self) -> str:
        """The value of a cookie for a new session."""
        nonce = secrets.token_urlsafe(_NONCE_BYTES)
        return self._signer.dumps({"until": self._now_seconds() + SESSION_SECONDS, "nonce": nonce})

    def session(self, cookie: str | None) -> Session | None:
        """The session of a cookie, if it is ours and not too old."""
        try:
            content = self._signer.loads(cookie or "")
        except BadData:
            return None
        if content["until"] <= self._now_seconds():
            return None
        return Session(self._digest(f"csrf {content['nonce']}"), self._digest(f"session {content['nonce']}")[:32])

    def is_same(self, csrf_token: str, session: Session) -> bool:
        """Whether a form was made for this session."""
        return hmac.compare_digest(csrf_token.encode(), session.csrf_token.encode())

    def _digest(self, text: str) -> str:
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()
