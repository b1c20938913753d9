"""Identifiers, and networks that a caller cannot choose."""

import pytest
from werkzeug.test import EnvironBuilder
from werkzeug.wrappers import Request

from backends.budgets import Scope
from flaskapp.http.identity import identify, network_of, rate_key, wide_network_of
from flaskapp.http.refusals import InvalidRequest
from tests.servers import CHAT, LITECOIN


def request_with(address="198.51.100.7", **headers):
    return Request(EnvironBuilder(headers=headers, environ_base={"REMOTE_ADDR": address}).get_environ())


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
    who = identify(request_with("2001:db8:1:2:3:4:5:6"))
    assert (who.identifier, who.network, who.challenge) == ("ip:2001:db8:1:2::/64", "2001:db8:1:2::/64", None)
    assert not who.has_fingerprint


@pytest.mark.parametrize("number", range(18))
def test_no_other_place_for_a_colon_is_a_fingerprint(number):
    text = "fpchallengehash456"
    for moved in (text[:number] + ":" + text[number:], "fp:" + text[:number] + ":" + text[number:] + ":"):
        with pytest.raises(InvalidRequest):
            identify(request_with(**{"X-Fingerprint": moved}))


def test_a_line_break_at_the_end_is_no_part_of_it():
    environ = EnvironBuilder().get_environ()
    environ["HTTP_X_FINGERPRINT"] = "hash456\n"
    with pytest.raises(InvalidRequest):
        identify(Request(environ))


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("203.0.113.9", "203.0.113.9"),
        ("::ffff:203.0.113.9", "203.0.113.9"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff:ffff:ffff:ffff", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        ("", "unknown"),
        (None, "unknown"),
        ("unix:", "unknown"),
        ("1.2.3.4:80", "unknown"),
        ("{x}", "unknown"),
    ],
)
def test_a_network_is_an_ipv4_address_or_an_ipv6_64(address, network):
    assert network_of(address) == network


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
    assert identify(request_with(address)).wide_network == wide_network
    assert wide_network_of(wide_network) == wide_network


def test_a_visitor_has_owners_in_all_scopes_but_those_of_keys():
    assert identify(request_with(**{"X-Fingerprint": "hash456"})).owners("gpt-4o") == {
        Scope.IDENTIFIER: "hash456",
        Scope.NETWORK: "198.51.100.7",
        Scope.WIDE_NETWORK: "198.51.100.0/24",
        Scope.GLOBAL: "all",
        Scope.MODEL: "gpt-4o",
    }


def test_a_bad_fingerprint_counts_for_its_network():
    assert rate_key(request_with(**{"X-Fingerprint": "{}"})) == "ip:198.51.100.7"
    assert rate_key(request_with(**{"X-Fingerprint": "fp:a:b"})) == "b"


def ask(service, forwarded):
    headers = {"X-Forwarded-For": forwarded} if forwarded else {}
    return service.client.post(
        CHAT, json=LITECOIN, headers=headers, buffered=True, environ_base={"REMOTE_ADDR": "10.0.0.1"}
    )


def networks(service):
    return {key.split(":")[3] for key in service.redis.scan_iter("llm:network:daily:*")}


def test_without_a_proxy_a_caller_cannot_choose_its_network_and_that_is_logged_once(make_app, caplog):
    service = make_app(NETWORK_COST_LIMIT_USD="0", HIGH_COST_THRESHOLD_USD="1", HOURLY_SPEND_LIMIT_USD="9")
    for number in range(20):
        assert ask(service, f"203.0.113.{number}").status_code == 200
    assert networks(service) == {"10.0.0.1"}
    assert [record.levelname for record in caplog.records if "X-Forwarded-For" in record.message] == ["WARNING"]


@pytest.mark.parametrize(
    ("hops", "forwarded", "network"),
    [
        ("1", "203.0.113.9", "203.0.113.9"),
        ("1", "198.51.100.1, 203.0.113.9", "203.0.113.9"),
        ("2", "198.51.100.1, 203.0.113.9", "198.51.100.1"),
        ("2", "6.6.6.6, 198.51.100.1, 203.0.113.9", "198.51.100.1"),
        ("2", "203.0.113.9", "10.0.0.1"),
        ("1", "", "10.0.0.1"),
        ("1", "rubbish", "unknown"),
    ],
)
def test_as_many_proxies_as_are_trusted_are_believed(make_app, caplog, hops, forwarded, network):
    service = make_app(TRUSTED_PROXY_HOPS=hops)
    assert ask(service, forwarded).status_code == 200
    assert networks(service) == {network}
    assert [record for record in caplog.records if "X-Forwarded-For" in record.message] == []
