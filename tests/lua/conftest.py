import pytest
import redis


@pytest.fixture
def client(each_redis_url):
    with redis.Redis.from_url(each_redis_url) as client:
        yield client
