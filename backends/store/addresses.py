"""Redis' address: what `REDIS_URL` may say, and how it is shown."""

import re
from collections.abc import Mapping
from urllib.parse import parse_qs, urlsplit

from backends.errors import ConfigurationError, shown

_SCHEMES = ("redis://", "rediss://", "unix://")
_URL_OPTIONS = ("db", "username", "password")
_TLS_OPTIONS = (
    "ssl_cert_reqs",
    "ssl_check_hostname",
    "ssl_ca_certs",
    "ssl_ca_path",
    "ssl_certfile",
    "ssl_keyfile",
    "ssl_password",
)
# In an address these would replace our own, and with them what is promised about time and repeats.
SET_BY_US = {
    "socket_timeout",
    "socket_connect_timeout",
    "socket_read_size",
    "socket_keepalive",
    "timeout",
    "max_connections",
    "retry",
    "retry_on_timeout",
    "retry_on_error",
    "health_check_interval",
    "protocol",
    "decode_responses",
    "encoding",
    "client_name",
    "driver_info",
}


ENCODING = "user and password percent-encoded (# as %23, / as %2F, ? as %3F, @ as %40, [ as %5B, % as %25)"
_PARTS = re.compile(
    r"[^:/?#]*://(?P<authority>[^/?#]*)(?P<path>[^?#]*)(?:\?(?P<query>[^#]*))?(?P<fragment>#.*)?", re.DOTALL
)


def without_password(url: str) -> str:
    """The same address without user, password and options, fit for a log."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.partition('?')[0].rpartition('@')[2]}"


def is_cut_short(url: str) -> bool:
    """Whether a character that is not percent-encoded, such as `#`, ends this URL's user or password too early.

    What stands before that character would be taken for host and port, and be printed as such.
    """
    parts = _PARTS.fullmatch(url)
    if parts is None:
        return False
    if parts["fragment"] or (parts["authority"] and "@" in parts["path"]):
        return True
    query = parts["query"] or ""
    if "@" in query and (not parts["path"] or url.startswith(_SCHEMES)):
        return any(pair.partition("=")[0] not in (*_URL_OPTIONS, *_TLS_OPTIONS) for pair in query.split("&"))
    return "@" in parts["authority"] and not _can_be_split(url)


def _can_be_split(url: str) -> bool:
    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False


def check_url(url: str) -> None:
    """Refuse what the client library would overlook, or find out only when it connects, or print with a password.

    Raises:
        ConfigurationError: one line, without a value (it may be a secret).
    """
    if is_cut_short(url):
        raise ConfigurationError(f"REDIS_URL: a URL with {ENCODING}; the value is not shown")
    if not url.startswith(_SCHEMES) or not _can_be_split(url):
        raise ConfigurationError(
            f"REDIS_URL: a URL that begins with {' or '.join(_SCHEMES)}, with a port that is a number"
        )
    try:
        parts = urlsplit(url)
        options = parse_qs(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError as error:
        raise ConfigurationError("REDIS_URL: a URL; what stands behind the ? is not name=value") from error
    _check_options(parts.scheme, options)
    if parts.scheme in {"redis", "rediss"} and not re.fullmatch(r"/?|/[0-9]{1,9}", parts.path):
        raise ConfigurationError("REDIS_URL: behind the host only / and the number of a database are allowed")
    if parts.scheme == "unix" and not parts.path:
        raise ConfigurationError("REDIS_URL: behind unix:// stands the path of a socket")


def _check_options(scheme: str, options: Mapping[str, list[str]]) -> None:
    allowed = (*_URL_OPTIONS, *(_TLS_OPTIONS if scheme == "rediss" else ()))
    for name in options:
        if name not in allowed:
            why = "; time-outs, retries, the pool and the protocol are set by Tollgate" if name in SET_BY_US else ""
            raise ConfigurationError(
                f"REDIS_URL: the options {', '.join(allowed)} are allowed behind the ?{why}; got {shown(name)}"
            )
    if not re.fullmatch(r"[0-9]{1,9}", options.get("db", ["0"])[-1]):
        raise ConfigurationError("REDIS_URL: db has to be the number of a database")
    if options.get("ssl_cert_reqs", ["none"])[-1] not in {"none", "optional", "required"}:
        raise ConfigurationError("REDIS_URL: ssl_cert_reqs has to be none, optional or required")
