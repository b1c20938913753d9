"""deploy/redis.acl: with these rights all of the service and its commands works, and no more than that is allowed."""

import re
from contextlib import closing

import pytest
import redis

from tests.apps import NETWORK, open_app
from tests.servers import ROOT

COMMANDS = (
    "settings show",
    "settings set llm_max_tokens 300",
    "settings unset llm_max_tokens",
    "scripts check",
    "doctor",
)
LEDGER = ("ledger show hash456", "ledger audit", "ledger reset hash456")


def rights_of(user):
    """The words of one user's line."""
    (line,) = [line for line in (ROOT / "deploy" / "redis.acl").read_text().splitlines() if f"user {user} " in line]
    return line.split()[2:]


@pytest.fixture
def url(own_server):
    with redis.Redis(port=own_server.port) as look:
        look.execute_command("ACL", "SETUSER", "tollgate", *rights_of("tollgate"))
    return f"redis://tollgate:choose-a-password@127.0.0.1:{own_server.port}/1"


def use(service):
    """Ask for all that the service and its commands do."""
    for name in ("hash456", "hash456", "hash457"):
        assert service.chat(name, headers={"Idempotency-Key": name}).status_code in {200, 409}
    service.client.get("/api/v1/usage", headers={"X-Fingerprint": "hash456"})
    from_here = {"headers": {"X-Fingerprint": "hash458"}, "environ_base": {"REMOTE_ADDR": NETWORK}}
    asked = service.client.get("/api/v1/auth/challenge", **from_here).json
    assert service.patch(enable_challenge_response=True).status_code == 200
    assert service.chat(f"fp:{asked['challenge']}:hash458").status_code == 200
    assert service.patch(enable_challenge_response=None, reservation_policy="slices").status_code == 200
    assert service.patch(reservation_slice_tokens=4).status_code == 200
    assert service.chat("hash459", max_tokens=100).status_code == 200
    assert service.patch(high_cost_threshold_usd="0.000001").status_code == 200
    assert service.chat("hash460").status_code == 429
    assert service.client.get("/readyz").status_code == 200
    commands = service.app.test_cli_runner()
    for words in (*COMMANDS, *LEDGER):
        done = commands.invoke(args=words.split())
        assert done.exit_code == 0, (words, done.output)


@pytest.mark.parametrize("user", ["", "tollgate:wrong@"])
def test_who_may_not_log_in_says_so_at_the_start(own_server, tmp_path, capsys, user):
    with redis.Redis(port=own_server.port) as look:
        look.execute_command("ACL", "SETUSER", "default", "on", ">a-password")
    with open_app(f"redis://{user}127.0.0.1:{own_server.port}/1", tmp_path, {}) as service:
        for _ in range(3):
            assert service.chat().headers["X-Throttle-Backend"] == "emergency"
        errors = re.findall(r" CRITICAL .* error=\"(.*)\"", capsys.readouterr().err)
    assert errors[0] in {"Authentication required.", "invalid username-password pair or user is disabled."}
    # Each text once a minute; a request of many words gets another one.
    assert len(errors) == len(set(errors)) <= 2


@pytest.mark.parametrize("backend", ["atomic", "legacy", "multi", "watch"])
def test_all_works_with_them(own_server, url, tmp_path, backend):
    with open_app(url, tmp_path, {"THROTTLE_BACKEND": backend}) as service:
        use(service)
    with redis.Redis(port=own_server.port, decode_responses=True) as look:
        assert look.acl_log() == []


@pytest.mark.parametrize(
    "words", ["GET other", "SET other 1", "KEYS *", "FLUSHALL", "CONFIG GET *", "EVAL return 0", "ACL LIST"]
)
def test_nothing_else_is_allowed(url, words):
    with closing(redis.Redis.from_url(url)) as client, pytest.raises(redis.exceptions.NoPermissionError):
        client.execute_command(*words.split())


def test_the_administrator_may_do_all(own_server):
    with redis.Redis(port=own_server.port) as look:
        look.execute_command("ACL", "SETUSER", "administrator", *rights_of("default"))
        assert look.acl_dryrun("administrator", "FLUSHALL") == b"OK"
