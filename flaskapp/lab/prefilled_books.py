"""Writes books as many reservations would have left them: for measuring, never in a database in use."""

import random
from typing import Any

from backends.clock import US_PER_SECOND
from backends.keys import (
    PENDING_BUCKETS,
    SECONDS_PER_DAY,
    WINDOW_BUCKETS,
    book_keys,
    bucket_seconds_of,
    pending_bucket_seconds_of,
)
from backends.store.link import Link
from flaskapp.lab.race import CLOCK, COST_NANOUSD, PENDING_SECONDS, WINDOW_SECONDS


def leave_as_after(link: Link, who: str, requests: int, its_random: random.Random) -> None:
    """Write the books of `who`, in the network ``net-<who>``, after reservations that were spread over the window."""
    now_seconds = CLOCK.now_us() // US_PER_SECOND
    keys = book_keys("", who, f"net-{who}", now_seconds)

    def buckets_of(each_seconds: int, buckets: int) -> dict[Any, int]:
        """Amounts of `requests` over at most `buckets` buckets, each another amount."""
        filled = min(requests, buckets)
        newest = now_seconds - now_seconds % each_seconds
        each = requests // filled * COST_NANOUSD
        return {newest - each_seconds * age: each - its_random.randrange(COST_NANOUSD) for age in range(filled)}

    spent = buckets_of(bucket_seconds_of(WINDOW_SECONDS), WINDOW_BUCKETS + 1)
    pending = buckets_of(pending_bucket_seconds_of(PENDING_SECONDS), PENDING_BUCKETS + 1)
    windows = dict.fromkeys((keys.recent, keys.network_recent), spent)
    windows |= dict.fromkeys((keys.pending_identifier, keys.pending_network, keys.pending_global), pending)

    def write(client: Any) -> None:
        for key, members in windows.items():
            client.delete(key)
            client.zadd(key, members)
            client.expire(key, WINDOW_SECONDS + bucket_seconds_of(WINDOW_SECONDS))
        for key in (keys.daily, keys.network_daily, keys.global_hourly, keys.global_daily):
            client.set(key, sum(spent.values()), ex=SECONDS_PER_DAY)

    link.run(write)
