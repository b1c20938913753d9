"""Writes books as many reservations would have left them: for measuring, never in a database in use."""

import random
from collections.abc import Iterator
from typing import Any

from backends.keys import (
    PENDING_BUCKETS,
    SECONDS_PER_DAY,
    WINDOW_BUCKETS,
    BookKeys,
    book_keys,
    bucket_seconds_of,
    pending_bucket_seconds_of,
)
from backends.store.link import Client


def leave_as_after(  # noqa: PLR0913 (what makes up such books)
    client: Client,
    who: str,
    requests: int,
    *,
    network: str,
    now_seconds: int,
    cost_nanousd: int,
    window_seconds: int,
    pending_seconds: int,
    its_random: random.Random,
) -> None:
    """Write the books of `who` after `requests` reservations of about `cost_nanousd`, spread over the window."""
    keys = book_keys("", who, network, now_seconds)
    bucket_seconds = bucket_seconds_of(window_seconds)

    def buckets_of(each_seconds: int, buckets: int) -> dict[int, int]:
        """Amounts of `requests` over at most `buckets` buckets, each another amount."""
        filled = min(requests, buckets)
        newest = now_seconds - now_seconds % each_seconds
        each = requests // filled * cost_nanousd
        return {newest - each_seconds * age: each - its_random.randrange(cost_nanousd) for age in range(filled)}

    spent = buckets_of(bucket_seconds, WINDOW_BUCKETS + 1)
    pending = buckets_of(pending_bucket_seconds_of(pending_seconds), PENDING_BUCKETS + 1)
    for key, members in _windows(keys, spent, pending):
        client.delete(key)
        client.zadd(key, members)
        client.expire(key, window_seconds + bucket_seconds)
    for key in (keys.daily, keys.network_daily, keys.global_hourly, keys.global_daily):
        client.set(key, sum(spent.values()), ex=SECONDS_PER_DAY)


def _windows(keys: BookKeys, spent: dict[int, int], pending: dict[int, int]) -> Iterator[tuple[str, dict[Any, int]]]:
    yield keys.recent, spent
    yield keys.network_recent, spent
    yield keys.pending_identifier, pending
    yield keys.pending_network, pending
    yield keys.pending_global, pending
