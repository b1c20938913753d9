"""Redis' address: what `REDIS_URL` may say, and how it is shown."""

import re
from urllib.parse import parse_qs, urlsplit

from backends.errors import ConfigurationError, shown

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


def without_password(url: str) -> str:
    """The same address without user, password and options, fit for a log."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}"


def check_url(url: str) -> None:
    """Refuse what the client library would overlook, or find out only when it connects.

    Raises:
        ConfigurationError: one line, without a value (it may be a secret).
    """
    try:
        parts = urlsplit(url)
        options = parse_qs(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError as error:
        raise ConfigurationError("REDIS_URL: a URL; what stands behind the ? is not name=value") from error
    allowed = (*_URL_OPTIONS, *(_TLS_OPTIONS if parts.scheme == "rediss" else ()))
    for name in options:
        if name not in allowed:
            why = "; time-outs, retries, the pool and the protocol are set by Tollgate" if name in SET_BY_US else ""
            raise ConfigurationError(
                f"REDIS_URL: the options {', '.join(allowed)} are allowed behind the ?{why}; got {shown(name)}"
            )
    if parts.scheme in {"redis", "rediss"} and not re.fullmatch(r"/?|/[0-9]{1,9}", parts.path):
        raise ConfigurationError("REDIS_URL: behind the host only / and the number of a database are allowed")
    if parts.scheme == "unix" and not parts.path:
        raise ConfigurationError("REDIS_URL: behind unix:// stands the path of a socket")
    if options.get("ssl_cert_reqs", ["none"])[-1] not in {"none", "optional", "required"}:
        raise ConfigurationError("REDIS_URL: ssl_cert_reqs has to be none, optional or required")
