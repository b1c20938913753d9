import pytest

pytest.register_assert_rewrite("backends.conformance")
