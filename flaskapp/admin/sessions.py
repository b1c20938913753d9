"""Sessions of the dashboard that were ended before their time, so that a copy of the cookie is worth nothing."""

from backends.keys import ENDED_SESSION_PREFIX
from backends.store.link import Link


class EndedSessions:
    """Remembers what was ended; both raise `StoreError` where Redis fails."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def end(self, session_id: str, keep_seconds: int) -> None:
        """From now on `has_ended`; `keep_seconds` has to outlive the session."""
        self._link.run(lambda client: client.set(ENDED_SESSION_PREFIX + session_id, 1, ex=keep_seconds))

    def has_ended(self, session_id: str) -> bool:
        """Whether it was ended."""
        return bool(self._link.run(lambda client: client.exists(ENDED_SESSION_PREFIX + session_id)))
