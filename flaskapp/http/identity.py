"""The identity of a caller: a browser's stable identifier, its challenge, and the network that it calls from."""

import ipaddress
import re
from dataclasses import dataclass
from functools import lru_cache

from flask import Request

from flaskapp.http.refusals import InvalidRequest

HEADER = "X-Fingerprint"
_WORD = r"[A-Za-z0-9_-]{1,128}"
_FINGERPRINT = re.compile(rf"(?:fp:({_WORD}):)?({_WORD})")
UNKNOWN_NETWORK = "unknown"


@dataclass(frozen=True, slots=True)
class Identity:
    """One caller, as far as a request shows it."""

    identifier: str
    """The hash of the fingerprint, or ``ip:<network>`` without one."""
    network: str
    challenge: str | None
    has_fingerprint: bool


def identify(request: Request) -> Identity:
    """The visitor that sent `request`.

    Raises:
        InvalidRequest: the fingerprint is malformed.
    """
    network = network_of(request.remote_addr)
    text = request.headers.get(HEADER)
    if text is None:
        return Identity(f"ip:{network}", network, None, has_fingerprint=False)
    match = _FINGERPRINT.fullmatch(text)
    if match is None:
        form = "fp:<challenge>:<hash> or <hash>, each 1 to 128 of A-Z a-z 0-9 _ -"
        raise InvalidRequest(400, HEADER, f"has to be {form}")
    return Identity(match[2], network, match[1], has_fingerprint=True)


def rate_key(request: Request) -> str:
    """The key of the request counter; it never fails, since bad input counts too."""
    try:
        return identify(request).identifier
    except InvalidRequest:
        return f"ip:{network_of(request.remote_addr)}"


@lru_cache(maxsize=1_024)
def network_of(address: str | None) -> str:
    """The IPv4 address, or the /64 of an IPv6 one."""
    try:
        parsed = ipaddress.ip_address((address or "").partition("%")[0])
    except ValueError:
        return UNKNOWN_NETWORK
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((int(parsed) >> 64 << 64, 64)))
    return str(parsed)
