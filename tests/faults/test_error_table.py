"""Whatever Redis or its client library says becomes one of three things: away, busy, or a bug."""

import pytest
import redis
from redis import exceptions

from backends.errors import StoreBroken, StoreError, StoreUnavailable
from backends.store.link import Link
from tests.faults.wire import SkippingClock, Told, server_that_says

SAID_BY_THE_SERVER = {
    "-OOM command not allowed when used memory > 'maxmemory'.": StoreUnavailable,
    "-OOM command not allowed when used memory > 'maxmemory'. script: a1, on @user_script:1.": StoreUnavailable,
    "-READONLY You can't write against a read only replica.": StoreUnavailable,
    "-READONLY You can't write against a read only replica. script: a1, on @user_script:9.": StoreUnavailable,
    "-BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.": StoreUnavailable,
    "-BUSY Valkey is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.": StoreUnavailable,
    "-LOADING Redis is loading the dataset in memory": StoreUnavailable,
    "-NOREPLICAS Not enough good replicas to write.": StoreUnavailable,
    "-NOREPLICAS Not enough good replicas to write. script: a1, on @user_script:1.": StoreUnavailable,
    "-MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist": StoreUnavailable,
    "-MISCONF Errors writing to the AOF file: No space left on device": StoreUnavailable,
    "-CLUSTERDOWN The cluster is down": StoreUnavailable,
    "-CLUSTERDOWN Hash slot not served": StoreUnavailable,
    "-MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.": StoreUnavailable,
    "-TRYAGAIN Multiple keys request during rehashing of slot": StoreUnavailable,
    "-UNKILLABLE Sorry the script already executed write commands against the dataset.": StoreUnavailable,
    "-ERR max number of clients reached": StoreUnavailable,
    "-ERR max number of clients + cluster connections reached": StoreUnavailable,
    "-NOAUTH Authentication required.": StoreBroken,
    "-ERR Protocol error: unauthenticated multibulk length": StoreBroken,
    "-WRONGPASS invalid username-password pair or user is disabled.": StoreBroken,
    "-ERR invalid password": StoreBroken,
    "-NOPERM User default has no permissions to run the 'evalsha' command": StoreBroken,
    "-WRONGTYPE Operation against a key holding the wrong kind of value": StoreBroken,
    "-WRONGTYPE Operation against a key holding the wrong kind of value script: a1, on @user_script:9.": StoreBroken,
    "-ERR user_script:9: llm:cost:daily:x holds no amount script: a1": StoreBroken,
    "-ERR Error compiling script (new function): user_script:1: '=' expected near 'x'": StoreBroken,
    "-ERR unknown command 'EVALSHA', with args beginning with: 'a1'": StoreBroken,
    "-NOSCRIPT No matching script. Please use EVAL.": StoreBroken,
    "-CROSSSLOT Keys in request don't hash to the same slot": StoreBroken,
    "-MOVED 3999 127.0.0.1:6381": StoreBroken,
    "-ASK 3999 127.0.0.1:6381": StoreBroken,
    "-EXECABORT Transaction discarded because of previous errors.": StoreBroken,
    "-EXECABORT Transaction discarded because of: NOREPLICAS Not enough good replicas to write.": StoreUnavailable,
    "-EXECABORT Transaction discarded because of: MISCONF Errors writing to the AOF file": StoreUnavailable,
    "-EXECABORT Transaction discarded because of: OOM command not allowed": StoreUnavailable,
    "-EXECABORT Transaction discarded because of: WRONGTYPE Operation against a key": StoreBroken,
    "-ERR Error running script (call to f_a1): @user_script:9: -READONLY You can't write": StoreUnavailable,
    "-ERR Error running script (call to f_a1): @user_script:9: @user_script: 9: -MISCONF Redis": StoreUnavailable,
    "-ERR Error running script (call to f_a1): @user_script:9: -NOREPLICAS Not enough": StoreUnavailable,
    "-ERR Error running script (call to f_a1): @user_script:9: WRONGTYPE Operation against a key": StoreBroken,
    "-DENIED Redis is running in protected mode": StoreBroken,
    "HTTP/1.1 400 Bad Request": StoreBroken,
}
RAISED_BY_THE_LIBRARY = {
    redis.ConnectionError("Connection reset by peer"): StoreUnavailable,
    redis.TimeoutError("Timeout reading from socket"): StoreUnavailable,
    ConnectionResetError(104, "Connection reset by peer"): StoreUnavailable,
    BrokenPipeError(32, "Broken pipe"): StoreUnavailable,
    OSError(24, "Too many open files"): StoreUnavailable,
    TimeoutError("timed out"): StoreUnavailable,
    exceptions.RedisClusterException("Redis Cluster cannot be connected"): StoreUnavailable,
    exceptions.SlotNotCoveredError("Slot 3 is not covered by the cluster"): StoreUnavailable,
    exceptions.ClusterDownError("The cluster is down"): StoreUnavailable,
    exceptions.MasterDownError("Link with MASTER is down"): StoreUnavailable,
    exceptions.TryAgainError("Multiple keys request during rehashing of slot"): StoreUnavailable,
    exceptions.ClusterError("TTL exhausted."): StoreUnavailable,
    exceptions.CrossSlotTransactionError("keys of two slots"): StoreBroken,
    exceptions.DataError("Invalid input of type: 'NoneType'"): StoreBroken,
    exceptions.InvalidResponse("Protocol Error"): StoreBroken,
    ValueError("not what Redis answers"): StoreBroken,
    exceptions.ResponseError("value is not an integer or out of range"): StoreBroken,
}


@pytest.fixture
def told():
    return Told()


@pytest.fixture
def linked(told):
    links = []

    def make(url):
        links.append(Link(url, clock=SkippingClock(), observer=told, timeout_seconds=2))
        return links[-1]

    yield make
    for link in links:
        link.close()


@pytest.mark.parametrize(("reply", "becomes"), SAID_BY_THE_SERVER.items(), ids=lambda part: str(part)[:40])
def test_what_the_server_says(linked, told, reply, becomes):
    with server_that_says(reply.encode() + b"\r\n") as url, pytest.raises(StoreError) as raised:
        linked(url).run(lambda client: client.get("x"))
    assert raised.type is becomes
    assert bool(told.named("store_broken")) == (becomes is StoreBroken), "a bug, and only a bug, raises the alarm"


@pytest.mark.parametrize(("error", "becomes"), RAISED_BY_THE_LIBRARY.items(), ids=lambda part: repr(part)[:40])
def test_what_the_library_raises(linked, told, error, becomes):
    def command(client):
        raise error

    with pytest.raises(StoreError) as raised:
        linked("redis://127.0.0.1:1/0").run(command)
    assert raised.type is becomes
    assert bool(told.named("store_broken")) == (becomes is StoreBroken)


IN_A_TRANSACTION = {
    "-NOREPLICAS Not enough good replicas to write.": StoreUnavailable,
    "-MISCONF Errors writing to the AOF file: No space left on device": StoreUnavailable,
    "-READONLY You can't write against a read only replica.": StoreUnavailable,
    "-OOM command not allowed when used memory > 'maxmemory'.": StoreUnavailable,
    "-WRONGTYPE Operation against a key holding the wrong kind of value": StoreBroken,
}


@pytest.mark.parametrize("is_transaction", [True, False])
@pytest.mark.parametrize(("reply", "becomes"), IN_A_TRANSACTION.items(), ids=lambda part: str(part)[:40])
def test_what_the_server_says_inside_a_pipeline(linked, told, reply, becomes, is_transaction):
    """The client library puts the command before the error, and the command has an identifier in it."""

    def command(client):
        client.pipeline(transaction=is_transaction).set("llm:cost:daily:somebody:x", "READONLY", ex=1).execute()

    aborted = b"-EXECABORT Transaction discarded because of previous errors.\r\n"
    replies = b"+OK\r\n" + reply.encode() + b"\r\n" + aborted if is_transaction else reply.encode() + b"\r\n"
    with server_that_says(replies) as url, pytest.raises(StoreError) as raised:
        linked(url).run(command)
    assert raised.type is becomes
    assert bool(told.named("store_broken")) == (becomes is StoreBroken)
    assert "somebody" not in str(raised.value)
    assert "somebody" not in str(list(told))


@pytest.mark.parametrize(
    "reply",
    [
        "-ERR unknown command 'EVALSHA', with args beginning with: 'a1' '2' 'llm:throttle:somebody' 'somebody' ",
        "-NOPERM No permissions to access the 'llm:cost:daily:somebody:2026-03-14' key",
        "-WRONGTYPE llm:budget:month:forever:somebody is no string",
        "-OOM llm:network:recent:somebody",
    ],
)
def test_no_owner_of_a_key_is_in_a_message(linked, told, reply):
    with server_that_says(reply.encode() + b"\r\n") as url, pytest.raises(StoreError) as raised:
        linked(url).run(lambda client: client.get("x"))
    assert "somebody" not in str(raised.value)
    assert "somebody" not in str(list(told))
    assert raised.value.args[0]


def test_nobody_there(linked):
    with pytest.raises(StoreUnavailable) as raised:
        linked("redis://127.0.0.1:1/0").run(lambda client: client.ping())
    assert raised.value.maybe_done


def test_a_server_that_hangs_up(linked):
    with server_that_says(None) as url, pytest.raises(StoreUnavailable) as raised:
        linked(url).run(lambda client: client.ping())
    assert raised.value.maybe_done


def test_a_reply_is_known_to_have_changed_nothing(linked):
    """OOM and its like refuse at the first write of a script; there is nothing to undo."""
    with server_that_says(b"-OOM command not allowed\r\n") as url, pytest.raises(StoreUnavailable) as raised:
        linked(url).run(lambda client: client.get("x"))
    assert not raised.value.maybe_done


def test_no_password_is_in_a_message(linked, told):
    with server_that_says(b"-WRONGPASS invalid username-password pair\r\n") as url:
        secret = url.replace("redis://", "redis://user:geheim@")
        with pytest.raises(StoreBroken) as raised:
            linked(secret).run(lambda client: client.ping())
    assert "geheim" not in str(raised.value)
    assert "geheim" not in str(list(told))
