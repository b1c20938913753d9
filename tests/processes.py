"""Which processes there are, as /proc says."""

from pathlib import Path


def children_of(pid):
    """Those that `pid` started, and those that they started."""
    found = [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]
    return [each for child in found for each in (child, *children_of(child))]


def is_alive(pid):
    """Whether it runs; one that has ended and waits for its parent does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
