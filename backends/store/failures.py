"""What the errors of the client library mean: Redis is away, it may not work now, or what we asked is wrong."""

import errno
import re

from redis import exceptions as theirs

CLIENT_ERRORS = (theirs.RedisError, theirs.RedisClusterException, ValueError)
"""All that the client library raises, besides `OSError`."""
NOT_LOGGED_IN = (theirs.AuthenticationError, theirs.AuthorizationError)
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
# What the server says to a request of more than ten words or of a script's length, in place of NOAUTH.
_TOO_LARGE_BEFORE_LOG_IN = "Protocol error: unauthenticated"
_TOO_MANY_CLIENTS = "max number of clients"
_OUR_LIMITS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL)
_OUTAGE_PREFIXES = (
    "OOM ",
    "READONLY",
    "BUSY ",
    "LOADING",
    "NOREPLICAS",
    "MISCONF",
    "UNKILLABLE",
    _TOO_MANY_CLIENTS,
    "command not allowed when used memory",
    "You can't write against a read only",
    "Redis is busy",
)


_NO_PRIMARY_PREFIXES = ("READONLY", "You can't write against a read only", "MASTERDOWN")
# What the client library, EXEC and a script of Redis 6 put before the error itself.
_AROUND = re.compile(
    r"(?:Command # \d+ \(.*\) of pipeline caused error: |Transaction discarded because of: "
    r"|(?:ERR )?Error running script \(call to \w+\): |@?user_script: ?\d+: |-)*",
    re.DOTALL,
)
_OWNER = re.compile(r"(?<=llm:)([a-z]+:)?\S+|(?<=with args beginning with:).*")


class OutOfTime(theirs.TimeoutError):
    """The caller's own time is over; this says nothing about Redis."""


class PoolExhausted(theirs.ConnectionError):
    """None of our connections became free in time; this says nothing about Redis."""


class OpeningFailed(theirs.ConnectionError):
    """A connection could not be opened, so nothing was sent on it. Those that are open may work."""


def is_our_own(error: Exception) -> bool:
    """Whether this process or its machine has no more of what a connection takes; this says nothing about Redis."""
    if isinstance(error, OpeningFailed):
        return isinstance(error.__cause__, OSError) and error.__cause__.errno in _OUR_LIMITS
    return isinstance(error, PoolExhausted)


def is_too_many_clients(error: Exception) -> bool:
    """Whether the server said, in place of its first reply, that it takes no more connections."""
    return str(error).startswith(_TOO_MANY_CLIENTS)


def is_not_logged_in(error: Exception) -> bool:
    """Whether the server takes no command of ours, since the password is missing or wrong."""
    return isinstance(error, NOT_LOGGED_IN) or _TOO_LARGE_BEFORE_LOG_IN in str(error)


def has_no_access(error: Exception) -> bool:
    """Whether the server takes this command from no user such as ours."""
    return is_not_logged_in(error) or isinstance(error, theirs.NoPermissionError)


def is_outage(error: Exception) -> bool:
    """Whether Redis is away or cannot work now. Otherwise the command or the set-up is wrong."""
    if is_not_logged_in(error):
        return False
    if isinstance(error, _OUTAGE_TYPES) or type(error) is theirs.RedisClusterException:
        return True
    return isinstance(error, theirs.ResponseError) and _error_itself(error).startswith(_OUTAGE_PREFIXES)


def is_no_primary(error: Exception) -> bool:
    """Whether a replica answered: after a failover the old connections lead to one, and new ones to the primary."""
    if isinstance(error, (theirs.ReadOnlyError, theirs.MasterDownError)):
        return True
    return isinstance(error, theirs.ResponseError) and _error_itself(error).startswith(_NO_PRIMARY_PREFIXES)


def one_line(error: Exception) -> str:
    """The text of an error for a log: at most 200 characters, and nothing of what was sent that names an owner."""
    text = _OWNER.sub(lambda key: f"{key[1] or ''}…", " ".join(_error_itself(error).split()))
    return text[:200] or type(error).__name__


def _error_itself(error: Exception) -> str:
    text = str(error)
    around = _AROUND.match(text)
    return text[around.end() :] if around else text
