"""``GET /api/v1/auth/challenge``: a challenge for one hash from one network."""

from collections.abc import Callable

from flask import Blueprint, Response, json, request

from backends.errors import StoreBusy, StoreError
from flaskapp.http.challenges import CHALLENGE_SECONDS, Challenges
from flaskapp.http.identity import HEADER, identify
from flaskapp.http.refusals import THROTTLE_UNAVAILABLE, InvalidRequest, problem

ROUTE = "/api/v1/auth/challenge"


def make_challenge_route(challenges: Challenges, is_closed_on_error: Callable[[], bool]) -> Blueprint:
    """The blueprint ``challenge``."""
    blueprint = Blueprint("challenge", __name__)

    @blueprint.get(ROUTE)
    def give() -> Response:
        who = identify(request)
        if not who.has_fingerprint or who.challenge is not None:
            raise InvalidRequest(400, HEADER, "has to be <hash>, 1 to 128 of A-Z a-z 0-9 _ -")
        try:
            challenge = challenges.give(who.identifier, who.network)
        except StoreError as error:
            if isinstance(error, StoreBusy) or is_closed_on_error():
                message = "No challenge can be given now. Please try again."
                return problem(503, THROTTLE_UNAVAILABLE, "store", message, retry_after_seconds=1)
            # While Redis is away it is not checked either; once Redis is back the client has to get another.
            challenge = challenges.draw()
        body = json.dumps({"challenge": challenge, "expires_in_seconds": CHALLENGE_SECONDS}, sort_keys=False)
        return Response(body + "\n", mimetype="application/json", headers={"Cache-Control": "no-store"})

    return blueprint
