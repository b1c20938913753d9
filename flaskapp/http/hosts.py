"""By which names this service may be asked in development mode.

A page of another site can let its own name point to 127.0.0.1 and then ask a service of the visitor's machine as if it
were its own (DNS rebinding). Its browser still sends that name as the Host.
"""

import re
from collections.abc import Collection
from ipaddress import IPv4Address, IPv6Address

from flask import Flask, request

from flaskapp.http.refusals import InvalidRequest

_LOCALHOST = "localhost"
_HOST = re.compile(r"(?:\[(?P<address>[^\[\]]*)\]|(?P<name>[^:\[\]]*))(?::[0-9]*)?")
_REASON = (
    "in development mode this service answers to localhost, to addresses, and to the names in HOST and ALLOWED_HOSTS"
)


def demand_known_host(app: Flask, names: Collection[str]) -> None:
    """Refuse requests whose Host is neither `localhost`, nor an IP address, nor one of `names`; ports do not matter.

    To be called before whatever else looks at requests. One without a Host passes: no browser sends such.
    """
    known = {_LOCALHOST, *map(str.lower, names)}

    @app.before_request
    def refuse_other_hosts() -> None:
        host = request.environ.get("HTTP_HOST")
        if host is not None and not _is_known(host, known):
            raise InvalidRequest(421, "Host", _REASON)


def _is_known(host: str, names: Collection[str]) -> bool:
    match = _HOST.fullmatch(host.strip())
    if match is None:
        return False
    try:
        return bool(IPv4Address(match["name"]) if match["address"] is None else IPv6Address(match["address"]))
    except ValueError:
        return (match["name"] or "").lower().removesuffix(".") in names
