"""Sessions of the dashboard that were ended by a log-out, so that a copy of their cookie is refused."""

from backends.keys import ENDED_SESSION_PREFIX
from backends.store.link import Link


class EndedSessions:
    """The ended sessions, in Redis; both methods raise `StoreError` where it fails."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def end(self, session_id: str, keep_seconds: int) -> None:
        """End a session; `keep_seconds` has to be at least what is left of it."""
        self._link.run(lambda client: client.set(ENDED_SESSION_PREFIX + session_id, 1, ex=keep_seconds))

    def has_ended(self, session_id: str) -> bool:
        """Whether it was ended."""
        return bool(self._link.run(lambda client: client.exists(ENDED_SESSION_PREFIX + session_id)))
