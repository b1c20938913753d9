"""What the errors of the client library mean: Redis is away, it may not work now, or what we asked is wrong."""

import redis
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ClusterError,
    NoPermissionError,
    RedisClusterException,
    SlotNotCoveredError,
    TryAgainError,
)

CLIENT_ERRORS = (redis.RedisError, RedisClusterException, ValueError)
"""All that the client library raises, besides `OSError`."""
NOT_LOGGED_IN = (AuthenticationError, AuthorizationError)
NO_ACCESS = (*NOT_LOGGED_IN, NoPermissionError)
CUT_OFF = (redis.ConnectionError, redis.TimeoutError)
"""No reply was read, so that Redis may have done what it was asked."""

# Errors that say "not now": the server is up, but cannot do its work. The library cuts the code off those that it has a
# class for, and leaves it on the others.
_OUTAGE_TYPES = (
    redis.ConnectionError,
    redis.TimeoutError,
    redis.OutOfMemoryError,
    redis.ReadOnlyError,
    ClusterError,
    SlotNotCoveredError,
    TryAgainError,
)
_OUTAGE_PREFIXES = (
    "OOM ",
    "READONLY",
    "BUSY ",
    "LOADING",
    "NOREPLICAS",
    "MISCONF",
    "UNKILLABLE",
    "max number of clients",
    "command not allowed when used memory",
    "You can't write against a read only",
    "Redis is busy",
)


class OutOfTime(redis.TimeoutError):
    """The caller's own time is over; this says nothing about Redis."""


class PoolExhausted(redis.ConnectionError):
    """None of our connections became free in time; this says nothing about Redis."""


def is_outage(error: Exception) -> bool:
    """Whether Redis is away or cannot work now. Otherwise the command or the set-up is wrong."""
    if isinstance(error, NOT_LOGGED_IN):
        return False
    if isinstance(error, _OUTAGE_TYPES) or type(error) is RedisClusterException:
        return True
    return isinstance(error, redis.ResponseError) and str(error).startswith(_OUTAGE_PREFIXES)


def one_line(error: Exception) -> str:
    """The text of an error for a log, at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__
