"""Writes books as many reservations would have left them: for measuring, never in a database in use."""

import random
from collections.abc import Sequence
from typing import Any

from backends.budgets import SECONDS_PER_DAY, Budget
from backends.clock import US_PER_SECOND
from backends.keys import PENDING_BUCKETS, WINDOW_BUCKETS, pending_bucket_seconds_of, rows_at, running_key
from backends.store.link import Link
from flaskapp.lab.race import CLOCK, COST_NANOUSD, PENDING_SECONDS


def leave_as_after(link: Link, budgets: Sequence[Budget], requests: int, its_random: random.Random) -> None:
    """Write the books of `budgets` after reservations that were spread over each window, and over what may be pending.

    What the windows come to is not noted: the next decision has to read them.
    """
    now_seconds = CLOCK.now_us() // US_PER_SECOND
    rows = rows_at(budgets, now_seconds)

    def buckets_of(each_seconds: int, buckets: int) -> dict[Any, int]:
        """Amounts of `requests` over at most `buckets` buckets, each another amount."""
        filled = min(requests, buckets)
        newest = now_seconds - now_seconds % each_seconds
        each = requests // filled * COST_NANOUSD
        return {newest - each_seconds * age: each - its_random.randrange(COST_NANOUSD) for age in range(filled)}

    pending = buckets_of(pending_bucket_seconds_of(PENDING_SECONDS), PENDING_BUCKETS + 1)
    windows = {row.pending_key: (pending, SECONDS_PER_DAY) for row in rows}
    totals = [row.key for row in rows if not row.layout.window_seconds]
    for row in rows:
        if row.layout.window_seconds:
            ttl_seconds = row.layout.window_seconds + row.bucket_seconds
            windows[row.key] = buckets_of(row.bucket_seconds, WINDOW_BUCKETS + 1), ttl_seconds

    def write(client: Any) -> None:
        for key, (members, ttl_seconds) in windows.items():
            client.delete(key, running_key(key))
            client.zadd(key, members)
            client.expire(key, ttl_seconds)
        for key in totals:
            client.set(key, requests * COST_NANOUSD, ex=SECONDS_PER_DAY)

    link.run(write)
