"""Gunicorn's response with its head and the first of its body in one write to the client, where gunicorn makes two.

Each write costs a call of the system, and under gevent one more for the size of its buffer.
"""

from collections.abc import Callable
from typing import Any

from gunicorn.http import wsgi


class _Gathered(list[bytes]):
    """In place of a connection: what gunicorn would send with one call of ours."""

    sendall = list.append


class OneWrite(wsgi.Response):  # type: ignore[misc] # gunicorn leaves it untyped
    """What one step of an answer gives is sent in one write."""

    sock: Any

    def write(self, arg: bytes) -> None:
        """A part of the body; with the first one goes the head."""
        self._send_together(super().write, arg)

    def close(self) -> None:
        """The end of the body; with an empty one goes the head."""
        self._send_together(super().close)

    def _send_together(self, step: Callable[..., None], *given: bytes) -> None:
        connection = self.sock
        self.sock = gathered = _Gathered()
        try:
            step(*given)
        finally:
            self.sock = connection
        if gathered:
            data = b"".join(gathered)
            # All of it nearly always, and for less than `sendall` takes under gevent.
            sent = connection.send(data)
            if sent < len(data):
                connection.sendall(memoryview(data)[sent:])


def install() -> None:
    """Let gunicorn make its responses so, in this process."""
    wsgi.Response = OneWrite
