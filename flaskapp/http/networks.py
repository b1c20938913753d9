"""Networks as keys spell them: what one caller cannot leave by itself, and what one network of a provider is."""

import ipaddress
from functools import lru_cache

UNKNOWN_NETWORK = "unknown"
IPV6_PREFIX = 56
"""Of one network, unless `NETWORK_IPV6_PREFIX` is another: what many providers give one customer."""


@lru_cache(maxsize=1_024)
def network_of(address: str | None, ipv6_prefix: int) -> str:
    """The IPv4 address, or the network with that prefix of an IPv6 one."""
    parsed = _parsed((address or "").partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        return _network(parsed, ipv6_prefix)
    return UNKNOWN_NETWORK if parsed is None else str(parsed)


@lru_cache(maxsize=1_024)
def wide_network_of(network: str) -> str:
    """The /24 of an IPv4 address, or the /48 of an IPv6 network."""
    parsed = _parsed(network.partition("/")[0])
    if parsed is None:
        return UNKNOWN_NETWORK
    return _network(parsed, 24 if isinstance(parsed, ipaddress.IPv4Address) else 48)


def _parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address; an IPv4 one also where it is mapped into IPv6."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return None
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return parsed if mapped is None else mapped


def _network(address: ipaddress.IPv4Address | ipaddress.IPv6Address, prefix: int) -> str:
    return str(ipaddress.ip_network(f"{address}/{prefix}", strict=False))
