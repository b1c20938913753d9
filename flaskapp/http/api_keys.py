"""The API keys of ``/v1`` and their identifiers: a key is known by its SHA-256 only, and never kept.

The identifier of a key is its plain hex SHA-256, so that an operator with the key finds its books with `redis-cli`.
With `*` no key is needed, and a key that comes along is not read: the network is the identifier.
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
    """Whether `text` can be a key, or the SHA-256 of one, in a list with commas."""
    return bool(_KEY.fullmatch(text)) and text != ANYONE and "," not in text


@dataclass(frozen=True, slots=True)
class ApiKeys:
    """The registered keys, or `is_open` for any caller; without either every caller is refused."""

    digests: tuple[bytes, ...] = field(default=(), repr=False)
    """Hex SHA-256, lower case."""
    is_open: bool = False
    listed_digests: int = field(default=0, compare=False)
    """How many were taken for a SHA-256 by their form: a key of that form would never be found."""

    @classmethod
    def of(cls, keys: Iterable[str]) -> Self:
        """Keys as they are, or as the 64 hex digits of their SHA-256."""
        listed = tuple(keys)
        digests = [key.lower().encode() if _DIGEST.fullmatch(key) else _digest(key.encode()) for key in listed]
        return cls(tuple(dict.fromkeys(digests)), listed_digests=sum(map(bool, map(_DIGEST.fullmatch, listed))))

    def identify(self, request: Request) -> Identity:
        """The identity of the caller's key.

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
        """The identity of the caller's key; None without a registered one."""
        network = network_of(request.remote_addr)
        if self.is_open:
            return Identity(f"ip:{network}", network, None, has_fingerprint=False)
        digest = self._registered(request.headers.get("Authorization", ""))
        return None if digest is None else Identity(digest.decode(), network, None, has_fingerprint=False)

    def rate_key(self, request: Request) -> str:
        """The key of the request counter; it never fails, since a wrong key counts too, for its network."""
        who = self.find(request)
        return f"ip:{network_of(request.remote_addr)}" if who is None else who.identifier

    def _registered(self, authorization: str) -> bytes | None:
        """The digest of the key in an Authorization header (as WSGI gives it), found in constant time."""
        scheme, _, key = authorization.partition(" ")
        presented = _digest(key.strip().encode("latin-1", "replace"))
        found = [digest for digest in self.digests if hmac.compare_digest(digest, presented)]
        return found[0] if found and scheme.lower() == "bearer" else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).hexdigest().encode()
