"""Challenges: 32 random bytes, good once, for one hash from one network, for five minutes."""

import re
import secrets
from enum import Enum

from backends.keys import CHALLENGE_PREFIX
from backends.store.link import Link
from backends.store.scripts import Script

CHALLENGE_SECONDS = 300
_CONSUME = Script("consume.lua")
_FORM = re.compile(r"[0-9a-f]{64}")


class ChallengeResult(Enum):
    """What a presented challenge was found to be."""

    GOOD = 0
    UNKNOWN = 1
    MISMATCH = 2


def has_form(challenge: str) -> bool:
    """Whether it can be one of ours."""
    return bool(_FORM.fullmatch(challenge))


class Challenges:
    """Issues and checks challenges; both raise `StoreError` where Redis fails."""

    def __init__(self, link: Link) -> None:
        self._link = link

    @staticmethod
    def draw() -> str:
        """64 random hex digits."""
        return secrets.token_hex(32)

    def give(self, identifier: str, network: str) -> str:
        """A new challenge, stored for `CHALLENGE_SECONDS`."""
        challenge = self.draw()
        key, owner = CHALLENGE_PREFIX + challenge, _owner(identifier, network)
        self._link.run(lambda client: client.set(key, owner, ex=CHALLENGE_SECONDS))
        return challenge

    def consume(self, challenge: str, identifier: str, network: str) -> ChallengeResult:
        """Check a challenge and use it up in one step: of a thousand callers at once, one finds it good."""
        if not has_form(challenge):
            return ChallengeResult.UNKNOWN
        key, owner = CHALLENGE_PREFIX + challenge, _owner(identifier, network)
        (status,) = self._link.run(lambda client: _CONSUME.run(client, [key], [owner]))
        return ChallengeResult(status)


def _owner(identifier: str, network: str) -> str:
    return f"{identifier} {network}"
