"""What a caller gets of an upstream's failure: status, words, and how long to wait."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from flask import Response

from backends.money import usd_text
from flaskapp.http.refusals import UPSTREAM_BUSY, UPSTREAM_ERROR, UPSTREAM_REFUSED, problem
from flaskapp.llm import UpstreamBroken, UpstreamBusy, UpstreamError, UpstreamRefused, UpstreamUnknownModel

TOO_LONG = "context_length_exceeded"
_UNKNOWN_MODEL = "model_not_found"


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed answer in the words of the contract."""

    status: int
    """What it has where the answer has not begun."""
    error: str
    reason: str
    message: str
    retry_after_seconds: int | None = None
    extra: Mapping[str, object] = field(default_factory=dict)
    """Further fields: the upstream's status, and OpenAI's `code` where that has one for the same error."""

    def response(self, cost_nanousd: int, headers: Mapping[str, str]) -> Response:
        """The problem, where nothing of the answer was sent yet."""
        return problem(
            self.status,
            self.error,
            self.reason,
            self.message,
            retry_after_seconds=self.retry_after_seconds,
            headers=headers,
            extra={"cost_usd": usd_text(cost_nanousd), **self.extra},
        )


def failure_of(error: UpstreamError) -> Failure:
    """The failure for an upstream's error."""
    extra = {} if error.status is None else {"upstream_status": error.status}
    if isinstance(error, UpstreamRefused):
        return _refused(error, extra)
    if isinstance(error, UpstreamBusy):
        status, reason = (429, "rate_limit") if error.is_rate_limited else (503, "overloaded")
        reason = reason if error.helps_to_wait else "quota"
        return Failure(status, UPSTREAM_BUSY, reason, str(error), error.retry_after_seconds, extra)
    if isinstance(error, UpstreamUnknownModel):
        return Failure(502, UPSTREAM_ERROR, "not_taken", str(error), None, {**extra, "code": _UNKNOWN_MODEL})
    if isinstance(error, UpstreamBroken):
        status, reason = (504, "timeout") if error.timed_out else (502, "broken")
        return Failure(status, UPSTREAM_ERROR, reason, str(error), None, extra)
    return Failure(502, UPSTREAM_ERROR, "not_taken", str(error), None, extra)


def _refused(error: UpstreamRefused, extra: Mapping[str, object]) -> Failure:
    if error.is_unknown_model:
        extra = {**extra, "code": _UNKNOWN_MODEL}
    if not error.is_too_long:
        return Failure(400, UPSTREAM_REFUSED, error.reason, str(error), None, extra)
    # Clients look for these words to know that they have to shorten a conversation.
    message = f"This model's maximum context length is exceeded: {error.reason}"
    return Failure(400, UPSTREAM_REFUSED, TOO_LONG, message, None, {**extra, "code": TOO_LONG})
