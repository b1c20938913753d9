"""Who calls, where proxies stand in front: read from `X-Forwarded-For`, and from no other header.

Each proxy adds the address that called it at the end. So the entries of the trusted ones stand last, the caller's
address is the first of those, and whatever the caller itself wrote stands before it.
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from flaskapp.http.networks import UNKNOWN_NETWORK, network_of

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

NETWORK = "tollgate.network"
"""Where the environment of a request has the network of its caller."""
_WITH_PORT = re.compile(r"\[([^\[\]]*)\](?::[0-9]*)?|([^:]*):[0-9]*")
"""Some proxies add the port, and then write an IPv6 address in brackets."""


class Forwarded:
    """Reads the network of the caller behind `hops` proxies.

    Args:
        on_unreadable: called for each request whose address cannot be read.
    """

    def __init__(self, hops: int, ipv6_prefix: int, on_unreadable: Callable[[], object]) -> None:
        self._hops = hops
        self._ipv6_prefix = ipv6_prefix
        self._on_unreadable = on_unreadable

    def network(self, environ: "WSGIEnvironment") -> str:
        """The caller's network; where there is no address that can be read, it is unknown.

        It is never the network of the peer, which is a proxy: each caller could choose that as a second one. The
        address becomes `REMOTE_ADDR`, which gunicorn's access log shows where an operator has switched that on.
        """
        address = environ["REMOTE_ADDR"] = self._address(environ.get("HTTP_X_FORWARDED_FOR", ""))
        network = network_of(address, self._ipv6_prefix)
        if network == UNKNOWN_NETWORK:
            self._on_unreadable()
        return network

    def _address(self, header: str) -> str:
        entries = header.rsplit(",", self._hops)
        if len(entries) < self._hops:
            return ""
        # A quote means nothing in this header, also where it is not closed.
        entry = entries[-self._hops].strip(' \t"')
        match = _WITH_PORT.fullmatch(entry)
        return entry if match is None else match[1] or match[2] or ""
