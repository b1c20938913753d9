"""Reading the books that Redis holds; both Redis strategies keep the same."""

from typing import Any

from backends import rules
from backends.clock import Clock
from backends.contract import Books
from backends.keys import book_keys, bucket_seconds_of
from backends.link import Client, Link


def ring_of(members: list[tuple[bytes, float]]) -> dict[int, int]:
    """A ring as ``ZRANGE … WITHSCORES`` gives it: bucket start (unix s) -> nano-dollars."""
    return {int(start): int(held) for start, held in members}


def read_ring(client: Client, key: str) -> dict[int, int]:
    """A ring, whole: at most as many members as it has buckets."""
    members: Any = client.zrange(key, 0, -1, withscores=True)
    return ring_of(members)


def read_books(link: Link, clock: Clock | None, identifier: str, network: str, window_seconds: int) -> Books:
    """What is booked now, by Redis' time or by `clock`."""
    now_us = clock.now_us() if clock else link.time_us()
    keys = book_keys("", identifier, network, now_us // rules.US)
    bucket = bucket_seconds_of(window_seconds)

    def read(client: Client) -> Books:
        def window(key: str) -> int:
            return sum(rules.alive(read_ring(client, key), bucket, window_seconds, now_us).values())

        def total(key: str) -> int:
            text: Any = client.get(key)
            return rules.amount(text)

        return Books(
            window_nanousd=window(keys.recent),
            day_nanousd=total(keys.daily),
            network_window_nanousd=window(keys.network_recent),
            network_day_nanousd=total(keys.network_daily),
            global_hour_nanousd=total(keys.hourly_of_all),
            global_day_nanousd=total(keys.daily_of_all),
            open_nanousd=sum(read_ring(client, keys.open_identifier).values()),
        )

    return link.run(read)
