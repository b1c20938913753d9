"""The command `llm-tollgate` of the installed package: `serve`, and what `flask` has for an operator.

It needs no checkout: the wheel holds the application and gunicorn's configuration.
"""

import os
import sys
from pathlib import Path
from typing import NoReturn

_PACKAGE = Path(__file__).resolve().parents[1]
_IS_PACKAGED = (_PACKAGE / "gunicorn.conf.py").is_file()
"""Whether this is a wheel; in a checkout both files lie beside the package."""
_PLACE = _PACKAGE if _IS_PACKAGED else _PACKAGE.parent
APPLICATION = "flaskapp.wsgi:app" if _IS_PACKAGED else "wsgi:app"

USAGE = """\
llm-tollgate serve [OPTIONS OF GUNICORN]   serves, as the environment says
llm-tollgate COMMAND [ARGS]...             is `flask --app wsgi COMMAND`:

"""


def main() -> NoReturn:
    """Become gunicorn (`serve`, with any of its options), or `flask` for every other command."""
    words = sys.argv[1:] or ["--help"]
    if words[:1] == ["serve"]:
        _become("gunicorn", "--config", str(_PLACE / "gunicorn.conf.py"), *words[1:], APPLICATION)
    if words == ["--help"]:
        sys.stdout.write(USAGE)
        sys.stdout.flush()
    _become("flask", "--app", str(_PLACE / "wsgi.py"), *words)


def _become(module: str, *words: str) -> NoReturn:
    # -P: nothing of the directory in which it is called, which may be a checkout, is imported in place of the package.
    os.execv(sys.executable, [sys.executable, "-P", "-m", module, *words])  # noqa: S606 - ourselves, with the caller's words
