"""What an upstream's template puts into a prompt by itself, learnt from what it bills.

A chat template may have a system prompt of its own, and words around tools, beyond what the bounds allow for. Where an
answer's input is more than its bound, the difference is added to the bounds of the model from then on: in this process
at once, in the others when they look next.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import cast

from backends.contract import Event, Observer
from backends.errors import StoreError
from backends.keys import OVERHEAD_PREFIX
from backends.store.link import Client, Link

KEEP_SECONDS = 30 * 86_400
_NUMBER = re.compile(rb"[0-9]{1,7}")


class PromptOverheads:
    """Of each model, how many tokens its bounds have in addition.

    Args:
        least_tokens: `LLM_PROMPT_OVERHEAD_TOKENS`, which holds for each model whatever was learnt.
        most_learnt_tokens: no more is learnt, so that one wrong bill does not shut every caller out.
    """

    def __init__(
        self,
        link: Link,
        models: Iterable[str],
        least_tokens: int,
        most_learnt_tokens: Callable[[], int],
        observer: Observer,
    ) -> None:
        self._link = link
        self._least_tokens = least_tokens
        self._most_learnt_tokens = most_learnt_tokens
        self._observer = observer
        self._tokens = dict.fromkeys(models, least_tokens)
        self._keys = [OVERHEAD_PREFIX + model for model in self._tokens]

    @property
    def tokens(self) -> Mapping[str, int]:
        """By model, as far as this process knows."""
        return self._tokens

    def refresh(self) -> None:
        """Take over what Redis has now. While it is away the last known numbers hold; never raises `StoreError`."""
        try:
            found = self._link.run(self._read)
        except StoreError:
            return
        for model, text in zip(self._tokens, found, strict=True):
            self._tokens[model] = max(self._least_tokens, _number_in(text))

    def learn(self, model: str, tokens: int) -> None:
        """An answer needed so many in addition to what its prompt itself can have."""
        tokens = min(tokens, max(self._most_learnt_tokens(), self._least_tokens))
        if tokens <= self._tokens.get(model, tokens):
            return
        self._tokens[model] = tokens
        self._observer(Event("overhead_learnt", {"model": model, "overhead_tokens": tokens}))
        try:
            self._link.run(lambda client: self._write(client, OVERHEAD_PREFIX + model, tokens))
        except StoreError:
            # It will be learnt again.
            return

    def _read(self, client: Client) -> list[bytes | None]:
        return cast("list[bytes | None]", client.mget(self._keys))

    @staticmethod
    def _write(client: Client, key: str, tokens: int) -> None:
        before = _number_in(cast("bytes | None", client.set(key, tokens, ex=KEEP_SECONDS, get=True)))
        if before > tokens:
            # Another process has learnt more meanwhile.
            client.set(key, before, ex=KEEP_SECONDS)


def _number_in(text: bytes | None) -> int:
    """The number of tokens in what Redis has; 0 for what is none."""
    return int(text) if text is not None and _NUMBER.fullmatch(text) else 0
