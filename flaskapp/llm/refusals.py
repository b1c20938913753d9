"""What an upstream's error says, read from its status and its body, whichever of their many shapes it has.

An error comes as a status with a body, as the only content of a 200, or as the first event of a stream. The class of
the failure decides what the caller gets, and what is booked.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any

import orjson

from flaskapp.llm import (
    UpstreamBroken,
    UpstreamBusy,
    UpstreamError,
    UpstreamNotTaken,
    UpstreamRefused,
    UpstreamUnknownModel,
)

_MOST_WAIT_SECONDS = 31 * 86_400
"""A server that says to wait for longer is not believed."""
_OVERLOADED = 529
"""Anthropic's and others'."""
_TIMEOUTS = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.GATEWAY_TIMEOUT, 524}
"""There the model may have worked, and what it costs cannot be known."""
_REFUSED = {HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNPROCESSABLE_ENTITY}
_STATUS_OF_WORD = (
    (re.compile(r"rate_?limit|too_?many_?requests|quota|resource_?exhausted|throttl"), HTTPStatus.TOO_MANY_REQUESTS),
    (re.compile(r"overloaded|unavailable|engine_busy"), HTTPStatus.SERVICE_UNAVAILABLE),
    (re.compile(r"context_?(length|size|window)|invalid_?(request|argument)|bad_?request"), HTTPStatus.BAD_REQUEST),
    (re.compile(r"content_?(filter|policy)"), HTTPStatus.BAD_REQUEST),
)
"""Errors that come without a status name their kind."""
_TOO_LONG = re.compile(
    r"context[_ -]?(length|size|window|limit)|maximum (prompt|model|input) (length|tokens)|max(imum)? context"
    r"|(prompt|input|request|conversation|message)s? (is|are|was|were) too long|too many (input |prompt )?tokens"
    r"|string_above_max_length|maximum number of (input |prompt )?tokens|reduce the length of"
    r"|maximum (allowed )?(number of )?tokens allowed|(exceed|longer than|greater than|above)[^.]{0,60}"
    r"(context|max[a-z_ ]{0,20}(model|input|prompt|sequence)[a-z_ ]{0,20}(len|tokens))"
    r"|exceeds? the (input|prompt) (token )?limit",
    re.IGNORECASE,
)
_NOT_TOO_LONG = re.compile(r"per (min|day|hour)|\b(tpm|tpd|rpm)\b|rate.?limit", re.IGNORECASE)
_NO_SUCH_MODEL = re.compile(
    r"model_?not_?found|(model|deployment)\b.{0,120}(not (found|exist|available)|does not exist|unknown)"
    r"|(unknown|no such|invalid) (model|deployment)|deploymentnotfound",
    re.IGNORECASE | re.DOTALL,
)
_REFUSED_MODEL = re.compile(
    r"model_?not_?found|(unknown|no such|invalid) (model|deployment)( name| id|\s*[:'\"`=]|\.?$)|not a valid model"
    r"|(model|deployment)[: ]+(\S+ )?((is|was) )?(does not exist|doesn't exist|not found)",
    re.IGNORECASE,
)
"""Narrower than `_NO_SUCH_MODEL`: a server that has the model may refuse a request for other reasons that name it."""
_USED_UP = re.compile(r"insufficient_?(quota|balance|credit|fund)|billing|exceeded your current quota", re.IGNORECASE)
_NO_WORDS = re.compile(r"\s*[<{\[]")
"""A page, or JSON without a reason."""


def refusal(status: int, text: str, retry_after: str | None, now_us: int, clean: Callable[[str], str]) -> UpstreamError:
    """The failure for an error status, with the body `text` as far as it was read, and the header of that name.

    `clean` makes a text fit for one line, short and without our secrets.
    """
    detail, body = clean(text), error_body(text)
    if status in _TIMEOUTS:
        message = f"The model did not answer in time: its server says so with status {status}."
        return UpstreamBroken(message, detail=detail, timed_out=True, status=status)
    if status in _REFUSED:
        return _refused(status, text, body, clean)
    if status in {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE, _OVERLOADED}:
        return UpstreamBusy(
            is_rate_limited=status == HTTPStatus.TOO_MANY_REQUESTS,
            helps_to_wait=not _USED_UP.search(text),
            retry_after_seconds=_wait_seconds(retry_after, now_us),
            detail=detail,
            status=status,
        )
    if status == HTTPStatus.NOT_FOUND and _NO_SUCH_MODEL.search(text):
        return UpstreamUnknownModel("The model's server has no such model.", detail=detail, status=status)
    message = f"The model's server refused the request with status {status}."
    return UpstreamNotTaken(message, detail=detail, status=status)


def refusal_in_answer(text: str, now_us: int, clean: Callable[[str], str]) -> UpstreamError:
    """The failure for an error that came with the status 200, before any piece of an answer."""
    body = error_body(text)
    status = _status_in(body)
    # Nothing of an answer came, so the model's time is no reason to book anything.
    if status is None or status in _TIMEOUTS:
        return UpstreamNotTaken("The model's server reported an error.", detail=clean(text), status=status)
    return refusal(status, text, _wait_in(body), now_us, clean)


def error_body(text: str) -> dict[str, Any]:
    """An error's JSON object; empty where it is none. Google sends a list of one."""
    try:
        body = orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}
    if isinstance(body, list) and body:
        body = body[0]
    return body if isinstance(body, dict) else {}


def _refused(status: int, text: str, body: Mapping[str, Any], clean: Callable[[str], str]) -> UpstreamRefused:
    reason = next(_reasons(body), "" if _NO_WORDS.match(text) else text)
    reason = clean(reason) or f"status {status}, without a reason"
    is_too_long = bool(_TOO_LONG.search(text)) and not _NOT_TOO_LONG.search(reason)
    is_unknown_model = not is_too_long and any(
        _REFUSED_MODEL.search(words) for words in (reason, *_words_for_kind(body)) if isinstance(words, str)
    )
    return UpstreamRefused(
        reason, is_too_long=is_too_long, is_unknown_model=is_unknown_model, detail=clean(text), status=status
    )


def _reasons(body: Mapping[str, Any]) -> Iterator[str]:
    """The texts that may be the reason, the best first."""
    error = body.get("error")
    inner = error if isinstance(error, dict) else body
    metadata = inner.get("metadata")
    # OpenRouter's own message only says that a provider failed.
    raw = metadata.get("raw") if isinstance(metadata, dict) else None
    if isinstance(raw, str) and raw:
        yield next(_reasons(error_body(raw)), raw)
    for value in (inner.get("message"), inner.get("detail"), inner.get("msg"), error, body.get("errors")):
        text = _text_of(value)
        if text:
            yield text


def _text_of(value: object) -> str:
    """A reason: a text, or a list of what validation libraries write."""
    if isinstance(value, str):
        # Some servers put the JSON of a server behind them into a text.
        return next(_reasons(error_body(value)), value) if value.startswith("{") else value
    if isinstance(value, list):
        return "; ".join(filter(None, map(_text_of, value[:3])))
    if not isinstance(value, dict):
        return ""
    where, words = (
        value.get("loc"),
        value.get("msg") or value.get("message") or value.get("detail") or value.get("type"),
    )
    place = ".".join(str(part) for part in where) if isinstance(where, list) else ""
    return f"{place}: {words}" if place and isinstance(words, str) else _text_of(words)


def _status_in(body: Mapping[str, Any]) -> int | None:
    """The status that an error names, as a number or by its kind."""
    words = _words_for_kind(body)
    for word in words:
        number = int(word) if isinstance(word, str) and re.fullmatch("[45][0-9][0-9]", word) else word
        if type(number) is int and HTTPStatus.BAD_REQUEST <= number < 600:  # noqa: PLR2004 (no status is larger)
            return number
    kinds = " ".join(word.lower() for word in words if isinstance(word, str))
    return next((status for pattern, status in _STATUS_OF_WORD if pattern.search(kinds)), None)


def _words_for_kind(body: Mapping[str, Any]) -> list[Any]:
    """What an error has beside its reason."""
    error = body.get("error")
    inner = error if isinstance(error, dict) else body
    return [inner.get(name) for name in ("code", "status", "status_code", "http_status", "type")]


def _wait_in(body: Mapping[str, Any]) -> str | None:
    error = body.get("error")
    metadata = error.get("metadata") if isinstance(error, dict) else None
    headers = metadata.get("headers") if isinstance(metadata, dict) else None
    value = headers.get("Retry-After") if isinstance(headers, dict) else None
    return str(value) if isinstance(value, str | int) else None


def _wait_seconds(retry_after: str | None, now_us: int) -> int | None:
    """Whole seconds, rounded up, at least 1; None for what cannot be read."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            until = parsedate_to_datetime(retry_after)
        except ValueError:
            return None
        seconds = until.replace(tzinfo=until.tzinfo or UTC).timestamp() - now_us / 1_000_000
    if not -_MOST_WAIT_SECONDS < seconds <= _MOST_WAIT_SECONDS:
        return None
    return max(1, -int(-seconds // 1))
