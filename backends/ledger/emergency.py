"""Emergency spend in the books: `lua/book.lua`, and which keys it is sent."""

from backends.budgets import EVERYBODY, SECONDS_PER_HOUR, Budget, Calendar, Scope
from backends.clock import US_PER_SECOND
from backends.keys import emergency_key, rows_at
from backends.store.link import Link
from backends.store.scripts import Script

_BOOK = Script("book.lua")
_EVERYBODYS = (
    Budget("global_hour", EVERYBODY, Calendar("hour"), None, Scope.GLOBAL),
    Budget("global_day", EVERYBODY, Calendar("day"), None, Scope.GLOBAL),
)


def book_emergency_spend(
    link: Link, instance: str, hour: int, nanousd: int, edition: int, *, now_us: int | None = None
) -> int:
    """Have everybody's hour and day hold so much of an instance's, and no more, however often it is said.

    A total whose key has aged out is left alone.

    Args:
        link: the Redis that holds the books.
        instance: 16 hex digits.
        hour: its number since 1970.
        nanousd: all that the instance has spent in it.
        edition: of two that say different amounts the later one holds, whichever comes first.
        now_us: stands in for Redis' own time in tests.

    Returns:
        By how many nano-dollars the books changed.

    Raises:
        StoreError: Redis could not be asked; repeat it later.
    """
    began_seconds = hour * SECONDS_PER_HOUR
    its_hour, its_day = rows_at(_EVERYBODYS, began_seconds)
    keys = (emergency_key(instance, began_seconds), its_hour.key, its_day.key)
    args = (
        "" if now_us is None else now_us,
        edition,
        nanousd,
        began_seconds * US_PER_SECOND,
        its_hour.layout.keep_until_seconds,
        its_day.layout.keep_until_seconds,
    )
    _, change_nanousd, _ = link.run(lambda client: _BOOK.run(client, keys, args))
    return int(change_nanousd)
