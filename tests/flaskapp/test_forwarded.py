"""The caller's network behind proxies, which the caller cannot choose."""

import random

import pytest

from flaskapp.http.forwarded import Forwarded
from tests.servers import CHAT, LITECOIN

HOME, PROXY, OUTER_PROXY = "203.0.113.7", "10.0.0.1", "192.0.2.1"
HOME_SPELLINGS = (
    HOME,
    f"{HOME}:51234",
    f'"{HOME}"',
    f'"{HOME}:80"',
    f"[{HOME}]:80",
    f"::ffff:{HOME}",
    "::FFFF:cb00:7107",
)


def network_behind(header, hops=1, **environ):
    """The network, and how often its address was found unreadable."""
    reports = []
    environ = {"REMOTE_ADDR": PROXY, **environ} | ({} if header is None else {"HTTP_X_FORWARDED_FOR": header})
    return Forwarded(hops, 56, lambda: reports.append(1)).network(environ), len(reports)


@pytest.mark.parametrize(
    ("hops", "forwarded", "network"),
    [
        (1, "203.0.113.9", "203.0.113.9"),
        (1, "198.51.100.1, 203.0.113.9", "203.0.113.9"),
        (1, "198.51.100.1,203.0.113.9", "203.0.113.9"),
        (2, "198.51.100.1, 203.0.113.9", "198.51.100.1"),
        (2, "6.6.6.6, 198.51.100.1, 203.0.113.9", "198.51.100.1"),
        (2, "198.51.100.1, rubbish", "198.51.100.1"),
        *((1, spelling, HOME) for spelling in HOME_SPELLINGS),
        (1, f'"{HOME}', HOME),
        (1, f'{HOME}"', HOME),
        (1, f'", {HOME}', HOME),
        (1, f'"6.6.6.6, {HOME}', HOME),
        (1, f"{HOME}:", HOME),
        (1, "2001:db8::1", "2001:db8::/56"),
        (1, "2001:DB8:0:00FF::1", "2001:db8::/56"),
        (1, "[2001:db8:0:ff::1]", "2001:db8::/56"),
        (1, "[2001:db8:0:ff::1]:443", "2001:db8::/56"),
        (1, '"[2001:db8:0:ff::1]:443"', "2001:db8::/56"),
        (1, "[2001:db8:0:ff::1%eth0]:443", "2001:db8::/56"),
        (1, "2001:db8:0:ff::1%25eth0", "2001:db8::/56"),
    ],
)
def test_the_last_entries_are_those_of_the_proxies(hops, forwarded, network):
    assert network_behind(forwarded, hops) == (network, 0)


@pytest.mark.parametrize(
    ("hops", "forwarded"),
    [
        (1, None),
        (1, ""),
        (1, '"'),
        (1, "6.6.6.6,"),
        (1, "rubbish"),
        (1, "unknown"),
        (1, "_hidden"),
        (1, "for=6.6.6.6"),
        (1, "6.6.6.6:http"),
        (1, "6.6.6.6:80:80"),
        (1, "6.6.6.6.6"),
        (1, "06.6.6.6"),
        (1, "[6.6.6.6"),
        (1, "[]:80"),
        (1, "[[2001:db8::1]]"),
        (1, "[2001:db8::1]443"),
        (1, "6.6.6.6 7.7.7.7"),
        (1, "\xb2.6.6.6"),
        (2, HOME),
        (3, f"6.6.6.6, {HOME}"),
    ],
)
def test_what_cannot_be_read_is_unknown_and_never_the_network_of_the_proxy(hops, forwarded):
    assert network_behind(forwarded, hops) == ("unknown", 1)


def test_the_access_log_is_given_the_address_of_the_caller():
    environ = {"REMOTE_ADDR": PROXY, "HTTP_X_FORWARDED_FOR": f"6.6.6.6, [{HOME}]:80"}
    Forwarded(1, 56, pytest.fail).network(environ)
    assert environ["REMOTE_ADDR"] == HOME


def test_ten_thousand_forgeries_change_no_owner():
    rng = random.Random(13)
    pieces = (
        *',"\'[]:;=%\\\t,," ',
        *("6.6.6.6", "::1", "2001:db8::1", "[::1]:80", "for=6.6.6.6", "unknown", PROXY, "\x85", "\xff", "0" * 300, ""),
    )
    for number in range(10_000):
        forged = "".join(rng.choices(pieces, k=rng.randint(0, 8)))
        told_by_proxy = rng.choice(HOME_SPELLINGS)
        between = rng.choice((", ", ",", " , "))
        hops = 1 + number % 2
        rest = [OUTER_PROXY] * (hops - 1)
        header = between.join([*([forged] if rng.random() < 0.95 else []), told_by_proxy, *rest])
        others = {f"HTTP_{name}": forged or "6.6.6.6" for name in ("FORWARDED", "X_REAL_IP", "X_FORWARDED_HOST", "VIA")}
        assert network_behind(header, hops, **others) == (HOME, 0), (header, hops)


# The whole service.


def ask(service, forwarded, **headers):
    given = headers | ({"X-Forwarded-For": forwarded} if forwarded else {})
    return service.client.post(
        CHAT, json=LITECOIN, headers=given, buffered=True, environ_base={"REMOTE_ADDR": "10.0.0.1"}
    )


def networks(service):
    return {key.removeprefix("llm:network:daily:")[:-11] for key in service.redis.scan_iter("llm:network:daily:*")}


def warnings(caplog):
    return [record.levelname for record in caplog.records if "X-Forwarded-For" in record.message]


def test_without_a_proxy_a_caller_cannot_choose_its_network_and_that_is_logged_once(make_app, caplog):
    service = make_app(NETWORK_COST_LIMIT_USD="0", HIGH_COST_THRESHOLD_USD="1", HOURLY_SPEND_LIMIT_USD="9")
    for number in range(20):
        assert ask(service, f"203.0.113.{number}").status_code == 200
    assert networks(service) == {"10.0.0.1"}
    assert warnings(caplog) == ["WARNING"]


def test_behind_a_proxy_its_entry_counts_and_nothing_is_logged(make_app, caplog):
    service = make_app(TRUSTED_PROXY_HOPS="1")
    assert ask(service, f'", {HOME}:80').status_code == 200
    assert networks(service) == {HOME}
    assert warnings(caplog) == []


def test_unreadable_addresses_share_one_network_and_are_logged_once(make_app, caplog):
    service = make_app(TRUSTED_PROXY_HOPS="1", NETWORK_COST_LIMIT_USD="0", HIGH_COST_THRESHOLD_USD="1")
    for forwarded in ('"', "rubbish", "", "6.6.6.6,"):
        assert ask(service, forwarded).status_code == 200
    assert networks(service) == {"unknown"}
    assert warnings(caplog) == ["WARNING"]


@pytest.mark.parametrize("name", ["Forwarded", "X-Real-IP", "X-Forwarded-Host", "X-Forwarded-Prefix", "Client-IP"])
def test_no_other_header_says_who_calls(make_app, name):
    service = make_app(TRUSTED_PROXY_HOPS="1", HIGH_COST_THRESHOLD_USD="1")
    assert ask(service, HOME, **{name: "for=6.6.6.6"}).status_code == 200
    assert ask(service, HOME, **{name: "6.6.6.6"}).status_code == 200
    assert networks(service) == {HOME}


def test_all_of_an_ipv6_customer_is_one_network(make_app):
    service = make_app(TRUSTED_PROXY_HOPS="1", HIGH_COST_THRESHOLD_USD="1", NETWORK_COST_LIMIT_USD="0")
    for number in range(4):
        assert ask(service, f"2001:db8:0:{number:x}f::1").status_code == 200
    assert networks(service) == {"2001:db8::/56"}
    assert ask(service, "2001:db8:0:100::1").status_code == 200
    assert networks(service) == {"2001:db8::/56", "2001:db8:0:100::/56"}


def test_how_large_a_network_is_can_be_set(make_app):
    service = make_app(TRUSTED_PROXY_HOPS="1", NETWORK_IPV6_PREFIX="64", HIGH_COST_THRESHOLD_USD="1")
    assert ask(service, "2001:db8:0:1::1").status_code == 200
    assert ask(service, "2001:db8:0:2::1").status_code == 200
    assert networks(service) == {"2001:db8:0:1::/64", "2001:db8:0:2::/64"}


def test_every_route_takes_the_same_network(make_app):
    service = make_app(TRUSTED_PROXY_HOPS="1", API_KEYS="*")
    headers = {"X-Forwarded-For": f'6.6.6.6", "{HOME}:443"'}
    assert service.client.get("/api/v1/usage", headers=headers).json["identifier"] == f"ip:{HOME}"
    headers["X-Fingerprint"] = "hash456"
    challenge = service.client.get("/api/v1/auth/challenge", headers=headers).json["challenge"]
    assert service.redis.get(f"llm:challenge:{challenge}") == f"hash456 {HOME}"
    body = {"messages": [{"role": "user", "content": "hi"}]}
    assert service.client.post("/v1/chat/completions", json=body, headers=headers, buffered=True).status_code == 200
    assert networks(service) == {HOME}
    assert service.redis.exists(f"llm:cost:recent:ip:{HOME}")
