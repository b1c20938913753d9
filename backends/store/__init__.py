"""Our client of Redis. redis-py is imported here, and where `backends` keeps its books in Redis."""

Words = tuple[str | int, ...]
"""One command to Redis: its name, then its arguments. Kept here, where no client library is needed."""
