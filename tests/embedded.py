"""An embedded server that can also fail: frozen, or killed."""

import os
import signal
import time

from flaskapp.ops.embedded_redis import EmbeddedServer
from flaskapp.ops.running_redis import answers


class FragileServer(EmbeddedServer):
    """One server process on 127.0.0.1. What was written to a durable one survives `kill` too."""

    def kill(self) -> None:
        """End it as a power cut would."""
        process = self._release()
        if process is not None:
            process.kill()
            process.wait()

    def freeze(self) -> None:
        """Stop it from answering; connections stay open. Returns when it has fallen silent."""
        os.kill(self.pid, signal.SIGSTOP)
        end = time.monotonic() + 5
        while answers(self.url, timeout_seconds=0.05) and time.monotonic() < end:
            time.sleep(0.005)

    def thaw(self) -> None:
        """Let it go on where `freeze` stopped it."""
        os.kill(self.pid, signal.SIGCONT)
