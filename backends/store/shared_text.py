"""One string in Redis that many processes change, so that no change overwrites another."""

from collections.abc import Callable, Sequence
from typing import cast

from redis.exceptions import ResponseError, WatchError

from backends.store import Words
from backends.store.link import Client, Link

NOT_A_STRING = b"(a key that is no string)"
"""Read in place of a key of another type."""
_TRIES = 50

Text = bytes | None
"""None: there is no such key."""


class SharedText:
    """The string at `key`. Both methods raise `StoreError` where Redis fails."""

    def __init__(self, link: Link, key: str) -> None:
        self._link = link
        self._key = key

    def read(self) -> Text:
        """What is there now, or `NOT_A_STRING`."""
        return self._link.run(self._read)

    def change(self, new_text: Callable[[Text], Text], beside: Sequence[Words] = ()) -> tuple[Text, Text] | None:
        """Replace what is there by `new_text` of it, in one step with the commands `beside`; the key has no TTL then.

        Returns the text before and after; None, with nothing changed, where others were faster `_TRIES` times.
        """
        return self._link.run(lambda client: self._change(client, new_text, beside))

    def _read(self, client: Client) -> Text:
        try:
            return cast("Text", client.get(self._key))
        except ResponseError as error:
            if str(error).startswith("WRONGTYPE"):
                return NOT_A_STRING
            raise

    def _change(
        self, client: Client, new_text: Callable[[Text], Text], beside: Sequence[Words]
    ) -> tuple[Text, Text] | None:
        with client.pipeline() as pipe:
            for _ in range(_TRIES):
                try:
                    pipe.watch(self._key)  # type: ignore[no-untyped-call]  # redis-py has no types there
                    before = self._read(pipe)
                    after = new_text(before)
                    pipe.multi()
                    if after is None:
                        pipe.delete(self._key)
                    else:
                        pipe.set(self._key, after)
                    for words in beside:
                        pipe.execute_command(*words)  # type: ignore[no-untyped-call]  # as above
                    pipe.execute()
                except WatchError:
                    continue
                return before, after
        return None
