"""Who a registered key stands for: its identifier, its name and its team."""

import hashlib

import pytest
from werkzeug.exceptions import Unauthorized
from werkzeug.test import EnvironBuilder
from werkzeug.wrappers import Request

from backends.budgets import Scope
from flaskapp.config import load_config
from flaskapp.http.api_keys import ApiKeys
from flaskapp.http.forwarded import NETWORK


def digest_of(key):
    return hashlib.sha256(key.encode()).hexdigest()


def request_with(key):
    headers = {"Authorization": f"Bearer {key}"}
    return Request(EnvironBuilder(headers=headers, environ_base={NETWORK: "198.51.100.7"}).get_environ())


def who(listed, key):
    return load_config({"API_KEYS": listed}).api_keys.find(request_with(key))


@pytest.mark.parametrize(
    ("entry", "key", "name", "team"),
    [
        ("web=sk-1", "sk-1", "web", None),
        ("web@marketing=sk-1", "sk-1", "web", "marketing"),
        ("a-b_9@0=sk=1==", "sk=1==", "a-b_9", "0"),
        ("x=y=z", "y=z", "x", None),
        ("x==", "=", "x", None),
        (f"{'n' * 32}@{'t' * 32}=sk-1", "sk-1", "n" * 32, "t" * 32),
        (f"web@marketing={digest_of('sk-1')}", "sk-1", "web", "marketing"),
        (f"web={digest_of('sk-1').upper()}", "sk-1", "web", None),
    ],
)
def test_what_stands_before_the_first_equals_sign_names_a_key_and_its_team(entry, key, name, team):
    caller = who(f"other, {entry}", key)
    assert (caller.key, caller.team, caller.identifier) == (name, team, digest_of(key))
    assert who(entry, entry) is None


@pytest.mark.parametrize(
    "entry",
    [
        "sk-1",
        "sk-1=",
        "web@marketing=",
        "c2VjcmV0==",
        "Web=sk-1",
        "we.b=sk-1",
        "=sk-1",
        "@marketing=sk-1",
        "web@=sk-1",
        "web@Marketing=sk-1",
        "web@a@b=sk-1",
        f"{'n' * 33}=sk-1",
        f"web@{'t' * 33}=sk-1",
    ],
)
def test_any_other_entry_is_a_key_named_by_its_digest(entry):
    caller = who(entry, entry)
    assert (caller.key, caller.team, caller.identifier) == (digest_of(entry)[:8], None, digest_of(entry))


def test_a_bare_digest_is_named_by_itself():
    assert who(digest_of("sk-1").upper(), "sk-1").key == digest_of("sk-1")[:8]


def test_two_keys_of_one_name_share_it_and_each_keeps_its_team():
    listed = "web=sk-1,web@marketing=sk-2,web@sales=sk-3"
    callers = [who(listed, f"sk-{number}") for number in (1, 2, 3)]
    assert [(caller.key, caller.team) for caller in callers] == [("web", None), ("web", "marketing"), ("web", "sales")]
    assert len({caller.identifier for caller in callers}) == 3


def test_one_key_has_one_name():
    assert len(ApiKeys.of(["web=sk-1", f"web={digest_of('sk-1')}"]).keys) == 1
    for other in ("sk-1", "mobile=sk-1", "web@marketing=sk-1", f"mobile={digest_of('sk-1')}"):
        with pytest.raises(ValueError, match="one key under two names"):
            ApiKeys.of(["web=sk-1", other])


def test_named_digests_are_counted_as_digests():
    assert ApiKeys.of([f"web={digest_of('sk-1')}", digest_of("sk-2"), "mobile=sk-3", "sk-4"]).listed_digests == 2


def test_the_owners_of_a_request_with_a_key():
    owners = who("web@marketing=sk-1", "sk-1").owners("gpt-4o")
    assert owners == {
        Scope.IDENTIFIER: digest_of("sk-1"),
        Scope.NETWORK: "198.51.100.7",
        Scope.WIDE_NETWORK: "198.51.100.0/24",
        Scope.GLOBAL: "all",
        Scope.MODEL: "gpt-4o",
        Scope.KEY: "web",
        Scope.TEAM: "marketing",
    }
    assert Scope.TEAM not in who("web=sk-1", "sk-1").owners("gpt-4o")


def test_open_to_anyone_no_caller_has_a_key():
    caller = who("*", "sk-1")
    assert (caller.identifier, caller.key, caller.team) == ("ip:198.51.100.7", None, None)


@pytest.mark.parametrize("key", ["web", "web=sk-1", "sk-", "", digest_of("sk-1")])
def test_neither_a_name_nor_an_entry_nor_a_digest_opens_anything(key):
    keys = ApiKeys.of(["web=sk-1", f"mobile={digest_of('sk-2')}"])
    with pytest.raises(Unauthorized):
        keys.identify(request_with(key))


def test_neither_a_key_nor_its_digest_is_in_a_repr():
    keys = ApiKeys.of(["web=sk-1"])
    assert digest_of("sk-1") not in repr((keys, keys.keys))
    assert "sk-1" not in repr(keys.keys)
