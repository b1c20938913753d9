"""The published suite over each of our own backends."""

import pytest

from backends.conformance.behaviour import Conformance, MemoryHarness, RedisHarness


class TestEveryBackend(Conformance):
    @pytest.fixture(autouse=True, params=["atomic", "legacy", "memory", "multi", "watch"])
    def _open(self, request):
        if request.param == "memory":
            self.harness = MemoryHarness()
        else:
            self.harness = RedisHarness(request.param, request.getfixturevalue("redis_url"))
        yield
        self.harness.close()
