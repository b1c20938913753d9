"""The API keys of ``/v1`` and their identifiers: a key is known by its SHA-256 only, and never kept.

The identifier of a key is its plain hex SHA-256, so that an operator with the key finds its books with `redis-cli`.
Its name and its team's name are the owners of budgets of the scopes `key` and `team`: keys of one name share them.
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

from flaskapp.http.forwarded import NETWORK
from flaskapp.http.identity import Identity, unnamed

ANYONE = "*"
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_KEY = re.compile(r"[!-~]{1,1000}")
_ENTRY = re.compile(r"(?:(?P<name>[a-z0-9_-]{1,32})(?:@(?P<team>[a-z0-9_-]{1,32}))?=)?(?P<key>.+)")
_DIGITS_OF_A_NAME = 8


@dataclass(frozen=True, slots=True)
class RegisteredKey:
    """One key that opens ``/v1``."""

    digest: bytes = field(repr=False)
    """Hex SHA-256, lower case."""
    name: str
    """Given, or the first digits of its digest."""
    team: str | None = None


@dataclass(frozen=True, slots=True)
class ApiKeys:
    """The registered keys, or `is_open` for any caller; without either every caller is refused."""

    keys: tuple[RegisteredKey, ...] = field(default=(), repr=False)
    is_open: bool = False
    listed_digests: int = field(default=0, compare=False)
    """How many were taken for a SHA-256 by their form: a key of that form would never be found."""

    @classmethod
    def of(cls, entries: Iterable[str]) -> Self:
        """Keys as they are, or as the 64 hex digits of their SHA-256; `name=…` or `name@team=…` before either names it.

        Raises:
            ValueError: an entry is no key, or one key stands under two names or teams; the text shows no key.
        """
        registered: dict[bytes, RegisteredKey] = {}
        listed_digests = 0
        for entry in entries:
            key, is_digest = _registered_key(entry)
            listed_digests += is_digest
            if registered.setdefault(key.digest, key) != key:
                raise ValueError("one key under two names")
        return cls(tuple(registered.values()), listed_digests=listed_digests)

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
        network = request.environ[NETWORK]
        if self.is_open:
            return Identity(unnamed(network), network, None, has_fingerprint=False)
        key = self._registered(request.headers.get("Authorization", ""))
        if key is None:
            return None
        return Identity(key.digest.decode(), network, None, has_fingerprint=False, key=key.name, team=key.team)

    def _registered(self, authorization: str) -> RegisteredKey | None:
        """The key in an Authorization header (as WSGI gives it), found in constant time."""
        scheme, _, key = authorization.partition(" ")
        presented = _digest(key.strip().encode("latin-1", "replace"))
        found = [known for known in self.keys if hmac.compare_digest(known.digest, presented)]
        return found[0] if found and scheme.lower() == "bearer" else None


def _registered_key(entry: str) -> tuple[RegisteredKey, bool]:
    """The key of an entry of the list, and whether it stands there as its SHA-256."""
    match = _ENTRY.fullmatch(entry)
    if match is None or not _is_key(match["key"]):
        raise ValueError("no key")
    is_digest = bool(_DIGEST.fullmatch(match["key"]))
    digest = match["key"].lower().encode() if is_digest else _digest(match["key"].encode())
    name = match["name"] or digest[:_DIGITS_OF_A_NAME].decode()
    return RegisteredKey(digest, name, match["team"]), is_digest


def _is_key(text: str) -> bool:
    """Whether `text` can be a key, or the SHA-256 of one, in a list with commas."""
    return bool(_KEY.fullmatch(text)) and text != ANYONE and "," not in text


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).hexdigest().encode()
