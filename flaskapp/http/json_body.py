"""JSON bodies of all routes: they are read strictly, and refused with the place and the reason."""

import secrets

from flask import Request, current_app
from pydantic import ValidationError

from flaskapp.http.refusals import InvalidRequest
from flaskapp.strict_json import MOST_STRUCTURE, StrictJsonError, loads, refuse_much_structure

CHOICE = f"<{secrets.token_hex(8)}>"
"""What the tags of unions begin with. No caller can know it, so no name in a body is taken for a tag."""
_PLACE_CHARACTERS = 200
NO_NAME = '""'
"""How a field is called whose name is empty."""
_WORDS = {
    "extra_forbidden": "is not known here",
    "missing": "is missing",
    "int_type": "has to be a whole number, in digits and at most 18 of them",
    "string_type": "has to be text",
    "bool_type": "has to be true or false",
    "list_type": "has to be a list",
    "dict_type": "has to be an object",
    "model_type": "has to be an object",
    "too_long": "may have at most {max_length} items",
    "too_short": "needs at least {min_length} items",
    "string_too_long": "may have at most {max_length} characters",
    "string_too_short": "needs at least {min_length} characters",
    "greater_than_equal": "has to be at least {ge}",
    "less_than_equal": "may be at most {le}",
}
"""In place of the validation's own words that are for the programmer, and not for the client."""


def read_json_object(request: Request) -> dict[str, object]:
    """The body of `request`; numbers with a fraction are `Decimal`.

    Raises:
        InvalidRequest: 400, 408, 413, 415 or 422: not strict JSON, too slow, too long, of another media type, or not an
            object.
    """
    if request.mimetype != "application/json":
        raise InvalidRequest(415, "Content-Type", "has to be application/json")
    try:
        text = request.get_data()
        if len(text) > MOST_STRUCTURE:
            current_app.extensions["tollgate"].bodies.take_turn()
            refuse_much_structure(text)
        content = loads(text)
    except StrictJsonError as error:
        raise InvalidRequest(400, "body", str(error)) from error
    if not isinstance(content, dict):
        raise InvalidRequest(422, "body", "has to be a JSON object")
    return content


def not_usable(error: ValidationError) -> InvalidRequest:
    """The first error, as a 422. The tags of unions are parts of its place that are left out."""
    first = error.errors(include_url=False, include_input=False)[0]
    parts = [part for part in first["loc"] if not str(part).startswith(CHOICE)]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part or NO_NAME}" for part in parts)
    words = _WORDS.get(first["type"])
    reason = words.format_map(first.get("ctx", {})) if words else first["msg"][:1].lower() + first["msg"][1:200]
    return InvalidRequest(422, place.removeprefix(".")[:_PLACE_CHARACTERS] or "body", reason)
