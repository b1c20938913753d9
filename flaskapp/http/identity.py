"""The identity of a caller: its stable identifier, its challenge, its networks, and the name and team of its key."""

import re
from collections.abc import Callable

from flask import Request

from backends.budgets import EVERYBODY, Scope
from backends.contract import frozen_for_the_type_checker
from flaskapp.http.forwarded import NETWORK
from flaskapp.http.networks import wide_network_of
from flaskapp.http.refusals import InvalidRequest

HEADER = "X-Fingerprint"
WORD = r"[A-Za-z0-9_-]{1,128}"
"""The pattern of a hash, and of a challenge."""
FINGERPRINT = rf"(?:fp:({WORD}):)?({WORD})"
_FINGERPRINT = re.compile(FINGERPRINT)
unnamed: Callable[[str], str] = "ip:{}".format
"""The identifier of a caller of whom only the network is known."""


@frozen_for_the_type_checker
class Identity:
    """One caller, as far as a request shows it."""

    identifier: str
    """The hash of the fingerprint or of the key, or ``ip:<network>`` without either."""
    network: str
    challenge: str | None
    has_fingerprint: bool
    key: str | None = None
    """The name of its API key."""
    team: str | None = None
    """The team of its API key."""

    def owners(self, model: str) -> dict[Scope, str]:
        """Whose budgets a request of this caller to `model` is charged to, of each scope that has an owner."""
        owners = {
            Scope.IDENTIFIER: self.identifier,
            Scope.NETWORK: self.network,
            Scope.WIDE_NETWORK: wide_network_of(self.network),
            Scope.GLOBAL: EVERYBODY,
            Scope.MODEL: model,
        }
        if self.key is not None:
            owners[Scope.KEY] = self.key
        if self.team is not None:
            owners[Scope.TEAM] = self.team
        return owners


def identify(request: Request) -> Identity:
    """The visitor that sent `request`.

    Raises:
        InvalidRequest: the fingerprint is malformed.
    """
    network = request.environ[NETWORK]
    text = request.environ.get("HTTP_X_FINGERPRINT")
    if text is None:
        return Identity(unnamed(network), network, None, has_fingerprint=False)
    match = _FINGERPRINT.fullmatch(text)
    if match is None:
        form = "fp:<challenge>:<hash> or <hash>, each 1 to 128 of A-Z a-z 0-9 _ -"
        raise InvalidRequest(400, HEADER, f"has to be {form}")
    return Identity(match[2], network, match[1], has_fingerprint=True)
