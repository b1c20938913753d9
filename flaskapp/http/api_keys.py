"""Who may use ``/v1``, and under which identifier: keys are known by their SHA-256 only, and never kept.

The identifier of a key is the plain hex SHA-256 of it, so that `redis-cli` finds its books by what the operator knows.
With `*` nobody is asked for a key, and the network is who asks; whatever key comes along is not even looked at.
"""

import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

from flask import Request
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import Unauthorized

from flaskapp.http.identity import Identity, network_of

ANYONE = "*"
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_KEY = re.compile(r"[!-~]{1,1000}")


def is_key(text: str) -> bool:
    """Whether that can be a key, or the SHA-256 of one, in a list with commas."""
    return bool(_KEY.fullmatch(text)) and text != ANYONE and "," not in text


@dataclass(frozen=True, slots=True)
class ApiKeys:
    """The registered keys, or anyone; without either nobody passes."""

    digests: tuple[bytes, ...] = field(default=(), repr=False)
    """Hex SHA-256, lower case."""
    is_open: bool = False
    listed_digests: int = field(default=0, compare=False)
    """How many were taken for a SHA-256 by their looks: a key that looks like one would never be found."""

    @classmethod
    def of(cls, keys: Iterable[str]) -> Self:
        """Keys as they are, or as the 64 hex digits of their SHA-256."""
        listed = tuple(keys)
        digests = [key.lower().encode() if _DIGEST.fullmatch(key) else _digest(key.encode()) for key in listed]
        return cls(tuple(dict.fromkeys(digests)), listed_digests=sum(map(bool, map(_DIGEST.fullmatch, listed))))

    def identify(self, request: Request) -> Identity:
        """Who asks.

        Raises:
            Unauthorized: without a registered key.
        """
        who = self.find(request)
        if who is None:
            raise Unauthorized(
                "A registered API key is needed: Authorization: Bearer <key>.",
                www_authenticate=WWWAuthenticate("bearer"),
            )
        return who

    def find(self, request: Request) -> Identity | None:
        """Who asks; None without a registered key."""
        network = network_of(request.remote_addr)
        if self.is_open:
            return Identity(f"ip:{network}", network, None, has_fingerprint=False)
        digest = self._registered(request.headers.get("Authorization", ""))
        return None if digest is None else Identity(digest.decode(), network, None, has_fingerprint=False)

    def rate_key(self, request: Request) -> str:
        """Whose request counter it is; never fails, since a wrong key counts too, for its network."""
        who = self.find(request)
        return f"ip:{network_of(request.remote_addr)}" if who is None else who.identifier

    def _registered(self, authorization: str) -> bytes | None:
        """The digest of the key in an Authorization header (as WSGI gives it); takes as long for every wrong one."""
        scheme, _, key = authorization.partition(" ")
        presented = _digest(key.strip().encode("latin-1", "replace"))
        found = [digest for digest in self.digests if hmac.compare_digest(digest, presented)]
        return found[0] if found and scheme.lower() == "bearer" else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).hexdigest().encode()
