r"""The conformance suites: what every backend must do, ours or another package's. pytest runs them; no import needs it.

* `behaviour.Behaviour` asks through the contract only: any backend can pass it, wherever it keeps its books.
* `redis_layout.RedisLayout` is the same and more, for a backend that keeps our keys: it compares every stored key.

`Backend.keeps_our_layout` declares which of the two a backend passes. A test module of the other package holds this,
where the name is the one registered in the entry-point group ``llm_tollgate.backends``, and the database may be
emptied::

    class TestMyBackend(RedisLayout):
        @pytest.fixture(autouse=True)
        def _open(self):
            self.harness = RedisHarness("my-backend", "redis://127.0.0.1:6380/0")
            yield self.harness
            self.harness.close()

A backend that keeps its books elsewhere inherits `Behaviour`, and brings a `harness.Harness` of its own.
``pytest.register_assert_rewrite("backends.conformance")`` in a conftest makes failures show the values compared.
Time is a clock that the suite moves, together with the TTLs of the stored keys; nothing sleeps.
"""
