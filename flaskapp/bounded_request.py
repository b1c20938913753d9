"""A body that is longer than it may be is refused, also where nothing announced its length."""

from typing import Any

from flask import Request
from werkzeug.exceptions import RequestEntityTooLarge


class BoundedRequest(Request):
    """`get_data` raises where the library would cut the body off at the maximum and say nothing."""

    def get_data(self, *args: Any, **options: Any) -> Any:  # the library's own signature
        """The whole body.

        Raises:
            RequestEntityTooLarge: it has more than `max_content_length` bytes.
        """
        body = super().get_data(*args, **options)
        ended_by_maximum = self.content_length is None and len(body) == self.max_content_length
        if ended_by_maximum and self.environ["wsgi.input"].read(1):
            raise RequestEntityTooLarge
        return body
