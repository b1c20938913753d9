"""The published suites over every registered backend, each as far as the backend claims."""

import pytest

from backends import backend_names, open_backend
from backends.clock import SystemClock
from backends.conformance.behaviour import Behaviour
from backends.conformance.harness import MemoryHarness, RedisHarness
from backends.conformance.redis_layout import RedisLayout
from backends.store.link import Link
from tests.contract.sqlite_backend import SqliteBackend, SqliteHarness

OURS = ("atomic", "legacy", "memory", "multi", "watch")
# To be opened says what a backend claims; nothing listens there, and nothing is asked.
NOWHERE = Link("redis://127.0.0.1:1/0", clock=SystemClock())
CLAIMED = {name: open_backend(name, NOWHERE).keeps_our_layout for name in backend_names()}


def opened(request):
    if request.param == "memory":
        return MemoryHarness()
    if request.param == "sqlite":
        return SqliteHarness(request.getfixturevalue("tmp_path") / "books.db")
    return RedisHarness(request.param, request.getfixturevalue("redis_url"))


class TestOurLayout(RedisLayout):
    @pytest.fixture(autouse=True, params=[name for name, ours in CLAIMED.items() if ours])
    def _open(self, request):
        self.harness = opened(request)
        yield
        self.harness.close()


class TestAnyLayout(Behaviour):
    @pytest.fixture(autouse=True, params=["sqlite", *[name for name, ours in CLAIMED.items() if not ours]])
    def _open(self, request):
        self.harness = opened(request)
        yield
        self.harness.close()


def test_all_of_ours_claim_our_layout_and_a_store_that_is_no_redis_does_not():
    assert {name for name in OURS if CLAIMED[name]} == set(OURS)
    assert not SqliteBackend.keeps_our_layout
