"""Identifiers, and networks that a caller cannot choose."""

import pytest
from werkzeug.test import EnvironBuilder
from werkzeug.wrappers import Request

from backends.budgets import Scope
from flaskapp.http.forwarded import NETWORK
from flaskapp.http.identity import identify
from flaskapp.http.networks import network_of, wide_network_of
from flaskapp.http.refusals import InvalidRequest


def request_with(network="198.51.100.7", **headers):
    return Request(EnvironBuilder(headers=headers, environ_base={NETWORK: network}).get_environ())


@pytest.mark.parametrize(
    ("header", "identifier", "challenge"),
    [
        ("hash456", "hash456", None),
        ("fp:test123:hash456", "hash456", "test123"),
        ("fp", "fp", None),
        ("fp:fp:fp", "fp", "fp"),
        ("fp:-:_", "_", "-"),
    ],
)
def test_the_stable_identifier_is_the_hash(header, identifier, challenge):
    who = identify(request_with(**{"X-Fingerprint": header}))
    assert (who.identifier, who.challenge, who.has_fingerprint) == (identifier, challenge, True)
    assert who.network == "198.51.100.7"


def test_without_the_header_it_is_the_network():
    who = identify(request_with("2001:db8:1:200::/56"))
    assert (who.identifier, who.network, who.challenge) == ("ip:2001:db8:1:200::/56", "2001:db8:1:200::/56", None)
    assert not who.has_fingerprint


@pytest.mark.parametrize("number", range(18))
def test_no_other_place_for_a_colon_is_a_fingerprint(number):
    text = "fpchallengehash456"
    for moved in (text[:number] + ":" + text[number:], "fp:" + text[:number] + ":" + text[number:] + ":"):
        with pytest.raises(InvalidRequest):
            identify(request_with(**{"X-Fingerprint": moved}))


def test_a_line_break_at_the_end_is_no_part_of_it():
    environ = request_with().environ
    environ["HTTP_X_FINGERPRINT"] = "hash456\n"
    with pytest.raises(InvalidRequest):
        identify(Request(environ))


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("203.0.113.9", "203.0.113.9"),
        ("::ffff:203.0.113.9", "203.0.113.9"),
        ("::FFFF:CB00:7109", "203.0.113.9"),
        ("2001:db8:1:2::", "2001:db8:1::/56"),
        ("2001:0DB8:0001:00FF:ffff:ffff:ffff:ffff", "2001:db8:1::/56"),
        ("2001:db8:1:100::", "2001:db8:1:100::/56"),
        ("fe80::1%eth0", "fe80::/56"),
        ("::1", "::/56"),
        ("", "unknown"),
        (None, "unknown"),
        ("unix:", "unknown"),
        ("1.2.3.4:80", "unknown"),
        ("{x}", "unknown"),
        ("203.0.113.09", "unknown"),
    ],
)
def test_a_network_is_an_ipv4_address_or_an_ipv6_56(address, network):
    assert network_of(address, 56) == network


@pytest.mark.parametrize(
    ("prefix", "network"),
    [
        (49, "2001:db8:1:8000::/49"),
        (60, "2001:db8:1:8640::/60"),
        (63, "2001:db8:1:864a::/63"),
        (64, "2001:db8:1:864b::/64"),
    ],
)
def test_a_network_has_as_many_bits_as_are_set(prefix, network):
    assert network_of("2001:db8:1:864b::1", prefix) == network
    assert network_of("203.0.113.9", prefix) == "203.0.113.9"


@pytest.mark.parametrize(
    ("address", "wide_network"),
    [
        ("203.0.113.9", "203.0.113.0/24"),
        ("203.0.113.255", "203.0.113.0/24"),
        ("203.0.114.0", "203.0.114.0/24"),
        ("0.0.0.1", "0.0.0.0/24"),
        ("::ffff:203.0.113.9", "203.0.113.0/24"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1::/48"),
        ("2001:db8:1:ffff::", "2001:db8:1::/48"),
        ("2001:db8:2::", "2001:db8:2::/48"),
        ("::1", "::/48"),
        ("fe80::1%eth0", "fe80::/48"),
        (None, "unknown"),
        ("rubbish", "unknown"),
    ],
)
def test_a_wide_network_is_an_ipv4_24_or_an_ipv6_48(address, wide_network):
    assert wide_network_of(network_of(address, 56)) == wide_network
    assert wide_network_of(network_of(address, 64)) == wide_network
    assert wide_network_of(wide_network) == wide_network


def test_a_visitor_has_owners_in_all_scopes_but_those_of_keys():
    assert identify(request_with(**{"X-Fingerprint": "hash456"})).owners("gpt-4o") == {
        Scope.IDENTIFIER: "hash456",
        Scope.NETWORK: "198.51.100.7",
        Scope.WIDE_NETWORK: "198.51.100.0/24",
        Scope.GLOBAL: "all",
        Scope.MODEL: "gpt-4o",
    }
