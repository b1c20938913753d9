"""Reading the books that Redis holds; both Redis strategies keep the same."""

from typing import Any

from backends.clock import US_PER_SECOND, Clock
from backends.contract import Books
from backends.keys import SECONDS_PER_DAY, book_keys, bucket_seconds_of
from backends.store.link import Client, Link
from backends.strategies import arithmetic


def ring_of(members: list[tuple[bytes, float]]) -> dict[int, int]:
    """A ring as ``ZRANGE … WITHSCORES`` gives it: bucket start (unix s) -> nano-dollars."""
    return {int(start): int(held) for start, held in members}


def read_books(link: Link, clock: Clock | None, identifier: str, network: str, window_seconds: int) -> Books:
    """What is booked now, by Redis' time or by `clock`; one round trip, all of it of one moment."""
    now_us = clock.now_us() if clock else link.time_us()
    keys = book_keys("", identifier, network, now_us // US_PER_SECOND)
    rings = (keys.recent, keys.network_recent, keys.pending_identifier)
    totals = (keys.daily, keys.network_daily, keys.global_hourly, keys.global_daily)

    def read(client: Client) -> list[Any]:
        transaction = client.pipeline(transaction=True)
        for key in rings:
            transaction.zrange(key, 0, -1, withscores=True)
        for key in totals:
            transaction.get(key)
        transaction.get(keys.marker)
        transaction.pttl(keys.marker)
        return transaction.execute()

    *members, daily, network_daily, global_hourly, global_daily, marker, marker_left_ms = link.run(read)
    recent, network_recent, opened = map(ring_of, members)
    bucket = bucket_seconds_of(window_seconds)
    living = arithmetic.alive(recent, bucket, window_seconds, now_us)
    today = now_us // US_PER_SECOND // SECONDS_PER_DAY * SECONDS_PER_DAY
    return Books(
        window_nanousd=sum(living.values()),
        day_nanousd=arithmetic.amount(daily),
        network_window_nanousd=sum(arithmetic.alive(network_recent, bucket, window_seconds, now_us).values()),
        network_day_nanousd=arithmetic.amount(network_daily),
        global_hour_nanousd=arithmetic.amount(global_hourly),
        global_day_nanousd=arithmetic.amount(global_daily),
        pending_nanousd=sum(opened.values()),
        pending_today_nanousd=arithmetic.since(opened, today),
        window_frees_at_seconds=arithmetic.window_frees_at(living, window_seconds, now_us) if living else None,
        marker=arithmetic.marker_of(marker, marker_left_ms, now_us),
        as_of_us=now_us,
    )
