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
CONFIGURATION = (_PACKAGE if _IS_PACKAGED else _PACKAGE.parent) / "gunicorn.conf.py"
APPLICATION = "flaskapp.wsgi" if _IS_PACKAGED else "wsgi"

USAGE = """\
llm-tollgate serve [OPTIONS OF GUNICORN]   serves, as the environment says
llm-tollgate COMMAND [ARGS]...             is `flask --app wsgi COMMAND`:

"""


def main() -> NoReturn:
    """Become gunicorn (`serve`, with any of its options), or `flask` for every other command."""
    words = sys.argv[1:] or ["--help"]
    if words[:1] == ["serve"]:
        _become("gunicorn", "--config", str(CONFIGURATION), *words[1:], f"{APPLICATION}:app")
    if words == ["--help"]:
        sys.stdout.write(USAGE)
        sys.stdout.flush()
    _become("flask", "--app", APPLICATION, *words)


def _become(module: str, *words: str) -> NoReturn:
    os.execv(sys.executable, [sys.executable, "-m", module, *words])  # noqa: S606 - ourselves, with the caller's words
