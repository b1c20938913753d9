"""The service: all that knows HTTP. `create_app` makes the application."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flaskapp.factory import create_app

__all__ = ["create_app"]


def __getattr__(name: str) -> Any:  # any attribute of a module (PEP 562)
    """Import the application's parts only for `create_app`: a small module of this package needs no Flask."""
    if name != "create_app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flaskapp.factory import create_app  # noqa: PLC0415 (see above)

    return create_app
