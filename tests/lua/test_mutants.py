"""The suite can fail: each of these small wrongs in a script is noticed by some case of it."""

import hashlib
import inspect

import pytest

from backends import atomic
from backends.conformance import Conformance, RedisHarness
from backends.scripts import Script

RESERVE = [
    ("daily + cost <= day_limit", "daily + cost < day_limit"),
    ("daily + cost <= day_limit", "daily <= day_limit"),
    ("and recent.total + cost <= window_limit", ""),
    ("and network_recent.total + cost <= network_limit", "and network_recent.total + cost < network_limit"),
    ("and network_daily + cost <= network_day_limit", ""),
    ("and hourly_of_all + cost <= hour_limit_of_all", ""),
    ("and daily_of_all + cost <= day_limit_of_all", "and daily_of_all + cost <= day_limit_of_all + 1"),
    ("if known_terms ~= terms then return { 9, 0, now_us } end", ""),
    ("if state ~= 'open' then", "if false then"),
    ("if record then", "if false then"),
    ("if marker then", "if false then"),
    ("if flat[i] > over_text then", "if flat[i] >= over_text then"),
    ("floor(now_us / SECOND - length_s - life_s)", "floor(now_us / SECOND - life_s)"),
    ("* (status == 2 and 2 or 1)", ""),
    ("if busy and ARGV[15] ~= '1' then", "if false then"),
    ("if status > 3 then", "if status > 4 then"),
    ("busy = busy and spent", "busy = spent"),
    ("wait_s = math.max(wait_s, marker_s)", ""),
    ("if held_before == 0 then call('EXPIRE', key, ends_at_s - now_s) end", ""),
    ("if held_before == 0 then call('EXPIRE'", "if true then call('EXPIRE'"),
    ("tonumber(call('ZINCRBY', key, ARGV[4], start)) == cost", "call('ZINCRBY', key, ARGV[4], start) == ''"),
    ("charge_ring(KEYS[3], bucket, window_s + bucket_s)", "charge_ring(KEYS[3], bucket, window_s)"),
    ("charge_ring(KEYS[5], bucket, window_s + bucket_s)", ""),
    ("charge_total(KEYS[7], hourly_of_all, hour_ends_s + 7200)", "charge_total(KEYS[7], hourly_of_all, hour_ends_s)"),
    ("charge_total(KEYS[8], daily_of_all, day_ends_s + 86400)", ""),
    ("if recent.over then", "if false then"),
    ("if network_recent.over then", "if false then"),
    ("for i, over in pairs(open_over) do", "for i, over in pairs({}) do"),
    ("'EX', open_s + tonumber(ARGV[18])", "'EX', open_s"),
    ("if left + cost <= limit then return bucket.start + bucket_s + window_s end", ""),
    ("then return bucket.start + bucket_s + window_s end", "then return bucket.start + window_s end"),
]
SETTLE = [
    ("if state ~= 'open' then return { 1, tonumber(nanousd), now_us } end", ""),
    ("if known_terms ~= terms then return { 9, 0, now_us } end", ""),
    ("local status, delta = 0, actual - reserved", "local status, delta = 0, -reserved"),
    ("status, delta = 2, actual", "status, delta = 2, actual - reserved"),
    ("elseif now_us >= made_at_us", "elseif false and now_us >= made_at_us"),
    ("math.max(delta, -(held or 0))", "delta"),
    ("and (total.held or delta > 0)", ""),
    ("and in_window and", "and"),
    ("if not total.held then redis.call('EXPIRE'", "if false then redis.call('EXPIRE'"),
    ("elseif not ring.held then", "elseif redis.call('TTL', ring.key) < 0 then"),
    ("made_s - made_s % bucket_s", "now_s - now_s % bucket_s"),
    ("redis.call('ZREM', ring.key, bucket)", ""),
    ("if open.mine then", "if false then"),
    ("if #open.over > 0 then", "if false then"),
    ("'settled %s %.0f %s', ARGV[4]", "'settled %s %.0f %s', ARGV[3]"),
]
CASES = [case for name, case in inspect.getmembers(Conformance, inspect.isfunction) if name.startswith("test_")]
LAST = "test_any_list_of_operations_leaves_what_the_memory_strategy_leaves"


def first_failure(harness):
    """The name of the first case that fails, the slow one last; None if all hold."""
    suite = Conformance()
    suite.harness = harness
    for case in sorted(CASES, key=lambda case: case.__name__ == LAST):
        harness.clear()
        try:
            case(suite)
        except Exception:  # noqa: BLE001 (whatever it is, the mutant is noticed)
            return case.__name__
    return None


@pytest.fixture
def harness(redis_url):
    harness = RedisHarness("atomic", redis_url)
    yield harness
    harness.close()


def test_the_scripts_as_they_are_pass(harness):
    assert first_failure(harness) is None


@pytest.mark.parametrize(
    ("script", "right", "wrong"),
    [("reserve.lua", *change) for change in RESERVE] + [("settle.lua", *change) for change in SETTLE],
    ids=lambda text: text[:40],
)
def test_a_wrong_in_a_script_is_noticed(monkeypatch, harness, script, right, wrong):
    mutant = Script(script)
    assert mutant.text.count(right) == 1, "the script has changed: so must this mutant"
    mutant.text = mutant.text.replace(right, wrong)
    mutant.digest = hashlib.sha1(mutant.text.encode(), usedforsecurity=False).hexdigest()
    monkeypatch.setattr(atomic, f"_{script.split('.', maxsplit=1)[0].upper()}", mutant)
    assert first_failure(harness) is not None
