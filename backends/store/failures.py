"""What the errors of the client library mean: Redis is away, it may not work now, or what we asked is wrong."""

from redis import exceptions as theirs

CLIENT_ERRORS = (theirs.RedisError, theirs.RedisClusterException, ValueError)
"""All that the client library raises, besides `OSError`."""
NOT_LOGGED_IN = (theirs.AuthenticationError, theirs.AuthorizationError)
NO_ACCESS = (*NOT_LOGGED_IN, theirs.NoPermissionError)
CUT_OFF = (theirs.ConnectionError, theirs.TimeoutError)
"""No reply was read, so that Redis may have done what it was asked."""

# Errors that say "not now": the server is up, but cannot do its work. The library cuts the code off those that it has a
# class for, and leaves it on the others.
_OUTAGE_TYPES = (
    theirs.ConnectionError,
    theirs.TimeoutError,
    theirs.OutOfMemoryError,
    theirs.ReadOnlyError,
    theirs.ClusterError,
    theirs.SlotNotCoveredError,
    theirs.TryAgainError,
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


class OutOfTime(theirs.TimeoutError):
    """The caller's own time is over; this says nothing about Redis."""


class PoolExhausted(theirs.ConnectionError):
    """None of our connections became free in time; this says nothing about Redis."""


def is_outage(error: Exception) -> bool:
    """Whether Redis is away or cannot work now. Otherwise the command or the set-up is wrong."""
    if isinstance(error, NOT_LOGGED_IN):
        return False
    if isinstance(error, _OUTAGE_TYPES) or type(error) is theirs.RedisClusterException:
        return True
    return isinstance(error, theirs.ResponseError) and str(error).startswith(_OUTAGE_PREFIXES)


def one_line(error: Exception) -> str:
    """The text of an error for a log, at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__
