"""Our client of Redis. Only this package and its users in `backends` know redis-py."""

Words = tuple[str | int, ...]
"""One command to Redis: its name, then its arguments. Kept here, where no client library is needed."""
