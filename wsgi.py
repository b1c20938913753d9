"""What gunicorn and `flask --app wsgi` load: the application as `app`."""

import sys

from backends.errors import ConfigurationError
from flaskapp.factory import create_app

try:
    app = create_app()
except ConfigurationError as error:
    print(error, file=sys.stderr)  # noqa: T201 - the operator's one line, before there is a log
    sys.exit(1)
