"""A name server of one name, that can fall silent, or refuse."""

import os
import socket
import threading
from pathlib import Path
from typing import Literal, Self

from benchmarks.outages.fault import CannotInject

NAME = "redis.outages.test"
_PORT = 53
_HEADER_BYTES, _TYPE_A = 12, 1
_ANSWERS, _REFUSES = b"\x81\x80", b"\x81\x85"


class NameServer:
    """Every name leads to this machine; a context manager. Only programs that read `configuration` ask it.

    Raises:
        CannotInject: this user may not listen where name servers do.
    """

    def __init__(self, directory: Path) -> None:
        self.asked_in_vain = 0
        self.mode: Literal["answers", "silent", "refuses"] = "answers"
        # Loopback has sixteen million addresses; one of its own for each process.
        address = f"127.{os.getpid() >> 8 & 255}.{os.getpid() & 255}.53"
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            self._socket.bind((address, _PORT))
        except OSError as error:
            self._socket.close()
            raise CannotInject(f"no name server on {address}: {error}") from error
        self.configuration = directory / "resolv.conf"
        self.configuration.write_text(f"nameserver {address}\n", encoding="utf-8")

    def __enter__(self) -> Self:
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.mode = "silent"
        # A thread that waits in recvfrom is not woken by close alone.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"", self._socket.getsockname())

    def _serve(self) -> None:
        with self._socket:
            while query := self._socket.recvfrom(512):
                text, asker = query
                if not text:
                    return
                self.asked_in_vain += self.mode != "answers"
                if self.mode != "silent":
                    self._socket.sendto(self._reply(text), asker)

    def _reply(self, query: bytes) -> bytes:
        # One question: labels that end with an empty one, its type, its class.
        end = query.index(b"\0", _HEADER_BYTES) + 5
        question = query[_HEADER_BYTES:end]
        is_answered = self.mode == "answers" and int.from_bytes(question[-4:-2]) == _TYPE_A
        flags = _ANSWERS if self.mode == "answers" else _REFUSES
        head = query[:2] + flags + b"\0\1" + (b"\0\1" if is_answered else b"\0\0") + b"\0\0\0\0"
        # The name of the question again, type A, class IN, to be kept for no time, four bytes.
        answer = b"\xc0\x0c\0\1\0\1\0\0\0\0\0\4" + socket.inet_aton("127.0.0.1") if is_answered else b""
        return head + question + answer
