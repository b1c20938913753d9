"""What an instance logs once a start, though each of its workers sees it."""

from pathlib import Path

from flaskapp.config import shared_numbers


class FirstOfWorkers:
    """Says once, to one of the workers of this start, that it is the first that asks.

    Args:
        name: of the file that the workers share, where there are several. It is not there when they start.
    """

    def __init__(self, name: str) -> None:
        numbers = shared_numbers()
        self._shared = Path(numbers.directory) / f"{name}.told" if numbers else None
        self._was_asked = False

    def is_first(self) -> bool:
        """Whether neither this worker nor another asked before."""
        was_asked, self._was_asked = self._was_asked, True
        if was_asked or self._shared is None:
            return not was_asked
        try:
            self._shared.touch(exist_ok=False)
        except OSError as error:
            # Where no file can be made each worker logs it.
            return not isinstance(error, FileExistsError)
        return True
