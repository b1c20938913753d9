"""The published suite over each of our own backends, on every kind of server at hand."""

import shutil

import pytest

from backends.conformance.behaviour import Conformance, MemoryHarness, RedisHarness

OTHER_SERVERS = ["atomic on Debian's Redis", "legacy on Debian's Redis"] if shutil.which("redis-server") else []


class TestEveryBackend(Conformance):
    @pytest.fixture(autouse=True, params=["atomic", "legacy", "memory", "multi", "watch", *OTHER_SERVERS])
    def _open(self, request):
        name, _, elsewhere = request.param.partition(" on ")
        if name == "memory":
            self.harness = MemoryHarness()
        else:
            url = request.getfixturevalue("_debian_server").url if elsewhere else request.getfixturevalue("redis_url")
            self.harness = RedisHarness(name, url)
        yield
        self.harness.close()
