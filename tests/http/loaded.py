"""The service, with a route that tells which modules its worker has loaded. For `test_loaded.py` only."""

import sys

from wsgi import app


@app.get("/loaded")
def loaded() -> list[str]:
    return sorted(sys.modules)


__all__ = ["app"]
