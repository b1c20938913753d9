"""A short form of `python -m tests.openapi_cases`, always with the same cases."""

import pytest

from tests.openapi_cases import PLENTY, SERVICES, generated, run
from tests.servers import Service


@pytest.mark.parametrize("name", SERVICES)
def test_nothing_undocumented_and_no_5xx(redis_url, tmp_path, name):
    environment, options = SERVICES[name]
    with Service(tmp_path, redis_url, **PLENTY, **environment) as service:
        status, output = run(service, options, 2, seed=1)
    assert status == 0, output
    assert generated(output) > 100, output
