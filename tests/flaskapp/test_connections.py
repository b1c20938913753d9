"""The turns of a worker's requests: one after each look at the connections, and new connections first."""

import subprocess
import sys

PROGRAM = """
from gevent import monkey; monkey.patch_all()
import gevent, os, socket
from flaskapp.ops.connections import Turns

class Clock:
    seconds = 1_000.0
    def monotonic_seconds(self):
        return self.seconds

clock = Clock()
turns, seen = Turns(clock), []
ours, theirs = socket.socketpair()

def worker(name):
    turns.take()
    seen.append(name)
    if name == "b":
        # Work that never waits: what others may do, they do after it.
        theirs.sendall(b"x")

def reader():
    ours.recv(1)
    seen.append("bytes")

jobs = [gevent.spawn(reader), *map(gevent.spawn, [worker] * 5, "abcde")]
gevent.joinall(jobs, raise_error=True)
print(*seen)
"""


def run(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_one_goes_on_after_each_look_at_the_connections():
    assert run(PROGRAM) == ["a", "b", "bytes", "c", "d", "e"]


def test_who_is_ended_while_it_waits_holds_up_none():
    program = PROGRAM.replace("gevent.joinall", "gevent.sleep(0); jobs[4].kill(); jobs[3].kill()\ngevent.joinall")
    assert run(program) == ["a", "b", "bytes", "e"]


def test_new_connections_go_first_for_a_while():
    """While more and more come none begins, but for one now and then."""
    program = PROGRAM.replace(
        "gevent.joinall(jobs, raise_error=True)",
        """
def looks(number):
    for _ in range(number):
        turns.announce()
        gevent.sleep(1e-9)  # one look
    return "".join(name for name in seen if len(name) == 1)

print(looks(20))
clock.seconds += 0.1
print(looks(20))
gevent.joinall(jobs, raise_error=True)""",
    )
    assert run(program) == ["ab", "abc", "a", "b", "bytes", "c", "d", "e"]
